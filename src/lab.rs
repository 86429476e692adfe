//! The laboratory: programs run on a network of hosts, packets are captured, claims are checked.

pub mod agent;
pub mod capture;
pub mod compose;
pub mod counters;
pub mod doctor;
pub mod event;
pub mod evidence;
pub mod experiment;
pub mod fault;
pub mod flow;
pub mod host;
pub mod journal;
pub mod kernel;
pub mod ladder;
pub mod lease;
pub mod namespaces;
pub mod netlink;
pub mod network;
pub mod packet;
pub mod pcap;
pub mod pin;
pub mod process;
pub mod procfs;
pub mod program;
pub mod protocol;
pub mod report;
pub mod run;
pub mod show;
pub mod sniff;
pub mod sockets;
pub mod timeline;
pub mod verdict;
pub mod wait;
pub mod wire;

#[cfg(test)]
mod testing;
