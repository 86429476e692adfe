//! `lab` on bad input: one line that says what to do, a status that is not zero, nothing left.

use assert_cmd::Command;
use predicates::prelude::*;
use predicates::str::contains;
use rstest::rstest;

fn lab() -> Command {
    let mut lab = Command::cargo_bin("lab").expect("it is built");
    lab.env_remove("LAB_AGENTS").env_remove("LAB_SUITES").env_remove("LAB_NETWORK");
    lab.timeout(std::time::Duration::from_secs(60));
    lab
}

/// One line, which begins with who says it.
fn one_line() -> impl Predicate<str> {
    predicate::function(|text: &str| text.lines().count() == 1 && text.starts_with("lab: "))
}

#[test]
fn help_names_every_command() {
    let help = lab().arg("--help").assert().success();
    for command in ["run", "doctor", "show", "host", "sniff", "completions"] {
        help.get_output();
        lab().args(["help", command]).assert().success();
        lab().arg("--help").assert().stdout(contains(command));
    }
}

#[test]
fn an_unknown_suite_is_told_from_those_there_are() {
    lab()
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .args(["run", "no-such-suite"])
        .assert()
        .code(2)
        .stderr(one_line().and(contains("no suite no-such-suite")));
}

#[test]
fn outside_a_checkout_there_are_no_suites() {
    let elsewhere = tempfile::tempdir().expect("a folder");
    lab()
        .current_dir(elsewhere.path())
        .arg("run")
        .assert()
        .code(2)
        .stderr(one_line().and(contains("run it in the folder of a serverlab checkout")));
}

#[test]
fn captures_that_cannot_be_written_stop_the_run_before_it_begins() {
    let suites = tempfile::tempdir().expect("a folder");
    lab()
        .env("LAB_SUITES", suites.path())
        .args(["run", "--captures", "/proc/nowhere"])
        .assert()
        .code(2)
        .stderr(
            one_line().and(contains("cannot write to /proc/nowhere")).and(contains("--captures")),
        );
}

#[test]
fn a_suite_that_dies_fails_the_run_and_is_told_again_at_its_end() {
    let suites = tempfile::tempdir().expect("a folder");
    let captures = tempfile::tempdir().expect("a folder");
    let suite = suites.path().join("broken");
    // Its last words are said by a child, after its end.
    let script = "#!/bin/sh\n\
        { while kill -0 $$ 2>/dev/null; do :; done; echo its last words >&2; } &\n\
        kill -9 $$\n";
    // Written by another process: a file that we had open, a child of another test's would hold
    // open for a moment too, and it could not be executed (ETXTBSY).
    let mut install = Command::new("install");
    install.args(["-m755", "/dev/stdin"]).arg(&suite).write_stdin(script).assert().success();
    let run = lab()
        .env("LAB_SUITES", suites.path())
        .args(["run", "--captures"])
        .arg(captures.path())
        .assert()
        .code(1);
    let told = "suite broken failed outside its experiments: signal: 9 (SIGKILL)";
    run.stdout(contains(told).count(2).and(contains("its last words").count(2)));
}

#[test]
fn a_network_that_there_is_not_is_refused() {
    lab().args(["run", "--network", "token-ring"]).assert().code(2).stderr(contains("token-ring"));
}

#[rstest]
#[case::missing("/no/such/file", "No such file")]
#[case::a_folder("/", "Is a directory")]
#[case::no_capture("/etc/passwd", "not a capture")]
fn what_is_no_capture_is_not_shown(#[case] file: &str, #[case] why: &str) {
    let shown = lab().args(["show", file]).assert().failure();
    shown.stderr(one_line().and(contains(file)).and(contains(why)));
}

#[test]
fn a_truncated_capture_is_shown_as_far_as_it_goes() {
    let whole = concat!(env!("CARGO_MANIFEST_DIR"), "/captures/reference/handshake-fin.pcap");
    let mut bytes = std::fs::read(whole).expect("the reference");
    bytes.truncate(bytes.len() - 7);
    let shown = lab().args(["show", "-"]).write_stdin(bytes).assert().failure();
    shown.stdout(contains("S.")).stderr(one_line().and(contains("in the middle of packet")));
}

#[test]
fn a_host_cannot_listen_where_there_is_no_folder() {
    let listens = lab().args(["host", "/no/such/folder/agent.sock"]).assert().code(2);
    listens.stderr(one_line().and(contains("cannot listen at /no/such/folder/agent.sock")));
}

#[rstest]
#[case("bash")]
#[case("zsh")]
#[case("fish")]
fn shells_get_completions(#[case] shell: &str) {
    lab().args(["completions", shell]).assert().success().stdout(contains("doctor"));
}

#[test]
fn the_doctor_tells_what_there_is_as_text_and_as_json() {
    lab().arg("doctor").assert().stdout(contains("namespaces").and(contains("tcpdump")));
    let json = lab().args(["doctor", "--json"]).assert().get_output().stdout.clone();
    let findings: Vec<serde_json::Value> = serde_json::from_slice(&json).expect("JSON");
    assert!(findings.iter().any(|finding| finding["what"] == "kernel" && finding["there"] == true));
}
