//! What a program's `main` returns: an error is one line on standard error, and status 1.

use std::fmt;

/// Ends a program: `Error: cannot listen on 0.0.0.0:2000: EADDRINUSE ...`.
///
/// The chain of causes stands on one line, and no backtrace follows even where RUST_BACKTRACE asks
/// for one: it is a message to the person at the command line, not a fault of the program.
pub struct Fatal(anyhow::Error);

/// What a program's `main` returns.
pub type Result<T = ()> = std::result::Result<T, Fatal>;

impl fmt::Debug for Fatal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#}", self.0)
    }
}

impl From<anyhow::Error> for Fatal {
    fn from(error: anyhow::Error) -> Fatal {
        Fatal(error)
    }
}

impl From<nix::errno::Errno> for Fatal {
    fn from(errno: nix::errno::Errno) -> Fatal {
        Fatal(errno.into())
    }
}

impl From<std::io::Error> for Fatal {
    fn from(error: std::io::Error) -> Fatal {
        Fatal(error.into())
    }
}
