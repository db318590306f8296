//! Tests of the guest's memory, on memory files as the node makes them.

use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::FileExt as _;

use rustix::fs::MemfdFlags;

use super::{Gpa, GuestMemory, MapError, OutOfMemory, PAGE_BYTES, Region, Sharing, Space};

const HIGH: u64 = 1 << 32;

/// Two pages at 0 and one above 4 GiB.
const REGIONS: [Region; 2] = [
    Region {
        start: Gpa(0),
        offset: 0,
        bytes: 2 * PAGE_BYTES,
    },
    Region {
        start: Gpa(HIGH),
        offset: 2 * PAGE_BYTES,
        bytes: PAGE_BYTES,
    },
];

fn file(bytes: u64) -> OwnedFd {
    let file = rustix::fs::memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&file, bytes).unwrap();
    file
}

fn filled(file: &OwnedFd, sharing: Sharing) -> GuestMemory {
    let space = Space::reserve(3 * PAGE_BYTES).unwrap();
    space.fill(file.as_fd(), sharing, &REGIONS).unwrap()
}

#[test]
fn what_is_written_is_read_in_both_regions() {
    let memory = filled(&file(3 * PAGE_BYTES), Sharing::Shared);
    for at in [
        Gpa(0),
        Gpa(PAGE_BYTES - 2),
        Gpa(HIGH),
        Gpa(HIGH + PAGE_BYTES - 4),
    ] {
        memory.write(at, b"word").unwrap();
        let mut word = [0; 4];
        memory.read(at, &mut word).unwrap();
        assert_eq!(&word, b"word", "{at}");
    }
    memory.store_u16(Gpa(HIGH + 2), 0x1234).unwrap();
    assert_eq!(memory.load_u16(Gpa(HIGH + 2)), Ok(0x1234));
    let mut bytes = [0; 2];
    memory.read(Gpa(HIGH + 2), &mut bytes).unwrap();
    assert_eq!(bytes, [0x34, 0x12]);
}

#[test]
fn a_range_that_is_partly_outside_is_refused_whole() {
    let memory = filled(&file(3 * PAGE_BYTES), Sharing::Shared);
    for at in [
        2 * PAGE_BYTES - 3,
        2 * PAGE_BYTES,
        HIGH - 1,
        HIGH + PAGE_BYTES - 1,
        u64::MAX - 1,
    ] {
        let outside = Err(OutOfMemory {
            at: Gpa(at),
            bytes: 4,
        });
        assert_eq!(memory.check(Gpa(at), 4), outside);
        assert_eq!(memory.write(Gpa(at), b"word"), outside);
        assert_eq!(memory.read(Gpa(at), &mut [0; 4]), outside);
    }
    let mut last = [0; 3];
    memory.read(Gpa(2 * PAGE_BYTES - 3), &mut last).unwrap();
    assert_eq!(last, [0; 3], "nothing of a refused write is written");
    assert!(memory.check(Gpa(0), u64::MAX).is_err());
    assert!(memory.check(Gpa(0), 2 * PAGE_BYTES).is_ok());
}

#[test]
fn a_number_that_is_not_aligned_is_refused() {
    let memory = filled(&file(3 * PAGE_BYTES), Sharing::Shared);
    assert!(memory.load_u16(Gpa(1)).is_err());
    assert!(memory.store_u16(Gpa(1), 1).is_err());
    assert!(memory.load_u16(Gpa(2 * PAGE_BYTES)).is_err());
}

#[test]
fn private_writes_stay_with_their_guest_and_shared_ones_reach_the_file() {
    let file = file(3 * PAGE_BYTES);
    let (one, two) = (
        filled(&file, Sharing::Private),
        filled(&file, Sharing::Private),
    );
    one.write(Gpa(8), b"one").unwrap();
    let mut seen = [0; 3];
    two.read(Gpa(8), &mut seen).unwrap();
    assert_eq!(seen, [0; 3]);
    rustix::io::pread(&file, &mut seen, 8).unwrap();
    assert_eq!(seen, [0; 3]);
    let source = filled(&file, Sharing::Shared);
    source.write(Gpa(HIGH), b"all").unwrap();
    two.read(Gpa(HIGH), &mut seen).unwrap();
    assert_eq!(&seen, b"all");
}

#[test]
fn pages_that_are_populated_are_the_guests_own_and_hold_what_they_held() {
    let file = file(3 * PAGE_BYTES);
    rustix::io::pwrite(&file, b"first", 0).unwrap();
    rustix::io::pwrite(&file, b"third", 2 * PAGE_BYTES).unwrap();
    let memory = filled(&file, Sharing::Private);
    let own = || {
        let from = memory.space().host_address(0, 3 * PAGE_BYTES).unwrap();
        let pagemap = std::fs::File::open("/proc/self/pagemap").unwrap();
        let mut entries = [0; 24];
        pagemap
            .read_exact_at(&mut entries, from / PAGE_BYTES * 8)
            .unwrap();
        // Present, and of no file (proc(5)).
        let own = |entry: &[u8; 8]| u64::from_ne_bytes(*entry) >> 61 & 0b101 == 0b100;
        entries.as_chunks().0.iter().map(own).collect::<Vec<_>>()
    };
    assert_eq!(own(), [false; 3]);
    memory.space().populate(0, PAGE_BYTES).unwrap();
    memory.space().populate(2 * PAGE_BYTES, PAGE_BYTES).unwrap();
    assert_eq!(own(), [true, false, true]);
    let mut seen = [0; 5];
    for (at, word) in [(0, b"first"), (HIGH, b"third")] {
        memory.read(Gpa(at), &mut seen).unwrap();
        assert_eq!(&seen, word);
    }
    for (offset, bytes) in [
        (2 * PAGE_BYTES, 2 * PAGE_BYTES),
        (u64::MAX, 2),
        (0, u64::MAX),
    ] {
        memory.space().populate(offset, bytes).unwrap_err();
    }
    // A space without memory has nothing to give.
    Space::reserve(PAGE_BYTES)
        .unwrap()
        .populate(0, PAGE_BYTES)
        .unwrap();
}

#[test]
fn a_space_is_filled_once_and_with_a_file_of_its_size() {
    let space = Space::reserve(3 * PAGE_BYTES).unwrap();
    for pages in [2, 4] {
        let other = file(pages * PAGE_BYTES);
        let error = space.fill(other.as_fd(), Sharing::Private, &REGIONS);
        assert!(matches!(error, Err(MapError::Length { .. })), "{error:?}");
    }
    let whole = file(3 * PAGE_BYTES);
    let memory = space
        .fill(whole.as_fd(), Sharing::Private, &REGIONS)
        .unwrap();
    let error = space.fill(whole.as_fd(), Sharing::Private, &REGIONS);
    assert!(matches!(error, Err(MapError::Twice)), "{error:?}");
    drop(space);
    memory.write(Gpa(0), b"still here").unwrap();
}

#[test]
fn regions_that_do_not_cover_the_file_are_refused() {
    let whole = file(3 * PAGE_BYTES);
    let change = |change: fn(&mut [Region; 2])| {
        let mut regions = REGIONS;
        change(&mut regions);
        let space = Space::reserve(3 * PAGE_BYTES).unwrap();
        let error = space.fill(whole.as_fd(), Sharing::Private, &regions);
        assert!(matches!(error, Err(MapError::Shape { .. })), "{regions:?}");
    };
    change(|regions| regions[1].bytes = 2 * PAGE_BYTES);
    change(|regions| regions[1].offset = 0);
    change(|regions| regions[1].start = Gpa(PAGE_BYTES));
    change(|regions| regions[1].start = Gpa(u64::MAX - PAGE_BYTES + 1));
    change(|regions| regions[0].bytes = PAGE_BYTES + 1);
    change(|regions| regions.swap(0, 1));
    let space = Space::reserve(PAGE_BYTES).unwrap();
    assert!(space.fill(whole.as_fd(), Sharing::Private, &[]).is_err());
    assert!(Space::reserve(0).is_err());
    assert!(Space::reserve(PAGE_BYTES + 1).is_err());
    assert!(Space::reserve(u64::MAX - PAGE_BYTES + 1).is_err());
}
