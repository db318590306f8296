//! What a paused VM gives so that others can begin where it stands, and what they begin from.
//!
//! Given by [`super::Vm::capture`], taken by [`super::Hypervisor::fork`]. Everything here is in
//! memory or a file without a name: it is gone with its last holder.

use std::fs::File;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::sync::{Arc, Weak};

use thiserror::Error;
use tokio::sync::OwnedMutexGuard;
use tokio::task::JoinHandle;

use super::memory_image::{CapturedMemory, MemoryDraft, MemoryImage, MemoryImageError};
use super::{BootError, Machine};
use crate::disk::overlay::DiskKey;

const MIB: u64 = 1024 * 1024;

/// What becomes of a VM behind its capture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Afterwards {
    /// It goes on: it stays paused until it is resumed.
    GoesOn,
    /// It is killed, which saves the copy of its memory.
    Ends,
    /// It stays paused until what was captured is on the disk, and is killed then. If it does not
    /// get there, it goes on.
    Sleeps,
}

/// A VM as it stood while it was paused.
#[derive(Debug)]
pub struct Capture {
    /// Its memory.
    pub memory: MemoryCopy,
    /// Its devices, in the driver's own form.
    pub state: File,
    /// Its scratch disk, where it has one.
    pub scratch: Option<ScratchCopy>,
}

impl Capture {
    /// What forks of it begin from, where it began from `source` itself.
    ///
    /// # Errors
    /// [`CaptureError`].
    pub async fn into_source(self, source: Option<&ForkFrom>) -> Result<ForkFrom, CaptureError> {
        let scratch = match self.scratch {
            Some(copy) => Some(Arc::new(copy.finished().await?.over(source))),
            None => None,
        };
        let memory = self.memory.finished().await?;
        let merged = tokio::task::spawn_blocking(move || memory.merge()).await;
        let merged = merged.map_err(|error| CaptureError::Step {
            what: "merging its memory",
            source: io::Error::other(error),
        })?;
        Ok(ForkFrom {
            memory: ForkMemory::Shared(merged?),
            state: Arc::new(self.state),
            scratch,
        })
    }
}

/// The turn of whoever prepares a capture, until it is dropped; nobody else captures that VM.
#[derive(Debug, Default)]
pub struct Turn {
    _held: Option<OwnedMutexGuard<()>>,
}

impl Turn {
    pub(crate) const fn of(held: OwnedMutexGuard<()>) -> Self {
        Self { _held: Some(held) }
    }
}

/// One file of a scratch disk, in the driver's own form; clones are the same file.
#[derive(Clone, Debug)]
pub struct ScratchLayer {
    /// What is in it says nothing of what is below it.
    pub file: Arc<File>,
    /// What opens it; `None` can be read by whoever has the file.
    pub key: Option<DiskKey>,
}

/// A whole scratch disk.
#[derive(Clone, Debug)]
pub struct Scratch {
    /// Its size, as the guest sees it.
    pub mib: u32,
    /// Lowest first; below that one there is nothing.
    pub layers: Vec<ScratchLayer>,
}

/// What is below what was captured of a scratch disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Below {
    /// Nothing: it is all there is.
    Nothing,
    /// The disk that the VM was forked with.
    Source,
}

/// A scratch disk as it stood.
#[derive(Clone, Debug)]
pub struct CapturedScratch {
    /// Its size, as the guest sees it.
    pub mib: u32,
    /// What it adds to what is below.
    pub layer: ScratchLayer,
    /// What is below.
    pub below: Below,
}

impl CapturedScratch {
    fn over(self, source: Option<&ForkFrom>) -> Scratch {
        let below = match self.below {
            Below::Nothing => None,
            Below::Source => source.and_then(|source| source.scratch.as_ref()),
        };
        let mut layers = below.map_or_else(Vec::new, |below| below.layers.clone());
        layers.push(self.layer);
        let mib = self.mib;
        Scratch { mib, layers }
    }
}

/// A scratch disk that is being copied as it stood, while its VM goes on.
#[derive(Debug)]
pub struct ScratchCopy {
    task: JoinHandle<Result<CapturedScratch, CaptureError>>,
}

impl ScratchCopy {
    /// What `task` copies; it goes on to its end whether or not that is waited for.
    pub(crate) const fn of(task: JoinHandle<Result<CapturedScratch, CaptureError>>) -> Self {
        Self { task }
    }

    /// Waits until it is whole.
    ///
    /// # Errors
    /// [`CaptureError`], also when the VM ended before.
    pub async fn finished(self) -> Result<CapturedScratch, CaptureError> {
        self.task.await.map_err(|error| CaptureError::Step {
            what: "copying its scratch disk",
            source: io::Error::other(error),
        })?
    }
}

/// A guest's memory as it stood.
#[derive(Debug)]
pub enum MemoryCopy {
    /// It is there.
    Done(CapturedMemory),
    /// It is being read while the VM goes on, until this is dropped.
    Reading(MemoryReading),
}

/// Memory that is being read.
#[derive(Debug)]
pub struct MemoryReading {
    task: JoinHandle<Result<CapturedMemory, CaptureError>>,
    _wanted: Arc<()>,
}

impl MemoryReading {
    /// What `begin` begins to read, for as long as it is wanted.
    pub(crate) fn new(
        begin: impl FnOnce(Wanted) -> JoinHandle<Result<CapturedMemory, CaptureError>>,
    ) -> Self {
        let wanted = Arc::new(());
        Self {
            task: begin(Wanted(Arc::downgrade(&wanted))),
            _wanted: wanted,
        }
    }
}

/// Whether somebody may still wait for what is being read.
#[derive(Clone, Debug)]
pub(crate) struct Wanted(Weak<()>);

impl Wanted {
    #[cfg(test)]
    pub(crate) fn always() -> Self {
        Self(Arc::downgrade(&*Box::leak(Box::new(Arc::new(())))))
    }

    pub(crate) fn is_so(&self) -> bool {
        self.0.strong_count() > 0
    }
}

impl MemoryCopy {
    /// Waits until it is there.
    ///
    /// # Errors
    /// [`CaptureError`]; the VM is not the worse for it.
    pub async fn finished(self) -> Result<CapturedMemory, CaptureError> {
        match self {
            Self::Done(memory) => Ok(memory),
            Self::Reading(mut reading) => {
                (&mut reading.task)
                    .await
                    .map_err(|error| CaptureError::Step {
                        what: "reading its memory",
                        source: io::Error::other(error),
                    })?
            }
        }
    }
}

/// The memory that a fork begins with.
#[derive(Clone, Debug)]
pub enum ForkMemory {
    /// Any number of forks share it, and each has what it changes.
    Shared(Arc<MemoryImage>),
    /// One fork has it for itself, as a VM that boots has its own.
    Own(Arc<MemoryDraft>),
}

impl ForkMemory {
    /// The file.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Shared(image) => image.fd(),
            Self::Own(draft) => draft.fd(),
        }
    }

    /// The guest's memory, holes included.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        match self {
            Self::Shared(image) => image.bytes(),
            Self::Own(draft) => draft.bytes(),
        }
    }
}

/// What a fork begins from; clones share it, and so do any number of forks unless the memory is
/// one's alone.
#[derive(Clone, Debug)]
pub struct ForkFrom {
    /// The guest's memory.
    pub memory: ForkMemory,
    /// Its devices, in the driver's own form.
    pub state: Arc<File>,
    /// Its scratch disk, over which each fork writes to a file of its own.
    pub scratch: Option<Arc<Scratch>>,
}

impl ForkFrom {
    /// Whether a machine is made as this is. What is loaded says nothing of sizes, and a VMM that
    /// is given others may read nonsense.
    ///
    /// # Errors
    /// [`ForkError::Shape`] names what differs.
    pub fn check(&self, machine: &Machine) -> Result<(), ForkError> {
        let differs = |what, wanted: String, actual: String| match wanted == actual {
            true => Ok(()),
            false => Err(ForkError::Shape {
                what,
                wanted,
                actual,
            }),
        };
        let mib = |bytes: u64| format!("{} MiB", bytes / MIB);
        let (wanted, actual) = (machine.resources.memory_bytes(), self.memory.bytes());
        differs("memory", mib(wanted), mib(actual))?;
        let wanted = machine.resources.disk_mib;
        let actual = self.scratch.as_ref().map_or(0, |scratch| scratch.mib);
        let [wanted, actual] = [wanted, actual].map(|disk| mib(u64::from(disk) * MIB));
        differs("scratch disk", wanted, actual)
    }
}

/// Why a VM did not stand still, or does not go on.
#[derive(Debug, Error)]
#[error("the VMM cannot {what} the guest")]
pub struct PauseError {
    /// Pause or resume.
    pub what: &'static str,
    /// What the VMM said.
    pub source: io::Error,
}

/// Why a VM was not captured. It is as it was before, or gone.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum CaptureError {
    /// Its guest runs.
    #[error("the guest is not paused: it is {0}")]
    NotPaused(String),
    /// Somebody else captures it, or the copy of its disk for an earlier capture goes on.
    #[error("another capture of the VM is under way")]
    Busy,
    /// What it wrote could not be copied.
    #[error("{} has no room for a copy of the VM's scratch disk", folder.display())]
    DiskFull {
        /// Where.
        folder: PathBuf,
    },
    /// A step failed.
    #[error("cannot capture the VM: {what}")]
    Step {
        /// Which.
        what: &'static str,
        /// What the kernel or the VMM said.
        source: io::Error,
    },
    /// Its memory.
    #[error(transparent)]
    Memory(#[from] MemoryImageError),
}

/// Why a fork did not start.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ForkError {
    /// As at a boot.
    #[error(transparent)]
    Start(#[from] BootError),
    /// It is made otherwise than what it is to begin from.
    #[error("a fork has its source's {what}: {wanted} was asked for, and the source has {actual}")]
    Shape {
        /// What differs.
        what: &'static str,
        /// Of the machine.
        wanted: String,
        /// Of the source.
        actual: String,
    },
    /// The VMM does not take it.
    #[error("the VMM did not load the source's state: {0}")]
    Load(String),
}
