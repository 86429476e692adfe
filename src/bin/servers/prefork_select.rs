//! Children that wait in `select` on one listener, then `accept`: the thundering herd.
//!
//! A wait for readiness wakes everybody who waits: each child has asked to be told, so each is
//! told, of every connection. One accept gets it; the others find nothing and wait again.
//!
//! ```text
//!   parent   listen --> fork, fork, ... --> wait for SIGCHLD: fork another; for SIGTERM: drain
//!                         |
//!   child                 +--> select --> accept --> recv, send ... --> close --+
//!                              ^            | EAGAIN: another was quicker       |
//!                              +------------+-----------------------------------+
//! ```
//!
//! What to notice: with N idle children every connection costs N wake-ups, by the
//! voluntary_ctxt_switches of /proc/PID/status; few show as EAGAIN, since most losers look again
//! inside the kernel and go back to sleep (thundering_herd.rs).
//! Break it: `--bug blocking-accept` leaves the listener blocking, as Stevens does: a child that
//! lost the race waits in accept, and so would one whose client has gone in between (UNP 16.6).
//! Compare: prefork_accept.rs, where the kernel wakes one.
//! Run: cargo run --bin prefork-select-server   then: cargo run --bin client -- -c 5 -t 100
//! See: select(2), accept(2); UNP 30.6 ("select collisions"), 16.6; TLPI 63.2.1.

use std::net::TcpListener;
use std::os::fd::{AsFd, AsRawFd};

use nix::errno::Errno;
use nix::sys::select::{FdSet, select};
use serverlab::net::listen::{accept, accept_failed};
use serverlab::net::pool::{self, Worker};
use serverlab::net::{self, drain};

fn main() -> net::Result {
    let about = "Children that wait in select on one listener, then accept";
    let args = net::args::server("prefork-select-server", about, &["blocking-accept"]);
    let listener = net::listen(&args)?;
    listener.set_nonblocking(!args.bug("blocking-accept"))?;
    drain::on_sigterm(&listener)?;
    pool::of_processes(&args, |worker| serve_clients(&listener, worker))
}

/// A child's life.
fn serve_clients(listener: &TcpListener, worker: &Worker<'_>) -> net::Result {
    while !drain::begun() {
        let mut readable = FdSet::new();
        readable.insert(listener.as_fd());
        match select(listener.as_raw_fd() + 1, &mut readable, None, None, None) {
            Ok(_) => {}
            Err(Errno::EINTR) => continue,
            Err(errno) => return Err(errno.into()),
        }
        match accept(listener) {
            Ok((connection, peer)) => {
                worker.serve(connection, peer); // blocking: O_NONBLOCK is not inherited on Linux
            }
            Err(Errno::EINVAL) => break, // the parent has shut the listener down: SIGTERM
            Err(errno) => accept_failed(errno)?, // EAGAIN: another child was quicker
        }
    }
    Ok(())
}
