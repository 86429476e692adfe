//! The parent accepts and passes each connection to a child: SCM_RIGHTS.
//!
//! The parent alone has the listener. It hands a connection to a child that is free, as a descriptor
//! in a message, and closes its own copy; the child says when it is free again.
//!
//! ```text
//!   parent   poll --> accept --> sendmsg(SCM_RIGHTS) --> close its copy --> poll ...
//!             ^ "free"               |
//!             | (1 byte)             v
//!   child     +-- send <-- close <-- recv, send ... <-- recvmsg <-- wait
//! ```
//!
//! What to notice: a passed descriptor is a copy, in another process, of the same connection: the
//! same inode in /proc/PID/fd, no packet, and no FIN when the parent closes (fd_passing.rs).
//! Break it: `--bug inherit-channel` lets each child keep the channels to its elder siblings, as in
//! Stevens: one descriptor more a child, and a channel has no end while any of them lives.
//! Compare: prefork_accept.rs, the same shares for half the system calls.
//! Run: cargo run --bin prefork-fdpass-server -- --assign round-robin
//! See: unix(7) SCM_RIGHTS, cmsg(3), signalfd(2); UNP 15.7, 30.9; TLPI 61.13.3.

use std::net::TcpStream;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::sys::signal::Signal;
use nix::sys::signalfd::{SfdFlags, SignalFd};
use serverlab::event;
use serverlab::net::channels::{Assign, Came, Channels};
use serverlab::net::listen::{accept, accept_failed, name};
use serverlab::net::pool::{Pool, Worker};
use serverlab::net::{self, drain, passing};

#[derive(clap::Args)]
struct Extra {
    /// Which free child gets the next connection
    #[arg(long, value_enum, default_value_t)]
    assign: Assign,
}

fn main() -> net::Result {
    let about = "The parent accepts and passes each connection to a child";
    let (args, extra) =
        net::args::server_and::<Extra>("prefork-fdpass-server", about, &["inherit-channel"]);
    let listener = net::listen(&args)?;
    drain::on_sigterm(&listener)?;
    let mut pool = Pool::new(&args)?; // blocks the signals: they come by signalfd(2)
    let signals = SignalFd::with_flags(pool.signals(), SfdFlags::SFD_NONBLOCK)?;
    let mut channels = Channels::new(args.workers.into());
    loop {
        while let Some(place) = pool.empty_place() {
            let channel = channels.open(place)?; // socketpair(2)
            let started = pool.start(place, |worker| {
                channels.close(place); // the parent's end of the child's own channel
                if !args.bug("inherit-channel") {
                    channels.close_all(); // and those of its elder siblings
                }
                serve_clients(&channel, worker)
            });
            if let Err(errno) = started {
                channels.close(place);
                event!("fork-failed", errno = name(errno), worker = place);
                break;
            }
        }
        match channels.wait(&signals, &listener)? {
            Came::Signal(Signal::SIGCHLD) => pool.reap(),
            Came::Signal(_) => break,
            Came::Nothing => {}
            Came::Client => match accept(&listener) {
                Ok((connection, peer)) => {
                    event!("accepted", peer = peer, fd = connection.as_raw_fd());
                    let message = peer.to_string();
                    while let Some((place, channel)) = channels.take_free(extra.assign) {
                        // sendmsg(2) with SCM_RIGHTS. EPIPE: the child has just died; the next one.
                        let rights = [connection.as_fd()];
                        if passing::send(channel, message.as_bytes(), &rights).is_ok() {
                            event!("passed", peer = peer, worker = place);
                            break;
                        }
                    }
                } // close(2) of the parent's copy: no FIN, the child has another
                Err(errno) => accept_failed(errno)?,
            },
        }
    }
    drain::begin(); // nobody else accepts: the parent alone is waited for by clients
    channels.close_all(); // idle children read the end
    pool.finish();
    Ok(())
}

/// A child's life.
fn serve_clients(channel: &OwnedFd, worker: &Worker<'_>) -> net::Result {
    let mut message = [0; 64];
    while !drain::begun() {
        // An empty message: the parent has closed the channel, or has died. An error: EINTR, which
        // is SIGTERM, or ECONNRESET, when it closed before it had read that we are free.
        let Ok((length @ 1.., mut descriptors)) = passing::receive(channel, &mut message) else {
            break;
        };
        let peer = std::str::from_utf8(&message[..length]).unwrap_or_default().parse();
        if let (Some(connection), Ok(peer)) = (descriptors.pop(), peer) {
            worker.serve(TcpStream::from(connection), peer);
        }
        if passing::send(channel, b"free", &[]).is_err() {
            break; // EPIPE: as above
        }
    }
    Ok(())
}
