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

#[cfg(test)]
pub(crate) mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::time::Duration;

    use super::Clock;

    /// A clock of milliseconds that the test moves.
    #[derive(Clone, Debug, Default)]
    pub(crate) struct Hand(pub(crate) Arc<AtomicU64>);

    impl Clock for Hand {
        fn now(&self) -> Duration {
            Duration::from_millis(self.0.load(Ordering::SeqCst))
        }
    }
}
