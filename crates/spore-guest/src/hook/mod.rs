//! The processes that want to hear when their VM has become a fork.
//!
//! Kept by [`crate::face`], told by [`crate::agent`] once a fork's processes run again and before
//! its network opens. Each has its own connection to `/run/spore/agent.sock`:
//!
//! ```text
//!   process                                    agent
//!    │ {"ask":"after_fork"} ──────────────────▶ │
//!    │ ◀────────────────────────── {"ok":true} │  the connection stays
//!    │ ◀─────────────── {"forked":"INCARNATION"} │  in a fork, and in its forks again
//!    │ {"done":true} ─────────────────────────▶ │  within 5 s, all of them together
//! ```
//!
//! Ready-made ones are files that the agent carries ([`FILES`]), and what had to be compiled for
//! them, which the first file system has below `/hooks`.

use std::io;
use std::os::fd::OwnedFd;

use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::interest::Interest;

/// The most processes that may wait for forks.
pub const HOOKS_MAX: usize = 64;

/// How long all of them together may take where the host does not say.
pub const HOOKS_MS: u64 = 5_000;

/// Ready-made hooks, below `/run/spore/lib`.
pub const FILES: [(&str, &str); 3] = [
    ("spore_after_fork.py", include_str!("spore_after_fork.py")),
    ("sitecustomize.py", include_str!("sitecustomize.py")),
    ("spore_after_fork.js", include_str!("spore_after_fork.js")),
];

/// The longest answer.
const LINE_BYTES_MAX: usize = 256;

#[derive(Debug, Serialize)]
struct Told<'a> {
    forked: &'a str,
}

#[derive(Debug, Deserialize)]
struct Answer {
    done: bool,
}

/// Those that wait.
#[derive(Debug, Default)]
pub struct Hooks {
    all: Vec<Hook>,
    done: u32,
}

#[derive(Debug)]
struct Hook {
    socket: OwnedFd,
    line: Vec<u8>,
    /// It was told of a fork and has not answered yet.
    is_busy: bool,
}

impl Hooks {
    /// Whether one more may wait.
    #[must_use]
    pub const fn has_room(&self) -> bool {
        self.all.len() < HOOKS_MAX
    }

    /// Takes one that was admitted.
    pub fn add(&mut self, socket: OwnedFd) {
        self.all.push(Hook {
            socket,
            line: Vec::new(),
            is_busy: false,
        });
    }

    /// What they wait for.
    pub fn interest<'a>(&'a self, interest: &mut Interest<'a>) {
        for hook in &self.all {
            interest.read(&hook.socket);
        }
    }

    /// Tells each that it is in the fork of this name now. Gives how many there are.
    pub fn tell(&mut self, forked: &str) -> usize {
        let mut text = serde_json::to_vec(&Told { forked }).unwrap_or_default();
        text.push(b'\n');
        self.done = 0;
        self.all.retain_mut(|hook| {
            hook.is_busy = true;
            hook.line.clear();
            // One that does not read for so long that a line does not fit has no use for it.
            rustix::io::write(&hook.socket, &text).is_ok_and(|bytes| bytes == text.len())
        });
        self.all.len()
    }

    /// Hears their answers. One that hung up, or says what it should not, is no longer there.
    pub fn pump(&mut self) {
        let done = &mut self.done;
        self.all.retain_mut(|hook| match hook.hear() {
            Ok(false) => true,
            Ok(true) => {
                *done += 1;
                true
            }
            Err(_gone) => false,
        });
    }

    /// How many have not answered.
    #[must_use]
    pub fn busy(&self) -> usize {
        self.all.iter().filter(|hook| hook.is_busy).count()
    }

    /// How many have answered since they were told.
    #[must_use]
    pub const fn done(&self) -> u32 {
        self.done
    }
}

impl Hook {
    /// True when it has done what it was told.
    fn hear(&mut self) -> io::Result<bool> {
        let mut buffer = [0; LINE_BYTES_MAX];
        match rustix::io::read(&self.socket, &mut buffer) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(bytes) => self.line.extend_from_slice(&buffer[..bytes]),
            Err(Errno::AGAIN | Errno::INTR) => return Ok(false),
            Err(errno) => return Err(errno.into()),
        }
        let Some(end) = self.line.iter().position(|byte| *byte == b'\n') else {
            return match self.line.len() < LINE_BYTES_MAX {
                true => Ok(false),
                false => Err(io::ErrorKind::InvalidData.into()),
            };
        };
        let answer: Answer = serde_json::from_slice(&self.line[..end])?;
        self.line.drain(..=end);
        Ok(answer.done && std::mem::take(&mut self.is_busy))
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixStream;

    use super::Hooks;

    fn hooked(hooks: &mut Hooks) -> UnixStream {
        let (theirs, ours) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        hooks.add(OwnedFd::from(ours));
        theirs
    }

    #[test]
    fn each_is_told_of_each_fork_and_counts_once_it_has_answered() {
        let mut hooks = Hooks::default();
        let (mut quick, mut slow) = (hooked(&mut hooks), hooked(&mut hooks));
        for name in ["one", "two"] {
            assert_eq!(hooks.tell(name), 2);
            assert_eq!((hooks.busy(), hooks.done()), (2, 0));
            let mut told = [0; 64];
            let bytes = quick.read(&mut told).unwrap();
            let expected = format!("{{\"forked\":\"{name}\"}}\n");
            assert_eq!(&told[..bytes], expected.as_bytes());
            quick.write_all(b"{\"done\":true}\n").unwrap();
            hooks.pump();
            assert_eq!((hooks.busy(), hooks.done()), (1, 1));
        }
        slow.write_all(b"{\"done\":tr").unwrap();
        hooks.pump();
        assert_eq!(hooks.busy(), 1);
        slow.write_all(b"ue}\n{\"done\":true}\n").unwrap();
        hooks.pump();
        assert_eq!((hooks.busy(), hooks.done()), (0, 2));
    }

    #[test]
    fn one_that_hangs_up_or_talks_nonsense_is_no_longer_waited_for() {
        let mut hooks = Hooks::default();
        let (gone, mut rude) = (hooked(&mut hooks), hooked(&mut hooks));
        let mut long = hooked(&mut hooks);
        hooks.tell("one");
        drop(gone);
        rude.write_all(b"hello\n").unwrap();
        long.write_all(&[b'x'; 256]).unwrap();
        hooks.pump();
        assert_eq!((hooks.busy(), hooks.done()), (0, 0));
        assert_eq!(hooks.tell("two"), 0);
    }
}
