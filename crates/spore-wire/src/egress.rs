//! Node and egress proxy: the one blob that a proxy is started with.
//!
//! The proxy (`spore egress`, one per VM with grants, unprivileged) reads it as JSON from its
//! standard input until end of file. Its sockets are made by the node inside the VM's namespace and
//! inherited by number. It is told nothing later: another policy is another proxy.

use serde::{Deserialize, Serialize};

use crate::id::VmId;

/// The TCP port inside the VM's namespace to which granted traffic is redirected.
pub const PROXY_PORT: u16 = 3128;

/// The descriptor of the listening TCP socket on [`PROXY_PORT`].
pub const TCP_FD: i32 = 3;

/// The descriptor of the UDP socket bound to port 53 of the host's side of the tap.
pub const DNS_FD: i32 = 4;

/// The most grants of one VM.
pub const GRANTS_MAX: usize = 64;

/// What a proxy is started with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EgressBlob {
    /// [`crate::generation::GENERATION`] of the node.
    pub generation: u32,
    /// Whose traffic it carries, for logs.
    pub vm: VmId,
    /// What it may dial; not empty.
    pub grants: Vec<Grant>,
    /// The host's resolvers, asked for granted names only.
    pub resolvers: Vec<core::net::SocketAddr>,
    /// The host's own addresses: refused unless granted as an address.
    pub host_addresses: Vec<core::net::IpAddr>,
    /// The most connections at once; more are closed at accept.
    pub connections_max: u32,
}

/// One permission to dial.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grant {
    /// Where to.
    pub to: GrantTarget,
    /// TCP port.
    pub port: u16,
}

/// What a grant names.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "by", rename_all = "snake_case")]
pub enum GrantTarget {
    /// A DNS name, lower case, without a trailing dot: only public addresses are dialled.
    Name {
        /// At least one dot; no wildcard.
        name: String,
    },
    /// Exactly this address, private or not.
    Address {
        /// IPv4.
        address: core::net::Ipv4Addr,
    },
}
