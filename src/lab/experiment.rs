//! An experiment: who runs what on which host, and what must be seen.
//!
//! ```ignore
//! experiment!(family, "What does close() send after SO_LINGER{1,0}?", |lab| {
//!     let server = lab.server().spawn(&program!("rst-server"), args!["-i", "::"])?;
//!     server.event("listening")?;
//!     let capture = lab.capture()?;
//!     lab.client().run(&program!("client"), args!["-i", lab.server().address(family)])?;
//!     let wire = capture.finish()?;
//!     lab.claim("the server sends no FIN", wire.at("server").flow()?.fins(Side::Server) == 0);
//!     Ok(())
//! });
//! ```

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::fmt::{Debug, Write as _};
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Context as _;

use super::capture::{Capture, Depth, Taken};
use super::evidence;
use super::host::Host;
use super::kernel::Seen;
use super::lease::{self, Lease};
use super::network::{Kind, Network};
use super::program::Program;
use super::report::{self, Message};
use super::sockets::TcpState;
use super::verdict::{Claim, Invalid, Skip, Verdict};
use super::wait::Late;

/// What the macro [`experiment!`](crate::experiment!) knows of the place where it stands.
#[derive(Debug)]
pub struct Experiment {
    /// The test's file.
    pub suite: &'static str,
    /// The path of a function inside the test's function.
    pub function: &'static str,
    /// Which case of the test.
    pub case: String,
    /// What it asks.
    pub question: &'static str,
    /// The executable `lab`.
    pub lab: Program,
    /// The package's folder.
    pub package: &'static str,
    /// The text of `tests/kernels`: on which kernels its claims were seen.
    pub kernels: &'static str,
}

/// Runs an experiment: `experiment!(case, "question", |lab| { ...; Ok(()) })`.
///
/// The closure gets a [`Lab`] with a network of its own and states its
/// claims. The test fails if a claim fails, and also if the experiment is invalid.
#[macro_export]
macro_rules! experiment {
    ($case:expr, $question:expr, $body:expr $(,)?) => {{
        fn here() {}
        $crate::lab::experiment::Experiment {
            suite: env!("CARGO_CRATE_NAME"),
            function: std::any::type_name_of_val(&here),
            case: $case.to_string(),
            question: $question,
            lab: $crate::program!("lab"),
            package: env!("CARGO_MANIFEST_DIR"),
            kernels: include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/kernels")),
        }
        .run($body)
    }};
}

/// Everything that an experiment needs: its network, its claims.
#[derive(Debug)]
pub struct Lab {
    network: Lease,
    program: Program,
    name: report::Experiment,
    captures: PathBuf,
    question: &'static str,
    seen: Seen,
    started: Instant,
    claims: RefCell<Vec<Claim>>,
    taken: RefCell<Vec<Taken>>,
    next_port: Cell<u16>,
    next_client_port: Cell<u16>,
}

impl Experiment {
    /// Runs it, writes its evidence, and reports.
    ///
    /// # Panics
    /// If a claim fails or the experiment is invalid: that is how a test fails.
    #[track_caller]
    pub fn run(self, body: impl FnOnce(&Lab) -> anyhow::Result<()>) {
        let name = self.name();
        report::send(&Message::Begun(name.clone()));
        let started = Instant::now();
        let network = match Lease::take(&self.lab) {
            Ok(network) => network,
            Err(error) => {
                let verdict = Verdict::Invalid(format!("no network: {error:#}"));
                return conclude(&name, "none", started, &verdict, &[]);
            }
        };
        network.journal().take(); // what an experiment before us left there
        let seen = Seen::of(self.kernels, &format!("{}/{}", name.suite, name.name));
        let lab = Lab {
            network,
            program: self.lab.clone(),
            name,
            captures: std::env::var_os("LAB_CAPTURES")
                .map_or_else(|| Path::new(self.package).join("captures"), PathBuf::from),
            question: self.question,
            seen,
            started,
            claims: RefCell::default(),
            taken: RefCell::default(),
            next_port: Cell::new(2000),
            next_client_port: Cell::new(40_000),
        };
        let verdict = lab.judge(body(&lab));
        lab.leave_evidence(&verdict);
        let kind = lab.network.kind().to_string();
        let claims = lab.claims.take();
        let name = lab.name.clone();
        drop(lab);
        conclude(&name, &kind, started, &verdict, &claims);
    }

    fn name(&self) -> report::Experiment {
        let path = self.function.strip_suffix("::here").unwrap_or(self.function);
        let function = path.rsplit("::").find(|part| *part != "{{closure}}").unwrap_or(path);
        let mut name = function.replace('_', "-");
        if !self.case.is_empty() {
            let _ = write!(name, "-{}", self.case);
        }
        report::Experiment { suite: self.suite.to_owned(), name }
    }
}

impl Lab {
    /// The host `client`.
    pub fn client(&self) -> &Host {
        self.network.host("client")
    }

    /// The host `server`.
    pub fn server(&self) -> &Host {
        self.network.host("server")
    }

    /// The whole network.
    pub fn network(&self) -> &Network {
        &self.network
    }

    /// The executable `lab`.
    pub fn program(&self) -> &Program {
        &self.program
    }

    /// A port that no socket of any host has, not even one in TIME_WAIT; each call another. In a
    /// network of namespaces, which is new, the first is 2000.
    ///
    /// # Errors
    /// A host cannot be asked.
    pub fn port(&self) -> anyhow::Result<u16> {
        let port = self.free_ports(self.next_port.get(), 1)?;
        self.next_port.set(port + 1);
        Ok(port)
    }

    /// The first of so many such ports in a row, from among those that the kernel gives to clients
    /// (ip(7), ip_local_port_range); each call others.
    ///
    /// # Errors
    /// As [`Lab::port`].
    pub fn client_ports(&self, count: u16) -> anyhow::Result<u16> {
        let first = self.free_ports(self.next_client_port.get(), count)?;
        self.next_client_port.set(first + count);
        Ok(first)
    }

    /// The first of `count` ports in a row, at `from` or above, that no socket of any host has.
    fn free_ports(&self, from: u16, count: u16) -> anyhow::Result<u16> {
        let mut taken = BTreeSet::new();
        if self.network.kind() == Kind::Compose {
            for host in self.network.hosts() {
                let rows = host.tcp_sockets()?;
                taken.extend(rows.iter().flat_map(|row| [row.local.port(), row.remote.port()]));
            }
        }
        let mut first = from;
        loop {
            let behind = first.checked_add(count).context("no port is free")?;
            match taken.range(first..behind).next_back() {
                Some(last_taken) => first = last_taken + 1,
                None => return Ok(first),
            }
        }
    }

    /// Starts to capture whole packets on every host.
    ///
    /// # Errors
    /// As `Capture::start`.
    pub fn capture(&self) -> anyhow::Result<Capture<'_>> {
        self.capture_deep(Depth::Whole)
    }

    /// Starts to capture on every host.
    ///
    /// # Errors
    /// As `Capture::start`.
    pub fn capture_deep(&self, depth: Depth) -> anyhow::Result<Capture<'_>> {
        Capture::start(self, depth)
    }

    /// States a claim and its verdict, which a `bool` or a `Result` can give.
    pub fn claim(&self, sentence: impl Into<String>, verdict: impl Into<Verdict>) {
        let verdict = self.seen.judge(verdict.into());
        let claim = Claim { sentence: sentence.into(), verdict };
        report::send(&Message::Claimed(self.name.clone(), claim.clone()));
        self.claims.borrow_mut().push(claim);
    }

    /// States that two values are the same.
    pub fn claim_eq<A: Debug + PartialEq<B>, B: Debug>(
        &self,
        sentence: impl Into<String>,
        seen: A,
        expected: B,
    ) {
        let verdict = if seen == expected {
            Verdict::Pass
        } else {
            Verdict::Fail(format!("expected {expected:?}\n     saw {seen:?}"))
        };
        self.claim(sentence, verdict);
    }

    /// The states of a host's connections from or to this port, listeners left out.
    ///
    /// # Errors
    /// The host cannot be asked.
    pub fn states(&self, host: &Host, port: u16) -> anyhow::Result<Vec<TcpState>> {
        let rows = host.tcp_sockets()?.into_iter();
        let rows = rows.filter(|row| row.local.port() == port || row.remote.port() == port);
        Ok(rows.map(|row| row.state).filter(|state| *state != TcpState::Listen).collect())
    }

    /// Keeps what a capture has taken for the evidence.
    pub(super) fn keep(&self, taken: Vec<Taken>) {
        self.taken.borrow_mut().extend(taken);
    }

    /// Where the evidence will be.
    pub fn folder(&self) -> PathBuf {
        self.captures.join(&self.name.suite).join(&self.name.name)
    }

    /// The experiment's verdict: the worst of its claims', or what ended it early.
    fn judge(&self, outcome: anyhow::Result<()>) -> Verdict {
        let claims = self.claims.borrow();
        let count = |is: fn(&Verdict) -> bool| claims.iter().filter(|c| is(&c.verdict)).count();
        let failures = count(|verdict| matches!(verdict, Verdict::Fail(_)));
        let drifts = count(|verdict| matches!(verdict, Verdict::Drift(_)));
        let invalid = count(|verdict| matches!(verdict, Verdict::Invalid(_)));
        match outcome {
            Err(error) => match error.downcast_ref::<Skip>() {
                Some(skip) if skip.could_be_had() && everything_is_required() => {
                    Verdict::Fail(format!("skipped, and LAB_REQUIRE=all: {error:#}"))
                }
                Some(_) => Verdict::Skip(format!("{error:#}")),
                // What never came may be what this kernel does not do.
                None if error.is::<Late>() && self.seen.may_drift() => {
                    self.seen.drift(&format!("{error:#}"))
                }
                None => Verdict::Invalid(format!("{error:#}")),
            },
            Ok(()) if claims.is_empty() => Verdict::Invalid("it claims nothing".to_owned()),
            Ok(()) if failures > 0 => {
                Verdict::Fail(format!("{failures} of {} claims fail", claims.len()))
            }
            Ok(()) if invalid > 0 => {
                Verdict::Invalid(format!("{invalid} of {} claims prove nothing", claims.len()))
            }
            Ok(()) if drifts > 0 => {
                self.seen.drift(&format!("{drifts} of {} claims drift", claims.len()))
            }
            Ok(()) => Verdict::Pass,
        }
    }

    fn leave_evidence(&self, verdict: &Verdict) {
        let written = evidence::write(
            &self.folder(),
            &evidence::Evidence {
                name: &self.name,
                question: self.question,
                seen_on: self.seen.on(),
                network: &self.network,
                verdict,
                claims: &self.claims.borrow(),
                taken: &self.taken.borrow(),
                programs: &self.network.journal().take(),
                took: self.started.elapsed(),
            },
        );
        if let Err(error) = written {
            // Not a verdict about the claims: they stand. But never silent.
            let name = &self.name;
            lease::say(&format!("{}/{}: no evidence: {error:#}", name.suite, name.name));
        }
    }
}

fn everything_is_required() -> bool {
    std::env::var("LAB_REQUIRE").is_ok_and(|value| value == "all")
}

/// Tells the verdict to whoever runs us, and to the test harness in its own way.
#[track_caller]
fn conclude(
    name: &report::Experiment,
    network: &str,
    started: Instant,
    verdict: &Verdict,
    claims: &[Claim],
) {
    report::send(&Message::Ended {
        experiment: name.clone(),
        verdict: verdict.clone(),
        network: network.to_owned(),
        millis: u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX),
    });
    let title = format!("{}/{}", name.suite, name.name);
    match verdict {
        Verdict::Pass => {}
        Verdict::Skip(missing) => lease::say(&format!("{title}: SKIPPED: {missing}")),
        Verdict::Drift(how) => lease::say(&format!("{title}: DRIFT: {how}")),
        Verdict::Fail(_) | Verdict::Invalid(_) => {
            let mut text = format!("{title}: {}: {}\n", verdict.word(), verdict.detail());
            for claim in claims {
                let _ = writeln!(text, "\n{:>7}  {}", claim.verdict.word(), claim.sentence);
                for line in claim.verdict.detail().lines() {
                    let _ = writeln!(text, "         {line}");
                }
            }
            panic!("{text}");
        }
    }
}

/// The error that skips an experiment, unless `there`.
///
/// # Errors
/// [`Skip`], with what is missing.
pub fn require(there: bool, missing: &str) -> anyhow::Result<()> {
    if there { Ok(()) } else { Err(Skip::new(missing).into()) }
}

/// The error of an experiment that proves nothing, unless `sound`.
///
/// # Errors
/// [`Invalid`], with the reason.
pub fn ensure_valid(sound: bool, why: &str) -> anyhow::Result<()> {
    if sound { Ok(()) } else { Err(Invalid::new(why).into()) }
}
