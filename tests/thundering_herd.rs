//! How many processes a connection wakes: one, or all that wait.
//!
//! A worker that sleeps is counted by the kernel: voluntary_ctxt_switches in /proc/PID/status. So
//! connections come one at a time, each when every worker sleeps again, and the count says how often
//! somebody was woken. (How often accept fails with EAGAIN is no measure: most of those who are
//! woken in vain look again inside the kernel and never come back to their program.)
//!
//! Each client costs its worker one more sleep, in recv(2), which is taken off.

mod common;

use std::collections::{BTreeMap, BTreeSet};

use common::pool::{EPOLL, Pool, SELECT, Sleeps};
use rstest::rstest;
use serverlab::lab::experiment::Lab;
use serverlab::lab::program::Program;
use serverlab::lab::verdict::Verdict;
use serverlab::{experiment, program};

/// Connections of an experiment.
const CONNECTIONS: usize = 40;

const ACCEPT: &[i64] = &[libc::SYS_accept, libc::SYS_accept4];
const LOCKED: &[i64] = &[libc::SYS_accept, libc::SYS_accept4, libc::SYS_futex, libc::SYS_flock];
const CHANNEL: &[i64] = &[libc::SYS_recvmsg];

/// What so many spaced connections did to a pool.
#[derive(Debug)]
struct Woken {
    workers: usize,
    /// Who served each connection, by tid.
    served: Vec<i32>,
    /// How often each worker was woken.
    each: BTreeMap<i32, u64>,
    /// How often the first process was.
    parent: u64,
}

impl Woken {
    fn count(pool: &Pool<'_>, workers: usize) -> anyhow::Result<Woken> {
        // What a worker does for the first time may have to wait for a page of its program, and that
        // is a sleep, too.
        pool.spaced(workers)?;
        let before = pool.sleeps()?;
        let served = pool.spaced(CONNECTIONS)?;
        let after = pool.sleeps()?;
        let grown = |tid: &i32| after[tid] - before.get(tid).copied().unwrap_or(0);
        let mut each: Sleeps = after
            .keys()
            .filter(|tid| pool.is_worker(**tid))
            .map(|tid| (*tid, grown(tid)))
            .collect();
        for worker in &served {
            // Its sleep in recv; less than it was seen to sleep, there is none.
            *each.get_mut(worker).expect("a worker that was seen") -= 1;
        }
        let parent = grown(&pool.server.pid());
        Ok(Woken { workers, served, each, parent })
    }

    fn total(&self) -> u64 {
        self.each.values().sum()
    }

    /// Wake-ups of workers a connection.
    fn rate(&self) -> f64 {
        self.total() as f64 / CONNECTIONS as f64
    }

    /// "10 workers, 40 connections, 1.00 wake-ups a connection".
    fn said(&self) -> String {
        let Woken { workers, .. } = self;
        format!(
            "{workers} workers, {CONNECTIONS} connections, {:.2} wake-ups a connection",
            self.rate()
        )
    }

    /// Exactly so many wake-ups a connection.
    fn exactly(&self, wanted: usize) -> Verdict {
        let wanted = (wanted * CONNECTIONS) as u64;
        verdict(self.total() == wanted, || format!("{wanted} expected in all: {self:?}"))
    }

    /// Nobody was woken but those who served, each once for each connection it served.
    fn only_those_who_served(&self) -> Verdict {
        let for_nothing = |(tid, woken): &(&i32, &u64)| {
            let served = self.served.iter().filter(|server| server == tid).count();
            **woken != served as u64
        };
        let wrong: Vec<_> = self.each.iter().filter(for_nothing).collect();
        verdict(wrong.is_empty(), || format!("woken otherwise: {wrong:?} of {self:?}"))
    }

    /// All were woken by every connection; a few wake-ups more may be.
    fn all_each_time(&self) -> Verdict {
        let fewest = self.each.values().min().copied().unwrap_or(0);
        let most = (11 * self.workers * CONNECTIONS / 10) as u64;
        let all = fewest >= CONNECTIONS as u64 && self.total() <= most;
        verdict(all, || format!("fewest: {fewest}, all: {}: {self:?}", self.total()))
    }

    /// Whoever waited longest was served.
    fn in_turn(&self) -> Verdict {
        let first: BTreeSet<_> = self.served.iter().take(self.workers).collect();
        let turns = self.served.chunks(self.workers).all(|turn| self.served.starts_with(turn));
        verdict(first.len() == self.workers && turns, || format!("served by {:?}", self.served))
    }

    /// One had them all.
    fn by_one(&self) -> Verdict {
        let servers: BTreeSet<_> = self.served.iter().collect();
        verdict(servers.len() == 1, || format!("served by {:?}", self.served))
    }
}

fn verdict(holds: bool, otherwise: impl FnOnce() -> String) -> Verdict {
    if holds { Verdict::Pass } else { Verdict::Fail(otherwise()) }
}

/// Starts a pool without a line for each connection: a full pipe would be one more sleep.
fn pool<'a>(
    lab: &'a Lab,
    program: &Program,
    workers: usize,
    flags: &[&str],
    waits: &'a [i64],
) -> anyhow::Result<Pool<'a>> {
    let flags: Vec<&str> = ["-q"].iter().chain(flags).copied().collect();
    Pool::start(lab, program, workers, &flags, waits)
}

#[rstest]
#[case::few(5)]
#[case::ten(10)]
#[case::many(40)]
fn blocking_accept_wakes_one(#[case] workers: usize) {
    experiment!(workers, "Do all children wake up when a connection comes?", |lab| {
        let pool = pool(lab, &program!("prefork-accept-server"), workers, &[], ACCEPT)?;
        let woken = Woken::count(&pool, workers)?;
        lab.claim(
            format!(
                "accept: {}, whatever the number of workers (that all children wake up, as is \
                 often said, has not been true of Linux since 2.4)",
                woken.said()
            ),
            woken.exactly(1),
        );
        lab.claim("nobody is woken but who serves", woken.only_those_who_served());
        lab.claim("whoever has waited longest is next: they take turns", woken.in_turn());
        lab.claim_eq("the parent sleeps through it all", woken.parent, 0);
        Ok(())
    });
}

#[rstest]
fn threads_in_accept_wake_one() {
    experiment!("", "Do all threads wake up when a connection comes?", |lab| {
        let pool = pool(lab, &program!("prethread-accept-server"), 10, &[], ACCEPT)?;
        let woken = Woken::count(&pool, 10)?;
        lab.claim(format!("threads in accept: {}", woken.said()), woken.exactly(1));
        lab.claim("nobody is woken but who serves", woken.only_those_who_served());
        lab.claim("whoever has waited longest is next: they take turns", woken.in_turn());
        Ok(())
    });
}

#[rstest]
#[case::select(program!("prefork-select-server"), SELECT)]
#[case::epoll(program!("prefork-epoll-server"), EPOLL)]
fn readiness_wakes_all(
    #[case] server: Program,
    #[case] waits: &[i64],
    #[values(5, 10)] workers: usize,
) {
    let case = format!("{server}-{workers}");
    experiment!(case, "Whom does a connection wake that all have asked to be told of?", |lab| {
        let pool = pool(lab, &server, workers, &[], waits)?;
        let woken = Woken::count(&pool, workers)?;
        let sentence = format!("{server}: {}: every worker, every time", woken.said());
        lab.claim(sentence, woken.all_each_time());
        lab.claim_eq("between connections all wait for readiness", pool.astray()?, []);
        lab.claim_eq(
            "the listener is non-blocking: whoever is too late is not stuck in accept",
            pool.blocking_listeners()?,
            Vec::<i32>::new(),
        );
        Ok(())
    });
}

#[rstest]
fn epollexclusive_wakes_one_and_always_the_same() {
    experiment!("", "Whom does a connection wake with EPOLLEXCLUSIVE?", |lab| {
        let pool = pool(lab, &program!("prefork-epoll-exclusive-server"), 10, &[], EPOLL)?;
        let woken = Woken::count(&pool, 10)?;
        lab.claim(format!("EPOLLEXCLUSIVE: {}", woken.said()), woken.exactly(1));
        lab.claim("nobody is woken but who serves", woken.only_those_who_served());
        lab.claim("one worker has them all, the others none", woken.by_one());
        let favourite = woken.served[0];
        for closing in [[0, 1, 2], [2, 1, 0]] {
            let order = next_after_three(&pool, closing)?;
            let [a, b, c, d] = order;
            let three = a == favourite && BTreeSet::from([a, b, c]).len() == 3;
            lab.claim(
                "while it serves, the next has the next client",
                verdict(three, || format!("{order:?}, the favourite is {favourite}")),
            );
            lab.claim(
                format!(
                    "idle again, it is the first again, though {}: an order of registration, not \
                     of who has waited shortest (LIFO)",
                    if closing[0] == 0 { "it has waited longest" } else { "it came back last" }
                ),
                verdict(d == favourite, || format!("{order:?}, the favourite is {favourite}")),
            );
        }
        Ok(())
    });
}

#[rstest]
fn blocking_accept_is_first_in_first_out() {
    experiment!("", "Who is next after three workers were busy?", |lab| {
        for closing in [[0, 1, 2], [2, 1, 0]] {
            let pool = pool(lab, &program!("prefork-accept-server"), 4, &[], ACCEPT)?;
            let order = next_after_three(&pool, closing)?;
            lab.claim(
                format!("three busy and idle again (in the order {closing:?}): the fourth is next"),
                verdict(BTreeSet::from(order).len() == 4, || format!("{order:?}")),
            );
        }
        Ok(())
    });
}

/// Three clients come and stay, leave in this order, and a fourth comes: who served each.
fn next_after_three(pool: &Pool<'_>, closing: [usize; 3]) -> anyhow::Result<[i32; 4]> {
    let (mut callers, mut held) = (Vec::new(), Vec::new());
    for _ in 0..3 {
        let (caller, worker) = pool.comes(&held)?;
        callers.push(Some(caller));
        held.push(worker);
    }
    let order = held.clone();
    for index in closing {
        held.retain(|worker| *worker != order[index]);
        let caller = callers[index].take().expect("each leaves once");
        pool.leaves(caller, &held)?;
    }
    let (caller, fourth) = pool.comes(&[])?;
    pool.leaves(caller, &[])?;
    Ok([order[0], order[1], order[2], fourth])
}

#[rstest]
fn a_listener_each_wakes_one() {
    experiment!("", "Whom does a connection wake when each worker has its own listener?", |lab| {
        let pool = pool(lab, &program!("prefork-reuseport-server"), 10, &[], ACCEPT)?;
        let woken = Woken::count(&pool, 10)?;
        lab.claim(format!("SO_REUSEPORT: {}", woken.said()), woken.exactly(1));
        lab.claim("nobody is woken but who serves", woken.only_those_who_served());
        Ok(())
    });
}

#[rstest]
#[case::processes(program!("prefork-mutex-server"))]
#[case::threads(program!("prethread-mutex-server"))]
fn a_mutex_wakes_two(#[case] server: Program) {
    experiment!(server.clone(), "What does a mutex around accept cost?", |lab| {
        let pool = pool(lab, &server, 10, &[], LOCKED)?;
        let woken = Woken::count(&pool, 10)?;
        lab.claim(
            format!("{server}: {}: one for the client, one for the lock", woken.said()),
            woken.exactly(2),
        );
        Ok(())
    });
}

#[rstest]
fn a_file_lock_costs_a_mutex_and_more() {
    experiment!("", "What does a file lock around accept cost?", |lab| {
        let locked = pool(lab, &program!("prefork-flock-server"), 10, &[], LOCKED)?;
        let woken = Woken::count(&locked, 10)?;
        let (fewest, most) = (2 * CONNECTIONS as u64, 11 * CONNECTIONS as u64);
        lab.claim(
            format!(
                "flock: {}: two, as with a mutex, and now and then all: unlocking wakes whoever \
                 waits for this very lock and not for another who waits; one gets it, the others \
                 sleep again",
                woken.said()
            ),
            verdict((fewest..=most).contains(&woken.total()), || format!("{woken:?}")),
        );
        let locked = quick_sleeps(&locked)?;
        let free = pool(lab, &program!("prefork-accept-server"), 10, &[], ACCEPT)?;
        let free = quick_sleeps(&free)?;
        lab.claim(
            format!(
                "no connection costs less than two; with quick clients {locked:.2} sleeps each, \
                 {free:.2} without a lock, recv's (two at most) included: who comes back from its \
                 client may take the lock before the one that was woken for it, which sleeps again"
            ),
            verdict(locked >= 2.0, || format!("{locked:.2}")),
        );
        Ok(())
    });
}

/// How often all sleep for a client that asks and leaves at once.
fn quick_sleeps(pool: &Pool<'_>) -> anyhow::Result<f64> {
    let before: u64 = pool.sleeps()?.values().sum();
    pool.quick(CONNECTIONS)?;
    let after: u64 = pool.sleeps()?.values().sum();
    Ok((after - before) as f64 / CONNECTIONS as f64)
}

#[rstest]
fn passing_wakes_the_child_that_is_meant() {
    experiment!("", "Whom does a connection wake that the parent passes on?", |lab| {
        let pool = pool(lab, &program!("prefork-fdpass-server"), 10, &[], CHANNEL)?;
        let woken = Woken::count(&pool, 10)?;
        lab.claim(format!("descriptor passing: {}", woken.said()), woken.exactly(1));
        lab.claim("no child is woken but who serves", woken.only_those_who_served());
        lab.claim_eq(
            "but the parent is woken twice a connection: when it comes, and when the child is free",
            woken.parent,
            2 * CONNECTIONS as u64,
        );
        Ok(())
    });
}

/// A check that no defect can make fail is no check.
#[rstest]
fn the_flag_left_out_is_caught() {
    experiment!("", "Does the count notice that EPOLLEXCLUSIVE is missing?", |lab| {
        let server = program!("prefork-epoll-exclusive-server");
        let pool = pool(lab, &server, 10, &["--bug", "no-exclusive"], EPOLL)?;
        let woken = Woken::count(&pool, 10)?;
        let caught = matches!(woken.exactly(1), Verdict::Fail(_));
        lab.claim(
            format!("--bug no-exclusive is not 1 wake-up a connection: {}", woken.said()),
            caught,
        );
        Ok(())
    });
}

#[rstest]
fn a_listener_left_blocking_is_caught() {
    experiment!("", "Does the look at the listener notice that it was left blocking?", |lab| {
        let server = program!("prefork-select-server");
        let pool = pool(lab, &server, 10, &["--bug", "blocking-accept"], SELECT)?;
        let blocking = pool.blocking_listeners()?;
        lab.claim(
            format!("--bug blocking-accept: {} workers would wait in accept", blocking.len()),
            blocking.len() >= 10,
        );
        Ok(())
    });
}
