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

use std::net::{SocketAddr, TcpStream};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Mutex, PoisonError};

use nix::errno::Errno;
use serverlab::net::args::ServerArgs;
use serverlab::net::listen::{accept, accept_failed};
use serverlab::net::pool::{self, Worker};
use serverlab::net::{self, drain};

type Client = (TcpStream, SocketAddr);

fn main() -> net::Result {
    let about = "One thread accepts, others serve, and a bounded queue is between them";
    let args = net::args::server("prethread-queue-server", about, &["exit-when-full"]);
    let args: &'static ServerArgs = Box::leak(Box::new(args)); // all threads read it, to the end
    let listener = net::listen(args)?;
    drain::on_sigterm(&listener)?;
    let (queue, clients) = sync_channel(args.workers.into());
    let clients: &'static Mutex<Receiver<Client>> = Box::leak(Box::new(Mutex::new(clients)));
    let pool = pool::of_threads_around(args, |worker| serve_clients(clients, worker))?;
    while !drain::begun() {
        match accept(&listener) {
            Ok(client) => put(&queue, client, args)?,
            Err(Errno::EINVAL) => break, // SIGTERM has shut the listener down
            Err(errno) => accept_failed(errno)?,
        }
    }
    drop(queue); // the threads serve what is still in it, and end
    pool.finish();
    Ok(())
}

/// Puts a client into the queue, and waits while that is full.
fn put(queue: &SyncSender<Client>, client: Client, args: &ServerArgs) -> net::Result {
    if args.bug("exit-when-full") {
        if let Err(TrySendError::Full(_)) = queue.try_send(client) {
            return Err(anyhow::anyhow!("the queue is full").into());
        }
    } else {
        let _ = queue.send(client); // an error would mean that no thread is left to take it
    }
    Ok(())
}

/// A thread's life.
fn serve_clients(clients: &Mutex<Receiver<Client>>, worker: &Worker<'_>) -> net::Result {
    loop {
        // One thread waits for a client, the others for the mutex.
        let client = clients.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok((connection, peer)) = client else { return Ok(()) }; // empty, and nobody puts
        worker.serve(connection, peer);
    }
}
