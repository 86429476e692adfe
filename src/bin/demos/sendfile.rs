//! A file to a client, five ways: read and write, sendfile, splice, mmap, MSG_ZEROCOPY.
//!
//! ```text
//!   read-write   read(file, buffer) --> send(buffer) --> ...     each byte copied twice
//!   sendfile     sendfile(file --> socket)                       pages, not bytes; one call
//!   splice       splice(file --> pipe) --> splice(pipe --> socket) --> ...
//!   mmap         mmap(file) --> send(the mapping)                copied once, by page faults
//!   zerocopy     send(buffer, MSG_ZEROCOPY) --> completion on the error queue
//! ```
//!
//! What to notice: the client gets the same bytes (the checksum says so); the calls differ by
//! orders. A completion says whether the kernel copied after all, which on veth and loopback it
//! always does (sendfile.rs in tests).
//! Break it: `--truncate 1000` cuts the file after its length was announced: sendfile, splice and
//! read then end early and say so; a mapping sends zeros to the page's end, or fails with EFAULT.
//! Compare: cork.rs: `--head 100` goes in the file's first segment only with `--more`.
//! Run: cargo run --bin sendfile-demo -- --how splice    then: cargo run --bin peer -- connect recv-all
//! See: sendfile(2), splice(2), mmap(2), send(2) MSG_MORE, tcp(7); TLPI 61.4, 49.4.
#![allow(unsafe_code, reason = "maps a file into memory, and sends from there")]

use std::os::fd::AsRawFd;

use clap::{Parser, ValueEnum};
use nix::errno::Errno;
use nix::fcntl::{OFlag, SpliceFFlags, splice};
use nix::sys::mman::{MapFlags, ProtFlags, mmap};
use nix::sys::sendfile::sendfile;
use nix::sys::socket::sockopt::TcpNoDelay;
use nix::sys::socket::{MsgFlags, send, setsockopt};
use nix::unistd::{pipe2, read};
use serverlab::event;
use serverlab::net::options::{MSG_MORE, MSG_ZEROCOPY, SO_ZEROCOPY};
use serverlab::net::zerocopy::{self, Completion};
use serverlab::net::{self, args::ListenAt, listen::accept_one, listen::name, sample};

/// Sends a file to one client and counts the system calls
#[derive(Parser)]
struct Args {
    #[command(flatten)]
    at: ListenAt,
    #[arg(long, value_enum, default_value = "sendfile")]
    how: How,
    /// Length of the file
    #[arg(long, default_value_t = 262_144, value_name = "BYTES")]
    bytes: usize,
    /// Length of a head that is sent before the file
    #[arg(long, default_value_t = 0)]
    head: usize,
    /// Send the head with MSG_MORE
    #[arg(long)]
    more: bool,
    /// Cut the file to this length before it is sent
    #[arg(long)]
    truncate: Option<u64>,
}

#[rustfmt::skip]
#[derive(ValueEnum, Clone, Copy, PartialEq)]
enum How { ReadWrite, Sendfile, Splice, Mmap, Zerocopy }

fn main() -> net::Result {
    let args = Args::parse();
    net::event::start("sendfile-demo", false);
    let file = sample::file(args.bytes)?;
    let checksum = format!("{:016x}", sample::checksum(&sample::bytes(args.bytes)));
    event!("opened", bytes = args.bytes, checksum = checksum);
    let bytes = if args.how == How::Zerocopy { sample::bytes(args.bytes) } else { Vec::new() };
    let socket = accept_one(args.at.address())?;
    let fd = socket.as_raw_fd();
    setsockopt(&socket, TcpNoDelay, &true)?; // segments as the calls make them
    SO_ZEROCOPY.set(&socket, (args.how == How::Zerocopy).into())?;
    let more = if args.more { MSG_MORE } else { MsgFlags::empty() };
    event!("sent", head = send(fd, &vec![b'h'; args.head], more)?); // no bytes, no segment
    let length = args.bytes.try_into().map_err(|_| Errno::EINVAL)?;
    let (protection, flags) = (ProtFlags::PROT_READ, MapFlags::MAP_SHARED);
    // SAFETY: a new mapping at an address of the kernel's choice touches no other memory.
    let mapping = unsafe { mmap(None, length, protection, flags, &file, 0) }?.as_ptr();
    if let Some(length) = args.truncate {
        file.set_len(length)?;
    }
    let (mut buffer, pipe) = (vec![0; 65536], pipe2(OFlag::O_CLOEXEC)?);
    let (mut sent, mut calls, mut completed) = (0, 0, 0);
    while sent < args.bytes {
        let left = args.bytes - sent;
        calls += 1;
        let moved = match args.how {
            How::Sendfile => sendfile(&socket, &file, None, left), // 0 at the file's end
            How::ReadWrite => read(&file, &mut buffer).and_then(|count| {
                calls += 1;
                // A blocking send takes all, unless a signal handler runs; there is none here.
                send(fd, &buffer[..count], MsgFlags::MSG_NOSIGNAL)
            }),
            How::Splice => {
                let (flags, room) = (SpliceFFlags::empty(), left.min(65536));
                splice(&file, None, &pipe.1, None, room, flags).and_then(|count| {
                    calls += 1; // this one, too, moves all before it returns
                    splice(&pipe.0, None, &socket, None, count, flags)
                })
            }
            How::Mmap => {
                // SAFETY: the kernel reads the mapping for us. Where it has no page, it stops or
                // says EFAULT; if we touched it ourselves, that would be SIGBUS.
                let sent = unsafe { libc::send(fd, mapping.wrapping_byte_add(sent), left, 0) };
                Errno::result(sent).map(isize::cast_unsigned)
            }
            How::Zerocopy => send(fd, &bytes[sent..], MSG_ZEROCOPY),
        };
        let _ = moved.inspect_err(|errno| event!("failed", call = "send", errno = name(*errno)));
        let Ok(1..) = moved else { break };
        sent += moved.unwrap_or(0);
    }
    event!("sent", bytes = sent, missing = args.bytes - sent, calls = calls);
    while args.how == How::Zerocopy && completed < calls {
        let Completion { sends, copied } = zerocopy::completion(&socket)?;
        event!("completed", sends = sends, copied = copied); // until now `bytes` was the kernel's
        completed += sends;
    }
    Ok(())
}
