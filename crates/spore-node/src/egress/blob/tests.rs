//! Blobs that pass and blobs that do not.

use std::net::Ipv4Addr;

use spore_wire::egress::{EgressBlob, Grant, GrantTarget};
use spore_wire::generation::GENERATION;
use spore_wire::id::VmId;

use super::{BlobError, check, is_host_name, read};

fn name(name: &str) -> Grant {
    Grant {
        to: GrantTarget::Name {
            name: name.to_owned(),
        },
        port: 443,
    }
}

fn address(address: [u8; 4], port: u16) -> Grant {
    Grant {
        to: GrantTarget::Address {
            address: Ipv4Addr::from(address),
        },
        port,
    }
}

fn blob(grants: Vec<Grant>) -> EgressBlob {
    EgressBlob {
        generation: GENERATION,
        vm: VmId::from_bytes([7; 16]),
        grants,
        resolvers: vec!["127.0.0.53:53".parse().unwrap()],
        host_addresses: vec!["192.168.1.2".parse().unwrap()],
        connections_max: 64,
    }
}

#[test]
fn a_good_blob_passes_unchanged() {
    let good = blob(vec![name("api.example.com"), address([10, 20, 0, 5], 5432)]);
    let json = serde_json::to_vec(&good).unwrap();
    assert_eq!(read(json.as_slice()).unwrap(), good);
}

#[test]
fn nothing_half_right_passes() {
    let refused = [
        blob(vec![]),
        blob(vec![name("a.example"); 65]),
        blob(vec![name("A.example")]),
        blob(vec![name("*.example.com")]),
        blob(vec![name("127.0.0.1")]),
        blob(vec![address([10, 0, 0, 1], 0)]),
        blob(vec![address([0, 0, 0, 0], 80)]),
        blob(vec![address([224, 0, 0, 1], 80)]),
        blob(vec![address([255, 255, 255, 255], 80)]),
        blob(vec![address([10, 42, 0, 1], 3128)]),
        EgressBlob {
            generation: GENERATION + 1,
            ..blob(vec![name("a.example")])
        },
        EgressBlob {
            generation: 0,
            ..blob(vec![name("a.example")])
        },
        EgressBlob {
            resolvers: vec![],
            ..blob(vec![name("a.example")])
        },
        EgressBlob {
            connections_max: 0,
            ..blob(vec![name("a.example")])
        },
        EgressBlob {
            connections_max: 5000,
            ..blob(vec![name("a.example")])
        },
    ];
    for blob in refused {
        assert!(check(&blob).is_err(), "{blob:?}");
    }
    let mut dead = blob(vec![name("a.example")]);
    dead.resolvers = vec!["0.0.0.0:53".parse().unwrap()];
    assert!(matches!(check(&dead), Err(BlobError::Resolver(_))));
}

#[test]
fn address_grants_need_no_resolver() {
    let alone = EgressBlob {
        resolvers: vec![],
        ..blob(vec![address([10, 0, 0, 5], 80)])
    };
    assert!(check(&alone).is_ok());
    // A guest's loopback and the proxy's are not the same.
    assert!(check(&blob(vec![address([127, 0, 0, 1], 80)])).is_err());
}

#[test]
fn a_blob_that_never_ends_is_refused() {
    let endless = std::io::repeat(b' ');
    assert!(matches!(read(endless), Err(BlobError::TooLong)));
    assert!(matches!(read(&b"{}"[..]), Err(BlobError::Decode(_))));
    assert!(matches!(read(&b""[..]), Err(BlobError::Decode(_))));
}

#[test]
fn host_names_are_the_plain_kind() {
    let long = format!("{}.example", "a".repeat(63));
    for good in ["a.b", "api.anthropic.com", "x-1.y2.z", "_a_b.c", &long] {
        assert!(is_host_name(good), "{good}");
    }
    let too_long = format!("{}.example", "a".repeat(64));
    for bad in [
        "", ".", "a", "a.", ".a", "a..b", "-a.b", "a-.b", "a b.c", "ä.b", &too_long,
    ] {
        assert!(!is_host_name(bad), "{bad}");
    }
    assert!(!is_host_name("1.2.3.4"));
    assert!(!is_host_name("10.1"));
    assert!(!is_host_name("a.b."));
}
