//! Threads that take turns at `accept`, by a mutex.
//!
//! One thread waits for a connection, the others for the mutex. It is what portable servers did
//! where accept by many threads at once was not to be trusted.
//!
//! ```text
//!   main     listen --> pthread_create, pthread_create, ... --> wait for them
//!                         |
//!   thread                +--> lock --> accept --> unlock --> recv, send ... --> close --+
//!                              ^                                                         |
//!                              +---------------------------------------------------------+
//! ```
//!
//! What to notice: futex(2) calls in `strace -f -c` that prethread_accept.rs does not make, and two
//! wake-ups a connection for its one (thundering_herd.rs).
//! Break it: `--bug hold-lock` keeps the mutex while it serves: one client at a time, and a silent
//! one stops the service.
//! Compare: prethread_accept.rs, no lock; prefork_mutex.rs, a lock that must survive its owner: here
//! all threads die together, so it need not be robust.
//! Run: cargo run --bin prethread-mutex-server       then: cargo run --bin client -- -c 5 -t 100
//! See: pthread_mutex_lock(3), futex(2); UNP 30.11; TLPI 30.1.

use std::net::TcpListener;
use std::sync::{Mutex, PoisonError};

use nix::errno::Errno;
use serverlab::net::args::ServerArgs;
use serverlab::net::listen::{accept, accept_failed};
use serverlab::net::pool::{self, Worker};
use serverlab::net::{self, drain};

static TURN: Mutex<()> = Mutex::new(());

fn main() -> net::Result {
    let about = "Threads that take turns at accept, by a mutex";
    let args = net::args::server("prethread-mutex-server", about, &["hold-lock"]);
    let args: &'static ServerArgs = Box::leak(Box::new(args)); // all threads read it, to the end
    let listener: &'static TcpListener = Box::leak(Box::new(net::listen(args)?));
    drain::on_sigterm(listener)?;
    pool::of_threads(args, |worker| serve_clients(listener, worker))
}

/// A thread's life.
fn serve_clients(listener: &TcpListener, worker: &Worker<'_>) -> net::Result {
    while !drain::begun() {
        // The mutex guards nothing that a panic could leave half done: poison is no danger here.
        let mut turn = Some(TURN.lock().unwrap_or_else(PoisonError::into_inner));
        let accepted = accept(listener);
        if !worker.args.bug("hold-lock") {
            turn = None; // unlocks: the next thread may accept while this one serves
        }
        match accepted {
            Ok((connection, peer)) => {
                worker.serve(connection, peer);
            }
            Err(Errno::EINVAL) => break, // SIGTERM has shut the listener down
            Err(errno) => accept_failed(errno)?,
        }
        drop(turn);
    }
    Ok(())
}
