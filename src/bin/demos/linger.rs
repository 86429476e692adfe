//! A close that waits until the data is delivered, for so long: SO_LINGER with a time.
//!
//! An ordinary close returns at once and leaves unsent data to the kernel. With SO_LINGER{1,n} it
//! returns when the peer's kernel has acknowledged everything, the FIN included, or after n seconds.
//!
//! ```text
//!   demo   connect --> send ... EAGAIN --> SO_LINGER{1,n} --> close ......... returns
//!                                                               |               |
//!   wire                                     window 0           +-- FIN waits   +-- acknowledged, or
//!                                                                                   n seconds over
//!   --how plain   no option: close returns at once
//!   --how exit    the option, and no close: the kernel closes at exit, and does not wait
//! ```
//!
//! What to notice: close returns 0 in each case, so nobody learns whether the data was delivered; and
//! delivered means to the peer's kernel: only an answer tells that the peer has read it
//! (flow_control.rs). A socket that does not block lingers all the same.
//! Break it: `--seconds 0`: nothing is sent any more but a RST.
//! Compare: rst.rs, SO_LINGER{1,0}; slow_reader.rs, an ordinary close.
//! Run: cargo run --bin peer -- rcvbuf:4096 listen accept pause recv-all
//! then: cargo run --bin linger-demo -- --seconds 10         then, or not: a line to peer
//! See: socket(7) SO_LINGER, close(2); UNP 7.5, 6.6.

use std::net::TcpStream;
use std::os::fd::{AsRawFd, IntoRawFd};
use std::time::Instant;

use anyhow::Context as _;
use clap::{Parser, ValueEnum};
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, send, setsockopt, sockopt::Linger};
use nix::unistd::close;
use serverlab::event;
use serverlab::net::{self, args::ConnectTo};

/// Sends as much as is taken, closes, and tells how long that took
#[derive(Parser)]
#[command(version)]
struct Args {
    #[command(flatten)]
    to: ConnectTo,
    /// How to end the connection
    #[arg(long, value_enum, default_value = "linger")]
    how: How,
    /// How long close may wait
    #[arg(long, default_value_t = 1)]
    seconds: i32,
}

#[derive(ValueEnum, Clone, Copy, PartialEq)]
enum How {
    Plain,
    Linger,
    Exit,
}

fn main() -> net::Result {
    let args = Args::parse();
    net::event::start("linger-demo", false);
    let connection = TcpStream::connect(args.to.address()).context("cannot connect")?;
    event!("connected", peer = args.to.address());
    let mut total = 0;
    loop {
        match send(connection.as_raw_fd(), &[b'x'; 65536], MsgFlags::MSG_DONTWAIT) {
            Ok(taken) => total += taken,
            Err(Errno::EAGAIN) => break,
            Err(errno) => return Err(errno.into()),
        }
    }
    event!("filled", bytes = total);

    if args.how != How::Plain {
        let option = libc::linger { l_onoff: 1, l_linger: args.seconds };
        setsockopt(&connection, Linger, &option)?;
        event!("set", option = "SO_LINGER", on = 1, seconds = args.seconds);
    }
    if args.how == How::Exit {
        let _ = connection.into_raw_fd(); // nobody closes it now
        return Ok(());
    }
    let began = Instant::now();
    close(connection)?; // never fails for want of time: the number of seconds is all that can tell
    event!("closed", ms = began.elapsed().as_millis());
    Ok(())
}
