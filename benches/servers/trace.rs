//! System calls a connection, by strace, in runs of their own: nothing is timed here.
//!
//! A server is traced twice, for few connections and for many. What the second run has more is what
//! the connections took: its start and its end cost the same both times.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use nix::sys::signal::Signal;
use serde::Serialize;
use serverlab::lab::wait;

use super::server::Server;
use super::{Bench, Shape};

const FEW: u64 = 200;
const MANY: u64 = 1200;

/// How often each system call is made for a connection.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct Calls(pub(crate) BTreeMap<String, f64>);

impl Calls {
    pub(crate) fn sum(&self) -> f64 {
        self.0.values().sum()
    }

    /// The calls that are made for at least every fiftieth connection, the most frequent first.
    pub(crate) fn list(&self) -> String {
        let mut calls: Vec<_> = self.0.iter().filter(|(_, count)| **count >= 0.02).collect();
        calls.sort_by(|a, b| b.1.total_cmp(a.1));
        let calls: Vec<_> =
            calls.iter().map(|(name, count)| format!("{name} {count:.2}")).collect();
        calls.join(", ")
    }
}

/// Whether there is a strace.
pub(crate) fn is_possible() -> bool {
    let version = Command::new("strace").arg("-V").stdout(Stdio::null()).status();
    version.is_ok_and(|status| status.success())
}

/// Counts the calls of this server, with 15 clients.
pub(crate) fn calls(bench: &Bench, server: &Server) -> anyhow::Result<Calls> {
    let (few, many) = (counted(bench, server, FEW)?, counted(bench, server, MANY)?);
    let more = |(name, count): (String, i64)| {
        let more = count - few.get(&name).copied().unwrap_or(0);
        (name, more as f64 / (MANY - FEW) as f64)
    };
    Ok(Calls(many.into_iter().map(more).filter(|(_, more)| *more > 0.0).collect()))
}

fn counted(
    bench: &Bench,
    server: &Server,
    connections: u64,
) -> anyhow::Result<BTreeMap<String, i64>> {
    let folder = tempfile::tempdir()?;
    let report = folder.path().join("calls");
    let strace = ["strace", "-f", "-c", "-o"].map(str::to_owned).into_iter();
    let tracer: Vec<String> = strace.chain([report.to_string_lossy().into_owned()]).collect();
    let shape = Shape { clients: 15, connections: Some(connections), ..Shape::default() };
    let mut ended = Ok(());
    let outcome = bench.measure(server, &shape, &tracer, |host, strace| {
        ended = end(host, strace);
    })?;
    ended?;
    let done = outcome.connections;
    ensure!(done == connections, "{done} of {connections} connections: {:?}", outcome.first_error);
    read(&report)
}

/// Ends the traced server, whoever of it goes on without its parent, and so strace.
fn end(
    host: &serverlab::lab::host::Host,
    strace: &serverlab::lab::process::Process,
) -> anyhow::Result<()> {
    let traced = host.processes_of(strace)?;
    for process in traced.iter().filter(|process| process.pid != strace.pid()) {
        let _ = host.signal(process.pid, Signal::SIGTERM); // ESRCH: it has ended with its parent
    }
    wait::until("the end of strace", Duration::from_secs(10), || Ok(strace.ended()))?;
    Ok(())
}

/// strace's table: percent, seconds, microseconds a call, calls, errors (if any), name.
fn read(report: &Path) -> anyhow::Result<BTreeMap<String, i64>> {
    let text = std::fs::read_to_string(report).context("strace left no report")?;
    let row = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let (calls, name) = (fields.get(3)?.parse().ok()?, *fields.last()?);
        (name != "total").then(|| (name.to_owned(), calls))
    };
    Ok(text.lines().filter_map(row).collect())
}
