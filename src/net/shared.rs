//! Memory that a process shares with the children it forks.
//!
//! An anonymous mapping with MAP_SHARED is the same memory before and after fork(2) (mmap(2);
//! TLPI 49.7). Counters in it are atomics: an addition by one process is never lost to that of
//! another, as happens to those who read, add and write (the Python original's counters lose some
//! that way).
#![allow(unsafe_code, reason = "maps memory and makes a slice of it")]

use std::num::NonZeroUsize;
use std::ops::Deref;
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};

/// Values, all zero bytes at first, shared with every process forked after they were mapped.
#[derive(Debug)]
pub struct Shared<T> {
    memory: NonNull<T>,
    count: usize,
}

/// Counters that every process may add to.
pub type Counters = Shared<AtomicU64>;

impl Counters {
    /// Maps so many counters. Pages that nobody writes to cost nothing.
    ///
    /// # Errors
    /// mmap(2)'s.
    pub fn new(count: usize) -> nix::Result<Counters> {
        // SAFETY: an atomic of zero bytes is zero.
        unsafe { Shared::zeroed(count) }
    }
}

impl<T> Shared<T> {
    /// Maps so many values of zero bytes.
    ///
    /// # Safety
    /// Zero bytes must make a valid `T`, and every process that has the memory must be allowed to
    /// use it through a shared reference: atomics, or what a lock guards.
    ///
    /// # Errors
    /// mmap(2)'s.
    pub unsafe fn zeroed(count: usize) -> nix::Result<Shared<T>> {
        let bytes = count.checked_mul(size_of::<T>()).ok_or(nix::errno::Errno::ENOMEM)?;
        let length = NonZeroUsize::new(bytes).unwrap_or(NonZeroUsize::MIN);
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let flags = MapFlags::MAP_SHARED | MapFlags::MAP_NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no other memory.
        let memory = unsafe { mmap_anonymous(None, length, protection, flags) }?.cast();
        Ok(Shared { memory, count })
    }
}

impl<T> Deref for Shared<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: the mapping holds `count` values for as long as `self` lives, aligned to a page;
        // whoever made it has promised that they may be shared.
        unsafe { std::slice::from_raw_parts(self.memory.as_ptr(), self.count) }
    }
}

impl<T> Drop for Shared<T> {
    fn drop(&mut self) {
        let bytes = (self.count * size_of::<T>()).max(1);
        // SAFETY: the mapping is ours, and no slice of it outlives `self`.
        let _ = unsafe { munmap(self.memory.cast(), bytes) };
    }
}

// SAFETY: a mapping belongs to the process, not to a thread.
unsafe impl<T: Send> Send for Shared<T> {}
// SAFETY: it gives out nothing but shared references.
unsafe impl<T: Sync> Sync for Shared<T> {}
