//! How fast `lab show` reads, and how much memory it takes: `cargo bench --bench show`.
//!
//! Writes captures of 100 MB and 1 GB (other sizes: `cargo bench --bench show -- 50 500`, in MB),
//! has `lab show` read each three times from the page cache, and deletes them. The traffic is made
//! up: 500 connections at a time, each of a request and an answer of 1 to 1000 full segments, every
//! second one acknowledged, ended by FIN or RST.

use std::fs::File;
use std::io::BufWriter;
use std::net::Ipv4Addr;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use etherparse::{PacketBuilder, TcpHeader};
use nix::sys::resource::{UsageWho, getrusage};
use serverlab::lab::pcap::{Link, Packet, Writer};

const RUNS: usize = 3;
const AT_A_TIME: u32 = 500;
const SEGMENT: u32 = 1448;

fn main() {
    let sizes: Vec<u64> = std::env::args().skip(1).filter_map(|arg| arg.parse().ok()).collect();
    let sizes = if sizes.is_empty() { vec![100, 1000] } else { sizes };
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory for captures");
    println!(
        "{:>6}  {:>12}  {:>9}  {:>8}  {:>9}",
        "MB", "options", "s, median", "MB/s", "peak RSS"
    );
    for size in sizes {
        let path = dir.path().join(format!("{size}MB.pcap"));
        let bytes = write_capture(&path, size * 1_000_000).expect("the capture is written");
        for options in ["", "--summary", "--json"] {
            let mut seconds: Vec<f64> = (0..RUNS).map(|_| show(&path, options)).collect();
            seconds.sort_by(f64::total_cmp);
            let median = seconds[RUNS / 2];
            let speed = bytes as f64 / 1e6 / median;
            // The largest of all children so far; sizes go up.
            let children = getrusage(UsageWho::RUSAGE_CHILDREN).expect("getrusage(2)");
            let peak = children.max_rss() as f64 / 1024.0;
            println!("{size:>6}  {options:>12}  {median:>9.3}  {speed:>8.0}  {peak:>6.1} MB");
        }
        std::fs::remove_file(path).expect("the capture is deleted");
    }
}

/// Has `lab show` read the file; how long it took, in seconds.
fn show(path: &Path, options: &str) -> f64 {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lab"));
    command.arg("show").arg(path).args(options.split_whitespace()).stdout(Stdio::null());
    let begin = Instant::now();
    let status = command.status().expect("lab runs");
    assert!(status.success(), "lab show fails: {status}");
    begin.elapsed().as_secs_f64()
}

/// One connection of the made-up traffic.
struct Talk {
    client: (Ipv4Addr, u16),
    /// Segments of its answer, and how many have been sent.
    answer: u32,
    said: u32,
    next: [u32; 2],
}

fn write_capture(path: &Path, bytes: u64) -> std::io::Result<u64> {
    let file = BufWriter::with_capacity(1 << 20, File::create(path)?);
    let mut writer = Writer::new(file, Link::ETHERNET, 65_535)?;
    let mut random = 1_u32;
    let mut next = || {
        random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        random >> 8
    };
    let mut begun = 0;
    let mut begin = |answer| {
        begun += 1;
        let address = Ipv4Addr::from(0x0a00_0000 + begun / 60_000);
        Talk {
            client: (address, 1025 + (begun % 60_000) as u16),
            answer,
            said: 0,
            next: [begun, 7],
        }
    };
    let mut talks: Vec<Talk> = (0..AT_A_TIME).map(|_| begin(1 + next() % 1000)).collect();
    let (mut written, mut at) = (24, 1_795_361_749_000_000_000);
    while written < bytes {
        let place = (next() % AT_A_TIME) as usize;
        let talk = &mut talks[place];
        let packet = Packet::new(at, Link::ETHERNET, talk.say());
        at += 1 + u64::from(next() % 10_000);
        written += 16 + u64::from(packet.len);
        writer.write(&packet)?;
        if talk.said > talk.answer + talk.answer / 2 + 6 {
            *talk = begin(1 + next() % 1000);
        }
    }
    writer.flush()?;
    Ok(written)
}

impl Talk {
    /// The connection's next segment: handshake, request, answer with its ACKs, the end.
    fn say(&mut self) -> Vec<u8> {
        let data = self.answer + self.answer / 2;
        let step = self.said;
        self.said += 1;
        match step {
            0 => self.segment(0, 200, |header| header.syn = true, 0),
            1 => self.segment(1, 200, |header| (header.syn, header.ack) = (true, true), 0),
            2 => self.segment(0, 200, |header| header.ack = true, 0),
            3 => self.segment(0, 200, |header| (header.psh, header.ack) = (true, true), 300),
            n if n < data + 4 && n % 3 == 0 => self.segment(0, 200, |header| header.ack = true, 0),
            n if n < data + 4 => self.segment(1, 500, |header| header.ack = true, SEGMENT),
            n if n == data + 4 && self.answer.is_multiple_of(10) => {
                self.segment(1, 0, |header| (header.rst, header.ack) = (true, true), 0)
            }
            n if n == data + 4 => {
                self.segment(1, 500, |header| (header.fin, header.ack) = (true, true), 0)
            }
            n if n == data + 5 => {
                self.segment(0, 200, |header| (header.fin, header.ack) = (true, true), 0)
            }
            _ => self.segment(1, 500, |header| header.ack = true, 0),
        }
    }

    fn segment(&mut self, from: usize, window: u16, set: fn(&mut TcpHeader), len: u32) -> Vec<u8> {
        let server = (Ipv4Addr::new(192, 0, 2, 1), 80);
        let (sender, peer) = if from == 0 { (self.client, server) } else { (server, self.client) };
        let mut header = TcpHeader::new(sender.1, peer.1, self.next[from], window);
        header.acknowledgment_number = self.next[1 - from];
        set(&mut header);
        self.next[from] =
            self.next[from].wrapping_add(len + u32::from(header.syn) + u32::from(header.fin));
        let mut frame = Vec::with_capacity(2048);
        let payload = [b'x'; SEGMENT as usize];
        PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2])
            .ipv4(sender.0.octets(), peer.0.octets(), 64)
            .tcp_header(header)
            .write(&mut frame, &payload[..len as usize])
            .expect("a Vec takes everything");
        frame
    }
}
