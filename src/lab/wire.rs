//! What a capture took: the packets of each host, as flows.

use anyhow::bail;

use super::capture::Taken;
use super::flow::{Flow, Flows};
use super::ladder::{Ladder, Names};
use super::verdict::Verdict;

/// A finished, complete capture.
#[derive(Debug)]
pub struct Wire {
    views: Vec<View>,
}

/// What one host saw.
#[derive(Debug)]
pub struct View {
    host: String,
    flows: Flows,
    names: Names,
    packets: usize,
}

impl Wire {
    /// The captures of all hosts, which their evidence will hold in this folder.
    pub(super) fn new(taken: &[Taken], names: &Names, folder: &std::path::Path) -> Wire {
        let view = |taken: &Taken| View {
            host: taken.host.clone(),
            flows: Flows::from_packets(&taken.packets)
                .in_file(folder.join(format!("{}.pcap", taken.host))),
            names: names.clone(),
            packets: taken.packets.len(),
        };
        Wire { views: taken.iter().map(view).collect() }
    }

    /// What this host saw.
    ///
    /// # Panics
    /// If there is no such host: the name in the experiment is wrong.
    pub fn at(&self, host: &str) -> &View {
        let found = self.views.iter().find(|view| view.host == host);
        found.unwrap_or_else(|| panic!("there is no capture of a host {host}"))
    }

    /// The verdict on a claim that every connection to this port, as every host saw it, is this
    /// ladder; see [`Ladder`] for how it reads. There must be one at least.
    pub fn ladder(&self, port: u16, expected: &str) -> Verdict {
        let expected = match Ladder::parse(expected) {
            Ok(expected) => expected,
            Err(error) => return Verdict::Invalid(error.to_string()),
        };
        for view in &self.views {
            let flows = view.to_port(port);
            if flows.is_empty() {
                return Verdict::Fail(format!("{} saw no connection to port {port}", view.host));
            }
            for flow in flows {
                if let Err(difference) = view.ladder(flow, &expected) {
                    return Verdict::Fail(difference);
                }
            }
        }
        Verdict::Pass
    }
}

impl View {
    /// Its TCP connections, in the order in which they began.
    pub fn flows(&self) -> &Flows {
        &self.flows
    }

    /// How many packets it took, sentinels not counted.
    pub fn packets(&self) -> usize {
        self.packets
    }

    /// The names of the hosts.
    pub fn names(&self) -> &Names {
        &self.names
    }

    /// The connections to this port, in the order in which they began.
    pub fn to_port(&self, port: u16) -> Vec<&Flow> {
        self.flows.iter().filter(|flow| flow.facts.server.port() == port).collect()
    }

    /// The connection to this port, of which there must be exactly one.
    ///
    /// # Errors
    /// How many there are instead.
    pub fn flow(&self, port: u16) -> anyhow::Result<&Flow> {
        match self.to_port(port)[..] {
            [flow] => Ok(flow),
            ref flows => bail!("there are {} connections to port {port}, not one", flows.len()),
        }
    }

    fn ladder(&self, flow: &Flow, expected: &Ladder) -> Result<(), String> {
        let compared = expected.compare(flow, &self.names);
        compared.map_err(|difference| format!("captured on {}:\n{difference}", self.host))
    }
}
