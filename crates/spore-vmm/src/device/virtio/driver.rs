//! A driver for tests: one queue in a small memory, and requests of given lengths.

use std::os::fd::AsFd as _;

use rustix::fs::MemfdFlags;

use super::queue::{QUEUE_SIZE_MAX, Queue, QueueState};
use crate::memory::{Gpa, GuestMemory, Region, Sharing, Space};

/// Entries of its queue.
pub(crate) const QUEUE_SIZE: u16 = 16;

const MEMORY_BYTES: u64 = 0x1_0000;
const DESCRIPTORS: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
const BUFFERS: u64 = 0x4000;

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

/// Where the queue's parts are.
pub(crate) const fn state() -> QueueState {
    QueueState {
        size: QUEUE_SIZE,
        ready: true,
        descriptors: DESCRIPTORS,
        available: AVAILABLE,
        used: USED,
        next_available: 0,
        next_used: 0,
    }
}

/// The driver's side of a queue, and ours.
#[derive(Debug)]
pub(crate) struct Driver {
    pub(crate) memory: GuestMemory,
    pub(crate) queues: Vec<Option<Queue>>,
    /// Where the buffers of each request are.
    pub(crate) buffers: Vec<Vec<Gpa>>,
    next_descriptor: u16,
    next_byte: u64,
}

impl Driver {
    pub(crate) fn new() -> Self {
        let memory = memory();
        let queue = Queue::new(&memory, &state(), QUEUE_SIZE_MAX).unwrap();
        Self {
            memory,
            queues: vec![Some(queue)],
            buffers: Vec::new(),
            next_descriptor: 0,
            next_byte: BUFFERS,
        }
    }

    /// Makes a request available.
    pub(crate) fn offer(&mut self, readable: &[u32], writable: &[u32]) {
        let head = self.next_descriptor;
        let count = readable.len() + writable.len();
        let lengths = readable.iter().map(|l| (0, *l));
        let lengths = lengths.chain(writable.iter().map(|l| (2, *l)));
        let mut places = Vec::new();
        for (number, (flags, length)) in (1..).zip(lengths) {
            let more = u16::from(number < count);
            let mut raw = self.next_byte.to_le_bytes().to_vec();
            raw.extend(length.to_le_bytes());
            raw.extend((flags | more).to_le_bytes());
            raw.extend((self.next_descriptor + 1).to_le_bytes());
            let at = DESCRIPTORS + u64::from(self.next_descriptor) * 16;
            self.memory.write(Gpa(at), &raw).unwrap();
            places.push(Gpa(self.next_byte));
            self.next_byte += u64::from(length) + 8;
            self.next_descriptor += 1;
        }
        assert!(self.next_descriptor <= QUEUE_SIZE, "no free descriptor");
        let index = u16::try_from(self.buffers.len()).unwrap();
        let entry = Gpa(AVAILABLE + 4 + u64::from(index) * 2);
        self.memory.store_u16(entry, head).unwrap();
        let index = index + 1;
        self.memory.store_u16(Gpa(AVAILABLE + 2), index).unwrap();
        self.buffers.push(places);
    }

    /// Heads and lengths that were given back.
    pub(crate) fn used(&self) -> Vec<(u32, u32)> {
        let count = self.memory.load_u16(Gpa(USED + 2)).unwrap();
        let number = |at| {
            let mut bytes = [0; 4];
            self.memory.read(Gpa(at), &mut bytes).unwrap();
            u32::from_le_bytes(bytes)
        };
        (0..u64::from(count))
            .map(|entry| USED + 4 + entry * 8)
            .map(|at| (number(at), number(at + 4)))
            .collect()
    }
}
