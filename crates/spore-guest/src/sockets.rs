//! A fork's connections to outside: ended, since their other ends are its source's.
//!
//! Called by [`crate::thaw`], while the tenant stands still and the tap is down. Speaks
//! sock_diag(7) by hand: one dump and one order per connection, of fixed layout
//! (`<linux/inet_diag.h>`). A process finds its connection aborted (`ECONNABORTED`), as after a
//! network's failure; connections inside the guest stay, since both of their ends were forked.

use std::io;
use std::net::{IpAddr, Ipv6Addr};
use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, netlink, recv, send};

use crate::net::{CHANGE, ask, guest_address, message, netlink as socket};

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;

const ERROR: u16 = 2;
const DONE: u16 = 3;

/// `NLM_F_REQUEST | NLM_F_DUMP`.
const DUMP: u16 = 0x1 | 0x300;

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
const TCP: u8 = 6;

/// `TCP_ESTABLISHED` to `TCP_CLOSING` without those that have no other end: `TCP_CLOSE` and
/// `TCP_LISTEN`; and without `TCP_TIME_WAIT`, which is only a number that is not used again.
const STATES: u32 = 0xfff & !1 & !(1 << 6 | 1 << 7 | 1 << 10);

const HEADER_BYTES: usize = 16;
/// `struct inet_diag_sockid`.
const ID_BYTES: usize = 48;

const READ_BYTES: usize = 64 * 1024;

/// One end of a connection, as the kernel names it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Connection {
    family: u8,
    id: [u8; ID_BYTES],
}

/// Ends every connection whose other end is not in this guest.
///
/// # Errors
/// Whatever the kernel answers.
pub fn end_outside() -> io::Result<()> {
    let socket = socket(Some(netlink::SOCK_DIAG))?;
    for family in [AF_INET, AF_INET6] {
        for connection in dump(&socket, family)? {
            if connection.is_outside() {
                end(&socket, &connection)?;
            }
        }
    }
    Ok(())
}

fn dump(socket: &OwnedFd, family: u8) -> io::Result<Vec<Connection>> {
    let body = request(family, [0; ID_BYTES]);
    send(
        socket,
        &message(SOCK_DIAG_BY_FAMILY, DUMP, &body),
        SendFlags::empty(),
    )?;
    let mut found = Vec::new();
    let mut buffer = vec![0_u8; READ_BYTES];
    loop {
        let (bytes, _whole) = recv(socket, &mut buffer[..], RecvFlags::empty())?;
        if take(&buffer[..bytes], &mut found)? {
            return Ok(found);
        }
    }
}

/// Ends one; that it has just ended by itself is no failure, and neither is one of which the kernel
/// keeps a number only (`EOPNOTSUPP`).
fn end(socket: &OwnedFd, connection: &Connection) -> io::Result<()> {
    let body = request(connection.family, connection.id);
    match ask(socket, &message(SOCK_DESTROY, CHANGE, &body)) {
        Err(error) if is_any(&error, &[Errno::NOENT, Errno::OPNOTSUPP]) => Ok(()),
        result => result,
    }
}

fn is_any(error: &io::Error, wanted: &[Errno]) -> bool {
    let is = |errno: &Errno| error.raw_os_error() == Some(errno.raw_os_error());
    wanted.iter().any(is)
}

/// `struct inet_diag_req_v2`.
fn request(family: u8, id: [u8; ID_BYTES]) -> Vec<u8> {
    let mut body = vec![family, TCP, 0, 0];
    body.extend(STATES.to_ne_bytes());
    body.extend(id);
    body
}

/// Takes the connections out of one answer. True when it is the last.
fn take(mut answer: &[u8], found: &mut Vec<Connection>) -> io::Result<bool> {
    let malformed = || io::Error::from_raw_os_error(libc::EPROTO);
    while !answer.is_empty() {
        let field = |at: usize| answer.get(at..at + 4)?.try_into().ok();
        let len = field(0).map(u32::from_ne_bytes).ok_or_else(malformed)?;
        let kind = answer.get(4..6).ok_or_else(malformed)?;
        let len = usize::try_from(len).map_err(|_e| malformed())?;
        let body = answer.get(HEADER_BYTES..len).ok_or_else(malformed)?;
        match u16::from_ne_bytes([kind[0], kind[1]]) {
            DONE => return Ok(true),
            ERROR => {
                let code = field(HEADER_BYTES).map(i32::from_ne_bytes);
                let code = code.ok_or_else(malformed)?;
                return Err(io::Error::from_raw_os_error(-code));
            }
            SOCK_DIAG_BY_FAMILY => found.push(Connection::parse(body).ok_or_else(malformed)?),
            _ => {}
        }
        answer = answer.get(len.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(false)
}

impl Connection {
    /// Of a `struct inet_diag_msg`.
    fn parse(body: &[u8]) -> Option<Self> {
        Some(Self {
            family: *body.first()?,
            id: body.get(4..4 + ID_BYTES)?.try_into().ok()?,
        })
    }

    /// The address of the other end: behind the ports and our own.
    fn other_end(&self) -> IpAddr {
        let mut bytes = [0; 16];
        bytes.copy_from_slice(&self.id[20..36]);
        if self.family == AF_INET {
            return IpAddr::from([bytes[0], bytes[1], bytes[2], bytes[3]]);
        }
        IpAddr::V6(Ipv6Addr::from(bytes)).to_canonical()
    }

    /// Whether the other end is not in this guest.
    fn is_outside(&self) -> bool {
        let other = self.other_end();
        !other.is_loopback() && other != IpAddr::V4(guest_address())
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv6Addr;

    use super::{AF_INET, AF_INET6, Connection, DONE, SOCK_DIAG_BY_FAMILY, STATES, request, take};
    use crate::net::message;

    fn connection(family: u8, other: &[u8]) -> Connection {
        let mut id = [0; 48];
        id[20..20 + other.len()].copy_from_slice(other);
        Connection { family, id }
    }

    /// As the kernel tells of one: 20 bytes of figures follow the id.
    fn told(connection: &Connection) -> Vec<u8> {
        let mut body = vec![connection.family, 1, 0, 0];
        body.extend(connection.id);
        body.resize(72, 0);
        message(SOCK_DIAG_BY_FAMILY, 2, &body)
    }

    #[test]
    fn what_stays_has_its_other_end_in_the_guest() {
        let outside: [(u8, &[u8]); 4] = [
            (AF_INET, &[10, 42, 0, 1]),
            (AF_INET, &[93, 184, 216, 34]),
            (
                AF_INET6,
                &Ipv6Addr::from([0, 0, 0, 0, 0, 0xffff, 0x0a2a, 1]).octets(),
            ),
            (
                AF_INET6,
                &Ipv6Addr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, 1]).octets(),
            ),
        ];
        let inside: [(u8, &[u8]); 5] = [
            (AF_INET, &[127, 0, 0, 1]),
            (AF_INET, &[10, 42, 0, 2]),
            (AF_INET6, &Ipv6Addr::LOCALHOST.octets()),
            (
                AF_INET6,
                &Ipv6Addr::from([0, 0, 0, 0, 0, 0xffff, 0x7f00, 1]).octets(),
            ),
            (
                AF_INET6,
                &Ipv6Addr::from([0, 0, 0, 0, 0, 0xffff, 0x0a2a, 2]).octets(),
            ),
        ];
        assert!(
            outside
                .iter()
                .all(|(family, at)| connection(*family, at).is_outside())
        );
        assert!(
            inside
                .iter()
                .all(|(family, at)| !connection(*family, at).is_outside())
        );
    }

    #[test]
    fn an_answer_is_taken_whole_to_its_end_and_a_cut_one_is_refused() {
        let (one, two) = (
            connection(AF_INET, &[10, 42, 0, 1]),
            connection(AF_INET6, &[1; 16]),
        );
        let mut answer = [told(&one), told(&two)].concat();
        let mut found = Vec::new();
        assert!(!take(&answer, &mut found).unwrap());
        assert_eq!(found, [one, two]);
        assert!(take(&message(DONE, 2, &[0; 4]), &mut found).unwrap());
        answer.truncate(100);
        assert!(take(&answer, &mut found).is_err());
        let mut refused = (-libc::EPERM).to_ne_bytes().to_vec();
        refused.extend([0; 16]);
        let error = take(&message(2, 0, &refused), &mut found).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EPERM));
    }

    #[test]
    fn what_is_asked_for_has_another_end() {
        let [established, time_wait, close, listen] = [1, 6, 7, 10].map(|state| 1 << state);
        assert_eq!(
            STATES & (established | time_wait | close | listen),
            established
        );
        assert_eq!(request(AF_INET, [0; 48]).len(), 56);
    }
}
