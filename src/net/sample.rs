//! A file to send: in memory, with bytes that anybody can make again, and a checksum of them.

use std::fs::File;
use std::io::Write as _;

use nix::sys::memfd::{MFdFlags, memfd_create};

/// So many bytes of a pattern in which no two pages are alike.
pub fn bytes(count: usize) -> Vec<u8> {
    (0..count).map(|at| (at ^ (at >> 8) ^ (at >> 16)) as u8).collect()
}

/// FNV-1a, 64 bits: short, and no cryptography is needed to see a byte out of its place.
pub fn checksum(bytes: &[u8]) -> u64 {
    let step = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3);
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, step)
}

/// A file of memory (memfd_create(2)) that holds the pattern, read from its beginning.
///
/// # Errors
/// memfd_create(2)'s, write(2)'s.
pub fn file(count: usize) -> std::io::Result<File> {
    use std::io::Seek as _;
    let mut file = File::from(memfd_create(c"sample", MFdFlags::MFD_CLOEXEC)?);
    file.write_all(&bytes(count))?;
    file.rewind()?;
    Ok(file)
}
