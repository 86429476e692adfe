//! What a connection costs each server: `cargo bench --bench servers -- --help`.
//!
//! Every server is run in a network namespace of its own, pinned to one processor, the load on
//! another, over loopback. Rounds go over all servers in turn, so that what disturbs the machine for
//! a while disturbs all of them; the smallest of the rounds counts, by epoll-server's in the same
//! run. That one is measured twice: how far it differs from itself is what no difference may claim.

use std::fmt;
use std::io::IsTerminal as _;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use clap::Parser as _;
use nix::sched::{CpuSet, sched_getaffinity};
use nix::unistd::Pid;
use serde::Serialize;
use serverlab::lab::host::Host;
use serverlab::lab::network::Network;
use serverlab::lab::process::Process;
use serverlab::lab::program::Program;
use serverlab::{args, program};

mod args;
mod idle;
mod load;
mod meter;
mod report;
mod server;
mod trace;

use args::{Args, Count};
use load::{Load, Outcome};
use meter::{Group, Meter};
use report::{Row, Table};
use server::{Place, Server, YARDSTICK};

/// A shape of load.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Shape {
    clients: usize,
    requests: u64,
    idle: usize,
    connections: Option<u64>,
}

impl Default for Shape {
    fn default() -> Shape {
        Shape { clients: 1, requests: 1, idle: 0, connections: None }
    }
}

impl Shape {
    /// Whether requests count, not connections.
    fn kept(&self) -> bool {
        self.requests > 1
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} clients, {} requests of 1 KB a connection", self.clients, self.requests)
    }
}

/// How everything is measured.
#[derive(Debug)]
pub(crate) struct Bench {
    workers: u16,
    run: Duration,
    /// The server's processor and the load's.
    cpus: [usize; 2],
    group: Option<Group>,
}

/// Outside the range that clients get their ports from.
const PORT: u16 = 2000;
const PORT_RANGE: &str = "16384 65535";

fn main() -> anyhow::Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match words.first().map(String::as_str) {
        Some("@become") => {
            return Err(server::become_server(&serde_json::from_str(&words[1])?, &words[2..]));
        }
        Some("@load") => {
            let outcome = load::run(&serde_json::from_str(&words[1])?)?;
            println!("{}", serde_json::to_string(&outcome)?);
            return Ok(());
        }
        _ => {}
    }
    let args = Args::parse();
    let bench = Bench::new(&args)?;
    let mut found = Found::default();
    if args.idle {
        found.tables = bench.idle(&args);
        report::print_idle(&found.tables);
    } else {
        let servers = servers(&args);
        if args.calls != Count::Only {
            for shape in shapes(&args) {
                let table = bench.rounds(&shape, &servers, args.rounds);
                table.print();
                found.tables.push(table);
            }
        }
        if args.calls != Count::Never {
            found.calls = bench.calls(&servers);
            report::print_calls(&found.calls);
        }
    }
    if let Some(file) = &args.json {
        std::fs::write(file, serde_json::to_vec_pretty(&found)?)
            .with_context(|| format!("cannot write {}", file.display()))?;
    }
    Ok(())
}

/// All that was found, for `--json`.
#[derive(Default, Serialize)]
struct Found {
    tables: Vec<Table>,
    calls: Vec<(String, Result<trace::Calls, String>)>,
}

/// The yardstick twice, then those that were asked for.
fn servers(args: &Args) -> Vec<Server> {
    let asked = |server: &Server| {
        args.filter.is_empty() || args.filter.iter().any(|part| server.name.contains(part))
    };
    let yardstick = Server::named(YARDSTICK).into_iter().cycle().take(2);
    let others = Server::all().into_iter().filter(|server| server.name != YARDSTICK);
    yardstick.chain(others.filter(asked)).chain(args.against.iter().cloned()).collect()
}

fn shapes(args: &Args) -> Vec<Shape> {
    let once = args.clients.iter().map(|clients| Shape { clients: *clients, ..Shape::default() });
    let kept = Shape { clients: 15, requests: args.kept, ..Shape::default() };
    once.chain((args.kept > 1).then_some(kept)).collect()
}

/// On a terminal, one line that the next one replaces.
fn progress(text: &str) {
    if std::io::stderr().is_terminal() {
        eprint!("\r{text}\x1b[K");
    }
}

impl Bench {
    fn new(args: &Args) -> anyhow::Result<Bench> {
        let allowed = sched_getaffinity(Pid::from_raw(0))?;
        let mut cpus = (0..CpuSet::count()).filter(|cpu| allowed.is_set(*cpu).unwrap_or(false));
        let server = cpus.next().context("no processor")?;
        let load = if args.same_core { server } else { cpus.next().unwrap_or(server) };
        let group = Group::new();
        println!(
            "server on processor {server}, load on {load}; {} rounds of {} s; time by {}",
            args.rounds,
            args.seconds,
            match &group {
                Ok(group) => group.usage().display().to_string(),
                Err(error) => format!("/proc, in ticks of 10 ms ({error})"),
            }
        );
        let run = Duration::from_secs_f64(args.seconds);
        Ok(Bench { workers: args.workers, run, cpus: [server, load], group: group.ok() })
    }

    /// So many rounds over these servers, each begun by another one.
    fn rounds(&self, shape: &Shape, servers: &[Server], rounds: u16) -> Table {
        let row =
            |server: &Server| Row { name: server.name.clone(), rounds: Vec::new(), failure: None };
        let mut table = Table { shape: shape.clone(), rows: servers.iter().map(row).collect() };
        for round in 0..usize::from(rounds) {
            for turn in 0..servers.len() {
                let place = (round + turn) % servers.len();
                let row = &mut table.rows[place];
                match self.measure(&servers[place], shape, &[], |_, _| {}) {
                    Ok(outcome) => row.rounds.push(outcome),
                    Err(error) => row.failure = Some(format!("{error:#}")),
                }
                progress(&format!("{shape}: round {} of {rounds}, {}", round + 1, row.name));
            }
        }
        progress("");
        table
    }

    fn calls(&self, servers: &[Server]) -> Vec<(String, Result<trace::Calls, String>)> {
        if !trace::is_possible() {
            println!("\nSystem calls are not counted: there is no strace");
            return Vec::new();
        }
        let once = servers.iter().skip(1); // the yardstick is there twice
        let count = |server: &Server| trace::calls(self, server).map_err(|e| format!("{e:#}"));
        once.map(|server| (server.name.clone(), count(server))).collect()
    }

    fn idle(&self, args: &Args) -> Vec<Table> {
        let names = ["select", "poll", "epoll", "epoll-edge", "io-uring", "tokio"];
        let servers: Vec<Server> =
            names.iter().filter_map(|name| Server::named(&format!("{name}-server"))).collect();
        let table = |idle| {
            let shape = Shape { idle, requests: u64::MAX, ..Shape::default() };
            // A select-server has no room for more (FD_SETSIZE).
            let servers = if idle > 1000 { &servers[1..] } else { &servers };
            self.rounds(&shape, servers, args.rounds)
        };
        [0, 100, 1_000, 10_000].map(table).into()
    }

    /// One server, once: in a network of its own, which takes its connections in TIME_WAIT with it.
    pub(crate) fn measure(
        &self,
        server: &Server,
        shape: &Shape,
        tracer: &[String],
        then: impl FnOnce(&Host, &Process),
    ) -> anyhow::Result<Outcome> {
        let lab = program!("lab");
        let network = Network::for_load(lab.path().context("it is ours")?, &["server"])?;
        let host = network.host("server");
        host.write("/proc/sys/net/ipv4/ip_local_port_range", PORT_RANGE)?;
        let [cpu, load_cpu] = self.cpus;
        let place = Place { cpu, members: self.group.as_ref().map(Group::members) };
        let process = server.start(host, PORT, self.workers, &place, tracer)?;
        let load = Load {
            port: PORT,
            clients: shape.clients,
            requests: shape.requests,
            idle: shape.idle,
            connections: shape.connections,
            warm_up: Duration::from_millis(150),
            run: self.run,
            cpu: load_cpu,
            meter: match &self.group {
                Some(group) => Meter::Group(group.usage()),
                None => Meter::Tree(process.pid()),
            },
        };
        let before = host.counters()?;
        let itself = Program::file(std::env::current_exe()?);
        let client = host.run(&itself, args!["@load", serde_json::to_string(&load)?])?;
        let (said, after) = (client.stdout(), host.counters()?);
        ensure!(process.ended().is_none(), "the server has ended: {:?}", process.ended());
        then(host, &process);
        let mut outcome: Outcome =
            serde_json::from_str(&said).with_context(|| client.stderr().trim().to_owned())?;
        outcome.listen_overflows = after.since(&before, "TcpExtListenOverflows")?;
        outcome.timeouts = after.since(&before, "TcpExtTCPTimeouts")?;
        Ok(outcome)
    }
}
