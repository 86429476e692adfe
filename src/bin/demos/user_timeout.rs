//! How long TCP sends again into a black hole: TCP_USER_TIMEOUT, or a quarter of an hour.
//!
//! What is sent and not acknowledged is sent again, each time after twice as long, but never more
//! than two minutes: 15 times (net.ipv4.tcp_retries2), about 15 minutes. TCP_USER_TIMEOUT says in
//! milliseconds how long data may stay unacknowledged before the connection is given up.
//!
//! ```text
//!   client   connect --> TCP_USER_TIMEOUT=1000 --> send: 5 --> poll ... POLLERR --> SO_ERROR
//!   wire     5 bytes --- 0.2 s --- again --- 0.4 s --- again --- ... 1 s: no more    ETIMEDOUT
//!   firewall (drops all that comes from the client)
//! ```
//!
//! What to notice: send succeeds, since it only fills a buffer; the error comes to whoever asks
//! later. The option does nothing for an idle connection, which has no data to wait for
//! (dead_peer.rs).
//! Break it: `--timeout 0`, as without the option: poll waits for a quarter of an hour.
//! Compare: keepalive.rs, for a connection that is silent.
//! Run: cargo run --bin peer -- listen accept pause   then: cargo run --bin user-timeout-demo
//!      sudo nft 'add table t; add chain t c { type filter hook input priority 0; }; \
//!      add rule t c tcp dport 2000 drop'   then Enter; at the end: sudo nft delete table t
//! See: tcp(7) TCP_USER_TIMEOUT, tcp_retries2; RFC 5482; RFC 9293 3.8.3; RFC 6298 5.

use std::net::TcpStream;
use std::os::fd::{AsFd, AsRawFd};
use std::time::Instant;

use anyhow::Context as _;
use clap::Parser;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, getsockopt, send, sockopt::SocketError};
use serverlab::event;
use serverlab::net::options::{TCP_USER_TIMEOUT, tcp_info};
use serverlab::net::script::events;
use serverlab::net::{self, args::ConnectTo, listen::name};

/// Connects, and sends to a peer that may be out of reach
#[derive(Parser)]
#[command(version)]
struct Args {
    #[command(flatten)]
    to: ConnectTo,
    /// How long data may stay unacknowledged; 0 leaves it to the system
    #[arg(long, default_value_t = 1000, value_name = "MILLISECONDS")]
    timeout: i32,
}

fn main() -> net::Result {
    let args = Args::parse();
    net::event::start("user-timeout-demo", false);
    let connection = TcpStream::connect(args.to.address()).context("cannot connect")?;
    event!("connected", peer = args.to.address());
    TCP_USER_TIMEOUT.set(&connection, args.timeout)?;
    event!("set", option = "TCP_USER_TIMEOUT", value = args.timeout);
    net::pause(); // time to cut the line

    let (fd, began) = (connection.as_raw_fd(), Instant::now());
    event!("sent", bytes = send(fd, b"hello", MsgFlags::MSG_NOSIGNAL)?);
    // Asked for no event at all, poll tells of an error: here the end of TCP's patience.
    let mut fds = [PollFd::new(connection.as_fd(), PollFlags::empty())];
    poll(&mut fds, PollTimeout::NONE)?;
    let revents = events(fds[0].revents().map_or(0, |revents| revents.bits()));
    event!("polled", revents = revents, ms = began.elapsed().as_millis());

    let error = Errno::from_raw(getsockopt(&connection, SocketError)?); // and takes it away
    event!(
        "so-error",
        errno = name(error),
        retransmits = tcp_info(&connection)?.tcpi_total_retrans
    );
    match send(fd, b"hello", MsgFlags::MSG_NOSIGNAL) {
        Ok(bytes) => event!("sent", bytes = bytes),
        Err(errno) => event!("failed", call = "send", errno = name(errno)),
    }
    Ok(())
}
