//! More clients than the queue has room for: `listen(n)` admits n + 1, and the next SYN is dropped.
//!
//! The kernel completes handshakes without us; what is complete waits in the listener's queue for
//! accept. A SYN that meets a full queue is dropped as if it were lost: TCP sends it again, about a
//! second later, and it gets in if there is room by then. Nobody is refused and nobody is told.
//!
//! ```text
//!   server   listen(1) ......................... accept ...........    TCP_INFO of the listener:
//!   client   SYN --> SYN,ACK --> ACK                |                  queue=1 backlog=1
//!   client   SYN --> SYN,ACK --> ACK                |                  queue=2 backlog=1
//!   client   SYN --> (dropped)  ... 1 s ...  SYN ---+--> SYN,ACK       queue=2 backlog=1
//! ```
//!
//! What to notice: a slow connect is all that the client sees of it; the server's kernel counts
//! TcpExtListenOverflows and TcpExtListenDrops, once for each SYN (overload.rs).
//! Break it: net.ipv4.tcp_abort_on_overflow=1: nothing changes. It is about a handshake whose last
//! ACK meets a full queue: with `--defer-accept 30` the ACK is put off until there is data.
//! Compare: emfile.rs, where accept is called and fails; rst.rs, where clients are turned away.
//! Run: cargo run --bin backlog-demo     then: cargo run --bin peer -- connect connect connect
//! See: listen(2), accept(2), tcp(7) TCP_DEFER_ACCEPT, tcp_abort_on_overflow; UNP 4.5; TLPI 56.5.1.

use std::net::TcpListener;
use std::os::fd::AsRawFd;

use anyhow::Context as _;
use clap::Parser;
use serverlab::event;
use serverlab::net::listen::{accept, bind, open, start_listening};
use serverlab::net::options::{FIONREAD, TCP_DEFER_ACCEPT, tcp_info};
use serverlab::net::{self, args::ListenAt};

/// Listens, and accepts one client for each line of standard input
#[derive(Parser)]
#[command(version)]
struct Args {
    #[command(flatten)]
    at: ListenAt,
    /// Connections that may wait for accept; the kernel admits one more
    #[arg(long, default_value_t = 1, value_name = "N",
          value_parser = clap::value_parser!(i32).range(0..))]
    backlog: i32,
    /// Let a handshake end with the client's first data, not with its ACK
    #[arg(long, value_name = "SECONDS")]
    defer_accept: Option<i32>,
}

fn main() -> net::Result {
    let args = Args::parse();
    net::event::start("backlog-demo", false);
    let listener = open(args.at.address())?;
    bind(&listener, args.at.address())?;
    if let Some(seconds) = args.defer_accept {
        TCP_DEFER_ACCEPT.set(&listener, seconds)?;
    }
    start_listening(&listener, args.backlog)?;

    let mut connections = Vec::new(); // nobody is served: a connection stays until we end
    loop {
        net::pause();
        tell_queue(&listener)?;
        let (connection, peer) = accept(&listener).context("cannot accept")?;
        // The handshake was over long before, and what the client has sent since is here as well.
        let unread = FIONREAD.get(&connection)?;
        event!("accepted", peer = peer, fd = connection.as_raw_fd(), unread = unread);
        connections.push(connection);
    }
}

/// A listener has no data to count: TCP_INFO uses two of its fields for the queue. `ss -lt` shows
/// them as Recv-Q and Send-Q.
fn tell_queue(listener: &TcpListener) -> nix::Result<()> {
    let info = tcp_info(listener)?;
    let (queue, backlog) = (info.tcpi_unacked, info.tcpi_sacked);
    event!("got", option = "TCP_INFO", queue = queue, backlog = backlog);
    Ok(())
}
