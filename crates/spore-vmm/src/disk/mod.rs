//! What is behind a block device: bytes at offsets, in a descriptor that came in open.
//!
//! Called by `device/virtio/blk`, which has checked every range against [`Disk::bytes`]. All of it
//! waits for the host's disk, so whoever calls is no thread that a guest's processor waits for.

pub mod copies;
pub mod copy;
pub mod locked;
pub mod overlay;
pub mod scratch;
pub mod stack;
pub mod zeros;

use std::fmt;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::{FileType, OFlags, SeekFrom};
use rustix::io::Errno;

/// The least piece of a disk that is read or written, as in virtio (1.2, section 5.2.6).
pub const SECTOR_BYTES: u64 = 512;

/// Bytes at offsets.
pub trait Disk: Send + fmt::Debug {
    /// How many there are: whole sectors, and the same for ever.
    fn bytes(&self) -> u64;

    /// Whether they can be written.
    fn access(&self) -> Access;

    /// Reads all of a range. An error is the host's, and what was read by then means nothing.
    fn read(&mut self, at: u64, into: &mut [u8]) -> io::Result<()>;

    /// Writes all of a range; after an error, any part of it.
    fn write(&mut self, at: u64, from: &[u8]) -> io::Result<()>;

    /// Returns when all that was written before is where a loss of power leaves it.
    fn flush(&mut self) -> io::Result<()>;
}

/// Whether a guest may write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// It may not, whatever the descriptor allows.
    ReadOnly,
    /// It may.
    ReadWrite,
}

/// A file or a block device as it is; clones are the same one.
#[derive(Clone, Debug)]
pub struct Raw {
    file: Arc<OwnedFd>,
    access: Access,
    bytes: u64,
    /// A file has a length that can change, and a write behind its end makes it longer.
    is_file: bool,
}

impl Raw {
    /// All of a file's whole sectors.
    pub fn new(file: OwnedFd, access: Access) -> io::Result<Self> {
        if rustix::fs::fcntl_getfl(&file)?.contains(OFlags::APPEND) {
            // Every write would go to the end, wherever it is for.
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let kind = FileType::from_raw_mode(rustix::fs::fstat(&file)?.st_mode);
        // A block device's status has no length; its end can be looked for.
        let end = rustix::fs::seek(&file, SeekFrom::End(0))?;
        Ok(Self {
            file: Arc::new(file),
            access,
            bytes: end - end % SECTOR_BYTES,
            is_file: kind == FileType::RegularFile,
        })
    }

    /// The same with another access.
    #[must_use]
    pub fn with(self, access: Access) -> Self {
        Self { access, ..self }
    }

    /// The next bytes at or behind a place that are no hole; all of the rest where nobody knows
    /// of holes.
    pub fn data(&self, from: u64) -> io::Result<Option<Range<u64>>> {
        // Where the descriptor stands means nothing here: all is read and written at a place.
        let seek = |to| rustix::fs::seek(&self.file, to);
        let start = match seek(SeekFrom::Data(from)) {
            Ok(start) => start,
            Err(Errno::NXIO) if seek(SeekFrom::End(0))? < self.bytes => {
                // What was cut off is no hole.
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            Err(Errno::NXIO) => return Ok(None),
            Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok(rest(from, self.bytes)),
            Err(error) => return Err(error.into()),
        };
        let end = seek(SeekFrom::Hole(start))?.min(self.bytes);
        Ok((start < end).then_some(start..end))
    }
}

impl Disk for Raw {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn access(&self) -> Access {
        self.access
    }

    fn read(&mut self, at: u64, into: &mut [u8]) -> io::Result<()> {
        read_at(&self.file, at, into)
    }

    fn write(&mut self, at: u64, from: &[u8]) -> io::Result<()> {
        if self.access == Access::ReadOnly {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        if self.is_file {
            // A file that somebody has shortened stays as it is.
            let end = rustix::fs::fstat(&self.file)?.st_size.unsigned_abs();
            if at.saturating_add(from.len() as u64) > end {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        write_at(&self.file, at, from)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(rustix::fs::fdatasync(&self.file)?)
    }
}

fn rest(from: u64, end: u64) -> Option<Range<u64>> {
    (from < end).then_some(from..end)
}

/// Reads all of a range of a file; its end comes too early.
pub(crate) fn read_at(file: &OwnedFd, mut at: u64, mut into: &mut [u8]) -> io::Result<()> {
    while !into.is_empty() {
        match rustix::io::pread(file, &mut *into, at) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => {
                into = into.get_mut(count..).unwrap_or_default();
                at += count as u64;
            }
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Writes all of a range of a file.
fn write_at(file: &OwnedFd, mut at: u64, mut from: &[u8]) -> io::Result<()> {
    while !from.is_empty() {
        match rustix::io::pwrite(file, from, at) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => {
                from = from.get(count..).unwrap_or_default();
                at += count as u64;
            }
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests {
    use std::io;
    use std::os::fd::OwnedFd;

    use rustix::fs::{MemfdFlags, OFlags};

    use super::{Access, Disk as _, Raw};

    /// A file of so many bytes in memory, and the same once more.
    pub(crate) fn file(bytes: u64) -> (OwnedFd, OwnedFd) {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = rustix::fs::memfd_create("disk", flags).unwrap();
        rustix::fs::ftruncate(&file, bytes).unwrap();
        let again = file.try_clone().unwrap();
        (file, again)
    }

    #[test]
    fn a_file_is_its_whole_sectors() {
        let mut raw = Raw::new(file(1500).0, Access::ReadWrite).unwrap();
        assert_eq!(raw.bytes(), 1024);
        raw.write(600, b"here").unwrap();
        let mut read = [0xee; 6];
        raw.read(599, &mut read).unwrap();
        assert_eq!(&read, b"\0here\0");
        raw.flush().unwrap();
        assert!(
            Raw::new(
                std::os::unix::net::UnixStream::pair().unwrap().0.into(),
                Access::ReadOnly
            )
            .is_err()
        );
    }

    #[test]
    fn holes_of_a_file_are_skipped() {
        let (holes, other) = file(1024 * 1024);
        rustix::io::pwrite(&other, &[1; 4096], 128 * 1024).unwrap();
        let raw = Raw::new(holes, Access::ReadOnly).unwrap();
        let data = raw.data(0).unwrap().unwrap();
        assert_eq!(data, 128 * 1024..132 * 1024);
        assert_eq!(raw.data(data.end).unwrap(), None);
        assert_eq!(raw.data(1024 * 1024).unwrap(), None);
        rustix::fs::ftruncate(&other, 4096).unwrap();
        let early = raw.data(0).unwrap_err().kind();
        assert_eq!(early, io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn a_file_that_is_only_appended_to_is_no_disk() {
        let (file, _other) = file(512);
        rustix::fs::fcntl_setfl(&file, OFlags::RDWR | OFlags::APPEND).unwrap();
        let error = Raw::new(file, Access::ReadWrite).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn a_file_that_was_shortened_is_not_made_longer_again() {
        let (file, other) = file(2048);
        let mut raw = Raw::new(file, Access::ReadWrite).unwrap();
        rustix::fs::ftruncate(&other, 600).unwrap();
        let early = io::ErrorKind::UnexpectedEof;
        assert_eq!(raw.read(512, &mut [0; 512]).unwrap_err().kind(), early);
        assert_eq!(raw.write(512, &[0; 512]).unwrap_err().kind(), early);
        raw.write(0, &[1; 512]).unwrap();
        assert_eq!(raw.bytes(), 2048);
        assert_eq!(rustix::fs::fstat(&other).unwrap().st_size, 600);
    }

    #[test]
    fn what_is_read_only_is_not_written_whatever_the_descriptor_allows() {
        let mut raw = Raw::new(file(512).0, Access::ReadOnly).unwrap();
        assert!(raw.write(0, &[1; 512]).is_err());
        let mut read = [0xee];
        raw.read(0, &mut read).unwrap();
        assert_eq!(read, [0]);
    }
}
