//! What /proc tells of the processes of a host (proc(5)): what they wait in, how often they slept,
//! what they have open.
//!
//! The agent reads it, and hands the whole over at once: it may look at processes of its host that
//! the runner may not, and one look at ten processes costs one conversation, not forty.

use std::fs;
use std::io::{self, Seek as _, Write as _};
use std::os::fd::OwnedFd;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// A process, at one moment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
    /// Its pid, as its host numbers it.
    pub pid: i32,
    /// Its parent's.
    pub parent: i32,
    /// Its state: `R`unning, `S`leeping, `D` (waiting for a disk, or in vfork), s`T`opped,
    /// `Z`ombie.
    pub state: char,
    /// Its threads. A zombie has one, which is dead.
    pub tasks: Vec<Task>,
    /// What it has open, by number. A zombie has nothing.
    pub descriptors: Vec<Descriptor>,
}

/// A thread, at one moment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Task {
    /// Its tid.
    pub tid: i32,
    /// What it is called: 15 bytes of the program's name, unless it chose another.
    pub name: String,
    /// Its state, as that of a process.
    pub state: char,
    /// How often it has slept: `voluntary_ctxt_switches`.
    pub sleeps: u64,
    /// The number of the system call that it sleeps in; `None` if it runs, sleeps in none, or may
    /// not be asked.
    pub call: Option<i64>,
    /// How long it has run: /proc/PID/schedstat. Zero where the kernel does not count it.
    pub ran: Duration,
}

/// An open descriptor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Descriptor {
    /// Its number.
    pub number: i32,
    /// What it is: `socket:[1234]`, `pipe:[1234]`, `/dev/null`.
    pub target: String,
}

impl Seen {
    /// Whether it is dead, and nobody has asked for its status yet.
    pub fn is_zombie(&self) -> bool {
        self.state == 'Z'
    }

    /// Whether every thread sleeps in a system call.
    pub fn is_asleep(&self) -> bool {
        self.tasks.iter().all(|task| task.state == 'S' && task.call.is_some())
    }

    /// Whether every thread is stopped.
    pub fn is_stopped(&self) -> bool {
        self.tasks.iter().all(|task| task.state == 'T')
    }

    /// Whether a thread sleeps in one of these system calls, which `libc::SYS_...` name.
    pub fn is_in(&self, calls: &[i64]) -> bool {
        self.tasks.iter().any(|task| task.call.is_some_and(|call| calls.contains(&call)))
    }

    /// How often its threads have slept, together.
    pub fn sleeps(&self) -> u64 {
        self.tasks.iter().map(|task| task.sleeps).sum()
    }

    /// How long its threads have run, together; those that have ended do not count.
    pub fn ran(&self) -> Duration {
        self.tasks.iter().map(|task| task.ran).sum()
    }

    /// The numbers under which it has the socket of this inode open.
    pub fn socket(&self, inode: u64) -> Vec<i32> {
        let target = format!("socket:[{inode}]");
        let same = self.descriptors.iter().filter(|descriptor| descriptor.target == target);
        same.map(|descriptor| descriptor.number).collect()
    }
}

/// Looks at whatever descends from this process, children before grandchildren; not at itself.
pub fn descendants(of: i32) -> Vec<Seen> {
    let mut pids = children(of);
    let mut seen = Vec::new();
    let mut next = 0;
    while let Some(&pid) = pids.get(next) {
        next += 1;
        if let Some(one) = look(pid) {
            pids.extend(children(pid));
            seen.push(one);
        }
    }
    seen
}

/// As [`descendants`], as a file with JSON in it.
///
/// # Errors
/// memfd_create(2)'s and write(2)'s.
pub fn descendants_file(of: i32) -> io::Result<OwnedFd> {
    let flags = nix::sys::memfd::MFdFlags::MFD_CLOEXEC;
    let mut file = fs::File::from(nix::sys::memfd::memfd_create(c"processes", flags)?);
    file.write_all(&serde_json::to_vec(&descendants(of))?)?;
    file.rewind()?;
    Ok(file.into())
}

/// /proc/PID/task/TID/children, of all threads: fork(2) makes a child of the thread that calls it.
fn children(of: i32) -> Vec<i32> {
    let list = |tid| fs::read_to_string(format!("/proc/{of}/task/{tid}/children")).ok();
    let lists = numbers(&format!("/proc/{of}/task")).into_iter().filter_map(list);
    lists
        .flat_map(|list| list.split(' ').filter_map(|pid| pid.parse().ok()).collect::<Vec<_>>())
        .collect()
}

/// `None` if it is gone, which it may be at any time.
fn look(pid: i32) -> Option<Seen> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    Some(Seen {
        pid,
        parent: field(&status, "PPid:")?.parse().ok()?,
        state: field(&status, "State:")?.chars().next()?,
        tasks: numbers(&format!("/proc/{pid}/task"))
            .into_iter()
            .filter_map(|tid| look_at_task(pid, tid))
            .collect(),
        descriptors: numbers(&format!("/proc/{pid}/fd"))
            .into_iter()
            .filter_map(|number| {
                let target = fs::read_link(format!("/proc/{pid}/fd/{number}")).ok()?;
                Some(Descriptor { number, target: target.to_string_lossy().into_owned() })
            })
            .collect(),
    })
}

fn look_at_task(pid: i32, tid: i32) -> Option<Task> {
    let read = |file: &str| fs::read_to_string(format!("/proc/{pid}/task/{tid}/{file}")).ok();
    // The call first: the kernel answers when the thread is off its processor, and a thread that is
    // has been counted as sleeping (task_current_syscall in lib/syscall.c).
    let call = read("syscall").and_then(|line| line.split(' ').next()?.parse().ok());
    let status = read("status")?;
    let ran = read("schedstat").and_then(|line| line.split(' ').next()?.parse().ok());
    Some(Task {
        tid,
        name: field(&status, "Name:")?.to_owned(),
        state: field(&status, "State:")?.chars().next()?,
        sleeps: field(&status, "voluntary_ctxt_switches:")?.parse().ok()?,
        call: call.filter(|number| *number >= 0),
        ran: Duration::from_nanos(ran.unwrap_or(0)),
    })
}

/// The first word after this key.
fn field<'a>(status: &'a str, key: &str) -> Option<&'a str> {
    let line = status.lines().find_map(|line| line.strip_prefix(key))?;
    line.split_whitespace().next()
}

/// The entries of a folder whose names are numbers, ascending.
fn numbers(folder: &str) -> Vec<i32> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut numbers: Vec<i32> =
        entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    numbers.sort_unstable();
    numbers
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    #[test]
    fn a_child_is_seen_asleep_with_what_it_has_open_and_then_as_a_zombie() {
        let mut child =
            Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let see = |wanted: fn(&Seen) -> bool| loop {
            let seen = descendants(std::process::id().cast_signed());
            if let Some(found) = seen.into_iter().find(|seen| seen.pid == pid && wanted(seen)) {
                return found;
            }
        };
        let asleep = see(|seen| seen.is_in(&[libc::SYS_read]));
        assert!(asleep.is_asleep() && !asleep.is_zombie());
        assert!(asleep.descriptors.iter().any(|open| open.target == "/dev/null"));
        assert!(asleep.descriptors[0].target.starts_with("pipe:["));
        assert!(asleep.sleeps() > 0);
        drop(child.stdin.take());
        let dead = see(Seen::is_zombie);
        assert_eq!(dead.descriptors, []);
        child.wait().unwrap();
        assert!(look(pid).is_none());
    }
}
