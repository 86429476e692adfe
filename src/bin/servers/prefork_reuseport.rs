//! Children with a listener each, on one port: SO_REUSEPORT.
//!
//! Each child binds a listener of its own to the same address. The kernel gives each connection to
//! one of them, by a hash of its addresses and ports, when the SYN comes: nothing is shared, nobody
//! is woken in vain, and a connection whose child is busy waits even if another child is idle.
//!
//! ```text
//!   parent   bind (so that the port is known) --> fork, fork, ... --> wait for signals
//!                                                   |
//!   child    socket, SO_REUSEPORT, bind, listen <---+
//!            accept --> recv, send ... --> close --+
//!            ^                                     |
//!            +-------------------------------------+
//! ```
//!
//! What to notice: N sockets in LISTEN (ss -ltn), shares that are even only statistically
//! (connection_distribution.rs), and that a child which ends resets what its queue holds, unless
//! net.ipv4.tcp_migrate_req is 1 (hot_restart.rs).
//! Break it: `--bug idle-listener` lets the parent listen as well and never accept, like any copy
//! of such a socket that was forgotten: one client in N+1 waits for ever.
//! Compare: prefork_accept.rs, one queue for all.
//! Run: cargo run --bin prefork-reuseport-server     then: cargo run --bin client -- -c 5 -t 100
//! See: socket(7) SO_REUSEPORT (Linux 3.9), listen(2); TLPI 61.10 (SO_REUSEADDR).

use std::net::{SocketAddr, TcpListener};

use nix::errno::Errno;
use nix::sys::socket::{setsockopt, sockopt::ReusePort};
use serverlab::net::listen::{accept, accept_failed, bind, open, start_listening};
use serverlab::net::pool::{self, Worker};
use serverlab::net::{self, drain};

fn main() -> net::Result {
    let about = "Children with a listener each, on one port";
    let args = net::args::server("prefork-reuseport-server", about, &["idle-listener"]);
    // Bound and not listening it gets no connection, but it holds the port, whichever that is.
    let holder = bound(args.address())?;
    let address = holder.local_addr()?;
    if args.bug("idle-listener") {
        start_listening(&holder, args.backlog)?;
    }
    pool::of_processes(&args, |worker| serve_clients(address, worker))
}

/// A socket that shares its address with those of its siblings.
fn bound(address: SocketAddr) -> anyhow::Result<TcpListener> {
    let socket = open(address)?;
    setsockopt(&socket, ReusePort, &true)?; // before bind(2), by each of them, of one user
    bind(&socket, address)?;
    Ok(socket)
}

/// A child's life.
fn serve_clients(address: SocketAddr, worker: &Worker<'_>) -> net::Result {
    let listener = bound(address)?;
    start_listening(&listener, worker.args.backlog)?;
    drain::on_sigterm(&listener)?; // its own, so SIGTERM is about this child alone
    while !drain::begun() {
        match accept(&listener) {
            Ok((connection, peer)) => {
                worker.serve(connection, peer);
            }
            Err(Errno::EINVAL) => break, // SIGTERM has shut the listener down
            Err(errno) => accept_failed(errno)?,
        }
    }
    Ok(())
}
