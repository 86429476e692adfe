//! What the client needs and is not about: its flags, how it connects, the record of each request
//! that its children leave in shared memory, and the summary that is made of them.

use std::collections::BTreeMap;
use std::fmt::{self, Display};
use std::io::{IsTerminal as _, Write as _};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs as _};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::Context as _;
use hdrhistogram::Histogram;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::socket::sockopt::{ReceiveTimeout, SendTimeout};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrStorage, setsockopt, socket};
use nix::sys::time::TimeVal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use serde::Serialize;

use crate::net::args::seconds;
use crate::net::listen::name;
use crate::net::shared::Counters;

/// Asks a server for bytes, again and again, from many processes, and counts what comes of it
#[derive(clap::Parser, Debug)]
#[command(name = "client", version)]
pub struct ClientArgs {
    /// Name or address of the server's host
    #[arg(short = 'i', long, default_value = "127.0.0.1", value_name = "HOST")]
    pub host: String,

    /// Port of the server
    #[arg(short, long, default_value_t = 2000)]
    pub port: u16,

    /// Clients at once, a process each
    #[arg(short, long, default_value = "1", value_name = "N", value_parser = at_least_one)]
    pub clients: usize,

    /// Connections that each client makes, one after another
    #[arg(short = 't', long = "requests", default_value = "1", value_name = "N",
          value_parser = at_least_one)]
    pub connections: usize,

    /// Bytes to ask for
    #[arg(short, long, default_value_t = 1024, value_name = "N")]
    pub bytes: u64,

    /// Requests on each connection
    #[arg(short, long, default_value = "1", value_name = "N", value_parser = at_least_one)]
    pub keep: usize,

    /// Give a request up after this long
    #[arg(long, default_value = "30", value_name = "SECONDS", value_parser = seconds)]
    pub timeout: Duration,

    /// Print the summary as JSON
    #[arg(long)]
    pub json: bool,
}

fn at_least_one(text: &str) -> Result<usize, String> {
    match text.parse::<u32>() {
        Ok(0) => Err("at least 1".to_owned()),
        Ok(count) => Ok(count as usize),
        Err(error) => Err(error.to_string()),
    }
}

/// The addresses of the server, by name or as they are.
///
/// # Errors
/// Says which name is not known.
pub fn resolve(args: &ClientArgs) -> anyhow::Result<Vec<SocketAddr>> {
    let host = args.host.trim_start_matches('[').trim_end_matches(']');
    let addresses = (host, args.port).to_socket_addrs();
    let addresses = addresses.with_context(|| format!("no address is known for `{host}`"))?;
    Ok(addresses.collect())
}

/// Connects to the first of these addresses that answers. Its receives and sends, like connect(2)
/// itself, fail with EAGAIN (EINPROGRESS) after the time-out.
///
/// # Errors
/// Why the last address did not answer.
pub fn connect(addresses: &[SocketAddr], timeout: Duration) -> Result<TcpStream, Failure> {
    let mut failure = Failure::Errno(Errno::EADDRNOTAVAIL);
    for address in addresses {
        match connect_to(*address, timeout) {
            Ok(connection) => return Ok(connection),
            Err(errno) => failure = errno.into(),
        }
    }
    Err(failure)
}

fn connect_to(address: SocketAddr, timeout: Duration) -> nix::Result<TcpStream> {
    let family = if address.is_ipv6() { AddressFamily::Inet6 } else { AddressFamily::Inet };
    let socket = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    // A zero would mean to wait for ever.
    let timeout = timeout.max(Duration::from_micros(1));
    let limit = TimeVal::new(timeout.as_secs() as i64, i64::from(timeout.subsec_micros()));
    setsockopt(&socket, ReceiveTimeout, &limit)?;
    setsockopt(&socket, SendTimeout, &limit)?;
    nix::sys::socket::connect(socket.as_raw_fd(), &SockaddrStorage::from(address))?;
    Ok(TcpStream::from(socket))
}

/// How a request went: the time it took, or why it failed.
pub type Outcome = Result<Duration, Failure>;

/// Why a request failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// A system call failed.
    Errno(Errno),
    /// The server closed before the whole answer had come.
    ShortAnswer,
    /// More came than was asked for.
    LongAnswer,
    /// `--timeout` ran out.
    TimedOut,
    /// The child ended before it got to this request.
    NotMade,
}

impl Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Errno(errno) => name(*errno).fmt(f),
            Failure::ShortAnswer => f.write_str("short-answer"),
            Failure::LongAnswer => f.write_str("long-answer"),
            Failure::TimedOut => f.write_str("timed-out"),
            Failure::NotMade => f.write_str("not-made"),
        }
    }
}

impl From<Errno> for Failure {
    /// EAGAIN, and EINPROGRESS from connect(2), are how a blocking socket says that SO_RCVTIMEO or
    /// SO_SNDTIMEO ran out (socket(7)).
    fn from(errno: Errno) -> Failure {
        match errno {
            Errno::EAGAIN | Errno::EINPROGRESS => Failure::TimedOut,
            errno => Failure::Errno(errno),
        }
    }
}

/// A record for each request of each child, in memory they share: no pipe that could fill up, and
/// nothing lost with a child that is killed.
#[derive(Debug)]
pub struct Board {
    records: Counters,
    each: usize,
}

/// A record is 0 before its request was made, then its nanoseconds times two, or its failure's
/// code times two, plus one.
impl Board {
    /// Records for so many clients of so many requests each.
    ///
    /// # Errors
    /// ENOMEM when there is no memory for so many.
    pub fn new(clients: usize, each: usize) -> nix::Result<Board> {
        let records = clients.checked_mul(each).ok_or(Errno::ENOMEM)?;
        Ok(Board { records: Counters::new(records)?, each })
    }

    /// Records how request `number` of `client` went.
    pub fn record(&self, client: usize, number: usize, outcome: Outcome) {
        let record = match outcome {
            Ok(time) => u64::try_from(time.as_nanos()).unwrap_or(u64::MAX >> 1).max(1) << 1,
            Err(Failure::Errno(errno)) => (errno as u64) << 3 | 1,
            Err(Failure::ShortAnswer) => 1 << 1 | 1,
            Err(Failure::LongAnswer) => 2 << 1 | 1,
            Err(Failure::TimedOut) => 3 << 1 | 1,
            Err(Failure::NotMade) => 0,
        };
        self.records[client * self.each + number].store(record, Ordering::Relaxed);
    }

    fn outcomes(&self) -> impl Iterator<Item = Outcome> {
        self.records.iter().map(|record| match record.load(Ordering::Relaxed) {
            0 => Err(Failure::NotMade),
            time if time & 1 == 0 => Ok(Duration::from_nanos(time >> 1)),
            3 => Err(Failure::ShortAnswer),
            5 => Err(Failure::LongAnswer),
            7 => Err(Failure::TimedOut),
            errno => Err(Failure::Errno(Errno::from_raw((errno >> 3) as i32))),
        })
    }

    /// How many requests have been made so far, of how many.
    pub fn progress(&self) -> (usize, usize) {
        let made = |record: &&AtomicU64| record.load(Ordering::Relaxed) != 0;
        (self.records.iter().filter(made).count(), self.records.len())
    }

    /// What came of all of them, `took` after the first child started.
    pub fn summary(&self, bytes: u64, took: Duration) -> Summary {
        let mut times = Histogram::<u64>::new(3).expect("3 digits are within its limits");
        let mut failures = BTreeMap::new();
        for outcome in self.outcomes() {
            match outcome {
                Ok(time) => times += time.as_nanos() as u64,
                Err(failure) => *failures.entry(failure.to_string()).or_insert(0) += 1,
            }
        }
        let micros = |nanos: u64| nanos as f64 / 1e3;
        Summary {
            requests: self.records.len() as u64,
            answered: times.len(),
            failed: failures.values().sum(),
            failures,
            bytes_each: bytes,
            seconds: took.as_secs_f64(),
            answers_per_second: times.len() as f64 / took.as_secs_f64(),
            p50_us: micros(times.value_at_quantile(0.5)),
            p90_us: micros(times.value_at_quantile(0.9)),
            p99_us: micros(times.value_at_quantile(0.99)),
            p999_us: micros(times.value_at_quantile(0.999)),
            max_us: micros(times.max()),
        }
    }
}

/// Waits until every child has ended, and ends them when SIGINT or SIGTERM comes. Shows progress on
/// standard error if that is a terminal. SIGCHLD, SIGINT and SIGTERM are blocked, `signals` are they.
///
/// # Errors
/// signalfd(2)'s.
pub fn watch(mut children: Vec<Pid>, signals: &SigSet, board: &Board) -> nix::Result<()> {
    let signals = SignalFd::with_flags(signals, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;
    let terminal = std::io::stderr().is_terminal();
    let pause = if terminal { PollTimeout::from(200u8) } else { PollTimeout::NONE };
    while !children.is_empty() {
        let _ = poll(&mut [PollFd::new(signals.as_fd(), PollFlags::POLLIN)], pause);
        while let Some(signal) = signals.read_signal()? {
            if signal.ssi_signo != Signal::SIGCHLD as u32 {
                for child in &children {
                    let _ = kill(*child, Signal::SIGKILL); // ESRCH: it has just ended
                }
            }
        }
        while let Ok(status) = waitpid(None::<Pid>, Some(WaitPidFlag::WNOHANG)) {
            if status == WaitStatus::StillAlive {
                break;
            }
            children.retain(|child| status.pid() != Some(*child));
        }
        if terminal {
            let (made, of) = board.progress();
            let end = if children.is_empty() { "\n" } else { "" };
            let _ = write!(std::io::stderr(), "\r{made} of {of} requests{end}");
        }
    }
    Ok(())
}

/// What came of a run; `--json` prints its fields.
#[derive(Debug, Serialize)]
pub struct Summary {
    /// Requests asked for: clients, times connections, times requests on each.
    pub requests: u64,
    /// Requests answered with as many bytes as asked for.
    pub answered: u64,
    /// All others.
    pub failed: u64,
    /// The others by reason: an errno, or one of this program's words.
    pub failures: BTreeMap<String, u64>,
    /// Bytes of an answer.
    pub bytes_each: u64,
    /// From before the first fork until after the last child.
    pub seconds: f64,
    /// `answered` by `seconds`.
    pub answers_per_second: f64,
    /// Half of the answers took no longer, from connect or, on a kept connection, from send to the
    /// last byte.
    pub p50_us: f64,
    /// The ninetieth percentile.
    pub p90_us: f64,
    /// The ninety-ninth.
    pub p99_us: f64,
    /// 999 in a thousand.
    pub p999_us: f64,
    /// The slowest answer.
    pub max_us: f64,
}

impl Summary {
    /// The fields as one line of JSON.
    pub fn json(&self) -> String {
        serde_json::to_string(self).expect("numbers and strings always have a JSON form")
    }
}

impl Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Summary { requests, answered, bytes_each, seconds, answers_per_second: rate, .. } =
            self;
        write!(f, "{answered} of {requests} answers of {bytes_each} bytes in {seconds:.3} s")?;
        if *answered > 0 {
            let Summary { p50_us, p90_us, p99_us, p999_us, max_us, .. } = self;
            write!(
                f,
                ": {rate:.0}/s\nmicroseconds: p50 {p50_us:.0}, p90 {p90_us:.0}, p99 {p99_us:.0}, \
                 p99.9 {p999_us:.0}, longest {max_us:.0}"
            )?;
        }
        if self.failed > 0 {
            write!(f, "\n{} failed:", self.failed)?;
            for (reason, count) in &self.failures {
                write!(f, " {count} {reason}{}", hint(reason))?;
            }
        }
        Ok(())
    }
}

fn hint(reason: &str) -> &'static str {
    match reason {
        "ECONNREFUSED" => " (nobody listens there)",
        "EADDRNOTAVAIL" => " (no local port is left: net.ipv4.ip_local_port_range)",
        "EMFILE" => " (too many descriptors: ulimit -n)",
        "not-made" => " (their connection or their client ended early)",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_outcome_reads_back() {
        let outcomes = [
            Ok(Duration::from_nanos(1)),
            Ok(Duration::from_secs(3600)),
            Err(Failure::Errno(Errno::EPERM)),
            Err(Failure::Errno(Errno::ECONNREFUSED)),
            Err(Failure::ShortAnswer),
            Err(Failure::LongAnswer),
            Err(Failure::TimedOut),
            Err(Failure::NotMade),
        ];
        let board = Board::new(2, 4).unwrap();
        for (at, outcome) in outcomes.iter().enumerate() {
            board.record(at / 4, at % 4, *outcome);
        }
        assert!(board.outcomes().eq(outcomes));
        assert_eq!(board.progress(), (7, 8));
    }

    #[test]
    fn a_summary_counts_every_request_once() {
        let board = Board::new(1, 4).unwrap();
        board.record(0, 0, Ok(Duration::from_micros(100)));
        board.record(0, 1, Err(Failure::ShortAnswer));
        board.record(0, 2, Err(Failure::ShortAnswer));
        let summary = board.summary(1024, Duration::from_secs(2));
        assert_eq!((summary.requests, summary.answered, summary.failed), (4, 1, 3));
        assert_eq!(summary.failures["short-answer"], 2);
        assert_eq!(summary.failures["not-made"], 1);
        assert_eq!(summary.answers_per_second, 0.5);
    }
}
