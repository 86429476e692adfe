//! What epoll watches is the open file, not the number: a copy keeps a closed descriptor reported.
//!
//! ```text
//!   dup     EPOLL_CTL_ADD(fd) --> dup(fd) --> close(fd) --> [data]  event for fd, which is closed
//!           EPOLL_CTL_DEL(fd): EBADF: it can no longer be named
//!   fork    the same, where the copy is a child's: one that does nothing but live
//!   delete  EPOLL_CTL_DEL(fd) --> close(fd)                         no event: the cure
//!   hangup  EPOLL_CTL_ADD(fd, no events) --> [RST]                  EPOLLERR, EPOLLHUP all the same,
//!                                                                   at each epoll_wait, until close
//! ```
//!
//! What to notice: with level triggering each of them is a loop at full speed: `woken` counts its
//! turns (descriptors.rs in tests).
//! Break it: `--trap dup` with EPOLLET: one event, and the descriptor still cannot be named.
//! Compare: emfile.rs, the other way to spin; poll(2), which is given the numbers each time.
//! Run: cargo run --bin epoll-traps-demo -- --trap dup     then: cargo run --bin peer -- connect send:1
//! See: epoll(7) "Questions and answers" 6, epoll_ctl(2); TLPI 63.4.4.
#![allow(unsafe_code, reason = "forks")]

use std::os::fd::{AsFd, AsRawFd};

use clap::{Parser, ValueEnum};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::unistd::{ForkResult, dup, fork, pause};
use serverlab::event;
use serverlab::net::{self, args::ListenAt, listen::accept_one, listen::name};

/// Walks into a trap of epoll with one client's connection
#[derive(Parser)]
#[command(version)]
struct Args {
    #[command(flatten)]
    at: ListenAt,
    /// Which
    #[arg(long, value_enum, default_value = "dup")]
    trap: Trap,
}

#[derive(ValueEnum, Clone, Copy, PartialEq)]
enum Trap {
    Dup,
    Fork,
    Delete,
    Hangup,
}

/// Turns of the loop that are enough to call it a spin.
const TURNS: u32 = 1000;

fn main() -> net::Result {
    let args = Args::parse();
    net::event::start("epoll-traps-demo", false);
    let connection = accept_one(args.at.address())?;
    let fd = connection.as_raw_fd();
    let copy = dup(&connection)?; // ours, to see when the data is here
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    let wanted = if args.trap == Trap::Hangup { EpollFlags::empty() } else { EpollFlags::EPOLLIN };
    epoll.add(&connection, EpollEvent::new(wanted, fd as u64))?;

    let mut kept = Some(connection);
    match args.trap {
        Trap::Dup => drop(kept.take()), // `copy` is the other descriptor of this open file
        // SAFETY: this process has one thread, and the child does nothing but wait for signals.
        Trap::Fork => match unsafe { fork() }? {
            ForkResult::Child => loop {
                pause();
            },
            ForkResult::Parent { child } => {
                event!("forked", child = child);
                drop(kept.take());
            }
        },
        Trap::Delete => {
            epoll.delete(kept.as_ref().map_or(copy.as_fd(), AsFd::as_fd))?;
            drop(kept.take());
        }
        Trap::Hangup => {}
    }
    event!("closed", fd = fd, kept = kept.is_some());
    if args.trap != Trap::Hangup {
        // SAFETY: fcntl takes two numbers here. The number is nobody's, which is the point.
        let gone = nix::errno::Errno::result(unsafe { libc::fcntl(fd, libc::F_GETFD) });
        event!(
            "checked",
            fd = fd,
            errno = gone.err().map_or("none".into(), |e| name(e).to_string())
        );
    }

    let flags = PollFlags::POLLIN;
    poll(&mut [PollFd::new(copy.as_fd(), flags)], PollTimeout::NONE)?; // data, or the RST, is here
    let (mut turns, mut last) = (0, EpollEvent::empty());
    while turns < TURNS {
        let mut events = [EpollEvent::empty()];
        if epoll.wait(&mut events, EpollTimeout::ZERO)? == 0 {
            break;
        }
        (turns, last) = (turns + 1, events[0]);
    }
    let (told, events) = (last.data(), format!("{:?}", last.events()));
    event!("woken", turns = turns, fd = told, events = events);
    Ok(())
}
