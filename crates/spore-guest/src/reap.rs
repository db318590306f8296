//! Who has ended: the agent's own children and, for PID 1, everybody's orphans.
//!
//! Called by [`crate::agent`] whenever [`Reaper::fds`] may be readable. Never blocks.
//!
//! PID 1 collects every zombie by SIGCHLD. Anything else must not take children that are not its
//! own, and watches each by a pidfd.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, WaitOptions, WaitStatus, pidfd_open, wait, waitpid};
use spore_wire::guest::Exit;

use crate::sys;

/// The ends of processes.
#[derive(Debug)]
pub enum Reaper {
    /// As PID 1.
    Everybody {
        /// Readable while a SIGCHLD is pending.
        signals: OwnedFd,
    },
    /// As an ordinary process.
    Own {
        /// Those that have not ended yet.
        children: BTreeMap<i32, OwnedFd>,
    },
}

impl Reaper {
    /// For PID 1: before its first thread.
    ///
    /// # Errors
    /// When the kernel gives no signalfd.
    pub fn everybody() -> io::Result<Self> {
        Ok(Self::Everybody {
            signals: sys::child_signals()?,
        })
    }

    /// For an ordinary process.
    #[must_use]
    pub const fn own() -> Self {
        Self::Own {
            children: BTreeMap::new(),
        }
    }

    /// Notes a child that was just spawned, so that its end is seen.
    ///
    /// # Errors
    /// When the kernel gives no pidfd.
    pub fn expect(&mut self, child: Pid) -> io::Result<()> {
        if let Self::Own { children } = self {
            let pidfd = pidfd_open(child, PidfdFlags::empty())?;
            children.insert(child.as_raw_nonzero().get(), pidfd);
        }
        Ok(())
    }

    /// What becomes readable when a process has ended.
    #[must_use]
    pub fn fds(&self) -> Vec<BorrowedFd<'_>> {
        match self {
            Self::Everybody { signals } => vec![signals.as_fd()],
            Self::Own { children } => children.values().map(OwnedFd::as_fd).collect(),
        }
    }

    /// Collects everybody who has ended.
    pub fn collect(&mut self) -> Vec<(Pid, Exit)> {
        match self {
            Self::Everybody { signals } => {
                drain(signals);
                std::iter::from_fn(any_end).collect()
            }
            Self::Own { children } => {
                let pids: Vec<i32> = children.keys().copied().collect();
                let ended: Vec<_> = pids.into_iter().filter_map(own_end).collect();
                for (pid, _exit) in &ended {
                    children.remove(&pid.as_raw_nonzero().get());
                }
                ended
            }
        }
    }
}

/// Empties the signalfd; several SIGCHLD may have become one, so the count says nothing.
fn drain(signals: &OwnedFd) {
    let mut buffer = [0_u8; 128];
    while matches!(rustix::io::read(signals, &mut buffer), Ok(n) if n > 0) {}
}

fn any_end() -> Option<(Pid, Exit)> {
    loop {
        match wait(WaitOptions::NOHANG) {
            Ok(ended) => return ended.map(|(pid, status)| (pid, exit(status))),
            Err(Errno::INTR) => {}
            Err(_no_child) => return None,
        }
    }
}

fn own_end(pid: i32) -> Option<(Pid, Exit)> {
    let (pid, status) = waitpid(Pid::from_raw(pid), WaitOptions::NOHANG).ok()??;
    Some((pid, exit(status)))
}

fn exit(status: WaitStatus) -> Exit {
    match (status.exit_status(), status.terminating_signal()) {
        (_, Some(signal)) => Exit::Signal { signal },
        (code, None) => Exit::Code {
            code: code
                .and_then(|code| u8::try_from(code).ok())
                .unwrap_or(u8::MAX),
        },
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use rustix::process::Pid;
    use spore_wire::guest::Exit;

    use super::Reaper;

    #[test]
    #[expect(
        clippy::zombie_processes,
        reason = "the reaper under test waits for them"
    )]
    fn an_end_is_seen_once_with_its_code_or_signal() {
        let mut reaper = Reaper::own();
        let mut wanted = Vec::new();
        for (script, exit) in [
            ("exit 7", Exit::Code { code: 7 }),
            ("kill -9 $$", Exit::Signal { signal: 9 }),
        ] {
            let child = Command::new("/bin/sh")
                .args(["-c", script])
                .spawn()
                .unwrap();
            let pid = Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap();
            reaper.expect(pid).unwrap();
            wanted.push((pid, exit));
        }
        let mut seen = Vec::new();
        while seen.len() < 2 {
            seen.extend(reaper.collect());
            std::thread::yield_now();
        }
        seen.sort_by_key(|(pid, _exit)| pid.as_raw_nonzero());
        wanted.sort_by_key(|(pid, _exit)| pid.as_raw_nonzero());
        assert_eq!(seen, wanted);
        assert!(reaper.collect().is_empty());
        assert!(reaper.fds().is_empty());
    }
}
