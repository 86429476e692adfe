//! What several suites share: how a scripted socket's answers read, and the control of a FIN.
#![allow(dead_code, reason = "not every suite uses all of it")]

pub(crate) mod callers;
pub(crate) mod play;
pub(crate) mod pool;
pub(crate) mod starter;

use serverlab::lab::experiment::Lab;
use serverlab::lab::flow::Side;
use serverlab::lab::host::Family;
use serverlab::lab::process::{DEADLINE, Process};
use serverlab::lab::sockets::TcpState;
use serverlab::lab::wait;
use serverlab::lab::wire::Wire;
use serverlab::{args, program};

/// What the kernel answered to each recv and send, and to each call that failed:
/// `["recv ECONNRESET", "recv 0", "send EPIPE"]`.
pub(crate) fn answers(process: &Process) -> Vec<String> {
    let answer = |event: &serverlab::lab::event::Event| {
        let field = |key| event.get(key).unwrap_or("?").to_owned();
        Some(match event.verb.as_str() {
            "received" => format!("recv {}", field("bytes")),
            "sent" => format!("send {}", field("bytes")),
            "failed" => format!("{} {}", field("call"), field("errno")),
            _ => return None,
        })
    };
    process.events().iter().filter_map(answer).collect()
}

/// A positive control: a connection that the server closes in the ordinary way, in the same
/// capture. What it shows, the connections of the experiment could have shown.
#[derive(Debug)]
pub(crate) struct Control {
    port: u16,
    _server: Process,
}

impl Control {
    /// Makes the connection. The server closes first.
    pub(crate) fn run(lab: &Lab, family: Family) -> anyhow::Result<Control> {
        let port = lab.port()?;
        let host = lab.server().address(family);
        let peer = program!("peer");
        let server = lab
            .server()
            .spawn(&peer, args!["-i", host, "-p", port, "listen", "accept", "close"])?;
        server.event("listening")?;
        let steps = args!["-i", host, "-p", port, "connect", "recv", "pause", "close"];
        let mut client = lab.client().command(&peer).args(steps).typed().spawn()?;
        client.event("paused")?;
        // An ACK that the client's FIN overtakes makes TIME_WAIT answer, and a RST ends it (RFC 1337).
        play::reached(lab.server(), port, &[TcpState::FinWait2])?;
        client.type_line("close")?;
        client.ending()?;
        Ok(Control { port, _server: server })
    }

    /// Claims that the capture shows the control's FIN and the server its TIME_WAIT.
    pub(crate) fn claim(&self, lab: &Lab, wire: &Wire) -> anyhow::Result<()> {
        let fin = wire.at("server").flow(self.port)?.facts[Side::Server].fin;
        lab.claim("control: an ordinary close in the same capture shows a FIN", fin.is_some());
        // The client's FIN may still be on its way.
        let seen = wait::until("the control's TIME_WAIT", DEADLINE, || {
            let states = lab.states(lab.server(), self.port)?;
            Ok((states == [TcpState::TimeWait]).then_some(()))
        });
        lab.claim("control: and leaves TIME_WAIT with who closed first", seen);
        Ok(())
    }
}
