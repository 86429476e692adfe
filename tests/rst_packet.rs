//! What makes TCP send a RST, and what the other side learns of it.

mod common;

use common::play::{claim_counter, hold, peer, reached};
use common::{Control, answers};
use nix::sys::signal::Signal;
use rstest::rstest;
use serverlab::lab::experiment::Lab;
use serverlab::lab::host::Family;
use serverlab::lab::process::Process;
use serverlab::lab::sockets::TcpState::FinWait2;
use serverlab::lab::verdict::Verdict;
use serverlab::{args, experiment, program};

/// A scripted server: `listen`, then these steps.
fn listening(lab: &Lab, family: Family, port: u16, steps: &[&str]) -> anyhow::Result<Process> {
    let host = lab.server().address(family);
    let server = lab
        .server()
        .command(&program!("peer"))
        .args(args!["-i", host, "-p", port, "listen"])
        .args(steps)
        .typed()
        .spawn()?;
    server.event("listening")?;
    Ok(server)
}

/// A scripted client, run to its end: `connect`, then these steps.
fn connecting(lab: &Lab, family: Family, port: u16, steps: &[&str]) -> anyhow::Result<Process> {
    let host = lab.server().address(family);
    let client = lab
        .client()
        .command(&program!("peer"))
        .args(args!["-i", host, "-p", port, "connect"])
        .args(steps)
        .spawn()?;
    client.ending()?;
    Ok(client)
}

fn claim_no_trace(lab: &Lab, port: u16) -> anyhow::Result<()> {
    for host in [lab.server(), lab.client()] {
        let states = lab.states(host, port)?;
        let sentence = format!("no TIME_WAIT on the {}, nor any other state", host.name());
        lab.claim_eq(sentence, states, []);
    }
    Ok(())
}

#[rstest]
fn linger_zero_sends_a_reset_instead_of_a_fin(#[values(Family::V4, Family::V6)] family: Family) {
    experiment!(family, "What does close() send after SO_LINGER{1,0}?", |lab| {
        let (host, port) = (lab.server().address(family), lab.port()?);
        let server = lab.server().spawn(&program!("rst-server"), args!["-i", host, "-p", port])?;
        server.event("listening")?;
        hold(lab.server(), &server)?;
        let before = lab.server().counters()?;
        let capture = lab.capture()?;
        let client =
            peer(lab.client(), host, port, &["connect", "recv", "recv", "send:1", "recv"])?;
        client.event("connected")?;
        server.signal(Signal::SIGCONT)?;
        client.ending()?;
        claim_counter(lab, lab.server(), &before, "TcpOutRsts", 1)?;
        claim_counter(lab, lab.server(), &before, "TcpExtTCPAbortOnData", 1)?;
        claim_counter(lab, lab.server(), &before, "TcpExtTCPAbortOnClose", 0)?;
        let control = Control::run(lab, family)?;
        let wire = capture.finish()?;

        lab.claim(
            "the server sends one RST, and no FIN",
            wire.ladder(
                port,
                "client > server  S
                 server > client  S.
                 client > server  .
                 server > client  R.  seq 1 ack 1",
            ),
        );
        lab.claim_eq(
            "the client's recv fails with ECONNRESET once, then tells the end; send fails with EPIPE",
            answers(&client),
            ["recv ECONNRESET", "recv 0", "send EPIPE", "recv 0"],
        );
        claim_no_trace(lab, port)?;
        control.claim(lab, &wire)
    });
}

#[test]
fn a_plain_close_is_told_from_a_reset() {
    experiment!("", "Would these claims notice a server that closes in the ordinary way?", |lab| {
        let (host, port) = (lab.server().address(Family::V4), lab.port()?);
        let flags = args!["-i", host, "-p", port, "--bug", "plain-close"];
        let server = lab.server().spawn(&program!("rst-server"), flags)?;
        server.event("listening")?;
        hold(lab.server(), &server)?;
        let before = lab.server().counters()?;
        let capture = lab.capture()?;
        let client = peer(lab.client(), host, port, &["connect", "recv", "recv"])?;
        client.event("connected")?;
        server.signal(Signal::SIGCONT)?;
        client.ending()?;
        claim_counter(lab, lab.server(), &before, "TcpExtTCPAbortOnData", 0)?;
        let wire = capture.finish()?;
        let reset = wire.ladder(
            port,
            "client > server  S
             server > client  S.
             client > server  .
             server > client  R.  seq 1 ack 1",
        );
        lab.claim("the ladder of a RST does not fit", matches!(reset, Verdict::Fail(_)));
        lab.claim_eq("the client's recv tells the end", answers(&client), ["recv 0", "recv 0"]);
        Ok(())
    });
}

#[rstest]
fn close_with_unread_data_resets(#[values(Family::V4, Family::V6)] family: Family) {
    experiment!(family, "What does close() send while received data is unread?", |lab| {
        let port = lab.port()?;
        let server = listening(lab, family, port, &["accept", "poll:in", "close"])?;
        let before = lab.server().counters()?;
        let capture = lab.capture()?;
        let host = lab.server().address(family);
        let steps = ["connect", "pause", "send:5", "recv", "recv", "send:1"];
        let mut client = peer(lab.client(), host, port, &steps)?;
        server.event("accepted")?; // the handshake's ACK is here: it cannot meet what close leaves
        client.event("paused")?;
        client.type_line("send")?;
        client.ending()?;
        server.ending()?;
        claim_counter(lab, lab.server(), &before, "TcpOutRsts", 1)?;
        claim_counter(lab, lab.server(), &before, "TcpExtTCPAbortOnClose", 1)?;
        claim_counter(lab, lab.server(), &before, "TcpExtTCPAbortOnData", 0)?;
        let control = Control::run(lab, family)?;
        let wire = capture.finish()?;

        lab.claim(
            "the server sends a RST that acknowledges what it did not read, and no FIN",
            wire.ladder(
                port,
                "client > server  S
                 server > client  S.
                 client > server  .
                 client > server  P.  1:6
                 server > client  R.  seq 1 ack 6",
            ),
        );
        lab.claim_eq(
            "the client's recv fails with ECONNRESET once, then tells the end; send fails with EPIPE",
            answers(&client),
            ["send 5", "recv ECONNRESET", "recv 0", "send EPIPE"],
        );
        claim_no_trace(lab, port)?;
        control.claim(lab, &wire)
    });
}

#[rstest]
fn a_reset_does_not_discard_what_was_received(#[values(Family::V4, Family::V6)] family: Family) {
    experiment!(family, "Is an answer lost when a RST follows it before it is read?", |lab| {
        let port = lab.port()?;
        let server = listening(lab, family, port, &["accept", "poll:in", "send:7", "close"])?;
        let capture = lab.capture()?;
        // poll for nothing returns when the connection is broken: the RST has come before recv.
        let steps = ["send:5", "poll:none", "recv", "recv", "recv", "send:1"];
        let client = connecting(lab, family, port, &steps)?;
        server.ending()?;
        let wire = capture.finish()?;

        lab.claim(
            "the answer goes out, and the RST behind it",
            wire.ladder(
                port,
                "client > server  S
                 server > client  S.
                 client > server  .
                 client > server  P.  1:6
                 server > client  P.  1:8  ack 6
                 server > client  R.  seq 8 ack 6",
            ),
        );
        lab.claim_eq(
            "after the RST the client still reads the answer, then ECONNRESET, then the end",
            answers(&client),
            ["send 5", "recv 7", "recv ECONNRESET", "recv 0", "send EPIPE"],
        );
        Ok(())
    });
}

#[rstest]
fn a_closed_port_refuses(#[values(Family::V4, Family::V6)] family: Family) {
    experiment!(family, "What answers a SYN to a port where nobody listens?", |lab| {
        let port = lab.port()?;
        let before = lab.server().counters()?;
        let clients_before = lab.client().counters()?;
        let capture = lab.capture()?;
        let client = connecting(lab, family, port, &[])?;
        claim_counter(lab, lab.server(), &before, "TcpOutRsts", 1)?;
        claim_counter(lab, lab.server(), &before, "TcpExtTCPAbortOnData", 0)?;
        claim_counter(lab, lab.client(), &clients_before, "TcpAttemptFails", 1)?;
        let control = Control::run(lab, family)?;
        let wire = capture.finish()?;

        lab.claim(
            "the RST acknowledges the SYN, has sequence number 0 and offers no window",
            wire.ladder(
                port,
                "client > server  S
                 server > client  R.  seq 0 ack 1 win 0",
            ),
        );
        lab.claim_eq("connect fails with ECONNREFUSED", answers(&client), ["connect ECONNREFUSED"]);
        claim_no_trace(lab, port)?;
        control.claim(lab, &wire)
    });
}

#[rstest]
fn data_to_a_closed_peer_is_answered_by_a_bare_reset(
    #[values(Family::V4, Family::V6)] family: Family,
) {
    experiment!(family, "What becomes of data sent to a peer that has closed?", |lab| {
        let port = lab.port()?;
        let server = listening(lab, family, port, &["accept", "close"])?;
        let before = lab.server().counters()?;
        let capture = lab.capture()?;
        let host = lab.server().address(family);
        let steps = ["connect", "recv", "pause", "send:1", "poll:none", "recv", "send:1"];
        let mut client = peer(lab.client(), host, port, &steps)?;
        // The ACK of the FIN must not come after the data: it would be answered by a RST of its own.
        reached(lab.server(), port, &[FinWait2])?;
        client.type_line("send")?;
        client.ending()?;
        server.ending()?;
        claim_counter(lab, lab.server(), &before, "TcpOutRsts", 1)?;
        let wire = capture.finish()?;

        lab.claim(
            "a FIN first; the data is answered by a RST without acknowledgement, without window",
            wire.ladder(
                port,
                "client > server  S
                 server > client  S.
                 client > server  .
                 server > client  F.  seq 1 ack 1
                 client > server  P.  1:2 ack 2
                 server > client  R   seq 2 win 0",
            ),
        );
        lab.claim_eq(
            "the first send succeeds, the second fails with EPIPE; recv never tells ECONNRESET",
            answers(&client),
            ["recv 0", "send 1", "recv 0", "send EPIPE"],
        );
        Ok(())
    });
}

#[rstest]
fn accept_returns_a_connection_that_was_reset(#[values(Family::V4, Family::V6)] family: Family) {
    experiment!(family, "What does accept() return if the client has reset already?", |lab| {
        let port = lab.port()?;
        let steps = ["pause", "accept", "recv", "recv", "getpeername"];
        let mut server = listening(lab, family, port, &steps)?;
        let capture = lab.capture()?;
        connecting(lab, family, port, &["linger:0", "close"])?;
        server.type_line("the client is gone")?;
        server.ending()?;
        let control = Control::run(lab, family)?;
        let wire = capture.finish()?;

        lab.claim(
            "the client's RST follows the handshake",
            wire.ladder(
                port,
                "client > server  S
                 server > client  S.
                 client > server  .
                 client > server  R.  seq 1 ack 1",
            ),
        );
        let accepted = server.events().iter().any(|event| event.verb == "accepted");
        lab.claim(
            "accept succeeds (it does not fail with ECONNABORTED, as POSIX has it)",
            accepted,
        );
        lab.claim_eq(
            "recv tells ECONNRESET, then the end; the peer's address is gone",
            answers(&server),
            ["recv ECONNRESET", "recv 0", "getpeername ENOTCONN"],
        );
        control.claim(lab, &wire)
    });
}

#[rstest]
fn closing_a_listener_resets_its_queue(#[values(Family::V4, Family::V6)] family: Family) {
    experiment!(family, "What becomes of connections that nobody has accepted?", |lab| {
        let port = lab.port()?;
        let mut server = listening(lab, family, port, &["pause", "close-listener"])?;
        let before = lab.server().counters()?;
        let capture = lab.capture()?;
        let steps = ["connect", "connect", "recv", "close", "recv", "close", "recv", "close"];
        let client = lab
            .client()
            .command(&program!("peer"))
            .args(args!["-i", lab.server().address(family), "-p", port, "connect"])
            .args(steps)
            .spawn()?;
        client.events_of("connected", 3)?;
        let rows = lab.server().tcp_sockets()?;
        let queue = rows.iter().find(|row| row.local.port() == port && row.remote.port() == 0);
        lab.claim_eq(
            "three connections wait in the listener's queue",
            queue.map(|row| row.receive_queue),
            Some(3),
        );
        server.type_line("close it")?;
        server.ending()?;
        client.ending()?;
        claim_counter(lab, lab.server(), &before, "TcpOutRsts", 3)?;
        let control = Control::run(lab, family)?;
        let wire = capture.finish()?;

        lab.claim_eq("three handshakes are on the wire", wire.at("server").to_port(port).len(), 3);
        lab.claim(
            "each of them ends with a RST from the server, and none with a FIN",
            wire.ladder(
                port,
                "client > server  S
                 server > client  S.
                 client > server  .
                 server > client  R.  seq 1 ack 1",
            ),
        );
        lab.claim_eq(
            "each client's recv fails with ECONNRESET",
            answers(&client),
            ["recv ECONNRESET", "recv ECONNRESET", "recv ECONNRESET"],
        );
        control.claim(lab, &wire)
    });
}
