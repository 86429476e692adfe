//! One thread accepts, N event loops serve: reactors.
//!
//! The main thread accepts and gives each connection to one of `-n` loops, which keeps it to its
//! end: epoll.rs N times, and a rule about who gets the next. Only the inboxes need a lock.
//!
//! ```text
//!   main     accept --> choose --> inbox of that loop, write(eventfd) --> accept ...
//!                                      |
//!   loop     +--> epoll_wait --> eventfd: empty the inbox, epoll_ctl ADD clients --+
//!            ^                +-> client: recv, send what the socket takes        |
//!            +--------------------------------------------------------------------+
//! ```
//!
//! What to notice: `--assign round-robin` gives each loop as many connections as the others, but
//! not as many that last; `least-connections` does (connection_distribution.rs).
//! Break it: `--bug leak-count` never counts down: the loop with short-lived clients looks full.
//! Compare: epoll_oneshot.rs, any thread for any client; prefork_reuseport.rs, the kernel's choice.
//! Run: cargo run --bin reactors-server -- -n 4 --assign least-connections
//! See: eventfd(2), epoll(7); TLPI 63.4.

use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use serverlab::net::args::ServerArgs;
use serverlab::net::connection::{Clients, events_or_none};
use serverlab::net::inbox::Inbox;
use serverlab::net::listen::{accept_failed, accept_nonblocking};
use serverlab::net::pool::{self, Worker};
use serverlab::net::{self, drain};

#[derive(clap::Args)]
struct Extra {
    /// Which loop gets the next connection
    #[arg(long, value_enum, default_value = "round-robin")]
    assign: Assign,
}

#[derive(clap::ValueEnum, Clone, Copy)]
enum Assign {
    RoundRobin,
    LeastConnections,
}

/// A loop's inbox, and how many connections it has.
type Reactor = (Inbox<(TcpStream, SocketAddr)>, AtomicUsize);

fn main() -> net::Result {
    let about = "One thread accepts, N event loops serve";
    let (args, extra) = net::args::server_and::<Extra>("reactors-server", about, &["leak-count"]);
    let args: &'static ServerArgs = Box::leak(Box::new(args)); // all threads read it, to the end
    let listener = net::listen(args)?;
    drain::on_sigterm(&listener)?;
    let reactors = (0..args.workers).map(|_| Ok((Inbox::new()?, AtomicUsize::new(0))));
    let reactors: &'static [Reactor] = reactors.collect::<nix::Result<Vec<_>>>()?.leak();
    let pool = pool::of_threads_around(args, |worker| serve(&reactors[worker.index], worker))?;
    let mut turn = reactors.iter().cycle();
    while !drain::begun() {
        match accept_nonblocking(&listener) {
            Ok(client) => {
                let next = match extra.assign {
                    Assign::RoundRobin => turn.next(),
                    Assign::LeastConnections => {
                        reactors.iter().min_by_key(|(_, has)| has.load(Relaxed))
                    }
                };
                let (inbox, connections) = next.unwrap_or(&reactors[0]);
                connections.fetch_add(1, Relaxed);
                inbox.put(client)?; // write(eventfd)
            }
            Err(Errno::EINVAL) => break, // SIGTERM has shut the listener down
            Err(errno) => accept_failed(errno)?,
        }
    }
    for (inbox, _) in reactors {
        inbox.ring()?; // each loop sees that the drain has begun
    }
    pool.finish();
    Ok(())
}

/// A loop's life.
fn serve((inbox, connections): &Reactor, worker: &Worker<'_>) -> net::Result {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    let bell = inbox.as_raw_fd();
    epoll.add(inbox, EpollEvent::new(EpollFlags::EPOLLIN, bell as u64))?;
    let mut clients = Clients::new(worker.args);
    let (mut events, mut new) = ([EpollEvent::empty(); 256], Vec::new());
    while !clients.drained() {
        let timeout = clients.timeout().and_then(|time| EpollTimeout::try_from(time).ok());
        let ready = events_or_none(epoll.wait(&mut events, timeout))?;
        let mut before = clients.count();
        for event in &events[..ready] {
            let fd = event.data() as RawFd;
            if fd != bell {
                clients.advance_registered(&epoll, fd)?; // recv, send; close when it has ended
                continue;
            }
            inbox.empty(&mut new);
            for (socket, peer) in new.drain(..) {
                worker.count();
                let event = EpollEvent::new(EpollFlags::EPOLLIN, socket.as_raw_fd() as u64);
                epoll.add(&socket, event)?;
                clients.insert(socket, peer);
                before += 1;
            }
            if drain::begun() {
                clients.begin_drain();
            }
        }
        clients.close_idle();
        if !worker.args.bug("leak-count") {
            connections.fetch_sub(before - clients.count(), Relaxed); // as many have ended
        }
    }
    Ok(())
}
