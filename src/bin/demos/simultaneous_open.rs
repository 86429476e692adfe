//! Two ends connect to one another at the same moment: one connection, and nobody listens.
//!
//! Each binds the port that the other connects to. If the SYNs cross, each end answers the other's
//! SYN instead of refusing it: TCP has no client and no server, only who sends the first SYN.
//!
//! ```text
//!   one                          wire                       the other
//!   socket, bind :2000                                      socket, bind :2000
//!   connect to the other:2000    S  -->   <--  S            connect to the one:2000
//!            SYN-SENT            S. -->   <--  S.           SYN-SENT
//!            ESTABLISHED                                    ESTABLISHED
//!   send, recv                   P. -->   <--  P.           send, recv
//! ```
//!
//! What to notice: both kernels count an active open, neither a passive one, and no socket has ever
//! listened (states.rs). A SYN that comes before the other end has called connect is refused by a
//! RST, so by hand it never works: hole punching through NATs relies on NATs that drop such SYNs.
//! Break it: start one alone: `failed call=connect errno=ECONNREFUSED`.
//! Compare: self_connect.rs, the same with a single socket; states.rs, the usual way.
//! Run: on loopback, in a namespace of your own whose SYNs are lost for the first half second:
//!   unshare -Urn sh -c 'ip link set lo up; nft "table t { chain c {
//!   type filter hook input priority 0; tcp flags & (syn|ack) == syn drop; }; }"; cd target/*/debug;
//!   for own in 1 2; do ./simultaneous-open-demo --own 127.0.0.$own -i 127.0.0.$((3-own)) & done;
//!   sleep 0.5; nft delete table t; wait'
//! See: connect(2), bind(2); RFC 9293 3.5 (figure 7); RFC 5128 3.4 (hole punching).

use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsRawFd;

use clap::Parser;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, SockaddrStorage, bind, connect, recv, send, socket,
};
use serverlab::event;
use serverlab::net::listen::name;
use serverlab::net::{self, args::ConnectTo, options::tcp_state};

/// Connects from a port to the same port of another host, which is to do the same
#[derive(Parser)]
#[command(version)]
struct Args {
    #[command(flatten)]
    other: ConnectTo,
    /// This end's own address
    #[arg(long, value_name = "ADDRESS")]
    own: IpAddr,
}

fn main() -> net::Result {
    let args = Args::parse();
    net::event::start("simultaneous-open-demo", false);
    let other = args.other.address();
    let own = SocketAddr::new(args.own, other.port());

    let family = if other.is_ipv6() { AddressFamily::Inet6 } else { AddressFamily::Inet };
    let socket = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    bind(socket.as_raw_fd(), &SockaddrStorage::from(own))?;
    event!("bound", local = own);

    // The kernel repeats the SYN after a second if nothing answers; connect waits meanwhile.
    if let Err(errno) = connect(socket.as_raw_fd(), &SockaddrStorage::from(other)) {
        event!("failed", call = "connect", errno = name(errno));
        return Ok(());
    }
    event!("connected", peer = other, state = tcp_state(&socket)?);

    let greeting = format!("I am {}", own.ip());
    let sent = send(socket.as_raw_fd(), greeting.as_bytes(), MsgFlags::MSG_NOSIGNAL)?;
    event!("sent", bytes = sent);
    let mut answer = [0; 100];
    let received = recv(socket.as_raw_fd(), &mut answer, MsgFlags::empty())?;
    let text = String::from_utf8_lossy(&answer[..received]);
    event!("received", bytes = received, text = text);
    net::pause(); // the connection is there to be looked at: ss -tan
    Ok(())
}
