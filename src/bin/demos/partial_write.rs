//! A non-blocking send takes a part and says so; the loop that sends the rest.
//!
//! A send takes what there is room for and returns how much that was. A blocking one waits until all
//! is taken; a non-blocking one never waits, so a large message needs a loop, and poll to know when
//! to go on.
//!
//! ```text
//!   demo   connect --> O_NONBLOCK
//!          --how once   send(all) = a part ---------------------------------> close
//!          --how loop   send(all) = a part --> send(rest): EAGAIN --> poll(POLLOUT) --> send(rest) ...
//!                                                                        |
//!   peer   accept --> recv ... ------------------------------------------+ the window opens
//! ```
//!
//! What to notice: with `--how once` nobody fails: each call succeeds, the connection ends in good
//! order, and the peer has a part of the message that looks like all of it (flow_control.rs).
//! Break it: leave poll out: the loop works, and spins at full speed until the peer reads.
//! Compare: slow_reader.rs, where what was taken waits; net/connection.rs, the same loop in a server
//! that must not stop for one client.
//! Run: cargo run --bin peer -- listen accept pause recv-all
//! then: cargo run --bin partial-write-demo -- --how once
//! See: send(2), poll(2), fcntl(2) O_NONBLOCK; UNP 3.9, 16.2; TLPI 61.1, 63.1.2.

use std::net::TcpStream;
use std::os::fd::{AsFd, AsRawFd};

use anyhow::Context as _;
use clap::{Parser, ValueEnum};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, send};
use serverlab::event;
use serverlab::net::{self, args::ConnectTo, listen::name, script::events};

/// Sends more than a socket has room for, without blocking
#[derive(Parser)]
#[command(version)]
struct Args {
    #[command(flatten)]
    to: ConnectTo,
    /// What to do about the rest
    #[arg(long, value_enum, default_value = "loop")]
    how: How,
    /// Length of the message
    #[arg(long, default_value_t = 20_000_000)]
    bytes: usize,
}

#[derive(ValueEnum, Clone, Copy)]
enum How {
    Once,
    Loop,
}

fn main() -> net::Result {
    let args = Args::parse();
    net::event::start("partial-write-demo", false);
    let connection = TcpStream::connect(args.to.address()).context("cannot connect")?;
    event!("connected", peer = args.to.address());
    connection.set_nonblocking(true)?; // O_NONBLOCK; MSG_DONTWAIT would do it for one send
    let message = vec![b'x'; args.bytes];
    match args.how {
        How::Once => {
            let taken = send(connection.as_raw_fd(), &message, MsgFlags::empty())?;
            event!("sent", bytes = taken, of = message.len()); // and what of the rest?
        }
        How::Loop => send_all(&connection, &message)?,
    }
    drop(connection); // close(2): what was taken is sent, then the FIN
    event!("closed");
    Ok(())
}

fn send_all(connection: &TcpStream, message: &[u8]) -> net::Result {
    let mut rest = message;
    while !rest.is_empty() {
        match send(connection.as_raw_fd(), rest, MsgFlags::empty()) {
            Ok(taken) => {
                event!("sent", bytes = taken, of = rest.len());
                rest = &rest[taken..];
            }
            Err(Errno::EAGAIN) => {
                event!("failed", call = "send", errno = name(Errno::EAGAIN));
                let mut fds = [PollFd::new(connection.as_fd(), PollFlags::POLLOUT)];
                poll(&mut fds, PollTimeout::NONE)?; // a good part of the buffer is free again
                let revents = fds[0].revents().map_or(0, |revents| revents.bits());
                event!("polled", revents = events(revents));
            }
            Err(errno) => return Err(errno.into()), // the peer is gone: poll told POLLERR, too
        }
    }
    Ok(())
}
