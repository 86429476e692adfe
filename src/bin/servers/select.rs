//! One process, many clients: `select`.
//!
//! The process asks which of its sockets are ready and does, for each, what can be done without
//! waiting. No client has a process or a thread; what a client is at is data (net/connection.rs).
//!
//! ```text
//!   server   +--> select --> listener readable: accept until EAGAIN ----------+
//!            ^            +-> client readable: recv, send what the socket takes +
//!            ^            +-> client writable: send the rest ------------------+
//!            +-----------------------------------------------------------------+
//! ```
//!
//! What to notice: each call hands over and scans all the descriptors, and none may be FD_SETSIZE
//! (1024) or more: those clients are refused, where C programs corrupt their memory
//! (every_server.rs). One client that reads slowly holds up nobody.
//! Break it: `--bug blocking-write` leaves the connections blocking: a send to a client that does
//! not read stops the service for all, as in Stevens and in the Python original.
//! Compare: poll.rs, without the limit; epoll.rs, without the scan; fork.rs, without the states.
//! Run: cargo run --bin select-server           then: cargo run --bin client -- -c 50 -t 100
//! See: select(2), accept4(2) SOCK_NONBLOCK; UNP 6.3, 6.8, 16.6; TLPI 63.2.1.

use std::os::fd::{AsFd, AsRawFd, RawFd};

use nix::errno::Errno;
use nix::libc::FD_SETSIZE;
use nix::sys::select::{FdSet, select};
use nix::sys::time::TimeVal;
use serverlab::net::connection::{Clients, Waits};
use serverlab::net::request::Ended;
use serverlab::net::{self, drain};

fn main() -> net::Result {
    let about = "One process, many clients: select";
    let args = net::args::server("select-server", about, &["blocking-write"]);
    let listener = net::listen(&args)?;
    listener.set_nonblocking(true)?; // a client may be gone between select and accept
    drain::on_sigterm(&listener)?;
    let mut clients = Clients::new(&args);
    let mut ready: Vec<RawFd> = Vec::new();
    while !clients.drained() {
        let (mut readable, mut writable) = (FdSet::new(), FdSet::new());
        if clients.accepting() {
            readable.insert(listener.as_fd());
        }
        let mut most = listener.as_raw_fd();
        for client in clients.iter() {
            most = most.max(client.as_fd().as_raw_fd());
            match client.waits() {
                Waits::ToRead => readable.insert(client.as_fd()),
                Waits::ToWrite => writable.insert(client.as_fd()),
            }
        }
        let mut timeout = clients
            .timeout()
            .map(|time| TimeVal::new(time.as_secs() as i64, i64::from(time.subsec_micros())));
        match select(most + 1, &mut readable, &mut writable, None, timeout.as_mut()) {
            Ok(_) => {}
            Err(Errno::EINTR) => continue, // the sets are not changed
            Err(errno) => return Err(errno.into()),
        }
        let news = readable.fds(Some(most)).chain(writable.fds(Some(most)));
        ready.extend(news.map(|fd| fd.as_raw_fd()));
        for fd in ready.drain(..) {
            if fd != listener.as_raw_fd() {
                clients.advance(fd); // recv, send; close when it has ended
                continue;
            }
            while let Some(fd) = clients.accept(&listener)? {
                if fd as usize >= FD_SETSIZE {
                    clients.close(fd, Ended::NoRoom);
                } else if args.bug("blocking-write")
                    && let Some(client) = clients.get(fd)
                {
                    client.socket().set_nonblocking(false)?;
                }
            }
        }
        clients.close_idle();
    }
    serverlab::event!("stopped");
    Ok(())
}
