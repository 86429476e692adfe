//! A capture on every host at once, complete or invalid.
//!
//! tcpdump, stopped right after the traffic, loses packets that it has not read yet and still
//! reports none dropped. So each host's capture is stopped only after it has shown a *sentinel*: a
//! UDP datagram to port 9 (discard) that the other host sends when the experiment is over. What the
//! wire carried before the sentinel is in the file before the sentinel. It is then taken out.
//!
//! Where tcpdump is not installed, `lab sniff` stands in.

use std::fs::File;
use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::os::fd::OwnedFd;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread::JoinHandle;

use anyhow::Context as _;
use nix::fcntl::OFlag;
use nix::sys::signal::Signal;

use super::experiment::Lab;
use super::host::{Family, Host};
use super::packet::{Decoded, decode};
use super::pcap::{Packet, ReadError, Reader};
use super::pin::INTERFACE;
use super::process::{Command, DEADLINE, Process};
use super::program::Program;
use super::verdict::Invalid;
use super::wire::Wire;

/// The port of the sentinel (RFC 863). Nobody listens there.
const DISCARD: u16 = 9;

/// What every capture takes: all TCP, and the sentinel.
const FILTER: &str = "tcp or udp dst port 9";

/// A running capture, one tap on each host.
#[derive(Debug)]
pub struct Capture<'a> {
    lab: &'a Lab,
    taps: Vec<Tap<'a>>,
}

/// How much of each packet is kept, and how large a burst the kernel may buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Depth {
    /// Whole packets, for experiments of up to a thousand packets or so.
    Whole,
    /// Headers only, and a ring for bursts of tens of thousands of packets.
    Headers,
}

impl Depth {
    /// Bytes kept of each packet. With immediate mode, a ring slot is as large as this: the default
    /// (262144) would leave eight slots.
    pub fn snapshot_length(self) -> u32 {
        match self {
            Depth::Whole => 2048,
            Depth::Headers => 128,
        }
    }

    fn ring_kib(self) -> u32 {
        match self {
            Depth::Whole => 4096,
            Depth::Headers => 16384,
        }
    }
}

/// What one host's tap has taken.
#[derive(Clone, Debug)]
pub struct Taken {
    /// The host.
    pub host: String,
    /// What captured: `tcpdump` or `lab sniff`.
    pub tool: String,
    /// Its packets, without sentinels.
    pub packets: Vec<Packet<'static>>,
    /// The snapshot length, in bytes.
    pub snapshot_length: u32,
}

impl<'a> Capture<'a> {
    /// Starts to capture on every host and returns when all do.
    ///
    /// # Errors
    /// The capturing program cannot be run, or says why it cannot capture.
    pub(super) fn start(lab: &'a Lab, depth: Depth) -> anyhow::Result<Capture<'a>> {
        let start = |host| Tap::start(host, lab.program(), depth);
        let taps = lab.network().hosts().iter().map(start).collect::<anyhow::Result<Vec<_>>>()?;
        for tap in &taps {
            tap.process.wait_until("\"listening on\"", |output| {
                output.stderr.contains("listening on").then_some(())
            })?;
        }
        Ok(Capture { lab, taps })
    }

    /// The program that captures on this host, for tests of the laboratory.
    ///
    /// # Panics
    /// If there is no such host.
    pub fn program(&self, host: &str) -> &Process {
        let tap = self.taps.iter().find(|tap| tap.host.name() == host);
        &tap.unwrap_or_else(|| panic!("there is no capture on a host {host}")).process
    }

    /// Stops, and returns what each host saw. It becomes part of the experiment's evidence.
    ///
    /// # Errors
    /// [`Invalid`]: a capture that is not complete, and why.
    pub fn finish(self) -> anyhow::Result<Wire> {
        let network = self.lab.network();
        for tap in &self.taps {
            let other = network.hosts().iter().find(|host| host.name() != tap.host.name());
            let other = other.context("a capture needs a second host for its sentinel")?;
            tap.send_sentinel(other)?;
        }
        for tap in &self.taps {
            tap.await_sentinel()?;
            tap.process.signal(Signal::SIGINT)?;
        }
        let taken = self.taps.into_iter().map(Tap::finish).collect::<anyhow::Result<Vec<_>>>()?;
        let wire = Wire::new(&taken, &network.names(), &self.lab.folder());
        self.lab.keep(taken);
        Ok(wire)
    }
}

/// One host's part of a capture.
#[derive(Debug)]
struct Tap<'a> {
    host: &'a Host,
    tool: &'static str,
    depth: Depth,
    process: Process,
    sentinel: String,
    seen: Receiver<()>,
    reading: JoinHandle<Result<Vec<Packet<'static>>, ReadError>>,
}

impl<'a> Tap<'a> {
    fn start(host: &'a Host, lab: &Program, depth: Depth) -> anyhow::Result<Tap<'a>> {
        let (output, end) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
        let (tool, process) = spawn(host, lab, depth, end)?;
        let sentinel = format!("serverlab sentinel {:016x}", rand());
        let (saw, seen) = mpsc::channel();
        let wanted = sentinel.clone();
        let reading = std::thread::Builder::new()
            .name(format!("{tool} on {}", host.name()))
            .spawn(move || read(File::from(output), &wanted, &saw))?;
        Ok(Tap { host, tool, depth, process, sentinel, seen, reading })
    }

    fn send_sentinel(&self, other: &Host) -> anyhow::Result<()> {
        let socket = UdpSocket::from(other.socket(libc::AF_INET, libc::SOCK_DGRAM, 0)?);
        let std::net::IpAddr::V4(to) = self.host.address(Family::V4) else { unreachable!() };
        socket
            .send_to(self.sentinel.as_bytes(), SocketAddrV4::new(to, DISCARD))
            .with_context(|| format!("cannot send the sentinel to {}", self.host.name()))?;
        Ok(())
    }

    fn await_sentinel(&self) -> Result<(), Invalid> {
        let why = match self.seen.recv_timeout(DEADLINE) {
            Ok(()) => return Ok(()),
            Err(RecvTimeoutError::Timeout) => format!("its end did not come within {DEADLINE:?}"),
            Err(RecvTimeoutError::Disconnected) => "it broke off before its end".to_owned(),
        };
        Err(self.invalid(&format!("{why}; {}", self.process.stderr().trim())))
    }

    fn finish(self) -> anyhow::Result<Taken> {
        let ending = self.process.ending()?;
        let said = self.process.stderr();
        let host = self.host.name();
        let tool = self.tool;
        let packets = match self.reading.join() {
            Ok(Ok(packets)) => packets,
            Ok(Err(error)) => return Err(Invalid::new(format!("{tool} on {host}: {error}")).into()),
            Err(_) => return Err(Invalid::new(format!("{tool} on {host}: unreadable")).into()),
        };
        match dropped(&said) {
            Some(0) => {}
            Some(count) => {
                let why = format!("{tool} on {host}: {count} packets dropped by kernel");
                return Err(Invalid::new(why).into());
            }
            None => {
                let why = format!("{tool} on {host} ended ({ending}) without its counts: {said}");
                return Err(Invalid::new(why).into());
            }
        }
        Ok(Taken {
            host: host.to_owned(),
            tool: tool.to_owned(),
            packets,
            snapshot_length: self.depth.snapshot_length(),
        })
    }

    fn invalid(&self, why: &str) -> Invalid {
        Invalid::new(format!("the capture on {} is not complete: {why}", self.host.name()))
    }
}

/// Runs tcpdump, or `lab sniff` where there is none or where `LAB_CAPTURE=sniff` asks for it.
fn spawn(
    host: &Host,
    lab: &Program,
    depth: Depth,
    end: OwnedFd,
) -> anyhow::Result<(&'static str, Process)> {
    let snapshot_length = depth.snapshot_length().to_string();
    if std::env::var("LAB_CAPTURE").as_deref() != Ok("sniff") {
        let ring = depth.ring_kib().to_string();
        let tcpdump = host
            .command(&Program::of_host("tcpdump"))
            .args(["-i", INTERFACE, "-n", "-U", "--immediate-mode", "-s", &snapshot_length])
            .args(["-B", &ring, "--time-stamp-precision=nano", "-w", "-"])
            // As root it would become another user, whom root without CAP_KILL could not stop.
            .args(if host.acts_as_root() { &["-Z", "root"][..] } else { &[] })
            .args([FILTER]);
        match tcpdump.stdout(end.try_clone()?).spawn() {
            Ok(process) => return Ok(("tcpdump", process)),
            Err(error) if is_missing(&error) => {}
            Err(error) => return Err(error),
        }
    }
    // The agent opens the packet socket and hands it over; we hand it on.
    let socket = super::sniff::open(host, INTERFACE)?;
    let args = ["sniff", "--descriptor", "3", "-i", INTERFACE, "-s", &snapshot_length];
    let sniff: Command<'_> = host.command(lab).args(args).descriptor(3, socket).stdout(end);
    Ok(("lab sniff", sniff.spawn()?))
}

fn is_missing(error: &anyhow::Error) -> bool {
    let cause = error.root_cause().downcast_ref::<std::io::Error>();
    cause.is_some_and(|cause| cause.kind() == std::io::ErrorKind::NotFound)
}

/// Reads packets as they come, until the capture ends; says when the sentinel has come.
fn read(source: File, sentinel: &str, saw: &Sender<()>) -> Result<Vec<Packet<'static>>, ReadError> {
    let mut reader = Reader::new(source)?;
    let mut packets = Vec::new();
    while let Some(packet) = reader.next_packet()? {
        match decode(0, &packet) {
            Decoded::Udp(datagram) if datagram.to.port() == DISCARD => {
                if datagram.payload == sentinel.as_bytes() {
                    let _ = saw.send(()); // nobody waits: the experiment was given up
                }
            }
            _ => packets.push(packet.into_owned()),
        }
    }
    Ok(packets)
}

/// "3 packets dropped by kernel"
fn dropped(said: &str) -> Option<u64> {
    let line = said.lines().find(|line| line.contains("dropped by kernel"))?;
    line.split_whitespace().next()?.parse().ok()
}

/// A number that no other capture has: time and a counter.
fn rand() -> u64 {
    use std::hash::{BuildHasher as _, RandomState};
    RandomState::new().hash_one(Ipv4Addr::LOCALHOST)
}
