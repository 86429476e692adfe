//! So many bytes make a socket readable, no fewer: SO_RCVLOWAT.
//!
//! The low-water mark is 1 unless set: a socket is readable as soon as there is a byte. A program
//! that can do nothing with less than a record asks to be woken when there is one.
//!
//! ```text
//!   demo   accept --> SO_RCVLOWAT=100 --> pause --> FIONREAD, poll(0): not readable
//!                                                   poll(-1) ...... readable --> recv = 100
//!                                                   poll(-1) .................. readable --> recv
//!   peer   connect --> 99 bytes                           1 byte            5 bytes  FIN
//! ```
//!
//! What to notice: 99 bytes are there and the socket is not readable; with the 100th it is. The end
//! of the data counts as readable too, however little came before it: a loop must not take
//! readiness for a whole record (flow_control.rs).
//! Break it: `--bytes 1`, the default of every socket: poll(0) tells `in` at once.
//! Compare: boundaries.rs, records of any length.
//! Run: cargo run --bin low-water-mark-demo
//! then: cargo run --bin peer -- connect send:99 pause send:1 pause send:5 pause
//! See: socket(7) SO_RCVLOWAT, poll(2); UNP 6.3, 7.5.

use std::net::TcpStream;
use std::os::fd::{AsFd, AsRawFd};

use clap::Parser;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, recv};
use serverlab::event;
use serverlab::net::options::{FIONREAD, SO_RCVLOWAT};
use serverlab::net::{self, args::ListenAt, listen::accept_one, pause, script::events};

/// Takes one connection, whose socket is readable only when enough has come
#[derive(Parser)]
#[command(version)]
struct Args {
    #[command(flatten)]
    at: ListenAt,
    /// The low-water mark
    #[arg(long, default_value_t = 100)]
    bytes: i32,
}

fn main() -> net::Result {
    let args = Args::parse();
    net::event::start("low-water-mark-demo", false);
    let connection = accept_one(args.at.address())?;
    SO_RCVLOWAT.set(&connection, args.bytes)?;
    event!("set", option = "SO_RCVLOWAT", value = args.bytes);

    pause();
    event!("got", option = "FIONREAD", value = FIONREAD.get(&connection)?);
    readable(&connection, PollTimeout::ZERO)?; // only looks

    loop {
        readable(&connection, PollTimeout::NONE)?; // waits
        let count = recv(connection.as_raw_fd(), &mut [0; 4096], MsgFlags::empty())?;
        event!("received", bytes = count);
        if count == 0 {
            return Ok(());
        }
    }
}

/// Tells what poll(2) says of the connection: `in`, or `none`.
fn readable(connection: &TcpStream, timeout: PollTimeout) -> nix::Result<()> {
    let mut fds = [PollFd::new(connection.as_fd(), PollFlags::POLLIN)];
    poll(&mut fds, timeout)?;
    event!("polled", revents = events(fds[0].revents().map_or(0, |revents| revents.bits())));
    Ok(())
}
