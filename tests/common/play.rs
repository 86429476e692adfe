//! Two scripted sockets, their ends observed: what most suites about TCP are made of.
#![allow(dead_code, reason = "not every suite uses all of it")]

use std::net::IpAddr;

use nix::sys::signal::Signal;
use serverlab::lab::counters::Counters;
use serverlab::lab::experiment::Lab;
use serverlab::lab::flow::Side;
use serverlab::lab::host::{Family, Host};
use serverlab::lab::process::{DEADLINE, Process};
use serverlab::lab::program::Program;
use serverlab::lab::sockets::{SocketRow, TcpState};
use serverlab::lab::verdict::Skip;
use serverlab::lab::wait::until;
use serverlab::lab::wire::Wire;
use serverlab::{args, program};

/// A scripted socket on a host: `peer -i ADDRESS -p PORT`, then these steps.
pub(crate) fn peer(
    on: &Host,
    address: IpAddr,
    port: u16,
    steps: &[&str],
) -> anyhow::Result<Process> {
    let peer = on.command(&program!("peer")).args(args!["-i", address, "-p", port]);
    peer.args(steps).typed().spawn()
}

/// A scripted server that listens already: `listen`, then these steps.
pub(crate) fn listening(
    lab: &Lab,
    family: Family,
    port: u16,
    steps: &[&str],
) -> anyhow::Result<Process> {
    let steps = [&["listen"], steps].concat();
    let server = peer(lab.server(), lab.server().address(family), port, &steps)?;
    server.event("listening")?;
    Ok(server)
}

/// A scripted client, which may still run: `connect`, then these steps.
pub(crate) fn calling(
    lab: &Lab,
    family: Family,
    port: u16,
    steps: &[&str],
) -> anyhow::Result<Process> {
    let steps = [&["connect"], steps].concat();
    peer(lab.client(), lab.server().address(family), port, &steps)
}

/// A scripted client, run to its end: `connect`, then these steps.
pub(crate) fn connecting(
    lab: &Lab,
    family: Family,
    port: u16,
    steps: &[&str],
) -> anyhow::Result<Process> {
    let client = calling(lab, family, port, steps)?;
    client.ending()?;
    Ok(client)
}

/// A demo on a host: its flags, `-i ADDRESS -p PORT`, and lines typed to it.
pub(crate) fn demo(
    on: &Host,
    program: &Program,
    (address, port): (IpAddr, u16),
    flags: &[&str],
) -> anyhow::Result<Process> {
    on.command(program).args(flags).args(args!["-i", address, "-p", port]).typed().spawn()
}

/// Claims what a counter of a host's kernel has grown by.
pub(crate) fn claim_counter(
    lab: &Lab,
    host: &Host,
    before: &Counters,
    name: &str,
    expected: i64,
) -> anyhow::Result<()> {
    let seen = host.counters()?.since(before, name)?;
    lab.claim_eq(format!("the {}'s kernel counts {name} {expected}", host.name()), seen, expected);
    Ok(())
}

/// Waits until a counter of a host's kernel has grown by so much.
pub(crate) fn counted(host: &Host, before: &Counters, name: &str, by: i64) -> anyhow::Result<()> {
    until(&format!("{name} +{by} on {}", host.name()), DEADLINE, || {
        Ok((host.counters()?.since(before, name)? >= by).then_some(()))
    })
}

/// Waits until a program waits for something: its state in /proc/PID/stat is S (proc(5)). One that
/// has told its last event before a blocking call blocks there, and nowhere else.
pub(crate) fn blocked(host: &Host, process: &Process) -> anyhow::Result<()> {
    until(&format!("{} asleep", process.command()), DEADLINE, || {
        let stat = host.read(&format!("/proc/{}/stat", process.pid()))?;
        let state = stat.rsplit(") ").next().and_then(|rest| rest.chars().next());
        Ok((state == Some('S')).then_some(()))
    })
}

/// Stops a server until it is sent SIGCONT. The kernel goes on without it: a client connects. A RST
/// that comes before connect(2) has returned would be connect's own error.
pub(crate) fn hold(host: &Host, server: &Process) -> anyhow::Result<()> {
    server.signal(Signal::SIGSTOP)?;
    until(&format!("{} stopped", server.command()), DEADLINE, || {
        Ok(status(host, server, "State")?.starts_with('T').then_some(()))
    })
}

/// A line of /proc/PID/status, as `SigPnd`.
pub(crate) fn status(host: &Host, process: &Process, key: &str) -> anyhow::Result<String> {
    let status = host.read(&format!("/proc/{}/status", process.pid()))?;
    let line = status.lines().find_map(|line| line.strip_prefix(&format!("{key}:")));
    Ok(line.unwrap_or_default().trim().to_owned())
}

/// The connections of a host from or to this port, listeners left out.
pub(crate) fn sockets(host: &Host, port: u16) -> anyhow::Result<Vec<SocketRow>> {
    let rows = host.tcp_sockets()?.into_iter();
    let ours = |row: &SocketRow| row.local.port() == port || row.remote.port() == port;
    Ok(rows.filter(|row| ours(row) && row.state != TcpState::Listen).collect())
}

/// The listener of a host at this port.
pub(crate) fn listener(host: &Host, port: u16) -> anyhow::Result<Option<SocketRow>> {
    let rows = host.tcp_sockets()?;
    Ok(rows.into_iter().find(|row| row.local.port() == port && row.state == TcpState::Listen))
}

/// Waits until the connections of a host from or to this port have exactly these states.
pub(crate) fn reached(host: &Host, port: u16, states: &[TcpState]) -> anyhow::Result<()> {
    let what = format!("{states:?} at port {port} of {}", host.name());
    let mut last = Vec::new();
    let seen = until(&what, DEADLINE, || {
        last = sockets(host, port)?.into_iter().map(|row| row.state).collect();
        last.sort_by_key(|state| *state as u8);
        let mut wanted = states.to_vec();
        wanted.sort_by_key(|state| *state as u8);
        Ok((last == wanted).then_some(()))
    });
    seen.map_err(|error| error.context(format!("saw {last:?}")))
}

/// Nanoseconds as milliseconds.
pub(crate) fn ms(nanoseconds: u64) -> u64 {
    nanoseconds / 1_000_000
}

/// A sysctl of a host, set until the guard is dropped. Compose's hosts have a read-only /proc/sys:
/// there the experiment is skipped.
#[derive(Debug)]
pub(crate) struct Sysctl<'a> {
    host: &'a Host,
    path: String,
    before: String,
}

impl Sysctl<'_> {
    pub(crate) fn set<'a>(host: &'a Host, name: &str, value: &str) -> anyhow::Result<Sysctl<'a>> {
        let path = format!("/proc/sys/{}", name.replace('.', "/"));
        let before = host.read(&path)?;
        if before.trim() != value {
            if !host.sets_sysctls() {
                let missing =
                    format!("{name} = {value}: /proc/sys of Compose's hosts is read-only");
                return Err(Skip::by_network(missing).into());
            }
            host.write(&path, value)?;
        }
        Ok(Sysctl { host, path, before })
    }
}

impl Drop for Sysctl<'_> {
    fn drop(&mut self) {
        let _ = self.host.write(&self.path, self.before.trim());
    }
}

/// Claims that the capture could have shown a RST: a connection to a port where nobody listens.
pub(crate) fn claim_rst_control(lab: &Lab, wire: &Wire, port: u16) -> anyhow::Result<()> {
    let rst = wire.at("client").flow(port)?.facts[Side::Server].rst;
    lab.claim("control: a closed port in the same capture answers with a RST", rst.is_some());
    Ok(())
}
