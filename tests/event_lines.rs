//! The event lines that programs print are the ones that the laboratory reads.
//!
//! The two sides share no code, so this is the one place where they meet.

use std::process::Command;

use serverlab::lab::event::Event;

#[test]
fn what_a_program_prints_reads_back() {
    let output = Command::new(std::env::current_exe().expect("this test's own executable"))
        .args(["--exact", "print", "--ignored", "--nocapture"])
        .output()
        .expect("the executable runs again");
    let mut lines = output.stdout.split(|byte| *byte == b'\n');
    let event = lines.find_map(Event::parse).expect("one line is an event");
    assert_eq!((event.program.as_str(), event.verb.as_str()), ("event-test", "sent"));
    assert_eq!(event.get("text"), Some("two words\n\"quoted\" \u{7f} é"));
    assert_eq!(event.get("peer"), Some("[::1]:40112"));
    assert_eq!(event.get("empty"), Some(""));
}

#[test]
#[ignore = "what_a_program_prints_reads_back runs it, in a process of its own"]
fn print() {
    println!(); // ends the line that the test harness has begun
    serverlab::net::event::start("event-test", false);
    let text = "two words\n\"quoted\" \u{7f} é";
    serverlab::event!("sent", text = text, peer = "[::1]:40112", empty = "");
}
