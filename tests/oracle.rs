//! The laboratory reads captures as Wireshark does.
//!
//! Every reference capture is read twice: by our decoder and flow tracker, and by `tshark -2`. They
//! must agree, segment by segment, on the connection, the addresses, the numbers, the flags, the
//! lengths, the time and the payload; and flow by flow on the completeness. `ORACLE=DIRECTORY` has
//! the captures of another directory checked too.
//!
//! Where the two mean different things, the difference is spelled out, not tolerated:
//!
//! - Any ACK flag completes Wireshark's handshake, with or without a SYN and a SYN-ACK before it.
//! - The RST that refuses a connection has the relative sequence number 0 for us, as in its header,
//!   and 1 for Wireshark.
//! - Retransmitted is for us what sends nothing new. Wireshark divides that further, by time: on a
//!   fast link it calls some of it out-of-order.

use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use serverlab::lab::flow::{Flow, Flows, Side, completeness};
use serverlab::lab::packet::{Decoded, decode};
use serverlab::lab::pcap;

/// What is asked of tshark, in the order of a row of [`Seen`].
const FIELDS: [&str; 18] = [
    "frame.number",
    "frame.time_epoch",
    "tcp.stream",
    "ip.src",
    "ipv6.src",
    "tcp.srcport",
    "tcp.dstport",
    "tcp.seq_raw",
    "tcp.ack_raw",
    "tcp.flags",
    "tcp.window_size_value",
    "tcp.len",
    "tcp.payload",
    "tcp.seq",
    "tcp.ack",
    "tcp.completeness",
    "tcp.analysis.retransmission",
    "tcp.analysis.out_of_order",
];

/// One segment, as text: either what tshark says or the same written by us.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    frame: String,
    epoch: String,
    stream: String,
    from: String,
    ports: String,
    seq_raw: String,
    ack_raw: String,
    flags: String,
    window: String,
    len: String,
    payload: String,
    seq: String,
    ack: String,
    completeness: String,
    retransmitted: bool,
}

#[test]
fn tshark_and_the_laboratory_agree() {
    let mut directories = vec![PathBuf::from("captures/reference")];
    directories.extend(std::env::var_os("ORACLE").map(PathBuf::from));
    let mut compared = 0;
    for directory in directories {
        for file in captures(&directory) {
            let Some(theirs) = tshark(&file) else { return };
            let ours = ours(&file);
            assert_eq!(ours.len(), theirs.len(), "{}: segments", file.display());
            for (ours, theirs) in ours.iter().zip(&theirs) {
                assert_eq!(ours, theirs, "{} (left: ours, right: tshark)", file.display());
                compared += 1;
            }
        }
    }
    assert!(compared > 50, "only {compared} segments were compared");
}

fn captures(directory: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(directory).expect("the directory of captures");
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.expect("a file").path()).collect();
    files.retain(|file| file.extension().is_some_and(|e| e == "pcap" || e == "pcapng"));
    files.sort();
    assert!(!files.is_empty(), "no captures in {}", directory.display());
    files
}

/// What tshark says; `None`, and a loud word, if there is none here.
fn tshark(file: &Path) -> Option<Vec<Seen>> {
    let mut command = Command::new("tshark");
    // -2: completeness is known in the second pass only. -n: no names for addresses.
    command.args(["-2", "-n", "-Y", "tcp", "-T", "fields", "-E", "occurrence=f", "-r"]).arg(file);
    command.args(FIELDS.iter().flat_map(|field| ["-e", field]));
    let output = match command.output() {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            let skipped = "SKIPPED tests/oracle.rs: tshark is not installed (apt install tshark)";
            assert!(std::env::var_os("LAB_REQUIRE").is_none_or(|v| v != "all"), "{skipped}");
            // Not through eprintln!, which the test harness keeps to itself when a test passes.
            let _ = writeln!(std::io::stderr(), "{skipped}");
            return None;
        }
        output => output.expect("tshark runs"),
    };
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "tshark {}: {errors}", file.display());
    let text = String::from_utf8(output.stdout).expect("tshark prints UTF-8");
    Some(text.lines().map(their_segment).collect())
}

fn their_segment(line: &str) -> Seen {
    let fields: Vec<&str> = line.split('\t').collect();
    let [frame, epoch, stream, v4, v6, from, to, seq_raw, ack_raw, rest @ ..] = fields.as_slice()
    else {
        panic!("tshark prints all fields: {line}");
    };
    let [flags, window, len, payload, seq, ack, complete, again, out_of_order] = rest else {
        panic!("tshark prints all fields: {line}");
    };
    let text = |text: &&str| (*text).to_owned();
    let flag_bits = u16::from_str_radix(flags.trim_start_matches("0x"), 16).expect("hexadecimal");
    let mut bits: u8 = complete.parse().expect("completeness");
    let handshake = completeness::SYN | completeness::SYN_ACK;
    if bits & handshake != handshake {
        bits &= !completeness::ACK;
    }
    let refusal = bits & completeness::SYN_ACK == 0 && flag_bits & 0x04 != 0;
    let seq = if refusal { "0".to_owned() } else { text(seq) };
    Seen {
        frame: text(frame),
        epoch: text(epoch),
        stream: text(stream),
        from: format!("{v4}{v6}"),
        ports: format!("{from} > {to}"),
        seq_raw: text(seq_raw),
        ack_raw: text(ack_raw),
        flags: format!("{:#04x}", flag_bits & 0xff),
        window: text(window),
        len: text(len),
        payload: payload.replace(':', ""),
        seq,
        // Wireshark prints the field even where no ACK flag makes it count.
        ack: if flag_bits & 0x10 == 0 { String::new() } else { text(ack) },
        completeness: bits.to_string(),
        retransmitted: !again.is_empty() || !out_of_order.is_empty(),
    }
}

/// The same by our code.
fn ours(file: &Path) -> Vec<Seen> {
    let flows = Flows::read(file).expect("a whole capture");
    let packets = pcap::read(file).expect("a whole capture");
    let mut seen = Vec::new();
    for (frame, packet) in (1..).zip(&packets) {
        let Decoded::Tcp(segment) = decode(frame, packet) else { continue };
        let (stream, flow, step) = find(&flows, frame);
        let bytes = segment.payload.iter().map(|byte| format!("{byte:02x}"));
        seen.push(Seen {
            frame: frame.to_string(),
            epoch: format!("{}.{:09}", segment.at / 1_000_000_000, segment.at % 1_000_000_000),
            stream: stream.to_string(),
            from: segment.from.ip().to_string(),
            ports: format!("{} > {}", segment.from.port(), segment.to.port()),
            seq_raw: segment.seq.0.to_string(),
            ack_raw: segment.ack.0.to_string(),
            flags: format!("{:#04x}", segment.flags.0),
            window: segment.window.to_string(),
            len: segment.len.to_string(),
            payload: bytes.collect(),
            seq: flow.steps[step].seq.to_string(),
            ack: flow.steps[step].ack.map_or(String::new(), |ack| ack.to_string()),
            completeness: flow.facts.completeness().to_string(),
            retransmitted: flow.steps[step].retransmitted,
        });
    }
    // What was put together is what the segments carried, each byte once.
    for flow in &flows {
        for side in [Side::Client, Side::Server].into_iter().filter(|s| flow.payload_is_whole(*s)) {
            let sent = flow.ranges(side).iter().map(|range| range.end - range.start).sum::<i64>();
            assert_eq!(sent as usize, flow.payload(side).len(), "{}", file.display());
        }
    }
    seen
}

/// The flow that has this frame, its number and the place of the frame in it.
fn find(flows: &Flows, frame: u64) -> (usize, &Flow, usize) {
    let place = |flow: &Flow| flow.steps.iter().position(|step| step.frame == frame);
    let mut found = flows.iter().enumerate().filter_map(|(n, flow)| Some((n, flow, place(flow)?)));
    found.next().expect("every segment belongs to a flow")
}
