//! The embedded network: hosts that are network namespaces, joined by veth pairs and a bridge.
//!
//! ```text
//!   runner -- control sockets --> lab namespaces        holds the switch: a namespace with a bridge
//!                |                   |  fork
//!                +---------------->  +--> agent of client    eth0 10.77.0.1  fd77::1
//!                +---------------->  +--> agent of server    eth0 10.77.0.2  fd77::2
//! ```
//!
//! It needs no privilege: an ordinary user gets a user namespace first, in which it has all
//! capabilities (user_namespaces(7)). The caller keeps its own uid there, not 0: tcpdump as uid 0
//! would try to become another user, and there is none.
//!
//! No namespace has a name or a mount. They live as long as the processes in them, and those end
//! when the runner's sockets close: nothing is left, even after SIGKILL.
#![allow(unsafe_code, reason = "forks an agent for each host, and makes two prctl(2) calls")]

use std::net::{IpAddr, Ipv6Addr};
use std::os::fd::{BorrowedFd, OwnedFd};

use anyhow::{Context as _, bail, ensure};
use caps::{CapSet, Capability};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{ForkResult, fork, getgid, getuid};
use serde::{Deserialize, Serialize};

use super::agent::{self, Door};
use super::netlink::Netlink;
use super::pin;
use super::process::DEADLINE;
use super::protocol::{self, Reply};
use crate::net::passing;

/// The hosts that a runner wants; a control socket for each comes with it, in the same order.
#[derive(Debug, Serialize, Deserialize)]
pub struct Plan {
    /// The hosts.
    pub hosts: Vec<HostPlan>,
    /// Buckets of each host's table of connections, [`SMALL_TABLE`]; 0 for the machine's own.
    pub table: u32,
}

/// One host of a [`Plan`].
#[derive(Debug, Serialize, Deserialize)]
pub struct HostPlan {
    /// What it is called.
    pub name: String,
    /// Its addresses, each with the length of its prefix.
    pub addresses: Vec<(IpAddr, u8)>,
}

/// Builds the network that the runner asks for over standard input (a [`Plan`] on a SOCK_SEQPACKET
/// socket), answers [`Reply::Ready`], and keeps it until the runner is gone. The whole of
/// `lab namespaces`; needs a process with one thread.
///
/// # Errors
/// What could not be set up, which the runner is told too.
pub fn serve(runner: BorrowedFd<'_>) -> anyhow::Result<()> {
    let Some((plan, controls)) = protocol::receive::<Plan>(runner)? else { return Ok(()) };
    ensure!(plan.hosts.len() == controls.len(), "a control socket for each host is wanted");
    match build(&plan, controls) {
        Ok(()) => protocol::send(runner, &Reply::Ready, &[])?,
        Err(error) => {
            let reply = Reply::Failed { what: format!("{error:#}"), errno: 0 };
            protocol::send(runner, &reply, &[])?;
        }
    }
    let _ = passing::receive(runner, &mut [0; 16]); // the end of the runner, or of its interest
    Ok(())
}

fn build(plan: &Plan, controls: Vec<OwnedFd>) -> anyhow::Result<()> {
    become_able()?;
    unshare(CloneFlags::CLONE_NEWNET).context("cannot make a network namespace")?;
    small_tables(plan.table);
    let mut netlink = Netlink::open()?;
    netlink.add_bridge("switch").context("cannot make a bridge")?;
    let mut controls = controls.into_iter();
    for (index, host) in plan.hosts.iter().enumerate() {
        let control = controls.next().expect("as many as hosts");
        add_host(&mut netlink, index, host, control, controls.as_slice())
            .with_context(|| format!("cannot set up host {}", host.name))?;
    }
    Ok(())
}

/// A table of connections of a host's own. The machine's has a bucket for each 64 KiB of its
/// memory, and whoever reads /proc/net/tcp walks through all of them, milliseconds at a time.
pub const SMALL_TABLE: u32 = 2048;

/// Gives each host a table of so many buckets. Kernels before 6.1 have the one table only, which
/// works as well.
fn small_tables(buckets: u32) {
    let _ = std::fs::write("/proc/sys/net/ipv4/tcp_child_ehash_entries", buckets.to_string());
}

/// Gives this process the capability to make network namespaces, by a user namespace if need be,
/// and makes capabilities ambient, so that tcpdump and nft on the hosts have them (capabilities(7)).
fn become_able() -> anyhow::Result<()> {
    if caps::has_cap(None, CapSet::Effective, Capability::CAP_SYS_ADMIN)? {
        return Ok(());
    }
    let (uid, gid) = (getuid(), getgid());
    unshare(CloneFlags::CLONE_NEWUSER).context(
        "cannot make a user namespace (see sysctls user.max_user_namespaces, \
         kernel.unprivileged_userns_clone, kernel.apparmor_restrict_unprivileged_userns)",
    )?;
    std::fs::write("/proc/self/setgroups", "deny")?;
    std::fs::write("/proc/self/uid_map", format!("{uid} {uid} 1"))?;
    std::fs::write("/proc/self/gid_map", format!("{gid} {gid} 1"))?;
    let all = caps::read(None, CapSet::Permitted)?;
    caps::set(None, CapSet::Inheritable, &all)?;
    caps::set(None, CapSet::Ambient, &all)?;
    Ok(())
}

/// Forks the host's agent into a network namespace of its own and links it to the switch.
fn add_host(
    netlink: &mut Netlink,
    index: usize,
    host: &HostPlan,
    control: OwnedFd,
    of_others: &[OwnedFd],
) -> anyhow::Result<()> {
    let (ours, theirs) = passing::pair()?;
    // SAFETY: this process has one thread.
    match unsafe { fork() }? {
        ForkResult::Child => {
            drop(ours);
            close_all(of_others);
            std::process::exit(match be_host(host, control, theirs) {
                Ok(()) => 0,
                Err(error) => {
                    eprintln!("lab: host {}: {error:#}", host.name);
                    1
                }
            })
        }
        ForkResult::Parent { child } => {
            drop((control, theirs));
            wait_for(&ours, "its namespace")?;
            netlink.add_veth(&format!("port{index}"), "switch", pin::INTERFACE, child)?;
            passing::send(&ours, b"linked", &[])?;
            wait_for(&ours, "its addresses")
        }
    }
}

/// The forked agent must not hold its siblings' control sockets open.
fn close_all(of_others: &[OwnedFd]) {
    use std::os::fd::AsRawFd as _;
    for other in of_others {
        // SAFETY: the vector that owns it is never dropped in this process, which exits.
        unsafe { libc::close(other.as_raw_fd()) };
    }
}

fn wait_for(socket: &OwnedFd, what: &str) -> anyhow::Result<()> {
    let mut buffer = [0; 256];
    match passing::receive(socket, &mut buffer)? {
        (0, _) => bail!("the agent died before it had {what}"),
        (length, _) if &buffer[..length] == b"ok" => Ok(()),
        (length, _) => bail!("{}", String::from_utf8_lossy(&buffer[..length])),
    }
}

/// In the host's process: its namespace, its addresses, then its agent for as long as it is wanted.
fn be_host(host: &HostPlan, control: OwnedFd, switch: OwnedFd) -> anyhow::Result<()> {
    // SAFETY: prctl takes no pointer here. The agent ends with the process that holds the switch.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM) };
    let say = |result: anyhow::Result<()>| {
        let word = result.as_ref().map_or_else(|error| format!("{error:#}"), |()| "ok".to_owned());
        passing::send(&switch, word.as_bytes(), &[])?;
        result
    };
    say(unshare(CloneFlags::CLONE_NEWNET).context("cannot make a network namespace"))?;
    passing::receive(&switch, &mut [0; 16])?; // linked
    say(configure(host))?;
    drop(switch);
    agent::run(Door::Control(control))
}

fn configure(host: &HostPlan) -> anyhow::Result<()> {
    // Neither router solicitations nor temporary addresses: nobody asks, so nobody is seen asking.
    std::fs::write("/proc/sys/net/ipv6/conf/default/accept_ra", "0")?;
    std::fs::write("/proc/sys/net/ipv6/conf/default/accept_dad", "0")?;
    std::fs::write("/proc/sys/net/ipv6/conf/eth0/accept_dad", "0")?;
    let mut netlink = Netlink::open()?;
    netlink.set_up("lo")?;
    for &(address, prefix) in &host.addresses {
        netlink.add_address(pin::INTERFACE, address, prefix)?;
    }
    pin::offloads_off(pin::INTERFACE).context("cannot turn offloads off")?;
    pin::set_sysctls()?;
    netlink.set_up(pin::INTERFACE)?;
    for (address, _) in &host.addresses {
        if let IpAddr::V6(address) = address {
            settled(*address)?;
        }
    }
    Ok(())
}

/// Waits until an IPv6 address is this host's own. The kernel sees to that on its own time when the
/// interface has come up; before, what is sent there goes out to ask who has it.
fn settled(address: Ipv6Addr) -> anyhow::Result<()> {
    let own: String = address.octets().iter().map(|byte| format!("{byte:02x}")).collect();
    super::wait::until(&format!("the route to {address}"), DEADLINE, || {
        let routes = std::fs::read_to_string("/proc/net/ipv6_route")?;
        // Destination, its length, source, its length, gateway, metric, references, uses, flags.
        let is_local = |route: &str| {
            let fields: Vec<&str> = route.split_whitespace().collect();
            let flags = fields.get(8).and_then(|flags| u32::from_str_radix(flags, 16).ok());
            fields.first() == Some(&own.as_str())
                && flags.is_some_and(|flags| flags & RTF_LOCAL != 0)
        };
        Ok(routes.lines().any(is_local).then_some(()))
    })
}

/// linux/ipv6_route.h: a route to one of our own addresses.
const RTF_LOCAL: u32 = 0x8000_0000;
