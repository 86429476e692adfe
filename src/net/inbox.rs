//! What a thread puts in for an event loop of another thread, and the bell that wakes the loop.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::{Mutex, PoisonError};

use nix::sys::eventfd::{EfdFlags, EventFd};

/// A list under a lock, and an eventfd(2), which is readable from each ring until it is emptied.
#[derive(Debug)]
pub struct Inbox<T> {
    list: Mutex<Vec<T>>,
    bell: EventFd,
}

impl<T> Inbox<T> {
    /// An empty inbox.
    ///
    /// # Errors
    /// eventfd(2)'s.
    pub fn new() -> nix::Result<Inbox<T>> {
        let bell = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        Ok(Inbox { list: Mutex::default(), bell })
    }

    /// Puts something in and rings: write(2).
    ///
    /// # Errors
    /// write(2)'s.
    pub fn put(&self, item: T) -> nix::Result<()> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner).push(item);
        self.ring()
    }

    /// Rings with nothing new.
    ///
    /// # Errors
    /// write(2)'s.
    pub fn ring(&self) -> nix::Result<()> {
        self.bell.write(1).map(drop)
    }

    /// Takes everything out, into an empty list, which goes in for it: the two are only exchanged.
    /// read(2) resets the bell first, so what is put in later rings again.
    pub fn empty(&self, into: &mut Vec<T>) {
        let _ = self.bell.read(); // EAGAIN: it did not ring
        std::mem::swap(&mut *self.list.lock().unwrap_or_else(PoisonError::into_inner), into);
    }
}

impl<T> AsFd for Inbox<T> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }
}

impl<T> AsRawFd for Inbox<T> {
    fn as_raw_fd(&self) -> RawFd {
        self.bell.as_raw_fd()
    }
}
