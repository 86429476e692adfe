//! A descriptor without close-on-exec goes to every program that is started: a server's port with
//! it.
//!
//! ```text
//!   server   listen --> fork --> exit: the port is free?
//!                        |
//!   child                +--> execve(another program) ... lives on, with the listener or without
//! ```
//!
//! What to notice: the program that was executed knows nothing of the socket and keeps the port;
//! clients connect to it and wait for ever (descriptors.rs in tests). accept4 and socket take
//! SOCK_CLOEXEC; Rust's std sets it everywhere, C and the shell do not.
//! Break it: `--cloexec`.
//! Compare: servers/fork.rs: there is no exec, so the child closes the listener itself.
//! Run: cargo run --bin inherit-demo             then: ss -ltnp sport = 2000
//! See: execve(2), fcntl(2) FD_CLOEXEC, socket(2); TLPI 27.4; UNP 4.7.
#![allow(unsafe_code, reason = "forks")]

use std::ffi::CString;

use clap::Parser;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::unistd::{ForkResult, execv, fork, pause};
use serverlab::event;
use serverlab::net::listen::{bind, open, start_listening};
use serverlab::net::{self, args::ListenAt};

/// Listens, starts a program that lives on, and exits
#[derive(Parser)]
#[command(version)]
struct Args {
    #[command(flatten)]
    at: ListenAt,
    /// Keep close-on-exec on the listener
    #[arg(long)]
    cloexec: bool,
    /// Be the program that is started: wait for a signal
    #[arg(long, hide = true)]
    live: bool,
}

fn main() -> net::Result {
    let args = Args::parse();
    net::event::start("inherit-demo", false);
    if args.live {
        event!("started", descriptors = open_descriptors()?);
        loop {
            pause();
        }
    }
    let listener = open(args.at.address())?; // close-on-exec, as all our sockets
    bind(&listener, args.at.address())?;
    if !args.cloexec {
        fcntl(&listener, FcntlArg::F_SETFD(FdFlag::empty()))?;
    }
    start_listening(&listener, 128)?;
    // SAFETY: this process has one thread.
    match unsafe { fork() }? {
        ForkResult::Child => {
            let program = [c"inherit-demo", c"--live"].map(CString::from);
            execv(c"/proc/self/exe", &program)?;
            unreachable!("execv returns only to fail")
        }
        ForkResult::Parent { child } => event!("forked", child = child),
    }
    Ok(())
}

/// How many descriptors this process has open, beyond the three that every program has.
fn open_descriptors() -> std::io::Result<usize> {
    let reading = 1; // the folder's own
    Ok(std::fs::read_dir("/proc/self/fd")?.count() - 3 - reading)
}
