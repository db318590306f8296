//! Pausing, resuming and capturing a QEMU that runs.
//!
//! Called by its actor, through the traits of [`crate::hypervisor`]. The task that owns the monitor
//! does what the monitor does; memory and disk are read beside it, on threads that may block. A VMM
//! may be a tenant's by now: what is opened through it is only ever read or sealed, and only as
//! much of it as the machine was made with.
//!
//! ```text
//!   paused ──┬─ monitor: state file handed over, devices saved, file taken back ─┬─▶ Capture
//!            ├─ memory: own pages (fork), all pages (booted, goes on)            │
//!            └─ scratch disk: copied                                             │
//!                                        killed, its memory sealed (booted, ends) ┘
//! ```

use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::sync::Arc;

use rustix::fs::{FileType, MemfdFlags, OFlags, fcntl_add_seals, fstat, memfd_create};
use spore_wire::id::VmId;
use tokio::sync::oneshot;

use super::arguments::FD_MEMORY;
use super::blocking;
use super::pages::{self, Sharing};
use super::vm::{Order, QemuVm};
use crate::disk::Disks;
use crate::hypervisor::Vm as _;
use crate::hypervisor::fork::{Afterwards, Capture, CaptureError, PauseError};
use crate::hypervisor::memory_image::{CapturedMemory, MemoryDraft, MemoryImage, SEALED};

fn step<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> CaptureError {
    move |source| CaptureError::Step {
        what,
        source: source.into(),
    }
}

impl QemuVm {
    pub(super) async fn run_state(
        &self,
        what: &'static str,
        order: impl FnOnce(oneshot::Sender<io::Result<()>>) -> Order,
    ) -> Result<(), PauseError> {
        self.order(order)
            .await
            .map_err(|source| PauseError { what, source })
    }

    /// What the VM's task answers to an order.
    async fn order<T>(
        &self,
        order: impl FnOnce(oneshot::Sender<io::Result<T>>) -> Order,
    ) -> io::Result<T> {
        let ended = || io::Error::new(io::ErrorKind::NotConnected, "the VMM has ended");
        let (answer, answered) = oneshot::channel();
        let sent = self.orders.send(order(answer)).await;
        sent.map_err(|_task_ended| ended())?;
        answered.await.map_err(|_task_ended| ended())?
    }

    pub(super) async fn take(&self, afterwards: Afterwards) -> Result<Capture, CaptureError> {
        let status = self.order(Order::Status).await;
        let status = status.map_err(step("asking for its status"))?;
        if status != "paused" {
            return Err(CaptureError::NotPaused(status));
        }
        let machine = self.rooms.machine(self.vm).map_err(step("its record"))?;
        let copying = Copying {
            vm: self.vm,
            pid: self.pid,
            memory_bytes: machine.resources.memory_bytes(),
            disk_mib: machine.resources.disk_mib,
            disks: self.rooms.disks().clone(),
            afterwards,
        };
        let (state, to) = state_file().map_err(step("a file for its devices"))?;
        let (saved, copied) = tokio::join!(
            self.order(|answer| Order::Save(to, answer)),
            blocking(move || copying.run()),
        );
        saved.map_err(step("saving its devices"))?;
        let (memory, scratch) = copied.map_err(step("a worker thread"))??;
        fcntl_add_seals(&state, SEALED).map_err(step("sealing its devices"))?;
        if afterwards == Afterwards::Ends {
            self.kill();
            self.exited().await;
        }
        let memory = match memory {
            Copied::Done(memory) => memory,
            Copied::Its(draft) => CapturedMemory::Whole(Arc::new(draft.seal()?)),
        };
        Ok(Capture {
            memory,
            state,
            scratch,
        })
    }
}

/// Two descriptors of one file in memory: the whole one, and the one for the VMM, which QEMU takes
/// for writing only if it is for nothing else.
fn state_file() -> io::Result<(File, File)> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let state = File::from(memfd_create(c"device-state", flags)?);
    let to = File::options()
        .write(true)
        .open(format!("/proc/self/fd/{}", state.as_raw_fd()))?;
    Ok((state, to))
}

/// What is copied beside the monitor.
struct Copying {
    vm: VmId,
    pid: u32,
    memory_bytes: u64,
    disk_mib: u32,
    disks: Disks,
    afterwards: Afterwards,
}

/// Memory that was copied, or is to be taken over once its VMM is gone.
enum Copied {
    Done(CapturedMemory),
    Its(MemoryDraft),
}

impl Copying {
    fn run(self) -> Result<(Copied, Option<File>), CaptureError> {
        let memory = self.memory()?;
        if self.disk_mib == 0 {
            return Ok((memory, None));
        }
        let of = self.disks.open_held(self.vm, self.pid);
        let copy = of.and_then(|file| self.disks.copy_nameless(&file));
        let copy = copy.map_err(step("copying its scratch disk"))?;
        Ok((memory, Some(copy)))
    }

    fn memory(&self) -> Result<Copied, CaptureError> {
        let (pid, bytes) = (self.pid, self.memory_bytes);
        let file = self.open_memory().map_err(step("opening its memory"))?;
        let inode = file.metadata().map_err(step("finding its memory"))?.ino();
        let mapping = pages::find(pid, inode, bytes).map_err(step("finding its memory"))?;
        match (mapping.sharing, self.afterwards) {
            (Sharing::Private, _) => {
                let base = MemoryImage::from_sealed_memfd(file.into(), bytes)?;
                let pages = pages::copy_private(pid, mapping, bytes);
                Ok(Copied::Done(CapturedMemory::Changed {
                    base: Arc::new(base),
                    pages: pages.map_err(step("copying its pages"))?,
                }))
            }
            (Sharing::Shared, Afterwards::Ends) => {
                Ok(Copied::Its(MemoryDraft::from_file(file, bytes)))
            }
            (Sharing::Shared, Afterwards::GoesOn) => {
                let mut draft = MemoryDraft::new(bytes)?;
                draft.copy(file.as_fd())?;
                let image = draft.seal()?;
                Ok(Copied::Done(CapturedMemory::Whole(Arc::new(image))))
            }
        }
    }

    /// The descriptor that the VMM was given for it, opened again. By now it may have put anything
    /// there: what is no plain file is refused, and opening it never waits.
    fn open_memory(&self) -> io::Result<File> {
        let file = File::options()
            .read(true)
            .write(true)
            .custom_flags(OFlags::NONBLOCK.bits().cast_signed())
            .open(format!("/proc/{}/fd/{FD_MEMORY}", self.pid))?;
        match FileType::from_raw_mode(fstat(&file)?.st_mode) {
            FileType::RegularFile => Ok(file),
            other => Err(io::Error::other(format!(
                "descriptor {FD_MEMORY} of the VMM is {other:?} and no file"
            ))),
        }
    }
}
