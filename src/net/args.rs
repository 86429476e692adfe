//! The flags of every server: those of the Python original, and a few that the lab needs.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use clap::{Args as _, FromArgMatches as _};

use crate::net::event;

/// What a server was asked to do on its command line.
#[derive(clap::Args, Clone, Debug)]
pub struct ServerArgs {
    /// Address to listen on: IPv4, or IPv6 (`::` takes both)
    #[arg(short = 'i', long, default_value = "0.0.0.0", value_name = "ADDRESS")]
    pub host: IpAddr,

    /// Port to listen on; 0 lets the kernel choose, and `listening` tells which
    #[arg(short, long, default_value_t = 2000)]
    pub port: u16,

    /// Processes or threads, for the designs that keep a pool of them
    #[arg(short = 'n', long, default_value_t = 10, value_name = "N",
          value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub workers: u16,

    /// Connections that may wait for accept; the kernel admits one more, and no more than
    /// net.core.somaxconn + 1
    #[arg(long, default_value_t = 4096, value_name = "N",
          value_parser = clap::value_parser!(i32).range(0..))]
    pub backlog: i32,

    /// How a request ends
    #[arg(long, value_enum, default_value_t)]
    pub framing: Framing,

    /// Largest answer a client may ask for, in bytes
    #[arg(long, default_value_t = 64 << 20, value_name = "BYTES")]
    pub max_bytes: u64,

    /// Close a connection whose client takes longer than this for a request, or to read an answer,
    /// or says nothing; 0 waits for ever
    #[arg(long, default_value = "0", value_name = "SECONDS", value_parser = seconds)]
    pub idle_timeout: Duration,

    /// Print no line for each connection
    #[arg(short, long)]
    pub quiet: bool,

    /// Break the server in a named way, to see what catches it
    #[arg(long, value_name = "DEFECT")]
    pub bug: Option<String>,
}

/// How a request ends.
#[derive(clap::ValueEnum, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Framing {
    /// A count ends with a newline, however the segments fall (Stevens)
    #[default]
    Line,
    /// A segment is a count, newline or not (the Python original; it breaks when TCP cuts or joins)
    Segment,
}

impl ServerArgs {
    /// The address and port to listen on.
    pub fn address(&self) -> SocketAddr {
        SocketAddr::new(self.host, self.port)
    }

    /// Whether the server was asked to break in this way.
    pub fn bug(&self, name: &str) -> bool {
        self.bug.as_deref() == Some(name)
    }
}

/// Where a demo listens.
#[derive(clap::Args, Clone, Copy, Debug)]
pub struct ListenAt {
    /// Address to listen on
    #[arg(short = 'i', long, default_value_t = Ipv4Addr::UNSPECIFIED.into(), value_name = "ADDRESS")]
    host: IpAddr,

    /// Port to listen on
    #[arg(short, long, default_value_t = 2000)]
    port: u16,
}

impl ListenAt {
    /// The address and port.
    pub fn address(self) -> SocketAddr {
        SocketAddr::new(self.host, self.port)
    }
}

/// Whom a demo connects to.
#[derive(clap::Args, Clone, Copy, Debug)]
pub struct ConnectTo {
    /// Address of the server
    #[arg(short = 'i', long, default_value_t = Ipv4Addr::LOCALHOST.into(), value_name = "ADDRESS")]
    host: IpAddr,

    /// Port of the server
    #[arg(short, long, default_value_t = 2000)]
    port: u16,
}

impl ConnectTo {
    /// The address and port.
    pub fn address(self) -> SocketAddr {
        SocketAddr::new(self.host, self.port)
    }
}

/// Reads a server's command line. `about` is its help's first line, `bugs` the defects it knows.
///
/// Prints help or an error and exits where the command line asks for it or is wrong (status 0 and
/// 2). Event lines carry the program's name and respect `-q` from here on.
pub fn server(program: &'static str, about: &'static str, bugs: &[&'static str]) -> ServerArgs {
    server_and::<NoneMore>(program, about, bugs).0
}

#[derive(clap::Args)]
struct NoneMore {}

/// The same for a server that has flags of its own.
pub fn server_and<Own: clap::Args>(
    program: &'static str,
    about: &'static str,
    bugs: &[&'static str],
) -> (ServerArgs, Own) {
    let command = clap::Command::new(program).version(env!("CARGO_PKG_VERSION"));
    let command = ServerArgs::augment_args(command).mut_arg("bug", |bug| {
        bug.hide(bugs.is_empty())
            .value_parser(clap::builder::PossibleValuesParser::new(bugs.iter().copied()))
    });
    // Both structures bring a sentence of their own; the program's is the one to show.
    let command = Own::augment_args(command).about(about).long_about(None);
    let matches = command.get_matches();
    let args = ServerArgs::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    let own = Own::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    event::start(program, args.quiet);
    (args, own)
}

/// A duration in seconds, decimals allowed.
///
/// # Errors
/// Says what is wrong with a text that is not a finite number of seconds, zero or more.
pub fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "not a number of seconds".to_owned())?;
    Duration::try_from_secs_f64(seconds).map_err(|error| error.to_string())
}
