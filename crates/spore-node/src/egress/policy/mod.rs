//! What a proxy may dial: grants, the addresses its resolver handed out, and the nets that no name
//! may lead to.
//!
//! Asked by `proxy.rs` for every connection and by `resolver` for every address of an answer.
//! Pure: no socket, no clock; "now" is the time since the proxy's start. Never says yes to an
//! address that no grant led to:
//!
//! ```text
//!                        (address, port) granted? ──yes──▶ Address: dial, bytes not looked at
//!                                   │ no
//!                        public, and not the host's own? ──no──▶ Refused(NotGranted)
//!                                   │ yes
//!    handed out, not expired, for a name granted with this port? ──no──▶ Refused(NotGranted)
//!                                   │ yes
//!                                Names: dial, and the client's first bytes must agree with a name
//! ```

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, SocketAddrV4};
use std::time::Duration;

use spore_wire::egress::{Grant, GrantTarget};

/// The most addresses remembered for one name; the oldest are forgotten first.
pub const ADDRESSES_PER_NAME_MAX: usize = 64;

/// How long a handed-out address is admitted at least. A name with a lifetime of one second, as
/// load balancers use, is answered, then dialled: the second step must not lose a race with time.
pub const ADMITTED_MIN: Duration = Duration::from_secs(30);

/// Nets that a name never leads to, as (address, prefix length).
///
/// The IPv4 special-purpose registry (RFC 6890 and its updates) without the nets that are globally
/// reachable, multicast and reserved space, and the metadata services that lie outside of them.
const NOT_PUBLIC: &[(Ipv4Addr, u32)] = &[
    (Ipv4Addr::new(0, 0, 0, 0), 8),
    (Ipv4Addr::new(10, 0, 0, 0), 8),
    // Shared by carriers; also Alibaba's metadata service 100.100.100.200.
    (Ipv4Addr::new(100, 64, 0, 0), 10),
    (Ipv4Addr::new(127, 0, 0, 0), 8),
    // Azure's host channel, a public address that only its own guests reach.
    (Ipv4Addr::new(168, 63, 129, 16), 32),
    // Link-local, above all 169.254.169.254.
    (Ipv4Addr::new(169, 254, 0, 0), 16),
    (Ipv4Addr::new(172, 16, 0, 0), 12),
    // Protocol assignments; also Oracle's metadata service 192.0.0.192.
    (Ipv4Addr::new(192, 0, 0, 0), 24),
    (Ipv4Addr::new(192, 0, 2, 0), 24),
    (Ipv4Addr::new(192, 88, 99, 0), 24),
    (Ipv4Addr::new(192, 168, 0, 0), 16),
    (Ipv4Addr::new(198, 18, 0, 0), 15),
    (Ipv4Addr::new(198, 51, 100, 0), 24),
    (Ipv4Addr::new(203, 0, 113, 0), 24),
    (Ipv4Addr::new(224, 0, 0, 0), 4),
    // Reserved, and the broadcast address.
    (Ipv4Addr::new(240, 0, 0, 0), 4),
];

/// A granted name's place in [`Policy`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct NameIndex(usize);

/// What may be dialled at all. Never changes: another policy is another proxy.
#[derive(Clone, Debug, Default)]
pub struct Policy {
    addresses: BTreeSet<SocketAddrV4>,
    names: Vec<GrantedName>,
    host: BTreeSet<Ipv4Addr>,
}

#[derive(Clone, Debug)]
struct GrantedName {
    name: String,
    ports: BTreeSet<u16>,
}

/// What is done with one connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Granted as exactly this address and port.
    Address,
    /// Handed out for these granted names, with this port; not empty.
    Names(Vec<NameIndex>),
    /// Neither.
    Refused,
}

/// How a name relates to the granted ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It is granted.
    Granted(NameIndex),
    /// A granted name lies below it: it exists, and has no address that the guest may know.
    Ancestor,
    /// Nothing here.
    Unknown,
}

impl Policy {
    /// The policy of a validated blob.
    #[must_use]
    pub fn new(grants: &[Grant], host_addresses: &[IpAddr]) -> Self {
        let mut policy = Self::default();
        for grant in grants {
            match &grant.to {
                GrantTarget::Address { address } => {
                    policy
                        .addresses
                        .insert(SocketAddrV4::new(*address, grant.port));
                }
                GrantTarget::Name { name } => policy.grant_name(name, grant.port),
            }
        }
        policy.host = host_addresses
            .iter()
            .filter_map(|address| match address.to_canonical() {
                IpAddr::V4(address) => Some(address),
                IpAddr::V6(_unreachable) => None,
            })
            .collect();
        policy
    }

    fn grant_name(&mut self, name: &str, port: u16) {
        let known = self.names.iter_mut().find(|granted| granted.name == name);
        if let Some(granted) = known {
            granted.ports.insert(port);
        } else {
            self.names.push(GrantedName {
                name: name.to_owned(),
                ports: BTreeSet::from([port]),
            });
        }
    }

    /// What to do with a connection to `to` at `now`.
    #[must_use]
    pub fn decide(&self, to: SocketAddrV4, admitted: &Admitted, now: Duration) -> Verdict {
        if self.addresses.contains(&to) {
            return Verdict::Address;
        }
        if !self.is_reachable_by_name(*to.ip()) {
            return Verdict::Refused;
        }
        let names = self
            .indices()
            .filter(|index| self.port_is_granted(*index, to.port()))
            .filter(|index| admitted.holds(*index, *to.ip(), now))
            .collect::<Vec<_>>();
        if names.is_empty() {
            Verdict::Refused
        } else {
            Verdict::Names(names)
        }
    }

    /// Whether a name may lead to `address`: public, and not the host's own.
    #[must_use]
    pub fn is_reachable_by_name(&self, address: Ipv4Addr) -> bool {
        is_public(address) && !self.host.contains(&address)
    }

    /// How `name` (lower case, no trailing dot) relates to the granted names.
    #[must_use]
    pub fn standing(&self, name: &str) -> Standing {
        if let Some(index) = self.indices().find(|index| self.name(*index) == Some(name)) {
            return Standing::Granted(index);
        }
        let is_above = |granted: &GrantedName| {
            name.is_empty()
                || granted
                    .name
                    .strip_suffix(name)
                    .is_some_and(|rest| rest.ends_with('.'))
        };
        if self.names.iter().any(is_above) {
            Standing::Ancestor
        } else {
            Standing::Unknown
        }
    }

    /// The granted name at `index`.
    #[must_use]
    pub fn name(&self, index: NameIndex) -> Option<&str> {
        self.names.get(index.0).map(|granted| granted.name.as_str())
    }

    /// Every granted name.
    pub fn indices(&self) -> impl Iterator<Item = NameIndex> + use<> {
        (0..self.names.len()).map(NameIndex)
    }

    fn port_is_granted(&self, index: NameIndex, port: u16) -> bool {
        self.names
            .get(index.0)
            .is_some_and(|granted| granted.ports.contains(&port))
    }
}

/// Whether `address` is an ordinary public one.
#[must_use]
pub fn is_public(address: Ipv4Addr) -> bool {
    !NOT_PUBLIC.iter().any(|(net, length)| {
        let shift = u32::BITS - length;
        address.to_bits() >> shift == net.to_bits() >> shift
    })
}

/// The addresses that this proxy's own resolver handed out, and until when each is admitted.
/// Bounded by [`ADDRESSES_PER_NAME_MAX`] times the granted names.
#[derive(Clone, Debug, Default)]
pub struct Admitted {
    /// One list per name, oldest hand-out first.
    names: Vec<Vec<(Ipv4Addr, Duration)>>,
}

impl Admitted {
    /// Remembers that `addresses` were handed out for `name` at `now`, to be used for `lifetime`.
    pub fn record(
        &mut self,
        name: NameIndex,
        addresses: &[Ipv4Addr],
        lifetime: Duration,
        now: Duration,
    ) {
        if self.names.len() <= name.0 {
            self.names.resize_with(name.0 + 1, Vec::new);
        }
        let Some(held) = self.names.get_mut(name.0) else {
            return;
        };
        let until = now.saturating_add(lifetime.max(ADMITTED_MIN));
        for address in addresses {
            let before = held.iter().find(|(known, _until)| known == address);
            // A shorter answer does not shorten what the guest was told before.
            let until = before.map_or(until, |(_address, earlier)| until.max(*earlier));
            held.retain(|(known, _until)| known != address);
            held.push((*address, until));
        }
        held.retain(|(_address, until)| *until > now);
        let surplus = held.len().saturating_sub(ADDRESSES_PER_NAME_MAX);
        held.drain(..surplus);
    }

    fn holds(&self, name: NameIndex, address: Ipv4Addr, now: Duration) -> bool {
        self.names.get(name.0).is_some_and(|held| {
            held.iter()
                .any(|(known, until)| *known == address && *until > now)
        })
    }
}

#[cfg(test)]
mod tests;
