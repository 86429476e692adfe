//! Descriptors between processes: `SCM_RIGHTS` over a Unix SOCK_SEQPACKET socket.
//!
//! A passed descriptor is a dup(2) into another process: the receiver has a number of its own for
//! the same open file. A message of SOCK_SEQPACKET comes whole or not at all, and the end of the
//! sender as an empty read (unix(7); UNP 15.7; TLPI 61.13.3).
#![allow(unsafe_code, reason = "takes ownership of the descriptors that the kernel has made")]

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, sendmsg, socketpair,
};

use crate::net::drain;

/// Most descriptors in one message: SCM_MAX_FD in the kernel (unix(7)).
pub const MAX_DESCRIPTORS: usize = 253;

/// A pair of connected sockets that keep messages apart. Both are close-on-exec.
///
/// # Errors
/// socketpair(2)'s.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?)
}

/// Sends a message and descriptors with it. The message must not be empty: to the receiver an
/// empty one is the end.
///
/// # Errors
/// sendmsg(2)'s: EPIPE when the receiver is gone, EMSGSIZE when the message is larger than the
/// socket's buffer, ETOOMANYREFS when too many descriptors are under way.
pub fn send(socket: impl AsFd, message: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    let raw: Vec<RawFd> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control = if raw.is_empty() { &[] } else { &rights[..] };
    let parts = [IoSlice::new(message)];
    loop {
        let flags = MsgFlags::MSG_NOSIGNAL;
        match sendmsg::<()>(socket.as_fd().as_raw_fd(), &parts, control, flags, None) {
            Ok(_) => return Ok(()),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Receives a message into `buffer`: its length, 0 when the sender is gone, and the descriptors
/// that came with it, close-on-exec.
///
/// # Errors
/// recvmsg(2)'s; `InvalidData` when the message or its descriptors did not fit (MSG_TRUNC,
/// MSG_CTRUNC; so it is too when this process may open no more), and the descriptors that did come
/// are closed; `Interrupted` once SIGTERM has come.
pub fn receive(socket: impl AsFd, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = receive_with_room(socket, buffer, MAX_DESCRIPTORS, flags)?;
    if message.truncated {
        let what = "a message or its descriptors did not fit the receiver's buffer";
        return Err(io::Error::new(io::ErrorKind::InvalidData, what));
    }
    Ok((message.length, message.descriptors))
}

/// A message, or what there was room for.
#[derive(Debug)]
pub struct Message {
    /// How many bytes have come; 0 when the sender is gone.
    pub length: usize,
    /// The descriptors that have come; close-on-exec, if MSG_CMSG_CLOEXEC was asked for.
    pub descriptors: Vec<OwnedFd>,
    /// Whether there was more (MSG_TRUNC, MSG_CTRUNC). The kernel has closed those descriptors.
    pub truncated: bool,
}

/// As [`receive`], with room for so many descriptors (one more where 8 bytes hold two) and these
/// flags, and what does not fit is no error. By libc: nix does not tell of the descriptors that have
/// come when others have not, and nobody could close them.
///
/// # Errors
/// recvmsg(2)'s; `Interrupted` once SIGTERM has come.
pub fn receive_with_room(
    socket: impl AsFd,
    buffer: &mut [u8],
    room: usize,
    flags: MsgFlags,
) -> io::Result<Message> {
    // SAFETY: arithmetic only.
    let space = unsafe { libc::CMSG_SPACE((room * size_of::<RawFd>()) as u32) } as usize;
    let mut control = vec![0u64; space.div_ceil(size_of::<u64>())]; // aligned as a cmsghdr must be
    let mut part = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // SAFETY: all fields of msghdr are integers or pointers, for which zero is a value.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    (header.msg_iov, header.msg_iovlen) = (&raw mut part, 1);
    (header.msg_control, header.msg_controllen) = (control.as_mut_ptr().cast(), space);
    let length = loop {
        let (socket, flags) = (socket.as_fd().as_raw_fd(), flags.bits());
        // SAFETY: the header's pointers and lengths are those of `buffer` and `control`.
        match Errno::result(unsafe { libc::recvmsg(socket, &raw mut header, flags) }) {
            Ok(length) => break length as usize,
            Err(Errno::EINTR) if !drain::begun() => {}
            Err(errno) => return Err(errno.into()),
        }
    };
    let truncated = header.msg_flags & (libc::MSG_TRUNC | libc::MSG_CTRUNC) != 0;
    Ok(Message { length, descriptors: rights(&header), truncated })
}

/// The descriptors in the control messages that recvmsg(2) has filled in.
fn rights(header: &libc::msghdr) -> Vec<OwnedFd> {
    let mut descriptors = Vec::new();
    // SAFETY: the kernel has filled in the header; here and below the macros stay within it.
    let mut at = unsafe { libc::CMSG_FIRSTHDR(header) };
    // SAFETY: not null, so it points to a whole cmsghdr.
    while let Some(control) = unsafe { at.as_ref() } {
        if (control.cmsg_level, control.cmsg_type) == (libc::SOL_SOCKET, libc::SCM_RIGHTS) {
            // SAFETY: arithmetic only.
            let bytes = control.cmsg_len - unsafe { libc::CMSG_LEN(0) } as usize;
            // SAFETY: see above.
            let data = unsafe { libc::CMSG_DATA(at) }.cast::<RawFd>();
            for index in 0..bytes / size_of::<RawFd>() {
                // SAFETY: within the bytes that the kernel says it has filled in.
                let number = unsafe { data.add(index) };
                // SAFETY: as above.
                let number = unsafe { number.read_unaligned() };
                // SAFETY: the kernel has made this descriptor for us in this very call.
                descriptors.push(unsafe { OwnedFd::from_raw_fd(number) });
            }
        }
        // SAFETY: see above.
        at = unsafe { libc::CMSG_NXTHDR(header, at) };
    }
    descriptors
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_passed_descriptor_is_the_same_open_file() {
        let (left, right) = pair().unwrap();
        let file = tempfile::tempfile().unwrap();
        send(&left, b"take it", &[file.as_fd()]).unwrap();
        let mut buffer = [0; 16];
        let (length, descriptors) = receive(&right, &mut buffer).unwrap();
        assert_eq!(&buffer[..length], b"take it");
        let identity = |fd: BorrowedFd<'_>| nix::sys::stat::fstat(fd).map(|s| (s.st_dev, s.st_ino));
        assert_eq!(identity(descriptors[0].as_fd()), identity(file.as_fd()));
        assert_ne!(descriptors[0].as_raw_fd(), file.as_raw_fd());
    }

    #[test]
    fn the_end_of_the_sender_is_an_empty_message() {
        let (left, right) = pair().unwrap();
        drop(left);
        assert_eq!(receive(&right, &mut [0; 16]).unwrap().0, 0);
    }

    #[test]
    fn a_message_that_does_not_fit_is_an_error_and_leaks_nothing() {
        let (left, right) = pair().unwrap();
        send(&left, b"too long", &[left.as_fd()]).unwrap();
        let error = receive(&right, &mut [0; 2]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }

    #[test]
    fn descriptors_beyond_the_room_are_closed_and_the_others_owned() {
        let (left, right) = pair().unwrap();
        let (ends, others): (Vec<_>, Vec<_>) = (0..5).map(|_| pair().unwrap()).unzip();
        send(&left, b"five", &ends.iter().map(AsFd::as_fd).collect::<Vec<_>>()).unwrap();
        drop(ends);
        let message = receive_with_room(&right, &mut [0; 16], 1, MsgFlags::empty()).unwrap();
        assert!(message.truncated);
        assert_eq!((message.length, message.descriptors.len()), (4, 2));
        assert_eq!(receive(&others[2], &mut [0; 1]).unwrap().0, 0, "the third was closed");
        drop(message);
        assert_eq!(receive(&others[1], &mut [0; 1]).unwrap().0, 0, "so is the second now");
    }
}
