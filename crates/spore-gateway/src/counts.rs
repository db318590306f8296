//! Counters since the last report to the daemon.
//!
//! Raised by `forward.rs` and `body.rs`, taken by `feed.rs`. Never blocks.

use std::sync::atomic::{AtomicU64, Ordering};

use spore_wire::gateway::Counts;

/// The counters.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    by_class: [AtomicU64; 6],
    waited: AtomicU64,
    refused_full: AtomicU64,
    vm_died: AtomicU64,
}

impl Counters {
    pub(crate) fn count_answer(&self, status: http::StatusCode) {
        let class = usize::from(status.as_u16() / 100).min(5);
        self.by_class[class].fetch_add(1, Ordering::Relaxed);
    }

    /// A request whose client left before the answer.
    pub(crate) fn count_unanswered(&self) {
        self.by_class[0].fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn count_waited(&self) {
        self.waited.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn count_refused_full(&self) {
        self.refused_full.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn count_death(&self) {
        self.vm_died.fetch_add(1, Ordering::Relaxed);
    }

    /// What was counted since the last call; `None` when nothing was.
    pub(crate) fn take(&self) -> Option<Counts> {
        let take = |counter: &AtomicU64| counter.swap(0, Ordering::Relaxed);
        let counts = Counts {
            by_class: std::array::from_fn(|class| take(&self.by_class[class])),
            waited: take(&self.waited),
            refused_full: take(&self.refused_full),
            vm_died: take(&self.vm_died),
        };
        (counts != Counts::default()).then_some(counts)
    }

    /// Gives back what could not be reported.
    pub(crate) fn put_back(&self, counts: &Counts) {
        let add = |counter: &AtomicU64, value| {
            counter.fetch_add(value, Ordering::Relaxed);
        };
        for (counter, value) in self.by_class.iter().zip(counts.by_class) {
            add(counter, value);
        }
        add(&self.waited, counts.waited);
        add(&self.refused_full, counts.refused_full);
        add(&self.vm_died, counts.vm_died);
    }
}
