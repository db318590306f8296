//! The wall clock and chance, as arguments: the simulator owns both.
//!
//! Used where a guest is told the time of day. Everything that only measures or waits takes
//! `tokio::time`, which a test can pause.

use core::fmt::Debug;
use core::time::Duration;

/// Tells the time of day.
pub trait Clock: Debug + Send + Sync + 'static {
    /// Since the Unix epoch.
    fn realtime(&self) -> Duration;
}

/// The host's clock.
#[derive(Clone, Copy, Debug, Default)]
pub struct HostClock;

impl Clock for HostClock {
    fn realtime(&self) -> Duration {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
        let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
        let nanos = u32::try_from(now.tv_nsec).unwrap_or(0);
        Duration::new(seconds, nanos)
    }
}

/// Gives the bits of ids that are used once.
pub trait Chance: Debug + Send + Sync + 'static {
    /// 128 random bits.
    ///
    /// # Errors
    /// When there are none.
    fn bits(&self) -> Result<[u8; 16], getrandom::Error>;
}

/// The kernel's random numbers.
#[derive(Clone, Copy, Debug, Default)]
pub struct KernelChance;

impl Chance for KernelChance {
    fn bits(&self) -> Result<[u8; 16], getrandom::Error> {
        let mut bits = [0; 16];
        getrandom::fill(&mut bits)?;
        Ok(bits)
    }
}

#[cfg(test)]
mod tests {
    use super::{Clock, HostClock};

    #[test]
    fn the_host_lives_after_its_software() {
        assert!(HostClock.realtime().as_secs() > 1_700_000_000);
    }
}
