//! TCP carries bytes, not messages: two sends may be one recv, one send two; a delimiter cures it.
//!
//! A receiver that takes each recv for a message works on an idle network with a quick reader, and
//! fails as soon as it reads late, or a message is longer than its buffer or a segment.
//!
//! ```text
//!   peer   send "10\n"   send "24\n"            send "hello, world\n"
//!   wire   1:4           4:7                    7:20                        a segment each
//!   demo   accept --> pause --> recv "10\n24\n"     recv "hello, w", recv "orld\n"
//!
//!   --framing recv        messages "10\n24\n", "hello, w", "orld\n"
//!   --framing delimiter   messages "10", "24", "hello, world"
//! ```
//!
//! What to notice: the calls, their results and the segments are the same with the delimiter; only
//! the program's idea of a message differs: it keeps what is not complete (flow_control.rs).
//! Break it: have `peer` end with `send:half` and no newline: what does `closed` say?
//! Compare: net/request.rs, how the servers here find the end of a request, with a limit to its
//! length; servers' `--framing segment`, the mistake; SOCK_SEQPACKET in unix(7) keeps messages apart.
//! Run: cargo run --bin boundaries-demo -- --framing recv
//! then: cargo run --bin peer -- connect nodelay:on 'send:10\n' 'send:24\n' pause 'send:hello, world\n'
//! See: recv(2), tcp(7); UNP 3.9, 5.18; TLPI 44.1; RFC 9293 2.2.

use std::os::fd::AsRawFd;

use clap::{Parser, ValueEnum};
use nix::sys::socket::{MsgFlags, recv};
use serverlab::event;
use serverlab::net::{self, args::ListenAt, listen::accept_one, pause};

/// Takes one connection and tells what it takes for messages
#[derive(Parser)]
#[command(version)]
struct Args {
    #[command(flatten)]
    at: ListenAt,
    /// What is a message: what a recv returns, or what ends with a newline
    #[arg(long, value_enum, default_value = "delimiter")]
    framing: Framing,
    /// The most that one recv takes
    #[arg(long, default_value_t = 8, value_name = "BYTES")]
    buffer: usize,
}

#[derive(ValueEnum, Clone, Copy)]
enum Framing {
    Recv,
    Delimiter,
}

fn main() -> net::Result {
    let args = Args::parse();
    net::event::start("boundaries-demo", false);
    let connection = accept_one(args.at.address())?;
    let (mut buffer, mut kept) = (vec![0; args.buffer], Vec::new());
    pause(); // the reader is late
    loop {
        let count = recv(connection.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
        event!("received", bytes = count);
        if count == 0 {
            break;
        }
        kept.extend_from_slice(&buffer[..count]);
        match args.framing {
            Framing::Recv => tell(&std::mem::take(&mut kept)),
            Framing::Delimiter => {
                while let Some(newline) = kept.iter().position(|byte| *byte == b'\n') {
                    let rest = kept.split_off(newline + 1); // it belongs to the next message
                    tell(&kept[..newline]);
                    kept = rest;
                }
            }
        }
    }
    event!("closed", unfinished = kept.len());
    Ok(())
}

fn tell(message: &[u8]) {
    event!("got", message = String::from_utf8_lossy(message));
}
