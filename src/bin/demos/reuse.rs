//! SO_REUSEADDR and SO_REUSEPORT: when a second socket may have an address that is taken.
//!
//! The first takes a port and becomes something; then the second wants the same port.
//!
//! ```text
//!   first    socket, option --> bind --> what --against says
//!   second   socket, option --> bind to the same address: EADDRINUSE, or ok --> listen
//!
//!   against              neither, or not the same    SO_REUSEADDR twice         SO_REUSEPORT twice
//!   a bound socket       EADDRINUSE                  the first to listen wins   both listen
//!   a listener           EADDRINUSE                  EADDRINUSE                 both listen
//!   its connections      EADDRINUSE                  listens                    listens
//!   their TIME_WAIT      EADDRINUSE                  listens                    listens
//! ```
//!
//! What to notice: each option works only if both sockets have it, and the two do not mix
//! (time_wait.rs). SO_REUSEADDR never lets two sockets listen; where it lets both bind, it is listen
//! that answers EADDRINUSE. SO_REUSEPORT does, and the kernel deals the clients out.
//! Break it: give the second socket both options: which of the failures are gone?
//! Compare: time_wait.rs, a server that starts again; servers/prefork_reuseport.rs, what to do with it.
//! Run: cargo run --bin reuse-demo -- --against time-wait
//! See: socket(7) SO_REUSEADDR, SO_REUSEPORT, bind(2), listen(2); UNP 7.5; TLPI 61.10.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};

use clap::{Parser, ValueEnum};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrStorage, bind, listen, socket,
};
use serverlab::event;
use serverlab::net::options::{SO_REUSEADDR, SO_REUSEPORT, SocketOption};
use serverlab::net::{self, listen::name};

/// Binds and listens twice at one address, under each combination of options
#[derive(Parser)]
#[command(version)]
struct Args {
    /// Address of this host to bind to; the kernel chooses the ports
    #[arg(short = 'i', long, default_value_t = Ipv4Addr::LOCALHOST.into(), value_name = "ADDRESS")]
    host: IpAddr,
    /// What the first socket has become
    #[arg(long, value_enum, default_value = "listener")]
    against: Against,
}

#[derive(ValueEnum, Clone, Copy, PartialEq)]
enum Against {
    Bound,
    Listener,
    Connection,
    TimeWait,
}

/// What a socket is given before bind.
const CHOICES: [(&str, Option<SocketOption>); 3] =
    [("none", None), ("reuseaddr", Some(SO_REUSEADDR)), ("reuseport", Some(SO_REUSEPORT))];

fn main() -> net::Result {
    let args = Args::parse();
    net::event::start("reuse-demo", false);
    let mut kept = Vec::new(); // for ss -tan
    for (old, old_option) in CHOICES {
        for (new, new_option) in CHOICES {
            let first = TcpListener::from(with(old_option, args.host)?);
            bind(first.as_raw_fd(), &SockaddrStorage::from(SocketAddr::new(args.host, 0)))?;
            let address = first.local_addr()?;
            let first = become_one(first, args.against)?;

            let second = with(new_option, args.host)?;
            let bound = bind(second.as_raw_fd(), &SockaddrStorage::from(address));
            event!("checked", old = old, new = new, call = "bind", answer = answer(bound));
            if bound.is_ok() {
                let listens = listen(&second, Backlog::new(1)?);
                event!("checked", old = old, new = new, call = "listen", answer = answer(listens));
            }
            if bound.is_ok() && args.against == Against::Bound {
                let listens = listen(&first[0], Backlog::new(1)?);
                event!("checked", old = old, new = new, call = "first", answer = answer(listens));
            }
            kept.push((first, second));
        }
    }
    net::pause();
    Ok(())
}

fn answer(result: nix::Result<()>) -> String {
    result.map_or_else(|errno| name(errno).to_string(), |()| "ok".to_owned())
}

/// A socket with one of the options, or none.
fn with(option: Option<SocketOption>, host: IpAddr) -> nix::Result<OwnedFd> {
    let family = if host.is_ipv6() { AddressFamily::Inet6 } else { AddressFamily::Inet };
    let socket = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    if let Some(option) = option {
        option.set(&socket, 1)?;
    }
    Ok(socket)
}

/// Makes of a bound socket what the second one will meet, and returns what is open of it.
fn become_one(first: TcpListener, against: Against) -> anyhow::Result<Vec<OwnedFd>> {
    if against == Against::Bound {
        return Ok(vec![first.into()]);
    }
    listen(&first, Backlog::new(1)?)?;
    if against == Against::Listener {
        return Ok(vec![first.into()]);
    }
    let client = TcpStream::connect(first.local_addr()?)?;
    let (connection, _) = first.accept()?;
    drop(first); // the listener; its connection stays
    if against == Against::Connection {
        return Ok(vec![connection.into(), client.into()]);
    }
    drop(connection); // the first FIN: TIME_WAIT will be at the port in question
    drop(client);
    Ok(vec![])
}
