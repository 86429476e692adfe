//! Completions of MSG_ZEROCOPY: messages on the socket's error queue (Documentation/networking/
//! msg_zerocopy.rst in the kernel's source).

use std::os::fd::{AsFd, AsRawFd};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg};

/// linux/errqueue.h: the kernel copied after all.
const CODE_COPIED: u8 = 1;

/// What has become of sends: a range of their numbers, counted from 0.
#[derive(Clone, Copy, Debug)]
pub struct Completion {
    /// How many sends it is about.
    pub sends: u32,
    /// Whether the kernel copied their bytes, and the caller paid for zero copies and got one.
    pub copied: bool,
}

/// Waits for the next completion.
///
/// # Errors
/// poll(2)'s, recvmsg(2)'s; EPROTO if what stands in the queue is something else.
pub fn completion(socket: impl AsFd) -> nix::Result<Completion> {
    let socket = socket.as_fd();
    // POLLERR needs no asking for: it is always told.
    poll(&mut [PollFd::new(socket, PollFlags::empty())], PollTimeout::NONE)?;
    let mut space = nix::cmsg_space!(libc::sock_extended_err, libc::sockaddr_in6);
    let flags = MsgFlags::MSG_ERRQUEUE;
    let message = recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut [], Some(&mut space), flags)?;
    for control in message.cmsgs()? {
        if let ControlMessageOwned::Ipv4RecvErr(error, _)
        | ControlMessageOwned::Ipv6RecvErr(error, _) = control
        {
            let sends = error.ee_data.wrapping_sub(error.ee_info).wrapping_add(1);
            return Ok(Completion { sends, copied: error.ee_code == CODE_COPIED });
        }
    }
    Err(Errno::EPROTO)
}
