//! More connections than the queue has room for, and other ends that are not orderly: half-open,
//! closed too early, orphaned, forged.

mod common;

use common::play::{
    Sysctl, blocked, calling, claim_counter, claim_rst_control, connecting, counted, demo,
    listener, listening, ms, reached, sockets,
};
use common::{Control, answers};
use rstest::rstest;
use serverlab::lab::experiment::Lab;
use serverlab::lab::flow::Side;
use serverlab::lab::host::Family;
use serverlab::lab::packet::Flags;
use serverlab::lab::process::{Ending, Process};
use serverlab::lab::sockets::TcpState::{self, CloseWait, Established, FinWait2, SynRecv, SynSent};
use serverlab::{experiment, program};

/// backlog-demo, which listens and accepts one client a line.
fn queue(lab: &Lab, family: Family, port: u16, flags: &[&str]) -> anyhow::Result<Process> {
    let at = (lab.server().address(family), port);
    let demo = demo(lab.server(), &program!("backlog-demo"), at, flags)?;
    demo.event("listening")?;
    Ok(demo)
}

#[rstest]
#[case(0, false)]
#[case(1, false)]
#[case(5, false)]
#[case(5, true)]
fn a_backlog_admits_one_more(
    #[case] backlog: u32,
    #[case] abort_on_overflow: bool,
    #[values(Family::V4, Family::V6)] family: Family,
) {
    let sysctl = if abort_on_overflow { "abort" } else { "default" };
    let case = format!("{backlog}-{sysctl}-{family}");
    experiment!(case, "How many clients does listen(n) let in before accept()?", |lab| {
        let (port, closed) = (lab.port()?, lab.port()?);
        // tcp_abort_on_overflow is about the handshake's last ACK, and changes nothing here.
        let _sysctl = if abort_on_overflow {
            Some(Sysctl::set(lab.server(), "net.ipv4.tcp_abort_on_overflow", "1")?)
        } else {
            None
        };
        let before = lab.server().counters()?;
        let mut server = queue(lab, family, port, &["--backlog", &backlog.to_string()])?;
        let capture = lab.capture()?;
        let room = backlog as usize + 1;
        let connects = vec!["connect"; room - 1];
        let steps = [&connects[..], &["socket", "nonblock:on", "connect", "poll:out", "pause"]];
        let mut client = calling(lab, family, port, &steps.concat())?;
        client.events_of("connected", room)?;
        counted(lab.server(), &before, "TcpExtListenDrops", 1)?;

        let states = |state| -> anyhow::Result<usize> {
            let rows = sockets(lab.client(), port)?;
            Ok(rows.iter().filter(|row| row.state == state).count())
        };
        lab.claim_eq(format!("listen({backlog}) lets in {room}"), states(Established)?, room);
        lab.claim_eq("one more client waits for an answer to its SYN", states(SynSent)?, 1);
        let queued = listener(lab.server(), port)?.map(|row| row.receive_queue);
        lab.claim_eq("the listener's queue holds as many", queued, Some(room as u32));
        // Once for each time that the SYN has come: a second later it comes again.
        let after = lab.server().counters()?;
        let overflows = after.since(&before, "TcpExtListenOverflows")?;
        let drops = after.since(&before, "TcpExtListenDrops")?;
        let sentence = "the server's kernel counts each such SYN as an overflow and as a drop";
        lab.claim(sentence, overflows >= 1 && overflows == drops);
        claim_counter(lab, lab.server(), &before, "TcpOutRsts", 0)?;

        server.type_line("accept one")?;
        client.event("polled")?;
        lab.claim_eq("after one accept the next SYN gets in", states(Established)?, room + 1);
        let told = server.event("got")?;
        lab.claim_eq(
            "TCP_INFO of the listener, before that: the queue and the backlog",
            [told.get("queue"), told.get("backlog")],
            [Some(&*room.to_string()), Some(&*backlog.to_string())],
        );
        connecting(lab, family, closed, &[])?;
        let wire = capture.finish()?;
        client.type_line("end")?;

        lab.claim(
            "nobody is reset: every client's connection is a SYN, its answer, and an ACK",
            wire.ladder(
                port,
                "client > server  S
                 server > client  S.
                 client > server  .",
            ),
        );
        let flows = wire.at("client").to_port(port);
        let last = flows.last().map(|flow| flow.facts[Side::Client].retransmitted);
        lab.claim(
            format!("the last one sent its SYN again, {last:?} times: the first was dropped"),
            last.is_some_and(|times| times >= 1),
        );
        claim_rst_control(lab, &wire, closed)
    });
}

/// Two handshakes that lack their end (TCP_DEFER_ACCEPT ignores the last ACK until there is data),
/// and a queue with room for one: whose data comes second meets a full queue.
fn overflow_at_the_last_ack(
    lab: &Lab,
    family: Family,
    port: u16,
) -> anyhow::Result<(Process, [Process; 3])> {
    // A backlog of 2 lets in 3, and has room for 2 handshakes without SYN cookies.
    let server = queue(lab, family, port, &["--backlog", "2", "--defer-accept", "30"])?;
    let others = calling(lab, family, port, &["send:1", "connect", "send:1", "pause"])?;
    others.event("paused")?;
    reached(lab.server(), port, &[Established; 2])?;
    let mut first = calling(lab, family, port, &["pause", "send:1", "pause"])?;
    first.event("paused")?;
    let second =
        calling(lab, family, port, &["pause", "send:2", "pause", "recv", "recv", "close"])?;
    second.event("paused")?;
    lab.claim_eq(
        "two clients have connected, and on the server their connections are SYN_RECV",
        (sorted(lab.states(lab.server(), port)?), sorted(lab.states(lab.client(), port)?)),
        (vec![Established, Established, SynRecv, SynRecv], vec![Established; 4]),
    );
    first.type_line("data")?;
    reached(lab.server(), port, &[Established, Established, Established, SynRecv])?;
    Ok((server, [others, first, second]))
}

fn sorted(mut states: Vec<TcpState>) -> Vec<TcpState> {
    states.sort_by_key(|state| *state as u8);
    states
}

#[rstest]
fn the_last_ack_of_an_overflow_is_ignored(#[values(Family::V4, Family::V6)] family: Family) {
    experiment!(family, "What if the queue is full when the handshake is over?", |lab| {
        let port = lab.port()?;
        let _sysctl = Sysctl::set(lab.server(), "net.ipv4.tcp_abort_on_overflow", "0")?;
        let capture = lab.capture()?;
        let (mut server, [_others, _first, mut second]) =
            overflow_at_the_last_ack(lab, family, port)?;
        let before = lab.server().counters()?;
        second.type_line("data")?;
        second.event("sent")?;
        counted(lab.server(), &before, "TcpExtListenOverflows", 1)?;
        claim_counter(lab, lab.server(), &before, "TcpOutRsts", 0)?;
        lab.claim_eq(
            "the client believes that it is connected, its send succeeds",
            (answers(&second), sockets(lab.client(), port)?.len()),
            (vec!["send 2".to_owned()], 4),
        );
        server.type_line("accept one")?;
        // There is room now, and the client's TCP sends its data again.
        reached(lab.server(), port, &[Established; 4])?;
        for _ in 1..4 {
            server.type_line("accept another")?;
        }
        let accepted = server.events_of("accepted", 4)?;
        let wire = capture.finish()?;
        let flows = wire.at("client").to_port(port);
        let again = flows.last().map_or(0, |flow| flow.facts[Side::Client].retransmitted);
        lab.claim("the data was sent again, which let it in", again >= 1);
        lab.claim_eq(
            "and is there when it is accepted, last",
            accepted.iter().filter_map(|event| event.get("unread")).collect::<Vec<_>>(),
            ["1", "1", "1", "2"],
        );
        Ok(())
    });
}

#[rstest]
fn the_last_ack_of_an_overflow_is_reset(#[values(Family::V4, Family::V6)] family: Family) {
    experiment!(family, "What does tcp_abort_on_overflow=1 reset?", |lab| {
        let port = lab.port()?;
        let _sysctl = Sysctl::set(lab.server(), "net.ipv4.tcp_abort_on_overflow", "1")?;
        let capture = lab.capture()?;
        let (_server, [_others, _first, mut second]) = overflow_at_the_last_ack(lab, family, port)?;
        let before = lab.server().counters()?;
        second.type_line("data")?;
        second.type_line("read")?;
        second.ending()?; // recv waits for the RST: it has been sent, and counted
        claim_counter(lab, lab.server(), &before, "TcpExtListenOverflows", 1)?;
        claim_counter(lab, lab.server(), &before, "TcpOutRsts", 1)?;
        claim_counter(lab, lab.server(), &before, "TcpExtEmbryonicRsts", 1)?;
        let wire = capture.finish()?;
        let reset: Vec<_> =
            wire.at("client").to_port(port).iter().map(|f| f.facts.reset_by()).collect();
        let last = Some(Side::Server);
        lab.claim_eq("the last is reset, the others are not", reset, [None, None, None, last]);
        lab.claim_eq(
            "its client had sent, and learns it from recv",
            answers(&second),
            ["send 2", "recv ECONNRESET", "recv 0"],
        );
        Ok(())
    });
}

#[rstest]
fn a_crash_leaves_the_other_end_open(#[values(Family::V4, Family::V6)] family: Family) {
    experiment!(family, "Who notices that a host has crashed?", |lab| {
        let port = lab.port()?;
        let at = (lab.server().address(family), port);
        let mut server = demo(lab.server(), &program!("half-open-demo"), at, &["crash"])?;
        server.event("listening")?;
        let capture = lab.capture()?;
        let mut client = demo(lab.client(), &program!("half-open-demo"), at, &["speak"])?;
        server.event("paused")?;
        client.event("paused")?;
        server.type_line("crash")?;
        server.event("closed")?;
        lab.claim_eq("the server knows nothing of it", lab.states(lab.server(), port)?, []);
        lab.claim_eq(
            "the client still believes that it is connected",
            lab.states(lab.client(), port)?,
            [Established],
        );
        client.type_line("speak")?;
        client.ending()?;
        let state = client.event("got")?.get("state").map(str::to_owned);
        lab.claim_eq("and is told so by TCP_INFO", state.as_deref(), Some("ESTABLISHED"));
        let control = Control::run(lab, family)?;
        let wire = capture.finish()?;
        lab.claim(
            "no FIN, no RST at the crash; the first data is answered by a bare RST",
            wire.ladder(
                port,
                "client > server  S
                 server > client  S.
                 client > server  .
                 client > server  P.  1:2
                 server > client  R   seq 1 win 0",
            ),
        );
        lab.claim_eq(
            "send succeeds, and the next call learns it",
            answers(&client),
            ["send 1", "recv ECONNRESET", "recv 0", "send EPIPE"],
        );
        control.claim(lab, &wire)
    });
}

/// half-close-demo, which sends 4 bytes and ends its side in this way; it has ended.
fn half_closer(lab: &Lab, family: Family, port: u16, how: &str) -> anyhow::Result<Process> {
    let to = (lab.server().address(family), port);
    let demo = demo(lab.client(), &program!("half-close-demo"), to, &["--how", how])?;
    lab.claim_eq(format!("the client ends well ({how})"), demo.ending()?, Ending::Exit(0));
    Ok(demo)
}

#[rstest]
fn close_instead_of_half_close_resets_the_answer(#[values(Family::V4, Family::V6)] family: Family) {
    experiment!(family, "What becomes of an answer to a client that has closed?", |lab| {
        let (closing, halving) = (lab.port()?, lab.port()?);
        let steps =
            ["accept", "poll:rdhup", "recv", "recv", "pause", "send:5", "poll:none", "send:1"];
        let capture = lab.capture()?;
        let mut server = listening(lab, family, closing, &steps)?;
        let before = lab.client().counters()?;
        half_closer(lab, family, closing, "close")?;
        // The ACK of the FIN must not come after the answer: it would be answered by a RST of its own.
        reached(lab.client(), closing, &[FinWait2])?;
        server.type_line("answer")?;
        server.ending()?;
        // In FIN_WAIT2 an orphan is no socket any more, but what the kernel keeps in its place
        // (tcp_close in net/ipv4/tcp.c): nothing is left to abort.
        claim_counter(lab, lab.client(), &before, "TcpExtTCPAbortOnData", 0)?;
        claim_counter(lab, lab.client(), &before, "TcpOutRsts", 1)?;
        lab.claim_eq(
            "the server's answer is sent, and the next one fails with EPIPE",
            answers(&server),
            ["recv 4", "recv 0", "send 5", "send EPIPE"],
        );

        let steps = ["accept", "poll:rdhup", "recv", "recv", "send:5", "close"];
        let server = listening(lab, family, halving, &steps)?;
        let client = half_closer(lab, family, halving, "shutdown")?;
        server.ending()?;
        let wire = capture.finish()?;
        lab.claim(
            "after close(), the answer is answered by a RST",
            wire.ladder(
                closing,
                "client > server  S
                 server > client  S.
                 client > server  .
                 client > server  P.  1:5
                 client > server  F.  seq 5
                 server > client  P.  1:6 ack 6
                 client > server  R   seq 6",
            ),
        );
        lab.claim(
            "after shutdown(SHUT_WR), the same FIN, it arrives, and both ends close",
            wire.ladder(
                halving,
                "client > server  S
                 server > client  S.
                 client > server  .
                 client > server  P.  1:5
                 client > server  F.  seq 5
                 server > client  P.  1:6 ack 6
                 server > client  F.  seq 6",
            ),
        );
        lab.claim_eq("and is read", answers(&client), ["send 4", "recv 5", "recv 0"]);
        Ok(())
    });
}

#[rstest]
fn an_orphan_in_fin_wait_2_is_forgotten(#[values(Family::V4, Family::V6)] family: Family) {
    experiment!(family, "How long does a closed socket wait for the other's FIN?", |lab| {
        let (port, halving) = (lab.port()?, lab.port()?);
        let steps = ["accept", "recv", "pause", "send:5", "poll:none", "send:1"];
        let mut server = listening(lab, family, port, &steps)?;
        let steps = ["accept", "recv", "pause", "send:5", "pause"];
        let mut patient = listening(lab, family, halving, &steps)?;
        let capture = lab.capture()?;
        let host = lab.server().address(family);
        let flags = |how| ["--how", how, "--linger2", "1"];
        let orphan = program!("orphan-demo");
        let waiting = demo(lab.client(), &orphan, (host, halving), &flags("shutdown"))?;
        patient.event("paused")?;
        reached(lab.client(), halving, &[FinWait2])?;
        // TCP_LINGER2 is net.ipv4.tcp_fin_timeout (60 s) for one socket. The state is looked for at
        // once: its second does not wait for us.
        let closing = demo(lab.client(), &orphan, (host, port), &flags("close"))?;
        reached(lab.client(), port, &[FinWait2])?;
        reached(lab.server(), port, &[CloseWait])?;
        lab.claim("the client's end is FIN_WAIT2, an orphan; the server's CLOSE_WAIT", true);
        closing.ending()?;
        server.event("paused")?;
        reached(lab.client(), port, &[])?;
        lab.claim_eq(
            "after TCP_LINGER2's second the orphan is gone, the other end stays",
            lab.states(lab.server(), port)?,
            [CloseWait],
        );
        lab.claim_eq(
            "control: a socket that a process has open is older, and is still in FIN_WAIT2",
            lab.states(lab.client(), halving)?,
            [FinWait2],
        );
        patient.type_line("answer")?;
        waiting.ending()?;
        lab.claim_eq("it gets its answer", answers(&waiting), ["recv 5"]);
        server.type_line("answer")?;
        server.ending()?;
        let wire = capture.finish()?;
        lab.claim(
            "an answer after that meets nobody: a bare RST",
            wire.ladder(
                port,
                "client > server  S
                 server > client  S.
                 client > server  .
                 client > server  F.  seq 1
                 server > client  P.  1:6 ack 2
                 client > server  R   seq 2 win 0",
            ),
        );
        let flow = wire.at("client").flow(port)?;
        let fin = flow.steps.iter().find(|step| step.flags.has(Flags::FIN)).map(|step| step.at);
        let data = flow.steps.iter().find(|step| step.len > 0).map(|step| step.at);
        let waited = fin.zip(data).map(|(fin, data)| ms(data - fin));
        lab.claim(
            format!("the state lasted 700 ms to 10 s: {waited:?} (Linux 6.18)"),
            waited.is_some_and(|waited| (700..10_000).contains(&waited)),
        );
        Ok(())
    });
}

#[rstest]
fn a_forged_reset_must_have_the_exact_number(#[values(Family::V4, Family::V6)] family: Family) {
    experiment!(family, "Which RST does TCP believe?", |lab| {
        let port = lab.port()?;
        let at = (lab.server().address(family), port);
        let mut demo = demo(lab.server(), &program!("blind-reset-demo"), at, &[])?;
        demo.event("listening")?;
        let capture = lab.capture()?;
        let client = calling(lab, family, port, &["recv", "recv"])?;
        client.event("connected")?;
        demo.event("paused")?;
        blocked(lab.client(), &client)?;
        let before = lab.client().counters()?;

        demo.type_line("beyond the window")?;
        demo.type_line("within it")?;
        counted(lab.client(), &before, "TcpExtTCPChallengeACK", 1)?;
        claim_counter(lab, lab.client(), &before, "TcpExtTCPChallengeACK", 1)?;
        lab.claim_eq(
            "one beyond the window is ignored, one within it is answered by a challenge: neither ends it",
            lab.states(lab.client(), port)?,
            [Established],
        );
        demo.type_line("exact")?;
        client.ending()?;
        lab.claim_eq("the exact one does", answers(&client), ["recv ECONNRESET", "recv 0"]);
        demo.type_line("end")?;
        lab.claim_eq("the demo ends well", demo.ending()?, Ending::Exit(0));
        let told = demo.events_of("got", 2)?[1].get("state").map(str::to_owned);
        let sentence = "in whose name it came is not told: its end stays ESTABLISHED";
        lab.claim_eq(sentence, told.as_deref(), Some("ESTABLISHED"));
        let wire = capture.finish()?;
        let flow = wire.at("client").flow(port)?;
        let resets: Vec<_> = flow.steps.iter().filter(|step| step.flags.has(Flags::RST)).collect();
        lab.claim_eq(
            "all three are on the wire: the capture could have shown what followed each",
            resets.iter().filter(|step| step.from == Side::Server).count(),
            3,
        );
        let frame = |at: usize| resets.get(at).map_or(0, |step| step.frame);
        let answers_after = |from: u64, to: u64| {
            let between =
                flow.steps.iter().filter(move |step| step.frame > from && step.frame < to);
            between.filter(|step| step.from == Side::Client && step.is_pure_ack()).count()
        };
        lab.claim_eq(
            "no answer to the one beyond the window",
            answers_after(frame(0), frame(1)),
            0,
        );
        lab.claim_eq("one ACK to the one within it", answers_after(frame(1), frame(2)), 1);
        Ok(())
    });
}
