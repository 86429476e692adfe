//! The steps of `peer`, as words on its command line.

use std::ops::BitOr;
use std::str::FromStr;

use std::net::{IpAddr, SocketAddr};

use libc::{c_int, c_short};
use nix::sys::signal::SigHandler;
use nix::sys::socket::{MsgFlags, Shutdown};

use crate::net::options::SocketOption;

/// One step: most are one system call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// `socket`: a new socket, for `set`, `bind` and then `connect` or `listen`.
    Socket,
    /// `bind:PORT`, `bind:ADDRESS` or `bind:ADDRESS:PORT`: gives the new socket its own address.
    Bind(Local),
    /// `connect`: the new socket, or one made for it, connected to the peer.
    Connect,
    /// `fastopen:TEXT`: sendto with MSG_FASTOPEN: connects and sends at once.
    FastOpen(Vec<u8>),
    /// `listen` or `listen:BACKLOG`: the new socket, or one made for it, bound and listening.
    Listen(i32),
    /// `listen-again:BACKLOG`: listen on the listener once more.
    ListenAgain(i32),
    /// `accept`: the next connection from the listener.
    Accept,
    /// `send:N`: N bytes; `send:TEXT`: the text, in which `\n` stands for a newline.
    Send(Vec<u8>),
    /// `recv` or `recv:N`: one call, for at most N bytes.
    Recv(usize),
    /// `recv-all`: as many calls as it takes to reach the end or an error.
    RecvAll,
    /// `fill`: sends without waiting until the socket takes no more.
    Fill,
    /// `shutdown:rd`, `shutdown:wr`, `shutdown:rdwr`.
    Shutdown(Shutdown),
    /// `linger:SECONDS` or `linger:off`: SO_LINGER.
    Linger(Option<i32>),
    /// `nodelay:on`, `nodelay:off`: TCP_NODELAY.
    NoDelay(bool),
    /// `set:OPTION=N`: setsockopt of the new socket, else the newest connection, else the listener.
    Set(SocketOption, c_int),
    /// `get:OPTION`: getsockopt of the same, or what an ioctl tells: FIONREAD, SIOCATMARK, SIOCOUTQ.
    Get(SocketOption),
    /// `nonblock:on`, `nonblock:off`: O_NONBLOCK of the same.
    NonBlock(bool),
    /// `rcvbuf:N`: SO_RCVBUF of the sockets that later steps make.
    ReceiveBuffer(usize),
    /// `flags:none`, or names joined by `+`: the flags of each send and recv from here on.
    Flags(MsgFlags),
    /// `sigpipe:default`, `sigpipe:ignore`: what SIGPIPE does from here on.
    SigPipe(SigPipe),
    /// `poll`, `poll:in`, `poll:rdhup`, `poll:none` ...: waits for the event and tells revents.
    Poll(c_short),
    /// `ready`, `ready:rdhup` ...: as `poll`, without waiting.
    Ready(c_short),
    /// `handle:usr1`, with `+restart` for SA_RESTART: a handler of SIGUSR1 that tells it ran.
    Handle(bool),
    /// `so-error`: getsockopt SO_ERROR, which also clears it.
    SoError,
    /// `getpeername`.
    PeerName,
    /// `dup`: another descriptor for the same connection.
    Dup,
    /// `older`: makes the oldest connection the newest.
    Older,
    /// `fork`: a child that keeps a copy of every descriptor, and does nothing, until it is killed.
    Fork,
    /// `close`: the newest connection; the one before it becomes the newest.
    Close,
    /// `close-listener`.
    CloseListener,
    /// `shutdown-listener`.
    ShutdownListener,
    /// `pause`: waits for a line, or the end, of standard input.
    Pause,
}

/// An address of one's own; what is left out is the kernel's choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Local {
    /// The address, or any.
    pub ip: Option<IpAddr>,
    /// The port; 0 is any.
    pub port: u16,
}

impl FromStr for Local {
    type Err = String;

    fn from_str(text: &str) -> Result<Local, String> {
        if let Ok(port) = text.parse() {
            return Ok(Local { ip: None, port });
        }
        if let Ok(ip) = text.parse() {
            return Ok(Local { ip: Some(ip), port: 0 });
        }
        let address: SocketAddr = text.parse().map_err(|_| format!("`{text}` is no address"))?;
        Ok(Local { ip: Some(address.ip()), port: address.port() })
    }
}

/// What SIGPIPE does.
#[derive(clap::ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum SigPipe {
    /// SIG_DFL: it ends the process
    Default,
    /// SIG_IGN: it does nothing, and the write fails with EPIPE
    Ignore,
}

/// The flags that `flags:` knows.
const FLAGS: [(&str, MsgFlags); 6] = [
    ("waitall", MsgFlags::MSG_WAITALL),
    ("nosignal", MsgFlags::MSG_NOSIGNAL),
    ("dontwait", MsgFlags::MSG_DONTWAIT),
    ("more", MsgFlags::from_bits_retain(libc::MSG_MORE)),
    ("oob", MsgFlags::MSG_OOB),
    ("peek", MsgFlags::MSG_PEEK),
];

/// The events of poll(2), as `poll:` and the event `polled` name them.
const EVENTS: [(&str, c_short); 6] = [
    ("in", libc::POLLIN),
    ("pri", libc::POLLPRI),
    ("out", libc::POLLOUT),
    ("rdhup", libc::POLLRDHUP),
    ("err", libc::POLLERR),
    ("hup", libc::POLLHUP),
];

impl From<SigPipe> for SigHandler {
    fn from(action: SigPipe) -> SigHandler {
        match action {
            SigPipe::Default => SigHandler::SigDfl,
            SigPipe::Ignore => SigHandler::SigIgn,
        }
    }
}

impl Step {
    /// The system call that an error of this step is from: the `call` of the event `failed`.
    pub fn call(&self) -> &'static str {
        match self {
            Step::Socket => "socket",
            Step::Bind(_) => "bind",
            Step::Connect => "connect",
            Step::FastOpen(_) => "sendto",
            Step::Listen(_) => "bind", // listen(2) itself fails only for sockets we do not make
            Step::ListenAgain(_) => "listen",
            Step::Accept => "accept",
            Step::Send(_) | Step::Fill => "send",
            Step::Recv(_) | Step::RecvAll => "recv",
            Step::Shutdown(_) | Step::ShutdownListener => "shutdown",
            Step::Linger(_) | Step::NoDelay(_) | Step::ReceiveBuffer(_) | Step::Set(..) => {
                "setsockopt"
            }
            Step::SoError | Step::Get(_) => "getsockopt",
            Step::NonBlock(_) => "fcntl",
            Step::PeerName => "getpeername",
            Step::SigPipe(_) => "signal",
            Step::Handle(_) => "sigaction",
            Step::Poll(_) | Step::Ready(_) => "poll",
            Step::Fork => "fork",
            Step::Dup => "dup",
            Step::Close | Step::CloseListener => "close",
            Step::Flags(_) | Step::Older | Step::Pause => "none",
        }
    }
}

impl FromStr for Step {
    type Err = String;

    fn from_str(word: &str) -> Result<Step, String> {
        let (step, value) = match word.split_once(':') {
            Some((step, value)) => (step, Some(value)),
            None => (word, None),
        };
        Ok(match (step, value) {
            ("socket", None) => Step::Socket,
            ("bind", Some(local)) => Step::Bind(local.parse()?),
            ("connect", None) => Step::Connect,
            ("fastopen", Some(what)) => Step::FastOpen(payload(what)?),
            ("listen-again", Some(backlog)) => Step::ListenAgain(number(backlog)?),
            ("listen", None) => Step::Listen(128),
            ("listen", Some(backlog)) => Step::Listen(number(backlog)?),
            ("accept", None) => Step::Accept,
            ("send", Some(what)) => Step::Send(payload(what)?),
            ("recv", None) => Step::Recv(65536),
            ("recv", Some(count)) => Step::Recv(number(count)?),
            ("recv-all", None) => Step::RecvAll,
            ("fill", None) => Step::Fill,
            ("shutdown", Some("rd")) => Step::Shutdown(Shutdown::Read),
            ("shutdown", Some("wr")) => Step::Shutdown(Shutdown::Write),
            ("shutdown", Some("rdwr")) => Step::Shutdown(Shutdown::Both),
            ("linger", Some("off")) => Step::Linger(None),
            ("linger", Some(seconds)) => Step::Linger(Some(number(seconds)?)),
            ("nodelay", Some(state)) => Step::NoDelay(switch(state)?),
            ("set", Some(assignment)) => {
                let (option, value) = assignment.split_once('=').ok_or("`set:` wants OPTION=N")?;
                Step::Set(self::option(option)?, number(value)?)
            }
            ("get", Some(option)) => Step::Get(self::option(option)?),
            ("nonblock", Some(state)) => Step::NonBlock(switch(state)?),
            ("rcvbuf", Some(size)) => Step::ReceiveBuffer(number(size)?),
            ("flags", Some(names)) => Step::Flags(union(names, MsgFlags::empty(), &FLAGS)?),
            ("sigpipe", Some("default")) => Step::SigPipe(SigPipe::Default),
            ("sigpipe", Some("ignore")) => Step::SigPipe(SigPipe::Ignore),
            ("poll", None) => Step::Poll(libc::POLLIN),
            ("poll", Some(names)) => Step::Poll(union(names, 0, &EVENTS)?),
            ("ready", None) => Step::Ready(libc::POLLIN),
            ("ready", Some(names)) => Step::Ready(union(names, 0, &EVENTS)?),
            ("handle", Some("usr1")) => Step::Handle(false),
            ("handle", Some("usr1+restart")) => Step::Handle(true),
            ("older", None) => Step::Older,
            ("fork", None) => Step::Fork,
            ("so-error", None) => Step::SoError,
            ("getpeername", None) => Step::PeerName,
            ("dup", None) => Step::Dup,
            ("close", None) => Step::Close,
            ("close-listener", None) => Step::CloseListener,
            ("shutdown-listener", None) => Step::ShutdownListener,
            ("pause", None) => Step::Pause,
            _ => return Err("no such step; `peer --help` lists them".to_owned()),
        })
    }
}

fn number<T: FromStr>(text: &str) -> Result<T, String> {
    text.parse().map_err(|_| format!("`{text}` is not a number that fits"))
}

fn option(name: &str) -> Result<SocketOption, String> {
    SocketOption::find(name).ok_or_else(|| format!("`{name}` is not an option it knows"))
}

fn switch(text: &str) -> Result<bool, String> {
    match text {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err(format!("`{text}` is neither on nor off")),
    }
}

fn payload(text: &str) -> Result<Vec<u8>, String> {
    if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) {
        return Ok(vec![b'x'; number(text)?]);
    }
    Ok(text.replace("\\n", "\n").into_bytes())
}

fn union<F: BitOr<Output = F> + Copy>(
    names: &str,
    none: F,
    known: &[(&str, F)],
) -> Result<F, String> {
    names.split('+').filter(|&name| name != "none").try_fold(none, |flags, name| {
        let found = known.iter().find(|(known, _)| *known == name);
        let (_, flag) = found.ok_or_else(|| format!("`{name}` is not one it knows"))?;
        Ok(flags | *flag)
    })
}

/// The names of poll(2)'s events in a set of them: `in+rdhup`, or `none`.
pub fn events(events: c_short) -> String {
    let names = EVENTS.iter().filter(|(_, event)| events & *event != 0).map(|(name, _)| *name);
    let names = names.collect::<Vec<_>>().join("+");
    if names.is_empty() { "none".to_owned() } else { names }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digits_are_a_count_and_anything_else_is_text() {
        assert_eq!("send:3".parse(), Ok(Step::Send(b"xxx".to_vec())));
        assert_eq!("send:1024\\n".parse(), Ok(Step::Send(b"1024\n".to_vec())));
        assert_eq!("send:".parse(), Ok(Step::Send(Vec::new())));
    }

    #[test]
    fn names_join_with_a_plus() {
        let both = MsgFlags::MSG_NOSIGNAL | MsgFlags::from_bits_retain(libc::MSG_MORE);
        assert_eq!("flags:nosignal+more".parse(), Ok(Step::Flags(both)));
        assert_eq!("flags:none".parse(), Ok(Step::Flags(MsgFlags::empty())));
        assert_eq!(events(libc::POLLIN | libc::POLLHUP), "in+hup");
        assert_eq!(events(0), "none");
    }

    #[test]
    fn what_is_no_step_is_refused() {
        for word in
            ["", "sned:1", "recv:x", "recv:-1", "shutdown", "connect:1", "flags:loud", "set:x=1"]
        {
            assert!(word.parse::<Step>().is_err(), "{word}");
        }
    }
}
