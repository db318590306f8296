//! Makes the two processes of a VM, in a pid namespace of their own and as the zygote's children.

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use rustix::pipe::{PipeFlags, pipe_with};
use rustix::thread::UnshareFlags;

use super::child::{self, Plan};
use super::sys::{self, Copied, Stack};

/// A VM's processes.
#[derive(Debug)]
pub(super) struct Spawned {
    /// The VMM's.
    pub(super) pid: u32,
    /// The sleeper's.
    pub(super) init: u32,
    /// The VMM's.
    pub(super) pidfd: OwnedFd,
}

/// Why there is no VM.
#[derive(Debug, thiserror::Error)]
pub(super) enum SpawnError {
    /// A step was refused. A sleeper that was made ends by itself.
    #[error("cannot make a VMM: {what}")]
    Step {
        /// Which.
        what: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// What makes the processes was killed.
    #[error("the process that makes VMMs was killed")]
    Killed,
}

fn step<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> SpawnError {
    move |source| SpawnError::Step {
        what,
        source: source.into(),
    }
}

/// Makes them.
pub(super) fn spawn(
    stack: &mut Stack,
    plan: &Plan<'_>,
    cgroup: Option<BorrowedFd<'_>>,
) -> Result<Spawned, SpawnError> {
    let (waits, held) = pipe_with(PipeFlags::CLOEXEC).map_err(step("pipe"))?;
    let made = sys::aside(stack, || {
        sys::unshare(UnshareFlags::NEWPID).map_err(step("pid namespace"))?;
        let (init, _pidfd) = match sys::sibling(cgroup).map_err(step("sleeper"))? {
            (Copied::Copy, _) => child::sleeper(plan, waits.as_fd()),
            (Copied::Source(init), pidfd) => (init, pidfd),
        };
        match sys::sibling(cgroup).map_err(step("process"))? {
            (Copied::Copy, _) => child::vmm(plan, held.as_fd()),
            (Copied::Source(pid), Some(pidfd)) => Ok(Spawned { pid, init, pidfd }),
            (Copied::Source(_), None) => Err(SpawnError::Killed),
        }
    });
    made.map_err(step("spawner"))?
        .unwrap_or(Err(SpawnError::Killed))
}
