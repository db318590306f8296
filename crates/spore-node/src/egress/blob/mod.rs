//! Reads and checks what a proxy is started with, before anything is believed.
//!
//! Called once by `main`, after the process is confined. The grants were parsed where the user
//! wrote them; here the same rules are checked again, so that a mistake elsewhere ends in a proxy
//! that refuses to start, never in one that dials more than was meant.

use std::io::Read;
use std::net::{Ipv4Addr, SocketAddr};

use spore_wire::egress::{EgressBlob, GRANTS_MAX, Grant, GrantTarget};
use spore_wire::generation::{GENERATION, is_served};
use thiserror::Error;

/// The most bytes of a blob.
pub const BLOB_BYTES_MAX: u64 = 256 * 1024;

/// The most resolvers; more are never asked by anybody.
pub const RESOLVERS_MAX: usize = 8;

/// The most addresses of the host.
pub const HOST_ADDRESSES_MAX: usize = 1024;

/// The most connections that a blob may ask for.
pub const CONNECTIONS_MAX: u32 = 1024;

/// The net between a VM and its host, the same in every VM: nothing there is ever dialled, since
/// the guest's word for it and the host's differ.
const TAP_NET: [Ipv4Addr; 4] = [
    Ipv4Addr::new(10, 42, 0, 0),
    Ipv4Addr::new(10, 42, 0, 1),
    Ipv4Addr::new(10, 42, 0, 2),
    Ipv4Addr::new(10, 42, 0, 3),
];

/// Why a blob is refused. None of it can be met by a user: the node wrote the blob.
#[derive(Debug, Error)]
pub enum BlobError {
    /// The pipe broke.
    #[error("cannot read the egress blob from standard input")]
    Read(#[source] std::io::Error),
    /// Longer than any blob that the node writes.
    #[error("the egress blob is longer than {BLOB_BYTES_MAX} bytes")]
    TooLong,
    /// Not the JSON of a blob.
    #[error("the egress blob cannot be decoded")]
    Decode(#[source] serde_json::Error),
    /// Written by a node of another age.
    #[error("the egress blob has generation {0}, this program speaks {GENERATION}: restart the VM")]
    Generation(u32),
    /// No grant, or too many.
    #[error("the egress blob has {0} grants: 1 to {GRANTS_MAX} are possible")]
    GrantCount(usize),
    /// A port, name or address that no connection can have.
    #[error("the egress blob's grant {grant:?} is refused: {why}")]
    Grant {
        /// The grant.
        grant: Grant,
        /// What is wrong with it.
        why: &'static str,
    },
    /// Names cannot be resolved.
    #[error("the egress blob has {0} resolvers: 1 to {RESOLVERS_MAX} are needed to grant a name")]
    ResolverCount(usize),
    /// A resolver that cannot be asked.
    #[error("the egress blob's resolver {0} cannot be asked")]
    Resolver(SocketAddr),
    /// More addresses than a host has.
    #[error("the egress blob has {0} host addresses, more than {HOST_ADDRESSES_MAX}")]
    HostAddressCount(usize),
    /// No connection, or too many.
    #[error("the egress blob allows {0} connections: 1 to {CONNECTIONS_MAX} are possible")]
    ConnectionCount(u32),
}

/// Reads `from` to its end and checks every part of the blob.
///
/// # Errors
/// [`BlobError`]; the proxy must then end.
pub fn read(from: impl Read) -> Result<EgressBlob, BlobError> {
    let mut bytes = Vec::new();
    from.take(BLOB_BYTES_MAX + 1)
        .read_to_end(&mut bytes)
        .map_err(BlobError::Read)?;
    if u64::try_from(bytes.len()).is_ok_and(|length| length > BLOB_BYTES_MAX) {
        return Err(BlobError::TooLong);
    }
    let blob = serde_json::from_slice::<EgressBlob>(&bytes).map_err(BlobError::Decode)?;
    check(&blob)?;
    Ok(blob)
}

fn check(blob: &EgressBlob) -> Result<(), BlobError> {
    if !is_served(blob.generation) {
        return Err(BlobError::Generation(blob.generation));
    }
    if blob.grants.is_empty() || blob.grants.len() > GRANTS_MAX {
        return Err(BlobError::GrantCount(blob.grants.len()));
    }
    for grant in &blob.grants {
        let why = fault_of(grant);
        if let Some(why) = why {
            return Err(BlobError::Grant {
                grant: grant.clone(),
                why,
            });
        }
    }
    let is_name = |grant: &Grant| matches!(grant.to, GrantTarget::Name { .. });
    let needed = usize::from(blob.grants.iter().any(is_name));
    if blob.resolvers.len() < needed || blob.resolvers.len() > RESOLVERS_MAX {
        return Err(BlobError::ResolverCount(blob.resolvers.len()));
    }
    for resolver in &blob.resolvers {
        if resolver.port() == 0 || resolver.ip().is_unspecified() || resolver.ip().is_multicast() {
            return Err(BlobError::Resolver(*resolver));
        }
    }
    if blob.host_addresses.len() > HOST_ADDRESSES_MAX {
        return Err(BlobError::HostAddressCount(blob.host_addresses.len()));
    }
    if blob.connections_max == 0 || blob.connections_max > CONNECTIONS_MAX {
        return Err(BlobError::ConnectionCount(blob.connections_max));
    }
    Ok(())
}

fn fault_of(grant: &Grant) -> Option<&'static str> {
    if grant.port == 0 {
        return Some("port 0");
    }
    match &grant.to {
        GrantTarget::Name { name } if !is_host_name(name) => Some("not a lower-case host name"),
        GrantTarget::Address { address }
            if address.is_unspecified()
                || address.is_loopback()
                || address.is_multicast()
                || address.is_broadcast() =>
        {
            Some("not the address of one host")
        }
        GrantTarget::Address { address } if TAP_NET.contains(address) => {
            Some("the VM's own link to its host")
        }
        GrantTarget::Name { .. } | GrantTarget::Address { .. } => None,
    }
}

/// Letters, digits, hyphens and underscores in at least two labels, lower case; never a numeric
/// address, however it is written.
fn is_host_name(name: &str) -> bool {
    let is_byte = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'_');
    let is_label = |label: &str| {
        (1..=63).contains(&label.len())
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(is_byte)
    };
    let top = name.rsplit('.').next().unwrap_or_default();
    name.len() <= 253
        && name.contains('.')
        && name.split('.').all(is_label)
        && !top.bytes().all(|b| b.is_ascii_digit())
}

#[cfg(test)]
mod tests;
