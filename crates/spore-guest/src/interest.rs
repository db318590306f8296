//! What one turn of the session loop waits for, and what came of it.
//!
//! Filled by every part of [`crate::agent`] before it waits. The set is built anew each turn: a
//! part that cannot go on (no credit, no room) leaves its descriptor out, since poll reports a
//! hang-up even of a descriptor of which nothing was asked.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, RawFd};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use crate::clock;

/// What is waited for.
#[derive(Debug, Default)]
pub struct Interest<'a> {
    fds: Vec<(BorrowedFd<'a>, PollFlags)>,
    deadline_ms: Option<u64>,
}

/// What may be done without blocking.
#[derive(Debug, Default)]
pub struct Ready(BTreeMap<RawFd, PollFlags>);

impl<'a> Interest<'a> {
    /// Bytes to read, a connection to accept, or the other end's going.
    pub fn read(&mut self, fd: &'a impl AsFd) {
        self.fds.push((fd.as_fd(), PollFlags::IN));
    }

    /// As [`Interest::read`], for a descriptor that is borrowed already.
    pub fn read_borrowed(&mut self, fd: BorrowedFd<'a>) {
        self.fds.push((fd, PollFlags::IN));
    }

    /// Room to write.
    pub fn write(&mut self, fd: &'a impl AsFd) {
        self.fds.push((fd.as_fd(), PollFlags::OUT));
    }

    /// A change of a file of the kernel's own.
    pub fn change(&mut self, fd: &'a impl AsFd) {
        self.fds.push((fd.as_fd(), PollFlags::PRI));
    }

    /// A time, in [`clock::monotonic_ms`].
    pub fn at(&mut self, ms: u64) {
        self.deadline_ms = Some(self.deadline_ms.map_or(ms, |earlier| earlier.min(ms)));
    }

    /// Waits for the first of all that.
    #[must_use]
    pub fn wait(&self, now_ms: u64) -> Ready {
        let mut fds: Vec<PollFd<'_>> = self
            .fds
            .iter()
            .map(|(fd, flags)| PollFd::from_borrowed_fd(*fd, *flags))
            .collect();
        let timeout = self
            .deadline_ms
            .map(|at| clock::timeout(at.saturating_sub(now_ms)));
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            // Only a lack of kernel memory is left; the turn then finds out by trying.
            Err(_) => return Ready::default(),
        }
        let mut ready = BTreeMap::new();
        for (asked, answered) in self.fds.iter().zip(&fds) {
            let flags = answered.revents();
            if !flags.is_empty() {
                *ready
                    .entry(asked.0.as_raw_fd())
                    .or_insert_with(PollFlags::empty) |= flags;
            }
        }
        Ready(ready)
    }
}

impl Ready {
    /// Whether reading, or writing to somebody who is gone, answers at once.
    #[must_use]
    pub fn is(&self, fd: &impl AsFd) -> bool {
        self.0.contains_key(&fd.as_fd().as_raw_fd())
    }
}
