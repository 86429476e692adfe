//! Write, write, read: Nagle's algorithm and the delayed acknowledgement wait for one another.

mod common;

use common::answers;
use common::play::{calling, listening, ms};
use rstest::rstest;
use serverlab::lab::experiment::Lab;
use serverlab::lab::flow::{Flow, Side, Step};
use serverlab::lab::host::Family;
use serverlab::lab::process::{Ending, Process};
use serverlab::{args, experiment, program};

const ROUNDS: usize = 4;

fn demo(lab: &Lab, family: Family, port: u16, cure: &str) -> anyhow::Result<Process> {
    let to = args!["-i", lab.server().address(family), "-p", port];
    let flags = args!["--cure", cure, "--rounds", ROUNDS];
    let demo = lab.client().command(&program!("nagle-demo")).args(to).args(flags).spawn()?;
    lab.claim_eq("every answer comes, whole", demo.ending()?, Ending::Exit(0));
    Ok(demo)
}

fn server(lab: &Lab, family: Family, port: u16) -> anyhow::Result<Process> {
    let host = lab.server().address(family);
    let server =
        lab.server().spawn(&program!("iterative-server"), args!["-i", host, "-p", port])?;
    server.event("listening")?;
    Ok(server)
}

/// A round's first half, and what came behind it: when the server acknowledged it alone, if it did
/// so before the second half left.
struct Round {
    first: Step,
    acknowledged: Option<Step>,
}

/// The rounds, as the server saw them.
fn rounds(flow: &Flow) -> Vec<Round> {
    let mut rounds = Vec::new();
    for (at, step) in flow.steps.iter().enumerate() {
        let half = step.from == Side::Client && step.len == 2 && !step.retransmitted;
        if half {
            let rest = flow.steps[at + 1..].iter();
            let until_second = rest.take_while(|next| next.from == Side::Server || next.len == 0);
            let alone = until_second
                .filter(|next| next.from == Side::Server && next.len == 0)
                .find(|next| next.ack == Some(step.range().end));
            rounds.push(Round { first: *step, acknowledged: alone.copied() });
        }
    }
    rounds
}

#[rstest]
fn write_write_read_stalls(#[values(Family::V4, Family::V6)] family: Family) {
    experiment!(family, "How long does a request take that is sent in two writes?", |lab| {
        let port = lab.port()?;
        let _server = server(lab, family, port)?;
        let before = lab.server().counters()?;
        let capture = lab.capture()?;
        let demo = demo(lab, family, port, "none")?;
        let delayed = lab.server().counters()?.since(&before, "TcpExtDelayedACKs")?;
        let wire = capture.finish()?;

        let rounds = rounds(wire.at("server").flow(port)?);
        lab.claim_eq("each request is two segments", rounds.len(), ROUNDS);
        let waits: Vec<Option<u64>> = rounds
            .iter()
            .map(|round| round.acknowledged.map(|ack| ms(ack.at - round.first.at)))
            .collect();
        lab.claim(
            format!("each second half leaves behind an acknowledgement of the first: {waits:?} ms"),
            waits.iter().all(Option::is_some),
        );
        lab.claim(
            "a new connection acknowledges at once: no stall in round 1",
            waits[0].is_some_and(|wait| wait < 30),
        );
        lab.claim(
            "from round 2 on the acknowledgement takes 30 to 500 ms (Linux 6.18: 40 to 44)",
            waits[1..].iter().flatten().all(|wait| (30..500).contains(wait)),
        );
        lab.claim(
            format!("the server's kernel counts TcpExtDelayedACKs {delayed}, one a stall or more"),
            delayed >= (ROUNDS - 1) as i64,
        );
        let events = demo.events();
        let told = events.iter().filter(|event| event.verb == "received");
        let stalled = told.filter(|event| {
            event.get("ms").and_then(|ms| ms.parse().ok()).is_some_and(|ms: u64| ms >= 30)
        });
        lab.claim("the program waits as long", stalled.count() >= ROUNDS - 1);
        Ok(())
    });
}

#[rstest]
fn without_nagle_the_second_half_does_not_wait(#[values(Family::V4, Family::V6)] family: Family) {
    experiment!(family, "What does TCP_NODELAY do to a request in two writes?", |lab| {
        let port = lab.port()?;
        let _server = server(lab, family, port)?;
        let capture = lab.capture()?;
        demo(lab, family, port, "nodelay")?;
        let wire = capture.finish()?;
        let rounds = rounds(wire.at("server").flow(port)?);
        lab.claim_eq("each request is two segments", rounds.len(), ROUNDS);
        let waited = rounds[1..].iter().filter(|round| {
            round.acknowledged.is_some_and(|ack| ms(ack.at - round.first.at) >= 30)
        });
        let waited = waited.count();
        lab.claim(
            format!("no second half waits for a delayed acknowledgement, but where the machine is too busy to send it within 40 ms: {waited} of {ROUNDS}"),
            waited <= 1,
        );
        Ok(())
    });
}

#[rstest]
fn one_segment_a_request_does_not_stall(
    #[values("cork", "writev")] cure: &str,
    #[values(Family::V4, Family::V6)] family: Family,
) {
    experiment!(format!("{cure}-{family}"), "What if both writes are one segment?", |lab| {
        let port = lab.port()?;
        let server = server(lab, family, port)?;
        let capture = lab.capture()?;
        demo(lab, family, port, cure)?;
        server.event("closed")?;
        let wire = capture.finish()?;
        lab.claim(
            "each request is one segment, and each answer",
            wire.ladder(
                port,
                "client > server  S
                 server > client  S.
                 client > server  .
                 client > server  P.  1:6
                 server > client  P.  1:1001
                 client > server  P.  6:11
                 server > client  P.  1001:2001
                 client > server  P.  11:16
                 server > client  P.  2001:3001
                 client > server  P.  16:21
                 server > client  P.  3001:4001
                 client > server  F.  seq 21
                 server > client  F.  seq 4001",
            ),
        );
        Ok(())
    });
}

#[rstest]
fn a_server_that_acknowledges_at_once_does_not_stall(
    #[values(Family::V4, Family::V6)] family: Family,
) {
    experiment!(family, "Can the server cure it, with TCP_QUICKACK?", |lab| {
        let port = lab.port()?;
        let round = ["set:quickack=1", "recv:5", "send:1000"];
        let steps = [&["accept", "flags:waitall"][..], &round.repeat(ROUNDS), &["recv"]].concat();
        let server = listening(lab, family, port, &steps)?;
        let capture = lab.capture()?;
        demo(lab, family, port, "none")?;
        server.ending()?;
        let wire = capture.finish()?;
        let rounds = rounds(wire.at("server").flow(port)?);
        lab.claim_eq("each request is two segments", rounds.len(), ROUNDS);
        let waits: Vec<Option<u64>> = rounds
            .iter()
            .map(|round| round.acknowledged.map(|ack| ms(ack.at - round.first.at)))
            .collect();
        lab.claim(
            format!("every first half is acknowledged at once: {waits:?} ms"),
            waits.iter().all(|wait| wait.is_some_and(|wait| wait < 30)),
        );
        lab.claim_eq("the server's calls", answers(&server).len(), 2 * ROUNDS + 1);
        Ok(())
    });
}

#[rstest]
fn the_first_stall_can_be_had_at_once(#[values(Family::V4, Family::V6)] family: Family) {
    experiment!(family, "Is round 1 fast because the connection is new?", |lab| {
        let port = lab.port()?;
        let steps = ["accept", "set:quickack=0", "flags:waitall", "recv:5", "send:1000", "recv"];
        let server = listening(lab, family, port, &steps)?;
        let capture = lab.capture()?;
        let halves = ["pause", "send:ab", "send:cde", "flags:waitall", "recv:1000", "close"];
        let mut client = calling(lab, family, port, &halves)?;
        server.event("set")?;
        client.type_line("ask")?;
        client.ending()?;
        server.ending()?;
        let wire = capture.finish()?;
        let rounds = rounds(wire.at("server").flow(port)?);
        let wait = rounds.first().and_then(|round| round.acknowledged.map(|ack| (round, ack)));
        let wait = wait.map(|(round, ack)| ms(ack.at - round.first.at));
        lab.claim_eq("the answer comes", answers(&client), ["send 2", "send 3", "recv 1000"]);
        lab.claim(
            format!("a server that says TCP_QUICKACK 0 stalls it from the beginning: {wait:?} ms"),
            wait.is_some_and(|wait| (30..500).contains(&wait)),
        );
        Ok(())
    });
}
