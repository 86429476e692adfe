//! The states of one end of a connection from the handshake to TIME_WAIT, told after each call.
//!
//! Run it twice, once for each end. It waits for a line on standard input before each call, so that
//! the other end, or ss(8), can be looked at. With `--first` the server closes without waiting for
//! the client to: if the FINs cross, that is a simultaneous close.
//!
//! ```text
//!   --end client                      wire                     --end server
//!   socket   CLOSED                                            listen         LISTEN
//!   connect  ESTABLISHED              S --> <-- S. . -->       accept         ESTABLISHED
//!   shutdown FIN-WAIT-1, FIN-WAIT-2   F. -->    <-- .          recv 0         CLOSE-WAIT
//!   recv 3   FIN-WAIT-2                         <-- P.         send 3         CLOSE-WAIT
//!   recv 0   CLOSED (TIME-WAIT)       . -->     <-- F.         shutdown       LAST-ACK, CLOSED
//! ```
//!
//! What to notice: who closes second decides for how long CLOSE-WAIT and FIN-WAIT-2 last: no clock
//! does while both have the socket open (states.rs). No descriptor is ever in TIME-WAIT: the kernel
//! keeps that state in a smaller socket of its own, shown by `ss -tan`, and ours is CLOSED.
//! Break it: end the client by ^C while the server pauses in CLOSE-WAIT: send is answered by a RST.
//! Compare: time_wait.rs, what TIME_WAIT forbids; simultaneous_open.rs, another way to open.
//! Run: cargo run --bin states-demo -- --end server   then: the same with --end client
//! See: tcp(7) TCP_INFO, shutdown(2); RFC 9293 3.3.2, 3.5, 3.6; UNP 2.6-2.7; TLPI 61.6.

use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, AsRawFd};

use clap::{Parser, ValueEnum};
use nix::sys::socket::{
    AddressFamily, MsgFlags, Shutdown, SockFlag, SockType, SockaddrStorage, connect, recv, send,
    shutdown, socket,
};
use serverlab::event;
use serverlab::net::listen::{accept, bind, open, start_listening};
use serverlab::net::{self, args::ConnectTo, options::tcp_state, pause};

/// Opens and closes one connection, step by step, and tells the state of this end
#[derive(Parser)]
#[command(version)]
struct Args {
    #[command(flatten)]
    server: ConnectTo,
    /// Which end to be
    #[arg(long, value_enum)]
    end: End,
    /// Close without waiting for the other end to close first, as a client always does
    #[arg(long)]
    first: bool,
}

#[derive(ValueEnum, Clone, Copy)]
enum End {
    Client,
    Server,
}

fn main() -> net::Result {
    let args = Args::parse();
    net::event::start("states-demo", false);
    let (socket, first) = match args.end {
        End::Client => (active_open(args.server.address())?, true),
        End::Server => (passive_open(args.server.address())?, args.first),
    };
    pause();
    if first {
        close_half(&socket)?;
        while receive(&socket)? > 0 {} // the other half may still bring data
    } else {
        while receive(&socket)? > 0 {}
        pause();
        event!("sent", bytes = send(socket.as_raw_fd(), b"bye", MsgFlags::MSG_NOSIGNAL)?);
        tell(&socket)?;
        pause();
        close_half(&socket)?;
    }
    pause();
    tell(&socket)?;
    Ok(())
}

fn active_open(server: SocketAddr) -> nix::Result<TcpStream> {
    let family = if server.is_ipv6() { AddressFamily::Inet6 } else { AddressFamily::Inet };
    let socket = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    tell(&socket)?;
    connect(socket.as_raw_fd(), &SockaddrStorage::from(server))?;
    event!("connected", peer = server);
    tell(&socket)?;
    Ok(TcpStream::from(socket))
}

fn passive_open(address: SocketAddr) -> anyhow::Result<TcpStream> {
    let listener = open(address)?;
    bind(&listener, address)?;
    start_listening(&listener, 128)?;
    tell(&listener)?;
    let (socket, peer) = accept(&listener)?;
    event!("accepted", peer = peer, fd = socket.as_raw_fd());
    tell(&socket)?;
    Ok(socket)
}

/// Sends the FIN. close(2) would send it too, but would leave no descriptor to ask.
fn close_half(socket: &TcpStream) -> nix::Result<()> {
    shutdown(socket.as_raw_fd(), Shutdown::Write)?;
    event!("shut-down", how = "write");
    tell(socket)
}

fn receive(socket: &TcpStream) -> nix::Result<usize> {
    let received = recv(socket.as_raw_fd(), &mut [0; 100], MsgFlags::empty())?;
    event!("received", bytes = received);
    tell(socket)?;
    Ok(received)
}

fn tell(socket: impl AsFd) -> nix::Result<()> {
    event!("got", option = "TCP_INFO", state = tcp_state(socket)?);
    Ok(())
}
