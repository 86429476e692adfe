//! A connect into silence: when the SYN is sent again, and when connect gives up with ETIMEDOUT.
//!
//! ```text
//!   seconds                   0   1   2   3   4   5   6   7        with TCP_SYNCNT 2
//!   books, Linux before 6.5   S   S       S               ETIMEDOUT
//!   Linux since 6.5           S   S   S   S   S   S       ETIMEDOUT
//! ```
//!
//! What to notice: the first SYNs follow one another by a second, not by 1, 2 and 4 seconds, and
//! TCP_SYNCNT no longer counts them (time_wait.rs): it says how long to try, as if the gaps doubled.
//! The sysctl tcp_syn_linear_timeouts tells how many gaps more are a second each: 4.
//! Break it: `--syncnt 6`, the kernel's default: over two minutes.
//! Compare: nonblocking_connect.rs, a limit of the program's own; states.rs, who does answer.
//! Run: in a network of its own, which says nothing:
//!   unshare -Urn sh -c 'ip link set lo up; nft "table t { chain c {
//!   type filter hook input priority 0; tcp dport 2000 drop; }; }"; cargo run --bin syn-retries-demo'
//! See: tcp(7) TCP_SYNCNT, tcp_syn_retries; connect(2) ETIMEDOUT; UNP 4.3; RFC 6298 5.7.

use std::os::fd::AsRawFd;
use std::time::Instant;

use clap::Parser;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrStorage, connect, socket};
use serverlab::event;
use serverlab::net::{self, args::ConnectTo, listen::name, options::TCP_SYNCNT};

/// Connects to a host that does not answer, and tells how long that took
#[derive(Parser)]
#[command(version)]
struct Args {
    #[command(flatten)]
    to: ConnectTo,
    /// TCP_SYNCNT: how often the SYN would be sent again if the seconds doubled each time
    #[arg(long, default_value_t = 2, value_name = "N")]
    syncnt: i32,
}

fn main() -> net::Result {
    let args = Args::parse();
    net::event::start("syn-retries-demo", false);
    let server = args.to.address();
    let family = if server.is_ipv6() { AddressFamily::Inet6 } else { AddressFamily::Inet };
    let socket = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    TCP_SYNCNT.set(&socket, args.syncnt)?;
    event!("set", option = "TCP_SYNCNT", value = args.syncnt);
    let began = Instant::now();
    let connected = connect(socket.as_raw_fd(), &SockaddrStorage::from(server));
    let ms = began.elapsed().as_millis();
    match connected {
        Ok(()) => event!("connected", peer = server, ms = ms),
        Err(errno) => event!("failed", call = "connect", errno = name(errno), ms = ms),
    }
    Ok(())
}
