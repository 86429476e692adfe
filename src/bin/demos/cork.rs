//! Small writes as few segments: TCP_CORK, MSG_MORE, writev, and what happens to a forgotten cork.
//!
//! A server that sends a head, a body and a tail by three calls sends three segments, unless it
//! tells the kernel that more is to come.
//!
//! ```text
//!   nodelay    send --> send --> send                                      3 segments
//!   cork       TCP_CORK=1 --> send --> send --> send --> TCP_CORK=0        1, at the uncork
//!   more       send MSG_MORE --> send MSG_MORE --> send                    1, at the last send
//!   writev     writev(head, body, tail)                                    1
//!   forgotten  TCP_CORK=1 --> send --> send --> send                       1, 200 ms later
//!   close      TCP_CORK=1 --> send --> send --> send --> close             1, and it is the FIN, too
//! ```
//!
//! What to notice: a cork holds back only what does not fill a segment, and for 200 ms at most; a
//! close does not wait for it. `--how plain` is not always three segments, nor ever surely one:
//! Nagle's algorithm holds a small segment while another is not acknowledged (tcp_cork.rs).
//! Break it: `--pieces 100,4000` with cork and with nodelay: who sends the short segment, and when?
//! Compare: nagle.rs, where holding back hurts; sendfile.rs, a head before a file.
//! Run: cargo run --bin cork-demo -- --how cork    then: cargo run --bin peer -- connect recv-all
//! See: tcp(7) TCP_CORK, TCP_NODELAY; send(2) MSG_MORE; writev(2); TLPI 61.4; UNP 7.9, 14.4.

use std::io::IoSlice;
use std::net::TcpStream;
use std::os::fd::AsRawFd;

use clap::{Parser, ValueEnum};
use nix::sys::socket::sockopt::TcpNoDelay;
use nix::sys::socket::{MsgFlags, recv, send, setsockopt};
use nix::sys::uio::writev;
use serverlab::event;
use serverlab::net::options::{MSG_MORE, TCP_CORK, tcp_info};
use serverlab::net::{self, args::ListenAt, listen::accept_one};

/// Sends a head, a body and a tail to one client, as segments that depend on how it is done
#[derive(Parser)]
#[command(version)]
struct Args {
    #[command(flatten)]
    at: ListenAt,
    /// How to send the pieces
    #[arg(long, value_enum, default_value = "cork")]
    how: How,
    /// The length of each piece
    #[arg(long, value_delimiter = ',', default_value = "100,200,300", value_name = "BYTES")]
    pieces: Vec<usize>,
}

#[derive(ValueEnum, Clone, Copy, PartialEq)]
enum How {
    Plain,
    Nodelay,
    Cork,
    More,
    Writev,
    Forgotten,
    Close,
}

fn main() -> net::Result {
    let args = Args::parse();
    net::event::start("cork-demo", false);
    let connection = accept_one(args.at.address())?;
    let pieces: Vec<Vec<u8>> = args.pieces.iter().map(|&length| vec![b'x'; length]).collect();

    match args.how {
        How::Plain => send_all(&connection, &pieces, MsgFlags::empty())?,
        How::Nodelay => {
            setsockopt(&connection, TcpNoDelay, &true)?; // Nagle's algorithm is off
            send_all(&connection, &pieces, MsgFlags::empty())?;
        }
        How::Cork => {
            TCP_CORK.set(&connection, 1)?;
            send_all(&connection, &pieces, MsgFlags::empty())?;
            TCP_CORK.set(&connection, 0)?; // what is there goes out
        }
        How::More => {
            let (last, others) = pieces.split_last().expect("there is a piece");
            send_all(&connection, others, MSG_MORE)?;
            send_all(&connection, std::slice::from_ref(last), MsgFlags::empty())?;
        }
        How::Writev => {
            let slices: Vec<IoSlice<'_>> = pieces.iter().map(|piece| IoSlice::new(piece)).collect();
            event!("sent", bytes = writev(&connection, &slices)?);
        }
        How::Forgotten | How::Close => {
            TCP_CORK.set(&connection, 1)?;
            send_all(&connection, &pieces, MsgFlags::empty())?;
        }
    }
    if args.how != How::Close {
        let _ = recv(connection.as_raw_fd(), &mut [0], MsgFlags::empty()); // until the client closes
        let segments = tcp_info(&connection)?.tcpi_data_segs_out;
        event!("got", option = "TCP_INFO", data_segs_out = segments);
    }
    drop(connection);
    event!("closed", how = if args.how == How::Close { "corked" } else { "last" });
    Ok(())
}

/// One send(2) a piece. A blocking send of so little is never short.
fn send_all(connection: &TcpStream, pieces: &[Vec<u8>], flags: MsgFlags) -> nix::Result<()> {
    for piece in pieces {
        let sent = send(connection.as_raw_fd(), piece, flags | MsgFlags::MSG_NOSIGNAL)?;
        event!("sent", bytes = sent);
    }
    Ok(())
}
