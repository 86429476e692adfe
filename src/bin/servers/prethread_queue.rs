//! One thread accepts, others serve, and a bounded queue is between them.
//!
//! The main thread puts connections into a queue of `-n` places, from which the threads take them.
//! A full queue pushes back: the main thread waits for a place and accepts nobody, and the next
//! clients wait in the listener's queue, where the kernel keeps them.
//!
//! ```text
//!   main     accept --> put ---+        put waits while the queue is full (futex)
//!                              |
//!                           [ queue ]
//!                              |
//!   thread                     +--> take --> recv, send ... --> close --+
//!                                   ^     take waits while it is empty  |
//!                                   +-----------------------------------+
//! ```
//!
//! What to notice: with all threads busy and the queue full, Recv-Q of the listener grows (ss -ltn)
//! and no client is lost; clients who give up while they wait are met with EOF or ECONNRESET.
//! Break it: `--bug exit-when-full` is Stevens' version: a full queue ends the program.
//! Compare: prethread_accept.rs, where the listener's own queue is the only one.
//! Run: cargo run --bin prethread-queue-server       then: cargo run --bin client -- -c 50 -t 100
//! See: pthread_cond_wait(3), futex(2), listen(2); UNP 30.12; TLPI 30.2.

use std::collections::VecDeque;
use std::net::{SocketAddr, TcpStream};
use std::sync::{Condvar, Mutex, PoisonError};

use nix::errno::Errno;
use serverlab::net::args::ServerArgs;
use serverlab::net::listen::{accept, accept_failed};
use serverlab::net::pool::{self, Worker};
use serverlab::net::{self, drain};

type Client = (TcpStream, SocketAddr);

/// Clients who have been accepted and wait for a thread. `None` tells a thread to end.
struct Queue {
    clients: Mutex<VecDeque<Option<Client>>>,
    places: usize,
    not_empty: Condvar,
    not_full: Condvar,
}

fn main() -> net::Result {
    let about = "One thread accepts, others serve, and a bounded queue is between them";
    let args = net::args::server("prethread-queue-server", about, &["exit-when-full"]);
    let args: &'static ServerArgs = Box::leak(Box::new(args)); // all threads read it, to the end
    let listener = net::listen(args)?;
    drain::on_sigterm(&listener)?;
    let queue: &'static Queue = Box::leak(Box::new(Queue::of(args.workers.into())));
    let pool = pool::of_threads_around(args, |worker| serve_clients(queue, worker))?;
    while !drain::begun() {
        match accept(&listener) {
            Ok(_) if args.bug("exit-when-full") && queue.is_full() => {
                return Err(anyhow::anyhow!("the queue is full").into());
            }
            Ok(client) => queue.put(Some(client)),
            Err(Errno::EINVAL) => break, // SIGTERM has shut the listener down
            Err(errno) => accept_failed(errno)?,
        }
    }
    for _ in 0..args.workers {
        queue.put(None); // the threads serve whoever is still before it, and end
    }
    pool.finish();
    Ok(())
}

/// A thread's life.
fn serve_clients(queue: &Queue, worker: &Worker<'_>) -> net::Result {
    while let Some((connection, peer)) = queue.take() {
        worker.serve(connection, peer);
    }
    Ok(())
}

impl Queue {
    fn of(places: usize) -> Queue {
        let clients = Mutex::new(VecDeque::with_capacity(places));
        Queue { clients, places, not_empty: Condvar::new(), not_full: Condvar::new() }
    }

    fn is_full(&self) -> bool {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner).len() == self.places
    }

    /// Waits while the queue is full. A condition variable gives the mutex up for as long as it
    /// waits: whoever takes a client needs it.
    fn put(&self, client: Option<Client>) {
        let clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        let clients = self.not_full.wait_while(clients, |clients| clients.len() == self.places);
        clients.unwrap_or_else(PoisonError::into_inner).push_back(client);
        self.not_empty.notify_one();
    }

    /// Waits while the queue is empty.
    fn take(&self) -> Option<Client> {
        let clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        let clients = self.not_empty.wait_while(clients, |clients| clients.is_empty());
        let mut clients = clients.unwrap_or_else(PoisonError::into_inner);
        let was_full = clients.len() == self.places;
        let client = clients.pop_front().flatten();
        drop(clients);
        if was_full {
            self.not_full.notify_one(); // only then may the main thread wait
        }
        client
    }
}
