//! The kernel that runs here, and those on which an experiment's claims were seen to hold.
//!
//! What a claim says of the kernel may be otherwise on the next one. `tests/kernels` lists on which
//! versions the claims of each suite were seen; a claim that does not hold on another version is
//! neither the lab's bug nor to be ignored: it is [`Verdict::Drift`].

use super::verdict::Verdict;

/// On which versions of Linux an experiment's claims were seen, and which runs here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// `6.18`; none, if the claims are not about the kernel.
    versions: Vec<String>,
    running: String,
}

impl Seen {
    /// What `list`, the text of `tests/kernels`, says of `SUITE/EXPERIMENT`.
    pub fn of(list: &str, experiment: &str) -> Seen {
        let running = nix::sys::utsname::uname()
            .map(|name| version(&name.release().to_string_lossy()).to_owned())
            .unwrap_or_default();
        let lines = list.lines().filter(|line| !line.starts_with('#'));
        let fitting = lines.filter_map(|line| {
            let mut words = line.split_whitespace();
            let subject = words.next()?;
            let fits = experiment.strip_prefix(subject).is_some_and(|rest| {
                subject.contains('/') || rest.is_empty() || rest.starts_with('/')
            });
            fits.then(|| (subject.len(), words.map(str::to_owned).collect()))
        });
        let versions = fitting.max_by_key(|(length, _)| *length);
        Seen { versions: versions.map(|(_, versions)| versions).unwrap_or_default(), running }
    }

    /// Whether what differs here may be the kernel: its claims were seen on others only.
    pub fn may_drift(&self) -> bool {
        !self.versions.is_empty() && !self.versions.contains(&self.running)
    }

    /// The versions in one line; `None`, if the claims are not about the kernel.
    pub fn on(&self) -> Option<String> {
        (!self.versions.is_empty()).then(|| format!("Linux {}", self.versions.join(", ")))
    }

    /// A verdict as it has to be taken here: a failure may be a drift.
    pub fn judge(&self, verdict: Verdict) -> Verdict {
        match verdict {
            Verdict::Fail(detail) if self.may_drift() => self.drift(&detail),
            other => other,
        }
    }

    /// The verdict that reports a difference between kernels.
    pub fn drift(&self, detail: &str) -> Verdict {
        let Seen { versions, running } = self;
        let seen = versions.join(", ");
        Verdict::Drift(format!("{detail}\nseen on Linux {seen}; this is Linux {running}"))
    }
}

/// `6.18` of a release like `6.18.44-fc-v782`.
fn version(release: &str) -> &str {
    let digits = |text: &str| text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let major = digits(release);
    match release[major..].strip_prefix('.') {
        Some(rest) => &release[..major + 1 + digits(rest)],
        None => &release[..major],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(experiment: &str, running: &str) -> Seen {
        let list = "# other 1.0\n\nmyths 6.1 6.18\nmyths/syn 6.5\nmyth 5.10\n";
        Seen { running: running.to_owned(), ..Seen::of(list, experiment) }
    }

    #[test]
    fn a_release_is_cut_to_its_version() {
        assert_eq!(version("6.18.44-fc-v782"), "6.18");
        assert_eq!(version("6.18-rc1"), "6.18");
        assert_eq!(version("7"), "7");
        assert_eq!(version(""), "");
    }

    #[test]
    fn the_longest_line_that_fits_counts() {
        assert_eq!(seen("myths/all-wake-ipv4", "6.18").on().unwrap(), "Linux 6.1, 6.18");
        assert_eq!(seen("myths/syn-retries-ipv4", "6.18").on().unwrap(), "Linux 6.5");
        assert_eq!(seen("myth", "6.18").on().unwrap(), "Linux 5.10");
        assert_eq!(seen("other/one", "6.18").on(), None);
    }

    #[test]
    fn only_another_kernel_excuses_and_it_says_which() {
        let fail = || Verdict::Fail("expected 1, saw 2".to_owned());
        assert_eq!(seen("myths/all", "6.18").judge(fail()), fail());
        assert_eq!(seen("laboratory/all", "6.19").judge(fail()), fail());
        assert_eq!(seen("myths/all", "6.19").judge(Verdict::Pass), Verdict::Pass);
        let drift = seen("myths/all", "6.19").judge(fail());
        let told = "expected 1, saw 2\nseen on Linux 6.1, 6.18; this is Linux 6.19";
        assert_eq!(drift, Verdict::Drift(told.to_owned()));
    }
}
