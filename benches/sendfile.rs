//! What it costs to send a file, by each way of sendfile-demo: `cargo bench --bench sendfile`.
//!
//! Each round sends a file of 256 MiB (another size: `cargo bench --bench sendfile -- 64`, in MiB)
//! from the page cache over loopback, by each way in turn, so that whatever else the machine does is
//! spread over all of them; the smallest of eight rounds counts. The figure is the server's processor
//! time from `listening` to its end. On loopback the sender's system calls do the receiver's half of
//! TCP as well, so the ways differ by less than their copies do.

use std::io::{BufRead as _, BufReader, Read as _};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeVal;

const WAYS: [&str; 5] = ["read-write", "sendfile", "splice", "mmap", "zerocopy"];
const ROUNDS: usize = 8;
const MIB: usize = 1 << 20;

/// One transfer.
#[derive(Clone, Copy)]
struct Cost {
    processor: Duration,
    wall: Duration,
}

fn main() -> anyhow::Result<()> {
    let mib = std::env::args().skip(1).find_map(|arg| arg.parse().ok()).unwrap_or(256);
    let mut least: [Option<Cost>; WAYS.len()] = [None; WAYS.len()];
    for round in 1..=ROUNDS {
        eprint!("\rround {round} of {ROUNDS}");
        for (least, way) in least.iter_mut().zip(WAYS) {
            let cost = send(way, mib * MIB).with_context(|| format!("by {way}"))?;
            let smaller =
                |one: Duration, other: Option<Duration>| other.map_or(one, |o| one.min(o));
            *least = Some(Cost {
                processor: smaller(cost.processor, least.map(|least| least.processor)),
                wall: smaller(cost.wall, least.map(|least| least.wall)),
            });
        }
    }
    eprintln!();
    println!("{mib} MiB over loopback, the smallest of {ROUNDS} rounds");
    println!("{:>12}  {:>12}  {:>6}  {:>8}", "way", "CPU us/MiB", "ratio", "MiB/s");
    let per_mib = |cost: Cost| cost.processor.as_secs_f64() * 1e6 / mib as f64;
    let first = least[0].map(per_mib).context("no round")?;
    for (way, cost) in WAYS.iter().zip(least.into_iter().flatten()) {
        let (cpu, speed) = (per_mib(cost), mib as f64 / cost.wall.as_secs_f64());
        println!("{way:>12}  {cpu:>12.1}  {:>6.2}  {speed:>8.0}", cpu / first);
    }
    Ok(())
}

/// Has the demo send so many bytes, and reads them.
fn send(way: &str, bytes: usize) -> anyhow::Result<Cost> {
    let before = of_children()?;
    let mut demo = Command::new(env!("CARGO_BIN_EXE_sendfile-demo"))
        .args(["-i", "127.0.0.1", "-p", "0", "--how", way, "--bytes", &bytes.to_string()])
        .stdout(Stdio::piped())
        .spawn()?;
    let sent = receive(&mut demo, bytes);
    if sent.is_err() {
        demo.kill()?;
    }
    let status = demo.wait()?;
    let (prepared, wall) = sent?;
    ensure!(status.success(), "the demo failed: {status}");
    Ok(Cost { processor: of_children()?.saturating_sub(before + prepared), wall })
}

/// Reads it all; the processor time of the demo's preparations, and how long the rest took.
fn receive(demo: &mut Child, bytes: usize) -> anyhow::Result<(Duration, Duration)> {
    let mut said = BufReader::new(demo.stdout.take().context("its output is piped")?).lines();
    let address = loop {
        let line = said.next().context("the demo ended early")??;
        if line.contains(" listening ") {
            let field = line.split("address=").nth(1).and_then(|rest| rest.split(' ').next());
            break field.context("listening where?")?.to_owned();
        }
    };
    // The first number: nanoseconds on a processor (Documentation/scheduler/sched-stats.rst).
    let stat = std::fs::read_to_string(format!("/proc/{}/schedstat", demo.id()))?;
    let prepared =
        stat.split(' ').next().and_then(|field| field.parse().ok()).context("no time")?;
    let started = Instant::now();
    let mut socket = TcpStream::connect(address)?;
    let (mut buffer, mut left) = (vec![0; 256 * 1024], bytes);
    while left > 0 {
        let count = socket.read(&mut buffer)?;
        ensure!(count > 0, "{left} bytes are missing");
        left -= count;
    }
    let wall = started.elapsed();
    drop(socket);
    said.for_each(drop); // until its end
    Ok((Duration::from_nanos(prepared), wall))
}

/// The processor time of all children that have been waited for.
fn of_children() -> anyhow::Result<Duration> {
    let used = getrusage(UsageWho::RUSAGE_CHILDREN)?;
    let time = |time: TimeVal| {
        Duration::new(time.tv_sec().unsigned_abs(), time.tv_usec().unsigned_abs() as u32 * 1000)
    };
    Ok(time(used.user_time()) + time(used.system_time()))
}
