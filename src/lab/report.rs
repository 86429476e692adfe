//! What experiments tell while they run, from the test processes to `lab run`.
//!
//! A test process sends each message as one datagram to the abstract Unix socket (unix(7)) that the
//! environment variable `LAB_REPORT` names. Without it, nobody listens, and nothing is sent.

use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};

use serde::{Deserialize, Serialize};

use super::verdict::{Claim, Verdict};

/// The environment variable with the socket's name.
pub const SOCKET: &str = "LAB_REPORT";

/// One message.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Message {
    /// An experiment has begun.
    Begun(Experiment),
    /// One of its claims has its verdict.
    Claimed(Experiment, Claim),
    /// It has ended: its verdict, what it ran on, and how long it took in milliseconds.
    Ended {
        /// Which.
        experiment: Experiment,
        /// The worst of its claims' verdicts.
        verdict: Verdict,
        /// `netns` or `compose`.
        network: String,
        /// Milliseconds from its beginning.
        millis: u64,
    },
}

/// The name of an experiment.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Experiment {
    /// The file under `tests/`, without its ending.
    pub suite: String,
    /// The experiment in it.
    pub name: String,
}

thread_local! {
    static SILENT: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

/// Does something of which this thread reports nothing: an experiment that is meant to fail.
pub fn silence<T>(run: impl FnOnce() -> T) -> T {
    SILENT.set(true);
    let done = run();
    SILENT.set(false);
    done
}

/// Sends a message to whoever listens. A listener that is gone is no error: the experiment goes on.
pub fn send(message: &Message) {
    if SILENT.get() {
        return;
    }
    let Ok(name) = std::env::var(SOCKET) else { return };
    let Ok(address) = SocketAddr::from_abstract_name(name) else { return };
    let Ok(socket) = UnixDatagram::unbound() else { return };
    if let Ok(text) = serde_json::to_vec(message) {
        let _ = socket.send_to_addr(&text, &address);
    }
}
