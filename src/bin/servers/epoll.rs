//! One process, many clients: `epoll`, level-triggered.
//!
//! The kernel keeps the list. A client is registered once, and each wait returns those that are
//! ready and only those, however many are idle.
//!
//! ```text
//!   server   epoll_create1, epoll_ctl ADD listener
//!            +--> epoll_wait --> listener: accept until EAGAIN, epoll_ctl ADD client -------+
//!            ^                +-> client readable: recv, send what the socket takes         |
//!            ^                |     the socket is full: epoll_ctl MOD to wait for room      |
//!            ^                +-> client writable: send the rest, epoll_ctl MOD back -------+
//!            +------------------------------------------------------------------------------+
//! ```
//!
//! What to notice: six system calls a connection, and a cost that does not grow with idle clients.
//! Room to send is waited for only while there is something to send.
//! Break it: `--bug stale-registration` keeps a duplicate of each connection. A registration is of
//! the open socket, not of the number: close does not end it, and epoll_wait goes on telling of a
//! client that nobody knows any more, for ever.
//! Compare: poll.rs, which hands the list over each time; epoll_edge.rs, which is told only once.
//! Run: cargo run --bin epoll-server            then: cargo run --bin client -- -c 50 -t 100
//! See: epoll(7), epoll_ctl(2), epoll_wait(2); TLPI 63.4.

use std::net::TcpListener;
use std::os::fd::{AsRawFd, RawFd};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use serverlab::event;
use serverlab::net::connection::{Clients, Waits, events_or_none};
use serverlab::net::{self, drain};

fn main() -> net::Result {
    let about = "One process, many clients: epoll, level-triggered";
    let args = net::args::server("epoll-server", about, &["stale-registration"]);
    let listener = net::listen(&args)?;
    listener.set_nonblocking(true)?; // accept until EAGAIN
    drain::on_sigterm(&listener)?;
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    let mut listening = false;
    let mut clients = Clients::new(&args);
    let mut events = [EpollEvent::empty(); 256];
    while !clients.drained() {
        if clients.accepting() != listening {
            listening = !listening;
            listen_or_not(&epoll, &listener, listening)?;
        }
        let timeout = clients.timeout().and_then(|time| EpollTimeout::try_from(time).ok());
        let ready = events_or_none(epoll.wait(&mut events, timeout))?;
        for event in &events[..ready] {
            let fd = event.data() as RawFd;
            if fd != listener.as_raw_fd() {
                advance(&epoll, &mut clients, fd)?;
                continue;
            }
            while let Some(fd) = clients.accept(&listener)? {
                let Some(client) = clients.get(fd) else { continue };
                epoll.add(client.socket(), EpollEvent::new(EpollFlags::EPOLLIN, fd as u64))?;
                if args.bug("stale-registration") {
                    std::mem::forget(client.socket().try_clone()?);
                }
            }
        }
        clients.close_idle();
    }
    event!("stopped");
    Ok(())
}

/// Does what the client's socket allows, and changes what is waited for if that is something else.
fn advance(epoll: &Epoll, clients: &mut Clients<'_>, fd: RawFd) -> nix::Result<()> {
    let Some(waited) = clients.get(fd).map(|client| client.waits()) else { return Ok(()) };
    let waits = clients.advance(fd); // recv, send; close when it has ended, which unregisters it
    if let Some(waits) = waits
        && waits != waited
        && let Some(client) = clients.get(fd)
    {
        let flags = match waits {
            Waits::ToRead => EpollFlags::EPOLLIN,
            Waits::ToWrite => EpollFlags::EPOLLOUT,
        };
        epoll.modify(client.socket(), &mut EpollEvent::new(flags, fd as u64))?;
    }
    Ok(())
}

/// Registers the listener, or takes it out: while descriptors have run out, and once it is shut
/// down, it would be ready all the time.
fn listen_or_not(epoll: &Epoll, listener: &TcpListener, listen: bool) -> nix::Result<()> {
    if listen {
        let event = EpollEvent::new(EpollFlags::EPOLLIN, listener.as_raw_fd() as u64);
        return epoll.add(listener, event);
    }
    epoll.delete(listener)
}
