//! The guest's network: the loopback, one interface, one neighbour, one route. The same in every
//! VM.
//!
//! Called by [`crate::init`] once, and by [`crate::thaw`]. Speaks rtnetlink by hand: four messages
//! of fixed layout (`<linux/rtnetlink.h>`, `<linux/neighbour.h>`) do not need a library.

use std::fs;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;

use rustix::net::{AddressFamily, Protocol, RecvFlags, SendFlags, SocketFlags, SocketType};
use rustix::net::{recv, send, socket_with};
use spore_wire::guest::{ADDRESS_PREFIX, GUEST_ADDRESS, HOST_ADDRESS};
use thiserror::Error;

/// The host's side of every tap has this address, so that a fork's neighbour entry is right.
pub const HOST_MAC: [u8; 6] = [0x02, 0x53, 0x50, 0x00, 0x00, 0x01];

/// The guest's only interface.
pub const INTERFACE: &str = "eth0";

const NEW_LINK: u16 = 16;
const NEW_ADDRESS: u16 = 20;
const NEW_ROUTE: u16 = 24;
const NEW_NEIGHBOUR: u16 = 28;
const ERROR: u16 = 2;

/// `NLM_F_REQUEST | NLM_F_ACK`.
pub(crate) const CHANGE: u16 = 0x1 | 0x4;

/// [`CHANGE`] with `NLM_F_CREATE | NLM_F_REPLACE`, which the kernel refuses for a link.
const CREATE: u16 = CHANGE | 0x400 | 0x100;

const AF_INET: u8 = 2;
const IFF_UP: u32 = 1;
const TABLE_MAIN: u8 = 254;
const PROTOCOL_STATIC: u8 = 4;
const UNICAST: u8 = 1;
const PERMANENT: u16 = 0x80;

/// Why the network is not up.
#[derive(Debug, Error)]
pub enum NetError {
    /// The kernel refused a step.
    #[error("cannot {step}")]
    Step {
        /// What was tried.
        step: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The interface is not there.
    #[error("the guest has no interface `{INTERFACE}`: is virtio_net among the modules?")]
    NoInterface(#[source] io::Error),
}

/// Brings everything up.
///
/// # Errors
/// [`NetError`] with the step that failed.
pub fn bring_up() -> Result<(), NetError> {
    let step = |step| move |source| NetError::Step { step, source };
    for scope in ["all", "default"] {
        let path = format!("/proc/sys/net/ipv6/conf/{scope}/disable_ipv6");
        match fs::write(path, "1") {
            // A kernel without IPv6 has nothing to disable.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            result => result.map_err(step("disable IPv6"))?,
        }
    }
    let socket = netlink(None).map_err(step("open a netlink socket"))?;
    let index = index(INTERFACE).map_err(NetError::NoInterface)?;
    // The kernel's loopback has index 1 in every network namespace.
    ask(&socket, &up(1)).map_err(step("bring the loopback up"))?;
    ask(&socket, &address(index)).map_err(step("set the guest's address"))?;
    ask(&socket, &up(index)).map_err(step("bring eth0 up"))?;
    ask(&socket, &neighbour(index)).map_err(step("set the host's neighbour entry"))?;
    ask(&socket, &default_route(index)).map_err(step("set the default route"))
}

/// Makes the host's neighbour entry what it is to be, whatever the source of a fork had learned. It
/// is the only neighbour that the link's network has room for.
///
/// # Errors
/// [`NetError`] with the step that failed.
pub fn renew_neighbour() -> Result<(), NetError> {
    let step = |step| move |source| NetError::Step { step, source };
    let socket = netlink(None).map_err(step("open a netlink socket"))?;
    let index = index(INTERFACE).map_err(NetError::NoInterface)?;
    ask(&socket, &neighbour(index)).map_err(step("set the host's neighbour entry"))
}

/// A socket to a part of the kernel; without a protocol's number it is 0, which is `NETLINK_ROUTE`.
pub(crate) fn netlink(protocol: Option<Protocol>) -> io::Result<OwnedFd> {
    let family = AddressFamily::NETLINK;
    Ok(socket_with(
        family,
        SocketType::RAW,
        SocketFlags::CLOEXEC,
        protocol,
    )?)
}

fn index(interface: &str) -> io::Result<u32> {
    let text = fs::read_to_string(format!("/sys/class/net/{interface}/ifindex"))?;
    text.trim()
        .parse()
        .map_err(|_malformed| io::Error::from_raw_os_error(libc::EINVAL))
}

/// Sends one message and reads the kernel's answer to it.
pub(crate) fn ask(socket: &OwnedFd, message: &[u8]) -> io::Result<()> {
    send(socket, message, SendFlags::empty())?;
    let mut buffer = [0_u8; 4096];
    let (bytes, _whole) = recv(socket, &mut buffer[..], RecvFlags::empty())?;
    let answer = &buffer[..bytes];
    let malformed = || io::Error::from_raw_os_error(libc::EPROTO);
    let kind = answer.get(4..6).ok_or_else(malformed)?;
    let code = answer.get(16..20).ok_or_else(malformed)?;
    let code = i32::from_ne_bytes([code[0], code[1], code[2], code[3]]);
    match (u16::from_ne_bytes([kind[0], kind[1]]), code) {
        (ERROR, 0) => Ok(()),
        (ERROR, code) => Err(io::Error::from_raw_os_error(-code)),
        _ => Err(malformed()),
    }
}

fn up(index: u32) -> Vec<u8> {
    let mut body = vec![0; 4];
    body.extend(index.to_ne_bytes());
    body.extend(IFF_UP.to_ne_bytes());
    body.extend(IFF_UP.to_ne_bytes());
    message(NEW_LINK, CHANGE, &body)
}

fn address(index: u32) -> Vec<u8> {
    let mut body = vec![AF_INET, ADDRESS_PREFIX, 0, 0];
    body.extend(index.to_ne_bytes());
    attribute(&mut body, 1, &GUEST_ADDRESS);
    attribute(&mut body, 2, &GUEST_ADDRESS);
    message(NEW_ADDRESS, CREATE, &body)
}

fn neighbour(index: u32) -> Vec<u8> {
    let mut body = vec![AF_INET, 0, 0, 0];
    body.extend(index.to_ne_bytes());
    body.extend(PERMANENT.to_ne_bytes());
    body.extend([0, UNICAST]);
    attribute(&mut body, 1, &HOST_ADDRESS);
    attribute(&mut body, 2, &HOST_MAC);
    message(NEW_NEIGHBOUR, CREATE, &body)
}

fn default_route(index: u32) -> Vec<u8> {
    let mut body = vec![AF_INET, 0, 0, 0, TABLE_MAIN, PROTOCOL_STATIC, 0, UNICAST];
    body.extend([0; 4]);
    attribute(&mut body, 5, &HOST_ADDRESS);
    attribute(&mut body, 4, &index.to_ne_bytes());
    message(NEW_ROUTE, CREATE, &body)
}

pub(crate) fn message(kind: u16, flags: u16, body: &[u8]) -> Vec<u8> {
    let len = u32::try_from(16 + body.len()).unwrap_or(u32::MAX);
    let mut out = Vec::new();
    out.extend(len.to_ne_bytes());
    out.extend(kind.to_ne_bytes());
    out.extend(flags.to_ne_bytes());
    out.extend([0; 8]);
    out.extend(body);
    out
}

/// Attributes are padded to four bytes; their length does not count the padding.
fn attribute(body: &mut Vec<u8>, kind: u16, value: &[u8]) {
    let len = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
    body.extend(len.to_ne_bytes());
    body.extend(kind.to_ne_bytes());
    body.extend(value);
    body.resize(body.len().next_multiple_of(4), 0);
}

/// The guest's address as the rest of the crate uses it.
#[must_use]
pub fn guest_address() -> Ipv4Addr {
    Ipv4Addr::from(GUEST_ADDRESS)
}

#[cfg(test)]
mod tests {
    use super::{address, default_route, neighbour, up};

    #[test]
    fn every_message_says_its_own_length_and_is_aligned() {
        for message in [up(1), address(2), neighbour(2), default_route(2)] {
            let len = u32::from_ne_bytes([message[0], message[1], message[2], message[3]]);
            assert_eq!(len as usize, message.len());
            assert_eq!(len % 4, 0);
        }
    }

    #[test]
    fn a_neighbour_carries_the_hosts_address_and_mac() {
        let message = neighbour(7);
        assert_eq!(&message[28..36], [8, 0, 1, 0, 10, 42, 0, 1]);
        assert_eq!(&message[36..46], [10, 0, 2, 0, 0x02, 0x53, 0x50, 0, 0, 1]);
    }
}
