//! What becomes of a connection whose descriptor another process is given: nothing.
//!
//! A descriptor passed by SCM_RIGHTS is one more name for the same socket, in another process. TCP
//! does not know: no packet is sent, no address changes, and the FIN waits for the last close.

mod common;

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::time::Duration;

use anyhow::Context as _;
use common::callers::{Caller, Callers, End};
use nix::sys::signal::Signal;
use nix::sys::socket::{Backlog, SockaddrStorage, bind, listen};
use rstest::rstest;
use serverlab::lab::experiment::Lab;
use serverlab::lab::host::Family;
use serverlab::lab::process::Process;
use serverlab::lab::procfs::Seen;
use serverlab::lab::sockets::{SocketRow, TcpState};
use serverlab::lab::verdict::Verdict;
use serverlab::lab::wait::until;
use serverlab::net::passing;
use serverlab::{args, experiment, program};

/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// Children of the server.
const WORKERS: usize = 3;

/// prefork-fdpass-server, and its clients.
#[derive(Debug)]
struct Passing<'a> {
    lab: &'a Lab,
    server: Process,
    port: u16,
    callers: Callers<'a>,
}

impl<'a> Passing<'a> {
    fn start(lab: &'a Lab, family: Family, flags: &[&str]) -> anyhow::Result<Passing<'a>> {
        let (host, port) = (lab.server().address(family), lab.port()?);
        let command = lab.server().command(&program!("prefork-fdpass-server"));
        let command = command.args(args!["-i", host, "-p", port, "-n", WORKERS]).args(flags);
        let server = command.spawn()?;
        server.event("listening")?;
        let callers = Callers::new(lab.client(), (host, port), PATIENCE);
        let passing = Passing { lab, server, port, callers };
        until("all children asleep", PATIENCE, || {
            let processes = passing.processes()?;
            let there = processes.len() > WORKERS && processes.iter().all(Seen::is_asleep);
            Ok(there.then_some(()))
        })?;
        Ok(passing)
    }

    fn processes(&self) -> anyhow::Result<Vec<Seen>> {
        self.lab.server().processes_of(&self.server)
    }

    fn children(&self) -> anyhow::Result<Vec<Seen>> {
        let mut processes = self.processes()?;
        processes.retain(|seen| seen.pid != self.server.pid());
        Ok(processes)
    }

    /// Stops every child, so that what is passed to them stays on its way.
    fn stop_children(&self) -> anyhow::Result<Vec<i32>> {
        let pids: Vec<i32> = self.children()?.iter().map(|seen| seen.pid).collect();
        for pid in &pids {
            self.lab.server().signal(*pid, Signal::SIGSTOP)?;
        }
        until("stopped children", PATIENCE, || {
            Ok(self.children()?.iter().all(Seen::is_stopped).then_some(()))
        })?;
        Ok(pids)
    }

    /// The server's side of a connection.
    fn row(&self, caller: &Caller) -> anyhow::Result<SocketRow> {
        row_of(self.lab, caller).map(|row| row.context("the server has no such connection"))?
    }

    /// Waits until the connection has been passed and the parent has closed its copy. All children
    /// are stopped: it is in a message, and nowhere else. Returns its inode.
    fn in_flight(&self, caller: &Caller) -> anyhow::Result<u64> {
        self.server.event("passed")?;
        let inode = self.row(caller)?.inode;
        until("a connection that no process has open", PATIENCE, || {
            let holders = self.holders(inode)?;
            Ok(holders.is_empty().then_some(()))
        })?;
        Ok(inode)
    }

    /// The processes that have this socket open.
    fn holders(&self, inode: u64) -> anyhow::Result<Vec<i32>> {
        let mut processes = self.processes()?;
        processes.retain(|seen| !seen.socket(inode).is_empty());
        Ok(processes.iter().map(|seen| seen.pid).collect())
    }
}

fn row_of(lab: &Lab, caller: &Caller) -> anyhow::Result<Option<SocketRow>> {
    let rows = lab.server().tcp_sockets()?;
    Ok(rows.into_iter().find(|row| caller.is_peer_of(row)))
}

/// A whole conversation with a server that answers 10 bytes; the client closes first.
const CONVERSATION: &str = "client > server  S
     server > client  S.
     client > server  .
     client > server  P.  1:4
     server > client  P.  1:11
     client > server  F.
     server > client  F.";

#[rstest]
fn nobody_on_the_wire_notices(#[values(Family::V4, Family::V6)] family: Family) {
    experiment!(
        family,
        "What does the wire show of a connection that changes its process?",
        |lab| {
            let passing = Passing::start(lab, family, &[])?;
            let capture = lab.capture()?;
            let mut caller = passing.callers.connect()?;
            caller.say("10\n")?;
            caller.hear(10)?;
            let inode = passing.row(&caller)?.inode;
            let holders = passing.holders(inode)?;
            let child = holders.first().copied().unwrap_or(0);
            lab.claim_eq("one process has the connection open", holders.len(), 1);
            lab.claim("a child, not the parent, which accepted it", child != passing.server.pid());
            let accepted = passing.server.event("accepted")?;
            lab.claim_eq(
                "the parent's event line tells that it accepted",
                (accepted.pid.cast_signed(), accepted.get("peer").map(str::to_owned)),
                (passing.server.pid(), Some(caller.address().to_string())),
            );
            drop(caller);
            passing.server.event("closed")?;
            let wire = capture.finish()?;
            lab.claim(
                "one conversation, one four-tuple, no FIN when the parent closes its copy",
                wire.ladder(passing.port, CONVERSATION),
            );
            let flows = wire.at("server").to_port(passing.port).len();
            lab.claim_eq("it is the only connection", flows, 1);
            Ok(())
        }
    );
}

#[rstest]
fn a_connection_on_its_way_stays_open(#[values(Family::V4, Family::V6)] family: Family) {
    experiment!(
        family,
        "Who has a connection while it is in a message between processes?",
        |lab| {
            let passing = Passing::start(lab, family, &[])?;
            let capture = lab.capture()?;
            let stopped = passing.stop_children()?;
            let mut caller = passing.callers.connect()?;
            caller.say("10\n")?;
            let inode = passing.in_flight(&caller)?;
            let row = passing.row(&caller)?;
            lab.claim_eq(
            "no process has it open, yet it is ESTABLISHED, with the same inode and its request",
            (row.state, row.inode, row.receive_queue),
            (TcpState::Established, inode, 3),
        );
            lab.claim("and its client has been told nothing", !caller.has_news()?);
            for pid in &stopped {
                passing.lab.server().signal(*pid, Signal::SIGCONT)?;
            }
            caller.hear(10)?;
            let holders = passing.holders(inode)?;
            let child = holders.len() == 1 && stopped.contains(&holders[0]);
            lab.claim("a child takes the message: the same inode, in another process", child);
            drop(caller);
            passing.server.event("closed")?;
            let wire = capture.finish()?;
            lab.claim(
                "the wire shows an ordinary conversation",
                wire.ladder(passing.port, CONVERSATION),
            );
            Ok(())
        }
    );
}

#[rstest]
#[case::unread("10\n", End::Rst)]
#[case::nothing_unread("", End::Fin)]
fn a_connection_whose_receiver_dies_is_closed(#[case] request: &str, #[case] expected: End) {
    experiment!(
        format!("{expected:?}").to_lowercase(),
        "What if the receiver dies with the message unread?",
        |lab| {
            let passing = Passing::start(lab, Family::V4, &[])?;
            let stopped = passing.stop_children()?;
            let mut caller = passing.callers.connect()?;
            caller.say(request)?;
            passing.in_flight(&caller)?;
            for pid in &stopped {
                passing.lab.server().signal(*pid, Signal::SIGKILL)?;
            }
            let end = caller.end()?;
            lab.claim_eq(
                format!("nobody can receive it any more: the kernel closes it, by a {expected:?}"),
                end,
                expected,
            );
            passing.server.events_of("reaped", WORKERS)?; // until then it may pass to the dying
            passing.callers.ask(10)?;
            until("as many children as before", PATIENCE, || {
                Ok((passing.children()?.len() == WORKERS).then_some(()))
            })?;
            lab.claim("the children are replaced, and serve", true);
            Ok(())
        }
    );
}

/// A listener of this very process on the server's host, and clients that call it.
fn own_listener(lab: &Lab) -> anyhow::Result<(TcpListener, Callers<'_>)> {
    let (host, port) = (lab.server().address(Family::V4), lab.port()?);
    let socket = lab.server().socket(libc::AF_INET, libc::SOCK_STREAM, 0)?;
    bind(socket.as_raw_fd(), &SockaddrStorage::from(SocketAddr::new(host, port)))?;
    listen(&socket, Backlog::MAXCONN)?;
    Ok((TcpListener::from(socket), Callers::new(lab.client(), (host, port), PATIENCE)))
}

fn inode(connection: &TcpStream) -> anyhow::Result<u64> {
    Ok(nix::sys::stat::fstat(connection)?.st_ino)
}

#[rstest]
fn two_processes_have_the_same_socket() {
    experiment!("", "Is a passed descriptor the same socket?", |lab| {
        let (listener, callers) = own_listener(lab)?;
        let port = listener.local_addr()?.port();
        let capture = lab.capture()?;
        let mut caller = callers.connect()?;
        let (ours, _) = listener.accept()?;
        let inode = inode(&ours)?;
        // The runner passes it to the agent, the agent to the program, by SCM_RIGHTS both times.
        let holder = lab
            .server()
            .command(&program!("peer"))
            .args(["pause"])
            .typed()
            .descriptor(5, OwnedFd::from(ours.try_clone()?))
            .spawn()?;
        holder.event("paused")?;
        let seen = lab.server().processes_of(&holder)?;
        lab.claim_eq(
            "the receiver's descriptor 5 has the sender's inode",
            seen[0].socket(inode),
            [5],
        );
        drop(ours);
        let state = row_of(lab, &caller)?.map(|row| (row.state, row.inode));
        lab.claim_eq(
            "the sender closes its own: still ESTABLISHED",
            state,
            Some((TcpState::Established, inode)),
        );
        drop(holder);
        let end = caller.end()?;
        lab.claim_eq(
            "the receiver is gone: the last close, and only that, sends a FIN",
            end,
            End::Fin,
        );
        drop(caller);
        let wire = capture.finish()?;
        lab.claim(
            "one FIN from each side, no RST",
            wire.ladder(
                port,
                "client > server  S
                 server > client  S.
                 client > server  .
                 server > client  F.
                 client > server  F.",
            ),
        );
        Ok(())
    });
}

#[rstest]
fn a_message_holds_all_there_can_be() {
    experiment!(
        "",
        "Can a message bring more descriptors than net::passing has room for?",
        |lab| {
            let (listener, callers) = own_listener(lab)?;
            let mut client = callers.connect()?;
            let (connection, _) = listener.accept()?;
            let (left, right) = passing::pair()?;
            let mut copies = vec![connection.as_fd(); passing::MAX_DESCRIPTORS + 1];
            let errno = passing::send(&left, b"too many", &copies).err();
            lab.claim_eq(
                "the kernel refuses a message with 254 of them",
                errno.and_then(|error| error.raw_os_error()),
                Some(libc::EINVAL),
            );
            copies.pop();
            passing::send(&left, b"all", &copies)?;
            drop(connection);
            let (_, received) = passing::receive(&right, &mut [0; 16])?;
            lab.claim_eq("all of 253 come", received.len(), 253);
            lab.claim("each is a copy: its client is told nothing", !client.has_news()?);
            drop(received);
            lab.claim_eq("until the last of them is closed", client.end()?, End::Fin);
            Ok(())
        }
    );
}

/// Whether no child has a socket of another child's: its channel is its own.
fn channels_apart(passing: &Passing<'_>) -> anyhow::Result<Verdict> {
    let sockets = |seen: &Seen| -> Vec<String> {
        let open = seen.descriptors.iter().map(|open| open.target.clone());
        open.filter(|target| target.starts_with("socket:")).collect()
    };
    let rows = passing.lab.server().tcp_sockets()?;
    let ours = |row: &&SocketRow| row.local.port() == passing.port && row.state == TcpState::Listen;
    let listener = rows.iter().find(ours);
    let listener = format!("socket:[{}]", listener.context("there is no listener")?.inode);
    let mut all = Vec::new();
    for child in passing.children()? {
        all.extend(sockets(&child).into_iter().filter(|target| *target != listener));
    }
    let mut once = all.clone();
    once.sort();
    once.dedup();
    Ok(if all.len() == WORKERS && once.len() == WORKERS {
        Verdict::Pass
    } else {
        Verdict::Fail(format!("{WORKERS} children have {all:?}"))
    })
}

#[rstest]
fn no_child_holds_the_channel_of_another() {
    experiment!("", "Which ends of channels do children inherit?", |lab| {
        let passing = Passing::start(lab, Family::V4, &[])?;
        lab.claim("each child has one channel, its own", channels_apart(&passing)?);
        let broken = Passing::start(lab, Family::V4, &["--bug", "inherit-channel"])?;
        let caught = matches!(channels_apart(&broken)?, Verdict::Fail(_));
        lab.claim("control: --bug inherit-channel is caught by the same look", caught);
        Ok(())
    });
}
