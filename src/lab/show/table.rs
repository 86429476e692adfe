//! The connections that are being followed: a bounded number, each with a bounded ladder.

use std::collections::hash_map::{Entry, HashMap};
use std::collections::{VecDeque, vec_deque};
use std::io;

use super::print::Print;
use crate::lab::flow::{Endpoints, Facts, Step};
use crate::lab::packet::Segment;

/// Connections followed at a time.
pub(super) const FLOWS: usize = 32_768;

/// Segments kept from the beginning of each.
pub(super) const FIRST: usize = 32;

/// Segments kept from the end of each.
pub(super) const LAST: usize = 16;

/// How long a connection that is over may still have stragglers, in nanoseconds of the capture's
/// time: as long as Linux keeps TIME_WAIT.
const STRAGGLERS: u64 = 60_000_000_000;

/// How many segments of others may come until then: those of a second or so where much is said.
const MEANWHILE: u64 = 100_000;

/// How many connections are looked at to find the one to give up.
const CANDIDATES: usize = 16;

/// A connection that is being followed.
#[derive(Debug)]
pub(crate) struct Followed {
    /// Connections are numbered in the order in which they begin, from 0.
    pub(crate) number: u64,
    pub(crate) facts: Facts,
    pub(crate) ladder: Ends,
    /// Its last segment, counted over all connections.
    touched: u64,
}

/// The first and the last segments of a connection.
#[derive(Debug, Default)]
pub(crate) struct Ends {
    first: Vec<Step>,
    /// How many there were between the first and the last.
    pub(crate) left_out: u64,
    last: VecDeque<Step>,
}

impl Ends {
    pub(crate) fn first(&self) -> &[Step] {
        &self.first
    }

    pub(crate) fn last(&self) -> vec_deque::Iter<'_, Step> {
        self.last.iter()
    }

    fn add(&mut self, step: Step) {
        if self.first.len() < FIRST {
            self.first.push(step);
            return;
        }
        if self.last.len() == LAST {
            self.last.pop_front();
            self.left_out += 1;
        }
        self.last.push_back(step);
    }
}

#[derive(Debug, Default)]
pub(crate) struct Table {
    followed: HashMap<Endpoints, Followed>,
    /// The keys of `followed`, each once, going round: one is looked at with each segment.
    round: VecDeque<Endpoints>,
    flows: u64,
    segments: u64,
}

impl Table {
    /// How many connections there have been.
    pub(crate) fn flows(&self) -> u64 {
        self.flows
    }

    /// Takes the next segment. Prints it, if segments are printed as they come, and connections
    /// that are done with.
    pub(crate) fn add(&mut self, segment: &Segment<'_>, print: &mut impl Print) -> io::Result<()> {
        self.segments += 1;
        self.print_one_that_is_over(segment.at, print)?;
        let endpoints = Endpoints::of(segment);
        if self.followed.len() == FLOWS && !self.followed.contains_key(&endpoints) {
            self.give_one_up(print)?;
        }
        let begin = || Followed {
            number: self.flows,
            facts: Facts::begin(segment),
            ladder: Ends::default(),
            touched: 0,
        };
        let flow = match self.followed.entry(endpoints) {
            Entry::Occupied(entry) => {
                let flow = entry.into_mut();
                if flow.facts.is_over_at(segment) {
                    print.flow(&std::mem::replace(flow, begin()))?;
                    self.flows += 1;
                }
                flow
            }
            Entry::Vacant(entry) => {
                let flow = entry.insert(begin());
                self.flows += 1;
                self.round.push_back(endpoints);
                flow
            }
        };
        flow.touched = self.segments;
        let step = flow.facts.add(segment);
        if print.segment(flow.number, &flow.facts, &step)? {
            return Ok(());
        }
        flow.ladder.add(step);
        Ok(())
    }

    /// Looks at the next one in the round.
    fn print_one_that_is_over(&mut self, now: u64, print: &mut impl Print) -> io::Result<()> {
        let Some(endpoints) = self.round.pop_front() else { return Ok(()) };
        if let Entry::Occupied(entry) = self.followed.entry(endpoints) {
            let Followed { facts, touched, .. } = entry.get();
            let is_late = now.saturating_sub(facts.ended) > STRAGGLERS
                || self.segments.saturating_sub(*touched) > MEANWHILE;
            if facts.is_over() && is_late {
                return print.flow(&entry.remove());
            }
        }
        self.round.push_back(endpoints);
        Ok(())
    }

    /// Prints one to make room: among the next ones in the round, one that is over, or else the one
    /// that has been silent longest.
    fn give_one_up(&mut self, print: &mut impl Print) -> io::Result<()> {
        let candidates = self.round.len().min(CANDIDATES);
        let rank = |endpoints: &Endpoints| {
            self.followed.get(endpoints).map(|flow| (!flow.facts.is_over(), flow.touched))
        };
        let next = self.round.range(..candidates).enumerate();
        let Some((place, _)) = next.min_by_key(|(_, endpoints)| rank(endpoints)) else {
            return Ok(());
        };
        let given_up = self.round.remove(place).and_then(|key| self.followed.remove(&key));
        given_up.map_or(Ok(()), |flow| print.flow(&flow))
    }

    /// Prints what is left, in the order in which it began.
    pub(crate) fn finish(self, print: &mut impl Print) -> io::Result<()> {
        let mut left: Vec<Followed> = self.followed.into_values().collect();
        left.sort_by_key(|flow| flow.number);
        left.iter().try_for_each(|flow| print.flow(flow))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::packet::{Decoded, Flags, Seq, decode};
    use crate::lab::pcap::{Link, Packet};
    use crate::lab::show::Totals;
    use crate::lab::testing::frame;

    const SECOND: u64 = 1_000_000_000;

    /// Collects the numbers of the connections as they are printed.
    #[derive(Default)]
    struct Printed(Vec<u64>);

    impl Print for Printed {
        fn segment(&mut self, _: u64, _: &Facts, _: &Step) -> io::Result<bool> {
            Ok(false)
        }
        fn flow(&mut self, flow: &Followed) -> io::Result<()> {
            self.0.push(flow.number);
            Ok(())
        }
        fn totals(&mut self, _: &Totals) -> io::Result<()> {
            Ok(())
        }
    }

    #[derive(Default)]
    struct Capture {
        table: Table,
        printed: Printed,
    }

    impl Capture {
        /// A segment of the client with this number.
        fn say(&mut self, client: u32, at: u64, flags: Flags, seq: u32) {
            let [a, b, c, d] = (0x0a00_0000 + client).to_be_bytes();
            let (from, to) = (([a, b, c, d], 1025).into(), ([192, 0, 2, 1], 80).into());
            let bytes = frame(from, to, Seq(seq), Seq(0), flags, 0, b"");
            let packet = Packet::new(at, Link::ETHERNET, bytes);
            let Decoded::Tcp(segment) = decode(1, &packet) else { panic!("a segment") };
            self.table.add(&segment, &mut self.printed).unwrap();
            assert_eq!(self.table.round.len(), self.table.followed.len());
            assert!(self.table.followed.len() <= FLOWS);
        }
    }

    #[test]
    fn a_full_table_gives_up_who_is_silent_longest() {
        let mut capture = Capture::default();
        for client in 0..FLOWS as u32 + 100 {
            capture.say(client, 0, Flags::SYN, 7);
            capture.say(0, 0, Flags::ACK, 8); // one that talks all the time
        }
        assert_eq!(capture.printed.0.len(), 100);
        assert!(!capture.printed.0.contains(&0), "the one that talks is kept");
        // Looking at a few only is not exact, but it finds old ones.
        let half = FLOWS as u64 / 2;
        let old = capture.printed.0.iter().filter(|number| **number < half).count();
        assert!(old > 50, "{:?}", capture.printed.0);
        capture.table.finish(&mut capture.printed).unwrap();
        let mut all = capture.printed.0;
        assert!(all[100..].is_sorted(), "what is left is printed in order");
        all.sort_unstable();
        assert!(all.into_iter().eq(0..FLOWS as u64 + 100), "each is printed once");
    }

    #[test]
    fn who_is_over_goes_first() {
        let mut capture = Capture::default();
        for client in 0..FLOWS as u32 {
            capture.say(client, 0, Flags::SYN, 7);
        }
        // In every stretch of the round, one is over, and has spoken last.
        for client in (0..FLOWS as u32).step_by(CANDIDATES / 2) {
            capture.say(client, 0, Flags::RST, 8);
        }
        capture.say(1 << 20, 0, Flags::SYN, 7);
        assert_eq!(capture.printed.0.len(), 1);
        assert_eq!(capture.printed.0[0] % (CANDIDATES as u64 / 2), 0);
    }

    #[test]
    fn who_is_over_for_a_minute_is_printed() {
        let mut capture = Capture::default();
        capture.say(1, 0, Flags::SYN, 7);
        capture.say(1, 0, Flags::RST, 8);
        capture.say(2, 0, Flags::SYN, 7);
        capture.say(3, 0, Flags::SYN, 7);
        let say =
            |capture: &mut Capture, at| (0..4).for_each(|_| capture.say(2, at, Flags::ACK, 8));
        say(&mut capture, 60 * SECOND);
        assert!(capture.printed.0.is_empty());
        say(&mut capture, 60 * SECOND + 1);
        assert_eq!(capture.printed.0, [0]); // and not 3, which is only silent
        assert_eq!(capture.table.flows(), 3);
    }

    #[test]
    fn who_is_over_is_printed_when_much_has_been_said_since() {
        let mut capture = Capture::default();
        capture.say(1, 0, Flags::SYN, 7);
        capture.say(1, 0, Flags::RST, 8);
        capture.say(2, 0, Flags::SYN, 7); // and not this one, which is only silent
        let say = |capture: &mut Capture, times| {
            (0..times).for_each(|_| capture.say(3, 0, Flags::SYN, 7));
        };
        say(&mut capture, MEANWHILE - 1);
        assert!(capture.printed.0.is_empty());
        say(&mut capture, 4);
        assert_eq!(capture.printed.0, [0]);
    }

    #[test]
    fn a_reused_port_is_another_connection() {
        let mut capture = Capture::default();
        capture.say(1, 0, Flags::SYN, 7);
        capture.say(1, 0, Flags::SYN, 7);
        assert!(capture.printed.0.is_empty());
        capture.say(1, 0, Flags::SYN, 1000);
        assert_eq!(capture.printed.0, [0]);
        assert_eq!(capture.table.flows(), 2);
    }
}
