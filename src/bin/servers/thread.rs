//! One thread a client: `pthread_create`.
//!
//! The main thread accepts and starts a thread; the thread serves that one client and ends. All
//! threads share one table of descriptors: the connection is handed over, not copied, and closed
//! once.
//!
//! ```text
//!   main     accept --> pthread_create --> accept ...
//!                          |
//!   thread                 +--> recv, send ... --> close --> end
//! ```
//!
//! What to notice: one task a client in /proc/PID/task, all with one pid, and no copy of the
//! connection to forget: the FIN goes out at the one close (every_server.rs).
//! Break it: `--bug exit-on-error` calls exit when a client's connection breaks, as if the thread
//! were a process of its own: one RST ends the service for all.
//! Compare: fork.rs, dearer and safer; prethread_accept.rs, whose threads wait for the clients.
//! Run: cargo run --bin thread-server           then: cargo run --bin client -- -c 5
//! See: pthread_create(3), pthreads(7), exit(3); UNP 26.4, 30.10; TLPI 29, 30.

use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsRawFd;

use nix::errno::Errno;
use serverlab::event;
use serverlab::net::args::ServerArgs;
use serverlab::net::listen::{accept, accept_failed, name};
use serverlab::net::request::{Ended, serve};
use serverlab::net::{self, drain, threads};

fn main() -> net::Result {
    let args = net::args::server("thread-server", "One thread a client", &["exit-on-error"]);
    let args: &'static ServerArgs = Box::leak(Box::new(args)); // all threads read it, to the end
    let listener = net::listen(args)?;
    drain::on_sigterm(&listener)?;
    while !drain::begun() {
        let (connection, peer) = match accept(&listener) {
            Ok(accepted) => accepted,
            Err(Errno::EINVAL) => break, // SIGTERM has shut the listener down
            Err(errno) => {
                accept_failed(errno)?;
                continue;
            }
        };
        event!("accepted", peer = peer, fd = connection.as_raw_fd());
        // The closure owns the connection: if there is no thread to run it, it is closed here.
        if let Err(errno) = threads::start(move || serve_client(connection, peer, args)) {
            event!("thread-failed", errno = name(errno), peer = peer);
        }
    }
    threads::wait_for_all();
    event!("stopped");
    Ok(())
}

fn serve_client(connection: TcpStream, peer: SocketAddr, args: &ServerArgs) {
    drain::serving(&connection);
    let ended = serve(&connection, args);
    drain::served(&connection);
    drop(connection); // close(2) of the only descriptor: TCP sends its FIN
    event!("closed", peer = peer, reason = ended);
    if args.bug("exit-on-error") && matches!(ended, Ended::Failed(_)) {
        std::process::exit(1); // all threads are gone
    }
}
