//! Connections that never block: what every event-driven server does with a client once it knows
//! that the client's socket is ready.
//!
//! A blocking server's place in its code is a client's state. Here the state is data: which bytes
//! of a request have come, how many of the answer are still to be sent, since when the client has
//! been idle. [`Clients::advance`] does what the socket allows now and says what to wait for.

use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags};
use nix::sys::resource::{Resource, getrlimit};
use nix::sys::socket::{MsgFlags, recv, send};

use crate::event;
use crate::net::args::ServerArgs;
use crate::net::drain;
use crate::net::listen::{self, accept_nonblocking};
use crate::net::request::{BadRequest, Ended, FILLER, Requests};

/// One client of an event-driven server.
#[derive(Debug)]
pub struct Connection {
    socket: TcpStream,
    peer: SocketAddr,
    requests: Requests,
    /// The answer that is being sent: its length, and how much of it is left.
    answer: Option<(u64, u64)>,
    /// Whether an answer is being sent, or another complete request may be in the buffer.
    busy: bool,
    /// Since when it has not moved on, if there is an idle time-out.
    since: Option<Instant>,
}

/// What a connection waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Waits {
    /// For bytes of a request.
    ToRead,
    /// For room to send more of an answer: the client reads slower than we send. No further
    /// request is read until it is sent.
    ToWrite,
}

/// How much one client may have in a row, in calls of send(2), before others have their turn.
const TURN: usize = 16;

impl Connection {
    /// A client that has just been accepted, on a non-blocking socket.
    pub fn new(socket: TcpStream, peer: SocketAddr, args: &ServerArgs) -> Connection {
        let since = (!args.idle_timeout.is_zero()).then(Instant::now);
        let requests = Requests::new(args);
        Connection { socket, peer, requests, answer: None, busy: false, since }
    }

    /// What to wait for.
    pub fn waits(&self) -> Waits {
        if self.busy { Waits::ToWrite } else { Waits::ToRead }
    }

    /// Receives once, or goes on sending, and stops where the socket would block, or when it has
    /// sent so much that others should have a turn. For who is told again as long as the socket is
    /// ready (level-triggered).
    ///
    /// # Errors
    /// Why the connection has ended.
    pub fn advance(&mut self) -> Result<Waits, Ended> {
        self.busy = self.busy || self.receive()?;
        for _ in 0..TURN {
            if !self.busy || !self.answer()? {
                break;
            }
        }
        Ok(self.waits())
    }

    /// Receives and sends until the socket would block (`true`: wait for the next event), or until
    /// others should have a turn (`false`: come back without one). For who is told only when
    /// something changes (edge-triggered).
    ///
    /// # Errors
    /// Why the connection has ended.
    pub fn exhaust(&mut self) -> Result<bool, Ended> {
        for _ in 0..TURN {
            if self.busy {
                if !self.answer()? && self.busy {
                    return Ok(true); // no room to send
                }
            } else {
                self.busy = self.receive()?;
                if !self.busy {
                    return Ok(true); // nothing to read
                }
            }
        }
        Ok(false)
    }

    /// One recv(2). Whether anything has come.
    fn receive(&mut self) -> Result<bool, Ended> {
        let fd = self.socket.as_raw_fd();
        match recv(fd, self.requests.space(), MsgFlags::empty()) {
            Ok(0) if self.requests.is_partial() => Err(Ended::BadRequest(BadRequest::CutShort)),
            Ok(0) => Err(Ended::Eof),
            Ok(count) => {
                self.requests.filled(count);
                Ok(true)
            }
            Err(Errno::EAGAIN | Errno::EINTR) => Ok(false),
            Err(errno) => Err(Ended::Failed(errno)),
        }
    }

    /// One send(2) of the answer to the next complete request. Whether it went: not, if the socket
    /// is full (EAGAIN), or if all that has come is answered, and then we are no longer busy.
    fn answer(&mut self) -> Result<bool, Ended> {
        let fd = self.socket.as_raw_fd();
        if self.answer.is_none() {
            let Some(bytes) = self.requests.take().map_err(Ended::BadRequest)? else {
                self.busy = false;
                return Ok(false);
            };
            event!("request", fd = fd, bytes = bytes);
            self.answer = Some((bytes, bytes));
        }
        let Some((bytes, left)) = &mut self.answer else { return Ok(false) };
        let chunk = FILLER.len().min(usize::try_from(*left).unwrap_or(usize::MAX));
        if chunk > 0 {
            match send(fd, &FILLER[..chunk], MsgFlags::MSG_NOSIGNAL) {
                Ok(sent) => *left -= sent as u64,
                Err(Errno::EAGAIN | Errno::EINTR) => return Ok(false),
                Err(errno) => return Err(Ended::Failed(errno)),
            }
        }
        if *left == 0 {
            event!("sent", fd = fd, bytes = *bytes);
            self.answer = None;
        }
        self.since = self.since.map(|_| Instant::now()); // it moved on
        Ok(true)
    }

    /// Whether it has been idle for too long.
    pub fn is_late(&self, args: &ServerArgs) -> bool {
        self.since.is_some_and(|since| since.elapsed() >= args.idle_timeout)
    }

    /// The socket.
    pub fn socket(&self) -> &TcpStream {
        &self.socket
    }

    /// Closes it: close(2), and the event.
    pub fn close(self, reason: Ended) {
        let peer = self.peer;
        drop(self.socket);
        event!("closed", peer = peer, reason = reason);
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// All clients of one event loop, by descriptor.
#[derive(Debug)]
pub struct Clients<'a> {
    args: &'a ServerArgs,
    table: Vec<Option<Box<Connection>>>,
    count: usize,
    swept: Instant,
    /// Until when no client is accepted, because descriptors ran out.
    full_until: Option<Instant>,
    draining: bool,
}

/// How long a loop that has run out of descriptors accepts nobody, unless one is closed before.
const PAUSE: Duration = Duration::from_millis(100);

impl<'a> Clients<'a> {
    /// Nobody yet.
    pub fn new(args: &'a ServerArgs) -> Clients<'a> {
        let (swept, full_until) = (Instant::now(), None);
        Clients { args, table: Vec::new(), count: 0, swept, full_until, draining: false }
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Takes in a client that has just been accepted.
    pub fn insert(&mut self, socket: TcpStream, peer: SocketAddr) -> RawFd {
        let fd = socket.as_raw_fd();
        event!("accepted", peer = peer, fd = fd);
        let place = fd as usize;
        if place >= self.table.len() {
            self.table.resize_with(place + 1, || None);
        }
        self.table[place] = Some(Box::new(Connection::new(socket, peer, self.args)));
        self.count += 1;
        fd
    }

    /// Accepts the next who waits, by accept4(2) with SOCK_NONBLOCK: the new client's descriptor, or
    /// `None` at EAGAIN, when all have been accepted.
    ///
    /// # Errors
    /// What is about the listener itself.
    pub fn accept(&mut self, listener: impl AsFd) -> nix::Result<Option<RawFd>> {
        while self.accepting() {
            match accept_nonblocking(listener.as_fd()) {
                Ok((socket, peer)) => return Ok(Some(self.insert(socket, peer))),
                Err(Errno::EAGAIN) => break,
                Err(errno) => self.accept_failed(errno)?,
            }
        }
        Ok(None)
    }

    /// Does what this client's socket allows now, and says what to wait for; `None`, once it has
    /// ended and is closed, or if it had been closed before: an event may be about one that was.
    pub fn advance(&mut self, fd: RawFd) -> Option<Waits> {
        match self.get(fd)?.advance() {
            Ok(waits) => Some(waits),
            Err(ended) => {
                self.close(fd, ended);
                None
            }
        }
    }

    /// The same for a client registered with an epoll instance, level-triggered: epoll_ctl(2) MOD, if
    /// it waits for something else from now on, as `src/bin/servers/epoll.rs` spells it out.
    ///
    /// # Errors
    /// epoll_ctl(2)'s.
    pub fn advance_registered(&mut self, epoll: &Epoll, fd: RawFd) -> nix::Result<()> {
        let waited = self.get(fd).map(|client| client.waits());
        let waits = self.advance(fd);
        let flags = match waits {
            Some(Waits::ToRead) => EpollFlags::EPOLLIN,
            Some(Waits::ToWrite) => EpollFlags::EPOLLOUT,
            None => return Ok(()),
        };
        match self.get(fd) {
            Some(client) if waits != waited => {
                epoll.modify(client.socket(), &mut EpollEvent::new(flags, fd as u64))
            }
            _ => Ok(()),
        }
    }

    /// The same until the socket would block: `true`, unless the turn was over before.
    pub fn exhaust(&mut self, fd: RawFd) -> bool {
        let Some(connection) = self.get(fd) else { return true };
        connection.exhaust().unwrap_or_else(|ended| {
            self.close(fd, ended);
            true
        })
    }

    /// The client with this descriptor.
    pub fn get(&mut self, fd: RawFd) -> Option<&mut Connection> {
        self.table.get_mut(fd as usize)?.as_deref_mut()
    }

    /// Everybody.
    pub fn iter(&self) -> impl Iterator<Item = &Connection> {
        self.table.iter().flatten().map(|connection| &**connection)
    }

    /// Closes a client's connection.
    pub fn close(&mut self, fd: RawFd, reason: Ended) {
        if let Some(connection) = self.table[fd as usize].take() {
            self.count -= 1;
            self.full_until = None; // there is a descriptor again
            connection.close(reason);
        }
    }

    /// Says that accept(2) failed; see [`accept_failed`](crate::net::listen::accept_failed). But
    /// this loop has others to serve: when descriptors have run out it does not sleep, it stops
    /// [`accepting`](Self::accepting) for a while.
    ///
    /// # Errors
    /// What is about the listener itself.
    pub fn accept_failed(&mut self, errno: Errno) -> nix::Result<()> {
        match errno {
            _ if drain::begun() => self.begin_drain(), // SIGTERM has shut the listener down
            errno if listen::ran_out(errno) => {
                event!("accept-failed", errno = listen::name(errno), pause_ms = PAUSE.as_millis());
                self.full_until = Some(Instant::now() + PAUSE);
            }
            errno => listen::accept_failed(errno)?,
        }
        Ok(())
    }

    /// Whether to wait for new clients.
    pub fn accepting(&mut self) -> bool {
        if self.full_until.is_some_and(|until| until <= Instant::now()) {
            self.full_until = None;
        }
        self.full_until.is_none() && !self.draining
    }

    /// SIGTERM has come: nobody is accepted any more, and who is there is served to the end.
    pub fn begin_drain(&mut self) {
        self.draining = true;
        for connection in self.iter() {
            drain::stop_receiving(connection.as_fd().as_raw_fd()); // what has come is answered
        }
    }

    /// Whether SIGTERM has come and the last client has gone.
    pub fn drained(&self) -> bool {
        self.draining && self.count == 0
    }

    /// How long the loop may wait before somebody's time is over; `None` for ever.
    pub fn timeout(&self) -> Option<Duration> {
        let sweep = (self.count > 0 && !self.args.idle_timeout.is_zero())
            .then(|| self.swept + pace(self.args));
        let wake = sweep.into_iter().chain(self.full_until).min()?;
        // A millisecond more than it takes: waits are in whole ones, and too early is a turn more.
        Some(wake.saturating_duration_since(Instant::now()) + Duration::from_millis(1))
    }

    /// Closes those who have been idle for too long.
    pub fn close_idle(&mut self) {
        if self.args.idle_timeout.is_zero() || self.swept.elapsed() < pace(self.args) {
            return;
        }
        self.swept = Instant::now();
        let late = self.iter().filter(|connection| connection.is_late(self.args));
        let late: Vec<RawFd> = late.map(|connection| connection.as_fd().as_raw_fd()).collect();
        for fd in late {
            self.close(fd, Ended::TimedOut);
        }
    }
}

/// All clients of several threads, by descriptor. Each has a lock of its own.
#[derive(Debug)]
pub struct SharedClients<'a> {
    args: &'a ServerArgs,
    table: Vec<Mutex<Option<Box<Connection>>>>,
    count: AtomicUsize,
    draining: AtomicBool,
    swept: Mutex<Instant>,
}

impl<'a> SharedClients<'a> {
    /// Nobody yet, and room for as many as this process may have descriptors.
    ///
    /// # Errors
    /// getrlimit(2)'s.
    pub fn new(args: &'a ServerArgs) -> nix::Result<SharedClients<'a>> {
        let (most, _) = getrlimit(Resource::RLIMIT_NOFILE)?;
        let table = (0..most).map(|_| Mutex::new(None)).collect();
        let (count, draining) = (AtomicUsize::new(0), AtomicBool::new(false));
        Ok(SharedClients { args, table, count, draining, swept: Mutex::new(Instant::now()) })
    }

    fn lock(&self, fd: RawFd) -> MutexGuard<'_, Option<Box<Connection>>> {
        self.table[fd as usize].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes in a client that has just been accepted. `then` registers it, while it is locked: its
    /// first event may come before that returns.
    pub fn insert(
        &self,
        socket: TcpStream,
        peer: SocketAddr,
        worker: usize,
        then: impl FnOnce(&TcpStream) -> nix::Result<()>,
    ) {
        let fd = socket.as_raw_fd();
        event!("accepted", peer = peer, fd = fd, worker = worker);
        self.count.fetch_add(1, Ordering::SeqCst);
        let mut place = self.lock(fd);
        let connection = place.insert(Box::new(Connection::new(socket, peer, self.args)));
        if let Err(errno) = then(connection.socket()) {
            self.close(place, Ended::Failed(errno));
        } else if self.draining.load(Ordering::SeqCst) {
            drain::stop_receiving(fd);
        }
    }

    /// As [`Clients::advance`]. `then` is told what to wait for while the client is still locked,
    /// so that its descriptor is its own until that has been done.
    ///
    /// # Errors
    /// Those of `then`.
    pub fn advance(
        &self,
        fd: RawFd,
        then: impl FnOnce(&TcpStream, Waits) -> nix::Result<()>,
    ) -> nix::Result<()> {
        let mut place = self.lock(fd);
        let Some(connection) = &mut *place else { return Ok(()) };
        match connection.advance() {
            Ok(waits) => then(connection.socket(), waits),
            Err(ended) => {
                self.close(place, ended);
                Ok(())
            }
        }
    }

    fn close(&self, mut place: MutexGuard<'_, Option<Box<Connection>>>, reason: Ended) {
        if let Some(connection) = place.take() {
            connection.close(reason);
            self.count.fetch_sub(1, Ordering::SeqCst);
        }
    }

    /// How long a thread may wait before somebody's time may be over.
    pub fn timeout(&self) -> Option<Duration> {
        (!self.args.idle_timeout.is_zero()).then(|| pace(self.args))
    }

    /// Closes those who have been idle for too long, if it is time, and no other thread does it.
    pub fn close_idle(&self) {
        if self.args.idle_timeout.is_zero() {
            return;
        }
        let Ok(mut swept) = self.swept.try_lock() else { return };
        if swept.elapsed() < pace(self.args) {
            return;
        }
        *swept = Instant::now();
        for place in &self.table {
            let Ok(place) = place.try_lock() else { continue }; // being served: not idle
            if place.as_ref().is_some_and(|connection| connection.is_late(self.args)) {
                self.close(place, Ended::TimedOut);
            }
        }
    }

    /// As [`Clients::begin_drain`].
    pub fn begin_drain(&self) {
        self.draining.store(true, Ordering::SeqCst);
        for place in &self.table {
            if let Some(connection) = &*place.lock().unwrap_or_else(PoisonError::into_inner) {
                drain::stop_receiving(connection.as_fd().as_raw_fd());
            }
        }
    }

    /// Whether SIGTERM has come and the last client has gone.
    pub fn drained(&self) -> bool {
        self.draining.load(Ordering::SeqCst) && self.count.load(Ordering::SeqCst) == 0
    }
}

/// What a wait for events returned, where EINTR is no event: a signal handler has run, and the loop
/// looks at what that changed.
///
/// # Errors
/// The others.
pub fn events_or_none(waited: nix::Result<usize>) -> nix::Result<usize> {
    if waited == Err(Errno::EINTR) { Ok(0) } else { waited }
}

/// How often all clients are looked at: idle ones may overstay by a quarter. So it costs little
/// however many there are, and no timer is set and cleared for each request.
pub fn pace(args: &ServerArgs) -> Duration {
    (args.idle_timeout / 4).clamp(Duration::from_millis(5), Duration::from_secs(1))
}
