//! Waits for facts that nobody announces: a socket's state, a process's, a counter.

use std::fmt;
use std::time::{Duration, Instant};

/// The pause between two looks: /proc has to be looked at again, there is no call that waits for it.
const PAUSE: Duration = Duration::from_micros(500);

/// The error of a fact that did not come in time.
#[derive(Debug)]
pub struct Late(pub Duration);

impl fmt::Display for Late {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "not within {:?}", self.0)
    }
}

impl std::error::Error for Late {}

/// Looks again and again until there is something, for no longer than `patience`.
///
/// # Errors
/// What `look` reports, or what was awaited in vain.
pub fn until<T>(
    what: &str,
    patience: Duration,
    mut look: impl FnMut() -> anyhow::Result<Option<T>>,
) -> anyhow::Result<T> {
    let deadline = Instant::now() + patience;
    loop {
        if let Some(found) = look()? {
            return Ok(found);
        }
        if Instant::now() >= deadline {
            return Err(anyhow::Error::new(Late(patience)).context(format!("awaited {what}")));
        }
        std::thread::sleep(PAUSE);
    }
}
