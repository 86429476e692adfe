//! Urgent data is one byte and a signal: MSG_OOB, SIGURG, SO_OOBINLINE.
//!
//! Nothing is out of band: the bytes of a send with MSG_OOB travel among the others, and the segment
//! says where the urgent ones end. To the sockets API only the last of them is urgent, and it takes
//! that one out of what recv reads.
//!
//! ```text
//!   peer   send "ab"    send "XY" MSG_OOB       send "cd"
//!   wire   1:3          3:5 URG                 5:7
//!   demo   accept --> sigaction SIGURG --> F_SETOWN --> pause ... [SIGURG] --> poll: POLLPRI
//!          sockatmark 0 --> recv "abX" --> sockatmark 1 --> recv MSG_OOB "Y" --> recv "cd"
//!          --inline: SO_OOBINLINE                       --> recv MSG_OOB EINVAL --> recv "Ycd"
//! ```
//!
//! What to notice: X was sent as urgent and is not; recv stops before the mark, though there is more
//! to read and room for it (flow_control.rs). Only one byte is kept apart: when another urgent one
//! comes, the first is an ordinary byte of the stream again (on Linux; BSD drops it).
//! Break it: leave F_SETOWN out: no signal, since the kernel does not know whom to tell.
//! Compare: boundaries.rs, the other thing that TCP does not keep. New protocols should not use it
//! (RFC 6093 5).
//! Run: cargo run --bin urgent-demo
//! then: cargo run --bin peer -- connect pause send:ab flags:oob send:XY flags:none send:cd pause
//! See: tcp(7) "Sockets API", send(2) MSG_OOB, fcntl(2) F_SETOWN, sockatmark(3); UNP 24.2, 24.3;
//! TLPI 61.13.1; RFC 6093.
#![allow(unsafe_code, reason = "installs a signal handler, and nix has no F_SETOWN")]

use std::net::TcpStream;
use std::os::fd::{AsFd, AsRawFd};

use clap::Parser;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use nix::sys::socket::{MsgFlags, recv};
use nix::unistd::getpid;
use serverlab::event;
use serverlab::net::listen::{accept_one, name};
use serverlab::net::options::{SIOCATMARK, SO_OOBINLINE};
use serverlab::net::{self, args::ListenAt, pause, script::events};

/// Takes one connection, and reads what comes around an urgent byte
#[derive(Parser)]
#[command(version)]
struct Args {
    #[command(flatten)]
    at: ListenAt,
    /// Leave the urgent byte among the others
    #[arg(long)]
    inline: bool,
}

fn main() -> net::Result {
    let args = Args::parse();
    net::event::start("urgent-demo", false);
    let connection = accept_one(args.at.address())?;
    let action = SigAction::new(SigHandler::Handler(tell), SaFlags::SA_RESTART, SigSet::empty());
    // SAFETY: the handler prints an event, which is async-signal-safe.
    unsafe { sigaction(Signal::SIGURG, &action) }?; // ignored unless handled
    // SAFETY: fcntl takes two numbers here.
    let owned = unsafe { libc::fcntl(connection.as_raw_fd(), libc::F_SETOWN, getpid().as_raw()) };
    Errno::result(owned)?;
    if args.inline {
        SO_OOBINLINE.set(&connection, 1)?; // before the byte comes
    }

    pause();
    let mut fds = [PollFd::new(connection.as_fd(), PollFlags::POLLPRI)];
    while let Err(errno) = poll(&mut fds, PollTimeout::NONE) {
        // SIGURG itself ends the wait, if it comes now: SA_RESTART is not for poll (sa_restart.rs).
        if errno != Errno::EINTR {
            return Err(errno.into());
        }
    }
    event!("polled", revents = events(fds[0].revents().map_or(0, |revents| revents.bits())));
    at_mark(&connection)?;
    read(&connection, MsgFlags::empty());
    at_mark(&connection)?;
    read(&connection, MsgFlags::MSG_OOB); // does not move on in what recv reads
    read(&connection, MsgFlags::empty());
    Ok(())
}

/// sockatmark(3), which is this ioctl.
fn at_mark(connection: &TcpStream) -> nix::Result<()> {
    event!("got", option = "SIOCATMARK", value = SIOCATMARK.get(connection)?);
    Ok(())
}

fn read(connection: &TcpStream, flags: MsgFlags) {
    let mut buffer = [0; 64];
    match recv(connection.as_raw_fd(), &mut buffer, flags) {
        Ok(n) => event!("received", bytes = n, text = String::from_utf8_lossy(&buffer[..n])),
        Err(errno) => event!("failed", call = "recv", errno = name(errno)),
    }
}

extern "C" fn tell(_: libc::c_int) {
    let errno = Errno::last_raw();
    event!("signaled", signal = "SIGURG");
    Errno::set_raw(errno);
}
