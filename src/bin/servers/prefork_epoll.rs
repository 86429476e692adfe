//! Children that wait in `epoll_wait` on one listener, an epoll instance each.
//!
//! Each child registers the shared listener with an epoll of its own, as event-driven servers with
//! several processes do. To the kernel that is N who asked to be told: the herd of select.
//!
//! ```text
//!   parent   listen --> fork, fork, ... --> wait for SIGCHLD: fork another; for SIGTERM: drain
//!                         |
//!   child                 +--> epoll_create1, epoll_ctl ADD listener
//!                              epoll_wait --> accept --> recv, send ... --> close --+
//!                              ^               | EAGAIN: another was quicker        |
//!                              +---------------+------------------------------------+
//! ```
//!
//! What to notice: N wake-ups a connection, and uneven shares: whoever is woken first and is quick
//! takes most (thundering_herd.rs, connection_distribution.rs).
//! Break it: `--bug no-drain` makes one edge-triggered epoll before the forks, for all, and accepts
//! once an event: connections that come together are one edge, so some wait in the queue until the
//! next client comes.
//! Compare: prefork_epoll_exclusive.rs, one flag more; prefork_select.rs, the same herd.
//! Run: cargo run --bin prefork-epoll-server    then: cargo run --bin client -- -c 5 -t 100
//! See: epoll(7), epoll_ctl(2); TLPI 63.4.

use std::net::TcpListener;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use serverlab::net::listen::{accept, accept_failed};
use serverlab::net::pool::{self, Worker};
use serverlab::net::{self, drain};

fn main() -> net::Result {
    let about = "Children that wait in epoll_wait on one listener";
    let args = net::args::server("prefork-epoll-server", about, &["no-drain"]);
    let listener = net::listen(&args)?;
    listener.set_nonblocking(true)?;
    drain::on_sigterm(&listener)?;
    let edge = EpollFlags::EPOLLIN | EpollFlags::EPOLLET;
    let shared = if args.bug("no-drain") { Some(interested(&listener, edge)?) } else { None };
    pool::of_processes(&args, |worker| serve_clients(&listener, shared.as_ref(), worker))
}

/// An epoll instance that tells about the listener.
fn interested(listener: &TcpListener, events: EpollFlags) -> nix::Result<Epoll> {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    epoll.add(listener, EpollEvent::new(events, 0))?;
    Ok(epoll)
}

/// A child's life.
fn serve_clients(
    listener: &TcpListener,
    shared: Option<&Epoll>,
    worker: &Worker<'_>,
) -> net::Result {
    let own = interested(listener, EpollFlags::EPOLLIN)?;
    let epoll = shared.unwrap_or(&own);
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
            Err(errno) => accept_failed(errno)?, // EAGAIN: another child was quicker
        }
    }
    Ok(())
}
