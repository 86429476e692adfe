//! Ten children end, one SIGCHLD comes: who reaps one child a signal leaves nine zombies.
//!
//! Signals do not queue. While SIGCHLD is blocked, or its handler runs, ten ends are one pending
//! signal. A zombie is a child that has ended and that nobody has waited for: it has no memory and
//! no descriptors left, but its pid and its status.
//!
//! ```text
//!   parent   block SIGCHLD --> fork x 10 --> [all have ended] --> unblock: the handler runs once
//!   handler  --reap one   wait()                                    1 reaped, 9 zombies
//!            --reap all   while waitpid(-1, WNOHANG) > 0            10 reaped
//!   no handler, --reap kernel   SIGCHLD ignored                     nothing to reap, ever
//! ```
//!
//! What to notice: `signaled` comes once in each case (signals.rs in tests). UNP shows the wrong
//! handler beside the right one: its server leaves zombies only when clients end together.
//! Break it: do not block the signal: how many run of ten is then a matter of luck.
//! Compare: net/children.rs, what the servers here do; servers/fork.rs.
//! Run: cargo run --bin zombies-demo -- --reap one      then: ps --ppid PID -o pid,stat
//! See: wait(2), sigaction(2) SA_NOCLDWAIT, signal(7); UNP 5.8-5.10; TLPI 26.2-26.3.
#![allow(unsafe_code, reason = "installs a signal handler and forks")]

use clap::{Parser, ValueEnum};
use nix::errno::Errno;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, wait, waitid, waitpid};
use nix::unistd::{ForkResult, Pid, fork};
use serverlab::event;
use serverlab::net::{self, children::reaped};

/// Lets ten children end at once, reaps them in a way, and waits for the end of its input
#[derive(Parser)]
#[command(version)]
struct Args {
    /// What to do about them
    #[arg(long, value_enum, default_value = "one")]
    reap: Reap,
    /// How many
    #[arg(long, default_value_t = 10)]
    children: u32,
}

#[derive(ValueEnum, Clone, Copy, PartialEq)]
enum Reap {
    One,
    All,
    Kernel,
}

fn main() -> net::Result {
    let args = Args::parse();
    net::event::start("zombies-demo", false);
    let handler = match args.reap {
        Reap::One => SigHandler::Handler(reap_one),
        Reap::All => SigHandler::Handler(reap_all),
        Reap::Kernel => SigHandler::SigIgn,
    };
    let action = SigAction::new(handler, SaFlags::SA_RESTART, SigSet::empty());
    // SAFETY: the handlers wait and print events, which is async-signal-safe, and restore errno.
    unsafe { sigaction(Signal::SIGCHLD, &action) }?;

    let sigchld = SigSet::from(Signal::SIGCHLD);
    sigchld.thread_block()?;
    for _ in 0..args.children {
        // SAFETY: this process has one thread, and the child calls only _exit(2).
        match unsafe { fork() }? {
            // SAFETY: _exit takes a number and does not return.
            ForkResult::Child => unsafe { libc::_exit(0) },
            ForkResult::Parent { child } => {
                event!("forked", child = child);
                // Until it has ended; WNOWAIT leaves it to be reaped. ECHILD: the kernel was quicker.
                let _ = waitid(Id::Pid(child), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT);
            }
        }
    }
    event!("checked", children = args.children);
    sigchld.thread_unblock()?; // what is pending comes before the call returns
    event!("woken", by = "SIGCHLD");
    let _ = std::io::stdin().read_line(&mut String::new());
    Ok(())
}

extern "C" fn reap_one(_: libc::c_int) {
    let errno = Errno::last_raw();
    event!("signaled", signal = "SIGCHLD");
    if let Ok(status) = wait() {
        reaped(status);
    }
    Errno::set_raw(errno);
}

extern "C" fn reap_all(_: libc::c_int) {
    let errno = Errno::last_raw();
    event!("signaled", signal = "SIGCHLD");
    while let Ok(status) = waitpid(None::<Pid>, Some(WaitPidFlag::WNOHANG)) {
        if status == WaitStatus::StillAlive {
            break;
        }
        reaped(status);
    }
    Errno::set_raw(errno);
}
