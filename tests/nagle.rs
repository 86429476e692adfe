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

/// How a request that was sent in two halves went, as the server saw it; all in milliseconds.
struct Round {
    /// How long the first half waited for an acknowledgement of its own, if it had one before the
    /// second half came.
    acknowledged: Option<u64>,
    /// How long the answer took, once the request was whole.
    answered: u64,
}

/// The rounds: in each the client sends 2 and 3 bytes, and the server 1000.
fn rounds(flow: &Flow) -> Vec<Round> {
    let sent = |from: Side, seq: i64| {
        flow.steps.iter().find(|step| step.from == from && step.len > 0 && step.seq == seq)
    };
    let round = |number: i64| {
        let first = sent(Side::Client, 1 + 5 * number).filter(|half| half.len == 2)?;
        let second = sent(Side::Client, 3 + 5 * number)?;
        let answer = sent(Side::Server, 1 + 1000 * number)?;
        let acknowledges = |step: &&Step| {
            let alone = step.from == Side::Server && step.is_pure_ack();
            alone && step.ack == Some(first.range().end) && step.frame < second.frame
        };
        let acknowledgement = flow.steps.iter().find(acknowledges);
        Some(Round {
            acknowledged: acknowledgement.map(|ack| ms(ack.at - first.at)),
            answered: ms(answer.at.saturating_sub(second.at)),
        })
    };
    (0..).map_while(round).collect()
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
        let waits: Vec<Option<u64>> = rounds.iter().map(|round| round.acknowledged).collect();
        lab.claim(
            format!("each second half leaves behind an acknowledgement of the first: {waits:?} ms"),
            waits.iter().all(Option::is_some),
        );
        lab.claim(
            "a new connection acknowledges at once: no stall in round 1",
            waits[0].is_some_and(|wait| wait < 30),
        );
        // Only an answer within 40 ms shows the kernel a dialogue: before, it does not delay.
        let slow = rounds.iter().take_while(|round| round.answered >= 30).count();
        let stalls = &waits[(slow + 1).min(ROUNDS)..];
        lab.claim(
            format!(
                "from round {} on, behind the first answer within 40 ms, the acknowledgement takes \
                 30 to 500 ms (Linux 6.18: 40 to 44)",
                slow + 2
            ),
            !stalls.is_empty() && stalls.iter().flatten().all(|wait| (30..500).contains(wait)),
        );
        lab.claim(
            format!("the server's kernel counts TcpExtDelayedACKs {delayed}, one a stall or more"),
            delayed >= stalls.len() as i64,
        );
        let events = demo.events();
        let told = events.iter().filter(|event| event.verb == "received");
        let stalled = told.filter(|event| {
            event.get("ms").and_then(|ms| ms.parse().ok()).is_some_and(|ms: u64| ms >= 30)
        });
        lab.claim("the program waits as long", stalled.count() >= stalls.len());
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
        let waited = |round: &&Round| round.acknowledged.is_some_and(|wait| wait >= 30);
        let waited = rounds.iter().filter(waited).count();
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
        let waits: Vec<Option<u64>> = rounds.iter().map(|round| round.acknowledged).collect();
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
        let wait = rounds.first().and_then(|round| round.acknowledged);
        lab.claim_eq("the answer comes", answers(&client), ["send 2", "send 3", "recv 1000"]);
        lab.claim(
            format!("a server that says TCP_QUICKACK 0 stalls it from the beginning: {wait:?} ms"),
            wait.is_some_and(|wait| (30..500).contains(&wait)),
        );
        Ok(())
    });
}
