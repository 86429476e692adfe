//! Capture files: reads pcap (microseconds or nanoseconds, either byte order) and pcapng packet by
//! packet, and writes nanosecond pcap.
//!
//! A [`Reader`] holds one buffer of fixed size, whatever the length of the capture, and asks its
//! source for more only when the bytes it has do not make a whole packet. So it follows a live
//! capture too: a packet that tcpdump has flushed into a pipe is delivered at once, although the
//! pipe stays open.
//!
//! ```
//! use serverlab::lab::pcap::{Link, Packet, Reader, Writer};
//!
//! let mut file = Vec::new();
//! let mut writer = Writer::new(&mut file, Link::ETHERNET, 128)?;
//! writer.write(&Packet::new(1_795_361_749_734_234_123, Link::ETHERNET, &b"frame"[..]))?;
//!
//! let mut reader = Reader::new(file.as_slice())?;
//! while let Some(packet) = reader.next_packet()? {
//!     assert_eq!(packet.at, 1_795_361_749_734_234_123);
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! See: pcap-savefile(5); the Internet-Drafts draft-ietf-opsawg-pcap and draft-ietf-opsawg-pcapng.

use std::borrow::Cow;
use std::fmt;
use std::fs::File;
use std::io::{self, Read, Write};
use std::ops::Range;
use std::path::Path;
use std::time::Duration;

use pcap_file::pcap::{
    PcapHeader, PcapParseError, PcapParser, PcapTsResolution, PcapWriteError, PcapWriter,
    RawPcapPacket,
};
use pcap_file::pcapng::blocks::{
    ENHANCED_PACKET_BLOCK, INTERFACE_DESCRIPTION_BLOCK, PACKET_BLOCK, SECTION_HEADER_BLOCK,
    SIMPLE_PACKET_BLOCK,
};
use pcap_file::pcapng::{Block, PcapNgParseError, PcapNgParser, RawBlock};
use pcap_file::{DataLink, Endianness};

/// The reader's buffer, in bytes, and so the largest packet it can deliver. Four times the largest
/// snapshot length that tcpdump uses (262144).
pub const BUFFER: usize = 1 << 20;

/// Interface descriptions of a pcapng section are kept while it is read; more than this, in bytes,
/// describe no network but an attack on the reader's memory.
const INTERFACES: usize = 4 << 20;

/// A link-layer type: what the first bytes of a packet are.
/// See: <https://www.tcpdump.org/linktypes.html>.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Link(pub u32);

impl Link {
    /// BSD loopback: an address family in the byte order of the capturing host, then IP.
    pub const NULL: Link = Link(0);
    /// Ethernet, with or without VLAN tags.
    pub const ETHERNET: Link = Link(1);
    /// IPv4 or IPv6 without a link layer (a TUN device).
    pub const RAW: Link = Link(101);
    /// OpenBSD loopback: an address family in network byte order, then IP.
    pub const LOOP: Link = Link(108);
    /// "Cooked" capture of Linux, version 1 (`tcpdump -i any` of older libpcap).
    pub const LINUX_SLL: Link = Link(113);
    /// IPv4 without a link layer.
    pub const IPV4: Link = Link(228);
    /// IPv6 without a link layer.
    pub const IPV6: Link = Link(229);
    /// "Cooked" capture of Linux, version 2 (`tcpdump -i any` of libpcap 1.10).
    pub const LINUX_SLL2: Link = Link(276);
}

impl From<DataLink> for Link {
    /// Without the upper half of a pcap header's field, which tells the length of the FCS.
    fn from(link: DataLink) -> Link {
        Link(u32::from(link) & 0xffff)
    }
}

/// One packet of a capture, not decoded yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packet<'a> {
    /// When it was captured: nanoseconds since the epoch (CLOCK_REALTIME). 0 in a pcapng "simple
    /// packet", which carries no time.
    pub at: u64,
    /// What its first bytes are.
    pub link: Link,
    /// Its length on the wire, in bytes; more than `bytes` when the capture cut it (snapshot length).
    pub len: u32,
    /// What was captured of it, from the link layer on.
    pub bytes: Cow<'a, [u8]>,
}

impl<'a> Packet<'a> {
    /// A packet captured whole.
    pub fn new(at: u64, link: Link, bytes: impl Into<Cow<'a, [u8]>>) -> Packet<'a> {
        let bytes = bytes.into();
        Packet { at, link, len: u32::try_from(bytes.len()).unwrap_or(u32::MAX), bytes }
    }

    /// The packet with its own copy of the bytes, to be kept while the reader goes on.
    pub fn into_owned(self) -> Packet<'static> {
        Packet { bytes: Cow::Owned(self.bytes.into_owned()), ..self }
    }
}

/// Reads a whole capture file.
///
/// # Errors
/// The file cannot be opened, or what [`Reader`] finds wrong with it.
pub fn read(path: impl AsRef<Path>) -> Result<Vec<Packet<'static>>, ReadError> {
    let mut reader = Reader::new(File::open(path).map_err(ReadError::Io)?)?;
    let mut packets = Vec::new();
    while let Some(packet) = reader.next_packet()? {
        packets.push(packet.into_owned());
    }
    Ok(packets)
}

/// Reads a capture from any source of bytes, in constant memory.
#[derive(Debug)]
pub struct Reader<R> {
    input: Input<R>,
    format: Format,
    delivered: u64,
    done: bool,
}

/// The library's parsers work on slices; the buffer is ours, so that we decide when to wait for
/// more bytes and know why there are none.
#[derive(Debug)]
enum Format {
    Pcap(PcapParser),
    /// With the bytes of interface descriptions kept so far for this section.
    PcapNg(PcapNgParser, usize),
}

impl<R: Read> Reader<R> {
    /// Reads the capture's header; the format is known by its first four bytes.
    ///
    /// # Errors
    /// [`ReadError::NotACapture`], [`ReadError::Truncated`] or the source's own.
    pub fn new(source: R) -> Result<Reader<R>, ReadError> {
        let mut input = Input { source, buffer: vec![0; BUFFER], start: 0, end: 0 };
        let format = loop {
            match parse_header(input.bytes()) {
                Ok((used, format)) => {
                    input.start += used;
                    break format;
                }
                Err(Stop::Incomplete(needed)) => input.fill(needed, 0)?,
                Err(Stop::Damaged(why)) => return Err(ReadError::NotACapture(why)),
            }
        };
        Ok(Reader { input, format, delivered: 0, done: false })
    }

    /// The next packet, or `None` at the end. Waits for the source only if the bytes at hand do
    /// not make a whole packet.
    ///
    /// # Errors
    /// What is wrong with the capture, after every whole packet before it has been delivered. It is
    /// reported once; then comes `None`.
    pub fn next_packet(&mut self) -> Result<Option<Packet<'_>>, ReadError> {
        if self.done {
            return Ok(None);
        }
        // Until it is known that there is another packet, this is the end.
        self.done = true;
        let Some(found) = self.find()? else { return Ok(None) };
        self.done = false;
        self.delivered += 1;
        let bytes = Cow::Borrowed(&self.input.buffer[found.bytes]);
        Ok(Some(Packet { at: found.at, link: found.link, len: found.len, bytes }))
    }

    fn find(&mut self) -> Result<Option<Found>, ReadError> {
        let packet = self.delivered + 1;
        loop {
            if self.input.bytes().is_empty() && !self.input.read()? {
                return Ok(None);
            }
            let parsed = match &mut self.format {
                Format::Pcap(parser) => parse_pcap(parser, self.input.bytes()),
                Format::PcapNg(parser, interfaces) => {
                    parse_pcapng(parser, interfaces, self.input.bytes())
                }
            };
            match parsed {
                Ok((used, found)) => {
                    let start = self.input.start;
                    self.input.start += used;
                    if let Some(mut found) = found {
                        found.bytes = start + found.bytes.start..start + found.bytes.end;
                        return Ok(Some(found));
                    }
                }
                Err(Stop::Incomplete(needed)) => self.input.fill(needed, packet)?,
                Err(Stop::Damaged(why)) => return Err(ReadError::Damaged { packet, why }),
            }
        }
    }

    /// How many packets have been delivered: the number of the last, as Wireshark counts frames.
    pub fn delivered(&self) -> u64 {
        self.delivered
    }

    /// The link type of a pcap; `None` for a pcapng, where every interface has its own.
    pub fn link(&self) -> Option<Link> {
        match &self.format {
            Format::Pcap(parser) => Some(parser.header().datalink.into()),
            Format::PcapNg(..) => None,
        }
    }
}

/// A packet in the buffer, before it is lent out.
struct Found {
    at: u64,
    link: Link,
    len: u32,
    bytes: Range<usize>,
}

/// Why a parser stopped.
enum Stop {
    /// It needs so many bytes to go on.
    Incomplete(usize),
    Damaged(String),
}

/// What a parser made of the bytes: how many it used and what it found in them.
type Parsed<T> = Result<(usize, T), Stop>;

fn parse_header(bytes: &[u8]) -> Parsed<Format> {
    let Some(magic) = bytes.first_chunk() else { return Err(Stop::Incomplete(4)) };
    match magic {
        [0xa1, 0xb2, 0xc3, 0xd4]
        | [0xa1, 0xb2, 0x3c, 0x4d]
        | [0xd4, 0xc3, 0xb2, 0xa1]
        | [0x4d, 0x3c, 0xb2, 0xa1] => {
            let (rest, parser) = PcapParser::new(bytes)?;
            Ok((bytes.len() - rest.len(), Format::Pcap(parser)))
        }
        [0x0a, 0x0d, 0x0d, 0x0a] => {
            let (rest, parser) = PcapNgParser::new(bytes)?;
            Ok((bytes.len() - rest.len(), Format::PcapNg(parser, 0)))
        }
        [0x1f, 0x8b, ..] => Err(Stop::Damaged("it is compressed: gunzip it first".into())),
        [0x28, 0xb5, 0x2f, 0xfd] => {
            Err(Stop::Damaged("it is compressed: decompress it with zstd -d first".into()))
        }
        _ => Err(Stop::Damaged("it begins like neither pcap nor pcapng".into())),
    }
}

fn parse_pcap(parser: &PcapParser, bytes: &[u8]) -> Parsed<Option<Found>> {
    // The raw form: the checked one refuses packets longer than the header's snapshot length,
    // which real files have (merged ones, and some devices').
    let (rest, packet) = parser.next_raw_packet(bytes)?;
    let header = parser.header();
    let unit = match header.ts_resolution {
        PcapTsResolution::MicroSecond => 1_000,
        PcapTsResolution::NanoSecond => 1,
    };
    let used = bytes.len() - rest.len();
    let found = Found {
        at: u64::from(packet.ts_sec) * 1_000_000_000 + u64::from(packet.ts_frac) * unit,
        link: header.datalink.into(),
        len: packet.orig_len.max(packet.incl_len),
        bytes: used - packet.data.len()..used,
    };
    Ok((used, Some(found)))
}

fn parse_pcapng(
    parser: &mut PcapNgParser,
    interfaces: &mut usize,
    bytes: &[u8],
) -> Parsed<Option<Found>> {
    // A block that is no packet (names, statistics, secrets, journal) need not be understood, and
    // so cannot make a capture unreadable. Sections and interfaces the parser decodes itself.
    let (rest, block) = parser.next_raw_block(bytes)?;
    let found = match block.type_ {
        SECTION_HEADER_BLOCK => {
            *interfaces = 0;
            None
        }
        INTERFACE_DESCRIPTION_BLOCK => {
            *interfaces += block.body.len();
            if *interfaces > INTERFACES {
                return Err(Stop::Damaged("it has more interfaces than can be true".into()));
            }
            None
        }
        ENHANCED_PACKET_BLOCK | SIMPLE_PACKET_BLOCK | PACKET_BLOCK => {
            Some(packet_block(parser, block, bytes)?)
        }
        _ => None,
    };
    Ok((bytes.len() - rest.len(), found))
}

fn packet_block(parser: &PcapNgParser, block: RawBlock, bytes: &[u8]) -> Result<Found, Stop> {
    let block = block.try_into_block(parser.state()).map_err(PcapNgParseError::from)?;
    let (interface, time, len, data) = match block {
        Block::EnhancedPacket(b) => (b.interface_id, b.timestamp, b.original_len, b.data),
        Block::SimplePacket(b) => (0, Duration::ZERO, b.original_len, b.data),
        Block::Packet(b) => (b.interface_id.into(), b.timestamp, b.original_len, b.data),
        _ => return Err(Stop::Damaged("a packet block that holds none".into())),
    };
    let Some(interface) = parser.interfaces().get(interface as usize) else {
        return Err(Stop::Damaged(format!("interface {interface} was never described")));
    };
    // The data is a part of `bytes`; where it begins is the distance of the two addresses.
    let from = data.as_ptr().addr() - bytes.as_ptr().addr();
    Ok(Found {
        at: u64::try_from(time.as_nanos()).unwrap_or(u64::MAX), // after the year 2554
        link: interface.linktype.into(),
        len: len.max(u32::try_from(data.len()).unwrap_or(u32::MAX)),
        bytes: from..from + data.len(),
    })
}

impl From<PcapParseError> for Stop {
    fn from(error: PcapParseError) -> Stop {
        match error {
            PcapParseError::IncompleteBuffer(needed, _) => Stop::Incomplete(needed),
            other => Stop::Damaged(one_line(&other)),
        }
    }
}

impl From<PcapNgParseError> for Stop {
    fn from(error: PcapNgParseError) -> Stop {
        match error {
            PcapNgParseError::IncompleteBuffer(needed, _) => Stop::Incomplete(needed),
            other => Stop::Damaged(one_line(&other)),
        }
    }
}

/// An error and its causes.
fn one_line(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

/// The source and the bytes that it gave and nobody has used yet.
#[derive(Debug)]
struct Input<R> {
    source: R,
    buffer: Vec<u8>,
    start: usize,
    end: usize,
}

impl<R: Read> Input<R> {
    fn bytes(&self) -> &[u8] {
        &self.buffer[self.start..self.end]
    }

    /// Gets more bytes for `packet` (0 is the header), which needs so many.
    fn fill(&mut self, needed: usize, packet: u64) -> Result<(), ReadError> {
        // A record's own header (at most 16 bytes) is not in the number.
        if needed > self.buffer.len() - 16 {
            let why = format!("it claims {needed} bytes, more than any packet has");
            return Err(ReadError::Damaged { packet, why });
        }
        if self.read()? {
            Ok(())
        } else if packet == 0 && self.bytes().is_empty() {
            Err(ReadError::NotACapture("it is empty".into()))
        } else {
            Err(ReadError::Truncated { packet })
        }
    }

    /// One read(2) of what there is, be it little. `false` at the end of the source. There is room,
    /// because the parsers use up all that is whole and nothing larger than the buffer is waited for.
    fn read(&mut self) -> Result<bool, ReadError> {
        self.buffer.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        self.start = 0;
        loop {
            match self.source.read(&mut self.buffer[self.end..]) {
                Ok(count) => {
                    self.end += count;
                    return Ok(count > 0);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(ReadError::Io(error)),
            }
        }
    }
}

/// Why a capture could not be read, or not to its end. Displayed in one line, without the file's
/// name.
#[derive(Debug)]
pub enum ReadError {
    /// The source failed.
    Io(io::Error),
    /// The bytes are no pcap and no pcapng; why.
    NotACapture(String),
    /// The capture ends in the middle of this packet, counted from 1; 0 is the header. All packets
    /// before it have been delivered.
    Truncated {
        /// The packet that is cut.
        packet: u64,
    },
    /// What should be this packet, counted from 1, makes no sense; reading cannot go on. All
    /// packets before it have been delivered.
    Damaged {
        /// The packet that is damaged; 0 is the header.
        packet: u64,
        /// What is wrong with it.
        why: String,
    },
}

impl fmt::Display for ReadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ReadError::Io(error) => error.fmt(f),
            ReadError::NotACapture(why) => write!(f, "not a capture: {why}"),
            ReadError::Truncated { packet: 0 } => {
                f.write_str("the capture ends in the middle of its header")
            }
            ReadError::Truncated { packet } => {
                write!(f, "the capture ends in the middle of packet {packet}")
            }
            ReadError::Damaged { packet: 0, why } => {
                write!(f, "the capture's header is damaged: {why}")
            }
            ReadError::Damaged { packet, why } => {
                write!(f, "the capture is damaged at packet {packet}: {why}")
            }
        }
    }
}

impl std::error::Error for ReadError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            ReadError::Io(error) => Some(error),
            _ => None,
        }
    }
}

impl From<io::Error> for ReadError {
    fn from(error: io::Error) -> ReadError {
        ReadError::Io(error)
    }
}

/// Writes a nanosecond pcap, one `write` a packet part: give it a buffer, or a descriptor if a
/// reader waits at the other end.
#[derive(Debug)]
pub struct Writer<W: Write> {
    inner: PcapWriter<W>,
    link: Link,
}

impl<W: Write> Writer<W> {
    /// Writes the header. `snaplen` is the snapshot length that the capture was made with; a packet
    /// is never cut by the writer.
    ///
    /// # Errors
    /// Those of `out`.
    pub fn new(out: W, link: Link, snaplen: u32) -> io::Result<Writer<W>> {
        let header = PcapHeader {
            snaplen,
            datalink: DataLink::from(link.0),
            ts_resolution: PcapTsResolution::NanoSecond,
            endianness: Endianness::Little,
            ..PcapHeader::default()
        };
        let inner = PcapWriter::with_header(out, header).map_err(into_io)?;
        Ok(Writer { inner, link })
    }

    /// Writes one packet.
    ///
    /// # Errors
    /// Those of the output; InvalidInput for a packet that this file cannot hold: one of another
    /// link type, or stamped after 2106.
    pub fn write(&mut self, packet: &Packet<'_>) -> io::Result<()> {
        let invalid = |what| io::Error::new(io::ErrorKind::InvalidInput, what);
        if packet.link != self.link {
            return Err(invalid("a pcap holds packets of one link type only"));
        }
        let seconds = u32::try_from(packet.at / 1_000_000_000)
            .map_err(|_| invalid("a pcap's time stamps end in 2106"))?;
        let raw = RawPcapPacket {
            ts_sec: seconds,
            ts_frac: (packet.at % 1_000_000_000) as u32,
            incl_len: u32::try_from(packet.bytes.len())
                .map_err(|_| invalid("a packet of 4 GiB"))?,
            orig_len: packet.len,
            data: Cow::Borrowed(&packet.bytes),
        };
        self.inner.write_raw_packet(&raw).map_err(into_io)?;
        Ok(())
    }

    /// Flushes the output.
    ///
    /// # Errors
    /// Those of the output.
    pub fn flush(&mut self) -> io::Result<()> {
        self.inner.flush().map_err(into_io)
    }
}

fn into_io(error: PcapWriteError) -> io::Error {
    match error {
        PcapWriteError::Io(error) | PcapWriteError::FieldWriteFailed(_, error) => error,
        other => io::Error::new(io::ErrorKind::InvalidInput, other),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::VecDeque;
    use std::sync::mpsc;

    const AT: u64 = 1_795_361_749_734_234_123;

    /// A nanosecond pcap of three packets.
    fn three() -> Vec<u8> {
        let mut writer = Writer::new(Vec::new(), Link::ETHERNET, 128).unwrap();
        for number in 1..=3 {
            let bytes = vec![number; 10 * usize::from(number)];
            let packet = Packet::new(AT + u64::from(number), Link::ETHERNET, bytes);
            writer.write(&Packet { len: 100, ..packet }).unwrap();
        }
        writer.inner.into_inner()
    }

    /// Reads to the end: the packets and, if there is one, the error.
    fn read_all(bytes: &[u8]) -> (Vec<Packet<'static>>, Option<ReadError>) {
        let mut reader = match Reader::new(bytes) {
            Ok(reader) => reader,
            Err(error) => return (Vec::new(), Some(error)),
        };
        let mut packets = Vec::new();
        loop {
            match reader.next_packet() {
                Ok(Some(packet)) => packets.push(packet.into_owned()),
                Ok(None) => return (packets, None),
                Err(error) => {
                    assert!(matches!(reader.next_packet(), Ok(None)), "one error, then the end");
                    return (packets, Some(error));
                }
            }
        }
    }

    #[test]
    fn what_is_written_reads_back() {
        let (packets, error) = read_all(&three());
        assert!(error.is_none());
        let times: Vec<_> = packets.iter().map(|packet| packet.at).collect();
        assert_eq!(times, [AT + 1, AT + 2, AT + 3]);
        assert!(packets.iter().all(|packet| packet.len == 100 && packet.link == Link::ETHERNET));
        assert_eq!(packets[2].bytes, vec![3; 30]);
    }

    #[test]
    fn a_writer_refuses_what_its_file_cannot_hold() {
        let mut writer = Writer::new(Vec::new(), Link::ETHERNET, 128).unwrap();
        let other = Packet::new(AT, Link::RAW, &b"x"[..]);
        assert_eq!(writer.write(&other).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        let late = Packet::new(u64::MAX, Link::ETHERNET, &b"x"[..]);
        assert_eq!(writer.write(&late).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }

    /// A pcap of one packet, in either byte order and either unit; snapshot length 4.
    fn pcap(big_endian: bool, magic: u32, fraction: u32) -> Vec<u8> {
        let words = [magic, 0x0004_0002, 0, 0, 4, 0x1000_0001, 1_795_361_749, fraction, 5, 5];
        let word = |word: u32| if big_endian { word.to_be_bytes() } else { word.to_le_bytes() };
        let mut bytes: Vec<u8> = words.into_iter().flat_map(word).collect();
        bytes.extend(b"hello");
        bytes
    }

    #[test]
    fn both_units_and_both_byte_orders_are_read() {
        for big_endian in [false, true] {
            for (magic, fraction, at) in
                [(0xa1b2_3c4d, 734_234_123, AT), (0xa1b2_c3d4, 734_234, AT - 123)]
            {
                // Longer than the snapshot length that the header states, and with an FCS length in
                // the upper half of the link type: both happen.
                let (packets, error) = read_all(&pcap(big_endian, magic, fraction));
                assert!(error.is_none(), "{error:?}");
                assert_eq!(packets, [Packet::new(at, Link::ETHERNET, &b"hello"[..])]);
            }
        }
    }

    /// A pcapng block.
    fn block(kind: u32, body: &[u8]) -> Vec<u8> {
        let body_len = body.len().next_multiple_of(4);
        let len = 12 + body_len as u32;
        let mut bytes = [kind.to_le_bytes(), len.to_le_bytes()].concat();
        bytes.extend(body);
        bytes.resize(8 + body_len, 0);
        bytes.extend(len.to_le_bytes());
        bytes
    }

    fn words(words: &[u32]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    fn section() -> Vec<u8> {
        block(SECTION_HEADER_BLOCK, &words(&[0x1a2b_3c4d, 1, u32::MAX, u32::MAX]))
    }

    /// An interface description; `resolution` is if_tsresol, if not the default of microseconds.
    fn interface(link: Link, resolution: Option<u8>) -> Vec<u8> {
        let mut body = words(&[link.0, 0]);
        if let Some(resolution) = resolution {
            body.extend([9, 0, 1, 0, resolution, 0, 0, 0, 0, 0, 0, 0]);
        }
        block(INTERFACE_DESCRIPTION_BLOCK, &body)
    }

    fn enhanced(interface: u32, at: u64, bytes: &[u8]) -> Vec<u8> {
        let len = bytes.len() as u32;
        let mut body = words(&[interface, (at >> 32) as u32, at as u32, len, len + 1]);
        body.extend(bytes);
        block(ENHANCED_PACKET_BLOCK, &body)
    }

    #[test]
    fn pcapng_packets_carry_their_interfaces_clock_and_link() {
        let names = block(4, b"not understood, and not needed");
        let simple = [5_u32.to_le_bytes().as_slice(), b"hello"].concat();
        let file = [
            section(),
            interface(Link::ETHERNET, None),
            interface(Link::RAW, Some(9)),
            names,
            enhanced(0, AT / 1000, b"micro"),
            enhanced(1, AT, b"nano"),
            block(SIMPLE_PACKET_BLOCK, &simple),
            section(), // and its interfaces begin anew
            interface(Link::LINUX_SLL2, Some(9)),
            enhanced(0, AT + 1, b""),
        ];
        let (packets, error) = read_all(&file.concat());
        assert!(error.is_none(), "{error:?}");
        let packet = |at, link, bytes: &'static [u8], cut| {
            let packet = Packet::new(at, link, bytes);
            Packet { len: packet.len + cut, ..packet }
        };
        assert_eq!(
            packets,
            [
                packet(AT - 123, Link::ETHERNET, b"micro", 1),
                packet(AT, Link::RAW, b"nano", 1),
                packet(0, Link::ETHERNET, b"hello", 0),
                packet(AT + 1, Link::LINUX_SLL2, b"", 1),
            ]
        );
    }

    #[test]
    fn a_cut_file_gives_its_whole_packets_and_then_says_where_it_ends() {
        let pcapng = [
            section(),
            interface(Link::ETHERNET, Some(9)),
            enhanced(0, AT, b"one"),
            enhanced(0, AT, b"two"),
        ];
        // The offsets at which a file may end well, each with the packets before it.
        let whole_pcap = [(24, 0), (24 + 26, 1), (24 + 62, 2), (24 + 108, 3)];
        let whole_pcapng = [(28, 0), (28 + 32, 0), (28 + 32 + 36, 1), (28 + 32 + 72, 2)];
        for (file, ends) in [(three(), whole_pcap), (pcapng.concat(), whole_pcapng)] {
            assert_eq!(file.len(), ends[3].0);
            for cut in 1..=file.len() {
                let (packets, error) = read_all(&file[..cut]);
                let whole = ends.iter().filter(|(end, _)| *end <= cut).map(|(_, n)| *n).next_back();
                assert_eq!(packets.len(), whole.unwrap_or(0));
                let well = ends.iter().any(|(end, _)| *end == cut);
                let packet = whole.map_or(0, |whole| whole as u64 + 1);
                match error {
                    None => assert!(well, "cut at {cut}"),
                    Some(ReadError::Truncated { packet: at }) => {
                        assert!(!well && at == packet, "cut at {cut}: {at}");
                    }
                    Some(other) => panic!("cut at {cut}: {other}"),
                }
            }
        }
    }

    #[test]
    fn what_is_wrong_is_said_in_one_line() {
        let mut huge = three();
        huge[24 + 8..24 + 12].copy_from_slice(&0x7fff_ffff_u32.to_le_bytes());
        let interface_7 = [section(), interface(Link::ETHERNET, None), enhanced(7, AT, b"x")];
        for (bytes, message) in [
            (b"".to_vec(), "not a capture: it is empty"),
            (b"GET".to_vec(), "the capture ends in the middle of its header"),
            (b"GET / HTTP".to_vec(), "not a capture: it begins like neither pcap nor pcapng"),
            (b"\x1f\x8b\x08\x00".to_vec(), "not a capture: it is compressed: gunzip it first"),
            (
                huge,
                "the capture is damaged at packet 1: it claims 2147483647 bytes, more than any packet has",
            ),
            (
                interface_7.concat(),
                "the capture is damaged at packet 1: Invalid content for block 'Enhanced Packet Block' (0x6): Invalid interface ID: 7",
            ),
        ] {
            let (_, error) = read_all(&bytes);
            assert_eq!(error.unwrap().to_string(), message);
        }
    }

    #[test]
    fn endless_interfaces_do_not_fill_the_memory() {
        let mut file = section();
        let comment = vec![b'x'; 60_000];
        let mut body = words(&[1, 0, 60_000 << 16 | 1]);
        body.extend(comment);
        let interface = block(INTERFACE_DESCRIPTION_BLOCK, &body);
        for _ in 0..=INTERFACES / interface.len() + 1 {
            file.extend(&interface);
        }
        let (_, error) = read_all(&file);
        assert!(error.unwrap().to_string().ends_with("it has more interfaces than can be true"));
    }

    #[test]
    fn many_sections_with_an_interface_each_are_read() {
        let mut body = words(&[1, 0, 60_000 << 16 | 1]);
        body.extend(vec![b'x'; 60_000]);
        let once = [section(), block(INTERFACE_DESCRIPTION_BLOCK, &body)].concat();
        let (_, error) = read_all(&once.repeat(2 * INTERFACES / once.len()));
        assert!(error.is_none(), "{error:?}");
    }

    #[test]
    fn the_largest_packet_fits_the_buffer() {
        for (length, fits) in [(BUFFER - 16, true), (BUFFER - 15, false)] {
            let mut writer = Writer::new(Vec::new(), Link::ETHERNET, 0).unwrap();
            let packet = Packet::new(AT, Link::ETHERNET, vec![0; length]);
            (0..2).for_each(|_| writer.write(&packet).unwrap());
            let (packets, error) = read_all(&writer.inner.into_inner());
            assert_eq!(packets.len(), if fits { 2 } else { 0 });
            assert_eq!(matches!(error, Some(ReadError::Damaged { packet: 1, .. })), !fits);
        }
    }

    /// A pipe: a read gives what is there, or waits. The second is interrupted by a signal.
    struct Pipe {
        chunks: mpsc::Receiver<Vec<u8>>,
        pending: VecDeque<u8>,
        reads: u64,
    }

    impl Read for Pipe {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            self.reads += 1;
            if self.reads == 2 {
                return Err(io::ErrorKind::Interrupted.into());
            }
            if self.pending.is_empty() {
                match self.chunks.recv() {
                    Ok(chunk) => self.pending.extend(chunk),
                    Err(_) => return Ok(0),
                }
            }
            self.pending.read(buffer)
        }
    }

    #[test]
    fn a_packet_in_a_pipe_is_delivered_before_the_next_is_written() {
        let file = three();
        let (to_reader, chunks) = mpsc::channel();
        let pipe = Pipe { chunks, pending: VecDeque::new(), reads: 0 };
        let (to_writer, delivered) = mpsc::channel();
        let reader = std::thread::spawn(move || {
            let mut reader = Reader::new(pipe).unwrap();
            while let Some(packet) = reader.next_packet().unwrap() {
                to_writer.send(packet.bytes[0]).unwrap();
            }
        });
        // The header, then each packet: the next is written only when the last has arrived. A
        // reader that waited to fill its buffer would wait for ever.
        let mut rest = file.as_slice();
        for (length, number) in [(24, None), (26, Some(1)), (36, Some(2)), (46, Some(3))] {
            let (chunk, after) = rest.split_at(length);
            to_reader.send(chunk.to_vec()).unwrap();
            rest = after;
            if let Some(number) = number {
                let deadline = Duration::from_secs(10);
                assert_eq!(delivered.recv_timeout(deadline), Ok(number), "packet {number}");
            }
        }
        drop(to_reader);
        reader.join().unwrap();
    }
}
