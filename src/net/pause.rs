//! A step that a person takes, or a test: whoever runs a demo looks at its sockets before it goes on.

use std::io::stdin;

use crate::event;

/// Prints `paused` and waits for a line on standard input, or its end; then prints `resumed`.
pub fn pause() {
    event!("paused");
    let _ = stdin().read_line(&mut String::new());
    event!("resumed");
}
