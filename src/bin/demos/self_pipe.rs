//! A signal between the check and the wait is lost, and six ways not to lose it.
//!
//! A handler that sets a flag is not enough: the flag is looked at, the signal comes, and the wait
//! that follows knows nothing of it. Here the signal comes there by construction: raise(3).
//!
//! ```text
//!   select      flag? no --> [signal] --> select(client) ............... asleep, the flag is set
//!   self-pipe   flag? no --> [signal: handler writes] --> select(client, pipe) returns: pipe
//!   pselect, ppoll, epoll-pwait   blocked, flag? no --> [pending] --> unblocks and waits: EINTR
//!   signalfd    blocked              --> [pending] --> poll(client, signalfd) returns: signalfd
//!   pidfd       a child, alive       --> [it ends] --> poll(client, pidfd) returns: pidfd
//! ```
//!
//! What to notice: with `--wait select` the client gets its goodbye only after it has sent a byte,
//! though the flag was set long before; with each cure at once (self_pipe.rs in tests).
//! Break it: take SIGUSR1 out of the signalfd's set, or block nothing: which cures still work?
//! Compare: net/drain.rs, whose handlers shut the sockets down: a seventh cure. net/children.rs.
//! Run: cargo run --bin self-pipe-demo -- --wait select    then: cargo run --bin peer -- connect recv
//! See: select(2), ppoll(2), signalfd(2), epoll_pwait(2), pidfd_open(2); TLPI 63.5; UNP 20.5.
#![allow(unsafe_code, reason = "installs a signal handler, forks, and calls epoll_pwait(2)")]

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering::Relaxed};

use clap::{Parser, ValueEnum};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll, ppoll};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::select::{FdSet, pselect, select};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, raise, sigaction};
use nix::sys::signalfd::SignalFd;
use nix::sys::socket::{MsgFlags, recv, send};
use nix::unistd::pipe2;
use serverlab::event;
use serverlab::net::{self, args::ListenAt, children::Doomed, listen::accept_one, listen::name};

/// Loses a signal between the check and the wait, or does not
#[derive(Parser)]
struct Args {
    #[command(flatten)]
    at: ListenAt,
    /// How to wait
    #[arg(long, value_enum, default_value = "select")]
    wait: Wait,
}

#[rustfmt::skip]
#[derive(ValueEnum, Clone, Copy, PartialEq)]
enum Wait { Select, SelfPipe, Pselect, Ppoll, EpollPwait, Signalfd, Pidfd }

const FOR_EVER: PollTimeout = PollTimeout::NONE;
static SIGNALED: AtomicBool = AtomicBool::new(false);
static PIPE: AtomicI32 = AtomicI32::new(-1);

extern "C" fn handler(_: libc::c_int) {
    let errno = Errno::last_raw();
    SIGNALED.store(true, Relaxed);
    // SAFETY: write(2) reads one byte. Without a pipe it says EBADF, and that is that.
    unsafe { libc::write(PIPE.load(Relaxed), b"!".as_ptr().cast(), 1) };
    Errno::set_raw(errno);
}

fn main() -> net::Result {
    let args = Args::parse();
    net::event::start("self-pipe-demo", false);
    let action = SigAction::new(SigHandler::Handler(handler), SaFlags::SA_RESTART, SigSet::empty());
    // SAFETY: the handler calls nothing but write(2), and restores errno.
    unsafe { sigaction(Signal::SIGUSR1, &action) }?;
    let mut child = Doomed::fork()?; // before there is a connection that it would share
    let connection = accept_one(args.at.address())?;
    let client = connection.as_fd();
    // What each way waits for, besides the client:
    let (none, usr1) = (SigSet::empty(), SigSet::from(Signal::SIGUSR1));
    let pipe = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?; // full already: as good as written
    let signals = SignalFd::new(&usr1)?;
    let readable = |fd| PollFd::new(fd, PollFlags::POLLIN);
    let mut set = FdSet::new();
    set.insert(client);
    match args.wait {
        Wait::Select | Wait::Pidfd => {}
        Wait::SelfPipe => {
            set.insert(pipe.0.as_fd());
            PIPE.store(pipe.1.as_raw_fd(), Relaxed);
        }
        _ => usr1.thread_block()?, // from here on it can only become pending
    }

    // 1. The check. Nothing has happened yet.
    event!("checked", signaled = SIGNALED.load(Relaxed));
    // 2. Now.
    if args.wait == Wait::Pidfd { child.end() } else { raise(Signal::SIGUSR1) }?;
    event!("raised", signaled = SIGNALED.load(Relaxed));
    // 3. The wait.
    let woken = match args.wait {
        Wait::Select | Wait::SelfPipe => select(None, &mut set, None, None, None),
        Wait::Pselect => pselect(None, &mut set, None, None, None, &none),
        Wait::Ppoll => ppoll(&mut [readable(client)], None, Some(none)),
        Wait::EpollPwait => epoll_pwait(client, &none),
        Wait::Signalfd => poll(&mut [readable(client), readable(signals.as_fd())], FOR_EVER),
        Wait::Pidfd => poll(&mut [readable(client), readable(child.as_fd())], FOR_EVER),
    };
    let spoke = recv(client.as_raw_fd(), &mut [0], MsgFlags::MSG_DONTWAIT).is_ok();
    let by = if spoke { "client" } else { "descriptor" };
    let by = woken.map_or_else(|errno| name(errno).to_string(), |_| by.to_owned());
    event!("woken", by = by);
    event!("sent", bytes = send(client.as_raw_fd(), b"bye", MsgFlags::MSG_NOSIGNAL)?);
    Ok(())
}

fn epoll_pwait(client: BorrowedFd<'_>, mask: &SigSet) -> nix::Result<i32> {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    epoll.add(client, EpollEvent::new(EpollFlags::EPOLLIN, 0))?;
    let (fd, mut event) = (epoll.0.as_raw_fd(), libc::epoll_event { events: 0, u64: 0 });
    // SAFETY: the kernel writes one event and reads the mask.
    Errno::result(unsafe { libc::epoll_pwait(fd, &raw mut event, 1, -1, mask.as_ref()) })
}
