//! A super-server: accept, fork, and exec of a program whose standard input and output are the
//! connection.
//!
//! The server knows nothing of the protocol, the program nothing of sockets: it is a filter that
//! reads requests and writes answers. One server waits for the clients of many services that way;
//! the price is an exec for each client.
//!
//! ```text
//!   inetd    accept --> fork --> close connection --> accept ...     SIGCHLD: waitpid until none
//!                        |
//!   child                +--> dup2(connection, 0), dup2(connection, 1) --> exec PROGRAM
//!                                                                            |
//!   program                                              read(0), write(1) --+--> exit
//! ```
//!
//! What to notice: 0 and 1 of the program are one socket (the same inode in /proc/PID/fd); the other
//! descriptors are closed by exec, because they are close-on-exec. 2 is where events go. Without
//! PROGRAM it is this one again, with `--filter`, which reads requests as all servers do.
//! Break it: `--bug no-cloexec` leaves the listener open in the program: after a restart of the
//! server the port is taken for as long as any program lives.
//! Compare: fork.rs, without the exec; activated.rs, which is handed the listener instead.
//! Run: cargo run --bin inetd-server -- tr a-z A-Z      then: nc 127.0.0.1 2000
//! See: dup2(2), execve(2), fcntl(2) FD_CLOEXEC; UNP 13.5, 13.6; TLPI 60.5.
#![allow(unsafe_code, reason = "fork(2), dup2(2), and _exit(2) in the child")]

use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::unistd::{ForkResult, dup, dup2_stderr, dup2_stdin, dup2_stdout, fork};
use serverlab::event;
use serverlab::net::args::ServerArgs;
use serverlab::net::listen::{accept, accept_failed, name};
use serverlab::net::{self, children, drain, event, request};

#[derive(clap::Args)]
struct Extra {
    /// The program for each connection, and its arguments
    #[arg(trailing_var_arg = true, value_name = "PROGRAM", allow_hyphen_values = true)]
    program: Vec<String>,
    /// Be that program: serve the client at standard input and output, whose address is this
    #[arg(long, value_name = "PEER")]
    filter: Option<SocketAddr>,
}

fn main() -> net::Result {
    let about = "A super-server: a program for each connection, its standard input and output";
    let (args, extra) = net::args::server_and::<Extra>("inetd-server", about, &["no-cloexec"]);
    if let Some(peer) = extra.filter {
        return filter(peer, &args);
    }
    let listener = net::listen(&args)?;
    if args.bug("no-cloexec") {
        fcntl(&listener, FcntlArg::F_SETFD(FdFlag::empty()))?;
    }
    drain::on_sigterm(&listener)?;
    children::reap_on_sigchld()?;
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
        // SAFETY: the process has one thread, so the child may do whatever its parent might.
        match unsafe { fork() } {
            Ok(ForkResult::Child) => {
                drain::default_again()?; // a handler would not outlive exec, nor what it was told
                let error = run(&connection, peer, &extra.program);
                event!("exec-failed", error = error, peer = peer);
                // SAFETY: _exit takes a number and does not return.
                unsafe { libc::_exit(127) }
            }
            Ok(ForkResult::Parent { child }) => event!("forked", child = child, peer = peer),
            Err(errno) => event!("fork-failed", errno = name(errno), peer = peer),
        }
    } // close(2) of the parent's copy of each connection
    children::terminate();
    event!("stopped");
    Ok(())
}

/// Makes the connection 0 and 1 of this process and becomes the program. Returns if that fails.
fn run(connection: &TcpStream, peer: SocketAddr, program: &[String]) -> std::io::Error {
    let descriptors = dup2_stderr(std::io::stdout()) // 2: where our events went, and still go
        .map(|()| event::to_standard_error())
        .and_then(|()| dup2_stdin(connection)) // these copies are not close-on-exec
        .and_then(|()| dup2_stdout(connection));
    if let Err(errno) = descriptors {
        return errno.into();
    }
    match program {
        [program, arguments @ ..] => Command::new(program).args(arguments).exec(),
        [] => {
            let mut filter = Command::new("/proc/self/exe");
            filter.args(std::env::args_os().skip(1)).arg(format!("--filter={peer}")).exec()
        }
    }
}

/// The program: a filter that happens to know that its input and output are a socket.
fn filter(peer: SocketAddr, args: &ServerArgs) -> net::Result {
    event::to_standard_error();
    let connection = TcpStream::from(dup(std::io::stdin())?);
    drain::on_sigterm_alone()?;
    drain::serving(&connection);
    let ended = request::serve(&connection, args);
    event!("closed", peer = peer, reason = ended); // by exit, as everything is
    Ok(())
}
