//! First messages of clients that agree, disagree, hide and mangle.

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
