//! Children that wait in `accept` on one listener.
//!
//! The parent forks `-n` children, once, and then only replaces those that die. Each child accepts
//! and serves one client after another: no fork, no lock and no hand-over for a client, just the
//! five system calls that it cannot do without.
//!
//! ```text
//!   parent   listen --> fork, fork, ... --> wait for SIGCHLD: fork another; for SIGTERM: drain
//!                         |
//!   child                 +--> accept --> recv, send ... --> close --+
//!                              ^                                     |
//!                              +-------------------------------------+
//! ```
//!
//! What to notice: there is no thundering herd: the kernel wakes one child a connection, whoever
//! has waited longest, so spaced connections go round (thundering_herd.rs,
//! connection_distribution.rs). SIGTERM prints what each has served.
//! Break it: `--bug mortal-workers` lets a bad request end the child, as in the Python original;
//! watch `reaped` and `started`, and what it costs.
//! Compare: prefork_select.rs, where the herd is real; fork.rs, which forks for each client.
//! Run: cargo run --bin prefork-accept-server   then: cargo run --bin client -- -c 5 -t 100
//! See: accept(2), fork(2), mmap(2) MAP_SHARED; UNP 30.6; TLPI 60.4.

use std::net::TcpListener;

use nix::errno::Errno;
use serverlab::net::listen::{accept, accept_failed};
use serverlab::net::pool::{self, Worker};
use serverlab::net::request::Ended;
use serverlab::net::{self, drain};

fn main() -> net::Result {
    let about = "Children that wait in accept on one listener";
    let args = net::args::server("prefork-accept-server", about, &["mortal-workers"]);
    let listener = net::listen(&args)?;
    drain::on_sigterm(&listener)?;
    pool::of_processes(&args, |worker| serve_clients(&listener, worker))
}

/// A child's life.
fn serve_clients(listener: &TcpListener, worker: &Worker<'_>) -> net::Result {
    while !drain::begun() {
        match accept(listener) {
            Ok((connection, peer)) => {
                let ended = worker.serve(connection, peer);
                if worker.args.bug("mortal-workers") && matches!(ended, Ended::BadRequest(_)) {
                    break;
                }
            }
            Err(Errno::EINVAL) => break, // the parent has shut the listener down: SIGTERM
            Err(errno) => accept_failed(errno)?,
        }
    }
    Ok(())
}
