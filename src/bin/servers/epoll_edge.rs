//! One process, many clients: `epoll`, edge-triggered.
//!
//! A client is registered once, for everything, and the kernel tells only when something changes:
//! who is told must go on until the socket would block, or will never be told again.
//!
//! ```text
//!   server   epoll_create1, epoll_ctl ADD listener
//!            +--> epoll_wait --> listener: accept until EAGAIN, epoll_ctl ADD client --+
//!            ^                +-> client: recv, send ... until EAGAIN                  |
//!            ^                     or until others should have a turn: come back -------+
//!            +-------------------------------------------------------------------------+
//! ```
//!
//! What to notice: no epoll_ctl MOD, whatever the client's pace; one recv more, that ends with
//! EAGAIN. A client who sends and reads without end would never let go, so each has a turn, and who
//! is not finished is kept in a list of our own: the kernel will not say it again.
//! Break it: `--bug no-drain` stops after one turn and forgets: of 25 requests that come in one
//! segment some are never answered.
//! Compare: epoll.rs, which is told as long as a socket is ready; epoll_oneshot.rs, with threads.
//! Run: cargo run --bin epoll-edge-server       then: cargo run --bin client -- -c 50 -b 5000000
//! See: epoll(7) "Level-triggered and edge-triggered"; TLPI 63.4.6.

use std::os::fd::{AsRawFd, RawFd};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use serverlab::event;
use serverlab::net::connection::{Clients, events_or_none};
use serverlab::net::{self, drain};

fn main() -> net::Result {
    let about = "One process, many clients: epoll, edge-triggered";
    let args = net::args::server("epoll-edge-server", about, &["no-drain"]);
    let listener = net::listen(&args)?;
    listener.set_nonblocking(true)?; // accept until EAGAIN
    drain::on_sigterm(&listener)?;
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    let edge = EpollFlags::EPOLLIN | EpollFlags::EPOLLET;
    epoll.add(&listener, EpollEvent::new(edge, listener.as_raw_fd() as u64))?;
    let mut clients = Clients::new(&args);
    let mut unfinished: Vec<RawFd> = Vec::new(); // those whose socket has not said EAGAIN yet
    let (mut turns, mut full) = (Vec::new(), false);
    let mut events = [EpollEvent::empty(); 256];
    while !clients.drained() {
        let timeout = clients.timeout().and_then(|time| EpollTimeout::try_from(time).ok());
        // After EMFILE the queue was left undrained, and nobody will say so either.
        let again = (full && clients.accepting()).then_some(listener.as_raw_fd());
        let at_once = !unfinished.is_empty() || again.is_some();
        let timeout = if at_once { Some(EpollTimeout::ZERO) } else { timeout };
        let ready = events_or_none(epoll.wait(&mut events, timeout))?;
        let ready = events[..ready].iter().map(|event| event.data() as RawFd);
        turns.extend(unfinished.drain(..).chain(again).chain(ready));
        for fd in turns.drain(..) {
            if fd == listener.as_raw_fd() {
                while let Some(fd) = clients.accept(&listener)? {
                    let Some(client) = clients.get(fd) else { continue };
                    let event = EpollEvent::new(edge | EpollFlags::EPOLLOUT, fd as u64);
                    epoll.add(client.socket(), event)?;
                }
                full = !clients.accepting();
            } else if !clients.exhaust(fd) && !args.bug("no-drain") && !unfinished.contains(&fd) {
                unfinished.push(fd);
            }
        }
        clients.close_idle();
    }
    event!("stopped");
    Ok(())
}
