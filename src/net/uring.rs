//! io_uring: requests go into one ring, completions come out of another, and one system call hands
//! over any number of the first and waits for the second.
//!
//! A request says what to do, and which client it is for; the kernel does it when it can, and says
//! so. A *multishot* request goes on: accept completes for each connection, receive for each piece
//! that comes, into buffers that the kernel picks from a pool that we keep filled.
#![allow(unsafe_code, reason = "hands memory to the kernel until a completion gives it back")]

use std::cell::UnsafeCell;
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsRawFd as _, FromRawFd as _, IntoRawFd as _, RawFd};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use io_uring::types::{BufRingEntry, Fd, SubmitArgs, Timespec};
use io_uring::{CompletionQueue, IoUring, SubmissionQueue, Submitter, cqueue, opcode, squeue};
use nix::errno::Errno;

use crate::event;
use crate::net::args::ServerArgs;
use crate::net::listen::peer_of;
use crate::net::request::{BadRequest, Ended, FILLER, Requests};

/// What a completion is about; it comes back as the request's user data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A connection was accepted.
    Accept,
    /// Bytes came, 0 is the end.
    Receive,
    /// Bytes were sent.
    Send,
    /// Nobody waits for this one: a cancellation, a close.
    Other,
}

/// A completion.
#[derive(Debug)]
pub struct Completion {
    /// What it is about.
    pub kind: Kind,
    /// For whom the request was made; the listener, for accept.
    pub fd: RawFd,
    /// What the system call would have returned.
    pub result: nix::Result<u32>,
    /// The buffer that the kernel has chosen; see [`Client::completed`].
    pub buffer: Option<u16>,
    /// The connection that was accepted.
    pub accepted: Option<TcpStream>,
    /// Whether a multishot request goes on; if not, it must be made again.
    pub more: bool,
}

/// The two rings, what hands them over, and the pool of receive buffers.
pub struct Ring {
    submitter: Submitter<'static>,
    requests: SubmissionQueue<'static>,
    completions: CompletionQueue<'static>,
    pool: Pool,
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring").finish_non_exhaustive()
    }
}

/// Requests that wait in the ring before it must be handed over.
const ENTRIES: u32 = 1024;

impl Ring {
    /// Sets both rings up and fills the pool.
    ///
    /// # Errors
    /// io_uring_setup(2)'s: EPERM where a seccomp profile or kernel.io_uring_disabled forbids it,
    /// ENOSYS where the kernel has none, EINVAL where it is too old (before 6.1), ENOMEM where
    /// RLIMIT_MEMLOCK is too low.
    pub fn new() -> io::Result<Ring> {
        // One thread submits, and completions are worked on when it asks for them: no interrupt of
        // whatever it does, no inter-processor wake-up.
        let uring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_cqsize(4 * ENTRIES)
            .build(ENTRIES)?;
        // Theirs until the process ends, as the pool is.
        let (mut submitter, requests, completions) = Box::leak(Box::new(uring)).split();
        submitter.register_ring_fd()?; // no look-up of the descriptor at each call
        let pool = Pool::new(&submitter)?;
        Ok(Ring { submitter, requests, completions, pool })
    }

    fn push(&mut self, entry: squeue::Entry, kind: Kind, fd: RawFd) -> io::Result<()> {
        let entry = entry.user_data(user_data(kind, fd));
        // SAFETY: what the requests of this file point to, the pool and FILLER, is never freed.
        while unsafe { self.requests.push(&entry) }.is_err() {
            self.hand_over(0, &SubmitArgs::new())?; // the ring is full
        }
        Ok(())
    }

    /// io_uring_enter(2). What we and the kernel have put into the ring of requests, and taken out,
    /// is told to each other before and after.
    fn hand_over(&mut self, wanted: usize, args: &SubmitArgs<'_, '_>) -> io::Result<usize> {
        self.requests.sync();
        let submitted = self.submitter.submit_with_args(wanted, args);
        self.requests.sync();
        submitted
    }

    /// Accepts every connection that comes, until a completion without `more`.
    ///
    /// # Errors
    /// io_uring_enter(2)'s, as for all of these: a full ring is handed over.
    pub fn accept(&mut self, listener: RawFd) -> io::Result<()> {
        let flags = libc::SOCK_CLOEXEC;
        self.push(
            opcode::AcceptMulti::new(Fd(listener)).flags(flags).build(),
            Kind::Accept,
            listener,
        )
    }

    /// Receives whatever comes, until a completion without `more`.
    ///
    /// # Errors
    /// As [`accept`](Self::accept).
    pub fn receive(&mut self, fd: RawFd) -> io::Result<()> {
        self.push(opcode::RecvMulti::new(Fd(fd), GROUP).build(), Kind::Receive, fd)
    }

    /// Ends what was asked for: its last completion is ECANCELED, unless another came before.
    ///
    /// # Errors
    /// As [`accept`](Self::accept).
    pub fn cancel(&mut self, kind: Kind, fd: RawFd) -> io::Result<()> {
        self.push(opcode::AsyncCancel::new(user_data(kind, fd)).build(), Kind::Other, fd)
    }

    /// Sends so many bytes of an answer.
    ///
    /// # Errors
    /// As [`accept`](Self::accept).
    pub fn send(&mut self, fd: RawFd, bytes: u64) -> io::Result<()> {
        let length = FILLER.len().min(usize::try_from(bytes).unwrap_or(usize::MAX)) as u32;
        let send = opcode::Send::new(Fd(fd), FILLER.as_ptr(), length).flags(libc::MSG_NOSIGNAL);
        self.push(send.build(), Kind::Send, fd)
    }

    /// Closes a socket for which nothing is under way.
    ///
    /// # Errors
    /// As [`accept`](Self::accept).
    pub fn close(&mut self, socket: TcpStream) -> io::Result<()> {
        let fd = socket.into_raw_fd();
        let close = opcode::Close::new(Fd(fd)).build().flags(squeue::Flags::SKIP_SUCCESS);
        self.push(close, Kind::Other, fd)
    }

    /// io_uring_enter(2): hands over what was asked for and waits until something is completed, or
    /// for so long. Adds what has been completed then, oldest first; nothing, when a signal came.
    ///
    /// # Errors
    /// io_uring_enter(2)'s.
    pub fn wait(&mut self, limit: Option<Duration>, done: &mut Vec<Completion>) -> io::Result<()> {
        let limit = limit.map(Timespec::from);
        let args = SubmitArgs::new();
        let args = limit.as_ref().map_or(args, |limit| args.timespec(limit));
        match self.hand_over(1, &args) {
            Ok(_) => {}
            Err(error) => match Errno::from_raw(error.raw_os_error().unwrap_or(0)) {
                Errno::EINTR | Errno::ETIME => {}
                Errno::EBUSY => {} // too many completions are waiting: they come first
                _ => return Err(error),
            },
        }
        self.completions.sync();
        done.extend(self.completions.by_ref().map(|entry| completion(&entry)));
        self.completions.sync(); // there is room for more
        Ok(())
    }
}

/// Receive buffers, and a third ring of shared memory: through it we give buffers to the kernel,
/// without a request. Which one the kernel has taken for some bytes is told with their completion.
struct Pool {
    memory: &'static Memory,
    tail: u16,
}

/// Starts on a page, as the kernel wants the ring to. Never freed: a receive that is under way when
/// the rings are closed may still write to it.
#[repr(C, align(4096))]
struct Memory {
    ring: [UnsafeCell<BufRingEntry>; BUFFERS as usize],
    buffers: [UnsafeCell<[u8; LENGTH]>; BUFFERS as usize],
}

/// Buffers in the pool, a power of two, and the bytes of each. Requests are short.
const BUFFERS: u16 = 256;
const LENGTH: usize = 64;
const GROUP: u16 = 0;

impl Pool {
    fn new(submitter: &Submitter<'_>) -> io::Result<Pool> {
        // SAFETY: all of it is integers, and zero is a value of theirs.
        let memory: &Memory = Box::leak(unsafe { Box::<Memory>::new_zeroed().assume_init() });
        let ring = memory.ring.as_ptr() as u64;
        // SAFETY: the memory is never freed.
        unsafe { submitter.register_buf_ring_with_flags(ring, BUFFERS, GROUP, 0) }?;
        let mut pool = Pool { memory, tail: 0 };
        (0..BUFFERS).for_each(|id| pool.give(id));
        Ok(pool)
    }

    /// Hands a buffer to the kernel.
    fn give(&mut self, id: u16) {
        let buffer = self.memory.buffers[usize::from(id)].get() as u64;
        let entry = self.memory.ring[usize::from(self.tail % BUFFERS)].get();
        // SAFETY: the kernel reads entries before the tail only, and this one is at it.
        let entry = unsafe { &mut *entry };
        entry.set_addr(buffer);
        entry.set_len(LENGTH as u32);
        entry.set_bid(id);
        self.tail = self.tail.wrapping_add(1);
        // SAFETY: that is the address of the first entry, in whose unused bytes the tail is.
        let tail = unsafe { BufRingEntry::tail(self.memory.ring[0].get()) };
        // SAFETY: the kernel only reads it, and we write it only here.
        let tail = unsafe { AtomicU16::from_ptr(tail.cast_mut()) };
        tail.store(self.tail, Ordering::Release); // after the entry
    }

    /// What has been received into a buffer, which must not be with the kernel.
    fn bytes(&self, id: u16, length: usize) -> &[u8] {
        // SAFETY: the kernel has given it to us, and gets it back from `give`, which is not called
        // while these bytes are borrowed.
        let buffer = unsafe { &*self.memory.buffers[usize::from(id)].get() };
        &buffer[..length]
    }
}

fn user_data(kind: Kind, fd: RawFd) -> u64 {
    (kind as u64) << 32 | u64::from(fd as u32)
}

fn completion(entry: &cqueue::Entry) -> Completion {
    let kind = match entry.user_data() >> 32 {
        kind if kind == Kind::Accept as u64 => Kind::Accept,
        kind if kind == Kind::Receive as u64 => Kind::Receive,
        kind if kind == Kind::Send as u64 => Kind::Send,
        _ => Kind::Other,
    };
    let result = entry.result();
    let result = u32::try_from(result).map_err(|_| Errno::from_raw(-result));
    let accepted = match (kind, result) {
        // SAFETY: the kernel has just made this descriptor, for us; an entry is read only once.
        (Kind::Accept, Ok(fd)) => Some(unsafe { TcpStream::from_raw_fd(fd as RawFd) }),
        _ => None,
    };
    let (buffer, more) = (cqueue::buffer_select(entry.flags()), cqueue::more(entry.flags()));
    Completion { kind, fd: entry.user_data() as u32 as RawFd, result, buffer, accepted, more }
}

/// What one client is at: requests that came, and the answer that is being sent.
#[derive(Debug)]
pub struct Conversation {
    requests: Requests,
    /// What came ahead of the answers, and does not fit into `requests` yet.
    ahead: Vec<u8>,
    at_end: bool,
    /// The answer that is being sent: its length, and how much of it is left.
    answer: Option<(u64, u64)>,
}

/// A client may be so many bytes of requests ahead of our answers before we stop receiving.
const FAR_AHEAD: usize = 4096;

impl Conversation {
    /// Nothing said yet.
    pub fn new(args: &ServerArgs) -> Conversation {
        let requests = Requests::new(args);
        Conversation { requests, ahead: Vec::new(), at_end: false, answer: None }
    }

    /// Says that these bytes have come: none, if the client has closed its half.
    pub fn came(&mut self, bytes: &[u8]) {
        self.at_end |= bytes.is_empty();
        let space = self.requests.space();
        if self.answer.is_none() && self.ahead.is_empty() && bytes.len() <= space.len() {
            space[..bytes.len()].copy_from_slice(bytes);
            self.requests.filled(bytes.len());
        } else {
            self.ahead.extend_from_slice(bytes);
        }
    }

    /// Whether to receive more.
    pub fn listens(&self) -> bool {
        !self.at_end && self.ahead.len() < FAR_AHEAD
    }

    /// How many bytes are to be sent now; `None` until more has come.
    ///
    /// # Errors
    /// Why the conversation is over.
    pub fn to_send(&mut self, fd: RawFd) -> Result<Option<u64>, Ended> {
        loop {
            match self.answer {
                Some((_, left @ 1..)) => return Ok(Some(left)),
                Some((bytes, _)) => {
                    event!("sent", fd = fd, bytes = bytes);
                    self.answer = None;
                }
                None => {}
            }
            if let Some(bytes) = self.requests.take().map_err(Ended::BadRequest)? {
                event!("request", fd = fd, bytes = bytes);
                self.answer = Some((bytes, bytes));
            } else if !self.ahead.is_empty() {
                let space = self.requests.space();
                let count = space.len().min(self.ahead.len());
                space[..count].copy_from_slice(&self.ahead[..count]);
                self.ahead.drain(..count);
                self.requests.filled(count);
            } else if !self.at_end {
                return Ok(None);
            } else if self.requests.is_partial() {
                return Err(Ended::BadRequest(BadRequest::CutShort));
            } else {
                return Err(Ended::Eof);
            }
        }
    }

    /// Says that so many bytes have been sent.
    pub fn sent(&mut self, bytes: u32) {
        if let Some((_, left)) = &mut self.answer {
            *left -= u64::from(bytes);
        }
    }
}

/// All clients, by descriptor.
#[derive(Debug, Default)]
pub struct Clients {
    table: Vec<Option<Box<Client>>>,
    count: usize,
}

impl Clients {
    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Takes in a client that has just been accepted.
    pub fn insert(&mut self, client: Client) {
        let place = client.fd() as usize;
        if place >= self.table.len() {
            self.table.resize_with(place + 1, || None);
        }
        self.table[place] = Some(Box::new(client));
        self.count += 1;
    }

    /// The client with this descriptor.
    pub fn get(&mut self, fd: RawFd) -> Option<&mut Client> {
        self.table.get_mut(fd as usize)?.as_deref_mut()
    }

    /// Everybody.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut Client> {
        self.table.iter_mut().flatten().map(|client| &mut **client)
    }

    /// Takes a client out.
    pub fn remove(&mut self, fd: RawFd) -> Option<Box<Client>> {
        let client = self.table.get_mut(fd as usize)?.take()?;
        self.count -= 1;
        Some(client)
    }
}

/// A client of an io_uring server: its socket, and what has been asked for it.
#[derive(Debug)]
pub struct Client {
    /// Its socket. Not to be closed before it [is over](Self::is_over).
    pub socket: TcpStream,
    /// Its address.
    pub peer: SocketAddr,
    /// What it has said and what it is told.
    pub conversation: Conversation,
    /// Whether a receive goes on.
    pub receiving: bool,
    /// Whether a send is under way.
    pub sending: bool,
    /// Why it has ended, if it has.
    pub ended: Option<Ended>,
    /// Since when it has not moved on, if there is an idle time-out.
    pub since: Option<Instant>,
}

impl Client {
    /// A client that has just been accepted.
    pub fn new(socket: TcpStream, args: &ServerArgs) -> Client {
        let peer = peer_of(&socket); // a multishot accept does not tell it
        event!("accepted", peer = peer, fd = socket.as_raw_fd());
        let (receiving, sending, ended) = (false, false, None);
        let since = (!args.idle_timeout.is_zero()).then(Instant::now);
        let conversation = Conversation::new(args);
        Client { socket, peer, conversation, receiving, sending, ended, since }
    }

    /// Its descriptor.
    pub fn fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }

    /// Takes in what came of a receive or of a send. A buffer goes back into the pool.
    pub fn completed(&mut self, done: &Completion, ring: &mut Ring) {
        match (done.kind, done.result) {
            (Kind::Accept | Kind::Other, _) => return,
            // Cancelled, or no buffer was left: whoever still wants it asks again.
            (_, Err(Errno::ECANCELED | Errno::ENOBUFS)) => {}
            (_, Err(errno)) => self.ended = self.ended.or(Some(Ended::Failed(errno))),
            (Kind::Receive, Ok(length)) => {
                let bytes = done.buffer.map(|id| ring.pool.bytes(id, length as usize));
                self.conversation.came(bytes.unwrap_or_default());
            }
            (_, Ok(length)) => {
                self.conversation.sent(length);
                self.since = self.since.map(|_| Instant::now()); // it moved on
            }
        }
        match done.kind {
            Kind::Receive => self.receiving = done.more,
            Kind::Send => self.sending = false,
            Kind::Accept | Kind::Other => {}
        }
        if let Some(id) = done.buffer {
            ring.pool.give(id);
        }
    }

    /// Whether to receive more from it.
    pub fn listens(&self) -> bool {
        self.ended.is_none() && self.conversation.listens()
    }

    /// Whether it has been idle for too long.
    pub fn is_late(&self, args: &ServerArgs) -> bool {
        let late = |since: Instant| since.elapsed() >= args.idle_timeout;
        self.ended.is_none() && self.since.is_some_and(late)
    }

    /// Whether it has ended and the kernel is done with its socket, so that it may be closed.
    pub fn is_over(&self) -> bool {
        self.ended.is_some() && !self.receiving && !self.sending
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_requests_than_the_ring_has_room_for_are_all_handed_over() {
        let mut ring = Ring::new().expect("io_uring");
        let count = 3 * ENTRIES as usize; // the other ring holds four times as many
        for _ in 0..count {
            ring.cancel(Kind::Send, 0).expect("room"); // there is none: ENOENT
        }
        let mut done = Vec::new();
        ring.wait(None, &mut done).expect("completions");
        assert_eq!(done.len(), count);
        assert!(done.iter().all(|done| done.result == Err(Errno::ENOENT)));
    }
}
