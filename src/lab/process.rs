//! A program on a host: its events, its output, its end.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd, RawFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, bail};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use nix::sys::socket::{Shutdown, shutdown};

use super::event::Event;
use super::host::Host;
use super::journal::Entry;
use super::program::Program;
use super::protocol::{self, Reply, Request, Spawn};
use super::wait::Late;

/// How long a wait lasts before it fails. Far longer than anything here takes: only a defect, or a
/// machine in distress, meets it.
pub const DEADLINE: Duration = Duration::from_secs(30);

/// A program about to be run.
#[derive(Debug)]
pub struct Command<'a> {
    host: &'a Host,
    program: Program,
    args: Vec<String>,
    descriptors: Vec<(RawFd, OwnedFd)>,
    typed: bool,
    stdout: Option<OwnedFd>,
    open_files: Option<u64>,
}

impl<'a> Command<'a> {
    pub(super) fn new(host: &'a Host, program: Program) -> Command<'a> {
        Command {
            host,
            program,
            args: Vec::new(),
            descriptors: Vec::new(),
            typed: false,
            stdout: None,
            open_files: None,
        }
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<A: AsRef<str>>(mut self, args: impl IntoIterator<Item = A>) -> Command<'a> {
        self.args.extend(args.into_iter().map(|arg| arg.as_ref().to_owned()));
        self
    }

    /// Gives the program this descriptor, under this number.
    #[must_use]
    pub fn descriptor(mut self, number: RawFd, descriptor: OwnedFd) -> Command<'a> {
        self.descriptors.push((number, descriptor));
        self
    }

    /// Makes its standard input a pipe for [`Process::type_line`].
    #[must_use]
    pub fn typed(mut self) -> Command<'a> {
        self.typed = true;
        self
    }

    /// Limits the descriptors that it may have open at once (RLIMIT_NOFILE, getrlimit(2)).
    #[must_use]
    pub fn open_files(mut self, limit: u64) -> Command<'a> {
        self.open_files = Some(limit);
        self
    }

    /// Makes this its standard output, which is then not kept and not looked at for events.
    #[must_use]
    pub fn stdout(mut self, stdout: OwnedFd) -> Command<'a> {
        self.stdout = Some(stdout);
        self
    }

    /// Runs it.
    ///
    /// # Errors
    /// The agent is lost, or the program cannot be executed.
    pub fn spawn(self) -> anyhow::Result<Process> {
        let (stderr, stderr_end) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
        let (stdout, stdout_end) = match self.stdout {
            Some(end) => (None, end),
            None => {
                let (stdout, end) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
                (Some(stdout), end)
            }
        };
        let (stdin_end, typing) = if self.typed {
            let (end, typing) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
            (end, Some(File::from(typing)))
        } else {
            (OwnedFd::from(File::open("/dev/null")?), None)
        };
        let executable = match self.program.path() {
            Some(path) => {
                Some(File::open(path).with_context(|| format!("cannot open {}", path.display()))?)
            }
            None => None,
        };
        let mut passed: Vec<BorrowedFd<'_>> = executable.iter().map(File::as_fd).collect();
        passed.extend([stdin_end.as_fd(), stdout_end.as_fd(), stderr_end.as_fd()]);
        passed.extend(self.descriptors.iter().map(|(_, descriptor)| descriptor.as_fd()));
        let mut numbers = vec![0, 1, 2];
        numbers.extend(self.descriptors.iter().map(|(number, _)| *number));
        let mut argv = vec![self.program.name().to_owned()];
        argv.extend(self.args);
        let spawn = Spawn {
            argv: argv.clone(),
            environment: environment(),
            executable: executable.is_some(),
            descriptors: numbers,
            open_files: self.open_files,
        };

        let conversation = self.host.converse()?;
        protocol::send(&conversation, &Request::Spawn(spawn), &passed)?;
        let (pid, keeper) = match protocol::receive(&conversation)? {
            Some((Reply::Spawned { pid, keeper }, _)) => (pid, keeper),
            Some((Reply::Failed { what, errno }, _)) => {
                return Err(io::Error::from_raw_os_error(errno))
                    .with_context(|| format!("cannot {what} on {}", self.host.name()));
            }
            Some((other, _)) => bail!("the agent of {} answered {other:?}", self.host.name()),
            None => bail!("the agent of host {} is lost", self.host.name()),
        };
        for pipe in stdout.iter().chain([&stderr]) {
            fcntl(pipe, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        }
        let recording = Recording::default();
        let conversation = Arc::new(conversation);
        let command = argv.join(" ");
        self.host.journal().add(Entry {
            host: self.host.name().to_owned(),
            command: command.clone(),
            pid,
            recording: recording.clone(),
        });
        let pump = Pump {
            recording: recording.clone(),
            conversation: Arc::clone(&conversation),
            stdout,
            stderr: Some(stderr),
        };
        Ok(Process {
            command,
            host: self.host.name().to_owned(),
            pid,
            keeper,
            recording,
            conversation,
            typing,
            pump: Some(std::thread::Builder::new().name(argv[0].clone()).spawn(|| pump.run())?),
        })
    }
}

/// Programs get no more of the runner's environment than this.
fn environment() -> Vec<(String, String)> {
    let path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    [("PATH", path), ("LC_ALL", "C")].map(|(name, value)| (name.into(), value.into())).into()
}

/// How a program ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// exit(3), with this status.
    Exit(i32),
    /// A signal, this one.
    Signal(Signal),
}

impl std::fmt::Display for Ending {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Ending::Exit(status) => write!(f, "exit status {status}"),
            Ending::Signal(signal) => write!(f, "killed by {signal}"),
        }
    }
}

/// A program that runs, or has run, on a host. Dropping it kills the program and all that it
/// started, and waits until they are gone.
#[derive(Debug)]
pub struct Process {
    command: String,
    host: String,
    pid: i32,
    keeper: i32,
    recording: Recording,
    conversation: Arc<OwnedFd>,
    typing: Option<File>,
    pump: Option<JoinHandle<()>>,
}

/// What a program has said and how it ended, as it grows.
#[derive(Clone, Debug, Default)]
pub(super) struct Recording(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Recording {
    pub(super) fn events(&self) -> Vec<Event> {
        self.lock().events.clone()
    }

    pub(super) fn stdout(&self) -> String {
        self.lock().stdout.clone()
    }

    pub(super) fn stderr(&self) -> String {
        self.lock().stderr.clone()
    }

    pub(super) fn ending(&self) -> Option<Ending> {
        self.lock().ending
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn update(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.lock());
        self.0.changed.notify_all();
    }

    fn wait<'a>(&'a self, state: MutexGuard<'a, State>, left: Duration) -> MutexGuard<'a, State> {
        self.0.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0
    }
}

#[derive(Debug, Default)]
struct State {
    stdout: String,
    /// How much of `stdout` has been looked at for events.
    parsed: usize,
    events: Vec<Event>,
    stderr: String,
    ending: Option<Ending>,
    agent_gone: bool,
}

/// What a program has said so far, for [`Process::wait_until`].
#[derive(Debug)]
pub struct Output<'a> {
    /// The events on standard output.
    pub events: &'a [Event],
    /// Everything on standard output.
    pub stdout: &'a str,
    /// Everything on standard error.
    pub stderr: &'a str,
}

impl Process {
    /// Its pid, as it sees it itself and as its host's /proc shows it.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// The pid of its parent on the host, of which all that came of the program descends, however it
    /// was forked and whoever of it is still alive.
    pub(super) fn keeper(&self) -> i32 {
        self.keeper
    }

    /// How it ended; `None` while it runs.
    pub fn ended(&self) -> Option<Ending> {
        self.recording.ending()
    }

    /// The name of the host that it runs on.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// Its arguments in one line, as a person would type them.
    pub fn command(&self) -> &str {
        &self.command
    }

    /// The events that it has printed so far.
    pub fn events(&self) -> Vec<Event> {
        self.recording.events()
    }

    /// What it has written to standard output so far.
    pub fn stdout(&self) -> String {
        self.recording.stdout()
    }

    /// What it has written to standard error so far.
    pub fn stderr(&self) -> String {
        self.recording.stderr()
    }

    /// Waits for the first event with this verb.
    ///
    /// # Errors
    /// The program ended without it, the agent is lost, or the deadline passed; the error tells
    /// what was awaited and what the program said.
    pub fn event(&self, verb: &str) -> anyhow::Result<Event> {
        self.wait_until(&format!("event {verb}"), |output| {
            output.events.iter().find(|event| event.verb == verb).cloned()
        })
    }

    /// Waits until there are `count` events with this verb, and returns them.
    ///
    /// # Errors
    /// As [`Process::event`].
    pub fn events_of(&self, verb: &str, count: usize) -> anyhow::Result<Vec<Event>> {
        self.wait_until(&format!("{count} events {verb}"), |output| {
            let found = output.events.iter().filter(|event| event.verb == verb);
            let found: Vec<Event> = found.cloned().collect();
            (found.len() >= count).then_some(found)
        })
    }

    /// Waits until `find` finds something in what the program has said.
    ///
    /// # Errors
    /// As [`Process::event`].
    pub fn wait_until<T>(
        &self,
        what: &str,
        mut find: impl FnMut(Output<'_>) -> Option<T>,
    ) -> anyhow::Result<T> {
        self.wait(what, |state| match find(state.output()) {
            Some(found) => Some(Ok(found)),
            None if state.ending.is_some() => Some(Err(anyhow!("it ended without"))),
            None => None,
        })
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// The agent is lost, or the deadline passed.
    pub fn ending(&self) -> anyhow::Result<Ending> {
        self.wait("its end", |state| state.ending.map(Ok))
    }

    /// Sends it a signal, if it still runs.
    ///
    /// # Errors
    /// The agent is lost.
    pub fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        protocol::send(&*self.conversation, &Request::Signal(signal as i32), &[])
            .with_context(|| format!("the agent of host {} is lost", self.host))
    }

    /// Sends SIGTERM and waits for the end: how a server is asked to finish.
    ///
    /// # Errors
    /// As [`Process::ending`].
    pub fn terminate(&self) -> anyhow::Result<Ending> {
        self.signal(Signal::SIGTERM)?;
        self.ending()
    }

    /// Writes a line to its standard input, if it was made [typed](Command::typed).
    ///
    /// # Errors
    /// write(2)'s: EPIPE when the program is gone.
    pub fn type_line(&mut self, line: &str) -> anyhow::Result<()> {
        let typing = self.typing.as_mut().context("its standard input is not typed")?;
        typing.write_all(format!("{line}\n").as_bytes())?;
        Ok(())
    }

    fn wait<T>(
        &self,
        what: &str,
        mut look: impl FnMut(&State) -> Option<anyhow::Result<T>>,
    ) -> anyhow::Result<T> {
        let deadline = Instant::now() + DEADLINE;
        let mut state = self.recording.lock();
        loop {
            let failure = match look(&state) {
                Some(Ok(found)) => return Ok(found),
                Some(Err(error)) => error,
                None if state.agent_gone => anyhow!("the agent of host {} is lost", self.host),
                None if Instant::now() >= deadline => Late(DEADLINE).into(),
                None => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    state = self.recording.wait(state, left);
                    continue;
                }
            };
            let said = state.summary();
            return Err(failure).with_context(|| {
                format!("awaited {what} of {} on {}{said}", self.command, self.host)
            });
        }
    }
}

impl State {
    fn output(&self) -> Output<'_> {
        Output { events: &self.events, stdout: &self.stdout, stderr: &self.stderr }
    }

    /// Takes the events from the whole lines that have come since the last time.
    fn parse(&mut self) {
        let whole = self.stdout.rfind('\n').map_or(0, |at| at + 1);
        if whole > self.parsed {
            self.events.extend(
                self.stdout[self.parsed..whole]
                    .lines()
                    .filter_map(|line| Event::parse(line.as_bytes())),
            );
            self.parsed = whole;
        }
    }

    /// What the program said and how it ended, for an error message.
    fn summary(&self) -> String {
        let mut text = String::new();
        for (name, output) in [("stdout", &self.stdout), ("stderr", &self.stderr)] {
            let skipped = output.lines().count().saturating_sub(20);
            for line in output.lines().skip(skipped) {
                let _ = write!(text, "\n  {name}: {line}");
            }
        }
        if let Some(ending) = self.ending {
            let _ = write!(text, "\n  ended: {ending}");
        }
        text
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.typing = None;
        // The agent sees the end, kills all that came of this conversation, and hangs up in turn.
        let _ = shutdown(self.conversation.as_raw_fd(), Shutdown::Write);
        if let Some(pump) = self.pump.take() {
            let _ = pump.join();
        }
    }
}

/// Moves what a program says into the shared state, until its agent hangs up.
struct Pump {
    recording: Recording,
    conversation: Arc<OwnedFd>,
    stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
}

impl Pump {
    fn run(mut self) {
        loop {
            let flags = PollFlags::POLLIN;
            let mut waits = vec![PollFd::new(self.conversation.as_fd(), flags)];
            let pipes = [&self.stdout, &self.stderr];
            waits.extend(pipes.into_iter().flatten().map(|pipe| PollFd::new(pipe.as_fd(), flags)));
            if let Err(errno) = poll(&mut waits, PollTimeout::NONE)
                && errno != Errno::EINTR
            {
                break;
            }
            let from_agent = waits[0].any().unwrap_or(false);
            drop(waits);
            // What a program says comes before its end: it is in the pipe by then.
            let reply =
                if from_agent { Some(protocol::receive(&*self.conversation)) } else { None };
            self.read_pipes();
            match reply {
                None => {}
                Some(Ok(Some((Reply::Exited(status), _)))) => self.end(Ending::Exit(status)),
                Some(Ok(Some((Reply::Signaled(number), _)))) => {
                    let signal = Signal::try_from(number).unwrap_or(Signal::SIGKILL);
                    self.end(Ending::Signal(signal));
                }
                Some(Ok(Some(_))) => {}
                Some(Ok(None) | Err(_)) => break,
            }
        }
        self.recording.update(|state| state.agent_gone = true);
    }

    fn end(&self, ending: Ending) {
        self.recording.update(|state| state.ending = Some(ending));
    }

    fn read_pipes(&mut self) {
        for is_stdout in [true, false] {
            let pipe = if is_stdout { &mut self.stdout } else { &mut self.stderr };
            let (text, ended) = pipe.as_ref().map_or((Vec::new(), false), read_available);
            if ended {
                *pipe = None;
            }
            if !text.is_empty() {
                let text = String::from_utf8_lossy(&text).into_owned();
                self.recording.update(|state| {
                    if is_stdout { &mut state.stdout } else { &mut state.stderr }.push_str(&text);
                    state.parse();
                });
            }
        }
    }
}

/// What is in the pipe now, and whether it is at its end.
fn read_available(pipe: &OwnedFd) -> (Vec<u8>, bool) {
    let mut text = Vec::new();
    let mut buffer = [0; 64 * 1024];
    loop {
        match nix::unistd::read(pipe, &mut buffer) {
            Ok(0) => return (text, true),
            Ok(count) => text.extend_from_slice(&buffer[..count]),
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => return (text, false),
            Err(_) => return (text, true),
        }
    }
}
