//! One client at a time: `accept`, serve, `close`.
//!
//! The same process accepts and serves. While it serves one client, the kernel goes on without it:
//! it completes the handshakes of the next ones, acknowledges what they send, and keeps them in
//! the listener's queue.
//!
//! ```text
//!   server   socket --> bind --> listen --> accept --> recv, send ... --> close --+
//!                                             ^                                   |
//!                                             +-----------------------------------+
//! ```
//!
//! What to notice: the second client's connect and write succeed at once, yet its answer comes only
//! after the first client has closed. A client that says nothing stops the service.
//! Break it: `--bug leak-connection` forgets the close; no client ever sees a FIN.
//! Compare: fork.rs, where a silent client holds up nobody else.
//! Run: cargo run --bin iterative-server        then: cargo run --bin client -- -c 5
//! See: accept(2), listen(2), shutdown(2); UNP 30.2, 4.6; TLPI 60.1.

use std::os::fd::AsRawFd;

use nix::errno::Errno;
use serverlab::event;
use serverlab::net::{self, drain, listen::accept, listen::accept_failed, request::serve};

fn main() -> net::Result {
    let args = net::args::server("iterative-server", "One client at a time", &["leak-connection"]);
    let listener = net::listen(&args)?;
    drain::on_sigterm(&listener)?;
    while !drain::begun() {
        let (connection, peer) = match accept(&listener) {
            Ok(accepted) => accepted,
            Err(Errno::EINVAL) => break, // SIGTERM has shut the listener down
            Err(errno) => {
                accept_failed(errno)?;
                continue;
            }
        };
        event!("accepted", peer = peer, fd = connection.as_raw_fd());
        drain::serving(&connection);
        let ended = serve(&connection, &args);
        drain::served(&connection);
        if args.bug("leak-connection") {
            std::mem::forget(connection);
        } else {
            drop(connection); // close(2): the last reference is gone, so TCP sends its FIN
        }
        event!("closed", peer = peer, reason = ended);
    }
    event!("stopped");
    Ok(())
}
