//! Reads the event lines that programs print.
//!
//! The form of a line is the contract between programs and laboratory; it is described where it is
//! printed, in [`crate::net::event`], and shares no code with this side. A program in another
//! language may print such lines too.
//!
//! ```
//! use serverlab::lab::event::Event;
//!
//! let line = b"1795361749.734234123 fork-server[1234] accepted peer=10.0.0.2:40112 fd=4";
//! let event = Event::parse(line).expect("an event line");
//! assert_eq!((event.verb.as_str(), event.pid), ("accepted", 1234));
//! assert_eq!(event.get("fd"), Some("4"));
//! ```

use std::fmt;

/// One event line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// When it was printed: nanoseconds since the epoch (CLOCK_REALTIME), as packets have.
    pub at: u64,
    /// The program's name.
    pub program: String,
    /// The process that printed it.
    pub pid: u32,
    /// What it did.
    pub verb: String,
    /// The rest: keys and values in the line's order, quoted values as they were before quoting.
    pub fields: Vec<(String, String)>,
}

/// A line this long, in bytes without its newline, may have been cut by its printer, at whatever
/// byte that was (the limit is 1024 with the newline, less a few for a character kept whole).
const MAY_BE_CUT: usize = 1024 - 1 - 3;

impl Event {
    /// Reads one line, with or without its newline; `None` if it is no event line.
    ///
    /// A line that was cut is still an event, with what is left of its last value. Bytes that are
    /// not UTF-8 become U+FFFD.
    pub fn parse(line: &[u8]) -> Option<Event> {
        let line = String::from_utf8_lossy(line.strip_suffix(b"\n").unwrap_or(line));
        let cut = line.len() >= MAY_BE_CUT;
        let (stamp, rest) = line.split_once(' ')?;
        let (who, rest) = rest.split_once(' ')?;
        let (program, pid) = who.strip_suffix(']')?.rsplit_once('[')?;
        let (verb, rest) = word(rest);
        if program.is_empty() || !is_name(verb) {
            return None;
        }
        Some(Event {
            at: nanoseconds(stamp)?,
            program: program.to_owned(),
            pid: number(pid)?,
            verb: verb.to_owned(),
            fields: pairs(rest, cut)?,
        })
    }

    /// The value of a key, the first if there are several.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.fields.iter().find(|(k, _)| k == key).map(|(_, value)| value.as_str())
    }
}

impl fmt::Display for Event {
    /// The line without its time.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}[{}] {}", self.program, self.pid, self.verb)?;
        for (key, value) in &self.fields {
            let plain = |c: char| c.is_ascii_graphic() && c != '"' || !c.is_ascii();
            if !value.is_empty() && value.chars().all(plain) {
                write!(f, " {key}={value}")?;
            } else {
                write!(f, " {key}={value:?}")?;
            }
        }
        Ok(())
    }
}

/// Seconds, a point and nine digits.
fn nanoseconds(stamp: &str) -> Option<u64> {
    let (seconds, nanos) = stamp.split_once('.').filter(|(_, nanos)| nanos.len() == 9)?;
    number::<u64>(seconds)?.checked_mul(1_000_000_000)?.checked_add(number(nanos)?)
}

/// Digits only: `parse` alone takes a sign too.
fn number<T: std::str::FromStr>(digits: &str) -> Option<T> {
    digits.parse().ok().filter(|_| digits.bytes().all(|b| b.is_ascii_digit()))
}

/// Verbs and keys.
fn is_name(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-')
}

/// The text up to the next blank, and the rest from that blank on.
fn word(text: &str) -> (&str, &str) {
    text.split_at(text.find(' ').unwrap_or(text.len()))
}

/// All the ` key=value`. The end of a cut line may be the beginning of a key, or nothing.
fn pairs(mut text: &str, cut: bool) -> Option<Vec<(String, String)>> {
    let mut pairs = Vec::new();
    while !text.is_empty() {
        let pair = text.strip_prefix(' ')?;
        let Some((key, value)) = pair.split_once('=') else {
            return (cut && (pair.is_empty() || is_name(pair))).then_some(pairs);
        };
        let (value, rest) = match value.strip_prefix('"') {
            Some(quoted) => unquote(quoted, cut)?,
            None => {
                let (value, rest) = word(value);
                (value.to_owned(), rest)
            }
        };
        if !is_name(key) {
            return None;
        }
        pairs.push((key.to_owned(), value));
        text = rest;
    }
    Some(pairs)
}

/// The value that begins after a quote, and what follows its closing quote. The escapes are those
/// of Rust's `{:?}`.
fn unquote(text: &str, cut: bool) -> Option<(String, &str)> {
    let mut value = String::new();
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match c {
            '"' => return Some((value, chars.as_str())),
            '\\' => match escape(&mut chars) {
                Some(c) => value.push(c),
                None if cut && chars.as_str().is_empty() => break,
                None => return None,
            },
            c => value.push(c),
        }
    }
    cut.then_some((value, ""))
}

/// What stands for an escaped character, after its backslash.
fn escape(chars: &mut std::str::Chars<'_>) -> Option<char> {
    match chars.next()? {
        'n' => Some('\n'),
        'r' => Some('\r'),
        't' => Some('\t'),
        '0' => Some('\0'),
        'u' => {
            let (code, rest) = chars.as_str().split_once('}').unwrap_or_default();
            *chars = rest.chars(); // without a closing brace: nothing, as after a cut
            char::from_u32(u32::from_str_radix(code.strip_prefix('{')?, 16).ok()?)
        }
        c @ ('"' | '\'' | '\\') => Some(c),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: &str = "1795361749.734234123 fork-server[1234]";

    fn parse(rest: &str) -> Option<Event> {
        Event::parse(format!("{HEAD} {rest}").as_bytes())
    }

    #[test]
    fn a_line_is_read_whole() {
        let event = parse("accepted peer=[::1]:40112 fd=4\n").unwrap();
        assert_eq!(event.at, 1_795_361_749_734_234_123);
        assert_eq!((event.program.as_str(), event.pid), ("fork-server", 1234));
        assert_eq!(event.verb, "accepted");
        assert_eq!(event.get("peer"), Some("[::1]:40112"));
        assert_eq!(event.get("fd"), Some("4"));
        assert_eq!(event.get("bytes"), None);
        assert_eq!(parse("listening").unwrap().fields, []);
    }

    #[test]
    fn quoted_values_read_back_as_they_were() {
        for value in ["", "x y", "\"\n\\", "a=b", "\u{1}\u{7f}\0\t\r'", "naïve ✓ \u{200b}"] {
            let event = parse(&format!("sent a={value:?} b=1")).unwrap();
            assert_eq!(event.get("a"), Some(value));
            assert_eq!(event.get("b"), Some("1"));
            assert_eq!(Event::parse(format!("{}", Line(&event)).as_bytes()), Some(event));
        }
    }

    /// An event with its time before it, as programs print it.
    struct Line<'a>(&'a Event);

    impl fmt::Display for Line<'_> {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "{}.{:09} {}", self.0.at / 1_000_000_000, self.0.at % 1_000_000_000, self.0)
        }
    }

    #[test]
    fn what_is_no_event_is_none() {
        for line in [
            "",
            "\n",
            "listening on port 2000",
            "1795361749.734234123",
            "1795361749.734234123 fork-server accepted",
            "1795361749.734234123 [12] accepted",
            "1795361749.734234123 fork-server[x] accepted",
            "1795361749.734234123 fork-server[+1] accepted",
            "1795361749.734234123 fork-server[99999999999] accepted",
            "1795361749.7342 fork-server[1] accepted",
            "-1.734234123 fork-server[1] accepted",
            "99999999999999.734234123 fork-server[1] accepted",
        ] {
            assert_eq!(Event::parse(line.as_bytes()), None, "{line}");
        }
        for rest in ["", " ", "accepted ", "sent fd", "sent =4", "sent a=\"x", "sent a=\"x\"y=1"] {
            assert_eq!(parse(rest), None, "{rest}");
        }
        assert_eq!(parse("sent a=\"\\q\""), None);
        assert_eq!(parse("sent a=\"\\u{110000}\""), None);
    }

    #[test]
    fn a_cut_line_keeps_what_is_left() {
        let whole = format!("{HEAD} sent a=1 bytes={:?} c=2", "x ".repeat(1000));
        for end in MAY_BE_CUT..1024 {
            let event = Event::parse(&whole.as_bytes()[..end]).unwrap();
            assert_eq!(event.get("a"), Some("1"));
            assert!(event.get("bytes").unwrap().starts_with("x x"));
        }
        let plain = format!("{HEAD} sent a={} key", "x".repeat(1000));
        assert_eq!(Event::parse(plain.as_bytes()).unwrap().fields.len(), 1);
        let escape = format!("{HEAD} sent a=\"{}\\u{{20", "x".repeat(1000));
        assert!(Event::parse(escape.as_bytes()).unwrap().get("a").unwrap().ends_with('x'));
    }
}
