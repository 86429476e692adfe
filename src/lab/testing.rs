//! Conversations made up for unit tests.

use std::net::SocketAddr;

use etherparse::{PacketBuilder, TcpHeader};

use crate::lab::flow::Side;
use crate::lab::packet::{Flags, Seq};
use crate::lab::pcap::{Link, Packet};

/// When the first packet of a [`Script`] is captured, in nanoseconds since the epoch.
pub(crate) const BEGAN: u64 = 1_795_361_749_734_234_123;

/// Two hosts that talk. Sequence numbers follow from what was said; each packet is captured 125
/// microseconds after the one before.
pub(crate) struct Script {
    pub(crate) packets: Vec<Packet<'static>>,
    pub(crate) ends: [SocketAddr; 2],
    /// The next sequence number of client and server.
    pub(crate) next: [Seq; 2],
    pub(crate) window: u16,
}

impl Script {
    /// Nothing said yet; the sequence numbers are about to wrap.
    pub(crate) fn new() -> Script {
        Script {
            packets: Vec::new(),
            ends: [([10, 0, 0, 1], 40112).into(), ([10, 0, 0, 2], 2000).into()],
            next: [Seq(u32::MAX - 2), Seq(u32::MAX)],
            window: 64240,
        }
    }

    /// A handshake.
    pub(crate) fn opened() -> Script {
        let mut script = Script::new();
        script.bare(Side::Client, Flags::SYN, b"");
        script.server(Flags::SYN, b"").client(Flags::default(), b"");
        script
    }

    /// The client sends a segment with ACK and these flags.
    pub(crate) fn client(&mut self, flags: Flags, payload: &[u8]) -> &mut Script {
        self.bare(Side::Client, flags.with(Flags::ACK), payload)
    }

    /// The server does.
    pub(crate) fn server(&mut self, flags: Flags, payload: &[u8]) -> &mut Script {
        self.bare(Side::Server, flags.with(Flags::ACK), payload)
    }

    /// A side sends a segment with exactly these flags.
    pub(crate) fn bare(&mut self, from: Side, flags: Flags, payload: &[u8]) -> &mut Script {
        let (me, peer) = (from as usize, from.other() as usize);
        let ack = if flags.has(Flags::ACK) { self.next[peer] } else { Seq(0) };
        let bytes =
            frame(self.ends[me], self.ends[peer], self.next[me], ack, flags, self.window, payload);
        let at = BEGAN + 125_000 * self.packets.len() as u64;
        self.packets.push(Packet::new(at, Link::ETHERNET, bytes));
        let counted = [Flags::SYN, Flags::FIN].iter().filter(|flag| flags.has(**flag)).count();
        self.next[me] = self.next[me] + (payload.len() + counted) as u32;
        self
    }

    /// Makes the last segment, the client's, one that began so many bytes earlier.
    pub(crate) fn again(&mut self, bytes: u32) -> &mut Script {
        let last = self.packets.pop().expect("something was sent");
        let earlier = self.next[0].0.wrapping_sub(bytes).wrapping_sub(last.bytes.len() as u32 - 54);
        let mut bytes = last.bytes.into_owned();
        bytes[38..42].copy_from_slice(&earlier.to_be_bytes());
        self.next[0] = Seq(earlier.wrapping_add(bytes.len() as u32 - 54));
        self.packets.push(Packet::new(last.at, last.link, bytes));
        self
    }
}

/// An Ethernet frame with one TCP segment, no options.
pub(crate) fn frame(
    from: SocketAddr,
    to: SocketAddr,
    seq: Seq,
    ack: Seq,
    flags: Flags,
    window: u16,
    payload: &[u8],
) -> Vec<u8> {
    let ethernet = PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);
    let ip = match (from, to) {
        (SocketAddr::V4(from), SocketAddr::V4(to)) => {
            ethernet.ipv4(from.ip().octets(), to.ip().octets(), 64)
        }
        (SocketAddr::V6(from), SocketAddr::V6(to)) => {
            ethernet.ipv6(from.ip().octets(), to.ip().octets(), 64)
        }
        _ => panic!("one address family a packet"),
    };
    let mut header = TcpHeader::new(from.port(), to.port(), seq.0, window);
    header.acknowledgment_number = ack.0;
    header.fin = flags.has(Flags::FIN);
    header.syn = flags.has(Flags::SYN);
    header.rst = flags.has(Flags::RST);
    header.psh = flags.has(Flags::PSH);
    header.ack = flags.has(Flags::ACK);
    header.urg = flags.has(Flags::URG);
    header.ece = flags.has(Flags::ECE);
    header.cwr = flags.has(Flags::CWR);
    let builder = ip.tcp_header(header);
    let mut bytes = Vec::with_capacity(builder.size(payload.len()));
    builder.write(&mut bytes, payload).expect("a Vec takes everything");
    bytes
}
