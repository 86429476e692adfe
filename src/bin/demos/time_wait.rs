//! Who closes first keeps TIME_WAIT, and a server that did cannot bind its port again for a minute.
//!
//! The state is there so that a late segment of this connection cannot be taken for one of the next,
//! and so that a lost last ACK can be sent again. SO_REUSEADDR tells bind that it does not matter:
//! a listener has no connection yet that could be confused. A line on standard input for each step.
//!
//! ```text
//!   --close first    accept --> pause --> close              FIN, then the client's: TIME-WAIT here
//!   --close second   accept --> recv 0 --> pause --> close   the client's FIN first: TIME-WAIT there
//!
//!   then: close(listener) --> socket --> bind: EADDRINUSE --> listen: at another port
//!                             socket, SO_REUSEADDR --> bind --> listen
//! ```
//!
//! What to notice: SO_REUSEADDR helps only if the old server had set it, too: the socket in
//! TIME_WAIT remembers (time_wait.rs). And a server that does not look at what bind answers listens
//! all the same, at a port of the kernel's choice.
//! Break it: `--old-without`: now neither attempt gets the port until the minute is over.
//! Compare: reuse.rs, against listeners and living connections; states.rs; rst.rs, no TIME_WAIT.
//! Run: cargo run --bin time-wait-demo          then: cargo run --bin peer -- connect recv close
//! See: socket(7) SO_REUSEADDR, bind(2), listen(2); RFC 9293 3.6; UNP 2.7, 7.5; TLPI 61.6.7, 61.10.

use std::net::SocketAddr;
use std::os::fd::AsRawFd;

use clap::{Parser, ValueEnum};
use nix::sys::socket::{Backlog, MsgFlags, SockaddrStorage, bind, getsockname, listen, recv};
use serverlab::event;
use serverlab::net::listen::{accept, name, open, start_listening};
use serverlab::net::{self, args::ListenAt, options::SO_REUSEADDR};

/// Serves and ends, then starts again at the same port
#[derive(Parser)]
#[command(version)]
struct Args {
    #[command(flatten)]
    at: ListenAt,
    /// When to close a connection
    #[arg(long, value_enum, default_value = "first")]
    close: Turn,
    /// How many connections to take
    #[arg(long, default_value_t = 1, value_name = "N")]
    connections: u32,
    /// Leave SO_REUSEADDR off in the first place
    #[arg(long)]
    old_without: bool,
}

#[derive(ValueEnum, Clone, Copy, PartialEq)]
enum Turn {
    First,
    Second,
}

fn main() -> net::Result {
    let args = Args::parse();
    net::event::start("time-wait-demo", false);
    let address = args.at.address();

    let listener = open(address)?; // with SO_REUSEADDR, which its connections inherit
    SO_REUSEADDR.set(&listener, (!args.old_without).into())?;
    bind(listener.as_raw_fd(), &SockaddrStorage::from(address))?;
    start_listening(&listener, 128)?;
    let mut connections = Vec::new();
    for _ in 0..args.connections {
        let (connection, peer) = accept(&listener)?;
        event!("accepted", peer = peer, fd = connection.as_raw_fd());
        connections.push(connection);
    }
    if args.close == Turn::Second {
        for connection in &connections {
            while recv(connection.as_raw_fd(), &mut [0; 100], MsgFlags::empty())? > 0 {}
        }
    }
    net::pause();
    drop(connections);
    drop(listener);
    event!("closed", what = "all");
    net::pause(); // whose are the rows of ss -tan now?

    start_again(address, false)?;
    start_again(address, true)?;
    Ok(())
}

fn start_again(address: SocketAddr, reuse: bool) -> net::Result {
    let socket = open(address)?;
    SO_REUSEADDR.set(&socket, reuse.into())?;
    event!("set", option = "SO_REUSEADDR", value = i32::from(reuse));
    match bind(socket.as_raw_fd(), &SockaddrStorage::from(address)) {
        Ok(()) => event!("bound", local = address),
        Err(errno) => event!("failed", call = "bind", errno = name(errno)),
    }
    listen(&socket, Backlog::new(128)?)?;
    let address: SockaddrStorage = getsockname(socket.as_raw_fd())?;
    event!("listening", address = address);
    Ok(())
}
