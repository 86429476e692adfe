//! What an experiment leaves behind: `captures/SUITE/EXPERIMENT/`.
//!
//! | file | holds |
//! |---|---|
//! | `README.md` | the question, the verdicts, how it was run, filters to try |
//! | `client.pcap`, `server.pcap` | the packets, as each host saw them |
//! | `events.log` | what each program said, in the order of time |
//! | `ladder.txt` | packets and events in one timeline |
//!
//! A folder is written beside its place and then renamed, so that it is never half of one run and
//! half of another.

use std::fs;
use std::io;
use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;

use super::capture::Taken;
use super::flow::Flows;
use super::journal::Entry;
use super::network::Network;
use super::pcap::{Link, Writer};
use super::pin::SYSCTLS;
use super::report::Experiment;
use super::timeline::Timeline;
use super::verdict::{Claim, Verdict};

/// What there is to write.
#[derive(Debug)]
pub struct Evidence<'a> {
    /// The experiment.
    pub name: &'a Experiment,
    /// What it asks.
    pub question: &'a str,
    /// On which kernels its claims were seen, if they are about the kernel.
    pub seen_on: Option<String>,
    /// Where it ran.
    pub network: &'a Network,
    /// Its verdict.
    pub verdict: &'a Verdict,
    /// Its claims.
    pub claims: &'a [Claim],
    /// Its captures, one a host; more if it captured more than once.
    pub taken: &'a [Taken],
    /// The programs that ran.
    pub programs: &'a [Entry],
    /// How long it took.
    pub took: Duration,
}

/// Writes it as this folder.
///
/// # Errors
/// The file that could not be written, and why.
pub fn write(folder: &Path, evidence: &Evidence<'_>) -> anyhow::Result<()> {
    let name = &evidence.name.name;
    let fresh = folder.with_file_name(format!(".{name}.{}", std::process::id()));
    let hint = || format!("cannot write {} (LAB_CAPTURES chooses another place)", folder.display());
    fs::create_dir_all(&fresh).with_context(hint)?;
    fill(&fresh, evidence).with_context(hint)?;
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(error).with_context(hint);
        }
        _ => {}
    }
    fs::rename(&fresh, folder).with_context(hint)
}

fn fill(folder: &Path, evidence: &Evidence<'_>) -> anyhow::Result<()> {
    for (name, taken) in files(evidence.taken) {
        write_pcap(&folder.join(name), taken)?;
    }
    fs::write(folder.join("events.log"), events(evidence.programs))?;
    if !evidence.taken.is_empty() {
        fs::write(folder.join("ladder.txt"), ladder(evidence))?;
    }
    fs::write(folder.join("README.md"), readme(evidence))?;
    Ok(())
}

/// A name for each capture: the host's, and a number from the second on.
fn files(taken: &[Taken]) -> Vec<(String, &Taken)> {
    let mut files: Vec<(String, &Taken)> = Vec::new();
    for one in taken {
        let before = files.iter().filter(|(_, other)| other.host == one.host).count();
        let number = if before == 0 { String::new() } else { format!("-{}", before + 1) };
        files.push((format!("{}{number}.pcap", one.host), one));
    }
    files
}

fn write_pcap(path: &Path, taken: &Taken) -> anyhow::Result<()> {
    let file = io::BufWriter::new(fs::File::create(path)?);
    let mut writer = Writer::new(file, Link::ETHERNET, taken.snapshot_length)?;
    for packet in &taken.packets {
        writer.write(packet)?;
    }
    writer.flush()?;
    Ok(())
}

/// A ladder longer than this is for `lab show`, not for reading.
const LONGEST_LADDER: usize = 2000;

/// The packets as the server saw them, and the events of all programs, in the order of time.
fn ladder(evidence: &Evidence<'_>) -> String {
    let names = evidence.network.names();
    let mut timeline = Timeline::new(&names);
    let of_server = evidence.taken.iter().filter(|taken| taken.host == "server");
    let mut packets = 0;
    for taken in of_server {
        packets += taken.packets.len();
        if packets > LONGEST_LADDER {
            return format!("{packets} packets: `lab show server.pcap` shows them.\n");
        }
        for flow in &Flows::from_packets(&taken.packets) {
            timeline.flow(flow);
        }
    }
    for program in evidence.programs {
        for event in program.events() {
            timeline.event(&program.host, &event);
        }
    }
    timeline.to_string()
}

/// Every line of every program; those with a stamp in its order.
fn events(programs: &[Entry]) -> String {
    let mut lines: Vec<(u64, String)> = Vec::new();
    for program in programs {
        let name = program.command.split(' ').next().unwrap_or_default();
        if name == "tcpdump" || name == "lab" {
            continue; // the capture's own
        }
        let mut last = 0;
        for line in program.stdout().lines() {
            let event = super::event::Event::parse(line.as_bytes());
            last = event.map_or(last, |event| event.at);
            lines.push((last, format!("{:<7} {line}", program.host)));
        }
        for line in program.stderr().lines() {
            lines.push((
                last,
                format!("{:<7} {name}[{}] stderr: {line}", program.host, program.pid),
            ));
        }
        if let Some(ending) = program.ending() {
            lines.push((last, format!("{:<7} {name}[{}] {ending}", program.host, program.pid)));
        }
    }
    lines.sort_by_key(|(at, _)| *at);
    lines.into_iter().map(|(_, line)| line + "\n").collect()
}

fn readme(evidence: &Evidence<'_>) -> String {
    use std::fmt::Write as _;
    let mut text = String::new();
    let Evidence { name, question, network, verdict, .. } = evidence;
    let _ = writeln!(text, "# {}/{}\n\n{question}\n", name.suite, name.name);
    let _ = writeln!(text, "Verdict: **{}** {}\n", verdict.word(), verdict.detail());
    let _ = writeln!(text, "| claim | verdict |\n|---|---|");
    for claim in evidence.claims {
        let _ = writeln!(text, "| {} | {} |", claim.sentence, claim.verdict.word());
    }
    for claim in evidence.claims.iter().filter(|claim| claim.verdict != Verdict::Pass) {
        let _ = writeln!(text, "\n{}:\n\n```text\n{}\n```", claim.sentence, claim.verdict.detail());
    }
    let _ = writeln!(text, "\n## How it was run\n\n```text");
    for program in evidence.programs {
        let _ = writeln!(text, "{:<7} $ {}", program.host, program.command);
    }
    let _ = writeln!(
        text,
        "```\n\nAgain: `LAB_NETWORK={} cargo test --test {}`\n",
        network.kind(),
        name.suite
    );
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let _ = writeln!(text, "- Network: {}; took {} ms", network.kind(), evidence.took.as_millis());
    for host in network.hosts() {
        let [ipv4, ipv6] = host.addresses();
        let _ = writeln!(text, "- Host `{}`: {ipv4}, {ipv6}", host.name());
    }
    let _ = writeln!(text, "- Kernel: Linux {}", kernel.trim());
    if let Some(versions) = &evidence.seen_on {
        let _ = writeln!(text, "- Its claims were seen on: {versions}");
    }
    let _ =
        writeln!(text, "- Pinned on the hosts: TSO, GSO, GRO and transmit checksums off on `eth0`");
    for (name, value) in SYSCTLS {
        let _ = writeln!(text, "- Pinned on the hosts: `{} = {value}`", name.replace('/', "."));
    }
    for (file, taken) in files(evidence.taken) {
        let _ = writeln!(
            text,
            "- `{file}`: {} packets by {}, complete: its sentinel was seen and the kernel dropped none",
            taken.packets.len(),
            taken.tool
        );
    }
    if !evidence.taken.is_empty() {
        let _ = writeln!(text, "\n## What to look at\n");
        let _ = writeln!(
            text,
            "`lab show server.pcap` prints the ladder, `wireshark server.pcap` opens it."
        );
        let _ = writeln!(text, "Display filters to try:\n");
        for (filter, what) in FILTERS {
            let _ = writeln!(text, "- `{filter}`: {what}");
        }
    }
    text
}

/// Wireshark's, which work on any capture of TCP.
const FILTERS: [(&str, &str); 4] = [
    ("tcp.flags.reset == 1", "every RST"),
    ("tcp.flags.fin == 1", "every FIN"),
    ("tcp.flags.syn == 1", "every connection's beginning"),
    ("tcp.len > 0", "every segment with data"),
];
