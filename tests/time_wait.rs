//! TIME_WAIT: who gets it and what it forbids; and the ports that a client may run out of.

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use common::answers;
use common::play::{calling, listener, listening, ms, peer, reached, sockets};
use rstest::rstest;
use serverlab::lab::event::Event;
use serverlab::lab::experiment::Lab;
use serverlab::lab::fault::Hook;
use serverlab::lab::flow::Side;
use serverlab::lab::host::Family;
use serverlab::lab::packet::Flags;
use serverlab::lab::process::Process;
use serverlab::lab::sockets::SocketRow;
use serverlab::lab::sockets::TcpState::{Established, FinWait2, Listen, TimeWait};
use serverlab::{args, experiment, program};

/// A server that takes connections, pauses, then starts again without and with SO_REUSEADDR.
fn server(lab: &Lab, family: Family, port: u16, flags: &[&str]) -> anyhow::Result<Process> {
    let at = args!["-i", lab.server().address(family), "-p", port];
    let demo = lab.server().command(&program!("time-wait-demo"));
    let server = demo.args(at).args(flags).typed().spawn()?;
    server.event("listening")?;
    Ok(server)
}

#[rstest]
#[case::client(Side::Client)]
#[case::server(Side::Server)]
fn it_stays_with_who_closes_first(
    #[case] first: Side,
    #[values(Family::V4, Family::V6)] family: Family,
) {
    experiment!(format!("{first}-{family}"), "Who keeps TIME_WAIT?", |lab| {
        let port = lab.port()?;
        const CONNECTIONS: usize = 5;
        let capture = lab.capture()?;
        let turn = if first == Side::Server { "first" } else { "second" };
        let count = CONNECTIONS.to_string();
        let mut server = server(lab, family, port, &["--close", turn, "--connections", &count])?;
        let steps = [["connect"; CONNECTIONS].as_slice(), &["pause"], &["close"; CONNECTIONS]];
        let mut client = peer(lab.client(), lab.server().address(family), port, &steps.concat())?;
        let (with, without) = match first {
            Side::Client => (lab.client(), lab.server()),
            Side::Server => (lab.server(), lab.client()),
        };
        let [earlier, later] = match first {
            Side::Client => [&mut client, &mut server],
            Side::Server => [&mut server, &mut client],
        };
        earlier.event("paused")?;
        earlier.type_line("close")?;
        // On two processors the last FIN may overtake the ACK before it: then TIME_WAIT answers that
        // ACK, and the RST that comes back ends it (RFC 1337). So the ACKs are waited for.
        reached(with, port, &[FinWait2; CONNECTIONS])?;
        later.event("paused")?;
        later.type_line("close")?;
        reached(with, port, &[TimeWait; CONNECTIONS])?;
        reached(without, port, &[])?;
        lab.claim(format!("{CONNECTIONS} on the {first}, none on the other"), true);
        let wire = capture.finish()?;
        let firsts = wire.at(with.name()).to_port(port);
        lab.claim(
            format!("the {first} sent the first FIN of each connection"),
            firsts.len() == CONNECTIONS
                && firsts.iter().all(|flow| flow.facts.first_fin_by() == Some(first)),
        );
        server.events_of("paused", 2)?;
        server.type_line("start again")?;
        server.ending()?;
        let (sentence, failures) = match first {
            Side::Client => ("none: the server binds its port without SO_REUSEADDR", vec![]),
            Side::Server => ("the server needs SO_REUSEADDR for it", vec!["bind EADDRINUSE"]),
        };
        lab.claim_eq(format!("what it forbids: {sentence}"), answers(&server), failures);
        Ok(())
    });
}

#[rstest]
#[case::old_without(false)]
#[case::old_with(true)]
fn a_server_starts_again_over_time_wait(
    #[case] old: bool,
    #[values(Family::V4, Family::V6)] family: Family,
) {
    let case = format!("old-{}-{family}", if old { "with" } else { "without" });
    experiment!(case, "Can a server bind its port while TIME_WAIT lasts?", |lab| {
        let port = lab.port()?;
        let mut server = server(lab, family, port, if old { &[] } else { &["--old-without"] })?;
        let mut client = calling(lab, family, port, &["recv", "pause", "close"])?;
        server.event("paused")?;
        server.type_line("close first")?;
        client.event("paused")?;
        reached(lab.server(), port, &[FinWait2])?;
        client.type_line("close")?;
        reached(lab.server(), port, &[TimeWait])?;
        server.events_of("paused", 2)?;
        server.type_line("start again")?;
        server.ending()?;
        let (sentence, failures) = match old {
            true => ("it can if the old socket and the new one have SO_REUSEADDR", 1),
            false => ("it cannot (EADDRINUSE): the old socket had no SO_REUSEADDR", 2),
        };
        lab.claim_eq(sentence, answers(&server), vec!["bind EADDRINUSE"; failures]);
        // bind failed: listen then takes a port of the kernel's choice, which nobody asked for.
        let listening = server.events_of("listening", 3)?.into_iter();
        let address = |event: Event| event.get("address")?.parse::<SocketAddr>().ok();
        let ports: Vec<u16> = listening.filter_map(address).map(|at| at.port()).collect();
        let elsewhere = ports.iter().filter(|at| **at != port && **at != 0).count();
        lab.claim_eq("listen succeeds after each failure, at another port", elsewhere, failures);
        Ok(())
    });
}

#[rstest]
#[case::bound("bound", [1, 1])]
#[case::listener("listener", [8, 1])]
#[case::connection("connection", [2, 0])]
#[case::time_wait("time-wait", [2, 0])]
fn one_address_for_two_sockets(
    #[case] against: &str,
    #[case] listeners: [usize; 2],
    #[values(Family::V4, Family::V6)] family: Family,
) {
    experiment!(
        format!("{against}-{family}"),
        "Which options let a second socket bind and listen?",
        |lab| {
            let args = args!["-i", lab.server().address(family), "--against", against];
            let demo = lab.server().command(&program!("reuse-demo")).args(args).typed().spawn()?;
            demo.event("paused")?;
            let events = demo.events();
            let answers = |same: Option<&str>| {
                let field = |event: &Event, key| event.get(key).unwrap_or("?").to_owned();
                let ours = events.iter().filter(|event| event.verb == "checked").filter(|event| {
                    let (old, new) = (field(event, "old"), field(event, "new"));
                    if old == new && old != "none" { same == Some(&*old) } else { same.is_none() }
                });
                ours.map(|event| format!("{} {}", field(event, "call"), field(event, "answer")))
                    .collect::<Vec<_>>()
            };
            lab.claim_eq(
                "none with neither option, nor with one that the other socket has not",
                answers(None),
                ["bind EADDRINUSE"; 7],
            );
            let reuseaddr: &[&str] = match against {
                "bound" => &["bind ok", "listen ok", "first EADDRINUSE"],
                "listener" => &["bind EADDRINUSE"],
                _ => &["bind ok", "listen ok"],
            };
            let reuseport: &[&str] = match against {
                "bound" => &["bind ok", "listen ok", "first ok"],
                _ => &["bind ok", "listen ok"],
            };
            lab.claim_eq("SO_REUSEADDR on both", answers(Some("reuseaddr")), reuseaddr);
            lab.claim_eq("SO_REUSEPORT on both", answers(Some("reuseport")), reuseport);
            // The other witness: the rows of /proc/net/tcp.
            let rows = lab.server().tcp_sockets()?.into_iter();
            let mut ports = BTreeMap::<u16, usize>::new();
            let host = lab.server().address(family);
            for row in rows.filter(|row| row.state == Listen && row.local.ip() == host) {
                *ports.entry(row.local.port()).or_default() += 1;
            }
            let with = |count| ports.values().filter(|listeners| **listeners == count).count();
            let sentence = "ports with one listener, and with two: only SO_REUSEPORT's";
            lab.claim_eq(sentence, [with(1), with(2)], listeners);
            Ok(())
        }
    );
}

#[rstest]
fn a_new_syn_ends_a_servers_time_wait(#[values(Family::V4, Family::V6)] family: Family) {
    experiment!(family, "Does a server's TIME_WAIT keep the same client out?", |lab| {
        let (port, own) = (lab.port()?, lab.port()?);
        let host = lab.server().address(family);
        let server =
            listening(lab, family, port, &["accept", "close", "accept", "send:2", "recv"])?;
        let capture = lab.capture()?;
        let bind = format!("bind:{}", SocketAddr::new(lab.client().address(family), own));
        let steps = ["socket", &bind, "connect", "recv", "pause", "close"];
        let mut once = peer(lab.client(), host, port, &steps)?;
        once.event("paused")?;
        reached(lab.server(), port, &[FinWait2])?;
        once.type_line("close")?;
        once.ending()?;
        reached(lab.server(), port, &[TimeWait])?;
        reached(lab.client(), port, &[])?; // in LAST_ACK it would still have the port, and bind fail
        let again = peer(lab.client(), host, port, &["socket", &bind, "connect", "recv"])?;
        again.ending()?;
        server.ending()?;
        lab.claim_eq("the same four-tuple connects again at once", answers(&again), ["recv 2"]);
        let wire = capture.finish()?;
        let flows = wire.at("server").to_port(port);
        lab.claim(
            "both connections have the same ports",
            flows.len() == 2 && flows.iter().all(|flow| flow.facts.client.port() == own),
        );
        let syns =
            flows.iter().map(|flow| flow.facts[Side::Client].retransmitted).collect::<Vec<_>>();
        lab.claim_eq("and the new SYN is answered the first time", syns, [0, 0]);
        Ok(())
    });
}

#[rstest]
fn ports_used_up(#[values(Family::V4, Family::V6)] family: Family) {
    experiment!(family, "How many connections can a client with ten ports have?", |lab| {
        let host = lab.server().address(family);
        let (one, two) = (lab.port()?, lab.port()?);
        let _servers =
            [listening(lab, family, one, &["pause"])?, listening(lab, family, two, &["pause"])?];
        // Each run has ten ports of its own, and keeps its connections until the end.
        let run = |how: &str| -> anyhow::Result<(Process, Vec<usize>)> {
            let from = lab.client_ports(10)?;
            let (servers, own) = (format!("{one},{two}"), lab.client().address(family));
            let to = args!["-i", host, "-p", servers, "--own", own, "--how", how, "--from", from];
            let demo = lab.client().command(&program!("ephemeral-ports-demo"));
            let demo = demo.args(to).typed().spawn()?;
            demo.event("paused")?;
            let completed = demo.events_of("completed", 2)?;
            let count = |event: &Event| event.get("connections")?.parse().ok();
            Ok((demo, completed.iter().filter_map(count).collect()))
        };

        let (connect, counts) = run("connect")?;
        lab.claim_eq("connect alone: ten to one server, ten to another", counts, [10, 10]);
        lab.claim_eq("then none is left", answers(&connect), ["connect EADDRNOTAVAIL"; 2]);

        let (bind, counts) = run("bind")?;
        lab.claim_eq("bind to port 0 takes a port altogether: ten in all", counts, [10, 0]);
        lab.claim_eq("and it is bind that fails", answers(&bind), ["bind EADDRINUSE"; 2]);

        let (late, counts) = run("late")?;
        lab.claim_eq("with IP_BIND_ADDRESS_NO_PORT: ten to each again", counts, [10, 10]);
        lab.claim_eq("and connect fails", answers(&late), ["connect EADDRNOTAVAIL"; 2]);

        let rows = lab.client().tcp_sockets()?;
        let ours =
            |row: &&SocketRow| row.state == Established && [one, two].contains(&row.remote.port());
        let (mut tuples, mut ports) = (BTreeSet::new(), BTreeSet::new());
        for row in rows.iter().filter(ours) {
            tuples.insert((row.local, row.remote));
            ports.insert(row.local.port());
        }
        lab.claim_eq("fifty four-tuples from thirty ports", (tuples.len(), ports.len()), (50, 30));
        Ok(())
    });
}

/// Whether this kernel repeats a SYN each second at first (tcp_syn_linear_timeouts, Linux 6.5).
fn linear() -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut numbers = release.split(['.', '-']).map_while(|part| part.parse::<u32>().ok());
    (numbers.next(), numbers.next()) >= (Some(6), Some(5))
}

#[rstest]
fn a_syn_is_sent_again(#[values(Family::V4, Family::V6)] family: Family) {
    experiment!(
        family,
        "When does connect() send its SYN again, and when does it give up?",
        |lab| {
            let port = lab.port()?;
            let _server = listening(lab, family, port, &["pause"])?;
            let fault = lab.server().fault(Hook::Input, &format!("tcp dport {port} drop"))?;
            let capture = lab.capture()?;
            let to = args!["-i", lab.server().address(family), "-p", port, "--syncnt", 2];
            let client = lab.client().run(&program!("syn-retries-demo"), to)?;
            client.ending()?;
            fault.lift()?;
            let wire = capture.finish()?;
            lab.claim_eq("connect fails with ETIMEDOUT", answers(&client), ["connect ETIMEDOUT"]);
            let flow = wire.at("client").flow(port)?;
            let syns: Vec<u64> =
                flow.steps.iter().filter(|s| s.flags.has(Flags::SYN)).map(|s| s.at).collect();
            let gaps: Vec<u64> = syns.windows(2).map(|pair| ms(pair[1] - pair[0])).collect();
            lab.claim(
                format!("the first again after 0.9 to 1.9 s: {gaps:?} ms"),
                gaps.first().is_some_and(|gap| (900..1900).contains(gap)),
            );
            let doubled = gaps.get(1).is_some_and(|gap| *gap >= 1900);
            let sentence = match linear() {
                true => "the second after another second, not two (since Linux 6.5; seen on 6.18)",
                false => "the second after two seconds (before Linux 6.5)",
            };
            lab.claim_eq(sentence, doubled, !linear());
            let (count, sentence) = match linear() {
                true => (6, "TCP_SYNCNT 2 means five times again (since Linux 6.5; seen on 6.18)"),
                false => (3, "TCP_SYNCNT 2 means twice again (before Linux 6.5)"),
            };
            lab.claim_eq(sentence, syns.len(), count);
            let waited = client.event("failed")?.get("ms").and_then(|ms| ms.parse::<u64>().ok());
            lab.claim(
                format!("in 7 s, the sum of 1, 2 and 4: {} ms", waited.unwrap_or_default()),
                waited.is_some_and(|waited| (6500..9500).contains(&waited)),
            );
            lab.claim("nothing answers", flow.steps.iter().all(|step| step.from == Side::Client));
            Ok(())
        }
    );
}

#[rstest]
fn it_is_not_shown_to_any_process(#[values(Family::V4, Family::V6)] family: Family) {
    experiment!(family, "Whose is a connection in TIME_WAIT?", |lab| {
        let port = lab.port()?;
        let mut server = listening(lab, family, port, &["accept", "close", "pause"])?;
        let mut client = calling(lab, family, port, &["recv", "pause", "close", "pause"])?;
        client.event("paused")?;
        reached(lab.server(), port, &[FinWait2])?;
        client.type_line("close")?;
        client.events_of("paused", 2)?;
        reached(lab.server(), port, &[TimeWait])?;
        let rows = sockets(lab.server(), port)?;
        lab.claim_eq(
            "nobody's: its inode is 0",
            rows.iter().map(|row| row.inode).collect::<Vec<_>>(),
            [0],
        );
        let listening = listener(lab.server(), port)?;
        lab.claim("control: the listener's is not", listening.is_some_and(|row| row.inode != 0));
        server.type_line("end")?;
        server.ending()?;
        reached(lab.server(), port, &[TimeWait])?;
        lab.claim("and it outlives the process", true);
        Ok(())
    });
}
