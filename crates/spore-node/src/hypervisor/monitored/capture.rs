//! Pausing, resuming and capturing a VM whose VMM runs.
//!
//! Called by its actor, through the traits of [`crate::hypervisor`]. The task that owns the monitor
//! does what the monitor does; memory is read beside it, on threads that may block. A VMM may be a
//! tenant's by now: what is opened through it is only ever read or sealed, and only as much of it
//! as the machine was made with.
//!
//! ```text
//!   runs   ─┬─ monitor: files for devices and disk handed over
//!           └─ memory: found, room made for its own pages (fork)
//!   paused ─┬─ monitor: devices saved, copy of the scratch disk begun (`copy.rs`)
//!           └─ memory: own pages (fork), a frozen copy of the VMM (fork with many, goes on), all
//!              pages (booted, goes on), or read once it is written to the disk (booted, sleeps)
//!   runs   ─── scratch disk copied, frozen copy read (`frozen.rs`) ──▶ Capture whole
//!   killed, once it is: its memory sealed (booted, ends)
//! ```

use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{
    FallocateFlags, FileType, MemfdFlags, OFlags, fallocate, fcntl_add_seals, fstat, memfd_create,
};
use rustix::io::Errno;
use tokio::sync::{OwnedMutexGuard, mpsc, oneshot};
use tokio::time::sleep;

use super::frozen::{self, Frozen, Origin};
use super::pages::{self, Reader, Sharing};
use super::vm::{How, MonitoredVm, Order};
use super::{Handed, HandedScratch, LENT_NOTE};
use crate::disk::overlay::DiskKey;
use crate::hypervisor::Vm as _;
use crate::hypervisor::fork::{
    Afterwards, Below, Capture, CaptureError, CapturedScratch, MemoryCopy, MemoryReading,
    PauseError, ScratchCopy, ScratchLayer, Turn,
};
use crate::hypervisor::memory_image::{CapturedMemory, MemoryDraft, MemoryImage, SEALED};
use crate::hypervisor::room::blocking;

/// How often a copy is asked whether it is over, at first and at last.
const COPY_STEPS: [Duration; 2] = [Duration::from_millis(2), Duration::from_millis(100)];

/// What a copy may have beyond what its source had when it was prepared: what says where things
/// are, and what the guest wrote until it stood still.
const COPY_MARGIN: u64 = 32 * 1024 * 1024;

pub(in crate::hypervisor) fn step<E: Into<io::Error>>(
    what: &'static str,
) -> impl FnOnce(E) -> CaptureError {
    move |source| CaptureError::Step {
        what,
        source: source.into(),
    }
}

/// What the VM's task answers to an order.
async fn ask<T>(
    orders: &mpsc::Sender<Order>,
    order: impl FnOnce(oneshot::Sender<T>) -> Order,
) -> io::Result<T> {
    let ended = || io::Error::new(io::ErrorKind::NotConnected, "the VMM has ended");
    let (answer, answered) = oneshot::channel();
    let sent = orders.send(order(answer)).await;
    sent.map_err(|_task_ended| ended())?;
    answered.await.map_err(|_task_ended| ended())
}

/// A capture that is prepared for.
#[derive(Debug)]
pub(super) struct Ready {
    state: File,
    memory: Memory,
    scratch: Option<CapturedScratch>,
    /// Nobody else's copy of the disk is under way.
    alone: OwnedMutexGuard<()>,
}

impl MonitoredVm {
    pub(super) async fn run_state(
        &self,
        what: &'static str,
        order: impl FnOnce(oneshot::Sender<io::Result<()>>) -> Order,
    ) -> Result<(), PauseError> {
        let done = ask(&self.orders, order).await.flatten();
        done.map_err(|source| PauseError { what, source })
    }

    /// Takes the place of what was prepared for before.
    pub(super) async fn make_ready(
        &self,
        key: Option<DiskKey>,
        below: Option<Below>,
    ) -> Result<Turn, CaptureError> {
        let turn = Arc::clone(&self.turn).try_lock_owned();
        let turn = Turn::of(turn.map_err(|_held| CaptureError::Busy)?);
        let mut ready = self.ready.lock().await;
        // One whose turn ended before it was captured.
        *ready = None;
        *ready = Some(self.prepared(key, below).await?);
        Ok(turn)
    }

    async fn prepared(
        &self,
        key: Option<DiskKey>,
        below: Option<Below>,
    ) -> Result<Ready, CaptureError> {
        let alone = Arc::clone(&self.copying).try_lock_owned();
        let alone = alone.map_err(|_held| CaptureError::Busy)?;
        let machine = self.rooms.machine(self.vm).map_err(step("its record"))?;
        let (state, to) = state_file().map_err(step("a file for its devices"))?;
        let mib = machine.resources.disk_mib;
        let (pid, bytes) = (self.pid, machine.resources.memory_bytes());
        let (disks, of) = (self.rooms.disks().clone(), key.clone());
        let how = self.how;
        let opened = blocking(move || {
            let memory = Memory::open(how, pid, bytes)?;
            let layer = (mib > 0).then(|| (how.new_layer)(&disks, mib, of.as_ref()));
            let layer = layer.transpose();
            let layer = layer.map_err(step("a file for its scratch disk"))?;
            Ok::<_, CaptureError>((memory, layer))
        });
        let (memory, layer) = opened.await.map_err(step("a worker thread"))??;
        let cloned = layer.as_ref().map(File::try_clone).transpose();
        let cloned = cloned.map_err(step("a file for its scratch disk"))?;
        let handed = Handed {
            state: to,
            scratch: cloned.map(|file| HandedScratch {
                file,
                key: key.clone(),
                below,
            }),
        };
        let extent = ask(&self.orders, |answer| Order::Prepare(handed, answer));
        let extent = extent.await.flatten();
        let (below, bytes) = extent.map_err(step("handing it files"))?;
        let scratch = match layer {
            None => None,
            Some(file) => {
                let layer = ScratchLayer {
                    file: Arc::new(self.with_room(file, bytes).await?),
                    key,
                };
                Some(CapturedScratch { mib, layer, below })
            }
        };
        Ok(Ready {
            state,
            memory,
            scratch,
            alone,
        })
    }

    /// Takes the room for a copy before it begins: each block is copied before the guest changes
    /// it, and a copy that cannot be written fails the guest's own write (`blockdev-backup` in
    /// QEMU's QMP reference: the default of `on-cbw-error`, which 7.2 has no other of).
    async fn with_room(&self, file: File, bytes: u64) -> Result<File, CaptureError> {
        let reserve = move || {
            let flags = FallocateFlags::KEEP_SIZE;
            let taken = fallocate(&file, flags, 0, bytes + COPY_MARGIN);
            taken.map(|()| file)
        };
        let reserved = blocking(reserve).await;
        reserved
            .map_err(step("a worker thread"))?
            .map_err(|error| match error {
                Errno::NOSPC | Errno::DQUOT => CaptureError::DiskFull {
                    folder: self.rooms.disks().folder().to_owned(),
                },
                error => step("room for a copy of its scratch disk")(error),
            })
    }

    pub(super) async fn take(&self, afterwards: Afterwards) -> Result<Capture, CaptureError> {
        let ready = self.ready.lock().await.take();
        let ready = match ready {
            Some(ready) => ready,
            None => self.prepared(None, None).await?,
        };
        let Ready {
            state,
            memory,
            scratch,
            alone,
        } = ready;
        let (saved, copied) = tokio::join!(
            ask(&self.orders, Order::Capture),
            self.copy_memory(memory, afterwards),
        );
        let saved = saved.map_err(step("saving its devices")).flatten();
        let memory = match saved.and(copied) {
            Ok(memory) => memory,
            Err(error) => {
                // A task that is over has nothing to forget.
                drop(self.orders.send(Order::Forget).await);
                return Err(error);
            }
        };
        fcntl_add_seals(&state, SEALED).map_err(step("sealing its devices"))?;
        let mut scratch = scratch.map(|scratch| self.copied(scratch, alone));
        if afterwards == Afterwards::Ends {
            if let Some(copy) = scratch {
                drop(self.orders.send(Order::Hasten).await);
                let whole = copy.finished().await?;
                scratch = Some(ScratchCopy::of(tokio::spawn(async { Ok(whole) })));
            }
            self.kill();
            self.exited().await;
        } else if scratch.is_none() {
            drop(self.orders.send(Order::Forget).await);
        } else if afterwards == Afterwards::Sleeps {
            // It stands still until the copy is on the disk.
            drop(self.orders.send(Order::Hasten).await);
        }
        Ok(Capture {
            memory: memory.taken()?,
            state,
            scratch,
        })
    }

    /// Of a fork that goes on and has many pages of its own a frozen copy is made. Where none can
    /// be had, they are read while the guest stands still.
    async fn copy_memory(
        &self,
        memory: Memory,
        afterwards: Afterwards,
    ) -> Result<Copied, CaptureError> {
        if let (Memory::Forked { base, frozen, .. }, Afterwards::GoesOn) = (&memory, afterwards)
            && let Some(many) = frozen
        {
            match self.freeze(*many).await {
                Ok(frozen) => return Ok(Copied::Frozen(Arc::clone(base), frozen)),
                Err(error) => {
                    tracing::warn!(vm = %self.vm, %error, "its memory is read in the pause");
                }
            }
        }
        let copied = blocking(move || memory.copy(afterwards)).await;
        copied.map_err(step("a worker thread")).flatten()
    }

    async fn freeze(&self, many: Many) -> io::Result<Frozen> {
        let alone = Arc::clone(&self.freezing).try_lock_owned();
        let alone = alone.map_err(|_held| io::Error::other("another copy of it is there"))?;
        let cgroup = self.vm.to_string();
        let cgroups = self.rooms.cgroups();
        // Each page that the guest changes is there twice, and it must not die of that.
        let more = (many.own + pages::more(many.own)) as u64;
        let note = self.rooms.folder(self.vm).join(LENT_NOTE);
        let lent = cgroups.lend_memory(&cgroup, more, note)?;
        let (theirs, socket) = frozen::sockets()?;
        let frozen = Frozen {
            socket,
            origin: Origin {
                cgroups: cgroups.clone(),
                cgroup,
                pid: self.pid,
                uid: self.uid,
                inode: many.inode,
                bytes: many.bytes,
            },
            _lent: lent,
            _alone: alone,
        };
        let freeze = |answer| Order::Freeze(theirs, frozen::LIMIT, answer);
        ask(&self.orders, freeze).await.flatten()?;
        Ok(frozen)
    }

    /// Waits for a copy that was begun, whether or not anybody waits for that.
    fn copied(&self, scratch: CapturedScratch, alone: OwnedMutexGuard<()>) -> ScratchCopy {
        let orders = self.orders.clone();
        ScratchCopy::of(tokio::spawn(async move {
            let [mut pace, slowest] = COPY_STEPS;
            loop {
                let over = ask(&orders, Order::Copied).await.flatten();
                match over {
                    Ok(true) => break,
                    Ok(false) => sleep(pace).await,
                    Err(error) => {
                        drop(orders.send(Order::Forget).await);
                        return Err(step("copying its scratch disk")(error));
                    }
                }
                pace = slowest.min(pace * 2);
            }
            drop(alone);
            Ok(scratch)
        }))
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

/// Where a VM's memory is.
#[derive(Debug)]
enum Memory {
    /// In a sealed image, but for its own pages.
    Forked {
        base: Arc<MemoryImage>,
        own: Box<Reader>,
        /// Where they are too many to be read while the guest stands still.
        frozen: Option<Many>,
    },
    /// In a file of its own.
    Booted { file: File, bytes: u64 },
}

/// The own pages of a VMM that has many.
#[derive(Clone, Copy, Debug)]
struct Many {
    /// The file of the whole memory, and its size.
    inode: u64,
    bytes: u64,
    /// What they were when the capture was prepared.
    own: usize,
}

/// Memory that was copied, is to be taken over once its VMM is gone, or stands still in a copy.
enum Copied {
    Done(CapturedMemory),
    Its(MemoryDraft),
    Frozen(Arc<MemoryImage>, Frozen),
}

impl Copied {
    /// A frozen one is read from now on, for as long as somebody may wait for it.
    fn taken(self) -> Result<MemoryCopy, CaptureError> {
        Ok(match self {
            Self::Done(memory) => MemoryCopy::Done(memory),
            Self::Its(draft) => MemoryCopy::Done(CapturedMemory::Whole(Arc::new(draft.seal()?))),
            Self::Frozen(base, frozen) => MemoryCopy::Reading(MemoryReading::new(|wanted| {
                tokio::spawn(async move {
                    let read = blocking(move || frozen.read(&wanted)).await.flatten();
                    let pages = read.map_err(step("reading its frozen copy"))?;
                    Ok(CapturedMemory::Changed { base, pages })
                })
            })),
        })
    }
}

impl Memory {
    fn open(how: How, pid: u32, bytes: u64) -> Result<Self, CaptureError> {
        let file = (how.open_memory)(pid, bytes).map_err(step("opening its memory"))?;
        let inode = file.metadata().map_err(step("finding its memory"))?.ino();
        let mapping = pages::find(pid, inode, bytes).map_err(step("finding its memory"))?;
        Ok(match mapping.sharing {
            Sharing::Private => {
                let looking = || step("looking at its pages");
                let mut reader = Reader::open(pid, mapping, bytes).map_err(looking())?;
                let own = reader.own_bytes().map_err(looking())?;
                let many = |from: &u64| own as u64 >= *from;
                let frozen = how
                    .freeze_from
                    .filter(many)
                    .map(|_| Many { inode, bytes, own });
                if frozen.is_none() {
                    reader.make_room(own);
                }
                Self::Forked {
                    base: Arc::new(MemoryImage::from_sealed_memfd(file.into(), bytes)?),
                    own: Box::new(reader),
                    frozen,
                }
            }
            Sharing::Shared => Self::Booted { file, bytes },
        })
    }

    fn copy(self, afterwards: Afterwards) -> Result<Copied, CaptureError> {
        match (self, afterwards) {
            (Self::Forked { base, own, .. }, _) => {
                let pages = own.copy(&|| true).map_err(step("copying its pages"))?;
                Ok(Copied::Done(CapturedMemory::Changed { base, pages }))
            }
            (Self::Booted { file, bytes }, Afterwards::Ends) => {
                Ok(Copied::Its(MemoryDraft::from_file(file, bytes)))
            }
            (Self::Booted { file, bytes }, Afterwards::Sleeps) => {
                let memory = MemoryDraft::from_file(file, bytes);
                Ok(Copied::Done(CapturedMemory::Standing(memory)))
            }
            (Self::Booted { file, bytes }, Afterwards::GoesOn) => {
                let mut draft = MemoryDraft::new(bytes)?;
                draft.copy(file.as_fd())?;
                let image = draft.seal()?;
                Ok(Copied::Done(CapturedMemory::Whole(Arc::new(image))))
            }
        }
    }
}

/// Opens a file through a VMM, which by now may have put anything there: what is no plain file is
/// refused, and opening it never waits.
pub(in crate::hypervisor) fn open_through(path: &str) -> io::Result<File> {
    let file = File::options()
        .read(true)
        .write(true)
        .custom_flags(OFlags::NONBLOCK.bits().cast_signed())
        .open(path)?;
    match FileType::from_raw_mode(fstat(&file)?.st_mode) {
        FileType::RegularFile => Ok(file),
        other => Err(io::Error::other(format!("{path} is {other:?} and no file"))),
    }
}
