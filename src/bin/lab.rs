//! The command line of the laboratory.

use std::os::fd::AsFd as _;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{CommandFactory as _, Parser, Subcommand};
use serverlab::lab::{agent, compose, doctor, namespaces, pin, run, show, sniff};

/// A laboratory of concurrent TCP servers: runs them on a network of hosts, captures their packets
/// and checks claims about them
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run experiments and report what becomes of their claims
    Run(run::RunArgs),
    /// Tell what this machine can do for the lab, and what to do about what is missing
    Doctor(doctor::DoctorArgs),
    /// Show the TCP connections of a capture, each with its ladder
    Show(show::ShowArgs),
    /// Be a host: run programs here for a runner that connects to SOCKET
    Host {
        /// Where to listen: a Unix socket's path
        socket: PathBuf,
    },
    /// Capture on an interface, as tcpdump does, where there is no tcpdump
    Sniff(sniff::SniffArgs),
    /// Print the completions of a shell
    Completions {
        /// Which shell
        shell: clap_complete::Shell,
    },
    /// Hold a network of namespaces for the runner at standard input
    #[command(hide = true)]
    Namespaces,
    /// Keep a Compose project for the runner at standard input
    #[command(hide = true)]
    Project {
        /// How Docker is called here
        docker: String,
    },
}

fn main() -> ExitCode {
    match command() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            anstream::eprintln!("lab: {error:#}");
            ExitCode::from(2)
        }
    }
}

/// Whether all is well.
fn command() -> anyhow::Result<bool> {
    match Cli::parse().command {
        Command::Run(args) => return run::run(&args),
        Command::Doctor(args) => return doctor::run(&args),
        Command::Show(args) => show::run(&args)?,
        Command::Host { socket } => be_host(&socket)?,
        Command::Sniff(args) => sniff::run(&args)?,
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "lab", &mut std::io::stdout());
        }
        Command::Namespaces => namespaces::serve(std::io::stdin().as_fd())?,
        Command::Project { docker } => compose::keep(&docker)?,
    }
    Ok(true)
}

fn be_host(socket: &std::path::Path) -> anyhow::Result<()> {
    let door = agent::Door::listen(socket)?;
    if let Err(error) = pin::offloads_off(pin::INTERFACE) {
        eprintln!("lab: offloads of {} stay as they are: {error}", pin::INTERFACE);
    }
    agent::run(door) // only now is the first runner served
}
