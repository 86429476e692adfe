//! The expectation: a ladder written by hand, compared with what was captured.

use std::fmt;
use std::ops::Range;
use std::path::Path;
use std::slice;
use std::str::FromStr;

use super::{Names, milliseconds, note, title};
use crate::lab::flow::{Facts, Flow, Step};
use crate::lab::packet::Flags;

/// An expected ladder.
///
/// ```
/// use serverlab::lab::flow::Flows;
/// use serverlab::lab::ladder::{Ladder, Names};
///
/// let flows = Flows::read("captures/reference/unread-close.pcap")?;
/// Ladder::parse("
///     client > server  S
///     server > client  S.
///     client > server  .
///     client > server  P. 1:6
///     server > client  R. seq 1 ack 6     <- and no F from the server
/// ")?
/// .compare(flows.only()?, &Names::default())?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// A line is `FROM > TO FLAGS` and, in any order, the fields to compare:
///
/// - `A:B` the payload's range of relative sequence numbers, as tcpdump prints it; with `split`
///   behind it, any number of segments in a row may carry it;
/// - `seq N`, `ack N` the relative numbers, `win N` the window as sent, `len N` the payload's length.
///
/// A field that is not given is not compared. `#` or `<-` begins a comment.
///
/// What TCP leaves to chance is not compared:
///
/// - PSH itself. But `P` says that the segment carries payload, as a range or a `len` does; without
///   any of them it must carry none.
/// - Pure ACKs, except the one that completes the handshake, which must be there. One that the
///   expectation names must be there too, in its place; the others may. With
///   [`with_every_ack`](Ladder::with_every_ack), none may.
/// - A bare RST after both FINs, unless it is expected (see [`Facts::add`]).
/// - Retransmissions. The page of a [`Difference`] shows them nevertheless.
/// - ECN's flags, unless the line has one of them.
#[derive(Clone, Debug)]
pub struct Ladder {
    lines: Vec<Line>,
    every_ack: bool,
}

/// One expected segment.
#[derive(Clone, Debug)]
struct Line {
    /// As it was written, without comment.
    text: String,
    from: String,
    to: String,
    flags: Flags,
    range: Option<Range<i64>>,
    split: bool,
    seq: Option<i64>,
    ack: Option<i64>,
    win: Option<u16>,
    len: Option<u32>,
}

impl Ladder {
    /// Reads an expectation.
    ///
    /// # Errors
    /// The line that cannot be read and why. An expectation without lines is an error too: it would
    /// claim nothing.
    pub fn parse(text: &str) -> Result<Ladder, NotALadder> {
        let mut lines = Vec::new();
        for (number, line) in (1..).zip(text.lines()) {
            let line = line.split('#').next().unwrap_or_default();
            let line = line.split("<-").next().unwrap_or_default().trim();
            if !line.is_empty() {
                let parsed = Line::parse(line);
                lines.push(parsed.map_err(|why| NotALadder { number, line: line.into(), why })?);
            }
        }
        if lines.is_empty() {
            let why = "it has no lines, so it claims nothing".into();
            return Err(NotALadder { number: 0, line: String::new(), why });
        }
        Ok(Ladder { lines, every_ack: false })
    }

    /// Compares pure ACKs like all other segments: for claims about them.
    #[must_use]
    pub fn with_every_ack(self) -> Ladder {
        Ladder { every_ack: true, ..self }
    }

    /// Compares with a flow, hosts by name.
    ///
    /// # Errors
    /// The first difference, on a page of its own.
    pub fn compare(&self, flow: &Flow, names: &Names) -> Result<(), Difference> {
        let mut page = Page { rows: Vec::new(), why: String::new(), flow, names };
        let (mut lines, mut steps) = (self.lines.iter(), flow.steps.iter());
        let Err(why) = self.walk(&mut lines, &mut steps, &mut page) else { return Ok(()) };
        page.why = why;
        let frame = page.rows.last().and_then(|row| row.step).map(|step| step.frame);
        // What follows cannot be aligned any more: it just stands side by side.
        loop {
            let (line, step) = (lines.next(), steps.next());
            if line.is_none() && step.is_none() {
                return Err(Difference { frame, page: page.to_string() });
            }
            page.rows.push(Row { line, step, differs: false });
        }
    }

    /// Lays lines and steps side by side, up to the first that differ: those are the last row then,
    /// and the error says why.
    fn walk<'a>(
        &self,
        lines: &mut slice::Iter<'a, Line>,
        steps: &mut slice::Iter<'a, Step>,
        page: &mut Page<'a>,
    ) -> Result<(), String> {
        let (facts, names) = (&page.flow.facts, page.names);
        for line in lines {
            let mut range = line.range.clone();
            let mut shown = Some(line); // a split range, on the row of its first part only
            loop {
                let Some(step) = steps.next() else {
                    page.rows.push(Row { line: Some(line), step: None, differs: true });
                    return Err("no such segment was captured".into());
                };
                match line.check(step, range.as_ref(), names, facts) {
                    Ok(()) => {
                        page.rows.push(Row {
                            line: shown.take(),
                            step: Some(step),
                            differs: false,
                        });
                        match range.as_mut() {
                            Some(range) if step.range().end < range.end => {
                                range.start = step.range().end;
                            }
                            _ => break,
                        }
                    }
                    Err(_) if self.leaves_out(step) => {
                        page.rows.push(Row { line: None, step: Some(step), differs: false });
                    }
                    Err(why) => {
                        page.rows.push(Row { line: Some(line), step: Some(step), differs: true });
                        return Err(why);
                    }
                }
            }
        }
        for step in steps {
            let differs = !self.leaves_out(step);
            page.rows.push(Row { line: None, step: Some(step), differs });
            if differs {
                return Err("the expectation ends here, the connection does not".into());
            }
        }
        Ok(())
    }

    fn leaves_out(&self, step: &Step) -> bool {
        step.retransmitted
            || step.after_the_end
            || step.is_pure_ack() && !step.completes_handshake && !self.every_ack
    }
}

impl FromStr for Ladder {
    type Err = NotALadder;
    fn from_str(text: &str) -> Result<Ladder, NotALadder> {
        Ladder::parse(text)
    }
}

impl Line {
    fn parse(text: &str) -> Result<Line, String> {
        let mut words = text.split_whitespace();
        let (Some(from), Some(">"), Some(to)) = (words.next(), words.next(), words.next()) else {
            return Err("a line begins with FROM > TO".into());
        };
        let flags = words.next().ok_or("flags are missing: S, S., ., P., F., R, R. ...")?;
        let flags = Flags::parse(flags)
            .ok_or_else(|| format!("{flags} is not flags: S, S., ., P., F., R, R. ..."))?;
        let mut line = Line {
            text: text.to_owned(),
            from: from.to_owned(),
            to: to.to_owned(),
            flags,
            range: None,
            split: false,
            seq: None,
            ack: None,
            win: None,
            len: None,
        };
        while let Some(word) = words.next() {
            let again = match word {
                "seq" => line.seq.replace(number_after(word, words.next())?).is_some(),
                "ack" => line.ack.replace(number_after(word, words.next())?).is_some(),
                "win" => line.win.replace(number_after(word, words.next())?).is_some(),
                "len" => line.len.replace(number_after(word, words.next())?).is_some(),
                "split" => std::mem::replace(&mut line.split, true),
                range => line.range.replace(parse_range(range)?).is_some(),
            };
            if again {
                return Err(format!("{word} comes twice"));
            }
        }
        if line.split && line.range.is_none() {
            return Err("split belongs to a range".into());
        }
        Ok(line)
    }

    /// Whether the segment is to carry payload.
    fn carries(&self) -> bool {
        self.flags.has(Flags::PSH) || self.range.is_some() || self.len.is_some_and(|len| len > 0)
    }

    /// Compares one segment, `range` being what is left of this line's. Says what differs.
    fn check(
        &self,
        step: &Step,
        range: Option<&Range<i64>>,
        names: &Names,
        facts: &Facts,
    ) -> Result<(), String> {
        if step.retransmitted {
            return Err("it is a retransmission".into());
        }
        let (from, to) = (names.of(facts, step.from), names.of(facts, step.from.other()));
        if (from, to) != (&self.from, &self.to) {
            return Err(format!("it goes from {from} to {to}"));
        }
        let ecn = Flags::ECE.with(Flags::CWR);
        let mut ignored = Flags::PSH;
        if self.flags.0 & ecn.0 == 0 {
            ignored = ignored.with(ecn);
        }
        if step.flags.without(ignored) != self.flags.without(ignored) {
            return Err(format!("its flags are {}, not {}", step.flags, self.flags));
        }
        if (step.len > 0) != self.carries() {
            return Err(match step.len {
                0 => "it carries no payload".into(),
                len => format!("it carries payload, {len} bytes"),
            });
        }
        if let Some(range) = range {
            let is = step.range();
            let fits = match self.split {
                true => is.start == range.start && is.end <= range.end,
                false => is == *range,
            };
            if !fits {
                let (s, e) = (range.start, range.end);
                return Err(format!("its bytes are {}:{}, not {s}:{e}", is.start, is.end));
            }
        }
        let fields = [
            ("seq", self.seq, Some(step.seq)),
            ("ack", self.ack, step.ack),
            ("win", self.win.map(i64::from), Some(step.window.into())),
            ("len", self.len.map(i64::from), Some(step.len.into())),
        ];
        for (name, expected, is) in fields {
            match (expected, is) {
                (Some(expected), Some(is)) if expected != is => {
                    return Err(format!("its {name} is {is}, not {expected}"));
                }
                (Some(_), None) => return Err(format!("it has no {name}")),
                _ => {}
            }
        }
        Ok(())
    }
}

fn number_after<T: FromStr>(word: &str, number: Option<&str>) -> Result<T, String> {
    let number = number.ok_or_else(|| format!("a number is missing after {word}"))?;
    number.parse().map_err(|_| format!("{number} is not a number for {word}"))
}

fn parse_range(text: &str) -> Result<Range<i64>, String> {
    let unknown = || format!("{text} is neither a range A:B nor seq, ack, win, len or split");
    let (start, end) = text.split_once(':').ok_or_else(unknown)?;
    let range = start.parse().map_err(|_| unknown())?..end.parse().map_err(|_| unknown())?;
    match range.is_empty() {
        true => Err(format!("the range {text} is empty")),
        false => Ok(range),
    }
}

/// A line of the page: what was expected beside what was captured.
struct Row<'a> {
    line: Option<&'a Line>,
    step: Option<&'a Step>,
    differs: bool,
}

/// What a [`Difference`] displays.
struct Page<'a> {
    rows: Vec<Row<'a>>,
    /// What differs in the one row that does.
    why: String,
    flow: &'a Flow,
    names: &'a Names,
}

/// Rows shown before and after the first difference; what is farther away is counted.
const AROUND: usize = 25;

impl fmt::Display for Page<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let facts = &self.flow.facts;
        let first = self.rows.iter().position(|row| row.differs).unwrap_or(0);
        let differing = &self.rows[first];
        match differing.line {
            Some(line) => writeln!(f, "expected   {}\nbut        {}", line.text, self.why)?,
            None => writeln!(f, "{}", self.why)?,
        }

        let shown = first.saturating_sub(AROUND)..self.rows.len().min(first + AROUND + 1);
        let lines = self.rows[shown.clone()].iter().filter_map(|row| row.line);
        let width = lines.map(|line| line.text.chars().count()).max().unwrap_or(0).max(8);
        writeln!(f, "\n  {:<width$}   frame        ms  captured", "expected")?;
        if shown.start > 0 {
            writeln!(f, "  ({} more)", shown.start)?;
        }
        for row in &self.rows[shown.clone()] {
            let mark = if row.differs { '>' } else { ' ' };
            let line = row.line.map_or("", |line| line.text.as_str());
            let captured = row.step.map_or_else(
                || if row.differs { "                 (nothing)".into() } else { String::new() },
                |step| captured(step, row, facts, self.names),
            );
            writeln!(f, "{}", format!("{mark} {line:<width$}   {captured}").trim_end())?;
        }
        if shown.end < self.rows.len() {
            writeln!(f, "  ({} more)", self.rows.len() - shown.end)?;
        }

        writeln!(f, "\n{}", title(facts, self.names))?;
        if let Some(file) = &self.flow.file {
            // Where a segment is missing, it is missing after the last one.
            let step = differing.step.or(self.flow.steps.last());
            let frame = step.map_or(1, |step| step.frame);
            writeln!(f, "look at it: wireshark -g {frame} {}", shell_quoted(file))?;
        }
        Ok(())
    }
}

fn captured(step: &Step, row: &Row<'_>, facts: &Facts, names: &Names) -> String {
    let ms = milliseconds(facts.began, step.at);
    let direction = names.direction(facts, step.from);
    let text = format!("{:>5} {ms:>9}  {direction}  {step}", step.frame);
    match note(step) {
        note if row.line.is_none() && !row.differs && !note.is_empty() => {
            format!("{text}   ({note})")
        }
        _ => text,
    }
}

fn shell_quoted(path: &Path) -> String {
    let path = path.display().to_string();
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"/._-+,:@%".contains(&b);
    match path.bytes().all(plain) && !path.is_empty() {
        true => path,
        false => format!("'{}'", path.replace('\'', r"'\''")),
    }
}

/// How a captured flow differs from what was expected. Displayed, it is a page: the claim that
/// fails first and why, expected beside captured, and the command that opens the frame.
#[derive(Clone, PartialEq, Eq)]
pub struct Difference {
    frame: Option<u64>,
    page: String,
}

impl Difference {
    /// The frame of the first segment that differs; `None` if an expected one is missing.
    pub fn frame(&self) -> Option<u64> {
        self.frame
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.page)
    }
}

impl fmt::Debug for Difference {
    /// The page too: it is what a test that unwraps shall print.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\n{self}")
    }
}

impl std::error::Error for Difference {}

/// A text that is no expectation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NotALadder {
    number: usize,
    line: String,
    why: String,
}

impl fmt::Display for NotALadder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.number {
            0 => write!(f, "the expected ladder: {}", self.why),
            number => {
                write!(f, "line {number} of the expected ladder, `{}`: {}", self.line, self.why)
            }
        }
    }
}

impl std::error::Error for NotALadder {}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::flow::Flows;
    use crate::lab::testing::Script;

    const HANDSHAKE: &str = "client > server S\nserver > client S.\nclient > server .\n";

    /// Handshake, five bytes from the client in two segments, an ACK, a RST from the server.
    fn script() -> Script {
        let mut script = Script::opened();
        script.client(Flags::default(), b"he").client(Flags::PSH, b"llo");
        script.server(Flags::default(), b"").server(Flags::RST, b"");
        script
    }

    fn compare_with(script: &Script, ladder: &Ladder) -> Result<(), Difference> {
        let flows = Flows::from_packets(&script.packets).in_file("/tmp/it's here.pcap");
        ladder.compare(flows.only().unwrap(), &Names::default())
    }

    /// Compares the script with a handshake and these lines.
    fn compare(script: &Script, lines: &str) -> Result<(), Difference> {
        compare_with(script, &Ladder::parse(&format!("{HANDSHAKE}{lines}")).unwrap())
    }

    /// The second line of the page: what differs.
    fn why(difference: Result<(), Difference>) -> String {
        let page = difference.expect_err("there is a difference").to_string();
        page.lines().nth(1).unwrap().strip_prefix("but        ").unwrap().to_owned()
    }

    #[test]
    fn what_was_expected_passes() {
        let ladder = "
            client > server  .  1:3      # two bytes
            client > server  P. 3:6 ack 1 len 3 win 64240
            server > client  R. seq 1 ack 6       <- and no F from the server
        ";
        assert_eq!(compare(&script(), ladder), Ok(()));
    }

    #[test]
    fn a_printed_ladder_is_an_expectation() {
        let flows = Flows::from_packets(&script().packets);
        let names = Names::default();
        let printed = flows.only().unwrap().ladder(&names).to_string();
        let lines = printed.lines().skip(2).map(|line| line[17..].to_owned() + "\n");
        let ladder = Ladder::parse(&lines.collect::<String>()).unwrap().with_every_ack();
        assert_eq!(compare_with(&script(), &ladder), Ok(()));
    }

    #[test]
    fn each_field_is_compared() {
        for (line, reason) in [
            ("server > client P. 1:3", "it goes from client to server"),
            ("client > client P. 1:3", "it goes from client to server"),
            ("client > server FP. 1:3", "its flags are ., not FP."),
            ("client > server P 1:3", "its flags are ., not P"),
            ("client > server P. 1:4", "its bytes are 1:3, not 1:4"),
            ("client > server P. 0:3", "its bytes are 1:3, not 0:3"),
            ("client > server P. seq 2", "its seq is 1, not 2"),
            ("client > server P. ack 2", "its ack is 1, not 2"),
            ("client > server P. win 1", "its win is 64240, not 1"),
            ("client > server P. len 3", "its len is 2, not 3"),
            ("client > server .", "it carries payload, 2 bytes"),
        ] {
            let ladder = format!("{line}\nclient > server P. 3:6\nserver > client R.");
            assert_eq!(why(compare(&script(), &ladder)), reason, "{line}");
        }
        let no_payload = "client > server P. 1:6 split\nserver > client PR.";
        assert_eq!(why(compare(&script(), no_payload)), "it carries no payload");
        let mut bare = Script::opened();
        bare.bare(crate::lab::flow::Side::Server, Flags::RST, b"");
        assert_eq!(why(compare(&bare, "server > client R ack 1")), "it has no ack");
        assert_eq!(compare(&bare, "server > client R"), Ok(()));
    }

    #[test]
    fn a_range_is_one_segment_unless_it_may_be_split() {
        let rst = "\nserver > client R.";
        let whole = format!("client > server P. 1:6{rst}");
        assert_eq!(why(compare(&script(), &whole)), "its bytes are 1:3, not 1:6");
        let split = format!("client > server P. 1:6 split{rst}");
        assert_eq!(compare(&script(), &split), Ok(()));
        let short = format!("client > server P. 1:5 split{rst}");
        assert_eq!(why(compare(&script(), &short)), "its bytes are 3:6, not 3:5");
        let mut lacking = script();
        lacking.packets.remove(3);
        let reason = why(compare(&lacking, &split));
        assert_eq!(reason, "its bytes are 3:6, not 1:6");
        let long = format!("client > server P. 1:7 split{rst}");
        assert_eq!(why(compare(&script(), &long)), "it goes from server to client");
    }

    #[test]
    fn a_segment_too_many_or_too_few_is_a_difference() {
        let data = "client > server P. 1:6 split\n";
        let page = compare(&script(), data).unwrap_err();
        assert_eq!(page.frame(), Some(7));
        assert!(page.to_string().starts_with("the expectation ends here, the connection does not"));

        let more = format!("{data}server > client R.\nclient > server F.");
        let page = compare(&script(), &more).unwrap_err();
        assert_eq!(page.frame(), None);
        assert_eq!(why(Err(page)), "no such segment was captured");
    }

    #[test]
    fn pure_acks_count_where_they_are_named() {
        let (data, rst) = ("client > server P. 1:6 split\n", "server > client R.");
        assert_eq!(compare(&script(), &format!("{data}server > client . ack 6\n{rst}")), Ok(()));
        let wrong = format!("{data}server > client . ack 7\n{rst}");
        assert_eq!(why(compare(&script(), &wrong)), "its flags are R., not .");
        let twice = format!("{data}server > client .\nserver > client .\n{rst}");
        assert_eq!(why(compare(&script(), &twice)), "its flags are R., not .");

        let every = Ladder::parse(&format!("{HANDSHAKE}{data}{rst}")).unwrap().with_every_ack();
        assert_eq!(why(compare_with(&script(), &every)), "its flags are ., not R.");
    }

    #[test]
    fn the_ack_of_the_handshake_must_be_there() {
        let without = Ladder::parse("client > server S\nserver > client S.\nserver > client R.");
        let mut script = Script::opened();
        script.server(Flags::RST, b"");
        let why_not = why(compare_with(&script, &without.unwrap()));
        assert_eq!(why_not, "it goes from client to server");
    }

    #[test]
    fn retransmissions_are_shown_but_not_compared() {
        let mut again = Script::opened();
        again.client(Flags::PSH, b"hello").client(Flags::PSH, b"hello").again(5);
        again.server(Flags::RST, b"");
        assert_eq!(compare(&again, "client > server P. 1:6\nserver > client R."), Ok(()));
        let twice = "client > server P. 1:6\nclient > server P. 1:6\nserver > client R.";
        let page = compare(&again, twice).unwrap_err().to_string();
        assert!(page.contains("P.   1:6 ack 1   (retransmission)"), "{page}");
    }

    #[test]
    fn ecn_counts_only_where_it_is_named() {
        let mut ecn = Script::new();
        let flags = Flags::SYN.with(Flags::ECE).with(Flags::CWR);
        ecn.bare(crate::lab::flow::Side::Client, flags, b"");
        let compare = |text| compare_with(&ecn, &Ladder::parse(text).unwrap());
        assert_eq!(compare("client > server S"), Ok(()));
        assert_eq!(compare("client > server SEW"), Ok(()));
        assert_eq!(why(compare("client > server SE")), "its flags are SEW, not SE");
    }

    #[test]
    fn the_page_shows_both_sides_and_the_frame() {
        let ladder = "client > server P. 1:6 split\nserver > client F. seq 1\nclient > server F.";
        let page = compare(&script(), ladder).unwrap_err();
        assert_eq!(page.frame(), Some(7));
        assert_eq!(
            page.to_string(),
            "\
expected   server > client F. seq 1
but        its flags are R., not F.

  expected                       frame        ms  captured
  client > server S                  1     0.000  client > server  S    win 64240
  server > client S.                 2     0.125  server > client  S.   ack 1 win 64240
  client > server .                  3     0.250  client > server  .    ack 1
  client > server P. 1:6 split       4     0.375  client > server  .    1:3 ack 1
                                     5     0.500  client > server  P.   3:6 ack 1
                                     6     0.625  server > client  .    ack 6   (pure ACK)
> server > client F. seq 1           7     0.750  server > client  R.   seq 1 ack 6
  client > server F.

client 10.0.0.1:40112, server 10.0.0.2:2000
look at it: wireshark -g 7 '/tmp/it'\\''s here.pcap'
"
        );
    }

    #[test]
    fn a_long_page_is_cut_around_the_difference() {
        let mut long = Script::opened();
        for _ in 0..1000 {
            long.client(Flags::PSH, b"x");
        }
        let page =
            compare(&long, "client > server P. 1:500 split\nserver > client R.").unwrap_err();
        let page = page.to_string();
        assert!(page.lines().count() < 2 * AROUND + 12, "{page}");
        assert!(page.contains("\n>") && page.contains("more)"), "{page}");
    }

    #[test]
    fn what_is_no_ladder_is_refused_with_the_line() {
        for (text, message) in [
            ("", "the expected ladder: it has no lines, so it claims nothing"),
            ("# S", "the expected ladder: it has no lines, so it claims nothing"),
            ("client S", "a line begins with FROM > TO"),
            ("client > server", "flags are missing: S, S., ., P., F., R, R. ..."),
            ("client > server SYN", "SYN is not flags: S, S., ., P., F., R, R. ..."),
            ("client > server S seq", "a number is missing after seq"),
            ("client > server S seq x", "x is not a number for seq"),
            ("client > server S win 65536", "65536 is not a number for win"),
            ("client > server S seq 1 seq 2", "seq comes twice"),
            ("client > server P. 1:6 1:6", "1:6 comes twice"),
            ("client > server P. 6:6", "the range 6:6 is empty"),
            ("client > server P. split", "split belongs to a range"),
            (
                "client > server P. 1-6",
                "1-6 is neither a range A:B nor seq, ack, win, len or split",
            ),
        ] {
            let error = Ladder::parse(text).unwrap_err().to_string();
            assert!(error.ends_with(message), "{error}");
        }
        let error = Ladder::parse("\n\n  a > b Q # comment").unwrap_err().to_string();
        assert!(error.starts_with("line 3 of the expected ladder, `a > b Q`: "), "{error}");
    }
}
