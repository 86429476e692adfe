//! The ports of a client run out: EADDRNOTAVAIL, sooner with bind, and the option that helps.
//!
//! A client that binds to one of its addresses, as a proxy does, takes a port altogether; one that
//! only connects shares it with its connections to other servers.
//!
//! ```text
//!   --how connect   socket --> connect                      a port for each four-tuple
//!   --how bind      socket --> bind :0 --> connect          a port for each socket
//!   --how late      socket --> IP_BIND_ADDRESS_NO_PORT --> bind :0 --> connect
//!                                                           the address now, the port with connect
//!   each until it fails, to the first server, then to the second, from the same ten ports
//! ```
//!
//! What to notice: what must be unique is the four-tuple, so ten ports are ten connections to each
//! server, not ten in all (time_wait.rs). With bind the kernel must choose before it knows whom the
//! socket will connect to: it gives out each port once, and bind fails with EADDRINUSE. Where connect
//! chooses and finds none, it fails with EADDRNOTAVAIL.
//! Break it: name a third server's port: how many connections for each `--how`?
//! Compare: self_connect.rs, which port a client may be given; time_wait.rs, ports kept by the past.
//! Run: cargo run --bin fork-server, and one with -p 2001    then: cargo run --bin ephemeral-ports-demo
//! See: ip(7) IP_BIND_ADDRESS_NO_PORT, IP_LOCAL_PORT_RANGE, ip_local_port_range; connect(2), bind(2).

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::{AsRawFd, OwnedFd};

use clap::{Parser, ValueEnum};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrStorage, bind, connect, getsockname, socket,
};
use serverlab::event;
use serverlab::net::options::{IP_BIND_ADDRESS_NO_PORT, IP_LOCAL_PORT_RANGE};
use serverlab::net::{self, listen::name};

/// Connects to two servers, as often as ten ports allow
#[derive(Parser)]
#[command(version)]
struct Args {
    /// Address of the servers
    #[arg(short = 'i', long, default_value_t = Ipv4Addr::LOCALHOST.into(), value_name = "ADDRESS")]
    host: IpAddr,
    /// Their ports
    #[arg(short, long, value_delimiter = ',', default_value = "2000,2001", value_name = "PORT")]
    ports: Vec<u16>,
    /// This host's own address, to bind to
    #[arg(long, default_value_t = Ipv4Addr::LOCALHOST.into(), value_name = "ADDRESS")]
    own: IpAddr,
    /// Who chooses the port
    #[arg(long, value_enum, default_value = "connect")]
    how: How,
    /// First of the ten ports
    #[arg(long, default_value_t = 40_000, value_name = "PORT")]
    from: u16,
}

#[derive(ValueEnum, Clone, Copy, PartialEq)]
enum How {
    Connect,
    Bind,
    Late,
}

fn main() -> net::Result {
    let args = Args::parse();
    net::event::start("ephemeral-ports-demo", false);
    let mut connections = Vec::new(); // all stay open
    for port in &args.ports {
        let server = SocketAddr::new(args.host, *port);
        let others = connections.len();
        while let Some(connection) = one_more(&args, server)? {
            connections.push(connection);
        }
        event!("completed", peer = server, connections = connections.len() - others);
    }
    net::pause();
    Ok(())
}

/// One more connection, or none, and then the reason has been told.
fn one_more(args: &Args, server: SocketAddr) -> nix::Result<Option<OwnedFd>> {
    let family = if server.is_ipv6() { AddressFamily::Inet6 } else { AddressFamily::Inet };
    let socket = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    let ports = (u32::from(args.from) + 9) << 16 | u32::from(args.from); // the last, the first
    IP_LOCAL_PORT_RANGE.set(&socket, ports.cast_signed())?;
    if args.how == How::Late {
        IP_BIND_ADDRESS_NO_PORT.set(&socket, 1)?;
    }
    if args.how != How::Connect {
        let own = SockaddrStorage::from(SocketAddr::new(args.own, 0));
        if let Err(errno) = bind(socket.as_raw_fd(), &own) {
            event!("failed", call = "bind", errno = name(errno));
            return Ok(None);
        }
    }
    if let Err(errno) = connect(socket.as_raw_fd(), &SockaddrStorage::from(server)) {
        event!("failed", call = "connect", errno = name(errno));
        return Ok(None);
    }
    event!("connected", peer = server, local = getsockname::<SockaddrStorage>(socket.as_raw_fd())?);
    Ok(Some(socket))
}
