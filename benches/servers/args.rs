//! The command line.

use std::path::PathBuf;

use clap::Parser;

use super::server::Server;

/// Measures what a connection costs each server design
#[derive(Debug, Parser)]
#[command(
    name = "cargo bench --bench servers --",
    after_help = "\
The time a server has had is read from a cgroup of its own, with its children that have ended; where
none may be made, from /proc, in ticks of 10 ms: then take rounds of some seconds."
)]
pub(crate) struct Args {
    /// Only the servers whose name contains one of these
    #[arg(value_name = "FILTER")]
    pub(crate) filter: Vec<String>,

    /// Rounds over all servers; the smallest cost counts
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..))]
    pub(crate) rounds: u16,

    /// Seconds that are measured in each round
    #[arg(long, default_value_t = 0.5, value_parser = |text: &str| match text.parse() {
        Ok(seconds) if (0.05..=20.0).contains(&seconds) => Ok(seconds),
        _ => Err("between 0.05 and 20"),
    })]
    pub(crate) seconds: f64,

    /// Clients at a time, one request on each connection
    #[arg(long, value_delimiter = ',', default_values_t = [1, 15, 64], value_name = "N,...")]
    pub(crate) clients: Vec<usize>,

    /// Requests on each connection of the last table, with 15 clients; 0 leaves it out
    #[arg(long, default_value_t = 100, value_name = "N")]
    pub(crate) kept: u64,

    /// Processes or threads, for the designs that keep a pool of them
    #[arg(short = 'n', long, default_value_t = 15, value_name = "N")]
    pub(crate) workers: u16,

    /// The load on the server's own processor: slower, and less disturbed
    #[arg(long)]
    pub(crate) same_core: bool,

    /// A server that is not ours joins the rounds; it takes -p PORT
    #[arg(long, value_parser = Server::foreign, value_name = "NAME=EXECUTABLE")]
    pub(crate) against: Vec<Server>,

    /// What idle connections cost: one active connection beside 0, 100, 1,000 and 10,000 idle
    #[arg(long)]
    pub(crate) idle: bool,

    /// Count system calls too, or nothing else
    #[arg(long, value_enum, default_value_t = Count::Also, value_name = "WHEN")]
    pub(crate) calls: Count,

    /// Write all values of all rounds to this file
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,

    #[arg(long, hide = true)]
    bench: bool, // what `cargo bench` adds
}

#[derive(clap::ValueEnum, Clone, Copy, Debug, PartialEq)]
pub(crate) enum Count {
    Also,
    Only,
    Never,
}
