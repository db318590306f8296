//! What happened, in order, with the virtual time; and what must never happen.
//!
//! Every part of the simulation writes here. Two runs of a seed write the same lines, which their
//! hashes tell; a run that broke an invariant shows its last lines.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::time::Instant;

/// Lines that a failure shows.
const TAIL_LINES: usize = 160;

/// A run's story; clones are the same story.
#[derive(Clone, Debug)]
pub struct Trace(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    began: Instant,
    print: Print,
    held: Mutex<Held>,
}

/// Whether lines are printed as they come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Print {
    /// No.
    Nothing,
    /// All of them, to standard error.
    Lines,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Hashed {
    Yes,
    No,
}

#[derive(Debug)]
struct Held {
    hash: u64,
    lines: u64,
    tail: VecDeque<String>,
    violations: Vec<String>,
    counts: BTreeMap<String, u64>,
}

impl Trace {
    /// A story that begins now.
    #[must_use]
    pub fn new(print: Print) -> Self {
        Self(Arc::new(Shared {
            began: Instant::now(),
            print,
            held: Mutex::new(Held {
                hash: 0xcbf2_9ce4_8422_2325,
                lines: 0,
                tail: VecDeque::new(),
                violations: Vec::new(),
                counts: BTreeMap::new(),
            }),
        }))
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.0.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Something happened whose order within its instant is not the seed's: tokio wakes those who
    /// watch one value in an order of its own. It is shown and not hashed.
    pub fn note(&self, text: impl AsRef<str>) {
        self.line(text.as_ref(), Hashed::No);
    }

    /// Something happened.
    pub fn say(&self, text: impl AsRef<str>) {
        self.line(text.as_ref(), Hashed::Yes);
    }

    fn line(&self, text: &str, hashed: Hashed) {
        let at = self.0.began.elapsed().as_micros();
        let line = format!("{at:>12} {text}");
        if self.0.print == Print::Lines {
            print_line(&line);
        }
        let mut held = self.held();
        if hashed == Hashed::Yes {
            for byte in line.bytes() {
                held.hash = (held.hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
            }
            held.lines += 1;
        }
        if held.tail.len() == TAIL_LINES {
            held.tail.pop_front();
        }
        held.tail.push_back(line);
    }

    /// Something happened that must not.
    pub fn violation(&self, text: impl Into<String>) {
        let text = text.into();
        self.say(format!("VIOLATION {text}"));
        self.held().violations.push(text);
    }

    /// Counts an event of this kind, for tests that ask whether a run met it at all.
    pub fn count(&self, kind: &str) {
        *self.held().counts.entry(kind.to_owned()).or_default() += 1;
    }

    /// How it came out.
    #[must_use]
    pub fn verdict(&self) -> Verdict {
        let held = self.held();
        Verdict {
            hash: held.hash,
            lines: held.lines,
            violations: held.violations.clone(),
            tail: held.tail.iter().cloned().collect(),
            counts: held.counts.clone(),
        }
    }
}

#[expect(clippy::print_stderr, reason = "the story was asked for")]
fn print_line(line: &str) {
    eprintln!("{line}");
}

/// How a run came out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Of every line, with its time.
    pub hash: u64,
    /// How many there were.
    pub lines: u64,
    /// What must never happen and did.
    pub violations: Vec<String>,
    /// The last lines.
    pub tail: Vec<String>,
    /// How often each kind of thing happened.
    pub counts: BTreeMap<String, u64>,
}
