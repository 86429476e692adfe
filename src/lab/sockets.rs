//! The TCP sockets of a host: /proc/net/tcp and /proc/net/tcp6 (proc(5)).

use std::fs::File;
use std::io::{self, Read as _, Seek as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::host::Host;

/// One row: a socket, in whatever state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SocketRow {
    /// Its own address.
    pub local: SocketAddr,
    /// Its peer's; the unspecified address and port 0 for a listener.
    pub remote: SocketAddr,
    /// Its state.
    pub state: TcpState,
    /// Bytes sent and not acknowledged; for a listener: 0.
    pub send_queue: u32,
    /// Bytes received and not read; for a listener: connections waiting for accept(2).
    pub receive_queue: u32,
    /// Its inode, as in the link /proc/PID/fd/N; 0 when no process has it any more.
    pub inode: u64,
}

/// A state of RFC 9293, section 3.3.2, under the kernel's names and numbers (net/tcp_states.h).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the RFC describes them")]
pub enum TcpState {
    Established = 1,
    SynSent,
    SynRecv,
    FinWait1,
    FinWait2,
    TimeWait,
    Close,
    CloseWait,
    LastAck,
    Listen,
    Closing,
    NewSynRecv,
}

impl TcpState {
    const ALL: [TcpState; 12] = [
        TcpState::Established,
        TcpState::SynSent,
        TcpState::SynRecv,
        TcpState::FinWait1,
        TcpState::FinWait2,
        TcpState::TimeWait,
        TcpState::Close,
        TcpState::CloseWait,
        TcpState::LastAck,
        TcpState::Listen,
        TcpState::Closing,
        TcpState::NewSynRecv,
    ];
}

/// The TCP sockets of a host.
///
/// # Errors
/// As [`Tables::open`].
pub fn tcp_sockets(host: &Host) -> anyhow::Result<Vec<SocketRow>> {
    Ok(Tables::open(host)?.rows()?)
}

/// The tables of a host, kept open to be looked at again and again.
#[derive(Debug)]
pub struct Tables {
    files: Vec<File>,
}

impl Tables {
    /// Opens them. A host without IPv6 has no tcp6 table, which is no error.
    ///
    /// # Errors
    /// As [`Host::open`].
    pub fn open(host: &Host) -> anyhow::Result<Tables> {
        let mut files = vec![host.open("/proc/net/tcp")?];
        files.extend(host.open("/proc/net/tcp6"));
        Ok(Tables { files })
    }

    /// The sockets as they are now.
    ///
    /// # Errors
    /// read(2)'s.
    pub fn rows(&mut self) -> io::Result<Vec<SocketRow>> {
        let mut text = String::new();
        for file in &mut self.files {
            file.rewind()?; // the kernel makes the table anew
            file.read_to_string(&mut text)?;
        }
        Ok(text.lines().filter_map(parse).collect())
    }
}

/// `  0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000  0  0 12345 ...`
fn parse(line: &str) -> Option<SocketRow> {
    let fields: Vec<&str> = line.split_whitespace().collect();
    let hex = |text: &str| u32::from_str_radix(text, 16).ok();
    let state = usize::try_from(hex(fields.get(3)?)?).ok()?;
    let (send_queue, receive_queue) = fields.get(4)?.split_once(':')?;
    Some(SocketRow {
        local: address(fields.get(1)?)?,
        remote: address(fields.get(2)?)?,
        state: *TcpState::ALL.get(state.checked_sub(1)?)?,
        send_queue: hex(send_queue)?,
        receive_queue: hex(receive_queue)?,
        inode: fields.get(9)?.parse().ok()?,
    })
}

/// An address is printed as 32-bit words in the machine's own byte order. IPv4 in IPv6 is IPv4.
fn address(text: &str) -> Option<SocketAddr> {
    let (ip, port) = text.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let word = |at: usize| Some(u32::from_str_radix(ip.get(at..at + 8)?, 16).ok()?.to_ne_bytes());
    let ip = if ip.len() == 8 {
        IpAddr::from(Ipv4Addr::from(word(0)?))
    } else {
        let mut bytes = [0; 16];
        for (index, chunk) in bytes.chunks_exact_mut(4).enumerate() {
            chunk.copy_from_slice(&word(8 * index)?);
        }
        Ipv6Addr::from(bytes).to_canonical()
    };
    Some(SocketAddr::new(ip, port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(target_endian = "little")]
    fn rows_of_both_tables_are_read() {
        let row = parse(
            "   0: 02004D0A:07D0 01004D0A:9C40 06 00000000:00000005 03:00001770 00000000 0 0 0 3 0",
        )
        .unwrap();
        assert_eq!(row.local, "10.77.0.2:2000".parse().unwrap());
        assert_eq!(row.remote, "10.77.0.1:40000".parse().unwrap());
        assert_eq!((row.state, row.receive_queue, row.inode), (TcpState::TimeWait, 5, 0));
        let row = parse(
            "   1: 000077FD000000000000000002000000:07D0 00000000000000000000000000000000:0000 0A \
             00000000:00000000 00:00000000 00000000 0 0 4242 1",
        )
        .unwrap();
        assert_eq!(row.local, "[fd77::2]:2000".parse().unwrap_or(row.local));
        assert_eq!((row.state, row.inode), (TcpState::Listen, 4242));
    }

    #[test]
    fn a_heading_is_no_row() {
        assert_eq!(parse("  sl  local_address rem_address   st tx_queue rx_queue"), None);
    }
}
