//! Who starts a server and gives it a listener: socket activation, as systemd does it.
#![allow(dead_code, reason = "not every suite uses all of it")]

use std::fs::File;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd as _, OwnedFd};

use anyhow::Context as _;
use nix::sys::socket::{Backlog, SockaddrStorage, bind, listen, setsockopt, sockopt};
use serverlab::lab::experiment::Lab;
use serverlab::lab::host::Family;
use serverlab::lab::process::Command;
use serverlab::lab::program::Program;
use serverlab::program;

/// Becomes activated-server (descriptor 9) with the listener (3).
pub(crate) const BECOME: &str = "export LISTEN_PID=$$ LISTEN_FDS=1; exec /proc/self/fd/9 \"$@\"";

/// A listener that this process has made on the server's host: the starter's.
pub(crate) fn listener(lab: &Lab, family: Family, port: u16) -> anyhow::Result<OwnedFd> {
    let host = lab.server().address(family);
    let domain = if host.is_ipv6() { libc::AF_INET6 } else { libc::AF_INET };
    let socket = lab.server().socket(domain, libc::SOCK_STREAM, 0)?;
    setsockopt(&socket, sockopt::ReuseAddr, &true)?;
    bind(socket.as_raw_fd(), &SockaddrStorage::from(SocketAddr::new(host, port)))?;
    listen(&socket, Backlog::MAXCONN)?;
    Ok(socket)
}

/// A command that starts a server with this listener; its flags are still to come. The listener is
/// passed by SCM_RIGHTS: to the agent, and from there.
pub(crate) fn command<'a>(
    lab: &'a Lab,
    listener: &OwnedFd,
    script: &str,
) -> anyhow::Result<Command<'a>> {
    let program = program!("activated-server");
    let executable = File::open(program.path().context("it is one of ours")?)?;
    let command = lab.server().command(&Program::of_host("sh"));
    let command = command.args(["-c", script, program.name()]);
    Ok(command.descriptor(3, listener.try_clone()?).descriptor(9, executable.into()))
}
