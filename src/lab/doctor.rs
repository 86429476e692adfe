//! `lab doctor`: what this machine can do for the lab, what is missing, and what to do about it.
#![allow(unsafe_code, reason = "asks the kernel for io_uring with a call that nix does not have")]

use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anstyle::{AnsiColor, Style};
use caps::{CapSet, Capability};
use clap::Args;
use serde::Serialize;

use super::compose::Docker;
use super::network::{HOSTS, Network};

/// Arguments of `lab doctor`.
#[derive(Args, Debug)]
pub struct DoctorArgs {
    /// Print the findings as JSON
    #[arg(long)]
    json: bool,
}

/// One thing that the lab can use.
#[derive(Debug, Serialize)]
struct Finding {
    what: &'static str,
    there: bool,
    /// What was found, or what was found missing.
    found: String,
    /// What is lost without it and how to get it; empty if it is there.
    advice: String,
}

/// Looks at everything and prints it; whether experiments can be run in one way at least.
///
/// # Errors
/// Standard output cannot be written to.
pub fn run(args: &DoctorArgs) -> anyhow::Result<bool> {
    let namespaces = namespaces();
    let compose = compose();
    let able = namespaces.there || compose.there;
    let findings = [
        kernel(),
        namespaces,
        compose,
        program("tcpdump", "--version", "captures", "`lab sniff` stands in; apt install tcpdump"),
        program(
            "nft",
            "--version",
            "makes faults",
            "experiments with faults are skipped; apt install nftables",
        ),
        program(
            "tshark",
            "--version",
            "checks our reading of captures",
            "the oracle's tests are skipped; apt install tshark",
        ),
        io_uring(),
        capabilities(),
        linking(),
    ];
    if args.json {
        anstream::println!("{}", serde_json::to_string_pretty(&findings)?);
        return Ok(able);
    }
    const GOOD: Style = AnsiColor::Green.on_default().bold();
    const LACK: Style = AnsiColor::Yellow.on_default().bold();
    for Finding { what, there, found, advice } in &findings {
        let (style, word) = if *there { (GOOD, "ok") } else { (LACK, "missing") };
        anstream::println!("{style}{word:<8}{style:#}{what:<14} {found}");
        if !advice.is_empty() {
            anstream::println!("{:<22} {advice}", "");
        }
    }
    anstream::println!();
    if able {
        anstream::println!("Experiments can be run here: `lab run`.");
    } else {
        anstream::println!("No network of hosts can be had here: no experiment can be run.");
    }
    Ok(able)
}

fn finding(what: &'static str, result: Result<String, String>, advice: &str) -> Finding {
    let there = result.is_ok();
    let advice = if there { String::new() } else { advice.to_owned() };
    Finding { what, there, found: result.unwrap_or_else(|missing| missing), advice }
}

fn kernel() -> Finding {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    finding("kernel", Ok(format!("Linux {}", release.trim())), "")
}

fn namespaces() -> Finding {
    let built = std::env::current_exe().map_err(|error| error.to_string()).and_then(|lab| {
        let started = Instant::now();
        let network = Network::namespaces(&lab, &HOSTS).map_err(|error| format!("{error:#}"))?;
        let took = started.elapsed();
        drop(network);
        Ok(format!("a network of two hosts, up in {:.1} ms", took.as_secs_f64() * 1e3))
    });
    finding(
        "namespaces",
        built,
        "run as root, allow user namespaces (the sysctls above), or use Compose",
    )
}

fn compose() -> Finding {
    let docker = Docker::for_hosts().map_err(|error| format!("{error:#}"));
    let found = docker.map(|docker| {
        let Docker { engine, compose, command } = docker;
        format!("`{}` {compose}, engine {engine}", command.join(" "))
    });
    finding("compose", found, "experiments run in namespaces")
}

fn program(name: &'static str, version: &str, purpose: &str, advice: &str) -> Finding {
    let output = Command::new(name).arg(version).output();
    let found = match output {
        Ok(output) => {
            let text = [output.stdout, output.stderr].concat();
            let text = String::from_utf8_lossy(&text).into_owned();
            Ok(format!("{purpose}: {}", text.lines().next().unwrap_or(name)))
        }
        Err(error) => Err(error.to_string()),
    };
    finding(name, found, advice)
}

/// io_uring_setup(2) with nothing to set up fails with EFAULT where it is allowed.
fn io_uring() -> Finding {
    // SAFETY: the kernel refuses the null pointer; nothing is made.
    let result = unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, std::ptr::null::<u8>()) };
    let errno = nix::errno::Errno::last();
    let found = match errno {
        nix::errno::Errno::EFAULT if result == -1 => Ok("allowed".to_owned()),
        errno => Err(format!("io_uring_setup: {errno}")),
    };
    let advice = "the io-uring server cannot run; see kernel.io_uring_disabled, or the container's seccomp profile";
    finding("io_uring", found, advice)
}

fn capabilities() -> Finding {
    let wanted = [Capability::CAP_NET_RAW, Capability::CAP_NET_ADMIN, Capability::CAP_SYS_ADMIN];
    let has = |capability| caps::has_cap(None, CapSet::Effective, capability).unwrap_or(false);
    let list = |wanted: &mut dyn Iterator<Item = &Capability>| {
        wanted.map(ToString::to_string).collect::<Vec<_>>().join(", ")
    };
    let missing = list(&mut wanted.iter().filter(|&&capability| !has(capability)));
    let found = if missing.is_empty() {
        Ok(list(&mut wanted.iter()))
    } else {
        Err(format!("no {missing}"))
    };
    finding("capabilities", found, "none is needed: namespaces give their own")
}

/// A dynamically linked program has its loader among its mappings.
fn linking() -> Finding {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let loader = maps.lines().filter_map(|line| line.split_whitespace().nth(5));
    let dynamic = loader.map(Path::new).any(|path| {
        path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("ld-linux"))
    });
    let found = if dynamic { Err("dynamic".to_owned()) } else { Ok("static".to_owned()) };
    finding(
        "linking",
        found,
        "hosts of Compose need the same C library; unset RUSTFLAGS and build again",
    )
}
