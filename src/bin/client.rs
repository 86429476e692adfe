//! The one client: it works with every server.
//!
//! It forks `-c` children. Each makes `-t` connections, one after another, asks for `-b` bytes `-k`
//! times on each, and checks that so many come. What came of each request is left in memory that
//! all share; the parent makes the summary, and its status is 0 only if every answer was right.
//!
//! ```text
//!   parent   fork, fork, ... --> poll signalfd: SIGCHLD, SIGINT --> waitpid --> summary
//!              |
//!   child      +--> socket --> connect --> send --> recv until all is here --> close --+
//!                      ^                    +-<- -k -<-+                                |
//!                      +------------------------- -t ---------------------------------+
//! ```
//!
//! What to notice: one recv(2) is not one answer: TCP has no messages. The client closes first, so
//! TIME_WAIT is on its side.
//! Break it: `-t 40000`, as fast as it goes, and the local ports run out: EADDRNOTAVAIL.
//! Compare: peer.rs, where each system call is a word on the command line.
//! Run: cargo run --bin fork-server             then: cargo run --bin client -- -c 5 -t 500 -b 4000
//! See: connect(2), recv(2), socket(7) SO_RCVTIMEO, signalfd(2), prctl(2); UNP 30.3; TLPI 61.1.
#![allow(unsafe_code, reason = "fork(2), and _exit(2) in the children")]

use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsRawFd as _;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::Context as _;
use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::socket::{MsgFlags, recv, send};
use nix::unistd::{ForkResult, fork};
use serverlab::net;
use serverlab::net::load::{self, Board, ClientArgs, Failure};

fn main() -> net::Result<ExitCode> {
    let args: ClientArgs = clap::Parser::parse();
    let addresses = load::resolve(&args)?;
    let board = Board::new(args.clients, args.connections * args.keep)
        .context("no memory to record so many requests")?;
    // Blocked, they wait for signalfd(2) to read them: none is missed, and no handler is needed.
    let signals = SigSet::from_iter([Signal::SIGCHLD, Signal::SIGINT, Signal::SIGTERM]);
    signals.thread_block()?;

    let started = Instant::now();
    let mut children = Vec::new();
    for client in 0..args.clients {
        // SAFETY: the process has one thread, so the child may do whatever its parent might.
        match unsafe { fork() } {
            Ok(ForkResult::Parent { child }) => children.push(child),
            Ok(ForkResult::Child) => {
                let _ = nix::sys::prctl::set_pdeathsig(Signal::SIGKILL); // no orphans
                let _ = signals.thread_unblock();
                run_client(client, &args, &addresses, &board);
                // SAFETY: _exit takes a number and does not return.
                unsafe { libc::_exit(0) }
            }
            Err(errno) => {
                eprintln!("client: only {client} of {} clients: fork: {errno}", args.clients);
                break;
            }
        }
    }
    load::watch(children, &signals, &board)?;
    let summary = board.summary(args.bytes, started.elapsed());
    println!("{}", if args.json { summary.json() } else { summary.to_string() });
    Ok(ExitCode::from(u8::from(summary.failed > 0)))
}

/// A child's work: its connections, one after another, and its requests on each.
fn run_client(client: usize, args: &ClientArgs, addresses: &[SocketAddr], board: &Board) {
    let mut buffer = vec![0; 64 * 1024];
    for first in (0..args.connections * args.keep).step_by(args.keep) {
        let mut started = Instant::now();
        let mut connection = load::connect(addresses, args.timeout);
        for number in first..first + args.keep {
            let answer = connection.as_mut().map_err(|failure| *failure);
            let answer = answer.and_then(|connection| ask(connection, args, started, &mut buffer));
            board.record(client, number, answer.map(|()| started.elapsed()));
            if answer.is_err() {
                break; // what should have followed on this connection is not made
            }
            started = Instant::now();
        }
    } // close(2): the client first, as in Stevens, so that TIME_WAIT is here
}

/// One request and its whole answer, no later than the time-out after `started`.
fn ask(
    connection: &TcpStream,
    args: &ClientArgs,
    started: Instant,
    buffer: &mut [u8],
) -> Result<(), Failure> {
    let request = format!("{}\n", args.bytes);
    // A request is a few bytes: it fits into the socket's buffer whole, or not at all.
    send(connection.as_raw_fd(), request.as_bytes(), MsgFlags::MSG_NOSIGNAL)?;
    let mut left = args.bytes;
    while left > 0 {
        let received = match recv(connection.as_raw_fd(), buffer, MsgFlags::empty()) {
            Ok(0) => return Err(Failure::ShortAnswer),
            Ok(received) => received as u64,
            Err(Errno::EINTR) => continue, // stopped and continued (signal(7))
            Err(errno) => return Err(errno.into()),
        };
        left = left.checked_sub(received).ok_or(Failure::LongAnswer)?;
        if left > 0 && started.elapsed() > args.timeout {
            return Err(Failure::TimedOut);
        }
    }
    Ok(())
}
