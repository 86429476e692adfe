//! Is anybody there? SO_KEEPALIVE asks a silent peer, and gives up after so many unanswered probes.
//!
//! A probe is an empty segment with a number that has been acknowledged already: whoever has the
//! connection must answer it with an ACK. The defaults are two hours of silence, then nine probes,
//! 75 s apart; three options set them for one socket.
//!
//! ```text
//!   client    connect --> TCP_KEEPIDLE=1, TCP_KEEPINTVL=1, TCP_KEEPCNT=2, SO_KEEPALIVE=1 --> recv
//!   alive     1 s: probe --> ACK,  1 s: probe --> ACK ...        recv waits, for ever if need be
//!   crashed   1 s: probe --> RST                                 recv: ECONNRESET
//!   away      1 s: probe, 1 s: probe, 1 s: RST                   recv: ETIMEDOUT
//! ```
//!
//! What to notice: the programs learn nothing of probes that are answered, and without `recv` or
//! `poll` nothing of those that are not; idle + count x interval is how long it takes
//! (dead_peer.rs).
//! Break it: `--off`: with the peer crashed or away, recv waits for ever.
//! Compare: user_timeout.rs, for a peer that is spoken to; half_open.rs, the crash.
//! Run: sudo target/*/debug/half-open-demo crash        then: cargo run --bin keepalive-demo
//! See: socket(7) SO_KEEPALIVE, tcp(7) TCP_KEEPIDLE; RFC 9293 3.8.4; RFC 1122 4.2.3.6; UNP 7.5.

use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::time::Instant;

use anyhow::Context as _;
use clap::Parser;
use nix::sys::socket::{MsgFlags, recv, send};
use serverlab::event;
use serverlab::net::listen::name;
use serverlab::net::options::{SO_KEEPALIVE, TCP_KEEPCNT, TCP_KEEPIDLE, TCP_KEEPINTVL};
use serverlab::net::{self, args::ConnectTo};

/// Connects and says nothing, to a peer that may be gone
#[derive(Parser)]
#[command(version)]
struct Args {
    #[command(flatten)]
    to: ConnectTo,
    /// Silence before the first probe
    #[arg(long, default_value_t = 1, value_name = "SECONDS")]
    idle: i32,
    /// Time between probes
    #[arg(long, default_value_t = 1, value_name = "SECONDS")]
    interval: i32,
    /// Unanswered probes that are enough
    #[arg(long, default_value_t = 2, value_name = "N")]
    count: i32,
    /// Do not probe
    #[arg(long)]
    off: bool,
}

fn main() -> net::Result {
    let args = Args::parse();
    net::event::start("keepalive-demo", false);
    let connection = TcpStream::connect(args.to.address()).context("cannot connect")?;
    event!("connected", peer = args.to.address());
    net::pause(); // time to crash the peer, or to cut the line
    TCP_KEEPIDLE.set(&connection, args.idle)?;
    TCP_KEEPINTVL.set(&connection, args.interval)?;
    TCP_KEEPCNT.set(&connection, args.count)?;
    SO_KEEPALIVE.set(&connection, i32::from(!args.off))?; // the clock starts here
    event!("set", option = "SO_KEEPALIVE", value = !args.off);

    let (fd, began) = (connection.as_raw_fd(), Instant::now());
    let result = recv(fd, &mut [0; 16], MsgFlags::empty());
    event!("woken", ms = began.elapsed().as_millis());
    tell("recv", result);
    // The error is told once, as ever.
    tell("recv", recv(fd, &mut [0; 16], MsgFlags::empty()));
    tell("send", send(fd, b"?", MsgFlags::MSG_NOSIGNAL));
    Ok(())
}

fn tell(call: &str, result: nix::Result<usize>) {
    match result {
        Ok(bytes) => event!(if call == "send" { "sent" } else { "received" }, bytes = bytes),
        Err(errno) => event!("failed", call = call, errno = name(errno)),
    }
}
