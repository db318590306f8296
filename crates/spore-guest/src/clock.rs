//! The guest's clocks, as plain numbers.
//!
//! Called by the session loop once per turn; everything below it takes the time as an argument.

use rustix::time::{ClockId, Timespec, clock_gettime};

/// Milliseconds since the guest's kernel started. Goes on across a snapshot, never jumps.
#[must_use]
pub fn monotonic_ms() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    whole(now.tv_sec) * 1000 + whole(now.tv_nsec) / 1_000_000
}

/// As [`monotonic_ms`], in microseconds: to measure with.
#[must_use]
pub fn monotonic_us() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    whole(now.tv_sec) * 1_000_000 + whole(now.tv_nsec) / 1000
}

/// Microseconds since the Unix epoch.
#[must_use]
pub fn realtime_us() -> u64 {
    let now = clock_gettime(ClockId::Realtime);
    whole(now.tv_sec) * 1_000_000 + whole(now.tv_nsec) / 1000
}

/// Nanoseconds since the Unix epoch.
#[must_use]
pub fn realtime_ns() -> u64 {
    let now = clock_gettime(ClockId::Realtime);
    whole(now.tv_sec) * 1_000_000_000 + whole(now.tv_nsec)
}

/// `ms` as the kernel wants a timeout.
#[must_use]
pub fn timeout(ms: u64) -> Timespec {
    Timespec {
        tv_sec: i64::try_from(ms / 1000).unwrap_or(i64::MAX),
        tv_nsec: i64::try_from(ms % 1000 * 1_000_000).unwrap_or(0),
    }
}

fn whole(part: i64) -> u64 {
    u64::try_from(part).unwrap_or(0)
}
