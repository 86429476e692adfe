//! The two forms of what `lab show` prints: text and JSON lines.

use std::io::{self, Write};
use std::net::SocketAddr;

use anstyle::{AnsiColor, Style};
use serde::Serialize;

use super::table::Followed;
use super::{Options, Totals};
use crate::lab::flow::{Facts, Side, Step};
use crate::lab::ladder::milliseconds;
use crate::lab::packet::Flags;

/// Where segments, connections and the end of the capture go.
pub(crate) trait Print {
    /// A segment of connection `number`. `false` keeps it for the connection's ladder.
    fn segment(&mut self, number: u64, facts: &Facts, step: &Step) -> io::Result<bool>;
    /// A connection that is done with.
    fn flow(&mut self, flow: &Followed) -> io::Result<()>;
    /// The end of the capture.
    fn totals(&mut self, totals: &Totals) -> io::Result<()>;
}

const BOLD: Style = Style::new().bold();
const DIM: Style = Style::new().dimmed();
const RED: Style = AnsiColor::Red.on_default().bold();
const YELLOW: Style = AnsiColor::Yellow.on_default();
const GREEN: Style = AnsiColor::Green.on_default();

/// For people.
pub(crate) struct Text<W> {
    out: W,
    options: Options,
    /// The heading of the one flow that is asked for has been printed.
    begun: bool,
}

impl<W: Write> Text<W> {
    pub(crate) fn new(out: W, options: Options) -> Text<W> {
        Text { out, options, begun: false }
    }

    fn heading(&mut self, number: u64, facts: &Facts) -> io::Result<()> {
        let (client, server) = (facts.client, facts.server);
        let (s, ns) = (facts.began / 1_000_000_000, facts.began % 1_000_000_000);
        writeln!(self.out, "{BOLD}flow {number}  {client} > {server}{BOLD:#}  at {s}.{ns:09}")
    }

    fn step(&mut self, facts: &Facts, step: &Step) -> io::Result<()> {
        let style = if step.retransmitted || step.is_pure_ack() {
            DIM
        } else if step.flags.has(Flags::RST) {
            RED
        } else if step.flags.has(Flags::FIN) {
            YELLOW
        } else if step.flags.has(Flags::SYN) {
            GREEN
        } else {
            Style::new()
        };
        let (from, to) = (step.from, step.from.other());
        let ms = milliseconds(facts.began, step.at);
        let again = if step.retransmitted { "   (retransmission)" } else { "" };
        let frame = step.frame;
        writeln!(self.out, "{frame:>7} {ms:>11}  {style}{from} > {to}  {step}{again}{style:#}")
    }

    /// How it began, what was sent, how it ended.
    fn story(&mut self, facts: &Facts) -> io::Result<()> {
        let sides = [Side::Client, Side::Server];
        let segments = count(sides.iter().map(|side| facts[*side].segments).sum(), "segment");
        let ms = milliseconds(facts.began, facts.ended);
        write!(self.out, "  {segments} in {ms} ms: {}", beginning(facts))?;
        for side in sides {
            let half = &facts[side];
            if half.bytes > 0 {
                write!(self.out, ", {} from {side}", count(half.bytes, "byte"))?;
            }
            if half.retransmitted > 0 {
                write!(self.out, ", {} from {side}", count(half.retransmitted, "retransmission"))?;
            }
        }
        if let Some(first) = facts.first_fin_by() {
            let both = facts[first.other()].fin.is_some();
            write!(self.out, ", {YELLOW}FIN from {}{YELLOW:#}", who(first, both))?;
        }
        if let Some(first) = facts.reset_by() {
            let both = facts[first.other()].rst.is_some();
            write!(self.out, ", {RED}RST from {}{RED:#}", who(first, both))?;
        }
        if !facts.is_over() {
            write!(self.out, ", not ended here")?;
        }
        writeln!(self.out)
    }
}

/// `1 segment`, `2 segments`
fn count(number: u64, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}

fn who(first: Side, both: bool) -> String {
    match both {
        true => format!("{first}, then {}", first.other()),
        false => first.to_string(),
    }
}

fn beginning(facts: &Facts) -> &'static str {
    if facts.handshake_completed() {
        "handshake"
    } else if facts[Side::Client].syn.is_none() {
        "began before the capture"
    } else if facts[Side::Server].syn.is_some() {
        "handshake not completed"
    } else if facts.reset_by() == Some(Side::Server) {
        "refused"
    } else {
        "SYN not answered"
    }
}

impl<W: Write> Print for Text<W> {
    fn segment(&mut self, number: u64, facts: &Facts, step: &Step) -> io::Result<bool> {
        let Some(wanted) = self.options.flow else { return Ok(self.options.summary) };
        if number == wanted {
            if !std::mem::replace(&mut self.begun, true) {
                self.heading(number, facts)?;
            }
            self.step(facts, step)?;
        }
        Ok(true)
    }

    fn flow(&mut self, flow: &Followed) -> io::Result<()> {
        match self.options.flow {
            Some(wanted) if wanted != flow.number => return Ok(()),
            Some(_) => {}
            None => self.heading(flow.number, &flow.facts)?,
        }
        for step in flow.ladder.first() {
            self.step(&flow.facts, step)?;
        }
        if flow.ladder.left_out > 0 {
            let (count, number) = (flow.ladder.left_out, flow.number);
            writeln!(self.out, "      {DIM}... {count} more: show --flow {number}{DIM:#}")?;
        }
        for step in flow.ladder.last() {
            self.step(&flow.facts, step)?;
        }
        self.story(&flow.facts)
    }

    fn totals(&mut self, totals: &Totals) -> io::Result<()> {
        let Totals { segments, unknown_links, unknown_link, .. } = *totals;
        let (packets, flows) = (count(totals.packets, "packet"), count(totals.flows, "flow"));
        write!(self.out, "{BOLD}{packets}, {segments} of TCP, {flows}{BOLD:#}")?;
        if let Some(link) = unknown_link {
            write!(self.out, "; {unknown_links} of a link type not known here ({link})")?;
        }
        writeln!(self.out)
    }
}

/// For programs.
pub(crate) struct Json<W> {
    pub(crate) out: W,
    pub(crate) options: Options,
}

/// A line of JSON; each field's unit is the one that its source documents, times are nanoseconds
/// since the epoch.
#[derive(Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Line<'a> {
    Segment(JsonSegment),
    Flow(JsonFlow<'a>),
    Capture(JsonCapture),
}

#[derive(Serialize)]
struct JsonSegment {
    flow: u64,
    frame: u64,
    at: u64,
    from: &'static str,
    flags: String,
    seq: i64,
    ack: Option<i64>,
    window: u16,
    len: u32,
    retransmitted: bool,
}

#[derive(Serialize)]
struct JsonFlow<'a> {
    number: u64,
    began: u64,
    ended: u64,
    beginning: &'a str,
    over: bool,
    completeness: u8,
    client: JsonHalf,
    server: JsonHalf,
}

#[derive(Serialize)]
struct JsonHalf {
    address: SocketAddr,
    segments: u64,
    bytes: u64,
    retransmitted: u64,
    syn_frame: Option<u64>,
    fin_frame: Option<u64>,
    rst_frame: Option<u64>,
    rsts: u64,
}

#[derive(Serialize)]
struct JsonCapture {
    packets: u64,
    segments: u64,
    flows: u64,
    unknown_link_packets: u64,
}

impl<W: Write> Json<W> {
    fn line(&mut self, line: &Line<'_>) -> io::Result<()> {
        serde_json::to_writer(&mut self.out, line)?;
        self.out.write_all(b"\n")
    }

    fn leaves_out(&self, number: u64) -> bool {
        self.options.flow.is_some_and(|wanted| wanted != number)
    }
}

impl<W: Write> Print for Json<W> {
    fn segment(&mut self, number: u64, _: &Facts, step: &Step) -> io::Result<bool> {
        if !self.options.summary && !self.leaves_out(number) {
            self.line(&Line::Segment(JsonSegment {
                flow: number,
                frame: step.frame,
                at: step.at,
                from: match step.from {
                    Side::Client => "client",
                    Side::Server => "server",
                },
                flags: step.flags.to_string(),
                seq: step.seq,
                ack: step.ack,
                window: step.window,
                len: step.len,
                retransmitted: step.retransmitted,
            }))?;
        }
        Ok(true)
    }

    fn flow(&mut self, flow: &Followed) -> io::Result<()> {
        if self.leaves_out(flow.number) {
            return Ok(());
        }
        let half = |side| {
            let half = &flow.facts[side];
            JsonHalf {
                address: flow.facts.address(side),
                segments: half.segments,
                bytes: half.bytes,
                retransmitted: half.retransmitted,
                syn_frame: half.syn,
                fin_frame: half.fin,
                rst_frame: half.rst,
                rsts: half.rsts,
            }
        };
        self.line(&Line::Flow(JsonFlow {
            number: flow.number,
            began: flow.facts.began,
            ended: flow.facts.ended,
            beginning: beginning(&flow.facts),
            over: flow.facts.is_over(),
            completeness: flow.facts.completeness(),
            client: half(Side::Client),
            server: half(Side::Server),
        }))
    }

    fn totals(&mut self, totals: &Totals) -> io::Result<()> {
        self.line(&Line::Capture(JsonCapture {
            packets: totals.packets,
            segments: totals.segments,
            flows: totals.flows,
            unknown_link_packets: totals.unknown_links,
        }))
    }
}
