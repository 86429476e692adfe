//! Packets and event lines of all hosts in one text, in the order of their times.
//!
//! ```text
//!        ms frame  who              what
//!     0.000     1  client > server  S    win 64240
//!     0.031     2  server > client  S.   ack 1 win 65160
//!     0.050     3  client > server  .    ack 1
//!     0.098        server           fork-server[1234] accepted peer=10.0.0.1:40112 fd=4
//! ```
//!
//! Event lines and packets are stamped by the same clock, CLOCK_REALTIME of the one kernel that
//! all hosts share, so that their order is real; but a program prints *after* the call that it
//! reports, so the packets that the call sent stand before its line.

use std::fmt;

use crate::lab::event::Event;
use crate::lab::flow::{Flow, Side};
use crate::lab::ladder::{Names, milliseconds};

/// A timeline under construction; displayed, it is the text.
#[derive(Clone, Debug)]
pub struct Timeline<'a> {
    names: &'a Names,
    rows: Vec<Row>,
    flows: usize,
}

#[derive(Clone, Debug)]
struct Row {
    at: u64,
    frame: Option<u64>,
    who: Who,
    what: String,
}

#[derive(Clone, Debug)]
enum Who {
    Host(String),
    /// A packet between two hosts, and the client's port: it is shown once there are several flows.
    Packet {
        from: String,
        to: String,
        sender: Side,
        port: u16,
    },
}

impl<'a> Timeline<'a> {
    /// Nothing yet; packets will show these names.
    pub fn new(names: &'a Names) -> Timeline<'a> {
        Timeline { names, rows: Vec::new(), flows: 0 }
    }

    /// Adds the segments of a flow. Take all flows from the capture of one host: the other host
    /// captured the same packets.
    pub fn flow(&mut self, flow: &Flow) -> &mut Self {
        self.flows += 1;
        for step in &flow.steps {
            let (from, to) = (step.from, step.from.other());
            let again = if step.retransmitted { "   (retransmission)" } else { "" };
            self.rows.push(Row {
                at: step.at,
                frame: Some(step.frame),
                who: Who::Packet {
                    from: self.names.of(&flow.facts, from).to_owned(),
                    to: self.names.of(&flow.facts, to).to_owned(),
                    sender: from,
                    port: flow.facts.client.port(),
                },
                what: format!("{step}{again}"),
            });
        }
        self
    }

    /// Adds what a program on a host printed.
    pub fn event(&mut self, host: &str, event: &Event) -> &mut Self {
        let (who, what) = (Who::Host(host.to_owned()), event.to_string());
        self.rows.push(Row { at: event.at, frame: None, who, what });
        self
    }
}

impl fmt::Display for Timeline<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rows: Vec<&Row> = self.rows.iter().collect();
        rows.sort_by_key(|row| row.at); // stable: what has the same time stays as it was added
        let Some(zero) = rows.first().map(|row| row.at) else { return Ok(()) };
        let who: Vec<String> = rows.iter().map(|row| row.who.text(self.flows > 1)).collect();
        let width = who.iter().map(|who| who.chars().count()).max().unwrap_or(0);
        writeln!(f, "{:>9} frame  {:<width$}  what", "ms", "who")?;
        for (row, who) in rows.iter().zip(who) {
            let frame = row.frame.map_or(String::new(), |frame| frame.to_string());
            let ms = milliseconds(zero, row.at);
            writeln!(f, "{ms:>9} {frame:>5}  {who:<width$}  {}", row.what)?;
        }
        Ok(())
    }
}

impl Who {
    fn text(&self, with_port: bool) -> String {
        match self {
            Who::Host(name) => name.clone(),
            Who::Packet { from, to, .. } if !with_port => format!("{from} > {to}"),
            Who::Packet { from, to, sender: Side::Client, port } => format!("{from}:{port} > {to}"),
            Who::Packet { from, to, sender: Side::Server, port } => format!("{from} > {to}:{port}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::flow::Flows;
    use crate::lab::packet::{Flags, Seq};
    use crate::lab::testing::Script;

    fn event(nanos: u64) -> Event {
        let line = format!("1795361749.{nanos} fork-server[12] accepted peer=10.0.0.1:40112 fd=4");
        Event::parse(line.as_bytes()).unwrap()
    }

    #[test]
    fn events_stand_between_the_packets() {
        let flows = Flows::from_packets(&Script::opened().packets);
        let names = Names::default();
        let mut timeline = Timeline::new(&names);
        timeline.event("server", &event(734_500_000)).flow(flows.only().unwrap());
        timeline.event("client", &event(734_234_000));
        assert_eq!(
            timeline.to_string(),
            "       ms frame  who              what
    0.000        client           fork-server[12] accepted peer=10.0.0.1:40112 fd=4
    0.000     1  client > server  S    win 64240
    0.125     2  server > client  S.   ack 1 win 64240
    0.250     3  client > server  .    ack 1
    0.266        server           fork-server[12] accepted peer=10.0.0.1:40112 fd=4
"
        );
    }

    #[test]
    fn flows_are_told_apart_by_the_clients_port() {
        let mut script = Script::opened();
        script.ends[0].set_port(40113);
        script.next = [Seq(1), Seq(2)];
        script.bare(Side::Client, Flags::SYN, b"").server(Flags::RST, b"");
        let flows = Flows::from_packets(&script.packets);
        let names = Names::default();
        let mut timeline = Timeline::new(&names);
        for flow in &flows {
            timeline.flow(flow);
        }
        let text = timeline.to_string();
        let who: Vec<&str> = text.lines().skip(1).map(|line| &line[17..39]).collect();
        assert_eq!(
            who,
            [
                "client:40112 > server ",
                "server > client:40112 ",
                "client:40112 > server ",
                "client:40113 > server ",
                "server > client:40113 ",
            ]
        );
    }

    #[test]
    fn nothing_is_an_empty_text() {
        assert_eq!(Timeline::new(&Names::default()).to_string(), "");
    }
}
