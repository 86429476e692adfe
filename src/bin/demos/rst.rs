//! Each connection ends with a RST: SO_LINGER{1,0}, then `close`.
//!
//! A close that lingers for no time throws away what is not sent yet and aborts: TCP sends one RST
//! where an ordinary close sends a FIN, and keeps no TIME_WAIT.
//!
//! ```text
//!   server   accept --> setsockopt SO_LINGER{1,0} --> close --> accept ...
//!                                                       |
//!   wire                                                +--> RST, ACK          (no FIN)
//! ```
//!
//! What to notice: the client's connect succeeds; its first recv fails with ECONNRESET, the next
//! returns 0 and every send fails with EPIPE: the reset is reported once (rst_packet.rs). The
//! kernel counts TcpExtTCPAbortOnData and TcpOutRsts.
//! Break it: `--bug plain-close` leaves the option out; the capture shows FINs instead.
//! Compare: peer.rs, with which the other ways to a RST are scripted: unread data, a closed port, a
//! listener closed with clients in its queue.
//! Run: cargo run --bin rst-server              then: cargo run --bin peer -- connect recv recv send:1
//! See: socket(7) SO_LINGER, tcp(7); UNP 5.11, 7.5; TLPI 61.6.6; RFC 9293 3.10.4.

use std::os::fd::AsRawFd;

use nix::errno::Errno;
use nix::sys::socket::{setsockopt, sockopt::Linger};
use serverlab::event;
use serverlab::net::listen::{accept, accept_failed, name};
use serverlab::net::{self, drain};

fn main() -> net::Result {
    let about = "Each connection ends with a RST: SO_LINGER{1,0}, then close";
    let args = net::args::server("rst-server", about, &["plain-close"]);
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
        if !args.bug("plain-close") {
            let at_once = libc::linger { l_onoff: 1, l_linger: 0 };
            if let Err(errno) = setsockopt(&connection, Linger, &at_once) {
                event!("failed", call = "setsockopt", errno = name(errno));
            }
        }
        drop(connection); // close(2): the RST is on its way before the call returns
        event!("closed", peer = peer, reason = "linger-0");
    }
    event!("stopped");
    Ok(())
}
