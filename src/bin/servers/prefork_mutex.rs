//! Children that take turns at `accept`, by a mutex in memory they share.
//!
//! A mutex in a mapping that the children share is a lock without a system call while nobody waits
//! for it: futex(2) is called only to sleep and to wake. It must be told that it is shared by
//! processes, and that it is robust: a child killed while it holds it must not stop the service.
//!
//! ```text
//!   parent   mmap(MAP_SHARED), pthread_mutex_init(shared, robust) --> listen --> fork, fork, ...
//!                                                                                  |
//!   child     +--> pthread_mutex_lock --> accept --> unlock --> recv, send ... --> close --+
//!             ^      | EOWNERDEAD: pthread_mutex_consistent                                |
//!             +----------------------------------------------------------------------------+
//! ```
//!
//! What to notice: two wake-ups a connection, one for the lock and one for accept
//! (thundering_herd.rs). Kill the child that waits in accept with SIGKILL: the kernel passes the
//! lock on, and the next owner is told EOWNERDEAD (event `recovered`).
//! Break it: `--bug plain-mutex` is Stevens' version: after that SIGKILL nobody accepts any more.
//! Compare: prefork_flock.rs, a lock on a file; prefork_accept.rs, no lock.
//! Run: cargo run --bin prefork-mutex-server    then: cargo run --bin client -- -c 5 -t 100
//! See: pthread_mutexattr_setrobust(3), pthread_mutexattr_setpshared(3), futex(2); UNP 30.8.

use std::net::TcpListener;

use nix::errno::Errno;
use serverlab::event;
use serverlab::net::listen::{accept, accept_failed};
use serverlab::net::mutex::{Locked, SharedMutex};
use serverlab::net::pool::{self, Worker};
use serverlab::net::{self, drain};

fn main() -> net::Result {
    let about = "Children that take turns at accept, by a mutex in memory they share";
    let args = net::args::server("prefork-mutex-server", about, &["plain-mutex"]);
    let listener = net::listen(&args)?;
    drain::on_sigterm(&listener)?;
    let robust = !args.bug("plain-mutex");
    let mutex = SharedMutex::new(robust)?;
    pool::of_processes(&args, |worker| serve_clients(&listener, &mutex, worker))
}

/// A child's life.
fn serve_clients(listener: &TcpListener, mutex: &SharedMutex, worker: &Worker<'_>) -> net::Result {
    while !drain::begun() {
        if mutex.lock()? == Locked::OwnerDied {
            mutex.make_consistent(); // what it guards is one system call: nothing is half done
            event!("recovered", worker = worker.index);
        }
        let accepted = accept(listener);
        mutex.unlock(); // the next child may accept while this one serves
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
