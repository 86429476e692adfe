//! What a runner asks of an agent, and what it answers.
//!
//! One conversation is one connected Unix SOCK_SEQPACKET socket: the runner sends one [`Request`],
//! with descriptors (SCM_RIGHTS) where it says so, and the agent answers. Messages are JSON; a
//! message comes whole or not at all, so there is no framing. The end of the conversation, by
//! whichever side and for whatever reason, ends everything that came of it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::net::passing;

/// Largest message, in bytes: below what a SOCK_SEQPACKET socket takes with the kernel's default
/// buffer (net.core.wmem_default, 212992).
pub const MAX_MESSAGE: usize = 128 * 1024;

/// What a runner asks.
#[derive(Debug, Serialize, Deserialize)]
pub enum Request {
    /// Run a program. Answers: [`Reply::Spawned`], later [`Reply::Exited`] or [`Reply::Signaled`].
    Spawn(Spawn),
    /// Send a signal to the program of this conversation, if it still runs. No answer.
    Signal(i32),
    /// Open a file in the host, as /proc/net/tcp or a sysctl. Answer: [`Reply::Descriptor`].
    Open {
        /// Its path.
        path: String,
        /// Whether to open it for writing, and not for reading.
        write: bool,
    },
    /// Open sockets in the host; they stay in the host's network namespace wherever they are passed.
    /// Answer: [`Reply::Descriptor`].
    Socket {
        /// AF_ ...
        domain: i32,
        /// SOCK_ ...
        kind: i32,
        /// The protocol, in the byte order that socket(2) wants.
        protocol: i32,
        /// How many of them, up to [`passing::MAX_DESCRIPTORS`].
        count: usize,
    },
    /// Look at all that descends from a process. Answer: [`Reply::Descriptor`], of a file with a
    /// list of [`Seen`](super::procfs::Seen) as JSON.
    Descendants {
        /// The process.
        of: i32,
    },
    /// Send a signal to any process of the host. Answer: [`Reply::Ready`].
    Kill {
        /// The process.
        pid: i32,
        /// The signal.
        signal: i32,
    },
    /// End the agent when this conversation ends. Answer: [`Reply::Ready`].
    Lease,
}

/// A program to run.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Spawn {
    /// Its arguments, the name first.
    pub argv: Vec<String>,
    /// Its whole environment.
    pub environment: Vec<(String, String)>,
    /// Whether the first descriptor of the message is the executable itself (execveat(2)); if not,
    /// `argv[0]` is looked up in the host.
    pub executable: bool,
    /// The number in the program of each further descriptor of the message. All others are closed.
    pub descriptors: Vec<RawFd>,
    /// RLIMIT_NOFILE, when it shall differ from the agent's own.
    pub open_files: Option<u64>,
}

/// What an agent answers.
#[derive(Debug, Serialize, Deserialize)]
pub enum Reply {
    /// The program runs.
    Spawned {
        /// Its pid, the one that the program sees itself.
        pid: i32,
        /// The pid of its parent, which becomes the parent of all orphans that it leaves.
        keeper: i32,
    },
    /// The program has ended by exit(3) with this status.
    Exited(i32),
    /// A signal has ended the program.
    Signaled(i32),
    /// The descriptor comes with the message, or as many as were asked for.
    Descriptor,
    /// The lease is taken, the network is up, or the signal is sent.
    Ready,
    /// It could not be done.
    Failed {
        /// What was tried.
        what: String,
        /// Its errno, 0 where there is none.
        errno: i32,
    },
}

impl Reply {
    /// The answer to a call that failed.
    pub fn failed(what: impl Into<String>, error: &io::Error) -> Reply {
        Reply::Failed { what: what.into(), errno: error.raw_os_error().unwrap_or(0) }
    }
}

/// Sends one message.
///
/// # Errors
/// sendmsg(2)'s; EMSGSIZE for a message over [`MAX_MESSAGE`].
pub fn send(
    socket: impl AsFd,
    message: &impl Serialize,
    descriptors: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let message = serde_json::to_vec(message)?;
    if message.len() > MAX_MESSAGE {
        return Err(io::Error::from_raw_os_error(libc::EMSGSIZE));
    }
    passing::send(socket, &message, descriptors)
}

/// Receives one message and its descriptors; `None` at the end of the conversation.
///
/// # Errors
/// recvmsg(2)'s; `InvalidData` for a message that is not one of ours.
pub fn receive<M: DeserializeOwned>(socket: impl AsFd) -> io::Result<Option<(M, Vec<OwnedFd>)>> {
    let mut buffer = vec![0; MAX_MESSAGE];
    match passing::receive(socket, &mut buffer) {
        Ok((0, _)) => Ok(None),
        Ok((length, descriptors)) => {
            Ok(Some((serde_json::from_slice(&buffer[..length])?, descriptors)))
        }
        // A peer that died with a message of ours unread.
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(None),
        Err(error) => Err(error),
    }
}
