//! From a launch blob and its descriptors to a machine. Every number is checked before it is used,
//! and every descriptor is somebody's before anything is made.

use std::io;
use std::num::NonZeroU64;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;

use spore_wire::guest::PORT_NAME;
use spore_wire::launch::{
    self, AHEAD_MAX, Begin, Launch, MemoryOwner, PageRun, Rates, TAP_HEADER_BYTES,
};
use spore_wire::secret::SecretBytes;

use super::files::{Files, FilesError};
use crate::clock::{Clock as _, Monotonic};
use crate::device::rate::{Bucket, Limit};
use crate::device::virtio::blk::{Blk, Exchange};
use crate::device::virtio::console::{Console, Listener};
use crate::device::virtio::net::{Net, Tap};
use crate::device::virtio::rng::{self, Rng};
use crate::disk::copies::{Copier, Copies};
use crate::disk::locked::KEY_BYTES;
use crate::disk::overlay::LayerError;
use crate::disk::scratch::{LayerFile, Scratch};
use crate::disk::stack::Base;
use crate::disk::zeros::Zeros;
use crate::disk::{Access, Disk, Raw, read_at};
use crate::jail::seccomp::FilterError;
use crate::kvm::Kvm;
use crate::kvm::bell::Bell;
use crate::machine::bare::{Bare, Early};
use crate::machine::board::{Board, BoardError};
use crate::machine::boot::Boot;
use crate::machine::layout::{Layout, LayoutError, Slot};
use crate::machine::saved::SavedMachine;
use crate::machine::{Machine, StartError};
use crate::memory::{GuestMemory, PAGE_BYTES, Sharing};
use crate::snapshot::format::STATE_BYTES_MAX;

/// Why there is no guest.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// Blob and descriptors do not go together.
    #[error(transparent)]
    Files(#[from] FilesError),
    /// A machine that cannot be.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// A descriptor is not what it should be.
    #[error("the {what} cannot be used")]
    Use {
        /// What it should be.
        what: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A key of another length.
    #[error("a layer's key has {found} bytes and not {KEY_BYTES}")]
    Key {
        /// Of the key.
        found: usize,
    },
    /// Too many layers.
    #[error(
        "a scratch disk of {found} layers: {} are possible",
        launch::LAYERS_MAX
    )]
    Layers {
        /// Of the disk.
        found: usize,
    },
    /// The base is not as long as the disk.
    #[error("the scratch disk has {expected} bytes, and its base {found}")]
    Base {
        /// The base's.
        found: u64,
        /// The disk's.
        expected: u64,
    },
    /// A layer is none, or of another disk.
    #[error("the scratch disk cannot be put together")]
    Layer(#[from] LayerError),
    /// Too much is to be copied ahead.
    #[error("{found} runs of pages to copy ahead: {AHEAD_MAX} are possible")]
    Ahead {
        /// How many runs.
        found: usize,
    },
    /// What is to be copied ahead is no memory of the guest's.
    #[error("{pages} pages from {first} on are to be copied ahead, and are not the guest's")]
    Outside {
        /// The number of the first.
        first: u32,
        /// How many.
        pages: u32,
    },
    /// The kernel gave no thread.
    #[error("the thread that copies the scratch disk cannot be started")]
    Thread(#[source] io::Error),
    /// That thread is not confined.
    #[error(transparent)]
    Filter(#[from] FilterError),
    /// What was saved of it is too long, or cannot be read.
    #[error("the saved machine cannot be read")]
    Read(#[source] io::Error),
    /// The machine cannot be put together.
    #[error(transparent)]
    Start(#[from] StartError),
}

/// What a guest's devices are made of.
#[derive(Debug)]
pub struct Devices {
    image: Raw,
    folder: Raw,
    scratch: Option<Scratch>,
    wire: Tap,
    mac: [u8; 6],
    door: Listener,
    rates: Rates,
}

/// A guest, paused, and its scratch disk.
#[derive(Debug)]
pub struct Launched {
    /// The guest.
    pub machine: Machine,
    /// Its scratch disk, if it has one, and the copies of it.
    pub copies: Option<Copies>,
    /// Layers that the disk was launched with, without its own.
    pub layers: usize,
    /// How it has its memory.
    pub memory: Sharing,
}

/// What there is of a guest before it is known which.
#[derive(Debug, Default)]
pub struct Ahead {
    early: Option<Early>,
    made: Option<Box<Bare>>,
    copier: Option<Copier>,
}

impl Ahead {
    /// Begins a machine. What cannot be had now is tried again when there is a guest for it, and
    /// then it is told why.
    pub fn begin(&mut self, kvm: &Arc<Kvm>) {
        self.early = Early::new(Arc::clone(kvm)).ok();
    }

    /// Likewise starts the thread that copies disks, unless it is there.
    pub fn copier(&mut self) {
        if self.copier.is_none() {
            self.copier = Copier::start().ok();
        }
    }

    /// Makes the machine of a guest to come.
    pub fn park(&mut self, kvm: &Kvm, memory_mib: u32, vcpus: u8) -> Result<(), LaunchError> {
        let layout = Layout::new(memory_mib, vcpus)?;
        let made = self.bare(kvm, &layout)?;
        made.hang().map_err(StartError::from)?;
        self.made = Some(Box::new(made));
        Ok(())
    }

    /// A machine of this size, which is begun anew if the one that is there has another.
    fn bare(&mut self, kvm: &Kvm, layout: &Layout) -> Result<Bare, StartError> {
        if let Some(made) = self.made.take_if(|made| made.layout() == layout) {
            return Ok(*made);
        }
        let early = self.early.take().and_then(|early| early.sized(layout));
        early.unwrap_or_else(|| Bare::new(kvm, layout))
    }
}

/// Makes the guest of a blob, with what is there of it. The bell is rung when a copy of its disk is
/// over.
pub fn launch(
    kvm: &Kvm,
    mut ahead: Ahead,
    blob: &Launch,
    fds: Vec<OwnedFd>,
    copied: &Arc<Bell>,
) -> Result<Launched, LaunchError> {
    // The blob's size and not the saved one's: what was saved may say anything.
    let layout = Layout::new(blob.memory_mib, blob.vcpus)?;
    let mut files = Files::new(fds);
    let memory = files.take(blob.memory)?;
    let devices = Devices::new(blob, &mut files)?;
    let copies = match &devices.scratch {
        Some(scratch) => {
            let copier = ahead.copier.take().map_or_else(Copier::start, Ok);
            let copier = copier.map_err(LaunchError::Thread)?;
            Some(Copies::new(copier, scratch.clone(), Arc::clone(copied)))
        }
        None => None,
    };
    let (machine, sharing) = match &blob.begin {
        Begin::Boot {
            kernel,
            initramfs,
            command_line,
        } => {
            let (kernel, initramfs) = (files.take(*kernel)?, files.take(*initramfs)?);
            files.finish()?;
            let boot = Boot {
                kernel: kernel.as_fd(),
                initramfs: Some(initramfs.as_fd()),
                command_line: command_line.as_bytes(),
                incarnation: blob.incarnation,
            };
            let plug = |board: &mut Board<'_>| devices.plug(board);
            let machine = ahead
                .bare(kvm, &layout)?
                .boot(memory.as_fd(), &boot, plug)?;
            (machine, Sharing::Shared)
        }
        Begin::Restore {
            state,
            memory: owner,
            ahead: pages,
        } => {
            let state = files.take(*state)?;
            files.finish()?;
            let sharing = match owner {
                MemoryOwner::Shared => Sharing::Private,
                MemoryOwner::Own => Sharing::Shared,
            };
            let state = read(&state).map_err(LaunchError::Read)?;
            let (file, incarnation) = (memory.as_fd(), blob.incarnation);
            let plug = |board: &mut Board<'_>| devices.plug(board);
            let saved = SavedMachine::read(&state).map_err(StartError::from)?;
            let bare = ahead.bare(kvm, &layout)?;
            let machine = bare.restore(saved, file, sharing, incarnation, plug)?;
            if sharing == Sharing::Private {
                copy_ahead(machine.memory(), pages)?;
            }
            (machine, sharing)
        }
    };
    copies.iter().try_for_each(Copies::ready)?;
    let layers = blob.scratch.as_ref().map_or(0, |disk| disk.layers.len());
    Ok(Launched {
        machine,
        copies,
        layers,
        memory: sharing,
    })
}

/// Gives a guest its own copies of the pages that it will write to, in one go instead of one fault
/// each. The kernel may have no room for all of them now: the guest takes them when it comes there.
fn copy_ahead(memory: &GuestMemory, ahead: &[PageRun]) -> Result<(), LaunchError> {
    let found = ahead.len();
    if found > AHEAD_MAX {
        return Err(LaunchError::Ahead { found });
    }
    for PageRun { first, pages } in ahead {
        let [offset, bytes] = [first, pages].map(|count| u64::from(*count) * PAGE_BYTES);
        let taken = memory.space().populate(offset, bytes);
        taken.map_err(|_outside| LaunchError::Outside {
            first: *first,
            pages: *pages,
        })?;
    }
    Ok(())
}

/// All of a saved machine's file, which has as much as one may have at most.
fn read(file: &OwnedFd) -> io::Result<Vec<u8>> {
    let bytes = rustix::fs::fstat(file)?.st_size.unsigned_abs();
    let bytes = usize::try_from(bytes).ok();
    let bytes = bytes.filter(|bytes| *bytes <= STATE_BYTES_MAX);
    let mut state = vec![0; bytes.ok_or(io::ErrorKind::FileTooLarge)?];
    read_at(file, 0, &mut state)?;
    Ok(state)
}

fn using<T>(what: &'static str, made: io::Result<T>) -> Result<T, LaunchError> {
    made.map_err(|source| LaunchError::Use { what, source })
}

/// A layer's file and its key.
pub fn layer(
    layer: &launch::Layer,
    files: &mut Files,
    access: Access,
) -> Result<LayerFile, LaunchError> {
    let raw = Raw::new(files.take(layer.file)?, access);
    let raw = using("scratch disk's layer", raw)?;
    let key = layer.key.as_ref().map(SecretBytes::expose);
    let found = key.map_or(0, <[u8]>::len);
    let key = key.map(<&[u8; KEY_BYTES]>::try_from).transpose();
    let key = key.map_err(|_wrong| LaunchError::Key { found })?;
    Ok(LayerFile::new(raw, key))
}

fn scratch(blob: &launch::Scratch, files: &mut Files) -> Result<Scratch, LaunchError> {
    let found = blob.layers.len();
    if found > launch::LAYERS_MAX {
        return Err(LaunchError::Layers { found });
    }
    let base = match blob.base {
        None => Base::Zeros(Zeros(blob.bytes)),
        Some(base) => {
            let raw = Raw::new(files.take(base)?, Access::ReadOnly);
            Base::File(using("scratch disk's base", raw)?)
        }
    };
    let (found, expected) = (base.bytes(), blob.bytes);
    if found != expected {
        return Err(LaunchError::Base { found, expected });
    }
    let below = blob.layers.iter();
    let below = below.map(|below| layer(below, files, Access::ReadOnly));
    let below = below.collect::<Result<_, _>>()?;
    let own = layer(&blob.own, files, Access::ReadWrite)?;
    Ok(Scratch::new(base, below, own)?)
}

impl Devices {
    /// Takes what the blob names for them. Nothing of it is KVM's.
    pub fn new(blob: &Launch, files: &mut Files) -> Result<Self, LaunchError> {
        let image = Raw::new(files.take(blob.image)?, Access::ReadOnly);
        let folder = Raw::new(files.take(blob.folder)?, Access::ReadOnly);
        let on = blob.scratch.as_ref();
        let on = on.map(|blob| scratch(blob, files)).transpose()?;
        let wire = Tap::new(files.take(blob.tap)?, TAP_HEADER_BYTES);
        let door = Listener::new(files.take(blob.agent)?);
        Ok(Self {
            image: using("image", image)?,
            folder: using("folder", folder)?,
            scratch: on,
            wire: using("tap", wire)?,
            mac: blob.mac,
            door: using("agent's socket", door)?,
            rates: blob.rates,
        })
    }

    /// Puts them into their places.
    fn plug(self, board: &mut Board<'_>) -> Result<(), BoardError> {
        let clock = || Box::new(Monotonic);
        let bucket = |rate: Option<NonZeroU64>| {
            // What may be had in a second may be had at once.
            rate.map(|per_s| Bucket::new(per_s.get(), per_s.get(), Monotonic.now()))
        };
        let of_disks = Limit {
            operations: bucket(self.rates.disk_operations),
            bytes: bucket(self.rates.disk_bytes),
        };
        let of_net = Limit {
            operations: None,
            bytes: bucket(self.rates.network_bytes),
        };
        let disk = |disk: Box<dyn Disk>, id| Blk::new(disk, id, of_disks, clock());
        board.plug(Slot::Image, disk(Box::new(self.image), "image"))?;
        // A guest may be forked for whichever app: it takes hold of this one's disk anew.
        let folder = disk(Box::new(self.folder), "folder").exchanged(Exchange::AnySize);
        board.plug(Slot::Folder, folder)?;
        if let Some(scratch) = self.scratch {
            board.plug(Slot::Scratch, disk(Box::new(scratch), "scratch"))?;
        }
        let net = Net::new(Box::new(self.wire), self.mac, of_net, of_net, clock());
        board.plug(Slot::Net, net)?;
        let port = Console::new(PORT_NAME, Box::new(self.door), clock());
        board.plug(Slot::Console, port)?;
        board.plug(Slot::Rng, Rng::new(rng::host))
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd as _;

    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
    use spore_wire::launch::{AHEAD_MAX, PageRun};

    use super::{LaunchError, copy_ahead};
    use crate::memory::{Gpa, PAGE_BYTES, Region, Sharing, Space};

    #[test]
    fn only_pages_of_the_guest_are_copied_ahead_and_only_so_many() {
        let bytes = 4 * PAGE_BYTES;
        let file = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, bytes).unwrap();
        let whole = Region {
            start: Gpa(0),
            offset: 0,
            bytes,
        };
        let space = Space::reserve(bytes).unwrap();
        let memory = space.fill(file.as_fd(), Sharing::Private, &[whole]);
        let memory = memory.unwrap();
        let copy = |first, pages| copy_ahead(&memory, &[PageRun { first, pages }]);
        for (first, pages) in [(0, 4), (3, 1), (4, 0)] {
            copy(first, pages).unwrap();
        }
        for (first, pages) in [(0, 5), (4, 1), (u32::MAX, 1), (1, u32::MAX)] {
            let refused = copy(first, pages).unwrap_err();
            let named = format!("{pages} pages from {first} on");
            assert!(refused.to_string().starts_with(&named), "{refused}");
        }
        let run = PageRun { first: 0, pages: 1 };
        copy_ahead(&memory, &vec![run; AHEAD_MAX]).unwrap();
        let refused = copy_ahead(&memory, &vec![run; AHEAD_MAX + 1]).unwrap_err();
        assert!(matches!(refused, LaunchError::Ahead { .. }), "{refused}");
    }
}
