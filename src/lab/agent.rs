//! The agent of a host: runs programs, opens files and sockets there, on request.
//!
//! ```text
//!   agent         accept --> fork --> accept ...                    one child a conversation
//!                              |
//!   conversation               +--> receive request --> fork, exec --> wait for {runner, SIGCHLD}
//!                                                         |                |
//!   program                                               +--> ...         +--> kill all, exit
//! ```
//!
//! A conversation is a child subreaper (prctl(2)): whatever descends from its program, double-forked
//! or not, in whatever session, becomes its child when its own parent dies. When the runner hangs
//! up, it kills its children until it has none. So nothing outlives the runner, which the kernel
//! hangs up for, however it dies.
#![allow(unsafe_code, reason = "forks, sets up descriptors between fork and exec")]

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, kill, sigaction};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork, getppid};

use super::procfs;
use super::protocol::{self, Reply, Request, Spawn};
use crate::net::{drain, passing};

/// Where an agent's conversations come from.
#[derive(Debug)]
pub enum Door {
    /// A listening socket at a path: the agents of Compose.
    Listener(OwnedFd, PathBuf),
    /// A connected socket over which the runner passes one end of a pair for each conversation:
    /// the agents of the embedded network, which have no path. Its end is the agent's end.
    Control(OwnedFd),
}

impl Door {
    /// Listens at `path`, which anyone may then connect to; a socket left there by a dead agent is
    /// replaced.
    ///
    /// # Errors
    /// The call that failed, with the path.
    pub fn listen(path: &Path) -> anyhow::Result<Door> {
        use nix::sys::socket::{
            AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket,
        };
        let socket =
            socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
        // It gets its name when it listens: whoever sees the name can connect.
        let unready = path.with_extension("unready");
        let _ = std::fs::remove_file(&unready);
        let address = UnixAddr::new(&unready)
            .with_context(|| format!("{}: too long a path", unready.display()))?;
        let cannot = || format!("cannot listen at {}", path.display());
        bind(socket.as_raw_fd(), &address).with_context(cannot)?;
        let anyone = std::os::unix::fs::PermissionsExt::from_mode(0o666);
        std::fs::set_permissions(&unready, anyone).with_context(cannot)?;
        listen(&socket, Backlog::MAXCONN).with_context(cannot)?;
        std::fs::rename(&unready, path).with_context(cannot)?;
        Ok(Door::Listener(socket, path.to_owned()))
    }

    /// The next conversation; `None` when there will be no more.
    fn next(&self) -> io::Result<Option<OwnedFd>> {
        match self {
            Door::Listener(listener, _) => {
                use nix::sys::socket::{SockFlag, accept4};
                let fd = accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC)?;
                // SAFETY: accept4 has just made this descriptor.
                Ok(Some(unsafe { OwnedFd::from_raw_fd(fd) }))
            }
            Door::Control(control) => {
                let (length, descriptors) = passing::receive(control, &mut [0; 16])?;
                Ok(if length == 0 { None } else { descriptors.into_iter().next() })
            }
        }
    }
}

impl AsFd for Door {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Door::Listener(socket, _) | Door::Control(socket) => socket.as_fd(),
        }
    }
}

/// Serves conversations until SIGTERM, or until the control socket's other end is gone; then kills
/// what is left of them. Must be called in a process with one thread: it forks.
///
/// # Errors
/// What the door or a system call of the set-up reports.
pub fn run(door: Door) -> anyhow::Result<()> {
    nix::sys::prctl::set_child_subreaper(true)?;
    on_signal(Signal::SIGCHLD, SigHandler::SigIgn)?; // the kernel reaps (sigaction(2), NOTES)
    drain::on_sigterm(&door)?; // a door that is shut down gives nothing more
    let path = match &door {
        Door::Listener(_, path) => Some(path.clone()),
        Door::Control(_) => None,
    };
    let served = serve_conversations(door);
    kill_all_children();
    if let Some(path) = path {
        let _ = std::fs::remove_file(path);
    }
    served
}

fn serve_conversations(door: Door) -> anyhow::Result<()> {
    loop {
        let conversation = match door.next() {
            Ok(Some(conversation)) => conversation,
            Ok(None) => return Ok(()),
            Err(_) if drain::begun() => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error).context("the agent's door is broken"),
        };
        // SAFETY: this process has one thread.
        match unsafe { fork() } {
            Ok(ForkResult::Parent { .. }) => {}
            Ok(ForkResult::Child) => {
                drain::serving(&conversation);
                drop(door); // a runner must not reach a door behind which nobody is any more
                std::process::exit(converse(&conversation))
            }
            Err(errno) => {
                let _ = protocol::send(&conversation, &Reply::failed("fork", &errno.into()), &[]);
            }
        }
    }
}

fn on_signal(signal: Signal, handler: SigHandler) -> nix::Result<()> {
    let action = SigAction::new(handler, SaFlags::empty(), SigSet::empty());
    // SAFETY: only the default action and ignoring are ever installed by this.
    unsafe { sigaction(signal, &action) }.map(drop)
}

/// One conversation, in a process of its own. Returns its exit status.
fn converse(runner: &OwnedFd) -> i32 {
    let result = match protocol::receive(runner) {
        Ok(Some((request, descriptors))) => answer(runner, request, descriptors),
        Ok(None) => Ok(()),
        Err(error) => Err(error),
    };
    if let Err(error) = result {
        let _ = protocol::send(runner, &Reply::failed("the request", &error), &[]);
    }
    kill_all_children();
    0
}

fn answer(runner: &OwnedFd, request: Request, descriptors: Vec<OwnedFd>) -> io::Result<()> {
    match request {
        Request::Spawn(spawn) => run_program(runner, &spawn, descriptors),
        Request::Open { path, write } => {
            let file = std::fs::OpenOptions::new().read(!write).write(write).open(&path);
            hand_over(runner, file.map(|file| vec![file.into()]), || format!("open {path}"))
        }
        Request::Socket { domain, kind, protocol, count } => {
            let socket = |_| {
                // SAFETY: socket(2) has no memory to break.
                let fd = unsafe { libc::socket(domain, kind | libc::SOCK_CLOEXEC, protocol) };
                // SAFETY: if it is a descriptor at all, socket(2) has just made it.
                let own = |fd| unsafe { OwnedFd::from_raw_fd(fd) };
                Errno::result(fd).map(own)
            };
            let sockets: nix::Result<Vec<OwnedFd>> = (0..count).map(socket).collect();
            hand_over(runner, sockets.map_err(io::Error::from), || format!("socket {domain}"))
        }
        Request::Descendants { of } => {
            let seen = procfs::descendants_file(of).map(|file| vec![file]);
            hand_over(runner, seen, || format!("look at what descends from {of}"))
        }
        Request::Kill { pid, signal } => {
            // SAFETY: kill(2) has no memory to break.
            let reply = match Errno::result(unsafe { libc::kill(pid, signal) }) {
                Ok(_) => Reply::Ready,
                Err(errno) => Reply::failed(format!("kill {pid}"), &errno.into()),
            };
            protocol::send(runner, &reply, &[])
        }
        Request::Lease => {
            protocol::send(runner, &Reply::Ready, &[])?;
            let _ = protocol::receive::<Request>(runner); // whatever comes, and above all the end
            let _ = kill(getppid(), Signal::SIGTERM);
            Ok(())
        }
        Request::Signal(_) => Err(io::Error::from_raw_os_error(libc::ESRCH)),
    }
}

fn hand_over(
    runner: &OwnedFd,
    descriptors: io::Result<Vec<OwnedFd>>,
    what: impl FnOnce() -> String,
) -> io::Result<()> {
    match descriptors {
        Ok(descriptors) => {
            let descriptors: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
            protocol::send(runner, &Reply::Descriptor, &descriptors)
        }
        Err(error) => protocol::send(runner, &Reply::failed(what(), &error), &[]),
    }
}

/// Runs the program and stays with it until the runner hangs up.
fn run_program(runner: &OwnedFd, spawn: &Spawn, descriptors: Vec<OwnedFd>) -> io::Result<()> {
    nix::sys::prctl::set_child_subreaper(true)?;
    on_signal(Signal::SIGCHLD, SigHandler::SigDfl)?; // the agent ignores it; here it is counted
    // SIGCHLD by descriptor, so that one poll waits for the runner and for the children.
    let mut mask = SigSet::empty();
    mask.add(Signal::SIGCHLD);
    mask.thread_block()?;
    let children = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
    let program = match start(spawn, descriptors) {
        Ok(program) => program,
        Err(error) => {
            let name = spawn.argv.first().map_or("", String::as_str);
            return protocol::send(runner, &Reply::failed(format!("run {name}"), &error), &[]);
        }
    };
    let keeper = std::process::id().cast_signed();
    protocol::send(runner, &Reply::Spawned { pid: program.as_raw(), keeper }, &[])?;

    let mut running = true;
    loop {
        let mut waits = [
            PollFd::new(runner.as_fd(), PollFlags::POLLIN),
            PollFd::new(children.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut waits, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        let [from_runner, from_children] = waits.map(|wait| wait.any().unwrap_or(false));
        if from_children {
            while let Ok(Some(_)) = children.read_signal() {}
            for status in reap() {
                if status.pid() == Some(program) {
                    running = false;
                    let _ = protocol::send(runner, &ending(status), &[]); // if it still listens
                }
            }
        }
        if from_runner {
            match protocol::receive(runner)? {
                None => return Ok(()),
                Some((Request::Signal(number), _)) if running => {
                    // Not reaped yet, so the pid is still the program's own.
                    // SAFETY: kill(2) has no memory to break.
                    unsafe { libc::kill(program.as_raw(), number) };
                }
                Some(_) => {}
            }
        }
    }
}

fn ending(status: WaitStatus) -> Reply {
    match status {
        WaitStatus::Exited(_, code) => Reply::Exited(code),
        WaitStatus::Signaled(_, signal, _) => Reply::Signaled(signal as i32),
        other => Reply::Failed { what: format!("unexpected wait status {other:?}"), errno: 0 },
    }
}

/// Forks and executes; returns once the program's image has replaced ours, or with the errno that
/// kept it from that. The descriptors are this process's no longer.
fn start(spawn: &Spawn, descriptors: Vec<OwnedFd>) -> io::Result<Pid> {
    let mut descriptors = descriptors.into_iter();
    let executable = if spawn.executable { descriptors.next() } else { None };
    let passed: Vec<(OwnedFd, RawFd)> =
        descriptors.zip(spawn.descriptors.iter().copied()).collect();
    let invalid = |_| io::Error::from_raw_os_error(libc::EINVAL);
    let c_string = |text: &String| CString::new(text.as_bytes()).map_err(invalid);
    let argv = spawn.argv.iter().map(c_string).collect::<io::Result<Vec<_>>>()?;
    let variable =
        |(name, value): &(String, String)| CString::new(format!("{name}={value}")).map_err(invalid);
    let environment = spawn.environment.iter().map(variable).collect::<io::Result<Vec<_>>>()?;
    let image = match executable {
        Some(file) => Image::Descriptor(file),
        None => Image::Path(find_in_path(spawn)?),
    };

    // The child writes its errno here; if exec succeeds, the pipe closes with nothing written.
    let (failure, report) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
    // SAFETY: this process has one thread, so the child may allocate.
    match unsafe { fork() }? {
        ForkResult::Child => {
            let (report, errno) = replace_image(image, &argv, &environment, passed, report, spawn);
            let _ = nix::unistd::write(&report, &(errno as i32).to_ne_bytes());
            // SAFETY: _exit does not return.
            unsafe { libc::_exit(127) }
        }
        ForkResult::Parent { child } => {
            drop(report);
            let mut errno = [0; 4];
            match nix::unistd::read(&failure, &mut errno)? {
                4 => Err(io::Error::from_raw_os_error(i32::from_ne_bytes(errno))),
                _ => Ok(child),
            }
        }
    }
}

enum Image {
    Descriptor(OwnedFd),
    Path(CString),
}

fn find_in_path(spawn: &Spawn) -> io::Result<CString> {
    let name = spawn.argv.first().ok_or(Errno::EINVAL)?;
    let path = spawn.environment.iter().find(|(name, _)| name == "PATH");
    let path =
        path.map_or("/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", |p| &p.1);
    let candidates = path.split(':').map(|folder| Path::new(folder).join(name));
    let found = candidates.into_iter().find(|file| file.is_file()).ok_or(Errno::ENOENT)?;
    CString::new(found.as_os_str().as_bytes()).map_err(|_| Errno::EINVAL.into())
}

/// In the forked child: a session of its own, signals as a fresh program expects them, descriptors
/// to their numbers, exec. Returns only if something fails: where to report it, and the errno.
fn replace_image(
    image: Image,
    argv: &[CString],
    environment: &[CString],
    passed: Vec<(OwnedFd, RawFd)>,
    report: OwnedFd,
    spawn: &Spawn,
) -> (OwnedFd, Errno) {
    // Whatever stands at a number that was asked for moves out of its way first.
    let above = passed.iter().map(|(_, wanted)| wanted + 1).max().unwrap_or(0).max(3);
    let Ok(report) = move_above(report, above) else {
        std::process::exit(127); // the runner sees a program that ends with 127
    };
    let executed = (|| {
        let image = image.move_above(above)?;
        // What was left open by whoever started the lab (a terminal, make, cargo) stays out of it.
        // SAFETY: no memory is involved, and what is marked is still ours until exec.
        Errno::result(unsafe {
            libc::close_range(3, u32::MAX, libc::CLOSE_RANGE_CLOEXEC as libc::c_int)
        })?;
        let moved = passed.into_iter().map(|(fd, wanted)| Ok((move_above(fd, above)?, wanted)));
        for (from, wanted) in moved.collect::<nix::Result<Vec<_>>>()? {
            // SAFETY: nothing of ours stands at `wanted` any more.
            Errno::result(unsafe { libc::dup2(from.as_raw_fd(), wanted) })?;
        }
        nix::unistd::setsid()?;
        nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?; // if the conversation itself is killed
        for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGPIPE] {
            on_signal(signal, SigHandler::SigDfl)?;
        }
        SigSet::empty().thread_set_mask()?;
        if let Some(limit) = spawn.open_files {
            use nix::sys::resource::{Resource, setrlimit};
            setrlimit(Resource::RLIMIT_NOFILE, limit, limit)?;
        }
        match &image {
            Image::Descriptor(file) => nix::unistd::fexecve(file, argv, environment),
            Image::Path(path) => nix::unistd::execve(path, argv, environment),
        }
    })();
    let Err(errno) = executed;
    (report, errno)
}

impl Image {
    fn move_above(self, above: RawFd) -> nix::Result<Image> {
        Ok(match self {
            Image::Descriptor(file) => Image::Descriptor(move_above(file, above)?),
            path @ Image::Path(_) => path,
        })
    }
}

/// The same open file at a number not below `above`, close-on-exec.
fn move_above(descriptor: OwnedFd, above: RawFd) -> nix::Result<OwnedFd> {
    let fd = fcntl(&descriptor, FcntlArg::F_DUPFD_CLOEXEC(above))?;
    // SAFETY: fcntl has just made this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Reaps every child that has ended.
fn reap() -> Vec<WaitStatus> {
    let mut ended = Vec::new();
    while let Ok(status) = waitpid(None::<Pid>, Some(WaitPidFlag::WNOHANG)) {
        if status == WaitStatus::StillAlive {
            break;
        }
        ended.push(status);
    }
    ended
}

/// Kills children until there is none. Their own children become ours as they die.
fn kill_all_children() {
    // While SIGCHLD is ignored, waitpid returns only when the last child has ended, and those that
    // become ours meanwhile would not be killed (wait(2), NOTES).
    let _ = on_signal(Signal::SIGCHLD, SigHandler::SigDfl);
    loop {
        let list = format!("/proc/self/task/{}/children", std::process::id());
        let children = std::fs::read_to_string(list).unwrap_or_default();
        for child in children.split_whitespace().filter_map(|pid| pid.parse().ok()) {
            let _ = kill(Pid::from_raw(child), Signal::SIGKILL);
        }
        match waitpid(None::<Pid>, None) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(_) => return,
        }
    }
}
