//! SIGTERM and SIGINT: finish what is being served, accept nothing new, exit with status 0.
//!
//! A flag that a handler sets is not enough: a signal that comes between the look at the flag and
//! the call that blocks leaves the program blocked (the race that the self-pipe cures, TLPI
//! 63.5.2). These handlers change the sockets instead, and a changed socket is seen by the call
//! that comes next as well as by the one that is blocked already:
//!
//! - the listener is shut down: every accept(2) on it, in every process that shares it, fails with
//!   EINVAL, and the kernel resets what is still in its queue;
//! - the connections being served have their receiving half shut down: what has been received can
//!   still be read and answered, then recv(2) returns 0, as if the client had closed.
//!
//! A process that shares its listener with others must not shut it down. It relies on EINTR, and
//! makes good for the race with a timer: SIGALRM interrupts it again and again until it has ended.
//!
//! shutdown(2) and getpid(2) are async-signal-safe (signal-safety(7)), and setitimer(2) is a bare
//! system call.
#![allow(unsafe_code, reason = "installs signal handlers and calls shutdown(2) in them")]

use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};

use nix::errno::Errno;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use nix::unistd::getpid;

/// What the handlers look at. All zero at first, so that the executable need not hold the table.
struct State {
    draining: AtomicBool,
    /// Whether the handler starts the timer.
    alone: AtomicBool,
    /// The listener's descriptor plus one, or [`NONE`].
    listener: AtomicI32,
    /// The process whose listener it is. A child that it forks has the number, and the handlers, but
    /// nothing to do with the listener.
    owner: AtomicI32,
    /// A bit for each descriptor, set while it is a connection being served: a table that a handler
    /// can read whatever the threads are doing. Pages of it that nobody touches cost nothing.
    served: [AtomicU64; MAX_DESCRIPTORS / 64],
}

static STATE: State = State {
    draining: AtomicBool::new(false),
    alone: AtomicBool::new(false),
    listener: AtomicI32::new(NONE),
    owner: AtomicI32::new(0),
    served: [const { AtomicU64::new(0) }; _],
};

const NONE: i32 = 0;

/// The kernel's own limit of descriptors in a process, unless fs.nr_open was raised. What is over it
/// is served all the same, but SIGTERM waits for its client.
const MAX_DESCRIPTORS: usize = 1 << 20;

/// Makes SIGTERM and SIGINT shut down this listener, so that accept(2) fails with EINVAL, and set
/// [`begun`]. No SA_RESTART: a blocked call returns EINTR, for those who wait for something else.
///
/// # Errors
/// sigaction(2)'s.
pub fn on_sigterm(listener: impl AsFd) -> nix::Result<()> {
    STATE.listener.store(listener.as_fd().as_raw_fd() + 1, Ordering::Relaxed);
    STATE.owner.store(getpid().as_raw(), Ordering::Relaxed);
    handle_signals()
}

/// The same for a process that shares the listener with others: it stops accepting, they go on.
/// That is so for each worker of a pool.
///
/// # Errors
/// sigaction(2)'s.
pub fn on_sigterm_alone() -> nix::Result<()> {
    STATE.listener.store(NONE, Ordering::Relaxed);
    let action = SigAction::new(SigHandler::Handler(interrupt), SaFlags::empty(), SigSet::empty());
    // SAFETY: the handler does nothing.
    unsafe { sigaction(Signal::SIGALRM, &action) }?;
    STATE.alone.store(true, Ordering::Relaxed);
    handle_signals()
}

/// SIGALRM's handler: that it runs is enough for a blocked call to return EINTR.
extern "C" fn interrupt(_: libc::c_int) {}

fn handle_signals() -> nix::Result<()> {
    let action = SigAction::new(SigHandler::Handler(handler), SaFlags::empty(), SigSet::empty());
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        // SAFETY: the handler makes only bare system calls (shutdown(2), getpid(2), setitimer(2)),
        // touches only atomics and restores errno.
        unsafe { sigaction(signal, &action) }?;
    }
    Ok(())
}

/// Says that this connection is being served, until [`served`] is called with it.
///
/// A parent can say so for the child that it is about to fork. It changes nothing if this number was
/// said before, and so neither process has to copy a page of memory for it.
pub fn serving(connection: impl AsFd) {
    let fd = connection.as_fd().as_raw_fd();
    if let Some((word, bit)) = place(fd)
        && word.load(Ordering::SeqCst) & bit == 0
    {
        word.fetch_or(bit, Ordering::SeqCst);
    }
    if begun() {
        stop_receiving(fd); // the signal came before we knew whom to serve
    }
}

/// Says that the connection is about to be closed: its number may soon name another.
pub fn served(connection: impl AsFd) {
    if let Some((word, bit)) = place(connection.as_fd().as_raw_fd()) {
        word.fetch_and(!bit, Ordering::SeqCst);
    }
}

fn place(fd: RawFd) -> Option<(&'static AtomicU64, u64)> {
    let fd = usize::try_from(fd).ok()?;
    Some((STATE.served.get(fd / 64)?, 1 << (fd % 64)))
}

/// Gives SIGTERM and SIGINT their default action, as before an exec(3) in a forked child; ends the
/// process if one of them has come already. So none is lost between fork and exec.
///
/// # Errors
/// sigaction(2)'s.
pub fn default_again() -> nix::Result<()> {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let action = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
        // SAFETY: the default action runs no code of ours.
        unsafe { sigaction(signal, &action) }?;
    }
    if begun() {
        std::process::exit(0);
    }
    Ok(())
}

/// Whether SIGTERM or SIGINT has come.
pub fn begun() -> bool {
    STATE.draining.load(Ordering::SeqCst)
}

/// Begins as SIGTERM does, for those who wait for signals without a handler.
pub fn begin() {
    STATE.draining.store(true, Ordering::SeqCst);
    let listener = STATE.listener.load(Ordering::Relaxed);
    if listener != NONE && STATE.owner.load(Ordering::Relaxed) == getpid().as_raw() {
        // SAFETY: shutdown has no memory to break; a descriptor that is gone gives EBADF.
        unsafe { libc::shutdown(listener - 1, libc::SHUT_RDWR) };
    }
    for (number, word) in STATE.served.iter().enumerate() {
        let bits = word.load(Ordering::SeqCst);
        for bit in (0..64).filter(|bit| bits >> bit & 1 == 1) {
            stop_receiving((number * 64 + bit) as RawFd);
        }
    }
}

extern "C" fn handler(_: libc::c_int) {
    let errno = Errno::last_raw();
    begin();
    if STATE.alone.load(Ordering::Relaxed) {
        let every = libc::timeval { tv_sec: 0, tv_usec: 20_000 };
        let timer = libc::itimerval { it_interval: every, it_value: every };
        // SAFETY: the timer outlives the call, which reads it.
        unsafe { libc::setitimer(libc::ITIMER_REAL, &raw const timer, std::ptr::null_mut()) };
    }
    Errno::set_raw(errno);
}

/// Lets a connection come to its end: what has been received is still answered.
pub fn stop_receiving(connection: RawFd) {
    // SAFETY: shutdown has no memory to break; a descriptor that is gone gives EBADF.
    unsafe { libc::shutdown(connection, libc::SHUT_RD) };
}
