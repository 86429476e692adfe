//! A client that retries until its server is up may connect to itself.
//!
//! A server's port that is one of the ephemeral ports can be given to the client as its own. Then
//! the SYN finds a socket that has just sent a SYN: its own. TCP takes that for a simultaneous open.
//!
//! ```text
//!   socket --> connect :40004, from :40000   S -->  <-- R.   ECONNREFUSED: nobody listens
//!   socket --> connect :40004, from :40006   S -->  <-- R.   ECONNREFUSED
//!     ...
//!   socket --> connect :40004, from :40004   S, S.           connected, to itself
//!   send --> recv                            its own bytes come back
//! ```
//!
//! What to notice: one socket is both ends, and the server, when it starts at last, cannot bind its
//! port (states.rs). A port below net.ipv4.ip_local_port_range never has this client. The demo has a
//! range of ten ports (IP_LOCAL_PORT_RANGE) so that few tries are enough; with the usual 28232 it is
//! the retry loop that runs all night.
//! Break it: `-p 2000`, a port outside the range: it is refused as often as it tries.
//! Compare: simultaneous_open.rs, the same between two hosts.
//! Run: cargo run --bin self-connect-demo       then: ss -tan '( sport = 40004 )'
//! See: ip(7) IP_LOCAL_PORT_RANGE, ip_local_port_range; RFC 9293 3.5; connect(2), getsockname(2).

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::AsRawFd;

use clap::Parser;
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, SockaddrStorage, bind, connect, getsockname, recv,
    send, socket,
};
use serverlab::event;
use serverlab::net::listen::{name, open};
use serverlab::net::{self, options::IP_LOCAL_PORT_RANGE};

/// Connects to a port where nobody listens, again and again
#[derive(Parser)]
#[command(version)]
struct Args {
    /// Address of the server, which must be this host's own
    #[arg(short = 'i', long, default_value_t = Ipv4Addr::LOCALHOST.into(), value_name = "ADDRESS")]
    host: IpAddr,
    /// Port of the server
    #[arg(short, long, default_value_t = 40_004)]
    port: u16,
    /// First of the ten ports that the client may be given
    #[arg(long, default_value_t = 40_000, value_name = "PORT")]
    from: u16,
    /// When to give up
    #[arg(long, default_value_t = 200, value_name = "TRIES")]
    tries: u32,
}

fn main() -> net::Result {
    let args = Args::parse();
    net::event::start("self-connect-demo", false);
    let server = SocketAddr::new(args.host, args.port);
    let family = if server.is_ipv6() { AddressFamily::Inet6 } else { AddressFamily::Inet };
    let ports = (u32::from(args.from) + 9) << 16 | u32::from(args.from); // the last, the first

    for tries in 1..=args.tries {
        let socket = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
        IP_LOCAL_PORT_RANGE.set(&socket, ports.cast_signed())?;
        let fd = socket.as_raw_fd();
        match connect(fd, &SockaddrStorage::from(server)) {
            Err(Errno::ECONNREFUSED) => continue, // a client would sleep here; it changes nothing
            connected => connected?,
        }
        let local: SockaddrStorage = getsockname(fd)?;
        event!("connected", peer = server, local = local, tries = tries);

        event!("sent", bytes = send(fd, b"hello, server", MsgFlags::MSG_NOSIGNAL)?);
        let mut answer = [0; 100];
        let received = recv(fd, &mut answer, MsgFlags::empty())?;
        let text = String::from_utf8_lossy(&answer[..received]);
        event!("received", bytes = received, text = text);

        let late = open(server)?; // the server, with SO_REUSEADDR as usual
        if let Err(errno) = bind(late.as_raw_fd(), &SockaddrStorage::from(server)) {
            event!("failed", call = "bind", errno = name(errno));
        }
        net::pause();
        return Ok(());
    }
    event!("failed", call = "connect", errno = name(Errno::ECONNREFUSED), times = args.tries);
    Ok(())
}
