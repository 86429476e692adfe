//! A laboratory of concurrent TCP servers.
//!
//! The package has two halves, and a rule between them:
//!
//! - [`net`] is what the programs under `src/bin/servers` and `src/bin/demos` share and no program
//!   is about: arguments, listening, the request, event lines, descriptor passing, signals.
//! - [`lab`] is the laboratory that runs those programs on a network of hosts, captures their
//!   packets and checks claims about them.
//!
//! Programs use `net`, never `lab`; `net` never uses `lab`; `lab` knows the programs only by their
//! command lines, their event lines and their packets. `tests/tidy.rs` holds all three.

pub mod lab;
pub mod net;
