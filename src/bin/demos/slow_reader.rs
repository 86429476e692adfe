//! A reader that does not read: the window closes to 0, and send takes no more.
//!
//! What send has taken is not yet with the peer's program. It waits in the reader's kernel, received
//! and acknowledged, and, when that is full, in the sender's kernel, which asks from time to time
//! whether there is room again: a window probe.
//!
//! ```text
//!   sender   connect, send ... EAGAIN --> pause, poll, SIOCOUTQ --> close --> exit
//!                      |                                             |
//!   its kernel         +--> what the window lets go                  +--> keeps the rest: FIN-WAIT-1
//!                                   |             probe ... probe ....... probe   --> the rest, FIN
//!   other kernel                    +--> acknowledges, window 0                      |
//!   reader   accept --> pause (does not read) ---------------------> FIONREAD --> recv ... 0
//! ```
//!
//! What to notice: SIOCOUTQ and FIONREAD add up to what send took, to the byte; close returns at
//! once all the same, and the kernel delivers on its own after the sender has exited
//! (flow_control.rs). Each pause between probes is twice the last, up to two minutes.
//! Break it: end the reader with Ctrl-C instead of a line: its unread bytes make a RST of its close.
//! Compare: partial_write.rs, a sender that goes on when there is room; linger.rs, a close that waits.
//! Run: cargo run --bin slow-reader-demo -- reader
//! then: cargo run --bin slow-reader-demo -- sender     and: ss -tno 'sport = 2000 or dport = 2000'
//! See: tcp(7) SIOCOUTQ, SIOCINQ, send(2) MSG_DONTWAIT; UNP 2.11; TLPI 58.6.3; RFC 9293 3.8.6.1.

use std::net::TcpStream;
use std::os::fd::{AsFd, AsRawFd};

use anyhow::Context as _;
use clap::Parser;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, recv, send};
use serverlab::event;
use serverlab::net::args::{ConnectTo, ListenAt};
use serverlab::net::listen::{accept, bind, open, start_listening};
use serverlab::net::options::{FIONREAD, SIOCOUTQ, SO_RCVBUF};
use serverlab::net::{self, pause, script::events};

/// A reader that does not read, and a sender that sends until nothing more is taken
#[derive(Parser)]
#[command(version)]
enum Role {
    /// Takes one connection, and reads from it only after a line on standard input
    Reader(ListenAt),
    /// Sends as much as it can, and closes after a line on standard input
    Sender(ConnectTo),
}

fn main() -> net::Result {
    let role = Role::parse();
    net::event::start("slow-reader-demo", false);
    match role {
        Role::Reader(at) => reader(at),
        Role::Sender(to) => sender(to),
    }
}

fn reader(at: ListenAt) -> net::Result {
    let listener = open(at.address())?;
    SO_RCVBUF.set(&listener, 4096)?; // connections inherit it; afterwards is too late for the window
    bind(&listener, at.address())?;
    start_listening(&listener, 128)?;
    let (connection, peer) = accept(&listener)?;
    event!("accepted", peer = peer, fd = connection.as_raw_fd());

    pause();
    event!("got", option = "FIONREAD", value = FIONREAD.get(&connection)?);
    let (mut buffer, mut total) = ([0; 65536], 0);
    loop {
        match recv(connection.as_raw_fd(), &mut buffer, MsgFlags::empty())? {
            0 => break,
            count => total += count, // and the window opens again
        }
    }
    event!("received", bytes = total);
    event!("received", bytes = 0);
    Ok(())
}

fn sender(to: ConnectTo) -> net::Result {
    let connection = TcpStream::connect(to.address()).context("cannot connect")?;
    event!("connected", peer = to.address());
    let mut total = 0;
    loop {
        match send(connection.as_raw_fd(), &[b'x'; 65536], MsgFlags::MSG_DONTWAIT) {
            Ok(taken) => total += taken,
            Err(Errno::EAGAIN) => break, // a send that may block would block here
            Err(errno) => return Err(errno.into()),
        }
    }
    event!("filled", bytes = total);

    pause();
    let mut fds = [PollFd::new(connection.as_fd(), PollFlags::POLLOUT)];
    poll(&mut fds, PollTimeout::ZERO)?;
    event!("polled", revents = events(fds[0].revents().map_or(0, |revents| revents.bits())));
    event!("got", option = "SIOCOUTQ", value = SIOCOUTQ.get(&connection)?);
    drop(connection); // close(2) does not wait
    event!("closed");
    Ok(())
}
