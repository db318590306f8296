//! Reads a split virtqueue that a hostile driver writes. Called by the virtio devices; never
//! believes a number, and never goes on after one that makes no sense.
//!
//! ```text
//!   descriptors  16 bytes each: where, how long, flags, which comes next
//!   available    flags, index, then heads of chains          written by the driver
//!   used         flags, index, then (head, length) pairs     written by us
//! ```
//!
//! A chain is read whole and copied before a device sees any of it, since the driver may change it
//! meanwhile. Whatever is wrong with it is a [`QueueFault`]: the guest ends. Going on would mean to
//! guess what the driver meant, and a driver that is wrong once is wrong again.
//!
//! Not offered, so not read: indirect descriptors, and event indices (a stale one in a snapshot
//! silences every later notification).

mod live;
#[cfg(test)]
mod tests;

pub use live::{Broken, Queues, total};

use std::sync::atomic::{Ordering, fence};

use crate::memory::{Gpa, GuestMemory, OutOfMemory};
use crate::snapshot::Saved;
use crate::snapshot::format::{Fields, FormatError};

/// The most entries that any queue of ours has.
pub const QUEUE_SIZE_MAX: u16 = 256;

const DESCRIPTOR_BYTES: u64 = 16;
const DESCRIPTOR_ALIGN: u64 = 16;
const AVAILABLE_ALIGN: u64 = 2;
const USED_ALIGN: u64 = 4;

/// Flags and index, before the entries of either ring.
const RING_HEAD_BYTES: u64 = 4;
const AVAILABLE_BYTES: u64 = 2;
const USED_BYTES: u64 = 8;

/// Of a descriptor.
const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// Of the available ring: the driver looks by itself and wants no interrupt.
const NO_INTERRUPT: u16 = 1;

/// What a driver did that no driver does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QueueFault {
    /// The number of entries is none that a queue can have.
    #[error("a queue of {size} entries: a power of two up to {most} is possible")]
    Size {
        /// What the driver asked for.
        size: u16,
        /// What it was offered.
        most: u16,
    },
    /// A part of the queue is where it may not begin.
    #[error("the {part} begins at {at}, which is no multiple of {align}")]
    Misaligned {
        /// Which part.
        part: Part,
        /// Where it begins.
        at: Gpa,
        /// What it must be a multiple of.
        align: u64,
    },
    /// A part of the queue is not in memory.
    #[error("the {part} is outside: {outside}")]
    Outside {
        /// Which part.
        part: Part,
        /// The range.
        outside: OutOfMemory,
    },
    /// More chains than the queue has descriptors.
    #[error("the available index is {index} when {used} were used: a queue of {size}")]
    Available {
        /// What the driver wrote.
        index: u16,
        /// How many were given back, counted in the same way.
        used: u16,
        /// Entries of the queue.
        size: u16,
    },
    /// A chain begins or goes on at a descriptor that is none.
    #[error("descriptor {index} of a queue of {size}")]
    Index {
        /// What the driver wrote.
        index: u16,
        /// Entries of the queue.
        size: u16,
    },
    /// A chain goes on for ever.
    #[error("a chain of more than {size} descriptors")]
    Endless {
        /// Entries of the queue.
        size: u16,
    },
    /// A descriptor with flags that were not agreed on.
    #[error("descriptor {index} has flags {flags:#x}")]
    Flags {
        /// Which one.
        index: u16,
        /// What the driver wrote.
        flags: u16,
    },
    /// Something to read behind something to write.
    #[error("descriptor {index} is to be read and comes after one to be written")]
    Order {
        /// Which one.
        index: u16,
    },
    /// A chain of 4 GiB and more.
    #[error("a chain of more than {} bytes", u32::MAX)]
    Long,
    /// What a chain points to is not in memory.
    #[error("a buffer is outside: {0}")]
    Buffer(OutOfMemory),
    /// A request that is none of the device's, whatever is in it.
    #[error("a request of {readable} bytes to be read and {writable} to be written")]
    Request {
        /// What the driver gave the device to read.
        readable: usize,
        /// What it gave it to write.
        writable: usize,
    },
    /// Saved indices that no queue comes to have.
    #[error("{available} chains were taken and {used} used: a queue of {size}")]
    Indices {
        /// How many were taken.
        available: u16,
        /// How many were given back.
        used: u16,
        /// Entries of the queue.
        size: u16,
    },
}

/// The three parts of a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The table of descriptors.
    Descriptors,
    /// The ring that the driver writes.
    Available,
    /// The ring that we write.
    Used,
}

impl std::fmt::Display for Part {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Descriptors => "descriptor table",
            Self::Available => "available ring",
            Self::Used => "used ring",
        })
    }
}

/// What a driver says of a queue, and what is saved of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueState {
    /// Entries.
    pub size: u16,
    /// Whether the driver has finished saying.
    pub ready: bool,
    /// Where the descriptors are.
    pub descriptors: u64,
    /// Where the driver writes.
    pub available: u64,
    /// Where we write.
    pub used: u64,
    /// How many chains were taken, ever; it wraps.
    pub next_available: u16,
    /// How many were given back, ever; it wraps.
    pub next_used: u16,
}

impl Saved for QueueState {
    const VERSION: u16 = 1;

    fn put(&self, into: &mut Vec<u8>) {
        into.extend(self.size.to_le_bytes());
        into.push(u8::from(self.ready));
        for place in [self.descriptors, self.available, self.used] {
            into.extend(place.to_le_bytes());
        }
        into.extend(self.next_available.to_le_bytes());
        into.extend(self.next_used.to_le_bytes());
    }

    fn get(from: &mut Fields<'_>) -> Result<Self, FormatError> {
        Ok(Self {
            size: from.u16()?,
            ready: from.flag("readiness of a queue")?,
            descriptors: from.u64()?,
            available: from.u64()?,
            used: from.u64()?,
            next_available: from.u16()?,
            next_used: from.u16()?,
        })
    }
}

/// A piece of memory that a chain points to. It was inside of the guest's memory when it was read,
/// and memory does not go away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// Where it begins.
    pub at: Gpa,
    /// How long it is.
    pub bytes: u32,
}

/// A request: what the device reads, then what it writes. Kept by its device and filled anew for
/// each, so that no request allocates.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chain {
    head: u16,
    buffers: Vec<Buffer>,
    /// How many of them are to be read; the others are to be written.
    readable: usize,
}

impl Default for Chain {
    fn default() -> Self {
        Self {
            head: 0,
            buffers: Vec::with_capacity(usize::from(QUEUE_SIZE_MAX)),
            readable: 0,
        }
    }
}

impl Chain {
    /// The fault of a chain that makes no sense to its device.
    #[must_use]
    pub fn fault(&self, queue: u16) -> Broken {
        let what = QueueFault::Request {
            readable: total(self.readable()),
            writable: total(self.writable()),
        };
        Broken { queue, what }
    }

    /// What names it when it is given back.
    #[must_use]
    pub const fn head(&self) -> u16 {
        self.head
    }

    /// What the device reads.
    #[must_use]
    pub fn readable(&self) -> &[Buffer] {
        self.buffers.get(..self.readable).unwrap_or_default()
    }

    /// What the device writes.
    #[must_use]
    pub fn writable(&self) -> &[Buffer] {
        self.buffers.get(self.readable..).unwrap_or_default()
    }
}

/// A queue that its driver has finished describing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Queue {
    size: u16,
    descriptors: Gpa,
    available: Gpa,
    used: Gpa,
    next_available: u16,
    next_used: u16,
}

impl Queue {
    /// A queue as its driver described it or as it was saved, all of it in memory.
    pub fn new(memory: &GuestMemory, state: &QueueState, most: u16) -> Result<Self, QueueFault> {
        let size = state.size;
        if !size.is_power_of_two() || size > most {
            return Err(QueueFault::Size { size, most });
        }
        let entries = u64::from(size);
        let place = |part, at, align, bytes| {
            let at = Gpa(at);
            if !at.0.is_multiple_of(align) {
                return Err(QueueFault::Misaligned { part, at, align });
            }
            let checked = memory.check(at, bytes);
            checked.map_err(|outside| QueueFault::Outside { part, outside })?;
            Ok(at)
        };
        let queue = Self {
            size,
            descriptors: place(
                Part::Descriptors,
                state.descriptors,
                DESCRIPTOR_ALIGN,
                entries * DESCRIPTOR_BYTES,
            )?,
            available: place(
                Part::Available,
                state.available,
                AVAILABLE_ALIGN,
                RING_HEAD_BYTES + entries * AVAILABLE_BYTES,
            )?,
            used: place(
                Part::Used,
                state.used,
                USED_ALIGN,
                RING_HEAD_BYTES + entries * USED_BYTES,
            )?,
            next_available: state.next_available,
            next_used: state.next_used,
        };
        if queue.in_flight() > size {
            return Err(QueueFault::Indices {
                available: queue.next_available,
                used: queue.next_used,
                size,
            });
        }
        Ok(queue)
    }

    /// What is saved. With chains in flight it says that they were taken and not given back, so a
    /// device gives them back first, or puts them back.
    #[must_use]
    pub const fn state(&self) -> QueueState {
        QueueState {
            size: self.size,
            ready: true,
            descriptors: self.descriptors.0,
            available: self.available.0,
            used: self.used.0,
            next_available: self.next_available,
            next_used: self.next_used,
        }
    }

    /// How many chains were taken and not given back.
    #[must_use]
    pub const fn in_flight(&self) -> u16 {
        self.next_available.wrapping_sub(self.next_used)
    }

    /// Takes the next chain, if the driver has made one available.
    pub fn pop(&mut self, memory: &GuestMemory, chain: &mut Chain) -> Result<bool, QueueFault> {
        let index = self.load(memory, Part::Available, 2)?;
        // Of `size` descriptors no more chains can be made than there are, ours in flight included.
        let waiting = index.wrapping_sub(self.next_available);
        if waiting > self.size - self.in_flight() {
            return Err(QueueFault::Available {
                index,
                used: self.next_used,
                size: self.size,
            });
        }
        if waiting == 0 {
            return Ok(false);
        }
        let entry = u64::from(self.next_available % self.size);
        let offset = RING_HEAD_BYTES + entry * AVAILABLE_BYTES;
        let head = self.load(memory, Part::Available, offset)?;
        self.read_chain(memory, head, chain)?;
        self.next_available = self.next_available.wrapping_add(1);
        Ok(true)
    }

    /// Forgets that the last `count` chains were taken: nothing was done of them yet.
    ///
    /// # Panics
    /// When fewer are in flight.
    pub fn put_back(&mut self, count: u16) {
        assert!(count <= self.in_flight(), "only taken chains are put back");
        self.next_available = self.next_available.wrapping_sub(count);
    }

    /// Gives a chain back, with so many bytes written from the beginning of what was to be written.
    ///
    /// # Panics
    /// When none is in flight.
    pub fn push(
        &mut self,
        memory: &GuestMemory,
        head: u16,
        written: u32,
    ) -> Result<(), QueueFault> {
        assert!(self.in_flight() > 0, "only taken chains are given back");
        let entry = u64::from(self.next_used % self.size);
        let at = Gpa(self.used.0 + RING_HEAD_BYTES + entry * USED_BYTES);
        let mut pair = [0; 8];
        let (id, length) = pair.split_at_mut(4);
        id.copy_from_slice(&u32::from(head).to_le_bytes());
        length.copy_from_slice(&written.to_le_bytes());
        let outside = |outside| QueueFault::Outside {
            part: Part::Used,
            outside,
        };
        memory.write(at, &pair).map_err(outside)?;
        self.next_used = self.next_used.wrapping_add(1);
        let index = Gpa(self.used.0 + 2);
        memory.store_u16(index, self.next_used).map_err(outside)
    }

    /// Whether the driver wants to be interrupted for what was given back.
    pub fn wants_interrupt(&self, memory: &GuestMemory) -> Result<bool, QueueFault> {
        // The driver writes its wish and then looks at our index; we wrote the index and now look
        // at its wish. Without a fence both could look too early, and it would wait for ever.
        fence(Ordering::SeqCst);
        let flags = self.load(memory, Part::Available, 0)?;
        Ok(flags & NO_INTERRUPT == 0)
    }

    fn load(&self, memory: &GuestMemory, part: Part, offset: u64) -> Result<u16, QueueFault> {
        let start = match part {
            Part::Descriptors => self.descriptors,
            Part::Available => self.available,
            Part::Used => self.used,
        };
        let loaded = memory.load_u16(Gpa(start.0 + offset));
        loaded.map_err(|outside| QueueFault::Outside { part, outside })
    }

    /// Copies the chain that begins at `head`.
    fn read_chain(
        &self,
        memory: &GuestMemory,
        head: u16,
        chain: &mut Chain,
    ) -> Result<(), QueueFault> {
        chain.head = head;
        chain.buffers.clear();
        chain.readable = 0;
        let mut total = 0_u32;
        let mut index = head;
        for _ in 0..self.size {
            let descriptor = self.descriptor(memory, index)?;
            if descriptor.flags & !(NEXT | WRITE) != 0 {
                let flags = descriptor.flags;
                return Err(QueueFault::Flags { index, flags });
            }
            let buffer = descriptor.buffer;
            let inside = memory.check(buffer.at, u64::from(buffer.bytes));
            inside.map_err(QueueFault::Buffer)?;
            total = total.checked_add(buffer.bytes).ok_or(QueueFault::Long)?;
            if descriptor.flags & WRITE == 0 {
                if chain.readable < chain.buffers.len() {
                    return Err(QueueFault::Order { index });
                }
                chain.readable += 1;
            }
            chain.buffers.push(buffer);
            if descriptor.flags & NEXT == 0 {
                return Ok(());
            }
            index = descriptor.next;
        }
        Err(QueueFault::Endless { size: self.size })
    }

    /// Copies one descriptor: all of what is looked at comes from this copy.
    fn descriptor(&self, memory: &GuestMemory, index: u16) -> Result<Descriptor, QueueFault> {
        if index >= self.size {
            let size = self.size;
            return Err(QueueFault::Index { index, size });
        }
        let at = Gpa(self.descriptors.0 + u64::from(index) * DESCRIPTOR_BYTES);
        let mut raw = [0; 16];
        let read = memory.read(at, &mut raw);
        read.map_err(|outside| QueueFault::Outside {
            part: Part::Descriptors,
            outside,
        })?;
        let [
            a0,
            a1,
            a2,
            a3,
            a4,
            a5,
            a6,
            a7,
            b0,
            b1,
            b2,
            b3,
            f0,
            f1,
            n0,
            n1,
        ] = raw;
        Ok(Descriptor {
            buffer: Buffer {
                at: Gpa(u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7])),
                bytes: u32::from_le_bytes([b0, b1, b2, b3]),
            },
            flags: u16::from_le_bytes([f0, f1]),
            next: u16::from_le_bytes([n0, n1]),
        })
    }
}

#[derive(Clone, Copy, Debug)]
struct Descriptor {
    buffer: Buffer,
    flags: u16,
    next: u16,
}
