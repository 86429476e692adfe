//! The listening socket, one `accept4(2)`, and what to do when it fails.
#![allow(unsafe_code, reason = "nix's accept4 does not tell the peer's address; libc's does")]

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};

use anyhow::Context as _;
use nix::errno::Errno;
use nix::poll::{PollTimeout, poll};
use nix::sys::socket::sockopt::{Ipv6V6Only, ReuseAddr};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrLike as _, SockaddrStorage, setsockopt,
    socket,
};

use crate::event;
use crate::net::args::ServerArgs;
use crate::net::event::is_quiet;

/// Opens the listening socket that the arguments ask for and prints `listening`.
///
/// It differs from `TcpListener::bind` in what can be chosen: the backlog (std's is 128), and an
/// IPv6 socket bound to `::` that takes IPv4 clients too. Like std's it is close-on-exec and has
/// SO_REUSEADDR, which lets a server start again while connections of the last one are in
/// TIME_WAIT (socket(7); UNP 7.5).
///
/// # Errors
/// The system call that failed, with the address, and a hint for a port that is taken.
pub fn listen(args: &ServerArgs) -> anyhow::Result<TcpListener> {
    let listener = open(args.address())?;
    bind(&listener, args.address())?;
    start_listening(&listener, args.backlog)?;
    Ok(listener)
}

/// The first step of [`listen`]: a socket for an address, with SO_REUSEADDR.
///
/// # Errors
/// As [`listen`].
pub fn open(address: SocketAddr) -> anyhow::Result<TcpListener> {
    let family = if address.is_ipv6() { AddressFamily::Inet6 } else { AddressFamily::Inet };
    let socket = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)
        .with_context(|| format!("cannot make a socket for {address}"))?;
    setsockopt(&socket, ReuseAddr, &true).context("cannot set SO_REUSEADDR")?;
    if address.is_ipv6() {
        setsockopt(&socket, Ipv6V6Only, &false).context("cannot clear IPV6_V6ONLY")?;
    }
    Ok(TcpListener::from(socket))
}

/// The second step: gives the socket its address.
///
/// # Errors
/// As [`listen`].
pub fn bind(socket: &TcpListener, address: SocketAddr) -> anyhow::Result<()> {
    nix::sys::socket::bind(socket.as_raw_fd(), &SockaddrStorage::from(address)).map_err(|errno| {
        let hint = match errno {
            Errno::EADDRINUSE => ": another program has the port; choose one with -p",
            Errno::EACCES => ": a port below 1024 needs privileges; choose one with -p",
            Errno::EADDRNOTAVAIL => ": no interface of this host has the address",
            _ => "",
        };
        anyhow::anyhow!("cannot listen on {address}: {errno}{hint}")
    })
}

/// The third step: lets clients in and prints `listening`.
///
/// # Errors
/// As [`listen`].
pub fn start_listening(listener: &TcpListener, backlog: i32) -> anyhow::Result<()> {
    let address = listener.local_addr().context("cannot read the socket's own address")?;
    let queue = Backlog::new(backlog.min(Backlog::MAXCONN.into())).unwrap_or(Backlog::MAXCONN);
    nix::sys::socket::listen(listener, queue)
        .with_context(|| format!("cannot listen on {address}"))?;
    event!("listening", address = address, backlog = backlog);
    Ok(())
}

/// Listens here and takes one connection: how a demo that serves one client begins.
///
/// # Errors
/// As [`listen`]; accept(2)'s.
pub fn accept_one(address: SocketAddr) -> anyhow::Result<TcpStream> {
    let listener = open(address)?;
    bind(&listener, address)?;
    start_listening(&listener, 128)?;
    let (connection, peer) = accept(&listener).context("cannot accept")?;
    event!("accepted", peer = peer, fd = connection.as_raw_fd());
    Ok(connection)
}

/// One `accept4(2)`: the next connection, close-on-exec, and its peer's address, or [`NOBODY`] with
/// `-q`: only event lines tell it, so then the kernel is not asked for it.
///
/// Unlike `TcpListener::accept` it returns EINTR when a signal handler has run, which a server
/// that waits for its children or for SIGTERM must see.
///
/// # Errors
/// accept(2)'s, untouched; [`accept_failed`] sorts them.
pub fn accept(listener: impl AsFd) -> nix::Result<(TcpStream, SocketAddr)> {
    accept4(listener.as_fd().as_raw_fd(), libc::SOCK_CLOEXEC)
}

/// The same for a connection that is not to block: SOCK_NONBLOCK.
///
/// # Errors
/// As [`accept`].
pub fn accept_nonblocking(listener: impl AsFd) -> nix::Result<(TcpStream, SocketAddr)> {
    accept4(listener.as_fd().as_raw_fd(), libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK)
}

fn accept4(listener: RawFd, flags: libc::c_int) -> nix::Result<(TcpStream, SocketAddr)> {
    let mut address = std::mem::MaybeUninit::<libc::sockaddr_storage>::zeroed();
    let mut length = size_of::<libc::sockaddr_storage>() as libc::socklen_t;
    let (to, room) = match is_quiet() {
        true => (std::ptr::null_mut(), std::ptr::null_mut()),
        false => (address.as_mut_ptr().cast(), &raw mut length),
    };
    // SAFETY: the kernel writes at most `length` bytes of an address into `address`.
    let fd = Errno::result(unsafe { libc::accept4(listener, to, room, flags) })?;
    // SAFETY: accept4 has just made this descriptor, and nobody else knows it.
    let connection = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: accept4 filled in `length` bytes or none, the rest is zeroed: AF_UNSPEC.
    let peer = unsafe { SockaddrStorage::from_raw(address.as_ptr().cast(), Some(length)) };
    Ok((TcpStream::from(connection), peer.and_then(|peer| socket_address(&peer)).unwrap_or(NOBODY)))
}

/// getpeername(2), for a connection that came without its peer's address; as [`accept`], with `-q`
/// it does not ask.
pub fn peer_of(connection: &TcpStream) -> SocketAddr {
    if is_quiet() {
        return NOBODY;
    }
    connection.peer_addr().unwrap_or(NOBODY) // ENOTCONN: it was reset before we looked
}

/// The address of a peer that has none, or was not asked for: the kernel gives no length when the
/// peer was reset early.
pub const NOBODY: SocketAddr =
    SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED), 0);

fn socket_address(address: &SockaddrStorage) -> Option<SocketAddr> {
    let v4 = address.as_sockaddr_in().map(|&a| SocketAddr::from(std::net::SocketAddrV4::from(a)));
    let v6 = address.as_sockaddr_in6().map(|&a| SocketAddr::from(std::net::SocketAddrV6::from(a)));
    // An IPv4 client of an IPv6 listener is told as what it is, not as ::ffff:10.0.0.2.
    v4.or(v6).map(|peer| SocketAddr::new(peer.ip().to_canonical(), peer.port()))
}

/// Prints `accept-failed` and says whether to go on: `Ok` to call accept again, `Err` to give up.
///
/// - EINTR: a signal handler has run. No event.
/// - EAGAIN: another process or thread was quicker. No event.
/// - EMFILE, ENFILE, ENOBUFS, ENOMEM: something has run out. The connection stays in the queue and
///   the listener readable, so trying again at once would spin; the pause of 100 ms lets
///   connections end.
/// - ECONNABORTED, EPROTO, EPERM and the pending network errors that Linux reports here: they
///   belong to one connection, which is gone (accept(2), "Error handling").
///
/// # Errors
/// EINVAL (the listener was shut down), EBADF and whatever else is about the listener itself.
pub fn accept_failed(errno: Errno) -> nix::Result<()> {
    match errno {
        Errno::EINTR | Errno::EAGAIN => {}
        errno if ran_out(errno) => {
            event!("accept-failed", errno = name(errno), pause_ms = 100);
            let _ = poll(&mut [], PollTimeout::from(100u8)); // EINTR only shortens the pause
        }
        Errno::ECONNABORTED
        | Errno::EPROTO
        | Errno::EPERM
        | Errno::ENETDOWN
        | Errno::ENOPROTOOPT
        | Errno::EHOSTDOWN
        | Errno::ENONET
        | Errno::EHOSTUNREACH
        | Errno::EOPNOTSUPP
        | Errno::ENETUNREACH => event!("accept-failed", errno = name(errno)),
        about_the_listener => return Err(about_the_listener),
    }
    Ok(())
}

/// Whether something that accept(2) needs has run out: descriptors or memory. Where others are
/// served by the same thread, it must not sleep for it.
pub fn ran_out(errno: Errno) -> bool {
    matches!(errno, Errno::EMFILE | Errno::ENFILE | Errno::ENOBUFS | Errno::ENOMEM)
}

/// An errno's symbol, as in errno(3): `ECONNRESET`.
pub fn name(errno: Errno) -> impl std::fmt::Display {
    struct Name(Errno);
    impl std::fmt::Display for Name {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            write!(f, "{:?}", self.0)
        }
    }
    Name(errno)
}
