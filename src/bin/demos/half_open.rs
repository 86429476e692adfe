//! A host that crashes says nothing: the other end stays connected, until it speaks.
//!
//! A process that ends, even by SIGKILL, has its connections closed by the kernel. When the kernel
//! itself ends there is nobody left to send a FIN. TCP_REPAIR makes that crash of one connection:
//! close in repair mode sends nothing. Restarted, the host knows no such connection: RST.
//!
//! ```text
//!   crash    accept -----> TCP_REPAIR=1 --> close    (no packet)        RST: there is no such
//!                                                                        ^   connection here
//!   speak    connect .......... ESTABLISHED .......... send: 1 byte -----+
//!                               (for years)            recv: ECONNRESET, recv: 0, send: EPIPE
//! ```
//!
//! What to notice: the survivor's state is ESTABLISHED after the crash as before it, and its first
//! send succeeds: the answer to that is a bare RST (overload.rs).
//! Break it: end the other with kill -9 instead, before the crash: a FIN, and recv returns 0.
//! Compare: keepalive.rs, to find it without speaking; user_timeout.rs, a host that stays away.
//! Run: sudo target/*/debug/half-open-demo crash       then: cargo run --bin half-open-demo speak
//! See: tcp(7), linux/tcp.h TCP_REPAIR; RFC 9293 3.5.1; UNP 5.14-5.16.

use std::net::TcpStream;
use std::os::fd::AsRawFd;

use anyhow::Context as _;
use clap::Parser;
use nix::sys::socket::{MsgFlags, recv, send};
use serverlab::event;
use serverlab::net::args::{ConnectTo, ListenAt};
use serverlab::net::listen::{accept_one, name};
use serverlab::net::options::{TCP_REPAIR, tcp_state};
use serverlab::net::{self, pause};

/// A connection of which one end is lost without a word, and what the other end makes of it
#[derive(Parser)]
#[command(version)]
enum Args {
    /// Take one client, and be lost
    Crash(ListenAt),
    /// Connect, and be left behind
    Speak(ConnectTo),
}

fn main() -> net::Result {
    let args = Args::parse();
    net::event::start("half-open-demo", false);
    match args {
        Args::Crash(at) => crash(&at),
        Args::Speak(to) => speak(&to),
    }
}

fn crash(at: &ListenAt) -> net::Result {
    let connection = accept_one(at.address())?;
    pause();
    TCP_REPAIR.set(&connection, 1).context("TCP_REPAIR needs CAP_NET_ADMIN")?;
    drop(connection); // frees the socket, as a crash would, and tells nobody
    event!("closed", how = "TCP_REPAIR");
    pause(); // the host is up again, and has no such connection
    Ok(())
}

fn speak(to: &ConnectTo) -> net::Result {
    let connection = TcpStream::connect(to.address()).context("cannot connect")?;
    event!("connected", peer = to.address());
    pause();
    event!("got", option = "TCP_INFO", state = tcp_state(&connection)?);
    let fd = connection.as_raw_fd();
    tell("send", send(fd, b"?", MsgFlags::MSG_NOSIGNAL)); // to a buffer of this host's, no further
    tell("recv", recv(fd, &mut [0; 16], MsgFlags::empty())); // waits for an answer, and gets it
    tell("recv", recv(fd, &mut [0; 16], MsgFlags::empty()));
    tell("send", send(fd, b"?", MsgFlags::MSG_NOSIGNAL));
    Ok(())
}

fn tell(call: &str, result: nix::Result<usize>) {
    match result {
        Ok(bytes) => event!(if call == "send" { "sent" } else { "received" }, bytes = bytes),
        Err(errno) => event!("failed", call = call, errno = name(errno)),
    }
}
