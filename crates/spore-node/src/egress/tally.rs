//! What a proxy counts, and the few lines it writes about it.
//!
//! Used by `proxy.rs` and `resolver`. Counts everything, writes little: the first refusals with
//! their address, then a summary a minute and only if something changed, so that a guest cannot
//! fill a disk. Never writes what a connection carried, nor a byte that the guest chose freely.

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddrV4;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tracing::{info, warn};

/// How often the counts are written, if they changed.
pub const SUMMARY_EVERY: Duration = Duration::from_secs(60);

/// The most refusals written one by one between two summaries.
const REFUSALS_PER_SUMMARY: u32 = 10;

/// The most refusals written one by one in a proxy's whole life.
const REFUSALS_IN_ALL: u32 = 1000;

/// The most summaries in a proxy's whole life: a day of busy minutes.
const SUMMARIES_IN_ALL: u32 = 1440;

/// What is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Event {
    /// A connection was dialled.
    Dialled,
    /// A dial failed or timed out.
    DialFailed,
    /// A connection to what no grant leads to.
    NotGranted,
    /// The client's first message did not agree with the granted name.
    HelloRefused,
    /// A connection was closed because nothing moved.
    Idle,
    /// A connection beyond the most at once.
    TooMany,
    /// A connection whose wanted address the kernel does not know.
    NoDestination,
    /// A question was answered with addresses.
    Resolved,
    /// A question about a name that is not granted.
    NameRefused,
    /// An address that a granted name may not lead to was left out of an answer.
    AddressStripped,
    /// No resolver gave an answer.
    ResolveFailed,
    /// A packet that is no question, or one too many at once.
    PacketDropped,
}

/// The counts of one proxy.
#[derive(Debug, Default)]
pub struct Tally {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    counts: BTreeMap<Event, u64>,
    changed: bool,
    lines: u32,
    lines_in_all: u32,
    summaries: u32,
}

impl Tally {
    /// Counts one.
    pub fn count(&self, event: Event) {
        let mut state = self.state();
        *state.counts.entry(event).or_default() += 1;
        state.changed = true;
    }

    /// Counts a refusal of a connection to `to` and writes it, unless there were many.
    pub fn refuse(&self, event: Event, to: SocketAddrV4) {
        self.count(event);
        if self.may_write() {
            warn!(%to, reason = ?event, "egress refused");
        }
    }

    /// How often `event` was counted.
    #[must_use]
    pub fn of(&self, event: Event) -> u64 {
        self.state().counts.get(&event).copied().unwrap_or_default()
    }

    /// Writes the counts if they changed since the last time, unless that was often enough.
    pub fn summarize(&self) {
        let mut state = self.state();
        state.lines = 0;
        if std::mem::take(&mut state.changed) && state.summaries < SUMMARIES_IN_ALL {
            state.summaries += 1;
            info!(counts = %Counts(&state.counts), "egress so far");
        }
    }

    fn may_write(&self) -> bool {
        let mut state = self.state();
        let may = state.lines < REFUSALS_PER_SUMMARY && state.lines_in_all < REFUSALS_IN_ALL;
        if may {
            state.lines += 1;
            state.lines_in_all += 1;
        }
        may
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Counts stay meaningful whatever a panicking holder left behind.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Counts<'a>(&'a BTreeMap<Event, u64>);

impl fmt::Display for Counts<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (place, (event, count)) in self.0.iter().enumerate() {
            let comma = if place == 0 { "" } else { ", " };
            write!(f, "{comma}{event:?} {count}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::{Event, REFUSALS_IN_ALL, REFUSALS_PER_SUMMARY, SUMMARIES_IN_ALL, Tally};

    #[test]
    fn a_flood_of_refusals_is_counted_and_hardly_written() {
        let tally = Tally::default();
        let written = (0..1000).filter(|_| tally.may_write()).count();
        assert_eq!(written, REFUSALS_PER_SUMMARY as usize);
        for _minute in 0..REFUSALS_IN_ALL {
            tally.summarize();
            let _more = (0..1000).filter(|_| tally.may_write()).count();
        }
        assert_eq!(tally.state().lines_in_all, REFUSALS_IN_ALL);
        for _minute in 0..=SUMMARIES_IN_ALL {
            tally.count(Event::Resolved);
            tally.summarize();
        }
        assert_eq!(tally.state().summaries, SUMMARIES_IN_ALL);
        assert_eq!(tally.of(Event::Resolved), u64::from(SUMMARIES_IN_ALL) + 1);
        assert_eq!(tally.of(Event::Idle), 0);
    }
}
