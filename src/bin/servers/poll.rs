//! One process, many clients: `poll`.
//!
//! select.rs with a list in place of sets: each entry names a descriptor, what to wait for, and
//! what has come. There is no highest descriptor; the list is still handed over and scanned whole.
//!
//! ```text
//!   server   +--> poll --> listener readable: accept until EAGAIN -------------+
//!            ^          +-> client readable: recv, send what the socket takes -+
//!            ^          +-> client writable: send the rest --------------------+
//!            +-----------------------------------------------------------------+
//! ```
//!
//! What to notice: POLLERR and POLLHUP come whether asked for or not: a client that resets is told
//! of, also while nothing else is waited for (every_server.rs).
//! Break it: `--bug always-writable` waits for room to send with nothing to send. An idle client
//! has room, so poll returns at once, for ever: all of one processor for nothing.
//! Compare: select.rs; epoll.rs, which is not handed the list each time.
//! Run: cargo run --bin poll-server             then: cargo run --bin client -- -c 50 -t 100
//! See: poll(2); UNP 6.10, 6.11; TLPI 63.2.2.

use std::os::fd::{AsFd, AsRawFd, RawFd};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serverlab::event;
use serverlab::net::connection::{Clients, Waits};
use serverlab::net::{self, drain};

fn main() -> net::Result {
    let about = "One process, many clients: poll";
    let args = net::args::server("poll-server", about, &["always-writable"]);
    let listener = net::listen(&args)?;
    listener.set_nonblocking(true)?; // a client may be gone between poll and accept
    drain::on_sigterm(&listener)?;
    let both = PollFlags::POLLIN | PollFlags::POLLOUT;
    let mut clients = Clients::new(&args);
    let mut ready: Vec<RawFd> = Vec::new();
    while !clients.drained() {
        let mut fds = Vec::with_capacity(clients.count() + 1);
        if clients.accepting() {
            fds.push(PollFd::new(listener.as_fd(), PollFlags::POLLIN));
        }
        for client in clients.iter() {
            let events = match client.waits() {
                _ if args.bug("always-writable") => both,
                Waits::ToRead => PollFlags::POLLIN,
                Waits::ToWrite => PollFlags::POLLOUT,
            };
            fds.push(PollFd::new(client.as_fd(), events));
        }
        let timeout = clients.timeout().and_then(|time| PollTimeout::try_from(time).ok());
        match poll(&mut fds, timeout) {
            Ok(_) => {}
            Err(Errno::EINTR) => continue,
            Err(errno) => return Err(errno.into()),
        }
        let news = fds.iter().filter(|fd| fd.any() == Some(true));
        ready.extend(news.map(|fd| fd.as_fd().as_raw_fd()));
        for fd in ready.drain(..) {
            if fd == listener.as_raw_fd() {
                while clients.accept(&listener)?.is_some() {}
            } else {
                clients.advance(fd); // recv, send; close when it has ended
            }
        }
        clients.close_idle();
    }
    event!("stopped");
    Ok(())
}
