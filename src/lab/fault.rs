//! Faults: what the network does to packets while an experiment wants it to.
//!
//! Exact rules of nftables in a table of their own, on the host that receives, removed when the
//! guard is dropped. What an input rule drops has been captured before: tcpdump sees a packet as
//! it arrives, the rule when it is delivered. What an output rule drops is never seen.

use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::bail;

use super::host::Host;
use super::process::Ending;
use super::program::Program;
use super::verdict::Skip;

/// Rules on a host. Dropping it removes them.
#[derive(Debug)]
pub struct Fault<'a> {
    host: &'a Host,
    table: String,
}

/// Where a packet meets a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// As it is delivered to this host.
    Input,
    /// As it leaves this host.
    Output,
}

impl Host {
    /// Puts this rule of nft(8) on the host, as `tcp dport 2000 drop`; several are separated by
    /// `;`.
    ///
    /// # Errors
    /// The rule cannot be set; [`Skip`] where the host has no nft.
    pub fn fault(&self, hook: Hook, rule: &str) -> anyhow::Result<Fault<'_>> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let table = format!("lab_{}_{number}", std::process::id());
        let hook = if hook == Hook::Input { "input" } else { "output" };
        let chain = format!("chain c {{ type filter hook {hook} priority 0; {rule}; }}");
        nft(self, &format!("table inet {table} {{ {chain}; }}"))?;
        Ok(Fault { host: self, table })
    }
}

fn nft(host: &Host, command: &str) -> anyhow::Result<()> {
    let missing = |error: &anyhow::Error| {
        let cause = error.root_cause().downcast_ref::<std::io::Error>();
        cause.is_some_and(|cause| cause.kind() == std::io::ErrorKind::NotFound)
    };
    let nft = match host.run(&Program::of_host("nft"), [command]) {
        Err(error) if missing(&error) => return Err(Skip::new("nft on the host").into()),
        run => run?,
    };
    match nft.ending()? {
        Ending::Exit(0) => Ok(()),
        ending => bail!("nft {command}: {ending}: {}", nft.stderr().trim()),
    }
}

impl Fault<'_> {
    /// Removes the rules.
    ///
    /// # Errors
    /// The agent is lost.
    pub fn lift(self) -> anyhow::Result<()> {
        let (host, table) = (self.host, self.table.clone());
        std::mem::forget(self);
        nft(host, &format!("delete table inet {table}"))
    }
}

impl Drop for Fault<'_> {
    fn drop(&mut self) {
        let _ = nft(self.host, &format!("delete table inet {}", self.table));
    }
}
