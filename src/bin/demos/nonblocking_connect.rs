//! A connect that does not wait: EINPROGRESS, poll for writing, then SO_ERROR, once.
//!
//! How a client bounds the time that a connect may take, or makes many at once. A blocking connect
//! waits as long as the kernel repeats the SYN, which may be two minutes.
//!
//! ```text
//!   socket(SOCK_NONBLOCK) --> connect: EINPROGRESS --> poll(POLLOUT, timeout)
//!                                                       |
//!     the server accepts   <-- out                    --+--> SO_ERROR: 0
//!     nobody listens       <-- out, err, hup          --+--> SO_ERROR: ECONNREFUSED, then 0
//!     nothing answers      <-- none, after timeout    --+--> close: the kernel gives up the SYN
//! ```
//!
//! What to notice: a socket whose connect has failed is writable, too: poll tells that it is over,
//! and SO_ERROR how (states.rs). Reading SO_ERROR clears it: who reads it twice takes a failure for
//! a success, and so does who does not read it at all.
//! Break it: without SOCK_NONBLOCK connect itself fails, with ECONNREFUSED, and SO_ERROR is 0.
//! Compare: syn_retries.rs, how long a blocking connect waits; servers/epoll.rs for the other end.
//! Run: cargo run --bin nonblocking-connect-demo   with and without: cargo run --bin fork-server
//! See: connect(2) EINPROGRESS, poll(2), socket(7) SO_ERROR; UNP 16.3-16.4.

use std::os::fd::{AsFd, AsRawFd};

use clap::Parser;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrStorage, connect, socket};
use serverlab::event;
use serverlab::net::{self, args::ConnectTo, listen::name, options::SO_ERROR, script::events};

/// Connects without waiting, then waits for no longer than it was told to
#[derive(Parser)]
#[command(version)]
struct Args {
    #[command(flatten)]
    to: ConnectTo,
    /// How long to wait for an answer
    #[arg(long, default_value_t = 5000, value_name = "MILLISECONDS")]
    timeout: u16,
}

fn main() -> net::Result {
    let args = Args::parse();
    net::event::start("nonblocking-connect-demo", false);
    let server = args.to.address();
    let family = if server.is_ipv6() { AddressFamily::Inet6 } else { AddressFamily::Inet };
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(family, SockType::Stream, flags, None)?;

    // 1. The SYN is sent before connect returns; the answer, if it were there, is not looked at.
    match connect(socket.as_raw_fd(), &SockaddrStorage::from(server)) {
        Ok(()) => event!("connected", peer = server), // other systems do so on loopback
        Err(errno) => event!("failed", call = "connect", errno = name(errno)),
    }

    // 2. Wait for the end of it, well or ill. A signal would end the wait too: EINTR.
    let mut wanted = [PollFd::new(socket.as_fd(), PollFlags::POLLOUT)];
    let ready = poll(&mut wanted, PollTimeout::from(args.timeout))?;
    let revents = wanted[0].revents().unwrap_or(PollFlags::empty());
    event!("polled", revents = events(revents.bits()));
    if ready == 0 {
        event!("closed", reason = "no answer in time");
        return Ok(()); // closes the socket
    }

    // 3. Ask which. The second time is to show that the first has taken the error away.
    for _ in 0..2 {
        match SO_ERROR.get(&socket)? {
            0 => event!("got", option = "SO_ERROR", value = 0),
            error => {
                let errno = name(Errno::from_raw(error));
                event!("got", option = "SO_ERROR", value = error, errno = errno);
            }
        }
    }
    Ok(())
}
