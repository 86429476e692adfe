//! What is pinned on a host, so that a distribution's defaults do not change a result.
#![allow(unsafe_code, reason = "SIOCETHTOOL takes a pointer inside a structure")]

use std::io;
use std::os::fd::AsRawFd as _;

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

/// The interface of every host on the lab's link.
pub const INTERFACE: &str = "eth0";

/// Sysctls that experiments depend on, and why.
pub const SYSCTLS: &[(&str, &str)] = &[
    // No tail loss probes: they send a segment a second time (RFC 8985).
    ("net/ipv4/tcp_early_retrans", "0"),
];

/// Turns off the offloads of an interface: what is captured is then what a wire would carry, no
/// segment above the MSS and with a checksum that is right. Those that the interface lacks are off
/// already.
///
/// # Errors
/// EPERM without CAP_NET_ADMIN, ENODEV.
pub fn offloads_off(interface: &str) -> io::Result<()> {
    // linux/ethtool.h: ETHTOOL_STXCSUM, ETHTOOL_STSO, ETHTOOL_SGSO, ETHTOOL_SGRO.
    const SET_FEATURES: [u32; 4] = [0x17, 0x1f, 0x24, 0x2c];
    let any = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    for feature in SET_FEATURES {
        match set_feature(any.as_raw_fd(), interface, feature) {
            Err(Errno::EOPNOTSUPP) | Ok(()) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

/// struct ethtool_value of linux/ethtool.h.
#[repr(C)]
struct EthtoolValue {
    command: u32,
    data: u32,
}

fn set_feature(socket: i32, interface: &str, command: u32) -> nix::Result<()> {
    let mut off = EthtoolValue { command, data: 0 };
    // SAFETY: all fields of ifreq are integers or pointers, for which zero is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(interface.bytes().take(libc::IFNAMSIZ - 1)) {
        *to = from as libc::c_char; // signed on x86-64, unsigned on aarch64
    }
    request.ifr_ifru.ifru_data = (&raw mut off).cast();
    // SAFETY: the kernel reads `request` and `off`, which outlive the call.
    let result = unsafe { libc::ioctl(socket, libc::SIOCETHTOOL, &raw mut request) };
    Errno::result(result).map(drop)
}

/// Writes the sysctls of this network namespace.
///
/// # Errors
/// The file that could not be written.
pub fn set_sysctls() -> io::Result<()> {
    for (name, value) in SYSCTLS {
        let path = format!("/proc/sys/{name}");
        std::fs::write(&path, value)
            .map_err(|error| io::Error::new(error.kind(), format!("{path}: {error}")))?;
    }
    Ok(())
}
