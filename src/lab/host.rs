//! A host of the lab's network, as a runner sees it.

use std::fmt;
use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::path::PathBuf;

use anyhow::{Context as _, bail};
use nix::errno::Errno;
use nix::sys::signal::Signal;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};

use super::counters::Counters;
use super::journal::Journal;
use super::process::{Command, Process};
use super::procfs::Seen;
use super::program::Program;
use super::protocol::{self, Reply, Request};
use super::sockets::{self, SocketRow};
use crate::net::passing;

/// A host: a network namespace with addresses, and an agent that acts in it for us.
#[derive(Debug)]
pub struct Host {
    name: String,
    ipv4: Ipv4Addr,
    ipv6: Ipv6Addr,
    way: Way,
    journal: Journal,
}

/// How to reach an agent.
#[derive(Debug)]
pub enum Way {
    /// It listens at this path.
    Path(PathBuf),
    /// It takes one end of a socket pair for each conversation over this socket.
    Control(OwnedFd),
}

/// The version of IP that an experiment runs over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if *self == Family::V4 { "ipv4" } else { "ipv6" })
    }
}

impl Host {
    /// A host of this name and these addresses, whose agent is reached this way.
    /// What is run there is written into `journal`.
    pub fn new(
        name: impl Into<String>,
        ipv4: Ipv4Addr,
        ipv6: Ipv6Addr,
        way: Way,
        journal: &Journal,
    ) -> Host {
        Host { name: name.into(), ipv4, ipv6, way, journal: journal.clone() }
    }

    /// Where what is run on this host is written down.
    pub(super) fn journal(&self) -> &Journal {
        &self.journal
    }

    /// What it is called: `client`, `server`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its address on the lab's link.
    pub fn address(&self, family: Family) -> IpAddr {
        match family {
            Family::V4 => self.ipv4.into(),
            Family::V6 => self.ipv6.into(),
        }
    }

    /// Whether its programs run as uid 0. The agents of the embedded network are the runner's own
    /// user, those of Compose root with few capabilities.
    pub fn acts_as_root(&self) -> bool {
        match self.way {
            Way::Path(_) => true,
            Way::Control(_) => nix::unistd::geteuid().is_root(),
        }
    }

    /// Whether its sysctls can be written; /proc/sys of Compose's hosts is read-only.
    pub fn sets_sysctls(&self) -> bool {
        matches!(self.way, Way::Control(_))
    }

    /// Both its addresses.
    pub fn addresses(&self) -> [IpAddr; 2] {
        [self.ipv4.into(), self.ipv6.into()]
    }

    /// Runs a program on this host with no input, its output kept and its events parsed.
    ///
    /// # Errors
    /// The agent is lost, or the program cannot be executed (ENOENT, EACCES ...).
    pub fn spawn<A: AsRef<str>>(
        &self,
        program: &Program,
        args: impl IntoIterator<Item = A>,
    ) -> anyhow::Result<Process> {
        self.command(program).args(args).spawn()
    }

    /// Runs a program on this host to its end.
    ///
    /// # Errors
    /// As [`Host::spawn`]; also if it does not end before the [deadline](super::process::DEADLINE).
    pub fn run<A: AsRef<str>>(
        &self,
        program: &Program,
        args: impl IntoIterator<Item = A>,
    ) -> anyhow::Result<Process> {
        let process = self.spawn(program, args)?;
        process.ending()?;
        Ok(process)
    }

    /// A program to be run on this host, with more to choose than [`Host::spawn`] has.
    pub fn command(&self, program: &Program) -> Command<'_> {
        Command::new(self, program.clone())
    }

    /// Opens a file on this host for reading; what /proc/net shows is the host's.
    ///
    /// # Errors
    /// open(2)'s, on the host.
    pub fn open(&self, path: &str) -> anyhow::Result<File> {
        let request = Request::Open { path: path.to_owned(), write: false };
        Ok(File::from(self.descriptor(&request)?))
    }

    /// The content of a file on this host.
    ///
    /// # Errors
    /// open(2)'s and read(2)'s.
    pub fn read(&self, path: &str) -> anyhow::Result<String> {
        let mut text = String::new();
        self.open(path)?
            .read_to_string(&mut text)
            .with_context(|| format!("cannot read {path} on {}", self.name))?;
        Ok(text)
    }

    /// Writes to a file on this host, as a sysctl in /proc/sys/net. Compose's hosts refuse this:
    /// their /proc/sys is read-only.
    ///
    /// # Errors
    /// open(2)'s and write(2)'s.
    pub fn write(&self, path: &str, text: &str) -> anyhow::Result<()> {
        let request = Request::Open { path: path.to_owned(), write: true };
        File::from(self.descriptor(&request)?)
            .write_all(text.as_bytes())
            .with_context(|| format!("cannot write {path} on {}", self.name))
    }

    /// Opens a socket on this host. It stays in the host's network namespace, and is ours to use.
    ///
    /// # Errors
    /// socket(2)'s, on the host: EPERM for a packet socket without CAP_NET_RAW.
    pub fn socket(&self, domain: i32, kind: i32, protocol: i32) -> anyhow::Result<OwnedFd> {
        let mut sockets = self.sockets(domain, kind, protocol, 1)?;
        sockets.pop().context("the agent sent no descriptor")
    }

    /// Opens so many sockets on this host, up to [`passing::MAX_DESCRIPTORS`], at the price of one.
    ///
    /// # Errors
    /// As [`Host::socket`].
    pub fn sockets(
        &self,
        domain: i32,
        kind: i32,
        protocol: i32,
        count: usize,
    ) -> anyhow::Result<Vec<OwnedFd>> {
        self.descriptors(&Request::Socket { domain, kind, protocol, count })
    }

    /// Every process that came of this program, which runs on this host, and is still there: itself
    /// first, then its children, and theirs.
    ///
    /// # Errors
    /// The agent is lost.
    pub fn processes_of(&self, program: &Process) -> anyhow::Result<Vec<Seen>> {
        let file = self.descriptor(&Request::Descendants { of: program.keeper() })?;
        Ok(serde_json::from_reader(io::BufReader::new(File::from(file)))?)
    }

    /// Sends a signal to any process of this host.
    ///
    /// # Errors
    /// kill(2)'s: ESRCH when it is gone.
    pub fn signal(&self, pid: i32, signal: Signal) -> anyhow::Result<()> {
        let conversation = self.converse()?;
        protocol::send(&conversation, &Request::Kill { pid, signal: signal as i32 }, &[])?;
        match protocol::receive(&conversation)? {
            Some((Reply::Ready, _)) => Ok(()),
            Some((Reply::Failed { what, errno }, _)) => Err(io::Error::from_raw_os_error(errno))
                .with_context(|| format!("cannot {what} on {}", self.name)),
            _ => bail!("the agent of host {} is lost", self.name),
        }
    }

    /// The kernel's network counters of this host, as they stand.
    ///
    /// # Errors
    /// As [`Host::read`].
    pub fn counters(&self) -> anyhow::Result<Counters> {
        Counters::read(self)
    }

    /// The TCP sockets of this host, as /proc/net/tcp and /proc/net/tcp6 list them.
    ///
    /// # Errors
    /// As [`Host::read`].
    pub fn tcp_sockets(&self) -> anyhow::Result<Vec<SocketRow>> {
        sockets::tcp_sockets(self)
    }

    /// Starts a conversation with the agent.
    ///
    /// # Errors
    /// The agent cannot be reached.
    pub fn converse(&self) -> anyhow::Result<OwnedFd> {
        let lost = || format!("the agent of host {} is lost", self.name);
        match &self.way {
            Way::Control(control) => {
                let (ours, theirs) = passing::pair()?;
                passing::send(control, b"converse", &[theirs.as_fd()]).with_context(lost)?;
                Ok(ours)
            }
            Way::Path(path) => {
                let kind = SockType::SeqPacket;
                let ours = socket(AddressFamily::Unix, kind, SockFlag::SOCK_CLOEXEC, None)?;
                let address = UnixAddr::new(path)?;
                loop {
                    match connect(ours.as_raw_fd(), &address) {
                        Ok(()) => return Ok(ours),
                        Err(Errno::EINTR) => {}
                        Err(errno) => return Err(io::Error::from(errno)).with_context(lost),
                    }
                }
            }
        }
    }

    /// Asks, and takes the answer's descriptor.
    fn descriptor(&self, request: &Request) -> anyhow::Result<OwnedFd> {
        self.descriptors(request)?.into_iter().next().context("the agent sent no descriptor")
    }

    /// Asks, and takes the answer's descriptors.
    fn descriptors(&self, request: &Request) -> anyhow::Result<Vec<OwnedFd>> {
        let conversation = self.converse()?;
        protocol::send(&conversation, request, &[])?;
        match protocol::receive(&conversation)? {
            Some((Reply::Descriptor, descriptors)) => Ok(descriptors),
            Some((Reply::Failed { what, errno }, _)) => Err(io::Error::from_raw_os_error(errno))
                .with_context(|| format!("cannot {what} on {}", self.name)),
            Some((other, _)) => bail!("the agent of host {} answered {other:?}", self.name),
            None => bail!("the agent of host {} is lost", self.name),
        }
    }
}
