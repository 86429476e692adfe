//! After `close` nobody waits for the other's FIN for ever: an orphan in FIN_WAIT2 is forgotten.
//!
//! Who closes first waits for the other's FIN in FIN_WAIT2. A socket that a process still has open,
//! half-closed by shutdown, waits as long as the process likes. One that is closed has no process
//! to decide; the kernel gives it net.ipv4.tcp_fin_timeout (60 s), or TCP_LINGER2 seconds.
//!
//! ```text
//!   --how close      connect --> TCP_LINGER2=1 --> close      FIN_WAIT2 ... 1 s ... (nothing)
//!   --how shutdown   connect --> TCP_LINGER2=1 --> shutdown   FIN_WAIT2 ........... recv: the answer
//!   server           accept --> recv: 0         CLOSE_WAIT, until it closes ....... send: the answer
//! ```
//!
//! What to notice: the server is in CLOSE_WAIT in both cases, for as long as it forgets to close;
//! an answer after the orphan's time meets a bare RST (overload.rs).
//! Break it: `--linger2 -1`: no FIN_WAIT2 at all, the ACK of the FIN is answered by a RST.
//! Compare: half_close.rs, an answer at once; the suite time_wait, what comes after FIN_WAIT2.
//! Run: cargo run --bin peer -- listen accept recv pause send:5 recv
//!      cargo run --bin orphan-demo          then, within its second: ss -tno state fin-wait-2
//! See: tcp(7) TCP_LINGER2, tcp_fin_timeout; close(2); RFC 9293 3.6; UNP 2.6; TLPI 61.6.5.

use std::net::{Shutdown, TcpStream};
use std::os::fd::AsRawFd;

use anyhow::Context as _;
use clap::{Parser, ValueEnum};
use nix::sys::socket::{MsgFlags, recv};
use serverlab::event;
use serverlab::net::options::{TCP_LINGER2, tcp_state};
use serverlab::net::{self, args::ConnectTo};

/// Connects, ends its side, and leaves the server to end the other
#[derive(Parser)]
#[command(version)]
struct Args {
    #[command(flatten)]
    to: ConnectTo,
    /// How to end this side
    #[arg(long, value_enum, default_value = "close")]
    how: How,
    /// How long the orphan may wait
    #[arg(long, default_value_t = 1, value_name = "SECONDS", allow_hyphen_values = true)]
    linger2: i32,
}

#[derive(ValueEnum, Clone, Copy)]
enum How {
    Close,
    Shutdown,
}

fn main() -> net::Result {
    let args = Args::parse();
    net::event::start("orphan-demo", false);
    let connection = TcpStream::connect(args.to.address()).context("cannot connect")?;
    event!("connected", peer = args.to.address());
    TCP_LINGER2.set(&connection, args.linger2)?;
    event!("set", option = "TCP_LINGER2", value = args.linger2);

    match args.how {
        How::Close => {
            drop(connection); // close(2): what is left belongs to the kernel
            event!("closed");
        }
        How::Shutdown => {
            connection.shutdown(Shutdown::Write)?;
            event!("shut-down", how = "SHUT_WR");
            // It waits in FIN_WAIT2, with a process: no timer runs.
            let received = recv(connection.as_raw_fd(), &mut [0; 16], MsgFlags::empty())?;
            event!("received", bytes = received);
            event!("got", option = "TCP_INFO", state = tcp_state(&connection)?);
        }
    }
    Ok(())
}
