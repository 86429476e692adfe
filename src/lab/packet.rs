//! One packet decoded: a TCP segment, a UDP datagram, or something else.
//!
//! ```
//! use serverlab::lab::packet::{Decoded, decode};
//! use serverlab::lab::pcap;
//!
//! for (frame, packet) in (1..).zip(pcap::read("captures/reference/handshake-fin.pcap")?) {
//!     if let Decoded::Tcp(segment) = decode(frame, &packet) {
//!         println!("{segment}"); // 127.0.0.1.40112 > 127.0.0.1.2000: Flags [S], seq 301, ...
//!     }
//! }
//! # Ok::<(), pcap::ReadError>(())
//! ```
//!
//! Nothing is verified: a capture at the sender's end holds packets whose checksums the network
//! card was to fill in, and cut packets are what a snapshot length is for.
//!
//! See: RFC 9293 3.1 (the TCP header), RFC 791, RFC 8200, RFC 768.

use std::borrow::Cow;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::ops::{Add, Sub};

use etherparse::{
    EtherType, LaxNetSlice, LaxSlicedPacket, TcpHeaderSlice, TransportSlice, ip_number,
};

use crate::lab::pcap::{Link, Packet};

/// A TCP sequence number. It wraps at 2^32, so it has no order, only distances (RFC 9293 3.4).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Seq(pub u32);

impl Add<u32> for Seq {
    type Output = Seq;
    fn add(self, bytes: u32) -> Seq {
        Seq(self.0.wrapping_add(bytes))
    }
}

impl Sub for Seq {
    /// How far ahead of the other this one is, in bytes; negative if it is behind.
    type Output = i32;
    fn sub(self, other: Seq) -> i32 {
        self.0.wrapping_sub(other.0) as i32
    }
}

/// The control bits of a TCP segment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Flags(pub u8);

impl Flags {
    /// No more data from the sender.
    pub const FIN: Flags = Flags(0x01);
    /// Synchronise sequence numbers.
    pub const SYN: Flags = Flags(0x02);
    /// Reset the connection.
    pub const RST: Flags = Flags(0x04);
    /// Push.
    pub const PSH: Flags = Flags(0x08);
    /// The acknowledgement field counts.
    pub const ACK: Flags = Flags(0x10);
    /// The urgent pointer counts.
    pub const URG: Flags = Flags(0x20);
    /// Explicit congestion echo (RFC 3168).
    pub const ECE: Flags = Flags(0x40);
    /// Congestion window reduced (RFC 3168).
    pub const CWR: Flags = Flags(0x80);

    /// The letters of tcpdump, in its order.
    const LETTERS: [(Flags, char); 8] = [
        (Flags::FIN, 'F'),
        (Flags::SYN, 'S'),
        (Flags::RST, 'R'),
        (Flags::PSH, 'P'),
        (Flags::ACK, '.'),
        (Flags::URG, 'U'),
        (Flags::ECE, 'E'),
        (Flags::CWR, 'W'),
    ];

    /// Whether all of these are set.
    pub fn has(self, flags: Flags) -> bool {
        self.0 & flags.0 == flags.0
    }

    /// These and those.
    #[must_use]
    pub const fn with(self, flags: Flags) -> Flags {
        Flags(self.0 | flags.0)
    }

    /// These without those.
    #[must_use]
    pub const fn without(self, flags: Flags) -> Flags {
        Flags(self.0 & !flags.0)
    }

    /// Reads flags as tcpdump prints them, in any order: `S`, `S.`, `.`, `P.`, `F.`, `R`; `none`.
    pub fn parse(text: &str) -> Option<Flags> {
        if text == "none" {
            return Some(Flags::default());
        }
        let flag =
            |letter| Flags::LETTERS.iter().find(|(_, l)| *l == letter).map(|(flag, _)| *flag);
        let flags = text.chars().map(flag).try_fold(Flags::default(), |all, f| Some(all.with(f?)));
        flags.filter(|_| !text.is_empty())
    }
}

impl fmt::Display for Flags {
    /// As tcpdump prints them between brackets.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if *self == Flags::default() {
            return f.pad("none");
        }
        let set = Flags::LETTERS.iter().filter(|(flag, _)| self.has(*flag));
        f.pad(&set.map(|(_, letter)| letter).collect::<String>())
    }
}

/// What a packet holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decoded<'a> {
    /// A TCP segment.
    Tcp(Segment<'a>),
    /// A UDP datagram.
    Udp(Datagram<'a>),
    /// Anything else: another protocol, an IP fragment, a packet cut inside its headers.
    Other,
}

/// A TCP segment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment<'a> {
    /// Its number in the capture file, counted from 1, as Wireshark counts.
    pub frame: u64,
    /// When it was captured: nanoseconds since the epoch.
    pub at: u64,
    /// Who sent it.
    pub from: SocketAddr,
    /// To whom.
    pub to: SocketAddr,
    /// Sequence number of its first byte (or of its SYN).
    pub seq: Seq,
    /// The next byte its sender waits for; counts only with [`Flags::ACK`].
    pub ack: Seq,
    /// Its control bits.
    pub flags: Flags,
    /// The window field as sent, not scaled (RFC 7323 2.2).
    pub window: u16,
    /// Length of its payload on the wire in bytes, by the IP header: neither padding nor a capture
    /// that cut the packet changes it.
    pub len: u32,
    /// What was captured of its payload; never longer than `len`.
    pub payload: Cow<'a, [u8]>,
}

impl fmt::Display for Segment<'_> {
    /// As `tcpdump -n -S`, without the options.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (from, to) = (dotted(self.from), dotted(self.to));
        write!(f, "{from} > {to}: Flags [{}]", self.flags)?;
        let Seq(seq) = self.seq;
        if self.len > 0 {
            write!(f, ", seq {seq}:{}", (self.seq + self.len).0)?;
        } else if self.flags.0 & Flags::SYN.with(Flags::FIN).with(Flags::RST).0 != 0 {
            write!(f, ", seq {seq}")?;
        }
        if self.flags.has(Flags::ACK) {
            write!(f, ", ack {}", self.ack.0)?;
        }
        write!(f, ", win {}, length {}", self.window, self.len)
    }
}

/// A UDP datagram.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Datagram<'a> {
    /// When it was captured: nanoseconds since the epoch.
    pub at: u64,
    /// Who sent it.
    pub from: SocketAddr,
    /// To whom.
    pub to: SocketAddr,
    /// What was captured of its payload.
    pub payload: &'a [u8],
}

impl fmt::Display for Datagram<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} > {}: UDP, captured {}",
            dotted(self.from),
            dotted(self.to),
            self.payload.len()
        )
    }
}

/// An address as tcpdump prints it: the port after a dot.
fn dotted(address: SocketAddr) -> String {
    format!("{}.{}", address.ip(), address.port())
}

/// Whether [`decode`] knows packets of this link type.
pub fn is_known(link: Link) -> bool {
    matches!(
        link,
        Link::ETHERNET
            | Link::RAW
            | Link::IPV4
            | Link::IPV6
            | Link::NULL
            | Link::LOOP
            | Link::LINUX_SLL
            | Link::LINUX_SLL2
    )
}

/// Decodes one packet, which is number `frame` of its file.
///
/// Never fails: what cannot be decoded is [`Decoded::Other`].
pub fn decode<'a>(frame: u64, packet: &'a Packet<'_>) -> Decoded<'a> {
    decode_some(frame, packet).unwrap_or(Decoded::Other)
}

fn decode_some<'a>(frame: u64, packet: &'a Packet<'_>) -> Option<Decoded<'a>> {
    let bytes: &[u8] = &packet.bytes;
    let sliced = slice(packet.link, bytes)?;
    let net = Network::of(sliced.net.as_ref()?, bytes, packet.len)?;
    match sliced.transport {
        Some(TransportSlice::Tcp(tcp)) => {
            let header = TcpHeaderSlice::from_slice(tcp.header_slice()).ok()?;
            let header_len = u32::from(tcp.data_offset()) * 4;
            Some(segment(frame, packet, &net, &header, header_len, tcp.payload()))
        }
        None if net.carries_tcp => {
            // The capture may have cut the TCP options. The first 20 bytes say all we need: read
            // them as a header without options.
            let mut base: [u8; 20] = *net.payload.first_chunk()?;
            let header_len = u32::from(base[12] >> 4) * 4;
            base[12] = 5 << 4;
            let header = TcpHeaderSlice::from_slice(&base).ok()?;
            (header_len >= 20).then(|| segment(frame, packet, &net, &header, header_len, &[]))
        }
        Some(TransportSlice::Udp(udp)) => Some(Decoded::Udp(Datagram {
            at: packet.at,
            from: SocketAddr::new(net.from, udp.source_port()),
            to: SocketAddr::new(net.to, udp.destination_port()),
            payload: udp.payload(),
        })),
        _ => None,
    }
}

fn slice(link: Link, bytes: &[u8]) -> Option<LaxSlicedPacket<'_>> {
    let ether_type = |at: usize| {
        let field = bytes.get(at..at + 2)?;
        Some(EtherType(u16::from_be_bytes([field[0], field[1]])))
    };
    match link {
        Link::ETHERNET => LaxSlicedPacket::from_ethernet(bytes).ok(),
        Link::RAW | Link::IPV4 | Link::IPV6 => LaxSlicedPacket::from_ip(bytes).ok(),
        // The address family is in somebody's byte order and numbering; the IP version is not.
        Link::NULL | Link::LOOP => LaxSlicedPacket::from_ip(bytes.get(4..)?).ok(),
        Link::LINUX_SLL => {
            Some(LaxSlicedPacket::from_ether_type(ether_type(14)?, bytes.get(16..)?))
        }
        Link::LINUX_SLL2 => {
            Some(LaxSlicedPacket::from_ether_type(ether_type(0)?, bytes.get(20..)?))
        }
        _ => None,
    }
}

/// What the IP header says.
struct Network<'a> {
    from: IpAddr,
    to: IpAddr,
    /// Length on the wire of what follows the IP headers.
    payload_len: u32,
    /// What was captured of that.
    payload: &'a [u8],
    /// It is the beginning of a TCP segment, not a later fragment of one.
    carries_tcp: bool,
}

impl<'a> Network<'a> {
    /// `bytes` and `wire_len` are the packet's, from the link layer on.
    fn of(net: &LaxNetSlice<'a>, bytes: &[u8], wire_len: u32) -> Option<Network<'a>> {
        let offset = |part: &[u8]| part.as_ptr().addr() - bytes.as_ptr().addr();
        // `end` is the offset in the packet at which the IP header says that it ends. A header
        // that says 0 is of a packet over 64 KiB (BIG TCP); then the wire's length tells.
        let (from, to, payload, end): (IpAddr, IpAddr, _, _) = match net {
            LaxNetSlice::Ipv4(ip) => {
                let header = ip.header();
                let end = match header.total_len() {
                    0 => None,
                    total => Some(offset(header.slice()) + usize::from(total)),
                };
                let (from, to) = (header.source_addr(), header.destination_addr());
                (from.into(), to.into(), ip.payload(), end)
            }
            LaxNetSlice::Ipv6(ip) => {
                let header = ip.header();
                let end = match header.payload_length() {
                    0 => None,
                    length => Some(offset(header.slice()) + 40 + usize::from(length)),
                };
                let (from, to) = (header.source_addr(), header.destination_addr());
                (from.into(), to.into(), ip.payload(), end)
            }
            LaxNetSlice::Arp(_) => return None,
        };
        let length = end.unwrap_or(wire_len as usize).saturating_sub(offset(payload.payload));
        Some(Network {
            from,
            to,
            payload_len: u32::try_from(length).ok()?,
            payload: payload.payload,
            carries_tcp: payload.ip_number == ip_number::TCP && !payload.fragmented,
        })
    }
}

fn segment<'a>(
    frame: u64,
    packet: &Packet<'_>,
    net: &Network<'a>,
    header: &TcpHeaderSlice<'_>,
    header_len: u32,
    payload: &'a [u8],
) -> Decoded<'a> {
    let len = net.payload_len.saturating_sub(header_len);
    let payload = &payload[..payload.len().min(len as usize)];
    Decoded::Tcp(Segment {
        frame,
        at: packet.at,
        from: SocketAddr::new(net.from, header.source_port()),
        to: SocketAddr::new(net.to, header.destination_port()),
        seq: Seq(header.sequence_number()),
        ack: Seq(header.acknowledgment_number()),
        flags: Flags(header.slice()[13]),
        window: header.window_size(),
        len,
        payload: Cow::Borrowed(payload),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::testing::{BEGAN, frame};

    const ETHERNET: usize = 14;

    fn addresses(v6: bool) -> (SocketAddr, SocketAddr) {
        let [from, to] = if v6 {
            ["[fd77::1]:40112", "[fd77::2]:2000"]
        } else {
            ["10.0.0.1:40112", "10.0.0.2:2000"]
        };
        (from.parse().unwrap(), to.parse().unwrap())
    }

    fn sample(v6: bool) -> Vec<u8> {
        let (from, to) = addresses(v6);
        frame(from, to, Seq(7), Seq(9), Flags::PSH.with(Flags::ACK), 501, b"hello")
    }

    /// What the sample decodes to, with so much of the payload captured.
    fn expected(v6: bool, payload: &'static [u8]) -> Segment<'static> {
        let (from, to) = addresses(v6);
        let flags = Flags::PSH.with(Flags::ACK);
        let payload = Cow::Borrowed(payload);
        let (seq, ack) = (Seq(7), Seq(9));
        Segment { frame: 3, at: BEGAN, from, to, seq, ack, flags, window: 501, len: 5, payload }
    }

    #[track_caller]
    fn assert_decodes(link: Link, bytes: &[u8], len: usize, expected: &Segment<'_>) {
        let packet = Packet { at: BEGAN, link, len: len as u32, bytes: bytes.into() };
        assert_eq!(decode(3, &packet), Decoded::Tcp(expected.clone()));
    }

    #[test]
    fn every_link_type_leads_to_the_same_segment() {
        for (v6, ether_type) in [(false, [0x08, 0x00]), (true, [0x86, 0xdd])] {
            let ethernet = sample(v6);
            let ip = &ethernet[ETHERNET..];
            let tagged = |tag: &[u8]| [&ethernet[..12], tag, &ether_type, ip].concat();
            let sll = [&[0; 14], ether_type.as_slice(), ip].concat();
            let sll2 = [ether_type.as_slice(), &[0; 18], ip].concat();
            for (link, bytes) in [
                (Link::ETHERNET, ethernet.clone()),
                (Link::ETHERNET, tagged(&[0x81, 0x00, 0, 5])),
                (Link::ETHERNET, tagged(&[0x88, 0xa8, 0, 5, 0x81, 0x00, 0, 6])),
                (Link::RAW, ip.to_vec()),
                (if v6 { Link::IPV6 } else { Link::IPV4 }, ip.to_vec()),
                (Link::NULL, [&[2, 0, 0, 0], ip].concat()),
                (Link::LOOP, [&[0, 0, 0, 24], ip].concat()),
                (Link::LINUX_SLL, sll),
                (Link::LINUX_SLL2, sll2),
            ] {
                assert!(is_known(link));
                assert_decodes(link, &bytes, bytes.len(), &expected(v6, b"hello"));
            }
        }
    }

    #[test]
    fn the_payload_is_as_long_as_the_ip_header_says() {
        for v6 in [false, true] {
            let whole = sample(v6);
            // Ethernet pads short frames to 60 bytes.
            let padded = [whole.as_slice(), &[0; 20]].concat();
            assert_decodes(Link::ETHERNET, &padded, padded.len(), &expected(v6, b"hello"));
            // A snapshot length cuts the payload,
            let cut = &whole[..whole.len() - 3];
            assert_decodes(Link::ETHERNET, cut, whole.len(), &expected(v6, b"he"));
            // or all of it.
            let cut = &whole[..whole.len() - 5];
            assert_decodes(Link::ETHERNET, cut, whole.len(), &expected(v6, b""));
            // BIG TCP: the header's length is 0, the wire's counts.
            let mut big = whole.clone();
            let length = if v6 { ETHERNET + 4 } else { ETHERNET + 2 };
            big[length..length + 2].fill(0);
            let wire = whole.len() + 100_000;
            let len = 100_005;
            assert_decodes(Link::ETHERNET, &big, wire, &Segment { len, ..expected(v6, b"hello") });
            let (wire, len) = (whole.len() - 3, 2);
            assert_decodes(Link::ETHERNET, &big, wire, &Segment { len, ..expected(v6, b"he") });
        }
    }

    #[test]
    fn a_header_cut_in_its_options_is_enough() {
        let mut bytes = sample(false);
        let tcp = ETHERNET + 20;
        // Twelve bytes of options, of which the capture has eight; five bytes of payload.
        bytes[tcp + 12] = 8 << 4;
        let total = 20 + 32 + 5_u16;
        bytes[ETHERNET + 2..ETHERNET + 4].copy_from_slice(&total.to_be_bytes());
        bytes.truncate(tcp + 20);
        bytes.extend([1; 8]);
        assert_decodes(Link::ETHERNET, &bytes, ETHERNET + 57, &expected(false, b""));
        // Without the first twenty bytes there is nothing to say.
        let packet = Packet::new(BEGAN, Link::ETHERNET, &bytes[..tcp + 19]);
        assert_eq!(decode(1, &packet), Decoded::Other);
        // Nor with a header that claims to be shorter than that.
        bytes[tcp + 12] = 4 << 4;
        assert_eq!(decode(1, &Packet::new(BEGAN, Link::ETHERNET, bytes)), Decoded::Other);
    }

    #[test]
    fn fragments_and_strangers_are_other() {
        let mut fragment = sample(false);
        fragment[ETHERNET + 6..ETHERNET + 8].copy_from_slice(&100_u16.to_be_bytes());
        let mut icmp = sample(false);
        icmp[ETHERNET + 9] = 1;
        let mut arp = sample(false);
        arp[12..14].copy_from_slice(&[0x08, 0x06]);
        for bytes in [fragment, icmp, arp, Vec::new(), vec![0; 5]] {
            for link in [Link::ETHERNET, Link::NULL, Link::LINUX_SLL, Link::LINUX_SLL2, Link(127)] {
                assert_eq!(decode(1, &Packet::new(0, link, bytes.clone())), Decoded::Other);
            }
        }
        assert!(!is_known(Link(127)));
    }

    #[test]
    fn the_sentinel_is_a_datagram() {
        let builder = etherparse::PacketBuilder::ethernet2([0; 6], [0; 6])
            .ipv4([10, 0, 0, 1], [10, 0, 0, 2], 64)
            .udp(40112, 9);
        let mut bytes = Vec::new();
        builder.write(&mut bytes, b"that was all").unwrap();
        bytes.resize(60, 0);
        let packet = Packet::new(BEGAN, Link::ETHERNET, bytes);
        let Decoded::Udp(datagram) = decode(1, &packet) else { panic!("a datagram") };
        assert_eq!(datagram.to.port(), 9);
        assert_eq!(datagram.payload, b"that was all");
        assert_eq!(datagram.to_string(), "10.0.0.1.40112 > 10.0.0.2.9: UDP, captured 12");
    }

    #[test]
    fn a_segment_reads_as_tcpdump_prints_it() {
        assert_eq!(
            expected(false, b"hello").to_string(),
            "10.0.0.1.40112 > 10.0.0.2.2000: Flags [P.], seq 7:12, ack 9, win 501, length 5"
        );
        let syn = Segment { flags: Flags::SYN, len: 0, ..expected(true, b"") };
        assert_eq!(
            syn.to_string(),
            "fd77::1.40112 > fd77::2.2000: Flags [S], seq 7, win 501, length 0"
        );
    }

    #[test]
    fn flags_read_back() {
        for (text, bits) in [
            ("S", 0x02),
            ("S.", 0x12),
            (".", 0x10),
            ("P.", 0x18),
            ("F.", 0x11),
            ("R", 0x04),
            ("R.", 0x14),
            ("FP.", 0x19),
            ("SEW", 0xc2),
            ("U", 0x20),
            ("none", 0),
        ] {
            assert_eq!(Flags::parse(text), Some(Flags(bits)));
            assert_eq!(Flags(bits).to_string(), text);
        }
        assert_eq!(Flags::parse(".P"), Flags::parse("P."));
        assert_eq!(Flags::parse(""), None);
        assert_eq!(Flags::parse("A"), None);
    }

    #[test]
    fn sequence_numbers_wrap() {
        assert_eq!(Seq(u32::MAX) + 2, Seq(1));
        assert_eq!(Seq(1) - Seq(u32::MAX), 2);
        assert_eq!(Seq(u32::MAX) - Seq(1), -2);
    }
}
