//! A signal between the check and the wait: lost by a flag, kept by six cures; and what SA_RESTART
//! restarts.

mod common;

use common::answers;
use common::play::{blocked, calling, connecting, status};
use nix::sys::signal::Signal;
use rstest::rstest;
use serverlab::lab::experiment::Lab;
use serverlab::lab::host::Family;
use serverlab::lab::process::{Ending, Process};
use serverlab::{args, experiment, program};

fn demo(lab: &Lab, family: Family, port: u16, wait: &str) -> anyhow::Result<Process> {
    let host = lab.server().address(family);
    let demo = lab
        .server()
        .spawn(&program!("self-pipe-demo"), args!["-i", host, "-p", port, "--wait", wait])?;
    demo.event("listening")?;
    Ok(demo)
}

/// The handler of SIGUSR1 has run, and nobody has been woken by it.
fn claim_raised(lab: &Lab, demo: &Process, signaled: &str) -> anyhow::Result<()> {
    let events = demo.events();
    let flags = events.iter().filter_map(|event| event.get("signaled"));
    lab.claim_eq(
        "the flag was not set at the check; what it is after the signal",
        flags.collect::<Vec<_>>(),
        ["false", signaled],
    );
    Ok(())
}

#[rstest]
fn a_flag_loses_the_signal(#[values(Family::V4, Family::V6)] family: Family) {
    experiment!(family, "What wakes select() if the signal came just before it?", |lab| {
        let port = lab.port()?;
        let demo = demo(lab, family, port, "select")?;
        let capture = lab.capture()?;
        let mut client = calling(lab, family, port, &["pause", "send:1", "recv", "recv", "close"])?;
        client.event("paused")?;
        demo.event("raised")?;
        blocked(lab.server(), &demo)?;
        claim_raised(lab, &demo, "true")?;
        lab.claim(
            "it sleeps in select nevertheless: no event after the signal's",
            demo.events().last().is_some_and(|event| event.verb == "raised"),
        );
        lab.claim_eq(
            "and the kernel has no signal left for it (SigPnd, ShdPnd)",
            [status(lab.server(), &demo, "SigPnd")?, status(lab.server(), &demo, "ShdPnd")?],
            ["0000000000000000"; 2],
        );
        client.type_line("speak")?;
        lab.claim_eq("the client's byte wakes it", demo.event("woken")?.get("by"), Some("client"));
        client.ending()?;
        lab.claim_eq("it ends well", demo.ending()?, Ending::Exit(0));
        let wire = capture.finish()?;
        lab.claim(
            "the goodbye leaves only after the client's byte",
            wire.ladder(
                port,
                "client > server  S
                 server > client  S.
                 client > server  .
                 client > server  P.  1:2
                 server > client  P.  1:4 ack 2
                 server > client  F.  seq 4
                 client > server  F.  seq 2 ack 5",
            ),
        );
        lab.claim_eq("what the client gets", answers(&client), ["send 1", "recv 3", "recv 0"]);
        Ok(())
    });
}

#[rstest]
#[case::self_pipe("self-pipe", "true", "descriptor")]
#[case::pselect("pselect", "false", "EINTR")]
#[case::ppoll("ppoll", "false", "EINTR")]
#[case::epoll_pwait("epoll-pwait", "false", "EINTR")]
#[case::signalfd("signalfd", "false", "descriptor")]
#[case::pidfd("pidfd", "false", "descriptor")]
fn a_cure_keeps_the_signal(
    #[case] wait: &str,
    #[case] signaled: &str,
    #[case] by: &str,
    #[values(Family::V4, Family::V6)] family: Family,
) {
    let case = format!("{wait}-{family}");
    experiment!(case, "Does the signal that came just before the wait end the wait?", |lab| {
        let port = lab.port()?;
        let demo = demo(lab, family, port, wait)?;
        let capture = lab.capture()?;
        // This client never says a word: only the signal can end the wait.
        let client = connecting(lab, family, port, &["recv", "recv", "close"])?;
        lab.claim_eq("it ends well", demo.ending()?, Ending::Exit(0));
        let wire = capture.finish()?;
        claim_raised(lab, &demo, signaled)?;
        lab.claim_eq("what ends the wait", demo.event("woken")?.get("by"), Some(by));
        lab.claim(
            "the goodbye leaves though the client has said nothing",
            wire.ladder(
                port,
                "client > server  S
                 server > client  S.
                 client > server  .
                 server > client  P.  1:4 ack 1
                 server > client  F.  seq 4
                 client > server  F.  seq 1 ack 5",
            ),
        );
        lab.claim_eq("what the client gets", answers(&client), ["recv 3", "recv 0"]);
        Ok(())
    });
}

/// What a blocked call does when a handler with SA_RESTART has run.
#[derive(Clone, Copy, PartialEq)]
enum Then {
    Restarted,
    Interrupted,
}

#[rstest]
#[case::accept("accept", Then::Restarted)]
#[case::recv("recv", Then::Restarted)]
#[case::recv_timeout("recv-timeout", Then::Interrupted)]
#[case::poll("poll", Then::Interrupted)]
#[case::select("select", Then::Interrupted)]
#[case::epoll_wait("epoll-wait", Then::Interrupted)]
#[case::nanosleep("nanosleep", Then::Interrupted)]
fn sa_restart_restarts_some_waits(
    #[case] call: &str,
    #[case] then: Then,
    #[values(false, true)] restart: bool,
    #[values(Family::V4, Family::V6)] family: Family,
) {
    let flags = if restart { "sa-restart" } else { "plain" };
    let case = format!("{call}-{flags}-{family}");
    experiment!(case, "Does a blocked call go on after a signal handler has run?", |lab| {
        let port = lab.port()?;
        let at = args!["-i", lab.server().address(family), "-p", port, "--call", call];
        let command = lab.server().command(&program!("sa-restart-demo")).args(at);
        let demo = command.args(restart.then_some("--restart")).spawn()?;
        demo.event("listening")?;
        let mut clients = Vec::new();
        if call != "accept" {
            clients.push(calling(lab, family, port, &["pause"])?);
        }
        demo.event("set")?;
        blocked(lab.server(), &demo)?;
        demo.signal(Signal::SIGUSR1)?;
        demo.event("signaled")?;
        if restart && then == Then::Restarted {
            blocked(lab.server(), &demo)?;
            let quiet = demo.events().last().is_some_and(|event| event.verb == "signaled");
            lab.claim("the handler has run, and the call waits on", quiet);
            // What it waits for comes now: a connection, or this connection's end.
            clients.clear();
            if call == "accept" {
                clients.push(calling(lab, family, port, &["pause"])?);
            }
            demo.ending()?;
            let last = demo.events().last().map(|event| event.verb.clone());
            lab.claim_eq("and it succeeds in the end", last.as_deref(), Some("completed"));
        } else {
            demo.ending()?;
            let errno = demo.event("failed")?;
            lab.claim_eq("the call fails with EINTR", errno.get("errno"), Some("EINTR"));
        }
        Ok(())
    });
}
