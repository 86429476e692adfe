//! `shutdown(SHUT_WR)` says that all is said, and listens; after `close` an answer meets a RST.
//!
//! Both send the same FIN: "no more from me". The server cannot tell one from the other, and
//! answers. Only then does it show: behind a closed socket nobody can read the answer, and TCP resets
//! the connection, to make it known that data was lost.
//!
//! ```text
//!   --how close      send --> close             FIN -->   <-- answer    RST -->
//!   --how shutdown   send --> shutdown(SHUT_WR) FIN -->   <-- answer    recv: 5, recv: 0 --> close
//! ```
//!
//! What to notice: the server's send succeeds in both cases; after the RST its next one fails with
//! EPIPE, or SIGPIPE ends it, for nothing that it has done wrong (overload.rs).
//! Break it: a server that sends nothing after the FIN: close does no harm.
//! Compare: orphan.rs, a server that never closes; rst.rs, a RST that is meant.
//! Run: cargo run --bin peer -- listen accept recv recv send:5 pause send:1     (then Enter)
//!      cargo run --bin half-close-demo -- --how close
//! See: shutdown(2), close(2); RFC 9293 3.6, 3.6.1; UNP 6.6; TLPI 61.2, 61.6.6.

use std::net::{Shutdown, TcpStream};
use std::os::fd::AsRawFd;

use anyhow::Context as _;
use clap::{Parser, ValueEnum};
use nix::sys::socket::{MsgFlags, recv, send};
use serverlab::event;
use serverlab::net::{self, args::ConnectTo};

/// Sends a request, says that it was the last, and reads the answer if it still can
#[derive(Parser)]
#[command(version)]
struct Args {
    #[command(flatten)]
    to: ConnectTo,
    /// How to say that there is no more to come
    #[arg(long, value_enum, default_value = "close")]
    how: How,
}

#[derive(ValueEnum, Clone, Copy)]
enum How {
    Close,
    Shutdown,
}

fn main() -> net::Result {
    let args = Args::parse();
    net::event::start("half-close-demo", false);
    let connection = TcpStream::connect(args.to.address()).context("cannot connect")?;
    event!("connected", peer = args.to.address());
    let fd = connection.as_raw_fd();
    event!("sent", bytes = send(fd, b"all\n", MsgFlags::MSG_NOSIGNAL)?);

    if let How::Shutdown = args.how {
        connection.shutdown(Shutdown::Write)?;
        event!("shut-down", how = "SHUT_WR");
        let mut answer = [0; 1024];
        loop {
            let bytes = recv(fd, &mut answer, MsgFlags::empty())?;
            event!("received", bytes = bytes);
            if bytes == 0 {
                break; // the server's FIN: it has said all, too
            }
        }
    }
    drop(connection); // close(2): with --how close, the FIN; otherwise the FIN went long before
    event!("closed");
    Ok(())
}
