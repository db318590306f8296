//! A guest's whole memory as one file without a name, sealed: what forks map privately.
//!
//! Made by drivers from a VM that is over or paused, and by the snapshot store from files. A sealed
//! image never changes, so any number of VMs share it, whatever one of them does to the descriptor
//! that it is given. Holes are memory that the guest never touched; reading one makes it a page.
//!
//! ```text
//!   MemoryDraft::new ──copy, write──▶ seal ──▶ MemoryImage
//!        └── as one VM's own memory ──its VMM is gone──▶ seal
//! ```

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::sync::{Arc, OnceLock};

use rustix::fs::{
    MemfdFlags, SealFlags, SeekFrom, fcntl_add_seals, fcntl_get_seals, fstat, ftruncate,
    memfd_create, seek,
};
use rustix::io::Errno;
use spore_wire::launch::AHEAD_MAX;
use zeroize::Zeroizing;

use crate::disk::copy_data;

/// The size of a page of x86-64 and of what is compared and copied.
pub const PAGE_BYTES: u64 = 4096;

/// What a sealed file may never do again.
pub(crate) const SEALED: SealFlags = SealFlags::WRITE
    .union(SealFlags::GROW)
    .union(SealFlags::SHRINK)
    .union(SealFlags::SEAL);

/// The most that a fork is given ahead: several times what a guest writes to while it is renewed.
const AHEAD_BYTES_MAX: u64 = 32 << 20;

/// The name of a guest's memory in `/proc/PID/maps`.
pub(super) const MEMFD_NAME: &str = "guest-memory";

/// Why a descriptor is no memory image, or none could be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MemoryImageError {
    /// Somebody could still write to it.
    #[error("the memory image is not sealed against writing: it has the seals {0:#x}")]
    Unsealed(u32),
    /// It is of another size.
    #[error("the memory image has {actual} bytes and not {wanted}")]
    Size {
        /// What it has.
        actual: u64,
        /// What it should have.
        wanted: u64,
    },
    /// The kernel refused.
    #[error("cannot {what} a memory image")]
    Kernel {
        /// What was tried.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

fn refused<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> MemoryImageError {
    move |source| MemoryImageError::Kernel {
        what,
        source: source.into(),
    }
}

impl From<MemoryImageError> for io::Error {
    fn from(error: MemoryImageError) -> Self {
        match error {
            // The kind and number tell callers why.
            MemoryImageError::Kernel { source, .. } => source,
            other => Self::other(other),
        }
    }
}

/// A guest's memory that never changes.
#[derive(Debug)]
pub struct MemoryImage {
    file: File,
    bytes: u64,
    /// What the first fork had written to when it was renewed.
    ahead: OnceLock<Vec<PageRun>>,
}

impl MemoryImage {
    /// An image of `bytes` bytes that somebody has filled and sealed.
    ///
    /// # Errors
    /// [`MemoryImageError`] when it can still change or has another size.
    pub fn from_sealed_memfd(fd: OwnedFd, bytes: u64) -> Result<Self, MemoryImageError> {
        let seals = fcntl_get_seals(&fd).map_err(refused("read the seals of"))?;
        if !seals.contains(SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK) {
            return Err(MemoryImageError::Unsealed(seals.bits()));
        }
        let actual = fstat(&fd).map_err(refused("measure"))?.st_size;
        let actual = u64::try_from(actual).unwrap_or(0);
        if actual != bytes {
            let wanted = bytes;
            return Err(MemoryImageError::Size { actual, wanted });
        }
        let (file, ahead) = (File::from(fd), OnceLock::new());
        Ok(Self { file, bytes, ahead })
    }

    /// The pages that a fork will write to before its programs run, where that is known.
    #[must_use]
    pub fn ahead(&self) -> Option<&[PageRun]> {
        self.ahead.get().map(Vec::as_slice)
    }

    /// Takes note of them; what was noted first stays. Of what is too much, nothing: a fork that
    /// writes so much is no measure for others.
    pub(crate) fn note_ahead(&self, mut runs: Vec<PageRun>) {
        let bytes: u64 = runs.iter().map(|run| run.pages * PAGE_BYTES).sum();
        if runs.len() > AHEAD_MAX || bytes > AHEAD_BYTES_MAX {
            runs.clear();
        }
        // Forks of one memory begin alike: any of them is as good.
        let _first = self.ahead.set(runs);
    }

    /// The file; mapped shared and writable, the kernel refuses it.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// The guest's memory, holes included.
    #[must_use]
    pub const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Of it, what is holes. A fork that touches one makes a page of the image, which stays for
    /// all, and one of its own once it writes: both are charged to it.
    ///
    /// # Errors
    /// [`MemoryImageError::Kernel`].
    pub fn hole_bytes(&self) -> Result<u64, MemoryImageError> {
        let blocks = fstat(&self.file).map_err(refused("measure"))?.st_blocks;
        let data = u64::try_from(blocks).unwrap_or(0).saturating_mul(512);
        Ok(self.bytes.saturating_sub(data))
    }

    /// The file, to read pages from.
    pub(crate) const fn file(&self) -> &File {
        &self.file
    }
}

/// The ranges of a file that are no holes: the rest was never written, or was zero.
#[derive(Debug)]
pub(crate) struct Extents<'a> {
    file: &'a File,
    bytes: u64,
    at: u64,
}

impl<'a> Extents<'a> {
    /// Those of the first `bytes` bytes.
    pub(crate) const fn of(file: &'a File, bytes: u64) -> Self {
        Self { file, bytes, at: 0 }
    }
}

impl Iterator for Extents<'_> {
    /// Where it starts and where it ends.
    type Item = io::Result<(u64, u64)>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.at >= self.bytes {
            return None;
        }
        let start = match seek(self.file, SeekFrom::Data(self.at)) {
            Ok(start) => start,
            // Only a hole is left.
            Err(Errno::NXIO) => return None,
            Err(error) => return Some(Err(error.into())),
        };
        Some(seek(self.file, SeekFrom::Hole(start)).map_or_else(
            |error| Err(error.into()),
            |end| {
                self.at = end;
                Ok((start, end))
            },
        ))
    }
}

/// A guest's memory that may still change.
#[derive(Debug)]
pub struct MemoryDraft {
    file: File,
    bytes: u64,
}

impl MemoryDraft {
    /// Memory of `bytes` bytes, all holes.
    ///
    /// # Errors
    /// [`MemoryImageError::Kernel`].
    pub fn new(bytes: u64) -> Result<Self, MemoryImageError> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let fd = memfd_create(MEMFD_NAME, flags).map_err(refused("make"))?;
        ftruncate(&fd, bytes).map_err(refused("size"))?;
        let file = File::from(fd);
        Ok(Self { file, bytes })
    }

    /// Memory of `bytes` bytes that a VMM had; whether it has that size is seen when it is sealed.
    pub(crate) const fn from_file(file: File, bytes: u64) -> Self {
        Self { file, bytes }
    }

    /// The file, for a VMM whose guest has it for itself.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// The guest's memory, holes included.
    #[must_use]
    pub const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The file, to put layers into.
    pub(crate) const fn file(&self) -> &File {
        &self.file
    }

    /// Takes over everything that is no hole in `from`. Blocks.
    ///
    /// # Errors
    /// [`MemoryImageError::Kernel`].
    pub fn copy(&mut self, from: BorrowedFd<'_>) -> Result<(), MemoryImageError> {
        let from = from.try_clone_to_owned().map_err(refused("open"))?;
        copy_data(&File::from(from), &self.file, self.bytes).map_err(refused("copy"))
    }

    /// Writes whole pages from page `first` on. Blocks.
    ///
    /// # Errors
    /// [`MemoryImageError::Kernel`]; nothing is written behind the end.
    pub fn write(&mut self, first: u64, pages: &[u8]) -> Result<(), MemoryImageError> {
        let failed = refused::<io::Error>("write to");
        let at = first.checked_mul(PAGE_BYTES);
        let end = at.and_then(|at| at.checked_add(u64::try_from(pages.len()).ok()?));
        match (at, end) {
            (Some(at), Some(end)) if end <= self.bytes => {
                self.file.write_all_at(pages, at).map_err(failed)
            }
            _ => Err(failed(io::ErrorKind::InvalidInput.into())),
        }
    }

    /// From now on it never changes. Nobody may have it mapped for writing.
    ///
    /// # Errors
    /// [`MemoryImageError`].
    pub fn seal(self) -> Result<MemoryImage, MemoryImageError> {
        fcntl_add_seals(&self.file, SEALED).map_err(refused("seal"))?;
        MemoryImage::from_sealed_memfd(self.file.into(), self.bytes)
    }
}

/// Some pages beside each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRun {
    /// The number of the first.
    pub first: u64,
    /// How many.
    pub pages: u64,
}

/// Pages that were copied out of a paused guest; they may hold its secrets.
#[derive(Debug, Default)]
pub struct CapturedPages {
    runs: Vec<PageRun>,
    bytes: Zeroizing<Vec<u8>>,
}

impl CapturedPages {
    /// The pages of `runs`, one behind the other in `bytes`.
    pub(crate) const fn new(runs: Vec<PageRun>, bytes: Zeroizing<Vec<u8>>) -> Self {
        Self { runs, bytes }
    }

    /// Each run's first page and its bytes, in the order of the guest's memory.
    pub fn iter(&self) -> impl Iterator<Item = (u64, &[u8])> {
        let mut rest: &[u8] = &self.bytes;
        self.runs.iter().map(move |run| {
            let len = usize::try_from(run.pages * PAGE_BYTES).unwrap_or(usize::MAX);
            let (pages, behind) = rest.split_at(len.min(rest.len()));
            rest = behind;
            (run.first, pages)
        })
    }

    /// Each page's number and its bytes, in the order of the guest's memory.
    pub(crate) fn each(&self) -> impl Iterator<Item = (u64, &[u8])> {
        let page_bytes = usize::try_from(PAGE_BYTES).unwrap_or(usize::MAX);
        self.iter()
            .flat_map(move |(first, bytes)| (first..).zip(bytes.chunks(page_bytes)))
    }

    /// What was copied.
    #[must_use]
    pub fn len_bytes(&self) -> usize {
        self.bytes.len()
    }
}

/// A guest's memory as a capture gives it.
#[derive(Debug)]
pub enum CapturedMemory {
    /// All of it, of a VM that is over.
    Whole(Arc<MemoryImage>),
    /// All of it, where it is: of a VM that stands still until this is on the disk.
    Standing(MemoryDraft),
    /// What a VM that goes on differs in from what it was forked from.
    Changed {
        /// What it was forked from; of a booted VM an image of holes.
        base: Arc<MemoryImage>,
        /// The pages that it has written since.
        pages: CapturedPages,
    },
}

impl CapturedMemory {
    /// One image with all of it. Blocks: a copy of the base, unless the VM is over.
    ///
    /// # Errors
    /// [`MemoryImageError`].
    pub fn merge(self) -> Result<Arc<MemoryImage>, MemoryImageError> {
        let (base, pages) = match self {
            Self::Whole(image) => return Ok(image),
            Self::Standing(memory) => {
                let mut draft = MemoryDraft::new(memory.bytes())?;
                draft.copy(memory.fd())?;
                return Ok(Arc::new(draft.seal()?));
            }
            Self::Changed { base, pages } => (base, pages),
        };
        let mut draft = MemoryDraft::new(base.bytes())?;
        draft.copy(base.fd())?;
        for (first, bytes) in pages.iter() {
            draft.write(first, bytes)?;
        }
        Ok(Arc::new(draft.seal()?))
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::{FileExt as _, MetadataExt as _};
    use std::sync::Arc;

    use zeroize::Zeroizing;

    use super::{
        CapturedMemory, CapturedPages, Extents, MemoryDraft, MemoryImage, MemoryImageError,
        PAGE_BYTES, PageRun,
    };

    const BYTES: u64 = 64 * PAGE_BYTES;

    fn page(byte: u8) -> Vec<u8> {
        vec![byte; usize::try_from(PAGE_BYTES).unwrap()]
    }

    fn file(image: &MemoryImage) -> File {
        File::from(image.fd().try_clone_to_owned().unwrap())
    }

    fn byte(image: &MemoryImage, number: u64) -> u8 {
        let mut byte = [0];
        let at = number * PAGE_BYTES + 17;
        file(image).read_exact_at(&mut byte, at).unwrap();
        byte[0]
    }

    #[test]
    fn a_sealed_image_cannot_be_written_to_by_whoever_holds_it() {
        let mut draft = MemoryDraft::new(BYTES).unwrap();
        draft.write(3, &page(7)).unwrap();
        let image = draft.seal().unwrap();
        assert_eq!(image.hole_bytes().unwrap(), BYTES - PAGE_BYTES);
        assert_eq!((byte(&image, 3), byte(&image, 4)), (7, 0));
        let refused = file(&image).write_all_at(b"x", 0).unwrap_err();
        assert_eq!(refused.kind(), std::io::ErrorKind::PermissionDenied);
        assert!(file(&image).set_len(BYTES * 2).is_err());
        let again = File::options()
            .read(true)
            .write(true)
            .open(format!(
                "/proc/self/fd/{}",
                std::os::fd::AsRawFd::as_raw_fd(&image.fd())
            ))
            .unwrap();
        assert!(again.write_all_at(b"x", 0).is_err());
    }

    #[test]
    fn the_extents_of_an_image_are_what_was_written() {
        let mut draft = MemoryDraft::new(BYTES).unwrap();
        draft.write(1, &page(7)).unwrap();
        draft.write(5, &page(7)).unwrap();
        draft.write(6, &page(7)).unwrap();
        let image = draft.seal().unwrap();
        let extents = Extents::of(image.file(), image.bytes());
        let extents: Vec<_> = extents.map(Result::unwrap).collect();
        let at = |page: u64| page * PAGE_BYTES;
        assert_eq!(extents, [(at(1), at(2)), (at(5), at(7))]);
    }

    #[test]
    fn what_can_change_or_has_another_size_is_no_image() {
        let open = MemoryDraft::new(BYTES).unwrap();
        let fd = open.fd().try_clone_to_owned().unwrap();
        let refused = MemoryImage::from_sealed_memfd(fd, BYTES).unwrap_err();
        assert!(
            matches!(refused, MemoryImageError::Unsealed(_)),
            "{refused}"
        );
        let image = open.seal().unwrap();
        let fd = image.fd().try_clone_to_owned().unwrap();
        let refused = MemoryImage::from_sealed_memfd(fd, BYTES + 1).unwrap_err();
        assert!(
            matches!(refused, MemoryImageError::Size { .. }),
            "{refused}"
        );
    }

    #[test]
    fn pages_behind_the_end_are_refused() {
        let mut draft = MemoryDraft::new(BYTES).unwrap();
        assert!(draft.write(63, &page(1)).is_ok());
        assert!(draft.write(64, &page(1)).is_err());
        assert!(draft.write(u64::MAX, &page(1)).is_err());
    }

    #[test]
    fn a_merged_image_has_the_base_under_the_changes_and_keeps_holes() {
        let mut base = MemoryDraft::new(BYTES).unwrap();
        base.write(1, &page(1)).unwrap();
        base.write(2, &page(2)).unwrap();
        let base = Arc::new(base.seal().unwrap());
        let runs = vec![
            PageRun { first: 2, pages: 2 },
            PageRun {
                first: 40,
                pages: 1,
            },
        ];
        let bytes = [page(9), page(0), page(8)].concat();
        let pages = CapturedPages::new(runs, Zeroizing::new(bytes));
        let merged = CapturedMemory::Changed { base, pages }.merge().unwrap();
        let seen = [0, 1, 2, 3, 40].map(|number| byte(&merged, number));
        assert_eq!(seen, [0, 1, 9, 0, 8]);
        let blocks = file(&merged).metadata().unwrap().blocks();
        assert_eq!(blocks * 512, 4 * PAGE_BYTES, "pages 1, 2, 3 and 40");
    }
}
