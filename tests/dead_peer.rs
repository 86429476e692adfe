//! Peers that are gone without a word: keepalive, TCP_USER_TIMEOUT, black holes, and what a
//! firewall says.

mod common;

use common::answers;
use common::play::{calling, claim_counter, connecting, counted, demo, listening, ms, peer};
use rstest::rstest;
use serverlab::lab::experiment::Lab;
use serverlab::lab::fault::Hook;
use serverlab::lab::flow::{Flow, Side, Step};
use serverlab::lab::host::Family;
use serverlab::lab::packet::Flags;
use serverlab::lab::process::Process;
use serverlab::lab::sockets::TcpState::Established;
use serverlab::{experiment, program};

/// keepalive-demo, which probes after 1 s of silence and then each second, and takes two unanswered
/// probes for enough. It is connected, and waits for a line before the first second begins.
fn keeping_alive(lab: &Lab, family: Family, port: u16) -> anyhow::Result<Process> {
    let to = (lab.server().address(family), port);
    let flags = ["--idle", "1", "--interval", "1", "--count", "2"];
    let demo = demo(lab.client(), &program!("keepalive-demo"), to, &flags)?;
    demo.event("paused")?;
    Ok(demo)
}

/// The client's probes: no data, and the number of a byte that has been acknowledged already. An ACK
/// of the server's FIN may look like one, if a byte of the client's has overtaken it.
fn probes(flow: &Flow) -> Vec<&Step> {
    let mut next = 1;
    let mut found = Vec::new();
    let ends = |step: &&Step| step.from == Side::Server && step.flags.has(Flags::FIN);
    let before_end = flow.steps.iter().take_while(|step| !ends(step));
    for step in before_end.filter(|step| step.from == Side::Client) {
        if step.is_pure_ack() && step.seq == next - 1 {
            found.push(step);
        }
        next = next.max(step.range().end);
    }
    found
}

#[rstest]
fn keepalive_finds_a_live_peer_alive(#[values(Family::V4, Family::V6)] family: Family) {
    experiment!(family, "What does keepalive send to a peer that is there?", |lab| {
        let port = lab.port()?;
        let mut server = listening(lab, family, port, &["accept", "pause", "ready"])?;
        let before = lab.client().counters()?;
        let capture = lab.capture()?;
        let mut client = keeping_alive(lab, family, port)?;
        client.type_line("wait for the server")?;
        counted(lab.client(), &before, "TcpExtTCPKeepAlive", 2)?;
        lab.claim_eq("the connection lives", lab.states(lab.client(), port)?, [Established]);
        lab.claim_eq("and the client's program learns nothing of it", answers(&client).len(), 0);
        server.type_line("end")?;
        let ready = server.event("polled")?.get("revents").map(str::to_owned);
        lab.claim_eq("nor the server's: nothing is there to read", ready.as_deref(), Some("none"));
        client.ending()?;
        lab.claim_eq("what ends the wait is the server's FIN", &answers(&client)[0], "recv 0");
        let wire = capture.finish()?;
        let flow = wire.at("server").flow(port)?;
        let probes = probes(flow);
        lab.claim("the kernel counts its probes, and they are on the wire", probes.len() >= 2);
        let answered = probes.iter().filter(|probe| {
            let later = flow.steps.iter().find(|step| step.frame > probe.frame);
            later.is_some_and(|step| step.from == Side::Server && step.is_pure_ack())
        });
        lab.claim_eq("each is answered by an ACK at once", answered.count(), probes.len());
        Ok(())
    });
}

#[rstest]
fn keepalive_finds_a_black_hole(#[values(Family::V4, Family::V6)] family: Family) {
    experiment!(family, "Who notices that a peer is unreachable while nothing is sent?", |lab| {
        let (port, idle) = (lab.port()?, lab.port()?);
        let _servers = [
            listening(lab, family, port, &["accept", "pause"])?,
            listening(lab, family, idle, &["accept", "pause"])?,
        ];
        let before = lab.client().counters()?;
        let capture = lab.capture()?;
        let mut client = keeping_alive(lab, family, port)?;
        // The other one has a TCP_USER_TIMEOUT, which is about data, and has no data.
        let other = calling(lab, family, idle, &["set:user-timeout=1000", "recv"])?;
        other.event("set")?;
        let fault = lab.server().fault(Hook::Input, "meta l4proto tcp drop")?;
        client.type_line("wait for the server")?;
        client.ending()?;
        claim_counter(lab, lab.client(), &before, "TcpExtTCPAbortOnTimeout", 1)?;
        lab.claim_eq(
            "with keepalive: ETIMEDOUT",
            answers(&client),
            ["recv ETIMEDOUT", "recv 0", "send EPIPE"],
        );
        lab.claim_eq(
            "without: it waits for ever, and TCP_USER_TIMEOUT does nothing for an idle connection",
            (lab.states(lab.client(), idle)?, answers(&other).len()),
            (vec![Established], 0),
        );
        lab.claim_eq("the server knows nothing", lab.states(lab.server(), port)?, [Established]);
        fault.lift()?;
        let wire = capture.finish()?;
        let flow = wire.at("client").flow(port)?;
        lab.claim_eq("two probes", probes(flow).len(), 2);
        lab.claim_eq(
            "then a RST, to whom it may concern",
            flow.facts.reset_by(),
            Some(Side::Client),
        );
        let waited = client.event("woken")?.get("ms").and_then(|ms| ms.parse().ok()).unwrap_or(0);
        lab.claim(
            format!("after idle + probes x interval = 3 s: {waited} ms"),
            (2700..10_000).contains(&waited),
        );
        Ok(())
    });
}

#[rstest]
fn keepalive_finds_a_crashed_peer(#[values(Family::V4, Family::V6)] family: Family) {
    experiment!(family, "What answers keepalive after a crash and a new start?", |lab| {
        let port = lab.port()?;
        let at = (lab.server().address(family), port);
        let mut server = demo(lab.server(), &program!("half-open-demo"), at, &["crash"])?;
        server.event("listening")?;
        let capture = lab.capture()?;
        let mut client = keeping_alive(lab, family, port)?;
        server.event("paused")?;
        server.type_line("crash")?;
        server.event("closed")?;
        client.type_line("wait for the server")?;
        client.ending()?;
        lab.claim_eq(
            "recv fails with ECONNRESET",
            answers(&client),
            ["recv ECONNRESET", "recv 0", "send EPIPE"],
        );
        let wire = capture.finish()?;
        let flow = wire.at("server").flow(port)?;
        lab.claim_eq("one probe", probes(flow).len(), 1);
        lab.claim_eq("answered by a RST", flow.facts.reset_by(), Some(Side::Server));
        Ok(())
    });
}

#[rstest]
fn user_timeout_bounds_retransmission(#[values(Family::V4, Family::V6)] family: Family) {
    experiment!(family, "How long does TCP try to send into a black hole?", |lab| {
        let (port, patient) = (lab.port()?, lab.port()?);
        let _servers = [
            listening(lab, family, port, &["accept", "pause"])?,
            listening(lab, family, patient, &["accept", "pause"])?,
        ];
        let before = lab.client().counters()?;
        let capture = lab.capture()?;
        let sending = |port, timeout| {
            let to = (lab.server().address(family), port);
            demo(lab.client(), &program!("user-timeout-demo"), to, &["--timeout", timeout])
        };
        let mut client = sending(port, "1000")?;
        let mut other = sending(patient, "0")?;
        client.event("paused")?;
        other.event("paused")?;
        let fault = lab.server().fault(Hook::Input, "meta l4proto tcp drop")?;
        other.type_line("send")?;
        client.type_line("send")?;
        client.ending()?;
        claim_counter(lab, lab.client(), &before, "TcpExtTCPAbortOnTimeout", 1)?;
        let error = client.event("so-error")?;
        lab.claim_eq(
            "send succeeds; the error is ETIMEDOUT",
            error.get("errno"),
            Some("ETIMEDOUT"),
        );
        lab.claim_eq("after which it is a broken pipe", answers(&client), ["send 5", "send EPIPE"]);
        lab.claim_eq(
            "without TCP_USER_TIMEOUT it still tries (15 times, a quarter of an hour)",
            lab.states(lab.client(), patient)?,
            [Established],
        );
        fault.lift()?;
        let wire = capture.finish()?;
        let flow = wire.at("client").flow(port)?;
        let sent = flow.steps.iter().filter(|step| step.len > 0).collect::<Vec<_>>();
        let again = flow.facts[Side::Client].retransmitted;
        lab.claim(format!("the data was sent again, {again} times"), (2..10).contains(&again));
        let counted = error.get("retransmits").and_then(|count| count.parse().ok());
        lab.claim_eq("TCP_INFO counts as many", counted, Some(again));
        let gaps: Vec<u64> = sent.windows(2).map(|pair| ms(pair[1].at - pair[0].at)).collect();
        lab.claim(
            format!("first after 200 ms or more, the last gap longer than the first: {gaps:?} ms"),
            gaps.first().is_some_and(|gap| *gap >= 180) && gaps.last() > gaps.first(),
        );
        Ok(())
    });
}

#[rstest]
#[case::drop("drop", "ETIMEDOUT")]
#[case::reset("reject with tcp reset", "ECONNREFUSED")]
#[case::port_unreachable("reject with icmpx port-unreachable", "ECONNREFUSED")]
#[case::host_unreachable("reject with icmpx host-unreachable", "EHOSTUNREACH")]
#[case::admin_prohibited("reject with icmpx admin-prohibited", "EHOSTUNREACH")]
fn what_a_firewall_says(
    #[case] verdict: &str,
    #[case] errno: &str,
    #[values(Family::V4, Family::V6)] family: Family,
) {
    let word = verdict.rsplit(' ').next().unwrap_or(verdict);
    experiment!(format!("{word}-{family}"), "What does connect() make of a firewall?", |lab| {
        let port = lab.port()?;
        let _server = listening(lab, family, port, &["pause"])?;
        let rule = format!("tcp dport {port} {verdict}");
        let capture = lab.capture()?;
        connecting(lab, family, port, &["close"])?; // it would have worked
        let fault = lab.server().fault(Hook::Input, &rule)?;
        let host = lab.server().address(family);
        let client = peer(lab.client(), host, port, &["socket", "set:syncnt=1", "connect"])?;
        client.ending()?;
        let expected = match (errno, family, word) {
            // IPv6's ICMP has a code of its own for a refusal by policy.
            ("EHOSTUNREACH", Family::V6, "admin-prohibited") => "EACCES",
            _ => errno,
        };
        fault.lift()?;
        let wire = capture.finish()?;
        lab.claim_eq("how connect fails", answers(&client), [format!("connect {expected}")]);
        let flows = wire.at("client").to_port(port);
        lab.claim_eq(
            "control: without the rule the handshake is completed",
            flows[0].facts.handshake_completed(),
            true,
        );
        let facts = &flows[1].facts;
        lab.claim_eq(
            "a RST answers only the rule that sends one",
            facts.reset_by(),
            (word == "reset").then_some(Side::Server),
        );
        let again = facts[Side::Client].retransmitted;
        // An ICMP error that comes while connect() still holds the socket, as on a link this short,
        // is only noted (tcp_v4_err in net/ipv4/tcp_ipv4.c): the next SYN's ends it.
        let (expected, which) = match word {
            "drop" => (1..=7, "into silence"),
            "reset" => (0..=0, "not at all: a RST ends it at once"),
            _ => (0..=1, "once or not at all: a first ICMP error may only be noted"),
        };
        lab.claim(format!("the SYN is sent again {which} ({again})"), expected.contains(&again));
        Ok(())
    });
}
