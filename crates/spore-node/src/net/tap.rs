//! The one interface of a VM's namespace.
//!
//! Called on a namespace thread, inside the namespace. The addresses are the same in every VM, so
//! that a snapshot needs no renumbering. Never decides when the tap goes up.

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
use spore_wire::guest::{ADDRESS_PREFIX, GUEST_ADDRESS, HOST_ADDRESS};

use crate::sys;

/// The tap's name.
pub const TAP: &str = "tap0";

/// The host side's hardware address: the same everywhere, or the neighbour entry of a guest that
/// was restored elsewhere would be stale.
pub const HOST_MAC: [u8; 6] = [0x02, 0x53, 0x50, 0x00, 0x00, 0x01];

/// The guest's hardware address.
pub const GUEST_MAC: [u8; 6] = [0x02, 0x53, 0x50, 0x00, 0x00, 0x02];

/// The guest's hardware address, as text.
pub const GUEST_MAC_TEXT: &str = "02:53:50:00:00:02";

fn any_socket() -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC;
    Ok(socket_with(
        AddressFamily::INET,
        SocketType::DGRAM,
        flags,
        None,
    )?)
}

/// Makes the tap, persistent and down, and takes the loopback interface up.
///
/// # Errors
/// What the kernel says.
pub fn make() -> io::Result<()> {
    let tap = sys::open_tap(TAP)?;
    let socket = any_socket()?;
    sys::set_hardware_address(&socket, TAP, HOST_MAC)?;
    sys::set_address(&socket, TAP, Ipv4Addr::from(HOST_ADDRESS), ADDRESS_PREFIX)?;
    sys::set_up(&socket, "lo")?;
    // Nothing may pass yet, whatever giving an address does to an interface.
    sys::set_down(&socket, TAP)?;
    drop(tap);
    Ok(())
}

/// Opens the tap for a VMM.
///
/// # Errors
/// What the kernel says; `EBUSY` when another VMM has it.
pub fn open() -> io::Result<OwnedFd> {
    sys::open_tap(TAP)
}

/// Whether packets may pass.
///
/// # Errors
/// What the kernel says.
pub fn is_up() -> io::Result<bool> {
    sys::is_up(&any_socket()?, TAP)
}

/// Lets packets pass and tells the host side where the guest is.
///
/// # Errors
/// What the kernel says.
pub fn up() -> io::Result<()> {
    let socket = any_socket()?;
    sys::set_up(&socket, TAP)?;
    // The kernel forgets neighbours of an interface that is taken down, so the entry comes after.
    sys::set_neighbour(&socket, TAP, Ipv4Addr::from(GUEST_ADDRESS), GUEST_MAC)
}
