//! Any bytes as a capture: `lab show` shows or refuses them, in every form of its output.
#![no_main]

use libfuzzer_sys::fuzz_target;
use serverlab::lab::show::{Options, show};

fuzz_target!(|bytes: &[u8]| {
    for options in [
        Options::default(),
        Options { json: true, ..Options::default() },
        Options { flow: Some(0), ..Options::default() },
    ] {
        let _ = show(bytes, std::io::sink(), options);
    }
});
