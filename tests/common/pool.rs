//! A pool of workers, looked at while connections come one at a time: who is asleep in what, who
//! serves, who was woken.
//!
//! A client of these suites connects, says nothing, and leaves when it has been seen to be served.
//! Its worker sleeps twice for it: in recv(2), until the client leaves, and then again wherever it
//! waits for the next one. Whatever else sleeps was woken for it, or in vain.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use serverlab::args;
use serverlab::lab::experiment::Lab;
use serverlab::lab::host::Family;
use serverlab::lab::process::Process;
use serverlab::lab::procfs::{Seen, Task};
use serverlab::lab::program::Program;
use serverlab::lab::sockets::{SocketRow, TcpState};
use serverlab::lab::wait::until;

use super::callers::{Caller, Callers};

/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// What a worker that serves one of our clients sleeps in.
const SERVING: [i64; 1] = [libc::SYS_recvfrom];

/// The system calls that select(2) and epoll_wait(2) may be. A newer architecture has no old ones.
#[cfg(target_arch = "x86_64")]
pub(crate) const SELECT: &[i64] = &[libc::SYS_select, libc::SYS_pselect6];
#[cfg(not(target_arch = "x86_64"))]
pub(crate) const SELECT: &[i64] = &[libc::SYS_pselect6];
#[cfg(target_arch = "x86_64")]
pub(crate) const EPOLL: &[i64] = &[libc::SYS_epoll_wait, libc::SYS_epoll_pwait];
#[cfg(not(target_arch = "x86_64"))]
pub(crate) const EPOLL: &[i64] = &[libc::SYS_epoll_pwait];

/// A server with a pool, and how it stands.
#[derive(Debug)]
pub(crate) struct Pool<'a> {
    lab: &'a Lab,
    pub(crate) server: Process,
    pub(crate) port: u16,
    callers: Callers<'a>,
    /// The system calls in which its workers wait for clients.
    waits: &'a [i64],
}

/// How often each thread has slept, by tid.
pub(crate) type Sleeps = BTreeMap<i32, u64>;

impl<'a> Pool<'a> {
    /// Starts a server and waits until all its workers wait for clients in one of these calls.
    pub(crate) fn start(
        lab: &'a Lab,
        program: &Program,
        workers: usize,
        flags: &[&str],
        waits: &'a [i64],
    ) -> anyhow::Result<Pool<'a>> {
        let (host, port) = (lab.server().address(Family::V4), lab.port()?);
        let command = lab.server().command(program);
        let command = command.args(args!["-i", host, "-p", port, "-n", workers]).args(flags);
        let server = command.spawn()?;
        server.event("listening")?;
        let callers = Callers::new(lab.client(), (host, port), PATIENCE);
        let pool = Pool { lab, server, port, callers, waits };
        until("all workers waiting for clients", PATIENCE, || {
            let tasks = pool.tasks()?;
            let waiting = tasks.iter().filter(|task| pool.waits(task)).count();
            Ok((waiting >= workers && all_asleep(&tasks)).then_some(()))
        })?;
        Ok(pool)
    }

    fn processes(&self) -> anyhow::Result<Vec<Seen>> {
        self.lab.server().processes_of(&self.server)
    }

    /// Every thread of every process.
    fn tasks(&self) -> anyhow::Result<Vec<Task>> {
        Ok(self.processes()?.into_iter().flat_map(|seen| seen.tasks).collect())
    }

    fn waits(&self, task: &Task) -> bool {
        task.call.is_some_and(|call| self.waits.contains(&call))
    }

    /// The threads that are workers: all but the first of the first process.
    pub(crate) fn is_worker(&self, tid: i32) -> bool {
        tid != self.server.pid()
    }

    /// How often each thread has slept so far. All are asleep.
    pub(crate) fn sleeps(&self) -> anyhow::Result<Sleeps> {
        Ok(self.tasks()?.iter().map(|task| (task.tid, task.sleeps)).collect())
    }

    /// A client connects. Returns it, and the tid of the worker that serves it, once every thread is
    /// asleep again: `held` clients are served besides it.
    pub(crate) fn comes(&self, held: &[i32]) -> anyhow::Result<(Caller, i32)> {
        let caller = self.callers.connect()?;
        let serving = until("a worker that serves, all others asleep", PATIENCE, || {
            let tasks = self.tasks()?;
            let serving: Vec<i32> = tasks.iter().filter(serves).map(|task| task.tid).collect();
            let ready = serving.len() == held.len() + 1 && all_asleep(&tasks);
            Ok(ready.then_some(serving))
        })?;
        let new = serving.into_iter().find(|tid| !held.contains(tid));
        Ok((caller, new.context("nobody new serves")?))
    }

    /// A client leaves. Returns once every thread is asleep again, `held` of them serving.
    pub(crate) fn leaves(&self, caller: Caller, held: &[i32]) -> anyhow::Result<()> {
        drop(caller);
        until("all workers waiting for clients again", PATIENCE, || {
            let tasks = self.tasks()?;
            let serving = tasks.iter().filter(serves).count();
            Ok((serving == held.len() && all_asleep(&tasks)).then_some(()))
        })
    }

    /// Clients come one at a time, and all sleep in between. Returns who served each.
    pub(crate) fn spaced(&self, connections: usize) -> anyhow::Result<Vec<i32>> {
        let mut served = Vec::new();
        for _ in 0..connections {
            let (caller, worker) = self.comes(&[])?;
            self.leaves(caller, &[])?;
            served.push(worker);
        }
        Ok(served)
    }

    /// Clients come one at a time that ask, are answered and leave, all in one go.
    pub(crate) fn quick(&self, connections: usize) -> anyhow::Result<()> {
        for _ in 0..connections {
            self.callers.ask(1)?;
            until("all workers waiting for clients again", PATIENCE, || {
                let tasks = self.tasks()?;
                Ok((!tasks.iter().any(|task| serves(&task)) && all_asleep(&tasks)).then_some(()))
            })?;
        }
        Ok(())
    }

    /// The tids of the workers that do not wait for clients in one of the calls they should.
    pub(crate) fn astray(&self) -> anyhow::Result<Vec<(i32, Option<i64>)>> {
        let tasks = self.tasks()?;
        ensure!(all_asleep(&tasks), "not all are asleep");
        let workers = tasks.iter().filter(|task| self.is_worker(task.tid));
        let astray = workers.filter(|task| !self.waits(task));
        Ok(astray.map(|task| (task.tid, task.call)).collect())
    }

    /// The processes whose copy of the listener would block: its O_NONBLOCK is not set
    /// (/proc/PID/fdinfo/N tells a descriptor's flags, in octal).
    pub(crate) fn blocking_listeners(&self) -> anyhow::Result<Vec<i32>> {
        let host = self.lab.server();
        let rows = host.tcp_sockets()?;
        let ours =
            |row: &&SocketRow| row.local.port() == self.port && row.state == TcpState::Listen;
        let listener = rows.iter().find(ours).context("there is no listener")?.inode;
        let mut blocking = Vec::new();
        for process in self.processes()? {
            for number in process.socket(listener) {
                let info = host.read(&format!("/proc/{}/fdinfo/{number}", process.pid))?;
                let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
                let flags = i32::from_str_radix(flags.context("no flags in fdinfo")?.trim(), 8)?;
                if flags & libc::O_NONBLOCK == 0 {
                    blocking.push(process.pid);
                }
            }
        }
        Ok(blocking)
    }
}

fn serves(task: &&Task) -> bool {
    task.call.is_some_and(|call| SERVING.contains(&call))
}

fn all_asleep(tasks: &[Task]) -> bool {
    tasks.iter().all(|task| task.state == 'S' && task.call.is_some())
}
