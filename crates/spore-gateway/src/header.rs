//! What of a message's head goes on, and what the gateway puts in its place.
//!
//! Called by `forward.rs`, for requests and answers. Pure: never reads a body, never looks up a
//! route.

use std::borrow::Cow;

use bytes::Bytes;
use http::header::{
    CONNECTION, CONTENT_LENGTH, EXPECT, FORWARDED, HOST, HeaderMap, HeaderName, HeaderValue,
    PROXY_AUTHORIZATION, SET_COOKIE, TE, TRANSFER_ENCODING, UPGRADE,
};
use http::uri::{Authority, PathAndQuery, Uri};
use http::{Method, Version};
use spore_wire::gateway::Phase;

use crate::limits::{HOST_BYTES_MAX, PHASES_MAX};
use crate::page::Trouble;

pub(crate) const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const X_FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const X_FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const X_REAL_IP: HeaderName = HeaderName::from_static("x-real-ip");
const SERVER_TIMING: HeaderName = HeaderName::from_static("server-timing");

/// What is known of a client, ready to be put into requests.
#[derive(Clone, Debug)]
pub(crate) struct ClientHeaders {
    /// The client's address.
    pub(crate) address: HeaderValue,
    /// How the client reached the gateway.
    pub(crate) scheme: HeaderValue,
}

/// The host that a request is for: lower case, without port.
///
/// In absolute form the target names it and the Host header does not count (RFC 9112, 3.2.2); it
/// is replaced then, so that the app sees what the gateway went by.
pub(crate) fn take_host(
    method: &Method,
    version: Version,
    uri: &mut Uri,
    headers: &mut HeaderMap,
) -> Result<String, Trouble> {
    if method == Method::CONNECT {
        return Err(Trouble::MethodRefused);
    }
    let mut hosts = headers.get_all(HOST).iter();
    let first = hosts.next();
    if hosts.next().is_some() {
        return Err(Trouble::HostRepeated);
    }
    // A target without a slash names a tunnel, and only `OPTIONS *` a server.
    if uri.scheme().is_none() && !uri.path().starts_with('/') && uri.path() != "*" {
        return Err(Trouble::TargetInvalid);
    }
    if let Some(authority) = uri.authority() {
        if first.is_none() && version >= Version::HTTP_11 {
            return Err(Trouble::HostMissing);
        }
        let host = host_of(authority.as_str().as_bytes())?;
        let value = HeaderValue::from_str(authority.as_str())
            .map_err(|_unprintable| Trouble::HostInvalid)?;
        headers.insert(HOST, value);
        let path = uri.path_and_query().cloned();
        *uri = Uri::from(path.unwrap_or_else(|| PathAndQuery::from_static("/")));
        return Ok(host);
    }
    host_of(first.ok_or(Trouble::HostMissing)?.as_bytes())
}

/// The host of a Host header or an authority.
fn host_of(value: &[u8]) -> Result<String, Trouble> {
    // An authority may hold a user's name and password, a Host header may not.
    if value.is_empty() || value.contains(&b'@') || value.len() > HOST_BYTES_MAX + 6 {
        return Err(Trouble::HostInvalid);
    }
    let authority = Authority::try_from(value).map_err(|_invalid| Trouble::HostInvalid)?;
    let host = authority.host();
    // What follows the host is nothing, or a colon and a port that fits.
    let rest = authority.as_str().get(host.len()..).unwrap_or_default();
    let port_is_valid = match rest.strip_prefix(':') {
        None => rest.is_empty(),
        Some("") => true,
        Some(port) => port.bytes().all(|b| b.is_ascii_digit()) && port.parse::<u16>().is_ok(),
    };
    let name = host.strip_suffix('.').unwrap_or(host);
    let literal = name.starts_with('[');
    let name_is_valid = !name.is_empty()
        && name.len() <= HOST_BYTES_MAX
        && name.bytes().all(|b| {
            b.is_ascii_alphanumeric()
                || matches!(b, b'-' | b'.' | b'_')
                || (literal && matches!(b, b'[' | b']' | b':'))
        })
        && (literal || !name.contains("..") && !name.starts_with('.'));
    if port_is_valid && name_is_valid {
        Ok(name.to_ascii_lowercase())
    } else {
        Err(Trouble::HostInvalid)
    }
}

/// Whether a message wants to leave HTTP/1.1, by its own words.
///
/// `h2c` is not among the protocols let through: behind such an upgrade the gateway would relay
/// requests that it never saw.
pub(crate) fn upgrade_of(version: Version, headers: &HeaderMap) -> Option<HeaderValue> {
    if version != Version::HTTP_11 {
        return None;
    }
    let protocol = headers.get(UPGRADE)?;
    let asked = tokens(headers, &CONNECTION).any(|token| token.eq_ignore_ascii_case("upgrade"));
    let h2c = protocol.to_str().ok()?.split(',').any(|name| {
        name.trim()
            .get(..3)
            .is_some_and(|p| p.eq_ignore_ascii_case("h2c"))
    });
    (asked && !h2c).then(|| protocol.clone())
}

fn tokens<'a>(headers: &'a HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'a str> {
    headers
        .get_all(name)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(str::trim)
}

/// How the body of a request goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Framing {
    Empty,
    Length,
    Chunked,
}

/// How the body of a request is delimited; refused when that could be understood in two ways.
pub(crate) fn framing_of(headers: &HeaderMap, empty: bool) -> Result<Framing, Trouble> {
    let chunked = headers.contains_key(TRANSFER_ENCODING);
    let mut lengths = headers.get_all(CONTENT_LENGTH).iter();
    let length = lengths.next();
    if lengths.any(|other| Some(other) != length) || (chunked && length.is_some()) {
        return Err(Trouble::FramingRefused);
    }
    if chunked {
        if !is_chunked_alone(headers) {
            return Err(Trouble::FramingRefused);
        }
        return Ok(Framing::Chunked);
    }
    Ok(if empty {
        Framing::Empty
    } else {
        Framing::Length
    })
}

/// Whether the body of an answer can be told from its head. One that is coded for transfer would
/// lose the name of its coding here; the length beside chunks does not count (RFC 9112, 6.3), and
/// must not be said again.
pub(crate) fn settle_answer(headers: &mut HeaderMap) -> Result<(), Trouble> {
    if headers.contains_key(TRANSFER_ENCODING) {
        if !is_chunked_alone(headers) {
            return Err(Trouble::AppBroke);
        }
        headers.remove(CONTENT_LENGTH);
    }
    Ok(())
}

fn is_chunked_alone(headers: &HeaderMap) -> bool {
    let mut codings = tokens(headers, &TRANSFER_ENCODING);
    let chunked = codings
        .next()
        .is_some_and(|coding| coding.eq_ignore_ascii_case("chunked"));
    chunked && codings.next().is_none()
}

/// Takes from the trailers of a request what a client may not say in its head either.
pub(crate) fn rewrite_trailers(trailers: &mut HeaderMap) {
    remove_where(trailers, |name| {
        is_hop_by_hop(name) || is_replaced(name) || name == HOST || name == CONTENT_LENGTH
    });
}

/// Makes a client's headers those of the gateway's own request.
pub(crate) fn rewrite_request(
    headers: &mut HeaderMap,
    client: &ClientHeaders,
    request_id: &HeaderValue,
    framing: Framing,
    upgrade: Option<HeaderValue>,
) {
    let trailers = headers.contains_key(TE)
        && tokens(headers, &TE).any(|token| token.eq_ignore_ascii_case("trailers"));
    remove_hop_by_hop(headers, is_replaced);
    if trailers {
        headers.insert(TE, HeaderValue::from_static("trailers"));
    }
    if let Some(protocol) = upgrade {
        headers.insert(UPGRADE, protocol);
        headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
    }
    if framing == Framing::Chunked {
        headers.insert(TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
    }
    if let Some(host) = headers.get(HOST).cloned() {
        headers.insert(X_FORWARDED_HOST, host);
    }
    headers.insert(X_FORWARDED_FOR, client.address.clone());
    headers.insert(X_REAL_IP, client.address.clone());
    headers.insert(X_FORWARDED_PROTO, client.scheme.clone());
    headers.insert(X_REQUEST_ID, request_id.clone());
}

/// Makes an app's headers those of the gateway's own answer.
pub(crate) fn rewrite_answer(headers: &mut HeaderMap, host: &str, request_id: &HeaderValue) {
    remove_hop_by_hop(headers, |_| false);
    if headers.contains_key(SET_COOKIE) {
        narrow_cookies(headers, host);
    }
    headers.insert(X_REQUEST_ID, request_id.clone());
}

/// Headers in which a client could claim to be somebody else, and those that the gateway answers.
/// Servers that speak CGI or WSGI make one variable of `X-Real-IP` and `X_Real_IP`, so a header is
/// known by either spelling.
fn is_replaced(name: &HeaderName) -> bool {
    let dashed;
    let name = if name.as_str().contains('_') {
        dashed = name.as_str().replace('_', "-");
        dashed.as_str()
    } else {
        name.as_str()
    };
    name == FORWARDED.as_str()
        || name == X_REAL_IP.as_str()
        || name == X_REQUEST_ID.as_str()
        || name == PROXY_AUTHORIZATION.as_str()
        || name == EXPECT.as_str()
        || name.starts_with("x-forwarded-")
}

/// Removes what is meant for the next hop only (RFC 9110, 7.6.1), and what `also` names.
fn remove_hop_by_hop(headers: &mut HeaderMap, also: impl Fn(&HeaderName) -> bool) {
    if headers.contains_key(CONNECTION) {
        let named: Vec<HeaderName> = tokens(headers, &CONNECTION)
            .filter_map(|token| HeaderName::try_from(token).ok())
            // These decide where a message goes and where it ends: nobody may have them removed.
            .filter(|name| name != HOST && name != CONTENT_LENGTH)
            .collect();
        for name in named {
            headers.remove(name);
        }
    }
    remove_where(headers, |name| is_hop_by_hop(name) || also(name));
}

/// Most messages have none of what is to go: one walk over the few names there are is cheaper than
/// a look-up of each that there could be.
fn remove_where(headers: &mut HeaderMap, doomed: impl Fn(&HeaderName) -> bool) {
    let names = headers.keys().filter(|name| doomed(name));
    let names: Vec<HeaderName> = names.cloned().collect();
    for name in names {
        headers.remove(name);
    }
}

fn is_hop_by_hop(name: &HeaderName) -> bool {
    matches!(
        name.as_str(),
        "connection"
            | "keep-alive"
            | "proxy-connection"
            | "te"
            | "transfer-encoding"
            | "upgrade"
            | "http2-settings"
    )
}

/// Takes the Domain from every cookie that would reach further than the app's own host, so that
/// it reaches the host alone.
fn narrow_cookies(headers: &mut HeaderMap, host: &str) {
    let wide = |value: &HeaderValue| matches!(narrow(value.as_bytes(), host), Cow::Owned(_));
    if !headers.get_all(SET_COOKIE).iter().any(wide) {
        return;
    }
    let narrowed: Vec<HeaderValue> = headers
        .get_all(SET_COOKIE)
        .iter()
        .filter_map(|value| {
            let bytes = narrow(value.as_bytes(), host).into_owned();
            HeaderValue::from_maybe_shared(Bytes::from(bytes)).ok()
        })
        .collect();
    headers.remove(SET_COOKIE);
    for value in narrowed {
        headers.append(SET_COOKIE, value);
    }
}

fn narrow<'a>(cookie: &'a [u8], host: &str) -> Cow<'a, [u8]> {
    let is_wide = |attribute: &[u8]| {
        let mut parts = attribute.splitn(2, |byte| *byte == b'=');
        let name = parts.next().unwrap_or_default().trim_ascii();
        let value = parts.next().unwrap_or_default().trim_ascii();
        let domain = value.strip_prefix(b".").unwrap_or(value);
        name.eq_ignore_ascii_case(b"domain") && !domain.is_empty() && !is_within(domain, host)
    };
    let mut attributes = cookie.split(|byte| *byte == b';');
    let pair = attributes.next().unwrap_or_default();
    if !attributes.clone().any(is_wide) {
        return Cow::Borrowed(cookie);
    }
    let mut narrowed = pair.to_vec();
    for attribute in attributes.filter(|attribute| !is_wide(attribute)) {
        narrowed.push(b';');
        narrowed.extend_from_slice(attribute);
    }
    Cow::Owned(narrowed)
}

/// Whether `domain` is the host or below it.
fn is_within(domain: &[u8], host: &str) -> bool {
    let host = host.as_bytes();
    let Some(head) = domain.len().checked_sub(host.len()) else {
        return false;
    };
    domain[head..].eq_ignore_ascii_case(host) && (head == 0 || domain[head - 1] == b'.')
}

/// Says on an answer what its wake took.
pub(crate) fn add_timing(headers: &mut HeaderMap, phases: &[Phase], wait_us: u64) {
    use std::fmt::Write as _;
    let mut text = String::new();
    let phases = phases.iter().take(PHASES_MAX);
    let phases = phases.filter(|phase| is_token(&phase.name));
    let named = phases.map(|phase| (phase.name.as_str(), phase.us));
    for (name, us) in named.chain([("wait", wait_us)]) {
        let separator = if text.is_empty() { "" } else { ", " };
        let (ms, rest) = (us / 1_000, us % 1_000);
        if write!(text, "{separator}{name};dur={ms}.{rest:03}").is_err() {
            return;
        }
    }
    if let Ok(value) = HeaderValue::try_from(text) {
        headers.append(SERVER_TIMING, value);
    }
}

fn is_token(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= 64
        && name
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte))
}

#[cfg(test)]
mod tests {
    use super::{host_of, narrow, remove_hop_by_hop, upgrade_of};
    use http::header::{HeaderMap, HeaderValue};
    use http::{HeaderName, Version};

    fn headers(list: &[(&'static str, &'static str)]) -> HeaderMap {
        list.iter()
            .map(|(name, value)| {
                (
                    HeaderName::from_static(name),
                    HeaderValue::from_static(value),
                )
            })
            .collect()
    }

    #[test]
    fn a_host_loses_port_case_and_final_dot() {
        for text in [
            "Notes.Localhost:8080",
            "notes.localhost.",
            "notes.localhost:",
        ] {
            assert_eq!(host_of(text.as_bytes()).unwrap(), "notes.localhost");
        }
        assert_eq!(host_of(b"[::1]:8080").unwrap(), "[::1]");
    }

    #[test]
    fn what_is_no_host_is_refused() {
        for text in [
            "", ":80", "a b", "a/b", "a@b", "a:b", "a:99999", "a:1:2", "a..b", ".a", "a?b", "a#b",
            "a,b", "a%41", "a\u{e9}",
        ] {
            assert!(host_of(text.as_bytes()).is_err(), "{text}");
        }
        assert!(host_of("a".repeat(300).as_bytes()).is_err());
    }

    #[test]
    fn headers_named_in_connection_go_but_never_host_or_length() {
        let mut map = headers(&[
            ("connection", "close, x-mine, Host, content-length"),
            ("x-mine", "1"),
            ("host", "a"),
            ("content-length", "3"),
            ("keep-alive", "timeout=5"),
            ("x-other", "2"),
        ]);
        remove_hop_by_hop(&mut map, |_| false);
        let mut left: Vec<_> = map.keys().map(HeaderName::as_str).collect();
        left.sort_unstable();
        assert_eq!(left, ["content-length", "host", "x-other"]);
    }

    #[test]
    fn a_cookie_for_a_wider_domain_becomes_the_hosts_own() {
        let host = "notes.example.org";
        let narrowed = |text: &str| String::from_utf8(narrow(text.as_bytes(), host).to_vec());
        for (given, left) in [
            ("a=1", "a=1"),
            (
                "a=1; Path=/; Domain=example.org; Secure",
                "a=1; Path=/; Secure",
            ),
            ("a=1; domain=.example.org", "a=1"),
            ("a=1;DOMAIN = org", "a=1"),
            (
                "a=1; Domain=notes.example.org",
                "a=1; Domain=notes.example.org",
            ),
            (
                "a=1; Domain=x.notes.example.org",
                "a=1; Domain=x.notes.example.org",
            ),
            ("a=1; Domain=evilnotes.example.org", "a=1"),
            ("domain=example.org", "domain=example.org"),
        ] {
            assert_eq!(narrowed(given).unwrap(), left, "{given}");
        }
    }

    #[test]
    fn an_upgrade_to_h2c_is_not_let_through() {
        let of = |list| upgrade_of(Version::HTTP_11, &headers(list)).is_some();
        assert!(of(&[
            ("connection", "keep-alive, Upgrade"),
            ("upgrade", "websocket")
        ]));
        assert!(!of(&[("connection", "upgrade"), ("upgrade", "h2c")]));
        assert!(!of(&[
            ("connection", "upgrade"),
            ("upgrade", "websocket, H2C")
        ]));
        assert!(!of(&[("upgrade", "websocket")]));
    }
}
