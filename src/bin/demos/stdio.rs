//! Text in a buffer when a process forks is printed twice, or, after _exit, never.
//!
//! A library's buffer is memory: fork(2) copies it with what is in it, exit(3) writes it out in each
//! process, _exit(2) in none. Rust keeps standard output's text until a newline comes.
//!
//! ```text
//!   print!("hello ")        in the buffer, not yet written
//!   --end exit              fork --> child: exit   writes "hello "    parent: exit   writes "hello "
//!   --end underscore-exit   fork --> child: _exit  writes nothing     parent: _exit  writes nothing
//!   --end flush             flush writes "hello ", then as underscore-exit
//! ```
//!
//! What to notice: the Python original's server01 forks and ends its children by _exit: with its
//! output in a file or a pipe, nothing is ever printed (descriptors.rs in tests).
//! Break it: `println!` in place of `print!`: Rust writes whole lines at once, C does so only to a
//! terminal.
//! Compare: net/event.rs: one write(2) a line, no buffer to copy or to lose.
//! Run: cargo run --bin stdio-demo -- --end exit | cat
//! See: fork(2), exit(3), _exit(2), setbuf(3); TLPI 25.4; fork_stdio_buf.c in TLPI's programs.
#![allow(unsafe_code, reason = "forks, and ends by _exit")]

use std::io::Write as _;

use clap::{Parser, ValueEnum};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, fork};
use serverlab::net;

/// Prints a word before it forks, and ends both processes in a way
#[derive(Parser)]
#[command(version)]
struct Args {
    /// How both end
    #[arg(long, value_enum, default_value = "exit")]
    end: End,
}

#[derive(ValueEnum, Clone, Copy)]
enum End {
    Exit,
    UnderscoreExit,
    Flush,
}

fn main() -> net::Result {
    let args = Args::parse();
    print!("hello ");
    if let End::Flush = args.end {
        std::io::stdout().flush()?;
    }
    // SAFETY: this process has one thread.
    if let ForkResult::Parent { child } = unsafe { fork() }? {
        waitpid(child, None)?;
    }
    match args.end {
        End::Exit => std::process::exit(0),
        // SAFETY: _exit takes a number and does not return.
        End::UnderscoreExit | End::Flush => unsafe { libc::_exit(0) },
    }
}
