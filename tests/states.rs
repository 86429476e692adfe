//! The states of both ends: handshake, closes, and the rarer ways to open and to close.

mod common;

use common::answers;
use common::play::{
    blocked, calling, claim_counter, connecting, counted, listening, peer, reached, sockets,
};
use rstest::rstest;
use serverlab::lab::experiment::Lab;
use serverlab::lab::fault::Hook;
use serverlab::lab::flow::Side;
use serverlab::lab::host::{Family, Host};
use serverlab::lab::packet::Flags;
use serverlab::lab::process::{Ending, Process};
use serverlab::lab::sockets::TcpState::{
    self, CloseWait, Closing, Established, FinWait1, FinWait2, LastAck, SynRecv, SynSent, TimeWait,
};
use serverlab::{args, experiment, program};

/// Waits until both ends have these states, and claims it.
fn claim_states(
    lab: &Lab,
    port: u16,
    when: &str,
    client: &[TcpState],
    server: &[TcpState],
) -> anyhow::Result<()> {
    reached(lab.client(), port, client)?;
    reached(lab.server(), port, server)?;
    lab.claim(format!("{when}: client {client:?}, server {server:?}"), true);
    Ok(())
}

/// One end of states-demo, which waits for a line before each step.
fn end(lab: &Lab, family: Family, port: u16, of: &str, flags: &[&str]) -> anyhow::Result<Process> {
    let host = if of == "server" { lab.server() } else { lab.client() };
    let at = args!["-i", lab.server().address(family), "-p", port, "--end", of];
    host.command(&program!("states-demo")).args(at).args(flags).typed().spawn()
}

/// The states that an end was told by TCP_INFO, in order.
fn told(process: &Process) -> Vec<String> {
    let events = process.events().into_iter();
    events.filter_map(|event| event.get("state").map(str::to_owned)).collect()
}

#[rstest]
fn from_the_handshake_to_time_wait(#[values(Family::V4, Family::V6)] family: Family) {
    experiment!(family, "Through which states do both ends go?", |lab| {
        let port = lab.port()?;
        let before = [lab.client().counters()?, lab.server().counters()?];
        let capture = lab.capture()?;
        let mut server = end(lab, family, port, "server", &[])?;
        server.event("listening")?;
        let mut client = end(lab, family, port, "client", &[])?;
        server.event("paused")?;
        client.event("paused")?;
        claim_states(lab, port, "after the handshake", &[Established], &[Established])?;
        server.type_line("wait for the end")?;
        client.type_line("close your half")?;
        server.events_of("paused", 2)?;
        claim_states(lab, port, "one FIN, acknowledged", &[FinWait2], &[CloseWait])?;
        server.type_line("answer")?;
        client.events_of("got", 4)?; // it has told its state with the answer
        server.events_of("paused", 3)?;
        claim_states(lab, port, "data still goes the other way", &[FinWait2], &[CloseWait])?;
        server.type_line("close")?;
        claim_states(lab, port, "both FINs", &[TimeWait], &[])?;
        for (end, paused) in [(&mut client, 2), (&mut server, 4)] {
            end.events_of("paused", paused)?;
            end.type_line("end")?;
            end.ending()?;
        }
        claim_counter(lab, lab.client(), &before[0], "TcpActiveOpens", 1)?;
        claim_counter(lab, lab.server(), &before[1], "TcpPassiveOpens", 1)?;
        let wire = capture.finish()?;
        lab.claim(
            "three segments open, two FINs close",
            wire.ladder(
                port,
                "client > server  S
                 server > client  S.
                 client > server  .
                 client > server  F.  seq 1
                 server > client  P.  1:4
                 server > client  F.  seq 4 ack 2",
            ),
        );
        lab.claim_eq("what the client gets", answers(&client), ["recv 3", "recv 0"]);
        // Whether the FIN is acknowledged before shutdown has returned is a matter of luck.
        let mut told = [told(&client), told(&server)];
        let after_shutdown = [told[0].remove(2), told[1].remove(4)];
        lab.claim_eq(
            "what the client is told, but for what follows its shutdown: no TIME-WAIT",
            told[0].join(" "),
            "CLOSED ESTABLISHED FIN-WAIT-2 CLOSED CLOSED",
        );
        lab.claim_eq(
            "what the server is told",
            told[1].join(" "),
            "LISTEN ESTABLISHED CLOSE-WAIT CLOSE-WAIT CLOSED",
        );
        let [client, server] = &after_shutdown;
        let may = ["FIN-WAIT-1", "FIN-WAIT-2"].contains(&client.as_str())
            && ["LAST-ACK", "CLOSED"].contains(&server.as_str());
        lab.claim(format!("shutdown returns in {client} and in {server}"), may);
        Ok(())
    });
}

#[rstest]
fn a_lost_last_ack_leaves_syn_recv(#[values(Family::V4, Family::V6)] family: Family) {
    experiment!(family, "What if the handshake's last ACK is lost?", |lab| {
        let port = lab.port()?;
        let server = listening(lab, family, port, &["accept", "recv", "recv"])?;
        let lost = format!("tcp dport {port} tcp flags & (syn | ack | psh) == ack drop");
        let fault = lab.server().fault(Hook::Input, &lost)?;
        let capture = lab.capture()?;
        let mut client = calling(lab, family, port, &["pause", "send:5", "pause", "close"])?;
        client.event("paused")?;
        claim_states(lab, port, "without the last ACK", &[Established], &[SynRecv])?;
        blocked(lab.server(), &server)?;
        lab.claim_eq("accept waits on", server.events().len(), 1);
        client.type_line("send")?;
        claim_states(
            lab,
            port,
            "after data, which acknowledges too",
            &[Established],
            &[Established],
        )?;
        server.event("received")?;
        fault.lift()?;
        client.type_line("close")?;
        server.ending()?;
        capture.finish()?;
        lab.claim_eq("accept returns, recv reads it", answers(&server), ["recv 5", "recv 0"]);
        Ok(())
    });
}

#[rstest]
fn a_lost_fin_leaves_fin_wait_1_and_last_ack(#[values(Family::V4, Family::V6)] family: Family) {
    experiment!(family, "Where do ends wait whose FIN is not acknowledged?", |lab| {
        let port = lab.port()?;
        let mut server = listening(lab, family, port, &["accept", "pause", "close"])?;
        let fin = "tcp flags & fin == fin drop";
        let capture = lab.capture()?;
        let mut client = calling(lab, family, port, &["pause", "close"])?;
        server.event("paused")?;
        client.event("paused")?;
        let fault = lab.server().fault(Hook::Input, fin)?;
        client.type_line("close")?;
        client.ending()?;
        claim_states(lab, port, "the client's FIN is lost", &[FinWait1], &[Established])?;
        let other = lab.client().fault(Hook::Input, fin)?;
        fault.lift()?;
        claim_states(lab, port, "it is sent again", &[FinWait2], &[CloseWait])?;
        server.type_line("close")?;
        server.ending()?;
        claim_states(lab, port, "the server's FIN is lost", &[FinWait2], &[LastAck])?;
        other.lift()?;
        claim_states(lab, port, "it is sent again, too", &[TimeWait], &[])?;
        let wire = capture.finish()?;
        for (at, side) in [("server", Side::Client), ("client", Side::Server)] {
            let flow = wire.at(at).flow(port)?;
            let fins =
                flow.steps.iter().filter(|step| step.from == side && step.flags.has(Flags::FIN));
            let fins = fins.count();
            lab.claim(format!("the {side} sent its FIN {fins} times"), fins >= 2);
        }
        Ok(())
    });
}

#[rstest]
fn a_simultaneous_close_ends_in_two_time_waits(#[values(Family::V4, Family::V6)] family: Family) {
    experiment!(family, "Who keeps TIME_WAIT if both ends close at once?", |lab| {
        let port = lab.port()?;
        let mut server = end(lab, family, port, "server", &["--first"])?;
        server.event("listening")?;
        let capture = lab.capture()?;
        let mut client = end(lab, family, port, "client", &[])?;
        server.event("paused")?;
        client.event("paused")?;
        // The first FINs are lost, so that each end closes before it hears of the other's close.
        let fin = "tcp flags & fin == fin drop";
        let to_server = lab.server().fault(Hook::Input, fin)?;
        let to_client = lab.client().fault(Hook::Input, fin)?;
        client.type_line("close")?;
        server.type_line("close")?;
        claim_states(lab, port, "both have closed", &[FinWait1], &[FinWait1])?;
        // What an end is told is what it asks for after its call: it must have asked before we go on.
        client.events_of("got", 3)?;
        server.events_of("got", 3)?;
        to_server.lift()?;
        claim_states(lab, port, "one FIN has come through", &[FinWait2], &[Closing])?;
        server.events_of("got", 4)?;
        to_client.lift()?;
        claim_states(lab, port, "both have", &[TimeWait], &[TimeWait])?;
        for end in [&mut client, &mut server] {
            end.events_of("paused", 2)?;
            end.type_line("end")?;
            end.ending()?;
        }
        lab.claim_eq(
            "what the client is told",
            told(&client).join(" "),
            "CLOSED ESTABLISHED FIN-WAIT-1 CLOSED CLOSED",
        );
        lab.claim_eq(
            "what the server is told: CLOSING, since it has a FIN and no answer to its own",
            told(&server).join(" "),
            "LISTEN ESTABLISHED FIN-WAIT-1 CLOSING CLOSED",
        );
        let wire = capture.finish()?;
        let flow = wire.at("client").flow(port)?;
        let acknowledges = |side: Side| {
            let mut sent = flow.steps.iter().filter(|step| step.from == side);
            sent.find(|step| step.flags.has(Flags::FIN)).and_then(|step| step.ack)
        };
        lab.claim_eq(
            "neither end's first FIN acknowledges the other's",
            [Side::Client, Side::Server].map(acknowledges),
            [Some(1); 2],
        );
        Ok(())
    });
}

#[rstest]
fn a_simultaneous_open_needs_no_listener(#[values(Family::V4, Family::V6)] family: Family) {
    experiment!(family, "Can two ends connect to one another?", |lab| {
        let port = lab.port()?;
        // The first SYNs are lost: else the one that comes first meets a closed port, and a RST.
        let syn = "tcp flags & (syn | ack) == syn drop";
        let faults = [lab.server().fault(Hook::Input, syn)?, lab.client().fault(Hook::Input, syn)?];
        let before = [lab.client().counters()?, lab.server().counters()?];
        let capture = lab.capture()?;
        let (client, server) = (lab.client(), lab.server());
        let open = |own: &Host, other: &Host| {
            let (own_address, other) = (own.address(family), other.address(family));
            let args = args!["--own", own_address, "-i", other, "-p", port];
            own.command(&program!("simultaneous-open-demo")).args(args).typed().spawn()
        };
        let (one, other) = (open(client, server)?, open(server, client)?);
        claim_states(lab, port, "both have sent a SYN, nobody listens", &[SynSent], &[SynSent])?;
        for fault in faults {
            fault.lift()?;
        }
        one.event("paused")?;
        other.event("paused")?;
        claim_states(lab, port, "the SYNs have crossed", &[Established], &[Established])?;
        let text = |end: &Process| {
            Ok::<_, anyhow::Error>(end.event("received")?.get("text").map(str::to_owned))
        };
        let greeting = |from: &Host| Some(format!("I am {}", from.address(family)));
        lab.claim_eq(
            "data goes both ways",
            [text(&one)?, text(&other)?],
            [greeting(server), greeting(client)],
        );
        for (host, before) in [(client, &before[0]), (server, &before[1])] {
            claim_counter(lab, host, before, "TcpActiveOpens", 1)?;
            claim_counter(lab, host, before, "TcpPassiveOpens", 0)?;
        }
        let wire = capture.finish()?;
        for view in ["client", "server"] {
            let flow = wire.at(view).flow(port)?;
            let bare = |side| {
                let mut sent = flow.steps.iter().filter(move |step| step.from == side);
                sent.any(|step| step.flags.has(Flags::SYN) && !step.flags.has(Flags::ACK))
            };
            lab.claim(
                format!("as the {view} saw it, each has sent a bare SYN, and none a RST"),
                bare(Side::Client) && bare(Side::Server) && flow.facts.reset_by().is_none(),
            );
        }
        Ok(())
    });
}

#[rstest]
fn a_socket_connects_to_itself(#[values(Family::V4, Family::V6)] family: Family) {
    experiment!(family, "What if connect() is given the port that it connects to?", |lab| {
        let host = lab.client();
        let from = lab.client_ports(11)?;
        let demo = |port: u16| {
            let args = args!["-i", host.address(family), "-p", port, "--from", from];
            host.command(&program!("self-connect-demo")).args(args).typed().spawn()
        };
        let port = from + 4;
        let mut one = demo(port)?;
        let tries = one.event("connected")?.get("tries").map(str::to_owned);
        one.event("paused")?;
        let mut rows = sockets(host, port)?;
        rows.retain(|row| row.local.ip() == host.address(family)); // Compose's hosts live on
        lab.claim_eq(
            format!("nobody listens, and try {} connects: one socket", tries.unwrap_or_default()),
            rows.iter().map(|row| row.state).collect::<Vec<_>>(),
            [Established],
        );
        lab.claim("whose peer is its own address", rows.iter().all(|row| row.local == row.remote));
        lab.claim_eq(
            "it reads what it has sent, and keeps the server from its port",
            answers(&one),
            ["send 13", "recv 13", "bind EADDRINUSE"],
        );
        one.type_line("end")?;
        lab.claim_eq("it ends well", one.ending()?, Ending::Exit(0));
        // Control: the same for a port that the client cannot be given.
        let control = demo(from + 10)?;
        control.ending()?;
        lab.claim_eq(
            "control: behind the last of the ten ports, all of 200 tries are refused",
            answers(&control),
            ["connect ECONNREFUSED"],
        );
        Ok(())
    });
}

#[rstest]
#[case::refused("refused")]
#[case::accepted("accepted")]
#[case::silent("silent")]
fn a_connect_that_does_not_wait(
    #[case] answer: &str,
    #[values(Family::V4, Family::V6)] family: Family,
) {
    experiment!(
        format!("{answer}-{family}"),
        "How does a non-blocking connect() tell its end?",
        |lab| {
            let port = lab.port()?;
            let listens = answer != "refused";
            let _server =
                if listens { Some(listening(lab, family, port, &["pause"])?) } else { None };
            let silence = format!("tcp dport {port} drop");
            let _fault = match answer {
                "silent" => Some(lab.server().fault(Hook::Input, &silence)?),
                _ => None,
            };
            let timeout = if answer == "silent" { 200 } else { 60_000 };
            let to = args!["-i", lab.server().address(family), "-p", port, "--timeout", timeout];
            let client = lab.client().run(&program!("nonblocking-connect-demo"), to)?;
            lab.claim_eq("connect: EINPROGRESS", answers(&client), ["connect EINPROGRESS"]);
            let revents = client.event("polled")?.get("revents").map(str::to_owned);
            let (expected, errors) = match answer {
                "accepted" => ("out", vec!["0", "0"]),
                "refused" => ("out+err+hup", vec!["ECONNREFUSED", "0"]),
                _ => ("none", vec![]),
            };
            lab.claim_eq("what poll for writing tells", revents.as_deref(), Some(expected));
            let events = client.events();
            let got = events.iter().filter(|event| event.verb == "got");
            let seen: Vec<_> =
                got.map(|event| event.get("errno").or(event.get("value")).unwrap_or("?")).collect();
            lab.claim_eq("SO_ERROR tells which, once", seen, errors);
            Ok(())
        }
    );
}

#[rstest]
fn what_accept_inherits(#[values(Family::V4, Family::V6)] family: Family) {
    experiment!(family, "Which options of a listener has an accepted socket?", |lab| {
        let port = lab.port()?;
        let at = args!["-i", lab.server().address(family), "-p", port];
        let server = lab.server().spawn(&program!("accept-inherits-demo"), at)?;
        server.event("listening")?;
        connecting(lab, family, port, &["recv"])?;
        server.ending()?;
        let both = |option: &str| {
            let events = server.events();
            let event = events.iter().find(|event| event.get("option") == Some(option))?;
            let value = |key| event.get(key)?.parse::<i32>().ok();
            Some((value("listener")?, value("connection")?))
        };
        for (option, value) in [
            ("TCP_NODELAY", 1),
            ("SO_KEEPALIVE", 1),
            ("TCP_KEEPIDLE", 77),
            ("TCP_USER_TIMEOUT", 9000),
            ("SO_RCVBUF", 100_000),
            ("SO_LINGER", 5),
        ] {
            let sentence = format!("{option}: {value} on the listener and on the connection");
            lab.claim_eq(sentence, both(option), Some((value, value)));
        }
        lab.claim_eq("O_NONBLOCK: no (BSD inherits it)", both("O_NONBLOCK"), Some((1, 0)));
        lab.claim_eq("close-on-exec: no", both("FD_CLOEXEC"), Some((1, 0)));
        Ok(())
    });
}

#[rstest]
fn a_second_listen_changes_the_backlog(#[values(Family::V4, Family::V6)] family: Family) {
    experiment!(family, "Can the backlog of a living listener be changed?", |lab| {
        let port = lab.port()?;
        let steps = ["pause", "listen-again:3", "pause"];
        let host = lab.server().address(family);
        let mut server = peer(lab.server(), host, port, &[&["listen:0"], &steps[..]].concat())?;
        server.event("paused")?;
        let before = lab.server().counters()?;
        connecting(lab, family, port, &[])?;
        let waiting = ["socket", "nonblock:on", "connect", "poll:out", "pause"];
        let client = peer(lab.client(), host, port, &waiting)?;
        counted(lab.server(), &before, "TcpExtListenOverflows", 1)?;
        lab.claim("the second client's SYN is dropped", true);
        server.type_line("more room")?;
        client.event("polled")?;
        lab.claim_eq(
            "after listen(3) its next SYN gets in",
            lab.states(lab.client(), port)?.contains(&Established),
            true,
        );
        Ok(())
    });
}
