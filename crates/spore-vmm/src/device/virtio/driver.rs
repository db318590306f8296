//! A driver for tests: its queues in a small memory, and requests with given bytes and lengths.

use std::os::fd::AsFd as _;

use rustix::fs::MemfdFlags;

use super::queue::{QUEUE_SIZE_MAX, Queue, QueueState, Queues};
use super::{F_VERSION_1, mmio};
use crate::memory::{Gpa, GuestMemory, Region, Sharing, Space};

/// Entries of each of its queues.
pub(crate) const QUEUE_SIZE: u16 = 16;

const MEMORY_BYTES: u64 = 0x1_0000;

/// Where the parts of a queue are, from its place on; the next one's are behind.
const QUEUE_BYTES: u64 = 0x10_0000;
const DESCRIPTORS: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
const BUFFERS: u64 = 0x4000;

/// The most bytes of a descriptor's buffer.
const BUFFER_BYTES: u64 = 0x8000;

/// A small memory.
pub(crate) fn memory() -> GuestMemory {
    memory_of(MEMORY_BYTES)
}

/// One of so many bytes, from address 0 on.
pub(crate) fn memory_of(bytes: u64) -> GuestMemory {
    let file = rustix::fs::memfd_create("driver", MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&file, bytes).unwrap();
    let region = Region {
        start: Gpa(0),
        offset: 0,
        bytes,
    };
    let space = Space::reserve(bytes).unwrap();
    let memory = space.fill(file.as_fd(), Sharing::Shared, &[region]);
    memory.unwrap()
}

/// Where the first queue's parts are.
pub(crate) const fn state() -> QueueState {
    state_of(0)
}

/// Where a queue's parts are.
const fn state_of(queue: u64) -> QueueState {
    let place = queue * QUEUE_BYTES;
    QueueState {
        size: QUEUE_SIZE,
        ready: true,
        descriptors: place + DESCRIPTORS,
        available: place + AVAILABLE,
        used: place + USED,
        next_available: 0,
        next_used: 0,
    }
}

/// The driver's side of its queues, and ours.
#[derive(Debug)]
pub(crate) struct Driver {
    pub(crate) memory: GuestMemory,
    pub(crate) live: Vec<Option<Queue>>,
    sides: Vec<Side>,
}

/// What the driver knows of a queue.
#[derive(Debug, Default)]
struct Side {
    /// Descriptors by number, those that are free last.
    free: Vec<u16>,
    available: u16,
    used: u16,
    out: Vec<Request>,
}

/// A request that is out.
#[derive(Debug)]
struct Request {
    /// Its descriptors, the head first.
    chain: Vec<u16>,
    /// What is to be written.
    room: Vec<(Gpa, u32)>,
}

/// A request that came back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Done {
    pub(crate) head: u16,
    /// How much the device says that it has written.
    pub(crate) written: u32,
    /// All of what it could write.
    pub(crate) bytes: Vec<u8>,
}

impl Done {
    /// What the device has written.
    pub(crate) fn data(&self) -> &[u8] {
        &self.bytes[..usize::try_from(self.written).unwrap()]
    }
}

impl Driver {
    /// One with a single queue.
    pub(crate) fn new() -> Self {
        Self::with_queues(1)
    }

    /// One with so many queues, all of them live.
    pub(crate) fn with_queues(count: u64) -> Self {
        let memory = memory_of(count * QUEUE_BYTES);
        let queue = |index| Queue::new(&memory, &state_of(index), QUEUE_SIZE_MAX).unwrap();
        let live = (0..count).map(|index| Some(queue(index))).collect();
        let side = || Side {
            free: (0..QUEUE_SIZE).rev().collect(),
            ..Side::default()
        };
        Self {
            live,
            sides: (0..count).map(|_| side()).collect(),
            memory,
        }
    }

    /// What a device is given of them.
    pub(crate) fn queues(&mut self) -> Queues<'_> {
        Queues::new(&mut self.live, &self.memory)
    }

    /// Writes a descriptor as it is given, whatever it says; its buffer is at `offset` of the
    /// queue's buffers.
    pub(crate) fn describe(&self, queue: u64, index: u16, offset: u64, rest: (u32, u16, u16)) {
        let place = queue * QUEUE_BYTES;
        let (length, flags, next) = rest;
        let mut raw = (place + BUFFERS)
            .wrapping_add(offset)
            .to_le_bytes()
            .to_vec();
        raw.extend(length.to_le_bytes());
        raw.extend(flags.to_le_bytes());
        raw.extend(next.to_le_bytes());
        let at = place + DESCRIPTORS + u64::from(index) * 16;
        self.memory.write(Gpa(at), &raw).unwrap();
    }

    /// Writes to the queue's buffers.
    pub(crate) fn fill(&self, queue: u64, offset: u64, bytes: &[u8]) {
        let at = Gpa(queue * QUEUE_BYTES + BUFFERS + offset);
        self.memory.write(at, bytes).unwrap();
    }

    /// Makes heads available as they are given, whatever they say.
    pub(crate) fn announce(&mut self, queue: u16, heads: &[u16]) {
        let ring = u64::from(queue) * QUEUE_BYTES + AVAILABLE;
        let side = &mut self.sides[usize::from(queue)];
        for head in heads {
            let entry = u64::from(side.available % QUEUE_SIZE);
            let at = Gpa(ring + 4 + entry * 2);
            self.memory.store_u16(at, *head).unwrap();
            side.available = side.available.wrapping_add(1);
        }
        let index = Gpa(ring + 2);
        self.memory.store_u16(index, side.available).unwrap();
    }

    /// The transport as a driver leaves it that has taken some features and is ready.
    pub(crate) fn transport(&self, features: u64) -> mmio::State {
        use mmio::status::{ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK};
        let queues = self.live.iter();
        mmio::State {
            status: ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK,
            features: features | F_VERSION_1,
            queues: queues
                .map(|live| live.as_ref().map(Queue::state).unwrap_or_default())
                .collect(),
            ..mmio::State::default()
        }
    }

    /// How many descriptors of a queue are free.
    pub(crate) fn free(&self, queue: usize) -> usize {
        self.sides[queue].free.len()
    }

    /// Makes a request available in the first queue.
    pub(crate) fn offer(&mut self, readable: &[u32], writable: &[u32]) -> u16 {
        let zeros = |bytes: &u32| vec![0; usize::try_from(*bytes).unwrap()];
        let readable: Vec<Vec<u8>> = readable.iter().map(zeros).collect();
        let readable: Vec<&[u8]> = readable.iter().map(Vec::as_slice).collect();
        self.send(0, &readable, writable)
    }

    /// Makes a request available in a queue: bytes to be read, then room to be written, filled
    /// with `0xee`. Says its head.
    pub(crate) fn send(&mut self, queue: usize, readable: &[&[u8]], writable: &[u32]) -> u16 {
        let place = queue as u64 * QUEUE_BYTES;
        let side = &mut self.sides[queue];
        let count = readable.len() + writable.len();
        assert!(count > 0 && count <= side.free.len(), "no free descriptor");
        let chain = side.free.split_off(side.free.len() - count);
        let blank: Vec<Vec<u8>> = writable
            .iter()
            .map(|bytes| vec![0xee; usize::try_from(*bytes).unwrap()])
            .collect();
        let readable = readable.iter().map(|bytes| (0_u16, *bytes));
        let contents = readable.chain(blank.iter().map(|bytes| (2, bytes.as_slice())));
        let mut room = Vec::new();
        for (number, (flags, bytes)) in contents.enumerate() {
            let at = Gpa(place + BUFFERS + u64::from(chain[number]) * BUFFER_BYTES);
            assert!(bytes.len() as u64 <= BUFFER_BYTES);
            self.memory.write(at, bytes).unwrap();
            let length = u32::try_from(bytes.len()).unwrap();
            if flags == 2 {
                room.push((at, length));
            }
            let next = chain.get(number + 1);
            let mut raw = at.0.to_le_bytes().to_vec();
            raw.extend(length.to_le_bytes());
            raw.extend((flags | u16::from(next.is_some())).to_le_bytes());
            raw.extend(next.copied().unwrap_or(0).to_le_bytes());
            let at = place + DESCRIPTORS + u64::from(chain[number]) * 16;
            self.memory.write(Gpa(at), &raw).unwrap();
        }
        let head = chain[0];
        side.out.push(Request { chain, room });
        let entry = u64::from(side.available % QUEUE_SIZE);
        let ring = place + AVAILABLE;
        self.memory
            .store_u16(Gpa(ring + 4 + entry * 2), head)
            .unwrap();
        side.available = side.available.wrapping_add(1);
        self.memory
            .store_u16(Gpa(ring + 2), side.available)
            .unwrap();
        head
    }

    /// Takes what came back in a queue since it was last asked, in order.
    pub(crate) fn take(&mut self, queue: usize) -> Vec<Done> {
        let ring = queue as u64 * QUEUE_BYTES + USED;
        let side = &mut self.sides[queue];
        let now = self.memory.load_u16(Gpa(ring + 2)).unwrap();
        let mut done = Vec::new();
        while side.used != now {
            let entry = ring + 4 + u64::from(side.used % QUEUE_SIZE) * 8;
            side.used = side.used.wrapping_add(1);
            let number = |at| {
                let mut bytes = [0; 4];
                self.memory.read(Gpa(at), &mut bytes).unwrap();
                u32::from_le_bytes(bytes)
            };
            let head = u16::try_from(number(entry)).unwrap();
            let at = side.out.iter().position(|request| request.chain[0] == head);
            let Request { chain, room } = side.out.remove(at.expect("it is out"));
            side.free.extend(chain);
            let mut bytes = Vec::new();
            for (at, length) in room {
                let mut part = vec![0; usize::try_from(length).unwrap()];
                self.memory.read(at, &mut part).unwrap();
                bytes.extend(part);
            }
            let written = number(entry + 4);
            assert!(usize::try_from(written).unwrap() <= bytes.len());
            done.push(Done {
                head,
                written,
                bytes,
            });
        }
        done
    }
}
