//! What a simulated guest is when it is captured, and what a fork of it begins with.
//!
//! Used by the driver's `capture` and `fork`. The guest's whole state travels as the device state;
//! its memory is an image of the right size without a page in it, but for what it began with and
//! one of each fork's own.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, fcntl_add_seals, memfd_create};
use zeroize::Zeroizing;

use super::guest::{Guest, GuestCopy, Life};
use super::lock;
use crate::hypervisor::fork::{Capture, CaptureError, ForkError, ForkFrom, ForkMemory, MemoryCopy};
use crate::hypervisor::memory_image::{
    CapturedMemory, CapturedPages, MemoryDraft, PAGE_BYTES, PageRun, SEALED,
};

const MIB: u64 = 1024 * 1024;

pub(super) fn write(guest: &Guest) -> Result<Capture, CaptureError> {
    let (memory, state) = parts(guest)?;
    Ok(Capture {
        memory: MemoryCopy::Done(memory),
        state,
        scratch: None,
    })
}

/// Its memory, and its devices.
pub(super) fn parts(guest: &Guest) -> Result<(CapturedMemory, File), CaptureError> {
    if !matches!(lock(&guest.state).life, Life::Frozen(_)) {
        guest.violation("captured while its tenant runs");
    }
    let step = |source| CaptureError::Step {
        what: "writing its state",
        source,
    };
    let memory = match &guest.base {
        None => {
            let memory = MemoryDraft::new(u64::from(guest.memory_mib) * MIB)?.seal()?;
            CapturedMemory::Whole(Arc::new(memory))
        }
        Some(ForkMemory::Shared(base)) => CapturedMemory::Changed {
            base: Arc::clone(base),
            pages: own_page(guest),
        },
        Some(ForkMemory::Own(own)) => {
            let mut memory = MemoryDraft::new(own.bytes())?;
            memory.copy(own.fd())?;
            for (first, bytes) in own_page(guest).iter() {
                memory.write(first, bytes)?;
            }
            CapturedMemory::Whole(Arc::new(memory.seal()?))
        }
    };
    Ok((memory, state_file(&guest.copy()).map_err(step)?))
}

/// What every fork changes: a page that is its alone.
fn own_page(guest: &Guest) -> CapturedPages {
    let mut bytes = Zeroizing::new(vec![0; usize::try_from(PAGE_BYTES).unwrap_or(0)]);
    let name = guest.vm.to_string();
    bytes[..name.len()].copy_from_slice(name.as_bytes());
    let run = PageRun { first: 0, pages: 1 };
    CapturedPages::new(vec![run], bytes)
}

fn state_file(copy: &GuestCopy) -> io::Result<File> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = File::from(memfd_create(c"simulated-state", flags)?);
    file.write_all_at(&serde_json::to_vec(copy)?, 0)?;
    fcntl_add_seals(&file, SEALED)?;
    Ok(file)
}

pub(super) fn read(from: &ForkFrom, memory_mib: u32) -> Result<GuestCopy, ForkError> {
    let (wanted, actual) = (u64::from(memory_mib) * MIB, from.memory.bytes());
    if wanted != actual {
        return Err(ForkError::Shape {
            what: "memory",
            wanted: format!("{memory_mib} MiB"),
            actual: format!("{} MiB", actual / MIB),
        });
    }
    let load = |error: io::Error| ForkError::Load(error.to_string());
    let len = from.state.metadata().map_err(load)?.len();
    let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
    from.state.read_exact_at(&mut bytes, 0).map_err(load)?;
    serde_json::from_slice(&bytes).map_err(|error| load(error.into()))
}
