//! Entropy for the guest, from the host's generator.

use rustix::io::retry_on_intr;
use rustix::rand::{GetRandomFlags, getrandom};

use super::queue::{self, Broken, Chain, Queues};
use super::{Handled, VirtioDevice};

/// The most that one request is answered with; the driver asks again.
pub const RESPONSE_BYTES_MAX: usize = 256;

const QUEUE_SIZES: [u16; 1] = [16];

/// How many requests are answered in one turn: a driver on another processor can go on asking.
const REQUESTS_MAX: u16 = 16;

/// Where random bytes come from. `false` when there are none.
pub type Source = fn(&mut [u8]) -> bool;

/// The host's generator, by its system call: a library would look in files where it takes that for
/// missing, and a VMM has none.
#[must_use]
pub fn host(bytes: &mut [u8]) -> bool {
    let wanted = bytes.len();
    // So few bytes come all at once (getrandom(2)).
    let filled = retry_on_intr(|| getrandom(&mut *bytes, GetRandomFlags::empty()));
    filled == Ok(wanted)
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
    fn fill(&self, index: u16, queues: &Queues<'_>) -> Result<u32, Broken> {
        let mut random = [0; RESPONSE_BYTES_MAX];
        let wanted = queue::total(self.chain.writable()).min(random.len());
        let random = random.get_mut(..wanted).unwrap_or_default();
        if random.is_empty() || !(self.source)(random) {
            return Ok(0);
        }
        let written = queues.scatter(index, self.chain.writable(), 0, random)?;
        Ok(u32::try_from(written).unwrap_or(0))
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

    fn handle(&mut self, index: u16, queues: &mut Queues<'_>) -> Result<Handled, Broken> {
        let mut answered = 0;
        while answered < REQUESTS_MAX && queues.pop(index, &mut self.chain)? {
            let written = self.fill(index, queues)?;
            queues.push(index, self.chain.head(), written)?;
            answered += 1;
        }
        Ok(Handled {
            interrupt: answered > 0 && queues.wants_interrupt(index)?,
            more: answered == REQUESTS_MAX,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::{RESPONSE_BYTES_MAX, Rng};
    use crate::device::virtio::VirtioDevice as _;
    use crate::device::virtio::driver::{Driver, QUEUE_SIZE};

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
        let handled = rng.handle(0, &mut driver.queues()).unwrap();
        assert!(handled.interrupt && !handled.more);
        let limit = u32::try_from(RESPONSE_BYTES_MAX).unwrap();
        let done = driver.take(0);
        let lengths: Vec<u32> = done.iter().map(|done| done.written).collect();
        assert_eq!(lengths, [8, limit, 0]);
        assert_eq!(done[0].bytes, [7; 8], "across a buffer of no bytes");
        let end = RESPONSE_BYTES_MAX;
        assert_eq!(done[1].bytes[end - 1..=end], [7, 0xee]);
    }

    #[test]
    fn without_entropy_a_request_is_given_back_empty() {
        let mut rng = Rng::new(none);
        let mut driver = Driver::new();
        driver.offer(&[], &[8]);
        let handled = rng.handle(0, &mut driver.queues()).unwrap();
        assert!(handled.interrupt);
        assert_eq!(driver.take(0)[0].written, 0);
    }

    #[test]
    fn a_full_queue_takes_its_turns() {
        let mut rng = Rng::new(sevens);
        let mut driver = Driver::new();
        for _ in 0..QUEUE_SIZE {
            driver.offer(&[], &[1]);
        }
        let turn = |rng: &mut Rng, driver: &mut Driver| {
            let handled = rng.handle(0, &mut driver.queues());
            handled.unwrap().more
        };
        assert!(turn(&mut rng, &mut driver));
        assert!(!turn(&mut rng, &mut driver));
        assert_eq!(driver.take(0).len(), usize::from(QUEUE_SIZE));
    }

    #[test]
    fn a_queue_that_is_not_there_is_not_handled() {
        let mut rng = Rng::new(sevens);
        let mut driver = Driver::new();
        driver.live = vec![None];
        for index in [0, 1, u16::MAX] {
            let handled = rng.handle(index, &mut driver.queues());
            assert!(!handled.unwrap().interrupt);
        }
    }
}
