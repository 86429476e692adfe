//! A scripted socket: each argument is one system call, and each prints what the kernel answered.
//!
//! Two of them, one a server and one a client, play any exchange, step by step; `pause` waits for a
//! line on standard input, so that whoever runs both orders their steps without a clock.
//!
//! ```text
//!   peer listen accept pause linger:0 close         listening, accepted, paused, set, closed
//!   peer connect send:5 recv recv send:1            connected, sent bytes=5,
//!                                                   failed call=recv errno=ECONNRESET,
//!                                                   received bytes=0,
//!                                                   failed call=send errno=EPIPE
//! ```
//!
//! What to notice: an error is an answer, not the end: the next step follows, the status is 0.
//! Break it: add `sigpipe:default`, and the send after a reset ends the process by SIGPIPE.
//! Compare: rst.rs and sigpipe.rs, the same calls as programs to read.
//! Run: cargo run --bin peer -- listen accept   then: cargo run --bin peer -- connect close
//! See: connect(2), accept(2), send(2), recv(2), shutdown(2), close(2), poll(2), socket(7), tcp(7).
#![allow(unsafe_code, reason = "handles signals, forks, and calls poll(2)")]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use clap::Parser;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction, signal};
use nix::sys::socket::{
    AddressFamily, Backlog, MsgFlags, Shutdown, SockFlag, SockType, SockaddrStorage, bind, connect,
    getpeername, getsockname, getsockopt, listen, recv, send, sendto, setsockopt, shutdown, socket,
    sockopt,
};
use nix::unistd::{ForkResult, dup, fork};
use serverlab::event;
use serverlab::net::listen::{accept, name};
use serverlab::net::{
    self,
    script::{Local, Step, events},
};

/// A scripted socket: each argument is one system call, and each prints what the kernel answered
#[derive(Parser)]
#[command(version, after_help = STEPS)]
struct Args {
    /// Address to connect to or to listen on
    #[arg(short = 'i', long, default_value_t = Ipv4Addr::LOCALHOST.into(), value_name = "ADDRESS")]
    host: IpAddr,
    /// Port to connect to or to listen on; 0 lets the kernel choose for `listen`
    #[arg(short, long, default_value_t = 2000)]
    port: u16,
    /// What to do, in order
    #[arg(required = true, value_name = "STEP")]
    steps: Vec<Step>,
}

const STEPS: &str = "\
Steps: connect  fastopen:TEXT  listen[:BACKLOG]  listen-again:BACKLOG  accept
       socket  bind:PORT|ADDRESS|ADDRESS:PORT (for the connect or listen after them)
       send:N  send:TEXT  fill (send until it would block)  recv[:N]  recv-all
       shutdown:rd|wr|rdwr  linger:SECONDS|off  nodelay:on|off  nonblock:on|off
       set:OPTION=N  get:OPTION (cork, keepidle, repair, fionread ...)  rcvbuf:N
       flags:nosignal+dontwait+more+oob+peek+waitall|none  sigpipe:default|ignore
       poll[:in+out+rdhup+pri|none]  ready[:...] (poll without waiting)
       so-error  getpeername  dup  fork  handle:usr1[+restart]
       close  older  close-listener  shutdown-listener
       pause (waits for a line on standard input)
Steps are about the newest connection; `close` makes the one before it the newest.";

/// What the steps so far have opened and set.
struct Peer {
    address: SocketAddr,
    /// What `socket` has made and no `connect` or `listen` has taken yet.
    fresh: Option<OwnedFd>,
    listener: Option<TcpListener>,
    connections: Vec<OwnedFd>,
    flags: MsgFlags,
    receive_buffer: Option<usize>,
}

fn main() {
    let args = Args::parse();
    net::event::start("peer", false);
    let address = SocketAddr::new(args.host, args.port);
    let mut peer = Peer {
        address,
        fresh: None,
        listener: None,
        connections: Vec::new(),
        flags: MsgFlags::empty(),
        receive_buffer: None,
    };
    for step in &args.steps {
        if let Err(errno) = peer.perform(step) {
            event!("failed", call = step.call(), errno = name(errno));
        }
    }
}

impl Peer {
    fn perform(&mut self, step: &Step) -> nix::Result<()> {
        match step {
            Step::Socket => {
                let socket = self.socket()?;
                event!("opened", fd = socket.as_raw_fd());
                self.fresh = Some(socket);
            }
            Step::Bind(local) => {
                let socket = self.fresh.as_ref().ok_or(Errno::EBADF)?;
                bind(socket.as_raw_fd(), &SockaddrStorage::from(self.own_address(*local)))?;
                event!("bound", local = getsockname::<SockaddrStorage>(socket.as_raw_fd())?);
            }
            Step::Connect => self.connect()?,
            Step::FastOpen(bytes) => {
                let socket = self.take_fresh()?;
                let fd = socket.as_raw_fd();
                self.connections.push(socket);
                let flag = MsgFlags::from_bits_retain(libc::MSG_FASTOPEN);
                let sent = sendto(fd, bytes, &SockaddrStorage::from(self.address), flag)?;
                event!("sent", bytes = sent);
            }
            Step::ListenAgain(backlog) => {
                listen(self.listener.as_ref().ok_or(Errno::EBADF)?, Backlog::new(*backlog)?)?;
                event!("listening", address = self.address, backlog = backlog);
            }
            Step::Listen(backlog) => self.listen(*backlog)?,
            Step::Accept => {
                let (socket, peer) = accept(self.listener.as_ref().ok_or(Errno::EBADF)?)?;
                event!("accepted", peer = peer, fd = socket.as_raw_fd());
                self.connections.push(socket.into());
            }
            Step::Send(bytes) => {
                let sent = send(self.newest()?.as_raw_fd(), bytes, self.flags)?;
                event!("sent", bytes = sent);
            }
            Step::Recv(size) => {
                let mut buffer = vec![0; *size];
                let received = recv(self.newest()?.as_raw_fd(), &mut buffer, self.flags)?;
                match text(&buffer[..received]) {
                    Some(text) => event!("received", bytes = received, text = text),
                    None => event!("received", bytes = received),
                }
            }
            Step::Fill => self.fill()?,
            Step::RecvAll => self.receive_all()?,
            Step::Set(option, value) => {
                option.set(self.subject()?, *value)?;
                event!("set", option = option.name, value = value);
            }
            Step::Get(option) => {
                event!("got", option = option.name, value = option.get(self.subject()?)?);
            }
            Step::NonBlock(on) => {
                let flags = if *on { OFlag::O_NONBLOCK } else { OFlag::empty() };
                fcntl(self.subject()?, FcntlArg::F_SETFL(flags))?;
            }
            Step::Shutdown(how) => {
                shutdown(self.newest()?.as_raw_fd(), *how)?;
                event!("shut-down", how = format_args!("{how:?}"));
            }
            Step::Linger(seconds) => {
                let l_onoff = seconds.is_some().into();
                let linger = libc::linger { l_onoff, l_linger: seconds.unwrap_or(0) };
                setsockopt(&self.newest()?, sockopt::Linger, &linger)?;
                event!("set", option = "SO_LINGER", on = l_onoff, seconds = linger.l_linger);
            }
            Step::NoDelay(on) => {
                setsockopt(&self.newest()?, sockopt::TcpNoDelay, on)?;
                event!("set", option = "TCP_NODELAY", on = *on);
            }
            Step::ReceiveBuffer(size) => self.receive_buffer = Some(*size),
            Step::Flags(flags) => self.flags = *flags,
            Step::SigPipe(action) => {
                // SAFETY: neither SIG_DFL nor SIG_IGN runs code of ours.
                unsafe { signal(Signal::SIGPIPE, (*action).into()) }?;
            }
            Step::Poll(wanted) => self.poll(*wanted, -1)?,
            Step::Ready(wanted) => self.poll(*wanted, 0)?,
            Step::Handle(restart) => {
                let flags = if *restart { SaFlags::SA_RESTART } else { SaFlags::empty() };
                let action = SigAction::new(SigHandler::Handler(tell), flags, SigSet::empty());
                // SAFETY: the handler prints an event, which is async-signal-safe.
                unsafe { sigaction(Signal::SIGUSR1, &action) }?;
                event!("set", signal = "SIGUSR1", restart = restart);
            }
            Step::SoError => {
                let error = getsockopt(&self.newest()?, sockopt::SocketError)?;
                event!("so-error", errno = name(Errno::from_raw(error)));
            }
            Step::PeerName => {
                let peer: SockaddrStorage = getpeername(self.newest()?.as_raw_fd())?;
                event!("peer-name", peer = peer);
            }
            Step::Dup => {
                let copy = dup(self.newest()?)?;
                event!("duplicated", fd = copy.as_raw_fd());
                self.connections.push(copy);
            }
            Step::Older => {
                self.connections.first().ok_or(Errno::EBADF)?;
                self.connections.rotate_left(1);
            }
            // SAFETY: the child does nothing but pause(2), which allocates nothing.
            Step::Fork => match unsafe { fork() }? {
                ForkResult::Parent { child } => event!("forked", child = child),
                ForkResult::Child => loop {
                    nix::unistd::pause();
                },
            },
            Step::Close => {
                drop(self.connections.pop().ok_or(Errno::EBADF)?);
                event!("closed", what = "connection");
            }
            Step::CloseListener => {
                drop(self.listener.take().ok_or(Errno::EBADF)?);
                event!("closed", what = "listener");
            }
            Step::ShutdownListener => {
                let listener = self.listener.as_ref().ok_or(Errno::EBADF)?;
                shutdown(listener.as_raw_fd(), Shutdown::Both)?;
                event!("shut-down", what = "listener");
            }
            Step::Pause => net::pause(),
        }
        Ok(())
    }

    fn connect(&mut self) -> nix::Result<()> {
        let socket = self.take_fresh()?;
        let fd = socket.as_raw_fd();
        self.connections.push(socket); // even if connect fails: the next steps may ask about it
        connect(fd, &SockaddrStorage::from(self.address))?;
        event!("connected", peer = self.address, local = getsockname::<SockaddrStorage>(fd)?);
        Ok(())
    }

    fn listen(&mut self, backlog: i32) -> nix::Result<()> {
        let socket = match self.fresh.take() {
            Some(socket) => socket,
            None => {
                let socket = self.socket()?;
                setsockopt(&socket, sockopt::ReuseAddr, &true)?;
                bind(socket.as_raw_fd(), &SockaddrStorage::from(self.address))?;
                socket
            }
        };
        listen(&socket, Backlog::new(backlog)?)?;
        let address: SockaddrStorage = getsockname(socket.as_raw_fd())?;
        event!("listening", address = address, backlog = backlog);
        self.listener = Some(socket.into());
        Ok(())
    }

    /// A socket of the address's family, with the receive buffer that a step before asked for:
    /// only what is set before the handshake decides about the window (tcp(7)).
    fn socket(&self) -> nix::Result<OwnedFd> {
        let ipv6 = self.address.is_ipv6();
        let family = if ipv6 { AddressFamily::Inet6 } else { AddressFamily::Inet };
        let socket = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
        if let Some(size) = self.receive_buffer {
            setsockopt(&socket, sockopt::RcvBuf, &size)?;
        }
        Ok(socket)
    }

    fn take_fresh(&mut self) -> nix::Result<OwnedFd> {
        self.fresh.take().map_or_else(|| self.socket(), Ok)
    }

    /// Any address of the peer's family, where none is given.
    fn own_address(&self, local: Local) -> SocketAddr {
        let any = match self.address {
            SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        SocketAddr::new(local.ip.unwrap_or(any), local.port)
    }

    fn fill(&self) -> nix::Result<()> {
        let (fd, chunk) = (self.newest()?.as_raw_fd(), [b'x'; 65536]);
        let mut total = 0;
        loop {
            match send(fd, &chunk, self.flags | MsgFlags::MSG_DONTWAIT) {
                Ok(sent) => total += sent,
                Err(Errno::EAGAIN) => break,
                Err(errno) => return Err(errno),
            }
        }
        event!("filled", bytes = total);
        Ok(())
    }

    fn poll(&self, wanted: libc::c_short, timeout: i32) -> nix::Result<()> {
        let fd = self.subject()?.as_raw_fd();
        let mut subject = libc::pollfd { fd, events: wanted, revents: 0 };
        // SAFETY: one pollfd, which outlives the call. (nix's poll knows no POLLRDHUP.)
        Errno::result(unsafe { libc::poll(&raw mut subject, 1, timeout) })?;
        event!("polled", revents = events(subject.revents));
        Ok(())
    }

    fn receive_all(&self) -> nix::Result<()> {
        let (fd, mut buffer) = (self.newest()?.as_raw_fd(), vec![0; 65536]);
        let mut total = 0;
        let end = loop {
            match recv(fd, &mut buffer, self.flags) {
                Ok(0) => break Ok(()),
                Ok(count) => total += count,
                Err(errno) => break Err(errno),
            }
        };
        event!("received", bytes = total);
        end?;
        event!("received", bytes = 0);
        Ok(())
    }

    fn newest(&self) -> nix::Result<BorrowedFd<'_>> {
        self.connections.last().map(AsFd::as_fd).ok_or(Errno::EBADF)
    }

    /// What options and waits are about: the new socket, else the newest connection, else the
    /// listener.
    fn subject(&self) -> nix::Result<BorrowedFd<'_>> {
        let fresh = self.fresh.as_ref().map(AsFd::as_fd);
        let listener = self.listener.as_ref().map(AsFd::as_fd);
        fresh.or(self.newest().ok()).or(listener).ok_or(Errno::EBADF)
    }
}

/// Received bytes that are a short text, and not the filler that `send:N` sends.
fn text(bytes: &[u8]) -> Option<&str> {
    let short = bytes.len() <= 32 && bytes.iter().any(|byte| *byte != b'x');
    short.then(|| str::from_utf8(bytes).ok()).flatten()
}

extern "C" fn tell(_: libc::c_int) {
    let errno = Errno::last_raw();
    event!("signaled", signal = "SIGUSR1");
    Errno::set_raw(errno);
}
