//! Interfaces, made and set up through rtnetlink(7): what `ip link` and `ip address` do, in-process.

use std::io;
use std::net::IpAddr;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage,
    NetlinkPayload,
};
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage};
use netlink_packet_route::link::{
    InfoData, InfoKind, InfoVeth, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use nix::net::if_::if_nametoindex;
use nix::unistd::Pid;

/// A netlink socket of the network namespace in which it was opened.
#[derive(Debug)]
pub struct Netlink {
    socket: Socket,
    sequence: u32,
}

impl Netlink {
    /// Opens a socket in this thread's network namespace.
    ///
    /// # Errors
    /// socket(2)'s and bind(2)'s.
    pub fn open() -> io::Result<Netlink> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Netlink { socket, sequence: 0 })
    }

    /// `ip link add NAME type bridge` and `ip link set NAME up`. Spanning tree is off, as the
    /// kernel's default has it, so that ports forward at once.
    ///
    /// # Errors
    /// The kernel's answer: EPERM, EEXIST, EOPNOTSUPP without the bridge module ...
    pub fn add_bridge(&mut self, name: &str) -> io::Result<()> {
        let mut link = named(name);
        link.attributes.push(LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Bridge)]));
        bring_up(&mut link);
        self.request(RouteNetlinkMessage::NewLink(link), NLM_F_CREATE | NLM_F_EXCL)
    }

    /// `ip link add NAME master BRIDGE up type veth peer name PEER netns PID`.
    ///
    /// # Errors
    /// The kernel's answer: EPERM, ESRCH ...
    pub fn add_veth(&mut self, name: &str, bridge: &str, peer: &str, pid: Pid) -> io::Result<()> {
        let mut far = named(peer);
        far.attributes.push(LinkAttribute::NetNsPid(pid.as_raw().cast_unsigned()));
        let mut near = named(name);
        near.attributes.push(LinkAttribute::Controller(if_nametoindex(bridge)?));
        near.attributes.push(LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Veth),
            LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(far))),
        ]));
        bring_up(&mut near);
        self.request(RouteNetlinkMessage::NewLink(near), NLM_F_CREATE | NLM_F_EXCL)
    }

    /// `ip link set NAME up`.
    ///
    /// # Errors
    /// ENODEV and the kernel's answer.
    pub fn set_up(&mut self, name: &str) -> io::Result<()> {
        let mut link = LinkMessage::default();
        link.header.index = if_nametoindex(name)?;
        bring_up(&mut link);
        self.request(RouteNetlinkMessage::SetLink(link), 0)
    }

    /// `ip address add ADDRESS/PREFIX dev NAME nodad`. Without duplicate address detection an IPv6
    /// address can be used at once instead of after a second.
    ///
    /// # Errors
    /// ENODEV and the kernel's answer.
    pub fn add_address(&mut self, name: &str, address: IpAddr, prefix: u8) -> io::Result<()> {
        let mut message = AddressMessage::default();
        message.header.index = if_nametoindex(name)?;
        message.header.prefix_len = prefix;
        message.header.family =
            if address.is_ipv6() { AddressFamily::Inet6 } else { AddressFamily::Inet };
        message.attributes = vec![
            AddressAttribute::Local(address),
            AddressAttribute::Address(address),
            AddressAttribute::Flags(AddressFlags::Nodad),
        ];
        self.request(RouteNetlinkMessage::NewAddress(message), NLM_F_CREATE | NLM_F_EXCL)
    }

    /// One request and its acknowledgement.
    fn request(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.sequence += 1;
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | NLM_F_ACK | flags;
        header.sequence_number = self.sequence;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::from(message));
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        self.socket.send(&bytes, 0)?;
        loop {
            let (bytes, _) = self.socket.recv_from_full()?;
            let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(&bytes)
                .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error.to_string()))?;
            match answer.payload {
                NetlinkPayload::Error(error) if error.code.is_some() => return Err(error.to_io()),
                NetlinkPayload::Error(_) => return Ok(()), // code 0: the acknowledgement
                _ => {}                                    // somebody else's news
            }
        }
    }
}

fn named(name: &str) -> LinkMessage {
    let mut link = LinkMessage::default();
    link.attributes.push(LinkAttribute::IfName(name.to_owned()));
    link
}

fn bring_up(link: &mut LinkMessage) {
    link.header.flags |= LinkFlags::Up;
    link.header.change_mask |= LinkFlags::Up;
}
