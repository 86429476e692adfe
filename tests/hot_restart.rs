//! A server makes room for its successor while clients come: who loses nobody, and who does.
//!
//! A listener's queue belongs to the socket, not to a process. As long as somebody has the socket
//! open and nobody shuts it down, clients may connect and wait, whether a server runs or not. So
//! what matters is whether old and new server have the same socket: by inheritance through exec, by
//! SCM_RIGHTS, from a starter that keeps it (LISTEN_FDS). With a listener of its own, by bind(2)
//! after close(2) or by SO_REUSEPORT, the new server has a new queue, and the old one is reset,
//! unless the kernel moves it (net.ipv4.tcp_migrate_req, Linux 5.14).

mod common;

use std::os::fd::OwnedFd;
use std::time::Duration;

use common::callers::{Caller, Callers, End};
use common::play::Sysctl;
use common::starter::{self, BECOME};
use nix::sys::signal::Signal;
use rstest::rstest;
use serverlab::lab::capture::Depth;
use serverlab::lab::experiment::{Lab, require};
use serverlab::lab::flow::Side;
use serverlab::lab::host::Family;
use serverlab::lab::process::{Ending, Process};
use serverlab::lab::sockets::TcpState;
use serverlab::lab::verdict::Verdict;
use serverlab::lab::wait::until;
use serverlab::lab::wire::Wire;
use serverlab::{args, experiment, program};

/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// Clients that wait in the old server's queue.
const QUEUED: usize = 5;

/// A starter's listener, and its port.
fn starters_listener(lab: &Lab, family: Family) -> anyhow::Result<(OwnedFd, u16)> {
    let port = lab.port()?;
    Ok((starter::listener(lab, family, port)?, port))
}

/// Starts a server with this listener.
fn start(lab: &Lab, listener: &OwnedFd, script: &str, flags: &[&str]) -> anyhow::Result<Process> {
    starter::command(lab, listener, script)?.args(flags).spawn()
}

/// Clients around a server that is busy with one of them.
struct Waiting {
    /// Who keeps the old server busy.
    held: Caller,
    /// Who wait in its queue, their requests sent.
    queue: Vec<Caller>,
}

impl Waiting {
    fn begin(lab: &Lab, callers: &Callers<'_>, port: u16) -> anyhow::Result<Waiting> {
        let held = callers.connect()?;
        until("an accepted connection", PATIENCE, || {
            let rows = lab.server().tcp_sockets()?;
            let accepted = rows.iter().any(|row| held.is_peer_of(row) && row.inode != 0);
            Ok(accepted.then_some(()))
        })?;
        let mut queue = Vec::new();
        for _ in 0..QUEUED {
            let mut caller = callers.connect()?;
            caller.say("10\n")?;
            queue.push(caller);
        }
        until_queued(lab, port, QUEUED)?;
        Ok(Waiting { held, queue })
    }

    /// What became of those in the queue: how many were answered, how many reset.
    fn outcome(&mut self) -> anyhow::Result<(usize, usize)> {
        let (mut answered, mut reset) = (0, 0);
        for caller in &mut self.queue {
            if caller.hear(10).is_ok() {
                answered += 1;
                caller.finish()?; // the next in the queue is waiting
            } else if matches!(caller.end(), Ok(End::Rst | End::Fin)) {
                reset += 1; // the first receive has told ECONNRESET, this one tells the end
            }
        }
        Ok((answered, reset))
    }
}

/// Waits until so many connections wait at this port to be accepted, in all listeners.
fn until_queued(lab: &Lab, port: u16, count: usize) -> anyhow::Result<()> {
    until(&format!("{count} clients in the queue"), PATIENCE, || {
        let rows = lab.server().tcp_sockets()?.into_iter();
        let ours = rows.filter(|row| row.local.port() == port && row.state == TcpState::Listen);
        let queued: usize = ours.map(|row| row.receive_queue as usize).sum();
        Ok((queued == count).then_some(()))
    })
}

/// RSTs that the server's side sent, and those that the host's kernel has counted.
fn resets(
    lab: &Lab,
    wire: &Wire,
    port: u16,
    before: &serverlab::lab::counters::Counters,
) -> anyhow::Result<(u64, i64)> {
    let flows = wire.at("server").to_port(port);
    let seen = flows.iter().map(|flow| flow.facts[Side::Server].rsts).sum();
    Ok((seen, lab.server().counters()?.since(before, "TcpOutRsts")?))
}

/// How the successor gets the listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// One process holds the listener, runs the old server as its child, then executes the new one.
    Exec,
    /// The new server is given the listener while the old one runs.
    Passed,
    /// The starter keeps it; the old server ends, nobody runs, then the new one is started.
    Activated,
}

#[rstest]
#[case::exec(Way::Exec)]
#[case::passed(Way::Passed)]
#[case::activated(Way::Activated)]
fn a_listener_handed_over_loses_nobody(
    #[case] way: Way,
    #[values(Family::V4, Family::V6)] family: Family,
) {
    let case = format!("{way:?}-{family}").to_lowercase();
    experiment!(
        case,
        "What becomes of the queue when the next server has the same listener?",
        |lab| {
            let (listener, port) = starters_listener(lab, family)?;
            let host = lab.server().address(family);
            let callers = Callers::new(lab.client(), (host, port), PATIENCE);
            let script = match way {
                Way::Exec => format!("sh -c '{BECOME}' old; {BECOME}"),
                Way::Passed | Way::Activated => BECOME.to_owned(),
            };
            let old = start(lab, &listener, &script, &[])?;
            let first = old.event("listening")?;
            let before = lab.server().counters()?;
            let capture = lab.capture()?;
            let mut waiting = Waiting::begin(lab, &callers, port)?;
            let inodes = listeners(lab, port)?;
            let (outcome, new) = match way {
                Way::Exec => {
                    lab.server().signal(first.pid.cast_signed(), Signal::SIGTERM)?;
                    waiting.held.end()?;
                    old.events_of("listening", 2)?;
                    (waiting.outcome()?, None)
                }
                Way::Passed => {
                    let new = start(lab, &listener, BECOME, &[])?;
                    new.event("listening")?;
                    let outcome = waiting.outcome()?; // the old one is still busy
                    let ending = old.terminate()?;
                    lab.claim_eq("the old server drains", ending, Ending::Exit(0));
                    waiting.held.end()?;
                    (outcome, Some(new))
                }
                Way::Activated => {
                    let ending = old.terminate()?;
                    lab.claim_eq("the old server drains", ending, Ending::Exit(0));
                    waiting.held.end()?;
                    let mut late = callers.connect()?;
                    late.say("10\n")?;
                    let waits = until_queued(lab, port, QUEUED + 1);
                    lab.claim("nobody serves, and one more client connects and waits", waits);
                    waiting.queue.push(late);
                    let new = start(lab, &listener, BECOME, &[])?;
                    (waiting.outcome()?, Some(new))
                }
            };
            let all = waiting.queue.len();
            lab.claim_eq(
                "all who waited are answered by the new server, none is reset",
                outcome,
                (all, 0),
            );
            lab.claim_eq("the listener's inode is the same", listeners(lab, port)?, inodes);
            drop((waiting, new, old));
            let wire = capture.finish()?;
            let resets = resets(lab, &wire, port, &before)?;
            lab.claim_eq("no RST in the capture, none in the kernel's counter", resets, (0, 0));
            let flows = wire.at("server").to_port(port);
            let whole = flows.iter().filter(|flow| flow.facts.handshake_completed()).count();
            lab.claim_eq("every client's handshake was completed at once", whole, all + 1);
            let again: u64 = flows.iter().map(|flow| flow.facts[Side::Client].retransmitted).sum();
            lab.claim_eq("and none had to send anything twice", again, 0);
            Ok(())
        }
    );
}

/// The inodes of the listeners at this port.
fn listeners(lab: &Lab, port: u16) -> anyhow::Result<Vec<u64>> {
    let rows = lab.server().tcp_sockets()?.into_iter();
    let ours = rows.filter(|row| row.local.port() == port && row.state == TcpState::Listen);
    Ok(ours.map(|row| row.inode).collect())
}

#[rstest]
fn closing_and_binding_again_loses_the_queue(#[values(Family::V4, Family::V6)] family: Family) {
    experiment!(family, "What becomes of the queue when the next server binds anew?", |lab| {
        let (host, port) = (lab.server().address(family), lab.port()?);
        let flags = args!["-i", host, "-p", port];
        let old = lab.server().spawn(&program!("iterative-server"), &flags)?;
        old.event("listening")?;
        let callers = Callers::new(lab.client(), (host, port), PATIENCE);
        let before = lab.server().counters()?;
        let capture = lab.capture()?;
        let mut waiting = Waiting::begin(lab, &callers, port)?;
        let early = lab.server().run(&program!("iterative-server"), &flags)?;
        lab.claim(
            "while the old server has the port, the new one cannot bind: EADDRINUSE",
            early.stderr().contains("EADDRINUSE"),
        );
        old.terminate()?;
        let outcome = waiting.outcome()?;
        lab.claim_eq("all five who waited are reset", outcome, (0, QUEUED));
        lab.claim("who comes before the new server is refused", callers.connect().is_err());
        let new = lab.server().spawn(&program!("iterative-server"), &flags)?;
        new.event("listening")?;
        drop(waiting);
        callers.ask(10)?;
        lab.claim("control: who comes after is served", true);
        let wire = capture.finish()?;
        let resets = resets(lab, &wire, port, &before)?;
        lab.claim_eq(
            "a RST for each of the five, and one for the refused, in capture and counter",
            resets,
            (QUEUED as u64 + 1, QUEUED as i64 + 1),
        );
        Ok(())
    });
}

#[rstest]
#[case::lost(0)]
#[case::migrated(1)]
fn with_a_listener_each_the_kernel_decides(
    #[case] migrate: usize,
    #[values(Family::V4, Family::V6)] family: Family,
) {
    let case = format!("{migrate}-{family}");
    experiment!(
        case,
        "What becomes of a queue whose listener goes, others at the same port?",
        |lab| {
            let sysctl = "/proc/sys/net/ipv4/tcp_migrate_req";
            require(lab.server().read(sysctl).is_ok(), "net.ipv4.tcp_migrate_req (Linux 5.14)")?;
            let _sysctl =
                Sysctl::set(lab.server(), "net.ipv4.tcp_migrate_req", &migrate.to_string())?;
            let (host, port) = (lab.server().address(family), lab.port()?);
            let flags = args!["-i", host, "-p", port, "-n", 1];
            let start = || {
                let server = lab.server().spawn(&program!("prefork-reuseport-server"), &flags)?;
                server.event("listening")?;
                anyhow::Ok(server)
            };
            let old = start()?;
            let callers = Callers::new(lab.client(), (host, port), PATIENCE);
            let before = lab.server().counters()?;
            let capture = lab.capture()?;
            let mut waiting = Waiting::begin(lab, &callers, port)?;
            let new = start()?;
            lab.claim_eq("both listen at one port", listeners(lab, port)?.len(), 2);
            old.terminate()?;
            waiting.held.end()?;
            let outcome = waiting.outcome()?;
            drop((waiting, new));
            let wire = capture.finish()?;
            let resets = resets(lab, &wire, port, &before)?;
            if migrate == 0 {
                lab.claim_eq(
                    "tcp_migrate_req 0: the five in the old queue are reset",
                    outcome,
                    (0, QUEUED),
                );
                let expected = (QUEUED as u64, QUEUED as i64);
                lab.claim_eq("five RSTs, in the capture and in the counter", resets, expected);
            } else {
                lab.claim_eq(
                    "tcp_migrate_req 1: the new server answers all five",
                    outcome,
                    (QUEUED, 0),
                );
                lab.claim_eq("no RST, in the capture or in the counter", resets, (0, 0));
                let moved =
                    lab.server().counters()?.since(&before, "TcpExtTCPMigrateReqSuccess")?;
                lab.claim_eq("the kernel counts five moves", moved, QUEUED as i64);
            }
            Ok(())
        }
    );
}

#[rstest]
fn under_load_a_passed_listener_refuses_and_resets_nobody() {
    experiment!("", "Does any client notice three restarts?", |lab| {
        let (listener, port) = starters_listener(lab, Family::V4)?;
        let host = lab.server().address(Family::V4);
        let mut server = start(lab, &listener, BECOME, &[])?;
        server.event("listening")?;
        let before = lab.server().counters()?;
        let capture = lab.capture_deep(Depth::Headers)?;
        for restart in 1..=3 {
            let load = || {
                let flags = args!["-i", host, "-p", port, "-c", 4, "-t", 200, "-b", 100];
                lab.client().spawn(&program!("client"), flags)
            };
            let by_the_old = count_accepted(&server);
            let first = load()?;
            server.events_of("accepted", by_the_old + 20)?;
            let next = start(lab, &listener, BECOME, &[])?;
            next.event("listening")?;
            // However busy the machine: the new server has its share before the old one goes.
            server.signal(Signal::SIGSTOP)?;
            let second = load()?;
            next.events_of("accepted", 20)?;
            server.signal(Signal::SIGTERM)?;
            server.signal(Signal::SIGCONT)?;
            lab.claim_eq(
                format!("restart {restart}: the old server drains"),
                server.ending()?,
                Ending::Exit(0),
            );
            for client in [first, second] {
                let all = match client.ending()? {
                    Ending::Exit(0) => Verdict::Pass,
                    _ => Verdict::Fail(client.stdout()),
                };
                lab.claim(format!("restart {restart}: 800 connections, all answered"), all);
            }
            let old = count_accepted(&server) - by_the_old;
            let new = next.events_of("accepted", 1600 - old)?.len();
            server = next;
            lab.claim(
                format!("control: it fell among them: {old} to the old server, {new} to the new"),
                old >= 20 && new >= 20 && old + new == 1600,
            );
        }
        let wire = capture.finish()?;
        let resets = resets(lab, &wire, port, &before)?;
        lab.claim_eq("no RST in the capture, none in the kernel's counter", resets, (0, 0));
        Ok(())
    });
}

fn count_accepted(server: &Process) -> usize {
    server.events().iter().filter(|event| event.verb == "accepted").count()
}

/// A check that no defect can make fail is no check.
#[rstest]
fn a_drain_that_shuts_the_listener_down_is_caught() {
    experiment!("", "What if a server shuts a listener down that is not its own?", |lab| {
        let (listener, port) = starters_listener(lab, Family::V4)?;
        let host = lab.server().address(Family::V4);
        let callers = Callers::new(lab.client(), (host, port), PATIENCE);
        let old = start(lab, &listener, BECOME, &["--bug", "shut-down-listener"])?;
        old.event("listening")?;
        let mut waiting = Waiting::begin(lab, &callers, port)?;
        old.terminate()?;
        let outcome = waiting.outcome()?;
        lab.claim_eq("--bug shut-down-listener: all who waited are reset", outcome, (0, QUEUED));
        lab.claim("and nobody can connect any more", callers.connect().is_err());
        Ok(())
    });
}
