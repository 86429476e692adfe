//! Clients that the suite plays itself, call by call, from one thread: sockets that live on the
//! client's host and behave as badly as wanted.

use std::cell::RefCell;
use std::io::{self, ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpStream};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use nix::sys::socket::{SockaddrStorage, connect, setsockopt, sockopt};
use serverlab::lab::host::Host;
use serverlab::lab::sockets::SocketRow;
use serverlab::net::request::FILLER;

/// Sockets are fetched from their host so many at a time.
const STOCK: usize = 32;

/// Where clients come from, and whom they call.
#[derive(Debug)]
pub(crate) struct Callers<'a> {
    host: &'a Host,
    to: SocketAddr,
    patience: Duration,
    stock: RefCell<Vec<OwnedFd>>,
}

impl<'a> Callers<'a> {
    /// Clients on this host, which call this address and wait no longer than this for anything.
    pub(crate) fn new(host: &'a Host, to: (IpAddr, u16), patience: Duration) -> Callers<'a> {
        Callers { host, to: to.into(), patience, stock: RefCell::default() }
    }

    /// Calls.
    pub(crate) fn connect(&self) -> anyhow::Result<Caller> {
        self.connect_with(|_| Ok(()))
    }

    /// Calls, with a receive buffer of so many bytes (the kernel doubles it): the less, the sooner
    /// an answer that is not read holds its server up.
    pub(crate) fn connect_with_buffer(&self, bytes: usize) -> anyhow::Result<Caller> {
        self.connect_with(|socket| setsockopt(socket, sockopt::RcvBuf, &bytes))
    }

    fn connect_with(
        &self,
        prepare: impl FnOnce(&OwnedFd) -> nix::Result<()>,
    ) -> anyhow::Result<Caller> {
        let socket = self.socket()?;
        prepare(&socket)?;
        let socket = TcpStream::from(socket);
        socket.set_write_timeout(Some(self.patience))?; // it limits connect(2) too
        socket.set_read_timeout(Some(self.patience))?;
        socket.set_nodelay(true)?;
        connect(socket.as_raw_fd(), &SockaddrStorage::from(self.to))
            .map_err(io::Error::from)
            .with_context(|| format!("connect to {}", self.to))?;
        let address = socket.local_addr()?;
        let address = SocketAddr::new(address.ip(), address.port());
        Ok(Caller { address, to: self.to, socket })
    }

    fn socket(&self) -> anyhow::Result<OwnedFd> {
        let mut stock = self.stock.borrow_mut();
        if stock.is_empty() {
            let domain = if self.to.is_ipv6() { libc::AF_INET6 } else { libc::AF_INET };
            *stock = self.host.sockets(domain, libc::SOCK_STREAM, 0, STOCK)?;
        }
        stock.pop().context("the host gave no socket")
    }

    /// Calls, asks for so many bytes, gets them, and leaves.
    pub(crate) fn ask(&self, bytes: usize) -> anyhow::Result<()> {
        let mut caller = self.connect()?;
        caller.say(&format!("{bytes}\n"))?;
        caller.hear(bytes)
    }
}

/// One client. Dropping it closes its connection.
#[derive(Debug)]
pub(crate) struct Caller {
    address: SocketAddr,
    to: SocketAddr,
    socket: TcpStream,
}

/// How a server ended a connection, as its client learns it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// A FIN: recv(2) gives 0.
    Fin,
    /// A RST: ECONNRESET.
    Rst,
}

impl Caller {
    /// Its own address, by which the server knows it.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Whether this is its server's side of the connection. Its own address alone does not say so:
    /// TCP may remember a client of another port's who had it (TIME_WAIT).
    pub(crate) fn is_peer_of(&self, row: &SocketRow) -> bool {
        row.remote == self.address && row.local == self.to
    }

    /// Sends this.
    pub(crate) fn say(&mut self, text: &str) -> anyhow::Result<()> {
        self.socket.write_all(text.as_bytes()).with_context(|| format!("send {text:?}"))
    }

    /// recv(2), again after a signal: where there is a time limit, SIGCHLD of anybody's child in this
    /// process may interrupt it, though nobody handles it (signal(7)).
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.socket.read(buffer) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                read => return read,
            }
        }
    }

    /// Receives so many bytes of answer, and checks them.
    pub(crate) fn hear(&mut self, bytes: usize) -> anyhow::Result<()> {
        let mut left = bytes;
        let mut buffer = vec![0; FILLER.len()];
        while left > 0 {
            let wanted = left.min(buffer.len());
            let heard = match self.read(&mut buffer[..wanted]) {
                Ok(0) => bail!("the connection ended {left} bytes before the end of {bytes}"),
                Ok(heard) => heard,
                Err(error) => {
                    let missing = format!("{left} of {bytes} bytes of an answer are missing");
                    return Err(error).context(missing);
                }
            };
            ensure!(buffer[..heard] == FILLER[..heard], "an answer with wrong bytes");
            left -= heard;
        }
        Ok(())
    }

    /// Waits for the end of the connection. Nothing may come before it.
    pub(crate) fn end(&mut self) -> anyhow::Result<End> {
        match self.read(&mut [0; 64]) {
            Ok(0) => Ok(End::Fin),
            Ok(count) => bail!("{count} bytes where the end was expected"),
            Err(error) if error.kind() == ErrorKind::ConnectionReset => Ok(End::Rst),
            Err(error) => Err(error).context("the connection does not end"),
        }
    }

    /// Whether the server has ended the connection within this time; nothing may come before.
    pub(crate) fn ended_within(&mut self, time: Duration) -> anyhow::Result<bool> {
        let before = self.socket.read_timeout()?;
        self.socket.set_read_timeout(Some(time))?;
        let read = self.read(&mut [0; 64]);
        self.socket.set_read_timeout(before)?;
        match read {
            Ok(0) => Ok(true),
            Ok(count) => bail!("{count} bytes where the end was expected"),
            Err(error) if error.kind() == ErrorKind::ConnectionReset => Ok(true),
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Whether bytes, or the end, are here to be received.
    pub(crate) fn has_news(&self) -> anyhow::Result<bool> {
        self.socket.set_nonblocking(true)?;
        let peeked = self.socket.peek(&mut [0; 1]);
        self.socket.set_nonblocking(false)?;
        match peeked {
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(false),
            _ => Ok(true),
        }
    }

    /// Sends a FIN; goes on to receive.
    pub(crate) fn finish(&mut self) -> anyhow::Result<()> {
        Ok(self.socket.shutdown(Shutdown::Write)?)
    }

    /// Closes with a RST instead of a FIN.
    pub(crate) fn reset(self) -> anyhow::Result<()> {
        let linger = libc::linger { l_onoff: 1, l_linger: 0 };
        Ok(setsockopt(&self.socket, sockopt::Linger, &linger)?)
    }
}
