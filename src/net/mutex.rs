//! A mutex in memory that processes share: pthread_mutex_lock(3) with a mutex that is
//! PTHREAD_PROCESS_SHARED and, if asked for, PTHREAD_MUTEX_ROBUST.
#![allow(unsafe_code, reason = "calls the pthread_mutex functions")]

use std::cell::UnsafeCell;
use std::mem::MaybeUninit;

use nix::errno::Errno;

use crate::net::shared::Shared;

/// A mutex for the processes forked after it was made. It guards nothing but the code between
/// [`lock`](Self::lock) and [`unlock`](Self::unlock).
#[derive(Debug)]
pub struct SharedMutex {
    memory: Shared<UnsafeCell<libc::pthread_mutex_t>>,
}

/// What it took to get the lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Locked {
    /// It was free, or became free.
    Freed,
    /// Its owner died with it: EOWNERDEAD. What it guarded may be half done, and the new owner says
    /// that it is sound again with [`SharedMutex::make_consistent`].
    OwnerDied,
}

impl SharedMutex {
    /// An unlocked mutex. Unless it is robust, an owner that dies locks it for ever.
    ///
    /// # Errors
    /// mmap(2)'s.
    pub fn new(robust: bool) -> nix::Result<SharedMutex> {
        // SAFETY: any bytes are a pthread_mutex_t; it is initialised below, and only then shared.
        let mutex = SharedMutex { memory: unsafe { Shared::zeroed(1) }? };
        let mut attributes = MaybeUninit::<libc::pthread_mutexattr_t>::uninit();
        let attributes = attributes.as_mut_ptr();
        // SAFETY: it initialises what it is given.
        unsafe { libc::pthread_mutexattr_init(attributes) };
        // SAFETY: initialised above.
        unsafe { libc::pthread_mutexattr_setpshared(attributes, libc::PTHREAD_PROCESS_SHARED) };
        if robust {
            // SAFETY: initialised above.
            unsafe { libc::pthread_mutexattr_setrobust(attributes, libc::PTHREAD_MUTEX_ROBUST) };
        }
        // SAFETY: nobody else knows the mutex yet, and the attributes are initialised.
        let error = unsafe { libc::pthread_mutex_init(mutex.get(), attributes) };
        if error == 0 { Ok(mutex) } else { Err(Errno::from_raw(error)) }
    }

    fn get(&self) -> *mut libc::pthread_mutex_t {
        self.memory[0].get()
    }

    /// pthread_mutex_lock(3). It is not interrupted by signals.
    ///
    /// # Errors
    /// ENOTRECOVERABLE, when an owner died and the next one unlocked it without
    /// [`make_consistent`](Self::make_consistent).
    pub fn lock(&self) -> nix::Result<Locked> {
        // SAFETY: the mutex was initialised and stays where it is.
        match unsafe { libc::pthread_mutex_lock(self.get()) } {
            0 => Ok(Locked::Freed),
            libc::EOWNERDEAD => Ok(Locked::OwnerDied),
            error => Err(Errno::from_raw(error)),
        }
    }

    /// pthread_mutex_consistent(3), for the owner after [`Locked::OwnerDied`].
    pub fn make_consistent(&self) {
        // SAFETY: as above; a mutex that is not inconsistent gives EINVAL.
        unsafe { libc::pthread_mutex_consistent(self.get()) };
    }

    /// pthread_mutex_unlock(3), for the owner. A robust mutex refuses anybody else.
    pub fn unlock(&self) {
        // SAFETY: as above.
        unsafe { libc::pthread_mutex_unlock(self.get()) };
    }
}
