//! To shut down reading tells nobody: `shutdown(SHUT_RD)`, and the peer goes on sending.
//!
//! TCP has a segment for "I send no more", the FIN, and none for "I read no more". On Linux the call
//! marks the socket, so that recv does not wait; what comes later is taken and acknowledged as ever.
//!
//! ```text
//!   peer   connect                                   send "xxxxx"
//!   wire              (nothing)                      1:6, ACK
//!   demo   accept --> SHUT_RD --> recv 0 --> pause --> FIONREAD 5 --> recv 5 --> recv 0 --> close
//!                                            --leave   FIONREAD 5 --> close: RST
//! ```
//!
//! What to notice: recv returns 0, which says "the end", and then 5: data that came after the call is
//! delivered, where UNP has it thrown away. What is left unread makes a RST of close, as without the
//! call (flow_control.rs).
//! Break it: `shutdown:wr` by `peer`, the other half: a FIN tells of it.
//! Compare: rst.rs, the way to tell a peer that nobody listens; slow_reader.rs, to stop it by not
//! reading.
//! Run: cargo run --bin shutdown-read-demo
//! then: cargo run --bin peer -- connect pause send:5 recv
//! See: shutdown(2), recv(2); UNP 6.6; TLPI 61.2; RFC 2525 2.17.

use std::os::fd::AsRawFd;

use clap::Parser;
use nix::sys::socket::{MsgFlags, Shutdown, recv, shutdown};
use serverlab::event;
use serverlab::net::{self, args::ListenAt, listen::accept_one, options::FIONREAD, pause};

/// Takes one connection, shuts down reading, and reads
#[derive(Parser)]
#[command(version)]
struct Args {
    #[command(flatten)]
    at: ListenAt,
    /// Close without reading what has come
    #[arg(long)]
    leave: bool,
}

fn main() -> net::Result {
    let args = Args::parse();
    net::event::start("shutdown-read-demo", false);
    let connection = accept_one(args.at.address())?;
    let fd = connection.as_raw_fd();
    let mut buffer = [0; 4096];
    shutdown(fd, Shutdown::Read)?;
    event!("shut-down", how = "SHUT_RD");
    event!("received", bytes = recv(fd, &mut buffer, MsgFlags::empty())?); // 0, without waiting

    pause();
    event!("got", option = "FIONREAD", value = FIONREAD.get(&connection)?);
    if !args.leave {
        event!("received", bytes = recv(fd, &mut buffer, MsgFlags::empty())?); // what has come since
        event!("received", bytes = recv(fd, &mut buffer, MsgFlags::empty())?); // and again the end
    }
    drop(connection);
    event!("closed");
    Ok(())
}
