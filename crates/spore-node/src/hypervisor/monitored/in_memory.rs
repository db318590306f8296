//! Files of a VMM that have no name and are gone with it.
//!
//! Made by drivers for each start.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::FileExt as _;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};

use crate::disk::overlay::DiskKey;

/// What of a VMM's own output is kept.
pub(in crate::hypervisor) const LOG_BYTES: u64 = 64 * 1024;

/// The size of the disk of a VM without a folder; the guest looks at that much for a file system.
const NO_FOLDER_BYTES: u64 = 4096;

/// A file in memory of a fixed size: writing behind its end fails.
pub(in crate::hypervisor) fn bounded_log() -> io::Result<OwnedFd> {
    let log = memfd_create(
        c"vmm-output",
        MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING,
    )?;
    ftruncate(&log, LOG_BYTES)?;
    fcntl_add_seals(&log, SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL)?;
    Ok(log)
}

/// What a VM without a folder has on its disk: nothing that could be mounted.
pub(in crate::hypervisor) fn no_folder() -> io::Result<OwnedFd> {
    let file = memfd_create(c"no-folder", MemfdFlags::CLOEXEC)?;
    ftruncate(&file, NO_FOLDER_BYTES)?;
    // A VMM is given it as it is given a folder, which it cannot write.
    let readable = File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
    Ok(readable.into())
}

/// What a VMM reads a disk's key from; emptied once it has.
pub(in crate::hypervisor) fn key_file(key: &DiskKey) -> io::Result<File> {
    let file = File::from(memfd_create(c"disk-key", MemfdFlags::CLOEXEC)?);
    file.write_all_at(key.passphrase().as_bytes(), 0)?;
    Ok(file)
}
