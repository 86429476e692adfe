//! The load: so many clients in one thread, each of which connects, asks, reads the answer, closes,
//! and begins again at once. It runs on the host, as a program of its own, and prints what came of
//! it as JSON.
//!
//! It costs less than the servers do, or it would measure itself: one epoll, no process a client, no
//! look at what the bytes are. The request is sent right after connect(2): over loopback the
//! handshake is over then.

use std::net::{Ipv4Addr, Shutdown, SocketAddrV4, TcpStream};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use hdrhistogram::Histogram;
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, SockaddrIn, connect, recv, send, socket,
};
use nix::sys::time::TimeValLike as _;
use serde::{Deserialize, Serialize};

use super::idle;
use super::meter::Meter;

const REQUEST: &[u8] = b"1024\n";
const ANSWER: usize = 1024;

/// How long the clients may take to finish when no new ones begin.
pub(crate) const PATIENCE: Duration = Duration::from_secs(4);

/// After so many errors the server is as good as gone.
const TOO_MANY: u64 = 1000;

/// What to do.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Load {
    pub(crate) port: u16,
    /// Clients at a time.
    pub(crate) clients: usize,
    /// Requests on each connection.
    pub(crate) requests: u64,
    /// Connections that are there and say nothing.
    pub(crate) idle: usize,
    /// Stop after so many connections, however long it takes.
    pub(crate) connections: Option<u64>,
    /// Before this nothing counts.
    pub(crate) warm_up: Duration,
    pub(crate) run: Duration,
    /// The processor to run on.
    pub(crate) cpu: usize,
    pub(crate) meter: Meter,
}

/// What came of it.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub(crate) struct Outcome {
    /// Connections and requests that count, those that were finished after the time included.
    pub(crate) connections: u64,
    pub(crate) requests: u64,
    /// A second, within the time.
    pub(crate) connections_a_second: f64,
    pub(crate) requests_a_second: f64,
    pub(crate) server_cpu_us: f64,
    pub(crate) client_cpu_us: f64,
    /// From connect to the last byte; from send, if there is more than one request a connection.
    pub(crate) p50_us: u64,
    pub(crate) p99_us: u64,
    /// Clients that had no answer when patience ended.
    pub(crate) unfinished: usize,
    pub(crate) errors: u64,
    pub(crate) first_error: Option<String>,
    /// Of the idle connections.
    pub(crate) lost: usize,
    /// Told by the kernel of the host: see main.rs.
    pub(crate) listen_overflows: i64,
    pub(crate) timeouts: i64,
}

struct Client {
    socket: OwnedFd,
    since: Instant,
    asked: u64,
    received: usize,
}

struct Clients<'a> {
    load: &'a Load,
    epoll: Epoll,
    slots: Vec<Option<Client>>,
    begun: u64,
    /// Whether a connection ends with its next answer, however many more it was to have.
    over: bool,
    outcome: Outcome,
    latencies: Histogram<u32>,
}

/// Does it.
pub(crate) fn run(load: &Load) -> anyhow::Result<Outcome> {
    super::server::pin(load.cpu)?;
    super::server::raise_open_files()?;
    wait_for_server(load.port)?;
    let mut idle = idle::open(load)?;
    let mut clients = Clients {
        load,
        epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?,
        slots: (0..load.clients).map(|_| None).collect(),
        begun: 0,
        over: false,
        outcome: Outcome::default(),
        latencies: Histogram::new_with_bounds(1, 60_000_000, 3)?,
    };
    if load.connections.is_none() {
        clients.until(Instant::now() + load.warm_up)?;
        clients.outcome = Outcome::default();
        clients.latencies.reset();
    }
    let (server, client) = (load.meter.read()?, own_cpu()?);
    let started = Instant::now();
    clients.until(started + load.run)?;
    let (took, in_time) = (started.elapsed().as_secs_f64(), clients.outcome.clone());
    clients.finish()?;
    let mut outcome = clients.outcome;
    outcome.connections_a_second = in_time.connections as f64 / took;
    outcome.requests_a_second = in_time.requests as f64 / took;
    outcome.client_cpu_us = own_cpu()? - client;
    outcome.server_cpu_us = load.meter.settled()? - server;
    outcome.p50_us = clients.latencies.value_at_quantile(0.5);
    outcome.p99_us = clients.latencies.value_at_quantile(0.99);
    outcome.lost = idle::lost(&mut idle);
    Ok(outcome)
}

impl Clients<'_> {
    /// Keeps all clients busy until then, or until all connections are made.
    fn until(&mut self, end: Instant) -> anyhow::Result<()> {
        for slot in 0..self.slots.len() {
            if self.slots[slot].is_none() {
                self.begin(slot);
            }
        }
        while self.goes_on() && (self.load.connections.is_some() || Instant::now() < end) {
            self.turn(true)?;
        }
        Ok(())
    }

    /// Lets those who have begun come to their end.
    fn finish(&mut self) -> anyhow::Result<()> {
        self.over = true;
        let end = Instant::now() + PATIENCE;
        while self.busy() > 0 && Instant::now() < end {
            self.turn(false)?;
        }
        self.outcome.unfinished = self.busy();
        Ok(())
    }

    fn busy(&self) -> usize {
        self.slots.iter().flatten().count()
    }

    fn goes_on(&self) -> bool {
        let more = self.load.connections.is_none_or(|most| self.begun < most);
        more && self.outcome.errors < TOO_MANY
    }

    /// One epoll_wait(2), and what it tells of.
    fn turn(&mut self, again: bool) -> anyhow::Result<()> {
        let mut events = [EpollEvent::empty(); 128];
        let ready = match self.epoll.wait(&mut events, EpollTimeout::from(100u8)) {
            Ok(ready) => ready,
            Err(Errno::EINTR) => 0,
            Err(errno) => return Err(errno.into()),
        };
        for event in &events[..ready] {
            let slot = event.data() as usize;
            match self.advance(slot) {
                Ok(false) => continue,
                Ok(true) => self.outcome.connections += 1,
                Err(error) => self.failed(&error),
            }
            self.slots[slot] = None; // close(2)
            if again && self.goes_on() {
                self.begin(slot);
            }
        }
        if ready == 0 && again {
            self.until_next(); // those who could not even begin
        }
        Ok(())
    }

    fn until_next(&mut self) {
        for slot in 0..self.slots.len() {
            if self.slots[slot].is_none() && self.goes_on() {
                self.begin(slot);
            }
        }
    }

    fn failed(&mut self, error: &anyhow::Error) {
        self.outcome.errors += 1;
        self.outcome.first_error.get_or_insert_with(|| format!("{error:#}"));
    }

    fn begin(&mut self, slot: usize) {
        self.begun += 1;
        match self.connect(slot) {
            Ok(client) => self.slots[slot] = Some(client),
            Err(error) => self.failed(&error),
        }
    }

    /// socket, connect, send, epoll_ctl ADD.
    fn connect(&self, slot: usize) -> anyhow::Result<Client> {
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let socket = socket(AddressFamily::Inet, SockType::Stream, flags, None)?;
        let since = Instant::now();
        let to = SockaddrIn::from(address(self.load.port, self.begun));
        let mut client = Client { socket, since, asked: 0, received: 0 };
        let events = match connect(client.socket.as_raw_fd(), &to) {
            Ok(()) => {
                client.ask()?;
                EpollFlags::EPOLLIN
            }
            Err(Errno::EINPROGRESS) => EpollFlags::EPOLLOUT, // its SYN was not answered at once
            Err(errno) => return Err(errno).context("connect"),
        };
        self.epoll.add(&client.socket, EpollEvent::new(events, slot as u64))?;
        Ok(client)
    }

    /// Does what the socket allows. Whether the connection has come to its proper end.
    fn advance(&mut self, slot: usize) -> anyhow::Result<bool> {
        let Some(client) = &mut self.slots[slot] else { return Ok(false) };
        if client.asked == 0 {
            client.ask()?;
            let mut readable = EpollEvent::new(EpollFlags::EPOLLIN, slot as u64);
            self.epoll.modify(&client.socket, &mut readable)?;
            return Ok(false);
        }
        match recv(client.socket.as_raw_fd(), &mut [0; 2 * ANSWER], MsgFlags::empty()) {
            Ok(0) => anyhow::bail!("recv: the end, after {} bytes", client.received),
            Ok(count) => client.received += count,
            Err(Errno::EAGAIN | Errno::EINTR) => return Ok(false),
            Err(errno) => return Err(errno).context("recv"),
        }
        ensure!(client.received <= ANSWER, "recv: more than was asked for");
        if client.received < ANSWER {
            return Ok(false);
        }
        self.outcome.requests += 1;
        self.latencies.saturating_record(client.since.elapsed().as_micros() as u64);
        if self.over || client.asked == self.load.requests {
            return Ok(true);
        }
        client.since = Instant::now();
        client.ask()?;
        Ok(false)
    }
}

impl Client {
    fn ask(&mut self) -> anyhow::Result<()> {
        send(self.socket.as_raw_fd(), REQUEST, MsgFlags::MSG_NOSIGNAL).context("send")?;
        (self.asked, self.received) = (self.asked + 1, 0);
        Ok(())
    }
}

/// 127.0.0.1 to 127.0.0.32 in turn: TIME_WAIT is here, and each address has ports of its own.
pub(crate) fn address(port: u16, number: u64) -> SocketAddrV4 {
    SocketAddrV4::new(Ipv4Addr::new(127, 0, 0, 1 + (number % 32) as u8), port)
}

fn own_cpu() -> nix::Result<f64> {
    let usage = getrusage(UsageWho::RUSAGE_SELF)?;
    Ok((usage.user_time() + usage.system_time()).num_microseconds() as f64)
}

/// Its first event line goes to /dev/null, so it is asked until it answers.
fn wait_for_server(port: u16) -> anyhow::Result<()> {
    let end = Instant::now() + 2 * PATIENCE;
    loop {
        match TcpStream::connect(address(port, 0)) {
            Ok(stream) => return Ok(stream.shutdown(Shutdown::Both)?),
            Err(error) if Instant::now() >= end => return Err(error).context("no server"),
            Err(_) => std::thread::sleep(Duration::from_millis(1)),
        }
    }
}
