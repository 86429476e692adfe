//! Sentences from books, articles and programs that Linux contradicts, each tried.
//!
//! The question of each experiment is the sentence with its source; its claims are what was seen, on
//! the kernels that tests/kernels lists; where another version is known to answer otherwise, the
//! claim says so.
//!
//! csdesign is the collection of Python programs that this project answers. Where it is wrong about
//! the kernel, or in a way that another server could be, the claim is tried on a server of ours. What
//! is about Python alone (EINTR since PEP 475, a name that is not imported, its own SIGPIPE) has no
//! experiment here; the races and losses that it could not show are shown by `self_pipe` and by the
//! experiments of stdio-demo in `descriptors`.

mod common;

use std::net::SocketAddr;

use common::callers::Callers;
use common::play::{
    Sysctl, blocked, calling, claim_counter, connecting, counted, listening, ms, peer, reached,
    sockets, status,
};
use common::{Control, answers};
use nix::sys::signal::Signal;
use rstest::rstest;
use serverlab::lab::event::Event;
use serverlab::lab::experiment::Lab;
use serverlab::lab::fault::Hook;
use serverlab::lab::flow::Side;
use serverlab::lab::host::{Family, Host};
use serverlab::lab::packet::Flags;
use serverlab::lab::process::{DEADLINE, Ending, Process};
use serverlab::lab::sockets::TcpState::{Established, FinWait2, SynSent, TimeWait};
use serverlab::lab::wait::until;
use serverlab::{args, experiment, program};

/// Waits until a host's connection at this port has so many bytes received and not read.
fn unread(host: &Host, port: u16, bytes: u32) -> anyhow::Result<()> {
    until(&format!("{bytes} unread bytes on {}", host.name()), DEADLINE, || {
        let rows = sockets(host, port)?;
        Ok(rows.iter().any(|row| row.receive_queue == bytes).then_some(()))
    })
}

/// How often each child of a process has gone to sleep of its own accord.
fn switches(host: &Host, parent: &Process) -> anyhow::Result<Vec<u64>> {
    let pid = parent.pid();
    let list = host.read(&format!("/proc/{pid}/task/{pid}/children"))?;
    let asleep = |child: &str| -> anyhow::Result<Option<u64>> {
        let status = host.read(&format!("/proc/{child}/status"))?;
        let field = |key: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(key));
            line.map(|rest| rest.trim().to_owned()).unwrap_or_default()
        };
        let sleeps = field("State:").starts_with('S');
        Ok(if sleeps { field("voluntary_ctxt_switches:").parse().ok() } else { None })
    };
    until("all children asleep", DEADLINE, || {
        list.split_whitespace().map(asleep).collect::<anyhow::Result<Option<Vec<u64>>>>()
    })
}

/// For each of five connections, how many of six children it wakes.
fn woken(lab: &Lab, family: Family, server: &Process, port: u16) -> anyhow::Result<Vec<usize>> {
    server.event("listening")?;
    until("six children", DEADLINE, || {
        let list = lab.server().read(&format!("/proc/{0}/task/{0}/children", server.pid()))?;
        Ok((list.split_whitespace().count() == 6).then_some(()))
    })?;
    let mut woken = Vec::new();
    for connection in 1..=5 {
        let before = switches(lab.server(), server)?;
        connecting(lab, family, port, &["close"])?;
        server.events_of("closed", connection)?;
        let after = switches(lab.server(), server)?;
        woken.push(before.iter().zip(&after).filter(|(before, after)| before != after).count());
    }
    Ok(woken)
}

#[rstest]
fn all_children_wake_up(#[values(Family::V4, Family::V6)] family: Family) {
    let question = "\"All children wake up\" when a connection comes for processes that block in \
                    accept() (csdesign, misc/thundering-herd.md)";
    experiment!(family, question, |lab| {
        let at = |port: u16| args!["-i", lab.server().address(family), "-p", port, "-n", 6];
        let (port, other) = (lab.port()?, lab.port()?);
        let server = lab.server().spawn(&program!("prefork-accept-server"), at(port))?;
        let accept = woken(lab, family, &server, port)?;
        drop(server);
        lab.claim_eq("a connection wakes one of the six", accept, [1; 5]);
        let server = lab.server().spawn(&program!("prefork-epoll-server"), at(other))?;
        let epoll = woken(lab, family, &server, other)?;
        lab.claim(
            format!("control: it wakes many of those that wait in epoll_wait: {epoll:?}"),
            epoll.iter().all(|woken| *woken >= 2),
        );
        Ok(())
    });
}

#[rstest]
fn time_wait_is_on_the_client(#[values(Family::V4, Family::V6)] family: Family) {
    let question = "\"TIME_WAIT state on the client\" (csdesign, a comment in client.py, for \
                    servers that close after their answer)";
    experiment!(family, question, |lab| {
        let port = lab.port()?;
        let capture = lab.capture()?;
        let server = listening(lab, family, port, &["accept", "recv", "send:100", "close"])?;
        let steps = ["send:4", "recv", "recv", "pause", "close"];
        let mut client = calling(lab, family, port, &steps)?;
        server.ending()?;
        client.event("paused")?;
        // An ACK that the client's FIN overtakes would end TIME_WAIT by a RST (RFC 1337).
        reached(lab.server(), port, &[FinWait2])?;
        client.type_line("close")?;
        client.ending()?;
        reached(lab.server(), port, &[TimeWait])?;
        reached(lab.client(), port, &[])?;
        lab.claim("it is on the server", true);
        let wire = capture.finish()?;
        let first = wire.at("server").flow(port)?.facts.first_fin_by();
        lab.claim_eq("which sent the first FIN", first, Some(Side::Server));
        Ok(())
    });
}

#[rstest]
fn one_recv_returns_one_answer(#[values(Family::V4, Family::V6)] family: Family) {
    let question = "One recv(n) returns the n bytes that the server has sent (csdesign, client.py)";
    experiment!(family, question, |lab| {
        let port = lab.port()?;
        let server = listening(lab, family, port, &["accept", "send:200000", "recv"])?;
        let mut client = calling(lab, family, port, &["pause", "recv:200000", "recv-all"])?;
        client.event("paused")?;
        until("something to read", DEADLINE, || {
            let rows = sockets(lab.client(), port)?;
            Ok(rows.iter().any(|row| row.receive_queue > 0).then_some(()))
        })?;
        client.type_line("read")?;
        let first: u64 = client.event("received")?.get("bytes").unwrap_or_default().parse()?;
        lab.claim(
            format!("it returns what is there: {first} of 200000"),
            (1..200_000).contains(&first),
        );
        drop(client);
        server.ending()?;
        Ok(())
    });
}

#[rstest]
fn a_number_needs_no_delimiter(#[values(Family::V4, Family::V6)] family: Family) {
    let question = "int(recv(1024)) reads the number that the client has sent (csdesign, all \
                    servers)";
    experiment!(family, question, |lab| {
        let port = lab.port()?;
        let mut server = listening(lab, family, port, &["accept", "pause", "recv"])?;
        let client = calling(lab, family, port, &["nodelay:on", "send:+10", "send:+24", "recv"])?;
        server.event("paused")?;
        unread(lab.server(), port, 6)?;
        server.type_line("read")?;
        let received = server.event("received")?;
        drop(client);
        lab.claim_eq("it reads two as one", received.get("text"), Some("+10+24"));
        Ok(())
    });
}

#[rstest]
fn reuseaddr_shares_a_port(#[values(Family::V4, Family::V6)] family: Family) {
    let question = "SO_REUSEADDR is there to \"re-use the port\" (csdesign, a comment in each \
                    server)";
    experiment!(family, question, |lab| {
        let port = lab.port()?;
        let host = lab.server().address(family);
        let _one = listening(lab, family, port, &["pause"])?; // peer sets SO_REUSEADDR
        let other = peer(lab.server(), host, port, &["listen"])?;
        other.ending()?;
        lab.claim_eq("not of one that listens", answers(&other), ["bind EADDRINUSE"]);
        Ok(())
    });
}

#[rstest]
fn a_backlog_of_n_is_room_for_n(#[values(Family::V4, Family::V6)] family: Family) {
    let question = "listen(fd, 5) lets five connections wait, and refuses more (csdesign, BACKLOG \
                    = 5; many textbooks)";
    experiment!(family, question, |lab| {
        let port = lab.port()?;
        let host = lab.server().address(family);
        let server = peer(lab.server(), host, port, &["listen:5", "pause"])?;
        server.event("listening")?;
        let before = lab.server().counters()?;
        let steps = [&["connect"; 6][..], &["socket", "nonblock:on", "connect", "pause"]].concat();
        let client = peer(lab.client(), host, port, &steps)?;
        client.events_of("connected", 6)?;
        counted(lab.server(), &before, "TcpExtListenDrops", 1)?;
        lab.claim("six wait", true);
        claim_counter(lab, lab.server(), &before, "TcpOutRsts", 0)?;
        lab.claim("and the seventh is not refused: its SYN is dropped", true);
        Ok(())
    });
}

#[rstest]
fn accept_fails_with_econnaborted(#[values(Family::V4, Family::V6)] family: Family) {
    let question = "accept() fails with ECONNABORTED if the client has reset meanwhile (POSIX; UNP \
                    5.11)";
    experiment!(family, question, |lab| {
        let port = lab.port()?;
        let mut server = listening(lab, family, port, &["pause", "accept", "recv", "recv"])?;
        connecting(lab, family, port, &["send:3", "linger:0", "close"])?;
        server.type_line("accept")?;
        server.ending()?;
        lab.claim("it succeeds", server.events().iter().any(|event| event.verb == "accepted"));
        lab.claim_eq(
            "and what the client sent before its RST is read first",
            answers(&server),
            ["recv 3", "recv ECONNRESET"],
        );
        Ok(())
    });
}

#[rstest]
fn the_first_write_after_a_reset_raises_sigpipe(#[values(Family::V4, Family::V6)] family: Family) {
    let question = "A write to a socket that has received a RST raises SIGPIPE (UNP 5.13)";
    experiment!(family, question, |lab| {
        let port = lab.port()?;
        let mut server = listening(lab, family, port, &["accept", "pause", "linger:0", "close"])?;
        let steps = ["sigpipe:default", "poll:none", "send:1", "pause", "send:1"];
        let mut client = calling(lab, family, port, &steps)?;
        client.event("connected")?; // else the RST may be what ends connect
        server.type_line("reset")?;
        client.event("paused")?;
        lab.claim_eq(
            "the first does not: it fails with ECONNRESET",
            answers(&client),
            ["send ECONNRESET"],
        );
        client.type_line("again")?;
        let ending = client.ending()?.to_string();
        lab.claim_eq("the second does", ending.as_str(), "killed by SIGPIPE");
        server.ending()?;
        Ok(())
    });
}

#[rstest]
fn a_write_after_a_close_makes_recv_fail(#[values(Family::V4, Family::V6)] family: Family) {
    let question = "Who has written to a peer that has closed gets ECONNRESET from recv (folklore)";
    experiment!(family, question, |lab| {
        let port = lab.port()?;
        let server = listening(lab, family, port, &["accept", "close"])?;
        let client =
            connecting(lab, family, port, &["recv", "send:1", "poll:none", "recv", "send:1"])?;
        server.ending()?;
        lab.claim_eq(
            "recv returns 0 still, and the next send fails with EPIPE",
            answers(&client),
            ["recv 0", "send 1", "recv 0", "send EPIPE"],
        );
        Ok(())
    });
}

#[rstest]
fn a_reset_discards_what_was_received(#[values(Family::V4, Family::V6)] family: Family) {
    let question = "A RST discards what the receiver has not read yet (folklore; true of some \
                    other systems)";
    experiment!(family, question, |lab| {
        let port = lab.port()?;
        let server = listening(lab, family, port, &["accept", "send:1000", "linger:0", "close"])?;
        let capture = lab.capture()?;
        let client = connecting(lab, family, port, &["poll:none", "recv", "recv"])?;
        server.ending()?;
        let wire = capture.finish()?;
        let reset = wire.at("client").flow(port)?.facts.reset_by();
        lab.claim_eq("the RST came before the first recv", reset, Some(Side::Server));
        lab.claim_eq(
            "which returns what had come before it",
            answers(&client),
            ["recv 1000", "recv ECONNRESET"],
        );
        Ok(())
    });
}

#[rstest]
fn shut_rd_discards_what_comes(#[values(Family::V4, Family::V6)] family: Family) {
    let question = "After shutdown(SHUT_RD) what comes is acknowledged and silently discarded (UNP \
                    6.6)";
    experiment!(family, question, |lab| {
        let port = lab.port()?;
        let steps = ["accept", "shutdown:rd", "pause", "recv"];
        let mut server = listening(lab, family, port, &steps)?;
        let mut client = calling(lab, family, port, &["pause", "send:hello", "pause"])?;
        server.event("paused")?;
        client.type_line("send")?;
        unread(lab.server(), port, 5)?;
        server.type_line("read")?;
        server.ending()?;
        let text = server.event("received")?.get("text").map(str::to_owned);
        lab.claim_eq("it is read like any other", text.as_deref(), Some("hello"));
        Ok(())
    });
}

#[rstest]
fn nagle_joins_small_writes(#[values(Family::V4, Family::V6)] family: Family) {
    let question = "Nagle's algorithm makes one segment of small writes in a row (folklore)";
    experiment!(family, question, |lab| {
        let port = lab.port()?;
        let server = listening(lab, family, port, &["accept", "poll:rdhup", "recv-all"])?;
        let capture = lab.capture()?;
        connecting(lab, family, port, &["send:10", "send:10", "send:10", "close"])?;
        server.ending()?;
        let wire = capture.finish()?;
        let ranges = wire.at("client").flow(port)?.ranges(Side::Client);
        lab.claim(
            format!("the first leaves at once: nothing is unacknowledged yet: {ranges:?}"),
            ranges.first() == Some(&(1..11)) && ranges.len() >= 2,
        );
        Ok(())
    });
}

#[rstest]
fn a_close_of_the_listener_is_a_goodbye(#[values(Family::V4, Family::V6)] family: Family) {
    let question = "Connections in the queue of a listener that closes end like any other \
                    (folklore; the cause of resets at deployments)";
    experiment!(family, question, |lab| {
        let port = lab.port()?;
        let mut server = listening(lab, family, port, &["pause", "close-listener"])?;
        let capture = lab.capture()?;
        let client = calling(lab, family, port, &["send:5", "recv"])?;
        client.event("sent")?;
        unread(lab.server(), port, 5).ok();
        server.type_line("close")?;
        server.ending()?;
        client.ending()?;
        let control = Control::run(lab, family)?;
        let wire = capture.finish()?;
        let facts = &wire.at("client").flow(port)?.facts;
        lab.claim_eq("they are reset", facts.reset_by(), Some(Side::Server));
        lab.claim_eq("without a FIN", facts[Side::Server].fin, None);
        lab.claim_eq(
            "the request that was sent is lost",
            answers(&client),
            ["send 5", "recv ECONNRESET"],
        );
        control.claim(lab, &wire)
    });
}

#[rstest]
fn the_address_of_nobody_is_nobodys(#[values(Family::V4, Family::V6)] family: Family) {
    let question = "connect to the empty host is a connect to localhost (csdesign, misc/sigpipe: \
                    connect(('', 2000)), which is 0.0.0.0)";
    experiment!(family, question, |lab| {
        let port = lab.port()?;
        let any = match family {
            Family::V4 => SocketAddr::from(([0, 0, 0, 0], port)),
            Family::V6 => SocketAddr::from(([0_u16; 8], port)),
        };
        let server = peer(lab.server(), any.ip(), port, &["listen", "accept", "recv"])?;
        server.event("listening")?;
        let client = peer(lab.server(), any.ip(), port, &["connect", "pause"])?;
        let connected = client.event("connected")?;
        let local: SocketAddr = connected.get("local").unwrap_or_default().parse()?;
        lab.claim(
            "it is on Linux, by courtesy: connect(2) elsewhere fails",
            local.ip().is_loopback(),
        );
        Ok(())
    });
}

#[rstest]
fn a_signal_restarts_what_it_interrupts(#[values(Family::V4)] family: Family) {
    let question = "With SA_RESTART no system call fails with EINTR (folklore)";
    experiment!(family, question, |lab| {
        let port = lab.port()?;
        let server = listening(lab, family, port, &["handle:usr1+restart", "poll"])?;
        server.event("set")?;
        blocked(lab.server(), &server)?;
        lab.claim(
            "the handler is there (SigCgt)",
            u64::from_str_radix(&status(lab.server(), &server, "SigCgt")?, 16)? & (1 << 9) != 0,
        );
        server.signal(Signal::SIGUSR1)?;
        server.ending()?;
        lab.claim_eq("poll does, whatever the flag", answers(&server), ["poll EINTR"]);
        Ok(())
    });
}

#[rstest]
fn keepalive_is_for_every_dead_peer(#[values(Family::V4, Family::V6)] family: Family) {
    let question = "TCP notices within some time that a peer has gone (folklore)";
    experiment!(family, question, |lab| {
        let port = lab.port()?;
        let steps = ["accept", "pause", "set:repair=1", "close", "pause"];
        let mut server = listening(lab, family, port, &steps)?;
        let capture = lab.capture()?;
        let client = calling(lab, family, port, &["get:keepalive", "recv"])?;
        server.event("paused")?;
        server.type_line("crash")?;
        server.event("closed")?;
        blocked(lab.client(), &client)?;
        let wire = capture.finish()?;
        let off = client.event("got")?.get("value").map(str::to_owned);
        lab.claim_eq("SO_KEEPALIVE is off unless it is set", off.as_deref(), Some("0"));
        lab.claim_eq("an idle connection stays", lab.states(lab.client(), port)?, [Established]);
        let flow = wire.at("client").flow(port)?;
        let told =
            flow.steps.iter().filter(|step| ms(step.at - flow.facts.began) > 0 && step.len > 0);
        lab.claim_eq("nothing was sent that could tell", told.count(), 0);
        Ok(())
    });
}

#[rstest]
fn syn_retries_come_at_1_3_and_7_seconds(#[values(Family::V4, Family::V6)] family: Family) {
    let question = "A SYN that is not answered is sent again after 1, 3 and 7 seconds (textbooks; \
                    true before Linux 6.5)";
    experiment!(family, question, |lab| {
        let port = lab.port()?;
        let _server = listening(lab, family, port, &["pause"])?;
        let fault = lab.server().fault(Hook::Input, &format!("tcp dport {port} drop"))?;
        let before = lab.client().counters()?;
        let capture = lab.capture()?;
        let steps = ["socket", "nonblock:on", "connect", "pause"];
        let _client = peer(lab.client(), lab.server().address(family), port, &steps)?;
        counted(lab.client(), &before, "TcpRetransSegs", 3)?;
        let wire = capture.finish()?;
        fault.lift()?;
        let flow = wire.at("client").flow(port)?;
        let syns: Vec<u64> =
            flow.steps.iter().filter(|s| s.flags.has(Flags::SYN)).map(|step| step.at).collect();
        let after: Vec<u64> = syns.iter().skip(1).map(|at| ms(at - syns[0])).collect();
        lab.claim(
            format!("the third time comes before 5 s, not at 7 s: after {after:?} ms"),
            after.len() >= 3 && after[2] < 5000,
        );
        Ok(())
    });
}

#[rstest]
fn abort_on_overflow_resets_who_finds_the_queue_full(
    #[values(Family::V4, Family::V6)] family: Family,
) {
    let question = "With tcp_abort_on_overflow=1 a client that finds the queue full is reset \
                    (folklore; ip-sysctl says \"reset them\")";
    experiment!(family, question, |lab| {
        let port = lab.port()?;
        let _sysctl = Sysctl::set(lab.server(), "net.ipv4.tcp_abort_on_overflow", "1")?;
        let host = lab.server().address(family);
        let server = peer(lab.server(), host, port, &["listen:0", "pause"])?;
        server.event("listening")?;
        let before = lab.server().counters()?;
        let steps = ["connect", "socket", "nonblock:on", "connect", "pause"];
        let _client = peer(lab.client(), host, port, &steps)?;
        counted(lab.server(), &before, "TcpExtListenOverflows", 1)?;
        claim_counter(lab, lab.server(), &before, "TcpOutRsts", 0)?;
        lab.claim_eq(
            "its SYN is dropped, and it goes on trying",
            lab.states(lab.client(), port)?.contains(&SynSent),
            true,
        );
        Ok(())
    });
}

/// A preforked server of ours with so many children, ready.
fn preforked(lab: &Lab, family: Family, port: u16, n: usize) -> anyhow::Result<Process> {
    let at = args!["-i", lab.server().address(family), "-p", port, "-n", n];
    let server = lab.server().spawn(&program!("prefork-accept-server"), at)?;
    server.events_of("started", n)?;
    Ok(server)
}

/// What it prints when it is asked to end: the connections of each child, and their sum.
fn distribution(server: &Process) -> anyhow::Result<(Vec<u64>, u64)> {
    server.terminate()?;
    let number = |event: &Event, key| event.get(key).and_then(|value| value.parse().ok());
    let told = server.events();
    let counts = told.iter().filter_map(|event| number(event, "connections")).collect();
    Ok((counts, told.iter().find_map(|event| number(event, "sum")).unwrap_or(0)))
}

#[rstest]
fn a_byte_counts_what_a_child_has_served(#[values(Family::V4, Family::V6)] family: Family) {
    let question = "A byte a child, in memory they share, counts its connections (csdesign, \
                    server03a.py: the 256th ends the child)";
    experiment!(family, question, |lab| {
        let port = lab.port()?;
        let server = preforked(lab, family, port, 1)?;
        let load = args!["-i", lab.server().address(family), "-p", port, "-t", 300, "-b", 1];
        let client = lab.client().run(&program!("client"), load)?;
        lab.claim_eq("300 connections are served", client.ending()?, Ending::Exit(0));
        let (counts, sum) = distribution(&server)?;
        lab.claim_eq("by one child, and counted", (counts, sum), (vec![300], 300));
        Ok(())
    });
}

#[rstest]
fn shared_counters_need_no_care(#[values(Family::V4, Family::V6)] family: Family) {
    let question = "Children that read, add and write the counters they share lose none (csdesign, \
                    server03a.py: its own table of 1500 requests adds up to 1482)";
    experiment!(family, question, |lab| {
        let port = lab.port()?;
        let server = preforked(lab, family, port, 4)?;
        let host = lab.server().address(family);
        let load = args!["-i", host, "-p", port, "-c", 15, "-t", 100, "-b", 1];
        let client = lab.client().run(&program!("client"), load)?;
        lab.claim_eq("1500 connections are served", client.ending()?, Ending::Exit(0));
        let (counts, sum) = distribution(&server)?;
        lab.claim_eq("an atomic addition loses none", counts.iter().sum::<u64>(), 1500);
        lab.claim_eq("and the sum says so", sum, 1500);
        Ok(())
    });
}

#[rstest]
fn ctrl_c_ends_what_it_began(#[values(Family::V4, Family::V6)] family: Family) {
    let question = "Ctrl-C ends a preforked server (csdesign, server03a.py: a child that catches it \
                    goes on where its parent forks, and up to 17 stay)";
    experiment!(family, question, |lab| {
        let port = lab.port()?;
        let server = preforked(lab, family, port, 10)?;
        let before = lab.server().processes_of(&server)?;
        lab.claim_eq("there are eleven processes", before.len(), 11);
        for process in before {
            // As the terminal does. ESRCH: its parent, which had the signal first, has ended it.
            let _ = lab.server().signal(process.pid, Signal::SIGINT);
        }
        lab.claim_eq("the parent ends well", server.ending()?, Ending::Exit(0));
        lab.claim_eq("nobody is left", lab.server().processes_of(&server)?.len(), 0);
        let started = server.events().iter().filter(|event| event.verb == "started").count();
        lab.claim_eq("and nobody was started beyond the ten", started, 10);
        Ok(())
    });
}

#[rstest]
#[case::prefork_accept("prefork-accept-server")]
#[case::prefork_fdpass("prefork-fdpass-server")]
fn a_silent_client_costs_a_child(
    #[case] program: &str,
    #[values(Family::V4, Family::V6)] family: Family,
) {
    let question = "A client that closes without a word may cost the child that serves it (csdesign, \
                    server03.py: three of them end the service; server04.py: one does)";
    experiment!(format!("{program}-{family}"), question, |lab| {
        let (host, port) = (lab.server().address(family), lab.port()?);
        let at = args!["-i", host, "-p", port, "-n", 3];
        let server = lab.server().spawn(&ours(program), at)?;
        server.events_of("started", 3)?;
        let callers = Callers::new(lab.client(), (host, port), DEADLINE);
        for _ in 0..6 {
            drop(callers.connect()?);
        }
        server.events_of("closed", 6)?;
        callers.ask(1024)?;
        lab.claim("after twice as many as there are children, the next is served", true);
        let reaped = server.events().iter().filter(|event| event.verb == "reaped").count();
        lab.claim_eq("and no child has ended", reaped, 0);
        Ok(())
    });
}

fn ours(program: &str) -> serverlab::lab::program::Program {
    match program {
        "prefork-fdpass-server" => program!("prefork-fdpass-server"),
        _ => program!("prefork-accept-server"),
    }
}

#[rstest]
fn passing_descriptors_cures_the_herd(#[values(Family::V4, Family::V6)] family: Family) {
    let question = "A parent that accepts and passes the connection on avoids the thundering herd \
                    (csdesign, README: the reason for server04.py)";
    experiment!(family, question, |lab| {
        let at = |port: u16| args!["-i", lab.server().address(family), "-p", port, "-n", 6];
        let (port, other) = (lab.port()?, lab.port()?);
        let server = lab.server().spawn(&program!("prefork-accept-server"), at(port))?;
        let accept = woken(lab, family, &server, port)?;
        drop(server);
        lab.claim_eq("where children call accept there is none to avoid", accept, [1; 5]);
        let server = lab.server().spawn(&program!("prefork-fdpass-server"), at(other))?;
        let parent = |server: &Process| -> anyhow::Result<u64> {
            let switches = status(lab.server(), server, "voluntary_ctxt_switches")?;
            Ok(switches.parse()?)
        };
        server.event("listening")?;
        let before = parent(&server)?;
        let passed = woken(lab, family, &server, other)?;
        let grew = parent(&server)? - before;
        lab.claim_eq("passing wakes one child as well", passed, [1; 5]);
        lab.claim(format!("and the parent besides, {grew} times for five connections"), grew >= 5);
        Ok(())
    });
}

#[rstest]
fn a_run_without_complaint_is_a_good_run(#[values(Family::V4, Family::V6)] family: Family) {
    let question = "A client whose children fail has failed (csdesign, client.py: it exits with 0 \
                    while every child of it raises)";
    experiment!(family, question, |lab| {
        let port = lab.port()?;
        let load =
            args!["-i", lab.server().address(family), "-p", port, "-c", 3, "-t", 2, "--json"];
        let client = lab.client().run(&program!("client"), load)?;
        lab.claim_eq("ours exits with 1", client.ending()?, Ending::Exit(1));
        let summary: serde_json::Value = serde_json::from_str(client.stdout().trim())?;
        lab.claim_eq("and counts each request that failed", summary["failed"].as_u64(), Some(6));
        Ok(())
    });
}
