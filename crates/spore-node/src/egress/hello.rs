//! Whether the first bytes of a client agree with the name it was let through for.
//!
//! Used by `relay.rs` for connections that a *name* grant admitted: one address often serves many
//! names, and a client that asked for one and speaks to another is turned away. Pure: bytes in,
//! judgement out. Never ends TLS, never changes a byte, never looks beyond the first message.
//!
//! ```text
//!   first bytes ──▶ TLS record (0x16) ──▶ whole ClientHello ──▶ SNI is a granted name? pass
//!        │                                                     none, or another: refuse
//!        ├────────▶ line with an HTTP version ──▶ whole head ──▶ Host (and the target's host) are
//!        │                                                     granted names? pass; else refuse
//!        └────────▶ anything else: pass (the server speaks first, STARTTLS, a database, SSH …)
//! ```
//!
//! A ClientHello *without* SNI and an HTTP request without Host are refused: the server would pick
//! whom it serves, and every client that resolved a name has the name to send. Cleartext HTTP/2
//! hides the host in a compressed header and is refused too. What this cannot see is written in
//! docs/internals/egress.md: the name inside TLS, an encrypted ClientHello, later requests of the
//! same connection.

use rustls::server::Acceptor;
use thiserror::Error;

/// The most bytes that are held back while the first message is incomplete.
pub const HELLO_BYTES_MAX: usize = 16 * 1024;

/// The most header lines of a request.
const HEADERS_MAX: usize = 100;

/// Longer words at the start of a line are no HTTP method.
const METHOD_BYTES_MAX: usize = 32;

/// TLS record type of a handshake.
const TLS_HANDSHAKE: u8 = 0x16;

/// What the bytes so far say.
#[derive(Debug, PartialEq, Eq)]
pub enum Hello {
    /// Nothing yet: more bytes are needed.
    Incomplete,
    /// They name a granted host, or nothing that could be checked.
    Pass,
    /// They name another host, or hide which.
    Refuse(HelloRefusal),
}

/// Why a client is turned away.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum HelloRefusal {
    /// SNI or Host is not a granted name of this address.
    #[error("the client speaks to another host than the granted one")]
    OtherHost,
    /// TLS without SNI, or a request without Host.
    #[error("the client names no host")]
    NoHost,
    /// What a server might read and this parser cannot.
    #[error("the client's first message cannot be checked")]
    Unreadable,
}

/// Judges the first bytes of a connection that `names` (lower case) admitted.
#[must_use]
pub fn judge(bytes: &[u8], names: &[&str]) -> Hello {
    let verdict = match bytes {
        [] => return Hello::Incomplete,
        [TLS_HANDSHAKE, ..] => judge_tls(bytes, names),
        [first, ..] if first & 0x80 != 0 => judge_ancient_tls(bytes),
        _ => judge_text(bytes, names),
    };
    if verdict == Hello::Incomplete && bytes.len() >= HELLO_BYTES_MAX {
        return Hello::Refuse(HelloRefusal::Unreadable);
    }
    verdict
}

fn judge_tls(bytes: &[u8], names: &[&str]) -> Hello {
    let mut acceptor = Acceptor::default();
    let mut rest = bytes;
    while !rest.is_empty() {
        if acceptor.read_tls(&mut rest).is_err() {
            return Hello::Refuse(HelloRefusal::Unreadable);
        }
    }
    match acceptor.accept() {
        Ok(None) => Hello::Incomplete,
        Ok(Some(accepted)) => match accepted.client_hello().server_name() {
            Some(host) => agree(host, names),
            None => Hello::Refuse(HelloRefusal::NoHost),
        },
        Err(_unreadable) => Hello::Refuse(HelloRefusal::Unreadable),
    }
}

/// The ClientHello of SSL 2, which some servers still take as the start of TLS, has no SNI.
fn judge_ancient_tls(bytes: &[u8]) -> Hello {
    match bytes {
        [_, _, 1, 3, ..] => Hello::Refuse(HelloRefusal::NoHost),
        [_] | [_, _] | [_, _, 1] => Hello::Incomplete,
        _ => Hello::Pass,
    }
}

fn judge_text(bytes: &[u8], names: &[&str]) -> Hello {
    // Servers skip empty lines before a request.
    let start = bytes.iter().position(|b| !matches!(b, b'\r' | b'\n'));
    let Some(text) = start.and_then(|start| bytes.get(start..)) else {
        return Hello::Incomplete;
    };
    let blank = |b: &u8| matches!(b, b' ' | b'\t');
    let word = text.iter().take_while(|b| is_token(**b)).count();
    match text.get(word) {
        _ if word > METHOD_BYTES_MAX => return Hello::Pass,
        None => return Hello::Incomplete,
        Some(next) if word == 0 || !blank(next) => return Hello::Pass,
        Some(_blank) => {}
    }
    let Some(end) = text.iter().position(|b| *b == b'\n') else {
        return Hello::Incomplete;
    };
    let line = text.get(..end).unwrap_or_default();
    let has_version = line
        .windows(5)
        .any(|part| part.eq_ignore_ascii_case(b"HTTP/"));
    if has_version {
        judge_http(text, names)
    } else {
        Hello::Pass
    }
}

fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

fn judge_http(text: &[u8], names: &[&str]) -> Hello {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut request = httparse::Request::new(&mut headers);
    match request.parse(text) {
        Ok(httparse::Status::Complete(_length)) => {}
        Ok(httparse::Status::Partial) => return Hello::Incomplete,
        Err(_unreadable) => return Hello::Refuse(HelloRefusal::Unreadable),
    }
    let mut hosts = request
        .headers
        .iter()
        .filter(|header| header.name.eq_ignore_ascii_case("host"))
        .map(|header| std::str::from_utf8(header.value).map_or("", str::trim))
        .collect::<Vec<_>>();
    if hosts.is_empty() {
        return Hello::Refuse(HelloRefusal::NoHost);
    }
    let target = request.path.unwrap_or_default();
    if let Some((_scheme, rest)) = target
        .split_once("://")
        .filter(|_| !target.starts_with('/'))
    {
        hosts.push(rest.split(['/', '?', '#']).next().unwrap_or_default());
    } else if !target.starts_with('/') && target != "*" {
        // CONNECT names its target as an authority.
        hosts.push(target);
    }
    let refused = hosts.iter().map(|host| agree(without_port(host), names));
    refused
        .into_iter()
        .find(|verdict| *verdict != Hello::Pass)
        .unwrap_or(Hello::Pass)
}

fn without_port(authority: &str) -> &str {
    match authority.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|b| b.is_ascii_digit()) => host,
        _ => authority,
    }
}

fn agree(host: &str, names: &[&str]) -> Hello {
    let host = host.strip_suffix('.').unwrap_or(host);
    if names.iter().any(|name| name.eq_ignore_ascii_case(host)) {
        Hello::Pass
    } else {
        Hello::Refuse(HelloRefusal::OtherHost)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{any, proptest};
    use proptest::{collection, prop_assert, prop_assert_eq};

    use super::{HELLO_BYTES_MAX, Hello, HelloRefusal, judge};

    const NAMES: &[&str] = &["api.example.com", "b.example.com"];

    /// A ClientHello of TLS 1.2, as small as one can be, with these SNI names.
    fn client_hello(host: Option<&str>) -> Vec<u8> {
        fn sized(bytes: &[u8]) -> Vec<u8> {
            let length = u16::try_from(bytes.len()).unwrap().to_be_bytes();
            [&length, bytes].concat()
        }
        let mut extensions = Vec::new();
        if let Some(host) = host {
            let entry = [&[0][..], &sized(host.as_bytes())].concat();
            extensions.extend([0, 0]);
            extensions.extend(sized(&sized(&entry)));
        }
        extensions.extend([0, 13]);
        extensions.extend(sized(&sized(&[4, 3])));
        let mut body = vec![3, 3];
        body.extend([7; 32]);
        body.push(0);
        body.extend(sized(&[0xc0, 0x2f]));
        body.extend([1, 0]);
        body.extend(sized(&extensions));
        let length = u32::try_from(body.len()).unwrap().to_be_bytes();
        let handshake = [&[1][..], &length[1..], &body].concat();
        [&[0x16, 3, 1][..], &sized(&handshake)].concat()
    }

    #[test]
    fn tls_to_the_granted_name_passes_and_to_another_does_not() {
        for host in ["api.example.com", "API.Example.com", "b.example.com"] {
            assert_eq!(
                judge(&client_hello(Some(host)), NAMES),
                Hello::Pass,
                "{host}"
            );
        }
        for host in ["evil.test", "example.com", "x.api.example.com"] {
            let verdict = judge(&client_hello(Some(host)), NAMES);
            assert_eq!(verdict, Hello::Refuse(HelloRefusal::OtherHost), "{host}");
        }
    }

    #[test]
    fn tls_that_names_no_host_is_refused() {
        let verdict = judge(&client_hello(None), NAMES);
        assert_eq!(verdict, Hello::Refuse(HelloRefusal::NoHost));
        let ancient = [0x80, 0x2e, 1, 3, 1, 0];
        assert_eq!(judge(&ancient, NAMES), Hello::Refuse(HelloRefusal::NoHost));
    }

    #[test]
    fn a_hello_in_pieces_is_waited_for() {
        let hello = client_hello(Some("evil.test"));
        for length in 0..hello.len() {
            assert_eq!(
                judge(&hello[..length], NAMES),
                Hello::Incomplete,
                "{length}"
            );
        }
    }

    #[test]
    fn a_hello_split_over_records_is_put_together() {
        let hello = client_hello(Some("evil.test"));
        let (first, second) = hello[5..].split_at(20);
        let record = |part: &[u8]| {
            let length = u16::try_from(part.len()).unwrap().to_be_bytes();
            [&[0x16, 3, 1][..], &length, part].concat()
        };
        let split = [record(first), record(second)].concat();
        assert_eq!(judge(&split, NAMES), Hello::Refuse(HelloRefusal::OtherHost));
    }

    #[test]
    fn http_to_the_granted_host_passes() {
        for head in [
            "GET / HTTP/1.1\r\nHost: api.example.com\r\n\r\n",
            "\r\nPOST /x HTTP/1.1\r\nhost: API.example.com.:8080\r\nA: b\r\n\r\nbody",
            "GET http://api.example.com/x HTTP/1.1\r\nHost: api.example.com\r\n\r\n",
            "CONNECT api.example.com:443 HTTP/1.1\r\nHost: api.example.com:443\r\n\r\n",
            "OPTIONS * HTTP/1.1\nHost: b.example.com\n\n",
            "GET /?to=http://evil.test/ HTTP/1.1\r\nHost: b.example.com\r\n\r\n",
        ] {
            assert_eq!(judge(head.as_bytes(), NAMES), Hello::Pass, "{head}");
        }
    }

    #[test]
    fn http_to_another_host_is_refused() {
        use HelloRefusal::{NoHost, OtherHost, Unreadable};
        for (head, why) in [
            ("GET / HTTP/1.1\r\nHost: evil.test\r\n\r\n", OtherHost),
            (
                "GET / HTTP/1.1\r\nHost: api.example.com\r\nHost: evil.test\r\n\r\n",
                OtherHost,
            ),
            (
                "GET http://evil.test/ HTTP/1.1\r\nHost: api.example.com\r\n\r\n",
                OtherHost,
            ),
            (
                "GET http://a@evil.test/ HTTP/1.1\r\nHost: api.example.com\r\n\r\n",
                OtherHost,
            ),
            (
                "CONNECT evil.test:443 HTTP/1.1\r\nHost: api.example.com\r\n\r\n",
                OtherHost,
            ),
            (
                "GET / HTTP/1.1\r\nHost: api.example.com@evil.test\r\n\r\n",
                OtherHost,
            ),
            ("GET / HTTP/1.1\r\n\r\n", NoHost),
            ("GET / HTTP/1.0\r\n\r\n", NoHost),
            ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", Unreadable),
            ("GET\t/ HTTP/1.1\r\nHost: evil.test\r\n\r\n", Unreadable),
            ("GET / http/1.1\r\nHost: evil.test\r\n\r\n", Unreadable),
            ("GET / HTTP/1.1\r\nHost : evil.test\r\n\r\n", Unreadable),
        ] {
            assert_eq!(judge(head.as_bytes(), NAMES), Hello::Refuse(why), "{head}");
        }
    }

    #[test]
    fn other_protocols_pass_at_once() {
        for first in [
            &b"\0\0\0\x08\x04\xd2\x16\x2f"[..],
            b"SSH-2.0-client\r\n",
            b"*1\r\n$4\r\nPING\r\n",
            b"AMQP\0\0\x09\x01",
            b"EHLO guest\r\n",
            b"\x10\x0c\0\x04MQTT",
            b"\x80\x01\x02\x03",
        ] {
            assert_eq!(judge(first, NAMES), Hello::Pass, "{first:?}");
        }
    }

    #[test]
    fn a_head_without_an_end_is_refused_at_the_limit() {
        let mut head = b"GET / HTTP/1.1\r\nHost: api.example.com\r\nA: ".to_vec();
        head.resize(HELLO_BYTES_MAX - 1, b'a');
        assert_eq!(judge(&head, NAMES), Hello::Incomplete);
        head.push(b'a');
        assert_eq!(judge(&head, NAMES), Hello::Refuse(HelloRefusal::Unreadable));
    }

    proptest! {
        #[test]
        fn no_bytes_crash_the_judge(bytes in collection::vec(any::<u8>(), 0..600)) {
            let _verdict = judge(&bytes, NAMES);
            let _tls = judge(&[&[0x16, 3, 1][..], &bytes].concat(), NAMES);
            let _http = judge(&[&b"GET / HTTP/1.1\r\n"[..], &bytes].concat(), NAMES);
        }

        #[test]
        fn more_bytes_never_turn_a_judgement_around(
            host in "[a-z]{1,8}\\.example\\.com", tail in collection::vec(any::<u8>(), 0..64),
        ) {
            let head = format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n").into_bytes();
            let hello = client_hello(Some(&host));
            for first in [head, hello] {
                let verdict = judge(&first, NAMES);
                prop_assert!(verdict != Hello::Incomplete);
                prop_assert_eq!(judge(&[first, tail.clone()].concat(), NAMES), verdict);
            }
        }
    }
}
