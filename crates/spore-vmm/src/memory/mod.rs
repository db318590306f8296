//! The guest's memory: one mapping of one file, in at most two places of the guest's map.
//!
//! ```text
//!   Space::reserve ──▶ Space ──fill(file)──▶ GuestMemory
//!                        │ (KVM's slots may point into it from here on)
//! ```
//!
//! Address space is taken first and filled later, so that KVM can be told of it before it is known
//! which guest it will hold. The file is mapped whole and in one piece: whoever looks at this
//! process from outside finds the guest's pages by that mapping.
//!
//! The guest runs while its memory is looked at. So nothing here gives out a reference to it: bytes
//! are copied, numbers are loaded once, and every range is checked against the guest's map.
#![expect(
    unsafe_code,
    reason = "mapping memory, and telling vm-memory where it is"
)]

#[cfg(test)]
mod tests;

use std::ffi::c_void;
use std::fmt;
use std::os::fd::BorrowedFd;
use std::ptr::{self, NonNull};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::mm::{Advice, MapFlags, ProtFlags};
use vm_memory::{
    Bytes as _, GuestAddress, GuestMemoryBackend as _, GuestMemoryMmap, GuestRegionMmap,
    MmapRegion, VolatileSlice,
};

/// Regions and the file's parts begin and end at whole pages.
pub const PAGE_BYTES: u64 = 4096;

/// A place in the guest's physical map.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Gpa(pub u64);

impl Gpa {
    /// The place `bytes` further on, if the map is that large.
    #[must_use]
    pub fn plus(self, bytes: u64) -> Option<Self> {
        self.0.checked_add(bytes).map(Self)
    }
}

impl fmt::Display for Gpa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// A part of the memory's file and where the guest sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Where the guest sees it.
    pub start: Gpa,
    /// Where it is in the file, and in the mapping of it.
    pub offset: u64,
    /// How long it is.
    pub bytes: u64,
}

/// Whether what the guest writes reaches the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// It does: the guest that a snapshot will be made of.
    Shared,
    /// It does not: one of many forks of the same file.
    Private,
}

/// Why a guest has no memory.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    /// The kernel gave no address space.
    #[error("cannot reserve {bytes} bytes of address space")]
    Reserve {
        /// How many were asked for.
        bytes: u64,
        /// What the kernel said.
        #[source]
        source: rustix::io::Errno,
    },
    /// The kernel did not map the file.
    #[error("cannot map {bytes} bytes of the memory's file")]
    File {
        /// How many were asked for.
        bytes: u64,
        /// What the kernel said.
        #[source]
        source: rustix::io::Errno,
    },
    /// The file is not as long as the guest's memory.
    #[error("the memory's file has {found} bytes where the guest has {expected}")]
    Length {
        /// The file's.
        found: u64,
        /// The guest's.
        expected: u64,
    },
    /// There is a guest's memory in this space already.
    #[error("this address space was filled before")]
    Twice,
    /// Sizes that no machine has.
    #[error("a memory of {bytes} bytes in {regions} regions is none that can be mapped")]
    Shape {
        /// Of all regions.
        bytes: u64,
        /// How many there are.
        regions: usize,
    },
}

/// A range that is not, or not wholly, in the guest's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{bytes} bytes at {at} are not in the guest's memory")]
pub struct OutOfMemory {
    /// Where it begins.
    pub at: Gpa,
    /// How long it is.
    pub bytes: u64,
}

/// Address space for a guest's memory, given back when the last who may touch it is gone.
pub struct Space {
    base: NonNull<c_void>,
    bytes: usize,
    filled: AtomicBool,
    /// It may not be ours any more.
    lost: AtomicBool,
}

// SAFETY: a `Space` is a range of addresses that is its own until it is dropped. It lets nobody
// read or write there, and what it does with the range are system calls.
unsafe impl Send for Space {}
// SAFETY: as above; of two threads that fill it one wins, by `filled`.
unsafe impl Sync for Space {}

impl fmt::Debug for Space {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Where it is would help nobody but an attacker who reads a log.
        f.debug_struct("Space")
            .field("bytes", &self.bytes)
            .finish_non_exhaustive()
    }
}

impl Space {
    /// Takes address space that nothing can be read from or written to yet.
    pub fn reserve(bytes: u64) -> Result<Arc<Self>, MapError> {
        let length = usize::try_from(bytes).ok();
        let shape = MapError::Shape { bytes, regions: 0 };
        let length = length.filter(|length| *length > 0 && bytes.is_multiple_of(PAGE_BYTES));
        let length = length.ok_or(shape)?;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a new anonymous mapping at an address that the kernel chooses overlaps nothing.
        let base = unsafe {
            rustix::mm::mmap_anonymous(ptr::null_mut(), length, ProtFlags::empty(), flags)
        };
        let base = base.map_err(|source| MapError::Reserve { bytes, source })?;
        // The kernel maps nothing at null unless it is asked to.
        let base = NonNull::new(base).ok_or(MapError::Reserve {
            bytes,
            source: rustix::io::Errno::NOMEM,
        })?;
        Ok(Arc::new(Self {
            base,
            bytes: length,
            filled: AtomicBool::new(false),
            lost: AtomicBool::new(false),
        }))
    }

    /// How much there is.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes as u64
    }

    /// The address of a part of it for KVM, which looks the pages up when the guest touches them.
    /// `None` when it is not wholly inside.
    #[must_use]
    pub(crate) fn host_address(&self, offset: u64, bytes: u64) -> Option<u64> {
        let end = offset.checked_add(bytes)?;
        let base = self.base.as_ptr().addr() as u64;
        (end <= self.bytes()).then(|| base + offset)
    }

    /// Maps the file over the whole space and shows it as the guest sees it.
    ///
    /// Happens once in a space's life: what is mapped stays until the space goes. After an error
    /// the space is of no use, and a guest whose slots point into it must not run.
    pub fn fill(
        self: &Arc<Self>,
        file: BorrowedFd<'_>,
        sharing: Sharing,
        regions: &[Region],
    ) -> Result<GuestMemory, MapError> {
        let bytes = self.bytes();
        check_regions(regions, bytes)?;
        let found = rustix::fs::fstat(file).map(|stat| stat.st_size.unsigned_abs());
        let found = found.map_err(|source| MapError::File { bytes, source })?;
        if found != bytes {
            // Beyond its end a mapping of a file is a signal that ends this process.
            let expected = bytes;
            return Err(MapError::Length { found, expected });
        }
        if self.filled.swap(true, Ordering::SeqCst) {
            return Err(MapError::Twice);
        }
        let flags = MapFlags::FIXED
            | MapFlags::NORESERVE
            | match sharing {
                Sharing::Shared => MapFlags::SHARED,
                Sharing::Private => MapFlags::PRIVATE,
            };
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the range is this space's own, was mapped by `reserve` and is unmapped by `drop`
        // only; nobody has a reference into it, and nobody else fills it.
        let mapped =
            unsafe { rustix::mm::mmap(self.base.as_ptr(), self.bytes, protection, flags, file, 0) };
        if let Err(source) = mapped {
            // The kernel takes away what was there before it maps, and may fail after that. Then
            // the range is free for whoever maps next, and is not to be unmapped from under them.
            self.lost.store(true, Ordering::SeqCst);
            return Err(MapError::File { bytes, source });
        }
        self.advise(Advice::LinuxDontDump)?;
        if sharing == Sharing::Private {
            // A first write would otherwise copy 2 MiB where 4 KiB were touched.
            self.advise(Advice::LinuxNoHugepage)?;
        }
        GuestMemory::new(Arc::clone(self), regions)
    }

    /// Makes the pages of a part its own, as the first write to each would. What the kernel has no
    /// room for now is left for that.
    pub fn populate(&self, offset: u64, bytes: u64) -> Result<(), OutOfMemory> {
        let at = Gpa(offset);
        let outside = OutOfMemory { at, bytes };
        let from = self.host_address(offset, bytes).ok_or(outside)?;
        let length = usize::try_from(bytes).map_err(|_error| outside)?;
        let from = self
            .base
            .as_ptr()
            .with_addr(usize::try_from(from).map_err(|_error| outside)?);
        // SAFETY: the range is this space's own. What is not mapped for writing is refused, and the
        // rest has the same bytes afterwards, in pages that nobody shares.
        let _populated = unsafe { rustix::mm::madvise(from, length, Advice::LinuxPopulateWrite) };
        Ok(())
    }

    /// Says something of the whole range: of a part, it would become several mappings.
    fn advise(&self, advice: Advice) -> Result<(), MapError> {
        // SAFETY: the range is this space's own, and the two advices that are given change no byte
        // of it.
        let advised = unsafe { rustix::mm::madvise(self.base.as_ptr(), self.bytes, advice) };
        match advised {
            // A kernel without huge pages knows no advice against them.
            Ok(()) | Err(rustix::io::Errno::INVAL) => Ok(()),
            Err(source) => Err(MapError::File {
                bytes: self.bytes(),
                source,
            }),
        }
    }
}

impl Drop for Space {
    fn drop(&mut self) {
        if *self.lost.get_mut() {
            return;
        }
        // SAFETY: the range was mapped by `reserve` and is this space's own. Whoever could still
        // touch it, KVM's slots included, holds the space in an `Arc`.
        let unmapped = unsafe { rustix::mm::munmap(self.base.as_ptr(), self.bytes) };
        debug_assert!(unmapped.is_ok(), "a whole mapping can be unmapped");
    }
}

/// Regions are in the guest's and the file's order, apart from each other, and cover the file.
fn check_regions(regions: &[Region], bytes: u64) -> Result<(), MapError> {
    let shape = || MapError::Shape {
        bytes,
        regions: regions.len(),
    };
    let mut offset = 0_u64;
    let mut start = 0_u64;
    for region in regions {
        let aligned = [region.start.0, region.offset, region.bytes]
            .iter()
            .all(|number| number.is_multiple_of(PAGE_BYTES));
        if !aligned || region.bytes == 0 || region.offset != offset || region.start.0 < start {
            return Err(shape());
        }
        offset = offset.checked_add(region.bytes).ok_or_else(shape)?;
        start = region.start.plus(region.bytes).ok_or_else(shape)?.0;
    }
    if offset == bytes && !regions.is_empty() {
        Ok(())
    } else {
        Err(shape())
    }
}

/// The guest's memory as its devices reach it. Cheap to clone; all clones are the same memory.
#[derive(Clone)]
pub struct GuestMemory {
    inner: GuestMemoryMmap,
    /// Behind everything in `inner`.
    space: Arc<Space>,
}

impl fmt::Debug for GuestMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("GuestMemory").field(&self.space).finish()
    }
}

impl GuestMemory {
    fn new(space: Arc<Space>, regions: &[Region]) -> Result<Self, MapError> {
        let shape = || MapError::Shape {
            bytes: space.bytes(),
            regions: regions.len(),
        };
        let mut mapped = Vec::with_capacity(regions.len());
        for region in regions {
            let bytes = usize::try_from(region.bytes).map_err(|_error| shape())?;
            let offset = usize::try_from(region.offset).map_err(|_error| shape())?;
            let start = space.base.as_ptr().cast::<u8>().wrapping_add(offset);
            let protection = (ProtFlags::READ | ProtFlags::WRITE).bits();
            let protection = i32::try_from(protection).map_err(|_error| shape())?;
            let flags = i32::try_from(MapFlags::NORESERVE.bits()).map_err(|_error| shape())?;
            // SAFETY: `check_regions` has put the region inside of the space, which is mapped for
            // reading and writing and stays so while `self.space` holds it.
            let region_map =
                unsafe { MmapRegion::<()>::build_raw(start, bytes, protection, flags) };
            let region_map = region_map.map_err(|_error| shape())?;
            let region = GuestRegionMmap::new(region_map, GuestAddress(region.start.0));
            mapped.push(region.ok_or_else(shape)?);
        }
        let inner = GuestMemoryMmap::from_regions(mapped).map_err(|_error| shape())?;
        Ok(Self { inner, space })
    }

    /// The address space that this memory is in.
    #[must_use]
    pub fn space(&self) -> &Arc<Space> {
        &self.space
    }

    /// The memory for those who copy into it through vm-memory, which checks each range.
    pub(crate) const fn backend(&self) -> &GuestMemoryMmap {
        &self.inner
    }

    /// Whether a range is wholly in the memory, and in one piece of it.
    pub fn check(&self, at: Gpa, bytes: u64) -> Result<(), OutOfMemory> {
        self.slice(at, bytes).map(drop)
    }

    /// A range for system calls that read into or write from it.
    pub fn slice(&self, at: Gpa, bytes: u64) -> Result<VolatileSlice<'_>, OutOfMemory> {
        let outside = OutOfMemory { at, bytes };
        let count = usize::try_from(bytes).map_err(|_error| outside)?;
        let slice = self.inner.get_slice(GuestAddress(at.0), count);
        slice.map_err(|_error| outside)
    }

    /// Copies out of the guest.
    pub fn read(&self, at: Gpa, into: &mut [u8]) -> Result<(), OutOfMemory> {
        let bytes = into.len() as u64;
        // All or nothing: vm-memory would copy what is inside of a range that is not.
        let slice = self.slice(at, bytes)?;
        let read = slice.read_slice(into, 0);
        read.map_err(|_error| OutOfMemory { at, bytes })
    }

    /// Copies into the guest; nothing when the range is not wholly inside.
    pub fn write(&self, at: Gpa, from: &[u8]) -> Result<(), OutOfMemory> {
        let bytes = from.len() as u64;
        let slice = self.slice(at, bytes)?;
        let written = slice.write_slice(from, 0);
        written.map_err(|_error| OutOfMemory { at, bytes })
    }

    /// Loads a number that the guest stores for us to see, and everything that it wrote before.
    /// Only from where it is aligned.
    pub fn load_u16(&self, at: Gpa) -> Result<u16, OutOfMemory> {
        let loaded = self.inner.load(GuestAddress(at.0), Ordering::Acquire);
        let loaded = loaded.map_err(|_error| OutOfMemory { at, bytes: 2 })?;
        Ok(u16::from_le(loaded))
    }

    /// Stores a number for the guest to see after everything that was written before. Only to where
    /// it is aligned.
    pub fn store_u16(&self, at: Gpa, value: u16) -> Result<(), OutOfMemory> {
        let value = value.to_le();
        let stored = self
            .inner
            .store(value, GuestAddress(at.0), Ordering::Release);
        stored.map_err(|_error| OutOfMemory { at, bytes: 2 })
    }
}
