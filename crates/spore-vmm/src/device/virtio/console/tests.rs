//! The console between a driver and hosts that are slow, gone, or many.

use std::cell::Cell;
use std::collections::VecDeque;
use std::io::{self, Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use proptest::prelude::*;

use super::{
    ACCEPT_AGAIN, CONTROL_RECEIVE, CONTROL_TRANSMIT, Console, Door, F_MULTIPORT, Listener, Peer,
    RECEIVE, Setup, State, Stream, TRANSMIT, event,
};
use crate::clock::tests::Hand;
use crate::device::virtio::driver::Driver;
use crate::device::virtio::queue::QueueFault;
use crate::device::virtio::{Interest, VirtioDevice as _};
use crate::snapshot::Saved as _;
use crate::snapshot::format::{Fields, FormatError};
use crate::snapshot::tests::is_pinned;

/// Hosts that stand before a door.
#[derive(Clone, Debug)]
struct Waiting {
    hosts: Arc<Mutex<VecDeque<UnixStream>>>,
    descriptor: Arc<OwnedFd>,
}

impl Door for Waiting {
    fn descriptor(&self) -> &Arc<OwnedFd> {
        &self.descriptor
    }

    fn accept(&mut self) -> io::Result<Option<Box<dyn Peer>>> {
        let host = self.hosts.lock().unwrap().pop_front();
        host.map(|host| Ok(Box::new(Stream::new(host.into())?) as Box<dyn Peer>))
            .transpose()
    }
}

/// A console with its driver, and the door.
struct Bench {
    console: Console,
    driver: Driver,
    door: Waiting,
    interrupts: Cell<u32>,
}

impl Bench {
    fn new() -> Self {
        let door = Waiting {
            hosts: Arc::default(),
            descriptor: Arc::new(UnixStream::pair().unwrap().0.into()),
        };
        let hand = Box::new(Hand::default());
        let mut console = Console::new("spore.agent", Box::new(door.clone()), hand);
        console.activate(F_MULTIPORT);
        Self {
            console,
            driver: Driver::with_queues(4),
            door,
            interrupts: Cell::new(0),
        }
    }

    /// One whose driver has set the port up, and has a program that has it open.
    fn open() -> Self {
        let mut bench = Self::new();
        assert_eq!(bench.hear(), []);
        bench.say(0, event::DEVICE_READY, 1);
        bench.say(0, event::PORT_READY, 1);
        bench.say(0, event::PORT_OPEN, 1);
        let heard: Vec<u16> = bench.heard().iter().map(|message| message.0).collect();
        assert_eq!(heard, [event::DEVICE_ADD, event::PORT_NAME]);
        bench
    }

    /// One with a host, of which the driver has heard.
    fn connected() -> (Self, UnixStream) {
        let mut bench = Self::open();
        let host = bench.connect();
        bench.ready();
        assert_eq!(bench.hear(), [(event::PORT_OPEN, 1, vec![])]);
        (bench, host)
    }

    fn connect(&self) -> UnixStream {
        let (ours, theirs) = UnixStream::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        self.door.hosts.lock().unwrap().push_back(ours);
        theirs
    }

    fn kick(&mut self, queue: u16) {
        loop {
            let handled = self.console.handle(queue, &mut self.driver.queues());
            let handled = handled.unwrap();
            let raised = u32::from(handled.interrupt);
            self.interrupts.set(self.interrupts.get() + raised);
            if !handled.more {
                break;
            }
        }
    }

    fn ready(&mut self) {
        while self.console.ready(&mut self.driver.queues()).unwrap().more {}
    }

    fn say(&mut self, port: u32, event: u16, value: u16) {
        let mut message = port.to_le_bytes().to_vec();
        message.extend(event.to_le_bytes());
        message.extend(value.to_le_bytes());
        let queue = usize::from(CONTROL_TRANSMIT);
        self.driver
            .send(queue, &[&message[..3], &message[3..]], &[]);
        self.kick(CONTROL_TRANSMIT);
        assert_eq!(self.driver.take(queue).len(), 1);
    }

    /// Gives room for news, and takes it.
    fn hear(&mut self) -> Vec<(u16, u16, Vec<u8>)> {
        let queue = usize::from(CONTROL_RECEIVE);
        while self.driver.free(queue) > 0 {
            self.driver.send(queue, &[], &[64]);
        }
        self.kick(CONTROL_RECEIVE);
        self.heard()
    }

    /// Takes the news that there was room for.
    fn heard(&mut self) -> Vec<(u16, u16, Vec<u8>)> {
        let done = self.driver.take(usize::from(CONTROL_RECEIVE));
        let number = |bytes: &[u8]| u16::from_le_bytes(bytes.try_into().unwrap());
        done.iter()
            .map(|done| done.data())
            .inspect(|bytes| assert_eq!(bytes[..4], [0; 4], "the port"))
            .map(|bytes| {
                (
                    number(&bytes[4..6]),
                    number(&bytes[6..8]),
                    bytes[8..].to_vec(),
                )
            })
            .collect()
    }

    fn send(&mut self, bytes: &[u8]) {
        self.driver.send(usize::from(TRANSMIT), &[bytes], &[]);
        self.kick(TRANSMIT);
    }

    fn room(&mut self, bytes: u32) {
        self.driver.send(usize::from(RECEIVE), &[], &[bytes]);
        self.kick(RECEIVE);
    }

    /// What the guest has received since.
    fn received(&mut self) -> Vec<u8> {
        let done = self.driver.take(usize::from(RECEIVE));
        done.iter().flat_map(|done| done.data().to_vec()).collect()
    }

    fn interest(&self) -> Option<Interest> {
        self.console
            .wants()
            .descriptor
            .map(|(_, interest)| interest)
    }

    fn wants_the_door(&self) -> bool {
        let wanted = self.console.wants().descriptor;
        wanted.is_some_and(|(wanted, _)| Arc::ptr_eq(&wanted, &self.door.descriptor))
    }
}

/// What a host can read now; an error when it is at the end.
fn read(host: &mut UnixStream, most: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; most];
    match host.read(&mut bytes) {
        Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
        Ok(count) => Ok(bytes[..count].to_vec()),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

#[test]
fn a_driver_hears_of_the_port_by_its_name_and_then_of_the_host() {
    let mut bench = Bench::new();
    let mut config = [0xee; 12];
    bench.console.config(0, &mut config);
    assert_eq!(config, [0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    let _host = bench.connect();
    assert_eq!(bench.hear(), []);
    bench.say(0, event::DEVICE_READY, 1);
    assert_eq!(bench.heard(), [(event::DEVICE_ADD, 0, vec![])]);
    bench.say(0, event::PORT_READY, 1);
    let name = b"spore.agent".to_vec();
    assert_eq!(bench.heard(), [(event::PORT_NAME, 1, name)]);
    assert_eq!(bench.interest(), None, "nobody is let in to nobody");
    bench.say(0, event::PORT_OPEN, 1);
    assert_eq!(bench.heard(), [(event::PORT_OPEN, 1, vec![])]);
    assert!(bench.interrupts.get() > 0);
    assert!(!bench.wants_the_door());
    assert_eq!(bench.hear(), []);
}

#[test]
fn bytes_go_both_ways_and_across_buffers() {
    let (mut bench, mut host) = Bench::connected();
    bench.send(b"hello ");
    bench
        .driver
        .send(usize::from(TRANSMIT), &[b"wo", b"", b"rld"], &[]);
    bench.kick(TRANSMIT);
    assert_eq!(read(&mut host, 64).unwrap(), b"hello world");
    host.write_all(b"and back").unwrap();
    bench.driver.send(usize::from(RECEIVE), &[], &[3, 1]);
    bench.room(100);
    assert_eq!(bench.received(), b"and back");
    bench.room(1);
    assert_eq!(bench.interest(), Some(Interest::Read));
}

#[test]
fn a_guest_that_gives_no_room_loses_nothing_and_is_not_asked() {
    let (mut bench, mut host) = Bench::connected();
    assert_eq!(bench.interest(), None);
    host.write_all(b"abc").unwrap();
    bench.ready();
    assert_eq!(bench.interest(), None);
    bench.room(2);
    assert_eq!((bench.received(), bench.interest()), (b"ab".to_vec(), None));
    drop(host);
    bench.room(2);
    bench.room(2);
    assert_eq!(bench.received(), b"c", "and then the end");
    assert_eq!(bench.heard(), [(event::PORT_OPEN, 0, vec![])]);
    assert!(bench.wants_the_door());
}

#[test]
fn a_host_that_does_not_read_loses_nothing_and_is_waited_for() {
    let (mut bench, mut host) = Bench::connected();
    bench.room(8);
    let block: Vec<u8> = (0..=255).cycle().take(30_000).collect();
    let mut sent = 0;
    while bench.interest() == Some(Interest::Read) {
        bench.send(&block);
        bench.driver.take(usize::from(TRANSMIT));
        sent += 1;
        assert!(sent < 1000, "no socket is that large");
    }
    assert_eq!(bench.interest(), Some(Interest::Both));
    bench.send(b"end");
    assert_eq!(bench.driver.take(usize::from(TRANSMIT)), []);
    let mut all = Vec::new();
    while all.len() < sent * block.len() + 3 {
        all.extend(read(&mut host, 5000).unwrap());
        bench.ready();
    }
    let expected = block.iter().copied().cycle().take(block.len());
    let expected: Vec<u8> = std::iter::repeat_n(expected, sent).flatten().collect();
    assert_eq!(&all[..expected.len()], expected);
    assert_eq!(&all[expected.len()..], b"end");
    assert_eq!(bench.interest(), Some(Interest::Read));
    assert_eq!(bench.driver.take(usize::from(TRANSMIT)).len(), 2);
}

#[test]
fn what_is_sent_to_nobody_is_given_back_and_dropped() {
    let mut bench = Bench::open();
    bench.send(b"nobody");
    assert_eq!(bench.driver.take(usize::from(TRANSMIT)).len(), 1);
    let mut host = bench.connect();
    // It comes before the news that somebody is there.
    bench.driver.send(usize::from(TRANSMIT), &[b"early"], &[]);
    bench.ready();
    assert_eq!(bench.heard(), [(event::PORT_OPEN, 1, vec![])]);
    bench.send(b"somebody");
    assert_eq!(read(&mut host, 64).unwrap(), b"somebody");
}

#[test]
fn a_next_host_is_news_even_before_the_last_one_is() {
    let (mut bench, host) = Bench::connected();
    // Without room for news.
    bench.driver = Driver::with_queues(4);
    bench.room(8);
    drop(host);
    let mut next = bench.connect();
    next.write_all(b"next").unwrap();
    bench.ready();
    bench.send(b"to the last");
    assert_eq!(bench.received(), b"");
    let news = bench.hear();
    let expected = [(event::PORT_OPEN, 0, vec![]), (event::PORT_OPEN, 1, vec![])];
    assert_eq!(news, expected);
    bench.ready();
    assert_eq!(bench.received(), b"next");
    bench.send(b"to the next");
    assert_eq!(read(&mut next, 64).unwrap(), b"to the next");
}

#[test]
fn what_a_host_sent_before_it_closed_arrives() {
    let (mut bench, mut host) = Bench::connected();
    host.write_all(b"last words").unwrap();
    drop(host);
    bench.send(b"too late");
    assert_eq!(bench.driver.take(usize::from(TRANSMIT)).len(), 1);
    bench.room(64);
    bench.room(64);
    assert_eq!(bench.received(), b"last words");
    assert_eq!(bench.heard(), [(event::PORT_OPEN, 0, vec![])]);
}

#[test]
fn a_port_that_is_closed_in_the_guest_ends_the_connection() {
    let (mut bench, mut host) = Bench::connected();
    // As the loop does that watches it.
    let _watched = bench
        .console
        .connection
        .as_ref()
        .unwrap()
        .peer
        .descriptor()
        .clone();
    bench.say(0, event::PORT_OPEN, 0);
    assert!(read(&mut host, 1).is_err());
    assert_eq!(bench.heard(), [(event::PORT_OPEN, 0, vec![])]);
    assert_eq!(bench.interest(), None);
    let (mut bench, mut host) = Bench::connected();
    bench.console.reset();
    assert!(read(&mut host, 1).is_err());
    assert_eq!(bench.console.save(), State::default());
}

#[test]
fn a_restored_guest_hears_that_the_last_host_is_gone() {
    let (mut bench, mut host) = Bench::connected();
    // Half of it is with the last host when the machine is saved.
    let state = bench.console.save();
    bench.driver.send(usize::from(TRANSMIT), &[b"stale"], &[]);
    let door = Box::new(bench.door.clone());
    let again = Console::new("spore.agent", door, Box::new(Hand::default())).restore(state);
    let source = std::mem::replace(&mut bench.console, again);
    bench.console.activate(F_MULTIPORT);
    let mut next = bench.connect();
    for queue in [RECEIVE, TRANSMIT, CONTROL_RECEIVE, CONTROL_TRANSMIT] {
        bench.kick(queue);
    }
    let expected = [(event::PORT_OPEN, 0, vec![]), (event::PORT_OPEN, 1, vec![])];
    assert_eq!(bench.heard(), expected);
    assert_eq!(read(&mut host, 1).unwrap(), b"", "the source still has it");
    assert_eq!(read(&mut next, 9).unwrap(), b"");
    drop(source);
    assert!(bench.console.save().told_open);
    bench.send(b"fresh");
    assert_eq!(read(&mut next, 9).unwrap(), b"fresh");
}

#[test]
fn a_saved_port_is_read_as_every_release_wrote_it() {
    for (setup, number) in [
        (Setup::Unknown, 0),
        (Setup::Asked, 1),
        (Setup::Added, 2),
        (Setup::Unnamed, 3),
        (Setup::Ready, 4),
    ] {
        let state = State {
            setup,
            guest_open: true,
            told_open: false,
        };
        is_pinned(&state, 1, &[number, 1, 0]);
    }
    let name = State::get(&mut Fields::new(&[5, 1, 0]));
    assert!(matches!(name, Err(FormatError::Name { value: 5, .. })));
}

#[test]
fn a_driver_without_ports_has_none() {
    let mut bench = Bench::new();
    bench.console.activate(0);
    bench.send(b"x");
    assert_eq!(bench.driver.take(usize::from(TRANSMIT)).len(), 1);
    let message = [0; 8];
    let queue = usize::from(CONTROL_TRANSMIT);
    bench.driver.send(queue, &[&message], &[]);
    bench.kick(CONTROL_TRANSMIT);
    assert_eq!(bench.driver.take(queue), []);
}

#[test]
fn messages_about_other_ports_or_nothing_change_nothing() {
    let mut bench = Bench::open();
    let before = bench.console.save();
    bench.say(1, event::PORT_OPEN, 0);
    bench.say(u32::MAX, event::PORT_READY, 1);
    bench.say(0, 4, 1);
    bench.say(0, u16::MAX, 1);
    assert_eq!(bench.console.save(), before);
}

#[test]
fn requests_that_make_no_sense_end_the_guest() {
    let broken = |queue: u16, readable: &[&[u8]], writable: &[u32]| {
        let (mut bench, _host) = Bench::connected();
        bench.driver = Driver::with_queues(4);
        if queue == CONTROL_RECEIVE {
            bench.console.state.setup = Setup::Unnamed;
        }
        bench.driver.send(usize::from(queue), readable, writable);
        let error = bench.console.handle(queue, &mut bench.driver.queues());
        let error = error.unwrap_err();
        assert_eq!(error.queue, queue);
        assert!(matches!(error.what, QueueFault::Request { .. }));
    };
    broken(CONTROL_TRANSMIT, &[b"1234567"], &[]);
    broken(CONTROL_TRANSMIT, &[], &[8]);
    broken(CONTROL_RECEIVE, &[], &[18]);
    broken(CONTROL_RECEIVE, &[b"x"], &[]);
    broken(RECEIVE, &[b"x"], &[]);
    broken(RECEIVE, &[], &[0]);
}

#[test]
fn a_door_that_fails_is_tried_again_later() {
    #[derive(Debug)]
    struct Broken(Arc<OwnedFd>);
    impl Door for Broken {
        fn descriptor(&self) -> &Arc<OwnedFd> {
            &self.0
        }
        fn accept(&mut self) -> io::Result<Option<Box<dyn Peer>>> {
            Err(io::Error::from_raw_os_error(24))
        }
    }
    let mut bench = Bench::open();
    let hand = Hand::default();
    bench.console.clock = Box::new(hand.clone());
    bench.console.door = Box::new(Broken(bench.door.descriptor.clone()));
    bench.ready();
    let wants = bench.console.wants();
    assert!(wants.descriptor.is_none());
    assert_eq!(wants.at, Some(ACCEPT_AGAIN));
    bench.console.door = Box::new(bench.door.clone());
    let _host = bench.connect();
    bench.ready();
    assert!(bench.console.connection.is_none(), "it is too early");
    hand.0.store(100, Ordering::SeqCst);
    bench.ready();
    assert_eq!(bench.heard(), [(event::PORT_OPEN, 1, vec![])]);
    assert_eq!(bench.console.wants().at, None);
}

#[test]
fn a_listener_lets_in_one_after_the_other_and_never_waits() {
    let name = format!("spore-vmm-console-{}", std::process::id());
    let address = SocketAddr::from_abstract_name(name).unwrap();
    let socket = UnixListener::bind_addr(&address).unwrap();
    let mut door = Listener::new(socket.into()).unwrap();
    assert!(door.accept().unwrap().is_none());
    let mut host = UnixStream::connect_addr(&address).unwrap();
    let mut peer = door.accept().unwrap().unwrap();
    assert!(door.accept().unwrap().is_none());
    let nothing = peer.read(&mut [0]).unwrap_err();
    assert_eq!(nothing.kind(), io::ErrorKind::WouldBlock);
    peer.write_all(b"in").unwrap();
    peer.flush().unwrap();
    let mut bytes = [0; 2];
    host.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"in");
    drop(host);
    assert_eq!(peer.read(&mut bytes).unwrap(), 0);
    let gone = peer.write(b"x").unwrap_err();
    assert_eq!(gone.kind(), io::ErrorKind::BrokenPipe);
}

/// What may happen between a guest and its hosts.
#[derive(Clone, Debug)]
enum Step {
    Room(u32),
    Send(u16),
    News,
    Write(u16),
    Read(u16),
    Reconnect,
    GuestOpen(bool),
    Kick(u16),
    Ready,
    Restore,
}

fn step(with_changes: bool) -> impl Strategy<Value = Step> {
    let changes = u32::from(with_changes);
    prop_oneof![
        4 => (1..9_000_u32).prop_map(Step::Room),
        4 => (0..30_000_u16).prop_map(Step::Send),
        2 => Just(Step::News),
        4 => (1..30_000_u16).prop_map(Step::Write),
        4 => (1..60_000_u16).prop_map(Step::Read),
        changes => Just(Step::Reconnect),
        changes => any::<bool>().prop_map(Step::GuestOpen),
        3 => (0..4_u16).prop_map(Step::Kick),
        3 => Just(Step::Ready),
        changes => Just(Step::Restore),
    ]
}

/// Both sides' view: each connection's bytes are its number, so that they cannot be mixed up.
struct World {
    bench: Bench,
    host: UnixStream,
    /// Number of the host's connection.
    number: u8,
    /// What the guest believes: it hears of a connection, and not of which.
    heard_open: bool,
    /// Bytes that the host wrote in this connection, and that the guest has received of it.
    written: usize,
    received: usize,
    /// Bytes that the guest sent after it heard of this connection, and that the host has read.
    sent: usize,
    read: usize,
}

impl World {
    fn new() -> Self {
        let (mut bench, host) = Bench::connected();
        bench.hear();
        Self {
            bench,
            host,
            number: 1,
            heard_open: true,
            written: 0,
            received: 0,
            sent: 0,
            read: 0,
        }
    }

    /// What the guest sees: news is told before the bytes of the same turn.
    fn look(&mut self) {
        for (event, value, _) in self.bench.heard() {
            assert_eq!(event, event::PORT_OPEN);
            assert_ne!(self.heard_open, value == 1, "0 and 1 take turns");
            self.heard_open = value == 1;
        }
        let bytes = self.bench.received();
        assert!(bytes.iter().all(|byte| *byte == self.number));
        self.received += bytes.len();
        assert!(self.received <= self.written);
        self.bench.driver.take(usize::from(TRANSMIT));
    }

    fn next_host(&mut self) {
        // What is not received yet of the last connection is looked at before it ends.
        self.number += 1;
        (self.written, self.received, self.sent, self.read) = (0, 0, 0, 0);
        // Nothing of the last one is on its way: it had not heard the end.
        self.host = self.bench.connect();
    }

    fn step(&mut self, step: Step) {
        let bench = &mut self.bench;
        match step {
            Step::Room(bytes) if bench.driver.free(0) > 0 => {
                bench.driver.send(0, &[], &[bytes]);
            }
            Step::Send(count) if bench.driver.free(1) > 0 => {
                let bytes = vec![self.number; usize::from(count)];
                bench.driver.send(1, &[&bytes], &[]);
                self.sent += bytes.len();
            }
            Step::News if bench.driver.free(2) > 0 => {
                bench.driver.send(2, &[], &[64]);
            }
            Step::Write(count) => {
                let bytes = vec![self.number; usize::from(count)];
                self.written += self.host.write(&bytes).unwrap_or(0);
            }
            Step::Read(count) => {
                let bytes = read(&mut self.host, usize::from(count)).unwrap_or_default();
                assert!(bytes.iter().all(|byte| *byte == self.number));
                self.read += bytes.len();
                assert!(self.read <= self.sent);
            }
            Step::Kick(queue) => bench.kick(queue),
            Step::Ready => bench.ready(),
            Step::Reconnect => self.reconnect(),
            Step::GuestOpen(open) => {
                bench.say(0, event::PORT_OPEN, u16::from(open));
                self.look();
                if !open {
                    self.reconnect();
                }
            }
            Step::Restore => {
                let door = Box::new(bench.door.clone());
                let hand = Box::new(Hand::default());
                let state = bench.console.save();
                bench.console = Console::new("spore.agent", door, hand).restore(state);
                bench.console.activate(F_MULTIPORT);
                self.reconnect();
            }
            _ => {}
        }
        self.look();
    }

    /// The host goes, all that it wrote arrives, and another comes.
    fn reconnect(&mut self) {
        self.bench.door.hosts.lock().unwrap().clear();
        let (_, unused) = UnixStream::pair().unwrap();
        drop(std::mem::replace(&mut self.host, unused));
        for _ in 0..200 {
            if self.bench.driver.free(0) > 0 {
                self.bench.driver.send(0, &[], &[4096]);
            }
            self.bench.kick(RECEIVE);
            self.bench.hear_later();
            self.look();
        }
        assert!(!self.heard_open);
        self.next_host();
    }

    /// Everything that can move does.
    fn settle(&mut self) {
        for _ in 0..120 {
            for step in [
                Step::Room(4096),
                Step::News,
                Step::Kick(RECEIVE),
                Step::Kick(CONTROL_RECEIVE),
                Step::Ready,
                Step::Read(60_000),
            ] {
                self.step(step);
            }
        }
    }
}

impl Bench {
    /// Gives room for news.
    fn hear_later(&mut self) {
        if self.driver.free(2) > 0 {
            self.driver.send(2, &[], &[64]);
        }
        self.kick(CONTROL_RECEIVE);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn every_byte_arrives_once_and_in_order_whoever_is_slow(
        steps in prop::collection::vec(step(false), 1..60),
    ) {
        let mut world = World::new();
        for step in steps {
            world.step(step);
        }
        world.settle();
        prop_assert_eq!(world.received, world.written);
        prop_assert_eq!(world.read, world.sent);
    }

    #[test]
    fn no_byte_of_a_connection_reaches_another(
        steps in prop::collection::vec(step(true), 1..60),
    ) {
        let mut world = World::new();
        for step in steps {
            world.step(step);
        }
        world.step(Step::GuestOpen(true));
        world.settle();
        prop_assert!(world.heard_open);
        prop_assert_eq!(world.received, world.written);
    }

    #[test]
    fn a_driver_that_says_anything_ends_in_a_fault_or_in_order(
        messages in prop::collection::vec(
            (0..4_usize, prop::collection::vec(0..9_u8, 0..12), prop::option::of(0..70_u32)),
            1..40,
        ),
    ) {
        let (mut bench, mut host) = Bench::connected();
        bench.driver = Driver::with_queues(4);
        host.write_all(&[1; 3000]).unwrap();
        for (queue, bytes, room) in messages {
            if bench.driver.free(queue) < 2 {
                bench.driver.take(queue);
                continue;
            }
            let room: Vec<u32> = room.into_iter().collect();
            bench.driver.send(queue, &[&bytes], &room);
            let number = u16::try_from(queue).unwrap();
            if bench.console.handle(number, &mut bench.driver.queues()).is_err() {
                return Ok(());
            }
            for queue in bench.driver.live.iter().flatten() {
                prop_assert_eq!(queue.in_flight(), 0);
            }
        }
    }
}
