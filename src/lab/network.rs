//! A network of hosts: namespaces of our own, or the services of a Compose project.

use std::fmt;
use std::io::Read as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, bail};

use super::host::{Host, Way};
use super::journal::Journal;
use super::ladder::Names;
use super::namespaces::{HostPlan, Plan, SMALL_TABLE};
use super::protocol::{self, Reply};
use crate::net::passing;

/// The hosts of every network, in the order of their addresses.
pub const HOSTS: [&str; 2] = ["client", "server"];

/// Hosts that can reach one another.
#[derive(Debug)]
pub struct Network {
    hosts: Vec<Host>,
    kind: Kind,
    journal: Journal,
    /// Keeps the network up; dropped after the hosts.
    _keeper: Option<Keeper>,
}

/// What a network is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Network namespaces of this machine, made for one experiment.
    Namespaces,
    /// Containers of a Compose project.
    Compose,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::Namespaces => "netns",
            Kind::Compose => "compose",
        })
    }
}

/// The process that holds the switch, and our end of its standard input.
#[derive(Debug)]
struct Keeper {
    process: Child,
    interest: Option<OwnedFd>,
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.interest = None;
        let _ = self.process.wait();
    }
}

impl Network {
    /// Builds a network of namespaces with these hosts, numbered from 1 in 10.77.0.0/24 and
    /// fd77::/64. `lab` is the executable of that name.
    ///
    /// # Errors
    /// The machine does not let us: no user namespaces, no bridge; the reason is in the error.
    pub fn namespaces(lab: &Path, names: &[&str]) -> anyhow::Result<Network> {
        Network::of_namespaces(lab, names, SMALL_TABLE)
    }

    /// The same for many connections: the hosts use the machine's own table of them.
    ///
    /// # Errors
    /// As [`Network::namespaces`].
    pub fn for_load(lab: &Path, names: &[&str]) -> anyhow::Result<Network> {
        Network::of_namespaces(lab, names, 0)
    }

    fn of_namespaces(lab: &Path, names: &[&str], table: u32) -> anyhow::Result<Network> {
        let (ours, theirs) = passing::pair()?;
        let mut process = Command::new(lab)
            .arg("namespaces")
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot run {}", lab.display()))?;
        let journal = Journal::default();
        let (mut hosts, mut plans, mut controls) = (Vec::new(), Vec::new(), Vec::new());
        for (index, &name) in names.iter().enumerate() {
            let number = u8::try_from(index + 1).context("too many hosts")?;
            let ipv4 = Ipv4Addr::new(10, 77, 0, number);
            let ipv6 = Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, number.into());
            let (control, agents) = passing::pair()?;
            let addresses = vec![(IpAddr::from(ipv4), 24), (IpAddr::from(ipv6), 64)];
            plans.push(HostPlan { name: name.to_owned(), addresses });
            controls.push(agents);
            hosts.push(Host::new(name, ipv4, ipv6, Way::Control(control), &journal));
        }
        let attached: Vec<_> = controls.iter().map(|control| control.as_fd()).collect();
        protocol::send(&ours, &Plan { hosts: plans, table }, &attached)?;
        drop(controls);
        let reply = protocol::receive(&ours)?;
        let mut stderr = process.stderr.take();
        let keeper = Keeper { process, interest: Some(ours) };
        match reply {
            Some((Reply::Ready, _)) => {}
            Some((Reply::Failed { what, .. }, _)) => bail!("{what}"),
            _ => {
                let mut said = String::new();
                drop(keeper);
                if let Some(stderr) = &mut stderr {
                    let _ = stderr.read_to_string(&mut said);
                }
                bail!("the network's process died: {}", said.trim());
            }
        }
        Ok(Network { hosts, kind: Kind::Namespaces, journal, _keeper: Some(keeper) })
    }

    /// The hosts whose agents listen in `folder`, as `client.sock` and `server.sock`.
    ///
    /// # Errors
    /// An agent cannot be reached, or tells no address.
    pub fn of_agents(folder: &Path) -> anyhow::Result<Network> {
        let journal = Journal::default();
        let mut hosts = Vec::new();
        for name in HOSTS {
            let path = || Way::Path(folder.join(format!("{name}.sock")));
            let nowhere =
                Host::new(name, Ipv4Addr::UNSPECIFIED, Ipv6Addr::UNSPECIFIED, path(), &journal);
            let (ipv4, ipv6) = addresses(&nowhere)?;
            hosts.push(Host::new(name, ipv4, ipv6, path(), &journal));
        }
        Ok(Network { hosts, kind: Kind::Compose, journal, _keeper: None })
    }

    /// What the network is made of.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// What has been run on its hosts.
    pub fn journal(&self) -> &Journal {
        &self.journal
    }

    /// The hosts.
    pub fn hosts(&self) -> &[Host] {
        &self.hosts
    }

    /// The names of the hosts by their addresses.
    pub fn names(&self) -> Names {
        let of_host = |host: &Host| host.addresses().map(|ip| (ip, host.name().to_owned()));
        self.hosts.iter().flat_map(of_host).collect()
    }

    /// The host of this name.
    ///
    /// # Panics
    /// If there is none: the name in the experiment is wrong.
    pub fn host(&self, name: &str) -> &Host {
        self.hosts
            .iter()
            .find(|host| host.name() == name)
            .unwrap_or_else(|| panic!("the network has no host {name}"))
    }
}

/// A host's own addresses, read from its /proc: the one in /proc/net/fib_trie that is not
/// loopback, and the global one in /proc/net/if_inet6.
fn addresses(host: &Host) -> anyhow::Result<(Ipv4Addr, Ipv6Addr)> {
    let trie = host.read("/proc/net/fib_trie")?;
    let mut last = None;
    let mut ipv4 = None;
    for line in trie.lines() {
        let line = line.trim();
        if let Some(address) = line.strip_prefix("|-- ") {
            last = address.parse::<Ipv4Addr>().ok();
        } else if line.starts_with("/32 host LOCAL") {
            ipv4 = ipv4.or(last.filter(|address| !address.is_loopback()));
        }
    }
    let table = host.read("/proc/net/if_inet6").unwrap_or_default();
    let global = table.lines().find_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let is_global = fields.get(3) == Some(&"00");
        let bits = u128::from_str_radix(fields.first()?, 16).ok()?;
        is_global.then(|| Ipv6Addr::from(bits))
    });
    let ipv4 = ipv4.with_context(|| format!("host {} has no IPv4 address", host.name()))?;
    let ipv6 = global.with_context(|| format!("host {} has no IPv6 address", host.name()))?;
    Ok((ipv4, ipv6))
}
