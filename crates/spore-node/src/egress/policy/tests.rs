//! What is dialled, and what never is, by example and by property.

use std::net::{IpAddr, Ipv4Addr, SocketAddrV4};
use std::time::Duration;

use proptest::prelude::{Just, Strategy, any, prop_oneof, proptest};
use proptest::{collection, prop_assert, prop_assert_eq};
use spore_wire::egress::{Grant, GrantTarget};

use super::{ADDRESSES_PER_NAME_MAX, ADMITTED_MIN, Admitted, Policy, Standing, Verdict, is_public};

const PUBLIC: Ipv4Addr = Ipv4Addr::new(8, 8, 4, 4);

fn by_name(name: &str, port: u16) -> Grant {
    Grant {
        to: GrantTarget::Name {
            name: name.to_owned(),
        },
        port,
    }
}

fn by_address(address: Ipv4Addr, port: u16) -> Grant {
    Grant {
        to: GrantTarget::Address { address },
        port,
    }
}

fn secs(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

#[test]
fn special_addresses_are_not_public() {
    let special = [
        "0.0.0.0",
        "0.1.2.3",
        "10.0.0.1",
        "10.255.255.255",
        "100.64.0.1",
        "100.100.100.200",
        "100.127.255.255",
        "127.0.0.1",
        "127.255.0.1",
        "168.63.129.16",
        "169.254.169.254",
        "172.16.0.1",
        "172.31.255.255",
        "192.0.0.192",
        "192.0.2.1",
        "192.168.0.1",
        "198.18.0.1",
        "198.19.255.255",
        "198.51.100.1",
        "203.0.113.9",
        "224.0.0.1",
        "239.1.1.1",
        "240.0.0.1",
        "255.255.255.255",
    ];
    for address in special {
        assert!(!is_public(address.parse().unwrap()), "{address}");
    }
    let ordinary = [
        "1.1.1.1",
        "8.8.8.8",
        "9.255.255.255",
        "11.0.0.0",
        "100.63.255.255",
        "100.128.0.0",
        "126.255.255.255",
        "128.0.0.0",
        "168.63.129.15",
        "169.253.255.255",
        "169.255.0.0",
        "172.15.255.255",
        "172.32.0.0",
        "192.167.255.255",
        "192.169.0.0",
        "198.17.255.255",
        "198.20.0.0",
        "223.255.255.255",
    ];
    for address in ordinary {
        assert!(is_public(address.parse().unwrap()), "{address}");
    }
}

#[test]
fn a_granted_name_is_dialled_only_after_its_address_was_handed_out() {
    let policy = Policy::new(&[by_name("api.example.com", 443)], &[]);
    let index = policy.indices().next().unwrap();
    let to = SocketAddrV4::new(PUBLIC, 443);
    let mut admitted = Admitted::default();
    assert_eq!(policy.decide(to, &admitted, secs(0)), Verdict::Refused);
    admitted.record(index, &[PUBLIC], secs(60), secs(0));
    assert_eq!(
        policy.decide(to, &admitted, secs(59)),
        Verdict::Names(vec![index])
    );
    assert_eq!(policy.decide(to, &admitted, secs(60)), Verdict::Refused);
    let other_port = SocketAddrV4::new(PUBLIC, 80);
    assert_eq!(
        policy.decide(other_port, &admitted, secs(1)),
        Verdict::Refused
    );
}

#[test]
fn a_short_lifetime_is_stretched_and_never_shortens_an_earlier_one() {
    let policy = Policy::new(&[by_name("a.example", 1)], &[]);
    let index = policy.indices().next().unwrap();
    let mut admitted = Admitted::default();
    admitted.record(index, &[PUBLIC], secs(300), secs(0));
    admitted.record(index, &[PUBLIC], secs(0), secs(10));
    let to = SocketAddrV4::new(PUBLIC, 1);
    assert_eq!(
        policy.decide(to, &admitted, secs(299)),
        Verdict::Names(vec![index])
    );
    let mut short = Admitted::default();
    short.record(index, &[PUBLIC], secs(1), secs(0));
    let last = ADMITTED_MIN - secs(1);
    assert_eq!(policy.decide(to, &short, last), Verdict::Names(vec![index]));
}

#[test]
fn the_hosts_own_addresses_need_a_grant_by_address() {
    let mapped = IpAddr::V6(PUBLIC.to_ipv6_mapped());
    let policy = Policy::new(&[by_name("a.example", 1)], &[mapped]);
    assert!(!policy.is_reachable_by_name(PUBLIC));
    let granted = Policy::new(&[by_address(PUBLIC, 1)], &[mapped]);
    let to = SocketAddrV4::new(PUBLIC, 1);
    assert_eq!(
        granted.decide(to, &Admitted::default(), secs(0)),
        Verdict::Address
    );
}

#[test]
fn a_names_ancestors_exist_and_its_neighbours_do_not() {
    let policy = Policy::new(&[by_name("api.example.com", 443)], &[]);
    assert!(matches!(
        policy.standing("api.example.com"),
        Standing::Granted(_)
    ));
    for above in ["example.com", "com", ""] {
        assert_eq!(policy.standing(above), Standing::Ancestor, "{above}");
    }
    for unknown in [
        "ple.com",
        "www.example.com",
        "x.api.example.com",
        "api.example.co",
    ] {
        assert_eq!(policy.standing(unknown), Standing::Unknown, "{unknown}");
    }
}

/// Addresses from a small set, so that grants, answers and connections meet often.
fn address() -> impl Strategy<Value = Ipv4Addr> {
    prop_oneof![
        Just(Ipv4Addr::new(127, 0, 0, 1)),
        Just(Ipv4Addr::new(169, 254, 169, 254)),
        Just(Ipv4Addr::new(10, 20, 0, 5)),
        Just(Ipv4Addr::new(8, 8, 4, 4)),
        Just(Ipv4Addr::new(1, 1, 1, 1)),
        any::<u32>().prop_map(Ipv4Addr::from_bits),
    ]
}

fn grant() -> impl Strategy<Value = Grant> {
    let port = 440_u16..444;
    prop_oneof![
        (address(), port.clone()).prop_map(|(address, port)| by_address(address, port)),
        (0_u8..4, port).prop_map(|(n, port)| by_name(&format!("n{n}.example"), port)),
    ]
}

proptest! {
    #[test]
    fn an_address_is_dialled_only_if_a_grant_led_to_it(
        grants in collection::vec(grant(), 0..8),
        host in address(),
        answers in collection::vec((0_usize..8, address(), 0_u64..200, 0_u64..100), 0..12),
        to in address(),
        port in 439_u16..445,
        now in 100_u64..400,
    ) {
        let policy = Policy::new(&grants, &[IpAddr::V4(host)]);
        let mut admitted = Admitted::default();
        let mut handed = Vec::new();
        for (name, address, lifetime, at) in answers {
            let Some(index) = policy.indices().nth(name) else { continue };
            admitted.record(index, &[address], secs(lifetime), secs(at));
            let until = at + lifetime.max(ADMITTED_MIN.as_secs());
            handed.push((policy.name(index).unwrap().to_owned(), address, until));
        }
        let by_address = grants.contains(&by_address(to, port));
        let names = grants
            .iter()
            .filter_map(|grant| match &grant.to {
                GrantTarget::Name { name } if grant.port == port => Some(name),
                _ => None,
            })
            .filter(|granted| {
                handed.iter().any(|(name, a, until)| name == *granted && *a == to && *until > now)
            })
            .collect::<std::collections::BTreeSet<_>>();
        let verdict = policy.decide(SocketAddrV4::new(to, port), &admitted, secs(now));
        match verdict {
            Verdict::Address => prop_assert!(by_address),
            Verdict::Names(found) => {
                prop_assert!(!by_address && is_public(to) && to != host);
                let found = found
                    .into_iter()
                    .map(|index| policy.name(index).unwrap().to_owned())
                    .collect::<std::collections::BTreeSet<_>>();
                prop_assert!(found.iter().eq(names.into_iter()));
            }
            Verdict::Refused => {
                prop_assert!(!by_address);
                prop_assert!(names.is_empty() || !is_public(to) || to == host);
            }
        }
    }

    #[test]
    fn a_refused_net_is_never_dialled_by_name(bits in any::<u32>(), port in 1_u16..) {
        let policy = Policy::new(&[by_name("a.example", port)], &[]);
        let index = policy.indices().next().unwrap();
        let address = Ipv4Addr::from_bits(bits);
        let mut admitted = Admitted::default();
        admitted.record(index, &[address], secs(100), secs(0));
        let verdict = policy.decide(SocketAddrV4::new(address, port), &admitted, secs(1));
        prop_assert_eq!(verdict == Verdict::Refused, !is_public(address));
        let special = address.is_private() || address.is_loopback() || address.is_link_local()
            || address.is_multicast() || address.is_broadcast() || address.is_unspecified()
            || address.is_documentation();
        prop_assert!(!(special && is_public(address)));
    }

    #[test]
    fn the_table_of_addresses_is_bounded(
        addresses in collection::vec(any::<u32>(), 0..300), lifetime in any::<u64>(),
    ) {
        let policy = Policy::new(&[by_name("a.example", 1)], &[]);
        let index = policy.indices().next().unwrap();
        let mut admitted = Admitted::default();
        for bits in addresses {
            admitted.record(index, &[Ipv4Addr::from_bits(bits)], secs(lifetime), secs(0));
        }
        let held = admitted.names.iter().map(Vec::len).sum::<usize>();
        prop_assert!(held <= ADDRESSES_PER_NAME_MAX);
    }
}
