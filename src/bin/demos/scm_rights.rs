//! Descriptors in a message: too many for the receiver, kept by exec, or never received.
//!
//! SCM_RIGHTS puts a reference to the open file into the message. From then on the sender may close
//! its own: the message keeps the connection open, and is one of those whose last close sends FIN.
//!
//! ```text
//!   accept x 5 --> sendmsg(SCM_RIGHTS: 5) --> close x 5          5 connections, nobody's
//!     --then receive  recvmsg, room for 2                        2, and MSG_CTRUNC: 3 x FIN
//!     --then exec     recvmsg, no MSG_CMSG_CLOEXEC --> execve    the program has them, unasked
//!     --then close    close the channel                          5 x FIN
//! ```
//!
//! What to notice: MSG_CTRUNC is all that tells the receiver of those that did not fit; they are
//! closed, not lost to a number that nobody knows (descriptors.rs in tests). Room is for an even
//! number: CMSG_SPACE rounds up to 8 bytes, and the kernel uses what there is.
//! Break it: `--then exec --cloexec`: exec closes them all, and their clients see FIN.
//! Compare: servers/prefork_fdpass.rs, and net/passing.rs, which has room for all there can be.
//! Run: cargo run --bin scm-rights-demo -- --clients 3    then: cargo run --bin peer -- \
//!      connect connect connect recv older recv older recv   (the third is told first)
//! See: unix(7) SCM_RIGHTS, recvmsg(2) MSG_CTRUNC, MSG_CMSG_CLOEXEC; UNP 15.7; TLPI 61.13.3.

use std::ffi::CString;
use std::os::fd::AsFd;

use anyhow::Context as _;
use clap::{Parser, ValueEnum};
use nix::sys::socket::MsgFlags;
use nix::unistd::execv;
use serverlab::event;
use serverlab::net::listen::{accept, bind, open, start_listening};
use serverlab::net::{self, args::ListenAt, passing};

/// Takes some clients, passes them in one message to itself, and receives them or not
#[derive(Parser)]
#[command(version)]
struct Args {
    #[command(flatten)]
    at: ListenAt,
    /// How many clients to take
    #[arg(long, default_value_t = 5, value_name = "N")]
    clients: usize,
    /// What to do with the message
    #[arg(long, value_enum, default_value = "receive")]
    then: Then,
    /// How many descriptors the receiver has room for
    #[arg(long, default_value_t = 2, value_name = "N")]
    room: usize,
    /// Receive with MSG_CMSG_CLOEXEC
    #[arg(long)]
    cloexec: bool,
    /// Be the program that is executed
    #[arg(long, hide = true)]
    live: bool,
}

#[derive(ValueEnum, Clone, Copy, PartialEq)]
enum Then {
    Receive,
    Exec,
    Close,
}

fn main() -> net::Result {
    let args = Args::parse();
    net::event::start("scm-rights-demo", false);
    if args.live {
        event!("started");
        net::pause();
        return Ok(());
    }
    let listener = open(args.at.address())?;
    bind(&listener, args.at.address())?;
    start_listening(&listener, 128)?;
    let (left, right) = passing::pair()?; // both ends are ours: a message waits between them
    let clients = (0..args.clients).map(|_| Ok(accept(&listener).context("cannot accept")?.0));
    let clients = clients.collect::<anyhow::Result<Vec<_>>>()?;
    drop(listener);
    passing::send(&left, b"take", &clients.iter().map(AsFd::as_fd).collect::<Vec<_>>())?;
    drop(clients); // close(2) of each: no packet, since the message has them all
    event!("passed", descriptors = args.clients);
    net::pause();

    if args.then == Then::Close {
        drop((left, right)); // and with the channel goes what nobody can receive any more
        event!("closed", what = "channel");
        net::pause();
        return Ok(());
    }
    let flags = if args.cloexec { MsgFlags::MSG_CMSG_CLOEXEC } else { MsgFlags::empty() };
    let message = passing::receive_with_room(&right, &mut [0; 16], args.room, flags)?;
    let (descriptors, truncated) = (message.descriptors, message.truncated);
    event!("received", bytes = message.length, descriptors = descriptors.len(), cut = truncated);
    net::pause();
    if args.then == Then::Exec {
        let program = [c"scm-rights-demo", c"--live"].map(CString::from);
        execv(c"/proc/self/exe", &program)?; // closes the channel, which is close-on-exec
    }
    drop(descriptors);
    event!("closed", what = "descriptors");
    net::pause();
    Ok(())
}
