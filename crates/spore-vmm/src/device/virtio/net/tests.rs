//! The network device over a pair of sockets that keep frames apart, and over wires that fail.

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use proptest::prelude::*;
use rustix::net::{AddressFamily, SocketFlags, SocketType};

use super::{
    Counts, FAILED_AGAIN, FRAME_BYTES_MAX, FRAME_BYTES_MIN, FRAMES_MAX, HEADER, HEADER_BYTES, Net,
    RECEIVE, Received, TRANSMIT, Tap, Wire,
};
use crate::clock::tests::Hand;
use crate::device::rate::{Bucket, Limit};
use crate::device::virtio::driver::Driver;
use crate::device::virtio::queue::QueueFault;
use crate::device::virtio::{Interest, VirtioDevice as _};
use crate::snapshot::tests::is_pinned;

const MAC: [u8; 6] = [2, 0x53, 0x50, 0, 0, 2];
const ROOM: u32 = 1600;

fn pair() -> (OwnedFd, OwnedFd) {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let (domain, kind) = (AddressFamily::UNIX, SocketType::SEQPACKET);
    rustix::net::socketpair(domain, kind, flags, None).unwrap()
}

/// A wire in memory, which keeps what it takes.
#[derive(Clone, Debug)]
struct Fake {
    shared: Arc<Mutex<Shared>>,
    descriptor: Arc<OwnedFd>,
}

#[derive(Debug, Default)]
struct Shared {
    coming: VecDeque<Vec<u8>>,
    sent: Vec<Vec<u8>>,
    /// How many more it takes, before it is full.
    room: usize,
    fails: bool,
}

impl Fake {
    fn new() -> Self {
        let shared = Shared {
            room: usize::MAX,
            ..Shared::default()
        };
        Self {
            shared: Arc::new(Mutex::new(shared)),
            descriptor: Arc::new(pair().0),
        }
    }

    fn with<R>(&self, work: impl FnOnce(&mut Shared) -> R) -> R {
        work(&mut self.shared.lock().unwrap())
    }

    fn come(&self, frame: Vec<u8>) {
        self.with(|shared| shared.coming.push_back(frame));
    }
}

impl Wire for Fake {
    fn descriptor(&self) -> &Arc<OwnedFd> {
        &self.descriptor
    }

    fn receive(&mut self, into: &mut [u8]) -> io::Result<Received> {
        self.with(|shared| {
            if shared.fails {
                return Err(io::Error::from_raw_os_error(77));
            }
            let frame = shared.coming.pop_front();
            let frame = frame.ok_or(io::ErrorKind::WouldBlock)?;
            let count = frame.len().min(into.len());
            into[..count].copy_from_slice(&frame[..count]);
            Ok(Received::Frame(count))
        })
    }

    fn send(&mut self, frame: &[u8]) -> io::Result<()> {
        self.with(|shared| {
            if shared.fails {
                return Err(io::Error::from_raw_os_error(5));
            }
            let room = shared.room.checked_sub(1);
            shared.room = room.ok_or(io::ErrorKind::WouldBlock)?;
            shared.sent.push(frame.to_vec());
            Ok(())
        })
    }
}

struct Bench {
    net: Net,
    driver: Driver,
    wire: Fake,
    hand: Hand,
}

impl Bench {
    fn new() -> Self {
        Self::limited(Limit::default(), Limit::default())
    }

    fn limited(receive: Limit, send: Limit) -> Self {
        let (wire, hand) = (Fake::new(), Hand::default());
        let boxed = Box::new(wire.clone());
        let mut net = Net::new(boxed, MAC, receive, send, Box::new(hand.clone()));
        net.activate(0);
        Self {
            net,
            driver: Driver::with_queues(2),
            wire,
            hand,
        }
    }

    fn kick(&mut self, queue: u16) {
        while self
            .net
            .handle(queue, &mut self.driver.queues())
            .unwrap()
            .more
        {}
    }

    fn ready(&mut self) {
        while self.net.ready(&mut self.driver.queues()).unwrap().more {}
    }

    fn send(&mut self, frame: &[u8]) {
        self.driver
            .send(usize::from(TRANSMIT), &[&[0; HEADER_BYTES], frame], &[]);
        self.kick(TRANSMIT);
    }

    fn room(&mut self, bytes: u32) {
        self.driver.send(usize::from(RECEIVE), &[], &[bytes]);
        self.kick(RECEIVE);
    }

    /// Frames that the guest has received since.
    fn received(&mut self) -> Vec<Vec<u8>> {
        let done = self.driver.take(usize::from(RECEIVE));
        done.iter()
            .map(|done| done.data().split_at(HEADER_BYTES))
            .inspect(|(header, _)| assert_eq!(*header, HEADER))
            .map(|(_, frame)| frame.to_vec())
            .collect()
    }

    /// How many of its requests to send came back since.
    fn given_back(&mut self) -> usize {
        self.driver.take(usize::from(TRANSMIT)).len()
    }

    fn sent(&self) -> Vec<Vec<u8>> {
        self.wire.with(|shared| std::mem::take(&mut shared.sent))
    }

    fn interest(&self) -> Option<Interest> {
        self.net.wants().descriptor.map(|(_, interest)| interest)
    }
}

fn frame(number: u8, bytes: usize) -> Vec<u8> {
    vec![number; bytes]
}

#[test]
fn a_driver_finds_its_address_and_the_mtu() {
    let bench = Bench::new();
    let mut config = [0xee; 14];
    bench.net.config(0, &mut config);
    assert_eq!(config[..6], MAC);
    assert_eq!(config[6..], [0, 0, 0, 0, 0xdc, 5, 0, 0]);
    assert_eq!(bench.net.features(), 0b10_1000);
}

#[test]
fn frames_go_both_ways_over_a_tap_with_or_without_a_header() {
    for header in [0, 10, 12] {
        let (ours, host) = pair();
        let mut bench = Bench::new();
        bench.net.wire = Box::new(Tap::new(ours, header).unwrap());
        // What a guest writes as a header, and where it cuts it, is not for the host.
        let wild = [0xff; HEADER_BYTES];
        let sent = [&wild[..5], &wild[5..], &[7; 20], &[8; 30]];
        bench.driver.send(usize::from(TRANSMIT), &sent, &[]);
        bench.kick(TRANSMIT);
        let mut bytes = [0xee; 100];
        let count = rustix::io::read(&host, &mut bytes).unwrap();
        assert_eq!(count, header + 50);
        assert_eq!(bytes[..header], [0; 12][..header]);
        assert_eq!(bytes[header..header + 20], [7; 20]);
        assert_eq!(bytes[header + 20..count], [8; 30]);

        let mut back = vec![0; header];
        back.extend(frame(9, 60));
        if let Some(flags) = back[..header].first_mut() {
            *flags = 2;
        }
        rustix::io::write(&host, &back).unwrap();
        bench
            .driver
            .send(usize::from(RECEIVE), &[], &[5, 7, 1, 1600]);
        bench.kick(RECEIVE);
        assert_eq!(bench.received(), [frame(9, 60)]);
        bench.room(ROOM);
        assert_eq!(bench.interest(), Some(Interest::Read));

        // Unfinished, and shorter than its header.
        for bytes in [
            &[1; 72][..],
            &[0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            &[0; 5],
        ] {
            rustix::io::write(&host, bytes).unwrap();
            bench.hand.0.fetch_add(200, Ordering::SeqCst);
            bench.ready();
            let expected = usize::from(header == 0 && bytes.len() >= FRAME_BYTES_MIN);
            assert_eq!(bench.received().len(), expected, "{header}");
            if expected > 0 {
                bench.room(ROOM);
            }
        }
        drop(host);
        bench.hand.0.fetch_add(200, Ordering::SeqCst);
        bench.ready();
        assert_eq!(bench.interest(), None);
        assert!(bench.net.wants().at.is_some());
    }
    assert!(Tap::new(pair().0, 11).is_err());
}

#[test]
fn a_guest_that_gives_no_room_loses_nothing_and_the_tap_is_not_asked() {
    let mut bench = Bench::new();
    assert_eq!(bench.interest(), None);
    bench.wire.come(frame(1, 60));
    bench.wire.come(frame(2, 60));
    bench.ready();
    assert_eq!(bench.interest(), None);
    bench.room(ROOM);
    assert_eq!(
        (bench.received(), bench.interest()),
        (vec![frame(1, 60)], None)
    );
    bench.room(ROOM);
    bench.room(ROOM);
    assert_eq!(bench.received(), [frame(2, 60)]);
    assert_eq!(bench.interest(), Some(Interest::Read));
    bench.net.reset();
    assert_eq!(bench.interest(), None);
}

#[test]
fn a_full_tap_is_waited_for_and_nothing_is_lost() {
    let mut bench = Bench::new();
    bench.wire.with(|shared| shared.room = 1);
    for number in 1..4 {
        bench.send(&frame(number, 60));
    }
    assert_eq!(bench.given_back(), 1);
    assert_eq!(bench.interest(), Some(Interest::Write));
    bench.room(ROOM);
    assert_eq!(bench.interest(), Some(Interest::Both));
    bench.wire.with(|shared| shared.room = 5);
    bench.ready();
    assert_eq!(bench.given_back(), 2);
    assert_eq!(bench.interest(), Some(Interest::Read));
    assert_eq!(bench.sent(), [frame(1, 60), frame(2, 60), frame(3, 60)]);
}

#[test]
fn frames_of_sizes_that_no_network_has_are_dropped_and_counted() {
    let mut bench = Bench::new();
    let (least, most) = (FRAME_BYTES_MIN, FRAME_BYTES_MAX);
    for bytes in [0, 1, least - 1, most + 1, 30_000, least, most] {
        bench.send(&frame(1, bytes));
        bench.wire.come(frame(1, bytes));
    }
    assert_eq!(bench.given_back(), 7);
    assert_eq!(bench.sent().len(), 2);
    for _ in 0..3 {
        bench.room(ROOM);
    }
    let lengths: Vec<usize> = bench.received().iter().map(Vec::len).collect();
    assert_eq!(lengths, [least, most]);
    // A buffer that is there and too small for what comes.
    bench.wire.come(frame(2, 1500));
    bench.net.reset();
    bench.driver = Driver::with_queues(2);
    bench.room(200);
    bench.wire.come(frame(3, 100));
    bench.ready();
    assert_eq!(bench.received(), [frame(3, 100)]);
    let expected = Counts {
        received: 3,
        sent: 2,
        receive_drops: 6,
        send_drops: 5,
    };
    assert_eq!(bench.net.counts(), expected);
}

#[test]
fn a_wire_that_fails_drops_what_is_sent_and_is_looked_at_later() {
    let mut bench = Bench::new();
    bench.room(ROOM);
    bench.wire.with(|shared| shared.fails = true);
    bench.send(&frame(1, 60));
    bench.ready();
    assert_eq!((bench.given_back(), bench.net.counts().send_drops), (1, 1));
    assert_eq!(bench.interest(), None);
    assert_eq!(bench.net.wants().at, Some(FAILED_AGAIN));
    bench.wire.with(|shared| shared.fails = false);
    bench.wire.come(frame(2, 60));
    bench.ready();
    assert!(bench.received().is_empty(), "it is too early");
    bench.hand.0.store(100, Ordering::SeqCst);
    bench.ready();
    assert_eq!(bench.received(), [frame(2, 60)]);
}

#[test]
fn rates_hold_each_way_and_lose_nothing() {
    let limit = |per_s, most| Limit {
        operations: None,
        bytes: Some(Bucket::new(per_s, most, Duration::ZERO)),
    };
    let mut bench = Bench::limited(limit(1000, 100), limit(2000, 100));
    for number in 1..4 {
        bench.send(&frame(number, 60));
        bench.wire.come(frame(number, 60));
        bench.room(ROOM);
    }
    assert_eq!((bench.given_back(), bench.received().len()), (1, 1));
    assert_eq!(bench.interest(), None, "it waits for its time");
    let ms = Duration::from_millis;
    assert_eq!(bench.net.wants().at, Some(ms(10)));
    bench.hand.0.store(10, Ordering::SeqCst);
    bench.ready();
    assert_eq!((bench.given_back(), bench.received().len()), (1, 0));
    assert_eq!(bench.net.wants().at, Some(ms(20)));
    // A tap that is full takes nothing of the rate.
    bench.wire.with(|shared| shared.room = 0);
    bench.hand.0.store(200, Ordering::SeqCst);
    for _ in 0..5 {
        bench.ready();
    }
    bench.wire.with(|shared| shared.room = 9);
    bench.ready();
    assert_eq!(bench.given_back(), 1);
    assert_eq!(bench.received(), [frame(2, 60)]);
    bench.hand.0.store(400, Ordering::SeqCst);
    bench.ready();
    assert_eq!(bench.received(), [frame(3, 60)]);
    assert_eq!(bench.sent(), [frame(1, 60), frame(2, 60), frame(3, 60)]);
}

#[test]
fn what_is_no_request_ends_the_guest() {
    for (queue, readable, writable) in [
        (TRANSMIT, &[0; HEADER_BYTES - 1][..], &[][..]),
        (TRANSMIT, &[], &[100]),
        (RECEIVE, &[0; 100], &[]),
        (RECEIVE, &[], &[11]),
    ] {
        let mut bench = Bench::new();
        let readable: Vec<&[u8]> = Some(readable)
            .filter(|readable| !readable.is_empty())
            .into_iter()
            .collect();
        let number = usize::from(queue);
        bench.driver.send(number, &readable, writable);
        let error = bench.net.handle(queue, &mut bench.driver.queues());
        let error = error.unwrap_err();
        assert_eq!(error.queue, queue);
        assert!(matches!(error.what, QueueFault::Request { .. }));
    }
}

#[test]
fn a_flood_takes_turns() {
    let mut bench = Bench::new();
    for _ in 0..2 * FRAMES_MAX {
        bench.wire.come(frame(1, 1));
    }
    bench.driver.send(usize::from(RECEIVE), &[], &[ROOM]);
    let handled = bench.net.handle(RECEIVE, &mut bench.driver.queues());
    assert!(handled.unwrap().more);
    bench.kick(RECEIVE);
    assert_eq!(bench.net.counts().receive_drops, u64::from(2 * FRAMES_MAX));
}

#[test]
fn a_guest_is_restored_with_the_address_that_it_knows() {
    let bench = Bench::new();
    let restore = |mac| {
        let (wire, limit) = (Box::new(bench.wire.clone()), Limit::default());
        let hand = Box::new(Hand::default());
        Net::new(wire, mac, limit, limit, hand).restore(bench.net.save())
    };
    assert_eq!(restore(MAC).unwrap().save(), bench.net.save());
    is_pinned(&bench.net.save(), 1, &MAC);
    let error = restore([0; 6]).unwrap_err();
    assert_eq!((error.saved, error.found), (MAC, [0; 6]));
}

#[derive(Clone, Debug)]
enum Step {
    Send(usize),
    Come(usize),
    Room(u32),
    Tap(usize),
    Kick(u16),
    Ready,
    Wait(u64),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0..1700_usize).prop_map(Step::Send),
        4 => (0..1700_usize).prop_map(Step::Come),
        4 => (1_540..1_700_u32).prop_map(Step::Room),
        1 => (0..4_usize).prop_map(Step::Tap),
        2 => (0..2_u16).prop_map(Step::Kick),
        2 => Just(Step::Ready),
        2 => (0..500_u64).prop_map(Step::Wait),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn every_frame_of_a_possible_size_arrives_once_and_in_order(
        steps in prop::collection::vec(step(), 1..80),
    ) {
        let limit = Limit {
            operations: Some(Bucket::new(100, 4, Duration::ZERO)),
            bytes: Some(Bucket::new(10_000, 3_000, Duration::ZERO)),
        };
        let mut bench = Bench::limited(limit, limit);
        let possible = FRAME_BYTES_MIN..=FRAME_BYTES_MAX;
        let (mut sent, mut came) = (Vec::new(), Vec::new());
        let (mut left, mut received) = (Vec::new(), Vec::new());
        let mut number = 0_u8;
        let end = [Step::Tap(99), Step::Wait(9_000), Step::Room(1_600), Step::Ready];
        let end = std::iter::repeat_n(end, 200).flatten();
        for step in steps.into_iter().chain(end) {
            number = number.wrapping_add(1);
            match step {
                Step::Send(bytes) if bench.driver.free(1) >= 2 => {
                    let frame = frame(number, bytes);
                    bench.driver.send(1, &[&[0; HEADER_BYTES], &frame], &[]);
                    sent.extend(Some(frame).filter(|_| possible.contains(&bytes)));
                }
                Step::Come(bytes) => {
                    bench.wire.come(frame(number, bytes));
                    let frame = Some(frame(number, bytes));
                    came.extend(frame.filter(|_| possible.contains(&bytes)));
                }
                Step::Room(bytes) if bench.driver.free(0) > 0 => {
                    bench.driver.send(0, &[], &[bytes]);
                }
                Step::Tap(room) => bench.wire.with(|shared| shared.room = room),
                Step::Kick(queue) => bench.kick(queue),
                Step::Ready => bench.ready(),
                Step::Wait(ms) => {
                    bench.hand.0.fetch_add(ms, Ordering::SeqCst);
                }
                Step::Send(_) | Step::Room(_) => {}
            }
            for queue in bench.driver.live.iter().flatten() {
                prop_assert_eq!(queue.in_flight(), 0);
            }
            bench.given_back();
            left.extend(bench.sent());
            received.extend(bench.received());
        }
        prop_assert_eq!(left, sent);
        prop_assert_eq!(received, came);
    }

    #[test]
    fn any_chain_ends_in_a_fault_or_in_order(
        chains in prop::collection::vec(
            (0..2_usize, 0..1700_usize, prop::option::of(0..2000_u32)),
            1..30,
        ),
    ) {
        let mut bench = Bench::new();
        for (queue, bytes, room) in chains {
            if bench.driver.free(queue) < 2 {
                bench.driver.take(queue);
                continue;
            }
            bench.wire.come(frame(1, bytes));
            let room: Vec<u32> = room.into_iter().collect();
            bench.driver.send(queue, &[&frame(2, bytes)], &room);
            let number = u16::try_from(queue).unwrap();
            let handled = bench.net.handle(number, &mut bench.driver.queues());
            if handled.is_err() {
                return Ok(());
            }
            for queue in bench.driver.live.iter().flatten() {
                prop_assert_eq!(queue.in_flight(), 0);
            }
        }
    }
}
