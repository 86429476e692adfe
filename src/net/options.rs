//! Socket options whose value is one number, by name: those of socket(7), ip(7) and tcp(7) that
//! `peer` and the demos set and read.
#![allow(unsafe_code, reason = "setsockopt(2), getsockopt(2) and ioctl(2) take pointers")]

use std::os::fd::{AsFd, AsRawFd};

use libc::c_int;
use nix::errno::Errno;
use nix::sys::socket::MsgFlags;

/// A socket option: what setsockopt(2) wants to know, or a number that ioctl(2) tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SocketOption {
    /// Its name in the manual pages.
    pub name: &'static str,
    number: Number,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Number {
    /// Level and option.
    Option(c_int, c_int),
    /// A request of ioctl(2), which only reads.
    Request(u64),
}

const SOCKET: c_int = libc::SOL_SOCKET;
const TCP: c_int = libc::IPPROTO_TCP;

/// linux/in.h, since Linux 6.3: the lower port in the lower 16 bits, the upper one above them.
const LOCAL_PORT_RANGE: c_int = 51;

/// linux/sockios.h; libc has it for other systems only.
const AT_MARK: u64 = 0x8905;

/// Declares each option under its own name, and the list of all of them.
macro_rules! options {
    ($($(#[$doc:meta])* $name:ident = $number:expr;)*) => {
        $(
            $(#[$doc])*
            pub const $name: SocketOption =
                SocketOption { name: stringify!($name), number: $number };
        )*

        /// The options that there are.
        pub const OPTIONS: &[SocketOption] = &[$($name),*];
    };
}

options! {
    /// The pending error, which reading it takes away: socket(7).
    SO_ERROR = Number::Option(SOCKET, libc::SO_ERROR);
    /// Probes a peer that is silent: socket(7), tcp(7).
    SO_KEEPALIVE = Number::Option(SOCKET, libc::SO_KEEPALIVE);
    /// Leaves the urgent byte among the others: socket(7).
    SO_OOBINLINE = Number::Option(SOCKET, libc::SO_OOBINLINE);
    /// Bytes for what has come and is not read; the kernel doubles what it is told: socket(7).
    SO_RCVBUF = Number::Option(SOCKET, libc::SO_RCVBUF);
    /// So many bytes make a socket readable: socket(7).
    SO_RCVLOWAT = Number::Option(SOCKET, libc::SO_RCVLOWAT);
    /// Allows bind over connections in TIME_WAIT: socket(7).
    SO_REUSEADDR = Number::Option(SOCKET, libc::SO_REUSEADDR);
    /// Allows several sockets of one user to have one address: socket(7).
    SO_REUSEPORT = Number::Option(SOCKET, libc::SO_REUSEPORT);
    /// Bytes for what is not acknowledged yet; the kernel doubles what it is told: socket(7).
    SO_SNDBUF = Number::Option(SOCKET, libc::SO_SNDBUF);
    /// Allows sends with [`MSG_ZEROCOPY`]: socket(7).
    SO_ZEROCOPY = Number::Option(SOCKET, libc::SO_ZEROCOPY);
    /// Leaves the choice of a port to connect, if bind is given an address alone: ip(7).
    IP_BIND_ADDRESS_NO_PORT = Number::Option(libc::IPPROTO_IP, libc::IP_BIND_ADDRESS_NO_PORT);
    /// The ephemeral ports of this socket, of IPv6 as well: ip(7).
    IP_LOCAL_PORT_RANGE = Number::Option(libc::IPPROTO_IP, LOCAL_PORT_RANGE);
    /// Keeps IPv4 clients out of an IPv6 socket: ipv6(7).
    IPV6_V6ONLY = Number::Option(libc::IPPROTO_IPV6, libc::IPV6_V6ONLY);
    /// Holds back what does not fill a segment: tcp(7).
    TCP_CORK = Number::Option(TCP, libc::TCP_CORK);
    /// Seconds in which accept waits for data rather than for the handshake's end: tcp(7).
    TCP_DEFER_ACCEPT = Number::Option(TCP, libc::TCP_DEFER_ACCEPT);
    /// Lets SYNs bring data; how many may wait: tcp(7).
    TCP_FASTOPEN = Number::Option(TCP, libc::TCP_FASTOPEN);
    /// Unanswered keepalive probes that are enough: tcp(7).
    TCP_KEEPCNT = Number::Option(TCP, libc::TCP_KEEPCNT);
    /// Seconds of silence before the first keepalive probe: tcp(7).
    TCP_KEEPIDLE = Number::Option(TCP, libc::TCP_KEEPIDLE);
    /// Seconds between keepalive probes: tcp(7).
    TCP_KEEPINTVL = Number::Option(TCP, libc::TCP_KEEPINTVL);
    /// Seconds that an orphan waits in FIN_WAIT2: tcp(7).
    TCP_LINGER2 = Number::Option(TCP, libc::TCP_LINGER2);
    /// Largest segment, in bytes: tcp(7).
    TCP_MAXSEG = Number::Option(TCP, libc::TCP_MAXSEG);
    /// Sends small segments at once, without Nagle's algorithm: tcp(7).
    TCP_NODELAY = Number::Option(TCP, libc::TCP_NODELAY);
    /// Acknowledges at once; not for ever: tcp(7).
    TCP_QUICKACK = Number::Option(TCP, libc::TCP_QUICKACK);
    /// In repair mode, the next sequence number of the chosen queue: linux/tcp.h.
    TCP_QUEUE_SEQ = Number::Option(TCP, libc::TCP_QUEUE_SEQ);
    /// Repair mode: the socket can be looked into, and close sends nothing: linux/tcp.h.
    TCP_REPAIR = Number::Option(TCP, libc::TCP_REPAIR);
    /// In repair mode, which queue is meant: 1 receive, 2 send: linux/tcp.h.
    TCP_REPAIR_QUEUE = Number::Option(TCP, libc::TCP_REPAIR_QUEUE);
    /// How often a SYN is sent again: tcp(7).
    TCP_SYNCNT = Number::Option(TCP, libc::TCP_SYNCNT);
    /// Milliseconds that data may go unacknowledged: tcp(7).
    TCP_USER_TIMEOUT = Number::Option(TCP, libc::TCP_USER_TIMEOUT);
    /// Largest window to offer, in bytes: tcp(7).
    TCP_WINDOW_CLAMP = Number::Option(TCP, libc::TCP_WINDOW_CLAMP);
    /// Bytes that have come and are not read: tcp(7), where it is SIOCINQ.
    FIONREAD = Number::Request(libc::FIONREAD);
    /// Whether the next byte to read follows the urgent one: sockatmark(3).
    SIOCATMARK = Number::Request(AT_MARK);
    /// Bytes that the peer has not acknowledged: tcp(7).
    SIOCOUTQ = Number::Request(libc::TIOCOUTQ);
}

/// More is to come: send(2).
pub const MSG_MORE: MsgFlags = MsgFlags::from_bits_retain(libc::MSG_MORE);

/// Send from where the bytes are: send(2).
pub const MSG_ZEROCOPY: MsgFlags = MsgFlags::from_bits_retain(libc::MSG_ZEROCOPY);

impl SocketOption {
    /// The option of this name, in capitals or not, with its prefix or without: `TCP_CORK`, `cork`.
    pub fn find(name: &str) -> Option<SocketOption> {
        let name = name.to_ascii_uppercase().replace('-', "_");
        let matches = |option: &&SocketOption| {
            option.name == name || option.name.split_once('_').is_some_and(|(_, rest)| rest == name)
        };
        OPTIONS.iter().find(matches).copied()
    }

    /// setsockopt(2) with this value.
    ///
    /// # Errors
    /// setsockopt(2)'s; EINVAL for what can only be read.
    pub fn set(self, socket: impl AsFd, value: c_int) -> nix::Result<()> {
        let Number::Option(level, number) = self.number else { return Err(Errno::EINVAL) };
        let (fd, length) = (socket.as_fd().as_raw_fd(), size_of_val(&value) as libc::socklen_t);
        // SAFETY: the kernel reads `length` bytes of `value`.
        let result =
            unsafe { libc::setsockopt(fd, level, number, (&raw const value).cast(), length) };
        Errno::result(result).map(drop)
    }

    /// Its value, by getsockopt(2) or ioctl(2).
    ///
    /// # Errors
    /// getsockopt(2)'s or ioctl(2)'s.
    pub fn get(self, socket: impl AsFd) -> nix::Result<c_int> {
        let mut value: c_int = 0;
        let mut length = size_of_val(&value) as libc::socklen_t;
        let (fd, to) = (socket.as_fd().as_raw_fd(), &raw mut value);
        let result = match self.number {
            Number::Option(level, number) => {
                // SAFETY: the kernel writes at most `length` bytes to `value`.
                unsafe { libc::getsockopt(fd, level, number, to.cast(), &raw mut length) }
            }
            // SAFETY: each of our requests writes one int to `value`.
            Number::Request(request) => unsafe { libc::ioctl(fd, request as libc::Ioctl, to) },
        };
        Errno::result(result)?;
        Ok(value)
    }
}

/// What the kernel tells of a connection: TCP_INFO (tcp(7), linux/tcp.h).
///
/// # Errors
/// getsockopt(2)'s.
pub fn tcp_info(socket: impl AsFd) -> nix::Result<libc::tcp_info> {
    let mut info = std::mem::MaybeUninit::<libc::tcp_info>::zeroed();
    let mut length = size_of::<libc::tcp_info>() as libc::socklen_t;
    let fd = socket.as_fd().as_raw_fd();
    // SAFETY: the kernel writes at most `length` bytes.
    let result = unsafe {
        libc::getsockopt(fd, TCP, libc::TCP_INFO, info.as_mut_ptr().cast(), &raw mut length)
    };
    Errno::result(result)?;
    // SAFETY: it holds numbers only, and what the kernel did not write is zero.
    Ok(unsafe { info.assume_init() })
}

/// The state of a TCP socket, by TCP_INFO, under its name in RFC 9293.
///
/// # Errors
/// getsockopt(2)'s.
pub fn tcp_state(socket: impl AsFd) -> nix::Result<&'static str> {
    // net/tcp_states.h counts them from 1; NEW_SYN_RECV is never shown here.
    const STATES: [&str; 11] = [
        "ESTABLISHED",
        "SYN-SENT",
        "SYN-RECEIVED",
        "FIN-WAIT-1",
        "FIN-WAIT-2",
        "TIME-WAIT",
        "CLOSED",
        "CLOSE-WAIT",
        "LAST-ACK",
        "LISTEN",
        "CLOSING",
    ];
    let state = usize::from(tcp_info(socket)?.tcpi_state);
    Ok(state.checked_sub(1).and_then(|at| STATES.get(at)).copied().unwrap_or("UNKNOWN"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_option_is_found_by_any_of_its_names() {
        let names = ["TCP_CORK", "cork", "tcp_cork", "Cork"];
        assert!(names.iter().all(|name| SocketOption::find(name).unwrap().name == "TCP_CORK"));
        assert_eq!(SocketOption::find("bind-address-no-port").unwrap().name.len(), 23);
        assert_eq!(SocketOption::find("corks"), None);
    }

    #[test]
    fn what_is_set_is_read_back() {
        let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let linger = SocketOption::find("linger2").unwrap();
        linger.set(&socket, 7).unwrap();
        assert_eq!(linger.get(&socket), Ok(7));
        let unread = SocketOption::find("fionread").unwrap();
        assert_eq!(unread.set(&socket, 7), Err(Errno::EINVAL));
    }
}
