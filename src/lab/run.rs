//! `lab run`: runs the suites and shows what becomes of their claims.
//!
//! The suites are the tests under `tests/`, the only place where claims are written. In a checkout
//! Cargo builds them and tells where they are; in the image they are there already, in the folder
//! that `LAB_SUITES` names. Each is an executable of Rust's test harness; what its experiments
//! report comes over a Unix socket ([`crate::lab::report`]).

use std::collections::BTreeMap;
use std::io::{IsTerminal as _, Write as _};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Sender};
use std::time::Instant;

use anstyle::{AnsiColor, Style};
use anyhow::{Context as _, bail};
use clap::Args;

use super::lease::AGENTS;
use super::report::{self, Experiment, Message};
use super::verdict::{Claim, Verdict};

/// Arguments of `lab run`.
#[derive(Args, Debug)]
pub struct RunArgs {
    /// Suites to run, by the names of their files under tests/; all, if none is named
    suites: Vec<String>,

    /// Only experiments with this in their name
    #[arg(short, long, value_name = "TEXT")]
    experiment: Option<String>,

    /// List the suites and run nothing
    #[arg(short, long)]
    list: bool,

    /// Network to run on
    #[arg(long, env = super::lease::NETWORK, value_name = "KIND",
          value_parser = ["auto", "netns", "compose"], default_value = "auto")]
    network: String,

    /// How many experiments at once, where each has a network of its own
    #[arg(short, long, value_name = "N")]
    jobs: Option<usize>,

    /// Folder for the evidence
    #[arg(long, env = "LAB_CAPTURES", value_name = "FOLDER")]
    captures: Option<PathBuf>,
}

/// An executable of tests.
#[derive(Debug)]
struct Suite {
    name: String,
    executable: PathBuf,
}

/// Runs the suites; whether nothing failed and nothing was invalid.
///
/// # Errors
/// An unknown suite, suites that cannot be built, a captures folder that cannot be written.
pub fn run(args: &RunArgs) -> anyhow::Result<bool> {
    let captures = args.captures.clone().unwrap_or_else(|| PathBuf::from("captures"));
    if std::env::var_os(AGENTS).is_some() {
        become_owner_of(&captures)?;
    }
    let suites = choose(find_suites(&args.suites)?, &args.suites)?;
    if args.list {
        let names: Vec<&str> = suites.iter().map(|suite| suite.name.as_str()).collect();
        anstream::println!("{}", names.join("\n"));
        return Ok(true);
    }
    check_writable(&captures)?;
    let _lease = super::lease::lease_agents()?;
    let mut show = Show::new(suites.len());
    for (number, suite) in (1..).zip(&suites) {
        show.suite(number, &suite.name);
        run_suite(suite, args, &captures, &mut show)?;
    }
    Ok(show.summary(&captures))
}

fn find_suites(wanted: &[String]) -> anyhow::Result<Vec<Suite>> {
    let mut suites = match std::env::var_os("LAB_SUITES") {
        Some(folder) => prebuilt(Path::new(&folder))?,
        None => built_by_cargo(wanted)?,
    };
    suites.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(suites)
}

fn prebuilt(folder: &Path) -> anyhow::Result<Vec<Suite>> {
    let entries = std::fs::read_dir(folder)
        .with_context(|| format!("cannot read LAB_SUITES={}", folder.display()))?;
    let mut suites = Vec::new();
    for entry in entries {
        let entry = entry?;
        if entry.metadata()?.permissions().mode() & 0o111 != 0 {
            let name = entry.file_name().to_string_lossy().into_owned();
            suites.push(Suite { name, executable: entry.path() });
        }
    }
    Ok(suites)
}

/// Asks Cargo to build the suites, in the profile that this executable was built in, and where they
/// are. Cargo shows its progress itself.
fn built_by_cargo(wanted: &[String]) -> anyhow::Result<Vec<Suite>> {
    let manifest = std::fs::read_to_string("Cargo.toml").unwrap_or_default();
    if !manifest.contains("name = \"serverlab\"") {
        bail!("no suites here: run it in the folder of a serverlab checkout, or in its image");
    }
    let there = |name: &String| Path::new("tests").join(name).with_extension("rs").exists();
    if let Some(unknown) = wanted.iter().find(|name| !there(name)) {
        bail!("no suite {unknown}: `lab run --list` lists them");
    }
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.args(["test", "--no-run", "--message-format=json-render-diagnostics"]);
    if !cfg!(debug_assertions) {
        command.arg("--release");
    }
    if wanted.is_empty() {
        command.args(["--test", "*"]);
    }
    for name in wanted {
        command.args(["--test", name]);
    }
    let output = command.stderr(Stdio::inherit()).output().context("cannot run cargo")?;
    if !output.status.success() {
        bail!("cargo could not build the suites");
    }
    let messages = String::from_utf8_lossy(&output.stdout);
    Ok(messages.lines().filter_map(suite_of_message).collect())
}

/// The suite in a message of Cargo, if it announces one.
fn suite_of_message(line: &str) -> Option<Suite> {
    let message: serde_json::Value = serde_json::from_str(line).ok()?;
    let target = message.get("target")?;
    let is_test = target.get("kind")?.as_array()?.iter().any(|kind| kind == "test");
    let executable = message.get("executable")?.as_str()?;
    let name = target.get("name")?.as_str()?.to_owned();
    is_test.then(|| Suite { name, executable: executable.into() })
}

fn choose(suites: Vec<Suite>, wanted: &[String]) -> anyhow::Result<Vec<Suite>> {
    if let Some(unknown) = wanted.iter().find(|name| suites.iter().all(|s| s.name != **name)) {
        let names: Vec<&str> = suites.iter().map(|suite| suite.name.as_str()).collect();
        bail!("no suite {unknown}; there are {}", names.join(", "));
    }
    let is_wanted = |suite: &Suite| wanted.is_empty() || wanted.contains(&suite.name);
    Ok(suites.into_iter().filter(is_wanted).collect())
}

fn check_writable(captures: &Path) -> anyhow::Result<()> {
    let probe = captures.join(format!(".probe-{}", std::process::id()));
    std::fs::create_dir_all(captures)
        .and_then(|()| std::fs::write(&probe, ""))
        .and_then(|()| std::fs::remove_file(&probe))
        .with_context(|| {
            format!("cannot write to {}: choose another folder with --captures", captures.display())
        })
}

/// In the image we start as root: what we write shall belong to whoever owns the folder that was
/// mounted for it.
fn become_owner_of(captures: &Path) -> anyhow::Result<()> {
    use nix::unistd::{Gid, Uid, getuid, setgid, setgroups, setuid};
    let Ok(owner) = std::fs::metadata(captures) else { return Ok(()) };
    if getuid().is_root() && owner.uid() != 0 {
        setgroups(&[]).context("cannot become the owner of the captures folder")?;
        setgid(Gid::from_raw(owner.gid()))?;
        setuid(Uid::from_raw(owner.uid()))?;
    }
    Ok(())
}

/// What comes while a suite runs.
enum News {
    Report(Message),
    Output(String),
    Ended(std::io::Result<ExitStatus>),
}

fn run_suite(
    suite: &Suite,
    args: &RunArgs,
    captures: &Path,
    show: &mut Show,
) -> anyhow::Result<()> {
    // An abstract socket (unix(7)): no file that could be left behind.
    let name = format!("serverlab-{}-{}", std::process::id(), suite.name);
    let socket = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name)?)?;
    let mut command = Command::new(&suite.executable);
    command.args(&args.experiment).arg("--quiet");
    command.env(report::SOCKET, &name).env(super::lease::NETWORK, &args.network);
    command.env("LAB_CAPTURES", std::path::absolute(captures)?);
    if let Some(jobs) = args.jobs {
        command.env("RUST_TEST_THREADS", jobs.to_string());
    }
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {}", suite.executable.display()))?;
    let (news, incoming) = mpsc::channel();
    read_output(&mut child, &news);
    let reports = news.clone();
    let listening = socket.try_clone()?;
    let listener = std::thread::spawn(move || {
        let mut buffer = vec![0; 1 << 20];
        // An empty datagram, from ourselves, is the end.
        while let Ok(length @ 1..) = listening.recv(&mut buffer) {
            if let Ok(message) = serde_json::from_slice(&buffer[..length]) {
                let _ = reports.send(News::Report(message));
            }
        }
    });
    let waiter = std::thread::spawn(move || {
        let status = child.wait();
        let address = SocketAddr::from_abstract_name(&name);
        let _ = address.and_then(|address| socket.send_to_addr(&[], &address));
        let _ = listener.join(); // every report was sent before the end
        let _ = news.send(News::Ended(status));
    });
    let mut output = String::new();
    let mut failed = false;
    let mut ended = None;
    // The last words may come after the end: all is heard before it is judged.
    for one in &incoming {
        match one {
            News::Report(message) => failed |= show.message(message),
            News::Output(text) => output.push_str(&text),
            News::Ended(status) => ended = Some(status?),
        }
    }
    let _ = waiter.join();
    if let Some(status) = ended.filter(|status| !status.success() && !failed) {
        show.suite_failed(&suite.name, status, &output);
    }
    Ok(())
}

fn read_output(child: &mut Child, news: &Sender<News>) {
    let stdout = child.stdout.take().map(|pipe| Box::new(pipe) as Box<dyn std::io::Read + Send>);
    let stderr = child.stderr.take().map(|pipe| Box::new(pipe) as Box<dyn std::io::Read + Send>);
    for mut pipe in stdout.into_iter().chain(stderr) {
        let news = news.clone();
        std::thread::spawn(move || {
            let mut bytes = Vec::new();
            let _ = pipe.read_to_end(&mut bytes);
            let _ = news.send(News::Output(String::from_utf8_lossy(&bytes).into_owned()));
        });
    }
}

/// The lab report on standard output, and on a terminal one line of progress below it.
struct Show {
    started: Instant,
    suites: usize,
    current: String,
    running: BTreeMap<String, Vec<Claim>>,
    progress: bool,
    counts: [usize; 5],
    claims: usize,
    broken_suites: usize,
    /// The lines of all that failed or was invalid: to be read again at the end.
    bad: Vec<String>,
}

const BOLD: Style = Style::new().bold();
const DIM: Style = Style::new().dimmed();

fn style(verdict: &Verdict) -> Style {
    let colour = match verdict {
        Verdict::Pass => AnsiColor::Green,
        Verdict::Fail(_) => AnsiColor::Red,
        Verdict::Drift(_) => AnsiColor::Cyan,
        Verdict::Skip(_) => AnsiColor::Yellow,
        Verdict::Invalid(_) => AnsiColor::Magenta,
    };
    colour.on_default().bold()
}

/// Whether the run fails with it.
fn is_bad(verdict: &Verdict) -> bool {
    matches!(verdict, Verdict::Fail(_) | Verdict::Invalid(_))
}

impl Show {
    fn new(suites: usize) -> Show {
        Show {
            started: Instant::now(),
            suites,
            current: String::new(),
            running: BTreeMap::new(),
            progress: std::io::stderr().is_terminal(),
            counts: [0; 5],
            claims: 0,
            broken_suites: 0,
            bad: Vec::new(),
        }
    }

    fn suite(&mut self, number: usize, name: &str) {
        self.current = format!("suite {number} of {}: {name}", self.suites);
        self.print(&format!("{BOLD}{name}{BOLD:#}"));
    }

    /// Whether the message tells of a failure.
    fn message(&mut self, message: Message) -> bool {
        match message {
            Message::Begun(experiment) => drop(self.running.insert(experiment.name, Vec::new())),
            Message::Claimed(experiment, claim) => {
                self.running.entry(experiment.name).or_default().push(claim);
            }
            Message::Ended { experiment, verdict, network, millis } => {
                let claims = self.running.remove(&experiment.name).unwrap_or_default();
                self.experiment(&experiment, &verdict, &network, millis, &claims);
                self.show_progress();
                return is_bad(&verdict);
            }
        }
        self.show_progress();
        false
    }

    fn experiment(
        &mut self,
        experiment: &Experiment,
        verdict: &Verdict,
        network: &str,
        millis: u64,
        claims: &[Claim],
    ) {
        self.claims += claims.len();
        self.counts[match verdict {
            Verdict::Pass => 0,
            Verdict::Fail(_) => 1,
            Verdict::Drift(_) => 2,
            Verdict::Skip(_) => 3,
            Verdict::Invalid(_) => 4,
        }] += 1;
        let Experiment { suite, name } = experiment;
        let title = format!("{name} {DIM}{network}, {millis} ms{DIM:#}");
        self.print(&format!("  {title}"));
        if is_bad(verdict) {
            self.bad.push(format!("  {suite} {title}"));
        }
        for claim in claims {
            self.verdict(&claim.verdict, &claim.sentence);
        }
        // What no claim says: why it was skipped, or ended before its claims.
        let kind = std::mem::discriminant(verdict);
        if !claims.iter().any(|claim| std::mem::discriminant(&claim.verdict) == kind) {
            self.verdict(verdict, "");
        }
    }

    fn verdict(&mut self, verdict: &Verdict, sentence: &str) {
        let style = style(verdict);
        let mut details = verdict.detail().lines();
        let sentence = if sentence.is_empty() { details.next().unwrap_or("") } else { sentence };
        let mut lines = vec![format!("    {style}{:<7}{style:#} {sentence}", verdict.word())];
        lines.extend(details.map(|line| format!("            {line}")));
        self.print(&lines.join("\n"));
        if is_bad(verdict) {
            self.bad.extend(lines);
        }
    }

    fn suite_failed(&mut self, name: &str, status: ExitStatus, output: &str) {
        self.broken_suites += 1;
        let what = format!("suite {name} failed outside its experiments: {status}\n{output}");
        self.verdict(&Verdict::Fail(what), "");
    }

    fn print(&self, line: &str) {
        self.clear_progress();
        anstream::println!("{line}");
    }

    fn show_progress(&self) {
        if self.progress {
            let names: Vec<&str> = self.running.keys().map(String::as_str).collect();
            let mut line = format!("{} · {}", self.current, names.join(", "));
            line.truncate(line.floor_char_boundary(76));
            eprint!("\r\x1b[K{line}");
            let _ = std::io::stderr().flush();
        }
    }

    fn clear_progress(&self) {
        if self.progress {
            eprint!("\r\x1b[K");
        }
    }

    fn summary(&self, captures: &Path) -> bool {
        let [passed, failed, drifted, skipped, invalid] = self.counts;
        let experiments: usize = self.counts.iter().sum();
        let good = failed + invalid + self.broken_suites == 0;
        let style = style(&if good { Verdict::Pass } else { Verdict::Fail(String::new()) });
        let drift = if drifted > 0 { format!(" {drifted} drifted,") } else { String::new() };
        self.print(&format!(
            "\n{style}{experiments} experiments, {} claims: {passed} passed, {failed} failed,\
             {drift} {skipped} skipped, {invalid} invalid{style:#} in {:.1} s",
            self.claims,
            self.started.elapsed().as_secs_f64()
        ));
        if self.broken_suites > 0 {
            self.print(&format!("{} suites failed outside experiments", self.broken_suites));
        }
        if !good {
            self.print(&format!("What failed:\n{}", self.bad.join("\n")));
        }
        self.print(&format!("The evidence is in {}", captures.display()));
        good
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(name: &str) -> Experiment {
        Experiment { suite: "tides".to_owned(), name: name.to_owned() }
    }

    fn experiment(show: &mut Show, name: &str, claims: &[(&str, Verdict)]) -> bool {
        show.message(Message::Begun(named(name)));
        for (sentence, verdict) in claims {
            let claim = Claim { sentence: (*sentence).to_owned(), verdict: verdict.clone() };
            show.message(Message::Claimed(named(name), claim));
        }
        let (_, last) = claims.last().expect("a claim");
        ended(show, name, last.clone())
    }

    fn ended(show: &mut Show, name: &str, verdict: Verdict) -> bool {
        let network = "netns".to_owned();
        show.message(Message::Ended { experiment: named(name), verdict, network, millis: 7 })
    }

    #[test]
    fn what_failed_is_kept_for_the_end_and_nothing_else() {
        let mut show = Show::new(1);
        show.suite(1, "tides");
        let skipped = Verdict::Skip("no moon".to_owned());
        let failed = Verdict::Fail("left: 1".to_owned());
        assert!(!experiment(&mut show, "good", &[("water is wet", Verdict::Pass)]));
        assert!(!experiment(&mut show, "skipped", &[("spring tide", skipped)]));
        let claims = [("it rises", Verdict::Pass), ("it falls", failed)];
        assert!(experiment(&mut show, "bad", &claims));
        assert!(ended(&mut show, "required", Verdict::Fail("skipped, but required".to_owned())));
        let kept = show.bad.iter().map(|line| anstream::adapter::strip_str(line).to_string());
        let kept: Vec<String> = kept.collect();
        assert_eq!(
            kept,
            [
                "  tides bad netns, 7 ms",
                "    FAIL    it falls",
                "            left: 1",
                "  tides required netns, 7 ms",
                "    FAIL    skipped, but required",
            ]
        );
    }
}
