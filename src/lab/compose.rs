//! The hosts as containers: a Compose project for as long as its runner lives, and no longer.
//!
//! ```text
//!   runner --stdin, stdout--> lab project                      the keeper, in a session of its own
//!                               | docker compose up            makes the project and its folder,
//!                               | "up /tmp/serverlab-.."       says where the agents' sockets are,
//!     ... dies, or lets go ---> | end of stdin                 waits for the runner's end,
//!                               | docker rm, network rm        takes everything down again
//! ```
//!
//! One process does it from start to end, so there is no moment in which a project has nobody that
//! would take it down: after Ctrl-C, a panic or SIGKILL of the runner the kernel closes its end of
//! the pipe all the same. Only if the keeper itself is killed, or the machine stops, does a project
//! stay; its labels name the keeper, and the next one takes it down first.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::io::ErrorKind::{NotFound, PermissionDenied};
use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::str::FromStr;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use nix::errno::Errno;
use nix::sys::signal::{Signal, killpg};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use nix::unistd::{Pid, setsid};
use serde::{Deserialize, Serialize};

/// Where compose.yaml is.
const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// The image of the hosts, which knows nothing of this package.
const IMAGE: &str = "serverlab-host";

/// What the image is built from: the first of these that the machine has.
const BASES: [&str; 2] = ["debian:bookworm-slim", "serverlab-offline/debian"];

/// The hosts' services.
const SERVICES: [&str; 2] = ["client", "server"];

/// How long an engine that works takes to answer, at the very most.
const ANSWER: Duration = Duration::from_secs(10);

/// How long it takes to start or to remove two containers, on a machine that does much else.
const CHANGE: Duration = Duration::from_secs(60);

/// How long it takes to build the image of the hosts.
const BUILD: Duration = Duration::from_secs(600);

/// A project of our own that is up. Dropped, it is taken down.
#[derive(Debug)]
pub struct Project {
    folder: PathBuf,
    keeper: Child,
}

impl Project {
    /// Brings up a project with the hosts, and waits until their agents answer. `lab` is the
    /// executable of that name: it is the keeper, and the agent on each host. What takes longer (the
    /// image has to be built first) is told to `note`.
    ///
    /// # Errors
    /// No image can be had, or the engine refuses, or no agent answers: why, in one line.
    pub fn up(docker: &Docker, lab: &Path, note: impl Fn(&str)) -> anyhow::Result<Project> {
        let mut keeper = Command::new(lab)
            .arg("project")
            .arg(serde_json::to_string(docker)?)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot run {}", lab.display()))?;
        let said = BufReader::new(keeper.stdout.take().context("the keeper has no output")?);
        for line in said.lines() {
            let line = line?;
            match line.split_once(' ') {
                Some(("note", what)) => note(what),
                Some(("up", folder)) => return Ok(Project { folder: folder.into(), keeper }),
                Some(("failed", why)) => {
                    let _ = keeper.wait();
                    bail!("{why}");
                }
                _ => bail!("the project's keeper said {line:?}"),
            }
        }
        let status = keeper.wait()?;
        bail!("the project's keeper ended too early: {status}")
    }

    /// The folder with the agents' sockets, `client.sock` and `server.sock`.
    pub fn agents(&self) -> PathBuf {
        self.folder.join("run")
    }
}

impl Drop for Project {
    fn drop(&mut self) {
        drop(self.keeper.stdin.take()); // the end that the keeper waits for
        let _ = self.keeper.wait();
    }
}

/// Keeps a project for whoever is at the other end of standard input and output; the whole of
/// `lab project DOCKER`.
///
/// # Errors
/// The project cannot be taken down. If it cannot be made, the runner is told.
pub fn keep(docker: &str) -> anyhow::Result<()> {
    let _ = setsid(); // Ctrl-C is for the runner
    let mut out = io::stdout();
    let docker: Docker = serde_json::from_str(docker)?;
    let name = format!("serverlab-{}-{:08x}", std::os::unix::process::parent_id(), random()? >> 32);
    let folder = Path::new("/tmp").join(&name); // short: a socket's path has 107 bytes at most
    let made = thread::scope(|scope| {
        scope.spawn(|| docker.reap_stale()); // while the engine is busy with ours
        docker.make(&name, &folder, &mut out)
    });
    let said = match made {
        Ok(()) => writeln!(out, "up {}", folder.display()),
        Err(error) => {
            let _ = docker.take_down(&name, &folder); // may fail for the same reason
            return Ok(writeln!(out, "failed {error:#}")?);
        }
    };
    if said.is_ok() {
        let _ = io::stdin().read_to_end(&mut Vec::new()); // until the runner is gone
    }
    docker.take_down(&name, &folder)
}

/// Docker, as this machine has it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Docker {
    /// The engine's version.
    pub engine: String,
    /// Compose's version.
    pub compose: String,
    /// How Compose is called: `docker compose`, or `docker-compose` (version 1).
    pub command: Vec<String>,
}

/// How the image of the hosts can be had.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Image {
    /// It is there, and is what docker/Dockerfile describes.
    Ready,
    /// It can be built from this base image.
    From(String),
}

impl Docker {
    /// Asks for the engine and for Compose, in whichever form it is installed.
    ///
    /// # Errors
    /// One of them is missing, or the engine does not answer, or not to us: what to do about it.
    pub fn find() -> anyhow::Result<Docker> {
        let version = ["version", "--format", "{{.Server.Version}}"];
        let engine = run(Command::new("docker").args(version), ANSWER)?.trim().to_owned();
        for command in ["docker compose", "docker-compose"] {
            let command: Vec<_> = command.split(' ').map(str::to_owned).collect();
            let mut asked = Command::new(&command[0]);
            asked.args(&command[1..]).args(["version", "--short"]);
            if let Ok(compose) = run(&mut asked, ANSWER) {
                return Ok(Docker { engine, compose: compose.trim().to_owned(), command });
            }
        }
        bail!("Docker Compose is not installed; on Debian: apt-get install docker-compose")
    }

    /// Docker, if it has what hosts need: the engine, Compose, and the image or a base for it.
    ///
    /// # Errors
    /// As [`Docker::find`] and [`Docker::image`].
    pub fn for_hosts() -> anyhow::Result<Docker> {
        let docker = Docker::find()?;
        docker.image()?;
        Ok(docker)
    }

    /// Whether the image of the hosts is there, or can be built without pulling anything.
    ///
    /// # Errors
    /// It is not there and there is no base image to build it from: how to get one.
    pub fn image(&self) -> anyhow::Result<Image> {
        let recipe = recipe()?;
        let label = "{{index .Config.Labels \"serverlab.recipe\"}}";
        if self.inspect(IMAGE, label).is_some_and(|built| built.trim() == recipe) {
            return Ok(Image::Ready);
        }
        if let Ok(base) = std::env::var("BASE_IMAGE") {
            ensure!(self.inspect(&base, "").is_some(), "the base image {base} is not here");
            return Ok(Image::From(base));
        }
        let base = BASES.into_iter().find(|base| self.inspect(base, "").is_some());
        base.map(|base| Image::From(base.to_owned())).with_context(|| {
            format!("no base image; docker pull {}, or docker/offline-images", BASES[0])
        })
    }

    /// Builds the image of the hosts from this base image.
    ///
    /// # Errors
    /// What the builder reported last.
    pub fn build_image(&self, base: &str) -> anyhow::Result<()> {
        let mut build = self.compose();
        build.env("BASE_IMAGE", base).env("LAB_RECIPE", recipe()?).args(["build", SERVICES[0]]);
        run(&mut build, BUILD).map(drop).context("cannot build the image of the hosts")
    }

    /// Takes down projects whose keeper is gone; says nothing if that fails, for somebody else may
    /// be at it too.
    fn reap_stale(&self) {
        for (project, (keeper, folder)) in self.kept().unwrap_or_default() {
            let folder = Path::new(&folder);
            let is_ours = folder.parent() == Some(Path::new("/tmp")) && folder.ends_with(&project);
            if is_ours && keeper.parse::<Keeper>().is_ok_and(|keeper| keeper.is_gone()) {
                let _ = self.take_down(&project, folder);
            }
        }
    }

    /// The projects that have, or had, a keeper: the keeper and the folder of each.
    fn kept(&self) -> anyhow::Result<BTreeMap<String, (String, String)>> {
        let labels = ["com.docker.compose.project", "serverlab.keeper", "serverlab.folder"]
            .map(|label| format!("{{{{.Label \"{label}\"}}}}"))
            .join("\t");
        let mut kept = BTreeMap::new();
        for list in [["ps", "--all"], ["network", "ls"]] {
            let mut command = Command::new("docker");
            command.args(list).args(["--filter", "label=serverlab.keeper", "--format", &labels]);
            for line in run(&mut command, ANSWER)?.lines() {
                let mut fields = line.split('\t').map(str::to_owned);
                if let (Some(project), Some(keeper), Some(folder)) =
                    (fields.next(), fields.next(), fields.next())
                {
                    kept.insert(project, (keeper, folder));
                }
            }
        }
        Ok(kept)
    }

    /// Makes the folder, the image if need be, and the project, and waits for its agents.
    fn make(&self, name: &str, folder: &Path, out: &mut impl io::Write) -> anyhow::Result<()> {
        if let Image::From(base) = self.image()? {
            writeln!(out, "note building {IMAGE} from {base}, once (about 30 s)")?;
            self.build_image(&base)?;
        }
        // Others must not reach the agents; the agents, which are root but own nothing and cannot
        // overrule a mode, must reach their folder.
        let agents = folder.join("run");
        fs::DirBuilder::new().mode(0o700).create(folder)?;
        fs::create_dir(&agents)?;
        fs::set_permissions(&agents, fs::Permissions::from_mode(0o1777))?;
        self.start(name, folder)?;
        for service in SERVICES {
            if let Err(error) = reach(&agents.join(format!("{service}.sock"))) {
                let mut logs = self.compose();
                logs.args(["-p", name, "logs", "--no-color", service]);
                let said = run(&mut logs, ANSWER).unwrap_or_default();
                let said = last_words(&said).unwrap_or("nothing");
                return Err(error.context(format!("the agent of {service} said: {said}")));
            }
        }
        Ok(())
    }

    /// `docker compose up`, with other addresses if somebody else has these.
    fn start(&self, name: &str, folder: &Path) -> anyhow::Result<()> {
        let executable = executable(folder)?;
        let mut tries = 0;
        loop {
            let (net4, net6) = addresses(random()?);
            let mut up = self.compose();
            up.args(["-p", name, "up", "-d", "--no-build"]).args(SERVICES);
            up.env("LAB_EXECUTABLE", &executable).env("LAB_FOLDER", folder);
            up.env("LAB_NET4", net4).env("LAB_NET6", net6);
            up.env("LAB_KEEPER", Keeper::me()?.to_string());
            tries += 1;
            match run(&mut up, CHANGE) {
                Ok(_) => return Ok(()),
                Err(error) if tries < 20 && error.to_string().contains("overlap") => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Removes a project's containers, networks and volumes (version 1 makes one that nobody uses),
    /// by their labels: what was made, whatever state it is in, rather than what the files say; then
    /// its folder.
    fn take_down(&self, name: &str, folder: &Path) -> anyhow::Result<()> {
        const KINDS: [(&[&str], &[&str]); 3] = [
            (&["ps", "--all"], &["rm", "--force"]),
            (&["network", "ls"], &["network", "rm"]),
            (&["volume", "ls"], &["volume", "rm"]),
        ];
        let of_project = format!("label=com.docker.compose.project={name}");
        for (list, remove) in KINDS {
            let start = Instant::now();
            loop {
                let mut listed = Command::new("docker");
                listed.args(list).args(["--quiet", "--filter", &of_project]);
                let left = run(&mut listed, ANSWER)?;
                if left.is_empty() {
                    break;
                }
                // Somebody else who reaps may be faster: what counts is that nothing is left.
                let removed = run(Command::new("docker").args(remove).args(left.lines()), CHANGE);
                if start.elapsed() > CHANGE {
                    removed.with_context(|| format!("cannot take down project {name}"))?;
                }
            }
        }
        match fs::remove_dir_all(folder) {
            Err(error) if error.kind() != NotFound => {
                Err(error).with_context(|| format!("cannot remove {}", folder.display()))
            }
            _ => Ok(()),
        }
    }

    /// What the engine knows of an image; `None` if it has no such image.
    fn inspect(&self, image: &str, format: &str) -> Option<String> {
        let inspect = ["image", "inspect", "--format", format, image];
        run(Command::new("docker").args(inspect), ANSWER).ok()
    }

    /// Compose, with the files of a project of our own.
    fn compose(&self) -> Command {
        let mut compose = Command::new(&self.command[0]);
        compose.args(&self.command[1..]).current_dir(ROOT);
        compose.args(["-f", "compose.yaml", "-f", "docker/compose.test.yaml"]);
        compose
    }
}

impl fmt::Display for Docker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Docker {} with Compose {}", self.engine, self.compose)
    }
}

/// Who keeps a project, so that another can tell whether it still does.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Keeper {
    pid: u32,
    /// In clock ticks after boot: a pid alone may be another process's by now.
    started: u64,
    /// The pid namespace, without which a pid says nothing.
    namespace: String,
    boot: String,
}

impl Keeper {
    fn me() -> anyhow::Result<Keeper> {
        let pid = std::process::id();
        let (_, started) = state(pid).context("/proc does not show this process")?;
        let namespace = fs::read_link("/proc/self/ns/pid")?.display().to_string();
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned();
        Ok(Keeper { pid, started, namespace, boot })
    }

    /// Whether it certainly is no more.
    fn is_gone(&self) -> bool {
        let Ok(me) = Keeper::me() else { return false };
        if self.boot != me.boot {
            return true;
        }
        let lives = || {
            state(self.pid).is_some_and(|(state, started)| {
                started == self.started && !matches!(state, 'Z' | 'X')
            })
        };
        self.namespace == me.namespace && !lives()
    }
}

impl fmt::Display for Keeper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {} {}", self.pid, self.started, self.namespace, self.boot)
    }
}

impl FromStr for Keeper {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Keeper> {
        let fields: Vec<&str> = text.split(' ').collect();
        let [pid, started, namespace, boot] = fields[..] else { bail!("no keeper: {text:?}") };
        let [namespace, boot] = [namespace, boot].map(str::to_owned);
        Ok(Keeper { pid: pid.parse()?, started: started.parse()?, namespace, boot })
    }
}

/// A process's state and when it started, from /proc/PID/stat.
fn state(pid: u32) -> Option<(char, u64)> {
    parse_stat(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// The third and the twenty-second field of proc_pid_stat(5). The second, the name, may hold spaces
/// and parentheses itself; the last parenthesis ends it.
fn parse_stat(stat: &str) -> Option<(char, u64)> {
    let after_name = &stat[stat.rfind(')')? + 1..];
    let mut fields = after_name.split_whitespace();
    let state = fields.next()?.chars().next()?;
    Some((state, fields.nth(18)?.parse().ok()?))
}

/// The prefixes of two networks that nobody else is likely to have: `10.x.y` and `fd5e:71ab:x:y`.
fn addresses(random: u64) -> (String, String) {
    let [a, b, c, d, e, f, ..] = random.to_ne_bytes();
    (format!("10.{}.{b}", a | 128), format!("fd5e:71ab:{c:x}{d:02x}:{e:x}{f:02x}"))
}

fn random() -> io::Result<u64> {
    let mut bytes = [0; 8];
    fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(u64::from_ne_bytes(bytes))
}

/// What tells an image that is built from today's docker/Dockerfile from one that is not.
fn recipe() -> anyhow::Result<String> {
    let file = Path::new(ROOT).join("docker/Dockerfile");
    let text = fs::read(&file).with_context(|| format!("cannot read {}", file.display()))?;
    let mut hasher = DefaultHasher::new();
    text.hash(&mut hasher);
    Ok(format!("{:016x}", hasher.finish()))
}

/// This executable, or a copy in `folder` if its mode keeps others out (after `umask 077`): root in
/// the containers owns nothing and cannot overrule a mode.
fn executable(folder: &Path) -> anyhow::Result<PathBuf> {
    let own = std::env::current_exe()?;
    if fs::metadata(&own)?.permissions().mode() & 0o005 == 0o005 {
        return Ok(own);
    }
    let copy = folder.join("lab");
    fs::copy(&own, &copy).with_context(|| format!("cannot copy {}", own.display()))?;
    fs::set_permissions(&copy, fs::Permissions::from_mode(0o755))?;
    Ok(copy)
}

/// Waits until somebody listens at `path`. Containers that `up` has started take a moment yet to
/// get that far.
fn reach(path: &Path) -> anyhow::Result<()> {
    let address = UnixAddr::new(path)?;
    let start = Instant::now();
    loop {
        let kind = SockType::SeqPacket;
        let socket = socket(AddressFamily::Unix, kind, SockFlag::SOCK_CLOEXEC, None)?;
        match connect(socket.as_raw_fd(), &address) {
            Ok(()) => return Ok(()),
            Err(Errno::ENOENT | Errno::ECONNREFUSED | Errno::EINTR) if start.elapsed() < ANSWER => {
                thread::sleep(Duration::from_millis(2));
            }
            Err(errno) => {
                return Err(errno).with_context(|| format!("cannot reach {}", path.display()));
            }
        }
    }
}

/// Runs a command to its end, in a process group of its own, and gives its standard output.
///
/// # Errors
/// It cannot be run, fails, or takes longer than `deadline`: in one line, with its own last words.
fn run(command: &mut Command, deadline: Duration) -> anyhow::Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
    let child = match command.spawn() {
        // EACCES as well: the search of PATH met a folder that is closed to this user (execvp(3)).
        Err(error) if matches!(error.kind(), NotFound | PermissionDenied) => {
            bail!("{name} is not installed, or not for this user")
        }
        spawned => spawned.with_context(|| format!("cannot run {name}"))?,
    };
    let group = Pid::from_raw(child.id().cast_signed());
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || sender.send(child.wait_with_output()));
    let Ok(ended) = receiver.recv_timeout(deadline) else {
        let _ = killpg(group, Signal::SIGKILL);
        let arguments: Vec<_> = command.get_args().map(|a| a.to_string_lossy()).collect();
        bail!("no answer to `{name} {}` in {} s", arguments.join(" "), deadline.as_secs());
    };
    let Output { status, stdout, stderr } = ended?;
    if status.success() {
        return Ok(String::from_utf8_lossy(&stdout).into_owned());
    }
    match last_words(&String::from_utf8_lossy(&stderr)) {
        Some(words) => bail!("{name}: {words}"),
        None => bail!("{name}: {status}"),
    }
}

/// The line that says why: the last one, but for what version 1 of Compose closes with.
fn last_words(said: &str) -> Option<&str> {
    let mut lines = said.lines().map(str::trim);
    lines.rfind(|line| !line.is_empty() && !line.starts_with("Encountered errors while"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_name_with_spaces_and_parentheses_does_not_confuse() {
        let stat =
            "4242 (a (b) c) d) S 1 4242 4242 0 -1 4194560 94 0 0 0 0 0 0 0 20 0 1 0 987654 2";
        assert_eq!(parse_stat(stat), Some(('S', 987_654)));
        assert_eq!(parse_stat("4242 (short) S 1"), None);
        assert_eq!(parse_stat(""), None);
    }

    #[test]
    fn a_keeper_is_read_as_it_was_written() {
        let me = Keeper::me().unwrap();
        assert_eq!(me.to_string().parse::<Keeper>().unwrap(), me);
        assert!("".parse::<Keeper>().is_err());
        assert!("1 2 pid:[3]".parse::<Keeper>().is_err());
    }

    #[test]
    fn a_keeper_is_gone_only_if_that_is_certain() {
        let me = Keeper::me().unwrap();
        assert!(!me.is_gone());
        assert!(Keeper { started: me.started + 1, ..me.clone() }.is_gone(), "another has its pid");
        assert!(Keeper { boot: "earlier".into(), ..me.clone() }.is_gone());
        let elsewhere = Keeper { pid: u32::MAX, namespace: "pid:[1]".into(), ..me };
        assert!(!elsewhere.is_gone(), "what runs in another pid namespace cannot be seen");
    }

    #[test]
    fn addresses_are_private_and_well_formed() {
        for random in [0, u64::MAX, 0x0102_0304_0506_0708] {
            let (net4, net6) = addresses(random);
            let net4: std::net::Ipv4Addr = format!("{net4}.3").parse().unwrap();
            let net6: std::net::Ipv6Addr = format!("{net6}::3").parse().unwrap();
            assert!(net4.is_private() && net6.is_unique_local());
        }
    }

    #[test]
    fn a_command_that_does_not_answer_is_given_up() {
        let error = run(Command::new("sleep").arg("60"), Duration::from_millis(50)).unwrap_err();
        assert_eq!(error.to_string(), "no answer to `sleep 60` in 0 s");
        let error = run(&mut Command::new("serverlab-is-no-command"), ANSWER).unwrap_err();
        let words = "serverlab-is-no-command is not installed, or not for this user";
        assert_eq!(error.to_string(), words);
    }

    #[test]
    fn the_last_line_but_for_a_formula_says_why() {
        let stderr = " Network a_lan  Creating\n Network a_lan  Error\nError response from daemon: \
                      Pool overlaps with other one on this address space\n\n";
        assert!(last_words(stderr).unwrap().starts_with("Error response from daemon: Pool"));
        let version_1 = "ERROR: for client  no such image\nEncountered errors while bringing up\n";
        assert_eq!(last_words(version_1), Some("ERROR: for client  no such image"));
        assert_eq!(last_words("\n \n"), None);
    }
}
