//! SIGPIPE and EPIPE: what becomes of a program that writes to a connection that was reset.

mod common;

use common::answers;
use common::play::hold;
use nix::sys::signal::Signal;
use rstest::rstest;
use serverlab::lab::experiment::Lab;
use serverlab::lab::host::Family;
use serverlab::lab::process::{Ending, Process};
use serverlab::lab::program::Program;
use serverlab::{args, experiment, program};

/// Runs rst-server, and sigpipe-demo against it; claims that the demo met a reset, on the wire.
fn run(lab: &Lab, family: Family, flags: &[&str]) -> anyhow::Result<Process> {
    let (host, port) = (lab.server().address(family), lab.port()?);
    let server = lab.server().spawn(&program!("rst-server"), args!["-i", host, "-p", port])?;
    server.event("listening")?;
    hold(lab.server(), &server)?;
    let capture = lab.capture()?;
    let demo = lab
        .client()
        .command(&program!("sigpipe-demo"))
        .args(args!["-i", host, "-p", port])
        .args(flags)
        .spawn()?;
    demo.event("connected")?;
    server.signal(Signal::SIGCONT)?;
    demo.ending()?;
    let wire = capture.finish()?;
    lab.claim(
        "the server resets the connection, and nothing that is written to it leaves the client",
        wire.ladder(
            port,
            "client > server  S
             server > client  S.
             client > server  .
             server > client  R.  seq 1 ack 1",
        ),
    );
    Ok(demo)
}

#[rstest]
fn the_default_action_kills_the_writer(#[values(Family::V4, Family::V6)] family: Family) {
    experiment!(family, "What does a program die of that writes to a reset connection?", |lab| {
        let demo = run(lab, family, &["--sigpipe", "default", "--first", "read"])?;
        lab.claim_eq(
            "recv tells ECONNRESET once, then the end; no send returns",
            answers(&demo),
            ["recv ECONNRESET", "recv 0"],
        );
        let killed = Ending::Signal(Signal::SIGPIPE);
        lab.claim_eq("the first send after that kills it: signal 13", demo.ending()?, killed);
        Ok(())
    });
}

#[rstest]
fn a_shell_calls_that_status_141(#[values(Family::V4, Family::V6)] family: Family) {
    experiment!(
        family,
        "Which status does a shell show for a program that SIGPIPE killed?",
        |lab| {
            let (host, port) = (lab.server().address(family), lab.port()?);
            let server =
                lab.server().spawn(&program!("rst-server"), args!["-i", host, "-p", port])?;
            server.event("listening")?;
            hold(lab.server(), &server)?;
            // The host need not have the program: the shell runs it from a descriptor.
            let demo = std::fs::File::open(program!("sigpipe-demo").path().expect("it is ours"))?;
            let script = format!("/proc/self/fd/5 -i {host} -p {port}; echo status $?");
            let shell = lab.client().command(&Program::of_host("sh")).args(["-c", &script]);
            let shell = shell.descriptor(5, demo.into()).spawn()?;
            shell.event("connected")?;
            server.signal(Signal::SIGCONT)?;
            shell.ending()?;
            let said = shell.stdout();
            lab.claim_eq("128 + 13", said.lines().last(), Some("status 141"));
            Ok(())
        }
    );
}

#[rstest]
#[case::ignored(&["--sigpipe", "ignore"])]
#[case::msg_nosignal(&["--no-signal"])]
fn without_the_signal_the_writer_gets_epipe(
    #[case] flags: &[&str],
    #[values(Family::V4, Family::V6)] family: Family,
) {
    let how = flags[0].trim_start_matches('-');
    experiment!(
        format!("{how}-{family}"),
        "What does send() return if SIGPIPE does not kill?",
        |lab| {
            let demo = run(lab, family, flags)?;
            lab.claim_eq(
                "recv tells ECONNRESET once, then the end; every send fails with EPIPE",
                answers(&demo),
                ["recv ECONNRESET", "recv 0", "send EPIPE", "send EPIPE"],
            );
            lab.claim_eq("it lives to its own end", demo.ending()?, Ending::Exit(0));
            Ok(())
        }
    );
}

#[rstest]
fn who_writes_first_gets_econnreset_and_no_signal(
    #[values(Family::V4, Family::V6)] family: Family,
) {
    experiment!(family, "Is the first write after a reset answered with SIGPIPE?", |lab| {
        let demo = run(lab, family, &["--sigpipe", "default", "--first", "write"])?;
        lab.claim_eq(
            "the first send takes the connection's error, ECONNRESET, and raises nothing",
            answers(&demo),
            ["send ECONNRESET"],
        );
        let killed = Ending::Signal(Signal::SIGPIPE);
        lab.claim_eq("the second kills it: signal 13", demo.ending()?, killed);
        Ok(())
    });
}
