//! `lab sniff`: captures on one interface where tcpdump is not installed, with tcpdump's manners.
//!
//! A packet socket (packet(7)) gives every frame that the interface sends or receives. What is TCP,
//! or a sentinel, goes to standard output as a nanosecond pcap; "listening on" goes to standard
//! error when the first frame can be caught; SIGINT or SIGTERM ends it; the counts come last.
#![allow(unsafe_code, reason = "PACKET_STATISTICS has no wrapper in nix")]

use std::borrow::Cow;
use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};

use anyhow::Context as _;
use clap::Args;
use nix::errno::Errno;
use nix::net::if_::if_nametoindex;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::socket::sockopt::{RcvBufForce, ReceiveTimestampns};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg, setsockopt};

use super::host::Host;
use super::packet::{Decoded, decode};
use super::pcap::{Link, Packet, Writer};

/// Arguments of `lab sniff`.
#[derive(Args, Debug)]
pub struct SniffArgs {
    /// Interface to capture on
    #[arg(short, long, default_value = super::pin::INTERFACE)]
    interface: String,

    /// Bytes to keep of each packet
    #[arg(short, long, default_value_t = 2048, value_name = "BYTES")]
    snapshot_length: u32,

    /// Use this open packet socket instead of opening one, which needs CAP_NET_RAW
    #[arg(long, value_name = "NUMBER")]
    descriptor: Option<RawFd>,
}

/// What the kernel may buffer for us, in bytes. Above net.core.rmem_max it takes CAP_NET_ADMIN;
/// without it, the default stays.
const BUFFER: usize = 32 << 20;

/// Captures until SIGINT or SIGTERM.
///
/// # Errors
/// EPERM without CAP_NET_RAW, ENODEV; a standard output that cannot be written to.
pub fn run(args: &SniffArgs) -> anyhow::Result<()> {
    let mut ends = SigSet::empty();
    ends.add(Signal::SIGINT);
    ends.add(Signal::SIGTERM);
    ends.thread_block()?;
    let ends = SignalFd::with_flags(&ends, SfdFlags::SFD_CLOEXEC)?;
    let socket = match args.descriptor {
        // SAFETY: whoever runs us with --descriptor has given us this one.
        Some(number) => unsafe { OwnedFd::from_raw_fd(number) },
        None => open_here(&args.interface)?,
    };
    setsockopt(&socket, ReceiveTimestampns, &true)?;
    let _ = setsockopt(&socket, RcvBufForce, &BUFFER);

    let mut sniffer = Sniffer {
        socket,
        out: Writer::new(io::stdout().lock(), Link::ETHERNET, args.snapshot_length)?,
        frame: vec![0; 128 * 1024],
        snapshot_length: args.snapshot_length as usize,
        captured: 0,
    };
    sniffer.out.flush()?;
    eprintln!(
        "lab sniff: listening on {}, link-type EN10MB (Ethernet), snapshot length {} bytes",
        args.interface, args.snapshot_length
    );
    loop {
        let mut waits = [
            PollFd::new(sniffer.socket.as_fd(), PollFlags::POLLIN),
            PollFd::new(ends.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut waits, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        let ended = waits[1].any().unwrap_or(false);
        sniffer.drain()?; // also at the end: what was caught is not thrown away
        if ended {
            break;
        }
    }
    let (received, dropped) = statistics(&sniffer.socket)?;
    let captured = sniffer.captured;
    eprintln!("{captured} packets captured\n{received} packets received by filter");
    eprintln!("{dropped} packets dropped by kernel");
    Ok(())
}

/// Opens a packet socket on a host, bound to an interface there. It is ours, but stays the host's.
///
/// # Errors
/// EPERM if the agent has no CAP_NET_RAW; ENODEV.
pub fn open(host: &Host, interface: &str) -> anyhow::Result<OwnedFd> {
    // Protocol 0 until it is bound: a socket for all protocols would catch other interfaces first.
    let socket = host.socket(libc::AF_PACKET, libc::SOCK_RAW, 0)?;
    bind(&socket, interface)?;
    Ok(socket)
}

fn open_here(interface: &str) -> anyhow::Result<OwnedFd> {
    // SAFETY: socket(2) has no memory to break.
    let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
    let fd = Errno::result(fd).context("cannot open a packet socket (it needs CAP_NET_RAW)")?;
    // SAFETY: socket(2) has just made this descriptor.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    bind(&socket, interface)?;
    Ok(socket)
}

/// Binds a packet socket to all protocols of an interface of its own namespace.
fn bind(socket: &OwnedFd, interface: &str) -> anyhow::Result<()> {
    let index = if_nametoindex(interface).with_context(|| format!("no interface {interface}"))?;
    // SAFETY: all fields of sockaddr_ll are integers.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
    address.sll_ifindex = index.cast_signed();
    let length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
    // SAFETY: `address` is a sockaddr_ll of this length and outlives the call.
    let bound = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) };
    Errno::result(bound).with_context(|| format!("cannot capture on {interface}"))?;
    Ok(())
}

struct Sniffer<W: io::Write> {
    socket: OwnedFd,
    out: Writer<W>,
    frame: Vec<u8>,
    snapshot_length: usize,
    captured: u64,
}

impl<W: io::Write> Sniffer<W> {
    /// Writes every frame that waits in the socket.
    fn drain(&mut self) -> anyhow::Result<()> {
        while let Some((at, length)) = self.receive()? {
            let kept = length.min(self.frame.len());
            let whole = Packet {
                at,
                link: Link::ETHERNET,
                len: u32::try_from(length).unwrap_or(u32::MAX),
                bytes: Cow::Borrowed(&self.frame[..kept]),
            };
            let wanted = match decode(0, &whole) {
                Decoded::Tcp(_) => true,
                Decoded::Udp(datagram) => datagram.to.port() == 9,
                Decoded::Other => false,
            };
            if wanted {
                let bytes = Cow::Borrowed(&self.frame[..kept.min(self.snapshot_length)]);
                self.out.write(&Packet { bytes, ..whole })?;
                self.captured += 1;
            }
        }
        self.out.flush()?;
        Ok(())
    }

    /// One frame: its time in nanoseconds and its length on the wire. `None` when none waits.
    fn receive(&mut self) -> anyhow::Result<Option<(u64, usize)>> {
        let mut control = nix::cmsg_space!(nix::sys::time::TimeSpec);
        let mut parts = [IoSliceMut::new(&mut self.frame)];
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_TRUNC; // the length before it was cut
        let socket = self.socket.as_raw_fd();
        match recvmsg::<()>(socket, &mut parts, Some(&mut control), flags) {
            Ok(message) => {
                let stamp = message.cmsgs()?.find_map(|control| match control {
                    ControlMessageOwned::ScmTimestampns(time) => Some(time),
                    _ => None,
                });
                let stamp = stamp.context("a frame without a time stamp")?;
                let at = stamp.tv_sec().cast_unsigned() * 1_000_000_000
                    + stamp.tv_nsec().cast_unsigned();
                Ok(Some((at, message.bytes)))
            }
            Err(Errno::EAGAIN | Errno::EINTR) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }
}

/// Frames received and dropped since the socket was opened (packet(7), PACKET_STATISTICS).
fn statistics(socket: &OwnedFd) -> nix::Result<(u32, u32)> {
    let mut stats = libc::tpacket_stats { tp_packets: 0, tp_drops: 0 };
    let mut length = size_of::<libc::tpacket_stats>() as libc::socklen_t;
    let (level, name) = (libc::SOL_PACKET, libc::PACKET_STATISTICS);
    // SAFETY: the kernel writes at most `length` bytes into `stats`.
    let result = unsafe {
        libc::getsockopt(socket.as_raw_fd(), level, name, (&raw mut stats).cast(), &raw mut length)
    };
    Errno::result(result)?;
    Ok((stats.tp_packets, stats.tp_drops))
}
