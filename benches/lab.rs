//! What the laboratory itself costs: a network up, a program run on a host, a whole experiment.
//!
//! `cargo bench --bench lab` prints the median, the smallest and the largest of 30 rounds each; of 9
//! for a Compose project, where there is an engine.

use std::path::Path;
use std::time::{Duration, Instant};

use serverlab::lab::compose::{Docker, Project};
use serverlab::lab::network::{HOSTS, Network};
use serverlab::lab::program::Program;
use serverlab::{args, experiment, program};

const ROUNDS: usize = 30;
const COMPOSE_ROUNDS: usize = 9;

fn main() {
    let lab = program!("lab");
    let lab = lab.path().expect("it is ours");
    measure("network of two hosts up", ROUNDS, || network(lab));
    measure("spawn, run and reap `true`", ROUNDS, {
        let network = Network::namespaces(lab, &HOSTS).expect("namespaces");
        move || {
            let started = Instant::now();
            let host = network.host("server");
            host.run(&Program::of_host("true"), [""; 0]).expect("true runs");
            started.elapsed()
        }
    });
    measure("an experiment of rst_packet", ROUNDS, one_experiment);
    match Docker::for_hosts() {
        Ok(docker) => measure("a Compose project ready", COMPOSE_ROUNDS, || project(&docker, lab)),
        Err(error) => println!("no Compose project: {error:#}"),
    }
}

fn network(lab: &Path) -> Duration {
    let started = Instant::now();
    let network = Network::namespaces(lab, &HOSTS).expect("namespaces");
    let took = started.elapsed();
    drop(network);
    took
}

/// Until the agents of both hosts answer. The image is there from the first round on.
fn project(docker: &Docker, lab: &Path) -> Duration {
    let started = Instant::now();
    let project = Project::up(docker, lab, |note| println!("{note}")).expect("a project");
    let took = started.elapsed();
    drop(project);
    took
}

/// What rst_packet's first experiment does, its evidence in captures/lab/ included.
fn one_experiment() -> Duration {
    let started = Instant::now();
    experiment!("", "How long does an experiment take?", |lab| {
        let (host, port) = (lab.server().address(serverlab::lab::host::Family::V4), lab.port()?);
        let server = lab.server().spawn(&program!("rst-server"), args!["-i", host, "-p", port])?;
        server.event("listening")?;
        let capture = lab.capture()?;
        let steps = args!["-i", host, "-p", port, "connect", "recv", "recv", "send:1"];
        lab.client().run(&program!("peer"), steps)?;
        let wire = capture.finish()?;
        lab.claim(
            "the server sends one RST, and no FIN",
            wire.ladder(
                port,
                "client > server  S
                 server > client  S.
                 client > server  .
                 server > client  R.  seq 1 ack 1",
            ),
        );
        Ok(())
    });
    started.elapsed()
}

fn measure(what: &str, rounds: usize, mut round: impl FnMut() -> Duration) {
    round(); // the first pays for what the rest shares
    let mut times: Vec<Duration> = (0..rounds).map(|_| round()).collect();
    times.sort_unstable();
    let ms = |time: Duration| time.as_secs_f64() * 1e3;
    println!(
        "{what:<32} median {:7.2} ms   min {:7.2}   max {:7.2}",
        ms(times[rounds / 2]),
        ms(times[0]),
        ms(times[rounds - 1])
    );
}
