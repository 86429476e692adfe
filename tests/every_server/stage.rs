//! A server on its host, the clients around it, and what they must leave behind: nothing.

use std::cell::RefCell;
use std::fmt::Write as _;
use std::os::fd::OwnedFd;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use nix::sys::signal::Signal;
use serverlab::lab::event::Event;
use serverlab::lab::experiment::Lab;
use serverlab::lab::host::Family;
use serverlab::lab::process::{Command, Process};
use serverlab::lab::procfs::Seen;
use serverlab::lab::program::Program;
use serverlab::lab::sockets::{SocketRow, Tables, TcpState};
use serverlab::lab::wait::until;
use serverlab::{args, program};

use crate::common::callers::{Caller, Callers};
use crate::common::starter::{self, BECOME};

/// Workers of the designs that keep a pool of them.
pub(crate) const WORKERS: usize = 4;

/// What a quick client asks for, in bytes.
pub(crate) const QUICK: usize = 1024;

/// A design, as far as its clients can tell it from others.
#[derive(Clone, Debug)]
pub(crate) struct Design {
    /// Its program.
    pub(crate) program: Program,
    /// What a client that keeps its server waiting keeps from the others.
    pub(crate) holds: Holds,
    /// What it shares with other processes, beyond the listener with its own workers.
    pub(crate) shares: Shares,
}

/// What a server does not have to itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shares {
    /// Nothing.
    Nothing,
    /// Its workers accept under a lock that they share.
    Lock,
    /// Its listener is a starter's, which keeps it.
    Listener,
}

/// What one client can hold up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Holds {
    /// Everything: there is one process, and it serves one client at a time.
    Service,
    /// One worker of the pool; the others serve.
    Worker,
    /// One worker, and the clients that the kernel has put into that worker's own queue.
    Queue,
    /// Nobody.
    Nobody,
}

/// A server that runs, and its clients.
#[derive(Debug)]
pub(crate) struct Stage<'a> {
    pub(crate) lab: &'a Lab,
    pub(crate) design: &'a Design,
    pub(crate) family: Family,
    pub(crate) port: u16,
    pub(crate) server: Process,
    /// The starter's, if it gives the server its listener.
    listener: Option<OwnedFd>,
    pub(crate) callers: Callers<'a>,
    pub(crate) patience: Duration,
    tables: RefCell<Tables>,
    idle: Traces,
}

/// What a server has of the system's while no client is there, and must have no more of afterwards.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Traces {
    pids: Vec<i32>,
    zombies: usize,
    threads: usize,
    descriptors: usize,
    connections: Vec<(u16, TcpState)>,
}

impl<'a> Stage<'a> {
    /// Starts a server and lets it serve one client, so that what it makes only once is made.
    pub(crate) fn set(
        lab: &'a Lab,
        design: &'a Design,
        family: Family,
        flags: &[&str],
        open_files: Option<u64>,
        patience: Duration,
    ) -> anyhow::Result<Stage<'a>> {
        let (host, port) = (lab.server().address(family), lab.port()?);
        let listener = match design.shares {
            Shares::Listener => Some(starter::listener(lab, family, port)?),
            Shares::Nothing | Shares::Lock => None,
        };
        let mut command = command(lab, design, listener.as_ref())?;
        if let Some(limit) = open_files {
            command = command.open_files(limit);
        }
        let server =
            command.args(args!["-i", host, "-p", port, "-n", WORKERS]).args(flags).spawn()?;
        server.event("listening")?;
        let mut stage = Stage {
            lab,
            design,
            family,
            port,
            server,
            listener,
            callers: Callers::new(lab.client(), (host, port), patience),
            patience,
            tables: RefCell::new(Tables::open(lab.server())?),
            idle: Traces::default(),
        };
        stage.all_asleep()?;
        stage.callers.ask(QUICK).context("the first client")?;
        until("the first connection's end", patience, || {
            Ok(stage.connections()?.is_empty().then_some(()))
        })?;
        stage.all_asleep()?;
        stage.idle = stage.traces()?;
        Ok(stage)
    }

    /// The same design once more, at the same port.
    pub(crate) fn next_server(&self) -> anyhow::Result<Process> {
        let at = args!["-i", self.lab.server().address(self.family), "-p", self.port];
        let server = command(self.lab, self.design, self.listener.as_ref())?.args(at).spawn()?;
        server.event("listening").context("the port cannot be taken again")?;
        Ok(server)
    }

    /// Waits until the server's host listens no more, where that is the server's to decide.
    pub(crate) fn no_listener(&self) -> anyhow::Result<()> {
        if self.listener.is_some() {
            return Ok(());
        }
        until("the end of the listener", self.patience, || {
            Ok(self.listeners()?.is_empty().then_some(()))
        })
    }

    /// The server's processes.
    pub(crate) fn processes(&self) -> anyhow::Result<Vec<Seen>> {
        self.lab.server().processes_of(&self.server)
    }

    /// Waits until every thread of every process sleeps in a system call. A parent sleeps only when
    /// it has forked all its workers.
    pub(crate) fn all_asleep(&self) -> anyhow::Result<()> {
        until("all processes asleep", self.patience, || {
            let processes = self.processes()?;
            let there = !processes.is_empty() && processes.iter().all(Seen::is_asleep);
            Ok(there.then_some(()))
        })
    }

    /// The sockets of the server's host at this port.
    pub(crate) fn rows(&self) -> anyhow::Result<Vec<SocketRow>> {
        let mut rows = self.tables.borrow_mut().rows()?;
        rows.retain(|row| row.local.port() == self.port);
        Ok(rows)
    }

    fn listeners(&self) -> anyhow::Result<Vec<SocketRow>> {
        let mut rows = self.rows()?;
        rows.retain(|row| row.state == TcpState::Listen);
        Ok(rows)
    }

    /// The server's side of its connections, those that TCP alone remembers (TIME_WAIT) left out.
    fn connections(&self) -> anyhow::Result<Vec<SocketRow>> {
        let mut rows = self.rows()?;
        rows.retain(|row| !matches!(row.state, TcpState::Listen | TcpState::TimeWait));
        Ok(rows)
    }

    /// The server's side of this client's connection, if there is one.
    pub(crate) fn row_of(&self, caller: &Caller) -> anyhow::Result<Option<SocketRow>> {
        Ok(self.rows()?.into_iter().find(|row| caller.is_peer_of(row)))
    }

    /// Waits until the server's side of this connection is as wanted.
    pub(crate) fn row_until(
        &self,
        what: &str,
        caller: &Caller,
        wanted: impl Fn(&SocketRow) -> bool,
    ) -> anyhow::Result<SocketRow> {
        until(what, self.patience, || Ok(self.row_of(caller)?.filter(&wanted)))
    }

    /// Waits until the server has accepted this connection and read all that came over it.
    pub(crate) fn has_been_read(&self, caller: &Caller) -> anyhow::Result<SocketRow> {
        let what = "a server that has read all its client said";
        self.row_until(what, caller, |row| row.inode != 0 && row.receive_queue == 0)
    }

    /// The pid of the process that has this connection open; the last of them if there are several.
    pub(crate) fn holder_of(&self, caller: &Caller) -> anyhow::Result<i32> {
        let row = self.row_until("an accepted connection", caller, |row| row.inode != 0)?;
        let mut holders =
            self.processes()?.into_iter().filter(|seen| !seen.socket(row.inode).is_empty());
        holders.next_back().map(|seen| seen.pid).context("no process has the connection open")
    }

    /// A client comes beside `held`, whom the server is waiting for, and is served if the design can;
    /// else it is proved to wait in the kernel, and returned: it is to be served once `held` is gone.
    pub(crate) fn beside(&self, held: &Caller) -> anyhow::Result<Vec<Caller>> {
        match self.design.holds {
            Holds::Nobody | Holds::Worker => {
                self.callers.ask(QUICK).context("another client")?;
                Ok(Vec::new())
            }
            Holds::Service => Ok(vec![self.waiting_in_the_queue()?]),
            Holds::Queue => {
                let busy = self.holder_of(held)?;
                let mut waiting = Vec::new();
                for _ in 0..2 * WORKERS {
                    waiting.extend(self.served_or_queued(busy)?);
                }
                Ok(waiting)
            }
        }
    }

    /// A client that the kernel has put into the queue of this process, or nobody: it was served.
    fn served_or_queued(&self, busy: i32) -> anyhow::Result<Option<Caller>> {
        let before = self.queue_of(busy)?;
        let mut caller = self.asking()?;
        let served =
            until("an answer, or a place in the busy worker's queue", self.patience, || {
                if caller.has_news()? {
                    return Ok(Some(true));
                }
                Ok((self.queue_of(busy)? > before).then_some(false))
            })?;
        if !served {
            return Ok(Some(caller));
        }
        caller.hear(QUICK)?;
        Ok(None)
    }

    /// How many connections wait for this process to accept them.
    fn queue_of(&self, pid: i32) -> anyhow::Result<u32> {
        let process = self.processes()?.into_iter().find(|seen| seen.pid == pid);
        let process = process.context("the process is gone")?;
        let mut listeners = self.listeners()?;
        listeners.retain(|row| !process.socket(row.inode).is_empty());
        Ok(listeners.iter().map(|row| row.receive_queue).sum())
    }

    /// How many connections wait for anybody to accept them.
    pub(crate) fn queue(&self) -> anyhow::Result<u32> {
        Ok(self.listeners()?.iter().map(|row| row.receive_queue).sum())
    }

    /// A client that has been accepted and says nothing.
    pub(crate) fn silent(&self) -> anyhow::Result<Caller> {
        let caller = self.callers.connect()?;
        self.row_until("an accepted connection", &caller, |row| row.inode != 0)?;
        Ok(caller)
    }

    /// A client that has asked for a quick answer.
    pub(crate) fn asking(&self) -> anyhow::Result<Caller> {
        let mut caller = self.callers.connect()?;
        caller.say(&format!("{QUICK}\n"))?;
        Ok(caller)
    }

    /// A client whose handshake the kernel has completed and whose request it keeps, while the
    /// server sleeps in a call for somebody else.
    fn waiting_in_the_queue(&self) -> anyhow::Result<Caller> {
        let caller = self.asking()?;
        let waits = "a client that waits in the listener's queue";
        self.row_until(waits, &caller, |row| row.inode == 0 && row.receive_queue > 0)?;
        self.all_asleep()?;
        ensure!(!caller.has_news()?, "the client was answered");
        let row = self.row_of(&caller)?;
        ensure!(row.is_some_and(|row| row.inode == 0), "the client was accepted");
        Ok(caller)
    }

    /// Those who had to wait get their answers, and leave.
    pub(crate) fn serve(&self, waiting: Vec<Caller>) -> anyhow::Result<()> {
        for mut caller in waiting {
            caller.hear(QUICK).context("a client that had to wait")?;
        }
        Ok(())
    }

    /// After every act: those who had to wait are served, so is another client, the server lives, and
    /// it has no process, thread, zombie, descriptor or connection more than before.
    pub(crate) fn aftermath(&self, waiting: Vec<Caller>) -> anyhow::Result<()> {
        self.serve(waiting)?;
        self.callers.ask(QUICK).context("the next client")?;
        self.leaves_nothing()?;
        ensure!(self.server.ended().is_none(), "the server has ended");
        Ok(())
    }

    /// Waits until the server has no more than while it was idle.
    pub(crate) fn leaves_nothing(&self) -> anyhow::Result<()> {
        let mut last = Traces::default();
        let gone = until("a server that has no more than before", self.patience, || {
            last = self.traces()?;
            Ok((last == self.idle).then_some(()))
        });
        gone.with_context(|| format!("it has {last:?}\n     idle it had {:?}", self.idle))
    }

    /// After the death of workers: as many processes as before, other pids.
    pub(crate) fn accept_replacements(&mut self) -> anyhow::Result<()> {
        let wanted = &self.idle;
        let mut last = Traces::default();
        let restored = until("as many workers as before", self.patience, || {
            last = self.traces()?;
            let like = Traces { pids: wanted.pids.clone(), ..last.clone() };
            Ok((last.pids.len() == wanted.pids.len() && like == *wanted).then(|| last.clone()))
        });
        self.idle = restored.with_context(|| format!("it has {last:?}, idle it had {wanted:?}"))?;
        Ok(())
    }

    fn traces(&self) -> anyhow::Result<Traces> {
        let processes = self.processes()?;
        let connections = self.connections()?;
        Ok(Traces {
            pids: processes.iter().map(|seen| seen.pid).collect(),
            zombies: processes.iter().filter(|seen| seen.is_zombie()).count(),
            threads: processes.iter().map(own_threads).sum(),
            descriptors: processes.iter().map(|seen| seen.descriptors.len()).sum(),
            connections: connections.iter().map(|row| (row.remote.port(), row.state)).collect(),
        })
    }

    /// Stops every process of the server.
    pub(crate) fn stop_all(&self) -> anyhow::Result<Vec<i32>> {
        let pids: Vec<i32> = self.processes()?.iter().map(|seen| seen.pid).collect();
        for pid in &pids {
            self.stop(*pid)?;
        }
        Ok(pids)
    }

    /// Stops this process, and waits until it has stopped.
    pub(crate) fn stop(&self, pid: i32) -> anyhow::Result<()> {
        self.lab.server().signal(pid, Signal::SIGSTOP)?;
        until("a stopped process", self.patience, || {
            let seen = self.processes()?.into_iter().find(|seen| seen.pid == pid);
            let seen = seen.context("the process to be stopped is gone")?;
            Ok(seen.is_stopped().then_some(()))
        })
    }

    /// Lets these processes go on.
    pub(crate) fn resume(&self, pids: &[i32]) -> anyhow::Result<()> {
        for pid in pids {
            self.lab.server().signal(*pid, Signal::SIGCONT)?;
        }
        Ok(())
    }

    /// Starts many clients at once, each in a process of its own.
    pub(crate) fn start_crowd(&self, flags: &[&str]) -> anyhow::Result<Process> {
        let host = self.lab.server().address(self.family);
        let timeout = self.patience.as_secs_f64();
        let command = self.lab.client().command(&program!("client"));
        command.args(args!["-i", host, "-p", self.port, "--timeout", timeout]).args(flags).spawn()
    }

    /// Waits for their end: all must have been answered.
    pub(crate) fn all_answered(crowd: &Process) -> anyhow::Result<()> {
        let ending = crowd.ending()?;
        let said = crowd.stdout();
        ensure!(ending == serverlab::lab::process::Ending::Exit(0), "client: {}", said.trim());
        Ok(())
    }

    /// The server's last words, for a verdict's detail.
    pub(crate) fn last_words(&self) -> String {
        let mut text = String::new();
        let (stdout, stderr) = (self.server.stdout(), self.server.stderr());
        let lines: Vec<&str> = stdout.lines().chain(stderr.lines()).collect();
        for line in &lines[lines.len().saturating_sub(6)..] {
            let _ = write!(text, "\n     {line}");
        }
        if let Some(ending) = self.server.ended() {
            let _ = write!(text, "\n     it ended: {ending}");
        }
        text
    }

    /// The connection's end as the server has told it: the `reason` of `closed`.
    pub(crate) fn closed_because(
        &self,
        caller: std::net::SocketAddr,
        why: &str,
    ) -> anyhow::Result<()> {
        let peer = caller.to_string();
        let mut seen = None;
        let told = until("the event `closed` of this client", self.patience, || {
            let mut events = self.server.events();
            // A filter of inetd's has the connection for its standard output.
            let stderr = self.server.stderr();
            events.extend(stderr.lines().filter_map(|line| Event::parse(line.as_bytes())));
            let mut closed = events.iter().filter(|event| event.verb == "closed");
            seen = closed.find(|event| event.get("peer") == Some(&peer)).cloned();
            Ok(seen.as_ref().and_then(|event| event.get("reason").map(str::to_owned)))
        })?;
        if told != why {
            bail!("the server closed because of {told}, not {why}");
        }
        Ok(())
    }
}

/// A command that runs the design, whose flags are still to come.
fn command<'a>(
    lab: &'a Lab,
    design: &Design,
    listener: Option<&OwnedFd>,
) -> anyhow::Result<Command<'a>> {
    match listener {
        Some(listener) => starter::command(lab, listener, BECOME),
        None => Ok(lab.server().command(&design.program)),
    }
}

/// The threads that a program has started. The kernel gives one who uses io_uring workers of its
/// own, `iou-wrk-PID`, and ends them when it pleases (io_uring(7)).
fn own_threads(seen: &Seen) -> usize {
    seen.tasks.iter().filter(|task| !task.name.starts_with("iou-")).count()
}
