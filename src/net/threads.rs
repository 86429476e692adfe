//! Threads: started by pthread_create(3), counted, and waited for when a server drains.
//!
//! Not `std::thread`: it gives each thread an alternate signal stack and asks for the bounds of its
//! stack, which is half a dozen system calls that a thread for one client need not pay.
#![allow(unsafe_code, reason = "calls pthread_create(3)")]

use std::ffi::c_void;
use std::mem::MaybeUninit;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering, fence};
use std::thread::Thread;

use nix::errno::Errno;

/// A thread's stack. What serves a client needs a page or two; only pages that are touched cost
/// memory, yet the default of 8 MiB each (ulimit -s) soon fills what a process may map.
const STACK: usize = 128 * 1024;

static RUNNING: AtomicUsize = AtomicUsize::new(0);
static WAITING: OnceLock<Thread> = OnceLock::new();

type Work = Box<dyn FnOnce() + Send>;

/// Starts a detached thread.
///
/// # Errors
/// pthread_create(3)'s: EAGAIN when there are too many.
pub fn start(work: impl FnOnce() + Send + 'static) -> nix::Result<()> {
    let work: Box<Work> = Box::new(Box::new(work));
    let mut attributes = MaybeUninit::<libc::pthread_attr_t>::uninit();
    // SAFETY: it initialises what it is given.
    unsafe { libc::pthread_attr_init(attributes.as_mut_ptr()) };
    // SAFETY: initialised above.
    unsafe { libc::pthread_attr_setstacksize(attributes.as_mut_ptr(), STACK) };
    let detached = libc::PTHREAD_CREATE_DETACHED;
    // SAFETY: initialised above.
    unsafe { libc::pthread_attr_setdetachstate(attributes.as_mut_ptr(), detached) };
    RUNNING.fetch_add(1, Ordering::SeqCst);
    let mut id = MaybeUninit::uninit();
    let argument = Box::into_raw(work);
    // SAFETY: `run` takes over the box it is given, and what is in it may go to another thread.
    let error =
        unsafe { libc::pthread_create(id.as_mut_ptr(), attributes.as_ptr(), run, argument.cast()) };
    if error != 0 {
        RUNNING.fetch_sub(1, Ordering::SeqCst);
        // SAFETY: no thread was made, so the box is still ours.
        drop(unsafe { Box::from_raw(argument) });
        return Err(Errno::from_raw(error));
    }
    Ok(())
}

extern "C" fn run(work: *mut c_void) -> *mut c_void {
    // SAFETY: `start` made this pointer from a box and gave it to this thread alone.
    let work = unsafe { Box::from_raw(work.cast::<Work>()) };
    work();
    let last = RUNNING.fetch_sub(1, Ordering::SeqCst) == 1;
    // Whoever waits leaves word before it looks at the count, we look for the word after we have
    // counted: one of us sees the other.
    fence(Ordering::SeqCst);
    if last && let Some(waiting) = WAITING.get() {
        waiting.unpark();
    }
    std::ptr::null_mut()
}

/// Waits until every thread that [`start`] started has ended. Called once, by the main thread.
pub fn wait_for_all() {
    let _ = WAITING.set(std::thread::current());
    fence(Ordering::SeqCst);
    while RUNNING.load(Ordering::SeqCst) > 0 {
        std::thread::park();
    }
}
