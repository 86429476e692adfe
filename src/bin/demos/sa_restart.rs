//! A signal comes while a call waits: with SA_RESTART some go on, others fail with EINTR even so.
//!
//! When the handler has run, the call that it interrupted either fails with EINTR or starts again.
//! Without SA_RESTART all of them fail. With it, those start again that wait without a limit of
//! time for one descriptor; a wait for many, or for a time, fails, and its loop must be ours.
//!
//! ```text
//!                            plain    SA_RESTART
//!   accept, recv             EINTR    waits on            [SIGUSR1] --> handler --> accept again
//!   recv with SO_RCVTIMEO    EINTR    EINTR               [SIGUSR1] --> handler --> EINTR
//!   select, poll, epoll      EINTR    EINTR
//!   nanosleep                EINTR    EINTR
//! ```
//!
//! What to notice: SO_RCVTIMEO changes what a signal does to recv, though it has not run out
//! (self_pipe.rs). BSD's signal(2), and so glibc's, sets SA_RESTART; sigaction(2) leaves it out.
//! Break it: SIGSTOP, then SIGCONT: no handler runs, and yet epoll_wait and the recv with a timeout
//! fail with EINTR.
//! Compare: self_pipe.rs, a signal just before the call; net/drain.rs, which wants the EINTR.
//! Run: cargo run --bin sa-restart-demo -- --call accept --restart    then: kill -USR1 PID
//! See: signal(7) "Interruption of system calls", sigaction(2); UNP 5.9; TLPI 21.5.
#![allow(unsafe_code, reason = "installs a signal handler and calls nanosleep(2)")]

use std::net::TcpListener;
use std::os::fd::{AsFd, AsRawFd};

use clap::{Parser, ValueEnum};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::select::{FdSet, select};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use nix::sys::socket::{MsgFlags, recv, setsockopt, sockopt::ReceiveTimeout};
use nix::sys::time::{TimeVal, TimeValLike};
use serverlab::event;
use serverlab::net::listen::{accept, bind, name, open, start_listening};
use serverlab::net::{self, args::ListenAt};

/// Waits in one call, and tells what becomes of it when SIGUSR1 comes
#[derive(Parser)]
#[command(version)]
struct Args {
    #[command(flatten)]
    at: ListenAt,
    /// Where to wait; all but accept take one client first
    #[arg(long, value_enum, default_value = "accept")]
    call: Call,
    /// Install the handler with SA_RESTART
    #[arg(long)]
    restart: bool,
}

#[rustfmt::skip]
#[derive(ValueEnum, Clone, Copy, PartialEq)]
enum Call { Accept, Recv, RecvTimeout, Select, Poll, EpollWait, Nanosleep }

extern "C" fn handler(_: libc::c_int) {
    let errno = Errno::last_raw();
    event!("signaled", signal = "SIGUSR1"); // async-signal-safe
    Errno::set_raw(errno);
}

fn main() -> net::Result {
    let args = Args::parse();
    net::event::start("sa-restart-demo", false);
    let listener = open(args.at.address())?;
    bind(&listener, args.at.address())?;
    start_listening(&listener, 128)?;
    let flags = if args.restart { SaFlags::SA_RESTART } else { SaFlags::empty() };
    let action = SigAction::new(SigHandler::Handler(handler), flags, SigSet::empty());
    // SAFETY: the handler prints an event, which is async-signal-safe, and restores errno.
    unsafe { sigaction(Signal::SIGUSR1, &action) }?;
    match wait(args.call, &listener) {
        Ok(()) => event!("completed"),
        Err(errno) => event!("failed", errno = name(errno)),
    }
    Ok(())
}

/// One call that waits; a signal finds it there.
fn wait(call: Call, listener: &TcpListener) -> nix::Result<()> {
    let waiting = || event!("set", signal = "SIGUSR1"); // the last word before the call
    if call == Call::Accept {
        waiting();
        return accept(listener).map(drop);
    }
    let (client, peer) = accept(listener)?;
    event!("accepted", peer = peer, fd = client.as_raw_fd());
    let mut readable = FdSet::new();
    readable.insert(client.as_fd());
    let mut fds = [PollFd::new(client.as_fd(), PollFlags::POLLIN)];
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    epoll.add(&client, EpollEvent::new(EpollFlags::EPOLLIN, 0))?;
    if call == Call::RecvTimeout {
        setsockopt(&client, ReceiveTimeout, &TimeVal::seconds(60))?;
    }
    waiting();
    match call {
        Call::Accept => unreachable!("see above"),
        Call::Recv | Call::RecvTimeout => {
            recv(client.as_raw_fd(), &mut [0; 16], MsgFlags::empty()).map(drop)
        }
        Call::Select => select(None, &mut readable, None, None, None).map(drop),
        Call::Poll => poll(&mut fds, PollTimeout::NONE).map(drop),
        Call::EpollWait => epoll.wait(&mut [EpollEvent::empty()], EpollTimeout::NONE).map(drop),
        Call::Nanosleep => {
            let minute = libc::timespec { tv_sec: 60, tv_nsec: 0 };
            // SAFETY: the kernel reads one timespec, and is not asked what was left of it.
            Errno::result(unsafe { libc::nanosleep(&raw const minute, std::ptr::null_mut()) })
                .map(drop)
        }
    }
}
