//! The rules of the house, as tests that read the tree.
//!
//! They hold for whoever adds a program: what is missing is named, with the file and the reason.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Longest program, in lines, its header included.
const MAX_LINES: usize = 120;

/// The files that may use `unsafe`, because they are about what it is needed for.
const UNSAFE: &[&str] = &[
    "src/bin/client.rs",
    "src/bin/demos/accept_inherits.rs",
    "src/bin/demos/epoll_traps.rs",
    "src/bin/demos/inherit.rs",
    "src/bin/demos/sa_restart.rs",
    "src/bin/demos/self_pipe.rs",
    "src/bin/demos/sendfile.rs",
    "src/bin/demos/sigpipe.rs",
    "src/bin/demos/stdio.rs",
    "src/bin/demos/urgent.rs",
    "src/bin/demos/zombies.rs",
    "src/bin/peer.rs",
    "src/bin/servers/activated.rs",
    "src/bin/servers/fork.rs",
    "src/bin/servers/inetd.rs",
    "src/lab/agent.rs",
    "src/lab/doctor.rs",
    "src/lab/lease.rs",
    "src/lab/namespaces.rs",
    "src/lab/pin.rs",
    "src/lab/sniff.rs",
    "src/net/children.rs",
    "src/net/drain.rs",
    "src/net/listen.rs",
    "src/net/mutex.rs",
    "src/net/options.rs",
    "src/net/passing.rs",
    "src/net/pool.rs",
    "src/net/shared.rs",
    "src/net/threads.rs",
    "src/net/uring.rs",
];

/// What programs say they do, in the past tense: the verbs of their event lines.
const VERBS: &[&str] = &[
    // Servers.
    "listening",
    "accepted",
    "accept-failed",
    "forked",
    "fork-failed",
    "request",
    "sent",
    "closed",
    "reaped",
    "stopped",
    // Pools of workers.
    "started",
    "passed",
    "served",
    "recovered",
    "worker-failed",
    "thread-failed",
    "exec-failed",
    // Peers and demos.
    "connected",
    "received",
    "failed",
    "set",
    "shut-down",
    "polled",
    "so-error",
    "peer-name",
    "opened",
    "bound",
    "got",
    "filled",
    "signaled",
    "checked",
    "raised",
    "woken",
    "completed",
    "duplicated",
    "paused",
    "resumed",
];

#[test]
fn programs_use_net_and_never_lab() {
    for file in programs() {
        let lab = file.code().find("serverlab::lab");
        assert!(lab.is_none(), "{} uses serverlab::lab", file.name);
    }
}

#[test]
fn net_never_uses_lab() {
    for file in tree("src/net").into_iter().chain(tree("src/net.rs")) {
        for path in ["crate::lab", "serverlab::lab", "super::lab"] {
            assert!(!file.code().contains(path), "{} uses {path}", file.name);
        }
    }
}

#[test]
fn a_program_opens_with_its_lesson_and_names_the_texts() {
    for file in programs() {
        for line in ["What to notice: ", "Break it: ", "Compare: ", "Run: ", "See: "] {
            let there =
                file.header().lines().any(|header| header.starts_with(&format!("//! {line}")));
            assert!(there, "the header of {} has no line `//! {line}...`", file.name);
        }
    }
}

#[test]
fn a_program_is_read_in_one_sitting() {
    for file in programs() {
        let lines = file.text.lines().count();
        assert!(lines <= MAX_LINES, "{} has {lines} lines, over {MAX_LINES}", file.name);
    }
}

#[test]
fn every_file_opens_by_saying_what_it_is() {
    for file in tree("src").into_iter().chain(tree("tests")).chain(tree("benches")) {
        assert!(file.text.starts_with("//! "), "{} does not open with `//! `", file.name);
    }
}

#[test]
fn every_program_is_a_bin_named_after_its_file() {
    let manifest = read("Cargo.toml");
    for file in programs() {
        let executable = executable(&manifest, &file.name);
        let stem = file.stem().replace('_', "-");
        let kinds =
            if file.name.contains("/servers/") { vec!["server"] } else { vec!["demo", "server"] };
        let wanted: Vec<_> = kinds.iter().map(|kind| format!("{stem}-{kind}")).collect();
        assert!(wanted.contains(&executable), "{} is {executable}, not {wanted:?}", file.name);
    }
    for path in paths(&manifest) {
        assert!(Path::new(&path).exists(), "Cargo.toml names {path}, which does not exist");
    }
}

#[test]
fn every_program_has_its_row_in_the_readme() {
    let (manifest, readme) = (read("Cargo.toml"), read("README.md"));
    for file in programs() {
        let executable = executable(&manifest, &file.name);
        let row = readme
            .lines()
            .any(|line| line.starts_with('|') && line.contains(&format!("`{executable}`")));
        assert!(row, "README.md has no table row with `{executable}`");
    }
}

#[test]
fn every_program_has_its_experiment() {
    let manifest = read("Cargo.toml");
    // programs.rs runs them alone, without the laboratory; this file names none.
    let alone = ["tests/programs.rs", "tests/tidy.rs"];
    let suites: Vec<File> =
        tree("tests").into_iter().filter(|suite| !alone.contains(&&*suite.name)).collect();
    for file in programs() {
        let executable = format!("\"{}\"", executable(&manifest, &file.name));
        let tried = suites.iter().any(|suite| suite.text.contains(&executable));
        assert!(tried, "no suite under tests/ runs {executable}");
    }
}

#[test]
fn every_bug_that_a_program_offers_is_caught_by_a_suite() {
    let suites: Vec<File> = tree("tests");
    for file in programs() {
        let offered = file.header();
        let bugs = offered.split("`--bug ").skip(1).filter_map(|rest| rest.split('`').next());
        for bug in bugs {
            let caught = suites.iter().any(|suite| suite.text.contains(&format!("\"{bug}\"")));
            assert!(caught, "no suite tries `--bug {bug}` of {}", file.name);
        }
        let code = file.text[offered.len()..].matches("args.bug(\"").count();
        assert!(code == 0 || offered.contains("`--bug "), "{} hides its bugs", file.name);
    }
}

#[test]
fn every_line_about_kernels_is_about_a_suite() {
    let list = read("tests/kernels");
    for line in list.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
        let (subject, versions) = line.split_once(' ').unwrap_or((line, ""));
        let suite = format!("tests/{}.rs", subject.split('/').next().unwrap());
        assert!(Path::new(&suite).exists(), "tests/kernels names {suite}: there is no such file");
        assert!(!versions.trim().is_empty(), "tests/kernels: {subject} was seen nowhere");
    }
}

#[test]
fn unsafe_stays_in_the_files_that_are_about_it() {
    let mut allowed = BTreeSet::new();
    for file in tree("src") {
        if file.text.contains("allow(unsafe_code") {
            let reasoned = file.text.contains("#![allow(unsafe_code, reason = ");
            assert!(reasoned, "{} allows unsafe code without a reason for the file", file.name);
            allowed.insert(file.name);
        }
    }
    let listed: BTreeSet<_> = UNSAFE.iter().map(|name| (*name).to_owned()).collect();
    assert_eq!(allowed, listed, "left: files with unsafe code; right: those that tidy.rs lists");
}

#[test]
fn events_use_the_words_of_one_list() {
    for file in tree("src") {
        for (at, _) in file.text.match_indices("event!(") {
            let Some(rest) =
                file.text[at..].trim_start_matches("event!(").trim_start().strip_prefix('"')
            else {
                continue; // the macro itself, or a verb chosen from two of the list
            };
            let verb = rest.split('"').next().unwrap();
            assert!(
                VERBS.contains(&verb),
                "{} prints `{verb}`, which tidy.rs does not list",
                file.name
            );
        }
    }
}

#[test]
fn no_test_sleeps() {
    for file in tree("tests") {
        let sleeps = ["::", " "].map(|before| format!("{before}sleep("));
        for (number, line) in file.text.lines().enumerate() {
            assert!(
                !sleeps.iter().any(|sleep| line.contains(sleep)),
                "{}:{}: wait for a fact: {line}",
                file.name,
                number + 1
            );
        }
    }
}

#[test]
fn every_path_that_the_readme_names_exists() {
    let readme = read("README.md");
    let tops = ["src/", "tests/", "docker/", "benches/", "fuzz/", "captures/reference", ".ci/"];
    for word in readme.split('`').skip(1).step_by(2) {
        let path = word.trim_start_matches("./");
        let is_path =
            !path.contains(['*', ' ', '<', '…']) && tops.iter().any(|top| path.starts_with(top));
        assert!(
            !is_path || Path::new(path).exists(),
            "README.md names `{word}`: there is no such path"
        );
    }
}

/// A file of the tree.
struct File {
    name: String,
    text: String,
}

impl File {
    /// The lines that say what the file is, at its top.
    fn header(&self) -> String {
        self.text
            .lines()
            .take_while(|line| line.starts_with("//!"))
            .map(|l| format!("{l}\n"))
            .collect()
    }

    /// The text without comments that take a line.
    fn code(&self) -> String {
        self.text.lines().filter(|line| !line.trim_start().starts_with("//")).collect()
    }

    fn stem(&self) -> &str {
        Path::new(&self.name).file_stem().unwrap().to_str().unwrap()
    }
}

/// The programs to read: one file a design, one file a behaviour.
fn programs() -> Vec<File> {
    let programs = tree("src/bin/servers").into_iter().chain(tree("src/bin/demos"));
    let programs: Vec<_> = programs.collect();
    assert!(!programs.is_empty());
    programs
}

/// The Rust files under a folder, or one file. None where there is no such path.
fn tree(root: &str) -> Vec<File> {
    let (mut found, mut waiting) = (Vec::new(), vec![PathBuf::from(root)]);
    while let Some(path) = waiting.pop() {
        if path.is_dir() {
            waiting.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        } else if path.extension().is_some_and(|extension| extension == "rs") && path.exists() {
            let name = path.to_str().unwrap().to_owned();
            found.push(File { text: read(&name), name });
        }
    }
    found.sort_by(|a, b| a.name.cmp(&b.name));
    found
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// The name that Cargo.toml gives to the executable of this file.
fn executable(manifest: &str, path: &str) -> String {
    let mut name = "";
    for line in manifest.lines() {
        match line.split_once(" = ") {
            Some(("name", value)) => name = value.trim_matches('"'),
            Some(("path", value)) if value.trim_matches('"') == path => return name.to_owned(),
            _ => {}
        }
    }
    panic!("Cargo.toml has no [[bin]] with path = \"{path}\"")
}

fn paths(manifest: &str) -> Vec<String> {
    let values = manifest.lines().filter_map(|line| line.strip_prefix("path = "));
    values.map(|value| value.trim_matches('"').to_owned()).collect()
}
