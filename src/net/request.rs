//! The request: the client sends a decimal count and a newline, the server answers with so many
//! bytes, and both go on until the client closes (UNP 30.2).

use std::fmt;
use std::os::fd::{AsFd, AsRawFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::sockopt::{ReceiveTimeout, SendTimeout};
use nix::sys::socket::{MsgFlags, recv, send, setsockopt};
use nix::sys::time::TimeVal;

use crate::event;
use crate::net::args::{Framing, ServerArgs};
use crate::net::listen::name;

/// What an answer is made of, sent as often as it takes. Its content does not matter.
pub static FILLER: [u8; 64 * 1024] = [b'x'; 64 * 1024];

/// Longest request, in bytes, its end not counted: 20 digits hold every 64-bit count.
pub const MAX_REQUEST: usize = 20;

/// Collects the bytes of requests, however TCP cuts or joins them.
#[derive(Debug)]
pub struct Requests {
    framing: Framing,
    max_bytes: u64,
    pending: [u8; BUFFER],
    start: usize,
    end: usize,
}

/// A client may send several requests at once; a buffer takes this many bytes of them. Every idle
/// client has one, and it is cleared without memset(3), whose code would be one page fault more of
/// each forked child's.
const BUFFER: usize = 64;

impl Requests {
    /// No bytes yet, under the limits that the server's arguments set.
    pub fn new(args: &ServerArgs) -> Requests {
        Requests {
            framing: args.framing,
            max_bytes: args.max_bytes,
            pending: [0; BUFFER],
            start: 0,
            end: 0,
        }
    }

    /// Where the next `recv(2)` shall put its bytes; never empty after [`take`](Self::take) gave
    /// `None`. Tell [`filled`](Self::filled) how many came.
    pub fn space(&mut self) -> &mut [u8] {
        if self.is_partial() {
            self.pending.copy_within(self.start..self.end, 0);
        }
        self.end -= self.start;
        self.start = 0;
        &mut self.pending[self.end..]
    }

    /// Says that `count` bytes have come into [`space`](Self::space).
    pub fn filled(&mut self, count: usize) {
        self.end += count;
    }

    /// Whether some bytes of a request are here, but not all.
    pub fn is_partial(&self) -> bool {
        self.start < self.end
    }

    /// Takes the next complete request: its count, or `None` until more bytes have come.
    ///
    /// # Errors
    /// What is wrong with a request that can never be answered.
    pub fn take(&mut self) -> Result<Option<u64>, BadRequest> {
        let pending = &self.pending[self.start..self.end];
        let newline = pending.iter().position(|&byte| byte == b'\n');
        let length = match (newline, self.framing) {
            (Some(length), _) => length,
            (None, Framing::Segment) if !pending.is_empty() => pending.len(),
            (None, _) if without_cr(pending).len() > MAX_REQUEST => {
                return Err(BadRequest::TooLong);
            }
            (None, _) => return Ok(None),
        };
        let count = parse(&pending[..length], self.max_bytes)?;
        self.start = self.end.min(self.start + length + 1);
        Ok(Some(count))
    }
}

fn parse(text: &[u8], max_bytes: u64) -> Result<u64, BadRequest> {
    let text = without_cr(text);
    if text.len() > MAX_REQUEST {
        return Err(BadRequest::TooLong);
    }
    if text.is_empty() || !text.iter().all(u8::is_ascii_digit) {
        return Err(BadRequest::NotANumber);
    }
    let append = |count: u64, digit: &u8| count.checked_mul(10)?.checked_add((digit - b'0').into());
    match text.iter().try_fold(0, append) {
        Some(count) if count <= max_bytes => Ok(count),
        _ => Err(BadRequest::OverLimit),
    }
}

/// A line without the CR that telnet(1), and nc(1) with -C, send before the newline.
fn without_cr(line: &[u8]) -> &[u8] {
    if let [before @ .., b'\r'] = line { before } else { line }
}

/// Why a request cannot be answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadRequest {
    /// Something else than decimal digits.
    NotANumber,
    /// More than [`MAX_REQUEST`] bytes without a newline.
    TooLong,
    /// A count over `--max-bytes`.
    OverLimit,
    /// The client closed in the middle of a request.
    CutShort,
}

impl fmt::Display for BadRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            BadRequest::NotANumber => "not-a-number",
            BadRequest::TooLong => "too-long",
            BadRequest::OverLimit => "over-limit",
            BadRequest::CutShort => "cut-short",
        })
    }
}

/// Why a connection ended; the `reason` of the event `closed`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The client closed, or closed its half: the ordinary end.
    Eof,
    /// A request that cannot be answered.
    BadRequest(BadRequest),
    /// `--idle-timeout` ran out.
    TimedOut,
    /// The server has no room for it: `select` for a descriptor of FD_SETSIZE or more.
    NoRoom,
    /// The connection broke: ECONNRESET, EPIPE, ETIMEDOUT ...
    Failed(Errno),
}

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Ended::Eof => f.write_str("eof"),
            Ended::BadRequest(bad) => write!(f, "bad-request:{bad}"),
            Ended::TimedOut => f.write_str("idle-timeout"),
            Ended::NoRoom => f.write_str("no-room"),
            Ended::Failed(errno) => name(*errno).fmt(f),
        }
    }
}

impl From<Errno> for Ended {
    /// EAGAIN on a blocking socket is its time-out (SO_RCVTIMEO, SO_SNDTIMEO: socket(7)).
    fn from(errno: Errno) -> Ended {
        if errno == Errno::EAGAIN { Ended::TimedOut } else { Ended::Failed(errno) }
    }
}

/// Serves one client on a blocking socket until the connection ends: the part that every design
/// with one process or thread a client shares. Prints `request` and `sent` for each request.
///
/// EINTR is a signal that another part of the program handles: the call is made again.
pub fn serve(connection: &(impl AsFd + AsRawFd), args: &ServerArgs) -> Ended {
    match serve_until_error(connection, args) {
        Ok(never) => match never {},
        Err(ended) => ended,
    }
}

fn serve_until_error(
    connection: &(impl AsFd + AsRawFd),
    args: &ServerArgs,
) -> Result<std::convert::Infallible, Ended> {
    let timeout = args.idle_timeout;
    if !timeout.is_zero() {
        // A connection that TCP has ended already refuses the option; its next recv says why.
        let limit = TimeVal::new(timeout.as_secs() as i64, i64::from(timeout.subsec_micros()));
        let _ = setsockopt(connection, ReceiveTimeout, &limit);
        let _ = setsockopt(connection, SendTimeout, &limit);
    }
    let mut requests = Requests::new(args);
    loop {
        let count = next_request(connection, &mut requests, timeout)?;
        event!("request", fd = connection.as_raw_fd(), bytes = count);
        send_answer(connection, count)?;
        event!("sent", fd = connection.as_raw_fd(), bytes = count);
    }
}

/// Receives until a request is complete. One that comes a byte at a time (slowloris) has no more
/// time than one that does not come.
fn next_request(
    connection: &(impl AsFd + AsRawFd),
    requests: &mut Requests,
    timeout: Duration,
) -> Result<u64, Ended> {
    let mut deadline = None;
    loop {
        if let Some(count) = requests.take().map_err(Ended::BadRequest)? {
            return Ok(count);
        }
        if !timeout.is_zero()
            && *deadline.get_or_insert_with(|| Instant::now() + timeout) <= Instant::now()
        {
            return Err(Ended::TimedOut);
        }
        match recv(connection.as_raw_fd(), requests.space(), MsgFlags::empty()) {
            Ok(0) if requests.is_partial() => return Err(Ended::BadRequest(BadRequest::CutShort)),
            Ok(0) => return Err(Ended::Eof),
            Ok(count) => requests.filled(count),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Sends `count` bytes, in as many `send(2)` as the client's pace makes it. MSG_NOSIGNAL, so that
/// a client that is gone gives EPIPE and no SIGPIPE.
fn send_answer(connection: &(impl AsFd + AsRawFd), count: u64) -> Result<(), Ended> {
    let mut left = count;
    while left > 0 {
        let chunk = FILLER.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        match send(connection.as_raw_fd(), &FILLER[..chunk], MsgFlags::MSG_NOSIGNAL) {
            Ok(sent) => left -= sent as u64,
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        args: ServerArgs,
    }

    fn requests(flags: &[&str]) -> Requests {
        let flags = ["server"].iter().chain(flags);
        Requests::new(&Command::parse_from(flags).args)
    }

    fn feed(requests: &mut Requests, bytes: &[u8]) {
        requests.space()[..bytes.len()].copy_from_slice(bytes);
        requests.filled(bytes.len());
    }

    #[test]
    fn a_request_split_byte_by_byte_is_one_request() {
        let mut requests = requests(&[]);
        for byte in b"1024" {
            feed(&mut requests, &[*byte]);
            assert_eq!(requests.take(), Ok(None));
            assert!(requests.is_partial());
        }
        feed(&mut requests, b"\n");
        assert_eq!(requests.take(), Ok(Some(1024)));
        assert_eq!(requests.take(), Ok(None));
        assert!(!requests.is_partial());
    }

    #[test]
    fn the_longest_request_may_be_cut_before_its_newline() {
        let mut requests = requests(&[]);
        for bytes in [&b"00000000000000001024"[..], b"\r"] {
            feed(&mut requests, bytes);
            assert_eq!(requests.take(), Ok(None));
        }
        feed(&mut requests, b"\n");
        assert_eq!(requests.take(), Ok(Some(1024)));
    }

    #[test]
    fn requests_that_come_together_are_taken_apart() {
        let mut requests = requests(&[]);
        feed(&mut requests, b"10\n24\r\n7");
        assert_eq!(requests.take(), Ok(Some(10)));
        assert_eq!(requests.take(), Ok(Some(24)));
        assert_eq!(requests.take(), Ok(None));
    }

    #[test]
    fn with_segment_framing_a_segment_is_a_request() {
        let mut requests = requests(&["--framing", "segment"]);
        feed(&mut requests, b"10");
        assert_eq!(requests.take(), Ok(Some(10)));
        feed(&mut requests, b"1024\n");
        assert_eq!(requests.take(), Ok(Some(1024)));
        assert_eq!(requests.take(), Ok(None));
    }

    #[test]
    fn what_cannot_be_answered_is_refused() {
        let refused = |bytes: &[u8]| {
            let mut requests = requests(&["--max-bytes", "1000"]);
            feed(&mut requests, bytes);
            requests.take()
        };
        assert_eq!(refused(b"\n"), Err(BadRequest::NotANumber));
        assert_eq!(refused(b"ten\n"), Err(BadRequest::NotANumber));
        assert_eq!(refused(b"-1\n"), Err(BadRequest::NotANumber));
        assert_eq!(refused(b"+1\n"), Err(BadRequest::NotANumber));
        assert_eq!(refused(b"1001\n"), Err(BadRequest::OverLimit));
        assert_eq!(refused(b"99999999999999999999\n"), Err(BadRequest::OverLimit));
        assert_eq!(refused(b"000000000000000000001\n"), Err(BadRequest::TooLong));
        assert_eq!(refused(b"000000000000000000001"), Err(BadRequest::TooLong));
        assert_eq!(refused(b"1000\n"), Ok(Some(1000)));
    }
}
