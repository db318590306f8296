//! What a proxy must know of the host that it dials from: resolvers and own addresses.
//!
//! Asked by the driver when a proxy starts. Both are what they are at that moment: an address that
//! the host gets later is guarded by not being public, or not at all, until the VM starts anew.

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use super::blob::{HOST_ADDRESSES_MAX, RESOLVERS_MAX};
use super::policy::is_public;

const RESOLV_CONF: &str = "/etc/resolv.conf";

const DNS_PORT: u16 = 53;

/// The host's resolvers, as its own programs find them.
///
/// # Errors
/// When `/etc/resolv.conf` cannot be read.
pub fn resolvers() -> io::Result<Vec<SocketAddr>> {
    match fs::read_to_string(RESOLV_CONF) {
        Ok(text) => Ok(parse(&text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(parse("")),
        Err(error) => Err(error),
    }
}

/// The `nameserver` lines of resolv.conf(5). Without one, the resolver of the host itself is meant.
fn parse(text: &str) -> Vec<SocketAddr> {
    let address = |line: &str| {
        let mut words = line.split_whitespace();
        (words.next()? == "nameserver").then_some(())?;
        // An address with a zone means one interface; there is always another resolver beside it.
        words.next()?.parse::<IpAddr>().ok()
    };
    let usable = |address: &IpAddr| !address.is_unspecified() && !address.is_multicast();
    let mut found: Vec<SocketAddr> = text
        .lines()
        .filter_map(address)
        .filter(usable)
        .map(|address| SocketAddr::new(address, DNS_PORT))
        .collect();
    found.truncate(RESOLVERS_MAX);
    if found.is_empty() {
        found.push(SocketAddr::from((Ipv4Addr::LOCALHOST, DNS_PORT)));
    }
    found
}

/// The host's own public addresses; the others are refused whoever has them.
///
/// # Errors
/// What the kernel says, or that there are more than a proxy can be told.
pub fn addresses() -> io::Result<Vec<IpAddr>> {
    let mut found = Vec::new();
    for interface in nix::ifaddrs::getifaddrs()? {
        let address = interface.address.as_ref().and_then(|address| {
            address
                .as_sockaddr_in()
                .map(nix::sys::socket::SockaddrIn::ip)
        });
        found.extend(
            address
                .filter(|address| is_public(*address))
                .map(IpAddr::V4),
        );
    }
    found.sort();
    found.dedup();
    if found.len() > HOST_ADDRESSES_MAX {
        return Err(io::Error::other(format!(
            "the host has {} public addresses, {HOST_ADDRESSES_MAX} is the most",
            found.len()
        )));
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::{addresses, is_public, parse};

    #[test]
    fn nameserver_lines_are_found_between_everything_else() {
        let text = "# nameserver 9.9.9.9\n;\nsearch example.org\nnameserver 192.0.2.1\n\
                    nameserver\t2001:db8::1 # two\nnameserver fe80::1%eth0\nnameserver\n\
                    nameservers 1.1.1.1\nnameserver 0.0.0.0\nnameserver 127.0.0.53\n";
        let found: Vec<String> = parse(text).iter().map(ToString::to_string).collect();
        assert_eq!(found, ["192.0.2.1:53", "[2001:db8::1]:53", "127.0.0.53:53"]);
    }

    #[test]
    fn without_a_nameserver_the_host_itself_is_asked() {
        assert_eq!(parse("search example.org\n")[0].to_string(), "127.0.0.1:53");
    }

    #[test]
    fn more_resolvers_than_a_proxy_takes_are_left_out() {
        assert_eq!(parse(&"nameserver 192.0.2.1\n".repeat(20)).len(), 8);
    }

    #[test]
    fn the_hosts_addresses_are_public_ones() {
        let found = addresses().unwrap();
        let public = |address: &std::net::IpAddr| match address {
            std::net::IpAddr::V4(address) => is_public(*address),
            std::net::IpAddr::V6(_) => false,
        };
        assert!(found.iter().all(public), "{found:?}");
    }
}
