//! Threads that wait in `accept` on one listener.
//!
//! The main thread starts `-n` threads, once. Each accepts and serves one client after another:
//! prefork_accept.rs with threads in place of children, and the same wake-one in the kernel.
//!
//! ```text
//!   main     listen --> pthread_create, pthread_create, ... --> wait for them
//!                         |
//!   thread                +--> accept --> recv, send ... --> close --+
//!                              ^                                     |
//!                              +-------------------------------------+
//! ```
//!
//! What to notice: it needs no lock around accept, though Stevens' version of it had one
//! (thundering_herd.rs). SIGTERM wakes all of them by shutdown of the listener; its close by another
//! thread would wake nobody.
//! Break it: `--bug mortal-workers` lets a bad request end its thread. Nobody replaces a thread that
//! returns: after `-n` of them the server lives and serves no one.
//! Compare: prefork_accept.rs, whose workers are replaced; prethread_mutex.rs, with the lock.
//! Run: cargo run --bin prethread-accept-server      then: cargo run --bin client -- -c 5 -t 100
//! See: accept(2), shutdown(2), pthread_create(3); UNP 30.11; TLPI 60.4.

use std::net::TcpListener;

use nix::errno::Errno;
use serverlab::net::args::ServerArgs;
use serverlab::net::listen::{accept, accept_failed};
use serverlab::net::pool::{self, Worker};
use serverlab::net::request::Ended;
use serverlab::net::{self, drain};

fn main() -> net::Result {
    let about = "Threads that wait in accept on one listener";
    let args = net::args::server("prethread-accept-server", about, &["mortal-workers"]);
    let args: &'static ServerArgs = Box::leak(Box::new(args)); // all threads read it, to the end
    let listener: &'static TcpListener = Box::leak(Box::new(net::listen(args)?));
    drain::on_sigterm(listener)?;
    pool::of_threads(args, |worker| serve_clients(listener, worker))
}

/// A thread's life.
fn serve_clients(listener: &TcpListener, worker: &Worker<'_>) -> net::Result {
    while !drain::begun() {
        match accept(listener) {
            Ok((connection, peer)) => {
                let ended = worker.serve(connection, peer);
                if worker.args.bug("mortal-workers") && matches!(ended, Ended::BadRequest(_)) {
                    break;
                }
            }
            Err(Errno::EINVAL) => break, // SIGTERM has shut the listener down
            Err(errno) => accept_failed(errno)?,
        }
    }
    Ok(())
}
