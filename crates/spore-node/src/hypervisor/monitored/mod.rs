//! VMs whose VMM is a process that is spoken to over a socket: what all drivers of such have alike.
//!
//! A driver brings a [`Monitor`], which speaks its VMM's language; the rest is here: the task that
//! watches a process and its guest, what they said last, captures of a guest's memory from outside.
//!
//! ```text
//!   vm.rs        a VM and the task that watches it
//!   capture.rs   pausing, and taking down what makes it what it is
//!   pages.rs     what a VMM has written of its guest's memory
//!   frozen.rs    the same, of a copy of the VMM that stands still
//!   tail.rs      the last lines of what a tenant may have written
//! ```

pub(super) mod capture;
mod frozen;
pub(super) mod in_memory;
pub(super) mod pages;
pub(super) mod tail;
pub(super) mod vm;

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use async_trait::async_trait;
use spore_wire::id::VmId;
use zeroize::Zeroizing;

use super::BootError;
use super::fork::{Below, CaptureError, ForkFrom, ForkMemory};
use super::room::Rooms;
use crate::disk::overlay::DiskKey;

/// Where the agent's socket is in a VM's folder.
pub(super) const AGENT_SOCKET: &str = "agent.sock";

/// In the VM's folder, while its cgroup has more memory than it was made with for a copy.
const LENT_NOTE: &str = "lent-memory";

/// Speaks with one VMM, for the one task that watches it. A VMM may be a tenant's by now: nothing
/// that it says is more than text and numbers that are checked.
#[async_trait]
pub(super) trait Monitor: Send + 'static {
    /// Resolves each time that the VMM tells of its guest's end; never once it hung up, since what
    /// that means the process tells. Safe to cancel.
    async fn guest_ended(&mut self);

    /// Whether the guest had ended before anybody listened.
    async fn is_over(&mut self) -> bool;

    /// Lets the guest stand still, with nothing under way on its disks.
    async fn pause(&mut self) -> io::Result<()>;

    /// Lets it run.
    async fn resume(&mut self) -> io::Result<()>;

    /// What its console said since it was asked last, or its last bytes: the end of it counts.
    async fn console(&mut self) -> io::Result<Said>;

    /// Asks the VMM to end.
    async fn quit(&mut self) -> io::Result<()>;

    /// Takes what the next capture is written to. Of a scratch disk, says what its copy will be
    /// over and how many bytes it may have.
    async fn prepare(&mut self, handed: Handed) -> io::Result<(Below, u64)>;

    /// Writes what its devices are, and begins the copy of its disk. Legal while it stands still,
    /// once for each [`prepare`](Self::prepare).
    async fn capture(&mut self) -> Result<(), CaptureError>;

    /// Has the VMM make a copy of itself that stands still: its guest's memory, as it is now, for
    /// as long as nobody closes the other end of `socket`, `limit` at most. Legal while it stands
    /// still, of a memory that is mapped privately.
    async fn freeze(&mut self, _socket: OwnedFd, _limit: Duration) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Does not hold the copy back any more.
    async fn hasten(&mut self);

    /// Whether the copy is whole; it is let go of then.
    async fn is_copied(&mut self) -> io::Result<bool>;

    /// Lets go of what a capture was prepared with, and of a copy that is under way.
    async fn forget(&mut self) -> io::Result<()>;

    /// Ends a copy that an earlier daemon left, which nobody waits for.
    async fn end_old_copy(&mut self) -> io::Result<()>;
}

/// Knows how VMMs ended that are not this process's children.
#[async_trait]
pub(super) trait Ends: Send + Sync + core::fmt::Debug {
    /// How the process of a pid ended, which has ended, as in "ended with code 3"; `None` when
    /// that is not known.
    async fn how(&self, pid: u32) -> Option<String>;
}

/// A part of what a console said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Said {
    /// What followed what was read before.
    Next(Vec<u8>),
    /// Its last bytes, whether or not they were read before.
    Last(Vec<u8>),
}

/// What a capture is written to.
#[derive(Debug)]
pub(super) struct Handed {
    /// For what its devices are.
    pub(super) state: File,
    /// For the copy of its scratch disk, where it has one.
    pub(super) scratch: Option<HandedScratch>,
}

/// Where the copy of a scratch disk goes to.
#[derive(Debug)]
pub(super) struct HandedScratch {
    /// An empty layer, as the driver's own are.
    pub(super) file: File,
    /// What it is locked with.
    pub(super) key: Option<DiskKey>,
    /// What the copy is over, where that is not the VMM's to say.
    pub(super) below: Option<Below>,
}

impl HandedScratch {
    /// As QEMU is told its key.
    pub(super) fn passphrase(&self) -> Option<Zeroizing<String>> {
        self.key.as_ref().map(DiskKey::passphrase)
    }
}

/// Whoever touches a hole of a shared image first pays for it, on top of a page of its own: raises
/// the limit of a fork, which has `bytes` without, by as much.
pub(super) fn allow_holes(
    rooms: &Rooms,
    vm: VmId,
    bytes: u64,
    from: &ForkFrom,
) -> Result<(), BootError> {
    let step = |source| BootError::Step {
        what: "allowing for the holes of its source's memory",
        source,
    };
    let ForkMemory::Shared(image) = &from.memory else {
        return Ok(());
    };
    let holes = image.hole_bytes();
    let holes = holes.map_err(|error| step(io::Error::other(error)))?;
    let cgroups = rooms.cgroups();
    cgroups
        .raise_memory(&vm.to_string(), bytes + holes)
        .map_err(step)
}
