//! What a paused VM gives so that others can begin where it stands, and what they begin from.
//!
//! Given by [`super::Vm::capture`], taken by [`super::Hypervisor::fork`]. Everything here is in
//! memory or a file without a name: it is gone with its last holder.

use std::fs::File;
use std::io;
use std::sync::Arc;

use thiserror::Error;

use super::BootError;
use super::memory_image::{CapturedMemory, MemoryImage, MemoryImageError};

/// What becomes of a VM behind its capture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Afterwards {
    /// It goes on: it stays paused until it is resumed.
    GoesOn,
    /// It is killed, which saves the copy of its memory.
    Ends,
}

/// A VM as it stood while it was paused.
#[derive(Debug)]
pub struct Capture {
    /// Its memory.
    pub memory: CapturedMemory,
    /// Its devices, in the driver's own form.
    pub state: File,
    /// Its scratch disk, where it has one.
    pub scratch: Option<File>,
}

impl Capture {
    /// What forks of it begin from. Blocks.
    ///
    /// # Errors
    /// [`MemoryImageError`].
    pub fn into_source(self) -> Result<ForkFrom, MemoryImageError> {
        Ok(ForkFrom {
            memory: self.memory.merge()?,
            state: Arc::new(self.state),
            scratch: self.scratch.map(Arc::new),
        })
    }
}

/// What a fork begins from; clones share it, and so do any number of forks.
#[derive(Clone, Debug)]
pub struct ForkFrom {
    /// The guest's memory.
    pub memory: Arc<MemoryImage>,
    /// Its devices, in the driver's own form.
    pub state: Arc<File>,
    /// Its scratch disk, which each fork gets a copy of.
    pub scratch: Option<Arc<File>>,
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
