//! Who opened a connection, who sent what, who ended it and how.
//!
//! ```
//! use serverlab::lab::flow::{Flows, Side};
//!
//! let flows = Flows::read("captures/reference/unread-close.pcap")?;
//! let flow = flows.only()?;
//! assert!(flow.facts.handshake_completed());
//! assert_eq!(flow.facts.reset_by(), Some(Side::Server));
//! assert_eq!(flow.facts[Side::Server].fin, None); // and no FIN from it
//! assert_eq!(flow.payload(Side::Client), b"hello");
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! [`Facts`] has a constant size and takes one segment after the other: `lab show` keeps only that.
//! A [`Flow`] adds every segment, as a [`Step`], and the payload: what a test wants.
//!
//! A segment that sends nothing new, all of it below the highest byte its sender has sent, counts
//! as retransmitted. Where the network reorders, that includes segments that merely came late; no
//! network of ours does. A capture that holds each packet twice (two interfaces on one path) shows
//! every second one so.
//!
//! See: RFC 9293 3.4 (sequence numbers) and 3.10.7 (what a segment does to a connection).

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::net::SocketAddr;
use std::ops::{Index, IndexMut, Range};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::lab::packet::{Decoded, Flags, Segment, Seq, decode};
use crate::lab::pcap::{Packet, ReadError, Reader};

/// One end of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Side {
    /// Who sent the first SYN. If the capture lacks it: whom the SYN-ACK is for, else who uses the
    /// higher port.
    Client,
    /// The other.
    Server,
}

impl Side {
    /// The other side.
    #[must_use]
    pub fn other(self) -> Side {
        match self {
            Side::Client => Side::Server,
            Side::Server => Side::Client,
        }
    }
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Side::Client => "client",
            Side::Server => "server",
        })
    }
}

/// The two endpoints of a connection in an order that does not depend on who speaks: what the
/// segments of both directions have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Endpoints(SocketAddr, SocketAddr);

impl Endpoints {
    /// Those of a segment.
    pub fn of(segment: &Segment<'_>) -> Endpoints {
        Endpoints(segment.from.min(segment.to), segment.from.max(segment.to))
    }
}

/// One segment as a part of its flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// Its number in the capture file, counted from 1.
    pub frame: u64,
    /// When it was captured: nanoseconds since the epoch.
    pub at: u64,
    /// Who sent it.
    pub from: Side,
    /// Its control bits.
    pub flags: Flags,
    /// Relative sequence number: 0 is the SYN, 1 the first byte. It goes on above 2^32; it is
    /// negative if the flow's beginning is missing and this comes from before what is there.
    pub seq: i64,
    /// Relative acknowledgement number, of a segment that has one.
    pub ack: Option<i64>,
    /// The window field as sent, not scaled.
    pub window: u16,
    /// Length of the payload on the wire, in bytes.
    pub len: u32,
    /// It sends something, but nothing that its sender had not sent before.
    pub retransmitted: bool,
    /// It is the client's first answer to the server's SYN-ACK.
    pub completes_handshake: bool,
    /// It is a RST that answers an ACK which came after the connection's end: see [`Facts::add`].
    pub after_the_end: bool,
}

impl Step {
    /// The payload's relative sequence numbers, as tcpdump prints them: `1:6` is the first five
    /// bytes.
    pub fn range(&self) -> Range<i64> {
        self.seq..self.seq + i64::from(self.len)
    }

    /// It only acknowledges: no payload, and none of SYN, FIN, RST.
    pub fn is_pure_ack(&self) -> bool {
        let sends = Flags::SYN.with(Flags::FIN).with(Flags::RST);
        self.len == 0 && self.flags.0 & sends.0 == 0
    }
}

/// What one side of a flow has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Half {
    /// Segments, of any kind.
    pub segments: u64,
    /// Bytes of payload, each counted once however often it was sent: the sequence numbers say it,
    /// so bytes that the capture missed count too.
    pub bytes: u64,
    /// The frame of its first SYN or SYN-ACK.
    pub syn: Option<u64>,
    /// The frame of its first FIN.
    pub fin: Option<u64>,
    /// The frame of its first RST.
    pub rst: Option<u64>,
    /// How many RSTs it sent.
    pub rsts: u64,
    /// How many segments it sent that sent nothing new.
    pub retransmitted: u64,
    /// The sequence number of its SYN.
    isn: Option<Seq>,
    /// The next sequence number, absolute and relative; unknown until something tells it.
    next: Option<(Seq, i64)>,
}

impl Half {
    /// The relative number of a sequence number of this side. Taken near the highest one sent, so
    /// that it goes on where 32 bits wrap.
    fn relative(&self, seq: Seq) -> Option<i64> {
        self.next.map(|(next, relative)| relative + i64::from(seq - next))
    }
}

/// What is known of a flow, in constant size however long it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    /// The address of the side that opened, or of the better guess; see [`Side::Client`].
    pub client: SocketAddr,
    /// The address of the other.
    pub server: SocketAddr,
    /// When the first segment was captured: nanoseconds since the epoch.
    pub began: u64,
    /// When the last one was.
    pub ended: u64,
    /// The frame that completed the handshake.
    pub handshake: Option<u64>,
    halves: [Half; 2],
}

impl Index<Side> for Facts {
    type Output = Half;
    fn index(&self, side: Side) -> &Half {
        &self.halves[side as usize]
    }
}

impl IndexMut<Side> for Facts {
    fn index_mut(&mut self, side: Side) -> &mut Half {
        &mut self.halves[side as usize]
    }
}

/// Bits of [`Facts::completeness`], with the values of Wireshark's `tcp.completeness`.
pub mod completeness {
    /// The client's SYN was seen.
    pub const SYN: u8 = 1;
    /// The server's SYN-ACK was seen.
    pub const SYN_ACK: u8 = 2;
    /// The handshake was completed.
    pub const ACK: u8 = 4;
    /// Payload was sent.
    pub const DATA: u8 = 8;
    /// A FIN was sent.
    pub const FIN: u8 = 16;
    /// A RST was sent.
    pub const RST: u8 = 32;
}

impl Facts {
    /// A flow that begins with this segment, which is still to be [added](Facts::add).
    pub fn begin(segment: &Segment<'_>) -> Facts {
        let from_server = if segment.flags.has(Flags::SYN) {
            segment.flags.has(Flags::ACK)
        } else {
            segment.from.port() < segment.to.port()
        };
        let (client, server) = match from_server {
            true => (segment.to, segment.from),
            false => (segment.from, segment.to),
        };
        Facts {
            client,
            server,
            began: segment.at,
            ended: segment.at,
            handshake: None,
            halves: Default::default(),
        }
    }

    /// Whether this segment, of the same endpoints, begins another connection: a SYN with another
    /// initial sequence number than this flow's. (A SYN that is sent again keeps its number.)
    pub fn is_over_at(&self, segment: &Segment<'_>) -> bool {
        if !segment.flags.has(Flags::SYN) {
            return false;
        }
        let sender = &self[self.side_of(segment)];
        match sender.isn {
            Some(isn) => isn != segment.seq,
            // Its first SYN here. A SYN-ACK answers this flow's SYN, even if an ACK of it was
            // captured before. A bare SYN is the other half of a simultaneous open, unless the
            // connection exists already.
            None if segment.flags.has(Flags::ACK) => {
                sender.relative(segment.seq).is_some_and(|relative| relative != 0)
            }
            None => self.handshake.is_some() || sender.next.is_some(),
        }
    }

    /// Takes the flow's next segment and says what it was.
    ///
    /// When both sides have sent their FINs, a bare RST of the next sequence number may follow:
    /// hosts with several processors can overtake themselves, so that the ACK of one FIN, sent
    /// before the other FIN, arrives behind it; TIME_WAIT answers such an old segment with an ACK,
    /// and by then nobody is there to take it. It changes nothing for anybody.
    pub fn add(&mut self, segment: &Segment<'_>) -> Step {
        let from = self.side_of(segment);
        self.ended = self.ended.max(segment.at);
        self.learn_base(from, segment);

        let flags = segment.flags;
        let half = &self[from];
        let seq = half.relative(segment.seq).unwrap_or(0);
        let highest = half.next.map_or(0, |(_, relative)| relative);
        // What it takes of the sequence space: a SYN and a FIN count as one byte each.
        let takes =
            segment.len + u32::from(flags.has(Flags::SYN)) + u32::from(flags.has(Flags::FIN));
        let end = seq + i64::from(takes);
        let acknowledged = flags.has(Flags::ACK).then(|| self[from.other()].relative(segment.ack));
        let step = Step {
            frame: segment.frame,
            at: segment.at,
            from,
            flags,
            seq,
            ack: acknowledged.flatten(),
            window: segment.window,
            len: segment.len,
            retransmitted: takes > 0 && end <= highest && !flags.has(Flags::RST),
            completes_handshake: self.completes_handshake(from, segment),
            after_the_end: flags.has(Flags::RST)
                && !flags.has(Flags::ACK)
                && seq == highest
                && self.halves.iter().all(|half| half.fin.is_some()),
        };
        if step.completes_handshake {
            self.handshake = Some(segment.frame);
        }

        let half = &mut self[from];
        half.segments += 1;
        half.retransmitted += u64::from(step.retransmitted);
        // A RST takes nothing and may have any number: it may not even come from this connection.
        if end > highest && !flags.has(Flags::RST) {
            half.next = Some((segment.seq + takes, end));
        }
        if flags.has(Flags::SYN) {
            half.isn.get_or_insert(segment.seq);
            half.syn.get_or_insert(segment.frame);
        }
        if flags.has(Flags::FIN) {
            half.fin.get_or_insert(segment.frame);
        }
        if flags.has(Flags::RST) {
            half.rst.get_or_insert(segment.frame);
            half.rsts += 1;
        }
        let (first, fin) = (1, i64::from(half.fin.is_some()));
        half.bytes = (half.next.map_or(0, |(_, next)| next) - first - fin).max(0) as u64;
        step
    }

    /// Fixes what relative 0 is for a side that has sent nothing yet: the number of its SYN; or,
    /// where the SYN is missing, the one before the first byte that is seen or acknowledged; or the
    /// number of a RST that answers a SYN, which is 0 (RFC 9293 3.10.7.1).
    fn learn_base(&mut self, from: Side, segment: &Segment<'_>) {
        if self[from].next.is_none() {
            let began = segment.flags.has(Flags::SYN) || segment.flags.has(Flags::RST);
            self[from].next = Some((segment.seq, i64::from(!began)));
        }
        let peer = &mut self[from.other()];
        if peer.next.is_none() && segment.flags.has(Flags::ACK) {
            peer.next = Some((segment.ack, 1));
        }
    }

    /// The client's first segment that acknowledges the server's SYN, whatever else it does.
    fn completes_handshake(&self, from: Side, segment: &Segment<'_>) -> bool {
        let forbidden = Flags::SYN.with(Flags::RST);
        self.handshake.is_none()
            && from == Side::Client
            && self[Side::Client].isn.is_some()
            && self[Side::Server].isn.is_some_and(|isn| segment.ack - isn > 0)
            && segment.flags.has(Flags::ACK)
            && segment.flags.0 & forbidden.0 == 0
    }

    /// Who sent this segment of the flow.
    pub fn side_of(&self, segment: &Segment<'_>) -> Side {
        if segment.from == self.client { Side::Client } else { Side::Server }
    }

    /// The address of a side.
    pub fn address(&self, side: Side) -> SocketAddr {
        match side {
            Side::Client => self.client,
            Side::Server => self.server,
        }
    }

    /// Whether SYN, SYN-ACK and ACK were seen.
    pub fn handshake_completed(&self) -> bool {
        self.handshake.is_some()
    }

    /// Who sent the first FIN.
    pub fn first_fin_by(&self) -> Option<Side> {
        self.first_by(|half| half.fin)
    }

    /// Who sent the first RST.
    pub fn reset_by(&self) -> Option<Side> {
        self.first_by(|half| half.rst)
    }

    fn first_by(&self, frame: impl Fn(&Half) -> Option<u64>) -> Option<Side> {
        match (frame(&self[Side::Client]), frame(&self[Side::Server])) {
            (None, None) => None,
            (Some(client), Some(server)) if server < client => Some(Side::Server),
            (Some(_), _) => Some(Side::Client),
            (None, Some(_)) => Some(Side::Server),
        }
    }

    /// Whether nothing but stragglers can follow: a RST, or a FIN from both.
    pub fn is_over(&self) -> bool {
        self.reset_by().is_some() || self.halves.iter().all(|half| half.fin.is_some())
    }

    /// What of a connection's life was seen: the sum of [`completeness`] bits.
    ///
    /// They mean what Wireshark's documentation says. Wireshark itself takes any segment with the
    /// ACK flag for the handshake's, even the RST that refuses a connection.
    pub fn completeness(&self) -> u8 {
        let either = |some: fn(&Half) -> bool| self.halves.iter().any(some);
        let bits = [
            (completeness::SYN, self[Side::Client].isn.is_some()),
            (completeness::SYN_ACK, self[Side::Server].isn.is_some()),
            (completeness::ACK, self.handshake_completed()),
            (completeness::DATA, either(|half| half.bytes > 0)),
            (completeness::FIN, either(|half| half.fin.is_some())),
            (completeness::RST, either(|half| half.rst.is_some())),
        ];
        bits.iter().filter(|(_, seen)| *seen).map(|(bit, _)| bit).sum()
    }
}

/// A connection with all its segments and its payload.
#[derive(Clone, Debug)]
pub struct Flow {
    /// What the segments add up to.
    pub facts: Facts,
    /// Every segment, in the capture's order.
    pub steps: Vec<Step>,
    /// The file in which the frames have the numbers of the steps, if it is known.
    pub file: Option<Arc<Path>>,
    streams: [Stream; 2],
}

impl Flow {
    fn begin(segment: &Segment<'_>) -> Flow {
        let facts = Facts::begin(segment);
        Flow { facts, steps: Vec::new(), file: None, streams: Default::default() }
    }

    fn add(&mut self, segment: &Segment<'_>) {
        let step = self.facts.add(segment);
        if segment.len > 0 && !step.flags.has(Flags::RST) {
            let at = step.seq + i64::from(step.flags.has(Flags::SYN));
            self.streams[step.from as usize].add(at, &segment.payload);
        }
        self.steps.push(step);
    }

    /// What a side sent, in order and without repetition, from the first byte up to the first that
    /// the capture lacks; see [`payload_is_whole`](Flow::payload_is_whole). A snapshot length cuts
    /// payload, too.
    pub fn payload(&self, side: Side) -> &[u8] {
        &self.streams[side as usize].bytes
    }

    /// Whether [`payload`](Flow::payload) is all that the side sent.
    pub fn payload_is_whole(&self, side: Side) -> bool {
        self.payload(side).len() as u64 == self.facts[side].bytes
    }

    /// The payload segments of a side, as byte ranges in the order in which they were sent, without
    /// retransmissions: how the stream was cut into segments.
    pub fn ranges(&self, side: Side) -> Vec<Range<i64>> {
        let sent = self.steps.iter().filter(|step| step.from == side && !step.retransmitted);
        sent.map(Step::range).filter(|range| !range.is_empty()).collect()
    }
}

/// The payload of one direction being put together.
#[derive(Clone, Debug, Default)]
struct Stream {
    /// Relative sequence number of the next byte.
    next: Option<i64>,
    bytes: Vec<u8>,
    /// What came ahead of its turn, by relative sequence number.
    waiting: BTreeMap<i64, Vec<u8>>,
}

impl Stream {
    fn add(&mut self, at: i64, payload: &[u8]) {
        let next = *self.next.get_or_insert(at.min(1)); // 1 is the first byte, even if it is lacking
        if at > next {
            let known = self.waiting.entry(at).or_default();
            if known.len() < payload.len() {
                *known = payload.to_vec();
            }
            return;
        }
        self.append(at, payload);
        while let Some(first) = self.waiting.first_entry() {
            if self.next.is_some_and(|next| *first.key() > next) {
                break;
            }
            let (at, payload) = first.remove_entry();
            self.append(at, &payload);
        }
    }

    /// Takes what is new in a payload that begins at or before the next byte.
    fn append(&mut self, at: i64, payload: &[u8]) {
        let next = self.next.unwrap_or(at);
        let known = usize::try_from(next - at).unwrap_or(usize::MAX);
        if let Some(new) = payload.get(known..) {
            self.bytes.extend_from_slice(new);
            self.next = Some(next + new.len() as i64);
        }
    }
}

/// The TCP flows of one capture, in the order in which they began.
///
/// Holds the capture's payload in memory; for captures without a limit there is
/// [`show`](crate::lab::show).
#[derive(Clone, Debug, Default)]
pub struct Flows {
    flows: Vec<Flow>,
}

impl Flows {
    /// The flows of all packets of a file, in order: their positions are the frame numbers.
    pub fn from_packets<'p>(packets: impl IntoIterator<Item = &'p Packet<'p>>) -> Flows {
        let mut tracker = Tracker::default();
        for packet in packets {
            tracker.add(packet);
        }
        tracker.flows
    }

    /// The flows of a capture file, with its name for the messages.
    ///
    /// # Errors
    /// The file's or the capture's, with the file's name before it.
    pub fn read(path: impl AsRef<Path>) -> Result<Flows, FileError> {
        let path = path.as_ref();
        let read = || {
            let mut tracker = Tracker::default();
            let mut reader = Reader::new(std::fs::File::open(path)?)?;
            while let Some(packet) = reader.next_packet()? {
                tracker.add(&packet);
            }
            Ok(tracker.flows)
        };
        match read() {
            Ok(flows) => Ok(flows.in_file(path)),
            Err(error) => Err(FileError { path: path.to_owned(), error }),
        }
    }

    /// The same flows, which now know in which file their frames are.
    #[must_use]
    pub fn in_file(mut self, path: impl AsRef<Path>) -> Flows {
        let path: Arc<Path> = path.as_ref().into();
        for flow in &mut self.flows {
            flow.file = Some(Arc::clone(&path));
        }
        self
    }

    /// The flows, in the order in which they began.
    pub fn iter(&self) -> std::slice::Iter<'_, Flow> {
        self.flows.iter()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.flows.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.flows.is_empty()
    }

    /// The flow, if there is exactly one.
    ///
    /// # Errors
    /// How many there are instead, and which.
    pub fn only(&self) -> Result<&Flow, NotOne> {
        match self.flows.as_slice() {
            [flow] => Ok(flow),
            flows => Err(NotOne(
                flows.iter().map(|flow| (flow.facts.client, flow.facts.server)).collect(),
            )),
        }
    }

    /// The first flow with this address as its client's, or as its server's.
    pub fn of(&self, endpoint: SocketAddr) -> Option<&Flow> {
        let has = |flow: &&Flow| [flow.facts.client, flow.facts.server].contains(&endpoint);
        self.flows.iter().find(has)
    }
}

impl<'f> IntoIterator for &'f Flows {
    type Item = &'f Flow;
    type IntoIter = std::slice::Iter<'f, Flow>;
    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

#[derive(Default)]
struct Tracker {
    packets: u64,
    flows: Flows,
    /// The place of the latest flow between two endpoints: earlier ones are over.
    latest: HashMap<Endpoints, usize>,
}

impl Tracker {
    fn add(&mut self, packet: &Packet<'_>) {
        self.packets += 1;
        let Decoded::Tcp(segment) = decode(self.packets, packet) else { return };
        let flows = &mut self.flows.flows;
        let next = flows.len();
        let place = self.latest.entry(Endpoints::of(&segment)).or_insert(next);
        if *place < next && flows[*place].facts.is_over_at(&segment) {
            *place = next;
        }
        if *place == next {
            flows.push(Flow::begin(&segment));
        }
        flows[*place].add(&segment);
    }
}

/// A capture file that could not be read.
#[derive(Debug)]
pub struct FileError {
    path: PathBuf,
    error: ReadError,
}

impl fmt::Display for FileError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.path.display(), self.error)
    }
}

impl std::error::Error for FileError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.error)
    }
}

/// There should have been one flow.
#[derive(Debug, PartialEq, Eq)]
pub struct NotOne(Vec<(SocketAddr, SocketAddr)>);

impl fmt::Display for NotOne {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "expected one TCP flow, captured {}", self.0.len())?;
        for (client, server) in self.0.iter().take(10) {
            write!(f, "\n  {client} > {server}")?;
        }
        if self.0.len() > 10 {
            f.write_str("\n  ...")?;
        }
        Ok(())
    }
}

impl std::error::Error for NotOne {}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::testing::{BEGAN, Script};

    const NO: Flags = Flags(0);

    fn flows(script: &Script) -> Flows {
        Flows::from_packets(&script.packets)
    }

    /// The only flow of a script.
    fn flow(script: &Script) -> Flow {
        flows(script).only().unwrap().clone()
    }

    #[test]
    fn a_connection_from_syn_to_last_ack() {
        let mut script = Script::opened();
        script.client(Flags::PSH, b"5\n").server(Flags::PSH, b"xxxxx").client(Flags::FIN, b"");
        script.server(Flags::FIN, b"").client(NO, b"");
        let flow = flow(&script);
        let facts = &flow.facts;
        assert_eq!((facts.client, facts.server), (script.ends[0], script.ends[1]));
        assert_eq!((facts.began, facts.ended), (BEGAN, BEGAN + 7 * 125_000));
        assert_eq!(facts.handshake, Some(3));
        assert_eq!(facts.first_fin_by(), Some(Side::Client));
        assert_eq!(facts.reset_by(), None);
        assert!(facts.is_over());
        let (client, server) = (facts[Side::Client], facts[Side::Server]);
        assert_eq!(
            (client.segments, client.bytes, client.syn, client.fin),
            (5, 2, Some(1), Some(6))
        );
        assert_eq!(
            (server.segments, server.bytes, server.syn, server.fin),
            (3, 5, Some(2), Some(7))
        );
        assert_eq!(facts.completeness(), 0b01_1111);
        // The script's sequence numbers wrap within the first bytes.
        let numbers: Vec<_> = flow.steps.iter().map(|step| (step.seq, step.ack)).collect();
        assert_eq!(
            numbers,
            [
                (0, None),
                (0, Some(1)),
                (1, Some(1)),
                (1, Some(1)),
                (1, Some(3)),
                (3, Some(6)),
                (6, Some(4)),
                (4, Some(7)),
            ]
        );
        assert_eq!(flow.payload(Side::Client), b"5\n");
        assert_eq!(flow.payload(Side::Server), b"xxxxx");
    }

    #[test]
    fn a_refused_connection_is_a_syn_and_a_reset() {
        let mut script = Script::new();
        script.bare(Side::Client, Flags::SYN, b"");
        script.next[1] = Seq(0); // RFC 9293 3.10.7.1: a RST without a connection has seq 0
        script.server(Flags::RST, b"");
        let flow = flow(&script);
        assert_eq!((flow.steps[1].seq, flow.steps[1].ack), (0, Some(1)));
        assert_eq!(flow.facts.reset_by(), Some(Side::Server));
        assert_eq!(flow.facts.completeness(), completeness::SYN | completeness::RST);
        assert!(!flow.facts.handshake_completed());
        assert!(flow.facts.is_over());
        assert_eq!(flow.facts[Side::Server].bytes, 0);
    }

    #[test]
    fn who_reset_first_is_told_by_the_frames() {
        let mut script = Script::opened();
        script.server(Flags::RST, b"").bare(Side::Client, Flags::RST, b"");
        script.bare(Side::Client, Flags::RST, b"");
        let facts = flow(&script).facts;
        assert_eq!(facts.reset_by(), Some(Side::Server));
        assert_eq!((facts[Side::Client].rst, facts[Side::Client].rsts), (Some(5), 2));
    }

    #[test]
    fn a_handshake_is_completed_by_an_ack_and_by_nothing_else() {
        let mut script = Script::new();
        script.bare(Side::Client, Flags::SYN, b"").server(Flags::SYN, b"");
        script.client(Flags::RST, b"");
        assert_eq!(flow(&script).facts.completeness(), 1 | 2 | 32);

        let mut script = Script::new();
        script.bare(Side::Client, Flags::SYN, b"").server(Flags::SYN, b"");
        script.next[1] = Seq(script.next[1].0.wrapping_sub(1)); // acknowledges what was before it
        script.client(NO, b"");
        assert_eq!(flow(&script).facts.completeness(), 1 | 2);

        let mut script = Script::new();
        script.bare(Side::Client, Flags::SYN, b"").server(Flags::SYN, b"");
        script.client(Flags::PSH, b"hello"); // the first ACK was lost
        let flow = flow(&script);
        assert!(flow.steps[2].completes_handshake);
        assert_eq!(flow.facts.completeness(), 1 | 2 | 4 | 8);
    }

    #[test]
    fn what_sends_nothing_new_is_retransmitted() {
        let mut script = Script::opened();
        script.client(NO, b"hello"); // 1:6
        script.client(NO, b"llo").again(3); // 3:6, all of it old
        script.client(NO, b"lo!!").again(2); // 4:8, new at its end
        script.client(NO, b""); // an ACK takes no number: never a retransmission
        script.client(Flags::FIN, b"");
        script.next[0] = Seq(script.next[0].0.wrapping_sub(1));
        script.client(Flags::FIN, b"");
        let flow = flow(&script);
        let again: Vec<_> = flow.steps.iter().map(|step| step.retransmitted).collect();
        assert_eq!(again[3..], [false, true, false, false, false, true]);
        assert_eq!(flow.facts[Side::Client].bytes, 7);
        assert_eq!(flow.payload(Side::Client), b"hello!!");
        assert_eq!(flow.ranges(Side::Client), [1..6, 4..8]);
    }

    #[test]
    fn a_repeated_syn_is_a_retransmission_and_another_syn_another_flow() {
        let mut script = Script::new();
        script.bare(Side::Client, Flags::SYN, b"");
        script.next[0] = Seq(u32::MAX - 2);
        script.bare(Side::Client, Flags::SYN, b"").server(Flags::SYN, b"");
        script.client(NO, b"").server(Flags::RST, b"");
        script.next = [Seq(77), Seq(99)]; // the same ports again
        script.bare(Side::Client, Flags::SYN, b"").server(Flags::SYN, b"").client(NO, b"");
        let flows = flows(&script);
        assert_eq!(flows.len(), 2);
        let [first, second] = [&flows.flows[0], &flows.flows[1]];
        assert_eq!(first.facts[Side::Client].retransmitted, 1);
        assert_eq!((first.steps.len(), second.steps.len()), (5, 3));
        assert_eq!(second.steps[0].frame, 6);
        assert_eq!(second.facts.reset_by(), None);
    }

    #[test]
    fn without_its_beginning_a_flow_is_still_told() {
        // Only the SYN is missing: the SYN-ACK says who is who.
        let mut script = Script::opened();
        script.packets.remove(0);
        let facts = flow(&script).facts;
        assert_eq!(facts.client, script.ends[0]);
        assert_eq!(facts.completeness(), completeness::SYN_ACK);

        // The handshake is missing: the lower port is the server's, the first byte has number 1.
        let mut script = Script::opened();
        script.packets.clear();
        script.server(Flags::PSH, b"hello").client(Flags::PSH, b"there").server(NO, b"");
        let flow = flow(&script);
        assert_eq!(flow.facts.server, script.ends[1]);
        assert_eq!((flow.steps[0].range(), flow.steps[0].ack), (1..6, Some(1)));
        assert_eq!((flow.steps[1].range(), flow.steps[1].ack), (1..6, Some(6)));
        assert_eq!(flow.payload(Side::Server), b"hello");
        assert_eq!(flow.facts.completeness(), completeness::DATA);

        // A SYN after that is another connection.
        script.next[0] = Seq(5);
        script.bare(Side::Client, Flags::SYN, b"");
        assert_eq!(flows(&script).len(), 2);
    }

    #[test]
    fn an_ack_captured_before_its_syn_ack_is_of_the_same_flow() {
        let mut script = Script::opened();
        script.packets.swap(1, 2);
        assert_eq!(flow(&script).facts.completeness(), 1 | 2);
    }

    #[test]
    fn a_simultaneous_open_is_one_flow() {
        let mut script = Script::new();
        script.bare(Side::Client, Flags::SYN, b"").bare(Side::Server, Flags::SYN, b"");
        script.next = [Seq(u32::MAX - 2), Seq(u32::MAX)];
        let facts = flow(&script).facts;
        assert_eq!((facts[Side::Client].syn, facts[Side::Server].syn), (Some(1), Some(2)));
    }

    #[test]
    fn payload_is_put_together_in_order() {
        let mut script = Script::opened();
        script.client(NO, b"ab").client(NO, b"cd").client(NO, b"ef");
        script.packets.swap(3, 5); // ef cd ab
        let whole = flow(&script);
        assert_eq!(whole.payload(Side::Client), b"abcdef");
        assert!(whole.payload_is_whole(Side::Client));

        script.packets.remove(4); // cd is lost
        let lacking = flow(&script);
        assert_eq!(lacking.payload(Side::Client), b"ab");
        assert_eq!(lacking.facts[Side::Client].bytes, 6);
        assert!(!lacking.payload_is_whole(Side::Client));

        script.packets.remove(4); // and so is ab
        assert_eq!(flow(&script).payload(Side::Client), b"");
    }

    #[test]
    fn what_comes_early_and_again_is_kept_at_its_longest() {
        let mut script = Script::opened();
        script.next[0] = script.next[0] + 2;
        script.client(NO, b"c").client(NO, b"cd").again(1); // both ahead of their turn
        script.client(NO, b"c").again(2);
        script.client(NO, b"ab").again(3);
        assert_eq!(flow(&script).payload(Side::Client), b"abcd");
    }

    #[test]
    fn payload_that_the_snapshot_length_cut_is_not_whole() {
        let mut script = Script::opened();
        script.client(NO, b"hello");
        let last = script.packets.pop().unwrap();
        let bytes = last.bytes[..last.bytes.len() - 2].to_vec();
        script.packets.push(Packet { bytes: bytes.into(), ..last });
        script.client(NO, b"again");
        let flow = flow(&script);
        assert_eq!(flow.payload(Side::Client), b"hel");
        assert_eq!(flow.facts[Side::Client].bytes, 10);
        assert!(!flow.payload_is_whole(Side::Client));
    }

    #[test]
    fn numbers_go_on_above_32_bits() {
        let mut script = Script::opened();
        // Five jumps of 1 GiB, as if the capture had missed what was between.
        for _ in 0..5 {
            script.next[0] = script.next[0] + (1 << 30);
            script.client(NO, b"x").server(NO, b"");
        }
        let flow = flow(&script);
        let (last, ack) = (flow.steps[flow.steps.len() - 2], flow.steps[flow.steps.len() - 1]);
        assert_eq!(last.seq, (5 << 30) + 5);
        assert_eq!(ack.ack, Some((5 << 30) + 6));
        assert_eq!(flow.facts[Side::Client].bytes, (5 << 30) + 5);
    }

    #[test]
    fn a_reset_with_a_wild_number_disturbs_nothing() {
        let mut script = Script::opened();
        let next = script.next;
        script.next[0] = script.next[0] + 1_000_000;
        script.client(Flags::RST, b"not accepted");
        script.next = next;
        script.client(NO, b"hello");
        let flow = flow(&script);
        assert!(!flow.steps[4].retransmitted);
        assert_eq!(flow.payload(Side::Client), b"hello");
        assert_eq!(flow.facts[Side::Client].bytes, 5);
    }

    #[test]
    fn only_says_what_there_is_instead() {
        assert_eq!(
            Flows::default().only().unwrap_err().to_string(),
            "expected one TCP flow, captured 0"
        );
        let mut script = Script::opened();
        script.ends[0].set_port(40113);
        script.next = [Seq(5), Seq(6)];
        script.bare(Side::Client, Flags::SYN, b"");
        assert_eq!(
            flows(&script).only().unwrap_err().to_string(),
            "expected one TCP flow, captured 2
  10.0.0.1:40112 > 10.0.0.2:2000
  10.0.0.1:40113 > 10.0.0.2:2000"
        );
        let second = flows(&script).of(script.ends[0]).unwrap().facts.client;
        assert_eq!(second, script.ends[0]);
    }

    #[test]
    fn a_file_that_cannot_be_read_is_named() {
        let error = Flows::read("/nonexistent/x.pcap").unwrap_err().to_string();
        assert!(error.starts_with("/nonexistent/x.pcap: No such file"), "{error}");
    }
}
