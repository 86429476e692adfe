//! Which network experiments run on, and a network for one of them at a time.
//!
//! Namespaces cost a few milliseconds: every experiment has its own. A Compose project costs half a
//! second: a process brings up one, hands it from experiment to experiment, and has it taken down
//! at its end.
#![allow(unsafe_code, reason = "calls atexit(3)")]

use std::ops::Deref;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Condvar, Mutex, OnceLock, PoisonError};

use anyhow::{Context as _, bail};

use super::compose::{Docker, Project};
use super::host::Host;
use super::network::{HOSTS, Network};
use super::process::DEADLINE;
use super::program::Program;
use super::protocol::{self, Reply, Request};
use super::wait;

/// `netns` or `compose`; unset or `auto`: Compose where it can be had, else namespaces.
pub const NETWORK: &str = "LAB_NETWORK";

/// A folder with the sockets of agents that run already: the `lab` service of compose.yaml has it.
pub const AGENTS: &str = "LAB_AGENTS";

/// A network that is one experiment's own until this is dropped.
#[derive(Debug)]
pub struct Lease {
    network: Option<Network>,
    shared: bool,
}

impl Lease {
    /// Takes a network. Waits while all that may be had are taken.
    ///
    /// # Errors
    /// What was asked for cannot be had on this machine, and why.
    pub fn take(lab: &Program) -> anyhow::Result<Lease> {
        let lab = lab.path().context("the lab's own executable has a path")?;
        match choice()? {
            Choice::Namespaces => {
                Ok(Lease { network: Some(Network::namespaces(lab, &HOSTS)?), shared: false })
            }
            Choice::Agents(folder) => POOL.take(|| Ok((Network::of_agents(folder)?, None))),
            Choice::Compose(docker) => POOL.take(|| {
                let project = Project::up(docker, lab, say)?;
                Ok((Network::of_agents(&project.agents())?, Some(project)))
            }),
        }
    }
}

impl Deref for Lease {
    type Target = Network;

    fn deref(&self) -> &Network {
        self.network.as_ref().expect("it is taken only by drop")
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Some(network) = self.network.take().filter(|_| self.shared) {
            POOL.give_back(network);
        }
    }
}

#[derive(Debug)]
enum Choice {
    Namespaces,
    Agents(PathBuf),
    Compose(Docker),
}

/// Chooses once a process, and says what and why, past the test harness's capture of output.
fn choice() -> anyhow::Result<&'static Choice> {
    static CHOICE: OnceLock<Result<Choice, String>> = OnceLock::new();
    let chosen = CHOICE.get_or_init(|| choose().map_err(|error| format!("{error:#}")));
    chosen.as_ref().map_err(|why| anyhow::anyhow!("{why}"))
}

fn choose() -> anyhow::Result<Choice> {
    if let Some(folder) = std::env::var_os(AGENTS) {
        return Ok(Choice::Agents(folder.into()));
    }
    let wanted = std::env::var(NETWORK).unwrap_or_else(|_| "auto".to_owned());
    let (choice, what) = match wanted.as_str() {
        "netns" => (Choice::Namespaces, format!("network namespaces ({NETWORK}=netns)")),
        "compose" => {
            (Choice::Compose(Docker::find()?), format!("a Compose project ({NETWORK}=compose)"))
        }
        "auto" | "" => match Docker::for_hosts() {
            Ok(docker) => (Choice::Compose(docker), "a Compose project".to_owned()),
            Err(why) => (Choice::Namespaces, format!("network namespaces: {why:#}")),
        },
        other => bail!("{NETWORK}={other}: it takes netns, compose or auto"),
    };
    say(&format!("experiments run on {what}"));
    Ok(choice)
}

/// Where agents run already: makes them end when what is returned is dropped, so that `docker
/// compose up lab` leaves nothing running. Waits for agents that are not up yet.
///
/// # Errors
/// An agent cannot be reached.
pub fn lease_agents() -> anyhow::Result<Vec<OwnedFd>> {
    let Some(folder) = std::env::var_os(AGENTS) else { return Ok(Vec::new()) };
    let folder = Path::new(&folder);
    let network = wait::until("the agents of the hosts", DEADLINE, || {
        let there = HOSTS.iter().all(|name| folder.join(format!("{name}.sock")).exists());
        if there { Network::of_agents(folder).map(Some) } else { Ok(None) }
    })?;
    let lease = |host: &Host| {
        let conversation = host.converse()?;
        protocol::send(&conversation, &Request::Lease, &[])?;
        protocol::receive::<Reply>(&conversation)?.context("the agent hung up")?;
        Ok(conversation)
    };
    network.hosts().iter().map(lease).collect()
}

/// Writes a line to standard error itself: the test harness captures only what the print macros
/// write.
pub(super) fn say(line: &str) {
    use std::io::Write as _;
    let _ = writeln!(std::io::stderr(), "serverlab: {line}");
}

/// The one shared network of this process.
struct Pool {
    state: Mutex<State>,
    returned: Condvar,
}

enum State {
    /// Nobody has needed it yet.
    Absent,
    Free(Network),
    Taken,
}

static POOL: Pool = Pool { state: Mutex::new(State::Absent), returned: Condvar::new() };

/// Its project, taken down when the process ends.
static PROJECT: Mutex<Option<Project>> = Mutex::new(None);

impl Pool {
    fn take(
        &self,
        make: impl FnOnce() -> anyhow::Result<(Network, Option<Project>)>,
    ) -> anyhow::Result<Lease> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            match std::mem::replace(&mut *state, State::Taken) {
                State::Free(network) => {
                    return Ok(Lease { network: Some(network), shared: true });
                }
                State::Absent => {
                    let made = make();
                    if made.is_err() {
                        *state = State::Absent;
                        self.returned.notify_one();
                    }
                    let (network, project) = made?;
                    if let Some(project) = project {
                        *PROJECT.lock().unwrap_or_else(PoisonError::into_inner) = Some(project);
                        take_down_at_exit();
                    }
                    return Ok(Lease { network: Some(network), shared: true });
                }
                State::Taken => {
                    state = self.returned.wait(state).unwrap_or_else(PoisonError::into_inner);
                }
            }
        }
    }

    fn give_back(&self, network: Network) {
        *self.state.lock().unwrap_or_else(PoisonError::into_inner) = State::Free(network);
        self.returned.notify_one();
    }
}

/// The harness of Rust's tests ends by exit(3), which drops no static.
fn take_down_at_exit() {
    // SAFETY: atexit(3) only stores the function, which is an ordinary one.
    unsafe { libc::atexit(take_down) };
}

extern "C" fn take_down() {
    let project = PROJECT.lock().unwrap_or_else(PoisonError::into_inner).take();
    drop(project);
}
