//! What the programs share and no program is about.
//!
//! | module | holds |
//! |---|---|
//! | [`args`] | the flags of every server |
//! | [`fatal`] | what `main` returns: an error is one line |
//! | [`mod@event`] | event lines: what a program did, one line and one `write(2)` each |
//! | [`listen`](mod@listen) | the listening socket, and what to do when `accept(2)` fails |
//! | [`request`] | the request: a decimal count, answered by so many bytes |
//! | [`connection`] | a connection that never blocks, and all of an event loop's |
//! | [`drain`] | SIGTERM: finish what is being served, accept nothing new |
//! | [`children`] | SIGCHLD: reap every child |
//! | [`pool`] | workers made in advance: processes or threads |
//! | [`uring`] | io_uring's rings, and its side of a client |
//! | [`channels`] | between a parent that passes connections and its children |
//! | [`inbox`] | from one thread to another's event loop |
//! | [`threads`] | threads by pthread_create(3) |
//! | [`passing`] | descriptors by `SCM_RIGHTS` |
//! | [`shared`] | counters shared with forked children |
//! | [`mutex`] | a mutex shared with forked children |
//! | [`load`] | the client's flags, records and summary |
//! | [`options`] | socket options by name, and TCP_INFO |
//! | [`mod@pause`] | a step that waits for a line on standard input |
//! | [`sample`] | a file to send, and its checksum |
//! | [`script`] | the steps of `peer`, the scripted socket |
//! | [`zerocopy`] | completions of MSG_ZEROCOPY |

pub mod args;
pub mod channels;
pub mod children;
pub mod connection;
pub mod drain;
pub mod event;
pub mod fatal;
pub mod inbox;
pub mod listen;
pub mod load;
pub mod mutex;
pub mod options;
pub mod passing;
pub mod pause;
pub mod pool;
pub mod request;
pub mod sample;
pub mod script;
pub mod shared;
pub mod threads;
pub mod uring;
pub mod zerocopy;

pub use fatal::{Fatal, Result};
pub use listen::listen;
pub use pause::pause;
