//! What flows, and when: full windows, short writes, low-water marks, deferred accepts, data in the
//! SYN, urgent data, half-closed readers, closes that linger.

mod common;

use common::answers;
use common::play::{
    Sysctl, blocked, calling, claim_counter, counted, listening, ms, peer, reached, sockets,
};
use rstest::rstest;
use serverlab::lab::experiment::Lab;
use serverlab::lab::flow::{Side, Step};
use serverlab::lab::host::{Family, Host};
use serverlab::lab::packet::Flags;
use serverlab::lab::process::{DEADLINE, Ending, Process};
use serverlab::lab::sockets::TcpState::{Established, FinWait1, FinWait2, SynRecv};
use serverlab::lab::wait::until;
use serverlab::{args, experiment, program};

/// Waits until a host's connection at this port has so many bytes received and not read.
fn unread(host: &Host, port: u16, bytes: u32) -> anyhow::Result<()> {
    until(&format!("{bytes} unread bytes on {}", host.name()), DEADLINE, || {
        let rows = sockets(host, port)?;
        Ok(rows.iter().any(|row| row.receive_queue == bytes).then_some(()))
    })
}

/// The numbers that `get:` told, in order.
fn got(process: &Process) -> Vec<i64> {
    let events = process.events();
    let values = events.iter().filter(|event| event.verb == "got");
    values.filter_map(|event| event.get("value")?.parse().ok()).collect()
}

/// The bytes that an event of this verb tells of.
fn bytes(process: &Process, verb: &str) -> anyhow::Result<u64> {
    Ok(process.event(verb)?.get("bytes").unwrap_or_default().parse()?)
}

/// What the events `polled` told, in order.
fn polled(process: &Process) -> Vec<String> {
    let events = process.events();
    let revents = events.iter().filter(|event| event.verb == "polled");
    revents.filter_map(|event| event.get("revents").map(str::to_owned)).collect()
}

#[rstest]
fn a_slow_reader_closes_the_window(#[values(Family::V4, Family::V6)] family: Family) {
    experiment!(family, "What does TCP do while the reader does not read?", |lab| {
        let port = lab.port()?;
        let at = args!["-i", lab.server().address(family), "-p", port];
        let demo = program!("slow-reader-demo");
        let mut reader = lab.server().command(&demo).args(["reader"]).args(&at).typed().spawn()?;
        reader.event("listening")?;
        let before = [lab.client().counters()?, lab.server().counters()?];
        let capture = lab.capture()?;
        let mut sender = lab.client().command(&demo).args(["sender"]).args(&at).typed().spawn()?;
        let filled = bytes(&sender, "filled")?;
        counted(lab.server(), &before[1], "TcpExtTCPToZeroWindowAdv", 1)?;
        counted(lab.client(), &before[0], "TcpExtTCPWinProbe", 3)?;
        sender.type_line("close")?;
        sender.ending()?;
        lab.claim_eq("there is no room to write", polled(&sender), ["none"]);
        lab.claim_eq(
            "after close() the kernel keeps the bytes, and FIN_WAIT1, on its own",
            lab.states(lab.client(), port)?,
            [FinWait1],
        );
        reader.type_line("read")?;
        reader.ending()?;
        let (outgoing, unread) = (got(&sender)[0], got(&reader)[0]);
        lab.claim(
            format!(
                "send took {filled} bytes: {unread} wait at the reader, {outgoing} at the sender"
            ),
            unread > 0 && outgoing > unread && filled.cast_signed() == outgoing + unread,
        );
        lab.claim_eq(
            "the reader gets every byte in the end, though the sender is gone",
            answers(&reader),
            [format!("recv {filled}"), "recv 0".to_owned()],
        );
        let wire = capture.finish()?;
        let flow = wire.at("client").flow(port)?;
        let zero = flow.steps.iter().position(|step| {
            step.from == Side::Server && step.window == 0 && !step.flags.has(Flags::RST)
        });
        lab.claim("the server offers a window of 0", zero.is_some());
        let after = &flow.steps[zero.unwrap_or(0)..];
        let probes = after.iter().filter(|step| step.from == Side::Client).take(3);
        let probes: Vec<&Step> = probes.collect();
        lab.claim(
            "the client probes it: segments without data, one byte before what comes next",
            probes.iter().all(|step| step.is_pure_ack() && step.seq == unread),
        );
        let gaps: Vec<u64> = probes.windows(2).map(|two| ms(two[1].at - two[0].at)).collect();
        lab.claim(
            format!("after ever longer pauses: {gaps:?} ms"),
            gaps.len() == 2 && gaps[1] > gaps[0] + gaps[0] / 2,
        );
        Ok(())
    });
}

#[rstest]
fn a_short_write_is_no_error(#[values(Family::V4, Family::V6)] family: Family) {
    experiment!(family, "How much does one non-blocking send() take?", |lab| {
        let port = lab.port()?;
        let mut reader = listening(lab, family, port, &["accept", "pause", "recv-all"])?;
        let at = args!["-i", lab.server().address(family), "-p", port, "--how", "once"];
        let demo = lab.client().run(&program!("partial-write-demo"), at)?;
        let taken = bytes(&demo, "sent")?;
        lab.claim(
            format!("of 20000000 bytes it takes {taken}, and says so"),
            (1..20_000_000).contains(&taken) && answers(&demo) == [format!("send {taken}")],
        );
        lab.claim_eq("the writer is content", demo.ending()?, Ending::Exit(0));
        reader.type_line("read")?;
        reader.ending()?;
        lab.claim_eq(
            "the reader gets these, and an orderly end: nothing tells it that there was more",
            answers(&reader),
            [format!("recv {taken}"), "recv 0".to_owned()],
        );
        Ok(())
    });
}

#[rstest]
fn a_loop_sends_the_rest(#[values(Family::V4, Family::V6)] family: Family) {
    experiment!(family, "How is what a send() did not take sent?", |lab| {
        let port = lab.port()?;
        let mut reader = listening(lab, family, port, &["accept", "pause", "recv-all"])?;
        let at = args!["-i", lab.server().address(family), "-p", port, "--how", "loop"];
        let counters = lab.client().counters()?;
        let demo = lab.client().spawn(&program!("partial-write-demo"), at)?;
        let sent = || -> u64 {
            let events = demo.events();
            let sent = events.iter().filter(|event| event.verb == "sent");
            sent.filter_map(|event| event.get("bytes")?.parse::<u64>().ok()).sum()
        };
        counted(lab.client(), &counters, "TcpExtTCPWinProbe", 1)?; // both buffers are full
        blocked(lab.client(), &demo)?;
        let before = sent();
        lab.claim(
            format!("while nobody reads, {before} of 20000000 bytes are taken, and poll waits"),
            (1..20_000_000).contains(&before) && demo.ended().is_none(),
        );
        reader.type_line("read")?;
        demo.ending()?;
        reader.ending()?;
        let (calls, told) = (answers(&demo), polled(&demo));
        lab.claim(
            "EAGAIN each time there is no room, then poll tells that there is",
            !told.is_empty()
                && told.iter().all(|revents| revents == "out")
                && calls.iter().filter(|call| *call == "send EAGAIN").count() == told.len(),
        );
        lab.claim_eq("the parts are the whole", sent(), 20_000_000);
        lab.claim_eq("and all of it arrives", answers(&reader), ["recv 20000000", "recv 0"]);
        Ok(())
    });
}

#[rstest]
fn a_low_water_mark_holds_back_readiness(#[values(Family::V4, Family::V6)] family: Family) {
    experiment!(family, "When is a socket with SO_RCVLOWAT 100 readable?", |lab| {
        let port = lab.port()?;
        let at = args!["-i", lab.server().address(family), "-p", port];
        let demo = lab.server().command(&program!("low-water-mark-demo")).args(at);
        let mut demo = demo.typed().spawn()?;
        demo.event("listening")?;
        let steps = ["send:99", "pause", "send:1", "pause", "send:5", "pause"];
        let mut client = calling(lab, family, port, &steps)?;
        demo.event("paused")?;
        unread(lab.server(), port, 99)?;
        demo.type_line("look")?;
        demo.event("polled")?;
        blocked(lab.server(), &demo)?;
        lab.claim_eq("99 bytes are there", got(&demo), [99]);
        lab.claim_eq("and poll does not tell, and waits", polled(&demo), ["none"]);
        client.type_line("one more")?;
        demo.event("received")?;
        lab.claim_eq("with 100 it does", polled(&demo), ["none", "in"]);
        lab.claim_eq("recv takes them all", answers(&demo), ["recv 100"]);
        client.type_line("five")?;
        unread(lab.server(), port, 5)?;
        blocked(lab.server(), &demo)?;
        lab.claim_eq("5 bytes more, and poll waits again", polled(&demo).len(), 2);
        client.type_line("end")?;
        demo.ending()?;
        lab.claim_eq("the end makes them readable", polled(&demo), ["none", "in", "in", "in"]);
        lab.claim_eq(
            "though they are fewer than 100",
            answers(&demo),
            ["recv 100", "recv 5", "recv 0"],
        );
        Ok(())
    });
}

#[rstest]
#[case::each_recv("recv", &["10\n24\n", "hello, w", "orld\n"])]
#[case::delimiter("delimiter", &["10", "24", "hello, world"])]
fn segments_are_not_messages(
    #[case] framing: &str,
    #[case] messages: &[&str],
    #[values(Family::V4, Family::V6)] family: Family,
) {
    experiment!(format!("{framing}-{family}"), "Does recv() return what send() sent?", |lab| {
        let port = lab.port()?;
        let at = args!["-i", lab.server().address(family), "-p", port, "--framing", framing];
        let demo = lab.server().command(&program!("boundaries-demo")).args(at);
        let mut demo = demo.typed().spawn()?;
        demo.event("listening")?;
        let capture = lab.capture()?;
        let steps = ["nodelay:on", "send:10\\n", "send:24\\n", "pause", "send:hello, world\\n"];
        let mut client = calling(lab, family, port, &steps)?;
        demo.event("paused")?;
        unread(lab.server(), port, 6)?;
        demo.type_line("read")?;
        demo.event("received")?;
        client.type_line("more")?;
        demo.ending()?;
        lab.claim_eq(
            "two sends, one recv; one send, two recvs",
            answers(&demo),
            ["recv 6", "recv 8", "recv 5", "recv 0"],
        );
        let wire = capture.finish()?;
        let ranges = wire.at("client").flow(port)?.ranges(Side::Client);
        lab.claim_eq("though each send was a segment of its own", ranges, [1..4, 4..7, 7..20]);
        let events = demo.events();
        let told: Vec<&str> = events.iter().filter_map(|event| event.get("message")).collect();
        let what = match framing {
            "recv" => "who takes each recv for a message gets what nobody sent",
            _ => "who looks for the delimiter gets the messages, from the same recvs",
        };
        lab.claim_eq(what, told, messages);
        Ok(())
    });
}

/// A demo of TCP_DEFER_ACCEPT on the server, which listens already.
fn deferring(lab: &Lab, family: Family, port: u16, seconds: u32) -> anyhow::Result<Process> {
    let at = args!["-i", lab.server().address(family), "-p", port, "--seconds", seconds];
    let demo = lab.server().spawn(&program!("defer-accept-demo"), at)?;
    demo.event("listening")?;
    Ok(demo)
}

#[rstest]
fn an_accept_waits_for_data(#[values(Family::V4, Family::V6)] family: Family) {
    experiment!(family, "What does accept() wait for after TCP_DEFER_ACCEPT?", |lab| {
        let port = lab.port()?;
        let demo = deferring(lab, family, port, 30)?;
        let before = lab.server().counters()?;
        let mut client = calling(lab, family, port, &["pause", "send:7", "pause"])?;
        client.event("paused")?;
        counted(lab.server(), &before, "TcpExtTCPDeferAcceptDrop", 1)?;
        reached(lab.client(), port, &[Established])?;
        reached(lab.server(), port, &[SynRecv])?;
        blocked(lab.server(), &demo)?;
        let accepted = demo.events().iter().any(|event| event.verb == "accepted");
        lab.claim("the client is connected, the server has SYN_RECV, accept waits", !accepted);
        claim_counter(lab, lab.server(), &before, "TcpExtTCPDeferAcceptDrop", 1)?;
        client.type_line("data")?;
        demo.ending()?;
        lab.claim_eq(
            "with the first data it returns: recv need not wait",
            answers(&demo),
            ["recv 7"],
        );
        Ok(())
    });
}

#[rstest]
fn an_accept_does_not_wait_for_ever_for_data(#[values(Family::V4, Family::V6)] family: Family) {
    experiment!(family, "What if no data comes in the time of TCP_DEFER_ACCEPT?", |lab| {
        let (port, other) = (lab.port()?, lab.port()?);
        let demo = deferring(lab, family, port, 1)?;
        let capture = lab.capture()?;
        let _client = calling(lab, family, port, &["pause"])?;
        demo.ending()?;
        let plain = deferring(lab, family, other, 0)?;
        let _silent = calling(lab, family, other, &["pause"])?;
        plain.ending()?;
        let wire = capture.finish()?;
        // From the SYN on, which the kernel's second follows: a client may be late to tell.
        let waited = |demo: &Process, port: u16| -> anyhow::Result<u64> {
            let syn = wire.at("server").flow(port)?.facts.began;
            Ok(ms(demo.event("accepted")?.at.saturating_sub(syn)))
        };
        let (deferred, at_once) = (waited(&demo, port)?, waited(&plain, other)?);
        lab.claim(
            format!("accept returns after its second: {deferred} ms"),
            (950..10_000).contains(&deferred),
        );
        lab.claim_eq("for a client that has said nothing", answers(&demo), ["recv EAGAIN"]);
        lab.claim(
            format!("control: without the option it returns with the handshake: {at_once} ms"),
            at_once < deferred && answers(&plain) == ["recv EAGAIN"],
        );
        let answers_to_syn = |port| -> anyhow::Result<usize> {
            let flow = wire.at("server").flow(port)?;
            let from_server = flow.steps.iter().filter(|step| step.from == Side::Server);
            Ok(from_server.filter(|step| step.flags.has(Flags::SYN)).count())
        };
        lab.claim_eq(
            "the SYN-ACK is sent twice, since the first answer to it was ignored; control: once",
            (answers_to_syn(port)?, answers_to_syn(other)?),
            (2, 1),
        );
        Ok(())
    });
}

#[rstest]
#[case::cookies("3", 1)]
#[case::no_cookies("1", 0)]
fn a_syn_can_carry_data(
    #[case] sysctl: &str,
    #[case] cookies: i64,
    #[values(Family::V4, Family::V6)] family: Family,
) {
    let case = format!("{}-{family}", if cookies == 1 { "cookies" } else { "no-cookies" });
    experiment!(case, "How many round trips until the server has the request?", |lab| {
        let port = lab.port()?;
        let _sysctl = Sysctl::set(lab.server(), "net.ipv4.tcp_fastopen", sysctl)?;
        let at = args!["-i", lab.server().address(family), "-p", port];
        let demo = program!("fastopen-demo");
        let server = lab.server().command(&demo).args(["server"]).args(&at).spawn()?;
        server.event("listening")?;
        let before = [lab.client().counters()?, lab.server().counters()?];
        let capture = lab.capture()?;
        let client = lab.client().command(&demo).args(["client"]).args(&at).spawn()?;
        client.ending()?;
        server.ending()?;
        // Who has no cookie asks for one, each time.
        claim_counter(lab, lab.server(), &before[1], "TcpExtTCPFastOpenCookieReqd", 2 - cookies)?;
        claim_counter(lab, lab.client(), &before[0], "TcpExtTCPFastOpenActive", cookies)?;
        claim_counter(lab, lab.server(), &before[1], "TcpExtTCPFastOpenPassive", cookies)?;
        let wire = capture.finish()?;
        let flows = wire.at("server").to_port(port);
        let syns: Vec<u32> = flows.iter().map(|flow| flow.steps[0].len).collect();
        let events = client.events();
        let told: Vec<&str> = events.iter().filter_map(|event| event.get("syn_data")).collect();
        if cookies == 1 {
            lab.claim_eq(
                "the first SYN asks for a cookie, the second carries the request",
                syns,
                [0, 5],
            );
            lab.claim_eq("TCP_INFO tells the client so", told, ["false", "true"]);
        } else {
            lab.claim_eq("control: without a cookie no SYN carries data", syns, [0, 0]);
            lab.claim_eq("TCP_INFO tells the client so", told, ["false", "false"]);
        }
        lab.claim_eq(
            "the client sees no difference",
            answers(&client),
            ["send 5", "recv 10", "send 5", "recv 10"],
        );
        lab.claim_eq(
            "nor does the server",
            answers(&server),
            ["recv 5", "send 10", "recv 5", "send 10"],
        );
        Ok(())
    });
}

#[rstest]
#[case::apart(false)]
#[case::inline(true)]
fn one_byte_is_urgent(#[case] inline: bool, #[values(Family::V4, Family::V6)] family: Family) {
    let case = format!("{}-{family}", if inline { "inline" } else { "apart" });
    experiment!(case, "What does MSG_OOB send out of band?", |lab| {
        let port = lab.port()?;
        let mut at = args!["-i", lab.server().address(family), "-p", port];
        if inline {
            at.push("--inline".to_owned());
        }
        let mut demo = lab.server().command(&program!("urgent-demo")).args(at).typed().spawn()?;
        demo.event("listening")?;
        let capture = lab.capture()?;
        let steps = ["pause", "send:ab", "flags:oob", "send:XY", "flags:none", "send:cd", "pause"];
        let mut client = calling(lab, family, port, &steps)?;
        demo.event("paused")?;
        client.type_line("send")?;
        client.events_of("sent", 3)?;
        // "abX", Y out of band, "cd".
        unread(lab.server(), port, 6)?;
        lab.claim("SIGURG comes", demo.event("signaled").is_ok());
        demo.type_line("read")?;
        demo.ending()?;
        lab.claim_eq("poll tells POLLPRI", polled(&demo), ["pri"]);
        lab.claim_eq("sockatmark(3) says where it is", got(&demo), [0, 1]);
        let events = demo.events();
        let texts: Vec<&str> = events.iter().filter_map(|event| event.get("text")).collect();
        if inline {
            lab.claim_eq("recv stops before the byte, then reads it", texts, ["abX", "Ycd"]);
            lab.claim_eq(
                "with SO_OOBINLINE nothing is there for MSG_OOB",
                answers(&demo),
                ["recv 3", "recv EINVAL", "recv 3"],
            );
        } else {
            lab.claim_eq(
                "only the last byte of the two is urgent: recv stops before it, MSG_OOB reads it",
                texts,
                ["abX", "Y", "cd"],
            );
        }
        let wire = capture.finish()?;
        let flow = wire.at("server").flow(port)?;
        let urgent = flow.steps.iter().filter(|step| step.flags.has(Flags::URG));
        let first = urgent.map(Step::range).next();
        lab.claim_eq("on the wire it is a flag, URG, on the segment with both", first, Some(3..5));
        Ok(())
    });
}

#[rstest]
#[case::reads(false)]
#[case::leaves(true)]
fn shutting_down_reading_tells_nobody(
    #[case] leaves: bool,
    #[values(Family::V4, Family::V6)] family: Family,
) {
    let case = format!("{}-{family}", if leaves { "leaves" } else { "reads" });
    experiment!(case, "What does shutdown(SHUT_RD) do?", |lab| {
        let port = lab.port()?;
        let mut at = args!["-i", lab.server().address(family), "-p", port];
        if leaves {
            at.push("--leave".to_owned());
        }
        let demo = lab.server().command(&program!("shutdown-read-demo")).args(at);
        let mut demo = demo.typed().spawn()?;
        demo.event("listening")?;
        let capture = lab.capture()?;
        let mut client = calling(lab, family, port, &["pause", "send:5", "recv", "close"])?;
        demo.event("paused")?;
        client.event("paused")?;
        client.type_line("send")?;
        unread(lab.server(), port, 5)?;
        demo.type_line("read")?;
        demo.ending()?;
        client.ending()?;
        let wire = capture.finish()?;
        if leaves {
            lab.claim_eq("recv returns 0 while nothing is there", answers(&demo), ["recv 0"]);
            lab.claim_eq("then 5 bytes are", got(&demo), [5]);
            lab.claim(
                "left unread, they make a RST of close, as without the call",
                wire.ladder(
                    port,
                    "client > server  S
                     server > client  S.
                     client > server  .
                     client > server  P.  1:6
                     server > client  .   ack 6
                     server > client  R.  seq 1 ack 6",
                ),
            );
            return Ok(());
        }
        lab.claim_eq(
            "recv returns 0 while nothing is there, and nevertheless what comes later",
            answers(&demo),
            ["recv 0", "recv 5", "recv 0"],
        );
        lab.claim(
            "nothing on the wire: the client sends, and is acknowledged",
            wire.ladder(
                port,
                "client > server  S
                 server > client  S.
                 client > server  .
                 client > server  P.  1:6
                 server > client  .   ack 6
                 server > client  F.  seq 1 ack 6
                 client > server  F.  seq 6",
            ),
        );
        Ok(())
    });
}

/// A reader that does not read until it is told to, and a demo of SO_LINGER that has filled its
/// window and the sender's buffer.
fn full(lab: &Lab, family: Family, port: u16, flags: &[&str]) -> anyhow::Result<[Process; 2]> {
    let host = lab.server().address(family);
    let steps = ["rcvbuf:4096", "listen", "accept", "pause", "recv-all", "pause"];
    let reader = peer(lab.server(), host, port, &steps)?;
    reader.event("listening")?;
    let demo = lab.client().command(&program!("linger-demo"));
    let demo = demo.args(args!["-i", host, "-p", port]).args(flags).spawn()?;
    demo.event("filled")?;
    Ok([reader, demo])
}

/// How long close() took, in milliseconds.
fn closing(demo: &Process) -> anyhow::Result<u64> {
    Ok(demo.event("closed")?.get("ms").unwrap_or_default().parse()?)
}

#[rstest]
#[case::lingers("linger")]
#[case::control("plain")]
fn a_close_that_lingers_waits(#[case] how: &str, #[values(Family::V4, Family::V6)] family: Family) {
    experiment!(
        format!("{how}-{family}"),
        "What does close() wait for after SO_LINGER{1,1}?",
        |lab| {
            let port = lab.port()?;
            let [_reader, demo] = full(lab, family, port, &["--how", how])?;
            demo.ending()?;
            let waited = closing(&demo)?;
            if how == "linger" {
                lab.claim(
                    format!("for its second, since the peer takes nothing: {waited} ms"),
                    (950..10_000).contains(&waited),
                );
            } else {
                lab.claim(
                    format!("control: without the option it does not wait: {waited} ms"),
                    waited < 900,
                );
            }
            lab.claim_eq(
                "the bytes are still to be sent, by the kernel alone",
                lab.states(lab.client(), port)?,
                [FinWait1],
            );
            Ok(())
        }
    );
}

#[rstest]
fn a_close_that_lingers_returns_once_all_is_acknowledged(
    #[values(Family::V4, Family::V6)] family: Family,
) {
    experiment!(family, "What does close() wait for after SO_LINGER{1,600}?", |lab| {
        let port = lab.port()?;
        let [mut reader, demo] = full(lab, family, port, &["--seconds", "600"])?;
        demo.event("set")?;
        reached(lab.client(), port, &[FinWait1])?;
        blocked(lab.client(), &demo)?;
        let waits = !demo.events().iter().any(|event| event.verb == "closed");
        lab.claim("while the peer takes nothing, close waits", waits);
        reader.type_line("read")?;
        demo.ending()?;
        lab.claim_eq(
            format!(
                "after {} ms it returns: the peer has acknowledged the FIN, too",
                closing(&demo)?
            ),
            lab.states(lab.client(), port)?,
            [FinWait2],
        );
        Ok(())
    });
}

#[rstest]
fn an_exit_does_not_linger(#[values(Family::V4, Family::V6)] family: Family) {
    experiment!(family, "Does exit() wait for SO_LINGER{1,600}?", |lab| {
        let port = lab.port()?;
        let flags = ["--seconds", "600", "--how", "exit"];
        let [_reader, demo] = full(lab, family, port, &flags)?;
        lab.claim_eq("the process ends at once", demo.ending()?, Ending::Exit(0));
        lab.claim_eq(
            "though its bytes are still to be sent, by the kernel alone",
            lab.states(lab.client(), port)?,
            [FinWait1],
        );
        Ok(())
    });
}

#[rstest]
fn a_forked_copy_keeps_the_connection_open(#[values(Family::V4, Family::V6)] family: Family) {
    experiment!(family, "Does close() send a FIN while a child has a copy?", |lab| {
        let (closing, shutting) = (lab.port()?, lab.port()?);
        let capture = lab.capture()?;
        let close = |port: u16, how: &str| -> anyhow::Result<(Process, Process)> {
            let server = listening(lab, family, port, &["accept", "fork", how, "pause"])?;
            let client = calling(lab, family, port, &["recv"])?;
            server.event("paused")?;
            Ok((server, client))
        };
        let (_server, client) = close(closing, "close")?;
        let (_other, told) = close(shutting, "shutdown:wr")?;
        told.ending()?;
        lab.claim_eq("shutdown() sends one, for all copies", answers(&told), ["recv 0"]);
        lab.claim_eq("close() does not", lab.states(lab.client(), closing)?, [Established]);
        lab.claim_eq("and the client waits on", answers(&client).len(), 0);
        let wire = capture.finish()?;
        let fin = |port| -> anyhow::Result<bool> {
            Ok(wire.at("client").flow(port)?.facts[Side::Server].fin.is_some())
        };
        lab.claim_eq(
            "no FIN on the wire; control: one after shutdown",
            (fin(closing)?, fin(shutting)?),
            (false, true),
        );
        Ok(())
    });
}
