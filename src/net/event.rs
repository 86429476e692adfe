//! Event lines: what a program did, one line an event, one `write(2)` a line, to standard output.
//!
//! ```text
//! 1795361749.734234123 fork-server[1234] accepted peer=10.0.0.2:40112 fd=4
//! ```
//!
//! The stamp is CLOCK_REALTIME in seconds, the clock and the form of `tcpdump -tt` and
//! `strace -ttt`, so that lines, packets and system calls sort into one timeline. Then come the
//! program, its pid, a verb in the past tense and `key=value` pairs; a value that would not read
//! back (a blank, a quote, a control character, nothing at all) stands in double quotes, escaped
//! as Rust escapes.
//!
//! A line is formatted on the stack and handed over by one system call. So lines of processes that
//! share a pipe never mix (pipe(7), PIPE_BUF), nothing is left in a buffer for a forked child to
//! print again or for `_exit` to lose, and an event may be printed in a signal handler: no
//! allocation, no lock, nothing but clock_gettime(2), getpid(2) and write(2), which
//! signal-safety(7) lists.

use std::fmt::{self, Display, Write};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

/// Longest event line, in bytes; a longer one is cut. Below PIPE_BUF (4096), so that a line is
/// written to a pipe whole or not at all.
pub const MAX_LINE: usize = 1024;

/// Whether a server prints this verb for each connection or request: what `-q` silences. The
/// compiler knows the answer for a verb that is written in the code.
#[inline(always)]
fn is_per_connection(verb: &str) -> bool {
    matches!(
        verb,
        "accepted" | "request" | "sent" | "closed" | "forked" | "reaped" | "passed" | "received"
    )
}

static QUIET: AtomicBool = AtomicBool::new(false);
static TO_STANDARD_ERROR: AtomicBool = AtomicBool::new(false);
static PROGRAM: OnceLock<String> = OnceLock::new();

/// Prints an event: `event!("accepted", peer = peer, fd = 4)`.
///
/// Values are anything with [`Display`]. See [`crate::net::event`].
#[macro_export]
macro_rules! event {
    ($verb:expr $(, $key:ident = $value:expr)* $(,)?) => {
        $crate::net::event::print($verb, &[$((stringify!($key), &$value)),*])
    };
}

/// Sets the program's name for its event lines and whether the verbs printed for each connection
/// are silenced. Called once, before the first event and before any signal handler or fork.
pub fn start(program: &str, quiet: bool) {
    let _ = PROGRAM.set(program.to_owned()); // a second call keeps the first name
    QUIET.store(quiet, Ordering::Relaxed);
}

/// Prints to standard error from here on, in a program whose standard output is a connection.
pub fn to_standard_error() {
    TO_STANDARD_ERROR.store(true, Ordering::Relaxed);
}

/// Prints one event line; [`event!`](crate::event!) is the readable way to call it.
///
/// Async-signal-safe. A failed write is ignored: a reader that is gone must not end a server.
#[inline(always)]
pub fn print(verb: &str, pairs: &[(&str, &dyn Display)]) {
    if !(is_per_connection(verb) && is_quiet()) {
        print_line(verb, pairs);
    }
}

/// Whether the events of connections are silenced, and what only they would tell is not asked for.
#[inline]
pub fn is_quiet() -> bool {
    QUIET.load(Ordering::Relaxed)
}

/// Apart from [`print()`], so that a quiet server pays for no line: a forked child that touches
/// another page of its stack, or of the code, pays microseconds for it.
#[cold]
#[inline(never)]
fn print_line(verb: &str, pairs: &[(&str, &dyn Display)]) {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_REALTIME)
        .expect("CLOCK_REALTIME exists on every Linux");
    let program = PROGRAM.get().map_or("program", String::as_str);
    let mut line = Line::new();
    line.fill(now.tv_sec(), now.tv_nsec(), program, verb, pairs);
    let _ = match TO_STANDARD_ERROR.load(Ordering::Relaxed) {
        false => nix::unistd::write(std::io::stdout(), line.finish()),
        true => nix::unistd::write(std::io::stderr(), line.finish()),
    };
}

/// A line under construction on the stack. What does not fit is cut.
struct Line {
    bytes: [u8; MAX_LINE],
    len: usize,
}

impl Line {
    fn new() -> Line {
        Line { bytes: [0; MAX_LINE], len: 0 }
    }

    fn fill(
        &mut self,
        seconds: i64,
        nanos: i64,
        program: &str,
        verb: &str,
        pairs: &[(&str, &dyn Display)],
    ) {
        let pid = nix::unistd::getpid();
        // Writing to a Line cannot fail; a value's own Display might, and then its text ends there.
        let _ = write!(self, "{seconds}.{nanos:09} {program}[{pid}] {verb}");
        for (key, value) in pairs {
            let _ = write!(self, " {key}=");
            let from = self.len;
            let _ = write!(self, "{value}");
            self.quote_if_needed(from);
        }
    }

    /// Quotes the value that stands from `from` to the end, if it would not read back as it is.
    fn quote_if_needed(&mut self, from: usize) {
        let plain = |b: &u8| b.is_ascii_graphic() && *b != b'"' || *b >= 0x80;
        let value = &self.bytes[from..self.len];
        if !value.is_empty() && value.iter().all(plain) {
            return;
        }
        let copy = self.bytes;
        let value = std::str::from_utf8(&copy[from..self.len]).unwrap_or("?");
        self.len = from;
        let _ = write!(self, "{value:?}");
    }

    /// The line with its newline.
    fn finish(&mut self) -> &[u8] {
        self.bytes[self.len] = b'\n';
        &self.bytes[..=self.len]
    }
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let room = MAX_LINE - 1 - self.len; // one byte is the newline's
        let take = text.floor_char_boundary(room.min(text.len()));
        self.bytes[self.len..self.len + take].copy_from_slice(&text.as_bytes()[..take]);
        self.len += take;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(pairs: &[(&str, &dyn Display)]) -> String {
        let mut line = Line::new();
        line.fill(1_795_361_749, 734_234_123, "fork-server", "accepted", pairs);
        String::from_utf8(line.finish().to_vec()).unwrap()
    }

    #[test]
    fn a_line_is_stamp_program_pid_verb_and_pairs() {
        let pid = std::process::id();
        assert_eq!(
            line(&[("peer", &"10.0.0.2:40112"), ("fd", &4)]),
            format!("1795361749.734234123 fork-server[{pid}] accepted peer=10.0.0.2:40112 fd=4\n")
        );
    }

    #[test]
    fn a_value_that_would_not_read_back_is_quoted() {
        assert!(
            line(&[("a", &""), ("b", &"x y"), ("c", &"\"\n")])
                .ends_with("accepted a=\"\" b=\"x y\" c=\"\\\"\\n\"\n")
        );
    }

    #[test]
    fn a_long_line_is_cut_and_still_ends() {
        for offset in ["", "x"] {
            let long = format!("{offset}{}", "é".repeat(MAX_LINE));
            let line = line(&[("long", &long)]);
            assert!(line.len() <= MAX_LINE && line.ends_with("é\n"), "{line}");
        }
    }
}
