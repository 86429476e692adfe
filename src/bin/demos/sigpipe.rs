//! SIGPIPE: who writes to a connection that was reset dies of it, unless told otherwise.
//!
//! The connection's error is reported once, to whoever asks first; after that it is a pipe that
//! nobody reads, and each write to it is answered with SIGPIPE, whose default action ends the
//! process, and EPIPE, for those who live to see it.
//!
//! ```text
//!   demo   1. connect --> 2. poll: POLLERR, the RST is here
//!          3. --first read:   recv ECONNRESET, recv 0, send EPIPE, and SIGPIPE
//!             --first write:  send ECONNRESET,         send EPIPE, and SIGPIPE
//!   rst-server   accept, SO_LINGER{1,0}, close
//! ```
//!
//! What to notice: the first send to a reset connection fails with ECONNRESET and raises nothing,
//! unless a recv has taken the error before it (sigpipe.rs in tests). A shell shows 141 = 128 + 13.
//! Break it: Rust hides the subject twice. It starts with SIGPIPE ignored, so `--sigpipe default`
//! sets SIG_DFL; and its TcpStream sends with MSG_NOSIGNAL, so this program calls send(2) itself.
//! Compare: rst.rs, the other side; peer.rs, any other order of calls.
//! Run: cargo run --bin rst-server              then: cargo run --bin sigpipe-demo; echo $?
//! See: send(2) MSG_NOSIGNAL, signal(7), pipe(7); UNP 5.12-5.13; TLPI 44.2, 61.3.
#![allow(unsafe_code, reason = "sets what SIGPIPE does")]

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd};

use anyhow::{Context as _, anyhow};
use clap::Parser;
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::signal::{Signal, signal};
use nix::sys::socket::{MsgFlags, recv, send};
use serverlab::event;
use serverlab::net::{
    self,
    listen::name,
    script::{SigPipe, events},
};

/// Writes to a connection that rst-server has reset, and shows what SIGPIPE makes of it
#[derive(Parser)]
#[command(version)]
struct Args {
    /// Address of rst-server
    #[arg(short = 'i', long, default_value_t = Ipv4Addr::LOCALHOST.into(), value_name = "ADDRESS")]
    host: IpAddr,
    /// Port of rst-server
    #[arg(short, long, default_value_t = 2000)]
    port: u16,
    /// What SIGPIPE does
    #[arg(long, value_enum, default_value = "default")]
    sigpipe: SigPipe,
    /// Send with MSG_NOSIGNAL
    #[arg(long)]
    no_signal: bool,
    /// Which call meets the reset first
    #[arg(long, value_enum, default_value = "read")]
    first: First,
}

#[derive(clap::ValueEnum, Clone, Copy, PartialEq)]
enum First {
    Read,
    Write,
}

fn main() -> net::Result {
    let args = Args::parse();
    net::event::start("sigpipe-demo", false);
    // SAFETY: neither SIG_DFL nor SIG_IGN runs code of ours.
    unsafe { signal(Signal::SIGPIPE, args.sigpipe.into()) }?;
    let flags = if args.no_signal { MsgFlags::MSG_NOSIGNAL } else { MsgFlags::empty() };

    // 1. The handshake succeeds: rst-server resets the connection only after accept.
    let address = SocketAddr::new(args.host, args.port);
    let connection = std::net::TcpStream::connect(address)
        .with_context(|| format!("cannot connect to {address}: is rst-server running there?"))?;
    event!("connected", peer = address, local = connection.local_addr()?);

    // 2. Asked for no event at all, poll(2) still reports POLLERR and POLLHUP: the reset.
    let mut fds = [PollFd::new(connection.as_fd(), PollFlags::empty())];
    let seen = poll(&mut fds, 5000u16)?;
    if seen == 0 {
        return Err(anyhow!("no reset from {address} within 5 s: is it rst-server?").into());
    }
    event!("polled", revents = events(fds[0].revents().map_or(0, |revents| revents.bits())));

    // 3. The error is told once. What comes after it is the end to a reader, EPIPE to a writer.
    let fd = connection.as_raw_fd();
    let calls = ["recv", "recv", "send", "send"];
    for call in &calls[if args.first == First::Read { 0 } else { 2 }..] {
        let (done, result) = match *call {
            "recv" => ("received", recv(fd, &mut [0; 16], MsgFlags::empty())),
            _ => ("sent", send(fd, b"x", flags)), // with SIG_DFL, the last call of this life
        };
        match result {
            Ok(count) => event!(done, bytes = count),
            Err(errno) => event!("failed", call = call, errno = name(errno)),
        }
    }
    Ok(())
}
