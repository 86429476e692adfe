//! One child a client: `fork`.
//!
//! The parent accepts and forks; the child serves that one client and exits. A descriptor is
//! copied by fork(2), not handed over: each process closes the copy it does not need, and TCP sends
//! its FIN when the last copy of a connection is closed.
//!
//! ```text
//!   parent   accept --> fork --> close connection --> accept ...     SIGCHLD: waitpid until none
//!                        |
//!   child                +--> close listener --> recv, send ... --> _exit, which closes connection
//! ```
//!
//! What to notice: one pid a client, and no zombie however many children end at once: signals do
//! not queue, so the handler reaps until nobody is left (fork_per_client.rs).
//! Break it: `--bug leak-connection` leaves the parent's copy open: the child closes and exits, and
//! no FIN is sent. `--bug no-reap` leaves a zombie a client.
//! Compare: iterative.rs, which a silent client stops; thread.rs, the same for less.
//! Run: cargo run --bin fork-server             then: cargo run --bin client -- -c 5
//! See: fork(2), waitpid(2), signal-safety(7), _exit(2); UNP 4.7, 4.8, 5.8-5.10, 30.5; TLPI 24.2,
//! 26.3, 60.3.
#![allow(unsafe_code, reason = "fork(2), and _exit(2) in the child")]

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;

use nix::errno::Errno;
use nix::unistd::{ForkResult, fork};
use serverlab::event;
use serverlab::net::args::ServerArgs;
use serverlab::net::listen::{accept, accept_failed, name};
use serverlab::net::{self, children, drain, request::serve};

fn main() -> net::Result {
    let bugs = ["leak-connection", "no-reap"];
    let args = net::args::server("fork-server", "One child a client", &bugs);
    let listener = net::listen(&args)?;
    drain::on_sigterm(&listener)?;
    if !args.bug("no-reap") {
        children::reap_on_sigchld()?;
    }
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
        drain::serving(&connection); // for the child: SIGTERM's handler comes over with fork
        // SAFETY: the process has one thread, so the child may do whatever its parent might.
        match unsafe { fork() } {
            Ok(ForkResult::Child) => serve_and_exit(listener, connection, peer, &args),
            Ok(ForkResult::Parent { child }) => event!("forked", child = child, peer = peer),
            // EAGAIN: too many processes (or ENOMEM). It costs this client, not the service.
            Err(errno) => event!("fork-failed", errno = name(errno), peer = peer),
        }
        if args.bug("leak-connection") {
            std::mem::forget(connection);
        } else {
            drop(connection); // close(2) of the parent's copy: the child's is open, so no FIN yet
        }
    }
    children::terminate();
    event!("stopped");
    Ok(())
}

/// The child's life. It ends by _exit(2), which closes what is open: of the connection it is the
/// last copy, so TCP sends its FIN. exit(3) would also run what the parent registered with atexit(3)
/// and flush what the parent left in stdio's buffers.
fn serve_and_exit(
    listener: TcpListener,
    connection: TcpStream,
    peer: SocketAddr,
    args: &ServerArgs,
) -> ! {
    drop(listener); // else the port stays taken as long as the slowest client stays
    let ended = serve(&connection, args);
    event!("closed", peer = peer, reason = ended); // by _exit, as everything is
    // SAFETY: _exit takes a number and does not return.
    unsafe { libc::_exit(0) }
}
