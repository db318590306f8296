//! Chance and time as arguments: both come from the seed, so that a run can be had again.
//!
//! Used by everything here. Never asks the host for either.

use core::time::Duration;
use std::sync::atomic::{AtomicU64, Ordering};

use jiff::Timestamp;
use tokio::time::Instant;

/// When every simulated world begins.
const EPOCH_S: u64 = 1_900_000_000;

/// Numbers from a seed.
#[derive(Clone, Debug)]
pub struct Chance(u64);

/// One round of splitmix64.
const fn mix(seed: u64) -> u64 {
    let z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

impl Chance {
    /// The numbers of `seed` for one purpose; two purposes do not disturb each other.
    #[must_use]
    pub fn new(seed: u64, purpose: &str) -> Self {
        let folded = purpose
            .bytes()
            .fold(mix(seed), |sum, byte| mix(sum ^ u64::from(byte)));
        Self(folded)
    }

    /// The next number.
    pub const fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// Less than `end`.
    pub const fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    /// Less than `most`, for a plan of faults.
    pub fn permille(&mut self, most: u16) -> u16 {
        u16::try_from(self.below(u64::from(most))).unwrap_or(0)
    }

    /// Whether something happens that does so in so many of a thousand cases.
    pub const fn happens(&mut self, permille: u64) -> bool {
        self.below(1000) < permille
    }

    /// One of these.
    pub fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        let count = u64::try_from(from.len().max(1)).unwrap_or(1);
        let at = usize::try_from(self.below(count)).unwrap_or(0);
        &from[at]
    }

    /// A span below `ms` milliseconds.
    pub const fn span(&mut self, ms: u64) -> Duration {
        Duration::from_millis(self.below(ms))
    }
}

/// Ids for control and the node, from the seed.
#[derive(Debug)]
pub struct Ids {
    seed: u64,
    given: AtomicU64,
}

impl Ids {
    /// The ids of `seed`.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self {
            seed,
            given: AtomicU64::new(0),
        }
    }
}

impl spore_control::clock::Chance for Ids {
    fn bits(&self) -> [u8; 16] {
        let count = self.given.fetch_add(1, Ordering::Relaxed);
        let mut bits = [0; 16];
        bits[..8].copy_from_slice(&mix(self.seed ^ mix(count)).to_be_bytes());
        bits[8..].copy_from_slice(&count.to_be_bytes());
        bits
    }
}

impl spore_node::clock::Chance for Ids {
    fn bits(&self) -> Result<[u8; 16], getrandom::Error> {
        Ok(spore_control::clock::Chance::bits(self))
    }
}

/// The time of day, on the virtual clock.
#[derive(Debug)]
pub struct SimClock {
    began: Instant,
}

impl SimClock {
    /// A clock that begins now.
    #[must_use]
    pub fn new() -> Self {
        Self {
            began: Instant::now(),
        }
    }

    fn since_epoch(&self) -> Duration {
        Duration::from_secs(EPOCH_S) + self.began.elapsed()
    }
}

impl Default for SimClock {
    fn default() -> Self {
        Self::new()
    }
}

impl spore_control::clock::Clock for SimClock {
    fn now(&self) -> Timestamp {
        let ms = i64::try_from(self.since_epoch().as_millis()).unwrap_or(i64::MAX);
        Timestamp::from_millisecond(ms).unwrap_or(Timestamp::UNIX_EPOCH)
    }
}

impl spore_node::clock::Clock for SimClock {
    fn realtime(&self) -> Duration {
        self.since_epoch()
    }
}
