//! Descriptors: none left, too many copies, inherited, in flight; and text copied with a process.

mod common;

use common::answers;
use common::play::{blocked, calling, connecting, demo, peer, sockets};
use rstest::rstest;
use serverlab::lab::experiment::Lab;
use serverlab::lab::flow::Side;
use serverlab::lab::host::Family;
use serverlab::lab::process::{DEADLINE, Ending, Process};
use serverlab::lab::sockets::{
    SocketRow,
    TcpState::{self, Established},
};
use serverlab::lab::wait::until;
use serverlab::lab::wire::Wire;
use serverlab::{args, experiment, program};

/// Three for standard input, output and error; listener, epoll, reserve: six. So there is room for
/// two clients.
const OPEN_FILES: u64 = 8;

fn emfile(lab: &Lab, family: Family, port: u16, cure: &str) -> anyhow::Result<Process> {
    let at = args!["-i", lab.server().address(family), "-p", port, "--cure", cure];
    let demo = lab.server().command(&program!("emfile-demo")).args(at).open_files(OPEN_FILES);
    let demo = demo.spawn()?;
    demo.event("listening")?;
    Ok(demo)
}

/// How often accept has failed, at least: the demo tells powers of two.
fn failures(demo: &Process) -> u32 {
    let events = demo.events();
    let told = events.iter().rfind(|event| event.verb == "accept-failed");
    told.and_then(|event| event.get("times")?.parse().ok()).unwrap_or(0)
}

#[rstest]
fn a_full_table_makes_epoll_spin(#[values(Family::V4, Family::V6)] family: Family) {
    experiment!(family, "What does an event loop do when accept fails with EMFILE?", |lab| {
        let port = lab.port()?;
        let demo = emfile(lab, family, port, "none")?;
        let mut two = calling(lab, family, port, &["connect", "pause", "close", "pause"])?;
        demo.events_of("accepted", 2)?;
        let third = calling(lab, family, port, &["recv"])?;
        third.event("connected")?;
        demo.wait_until("a thousand failures", |output| {
            let told = output.events.iter().any(|event| event.get("times") == Some("1024"));
            told.then_some(())
        })?;
        lab.claim("it tries more than a thousand times, and nobody has done anything", true);
        lab.claim_eq(
            "the third client is connected, and is told nothing",
            (lab.states(lab.client(), port)?, answers(&third).len()),
            (vec![Established; 3], 0),
        );
        two.type_line("one of you may go")?;
        demo.events_of("accepted", 3)?;
        lab.claim("when a client leaves, the third is accepted", true);
        Ok(())
    });
}

#[rstest]
fn a_reserve_turns_the_client_away(#[values(Family::V4, Family::V6)] family: Family) {
    experiment!(family, "What can be done with one descriptor kept in reserve?", |lab| {
        let port = lab.port()?;
        let demo = emfile(lab, family, port, "reserve")?;
        let _two = calling(lab, family, port, &["connect", "pause"])?;
        demo.events_of("accepted", 2)?;
        let third = connecting(lab, family, port, &["recv", "close"])?;
        lab.claim_eq(
            "the third client learns at once: its connection ends",
            answers(&third),
            ["recv 0"],
        );
        let fourth = connecting(lab, family, port, &["recv", "close"])?;
        lab.claim_eq("so does the fourth", answers(&fourth), ["recv 0"]);
        demo.wait_until("the second failure", |output| {
            output.events.iter().find(|event| event.get("times") == Some("2")).cloned()
        })?;
        blocked(lab.server(), &demo)?;
        lab.claim_eq("one failure a client, and no spin", failures(&demo), 2);
        Ok(())
    });
}

#[rstest]
fn a_masked_listener_lets_the_client_wait(#[values(Family::V4, Family::V6)] family: Family) {
    experiment!(family, "What if the loop does not look at the listener for a while?", |lab| {
        let port = lab.port()?;
        let demo = emfile(lab, family, port, "mask")?;
        let mut two = calling(lab, family, port, &["connect", "pause", "close", "pause"])?;
        demo.events_of("accepted", 2)?;
        let third = calling(lab, family, port, &["recv"])?;
        third.event("connected")?;
        demo.event("accept-failed")?;
        blocked(lab.server(), &demo)?;
        lab.claim_eq("one failure, then it sleeps", failures(&demo), 1);
        two.type_line("one of you may go")?;
        demo.events_of("accepted", 3)?;
        lab.claim_eq(
            "when a client leaves, the third is served; still one failure",
            failures(&demo),
            1,
        );
        Ok(())
    });
}

#[rstest]
#[case::dup("dup", "EBADF", true)]
#[case::fork("fork", "EBADF", true)]
#[case::delete("delete", "EBADF", false)]
fn epoll_watches_the_open_file(
    #[case] trap: &str,
    #[case] errno: &str,
    #[case] spins: bool,
    #[values(Family::V4, Family::V6)] family: Family,
) {
    experiment!(format!("{trap}-{family}"), "Does close() end what epoll tells of it?", |lab| {
        let port = lab.port()?;
        let at = args!["-i", lab.server().address(family), "-p", port, "--trap", trap];
        let demo = lab.server().spawn(&program!("epoll-traps-demo"), at)?;
        demo.event("listening")?;
        let mut client = calling(lab, family, port, &["pause", "send:1", "pause"])?;
        demo.event("checked")?;
        client.type_line("send")?;
        demo.ending()?;
        let checked = demo.event("checked")?;
        lab.claim_eq("the descriptor is closed: fcntl says", checked.get("errno"), Some(errno));
        let woken = demo.event("woken")?;
        let sentence = match spins {
            true => "a copy keeps it open, and epoll_wait tells of the data, turn after turn",
            false => "taken out before, it is not told of",
        };
        lab.claim_eq(sentence, woken.get("turns"), Some(if spins { "1000" } else { "0" }));
        if spins {
            let closed = demo.event("closed")?;
            lab.claim_eq("under the number that is closed", woken.get("fd"), closed.get("fd"));
        }
        Ok(())
    });
}

#[rstest]
fn a_reset_cannot_be_masked(#[values(Family::V4, Family::V6)] family: Family) {
    experiment!(family, "What does epoll tell who asked for no events?", |lab| {
        let port = lab.port()?;
        let at = args!["-i", lab.server().address(family), "-p", port, "--trap", "hangup"];
        let demo = lab.server().spawn(&program!("epoll-traps-demo"), at)?;
        demo.event("listening")?;
        connecting(lab, family, port, &["linger:0", "close"])?;
        demo.ending()?;
        let woken = demo.event("woken")?;
        lab.claim_eq("a reset connection wakes it at each turn", woken.get("turns"), Some("1000"));
        let events = woken.get("events").unwrap_or_default().to_owned();
        lab.claim(
            format!("by events that nobody can switch off: {events}"),
            events.contains("EPOLLERR")
                && events.contains("EPOLLHUP")
                && !events.contains("EPOLLIN"),
        );
        Ok(())
    });
}

#[rstest]
#[case::exit("exit", 2)]
#[case::underscore_exit("underscore-exit", 0)]
#[case::flush("flush", 1)]
fn a_buffer_is_copied_or_lost(#[case] end: &str, #[case] times: usize) {
    experiment!(end, "How often is text printed that was in a buffer at fork()?", |lab| {
        let demo = lab.server().run(&program!("stdio-demo"), ["--end", end])?;
        lab.claim_eq("both processes end well", demo.ending()?, Ending::Exit(0));
        // The ending comes behind all that was written.
        lab.claim_eq("how often", demo.stdout().matches("hello").count(), times);
        Ok(())
    });
}

#[rstest]
#[case::inherited(false)]
#[case::close_on_exec(true)]
fn a_listener_goes_through_exec(
    #[case] cloexec: bool,
    #[values(Family::V4, Family::V6)] family: Family,
) {
    let case = format!("{}-{family}", if cloexec { "cloexec" } else { "inherited" });
    experiment!(case, "Who keeps the port of a server that has ended?", |lab| {
        let port = lab.port()?;
        let host = lab.server().address(family);
        let mut at = args!["-i", host, "-p", port];
        at.extend(cloexec.then(|| "--cloexec".to_owned()));
        let demo = lab.server().spawn(&program!("inherit-demo"), at)?;
        // Its own end comes first: what it has started goes on to speak.
        let started = until("the started program", DEADLINE, || {
            Ok(demo.events().into_iter().find(|event| event.verb == "started"))
        })?;
        demo.ending()?;
        let descriptors = started.get("descriptors").map(str::to_owned);
        let again = peer(lab.server(), host, port, &["listen"])?;
        again.ending()?;
        let states: Vec<TcpState> = lab
            .server()
            .tcp_sockets()?
            .iter()
            .filter(|row| row.local.port() == port)
            .map(|row| row.state)
            .collect();
        if cloexec {
            lab.claim_eq(
                "the program has no descriptor of the server's",
                descriptors.as_deref(),
                Some("0"),
            );
            lab.claim_eq("the port is free", (answers(&again).len(), states.len()), (0, 0));
        } else {
            lab.claim_eq(
                "the program has one, of which it knows nothing",
                descriptors.as_deref(),
                Some("1"),
            );
            lab.claim_eq("the port is taken", answers(&again), ["bind EADDRINUSE"]);
            let client = calling(lab, family, port, &["recv"])?;
            client.event("connected")?;
            blocked(lab.client(), &client)?;
            lab.claim_eq("clients connect, and wait for ever", answers(&client).len(), 0);
        }
        Ok(())
    });
}

/// Clients of scm-rights-demo, one process each, and the demo with their connections in a message.
fn passed(
    lab: &Lab,
    family: Family,
    port: u16,
    clients: usize,
    flags: &[&str],
) -> anyhow::Result<(Process, Vec<Process>)> {
    let at = (lab.server().address(family), port);
    let count = clients.to_string();
    let flags = [&["--clients", &count], flags].concat();
    let demo = demo(lab.server(), &program!("scm-rights-demo"), at, &flags)?;
    demo.event("listening")?;
    let mut callers = Vec::new();
    for _ in 0..clients {
        let caller = calling(lab, family, port, &["recv", "close"])?;
        caller.event("connected")?; // so they are accepted in this order
        callers.push(caller);
    }
    demo.event("passed")?;
    Ok((demo, callers))
}

/// How many of the server's connections at this port the demo's process has open.
fn held(lab: &Lab, port: u16, demo: &Process) -> anyhow::Result<usize> {
    let processes = lab.server().processes_of(demo)?;
    let rows = sockets(lab.server(), port)?;
    let open = |row: &&SocketRow| processes.iter().any(|seen| !seen.socket(row.inode).is_empty());
    Ok(rows.iter().filter(open).count())
}

/// Claims that the server ended so many connections to this port by a FIN, and none by a RST. (Its
/// client can send one at the end of all: to the answer to an ACK that its own FIN has overtaken.)
fn claim_fins(lab: &Lab, wire: &Wire, port: u16, expected: usize) {
    let flows = wire.at("server").to_port(port);
    let fins = flows.iter().filter(|flow| flow.facts.first_fin_by() == Some(Side::Server)).count();
    let resets: u64 = flows.iter().map(|flow| flow.facts[Side::Server].rsts).sum();
    lab.claim_eq("the server's FINs on the wire, and its RSTs", (fins, resets), (expected, 0));
}

#[rstest]
fn a_descriptor_in_flight_keeps_the_connection(#[values(Family::V4, Family::V6)] family: Family) {
    experiment!(family, "Whose is a connection that is in a message nobody has read?", |lab| {
        let port = lab.port()?;
        let capture = lab.capture()?;
        let (mut demo, clients) = passed(lab, family, port, 1, &["--then", "close"])?;
        demo.event("paused")?;
        lab.claim_eq(
            "no process has it, and it is established",
            (held(lab, port, &demo)?, lab.states(lab.server(), port)?),
            (0, vec![Established]),
        );
        lab.claim_eq("its client has been told nothing", answers(&clients[0]).len(), 0);
        demo.type_line("close the channel")?;
        clients[0].ending()?;
        lab.claim_eq(
            "it ends with the socket whose message it is in",
            answers(&clients[0]),
            ["recv 0"],
        );
        lab.claim("though the process lives on", demo.ended().is_none());
        claim_fins(lab, &capture.finish()?, port, 1);
        Ok(())
    });
}

#[rstest]
#[case::even(2, 2)]
#[case::odd(1, 2)] // CMSG_SPACE rounds up to 8 bytes: there is room for one more
fn descriptors_without_room_are_closed(
    #[case] room: usize,
    #[case] fit: usize,
    #[values(Family::V4, Family::V6)] family: Family,
) {
    const CLIENTS: usize = 5;
    let question = "What comes of descriptors for which there is no room?";
    experiment!(format!("{room}-{family}"), question, |lab| {
        let port = lab.port()?;
        let capture = lab.capture()?;
        let (mut demo, clients) =
            passed(lab, family, port, CLIENTS, &["--room", &room.to_string()])?;
        demo.type_line("receive")?;
        let received = demo.event("received")?;
        lab.claim_eq("MSG_CTRUNC tells of it", received.get("cut"), Some("true"));
        let came = received.get("descriptors");
        lab.claim_eq("what there is room for comes", came, Some(&*fit.to_string()));
        for client in &clients[fit..] {
            client.ending()?;
        }
        let gone: Vec<_> = clients[fit..].iter().map(answers).collect();
        lab.claim_eq(
            "the others are closed: their clients see the end",
            gone,
            vec![["recv 0"]; CLIENTS - fit],
        );
        let (all, told) = (
            sockets(lab.server(), port)?.iter().filter(|row| row.state == Established).count(),
            clients[..fit].iter().map(|client| answers(client).len()).sum::<usize>(),
        );
        lab.claim_eq(
            "those that came are open in the receiver, established, and told nothing",
            (held(lab, port, &demo)?, all, told),
            (fit, fit, 0),
        );
        demo.events_of("paused", 2)?;
        demo.type_line("close")?;
        for client in &clients[..fit] {
            client.ending()?;
        }
        claim_fins(lab, &capture.finish()?, port, CLIENTS);
        Ok(())
    });
}

#[rstest]
#[case::inherited(false)]
#[case::close_on_exec(true)]
fn a_received_descriptor_goes_through_exec(
    #[case] cloexec: bool,
    #[values(Family::V4, Family::V6)] family: Family,
) {
    let case = format!("{}-{family}", if cloexec { "cloexec" } else { "inherited" });
    experiment!(case, "Does exec close a descriptor that has come in a message?", |lab| {
        let port = lab.port()?;
        let flags = ["--then", "exec", "--cloexec"];
        let flags = if cloexec { &flags[..] } else { &flags[..2] };
        let capture = lab.capture()?;
        // The sender's descriptors are close-on-exec, as all of ours: that does not travel.
        let (mut demo, clients) = passed(lab, family, port, 1, flags)?;
        demo.type_line("receive")?;
        demo.event("received")?;
        lab.claim_eq("the receiver has it", held(lab, port, &demo)?, 1);
        demo.type_line("exec")?;
        demo.event("started")?;
        if cloexec {
            clients[0].ending()?;
            lab.claim_eq("with MSG_CMSG_CLOEXEC, yes", answers(&clients[0]), ["recv 0"]);
        } else {
            let seen = (held(lab, port, &demo)?, lab.states(lab.server(), port)?);
            lab.claim_eq("without, no: the new program has it", seen, (1, vec![Established]));
            demo.type_line("end")?;
            clients[0].ending()?;
            lab.claim_eq("until it ends", answers(&clients[0]), ["recv 0"]);
        }
        claim_fins(lab, &capture.finish()?, port, 1);
        Ok(())
    });
}
