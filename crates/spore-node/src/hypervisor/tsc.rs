//! The rate of the host's time stamp counter, which a guest's is: one in software emulation must be
//! told it, and a snapshot is for hosts with the same.
//!
//! Called once by each driver.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

use crate::sys;

/// How long is measured: the error is a few parts per million of it.
const MEASURED: Duration = Duration::from_millis(200);

/// Readings of the clock around one of the counter; the closest pair counts.
const TRIES: usize = 8;

/// A moment on both scales.
#[derive(Clone, Copy, Debug)]
struct Moment {
    counter: u64,
    nanoseconds: i128,
}

/// Measures the counter against the clock that no daemon corrects. Blocks for 200 ms.
pub(super) fn measure_khz() -> u64 {
    let start = moment();
    std::thread::sleep(MEASURED);
    khz(start, moment())
}

fn moment() -> Moment {
    let mut best: Option<(i128, Moment)> = None;
    for _try in 0..TRIES {
        let before = clock_ns();
        let counter = sys::time_stamp_counter();
        let after = clock_ns();
        let reading = Moment {
            counter,
            nanoseconds: i128::midpoint(before, after),
        };
        if best.is_none_or(|(width, _)| after - before < width) {
            best = Some((after - before, reading));
        }
    }
    best.map_or(
        Moment {
            counter: 0,
            nanoseconds: 0,
        },
        |(_, reading)| reading,
    )
}

fn clock_ns() -> i128 {
    let time = clock_gettime(ClockId::MonotonicRaw);
    i128::from(time.tv_sec) * 1_000_000_000 + i128::from(time.tv_nsec)
}

fn khz(start: Moment, end: Moment) -> u64 {
    let ticks = i128::from(end.counter.saturating_sub(start.counter));
    let elapsed = (end.nanoseconds - start.nanoseconds).max(1);
    u64::try_from(ticks * 1_000_000 / elapsed).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::{Moment, khz};

    #[test]
    fn a_gigahertz_counts_a_million_per_millisecond() {
        let start = Moment {
            counter: 5,
            nanoseconds: 7,
        };
        let end = Moment {
            counter: 5 + 200_000_000,
            nanoseconds: 7 + 200_000_000,
        };
        assert_eq!(khz(start, end), 1_000_000);
    }
}
