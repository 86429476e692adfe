//! What ran in an experiment: every program, with all that it said.

use std::sync::{Arc, Mutex, PoisonError};

use super::event::Event;
use super::process::{Ending, Recording};

/// The programs that were run on a network since it was last cleared.
#[derive(Clone, Debug, Default)]
pub struct Journal {
    entries: Arc<Mutex<Vec<Entry>>>,
}

/// One program.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Where it ran.
    pub host: String,
    /// Its arguments in one line.
    pub command: String,
    /// Its pid there.
    pub pid: i32,
    /// What it said and how it ended.
    pub(super) recording: Recording,
}

impl Journal {
    /// Adds a program.
    pub(super) fn add(&self, entry: Entry) {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner).push(entry);
    }

    /// Takes what has been added so far.
    pub fn take(&self) -> Vec<Entry> {
        std::mem::take(&mut *self.entries.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Entry {
    /// The events that it printed.
    pub fn events(&self) -> Vec<Event> {
        self.recording.events()
    }

    /// What it wrote to standard output.
    pub fn stdout(&self) -> String {
        self.recording.stdout()
    }

    /// What it wrote to standard error.
    pub fn stderr(&self) -> String {
        self.recording.stderr()
    }

    /// How it ended; `None` if the experiment ended it.
    pub fn ending(&self) -> Option<Ending> {
        self.recording.ending()
    }
}
