//! Who listens on which TCP port, read from `/proc/net/tcp` and `/proc/net/tcp6`.
//!
//! Called by [`crate::runner`] while an app starts. The kernel accepts connections for a socket as
//! soon as it is in state LISTEN, so the table answers "does the port accept" without a connection
//! that the app would see. Parsing is pure.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// The kernel's number for LISTEN (`include/net/tcp_states.h`).
const LISTEN: u8 = 0x0a;

/// The most bytes of one table that are read; a listener stands in its first lines.
const TABLE_BYTES_MAX: u64 = 1024 * 1024;

/// The addresses on which something listens, by port.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Listeners(BTreeSet<(u16, IpAddr)>);

/// How a port can be reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// Nothing listens.
    Closed,
    /// Only from inside the guest.
    Loopback(Ipv4Addr),
    /// From the guest's address, hence from the host.
    Outside,
}

impl Listeners {
    /// Reads the tables of the calling process's network namespace.
    ///
    /// # Errors
    /// When `/proc/net/tcp` cannot be read; a missing `tcp6` is a kernel without IPv6.
    pub fn read() -> io::Result<Self> {
        let mut listeners = Self::default();
        listeners.parse(&table("/proc/net/tcp")?);
        if let Ok(text) = table("/proc/net/tcp6") {
            listeners.parse(&text);
        }
        Ok(listeners)
    }

    /// Adds the listeners of one table; a line that cannot be read is passed over.
    pub fn parse(&mut self, text: &str) {
        // The kernel lists listeners first, but promises nothing: every line is looked at.
        self.0.extend(text.lines().skip(1).filter_map(listener));
    }

    /// How `port` can be reached when the guest's own address is `outside`.
    #[must_use]
    pub fn reach(&self, port: u16, outside: Ipv4Addr) -> Reach {
        let mut reach = Reach::Closed;
        for (_port, address) in self.0.iter().filter(|(listening, _)| *listening == port) {
            match address {
                IpAddr::V4(v4) if v4.is_unspecified() || *v4 == outside => return Reach::Outside,
                IpAddr::V4(v4) if v4.is_loopback() => reach = Reach::Loopback(*v4),
                IpAddr::V6(v6) if v6.is_unspecified() => return Reach::Outside,
                IpAddr::V6(v6) => match v6.to_ipv4_mapped() {
                    Some(v4) if v4 == outside => return Reach::Outside,
                    Some(v4) if v4.is_loopback() => reach = Reach::Loopback(v4),
                    _ => {}
                },
                IpAddr::V4(_) => {}
            }
        }
        reach
    }

    /// The ports on which something listens, for people.
    #[must_use]
    pub fn ports(&self) -> BTreeSet<u16> {
        self.0.iter().map(|(port, _address)| *port).collect()
    }
}

fn table(path: &str) -> io::Result<String> {
    let mut text = String::new();
    File::open(path)?
        .take(TABLE_BYTES_MAX)
        .read_to_string(&mut text)?;
    Ok(text)
}

/// The listener of a line such as `0: 0100007F:1F90 00000000:0000 0A ...`.
fn listener(line: &str) -> Option<(u16, IpAddr)> {
    let mut fields = line.split_ascii_whitespace();
    let local = fields.nth(1)?;
    let state = fields.nth(1)?;
    if u8::from_str_radix(state, 16).ok()? != LISTEN {
        return None;
    }
    let (address, port) = local.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    Some((port, parse_address(address)?))
}

/// An address as the kernel prints it: 32-bit words in the machine's byte order, in hexadecimal.
fn parse_address(hex: &str) -> Option<IpAddr> {
    let word = |at: usize| {
        let digits = hex.get(at * 8..at * 8 + 8)?;
        Some(u32::from_str_radix(digits, 16).ok()?.to_ne_bytes())
    };
    match hex.len() {
        8 => Some(IpAddr::V4(Ipv4Addr::from(word(0)?))),
        32 => {
            let mut bytes = [0; 16];
            for (at, part) in bytes.chunks_exact_mut(4).enumerate() {
                part.copy_from_slice(&word(at)?);
            }
            Some(IpAddr::V6(Ipv6Addr::from(bytes)))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, TcpListener};

    use proptest::prelude::proptest;

    use super::{Listeners, Reach};

    const OUTSIDE: Ipv4Addr = Ipv4Addr::new(10, 42, 0, 2);
    const HEADER: &str = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when\n";

    fn parsed(lines: &str) -> Listeners {
        let mut listeners = Listeners::default();
        listeners.parse(&format!("{HEADER}{lines}"));
        listeners
    }

    #[test]
    fn a_loopback_listener_is_told_from_an_open_one() {
        let table = parsed(
            "   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000 0 0 1\n\
             \x20  1: 00000000:1F91 00000000:0000 0A 00000000:00000000 00:00000000 00000000 0 0 1\n\
             \x20  2: 02002A0A:1F92 00000000:0000 0A 00000000:00000000 00:00000000 00000000 0 0 1\n\
             \x20  3: 0100007F:1F93 0100007F:9999 01 00000000:00000000 00:00000000 0\n",
        );
        assert_eq!(
            table.reach(8080, OUTSIDE),
            Reach::Loopback(Ipv4Addr::LOCALHOST)
        );
        assert_eq!(table.reach(8081, OUTSIDE), Reach::Outside);
        assert_eq!(table.reach(8082, OUTSIDE), Reach::Outside);
        assert_eq!(table.reach(8083, OUTSIDE), Reach::Closed);
        assert_eq!(table.ports().len(), 3);
    }

    #[test]
    fn a_dual_stack_listener_counts_as_open_and_a_mapped_one_as_loopback() {
        let table = parsed(
            "   0: 00000000000000000000000000000000:1F90 \
             00000000000000000000000000000000:0000 0A 0\n\
             \x20  1: 0000000000000000FFFF00000100007F:1F91 \
             00000000000000000000000000000000:0000 0A 0\n",
        );
        assert_eq!(table.reach(8080, OUTSIDE), Reach::Outside);
        assert_eq!(
            table.reach(8081, OUTSIDE),
            Reach::Loopback(Ipv4Addr::LOCALHOST)
        );
    }

    #[test]
    fn a_real_listener_is_seen_and_a_closed_one_is_not() {
        let socket = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = socket.local_addr().unwrap().port();
        let seen = Listeners::read().unwrap().reach(port, OUTSIDE);
        assert_eq!(seen, Reach::Loopback(Ipv4Addr::LOCALHOST));
        drop(socket);
        assert_eq!(
            Listeners::read().unwrap().reach(port, OUTSIDE),
            Reach::Closed
        );
    }

    proptest! {
        #[test]
        fn no_table_makes_the_parser_panic(text in "\\PC{0,300}(\n\\PC{0,120}){0,5}") {
            let mut listeners = Listeners::default();
            listeners.parse(&text);
        }
    }
}
