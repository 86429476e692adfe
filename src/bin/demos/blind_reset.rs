//! A forged RST must have the exact sequence number: near it TCP asks back, others it ignores.
//!
//! RFC 793 let any RST within the window end a connection, and a large window is soon hit blindly.
//! Since RFC 5961 only the next number expected ends it. To one within the window TCP answers with
//! a challenge ACK: a real peer, which has no such connection, would answer that by an exact RST.
//!
//! ```text
//!   server     accept --> TCP_REPAIR: the next number N        (an attacker would have to guess)
//!   raw socket   RST seq N + 2^30 --> client                   nothing: beyond the window
//!                RST seq N + 100  --> client     <-- ACK       a challenge: within it
//!                RST seq N        --> client                   recv: ECONNRESET
//! ```
//!
//! What to notice: four things must be right: two addresses, two ports, known or guessed; then one
//! number of 2^32, whatever the window. The client's kernel counts TcpExtTCPChallengeACK
//! (overload.rs).
//! Break it: let the client send:5 first: the numbers are the server's, and do not change.
//! Compare: rst.rs, a RST from the socket itself; half_open.rs, TCP_REPAIR to crash.
//! Run: sudo target/*/debug/blind-reset-demo        then: cargo run --bin peer -- connect recv recv
//! See: raw(7), tcp(7), linux/tcp.h TCP_REPAIR; RFC 5961 3; RFC 9293 3.10.7.4; UNP 28.

use std::net::{IpAddr, SocketAddr, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};

use anyhow::Context as _;
use clap::Parser;
use etherparse::TcpHeader;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrStorage, sendto, socket,
};
use serverlab::event;
use serverlab::net::listen::accept_one;
use serverlab::net::options::{TCP_QUEUE_SEQ, TCP_REPAIR, TCP_REPAIR_QUEUE, tcp_state};
use serverlab::net::{self, args::ListenAt};

/// Takes one client, and forges three RSTs to it, as somebody else would
#[derive(Parser)]
#[command(version)]
struct Args {
    #[command(flatten)]
    at: ListenAt,
}

const SEND_QUEUE: i32 = 2; // linux/tcp.h
const BACK_TO_NORMAL: i32 = -1; // TCP_REPAIR_OFF_NO_WP: off, without a window probe

fn main() -> net::Result {
    let args = Args::parse();
    net::event::start("blind-reset-demo", false);
    let connection = accept_one(args.at.address())?;
    let next = next_number(&connection).context("TCP_REPAIR needs CAP_NET_ADMIN")?;
    event!("got", option = "TCP_QUEUE_SEQ", value = next);
    let forger = Forger::between(connection.local_addr()?, connection.peer_addr()?)
        .context("a raw socket needs CAP_NET_RAW")?;
    for distance in [1 << 30, 100, 0] {
        net::pause();
        forger.reset(next.wrapping_add(distance)).context("cannot forge")?;
        event!("sent", what = "RST", distance = distance);
    }
    net::pause();
    event!("got", option = "TCP_INFO", state = tcp_state(&connection)?); // we know nothing of it
    Ok(())
}

/// What the server's end would send next: in repair mode a socket tells its numbers.
fn next_number(connection: &TcpStream) -> nix::Result<u32> {
    TCP_REPAIR.set(connection, 1)?;
    TCP_REPAIR_QUEUE.set(connection, SEND_QUEUE)?;
    let next = TCP_QUEUE_SEQ.get(connection)?.cast_unsigned();
    TCP_REPAIR.set(connection, BACK_TO_NORMAL)?;
    Ok(next)
}

/// A raw socket: what is written to it goes out behind an IP header that the kernel makes.
struct Forger {
    raw: OwnedFd,
    from: SocketAddr,
    to: SocketAddr,
}

impl Forger {
    fn between(from: SocketAddr, to: SocketAddr) -> nix::Result<Forger> {
        let family = if to.is_ipv6() { AddressFamily::Inet6 } else { AddressFamily::Inet };
        let tcp = SockProtocol::Tcp; // all that the kernel needs to know of it
        let raw = socket(family, SockType::Raw, SockFlag::SOCK_CLOEXEC, tcp)?;
        Ok(Forger { raw, from, to })
    }

    fn reset(&self, sequence: u32) -> anyhow::Result<()> {
        let window = 0;
        let mut header = TcpHeader::new(self.from.port(), self.to.port(), sequence, window);
        header.rst = true;
        // The checksum covers the addresses as well: they cannot be left to chance.
        header.checksum = match (self.from.ip(), self.to.ip()) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                header.calc_checksum_ipv4_raw(from.octets(), to.octets(), &[])?
            }
            (IpAddr::V6(from), IpAddr::V6(to)) => {
                header.calc_checksum_ipv6_raw(from.octets(), to.octets(), &[])?
            }
            _ => unreachable!("both ends of a socket have its family"),
        };
        let to = SockaddrStorage::from(SocketAddr::new(self.to.ip(), 0)); // raw: no port
        sendto(self.raw.as_raw_fd(), &header.to_bytes(), &to, MsgFlags::empty())?;
        Ok(())
    }
}
