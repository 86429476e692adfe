//! The kernel's network counters: /proc/net/snmp, /proc/net/netstat (proc(5)), one set for each
//! network namespace.

use std::collections::BTreeMap;

use anyhow::Context as _;

use super::host::Host;

/// The counters of a host at one moment, under the names that nstat(8) gives them: `TcpOutRsts`,
/// `TcpExtTCPAbortOnData`.
#[derive(Clone, Debug, Default)]
pub struct Counters {
    values: BTreeMap<String, i64>,
}

impl Counters {
    /// Reads them.
    ///
    /// # Errors
    /// The files cannot be read.
    pub fn read(host: &Host) -> anyhow::Result<Counters> {
        let mut values = parse(&host.read("/proc/net/snmp")?);
        values.extend(parse(&host.read("/proc/net/netstat")?));
        Ok(Counters { values })
    }

    /// How much this counter has grown since `earlier`.
    ///
    /// # Errors
    /// This kernel has no such counter.
    pub fn since(&self, earlier: &Counters, name: &str) -> anyhow::Result<i64> {
        let now = self.values.get(name);
        let now = now.with_context(|| format!("this kernel has no counter {name}"))?;
        Ok(now - earlier.values.get(name).copied().unwrap_or(0))
    }

    /// Every counter that has changed since `earlier`, and by how much.
    pub fn changes(&self, earlier: &Counters) -> Vec<(&str, i64)> {
        self.values
            .iter()
            .map(|(name, now)| (name.as_str(), now - earlier.values.get(name).unwrap_or(&0)))
            .filter(|(_, change)| *change != 0)
            .collect()
    }
}

/// Lines come in pairs: `Tcp: RtoAlgorithm RtoMin ...` and `Tcp: 1 200 ...`.
fn parse(text: &str) -> BTreeMap<String, i64> {
    let lines: Vec<&str> = text.lines().collect();
    let mut values = BTreeMap::new();
    for pair in lines.chunks_exact(2) {
        let (names, numbers) = (pair[0].split_whitespace(), pair[1].split_whitespace());
        let mut columns = names.zip(numbers);
        let Some((group, _)) = columns.next() else { continue };
        let group = group.trim_end_matches(':');
        for (name, number) in columns {
            values.insert(format!("{group}{name}"), number.parse().unwrap_or(0));
        }
    }
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_nstat() {
        let text = "Tcp: OutRsts InErrs\nTcp: 7 -1\nTcpExt: TCPAbortOnData\nTcpExt: 2\n";
        let values = parse(text);
        assert_eq!(values["TcpOutRsts"], 7);
        assert_eq!(values["TcpInErrs"], -1);
        assert_eq!(values["TcpExtTCPAbortOnData"], 2);
    }
}
