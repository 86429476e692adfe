//! Any bytes as an event line; what is read, displayed and read again is the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use serverlab::lab::event::Event;

fuzz_target!(|line: &[u8]| {
    let Some(event) = Event::parse(line) else { return };
    let stamp = format!("{}.{:09}", event.at / 1_000_000_000, event.at % 1_000_000_000);
    let again = format!("{stamp} {event}");
    // A line that escaping made longer may count as cut: only shorter ones must survive.
    if again.len() < 1000 && line.len() < 1000 {
        assert_eq!(Event::parse(again.as_bytes()), Some(event), "{again}");
    }
});
