//! Threads that share one epoll: EPOLLONESHOT.
//!
//! Any thread may be told of any client, but only one at a time: an event disarms the registration,
//! and whoever has served it arms it again. So a client's state needs no protection but that it is
//! handed on whole; the lock here is never waited for.
//!
//! ```text
//!   thread   +--> epoll_wait --> listener: accept until EAGAIN, epoll_ctl ADD clients ---+
//!   thread   ^                +-> client: recv, send what the socket takes               |
//!   thread   ^                    epoll_ctl MOD: armed again, for whichever thread ------+
//!            +---------------------------------------------------------------------------+
//! ```
//!
//! What to notice: the requests of one connection are served by different threads, never by two at
//! once (every_server.rs). One epoll_ctl more a request than epoll.rs.
//! Break it: `--bug no-rearm` forgets to arm the client after an answer: its next request is never
//! read.
//! Compare: epoll.rs, one thread; reactors.rs, an epoll and its clients for each thread.
//! Run: cargo run --bin epoll-oneshot-server    then: cargo run --bin client -- -c 50 -k 100
//! See: epoll_ctl(2) EPOLLONESHOT, epoll(7); TLPI 63.4.

use std::net::TcpListener;
use std::os::fd::{AsRawFd, RawFd};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use serverlab::net::args::ServerArgs;
use serverlab::net::connection::{SharedClients, Waits};
use serverlab::net::listen::{accept_failed, accept_nonblocking};
use serverlab::net::pool::{self, Worker};
use serverlab::net::{self, drain};

/// What the threads share.
struct Server {
    listener: TcpListener,
    epoll: Epoll,
    clients: SharedClients<'static>,
}

fn main() -> net::Result {
    let about = "Threads that share one epoll";
    let args = net::args::server("epoll-oneshot-server", about, &["no-rearm"]);
    let args: &'static ServerArgs = Box::leak(Box::new(args)); // all threads read it, to the end
    let listener = net::listen(args)?;
    listener.set_nonblocking(true)?; // accept until EAGAIN
    drain::on_sigterm(&listener)?;
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    epoll.add(&listener, once(EpollFlags::EPOLLIN, listener.as_raw_fd()))?;
    let server = Server { listener, epoll, clients: SharedClients::new(args)? };
    let server: &'static Server = Box::leak(Box::new(server));
    pool::of_threads(args, |worker| serve_clients(server, worker))
}

/// A registration that the next event disarms.
fn once(events: EpollFlags, fd: RawFd) -> EpollEvent {
    EpollEvent::new(events | EpollFlags::EPOLLONESHOT, fd as u64)
}

/// A thread's life.
fn serve_clients(server: &Server, worker: &Worker<'_>) -> net::Result {
    let Server { listener, epoll, clients } = server;
    while !clients.drained() {
        let mut events = [EpollEvent::empty()]; // room for one: the next is for another thread
        let timeout = clients.timeout().and_then(|time| EpollTimeout::try_from(time).ok());
        match epoll.wait(&mut events, timeout) {
            Ok(0) | Err(Errno::EINTR) => {}
            Ok(_) if events[0].data() as RawFd == listener.as_raw_fd() => {
                accept_all(server, worker)?;
            }
            Ok(_) => clients.advance(events[0].data() as RawFd, |socket, waits| {
                let flags = match waits {
                    _ if worker.args.bug("no-rearm") => return Ok(()),
                    Waits::ToRead => EpollFlags::EPOLLIN,
                    Waits::ToWrite => EpollFlags::EPOLLOUT,
                };
                epoll.modify(socket, &mut once(flags, socket.as_raw_fd()))
            })?,
            Err(errno) => return Err(errno.into()),
        }
        clients.close_idle();
    }
    // The last to close a client, or another who sees it gone, wakes those who still wait: a
    // listener that is shut down is ready for ever, and armed without ONESHOT it tells everybody.
    let mut everybody = EpollEvent::new(EpollFlags::EPOLLIN, listener.as_raw_fd() as u64);
    epoll.modify(listener, &mut everybody)?;
    Ok(())
}

fn accept_all(server: &Server, worker: &Worker<'_>) -> net::Result {
    let Server { listener, epoll, clients } = server;
    loop {
        match accept_nonblocking(listener) {
            Ok((socket, peer)) => {
                worker.count();
                clients.insert(socket, peer, worker.index, |socket| {
                    epoll.add(socket, once(EpollFlags::EPOLLIN, socket.as_raw_fd()))
                });
            }
            Err(Errno::EAGAIN) => break,
            Err(_) if drain::begun() => {
                clients.begin_drain(); // SIGTERM has shut the listener down: not armed again
                return Ok(());
            }
            Err(errno) => accept_failed(errno)?, // EMFILE: this thread pauses, the others go on
        }
    }
    epoll.modify(listener, &mut once(EpollFlags::EPOLLIN, listener.as_raw_fd()))?;
    Ok(())
}
