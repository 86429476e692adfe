//! `lab show`: the TCP connections of any capture, each with its ladder.
//!
//! Works on captures of any length in constant memory: at most 32768 connections are followed at a
//! time, and of each the first 32 and the last 16 segments are kept for its ladder, some 100 MB in
//! all if every one is long (`--flow N` and `--json` print segments as they are read and keep
//! none). A connection is printed when it has been over for a minute of the capture's time or for
//! 100,000 segments of others, when its place is needed for another, or at the end. What comes after
//! that for the same endpoints is shown as a connection of its own.

mod print;
mod table;

use std::fs::File;
use std::io::{self, BufWriter, IsTerminal, LineWriter, Read, Write};
use std::path::PathBuf;

use anyhow::{Context, anyhow, bail};

use crate::lab::packet::{Decoded, decode, is_known};
use crate::lab::pcap::{ReadError, Reader};
use print::{Json, Print, Text};
use table::Table;

/// The arguments of `lab show`.
#[derive(Clone, Debug, clap::Args)]
pub struct ShowArgs {
    /// A pcap or pcapng file; `-` reads standard input, which may be a running capture's
    pub file: PathBuf,
    /// What to print
    #[command(flatten)]
    pub options: Options,
}

/// What `lab show` prints.
#[derive(Clone, Copy, Debug, Default, clap::Args)]
pub struct Options {
    /// Print JSON lines: every segment, every flow when it is done with, at last the capture
    #[arg(long)]
    pub json: bool,
    /// Print only flow N, with every segment; N is the tcp.stream of Wireshark
    #[arg(long, value_name = "N", conflicts_with = "summary")]
    pub flow: Option<u64>,
    /// Print no segments, only what they add up to
    #[arg(long)]
    pub summary: bool,
}

/// Shows a capture on standard output, in colour if that is a terminal. A reader that goes away
/// (`| head`) ends it quietly.
///
/// # Errors
/// One line that says what is wrong with the capture. What was read before is shown.
pub fn run(args: &ShowArgs) -> anyhow::Result<()> {
    let stdout = anstream::AutoStream::auto(io::stdout().lock());
    // At a terminal, each line at once: the capture may still be running.
    let out: Box<dyn Write> = match io::stdout().is_terminal() {
        true => Box::new(LineWriter::new(stdout)),
        false => Box::new(BufWriter::new(stdout)),
    };
    let (name, shown) = if args.file.as_os_str() == "-" {
        let input = io::stdin().lock();
        if input.is_terminal() {
            bail!(
                "standard input is a terminal: pipe a capture into it, tcpdump -w - | lab show -"
            );
        }
        ("standard input".to_owned(), show(input, out, args.options))
    } else {
        let name = args.file.display().to_string();
        let file = File::open(&args.file).with_context(|| format!("cannot open {name}"))?;
        (name, show(file, out, args.options))
    };
    match shown {
        Err(error) if is_broken_pipe(&error) => Ok(()),
        Err(error) => Err(anyhow!("{name}: {}", advice(&error))),
        Ok(()) => Ok(()),
    }
}

/// Standard output's: a capture's source that breaks is a [`ReadError`].
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe)
}

/// The error, and what it means for the reader.
fn advice(error: &anyhow::Error) -> String {
    match error.downcast_ref() {
        Some(ReadError::NotACapture(_)) => {
            format!("{error}; show reads what tcpdump -w, dumpcap and Wireshark write")
        }
        Some(ReadError::Truncated { packet: 1.. } | ReadError::Damaged { packet: 1.., .. }) => {
            format!("{error}; what came before is shown")
        }
        _ => error.to_string(),
    }
}

/// Shows a capture: what [`run`] does, on any input and output.
///
/// # Errors
/// A [`ReadError`] of the capture, after what came before has been shown; an [`io::Error`] of the
/// output; or that there is no such flow.
pub fn show(input: impl Read, mut out: impl Write, options: Options) -> anyhow::Result<()> {
    let result = match options.json {
        true => follow(input, &mut Json { out: &mut out, options }, options.flow),
        false => follow(input, &mut Text::new(&mut out, options), options.flow),
    };
    out.flush()?;
    result
}

/// What a capture held.
#[derive(Clone, Copy, Debug, Default)]
struct Totals {
    packets: u64,
    segments: u64,
    flows: u64,
    /// Packets of link types that we cannot decode, and one such type.
    unknown_links: u64,
    unknown_link: Option<u32>,
}

fn follow(input: impl Read, print: &mut impl Print, wanted: Option<u64>) -> anyhow::Result<()> {
    let mut reader = Reader::new(input)?;
    let mut table = Table::default();
    let mut totals = Totals::default();
    let broken = loop {
        let packet = match reader.next_packet() {
            Ok(Some(packet)) => packet,
            Ok(None) => break None,
            Err(error) => break Some(error),
        };
        totals.packets += 1;
        if !is_known(packet.link) {
            totals.unknown_links += 1;
            totals.unknown_link = Some(packet.link.0);
        } else if let Decoded::Tcp(segment) = decode(totals.packets, &packet) {
            totals.segments += 1;
            table.add(&segment, print)?;
        }
    };
    totals.flows = table.flows();
    table.finish(print)?;
    print.totals(&totals)?;
    if let Some(error) = broken {
        return Err(error.into());
    }
    match wanted.filter(|wanted| *wanted >= totals.flows) {
        Some(wanted) => {
            bail!("there is no flow {wanted}: it has {}, numbered from 0", totals.flows)
        }
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::flow::Side;
    use crate::lab::packet::{Flags, Seq};
    use crate::lab::pcap::{Link, Packet, Writer};
    use crate::lab::testing::Script;

    /// A capture file of these packets.
    fn file(packets: &[Packet<'_>]) -> Vec<u8> {
        let mut file = Vec::new();
        let mut writer = Writer::new(&mut file, Link::ETHERNET, 128).unwrap();
        packets.iter().for_each(|packet| writer.write(packet).unwrap());
        file
    }

    fn shown(file: &[u8], options: Options) -> (String, Result<(), String>) {
        let mut out = Vec::new();
        let plain = anstream::StripStream::new(&mut out);
        let result = show(file, plain, options).map_err(|error| advice(&error));
        (String::from_utf8(out).unwrap(), result)
    }

    /// A handshake, five bytes, a RST.
    fn reset() -> Script {
        let mut script = Script::opened();
        script.client(Flags::PSH, b"hello").server(Flags::RST, b"");
        script
    }

    #[test]
    fn a_flow_is_its_ladder_and_its_story() {
        let (text, result) = shown(&file(&reset().packets), Options::default());
        assert_eq!(result, Ok(()));
        assert_eq!(
            text,
            "\
flow 0  10.0.0.1:40112 > 10.0.0.2:2000  at 1795361749.734234123
      1       0.000  client > server  S    win 64240
      2       0.125  server > client  S.   ack 1 win 64240
      3       0.250  client > server  .    ack 1
      4       0.375  client > server  P.   1:6 ack 1
      5       0.500  server > client  R.   seq 1 ack 6
  5 segments in 0.500 ms: handshake, 5 bytes from client, RST from server
5 packets, 5 of TCP, 1 flow
"
        );
    }

    #[test]
    fn json_is_an_object_a_line() {
        let (text, _) =
            shown(&file(&reset().packets), Options { json: true, ..Options::default() });
        let lines: Vec<serde_json::Value> =
            text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(lines.len(), 7);
        assert_eq!(lines[4]["type"], "segment");
        assert_eq!((&lines[4]["flags"], &lines[4]["ack"]), (&"R.".into(), &6.into()));
        assert_eq!((&lines[5]["type"], &lines[5]["completeness"]), (&"flow".into(), &47.into()));
        assert_eq!((&lines[5]["client"]["bytes"], &lines[5]["over"]), (&5.into(), &true.into()));
        assert_eq!((&lines[6]["type"], &lines[6]["packets"]), (&"capture".into(), &5.into()));
    }

    #[test]
    fn a_flow_can_be_asked_for_by_number() {
        let mut script = reset();
        script.next = [Seq(5), Seq(6)];
        script.bare(Side::Client, Flags::SYN, b"");
        let file = file(&script.packets);
        let flow = |n| shown(&file, Options { flow: Some(n), ..Options::default() });
        let (text, result) = flow(1);
        assert_eq!(result, Ok(()));
        assert!(text.starts_with("flow 1 ") && !text.contains("flow 0"), "{text}");
        assert!(text.contains("1 segment in 0.000 ms: SYN not answered, not ended here"), "{text}");
        assert_eq!(flow(2).1.unwrap_err(), "there is no flow 2: it has 2, numbered from 0");
    }

    #[test]
    fn a_summary_has_no_segments() {
        let (text, _) =
            shown(&file(&reset().packets), Options { summary: true, ..Options::default() });
        assert_eq!(text.lines().count(), 3, "{text}");
    }

    #[test]
    fn a_long_ladder_keeps_both_ends_and_says_what_it_lacks() {
        let mut script = Script::opened();
        for _ in 0..100 {
            script.client(Flags::PSH, b"x");
        }
        let (text, _) = shown(&file(&script.packets), Options::default());
        assert!(text.contains("\n     32 ") && !text.contains("\n     33 "), "{text}");
        assert!(text.contains("... 55 more: show --flow 0\n     88 "), "{text}");
        let (text, _) =
            shown(&file(&script.packets), Options { flow: Some(0), ..Options::default() });
        assert!(text.contains("\n     33 "), "{text}");
    }

    #[test]
    fn what_came_before_the_damage_is_shown() {
        let whole = file(&reset().packets);
        let (text, result) = shown(&whole[..whole.len() - 1], Options::default());
        assert!(text.ends_with("4 packets, 4 of TCP, 1 flow\n"), "{text}");
        assert_eq!(
            result.unwrap_err(),
            "the capture ends in the middle of packet 5; what came before is shown"
        );
    }

    #[test]
    fn packets_that_are_no_tcp_are_counted() {
        let mut file = Vec::new();
        let mut writer = Writer::new(&mut file, Link(127), 128).unwrap();
        writer.write(&Packet::new(0, Link(127), &b"802.11"[..])).unwrap();
        let (text, _) = shown(&file, Options::default());
        assert_eq!(text, "1 packet, 0 of TCP, 0 flows; 1 of a link type not known here (127)\n");
    }

    /// An output whose reader has gone.
    struct Gone;

    impl Write for Gone {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::BrokenPipe.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_reader_that_goes_away_is_told_from_a_broken_capture() {
        let file = file(&reset().packets);
        let error = show(file.as_slice(), Gone, Options::default()).unwrap_err();
        assert!(is_broken_pipe(&error));
        let json = Options { json: true, ..Options::default() };
        assert!(is_broken_pipe(&show(file.as_slice(), Gone, json).unwrap_err()));
        let broken = ReadError::Io(io::ErrorKind::BrokenPipe.into());
        assert!(!is_broken_pipe(&broken.into()));
    }

    /// However a capture is damaged, it is shown or refused; nothing panics, nothing hangs.
    #[test]
    fn no_damage_makes_it_panic() {
        let mut random = 0x9e37_79b9_7f4a_7c15_u64; // a fixed seed: the same files in every run
        let mut next = move |below: usize| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            (random % below as u64) as usize
        };
        let mut files: Vec<Vec<u8>> = Vec::new();
        for entry in std::fs::read_dir("captures/reference").unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|e| e == "pcap" || e == "pcapng") {
                files.push(std::fs::read(path).unwrap());
            }
        }
        assert!(files.len() > 5, "the captures to damage");
        let mut packets = 0;
        for round in 0..4000 {
            let mut file = files[next(files.len())].clone();
            for _ in 0..1 + next(8) {
                // The headers are where damage does something.
                let place = if next(2) == 0 { next(file.len().min(120)) } else { next(file.len()) };
                match next(4) {
                    0 => file[place] ^= 1 << next(8),
                    1 => file[place] = [0, 1, 0x7f, 0x80, 0xff][next(5)],
                    2 => file.truncate(place.max(1)),
                    _ => drop(file.drain(place..(place + next(8)).min(file.len()))),
                }
                if file.is_empty() {
                    break;
                }
            }
            let options = Options { json: round % 2 == 0, ..Options::default() };
            packets += usize::from(show(file.as_slice(), io::sink(), options).is_ok());
        }
        assert!(packets > 100, "some files survive their damage: {packets}");
    }
}
