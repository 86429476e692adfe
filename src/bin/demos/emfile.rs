//! No descriptor left for accept: the connection waits, the listener stays readable, the loop spins.
//!
//! ```text
//!   epoll_wait: the listener is readable --> accept4: EMFILE --> epoll_wait: it is readable --> ...
//!
//!   --cure none       tries again at once, for ever: one processor, no progress
//!   --cure reserve    close(reserve) --> accept4 --> close(it) --> open(reserve): the client learns
//!   --cure mask       EPOLL_CTL_DEL(listener), until a connection ends: the client waits
//! ```
//!
//! What to notice: nobody is told. The client is connected, since the kernel completes handshakes
//! without us; it may even send. `accept-failed` counts the spin (descriptors.rs in tests).
//! Break it: leave EPOLL_CTL_ADD out where a connection ends.
//! Compare: net/listen.rs, accept_failed: a pause of 100 ms, what the servers here do.
//! Run: (ulimit -n 8; cargo run --bin emfile-demo)    then: cargo run --bin peer -- connect recv ...
//! See: accept(2) EMFILE, epoll(7), getrlimit(2) RLIMIT_NOFILE; TLPI 36.3, 63.4.

use std::collections::HashMap;
use std::fs::File;
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;

use clap::{Parser, ValueEnum};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use serverlab::event;
use serverlab::net::listen::{accept, bind, name, open, start_listening};
use serverlab::net::{self, args::ListenAt};

/// Accepts with too few descriptors; each connection stays until its client ends it
#[derive(Parser)]
#[command(version)]
struct Args {
    #[command(flatten)]
    at: ListenAt,
    /// What to do when accept fails with EMFILE
    #[arg(long, value_enum, default_value = "none")]
    cure: Cure,
}

#[derive(ValueEnum, Clone, Copy, PartialEq)]
enum Cure {
    None,
    Reserve,
    Mask,
}

fn main() -> net::Result {
    let args = Args::parse();
    net::event::start("emfile-demo", false);
    let listener = open(args.at.address())?;
    bind(&listener, args.at.address())?;
    listener.set_nonblocking(true)?;
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    let readable = |fd: i32| EpollEvent::new(EpollFlags::EPOLLIN, fd as u64);
    epoll.add(&listener, readable(listener.as_raw_fd()))?;
    let mut reserve = Some(File::open("/dev/null")?);
    let mut connections: HashMap<u64, TcpStream> = HashMap::new();
    let (mut masked, mut failures) = (false, 0_u32);
    start_listening(&listener, 128)?;

    loop {
        let mut events = [EpollEvent::empty()];
        epoll.wait(&mut events, EpollTimeout::NONE)?;
        if let Some(connection) = connections.remove(&events[0].data()) {
            // A client that says something ends its connection too: this is not about serving.
            event!("closed", fd = connection.as_raw_fd());
            drop(connection); // close(2) takes it out of the epoll set, since there is no copy of it
            if masked {
                epoll.add(&listener, readable(listener.as_raw_fd()))?;
                masked = false;
            }
            continue;
        }
        match accept(&listener) {
            Ok((connection, peer)) => {
                let fd = connection.as_raw_fd();
                event!("accepted", peer = peer, fd = fd);
                epoll.add(&connection, readable(fd))?;
                connections.insert(fd as u64, connection);
            }
            Err(Errno::EMFILE) => {
                failures += 1;
                if failures.is_power_of_two() {
                    event!("accept-failed", errno = name(Errno::EMFILE), times = failures);
                }
                match args.cure {
                    Cure::None => {}
                    Cure::Reserve => turn_away(&listener, &mut reserve)?,
                    Cure::Mask => {
                        epoll.delete(&listener)?;
                        masked = true;
                    }
                }
            }
            Err(_) => {} // EAGAIN: the client is gone
        }
    }
}

/// Uses the descriptor that is kept for this to accept the client and close it.
fn turn_away(listener: &TcpListener, reserve: &mut Option<File>) -> net::Result {
    drop(reserve.take());
    if let Ok((connection, peer)) = accept(listener) {
        drop(connection);
        event!("closed", peer = peer, reason = "no descriptor left");
    }
    *reserve = Some(File::open("/dev/null")?);
    Ok(())
}
