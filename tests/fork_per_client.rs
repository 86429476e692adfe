//! One child a client: every child is reaped, every copy of a connection closed.

use std::collections::BTreeSet;

use anyhow::Context as _;
use rstest::rstest;
use serverlab::lab::experiment::Lab;
use serverlab::lab::flow::Side;
use serverlab::lab::host::Family;
use serverlab::lab::process::{DEADLINE, Ending, Process};
use serverlab::lab::procfs::{Descriptor, Seen};
use serverlab::lab::wait;
use serverlab::{args, experiment, program};

const CLIENTS: usize = 10;
const REQUESTS: usize = 5;
const CONNECTIONS: usize = CLIENTS * REQUESTS;

fn fork_server(lab: &Lab, family: Family, flags: &[&str]) -> anyhow::Result<(Process, u16)> {
    let (host, port) = (lab.server().address(family), lab.port()?);
    let server = lab
        .server()
        .command(&program!("fork-server"))
        .args(args!["-i", host, "-p", port])
        .args(flags)
        .spawn()?;
    server.event("listening")?;
    Ok((server, port))
}

/// A burst of connections, several at once.
fn burst(lab: &Lab, family: Family, port: u16) -> anyhow::Result<Ending> {
    let host = lab.server().address(family);
    let args = args!["-i", host, "-p", port, "-c", CLIENTS, "-t", REQUESTS, "-b", 4096];
    lab.client().run(&program!("client"), args)?.ending()
}

/// The pids that printed an event with this verb.
fn pids(server: &Process, verb: &str) -> BTreeSet<u32> {
    let events = server.events();
    events.iter().filter(|event| event.verb == verb).map(|event| event.pid).collect()
}

/// The children of the server.
fn children(lab: &Lab, server: &Process) -> anyhow::Result<Vec<Seen>> {
    let family = lab.server().processes_of(server)?;
    Ok(family.into_iter().filter(|process| process.pid != server.pid()).collect())
}

/// What the server has open.
fn descriptors(lab: &Lab, server: &Process) -> anyhow::Result<Vec<Descriptor>> {
    let family = lab.server().processes_of(server)?;
    let itself = family.into_iter().find(|process| process.pid == server.pid());
    Ok(itself.context("the server is gone")?.descriptors)
}

#[rstest]
fn every_child_is_reaped(#[values(Family::V4, Family::V6)] family: Family) {
    experiment!(family, "What is left of the children after a burst of clients?", |lab| {
        let (server, port) = fork_server(lab, family, &[])?;
        let before = descriptors(lab, &server)?;
        let capture = lab.capture()?;
        let clients = burst(lab, family, port)?;
        server.events_of("reaped", CONNECTIONS)?;
        let wire = capture.finish()?;

        lab.claim_eq("every client got every answer, whole", clients, Ending::Exit(0));
        let served = pids(&server, "closed");
        lab.claim_eq("each connection had a process of its own", served.len(), CONNECTIONS);
        lab.claim(
            "and none of them was the parent",
            !served.contains(&server.pid().cast_unsigned()),
        );
        lab.claim_eq("no zombie is left, nor any other child", children(lab, &server)?, []);
        let after = descriptors(lab, &server)?;
        lab.claim_eq("the parent holds the same descriptors as before", after, before);
        let flows = wire.at("server").to_port(port);
        lab.claim_eq("the wire shows as many connections", flows.len(), CONNECTIONS);
        let fins = flows.iter().filter(|flow| flow.facts[Side::Server].fin.is_some()).count();
        lab.claim_eq("each of them closed by the server with a FIN", fins, CONNECTIONS);
        lab.claim_eq("SIGTERM ends the server with status 0", server.terminate()?, Ending::Exit(0));
        Ok(())
    });
}

#[rstest]
fn children_that_nobody_reaps_stay_zombies(#[values(Family::V4, Family::V6)] family: Family) {
    experiment!(family, "Would a zombie have been seen? (--bug no-reap)", |lab| {
        let (server, port) = fork_server(lab, family, &["--bug", "no-reap"])?;
        let clients = burst(lab, family, port)?;
        server.events_of("closed", CONNECTIONS)?;
        // The last thing a child does before it exits is to print this; then it is a zombie soon.
        let zombies =
            || anyhow::Ok(children(lab, &server)?.iter().filter(|child| child.is_zombie()).count());
        wait::until("a zombie a connection", DEADLINE, || {
            Ok((zombies()? == CONNECTIONS).then_some(()))
        })?;
        lab.claim_eq("the clients notice nothing", clients, Ending::Exit(0));
        lab.claim_eq("a zombie a connection is left", zombies()?, CONNECTIONS);
        Ok(())
    });
}

/// One client that asks, reads its answer and closes its half; then the server's child closes.
fn one_client(lab: &Lab, family: Family, server: &Process, port: u16) -> anyhow::Result<Process> {
    let host = lab.server().address(family);
    let steps = ["connect", "send:5\n", "recv", "shutdown:wr", "pause"];
    let client = lab.client().command(&program!("peer")).typed();
    let client = client.args(args!["-i", host, "-p", port]).args(steps).spawn()?;
    server.event("reaped")?;
    Ok(client)
}

#[rstest]
fn the_last_copy_to_be_closed_sends_the_fin(#[values(Family::V4, Family::V6)] family: Family) {
    experiment!(family, "When does a FIN go out if two processes hold the connection?", |lab| {
        let capture = lab.capture()?;
        let (good, good_port) = fork_server(lab, family, &[])?;
        let good_client = one_client(lab, family, &good, good_port)?;
        let (leaky, leaky_port) = fork_server(lab, family, &["--bug", "leak-connection"])?;
        let leaky_client = one_client(lab, family, &leaky, leaky_port)?;
        let wire = capture.finish()?;

        let ladder = "client > server  S
                      server > client  S.
                      client > server  .
                      client > server  P.  1:3
                      server > client  P.  1:6
                      client > server  F.  seq 3";
        lab.claim(
            "the parent has closed its copy: the child's close sends a FIN",
            wire.ladder(good_port, &format!("{ladder}\nserver > client  F.  seq 6")),
        );
        lab.claim(
            "--bug leak-connection: the child has closed and exited, and no FIN is sent",
            wire.ladder(leaky_port, ladder),
        );
        let states = lab.states(lab.server(), leaky_port)?;
        let close_wait = [serverlab::lab::sockets::TcpState::CloseWait];
        lab.claim_eq("the connection stays in CLOSE_WAIT on the server", states, close_wait);
        drop((good_client, leaky_client));
        Ok(())
    });
}
