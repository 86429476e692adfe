//! What an accepted socket has of its listener: its options, and none of its flags.
//!
//! ```text
//!   socket --> setsockopt ... --> bind --> listen --> fcntl O_NONBLOCK, FD_CLOEXEC
//!                                            |
//!                      poll --> accept ------+--> getsockopt, fcntl: of both, side by side
//! ```
//!
//! What to notice: options are copied from the listener; O_NONBLOCK and close-on-exec are not, since
//! they belong to the open file and to the descriptor, which accept makes anew (states.rs). The copy
//! is made when the handshake ends: what is set between that and accept comes too late. A receive
//! buffer must be set on the listener: it decides about the window scale, which the SYN-ACK tells.
//! Break it: `--linger 0`: now every connection of this server ends with a RST.
//! Compare: net/listen.rs, accept4 with the flags; rst.rs, SO_LINGER on each connection.
//! Run: cargo run --bin accept-inherits-demo    then: cargo run --bin peer -- connect recv
//! See: accept(2), accept4(2), socket(7), tcp(7); UNP 7.4; TLPI 61.11.
#![allow(unsafe_code, reason = "nix's accept returns a number, not an owner")]

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use clap::Parser;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{accept, getsockopt, setsockopt, sockopt};
use serverlab::event;
use serverlab::net::listen::{bind, open, start_listening};
use serverlab::net::options::{
    SO_KEEPALIVE, SO_RCVBUF, SocketOption, TCP_KEEPIDLE, TCP_NODELAY, TCP_USER_TIMEOUT,
};
use serverlab::net::{self, args::ListenAt};

/// What the listener is given: no value that a new socket has anyway.
const OPTIONS: [(SocketOption, i32); 5] = [
    (TCP_NODELAY, 1),
    (SO_KEEPALIVE, 1),
    (TCP_KEEPIDLE, 77),
    (TCP_USER_TIMEOUT, 9000),
    (SO_RCVBUF, 50_000), // the kernel doubles it
];

/// Accepts one connection and tells what it has of its listener
#[derive(Parser)]
#[command(version)]
struct Args {
    #[command(flatten)]
    at: ListenAt,
    /// SO_LINGER of the listener
    #[arg(long, default_value_t = 5, value_name = "SECONDS")]
    linger: i32,
}

fn main() -> net::Result {
    let args = Args::parse();
    net::event::start("accept-inherits-demo", false);
    let listener = open(args.at.address())?;
    for (option, value) in OPTIONS {
        option.set(&listener, value)?;
    }
    let linger = libc::linger { l_onoff: 1, l_linger: args.linger };
    setsockopt(&listener, sockopt::Linger, &linger)?;
    bind(&listener, args.at.address())?;
    start_listening(&listener, 128)?;
    fcntl(&listener, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    fcntl(&listener, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;

    poll(&mut [PollFd::new(listener.as_fd(), PollFlags::POLLIN)], PollTimeout::NONE)?;
    let fd = accept(listener.as_raw_fd())?; // accept(2) itself; accept4 would set flags
    // SAFETY: accept has just made this descriptor, and nobody else knows it.
    let connection = unsafe { OwnedFd::from_raw_fd(fd) };
    event!("accepted", fd = fd);

    for (option, _) in OPTIONS {
        compare(option.name, option.get(&listener)?, option.get(&connection)?);
    }
    let seconds = |socket: BorrowedFd<'_>| getsockopt(&socket, sockopt::Linger).map(|l| l.l_linger);
    compare("SO_LINGER", seconds(listener.as_fd())?, seconds(connection.as_fd())?);
    let nonblock = |socket: BorrowedFd<'_>| {
        let flags = OFlag::from_bits_retain(fcntl(socket, FcntlArg::F_GETFL)?);
        Ok::<_, Errno>(flags.contains(OFlag::O_NONBLOCK).into())
    };
    compare("O_NONBLOCK", nonblock(listener.as_fd())?, nonblock(connection.as_fd())?);
    let cloexec = |socket: BorrowedFd<'_>| fcntl(socket, FcntlArg::F_GETFD);
    compare("FD_CLOEXEC", cloexec(listener.as_fd())?, cloexec(connection.as_fd())?);
    Ok(())
}

fn compare(what: &str, listener: i32, connection: i32) {
    event!("got", option = what, listener = listener, connection = connection);
}
