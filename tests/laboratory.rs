//! The laboratory tests itself: what it reports is complete, and what it starts, it ends.

mod common;

use std::io::BufRead as _;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rstest::rstest;
use serverlab::lab::capture::Depth;
use serverlab::lab::experiment::{Experiment, Lab};
use serverlab::lab::host::{Family, Host, Way};
use serverlab::lab::journal::Journal;
use serverlab::lab::lease::AGENTS;
use serverlab::lab::network::Network;
use serverlab::lab::process::{DEADLINE, Ending};
use serverlab::lab::program::Program;
use serverlab::lab::verdict::{Invalid, Verdict};
use serverlab::lab::wait;
use serverlab::{args, experiment, program};

#[rstest]
fn a_large_capture_is_complete(#[values(Family::V4, Family::V6)] family: Family) {
    experiment!(family, "Does a capture hold every segment that the kernels counted?", |lab| {
        let (host, port) = (lab.server().address(family), lab.port()?);
        let args = args!["-i", host, "-p", port, "-q"];
        let server = lab.server().spawn(&program!("iterative-server"), args)?;
        server.event("listening")?;
        let capture = lab.capture_deep(Depth::Headers)?;
        let before = [lab.client().counters()?, lab.server().counters()?];
        let args = args!["-i", host, "-p", port, "-b", 30_000_000];
        let ending = lab.client().run(&program!("client"), args)?.ending()?;
        // The server's last segments have been answered when neither side has a connection left
        // but the client's TIME_WAIT.
        wait::until("the end of the connection", DEADLINE, || {
            Ok(lab.states(lab.server(), port)?.is_empty().then_some(()))
        })?;
        let after = [lab.client().counters()?, lab.server().counters()?];
        let wire = capture.finish()?;

        lab.claim_eq("the client got its 30 MB", ending, Ending::Exit(0));
        for (number, name) in ["client", "server"].into_iter().enumerate() {
            // OutSegs leaves out what is sent again (RFC 4022, tcpOutSegs).
            let mut counted = 0;
            for counter in ["TcpInSegs", "TcpOutSegs", "TcpRetransSegs"] {
                counted += after[number].since(&before[number], counter)?;
            }
            let captured = wire.at(name).packets();
            lab.claim(format!("more than 20,000 packets on the {name}"), captured > 20_000);
            let sentence = format!("the {name}'s capture has as many as its kernel counted");
            lab.claim_eq(sentence, i64::try_from(captured)?, counted);
        }
        Ok(())
    });
}

#[rstest]
#[case::with_its_tail_cut(Signal::SIGINT)]
#[case::by_a_killed_program(Signal::SIGKILL)]
fn a_capture_that_broke_off_is_invalid(#[case] signal: Signal) {
    experiment!(
        signal,
        "Is a capture that ended before the experiment taken for a whole one?",
        |lab| {
            let port = lab.port()?;
            let capture = lab.capture()?;
            let tap = capture.program("server");
            tap.signal(signal)?;
            tap.ending()?;
            let host = lab.server().address(Family::V4);
            lab.client().run(&program!("peer"), args!["-i", host, "-p", port, "connect"])?;
            let error = capture.finish().expect_err("it must not pass for complete");
            lab.claim("it is invalid, not passed and not failed", error.is::<Invalid>());
            let told = error.to_string();
            let names = told.contains("the capture on server is not complete");
            lab.claim(format!("the error names the host: {told}"), names);
            Ok(())
        }
    );
}

#[test]
fn an_experiment_with_such_a_capture_fails_its_test() {
    let run = || {
        experiment!(
            "",
            "Does a test fail if its experiment is invalid? (This one is, on purpose.)",
            |lab| {
                let capture = lab.capture()?;
                capture.program("client").signal(Signal::SIGKILL)?;
                capture.program("client").ending()?;
                lab.claim("this claim passes", true);
                capture.finish()?;
                Ok(())
            }
        );
    };
    // Its report is not for whoever runs us: this invalid experiment is as it should be.
    let panic = quietly(run).expect_err("an invalid experiment must fail its test");
    let message = panic.downcast_ref::<String>().expect("a message");
    assert!(message.contains("INVALID") && message.contains("the capture on client"), "{message}");
}

#[test]
fn a_claim_that_proves_nothing_fails_its_test() {
    let run = || {
        let question = "Does a test fail if a claim is invalid? (This one is, on purpose.)";
        experiment!("", question, |lab| {
            lab.claim("this claim passes", true);
            lab.claim("this one proves nothing", Verdict::Invalid("on purpose".to_owned()));
            Ok(())
        });
    };
    let panic = quietly(run).expect_err("an invalid claim must fail its test");
    let message = panic.downcast_ref::<String>().expect("a message");
    assert!(message.contains("INVALID: 1 of 2 claims prove nothing"), "{message}");
}

/// An experiment whose claim does not hold, or whose fact does not come in time, with this list of
/// kernels in place of tests/kernels; what its evidence says then.
fn one_that_differs(kernels: &'static str, comes: bool) -> String {
    let experiment = Experiment {
        suite: "laboratory",
        function: "one_that_differs",
        case: format!("{}-{comes}", kernels.replace(' ', "-")),
        question: "What becomes of a claim that does not hold on this kernel? (As here, on purpose.)",
        lab: program!("lab"),
        package: env!("CARGO_MANIFEST_DIR"),
        kernels,
    };
    let mut folder = std::path::PathBuf::new();
    // Its report is not for whoever runs us: it is as it should be.
    let ended = quietly(std::panic::AssertUnwindSafe(|| {
        experiment.run(|lab| {
            folder = lab.folder();
            if comes {
                lab.claim_eq("two is one", 2, 1);
            } else {
                wait::until("the impossible", Duration::ZERO, || Ok(None::<()>))?;
            }
            Ok(())
        });
    }));
    let evidence = std::fs::read_to_string(folder.join("README.md")).expect("its evidence");
    assert_eq!(ended.is_ok(), evidence.contains("DRIFT"), "{evidence}");
    evidence
}

#[test]
fn another_answer_of_another_kernel_is_drift() {
    for (comes, detail) in [(true, "saw 2"), (false, "awaited the impossible: not within 0ns")] {
        let evidence = one_that_differs("laboratory 2.6", comes);
        assert!(evidence.contains("Verdict: **DRIFT**"), "{evidence}");
        assert!(evidence.contains("seen on Linux 2.6; this is Linux"), "{evidence}");
        assert!(evidence.contains(detail), "{evidence}");
    }
    // Controls: on a kernel that is listed, or where none is, it is no drift.
    let release = nix::sys::utsname::uname().expect("uname").release().to_owned();
    let release = release.to_str().expect("ASCII");
    let listed = release.split(['.', '-']).take(2).collect::<Vec<_>>().join(".");
    let listed = Box::leak(format!("laboratory 2.6 {listed}").into_boxed_str());
    assert!(one_that_differs(listed, true).contains("Verdict: **FAIL**"));
    assert!(one_that_differs("sigpipe 2.6", true).contains("Verdict: **FAIL**"));
    assert!(one_that_differs(listed, false).contains("Verdict: **INVALID**"));
}

/// Runs what is expected to panic, and keeps its message from the console.
fn quietly(run: impl FnOnce() + std::panic::UnwindSafe) -> std::thread::Result<()> {
    serverlab::lab::report::silence(|| std::panic::catch_unwind(run))
}

#[rstest]
#[case::that_ignores_sigterm("trap '' TERM; echo $$; sleep 1000 & wait")]
#[case::whose_grandchild_calls_setsid("setsid sh -c 'echo $$; sleep 1000' & wait")]
#[case::that_daemonized("(setsid sleep 1000 & echo $!); exit 0")]
fn nothing_outlives_a_program(#[case] script: &str) {
    let case = script.split([' ', '\'']).next().unwrap_or_default().replace('(', "double-");
    experiment!(case, "Is everything that a program started gone when it is dropped?", |lab| {
        let shell = lab.server().spawn(&Program::of_host("sh"), ["-c", script])?;
        let pid = shell.wait_until("a pid", |output| {
            output.stdout.lines().next().and_then(|line| line.trim().parse().ok())
        })?;
        shell.signal(Signal::SIGTERM)?;
        let is_there = |pid: i32| lab.server().read(&format!("/proc/{pid}/comm")).is_ok();
        lab.claim("control: the process is there after SIGTERM", is_there(pid));
        let started = Instant::now();
        drop(shell);
        lab.claim("it is dropped in bounded time", started.elapsed() < DEADLINE);
        lab.claim("the process is gone", !is_there(pid));
        Ok(())
    });
}

/// An agent of our own, on this machine: whatever becomes of it concerns no other experiment.
fn local_agent(folder: &Path) -> anyhow::Result<(std::process::Child, Host)> {
    let socket = folder.join("agent.sock");
    let lab = program!("lab");
    let mut agent = Command::new(lab.path().expect("it is ours"))
        .arg("host")
        .arg(&socket)
        .stderr(Stdio::null())
        .spawn()?;
    let deadline = Instant::now() + DEADLINE;
    while !socket.exists() {
        anyhow::ensure!(agent.try_wait()?.is_none(), "the agent died");
        anyhow::ensure!(Instant::now() < deadline, "awaited the agent's socket");
        std::thread::yield_now();
    }
    let way = Way::Path(socket);
    let host =
        Host::new("agent", Ipv4Addr::LOCALHOST, Ipv6Addr::LOCALHOST, way, &Journal::default());
    Ok((agent, host))
}

#[test]
fn a_dead_agent_is_an_error_not_a_hang() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let (mut agent, host) = local_agent(folder.path())?;
    let sleeper = host.spawn(&Program::of_host("sh"), ["-c", "echo ready; exec sleep 1000"])?;
    sleeper.wait_until("ready", |output| output.stdout.contains("ready").then_some(()))?;
    agent.kill()?;
    agent.wait()?;
    let started = Instant::now();
    let error = host.spawn(&Program::of_host("true"), [""; 0]).expect_err("nobody is there");
    assert!(format!("{error:#}").contains("the agent of host agent is lost"), "{error:#}");
    assert!(started.elapsed() < DEADLINE, "it took {:?}", started.elapsed());
    drop(sleeper); // its conversation outlived the agent, and still ends what it began
    Ok(())
}

#[test]
fn an_agent_that_is_asked_to_end_kills_what_it_runs() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let (mut agent, host) = local_agent(folder.path())?;
    let script = "setsid sh -c 'echo $$; exec sleep 1000' & wait";
    let shell = host.spawn(&Program::of_host("sh"), ["-c", script])?;
    let pid: i32 = shell.wait_until("a pid", |output| {
        output.stdout.lines().next().and_then(|line| line.trim().parse().ok())
    })?;
    kill(Pid::from_raw(agent.id().cast_signed()), Signal::SIGTERM)?;
    assert!(agent.wait()?.success());
    assert!(!Path::new(&format!("/proc/{pid}")).exists(), "process {pid} is left");
    assert!(!folder.path().join("agent.sock").exists(), "the socket is left");
    let error = shell.ending().expect_err("its agent is gone");
    assert!(format!("{error:#}").contains("is lost"), "{error:#}");
    Ok(())
}

#[test]
fn what_cannot_be_run_says_why() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let (mut agent, host) = local_agent(folder.path())?;
    let error = host.spawn(&Program::of_host("no-such-program"), [""; 0]).expect_err("none");
    let told = format!("{error:#}");
    assert!(
        told.contains("cannot run no-such-program on agent") && told.contains("No such file"),
        "{told}"
    );
    let text = folder.path().join("text");
    std::fs::write(&text, "not an executable")?;
    let error = host.spawn(&Program::file(&text), [""; 0]).expect_err("no executable");
    assert!(format!("{error:#}").contains("Permission denied"), "{error:#}");
    agent.kill()?;
    agent.wait()?;
    Ok(())
}

#[test]
fn eight_experiments_at_once_do_not_disturb_one_another() {
    std::thread::scope(|scope| {
        for number in 0..8 {
            scope.spawn(move || one_of_many(number));
        }
    });
}

fn one_of_many(number: usize) {
    experiment!(number, "Does an experiment see anything of seven others?", |lab| {
        let (host, port) = (lab.server().address(Family::V4), lab.port()?);
        let args = args!["-i", host, "-p", port];
        let server = lab.server().spawn(&program!("iterative-server"), args)?;
        server.event("listening")?;
        let capture = lab.capture()?;
        let before = lab.server().counters()?;
        let requests = number + 1;
        let args = args!["-i", host, "-p", port, "-t", requests, "-b", 100 * requests];
        let ending = lab.client().run(&program!("client"), args)?.ending()?;
        let opened = lab.server().counters()?.since(&before, "TcpPassiveOpens")?;
        server.events_of("closed", requests)?;
        let wire = capture.finish()?;
        lab.claim_eq("its client is served", ending, Ending::Exit(0));
        lab.claim_eq(
            "its server accepts its connections",
            server.events_of("accepted", 0)?.len(),
            requests,
        );
        lab.claim_eq("its kernel counts them", usize::try_from(opened)?, requests);
        lab.claim_eq(
            "its capture holds them and no other",
            wire.at("server").flows().len(),
            requests,
        );
        Ok(())
    });
}

/// What the next test runs in a process of its own, and kills.
#[test]
#[ignore = "never ends: a part of the_end_of_a_runner_is_the_end_of_what_it_runs"]
fn a_runner_that_never_ends() {
    experiment!("", "", |lab: &Lab| {
        let script = "echo $$; trap '' TERM; setsid sleep 1000 & wait";
        let sleeper = lab.server().spawn(&Program::of_host("sh"), ["-c", script])?;
        let _capture = lab.capture()?;
        let pid = sleeper
            .wait_until("a pid", |output| output.stdout.lines().next().map(str::to_owned))?;
        println!("ready {pid}");
        loop {
            std::thread::park();
        }
    });
}

#[rstest]
#[case::killed(Signal::SIGKILL)]
#[case::interrupted(Signal::SIGINT)]
fn the_end_of_a_runner_is_the_end_of_what_it_runs(#[case] signal: Signal) -> anyhow::Result<()> {
    let captures = tempfile::tempdir()?;
    let mut runner = Command::new(std::env::current_exe()?)
        .args(["a_runner_that_never_ends", "--exact", "--ignored", "--nocapture"])
        .env("LAB_CAPTURES", captures.path())
        .env_remove("LAB_REPORT")
        .stdout(Stdio::piped())
        .spawn()?;
    let output = std::io::BufReader::new(runner.stdout.take().expect("it is piped"));
    let ready = output.lines().map_while(Result::ok).find_map(|line| {
        let pid = line.split_once("ready ")?.1;
        Some(pid.trim().to_owned())
    });
    let sleeper = ready.context("the runner ended early")?;
    let started = descendants(runner.id());
    kill(Pid::from_raw(runner.id().cast_signed()), signal)?;
    runner.wait()?;
    if let Some(folder) = std::env::var_os(AGENTS) {
        // The hosts are others' containers. What ran there must be gone from there.
        let network = Network::of_agents(Path::new(&folder))?;
        let sleeper = format!("/proc/{sleeper}/comm");
        return wait::until("the end of what the runner ran", DEADLINE, || {
            Ok(network.host("server").read(&sleeper).is_err().then_some(()))
        });
    }
    anyhow::ensure!(!started.is_empty(), "the runner had started nothing");
    for process in &started {
        wait::until(&format!("the end of {process:?}"), DEADLINE, || {
            Ok((!process.lives()).then_some(()))
        })?;
    }
    Ok(())
}

/// A process of this machine: a pid may be used again, a pid with its start time not.
#[derive(Debug)]
struct LocalProcess {
    pid: u32,
    #[allow(dead_code, reason = "read by Debug, in the failure's message")]
    command: String,
    start: String,
}

impl LocalProcess {
    fn lives(&self) -> bool {
        start_time(self.pid).is_some_and(|start| start == self.start)
    }
}

/// Field 22 of /proc/PID/stat; none for a process that is gone, or a zombie.
fn start_time(pid: u32) -> Option<String> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    (fields[0] != "Z").then(|| fields[19].to_owned())
}

/// All that a process has started, and that has started, and so on, on this machine. Of a Compose
/// project that is the guardian; what it leaves is seen by `docker ps` (see .ci/run).
fn descendants(pid: u32) -> Vec<LocalProcess> {
    let mut found = Vec::new();
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    for task in tasks {
        let children = std::fs::read_to_string(task.path().join("children")).unwrap_or_default();
        for child in children.split_whitespace().filter_map(|pid| pid.parse().ok()) {
            let command =
                std::fs::read_to_string(format!("/proc/{child}/comm")).unwrap_or_default();
            if let Some(start) = start_time(child) {
                found.push(LocalProcess { pid: child, command: command.trim().to_owned(), start });
            }
            found.extend(descendants(child));
        }
    }
    found
}
