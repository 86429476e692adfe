//! Accept returns when there is data to read, not when the handshake ends: TCP_DEFER_ACCEPT.
//!
//! A server whose clients speak first need not be woken before they have spoken. The kernel ignores
//! the acknowledgement that ends the handshake and lets the first data end it.
//!
//! ```text
//!   client   connect --> ESTABLISHED .......... send "x"
//!   wire     SYN, SYN-ACK, ACK (ignored)          |
//!   kernel   SYN-RECEIVED ........................+--> ESTABLISHED
//!   demo     TCP_DEFER_ACCEPT --> listen --> accept .......... returns --> recv: at once
//! ```
//!
//! What to notice: the two ends do not agree: the client is connected, the server has half a
//! handshake, and no descriptor is spent on it. When the time is over the kernel sends its SYN-ACK
//! again, and accept returns for a client that has said nothing (flow_control.rs).
//! Break it: `--seconds 0` leaves the option out: accept returns first, and recv finds nothing.
//! Compare: iterative.rs, which a silent client stops for good; fastopen.rs, data in the SYN.
//! Run: cargo run --bin defer-accept-demo
//! then: cargo run --bin peer -- connect pause send:7       and: ss -tan 'sport = 2000'
//! See: tcp(7) TCP_DEFER_ACCEPT, accept(2).

use std::os::fd::AsRawFd;

use clap::Parser;
use nix::sys::socket::{MsgFlags, recv};
use serverlab::event;
use serverlab::net::listen::{accept, bind, name, open, start_listening};
use serverlab::net::options::TCP_DEFER_ACCEPT;
use serverlab::net::{self, args::ListenAt};

/// Takes one connection, and looks whether its data is there already
#[derive(Parser)]
#[command(version)]
struct Args {
    #[command(flatten)]
    at: ListenAt,
    /// How long accept may wait for data; the kernel rounds to its own steps: 1, 3, 7 ...
    #[arg(long, default_value_t = 30)]
    seconds: i32,
}

fn main() -> net::Result {
    let args = Args::parse();
    net::event::start("defer-accept-demo", false);
    let listener = open(args.at.address())?;
    if args.seconds > 0 {
        TCP_DEFER_ACCEPT.set(&listener, args.seconds)?;
        let steps = TCP_DEFER_ACCEPT.get(&listener)?;
        event!("set", option = "TCP_DEFER_ACCEPT", seconds = steps);
    }
    bind(&listener, args.at.address())?;
    start_listening(&listener, 128)?;

    let (connection, peer) = accept(&listener)?;
    event!("accepted", peer = peer, fd = connection.as_raw_fd());
    match recv(connection.as_raw_fd(), &mut [0; 4096], MsgFlags::MSG_DONTWAIT) {
        Ok(count) => event!("received", bytes = count),
        Err(errno) => event!("failed", call = "recv", errno = name(errno)), // EAGAIN: none yet
    }
    Ok(())
}
