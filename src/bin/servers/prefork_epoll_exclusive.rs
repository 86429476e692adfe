//! Children that wait in `epoll_wait` on one listener, with EPOLLEXCLUSIVE.
//!
//! The flag makes each registration an exclusive wait: a connection wakes one child, or at least
//! not all. It is prefork_epoll.rs and one flag, and the herd is gone.
//!
//! ```text
//!   parent   listen --> fork, fork, ... --> wait for SIGCHLD: fork another; for SIGTERM: drain
//!                         |
//!   child                 +--> epoll_create1, epoll_ctl ADD listener EPOLLEXCLUSIVE
//!                              epoll_wait --> accept --> recv, send ... --> close --+
//!                              ^               | EAGAIN: another was quicker        |
//!                              +---------------+------------------------------------+
//! ```
//!
//! What to notice: one wake-up a connection, but always the same child while it is idle: the first
//! registered comes first, the next get what it has no time for (connection_distribution.rs).
//! Break it: `--bug no-exclusive` leaves the flag out: N wake-ups a connection.
//! Compare: prefork_epoll.rs; prefork_accept.rs, which wakes one as well, and in turn.
//! Run: cargo run --bin prefork-epoll-exclusive-server    then: cargo run --bin client -- -c 5
//! See: epoll_ctl(2) EPOLLEXCLUSIVE (Linux 4.5), epoll(7); TLPI 63.4.

use std::net::TcpListener;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use serverlab::net::listen::{accept, accept_failed};
use serverlab::net::pool::{self, Worker};
use serverlab::net::{self, drain};

fn main() -> net::Result {
    let about = "Children that wait in epoll_wait on one listener, with EPOLLEXCLUSIVE";
    let args = net::args::server("prefork-epoll-exclusive-server", about, &["no-exclusive"]);
    let listener = net::listen(&args)?;
    listener.set_nonblocking(true)?;
    drain::on_sigterm(&listener)?;
    pool::of_processes(&args, |worker| serve_clients(&listener, worker))
}

/// A child's life.
fn serve_clients(listener: &TcpListener, worker: &Worker<'_>) -> net::Result {
    let exclusive = !worker.args.bug("no-exclusive");
    let flag = if exclusive { EpollFlags::EPOLLEXCLUSIVE } else { EpollFlags::empty() };
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    epoll.add(listener, EpollEvent::new(EpollFlags::EPOLLIN | flag, 0))?;
    while !drain::begun() {
        match epoll.wait(&mut [EpollEvent::empty()], EpollTimeout::NONE) {
            Ok(_) => {}
            Err(Errno::EINTR) => continue,
            Err(errno) => return Err(errno.into()),
        }
        match accept(listener) {
            Ok((connection, peer)) => {
                worker.serve(connection, peer); // blocking: O_NONBLOCK is not inherited on Linux
            }
            Err(Errno::EINVAL) => break, // the parent has shut the listener down: SIGTERM
            Err(errno) => accept_failed(errno)?, // EAGAIN: "one or more" are woken (epoll_ctl(2))
        }
    }
    Ok(())
}
