//! Wall-clock time and chance, as arguments: a simulator owns them.
//!
//! Used for what is shown and stored. Spans inside control are measured with tokio's clock, which
//! tests pause.

use std::sync::Arc;

use data_encoding::BASE32_NOPAD;
use jiff::Timestamp;
use spore_wire::id::VmId;

/// Tells the time of day.
pub trait Clock: Send + Sync + 'static {
    /// Now, in UTC.
    fn now(&self) -> Timestamp;
}

/// A clock that several parts of control share.
pub type SharedClock = Arc<dyn Clock>;

/// Gives ids that are used once.
pub trait Chance: Send + Sync + 'static {
    /// 128 random bits.
    fn bits(&self) -> [u8; 16];
}

/// Chance that several parts of control share.
pub type SharedChance = Arc<dyn Chance>;

/// The id of the next VM.
pub fn next_vm(chance: &dyn Chance) -> VmId {
    VmId::from_bytes(chance.bits())
}

/// The id of the next operation or request: 26 characters.
pub fn next_id(chance: &dyn Chance) -> String {
    BASE32_NOPAD.encode(&chance.bits()).to_ascii_lowercase()
}

/// The kernel's random numbers.
#[derive(Clone, Copy, Debug, Default)]
pub struct KernelChance;

impl Chance for KernelChance {
    fn bits(&self) -> [u8; 16] {
        let mut bits = [0; 16];
        getrandom::fill(&mut bits).expect("Linux gives random bytes once it has booted");
        bits
    }
}

/// The host's clock.
#[derive(Clone, Copy, Debug, Default)]
pub struct HostClock;

impl Clock for HostClock {
    fn now(&self) -> Timestamp {
        Timestamp::now()
    }
}

/// RFC 3339 of stored milliseconds; the epoch when they are outside the calendar.
#[must_use]
pub fn rfc3339(ms: i64) -> String {
    Timestamp::from_millisecond(ms)
        .unwrap_or(Timestamp::UNIX_EPOCH)
        .to_string()
}
