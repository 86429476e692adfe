//! Any text as an expectation, compared with any capture: flows, ladders and their differences.
//!
//! The capture is what follows the first NUL.
#![no_main]

use libfuzzer_sys::fuzz_target;
use serverlab::lab::flow::{Flows, Side};
use serverlab::lab::ladder::{Ladder, Names};
use serverlab::lab::pcap::Reader;

fuzz_target!(|bytes: &[u8]| {
    let Some(nul) = bytes.iter().position(|byte| *byte == 0) else { return };
    let (text, capture) = bytes.split_at(nul);
    let Ok(mut reader) = Reader::new(&capture[1..]) else { return };
    let mut packets = Vec::new();
    while let Ok(Some(packet)) = reader.next_packet() {
        packets.push(packet.into_owned());
    }
    let ladder = std::str::from_utf8(text).ok().and_then(|text| Ladder::parse(text).ok());
    let names = Names::default();
    for flow in &Flows::from_packets(&packets) {
        assert!(flow.payload(Side::Client).len() <= capture.len());
        let _ = flow.ladder(&names).to_string();
        if let Some(Err(difference)) = ladder.as_ref().map(|l| l.compare(flow, &names)) {
            let _ = difference.to_string();
        }
    }
});
