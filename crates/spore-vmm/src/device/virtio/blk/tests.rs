//! The block device against a model of a disk, disks that fail, and a driver that asks for
//! anything.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use proptest::prelude::*;

use super::{
    Blk, DATA_BYTES_MAX, Exchange, F_FLUSH, F_RO, HEADER_BYTES, ID_BYTES, SECTOR_BYTES, State,
    request, status,
};
use crate::clock::tests::Hand;
use crate::device::rate::{Bucket, Limit};
use crate::device::virtio::VirtioDevice as _;
use crate::device::virtio::driver::{Done, Driver};
use crate::device::virtio::queue::QueueFault;
use crate::disk::tests::file;
use crate::disk::{Access, Disk, Raw};
use crate::snapshot::tests::is_pinned;

const SECTORS: u64 = 64;

struct Bench {
    blk: Blk,
    driver: Driver,
    hand: Hand,
}

impl Bench {
    fn of(disk: Box<dyn Disk>, limit: Limit) -> Self {
        let hand = Hand::default();
        let mut blk = Blk::new(disk, "image", limit, Box::new(hand.clone()));
        blk.activate(F_FLUSH);
        let driver = Driver::new();
        Self { blk, driver, hand }
    }

    fn new(access: Access) -> (Self, OwnedFd) {
        let (ours, other) = file(SECTORS * SECTOR_BYTES);
        let disk = Raw::new(ours, access).unwrap();
        (Self::of(Box::new(disk), Limit::default()), other)
    }

    fn turn(&mut self) -> bool {
        let handled = self.blk.handle(0, &mut self.driver.queues()).unwrap();
        handled.more
    }

    fn ask(&mut self, kind: u32, sector: u64, data: &[u8], room: u32) {
        let header = header(kind, sector);
        self.driver.send(0, &[&header, data], &[room, 1]);
    }

    fn one(&mut self, kind: u32, sector: u64, data: &[u8], room: u32) -> Done {
        self.ask(kind, sector, data, room);
        assert!(!self.turn());
        let done = self.driver.take(0);
        assert_eq!(done.len(), 1);
        assert_eq!(done[0].written, room + 1);
        done[0].clone()
    }

    fn status(&mut self, kind: u32, sector: u64, data: &[u8], room: u32) -> u8 {
        *self.one(kind, sector, data, room).bytes.last().unwrap()
    }
}

fn header(kind: u32, sector: u64) -> [u8; HEADER_BYTES] {
    let mut header = [0; HEADER_BYTES];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    header
}

/// A disk that counts its flushes, and fails when it is told to.
#[derive(Clone, Debug, Default)]
struct Fake {
    flushes: Arc<AtomicU64>,
    fails: Arc<AtomicU64>,
}

impl Fake {
    fn done(&self) -> io::Result<()> {
        match self.fails.load(Ordering::SeqCst) {
            0 => Ok(()),
            _ => Err(io::Error::from_raw_os_error(5)),
        }
    }
}

impl Disk for Fake {
    fn bytes(&self) -> u64 {
        1 << 30
    }

    fn access(&self) -> Access {
        Access::ReadWrite
    }

    fn read(&mut self, _at: u64, into: &mut [u8]) -> io::Result<()> {
        into.fill(1);
        self.done()
    }

    fn write(&mut self, _at: u64, _from: &[u8]) -> io::Result<()> {
        self.done()
    }

    fn flush(&mut self) -> io::Result<()> {
        self.flushes.fetch_add(1, Ordering::SeqCst);
        self.done()
    }
}

#[test]
fn a_driver_reads_what_it_wrote_and_the_file_has_it() {
    let (mut bench, other) = Bench::new(Access::ReadWrite);
    let mut config = [0xee; 18];
    bench.blk.config(0, &mut config);
    assert_eq!(config[..8], SECTORS.to_le_bytes());
    assert_eq!(config[8..], [0, 0, 1, 0, 126, 0, 0, 0, 0, 0]);
    let data: Vec<u8> = (0..=255).cycle().take(1536).collect();
    assert_eq!(bench.status(request::WRITE, 3, &data, 0), status::OK);
    let done = bench.one(request::READ, 3, &[], 1536);
    assert_eq!(done.bytes[..1536], data);
    let mut byte = [0];
    rustix::io::pread(&other, &mut byte, 3 * 512 + 700).unwrap();
    assert_eq!(byte[0], data[700]);
    assert_eq!(bench.status(request::FLUSH, 0, &[], 0), status::OK);
}

#[test]
fn a_disk_has_its_name() {
    let (mut bench, _other) = Bench::new(Access::ReadOnly);
    let done = bench.one(request::GET_ID, 0, &[], 20);
    assert_eq!(done.bytes[..8], *b"image\0\0\0");
    assert_eq!(*done.bytes.last().unwrap(), status::OK);
    let done = bench.one(request::GET_ID, 0, &[], 3);
    assert_eq!(done.bytes, b"ima\0");
    let long = "a name that is much longer than that";
    let hand = Box::new(Hand::default());
    let blk = Blk::new(Box::new(Fake::default()), long, Limit::default(), hand);
    assert_eq!(blk.id, long.as_bytes()[..ID_BYTES]);
}

#[test]
fn ranges_that_are_not_there_are_refused_and_change_nothing() {
    let (mut bench, other) = Bench::new(Access::ReadWrite);
    for (sector, count) in [
        (SECTORS, 512),
        (SECTORS - 1, 1024),
        (u64::MAX, 512),
        (u64::MAX / 512, 512),
        (0, 511),
        (0, 513),
        (0, 1),
    ] {
        let data = vec![7; count];
        let room = u32::try_from(count).unwrap();
        let read = bench.status(request::READ, sector, &[], room);
        let write = bench.status(request::WRITE, sector, &data, 0);
        let expected = (status::ERROR, status::ERROR);
        assert_eq!((read, write), expected, "{sector} {count}");
    }
    let mut all = vec![0; 512 * 64];
    rustix::io::pread(&other, &mut all, 0).unwrap();
    assert!(all.iter().all(|byte| *byte == 0));
    assert_eq!(bench.status(request::READ, SECTORS, &[], 0), status::OK);
}

#[test]
fn what_is_not_offered_is_unsupported() {
    let (mut bench, _other) = Bench::new(Access::ReadWrite);
    // Discard and write-zeroes among them.
    for kind in [2, 3, 5, 7, 9, 10, 11, 13, 14, u32::MAX] {
        let found = bench.status(kind, 0, &[0; 16], 0);
        assert_eq!(found, status::UNSUPPORTED, "{kind}");
    }
}

#[test]
fn a_read_only_disk_says_so_and_is_not_written() {
    let (mut bench, other) = Bench::new(Access::ReadOnly);
    assert_eq!(bench.blk.features() & F_RO, F_RO);
    let found = bench.status(request::WRITE, 0, &[1; 512], 0);
    assert_eq!(found, status::ERROR);
    let mut byte = [0xee];
    rustix::io::pread(&other, &mut byte, 0).unwrap();
    assert_eq!(byte, [0]);
    let (bench, _other) = Bench::new(Access::ReadWrite);
    assert_eq!(bench.blk.features() & F_RO, 0);
}

#[test]
fn a_shortened_file_is_an_error_where_it_is_missing_and_nowhere_else() {
    let (mut bench, other) = Bench::new(Access::ReadWrite);
    rustix::fs::ftruncate(&other, 1024).unwrap();
    assert_eq!(bench.status(request::READ, 1, &[], 1024), status::ERROR);
    assert_eq!(bench.status(request::WRITE, 2, &[1; 512], 0), status::ERROR);
    assert_eq!(rustix::fs::fstat(&other).unwrap().st_size, 1024);
    assert_eq!(bench.status(request::WRITE, 1, &[1; 512], 0), status::OK);
    assert_eq!(bench.status(request::READ, 1, &[], 512), status::OK);
    assert_eq!(bench.status(request::FLUSH, 0, &[], 0), status::OK);
}

#[test]
fn an_error_of_the_hosts_is_the_requests_alone() {
    let fake = Fake::default();
    let mut bench = Bench::of(Box::new(fake.clone()), Limit::default());
    fake.fails.store(1, Ordering::SeqCst);
    assert_eq!(bench.status(request::READ, 0, &[], 512), status::ERROR);
    assert_eq!(bench.status(request::WRITE, 0, &[0; 512], 0), status::ERROR);
    assert_eq!(bench.status(request::FLUSH, 0, &[], 0), status::ERROR);
    fake.fails.store(0, Ordering::SeqCst);
    assert_eq!(bench.status(request::FLUSH, 0, &[], 0), status::OK);
}

#[test]
fn a_driver_that_does_not_flush_has_each_write_flushed() {
    let fake = Fake::default();
    let mut bench = Bench::of(Box::new(fake.clone()), Limit::default());
    let flushes = || fake.flushes.load(Ordering::SeqCst);
    bench.status(request::WRITE, 0, &[0; 512], 0);
    assert_eq!(flushes(), 0);
    bench.blk.reset();
    bench.blk.activate(0);
    bench.status(request::WRITE, 0, &[0; 512], 0);
    assert_eq!(flushes(), 1);
    bench.blk.flush().unwrap();
    assert_eq!(flushes(), 2);
}

#[test]
fn what_is_no_request_ends_the_guest() {
    let header = header(request::READ, 0);
    for (readable, writable) in [
        (&header[..15], &[512, 1][..]),
        (&header, &[]),
        (&header, &[0]),
        (&[], &[1]),
    ] {
        let (mut bench, _other) = Bench::new(Access::ReadWrite);
        bench.driver.send(0, &[readable], writable);
        let error = bench.blk.handle(0, &mut bench.driver.queues()).unwrap_err();
        assert!(matches!(error.what, QueueFault::Request { .. }));
    }
}

#[test]
fn header_and_status_may_be_cut_anywhere() {
    let (mut bench, _other) = Bench::new(Access::ReadWrite);
    let header = header(request::WRITE, 1);
    let mut row = header.to_vec();
    row.extend([9; 512]);
    bench
        .driver
        .send(0, &[&row[..3], &row[3..20], &row[20..]], &[1]);
    assert!(!bench.turn());
    assert_eq!(bench.driver.take(0)[0].bytes, [status::OK]);
    // Data and status in one buffer.
    bench
        .driver
        .send(0, &[&super::tests::header(request::READ, 1)], &[513]);
    assert!(!bench.turn());
    let bytes = &bench.driver.take(0)[0].bytes;
    assert_eq!((bytes[0], bytes[511], bytes[512]), (9, 9, status::OK));
}

#[test]
fn what_the_rate_does_not_allow_stays_in_the_ring_until_its_time() {
    let limit = Limit {
        operations: Some(Bucket::new(100, 2, Duration::ZERO)),
        bytes: Some(Bucket::new(1024, 1024, Duration::ZERO)),
    };
    let mut bench = Bench::of(Box::new(Fake::default()), limit);
    for _ in 0..3 {
        bench.ask(request::READ, 0, &[], 512);
    }
    assert!(!bench.turn());
    assert_eq!(bench.driver.take(0).len(), 2);
    assert_eq!(bench.blk.wants().at, Some(Duration::from_millis(500)));
    bench.hand.0.store(499, Ordering::SeqCst);
    assert!(!bench.turn(), "a kick does not make it earlier");
    assert_eq!(bench.driver.take(0).len(), 0);
    assert_eq!(bench.driver.live[0].as_ref().unwrap().in_flight(), 0);
    bench.blk.reset();
    bench.hand.0.store(500, Ordering::SeqCst);
    let _handled = bench.blk.ready(&mut bench.driver.queues()).unwrap();
    assert_eq!(bench.driver.take(0).len(), 1);
    assert_eq!(bench.blk.wants().at, None);
}

#[test]
fn a_turn_ends_and_another_goes_on() {
    let mut bench = Bench::of(Box::new(Fake::default()), Limit::default());
    let header = header(request::READ, 0);
    for _ in 0..3 {
        bench.driver.send(0, &[&header], &[32768, 32768, 32768, 1]);
    }
    assert!(bench.turn());
    assert_eq!(bench.driver.take(0).len(), 2);
    assert!(!bench.turn());
    assert_eq!(bench.driver.take(0).len(), 1);
}

#[test]
fn a_request_of_more_bytes_than_any_is_refused() {
    let bench = Bench::of(Box::new(Fake::default()), Limit::default());
    assert_eq!(bench.blk.place(2, DATA_BYTES_MAX).ok(), Some(1024));
    assert!(bench.blk.place(0, DATA_BYTES_MAX + 512).is_err());
}

#[test]
fn a_guest_is_restored_with_the_disk_that_it_knows() {
    let (bench, _other) = Bench::new(Access::ReadWrite);
    let saved = bench.blk.save();
    let sectors = SECTORS;
    let access = Access::ReadWrite;
    assert_eq!(saved, State { sectors, access });
    let restore = |bytes, access| {
        let disk = Box::new(Raw::new(file(bytes).0, access).unwrap());
        let hand = Box::new(Hand::default());
        Blk::new(disk, "image", Limit::default(), hand).restore(saved)
    };
    let larger = file(2 * SECTORS * 512).0;
    let (disk, hand) = (Raw::new(larger, access).unwrap(), Hand::default());
    let (disk, hand) = (Box::new(disk), Box::new(hand));
    let other = Blk::new(disk, "folder", Limit::default(), hand).exchanged(Exchange::AnySize);
    assert_eq!(other.restore(saved).unwrap().save().sectors, 2 * SECTORS);
    let again = restore(SECTORS * 512 + 1, Access::ReadWrite).unwrap();
    assert_eq!(again.save(), saved);
    assert!(restore(SECTORS * 512 - 1, Access::ReadWrite).is_err());
    let error = restore(SECTORS * 512, Access::ReadOnly).unwrap_err();
    assert_eq!(error.found.access, Access::ReadOnly);
}

#[test]
fn a_saved_disk_is_read_as_every_release_wrote_it() {
    for (access, number) in [(Access::ReadOnly, 0), (Access::ReadWrite, 1)] {
        let sectors = 0x203;
        let bytes = [3, 2, 0, 0, 0, 0, 0, 0, number];
        is_pinned(&State { sectors, access }, 1, &bytes);
    }
}

/// A request with its data cut into segments.
#[derive(Clone, Debug)]
struct Request {
    kind: u32,
    sector: u64,
    segments: Vec<u32>,
    fill: u8,
}

fn request() -> impl Strategy<Value = Request> {
    let kind = prop_oneof![
        4 => Just(request::READ),
        4 => Just(request::WRITE),
        1 => Just(request::FLUSH),
        1 => 0..16_u32,
    ];
    let segment = prop_oneof![
        4 => (0..20_u32).prop_map(|sectors| sectors * 512),
        2 => (0..3_u32).prop_map(|halves| halves * 256),
        1 => 0..600_u32,
    ];
    let segments = prop::collection::vec(segment, 1..5);
    (kind, 0..SECTORS + 4, segments, any::<u8>()).prop_map(|(kind, sector, segments, fill)| {
        Request {
            kind,
            sector,
            segments,
            fill,
        }
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_disk_is_what_a_model_of_it_is(
        requests in prop::collection::vec(request(), 1..30),
        batch in 1..3_usize,
    ) {
        let (mut bench, _other) = Bench::new(Access::ReadWrite);
        let mut model = vec![0_u8; usize::try_from(SECTORS * SECTOR_BYTES).unwrap()];
        for requests in requests.chunks(batch) {
            let mut expected = Vec::new();
            for Request { kind, sector, segments, fill } in requests {
                let count: u32 = segments.iter().sum();
                let count = usize::try_from(count).unwrap();
                let at = usize::try_from(sector * SECTOR_BYTES).unwrap();
                let fits = count.is_multiple_of(512) && at + count <= model.len();
                let data: Vec<u8> = (0..=*fill).cycle().take(count).collect();
                let header = header(*kind, *sector);
                if *kind == request::READ {
                    let mut room = segments.clone();
                    room.push(1);
                    bench.driver.send(0, &[&header], &room);
                    let read = model.get(at..at + count).filter(|_| fits);
                    expected.push((fits, read.map(<[u8]>::to_vec)));
                } else {
                    let mut rest = data.as_slice();
                    let mut readable = vec![header.as_slice()];
                    for segment in segments {
                        let (part, behind) = rest.split_at(usize::try_from(*segment).unwrap());
                        readable.push(part);
                        rest = behind;
                    }
                    bench.driver.send(0, &readable, &[1]);
                    let is_write = *kind == request::WRITE;
                    if is_write && fits {
                        model[at..at + count].copy_from_slice(&data);
                    }
                    let known = [request::FLUSH, request::GET_ID].contains(kind);
                    expected.push((if is_write { fits } else { known }, None));
                }
            }
            prop_assert!(!bench.turn());
            let done = bench.driver.take(0);
            prop_assert_eq!(done.len(), expected.len());
            for (done, (is_ok, read)) in done.iter().zip(expected) {
                let (status, data) = done.bytes.split_last().unwrap();
                prop_assert_eq!(*status == status::OK, is_ok);
                if let Some(read) = read {
                    prop_assert_eq!(data, read);
                }
            }
        }
    }

    #[test]
    fn any_chain_ends_in_a_fault_or_is_given_back(
        chains in prop::collection::vec(
            (
                prop::collection::vec(0..3_u8, 0..40),
                prop::collection::vec(0..40_u32, 0..4),
            ),
            1..12,
        ),
    ) {
        let (mut bench, _other) = Bench::new(Access::ReadWrite);
        for (bytes, room) in chains {
            if bench.driver.free(0) < 8 {
                break;
            }
            let (head, tail) = bytes.split_at(bytes.len() / 2);
            bench.driver.send(0, &[head, tail], &room);
            let whole = bytes.len() >= HEADER_BYTES && room.iter().sum::<u32>() > 0;
            let handled = bench.blk.handle(0, &mut bench.driver.queues());
            prop_assert_eq!(handled.is_ok(), whole);
            if !whole {
                return Ok(());
            }
            prop_assert_eq!(bench.driver.take(0).len(), 1);
        }
    }
}
