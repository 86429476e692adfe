//! What clients and chance do to a server, one function each. It returns what became of them, or
//! the first thing that was not as it must be.

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use nix::sys::signal::Signal;
use serverlab::lab::process::Ending;
use serverlab::lab::procfs::Seen;
use serverlab::lab::wait::until;

use crate::common::callers::End;
use crate::stage::{Design, Holds, QUICK, Shares, Stage, WORKERS};

/// A large answer, in bytes: more than both sockets' buffers hold.
const LARGE: usize = 5_000_000;

/// One row of the matrix.
#[derive(Clone, Copy)]
pub(crate) struct Act {
    /// Its name.
    pub(crate) name: &'static str,
    /// What becomes of it, by design.
    pub(crate) claim: fn(&Design) -> String,
    /// Does it.
    pub(crate) check: fn(&mut Stage<'_>) -> anyhow::Result<()>,
    /// Which server it is done to.
    pub(crate) run: Run,
}

/// Acts that do not disturb one another are done to the same server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Run {
    /// Flags as they are.
    Plain,
    /// With an idle time-out.
    Hurried,
    /// With few descriptors.
    Limited,
    /// As plain, for what may end it.
    Faults,
}

/// With `--idle-timeout`: how long a client may say nothing.
pub(crate) const IDLE: Duration = Duration::from_millis(300);

/// RLIMIT_NOFILE of the server that shall run out of descriptors.
pub(crate) const OPEN_FILES: u64 = 40;

/// Who else is served, in a claim.
fn others(design: &Design) -> &'static str {
    match design.holds {
        Holds::Nobody | Holds::Worker => "the others are served meanwhile",
        Holds::Queue => "the others are served meanwhile, but for those in that worker's own queue",
        Holds::Service => {
            "the others wait in the kernel's queue until it is gone, then they are served"
        }
    }
}

macro_rules! acts {
    ($($check:ident, $name:literal, $run:ident, $claim:expr;)*) => {
        /// All of them, in the order in which they are done.
        pub(crate) const ACTS: &[Act] =
            &[$(Act { name: $name, claim: $claim, check: $check, run: Run::$run }),*];
    };
}

acts! {
    sizes, "right bytes", Plain,
        |_| "answers of 0, 1, 1024 and 5,000,000 bytes are whole and right".into();
    kept_connection, "kept connection", Plain,
        |_| "fifty requests on one connection get fifty answers, also when sent in one segment".into();
    two_hundred, "200 at once", Plain,
        |_| "200 clients who are all there before the first is accepted are all answered".into();
    says_nothing, "says nothing", Plain,
        |design| format!("clients that say nothing: {}{}", others(design),
            if design.holds == Holds::Worker { "; once every worker has such a client, the others \
                wait until they are gone" } else { "" });
    closes_at_once, "closes at once", Plain,
        |_| "clients that close at once leave nothing".into();
    junk, "junk", Plain,
        |_| "what is not a number ends its own connection only, and the reason is told".into();
    over_the_limit, "over the limit", Plain,
        |_| "a number over the limit, or without end, ends its own connection only".into();
    byte_by_byte, "byte by byte", Plain,
        |_| "a request that comes byte by byte, each in a segment of its own, is one request".into();
    reset_before_accept, "RST before accept", Plain,
        |_| "a client that resets before it is accepted costs nobody else anything".into();
    reset_in_request, "RST in a request", Plain,
        |_| "a client that resets in the middle of its request costs nobody else anything".into();
    reset_in_answer, "RST in an answer", Plain,
        |_| "a client that resets in the middle of its answer costs nobody else anything".into();
    half_close, "half-close", Plain,
        |_| "a client that sends its requests and a FIN gets all its answers, and then a FIN".into();
    slow_reader, "slow reader", Plain,
        |design| format!("a client that does not read its 5 MB: {}; then it gets all", others(design));
    slowloris, "slowloris", Hurried,
        |design| format!("a request that never ends is ended by --idle-timeout; {}", others(design));
    no_descriptor_left, "EMFILE", Limited,
        |design| match design.holds {
            Holds::Nobody => "more clients than descriptors: they wait without any spinning, \
                              and are served when others are gone",
            _ => "it accepts no more clients than it can serve, so it never runs out of \
                  descriptors; the next are served when those are gone",
        }.into();
    worker_stopped, "worker stopped", Faults,
        |design| if design.holds == Holds::Service { "the only process stopped: all wait, and all \
            are served when it goes on".into() } else {
            format!("the process that serves a client stopped: {}; all are served when it goes on",
                "whoever has a process of their own is served meanwhile") };
    lock_holder_killed, "lock holder killed", Faults,
        |design| if design.shares == Shares::Lock { "one worker at a time is in accept; killed there, it does not \
            take the lock with it" } else { "no process waits for a lock of another" }.into();
    worker_killed, "worker killed", Faults,
        |_| "SIGKILL of the process that serves a client ends its connections; if others are left, \
             they go on and it is replaced; if not, the port can be taken again at once".into();
    first_killed, "first process killed", Faults,
        |_| "SIGKILL of the first process: nobody else keeps the port, the next server has it at once, \
             and when their clients are gone nobody is left".into();
    drains, "SIGTERM", Plain,
        |design| if design.shares == Shares::Listener {
            "SIGTERM: the answer under way is finished, a new client waits in the listener, which \
             is the starter's, exit 0, nobody is left; the next server serves it"
        } else {
            "SIGTERM: the answer under way is finished, nothing new is accepted, exit 0, \
             nobody is left"
        }.into();
}

fn sizes(stage: &mut Stage<'_>) -> anyhow::Result<()> {
    for bytes in [0, 1, 1024, LARGE] {
        let mut caller = stage.callers.connect()?;
        caller.say(&format!("{bytes}\n"))?;
        caller.hear(bytes).with_context(|| format!("an answer of {bytes}"))?;
        caller.finish()?;
        let end = caller.end().context("after the answer")?;
        ensure!(end == End::Fin, "the connection ends with {end:?}");
    }
    stage.aftermath(Vec::new())
}

fn kept_connection(stage: &mut Stage<'_>) -> anyhow::Result<()> {
    let mut caller = stage.callers.connect()?;
    for number in 0..25 {
        caller.say(&format!("{number}\n"))?;
        caller.hear(number)?;
    }
    stage.all_asleep()?; // so that the segment is one event
    caller.say(&"7\n".repeat(25))?;
    caller.hear(7 * 25)?;
    drop(caller);
    stage.aftermath(Vec::new())
}

fn two_hundred(stage: &mut Stage<'_>) -> anyhow::Result<()> {
    let stopped = stage.stop_all()?;
    let crowd = stage.start_crowd(&["-c", "200"])?;
    until(
        "200 clients in the queue",
        stage.patience,
        || Ok((stage.queue()? == 200).then_some(())),
    )?;
    stage.resume(&stopped)?;
    Stage::all_answered(&crowd)?;
    stage.aftermath(Vec::new())
}

fn says_nothing(stage: &mut Stage<'_>) -> anyhow::Result<()> {
    // More than there are threads, where each client is to hold up nobody; else one is enough.
    let count = if stage.design.holds == Holds::Nobody { 2 * WORKERS } else { 1 };
    let mut silent = (0..count).map(|_| stage.silent()).collect::<Result<Vec<_>, _>>()?;
    let mut waiting = stage.beside(&silent[0])?;
    if stage.design.holds == Holds::Worker {
        for _ in 1..WORKERS {
            silent.push(stage.silent()?);
        }
        for _ in 0..2 * WORKERS {
            waiting.push(stage.asking()?);
        }
        stage.all_asleep()?;
    }
    for caller in silent.iter().chain(&waiting) {
        ensure!(!caller.has_news()?, "a client was told something that should be waiting");
    }
    drop(silent);
    stage.aftermath(waiting)
}

fn closes_at_once(stage: &mut Stage<'_>) -> anyhow::Result<()> {
    for _ in 0..2 * WORKERS {
        drop(stage.callers.connect()?);
    }
    stage.aftermath(Vec::new())
}

fn junk(stage: &mut Stage<'_>) -> anyhow::Result<()> {
    for junk in ["ten\n", "-1\n", "\n", "GET / HTTP/1.1\r\n\r\n", "\0\u{1}\u{2}\n"] {
        let mut caller = stage.callers.connect()?;
        caller.say(junk)?;
        caller.end().with_context(|| format!("after {junk:?}"))?;
        stage.closed_because(caller.address(), "bad-request:not-a-number")?;
    }
    stage.aftermath(Vec::new())
}

fn over_the_limit(stage: &mut Stage<'_>) -> anyhow::Result<()> {
    for (request, why) in
        [("99999999999\n".to_owned(), "over-limit"), ("1".repeat(600), "too-long")]
    {
        let mut caller = stage.callers.connect()?;
        caller.say(&request)?;
        caller.end().with_context(|| format!("after {request:?}"))?;
        stage.closed_because(caller.address(), &format!("bad-request:{why}"))?;
    }
    stage.aftermath(Vec::new())
}

fn byte_by_byte(stage: &mut Stage<'_>) -> anyhow::Result<()> {
    let mut caller = stage.callers.connect()?;
    for byte in ["1", "0", "2", "4"] {
        caller.say(byte)?;
        stage.has_been_read(&caller)?;
    }
    ensure!(!caller.has_news()?, "an answer to half a request");
    caller.say("\n")?;
    caller.hear(1024)?;
    drop(caller);
    stage.aftermath(Vec::new())
}

fn reset_before_accept(stage: &mut Stage<'_>) -> anyhow::Result<()> {
    let stopped = stage.stop_all()?;
    for request in ["", "10\n"] {
        let mut caller = stage.callers.connect()?;
        caller.say(request)?;
        caller.reset()?;
    }
    stage.resume(&stopped)?;
    stage.aftermath(Vec::new())
}

fn reset_in_request(stage: &mut Stage<'_>) -> anyhow::Result<()> {
    let mut caller = stage.callers.connect()?;
    caller.say("10")?;
    stage.has_been_read(&caller)?;
    let address = caller.address();
    caller.reset()?;
    stage.closed_because(address, "ECONNRESET")?;
    stage.aftermath(Vec::new())
}

fn reset_in_answer(stage: &mut Stage<'_>) -> anyhow::Result<()> {
    let mut caller = stage.callers.connect()?;
    caller.say(&format!("{LARGE}\n"))?;
    caller.hear(100_000)?;
    let address = caller.address();
    caller.reset()?;
    stage.closed_because(address, "ECONNRESET")?;
    stage.aftermath(Vec::new())
}

fn half_close(stage: &mut Stage<'_>) -> anyhow::Result<()> {
    let mut caller = stage.callers.connect()?;
    caller.say(&format!("1024\n{LARGE}\n5\n"))?;
    caller.finish()?;
    caller.hear(1024 + LARGE + 5)?;
    let end = caller.end()?;
    ensure!(end == End::Fin, "after the answers comes {end:?}");
    stage.closed_because(caller.address(), "eof")?;
    drop(caller);
    stage.aftermath(Vec::new())
}

fn slow_reader(stage: &mut Stage<'_>) -> anyhow::Result<()> {
    let mut slow = stage.callers.connect_with_buffer(64 * 1024)?;
    slow.say(&format!("{LARGE}\n"))?;
    stage.row_until("an answer that its reader holds up", &slow, |row| row.send_queue > 10_000)?;
    let waiting = stage.beside(&slow)?;
    let fifty = stage.start_crowd(&["-c", "50"])?;
    if matches!(stage.design.holds, Holds::Nobody | Holds::Worker) {
        Stage::all_answered(&fifty).context("fifty quick clients")?;
    }
    slow.hear(LARGE).context("the slow reader")?;
    drop(slow);
    stage.serve(waiting)?;
    Stage::all_answered(&fifty).context("fifty quick clients")?;
    stage.aftermath(Vec::new())
}

fn slowloris(stage: &mut Stage<'_>) -> anyhow::Result<()> {
    let began = Instant::now();
    let mut slow = stage.callers.connect()?;
    slow.say("0")?;
    let waiting = stage.beside(&slow)?;
    // Three digits in each time-out: never silent for long, never done. The twentieth would be the last
    // that a request may have: by then it must be over.
    while !slow.ended_within(IDLE / 3)? {
        ensure!(began.elapsed() < stage.patience, "the server waits for ever");
        if slow.say("0").is_err() {
            break; // EPIPE: it has just ended
        }
    }
    ensure!(began.elapsed() >= IDLE, "ended after {:?}, before its time", began.elapsed());
    stage.closed_because(slow.address(), "idle-timeout")?;
    drop(slow);
    stage.aftermath(waiting)
}

fn no_descriptor_left(stage: &mut Stage<'_>) -> anyhow::Result<()> {
    let count = match stage.design.holds {
        Holds::Nobody => usize::try_from(OPEN_FILES)? + 8,
        Holds::Worker | Holds::Queue => WORKERS,
        Holds::Service => 1,
    };
    let failures = |stage: &Stage<'_>| {
        let events = stage.server.events();
        events.iter().filter(|event| event.verb == "accept-failed").count()
    };
    let (began, failed) = (Instant::now(), failures(stage));
    let silent = (0..count).map(|_| stage.callers.connect()).collect::<Result<Vec<_>, _>>()?;
    let last = stage.asking()?;
    if stage.design.holds == Holds::Nobody {
        let what = "an accept that fails, or a process for each client";
        until(what, stage.patience, || {
            let each = stage.processes()?.len() > count;
            Ok((each || failures(stage) > failed).then_some(()))
        })?;
    }
    // Who spins is not found asleep.
    stage.all_asleep().context("while clients wait")?;
    if matches!(stage.design.holds, Holds::Worker | Holds::Service) {
        ensure!(!last.has_news()?, "it serves more clients at once than it can");
    }
    drop(silent);
    stage.serve(vec![last]).context("beyond the descriptors")?;
    let tries = failures(stage) - failed;
    let most = 20 + 20 * began.elapsed().as_secs();
    ensure!(tries as u64 <= most, "accept failed {tries} times, not {most}: it spins");
    stage.aftermath(Vec::new())
}

fn worker_stopped(stage: &mut Stage<'_>) -> anyhow::Result<()> {
    let mut held = stage.callers.connect()?;
    held.say("10")?;
    stage.has_been_read(&held)?;
    let holder = stage.holder_of(&held)?;
    stage.stop(holder)?;
    held.say("24\n")?;
    let waiting = if holder == stage.server.pid() {
        // The process that accepts is the one that stopped.
        let caller = stage.asking()?;
        stage.row_until("a client that waits", &caller, |row| row.receive_queue > 0)?;
        vec![caller]
    } else {
        stage.beside(&held)?
    };
    ensure!(!held.has_news()?, "an answer from a stopped process");
    stage.resume(&[holder])?;
    held.hear(1024).context("the client of the stopped process")?;
    drop(held);
    stage.aftermath(waiting)
}

fn lock_holder_killed(stage: &mut Stage<'_>) -> anyhow::Result<()> {
    if stage.design.shares != Shares::Lock {
        return Ok(());
    }
    let parent = stage.server.pid();
    let workers = |stage: &Stage<'_>| -> anyhow::Result<Vec<Seen>> {
        Ok(stage.processes()?.into_iter().filter(|seen| seen.pid != parent).collect())
    };
    let in_accept = [libc::SYS_accept, libc::SYS_accept4];
    let accepting = until("a worker in accept, the others asleep", stage.patience, || {
        let workers = workers(stage)?;
        if !workers.iter().all(Seen::is_asleep) {
            return Ok(None);
        }
        let accepting = workers.iter().filter(|seen| seen.is_in(&in_accept));
        Ok(Some(accepting.map(|seen| seen.pid).collect::<Vec<_>>()))
    })?;
    let [holder] = accepting[..] else {
        anyhow::bail!("{} workers are in accept at once: there is no lock", accepting.len());
    };
    stage.lab.server().signal(holder, Signal::SIGKILL)?;
    // While it dies it may still accept a client, who then dies with it.
    until("the death of the lock's holder", stage.patience, || {
        let gone = !workers(stage)?.iter().any(|seen| seen.pid == holder && !seen.is_zombie());
        Ok(gone.then_some(()))
    })?;
    for _ in 0..2 * WORKERS {
        stage.callers.ask(QUICK).context("a client after the lock's holder was killed")?;
    }
    stage.accept_replacements()?;
    stage.aftermath(Vec::new())
}

fn worker_killed(stage: &mut Stage<'_>) -> anyhow::Result<()> {
    let mut held = stage.callers.connect()?;
    held.say("10")?;
    stage.has_been_read(&held)?;
    let holder = stage.holder_of(&held)?;
    stage.lab.server().signal(holder, Signal::SIGKILL)?;
    held.end().context("the client of the killed process")?;
    drop(held);
    if holder == stage.server.pid() {
        return the_next_server_has_the_port(stage);
    }
    let killed = holder.to_string();
    until("the event `reaped` of the killed child", stage.patience, || {
        let events = stage.server.events();
        let mut reaped = events.iter().filter(|event| event.verb == "reaped");
        Ok(reaped.any(|event| event.get("child") == Some(&killed)).then_some(()))
    })?;
    stage.callers.ask(QUICK).context("another client")?;
    stage.accept_replacements()?;
    stage.aftermath(Vec::new())
}

fn first_killed(stage: &mut Stage<'_>) -> anyhow::Result<()> {
    let held = stage.silent()?;
    stage.server.signal(Signal::SIGKILL)?;
    the_next_server_has_the_port(stage)?;
    drop(held);
    nobody_is_left(stage)
}

/// The first process was killed: its port is free, at once, and the next server gets it.
fn the_next_server_has_the_port(stage: &Stage<'_>) -> anyhow::Result<()> {
    let ending = stage.server.ending()?;
    ensure!(ending == Ending::Signal(Signal::SIGKILL), "the server ended by {ending}");
    stage.no_listener()?;
    let _again = stage.next_server()?;
    stage.callers.ask(QUICK).context("the next server's client")
}

fn drains(stage: &mut Stage<'_>) -> anyhow::Result<()> {
    let mut served = stage.callers.connect_with_buffer(64 * 1024)?;
    served.say(&format!("{LARGE}\n"))?;
    stage.row_until("an answer under way", &served, |row| row.send_queue > 10_000)?;
    let beside = matches!(stage.design.holds, Holds::Nobody | Holds::Worker);
    let silent = beside.then(|| stage.silent()).transpose()?;
    stage.server.signal(Signal::SIGTERM)?;
    stage.no_listener()?;
    let waits = stage.design.shares == Shares::Listener;
    let late = stage.callers.connect();
    ensure!(late.is_ok() == waits, "a new client after SIGTERM: {late:?}");
    if let Some(mut silent) = silent {
        silent.end().context("the client that says nothing")?;
    }
    ensure!(stage.server.ended().is_none(), "it ended before its last answer did");
    served.hear(LARGE).context("the answer that was under way")?;
    served.end().context("after the answer")?;
    let ending = stage.server.ending()?;
    ensure!(ending == Ending::Exit(0), "it ended by {ending}");
    nobody_is_left(stage)?;
    if waits {
        let _next = stage.next_server()?;
        let mut late = late?;
        late.say(&format!("{QUICK}\n"))?;
        late.hear(QUICK).context("who came after SIGTERM")?;
    }
    let events = stage.server.events();
    let count = |verb: &str| events.iter().filter(|event| event.verb == verb).count();
    ensure!(count("stopped") == 1, "it said `stopped` {} times", count("stopped"));
    if let Some(sum) = events.iter().find_map(|event| event.get("sum")) {
        // Where the parent accepts and passes on, both tell; the worker's lines count.
        let lines = events.iter().filter(|event| event.verb == "accepted");
        let by_workers = lines.clone().filter(|event| event.get("worker").is_some()).count();
        let accepted = if by_workers > 0 { by_workers } else { lines.count() }.to_string();
        ensure!(sum == accepted, "it counted {sum} connections and told of {accepted}");
    }
    Ok(())
}

fn nobody_is_left(stage: &Stage<'_>) -> anyhow::Result<()> {
    let mut left = Vec::new();
    let gone = until("the end of every process", stage.patience, || {
        left = stage.processes()?.iter().map(|seen| seen.pid).collect();
        Ok(left.is_empty().then_some(()))
    });
    gone.with_context(|| format!("it left processes {left:?}"))
}
