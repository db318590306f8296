//! Each device behind its transport: driven as a machine drives it, saved and gone on with.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use proptest::prelude::*;
use rustix::net::{AddressFamily, SocketFlags, SocketType};

use super::blk::Blk;
use super::console::{Console, Listener};
use super::driver::Driver;
use super::mmio::Mmio;
use super::net::{Net, Tap};
use super::queue::QueueFault;
use super::rng::Rng;
use super::{Driven, VirtioDevice, rng};
use crate::clock::tests::Hand;
use crate::device::Interrupt;
use crate::device::rate::{Bucket, Limit};
use crate::disk::tests::file;
use crate::disk::{Access, Raw};
use crate::memory::Gpa;

const MAC: [u8; 6] = [2, 0x53, 0x50, 0, 0, 2];

#[derive(Debug, Default)]
struct Line(AtomicU64);

impl Interrupt for Line {
    fn raise(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

impl Line {
    /// How often it was raised since.
    fn take(&self) -> u64 {
        self.0.swap(0, Ordering::SeqCst)
    }
}

fn hand() -> Box<Hand> {
    Box::new(Hand::default())
}

/// A device whose driver is ready and has taken all that it offers.
fn live<D: VirtioDevice>(device: D, driver: &Driver, line: &Arc<Line>) -> Mmio<D> {
    let state = driver.transport(device.features());
    Mmio::restore(&state, device, driver.memory.clone(), line.clone()).unwrap()
}

/// The same device in another process: its transport and what is made of the device's state.
fn again<D: VirtioDevice>(
    source: &Mmio<D>,
    driver: &Driver,
    line: &Arc<Line>,
    restore: impl FnOnce(&mut D) -> D,
) -> Mmio<D> {
    let (state, device) = (source.save(), source.with(restore));
    for queue in &state.queues {
        assert_eq!(queue.next_available, queue.next_used, "none is in flight");
    }
    let again = Mmio::restore(&state, device, driver.memory.clone(), line.clone()).unwrap();
    assert_eq!(again.save(), state);
    again
}

#[test]
fn a_disk_goes_on_with_what_was_asked_and_not_heard() {
    let (line, mut driver) = (Arc::new(Line::default()), Driver::new());
    let slow = Limit {
        operations: Some(Bucket::new(1, 1, Duration::ZERO)),
        bytes: None,
    };
    let disk = || Box::new(Raw::new(file(4096).0, Access::ReadWrite).unwrap());
    let blk = live(Blk::new(disk(), "image", slow, hand()), &driver, &line);
    let header = [0; 16];
    for _ in 0..3 {
        driver.send(0, &[&header], &[512, 1]);
    }
    assert_eq!(blk.handle(0), Ok(false));
    assert_eq!((line.take(), driver.take(0).len()), (1, 1));
    assert_eq!(blk.wants().at, Some(Duration::from_secs(1)));
    // The interrupt may be lost, and two requests wait for their time.
    let again = again(&blk, &driver, &line, |blk| {
        let again = Blk::new(disk(), "image", Limit::default(), hand());
        again.restore(blk.save()).unwrap()
    });
    assert_eq!(again.resume(), Ok(vec![]));
    assert_eq!(line.take(), 2, "for what was done, and once anyway");
    assert_eq!(driver.take(0).len(), 2);
    assert_eq!(again.wants().at, None);
}

#[test]
fn a_port_goes_on_with_the_next_host() {
    let (line, mut driver) = (Arc::new(Line::default()), Driver::with_queues(4));
    let (socket, address) = listen();
    let door = || Box::new(Listener::new(socket.try_clone().unwrap().into()).unwrap());
    let console = Console::new("spore.agent", door(), hand());
    let console = live(console, &driver, &line);
    for _ in 0..8 {
        driver.send(2, &[], &[64]);
    }
    for event in [0_u8, 3, 6] {
        driver.send(3, &[&[0, 0, 0, 0, event, 0, 1, 0]], &[]);
        assert_eq!(console.handle(3), Ok(false));
    }
    let mut host = UnixStream::connect_addr(&address).unwrap();
    while console.ready().unwrap() {}
    driver.send(0, &[], &[64]);
    assert_eq!(console.handle(0), Ok(false));
    host.write_all(b"to the source").unwrap();
    assert!(console.wants().descriptor.is_some());
    assert_eq!(console.ready(), Ok(false));
    assert_eq!(driver.take(0)[0].data(), b"to the source");
    assert_eq!(driver.take(2).len(), 3);
    assert!(line.take() > 0);

    driver.send(0, &[], &[64]);
    let again = again(&console, &driver, &line, |console| {
        Console::new("spore.agent", door(), hand()).restore(console.save())
    });
    drop(console);
    assert_eq!(again.resume(), Ok(vec![]));
    let closed: Vec<_> = driver.take(2).iter().map(|done| done.bytes[6]).collect();
    assert_eq!(closed, [0], "the driver hears that the host is gone");
    assert!(line.take() > 0);
    assert_eq!(host.read(&mut [0]).unwrap(), 0);
    let mut next = UnixStream::connect_addr(&address).unwrap();
    next.write_all(b"to the fork").unwrap();
    while again.ready().unwrap() {}
    assert_eq!(driver.take(2).len(), 1);
    assert_eq!(driver.take(0)[0].data(), b"to the fork");
}

fn listen() -> (
    std::os::unix::net::UnixListener,
    std::os::unix::net::SocketAddr,
) {
    use std::os::linux::net::SocketAddrExt as _;
    let name = format!("spore-vmm-driven-{}", std::process::id());
    let address = std::os::unix::net::SocketAddr::from_abstract_name(name).unwrap();
    let socket = std::os::unix::net::UnixListener::bind_addr(&address).unwrap();
    (socket, address)
}

#[test]
fn a_network_goes_on_with_frames_that_nobody_kicked_for() {
    let (line, mut driver) = (Arc::new(Line::default()), Driver::with_queues(2));
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let kind = SocketType::SEQPACKET;
    let pair = rustix::net::socketpair(AddressFamily::UNIX, kind, flags, None);
    let (ours, host) = pair.unwrap();
    let tap = || Box::new(Tap::new(ours.try_clone().unwrap(), 0).unwrap());
    let none = Limit::default();
    let net = live(Net::new(tap(), MAC, none, none, hand()), &driver, &line);
    assert!(net.wants().descriptor.is_none());
    driver.send(0, &[], &[1600]);
    driver.send(1, &[&[0; 12], &[5; 40]], &[]);
    rustix::io::write(&host, &[6; 40]).unwrap();
    let again = again(&net, &driver, &line, |net| {
        let again = Net::new(tap(), MAC, none, none, hand());
        again.restore(net.save()).unwrap()
    });
    assert_eq!(again.resume(), Ok(vec![]));
    assert_eq!(line.take(), 3);
    assert_eq!(driver.take(0)[0].data()[12..], [6; 40]);
    assert_eq!(driver.take(1).len(), 1);
    let mut sent = [0; 64];
    assert_eq!(rustix::io::read(&host, &mut sent).unwrap(), 40);
}

#[test]
fn a_fault_names_the_device_and_the_queue_that_it_is_in() {
    let (line, mut driver) = (Arc::new(Line::default()), Driver::with_queues(4));
    let socket = UnixStream::pair().unwrap().0;
    let door = Box::new(Listener::new(socket.into()).unwrap());
    let console = live(Console::new("x", door, hand()), &driver, &line);
    driver.send(3, &[b"short"], &[]);
    // A kick of another queue, which looks at all of them.
    let fault = console.handle(0).unwrap_err();
    assert_eq!((fault.device, fault.queue), ("console", 3));
    assert!(matches!(fault.what, QueueFault::Request { .. }));
    assert_eq!(Driven::queues(&console), 4);
    assert_eq!(line.take(), 0);
}

#[test]
fn entropy_needs_nothing_but_its_queue() {
    let (line, mut driver) = (Arc::new(Line::default()), Driver::new());
    let rng = live(Rng::new(rng::host), &driver, &line);
    driver.send(0, &[], &[16]);
    let again = again(&rng, &driver, &line, |_| Rng::new(rng::host));
    assert_eq!(again.resume(), Ok(vec![]));
    assert_eq!((line.take(), driver.take(0)[0].written), (2, 16));
    assert_eq!(again.ready(), Ok(false));
    let wants = again.wants();
    assert!(wants.descriptor.is_none() && wants.at.is_none());
    // A turn that was not the last is due again.
    let place = driver.transport(0).queues[0].available;
    for _ in 0..16 {
        driver.send(0, &[], &[1]);
    }
    assert_eq!(again.resume(), Ok(vec![0]));
    assert_eq!(again.handle(0), Ok(false));
    // Interrupts that the driver does not want are for what was used, and not for a restore.
    driver.memory.store_u16(Gpa(place), 1).unwrap();
    line.take();
    assert_eq!(again.resume(), Ok(vec![]));
    assert_eq!(line.take(), 1);
}

/// A descriptor that may be anything, and is possible often enough to be gone on with.
fn descriptor() -> impl Strategy<Value = (u64, (u32, u16, u16))> {
    let offset = prop_oneof![
        8 => (0..64_u64).prop_map(|number| number * 16),
        1 => any::<u64>(),
    ];
    let length = prop_oneof![
        4 => 0..64_u32,
        4 => Just(512_u32),
        4 => Just(1600_u32),
        1 => any::<u32>(),
    ];
    let flags = prop_oneof![8 => 0..4_u16, 1 => any::<u16>()];
    let next = prop_oneof![16 => 0..16_u16, 1 => any::<u16>()];
    (offset, (length, flags, next))
}

/// What a driver does: descriptors, what they point to, and then heads in a queue, which it kicks.
#[derive(Clone, Debug)]
struct Attack {
    queue: u16,
    descriptors: Vec<(u64, (u32, u16, u16))>,
    bytes: Vec<u8>,
    heads: Vec<u16>,
}

fn attack() -> impl Strategy<Value = Attack> {
    let small = prop_oneof![4 => 0..9_u8, 1 => any::<u8>()];
    let head = prop_oneof![16 => 0..16_u16, 1 => any::<u16>()];
    (
        0..4_u16,
        prop::collection::vec(descriptor(), 16),
        prop::collection::vec(small, 0..600),
        prop::collection::vec(head, 0..6),
    )
        .prop_map(|(queue, descriptors, bytes, heads)| Attack {
            queue,
            descriptors,
            bytes,
            heads,
        })
}

/// Drives a device through attacks until it calls one a fault.
fn withstands<D: VirtioDevice>(device: D, queues: u16, attacks: &[Attack]) {
    let (line, mut driver) = (
        Arc::new(Line::default()),
        Driver::with_queues(queues.into()),
    );
    let mmio = live(device, &driver, &line);
    for attack in attacks {
        let queue = attack.queue % queues;
        for (index, (offset, rest)) in (0..).zip(&attack.descriptors) {
            driver.describe(queue.into(), index, *offset, *rest);
        }
        driver.fill(queue.into(), 0, &attack.bytes);
        driver.announce(queue, &attack.heads);
        let handled = mmio.handle(queue).and_then(|_| mmio.ready());
        for queue in mmio.save().queues {
            // Only a guest that ends has something in flight.
            let drained = queue.next_available == queue.next_used;
            assert!(drained || handled.is_err());
        }
        if handled.is_err() {
            return;
        }
    }
}

proptest! {
    #[test]
    fn no_driver_does_more_than_end_its_guest(
        attacks in prop::collection::vec(attack(), 1..12),
    ) {
        let limit = Limit::default();
        withstands(Rng::new(rng::host), 1, &attacks);
        let disk = Box::new(Raw::new(file(4096).0, Access::ReadWrite).unwrap());
        withstands(Blk::new(disk, "x", limit, hand()), 1, &attacks);
        let kind = SocketType::SEQPACKET;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let pair = rustix::net::socketpair(AddressFamily::UNIX, kind, flags, None);
        let (ours, host) = pair.unwrap();
        for _ in 0..4 {
            rustix::io::write(&host, &[1; 100]).unwrap();
        }
        let tap = Box::new(Tap::new(ours, 0).unwrap());
        withstands(Net::new(tap, MAC, limit, limit, hand()), 2, &attacks);
        let door = Box::new(Listener::new(UnixStream::pair().unwrap().0.into()).unwrap());
        withstands(Console::new("x", door, hand()), 4, &attacks);
    }
}
