//! The servers that are measured: what they are called, with which flags, and how one is started.

use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::Command;

use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::socket::{Backlog, SockaddrStorage, bind, listen, setsockopt, sockopt};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use serverlab::lab::host::Host;
use serverlab::lab::process::Process;
use serverlab::lab::program::Program;
use serverlab::{args, program};

/// A server of the round.
#[derive(Clone, Debug)]
pub(crate) struct Server {
    pub(crate) name: String,
    program: Program,
    kind: Kind,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    /// One of this package, without a pool.
    Own,
    /// With a pool of processes or threads that block: as many as there may be clients in service.
    Pool,
    /// With event loops: one for each processor that it may use.
    Loops,
    /// Given its listener.
    Activated,
    /// Somebody else's: it takes `-p PORT`.
    Foreign,
}

/// What everything is compared with.
pub(crate) const YARDSTICK: &str = "epoll-server";

macro_rules! servers {
    ($($kind:ident $name:literal)*) => {
        vec![$(Server { name: $name.into(), program: program!($name), kind: Kind::$kind }),*]
    };
}

impl Server {
    /// Every design, in the order of the README.
    pub(crate) fn all() -> Vec<Server> {
        servers! {
            Own "iterative-server"
            Own "fork-server"
            Own "thread-server"
            Pool "prefork-accept-server"
            Pool "prefork-select-server"
            Pool "prefork-flock-server"
            Pool "prefork-mutex-server"
            Pool "prefork-epoll-server"
            Pool "prefork-epoll-exclusive-server"
            Pool "prefork-reuseport-server"
            Pool "prefork-fdpass-server"
            Pool "prethread-accept-server"
            Pool "prethread-mutex-server"
            Pool "prethread-queue-server"
            Own "select-server"
            Own "poll-server"
            Own "epoll-server"
            Own "epoll-edge-server"
            Loops "epoll-oneshot-server"
            Loops "reactors-server"
            Own "inetd-server"
            Activated "activated-server"
            Loops "tokio-server"
            Own "io-uring-server"
        }
    }

    /// The one of this name.
    pub(crate) fn named(name: &str) -> Option<Server> {
        Server::all().into_iter().find(|server| server.name == name)
    }

    /// Somebody else's, from `NAME=EXECUTABLE`.
    pub(crate) fn foreign(text: &str) -> Result<Server, String> {
        let (name, file) = text.split_once('=').ok_or("NAME=EXECUTABLE is wanted")?;
        let file = std::fs::canonicalize(file).map_err(|error| format!("{file}: {error}"))?;
        Ok(Server { name: name.into(), program: Program::file(file), kind: Kind::Foreign })
    }

    /// Starts it on this host, quiet, its event lines thrown away, under `tracer` if there is one.
    pub(crate) fn start(
        &self,
        host: &Host,
        port: u16,
        workers: u16,
        place: &Place,
        tracer: &[String],
    ) -> anyhow::Result<Process> {
        let itself = std::env::current_exe()?;
        let (program, mut command) = match tracer.split_first() {
            None => (Program::file(itself), Vec::new()),
            Some((name, flags)) => {
                let flags = flags.iter().cloned().chain([itself.to_string_lossy().into_owned()]);
                (Program::of_host(name), flags.collect())
            }
        };
        let path = self.program.path().expect("all are files").to_string_lossy();
        command.extend(args!["@become", serde_json::to_string(place)?, path, "-p", port]);
        if self.kind != Kind::Foreign {
            command.push("-q".into());
        }
        match self.kind {
            Kind::Pool => command.extend(args!["-n", workers]),
            Kind::Loops => command.extend(args!["-n", 1]), // it is pinned to one
            _ => {}
        }
        let nowhere = std::fs::File::options().write(true).open("/dev/null")?;
        let mut server = host.command(&program).args(command).stdout(nowhere.into());
        if self.kind == Kind::Activated {
            server = server.descriptor(3, listener(host, port)?);
        }
        server.spawn()
    }
}

/// What the starter of activated-server makes.
fn listener(host: &Host, port: u16) -> anyhow::Result<OwnedFd> {
    let socket = host.socket(libc::AF_INET, libc::SOCK_STREAM, 0)?;
    setsockopt(&socket, sockopt::ReuseAddr, &true)?;
    let address = SocketAddr::from((Ipv4Addr::UNSPECIFIED, port));
    bind(socket.as_raw_fd(), &SockaddrStorage::from(address))?;
    listen(&socket, Backlog::MAXCONN)?;
    Ok(socket)
}

/// Where a server runs.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Place {
    pub(crate) cpu: usize,
    /// cgroup.procs of its cgroup.
    pub(crate) members: Option<PathBuf>,
}

/// In the host: takes its place and becomes the server. Returns if that fails.
pub(crate) fn become_server(place: &Place, command: &[String]) -> anyhow::Error {
    let enter = || {
        pin(place.cpu)?;
        raise_open_files()?;
        if let Some(members) = &place.members {
            std::fs::write(members, "0")?;
        }
        anyhow::Ok(())
    };
    if let Err(error) = enter() {
        return error;
    }
    let mut server = Command::new(&command[0]);
    server.args(&command[1..]);
    server.env("LISTEN_PID", std::process::id().to_string()).env("LISTEN_FDS", "1");
    server.exec().into()
}

/// Keeps this process to one processor.
pub(crate) fn pin(cpu: usize) -> nix::Result<()> {
    let mut cpus = CpuSet::new();
    cpus.set(cpu)?;
    sched_setaffinity(Pid::from_raw(0), &cpus)
}

/// As many descriptors as the hard limit lets us have.
pub(crate) fn raise_open_files() -> nix::Result<()> {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, most, most)
}
