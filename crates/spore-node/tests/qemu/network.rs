//! What passes in a VM's namespace. The test holds the tap in the VMM's place, so it sees and says
//! exactly what a guest could.

use std::fs::File;
use std::io::{Read, Write};
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use spore_node::hypervisor::PolicyError;
use spore_node::net::policy::Policy;
use spore_node::net::tap::{GUEST_MAC, HOST_MAC};
use tokio::time::timeout;

use crate::driver::Driver;
use crate::guest::Then;
use crate::host::{HANG, TestHost, new_id};

const HOST: Ipv4Addr = Ipv4Addr::new(10, 42, 0, 1);
const GUEST: Ipv4Addr = Ipv4Addr::new(10, 42, 0, 2);

/// How long what must come may take.
const PATIENCE_S: i64 = 60;

/// How long nothing comes where nothing may.
const SILENCE_S: i64 = 1;

/// Every frame on the tap has this header in front (`IFF_VNET_HDR`).
const VNET_HEADER: usize = 10;

const SYN: u8 = 0x02;
const ACK: u8 = 0x10;
const RST: u8 = 0x04;

/// A tap, held as a VMM holds it.
struct Tap(File);

/// A TCP segment, as far as these tests look at it.
#[derive(Debug, PartialEq, Eq)]
struct Segment {
    from: (Ipv4Addr, u16),
    to: (Ipv4Addr, u16),
    flags: u8,
    sequence: u32,
}

impl Tap {
    async fn open(driver: &Driver, namespace: &str) -> Self {
        let fd: OwnedFd = driver
            .rooms()
            .namespaces()
            .open_tap(namespace)
            .await
            .unwrap();
        Self(File::from(fd))
    }

    /// The next TCP segment, which comes.
    fn receive(&mut self) -> Segment {
        self.receive_within(PATIENCE_S).unwrap()
    }

    /// The next TCP segment, or `None` when none comes for so long.
    fn receive_within(&mut self, seconds: i64) -> Option<Segment> {
        loop {
            let mut waited = [PollFd::new(&self.0, PollFlags::IN)];
            let wait = Timespec {
                tv_sec: seconds,
                tv_nsec: 0,
            };
            if poll(&mut waited, Some(&wait)).unwrap() == 0 {
                return None;
            }
            let mut frame = vec![0; 4096];
            let len = self.0.read(&mut frame).ok()?;
            if let Some(segment) = parse(&frame[VNET_HEADER..len]) {
                return Some(segment);
            }
        }
    }

    fn send(&mut self, segment: &Segment) -> std::io::Result<()> {
        let mut frame = vec![0; VNET_HEADER];
        frame.extend_from_slice(&HOST_MAC);
        frame.extend_from_slice(&GUEST_MAC);
        frame.extend_from_slice(&[8, 0]);
        frame.extend_from_slice(&packet(segment));
        self.0.write_all(&frame)
    }
}

fn parse(frame: &[u8]) -> Option<Segment> {
    let packet = frame
        .strip_prefix(&GUEST_MAC[..])?
        .get(6..)?
        .strip_prefix(&[8, 0])?;
    let address = |at: usize| <[u8; 4]>::try_from(packet.get(at..at + 4)?).ok();
    let port = |at: usize| Some(u16::from_be_bytes([*packet.get(at)?, *packet.get(at + 1)?]));
    (packet.get(9) == Some(&6)).then_some(())?;
    Some(Segment {
        from: (address(12)?.into(), port(20)?),
        to: (address(16)?.into(), port(22)?),
        sequence: u32::from_be_bytes(address(24)?),
        flags: *packet.get(33)?,
    })
}

fn packet(segment: &Segment) -> Vec<u8> {
    let (from, to) = (segment.from.0.octets(), segment.to.0.octets());
    let mut tcp = Vec::new();
    tcp.extend_from_slice(&segment.from.1.to_be_bytes());
    tcp.extend_from_slice(&segment.to.1.to_be_bytes());
    tcp.extend_from_slice(&segment.sequence.to_be_bytes());
    tcp.extend_from_slice(&[0, 0, 0, 0, 0x50, segment.flags, 0xff, 0xff, 0, 0, 0, 0]);
    let pseudo = [&from[..], &to, &[0, 6, 0, 20], &tcp].concat();
    tcp[16..18].copy_from_slice(&checksum(&pseudo).to_be_bytes());
    let mut ip = vec![0x45, 0, 0, 40, 0, 1, 0, 0, 64, 6, 0, 0];
    ip.extend_from_slice(&from);
    ip.extend_from_slice(&to);
    let sum = checksum(&ip);
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    ip.extend_from_slice(&tcp);
    ip
}

fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1]));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap()
}

fn syn_to(to: (Ipv4Addr, u16)) -> Segment {
    Segment {
        from: (GUEST, 40_000),
        to,
        flags: SYN,
        sequence: 7,
    }
}

/// A namespace of its own, outside the pool.
async fn namespace(driver: &Driver) -> &'static str {
    driver.rooms().namespaces().make("mine").await.unwrap();
    "mine"
}

#[tokio::test(flavor = "multi_thread")]
async fn no_packet_passes_before_the_network_is_opened() {
    let Some(host) = TestHost::new(Then::Wait) else {
        return;
    };
    let driver = host.driver().await;
    let name = namespace(&driver).await;
    let mut tap = Tap::open(&driver, name).await;
    assert!(tap.send(&syn_to((HOST, 3128))).is_err());
    let namespaces = driver.rooms().namespaces();
    let refused = timeout(HANG, namespaces.connect(name, 80)).await.unwrap();
    assert!(refused.is_err());
    assert_eq!(tap.receive_within(SILENCE_S), None);

    namespaces.open_policy(name, Policy::Open).await.unwrap();
    let connecting = {
        let namespaces = namespaces.clone();
        tokio::spawn(async move { namespaces.connect(name, 80).await })
    };
    let syn = tokio::task::block_in_place(|| tap.receive());
    assert_eq!(
        (syn.from.0, syn.to, syn.flags),
        (HOST, (GUEST, 80), SYN | 0xc0 & syn.flags)
    );
    connecting.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_reaches_nothing_and_with_a_grant_only_the_proxy() {
    let Some(host) = TestHost::new(Then::Wait) else {
        return;
    };
    let driver = host.driver().await;
    let name = namespace(&driver).await;
    let namespaces = driver.rooms().namespaces();
    let mut tap = Tap::open(&driver, name).await;
    let sockets = namespaces.proxy_sockets(name).await.unwrap();
    let elsewhere = (Ipv4Addr::new(93, 184, 216, 34), 443);
    namespaces.open_policy(name, Policy::Open).await.unwrap();
    for to in [
        (HOST, 3128),
        (HOST, 22),
        elsewhere,
        (Ipv4Addr::new(169, 254, 169, 254), 80),
    ] {
        tap.send(&syn_to(to)).unwrap();
        assert_eq!(
            tokio::task::block_in_place(|| tap.receive_within(SILENCE_S)),
            None,
            "{to:?}"
        );
    }
    drop((tap, sockets));

    namespaces.make("granted").await.unwrap();
    let mut tap = Tap::open(&driver, "granted").await;
    let sockets = namespaces.proxy_sockets("granted").await.unwrap();
    namespaces
        .open_policy("granted", Policy::OpenWithEgress)
        .await
        .unwrap();
    tap.send(&syn_to(elsewhere)).unwrap();
    let answer = tokio::task::block_in_place(|| tap.receive());
    assert_eq!(
        (answer.from, answer.to.0, answer.flags),
        (elsewhere, GUEST, SYN | ACK)
    );
    let another = Segment {
        from: (Ipv4Addr::new(10, 42, 0, 3), 40_001),
        ..syn_to(elsewhere)
    };
    tap.send(&another).unwrap();
    let answers = tokio::task::block_in_place(|| tap.receive_within(SILENCE_S));
    // The first answer may come again; nothing is said to the address that is not the guest's.
    assert!(answers.is_none_or(|segment| segment.to == (GUEST, 40_000)));
    drop(sockets);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_driver_that_closes_while_namespaces_are_made_leaves_none() {
    let Some(host) = TestHost::new(Then::Wait) else {
        return;
    };
    // From before the first one is begun to after the last one is ready.
    for wait_ms in (0..60).step_by(6) {
        let driver = host.driver().await;
        tokio::time::sleep(std::time::Duration::from_millis(wait_ms)).await;
        driver.close().unwrap();
        let none = Vec::<String>::new();
        assert_eq!(host.namespaces(), none, "closed after {wait_ms} ms");
        let machine = host.machine();
        let refused = driver.prepare(new_id(), &machine).await;
        assert!(refused.is_err(), "{refused:?}");
        driver
            .sweep(&std::collections::BTreeSet::new())
            .await
            .unwrap();
        assert_eq!(host.namespaces(), none, "closed after {wait_ms} ms");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_rule_is_noticed() {
    let Some(host) = TestHost::new(Then::Wait) else {
        return;
    };
    let driver = host.driver().await;
    let name = namespace(&driver).await;
    let namespaces = driver.rooms().namespaces();
    namespaces
        .open_policy(name, Policy::OpenWithEgress)
        .await
        .unwrap();
    namespaces
        .open_policy(name, Policy::OpenWithEgress)
        .await
        .unwrap();
    let path = namespaces.folder().join(name);
    nft(&path, &["flush", "chain", "inet", "spore", "prerouting"]);
    let differs = namespaces
        .open_policy(name, Policy::OpenWithEgress)
        .await
        .unwrap_err();
    assert!(matches!(differs, PolicyError::Differs(_)), "{differs}");
    nft(&path, &["flush", "ruleset"]);
    let differs = namespaces
        .open_policy(name, Policy::Open)
        .await
        .unwrap_err();
    assert!(matches!(differs, PolicyError::Differs(_)), "{differs}");
}

fn nft(namespace: &Path, arguments: &[&str]) {
    let status = std::process::Command::new("nsenter")
        .arg(format!("--net={}", namespace.display()))
        .arg("nft")
        .args(arguments)
        .status()
        .unwrap();
    assert!(status.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_namespace_has_one_tap_no_route_out_no_ip_v6_and_no_forwarding() {
    let Some(host) = TestHost::new(Then::Wait) else {
        return;
    };
    let driver = host.driver().await;
    let name = namespace(&driver).await;
    let namespaces = driver.rooms().namespaces();
    namespaces.open_policy(name, Policy::Open).await.unwrap();
    let path = namespaces.folder().join(name);
    let look = |arguments: &[&str]| {
        let output = std::process::Command::new("nsenter")
            .arg(format!("--net={}", path.display()))
            .args(arguments)
            .output()
            .unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    let links = look(&["ip", "-o", "link"]);
    assert_eq!(links.lines().count(), 2, "{links}");
    assert!(links.contains("link/ether 02:53:50:00:00:01"), "{links}");
    let routes = look(&["ip", "route"]);
    assert_eq!(routes.lines().count(), 1, "{routes}");
    assert!(routes.starts_with("10.42.0.0/30 dev tap0"), "{routes}");
    let neighbours = look(&["ip", "neigh"]);
    assert!(neighbours.contains("10.42.0.2 dev tap0 lladdr 02:53:50:00:00:02 PERMANENT"));
    assert_eq!(look(&["cat", "/proc/sys/net/ipv4/ip_forward"]).trim(), "0");
    assert_eq!(look(&["ip", "-6", "address"]), "");
}

#[test]
fn a_reset_is_told_from_a_greeting() {
    let segment = Segment {
        from: (HOST, 1),
        to: (GUEST, 2),
        flags: RST,
        sequence: 3,
    };
    let mut frame = [GUEST_MAC, HOST_MAC].concat();
    frame.extend_from_slice(&[8, 0]);
    frame.extend_from_slice(&packet(&segment));
    assert_eq!(parse(&frame), Some(segment));
}
