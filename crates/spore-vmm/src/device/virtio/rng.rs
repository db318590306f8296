//! Entropy for the guest, from the host's generator.

use super::queue::{Chain, Queue, QueueFault};
use super::{Handled, VirtioDevice};
use crate::memory::GuestMemory;

/// The most that one request is answered with; the driver asks again.
pub const RESPONSE_BYTES_MAX: usize = 256;

const QUEUE_SIZES: [u16; 1] = [16];

/// How many requests are answered in one turn: a driver on another processor can go on asking.
const REQUESTS_MAX: u16 = 16;

/// Where random bytes come from. `false` when there are none.
pub type Source = fn(&mut [u8]) -> bool;

/// The host's generator.
#[must_use]
pub fn host(bytes: &mut [u8]) -> bool {
    getrandom::fill(bytes).is_ok()
}

/// The device.
#[derive(Debug)]
pub struct Rng {
    source: Source,
    chain: Chain,
}

impl Rng {
    /// One that answers from a source.
    #[must_use]
    pub fn new(source: Source) -> Self {
        Self {
            source,
            chain: Chain::default(),
        }
    }

    /// Fills what a request gives, up to the limit; says how much it was.
    fn fill(&self, memory: &GuestMemory) -> Result<u32, QueueFault> {
        let mut random = [0; RESPONSE_BYTES_MAX];
        let mut rest = random.as_mut_slice();
        let mut written = 0_u32;
        for buffer in self.chain.writable() {
            let count = usize::try_from(buffer.bytes).unwrap_or(usize::MAX);
            let (part, behind) = rest.split_at_mut(count.min(rest.len()));
            rest = behind;
            if part.is_empty() || !(self.source)(part) {
                break;
            }
            memory.write(buffer.at, part).map_err(QueueFault::Buffer)?;
            written += u32::try_from(part.len()).unwrap_or(0);
        }
        Ok(written)
    }
}

impl VirtioDevice for Rng {
    fn name(&self) -> &'static str {
        "rng"
    }

    fn id(&self) -> u32 {
        4
    }

    fn features(&self) -> u64 {
        0
    }

    fn queues(&self) -> &'static [u16] {
        &QUEUE_SIZES
    }

    fn config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn activate(&mut self, _features: u64) {}

    fn reset(&mut self) {}

    fn handle(
        &mut self,
        index: u16,
        queues: &mut [Option<Queue>],
        memory: &GuestMemory,
    ) -> Result<Handled, QueueFault> {
        let Some(Some(queue)) = queues.get_mut(usize::from(index)) else {
            return Ok(Handled::default());
        };
        let mut answered = 0;
        while answered < REQUESTS_MAX && queue.pop(memory, &mut self.chain)? {
            let written = self.fill(memory)?;
            queue.push(memory, self.chain.head(), written)?;
            answered += 1;
        }
        Ok(Handled {
            interrupt: answered > 0 && queue.wants_interrupt(memory)?,
            more: answered == REQUESTS_MAX,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::{RESPONSE_BYTES_MAX, Rng};
    use crate::device::virtio::VirtioDevice as _;
    use crate::device::virtio::driver::{Driver, QUEUE_SIZE};
    use crate::memory::Gpa;

    fn sevens(bytes: &mut [u8]) -> bool {
        bytes.fill(7);
        true
    }

    fn none(_bytes: &mut [u8]) -> bool {
        false
    }

    #[test]
    fn a_request_is_filled_across_its_buffers_up_to_the_limit() {
        let mut rng = Rng::new(sevens);
        let mut driver = Driver::new();
        driver.offer(&[], &[3, 0, 5]);
        driver.offer(&[], &[1000]);
        driver.offer(&[4], &[]);
        let handled = rng.handle(0, &mut driver.queues, &driver.memory).unwrap();
        assert!(handled.interrupt && !handled.more);
        let limit = u32::try_from(RESPONSE_BYTES_MAX).unwrap();
        let lengths: Vec<u32> = driver.used().iter().map(|used| used.1).collect();
        assert_eq!(
            lengths,
            [3, limit, 0],
            "a buffer of no bytes ends a request"
        );
        let mut bytes = [0; 4];
        let first = driver.buffers[0][0];
        driver.memory.read(first, &mut bytes).unwrap();
        assert_eq!(bytes, [7, 7, 7, 0]);
        let second = Gpa(driver.buffers[1][0].0 + u64::from(limit) - 1);
        let mut bytes = [0; 2];
        driver.memory.read(second, &mut bytes).unwrap();
        assert_eq!(bytes, [7, 0]);
    }

    #[test]
    fn without_entropy_a_request_is_given_back_empty() {
        let mut rng = Rng::new(none);
        let mut driver = Driver::new();
        driver.offer(&[], &[8]);
        let handled = rng.handle(0, &mut driver.queues, &driver.memory).unwrap();
        assert!(handled.interrupt);
        assert_eq!(driver.used(), [(0, 0)]);
    }

    #[test]
    fn a_full_queue_takes_its_turns() {
        let mut rng = Rng::new(sevens);
        let mut driver = Driver::new();
        for _ in 0..QUEUE_SIZE {
            driver.offer(&[], &[1]);
        }
        let turn = |rng: &mut Rng, driver: &mut Driver| {
            let handled = rng.handle(0, &mut driver.queues, &driver.memory);
            handled.unwrap().more
        };
        assert!(turn(&mut rng, &mut driver));
        assert!(!turn(&mut rng, &mut driver));
        assert_eq!(driver.used().len(), usize::from(QUEUE_SIZE));
    }

    #[test]
    fn a_queue_that_is_not_there_is_not_handled() {
        let mut rng = Rng::new(sevens);
        let mut driver = Driver::new();
        driver.queues = vec![None];
        for index in [0, 1, u16::MAX] {
            let handled = rng.handle(index, &mut driver.queues, &driver.memory);
            assert!(!handled.unwrap().interrupt);
        }
    }
}
