//! The queue against a model of a driver, against another implementation, and against a driver that
//! writes what it likes.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};

use proptest::prelude::*;
use virtio_queue::{Queue as OtherQueue, QueueT as _};
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryMmap};

use super::{Buffer, Chain, NEXT, Part, QUEUE_SIZE_MAX, Queue, QueueFault, QueueState, WRITE};
use crate::device::virtio::driver::memory_of;
use crate::memory::{Gpa, GuestMemory};

const MEMORY_BYTES: u64 = 0x1_0000;
const DESCRIPTORS: u64 = 0x1000;
const AVAILABLE: u64 = 0x3000;
const USED: u64 = 0x4000;
/// From here on, what chains point to.
const BUFFERS: u64 = 0x8000;

fn memory() -> GuestMemory {
    memory_of(MEMORY_BYTES)
}

fn state(size: u16) -> QueueState {
    QueueState {
        size,
        ready: true,
        descriptors: DESCRIPTORS,
        available: AVAILABLE,
        used: USED,
        next_available: 0,
        next_used: 0,
    }
}

fn queue(memory: &GuestMemory, size: u16) -> Queue {
    Queue::new(memory, &state(size), QUEUE_SIZE_MAX).unwrap()
}

/// What a driver writes: raw, so that it can be wrong.
fn describe(memory: &GuestMemory, index: u16, buffer: Buffer, flags: u16, next: u16) {
    let mut raw = buffer.at.0.to_le_bytes().to_vec();
    raw.extend(buffer.bytes.to_le_bytes());
    raw.extend(flags.to_le_bytes());
    raw.extend(next.to_le_bytes());
    let at = Gpa(DESCRIPTORS + u64::from(index) * 16);
    memory.write(at, &raw).unwrap();
}

fn set_head(memory: &GuestMemory, entry: u16, head: u16) {
    let at = Gpa(AVAILABLE + 4 + u64::from(entry) * 2);
    memory.store_u16(at, head).unwrap();
}

fn set_index(memory: &GuestMemory, index: u16) {
    memory.store_u16(Gpa(AVAILABLE + 2), index).unwrap();
}

fn buffer(number: u64, bytes: u32) -> Buffer {
    Buffer {
        at: Gpa(BUFFERS + number * 16),
        bytes,
    }
}

/// One chain of one descriptor, available.
fn offer(memory: &GuestMemory, buffer: Buffer, flags: u16, next: u16) {
    describe(memory, 0, buffer, flags, next);
    set_head(memory, 0, 0);
    set_index(memory, 1);
}

fn popped(memory: &GuestMemory, queue: &mut Queue) -> Result<Option<Chain>, QueueFault> {
    let mut chain = Chain::default();
    let popped = queue.pop(memory, &mut chain)?;
    Ok(popped.then_some(chain))
}

#[test]
fn a_chain_is_taken_and_given_back() {
    let memory = memory();
    let mut queue = queue(&memory, 4);
    assert_eq!(popped(&memory, &mut queue), Ok(None));
    describe(&memory, 2, buffer(0, 8), NEXT, 1);
    describe(&memory, 1, buffer(1, 5), NEXT | WRITE, 3);
    describe(&memory, 3, buffer(2, 6), WRITE, 77);
    set_head(&memory, 0, 2);
    set_index(&memory, 1);
    let chain = popped(&memory, &mut queue).unwrap().unwrap();
    assert_eq!(chain.head(), 2);
    assert_eq!(chain.readable(), [buffer(0, 8)]);
    assert_eq!(chain.writable(), [buffer(1, 5), buffer(2, 6)]);
    assert_eq!(queue.in_flight(), 1);
    queue.push(&memory, chain.head(), 9).unwrap();
    let mut used = [0; 12];
    memory.read(Gpa(USED), &mut used).unwrap();
    assert_eq!(used, [0, 0, 1, 0, 2, 0, 0, 0, 9, 0, 0, 0]);
    assert_eq!(queue.in_flight(), 0);
    assert_eq!(popped(&memory, &mut queue), Ok(None));
}

#[test]
fn the_driver_says_whether_it_wants_interrupts() {
    let memory = memory();
    let queue = queue(&memory, 4);
    assert_eq!(queue.wants_interrupt(&memory), Ok(true));
    memory.store_u16(Gpa(AVAILABLE), 1).unwrap();
    assert_eq!(queue.wants_interrupt(&memory), Ok(false));
}

#[test]
fn a_chain_that_is_put_back_is_taken_again() {
    let memory = memory();
    let mut queue = queue(&memory, 4);
    offer(&memory, buffer(0, 1), 0, 0);
    let first = popped(&memory, &mut queue).unwrap().unwrap();
    queue.put_back(1);
    assert_eq!(queue.in_flight(), 0);
    assert_eq!(popped(&memory, &mut queue), Ok(Some(first)));
}

#[test]
fn a_saved_queue_goes_on_where_it_was() {
    let memory = memory();
    let mut queue = queue(&memory, 4);
    for round in 0..6_u16 {
        describe(&memory, round % 4, buffer(u64::from(round), 1), 0, 0);
        set_head(&memory, round % 4, round % 4);
        set_index(&memory, round + 1);
        let chain = popped(&memory, &mut queue).unwrap().unwrap();
        queue.push(&memory, chain.head(), 0).unwrap();
    }
    let again = Queue::new(&memory, &queue.state(), 4).unwrap();
    assert_eq!(again, queue);
    let mut wrong = queue.state();
    wrong.next_used = wrong.next_available.wrapping_add(1);
    let error = Queue::new(&memory, &wrong, 4);
    assert!(
        matches!(error, Err(QueueFault::Indices { .. })),
        "{error:?}"
    );
}

#[test]
fn a_queue_must_have_a_possible_size_and_be_in_memory() {
    let memory = memory();
    let refused = |change: fn(&mut QueueState)| {
        let mut state = state(8);
        change(&mut state);
        Queue::new(&memory, &state, 16).unwrap_err()
    };
    for size in [0, 3, 32, 0xffff] {
        let mut state = state(8);
        state.size = size;
        let error = Queue::new(&memory, &state, 16).unwrap_err();
        assert_eq!(error, QueueFault::Size { size, most: 16 });
    }
    let part = |error| match error {
        QueueFault::Misaligned { part, .. } | QueueFault::Outside { part, .. } => Some(part),
        _ => None,
    };
    for (error, expected) in [
        (refused(|s| s.descriptors += 8), Part::Descriptors),
        (refused(|s| s.available += 1), Part::Available),
        (refused(|s| s.used += 2), Part::Used),
        (
            refused(|s| s.descriptors = MEMORY_BYTES - 112),
            Part::Descriptors,
        ),
        (
            refused(|s| s.available = MEMORY_BYTES - 18),
            Part::Available,
        ),
        (refused(|s| s.used = MEMORY_BYTES - 64), Part::Used),
        (refused(|s| s.used = u64::MAX - 3), Part::Used),
    ] {
        assert_eq!(part(error), Some(expected), "{error}");
    }
    let mut last = state(8);
    last.used = MEMORY_BYTES - 68;
    assert!(Queue::new(&memory, &last, 16).is_ok());
}

#[test]
fn what_makes_no_sense_is_named() {
    let cases: [(Buffer, u16, u16, QueueFault); 6] = [
        (buffer(0, 1), NEXT, 0, QueueFault::Endless { size: 4 }),
        (
            buffer(0, 1),
            NEXT,
            4,
            QueueFault::Index { index: 4, size: 4 },
        ),
        (buffer(0, 1), 4, 0, QueueFault::Flags { index: 0, flags: 4 }),
        (
            buffer(0, u32::MAX),
            0,
            0,
            QueueFault::Buffer(crate::memory::OutOfMemory {
                at: Gpa(BUFFERS),
                bytes: u64::from(u32::MAX),
            }),
        ),
        (
            Buffer {
                at: Gpa(u64::MAX),
                bytes: 2,
            },
            WRITE,
            0,
            QueueFault::Buffer(crate::memory::OutOfMemory {
                at: Gpa(u64::MAX),
                bytes: 2,
            }),
        ),
        (
            buffer(0, 1),
            0x8000,
            0,
            QueueFault::Flags {
                index: 0,
                flags: 0x8000,
            },
        ),
    ];
    for (buffer, flags, next, expected) in cases {
        let memory = memory();
        let mut queue = queue(&memory, 4);
        offer(&memory, buffer, flags, next);
        assert_eq!(popped(&memory, &mut queue), Err(expected));
    }
}

#[test]
fn what_is_read_comes_before_what_is_written() {
    let memory = memory();
    let mut queue = queue(&memory, 4);
    offer(&memory, buffer(0, 1), NEXT | WRITE, 1);
    describe(&memory, 1, buffer(1, 1), 0, 0);
    let expected = QueueFault::Order { index: 1 };
    assert_eq!(popped(&memory, &mut queue), Err(expected));
}

#[test]
fn more_chains_than_descriptors_are_refused() {
    for index in [5, 0x8000, u16::MAX] {
        let memory = memory();
        let mut queue = queue(&memory, 4);
        set_index(&memory, index);
        let error = popped(&memory, &mut queue);
        assert!(
            matches!(error, Err(QueueFault::Available { .. })),
            "{index}: {error:?}"
        );
    }
    // One is in flight: four more would be five chains of four descriptors.
    let memory = memory();
    let mut queue = queue(&memory, 4);
    offer(&memory, buffer(0, 1), 0, 0);
    popped(&memory, &mut queue).unwrap().unwrap();
    set_index(&memory, 5);
    assert!(popped(&memory, &mut queue).is_err());
}

#[test]
fn an_available_index_that_goes_back_is_refused() {
    let memory = memory();
    let mut queue = queue(&memory, 4);
    offer(&memory, buffer(0, 1), 0, 0);
    popped(&memory, &mut queue).unwrap().unwrap();
    set_index(&memory, 0);
    let error = popped(&memory, &mut queue);
    assert!(
        matches!(error, Err(QueueFault::Available { .. })),
        "{error:?}"
    );
}

#[test]
fn a_driver_that_writes_meanwhile_breaks_nothing_but_its_own_queue() {
    let memory = memory();
    let writer = memory.clone();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut round = 0_u16;
            while !done.load(Ordering::Relaxed) {
                round = round.wrapping_add(1);
                let far = Buffer {
                    at: Gpa(u64::from(round) << 48),
                    bytes: u32::MAX,
                };
                let flags = round & 7;
                describe(&writer, round % 4, far, flags, round);
                describe(&writer, round % 4, buffer(0, 4), 0, 0);
            }
        });
        let mut taken = 0;
        for index in 0..2_000_u16 {
            let mut queue = queue(&memory, 4);
            set_head(&memory, 0, index % 4);
            set_index(&memory, 1);
            if let Ok(Some(chain)) = popped(&memory, &mut queue) {
                taken += 1;
                for buffer in chain.readable().iter().chain(chain.writable()) {
                    memory.check(buffer.at, u64::from(buffer.bytes)).unwrap();
                }
            }
        }
        done.store(true, Ordering::Relaxed);
        assert!(taken > 0, "some chains are whole");
    });
}

/// A well-behaved driver's request: lengths to read and to write.
#[derive(Clone, Debug)]
struct Request {
    readable: Vec<u32>,
    writable: Vec<u32>,
}

fn request() -> impl Strategy<Value = Request> {
    let lengths = || prop::collection::vec(1..64_u32, 0..4);
    (lengths(), lengths())
        .prop_map(|(readable, writable)| Request { readable, writable })
        .prop_filter("a chain has a descriptor", |request| {
            !request.readable.is_empty() || !request.writable.is_empty()
        })
}

/// What a driver does next.
#[derive(Clone, Debug)]
enum Step {
    Offer(Request),
    Take,
    /// Give back one of those in flight, of any age.
    GiveBack(prop::sample::Index, u32),
    SaveAndRestore,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => request().prop_map(Step::Offer),
        4 => Just(Step::Take),
        4 => (any::<prop::sample::Index>(), 0..1000_u32).prop_map(|(i, n)| Step::GiveBack(i, n)),
        1 => Just(Step::SaveAndRestore),
    ]
}

/// A driver in plain Rust: free descriptors, requests that were offered and not taken, and those in
/// flight.
struct Driver {
    size: u16,
    free: Vec<u16>,
    index: u16,
    offered: VecDeque<(u16, Vec<u16>, Chain)>,
    flying: Vec<(u16, Vec<u16>)>,
    used: u16,
}

impl Driver {
    fn new(size: u16) -> Self {
        Self {
            size,
            free: (0..size).rev().collect(),
            index: 0,
            offered: VecDeque::new(),
            flying: Vec::new(),
            used: 0,
        }
    }

    fn offer(&mut self, memory: &GuestMemory, request: &Request) {
        let count = request.readable.len() + request.writable.len();
        if self.free.len() < count {
            return;
        }
        let taken = self.free.split_off(self.free.len() - count);
        let lengths = request.readable.iter().chain(&request.writable);
        let mut buffers = Vec::new();
        for (place, length) in lengths.enumerate() {
            let index = taken[place];
            let next = taken.get(place + 1).copied();
            let write = if place < request.readable.len() {
                0
            } else {
                WRITE
            };
            let more = if next.is_some() { NEXT } else { 0 };
            let buffer = buffer(u64::from(index) * 4, *length);
            describe(memory, index, buffer, write | more, next.unwrap_or(0xffff));
            buffers.push(buffer);
        }
        let head = taken[0];
        set_head(memory, self.index % self.size, head);
        self.index = self.index.wrapping_add(1);
        set_index(memory, self.index);
        let chain = Chain {
            head,
            buffers,
            readable: request.readable.len(),
        };
        self.offered.push_back((head, taken, chain));
    }

    fn give_back(&mut self, memory: &GuestMemory, queue: &mut Queue, which: usize, written: u32) {
        let (head, descriptors) = self.flying.remove(which);
        queue.push(memory, head, written).unwrap();
        let mut pair = [0; 8];
        let at = USED + 4 + u64::from(self.used % self.size) * 8;
        memory.read(Gpa(at), &mut pair).unwrap();
        let mut expected = u32::from(head).to_le_bytes().to_vec();
        expected.extend(written.to_le_bytes());
        assert_eq!(pair.to_vec(), expected);
        self.used = self.used.wrapping_add(1);
        assert_eq!(memory.load_u16(Gpa(USED + 2)), Ok(self.used));
        self.free.extend(descriptors);
    }
}

proptest! {
    #[test]
    fn every_chain_of_a_good_driver_is_taken_once_and_whole(
        log_size in 2..6_u32,
        first in any::<u16>(),
        steps in prop::collection::vec(step(), 1..120),
    ) {
        let size = 1_u16 << log_size;
        let memory = memory();
        let mut begin = state(size);
        (begin.next_available, begin.next_used) = (first, first);
        let mut queue = Queue::new(&memory, &begin, QUEUE_SIZE_MAX).unwrap();
        let mut driver = Driver::new(size);
        (driver.index, driver.used) = (first, first);
        set_index(&memory, first);
        for step in steps {
            match step {
                Step::Offer(request) => driver.offer(&memory, &request),
                Step::Take => {
                    let expected = driver.offered.pop_front();
                    let found = popped(&memory, &mut queue);
                    let (chain, flying) = match expected {
                        Some((head, all, chain)) => (Some(chain), Some((head, all))),
                        None => (None, None),
                    };
                    prop_assert_eq!(found, Ok(chain));
                    driver.flying.extend(flying);
                }
                Step::GiveBack(which, written) => {
                    if !driver.flying.is_empty() {
                        let which = which.index(driver.flying.len());
                        driver.give_back(&memory, &mut queue, which, written);
                    }
                }
                Step::SaveAndRestore => {
                    queue = Queue::new(&memory, &queue.state(), size).unwrap();
                }
            }
            prop_assert_eq!(usize::from(queue.in_flight()), driver.flying.len());
        }
    }

    #[test]
    fn another_implementation_reads_the_same_chains(
        requests in prop::collection::vec(request(), 1..8),
    ) {
        const SIZE: u16 = 64;
        let memory = memory();
        let mut driver = Driver::new(SIZE);
        for request in &requests {
            driver.offer(&memory, request);
        }
        let mut bytes = vec![0; usize::try_from(MEMORY_BYTES).unwrap()];
        memory.read(Gpa(0), &mut bytes).unwrap();
        let other: GuestMemoryMmap<()> =
            GuestMemoryMmap::from_ranges(&[(GuestAddress(0), bytes.len())]).unwrap();
        other.write_slice(&bytes, GuestAddress(0)).unwrap();
        let mut theirs = OtherQueue::new(SIZE).unwrap();
        theirs.set_size(SIZE);
        theirs.try_set_desc_table_address(GuestAddress(DESCRIPTORS)).unwrap();
        theirs.try_set_avail_ring_address(GuestAddress(AVAILABLE)).unwrap();
        theirs.try_set_used_ring_address(GuestAddress(USED)).unwrap();
        theirs.set_ready(true);
        let mut ours = queue(&memory, SIZE);
        while let Some(chain) = theirs.pop_descriptor_chain(&other) {
            let head = chain.head_index();
            let parts: Vec<(bool, Buffer)> = chain
                .map(|d| {
                    let at = Gpa(d.addr().0);
                    (d.is_write_only(), Buffer { at, bytes: d.len() })
                })
                .collect();
            let mine = popped(&memory, &mut ours).unwrap().unwrap();
            prop_assert_eq!(mine.head(), head);
            let side = |write: bool| -> Vec<Buffer> {
                parts.iter().filter(|p| p.0 == write).map(|p| p.1).collect()
            };
            prop_assert_eq!(mine.readable(), side(false));
            prop_assert_eq!(mine.writable(), side(true));
        }
        prop_assert_eq!(popped(&memory, &mut ours), Ok(None));
    }

    #[test]
    fn a_driver_that_writes_anything_ends_in_a_fault_or_a_chain_in_memory(
        log_size in 0..6_u32,
        rings in prop::collection::vec(any::<u8>(), 1024),
        index in 0..40_u16,
        small in any::<bool>(),
    ) {
        let size = 1_u16 << log_size;
        let memory = memory();
        memory.write(Gpa(DESCRIPTORS), &rings).unwrap();
        memory.write(Gpa(AVAILABLE), &rings).unwrap();
        set_index(&memory, index);
        if small {
            // Most of random descriptors lie far outside: with these, chains get long.
            for (number, pair) in (0..size).zip(rings.chunks(2)) {
                let next = u16::from(pair[1]) % (size + 1);
                describe(&memory, number, buffer(0, 1), u16::from(pair[0] & 3), next);
                set_head(&memory, number, u16::from(pair[1]) % size);
            }
        }
        let mut queue = queue(&memory, size);
        for _ in 0..=size {
            match popped(&memory, &mut queue) {
                Ok(Some(chain)) => {
                    let parts = chain.readable().len() + chain.writable().len();
                    prop_assert!(parts >= 1 && parts <= usize::from(size));
                    for buffer in chain.readable().iter().chain(chain.writable()) {
                        prop_assert!(memory.check(buffer.at, u64::from(buffer.bytes)).is_ok());
                    }
                }
                Ok(None) | Err(_) => return Ok(()),
            }
        }
        prop_assert!(false, "more chains than descriptors");
    }
}
