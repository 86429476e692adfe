//! How much processor time a server has had, with all that came of it and has ended.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use serde::{Deserialize, Serialize};

/// Where it is read.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) enum Meter {
    /// A file of a cgroup that holds the server and nothing else: cpuacct.usage of version 1, in
    /// nanoseconds, or cpu.stat of version 2, in microseconds.
    Group(PathBuf),
    /// Those of /proc/PID/stat, the dead included, in ticks of 10 ms: for want of a cgroup.
    Tree(i32),
}

impl Meter {
    /// In microseconds.
    pub(crate) fn read(&self) -> anyhow::Result<f64> {
        match self {
            Meter::Group(file) => {
                let text = fs::read_to_string(file)?;
                match text.strip_prefix("usage_usec ").and_then(|rest| rest.lines().next()) {
                    Some(micros) => Ok(micros.parse()?),
                    None => Ok(text.trim().parse::<f64>()? / 1e3),
                }
            }
            Meter::Tree(root) => {
                let ticks: u64 = std::iter::once(*root).chain(descendants(*root)).map(ticks).sum();
                Ok(ticks as f64 * 1e4)
            }
        }
    }

    /// The same, once nothing is added any more: the last child has been reaped.
    pub(crate) fn settled(&self) -> anyhow::Result<f64> {
        let mut last = self.read()?;
        for _ in 0..100 {
            std::thread::sleep(Duration::from_millis(10));
            let now = self.read()?;
            if now - last < 50.0 {
                return Ok(now);
            }
            last = now;
        }
        Ok(last)
    }
}

/// utime, stime, cutime and cstime: fields 14 to 17 of proc(5), and the 2nd may contain blanks.
fn ticks(pid: i32) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let rest = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    rest.split_whitespace().skip(11).take(4).filter_map(|field| field.parse::<u64>().ok()).sum()
}

fn descendants(root: i32) -> Vec<i32> {
    serverlab::lab::procfs::descendants(root).iter().map(|seen| seen.pid).collect()
}

/// A cgroup of our own, removed at the end.
#[derive(Debug)]
pub(crate) struct Group {
    folder: PathBuf,
    usage: &'static str,
}

impl Group {
    /// Makes one below the cgroup that we are in, of whichever version lets us.
    pub(crate) fn new() -> anyhow::Result<Group> {
        let own = fs::read_to_string("/proc/self/cgroup").context("no cgroups")?;
        let mut tried = false;
        for line in own.lines() {
            let mut fields = line.splitn(3, ':').skip(1);
            let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else { continue };
            let (root, usage) = match controllers {
                "" => (["/sys/fs/cgroup", "/sys/fs/cgroup/unified"], "cpu.stat"),
                list if list.split(',').any(|name| name == "cpuacct") => {
                    (["/sys/fs/cgroup/cpuacct", "/sys/fs/cgroup/cpu,cpuacct"], "cpuacct.usage")
                }
                _ => continue,
            };
            tried = true;
            for root in root {
                let parent = Path::new(root).join(path.trim_start_matches('/'));
                remove_stale(&parent);
                let folder = parent.join(format!("{PREFIX}{}", std::process::id()));
                if parent.join("cgroup.procs").exists() && fs::create_dir(&folder).is_ok() {
                    let group = Group { folder, usage };
                    if group.usage().exists() {
                        return Ok(group);
                    }
                }
            }
        }
        ensure!(tried, "no cgroup that counts processor time");
        anyhow::bail!("no cgroup may be made here")
    }

    pub(crate) fn usage(&self) -> PathBuf {
        self.folder.join(self.usage)
    }

    /// Who is written here is in it.
    pub(crate) fn members(&self) -> PathBuf {
        self.folder.join("cgroup.procs")
    }
}

const PREFIX: &str = "serverlab-bench-";

/// Removes those of runs that were killed.
fn remove_stale(parent: &Path) {
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let pid = name.to_str().and_then(|name| name.strip_prefix(PREFIX));
        if pid.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
            let _ = fs::remove_dir(entry.path());
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.folder);
    }
}
