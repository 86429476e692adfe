//! Children that end together: one SIGCHLD, and what it leaves behind.

mod common;

use common::play::status;
use rstest::rstest;
use serverlab::experiment;
use serverlab::lab::host::Host;
use serverlab::lab::process::Process;
use serverlab::{args, program};

/// The states of a process's children, as /proc/PID/stat tells them: Z is a zombie.
fn children(host: &Host, parent: &Process) -> anyhow::Result<Vec<char>> {
    let pid = parent.pid();
    let list = host.read(&format!("/proc/{pid}/task/{pid}/children"))?;
    let state = |child: &str| -> anyhow::Result<char> {
        let stat = host.read(&format!("/proc/{child}/stat"))?;
        let after_name = stat.rsplit(") ").next().unwrap_or_default();
        Ok(after_name.chars().next().unwrap_or('?'))
    };
    list.split_whitespace().map(state).collect()
}

#[rstest]
#[case::one("one", 1, 1, 9)]
#[case::all("all", 1, 10, 0)]
#[case::kernel("kernel", 0, 0, 0)]
fn ten_ends_are_one_signal(
    #[case] reap: &str,
    #[case] signals: usize,
    #[case] reaped: usize,
    #[case] zombies: usize,
) {
    experiment!(reap, "How many SIGCHLD come of ten children that end together?", |lab| {
        let host = lab.server();
        let command = host.command(&program!("zombies-demo")).args(args!["--reap", reap]);
        let mut demo = command.typed().spawn()?;
        demo.event("woken")?;
        let count = |verb| demo.events().iter().filter(|event| event.verb == verb).count();
        lab.claim_eq("children have ended", count("forked"), 10);
        lab.claim_eq("runs of the handler", count("signaled"), signals);
        lab.claim_eq("children reaped", count("reaped"), reaped);
        lab.claim_eq("zombies left", children(host, &demo)?, vec!['Z'; zombies]);
        lab.claim_eq(
            "and no signal is left to tell of them",
            status(host, &demo, "ShdPnd")?,
            "0000000000000000",
        );
        demo.type_line("end")?;
        demo.ending()?;
        Ok(())
    });
}

#[rstest]
fn a_zombie_is_readable_by_its_pidfd() {
    // self-pipe-demo --wait pidfd ends its child before it waits for it: it is a zombie by then.
    experiment!("", "Does a pidfd tell of a child that has ended already?", |lab| {
        let port = lab.port()?;
        let host = lab.server();
        let at = host.address(serverlab::lab::host::Family::V4);
        let demo = host
            .spawn(&program!("self-pipe-demo"), args!["-i", at, "-p", port, "--wait", "pidfd"])?;
        demo.event("listening")?;
        common::play::connecting(lab, serverlab::lab::host::Family::V4, port, &["recv", "close"])?;
        demo.ending()?;
        lab.claim_eq("it is readable", demo.event("woken")?.get("by"), Some("descriptor"));
        Ok(())
    });
}
