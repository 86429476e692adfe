//! The first SYN asks for a cookie, the next one carries the request: TCP Fast Open.
//!
//! A handshake costs a round trip before the request may leave. A client that shows the cookie which
//! the server gave it last time proves that it gets what is sent to its address, so the server takes
//! data from its SYN and may answer before the handshake is over.
//!
//! ```text
//!   client   sendto MSG_FASTOPEN "hello"                     sendto MSG_FASTOPEN "hello"
//!   wire     SYN, asks -->                                   SYN, cookie, "hello" -->
//!                       <-- SYN-ACK, cookie                                   <-- SYN-ACK
//!            ACK, "hello" -->                                                 <-- the answer
//!   server   TCP_FASTOPEN --> listen --> accept --> recv --> send --> close, and the same again
//! ```
//!
//! What to notice: the calls are the same both times, and so are their results; TCP_INFO tells which
//! SYN brought data, and the capture shows it (flow_control.rs).
//! Break it: `sysctl net.ipv4.tcp_fastopen=1`, the default: no server gives cookies, nobody fails.
//! Compare: defer_accept.rs, which waits for data after the handshake. A SYN may come twice, and a
//! request in it, too: Fast Open is for requests that may be repeated (RFC 7413 2.1).
//! Run: sudo sysctl -w net.ipv4.tcp_fastopen=3; cargo run --bin fastopen-demo -- server
//! then: cargo run --bin fastopen-demo -- client
//! See: tcp(7) TCP_FASTOPEN, tcp_fastopen, send(2); RFC 7413.

use std::os::fd::AsRawFd;

use anyhow::Context as _;
use clap::Parser;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, SockaddrStorage, recv, send, sendto, socket,
};
use serverlab::net::args::{ConnectTo, ListenAt};
use serverlab::net::listen::{accept, bind, open, start_listening};
use serverlab::net::options::{TCP_FASTOPEN, tcp_info};
use serverlab::{event, net};

/// Requests in SYNs: one connection to get the cookie, one to use it
#[derive(Parser)]
#[command(version)]
enum Role {
    /// Serves two connections
    Server(ListenAt),
    /// Makes two connections, a request each
    Client(ConnectTo),
}

const CONNECTIONS: usize = 2;

const MSG_FASTOPEN: MsgFlags = MsgFlags::from_bits_retain(libc::MSG_FASTOPEN);

/// linux/tcp.h: data of the SYN was taken.
const TCPI_OPT_SYN_DATA: u8 = 32;

fn main() -> net::Result {
    let role = Role::parse();
    net::event::start("fastopen-demo", false);
    match role {
        Role::Server(at) => server(at),
        Role::Client(to) => client(to),
    }
}

fn server(at: ListenAt) -> net::Result {
    let listener = open(at.address())?;
    TCP_FASTOPEN.set(&listener, 5)?; // so many may wait whose handshake is not over
    bind(&listener, at.address())?;
    start_listening(&listener, 128)?;
    for _ in 0..CONNECTIONS {
        let (connection, peer) = accept(&listener)?; // perhaps before the handshake's last ACK
        event!("accepted", peer = peer, fd = connection.as_raw_fd());
        let received = recv(connection.as_raw_fd(), &mut [0; 4096], MsgFlags::empty())?;
        event!("received", bytes = received);
        event!("sent", bytes = send(connection.as_raw_fd(), b"hello, too", MsgFlags::empty())?);
    }
    Ok(())
}

fn client(to: ConnectTo) -> net::Result {
    let address = to.address();
    let family = if address.is_ipv6() { AddressFamily::Inet6 } else { AddressFamily::Inet };
    for _ in 0..CONNECTIONS {
        let connection = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
        let fd = connection.as_raw_fd();
        // connect(2) and send(2) in one call, since the SYN is to have the data.
        let sent = sendto(fd, b"hello", &SockaddrStorage::from(address), MSG_FASTOPEN);
        event!("sent", bytes = sent.context("cannot connect")?);
        event!("received", bytes = recv(fd, &mut [0; 4096], MsgFlags::empty())?);
        let syn_data = tcp_info(&connection)?.tcpi_options & TCPI_OPT_SYN_DATA != 0;
        event!("got", option = "TCP_INFO", syn_data = syn_data);
    }
    Ok(())
}
