//! Programs that hosts run: ours, passed to the host as an open file, or the host's own.

use std::fmt;
use std::path::{Path, PathBuf};

/// A program to run on a host.
#[derive(Clone, Debug)]
pub struct Program {
    name: String,
    file: Option<PathBuf>,
}

impl Program {
    /// One of this package: [`program!`](crate::program!) is the way to name it. `built` is where
    /// Cargo put it; in an image, where it was put is told by the environment variable
    /// `LAB_PROGRAMS`, a folder.
    pub fn built(name: &str, built: &str) -> Program {
        let elsewhere =
            std::env::var_os("LAB_PROGRAMS").map(|folder| Path::new(&folder).join(name));
        Program { name: name.to_owned(), file: Some(elsewhere.unwrap_or_else(|| built.into())) }
    }

    /// An executable file of the runner's, which the host need not have. It must be linked
    /// statically, unless the host has the libraries that it wants.
    pub fn file(path: impl Into<PathBuf>) -> Program {
        let path = path.into();
        let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
        Program { name, file: Some(path) }
    }

    /// A program that the host has itself, as `tcpdump` or `nft`.
    pub fn of_host(name: &str) -> Program {
        Program { name: name.to_owned(), file: None }
    }

    /// What it is called, and its `argv[0]`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The runner's file, if it is one.
    pub fn path(&self) -> Option<&Path> {
        self.file.as_deref()
    }
}

impl fmt::Display for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

/// A program of this package, by the name of its executable: `program!("fork-server")`.
///
/// For tests of the package: Cargo builds the program first and tells where it is. A name that is
/// none does not compile.
#[macro_export]
macro_rules! program {
    ($name:literal) => {
        $crate::lab::program::Program::built($name, env!(concat!("CARGO_BIN_EXE_", $name)))
    };
}

/// Arguments of a program, anything with `Display`: `args!["-p", port, "-n", 10]`.
#[macro_export]
macro_rules! args {
    ($($value:expr),* $(,)?) => {
        Vec::<String>::from([$($value.to_string()),*])
    };
}
