//! No client ends a server or takes it from the others, whatever the design.
//!
//! Every design goes through the same acts, over IPv4 and over IPv6: right answers of all sizes,
//! crowds, and clients as they are: silent, slow, in pieces, gone. After each act the next client is
//! served, and the server has no process, thread, zombie, descriptor or connection more than before.
//! What a design cannot do by nature is claimed as what it does instead.
//!
//! The verdicts are also a matrix, in `captures/every_server/matrix.md` and `matrix.json`. The packets
//! of the acts are not captured: what is claimed of them is not about packets. An ordinary client's
//! are, of each design, and they are the same.
//!
//! The last part proves the first: each `--bug` of each design must fail the act that is about it.

#[path = "every_server/acts.rs"]
mod acts;
mod common;
#[path = "every_server/matrix.rs"]
mod matrix;
#[path = "every_server/stage.rs"]
mod stage;

use std::collections::BTreeMap;
use std::time::Duration;

use acts::{ACTS, Act, IDLE, OPEN_FILES, Run};
use rstest::rstest;
use serverlab::lab::experiment::Lab;
use serverlab::lab::flow::Side;
use serverlab::lab::host::Family;
use serverlab::lab::verdict::{Invalid, Verdict};
use serverlab::{experiment, program};
use stage::{Design, Holds, Shares, Stage};

/// How long a server may take for anything. Far more than it needs.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long a server with a bug is waited for: a claim that fails, fails by waiting.
const WITH_A_BUG: Duration = Duration::from_millis(1500);

/// The designs: the program, what a client can hold up there, what is not its own. To add one is to
/// add a line.
macro_rules! designs {
    ($($case:ident $program:literal $holds:ident $shares:ident;)*) => {
        /// Their programs.
        const PROGRAMS: &[&str] = &[$($program),*];

        /// The design of this program.
        fn design(program: &str) -> Design {
            match program {
                $($program => Design {
                    program: program!($program),
                    holds: Holds::$holds,
                    shares: Shares::$shares,
                },)*
                _ => panic!("{program} is not in the list of designs"),
            }
        }

        #[rstest]
        $(#[case::$case($program)])*
        fn a_server_serves_and_survives(
            #[case] program: &str,
            #[values(Family::V4, Family::V6)] family: Family,
        ) {
            let question = "What do its clients, and chance, do to this server and to each other?";
            experiment!(format!("{program}-{family}"), question, |lab| {
                go_through(lab, &design(program), family)
            });
        }

        #[rstest]
        $(#[case::$case($program)])*
        fn the_wire_does_not_tell_the_design(#[case] program: &str) {
            let question = "What is an ordinary client of this server on the wire?";
            experiment!(program, question, |lab| on_the_wire(lab, &design(program)));
        }
    };
}

designs! {
    iterative "iterative-server" Service Nothing;
    fork "fork-server" Nobody Nothing;
    prefork_accept "prefork-accept-server" Worker Nothing;
    prefork_select "prefork-select-server" Worker Nothing;
    prefork_flock "prefork-flock-server" Worker Lock;
    prefork_mutex "prefork-mutex-server" Worker Lock;
    prefork_fdpass "prefork-fdpass-server" Worker Nothing;
    prefork_epoll "prefork-epoll-server" Worker Nothing;
    prefork_epoll_exclusive "prefork-epoll-exclusive-server" Worker Nothing;
    prefork_reuseport "prefork-reuseport-server" Queue Nothing;
    thread "thread-server" Nobody Nothing;
    prethread_accept "prethread-accept-server" Worker Nothing;
    prethread_mutex "prethread-mutex-server" Worker Nothing;
    prethread_queue "prethread-queue-server" Worker Nothing;
    select "select-server" Nobody Nothing;
    poll "poll-server" Nobody Nothing;
    epoll "epoll-server" Nobody Nothing;
    epoll_edge "epoll-edge-server" Nobody Nothing;
    epoll_oneshot "epoll-oneshot-server" Nobody Nothing;
    reactors "reactors-server" Nobody Nothing;
    io_uring "io-uring-server" Nobody Nothing;
    tokio "tokio-server" Nobody Nothing;
    inetd "inetd-server" Nobody Nothing;
    activated "activated-server" Service Listener;
}

/// A design's bug, and the act that must catch it.
#[rstest]
#[case::iterative_leak_connection("iterative-server", "leak-connection", "closes at once")]
#[case::fork_leak_connection("fork-server", "leak-connection", "closes at once")]
#[case::fork_no_reap("fork-server", "no-reap", "closes at once")]
#[case::prefork_accept_mortal_workers("prefork-accept-server", "mortal-workers", "junk")]
#[case::prefork_flock_inherited_lock(
    "prefork-flock-server",
    "inherited-lock",
    "lock holder killed"
)]
#[case::prefork_mutex_plain_mutex("prefork-mutex-server", "plain-mutex", "lock holder killed")]
#[case::prefork_epoll_no_drain("prefork-epoll-server", "no-drain", "200 at once")]
#[case::prefork_reuseport_idle_listener("prefork-reuseport-server", "idle-listener", "200 at once")]
#[case::thread_exit_on_error("thread-server", "exit-on-error", "RST in a request")]
#[case::prethread_accept_mortal_workers("prethread-accept-server", "mortal-workers", "junk")]
#[case::prethread_mutex_hold_lock("prethread-mutex-server", "hold-lock", "says nothing")]
#[case::prethread_queue_exit_when_full("prethread-queue-server", "exit-when-full", "says nothing")]
#[case::select_blocking_write("select-server", "blocking-write", "slow reader")]
#[case::poll_always_writable("poll-server", "always-writable", "EMFILE")]
#[case::epoll_stale_registration("epoll-server", "stale-registration", "closes at once")]
#[case::epoll_edge_no_drain("epoll-edge-server", "no-drain", "kept connection")]
#[case::epoll_oneshot_no_rearm("epoll-oneshot-server", "no-rearm", "kept connection")]
#[case::io_uring_no_rearm("io-uring-server", "no-rearm", "EMFILE")]
#[case::tokio_blocking_call("tokio-server", "blocking-call", "says nothing")]
#[case::inetd_no_cloexec("inetd-server", "no-cloexec", "first process killed")]
#[case::activated_shut_down_listener("activated-server", "shut-down-listener", "SIGTERM")]
fn a_bug_is_caught(#[case] program: &str, #[case] bug: &str, #[case] act: &str) {
    let question = "Does the suite notice a server that is broken on purpose?";
    experiment!(format!("{program}-{bug}"), question, |lab| {
        let act = ACTS.iter().find(|known| known.name == act).expect("an act of this name");
        let caught = match Acting::new(lab, &design(program), Family::V4, Some(bug)).perform(act) {
            Verdict::Fail(_) => Verdict::Pass,
            Verdict::Pass => Verdict::Fail("it passes".to_owned()),
            other => other,
        };
        lab.claim(
            format!("{program} --bug {bug} fails \"{}\"", (act.claim)(&design(program))),
            caught,
        );
        Ok(())
    });
}

/// Does everything to one design, and claims what became of it.
fn go_through(lab: &Lab, design: &Design, family: Family) -> anyhow::Result<()> {
    let mut acting = Acting::new(lab, design, family, None);
    let mut row = BTreeMap::new();
    // The runs one after another: a server is started for each, and again if an act has failed.
    for run in [Run::Plain, Run::Hurried, Run::Limited, Run::Faults] {
        for act in ACTS.iter().filter(|act| act.run == run) {
            let verdict = acting.perform(act);
            row.insert(act.name.to_owned(), verdict.clone());
            lab.claim((act.claim)(design), verdict);
        }
        acting.stage = None;
    }
    let folder = lab.folder();
    let folder = folder.parent().expect("the suite's folder");
    let (network, family) = (lab.network().kind().to_string(), family.to_string());
    matrix::record(folder, &network, (design.program.name(), &family), row, PROGRAMS)
}

/// One client with two requests, who then closes its half.
fn on_the_wire(lab: &Lab, design: &Design) -> anyhow::Result<()> {
    let stage = Acting::new(lab, design, Family::V4, None).set(Run::Plain)?;
    let capture = lab.capture()?;
    let mut caller = stage.callers.connect()?;
    for _ in 0..2 {
        caller.say("1024\n")?;
        caller.hear(1024)?;
    }
    caller.finish()?;
    caller.end()?;
    let wire = capture.finish()?;
    let flow = wire.at("server").flow(stage.port)?;
    lab.claim(
        "the client's SYN, the server's and the client's ACK",
        flow.facts.handshake_completed(),
    );
    let requests = flow.payload(Side::Client);
    lab.claim_eq("then its requests", requests, b"1024\n1024\n");
    let answers = flow.ranges(Side::Server);
    lab.claim_eq("each answer is one segment", answers, [1..1025, 1025..2049]);
    lab.claim_eq("the client closes first", flow.facts.first_fin_by(), Some(Side::Client));
    lab.claim("then the server", flow.facts[Side::Server].fin.is_some());
    lab.claim_eq("and nobody resets", flow.facts.reset_by(), None);
    Ok(())
}

/// A design under trial, and the server that runs just now.
#[derive(Debug)]
struct Acting<'a> {
    lab: &'a Lab,
    design: &'a Design,
    family: Family,
    bug: Option<&'a str>,
    stage: Option<Stage<'a>>,
}

impl<'a> Acting<'a> {
    fn new(lab: &'a Lab, design: &'a Design, family: Family, bug: Option<&'a str>) -> Acting<'a> {
        Acting { lab, design, family, bug, stage: None }
    }

    fn perform(&mut self, act: &Act) -> Verdict {
        let mut stage = match self.stage.take().map_or_else(|| self.set(act.run), Ok) {
            Ok(stage) => stage,
            Err(error) => return verdict(&error, String::new()),
        };
        match (act.check)(&mut stage) {
            Ok(()) => {
                self.stage = Some(stage).filter(|stage| stage.server.ended().is_none());
                Verdict::Pass
            }
            Err(error) => verdict(&error, stage.last_words()), // the next act gets a new server
        }
    }

    fn set(&self, run: Run) -> anyhow::Result<Stage<'a>> {
        let idle = IDLE.as_secs_f64().to_string();
        let (mut flags, open_files) = match run {
            Run::Plain | Run::Faults => (Vec::new(), None),
            Run::Hurried => (vec!["--idle-timeout", idle.as_str()], None),
            Run::Limited => (Vec::new(), Some(OPEN_FILES)),
        };
        flags.extend(self.bug.iter().flat_map(|bug| ["--bug", bug]));
        let patience = if self.bug.is_some() { WITH_A_BUG } else { PATIENCE };
        Stage::set(self.lab, self.design, self.family, &flags, open_files, patience)
    }
}

/// What a check that did not get through means: the server is at fault, unless the experiment is.
fn verdict(error: &anyhow::Error, last_words: String) -> Verdict {
    if error.is::<Invalid>() {
        return Verdict::Invalid(format!("{error:#}"));
    }
    Verdict::Fail(format!("{error:#}{last_words}"))
}
