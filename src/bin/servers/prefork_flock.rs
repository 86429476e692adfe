//! Children that take turns at `accept`, by a lock on a file.
//!
//! On systems where accept cannot be called by many at once, or wakes them all, a lock around it
//! lets one child wait for a connection while the others wait for the lock. Linux needs no lock;
//! what it costs is that the herd now waits for the file.
//!
//! ```text
//!   parent   memfd_create --> listen --> fork, fork, ... --> wait for signals
//!                                          |
//!   child   open /proc/self/fd/N <---------+
//!             +--> flock --> accept --> unlock --> recv, send ... --> close --+
//!             ^                                                               |
//!             +---------------------------------------------------------------+
//! ```
//!
//! What to notice: /proc/locks shows one holder and N-1 waiters; each unlock wakes more than one of
//! them, so a connection costs 2 to 5 wake-ups where accept alone costs 1 (thundering_herd.rs).
//! Whoever dies with the lock loses it: the kernel unlocks.
//! Break it: `--bug inherited-lock` locks the descriptor that came over with fork(2). A flock
//! belongs to the open file, which all children share: all of them hold it at once.
//! Compare: prefork_mutex.rs, a lock in memory; prefork_accept.rs, no lock.
//! Run: cargo run --bin prefork-flock-server    then: cargo run --bin client -- -c 5 -t 100
//! See: flock(2), memfd_create(2), proc_locks(5); UNP 30.7; TLPI 55.2, 55.3.

use std::fs::File;
use std::io::ErrorKind;
use std::net::TcpListener;
use std::os::fd::AsRawFd;

use nix::errno::Errno;
use nix::sys::memfd::{MFdFlags, memfd_create};
use serverlab::net::listen::{accept, accept_failed};
use serverlab::net::pool::{self, Worker};
use serverlab::net::{self, drain};

fn main() -> net::Result {
    let about = "Children that take turns at accept, by a lock on a file";
    let args = net::args::server("prefork-flock-server", about, &["inherited-lock"]);
    let listener = net::listen(&args)?;
    drain::on_sigterm(&listener)?;
    let file = File::from(memfd_create("accept-lock", MFdFlags::MFD_CLOEXEC)?);
    pool::of_processes(&args, |worker| serve_clients(&listener, &file, worker))
}

/// A child's life.
fn serve_clients(listener: &TcpListener, file: &File, worker: &Worker<'_>) -> net::Result {
    let own = File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))?; // an open file of its own
    let lock = if worker.args.bug("inherited-lock") { file } else { &own };
    while !drain::begun() {
        match lock.lock() {
            Ok(()) => {}                                                      // flock(2) LOCK_EX
            Err(error) if error.kind() == ErrorKind::Interrupted => continue, // SIGTERM
            Err(error) => return Err(error.into()),
        }
        let accepted = accept(listener);
        lock.unlock()?; // flock(2) LOCK_UN: the next child may accept while this one serves
        match accepted {
            Ok((connection, peer)) => {
                worker.serve(connection, peer);
            }
            Err(Errno::EINVAL) => break, // the parent has shut the listener down: SIGTERM
            Err(errno) => accept_failed(errno)?,
        }
    }
    Ok(())
}
