//! A connection as text, one line a segment, and what such a text claims.
//!
//! ```text
//! frame        ms
//!     1     0.000  client > server  S    win 64240
//!     2     0.031  server > client  S.   ack 1 win 65160
//!     3     0.050  client > server  .    ack 1
//!     4     0.211  client > server  P.   1:6 ack 1
//!     5     0.230  server > client  .    ack 6
//!     6     1.204  server > client  R.   seq 1 ack 6
//! ```
//!
//! Flags are those of tcpdump, sequence numbers are relative to each side's SYN, and what stands
//! behind the times is also the language of an expectation, [`Ladder`]: a line may be copied from
//! a printed ladder into a test.

mod expected;

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;

pub use expected::{Difference, Ladder, NotALadder};

use crate::lab::flow::{Facts, Flow, Side, Step};
use crate::lab::packet::Flags;

/// The names of hosts by their addresses.
///
/// An endpoint whose address has no name goes by its role, `client` or `server`; so do both, if
/// they share an address.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Names(BTreeMap<IpAddr, String>);

impl<N: Into<String>> FromIterator<(IpAddr, N)> for Names {
    fn from_iter<I: IntoIterator<Item = (IpAddr, N)>>(hosts: I) -> Names {
        Names(hosts.into_iter().map(|(address, name)| (address, name.into())).collect())
    }
}

impl Names {
    /// The name of a host, if it has one.
    pub fn get(&self, address: IpAddr) -> Option<&str> {
        self.0.get(&address).map(String::as_str)
    }

    /// The name of one side of a flow.
    pub fn of(&self, facts: &Facts, side: Side) -> &str {
        let role = match side {
            Side::Client => "client",
            Side::Server => "server",
        };
        if facts.client.ip() == facts.server.ip() {
            return role;
        }
        self.get(facts.address(side).ip()).unwrap_or(role)
    }

    /// `client > server`, for a segment from this side.
    fn direction(&self, facts: &Facts, from: Side) -> String {
        format!("{} > {}", self.of(facts, from), self.of(facts, from.other()))
    }
}

impl fmt::Display for Step {
    /// Flags and fields, as a line of an expectation has them: `P.   1:6 ack 1`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:<3}", self.flags)?;
        if self.len > 0 {
            write!(f, "  {}:{}", self.range().start, self.range().end)?;
        } else if self.flags.has(Flags::FIN) || self.flags.has(Flags::RST) {
            write!(f, "  seq {}", self.seq)?;
        } else {
            f.write_str(" ")?;
        }
        if let Some(ack) = self.ack {
            write!(f, " ack {ack}")?;
        }
        // A window tells something when it is offered first and when it is closed.
        let closed = self.window == 0 && !self.flags.has(Flags::RST);
        if self.flags.has(Flags::SYN) || closed {
            write!(f, " win {}", self.window)?;
        }
        Ok(())
    }
}

/// Why a comparison leaves a segment out; empty if it does not.
fn note(step: &Step) -> &'static str {
    if step.retransmitted {
        "retransmission"
    } else if step.after_the_end {
        "after the end"
    } else if step.is_pure_ack() && !step.completes_handshake {
        "pure ACK"
    } else {
        ""
    }
}

/// Milliseconds from one time to another, both in nanoseconds, to the microsecond.
pub(crate) fn milliseconds(from: u64, to: u64) -> String {
    format!("{:.3}", to.wrapping_sub(from) as i64 as f64 / 1e6)
}

/// The whole ladder of a flow, to be displayed; see [`Flow::ladder`].
#[derive(Clone, Copy, Debug)]
pub struct Rendered<'a> {
    flow: &'a Flow,
    names: &'a Names,
}

impl Flow {
    /// All segments, with their frame numbers and the milliseconds since the first.
    pub fn ladder<'a>(&'a self, names: &'a Names) -> Rendered<'a> {
        Rendered { flow: self, names }
    }
}

impl fmt::Display for Rendered<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let facts = &self.flow.facts;
        writeln!(f, "{}", title(facts, self.names))?;
        writeln!(f, "{:>5} {:>9}", "frame", "ms")?;
        for step in &self.flow.steps {
            let direction = self.names.direction(facts, step.from);
            let ms = milliseconds(facts.began, step.at);
            write!(f, "{:>5} {ms:>9}  {direction}  {step}", step.frame)?;
            writeln!(f, "{}", if step.retransmitted { "   (retransmission)" } else { "" })?;
        }
        Ok(())
    }
}

/// `client 10.0.0.1:40112, server 10.0.0.2:2000`
fn title(facts: &Facts, names: &Names) -> String {
    let side = |side| format!("{} {}", names.of(facts, side), facts.address(side));
    format!("{}, {}", side(Side::Client), side(Side::Server))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::flow::Flows;
    use crate::lab::packet::Flags;
    use crate::lab::testing::Script;

    #[test]
    fn a_ladder_shows_every_segment() {
        let mut script = Script::opened();
        script.client(Flags::PSH, b"hello").client(Flags::PSH, b"hello").again(5);
        script.server(Flags::RST, b"");
        let flows = Flows::from_packets(&script.packets);
        let names = Names::default();
        assert_eq!(
            flows.only().unwrap().ladder(&names).to_string(),
            "\
client 10.0.0.1:40112, server 10.0.0.2:2000
frame        ms
    1     0.000  client > server  S    win 64240
    2     0.125  server > client  S.   ack 1 win 64240
    3     0.250  client > server  .    ack 1
    4     0.375  client > server  P.   1:6 ack 1
    5     0.500  client > server  P.   1:6 ack 1   (retransmission)
    6     0.625  server > client  R.   seq 1 ack 6
"
        );
    }

    #[test]
    fn a_closed_window_shows() {
        let mut script = Script::opened();
        script.window = 0;
        script.client(Flags::default(), b"");
        let flows = Flows::from_packets(&script.packets);
        assert_eq!(flows.only().unwrap().steps[3].to_string(), ".    ack 1 win 0");
    }

    #[test]
    fn hosts_go_by_name_and_else_by_role() {
        let flows = Flows::from_packets(&Script::opened().packets);
        let mut facts = flows.only().unwrap().facts.clone();
        let names: Names = [(facts.client.ip(), "alice")].into_iter().collect();
        assert_eq!(names.direction(&facts, Side::Server), "server > alice");

        facts.server.set_ip(facts.client.ip());
        assert_eq!(names.direction(&facts, Side::Client), "client > server");
    }
}
