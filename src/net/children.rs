//! SIGCHLD: every child is reaped, however many have ended when the signal comes.
//!
//! Signals do not queue: ten children that end while SIGCHLD is blocked, or while its handler
//! runs, are one more run of the handler (TLPI 26.3.1). So the handler calls waitpid(2) until it
//! has nobody left to report. It prints `reaped` from inside the handler, which
//! [`crate::net::event`] allows.
#![allow(unsafe_code, reason = "installs a signal handler, forks, and calls pidfd_open(2)")]

use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, kill, sigaction};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid};
use nix::unistd::{ForkResult, Pid, fork, pipe2};

use crate::event;

/// Reaps children as they end, by a handler of SIGCHLD. SA_RESTART: whoever accepts or receives
/// meanwhile does not notice. SA_NOCLDSTOP: a stopped child has not ended.
///
/// # Errors
/// sigaction(2)'s.
pub fn reap_on_sigchld() -> nix::Result<()> {
    let flags = SaFlags::SA_RESTART | SaFlags::SA_NOCLDSTOP;
    let action = SigAction::new(SigHandler::Handler(handler), flags, SigSet::empty());
    // SAFETY: the handler calls waitpid(2) and prints an event, both async-signal-safe, and
    // restores errno.
    unsafe { sigaction(Signal::SIGCHLD, &action) }?;
    Ok(())
}

extern "C" fn handler(_: libc::c_int) {
    let errno = Errno::last_raw();
    while let Ok(status) = waitpid(None::<Pid>, Some(WaitPidFlag::WNOHANG)) {
        if status == WaitStatus::StillAlive {
            break;
        }
        reaped(status);
    }
    Errno::set_raw(errno);
}

/// Prints `reaped` for a child that waitpid(2) reported.
pub fn reaped(status: WaitStatus) {
    match status {
        WaitStatus::Exited(pid, code) => event!("reaped", child = pid, status = code),
        WaitStatus::Signaled(pid, signal, _) => event!("reaped", child = pid, signal = signal),
        _ => {}
    }
}

/// Sends SIGTERM to every child of this thread and waits until none is left.
///
/// A child that has not called [`crate::net::drain::serving`] yet still holds the signal for it.
pub fn terminate() {
    for child in all() {
        let _ = kill(child, Signal::SIGTERM); // ESRCH: it has just ended
    }
    loop {
        match waitpid(None::<Pid>, None) {
            Ok(status) => reaped(status),
            Err(Errno::EINTR) => {}
            Err(_) => return, // ECHILD: the handler has reaped the last one
        }
    }
}

/// A child that lives until it is told to end, and a descriptor that becomes readable when it has:
/// pidfd_open(2).
#[derive(Debug)]
pub struct Doomed {
    pidfd: OwnedFd,
    life: Option<OwnedFd>,
}

impl Doomed {
    /// Forks it. Must be called in a process with one thread.
    ///
    /// # Errors
    /// fork(2)'s, pidfd_open(2)'s.
    pub fn fork() -> nix::Result<Doomed> {
        let (end, life) = pipe2(OFlag::O_CLOEXEC)?;
        // SAFETY: the child calls read(2), which returns when `life` is closed, and _exit(2).
        match unsafe { fork() }? {
            ForkResult::Child => {
                drop(life);
                let _ = nix::unistd::read(&end, &mut [0]);
                // SAFETY: _exit takes a number and does not return.
                unsafe { libc::_exit(0) }
            }
            ForkResult::Parent { child } => {
                event!("forked", child = child);
                // SAFETY: pidfd_open takes two numbers.
                let pidfd = unsafe { libc::syscall(libc::SYS_pidfd_open, child.as_raw(), 0) };
                let pidfd = Errno::result(pidfd)? as i32;
                // SAFETY: pidfd_open has just made this descriptor; it is close-on-exec.
                Ok(Doomed { pidfd: unsafe { OwnedFd::from_raw_fd(pidfd) }, life: Some(life) })
            }
        }
    }

    /// Ends it, and returns when it is a zombie: ended, not reaped.
    ///
    /// # Errors
    /// waitid(2)'s.
    pub fn end(&mut self) -> nix::Result<()> {
        self.life = None;
        let until_ended = WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT;
        while let Err(errno) = waitid(Id::PIDFd(self.pidfd.as_fd()), until_ended) {
            if errno != Errno::EINTR {
                return Err(errno);
            }
        }
        Ok(())
    }
}

impl AsFd for Doomed {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

/// The children of this thread, as /proc/self/task/TID/children lists them (proc(5)).
fn all() -> Vec<Pid> {
    let list = format!("/proc/self/task/{}/children", nix::unistd::gettid());
    let children = std::fs::read_to_string(&list).or_else(|_| {
        // EMFILE, if descriptors have run out. A server that ends needs no standard input.
        // SAFETY: nothing in this package reads it, and nobody owns it.
        unsafe { libc::close(libc::STDIN_FILENO) };
        std::fs::read_to_string(&list)
    });
    let children = children.unwrap_or_default();
    children.split_whitespace().filter_map(|pid| pid.parse().ok()).map(Pid::from_raw).collect()
}
