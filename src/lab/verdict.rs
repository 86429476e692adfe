//! Claims and what became of them.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What became of a claim or an experiment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// It holds.
    Pass,
    /// It does not hold; what was seen instead.
    Fail(String),
    /// It does not hold on this kernel, and was never seen on it; what was seen instead.
    Drift(String),
    /// It could not be tried; what is missing.
    Skip(String),
    /// It was tried, but what was seen proves nothing; why.
    Invalid(String),
}

impl Verdict {
    /// Its name: `pass`, `FAIL`, `DRIFT`, `skip`, `INVALID`.
    pub fn word(&self) -> &'static str {
        match self {
            Verdict::Pass => "pass",
            Verdict::Fail(_) => "FAIL",
            Verdict::Drift(_) => "DRIFT",
            Verdict::Skip(_) => "skip",
            Verdict::Invalid(_) => "INVALID",
        }
    }

    /// What was seen, what is missing, or why; empty for a pass.
    pub fn detail(&self) -> &str {
        match self {
            Verdict::Pass => "",
            Verdict::Fail(text)
            | Verdict::Drift(text)
            | Verdict::Skip(text)
            | Verdict::Invalid(text) => text,
        }
    }
}

impl From<bool> for Verdict {
    fn from(holds: bool) -> Verdict {
        if holds { Verdict::Pass } else { Verdict::Fail("it does not".to_owned()) }
    }
}

impl<E: fmt::Display> From<Result<(), E>> for Verdict {
    fn from(result: Result<(), E>) -> Verdict {
        match result {
            Ok(()) => Verdict::Pass,
            Err(difference) => Verdict::Fail(difference.to_string()),
        }
    }
}

/// A sentence about what programs, packets and kernel do, and its verdict.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claim {
    /// The sentence.
    pub sentence: String,
    /// Whether it holds.
    pub verdict: Verdict,
}

/// The error of an experiment that cannot be tried here, and what is missing for it.
#[derive(Debug)]
pub struct Skip {
    missing: String,
    by_network: bool,
}

/// The error of an experiment whose outcome proves nothing, as one with an incomplete capture.
#[derive(Debug)]
pub struct Invalid(String);

impl Skip {
    /// With what this machine lacks.
    pub fn new(missing: impl Into<String>) -> Skip {
        Skip { missing: missing.into(), by_network: false }
    }

    /// With what this kind of network cannot do, whatever the machine: Compose's hosts cannot
    /// change a sysctl. `LAB_REQUIRE=all` does not ask for it.
    pub fn by_network(missing: impl Into<String>) -> Skip {
        Skip { missing: missing.into(), by_network: true }
    }

    /// Whether `LAB_REQUIRE=all` makes it a failure.
    pub fn could_be_had(&self) -> bool {
        !self.by_network
    }
}

impl Invalid {
    /// With the reason.
    pub fn new(why: impl Into<String>) -> Invalid {
        Invalid(why.into())
    }
}

impl fmt::Display for Skip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.missing)
    }
}

impl fmt::Display for Invalid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Skip {}
impl std::error::Error for Invalid {}
