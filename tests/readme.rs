//! The README's tables are what the programs' headers say. `UPDATE=1 cargo test --test readme`
//! writes them again.

use std::fs;
use std::path::Path;

/// The paragraphs of a program's `//!` header.
struct Header {
    /// The part of Cargo.toml in which the program stands: `# Behaviours: to end one.`
    part: String,
    program: String,
    text: String,
}

impl Header {
    fn technique(&self) -> String {
        let first = self.text.lines().take_while(|line| !line.is_empty()).collect::<Vec<_>>();
        first.join(" ").trim_end_matches('.').to_owned()
    }

    /// The text behind `What to notice:`, up to its first full stop or the end.
    fn notice(&self) -> String {
        let text = self.after("What to notice:");
        let end = text.find(". ").map_or(text.len(), |at| at + 1);
        without_suites(text[..end].trim().trim_end_matches('.'))
    }

    /// The suites that run the program.
    fn suites(&self, suites: &[(String, String)]) -> String {
        let executable = format!("\"{}\"", self.program);
        let runs = suites.iter().filter(|(_, text)| text.contains(&executable));
        runs.map(|(name, _)| format!("`{name}`")).collect::<Vec<_>>().join(", ")
    }

    /// What the line `See:` has of UNP and TLPI.
    fn pages(&self) -> String {
        let see = self.after("See:");
        let books = see.trim_end_matches('.').split(';').map(str::trim);
        books
            .filter(|part| part.starts_with("UNP") || part.starts_with("TLPI"))
            .collect::<Vec<_>>()
            .join("; ")
    }

    fn after(&self, heading: &str) -> String {
        let mut lines = self.text.lines().skip_while(|line| !line.starts_with(heading));
        let mut paragraph = vec![lines.next().unwrap_or_default()[heading.len()..].trim()];
        let is_heading =
            |line: &&str| line.split(' ').next().is_some_and(|word| word.ends_with(':'));
        paragraph.extend(lines.take_while(|line| {
            !line.is_empty() && !is_heading(line) && !line.starts_with("Break it:")
        }));
        paragraph.join(" ")
    }
}

/// A text without its parentheses that only name a suite: ` (every_server.rs)`.
fn without_suites(text: &str) -> String {
    let mut rest = text;
    let mut plain = String::new();
    while let Some(open) = rest.find(" (") {
        let Some(close) = rest[open..].find(')').map(|at| open + at) else { break };
        let inner = &rest[open + 2..close];
        let end = if inner.contains(".rs") { open } else { close + 1 };
        plain += &rest[..end];
        rest = &rest[close + 1..];
    }
    plain + rest
}

/// The suites of experiments: each file under tests/ that has one, with its folder of the same name.
fn suites() -> Vec<(String, String)> {
    let mut suites = Vec::new();
    for entry in fs::read_dir(root().join("tests")).expect("tests/") {
        let path = entry.expect("tests/").path();
        let Some(name) = path.file_name().and_then(|name| name.to_str()?.strip_suffix(".rs"))
        else {
            continue;
        };
        let mut text = fs::read_to_string(&path).expect(name);
        for entry in fs::read_dir(path.with_extension("")).into_iter().flatten().flatten() {
            text += &fs::read_to_string(entry.path()).expect(name);
        }
        if text.contains(concat!("experiment", "!(")) {
            suites.push((name.to_owned(), text));
        }
    }
    suites.sort();
    suites
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The headers of the programs in a folder, in the order of Cargo.toml.
fn headers(folder: &str) -> Vec<Header> {
    let manifest = fs::read_to_string(root().join("Cargo.toml")).expect("Cargo.toml");
    let mut headers = Vec::new();
    let (mut part, mut name) = ("", "");
    for line in manifest.lines() {
        if let Some(value) = line.strip_prefix("name = ") {
            name = value.trim_matches('"');
        }
        part = line.strip_prefix("# Behaviours: ").unwrap_or(part);
        let Some(path) = line.strip_prefix("path = ").map(|path| path.trim_matches('"')) else {
            continue;
        };
        if path.starts_with(folder) {
            let source = fs::read_to_string(root().join(path)).expect(path);
            let lines = source.lines().map_while(|line| line.strip_prefix("//!"));
            let text: Vec<&str> =
                lines.map(|line| line.strip_prefix(' ').unwrap_or(line)).collect();
            let (part, program) = (part.trim_end_matches('.').to_owned(), name.to_owned());
            headers.push(Header { part, program, text: text.join("\n") });
        }
    }
    headers
}

fn table(headers: &[Header]) -> String {
    let suites = suites();
    let head = "| program | technique | what to notice | suites (captures in `captures/SUITE/`) | UNP, TLPI |\n\
                |---|---|---|---|---|\n";
    let mut table = String::new();
    let mut part = None;
    for header in headers {
        if part != Some(&header.part) {
            let first = if table.is_empty() { "" } else { "\n" };
            if !header.part.is_empty() {
                let (initial, rest) = header.part.split_at(1);
                table += &format!("{first}### {}{rest}\n\n", initial.to_uppercase());
            }
            table += head;
            part = Some(&header.part);
        }
        let cells = [
            format!("`{}`", header.program),
            header.technique(),
            header.notice(),
            header.suites(&suites),
            header.pages(),
        ];
        table += &format!("| {} |\n", cells.map(|cell| cell.replace('|', "\\|")).join(" | "));
    }
    table
}

#[test]
fn the_tables_are_what_the_programs_say() {
    let file = root().join("README.md");
    let mut readme = fs::read_to_string(&file).expect("README.md");
    let written = readme.clone();
    for (mark, folder) in [("servers", "src/bin/servers/"), ("demos", "src/bin/demos/")] {
        let (open, close) = (format!("<!-- {mark} -->\n"), format!("<!-- /{mark} -->"));
        let start = readme.find(&open).expect("the table's beginning") + open.len();
        let end = readme.find(&close).expect("the table's end");
        readme.replace_range(start..end, &table(&headers(folder)));
    }
    if std::env::var_os("UPDATE").is_some() {
        fs::write(&file, readme).expect("README.md can be written");
        return;
    }
    assert!(readme == written, "the README's tables are old: UPDATE=1 cargo test --test readme");
}
