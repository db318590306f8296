//! Time for this process: the monotonic clock behind a seam, so that tests own it.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// Tells time since some fixed instant; never goes back.
pub trait Clock {
    /// Now.
    fn now(&self) -> Duration;
}

/// The host's monotonic clock.
#[derive(Clone, Copy, Debug, Default)]
pub struct Monotonic;

impl Clock for Monotonic {
    fn now(&self) -> Duration {
        let now = clock_gettime(ClockId::Monotonic);
        // The kernel gives neither a negative second nor a whole one in nanoseconds.
        Duration::new(
            u64::try_from(now.tv_sec).unwrap_or(0),
            u32::try_from(now.tv_nsec).unwrap_or(0),
        )
    }
}
