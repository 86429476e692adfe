//! A server that is given its listener: LISTEN_FDS.
//!
//! Whoever starts it (systemd calls it socket activation) has made the listener, passes it as
//! descriptor 3, and keeps it: clients may connect before the server runs, while it starts again,
//! and after it has died; they wait in a queue that is not the server's.
//!
//! ```text
//!   starter   socket, bind, listen --> fork --> LISTEN_PID, LISTEN_FDS=1, exec   (keeps the listener)
//!                                                 |
//!   server                                        +--> accept(3) --> recv, send ... --> close --+
//!                                                      ^                                        |
//!                                                      +----------------------------------------+
//! ```
//!
//! What to notice: the same inode of the listener before and after a restart, and no client refused
//! or reset (hot_restart.rs). LISTEN_PID says whom the variables are for: a child of the server
//! inherits them, but not the right to believe them.
//! Break it: `--bug shut-down-listener` drains as servers do that own their listener: shutdown acts
//! on the socket, not on the descriptor, so the starter's is dead too, and its queue reset.
//! Compare: iterative.rs, which makes its own; inetd.rs, which hands out connections.
//! Run: systemd-socket-activate -l 2000 target/*/debug/activated-server
//! See: sd_listen_fds(3), environ(7), getsockname(2); UNP 13.5; TLPI 60.5.
#![allow(unsafe_code, reason = "takes ownership of descriptor 3")]

use std::net::TcpListener;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd};

use anyhow::{Context as _, ensure};
use nix::errno::Errno;
use nix::sys::socket::{getsockopt, sockopt::AcceptConn};
use serverlab::event;
use serverlab::net::listen::{accept, accept_failed};
use serverlab::net::{self, drain, request::serve};

fn main() -> net::Result {
    let about = "A server that is given its listener: LISTEN_FDS";
    let args = net::args::server("activated-server", about, &["shut-down-listener"]);
    let listener = inherited()?;
    listener.set_nonblocking(false)?; // the starter may have waited for it with poll
    event!("listening", address = listener.local_addr()?, inherited = listener.as_raw_fd());
    if args.bug("shut-down-listener") {
        drain::on_sigterm(&listener)?;
    } else {
        drain::on_sigterm_alone()?; // the listener is another's
    }
    while !drain::begun() {
        let (connection, peer) = match accept(&listener) {
            Ok(accepted) => accepted,
            Err(Errno::EINVAL) => break, // somebody has shut it down
            Err(errno) => {
                accept_failed(errno)?; // EINTR: SIGTERM
                continue;
            }
        };
        event!("accepted", peer = peer, fd = connection.as_raw_fd());
        drain::serving(&connection);
        let ended = serve(&connection, &args);
        drain::served(&connection);
        drop(connection);
        event!("closed", peer = peer, reason = ended);
    }
    event!("stopped");
    Ok(())
}

/// The listener at descriptor 3, if the environment says that it is for this process.
fn inherited() -> anyhow::Result<TcpListener> {
    let number = |name: &str| {
        let value =
            std::env::var(name).with_context(|| format!("no listener was passed: {name}"))?;
        value.parse::<i32>().with_context(|| format!("{name}={value}"))
    };
    let (pid, count) = (number("LISTEN_PID")?, number("LISTEN_FDS")?);
    let own = nix::unistd::getpid().as_raw();
    ensure!(pid == own, "the listener is for another process: LISTEN_PID={pid}, and this is {own}");
    ensure!(count == 1, "one listener is needed, and LISTEN_FDS={count}");
    // SAFETY: 3 is looked at and no more; if it is not open, the call says EBADF.
    let passed = unsafe { BorrowedFd::borrow_raw(3) };
    let listening = getsockopt(&passed, AcceptConn).context("descriptor 3 is not a socket")?;
    ensure!(listening, "descriptor 3 is a socket that does not listen");
    // SAFETY: LISTEN_FDS says that 3 was passed for us to own.
    Ok(unsafe { TcpListener::from_raw_fd(3) })
}
