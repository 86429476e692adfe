//! One process, many clients: `io_uring`.
//!
//! The process asks for calls, in a ring of memory it shares with the kernel, and is told, in
//! another, what they came to. One system call hands over all that is asked for, and waits.
//!
//! ```text
//!   server   ask: accept, each that comes
//!            +--> io_uring_enter --> accepted: ask: receive, whatever comes ----+
//!            ^                   +-> received: ask: send an answer -------------+
//!            ^                   +-> sent: ask: send the rest, or close --------+
//!            +------------------------------------------------------------------+
//! ```
//!
//! What to notice: with many clients, few system calls a connection (strace -c), for the same
//! packets. Accept and receive go on once asked for (multishot); idle clients hold no buffer.
//! Break it: `--bug no-rearm` overlooks that a multishot accept has ended: after one EMFILE nobody
//! is accepted again.
//! Compare: epoll.rs, which is told of readiness and calls.
//! Run: cargo run --bin io-uring-server         then: cargo run --bin client -- -c 50 -t 100
//! See: io_uring(7), io_uring_enter(2), io_uring_multishot(7), io_uring_provided_buffers(7).

use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use serverlab::event;
use serverlab::net::listen::{accept_failed, name, ran_out};
use serverlab::net::uring::{Client, Clients, Kind, Ring};
use serverlab::net::{self, connection::pace, drain, request::Ended};

fn main() -> net::Result {
    let about = "One process, many clients: io_uring";
    let args = net::args::server("io-uring-server", about, &["no-rearm"]);
    let mut ring = Ring::new().context("no io_uring (io_uring_disabled? seccomp? ulimit -l?)")?;
    let listener = net::listen(&args)?;
    drain::on_sigterm(&listener)?;
    let mut clients = Clients::default();
    let (mut accept_at, mut swept, mut draining) = (Some(Instant::now()), Instant::now(), false);
    let (mut done, mut changed) = (Vec::new(), Vec::new());
    while !draining || !clients.is_empty() {
        if !draining && accept_at.is_some_and(|at| at <= Instant::now()) {
            ring.accept(listener.as_raw_fd())?;
            accept_at = None;
        }
        let accept_in = accept_at.map(|at| at.saturating_duration_since(Instant::now()));
        let sweep_in = (!args.idle_timeout.is_zero()).then(|| pace(&args));
        ring.wait(accept_in.into_iter().chain(sweep_in).min(), &mut done)?;
        for done in done.drain(..) {
            match (done.kind, done.result) {
                (Kind::Accept, Ok(_)) => {
                    let Some(socket) = done.accepted else { continue };
                    changed.push(socket.as_raw_fd());
                    clients.insert(Client::new(socket, &args));
                }
                (Kind::Accept, Err(_)) if drain::begun() => {
                    draining = true; // EINVAL: SIGTERM has shut the listener down
                    clients.iter_mut().for_each(|client| drain::stop_receiving(client.fd()));
                }
                (Kind::Accept, Err(errno)) if ran_out(errno) => {
                    event!("accept-failed", errno = name(errno), pause_ms = 100);
                    accept_at = Some(Instant::now() + Duration::from_millis(100));
                }
                (Kind::Accept, Err(errno)) => accept_failed(errno)?,
                _ => {
                    if let Some(client) = clients.get(done.fd) {
                        client.completed(&done, &mut ring); // received, sent, cancelled
                        changed.push(done.fd);
                    }
                }
            }
            if done.kind == Kind::Accept && !done.more {
                accept_at = accept_at.or(Some(Instant::now())).filter(|_| !args.bug("no-rearm"));
            }
        }
        if sweep_in.is_some() && swept.elapsed() >= pace(&args) {
            swept = Instant::now();
            for client in clients.iter_mut().filter(|client| client.is_late(&args)) {
                client.ended = Some(Ended::TimedOut);
                changed.push(client.fd());
            }
        }
        for fd in changed.drain(..) {
            let Some(client) = clients.get(fd) else { continue };
            ask(&mut ring, fd, client)?;
            if client.is_over()
                && let Some(client) = clients.remove(fd)
            {
                event!("closed", peer = client.peer, reason = client.ended.unwrap_or(Ended::Eof));
                ring.close(client.socket)?;
            }
        }
    }
    event!("stopped");
    Ok(())
}

/// Asks for whatever comes next for this client.
fn ask(ring: &mut Ring, fd: RawFd, client: &mut Client) -> std::io::Result<()> {
    if client.ended.is_none() && !client.sending {
        match client.conversation.to_send(fd) {
            Ok(Some(bytes)) => {
                ring.send(fd, bytes)?;
                client.sending = true;
            }
            Ok(None) => {} // more must come first
            Err(ended) => client.ended = Some(ended),
        }
    }
    match (client.listens(), client.receiving) {
        (true, false) => ring.receive(fd)?,
        (false, true) => ring.cancel(Kind::Receive, fd)?, // far ahead of our answers, or over
        _ => {}
    }
    client.receiving |= client.listens();
    if client.ended.is_some() && client.sending {
        ring.cancel(Kind::Send, fd)?; // to a client that does not read
    }
    Ok(())
}
