//! Which worker gets the connections, and that everybody agrees on it.
//!
//! Three witnesses: the counters that workers share (printed when the server drains), the event line
//! that a worker prints for each connection, and the flows of the capture, each told from the others
//! by its client's port. They must agree for every worker, not only in sum.

mod common;

use std::collections::BTreeMap;

use common::callers::Callers;
use common::pool::{EPOLL, Pool};
use rstest::rstest;
use serverlab::lab::capture::Depth;
use serverlab::lab::experiment::Lab;
use serverlab::lab::host::Family;
use serverlab::lab::process::{Ending, Process};
use serverlab::lab::program::Program;
use serverlab::lab::verdict::Verdict;
use serverlab::lab::wire::Wire;
use serverlab::{args, experiment, program};

/// Workers of each pool.
const WORKERS: usize = 10;

/// Connections that come one at a time.
const SPACED: usize = 40;

/// Connections by worker.
type Shares = BTreeMap<usize, u64>;

/// What the three witnesses say after the server has drained.
#[derive(Debug)]
struct Witnesses {
    counters: Shares,
    sum: u64,
    lines: Shares,
    /// The client's port of each connection, and its worker, as event lines have it.
    ports: BTreeMap<u16, usize>,
    /// The processes that printed lines for each worker.
    pids: BTreeMap<usize, Vec<u32>>,
}

impl Witnesses {
    fn hear(server: &Process) -> anyhow::Result<Witnesses> {
        let mut heard = Witnesses {
            counters: Shares::new(),
            sum: 0,
            lines: (0..WORKERS).map(|worker| (worker, 0)).collect(),
            ports: BTreeMap::new(),
            pids: BTreeMap::new(),
        };
        for event in server.events() {
            let number = |key| event.get(key).and_then(|value| value.parse::<u64>().ok());
            let worker = number("worker").map(|worker| worker as usize);
            match (event.verb.as_str(), worker) {
                ("served", Some(worker)) => {
                    heard.counters.insert(worker, number("connections").unwrap_or(0));
                }
                ("served", None) => heard.sum = number("sum").unwrap_or(0),
                ("accepted", Some(worker)) => {
                    *heard.lines.entry(worker).or_default() += 1;
                    let peer: Option<std::net::SocketAddr> =
                        event.get("peer").and_then(|peer| peer.parse().ok());
                    heard.ports.extend(peer.map(|peer| (peer.port(), worker)));
                    let pids = heard.pids.entry(worker).or_default();
                    if !pids.contains(&event.pid) {
                        pids.push(event.pid);
                    }
                }
                _ => {}
            }
        }
        Ok(heard)
    }

    /// The connections of the capture, by the worker whose line has the same client's port.
    fn flows(&self, wire: &Wire, port: u16) -> anyhow::Result<Shares> {
        let mut shares: Shares = (0..WORKERS).map(|worker| (worker, 0)).collect();
        for flow in wire.at("server").to_port(port) {
            let from = flow.facts.client.port();
            let worker = self.ports.get(&from);
            let worker = worker.ok_or_else(|| anyhow::anyhow!("no worker told of port {from}"))?;
            *shares.entry(*worker).or_default() += 1;
        }
        Ok(shares)
    }

    fn claim_agreement(&self, lab: &Lab, wire: &Wire, port: u16, made: u64) -> anyhow::Result<()> {
        lab.claim_eq(format!("the counters' sum is {made}, the connections made"), self.sum, made);
        let counters: u64 = self.counters.values().sum();
        lab.claim_eq("and the sum of what they say of each worker", counters, made);
        lab.claim_eq("the event lines agree, worker by worker", &self.lines, &self.counters);
        let flows = self.flows(wire, port)?;
        lab.claim_eq("the flows of the capture agree, worker by worker", &flows, &self.counters);
        Ok(())
    }

    /// Pearson's chi-square against equal shares.
    fn chi_square(&self) -> f64 {
        let expected = self.sum as f64 / WORKERS as f64;
        self.counters.values().map(|share| (*share as f64 - expected).powi(2) / expected).sum()
    }
}

/// 45.1: a chi-square with 9 degrees of freedom is above it once in a million times.
const ONCE_IN_A_MILLION: f64 = 45.1;

fn drain(server: &Process) -> anyhow::Result<Verdict> {
    let ending = server.terminate()?;
    Ok(match ending {
        Ending::Exit(0) => Verdict::Pass,
        other => Verdict::Fail(format!("it ended by {other}")),
    })
}

#[rstest]
fn every_witness_agrees(
    #[values(
        program!("prefork-accept-server"),
        program!("prefork-select-server"),
        program!("prefork-flock-server"),
        program!("prefork-mutex-server"),
        program!("prefork-fdpass-server"),
        program!("prefork-epoll-server"),
        program!("prefork-epoll-exclusive-server"),
        program!("prefork-reuseport-server"),
        program!("prethread-accept-server"),
        program!("prethread-mutex-server"),
        program!("prethread-queue-server")
    )]
    server: Program,
    #[values(1, 15, 64)] clients: usize,
) {
    let case = format!("{server}-{clients}");
    experiment!(case, "Who served how many, by counters, event lines and packets?", |lab| {
        let each = if clients == 1 { 60 } else { 320 / clients };
        let made = (clients * each) as u64;
        let (host, port) = (lab.server().address(Family::V4), lab.port()?);
        let running = lab.server().spawn(&server, args!["-i", host, "-p", port, "-n", WORKERS])?;
        running.event("listening")?;
        until_it_accepts(lab, &running)?;
        let capture = lab.capture_deep(Depth::Headers)?;
        let client = lab
            .client()
            .run(&program!("client"), args!["-i", host, "-p", port, "-c", clients, "-t", each])?;
        let answered = client.ending()? == Ending::Exit(0);
        let said = client.stdout();
        let all = if answered { Verdict::Pass } else { Verdict::Fail(said) };
        lab.claim(format!("{clients} clients, {each} connections each: all answered"), all);
        lab.claim("SIGTERM: it drains, and prints who served how many", drain(&running)?);
        let wire = capture.finish()?;
        let heard = Witnesses::hear(&running)?;
        heard.claim_agreement(lab, &wire, port, made)?;
        let alone = heard.pids.values().all(|pids| pids.len() == 1);
        lab.claim("each worker's lines come from one process", alone);
        if server.name() == "prefork-reuseport-server" {
            let seen = heard.chi_square();
            lab.claim(
                format!(
                    "the hash spreads them evenly: chi-square {seen:.1} of {:?} is below \
                     {ONCE_IN_A_MILLION} (9 degrees of freedom, once in a million)",
                    heard.counters.values().collect::<Vec<_>>()
                ),
                seen < ONCE_IN_A_MILLION,
            );
        }
        Ok(())
    });
}

/// Waits until every process and thread is asleep: all workers are there.
fn until_it_accepts(lab: &Lab, server: &Process) -> anyhow::Result<()> {
    until_all_sleep(lab, server, WORKERS)
}

/// Waits until there are so many processes and threads at least, and all are asleep.
fn until_all_sleep(lab: &Lab, server: &Process, tasks: usize) -> anyhow::Result<()> {
    let patience = serverlab::lab::process::DEADLINE;
    serverlab::lab::wait::until("all workers asleep", patience, || {
        let processes = lab.server().processes_of(server)?;
        let there = processes.iter().map(|seen| seen.tasks.len()).sum::<usize>() >= tasks;
        Ok((there && processes.iter().all(serverlab::lab::procfs::Seen::is_asleep)).then_some(()))
    })
}

/// What each of ten workers gets of forty connections that come when all are idle.
#[rstest]
#[case::accept_takes_turns("prefork-accept-server", &[], Spread::Even)]
#[case::threads_in_accept_take_turns("prethread-accept-server", &[], Spread::Even)]
#[case::epollexclusive_favours_one("prefork-epoll-exclusive-server", &[], Spread::One)]
#[case::round_robin_as_asked("prefork-fdpass-server", &["--assign", "round-robin"], Spread::InOrder)]
#[case::first_free_as_asked("prefork-fdpass-server", &["--assign", "first-free"], Spread::First)]
fn idle_workers(#[case] server: &str, #[case] flags: &[&str], #[case] spread: Spread) {
    let case =
        format!("{server}{}", flags.last().map(|flag| format!("-{flag}")).unwrap_or_default());
    experiment!(case, "Which worker gets a connection when all are idle?", |lab| {
        let (server, waits) = idle(server);
        let pool = Pool::start(lab, &server, WORKERS, flags, waits)?;
        let capture = lab.capture_deep(Depth::Headers)?;
        pool.spaced(SPACED)?;
        lab.claim("SIGTERM: it drains, and prints who served how many", drain(&pool.server)?);
        let wire = capture.finish()?;
        let heard = Witnesses::hear(&pool.server)?;
        heard.claim_agreement(lab, &wire, pool.port, SPACED as u64)?;
        let shares: Vec<u64> = heard.counters.values().copied().collect();
        let order = heard_order(&pool.server);
        let (sentence, holds) = spread.judge(&shares, &order);
        let detail = || format!("shares {shares:?}, in the order {order:?}");
        lab.claim(sentence, if holds { Verdict::Pass } else { Verdict::Fail(detail()) });
        Ok(())
    });
}

/// Loops of `reactors-server`.
const LOOPS: usize = 4;

/// A lasting connection for each of the loops but the last, then ten that come and go, then two that
/// last: what each loop got.
fn reactors(lab: &Lab, flags: &[&str]) -> anyhow::Result<Vec<u64>> {
    let (host, port) = (lab.server().address(Family::V4), lab.port()?);
    let command = lab.server().command(&program!("reactors-server"));
    let server = command.args(args!["-i", host, "-p", port, "-n", LOOPS]).args(flags).spawn()?;
    server.event("listening")?;
    let callers = Callers::new(lab.client(), (host, port), serverlab::lab::process::DEADLINE);
    let mut lasting = Vec::new();
    let mut stay = |more: usize| -> anyhow::Result<()> {
        for _ in 0..more {
            let mut caller = callers.connect()?;
            caller.say("1\n")?;
            caller.hear(1)?;
            lasting.push(caller);
        }
        Ok(())
    };
    stay(LOOPS - 1)?;
    for gone in 1..=10 {
        callers.ask(1)?;
        server.events_of("closed", gone)?;
        until_all_sleep(lab, &server, LOOPS)?; // a loop counts down after it has told
    }
    stay(2)?;
    drop(lasting);
    server.events_of("closed", LOOPS + 11)?;
    drain(&server)?;
    Ok(Witnesses::hear(&server)?.counters.into_values().collect())
}

#[rstest]
fn reactors_get_what_their_policy_says() {
    experiment!("", "Which event loop gets a connection, by turns and by load?", |lab| {
        lab.claim_eq(
            "round robin: fifteen connections, whether they last or not, go round",
            reactors(lab, &["--assign", "round-robin"])?,
            [4, 4, 4, 3],
        );
        let least = ["--assign", "least-connections"];
        lab.claim_eq(
            "least connections: three last, so the fourth loop gets the ten that come and go, and \
             one more that lasts; then all are equal, and the first is next",
            reactors(lab, &least)?,
            [2, 1, 1, 11],
        );
        let broken = reactors(lab, &[&least[..], &["--bug", "leak-count"]].concat())?;
        lab.claim(
            format!("control: --bug leak-count takes those who have gone for load: {broken:?}"),
            broken != [2, 1, 1, 11],
        );
        Ok(())
    });
}

/// What is expected of idle workers.
#[derive(Clone, Copy, Debug)]
enum Spread {
    Even,
    One,
    InOrder,
    First,
}

impl Spread {
    fn judge(self, shares: &[u64], order: &[usize]) -> (String, bool) {
        let even = shares.iter().all(|share| *share == (SPACED / WORKERS) as u64);
        match self {
            Spread::Even => {
                ("every worker served four: whoever has waited longest is next".into(), even)
            }
            Spread::One => {
                let one = shares.iter().filter(|share| **share > 0).count() == 1;
                ("one worker served them all".into(), one)
            }
            Spread::InOrder => {
                let cyclic = order.iter().enumerate().all(|(at, worker)| *worker == at % WORKERS);
                ("round robin: 0, 1, 2 ... 9, 0, 1 ...: four each".into(), even && cyclic)
            }
            Spread::First => {
                let first = order.iter().all(|worker| *worker == 0);
                ("first free: worker 0 served them all".into(), first)
            }
        }
    }
}

/// The program, and the calls in which its idle workers wait.
fn idle(server: &str) -> (Program, &'static [i64]) {
    match server {
        "prefork-accept-server" => (program!("prefork-accept-server"), &[libc::SYS_accept4]),
        "prethread-accept-server" => (program!("prethread-accept-server"), &[libc::SYS_accept4]),
        "prefork-fdpass-server" => (program!("prefork-fdpass-server"), &[libc::SYS_recvmsg]),
        "prefork-epoll-exclusive-server" => (program!("prefork-epoll-exclusive-server"), EPOLL),
        other => panic!("it is not said what {other} waits in"),
    }
}

/// The workers in the order in which they accepted.
fn heard_order(server: &Process) -> Vec<usize> {
    let events = server.events();
    let accepted = events.iter().filter(|event| event.verb == "accepted");
    accepted.filter_map(|event| event.get("worker")?.parse().ok()).collect()
}
