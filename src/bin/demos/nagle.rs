//! Write, write, read: a request in two writes waits 40 ms for an acknowledgement, each time.
//!
//! Nagle's algorithm holds the second small segment until the first is acknowledged; the server,
//! which has no answer to half a request, delays its acknowledgement for 40 ms in the hope of one.
//! Each is sensible, and together they stall.
//!
//! ```text
//!   client   write "10" ---------> server        recv: half a request, nothing to answer
//!            write "00\n"  (held)                ... 40 ms ...
//!                        <--------- ACK          the delayed acknowledgement
//!            "00\n" -------------->              recv: the other half
//!            read 1000 <----------- answer       and so on, each round
//! ```
//!
//! What to notice: the first round is fast: a new connection acknowledges at once. From the second
//! on the segment with "00\n" leaves right after an ACK that took 40 ms (nagle.rs in tests). The
//! server's kernel counts TcpExtDelayedACKs.
//! Break it: against `peer ... set:quickack=1 flags:waitall recv:5 send:1000 ...` it does not stall.
//! Compare: cork.rs, where holding back is wanted.
//! Run: cargo run --bin iterative-server        then: cargo run --bin nagle-demo -- --cure none
//! See: tcp(7) TCP_NODELAY, TCP_QUICKACK; UNP 7.9; TLPI 61.4; RFC 9293 3.7.4, 3.8.6.3.

use std::io::IoSlice;
use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::time::Instant;

use anyhow::Context as _;
use clap::{Parser, ValueEnum};
use nix::sys::socket::sockopt::TcpNoDelay;
use nix::sys::socket::{MsgFlags, recv, send, setsockopt};
use nix::sys::uio::writev;
use serverlab::event;
use serverlab::net::{self, args::ConnectTo, options::TCP_CORK};

/// Asks for 1000 bytes, by two writes a request, and tells how long each answer took
#[derive(Parser)]
#[command(version)]
struct Args {
    #[command(flatten)]
    to: ConnectTo,
    /// What to do about the stall
    #[arg(long, value_enum, default_value = "none")]
    cure: Cure,
    /// Requests to send
    #[arg(long, default_value_t = 5, value_name = "N")]
    rounds: u32,
}

#[derive(ValueEnum, Clone, Copy)]
enum Cure {
    None,
    Nodelay,
    Cork,
    Writev,
}

const HALVES: [&[u8]; 2] = [b"10", b"00\n"];

fn main() -> net::Result {
    let args = Args::parse();
    net::event::start("nagle-demo", false);
    let connection = TcpStream::connect(args.to.address()).context("cannot connect")?;
    event!("connected", peer = args.to.address());
    for round in 1..=args.rounds {
        let began = Instant::now();
        match args.cure {
            Cure::None => write_write(&connection)?,
            Cure::Nodelay => {
                setsockopt(&connection, TcpNoDelay, &true)?; // once would do
                write_write(&connection)?;
            }
            Cure::Cork => {
                TCP_CORK.set(&connection, 1)?;
                write_write(&connection)?;
                TCP_CORK.set(&connection, 0)?;
            }
            Cure::Writev => {
                writev(&connection, &HALVES.map(IoSlice::new))?;
            }
        }
        let mut answer = [0; 1000];
        let received = recv(connection.as_raw_fd(), &mut answer, MsgFlags::MSG_WAITALL)?;
        let ms = began.elapsed().as_millis();
        event!("received", round = round, bytes = received, ms = ms);
    }
    Ok(())
}

fn write_write(connection: &TcpStream) -> nix::Result<()> {
    for half in HALVES {
        send(connection.as_raw_fd(), half, MsgFlags::MSG_NOSIGNAL)?;
    }
    Ok(())
}
