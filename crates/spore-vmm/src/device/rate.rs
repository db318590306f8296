//! A token bucket: how much of something a guest may have in a time. Pure; time comes in.
//!
//! Tokens are kept in parts of a nanosecond's worth, so that nothing is lost to rounding, however
//! often it is asked.

use std::time::Duration;

const NANOS_PER_S: u128 = 1_000_000_000;

/// So much a second, and so much at once after a pause.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bucket {
    per_s: u64,
    most: u64,
    /// Tokens times nanoseconds in a second.
    level: u128,
    /// When the level was that.
    since: Duration,
}

impl Bucket {
    /// A full bucket. One that gives nothing in a second lets nothing pass once it is empty.
    #[must_use]
    pub fn new(per_s: u64, most: u64, now: Duration) -> Self {
        Self {
            per_s,
            most,
            level: u128::from(most) * NANOS_PER_S,
            since: now,
        }
    }

    /// Takes so many tokens, all or none; for none says how long until they are there. More than
    /// the bucket holds are there once it is full, and are owed from then on.
    pub fn take(&mut self, amount: u64, now: Duration) -> Result<(), Duration> {
        self.fill(now);
        let wanted = u128::from(amount.min(self.most)) * NANOS_PER_S;
        if let Some(missing) = wanted
            .checked_sub(self.level)
            .filter(|missing| *missing > 0)
        {
            let owed = self.since.saturating_sub(now);
            return Err(owed.saturating_add(self.time_for(missing)));
        }
        self.level -= wanted;
        // What was owed is waited for by whoever asks next: time counts from later on.
        let owed = u128::from(amount - amount.min(self.most)) * NANOS_PER_S;
        self.since = self.since.saturating_add(self.time_for(owed));
        Ok(())
    }

    /// Lets the time since the last question count.
    fn fill(&mut self, now: Duration) {
        let Some(passed) = now.checked_sub(self.since) else {
            return;
        };
        let gained = passed.as_nanos().saturating_mul(u128::from(self.per_s));
        let most = u128::from(self.most) * NANOS_PER_S;
        self.level = self.level.saturating_add(gained).min(most);
        self.since = now;
    }

    /// How long so much of a level takes, rounded up.
    fn time_for(&self, level: u128) -> Duration {
        let nanos = match (level, u128::from(self.per_s)) {
            (0, _) => Ok(0),
            (_, 0) => return Duration::MAX,
            (level, per_s) => u64::try_from(level.div_ceil(per_s)),
        };
        nanos.map_or(Duration::MAX, Duration::from_nanos)
    }
}

/// What a device may do in a time, in operations and in bytes. `None` where it may do what it can.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limit {
    /// Of operations, however large.
    pub operations: Option<Bucket>,
    /// Of bytes in them.
    pub bytes: Option<Bucket>,
}

impl Limit {
    /// Takes one operation of so many bytes, or nothing of either; then says how long to wait.
    pub fn take(&mut self, bytes: u64, now: Duration) -> Result<(), Duration> {
        let mut after = *self;
        let buckets = [(&mut after.operations, 1), (&mut after.bytes, bytes)];
        let mut wait = None;
        for (bucket, amount) in buckets {
            let taken = bucket.as_mut().map_or(Ok(()), |b| b.take(amount, now));
            wait = wait.max(taken.err());
        }
        if let Some(wait) = wait {
            return Err(wait);
        }
        *self = after;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::{Bucket, Limit};

    const fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn a_full_bucket_gives_what_it_holds_and_then_says_when() {
        let mut bucket = Bucket::new(1000, 100, ms(5));
        assert_eq!(bucket.take(60, ms(5)), Ok(()));
        assert_eq!(bucket.take(60, ms(5)), Err(ms(20)));
        assert_eq!(bucket.take(60, ms(24)), Err(ms(1)));
        assert_eq!(bucket.take(60, ms(25)), Ok(()));
        assert_eq!(bucket.take(1, ms(25)), Err(ms(1)));
    }

    #[test]
    fn a_pause_fills_it_and_no_more() {
        let mut bucket = Bucket::new(1000, 100, ms(0));
        assert_eq!(bucket.take(100, ms(0)), Ok(()));
        assert_eq!(bucket.take(100, ms(1_000_000)), Ok(()));
        assert_eq!(bucket.take(1, ms(1_000_000)), Err(ms(1)));
    }

    #[test]
    fn more_than_it_holds_passes_and_is_waited_for_afterwards() {
        let mut bucket = Bucket::new(1000, 100, ms(0));
        assert_eq!(bucket.take(250, ms(0)), Ok(()));
        assert_eq!(bucket.take(100, ms(50)), Err(ms(200)));
        assert_eq!(bucket.take(100, ms(249)), Err(ms(1)));
        assert_eq!(bucket.take(100, ms(250)), Ok(()));
    }

    #[test]
    fn a_bucket_that_gives_nothing_ends_and_time_that_goes_back_gives_nothing() {
        let mut bucket = Bucket::new(0, 10, ms(0));
        assert_eq!(bucket.take(10, ms(0)), Ok(()));
        assert_eq!(bucket.take(1, ms(1_000_000)), Err(Duration::MAX));
        let mut bucket = Bucket::new(1000, 10, ms(10));
        assert_eq!(bucket.take(10, ms(10)), Ok(()));
        assert!(bucket.take(1, ms(5)).is_err());
        assert_eq!(bucket.take(1, ms(11)), Ok(()));
    }

    #[test]
    fn an_operation_passes_by_both_limits_or_takes_nothing_of_either() {
        let mut limit = Limit {
            operations: Some(Bucket::new(1000, 2, ms(0))),
            bytes: Some(Bucket::new(1000, 100, ms(0))),
        };
        assert_eq!(limit.take(90, ms(0)), Ok(()));
        let before = limit;
        assert_eq!(limit.take(90, ms(0)), Err(ms(80)));
        assert_eq!(limit, before);
        assert_eq!(limit.take(10, ms(0)), Ok(()));
        assert_eq!(limit.take(0, ms(0)), Err(ms(1)));
        assert_eq!(Limit::default().take(u64::MAX, ms(0)), Ok(()));
    }

    proptest! {
        #[test]
        fn never_more_passes_than_the_rate_and_one_bucket(
            per_s in 1..5_000_u64,
            most in 1..500_u64,
            asks in prop::collection::vec((0..50_000_000_u64, 1..500_u64), 1..100),
        ) {
            let mut bucket = Bucket::new(per_s, most, Duration::ZERO);
            let (mut now, mut passed) = (Duration::ZERO, 0_u128);
            for (pause, amount) in asks {
                now += Duration::from_nanos(pause);
                let amount = amount.min(most);
                match bucket.take(amount, now) {
                    Ok(()) => passed += u128::from(amount),
                    Err(wait) => {
                        // What it says is enough, and not a nanosecond too much.
                        let mut later = bucket;
                        prop_assert!(later.take(amount, now + wait).is_ok());
                        let early = now + wait - Duration::from_nanos(1);
                        let mut later = bucket;
                        prop_assert!(later.take(amount, early).is_err());
                    }
                }
                let bound = u128::from(most) * 1_000_000_000
                    + now.as_nanos() * u128::from(per_s);
                prop_assert!(passed * 1_000_000_000 <= bound);
            }
        }
    }
}
