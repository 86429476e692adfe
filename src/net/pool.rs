//! A pool of workers: processes forked, or threads started, before any client comes.
//!
//! The parent of a pool of processes serves nobody. It waits for signals: SIGCHLD, and the worker
//! that died is replaced; SIGTERM or SIGINT, and it stops the workers, waits for them and prints
//! how many connections each has served. The signals are blocked and waited for by
//! sigtimedwait(2), so that none can come at a bad moment.
#![allow(unsafe_code, reason = "forks, waits for signals, leaves a worker by _exit(2)")]

use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsRawFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nix::poll::{PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::time::TimeSpec;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork};

use crate::event;
use crate::net::args::ServerArgs;
use crate::net::listen::name;
use crate::net::request::{self, Ended};
use crate::net::shared::Counters;
use crate::net::{self, children, drain, threads};

/// One process or thread of a pool, as it sees itself.
#[derive(Clone, Copy, Debug)]
pub struct Worker<'a> {
    /// Its place in the pool, from 0. A replacement takes the place of the one that died.
    pub index: usize,
    /// The command line.
    pub args: &'a ServerArgs,
    served: &'a AtomicU64,
}

impl Worker<'_> {
    /// Counts a connection, serves it until it ends and closes it: recv(2), send(2) ..., close(2).
    pub fn serve(&self, connection: TcpStream, peer: SocketAddr) -> Ended {
        self.count();
        event!("accepted", peer = peer, fd = connection.as_raw_fd(), worker = self.index);
        drain::serving(&connection);
        let ended = request::serve(&connection, self.args);
        drain::served(&connection);
        drop(connection);
        event!("closed", peer = peer, reason = ended);
        ended
    }

    /// Counts a connection. One addition in memory that all workers share: none is lost.
    pub fn count(&self) {
        self.served.fetch_add(1, Ordering::Relaxed);
    }
}

/// A pool of processes, as their parent sees it. Its signals are blocked from here on: SIGCHLD,
/// SIGTERM and SIGINT come when they are waited for.
#[derive(Debug)]
pub struct Pool<'a> {
    args: &'a ServerArgs,
    signals: SigSet,
    counters: Counters,
    /// Who has which place, and since when.
    places: Vec<Option<(Pid, Instant)>>,
}

/// A worker that lived no longer than this is replaced only after so long, so that a pool whose
/// workers die as soon as they are made does not fork as fast as it can.
const SHORT_LIFE: Duration = Duration::from_millis(100);

impl<'a> Pool<'a> {
    /// A pool of `-n` places, all empty.
    ///
    /// # Errors
    /// mmap(2)'s.
    pub fn new(args: &'a ServerArgs) -> nix::Result<Pool<'a>> {
        let signals = SigSet::from_iter([Signal::SIGCHLD, Signal::SIGTERM, Signal::SIGINT]);
        signals.thread_block()?;
        let places = vec![None; args.workers.into()];
        Ok(Pool { args, signals, counters: Counters::new(places.len())?, places })
    }

    /// The signals that the parent waits for.
    pub fn signals(&self) -> &SigSet {
        &self.signals
    }

    /// A place with no worker in it, if there is one.
    pub fn empty_place(&self) -> Option<usize> {
        self.places.iter().position(Option::is_none)
    }

    /// Forks a worker for a place. Its life is `work`; it ends when that returns, which before a
    /// drain is an accident.
    ///
    /// # Errors
    /// fork(2)'s.
    pub fn start(
        &mut self,
        index: usize,
        work: impl FnOnce(&Worker<'_>) -> net::Result,
    ) -> nix::Result<()> {
        let parent = nix::unistd::getpid();
        // SAFETY: the parent of a pool has one thread, so the child may do whatever it might.
        match unsafe { fork() }? {
            ForkResult::Parent { child } => {
                event!("started", worker = index, child = child);
                self.places[index] = Some((child, Instant::now()));
                Ok(())
            }
            ForkResult::Child => {
                let worker = Worker { index, args: self.args, served: &self.counters[index] };
                let ended =
                    self.enter(parent).map_err(net::Fatal::from).and_then(|()| work(&worker));
                if let Err(error) = &ended {
                    event!("worker-failed", worker = index, error = format_args!("{error:?}"));
                }
                // SAFETY: _exit takes a number and does not return.
                unsafe { libc::_exit(ended.is_err().into()) }
            }
        }
    }

    /// What a worker does first. A signal that came since the fork is delivered here.
    fn enter(&self, parent: Pid) -> nix::Result<()> {
        drain::on_sigterm_alone()?;
        nix::sys::prctl::set_pdeathsig(Signal::SIGTERM)?; // no orphan goes on accepting
        if nix::unistd::getppid() != parent {
            drain::begin(); // it died before it could be a signal
        }
        self.signals.thread_unblock()
    }

    /// Waits for a signal; no longer than a moment if a place is empty.
    fn wait(&self) -> Option<Signal> {
        let limit = self.empty_place().map(|_| TimeSpec::from_duration(SHORT_LIFE));
        let limit = limit.as_ref().map_or(std::ptr::null(), |limit| limit.as_ref());
        // SAFETY: the set and the limit, if there is one, outlive the call; it may skip the report.
        let signal =
            unsafe { libc::sigtimedwait(self.signals.as_ref(), std::ptr::null_mut(), limit) };
        Signal::try_from(signal).ok() // -1: EAGAIN, the time is over
    }

    /// Reaps whoever has died, and empties their places. SIGCHLDs do not queue: one may stand for
    /// many.
    pub fn reap(&mut self) {
        while let Ok(status) = waitpid(None::<Pid>, Some(WaitPidFlag::WNOHANG)) {
            if status == WaitStatus::StillAlive {
                return;
            }
            children::reaped(status);
            let died =
                |place: &&mut Option<(Pid, Instant)>| place.map(|(pid, _)| pid) == status.pid();
            if let Some(place) = self.places.iter_mut().find(died)
                && let Some((_, since)) = place.take()
                && since.elapsed() < SHORT_LIFE
            {
                let _ = poll(&mut [], PollTimeout::from(100u8));
            }
        }
    }

    /// Ends the workers, each after the client that it is serving, and prints what they have
    /// served.
    pub fn finish(self) {
        children::terminate();
        print_served(&self.counters);
        event!("stopped");
    }
}

/// Forks `-n` workers and keeps that many until SIGTERM or SIGINT, which shut down the listener if
/// the caller has called [`drain::on_sigterm`] with one that they share.
///
/// # Errors
/// Those of the first forks.
pub fn of_processes(args: &ServerArgs, work: impl Fn(&Worker<'_>) -> net::Result) -> net::Result {
    let mut pool = Pool::new(args)?;
    while let Some(index) = pool.empty_place() {
        pool.start(index, &work)?;
    }
    loop {
        match pool.wait() {
            Some(Signal::SIGTERM | Signal::SIGINT) => break,
            Some(_) => pool.reap(),
            None => {}
        }
        while let Some(index) = pool.empty_place() {
            if let Err(errno) = pool.start(index, &work) {
                event!("fork-failed", errno = name(errno), worker = index);
                break;
            }
        }
    }
    drain::begin();
    pool.finish();
    Ok(())
}

/// Starts `-n` threads, each of which does `work` until that returns, and waits for them. A thread
/// whose work panics does it again.
///
/// # Errors
/// pthread_create(3)'s.
pub fn of_threads(
    args: &'static ServerArgs,
    work: impl Fn(&Worker<'_>) -> net::Result + Send + Sync + Copy + 'static,
) -> net::Result {
    of_threads_around(args, work)?.finish();
    Ok(())
}

/// The same for a caller who has work as well, and calls [`ThreadPool::finish`] after it.
///
/// # Errors
/// pthread_create(3)'s.
pub fn of_threads_around(
    args: &'static ServerArgs,
    work: impl Fn(&Worker<'_>) -> net::Result + Send + Sync + Copy + 'static,
) -> net::Result<ThreadPool> {
    let counters: &Counters = Box::leak(Box::new(Counters::new(args.workers.into())?));
    for (index, served) in counters.iter().enumerate() {
        let worker = Worker { index, args, served };
        threads::start(move || run_thread(&worker, work))?;
        event!("started", worker = index);
    }
    Ok(ThreadPool { counters })
}

/// A pool of threads, as the main thread sees it.
#[derive(Debug)]
pub struct ThreadPool {
    counters: &'static Counters,
}

impl ThreadPool {
    /// Waits until the threads have ended, and prints what they have served.
    pub fn finish(self) {
        threads::wait_for_all();
        print_served(self.counters);
        event!("stopped");
    }
}

fn run_thread(worker: &Worker<'_>, work: impl Fn(&Worker<'_>) -> net::Result) {
    loop {
        match catch_unwind(AssertUnwindSafe(|| work(worker))) {
            Ok(Ok(())) => return,
            Ok(Err(error)) => {
                event!("worker-failed", worker = worker.index, error = format_args!("{error:?}"));
                return;
            }
            Err(_) => event!("worker-failed", worker = worker.index, error = "panic"),
        }
    }
}

/// Prints what each worker has served, and the sum.
fn print_served(counters: &Counters) {
    let counts = counters.iter().map(|counter| counter.load(Ordering::Relaxed));
    for (worker, connections) in counts.clone().enumerate() {
        event!("served", worker = worker, connections = connections);
    }
    event!("served", sum = counts.sum::<u64>());
}
