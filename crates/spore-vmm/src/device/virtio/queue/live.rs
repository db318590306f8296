//! The live queues of a device as it uses them: by number, with the number in every fault, and with
//! the bytes of a chain as one row, however many buffers they are in.

use super::{Buffer, Chain, Queue, QueueFault};
use crate::memory::{Gpa, GuestMemory, OutOfMemory};

/// What a driver did, and in which of its device's queues.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Broken {
    /// The queue's number.
    pub queue: u16,
    /// What was done.
    pub what: QueueFault,
}

/// The queues of one device, and the memory that they are in. A queue that is not live is empty.
#[derive(Debug)]
pub struct Queues<'a> {
    live: &'a mut [Option<Queue>],
    memory: &'a GuestMemory,
}

impl<'a> Queues<'a> {
    /// Of queues by number.
    pub const fn new(live: &'a mut [Option<Queue>], memory: &'a GuestMemory) -> Self {
        Self { live, memory }
    }

    fn get(&mut self, queue: u16) -> Option<&mut Queue> {
        self.live.get_mut(usize::from(queue))?.as_mut()
    }

    /// Takes the next chain of a queue, if there is one.
    pub fn pop(&mut self, queue: u16, chain: &mut Chain) -> Result<bool, Broken> {
        let memory = self.memory;
        let popped = self.get(queue).map(|queue| queue.pop(memory, chain));
        popped
            .unwrap_or(Ok(false))
            .map_err(|what| Broken { queue, what })
    }

    /// Forgets that the last chain of a queue was taken.
    ///
    /// # Panics
    /// When none is in flight.
    pub fn put_back(&mut self, queue: u16) {
        if let Some(queue) = self.get(queue) {
            queue.put_back(1);
        }
    }

    /// Gives a chain back.
    ///
    /// # Panics
    /// When none is in flight.
    pub fn push(&mut self, queue: u16, head: u16, written: u32) -> Result<(), Broken> {
        let memory = self.memory;
        let pushed = self
            .get(queue)
            .map(|queue| queue.push(memory, head, written));
        pushed
            .unwrap_or(Ok(()))
            .map_err(|what| Broken { queue, what })
    }

    /// Whether the driver wants to be interrupted for what was given back.
    pub fn wants_interrupt(&self, queue: u16) -> Result<bool, Broken> {
        let Some(Some(live)) = self.live.get(usize::from(queue)) else {
            return Ok(false);
        };
        let wants = live.wants_interrupt(self.memory);
        wants.map_err(|what| Broken { queue, what })
    }

    /// Copies out of a chain's buffers, from `offset` bytes behind the beginning of the first on.
    /// Says how much it was: less than asked for where they end.
    pub fn gather(
        &self,
        queue: u16,
        buffers: &[Buffer],
        offset: usize,
        into: &mut [u8],
    ) -> Result<usize, Broken> {
        let mut done = 0;
        for (at, count) in pieces(buffers, offset, into.len()) {
            let part = into.get_mut(done..done + count).unwrap_or_default();
            let read = self.memory.read(at, part);
            read.map_err(|outside| broken(queue, outside))?;
            done += count;
        }
        Ok(done)
    }

    /// Copies into a chain's buffers, likewise.
    pub fn scatter(
        &self,
        queue: u16,
        buffers: &[Buffer],
        offset: usize,
        from: &[u8],
    ) -> Result<usize, Broken> {
        let mut done = 0;
        for (at, count) in pieces(buffers, offset, from.len()) {
            let part = from.get(done..done + count).unwrap_or_default();
            let written = self.memory.write(at, part);
            written.map_err(|outside| broken(queue, outside))?;
            done += count;
        }
        Ok(done)
    }
}

/// What cannot be: a chain's buffers were in memory when it was taken, and memory does not go away.
const fn broken(queue: u16, outside: OutOfMemory) -> Broken {
    let what = QueueFault::Buffer(outside);
    Broken { queue, what }
}

/// How long a buffer is.
fn length(buffer: &Buffer) -> usize {
    usize::try_from(buffer.bytes).unwrap_or(usize::MAX)
}

/// How many bytes there are in buffers of one chain, which are less than 4 GiB.
#[must_use]
pub fn total(buffers: &[Buffer]) -> usize {
    buffers.iter().map(length).sum()
}

/// The places of at most `count` bytes, from `offset` on.
fn pieces(
    buffers: &[Buffer],
    mut offset: usize,
    mut count: usize,
) -> impl Iterator<Item = (Gpa, usize)> {
    buffers.iter().filter_map(move |buffer| {
        let skip = offset.min(length(buffer));
        offset -= skip;
        let piece = (length(buffer) - skip).min(count);
        count -= piece;
        let at = buffer.at.plus(u64::try_from(skip).ok()?)?;
        (piece > 0).then_some((at, piece))
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{Queues, total};
    use crate::device::virtio::driver::memory;
    use crate::device::virtio::queue::Buffer;
    use crate::memory::Gpa;

    proptest! {
        #[test]
        fn a_chain_is_one_row_of_bytes(
            lengths in prop::collection::vec(0..9_u32, 0..6),
            offset in 0..50_usize,
            count in 0..50_usize,
        ) {
            let memory = memory();
            let buffers: Vec<Buffer> = (1..)
                .zip(lengths)
                .map(|(number, bytes)| Buffer { at: Gpa(number * 16), bytes })
                .collect();
            let whole = total(&buffers);
            let row: Vec<u8> = (1..=u8::try_from(whole).unwrap()).collect();
            let queues = Queues::new(&mut [], &memory);
            prop_assert_eq!(queues.scatter(0, &buffers, 0, &row).unwrap(), whole);
            let mut read = vec![0; count];
            let expected: Vec<u8> = row.iter().skip(offset).take(count).copied().collect();
            let found = queues.gather(0, &buffers, offset, &mut read).unwrap();
            prop_assert_eq!(&read[..found], expected);
            // A part is written where it is read, and nothing beside it.
            let part = vec![0xee; count];
            prop_assert_eq!(queues.scatter(0, &buffers, offset, &part).unwrap(), found);
            let mut expected = row;
            expected.iter_mut().skip(offset).take(count).for_each(|byte| *byte = 0xee);
            let mut read = vec![0; whole];
            queues.gather(0, &buffers, 0, &mut read).unwrap();
            prop_assert_eq!(read, expected);
        }
    }
}
