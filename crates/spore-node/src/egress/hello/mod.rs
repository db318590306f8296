//! Whether the first bytes of a client agree with the name it was let through for.
//!
//! Used by `relay` for connections that a *name* grant admitted: one address often serves many
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
mod tests;
