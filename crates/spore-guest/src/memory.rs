//! Watches the tenant's memory: what the kernel ended for want of it, and what it should have.
//!
//! Called by [`crate::agent`] in every turn; uses [`crate::cgroup`].
//!
//! At its limit the kernel first takes pages back, and a program's own code is such a page: it is
//! read from the image again at the next step. Once that is all there is to take, nothing fails and
//! next to nothing goes on, for minutes. The kernel counts that time as stalled (pressure stall
//! information, Documentation/accounting/psi.rst); who stalls for long, with hardly a page of files
//! left, is ended here.

use std::fs::File;
use std::io::{Read as _, Seek as _, Write as _};

use spore_wire::guest::Event;

use crate::cgroup::{Group, Groups, oom_kills};
use crate::interest::{Interest, Ready};

/// A fifth of two seconds, in microseconds. It is not more, although nothing gets done: a stall is
/// the wait for a page, and what it takes to map, translate and lose it again is not counted.
const TRIGGER: &str = "some 400000 2000000";

/// So many such windows, one upon the other, are no start and no burst any more.
const WINDOWS: u32 = 5;

/// The kernel tells a stall once in a window; one that comes later is another one.
const WINDOW_MS: u64 = 2_000;

/// The watch over the tenant's group.
#[derive(Debug)]
pub struct MemoryWatch {
    groups: Groups,
    /// `memory.events`, where the kernel counts its kills.
    events: Option<File>,
    /// `memory.pressure`, with a trigger in it.
    pressure: Option<File>,
    /// Kills so far by the kernel, and by this watch.
    kills: (u64, u64),
    stall: Stall,
}

/// How long the stall of now lasts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Stall {
    windows: u32,
    last_ms: u64,
}

/// What was seen.
#[derive(Debug, Default)]
pub struct Seen {
    /// To be told to the host.
    pub event: Option<Event>,
    /// The group that was ended here.
    pub ended: Option<Group>,
}

impl MemoryWatch {
    /// A watch over these groups. What their kernel does not offer is not watched.
    #[must_use]
    pub fn new(groups: &Groups) -> Self {
        Self {
            groups: groups.clone(),
            events: groups.memory_events().ok().flatten(),
            pressure: groups.memory_pressure().ok().flatten().and_then(armed),
            kills: (0, 0),
            stall: Stall::default(),
        }
    }

    /// Says what it waits for.
    pub fn interest<'a>(&'a self, interest: &mut Interest<'a>) {
        for file in self.events.iter().chain(&self.pressure) {
            interest.change(file);
        }
    }

    /// Looks after a wait; ends who stalls for too long.
    #[must_use]
    pub fn look(&mut self, ready: &Ready, now_ms: u64) -> Seen {
        let before = self.kills;
        self.count_kills(ready);
        let stalled = self.pressure.as_ref().is_some_and(|file| ready.is(file));
        let ended = if stalled && self.groups.caches_little() && self.stall.goes_on(now_ms) {
            self.end_largest()
        } else {
            None
        };
        let (kernel, own) = self.kills;
        let event = (self.kills != before).then_some(Event::OutOfMemory {
            kills: kernel + own,
        });
        Seen { event, ended }
    }

    fn count_kills(&mut self, ready: &Ready) {
        let Some(file) = &mut self.events else {
            return;
        };
        if !ready.is(file) {
            return;
        }
        let mut text = String::new();
        // Reading is also what takes the change back from poll.
        let read = file
            .rewind()
            .and_then(|()| file.read_to_string(&mut text).map(|_bytes| ()));
        match read {
            Ok(()) => self.kills.0 = self.kills.0.max(oom_kills(&text)),
            Err(_) => self.events = None,
        }
    }

    fn end_largest(&mut self) -> Option<Group> {
        let group = self.groups.largest()?;
        group.kill().ok()?;
        self.kills.1 += 1;
        Some(group)
    }
}

/// The pressure file, once the kernel took the trigger. Closing it takes the trigger away.
fn armed(mut file: File) -> Option<File> {
    file.write_all(TRIGGER.as_bytes()).ok()?;
    Some(file)
}

impl Stall {
    /// Notes a window; true when it was one too many, after which the count begins anew.
    const fn goes_on(&mut self, now_ms: u64) -> bool {
        let follows = now_ms.saturating_sub(self.last_ms) < 2 * WINDOW_MS;
        self.windows = if follows { self.windows + 1 } else { 1 };
        self.last_ms = now_ms;
        let enough = self.windows >= WINDOWS;
        if enough {
            self.windows = 0;
        }
        enough
    }
}

#[cfg(test)]
mod tests {
    use super::{Stall, WINDOWS};

    #[test]
    fn windows_upon_each_other_are_too_many_in_the_end() {
        let mut stall = Stall::default();
        for window in 0..WINDOWS - 1 {
            assert!(!stall.goes_on(60_000 + u64::from(window) * 2_000));
        }
        assert!(stall.goes_on(60_500 + u64::from(WINDOWS - 1) * 2_000));
        assert!(!stall.goes_on(80_000), "who was ended gets time again");
    }

    #[test]
    fn bursts_with_pauses_between_them_are_let_be() {
        let mut stall = Stall::default();
        for burst in 1..20 {
            assert!(!stall.goes_on(burst * 10_000));
            assert!(!stall.goes_on(burst * 10_000 + 2_000));
        }
    }
}
