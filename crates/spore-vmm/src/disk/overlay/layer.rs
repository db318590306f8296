//! A layer's file: which clusters of a disk are in it, and these clusters.
//!
//! ```text
//!   header 4 KiB │ map, a bit for each cluster │ (to a whole cluster) │ cluster 0, 1, 2, …
//! ```
//!
//! A cluster whose bit is set is in the layer, each at its own place, so that the layer is a file
//! with holes and the map is all there is to remember: 32 KiB for 16 GiB.
//!
//! The order that a loss of power is survived by: clusters, flush, map, flush. So a bit on the
//! disk never stands for a cluster that is not there. Bits are only ever set, and a page of the map
//! that was written in part is a page with fewer of them. What was not flushed may be lost, as on
//! any disk, in whole sectors and each by itself.
//!
//! Nothing here makes files or changes their length.

use std::io;

use super::map::Map;
use crate::disk::{Access, Disk};
use crate::snapshot::format::Fields;

/// What is copied into a layer at once.
pub const CLUSTER_BYTES: u64 = 64 * 1024;

/// The largest disk, whose map has 2 MiB.
pub const DISK_BYTES_MAX: u64 = 1024 * 1024 * 1024 * 1024;

/// The number of this form of a layer.
pub const FORMAT: u32 = 1;

/// What a layer begins with.
const MAGIC: [u8; 4] = *b"SPLY";

pub(super) const HEADER_BYTES: u64 = 4096;
pub(super) const PAGE_BYTES: u64 = 4096;
const SECTOR: usize = 512;

/// Magic, form, cluster, disk, base, before their checksum.
const FIELD_BYTES: usize = 4 + 4 + 8 + 8 + 32;

/// What tells one base from another: the caller's, such as a hash of its content.
pub type BaseName = [u8; 32];

/// Why a layer is none that a disk can be made of.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// The base is too large, or nothing.
    #[error("a disk of {bytes} bytes: 1 to {DISK_BYTES_MAX} are possible")]
    Disk {
        /// The base's.
        bytes: u64,
    },
    /// The layer's file has the wrong length.
    #[error("a layer of {found} bytes where one of {expected} is needed")]
    Length {
        /// The layer's.
        found: u64,
        /// What [`layer_bytes`] says.
        expected: u64,
    },
    /// It does not begin as a layer does, or what it says there was damaged.
    #[error("this is no layer of a disk")]
    Header,
    /// It has another form.
    #[error("a layer of form {found}: this version reads {FORMAT}")]
    Format {
        /// What it says.
        found: u32,
    },
    /// It belongs to another disk.
    #[error("a layer of another base than the one that is given with it")]
    Base,
    /// It has clusters where the disk has none.
    #[error("a layer with clusters behind its disk's end")]
    Map,
    /// The host failed.
    #[error("cannot read or write a layer")]
    Io(#[from] io::Error),
}

/// How long a layer is for a disk of so many bytes: most of it holes, at first.
#[must_use]
pub const fn layer_bytes(disk: u64) -> u64 {
    data_start(disk) + clusters(disk) * CLUSTER_BYTES
}

pub(super) const fn clusters(disk: u64) -> u64 {
    disk.div_ceil(CLUSTER_BYTES)
}

/// The map's bytes in the file, in whole pages.
pub(super) const fn map_bytes(disk: u64) -> u64 {
    clusters(disk).div_ceil(8).next_multiple_of(PAGE_BYTES)
}

/// Where cluster 0 is.
pub(super) const fn data_start(disk: u64) -> u64 {
    (HEADER_BYTES + map_bytes(disk)).next_multiple_of(CLUSTER_BYTES)
}

/// A layer, by itself: what is not in it is somebody else's.
#[derive(Debug)]
pub struct Layer {
    file: Box<dyn Disk>,
    map: Map,
    /// The disk's bytes.
    bytes: u64,
    /// Where cluster 0 is in the file.
    start: u64,
    /// The host has failed to flush. It may have dropped what it could not write and say the next
    /// time that all is well, so nothing is believed any more.
    has_failed: bool,
}

impl Layer {
    /// One in which nothing is, for a disk of so many bytes, in a file that was nothing before: of
    /// [`layer_bytes`] bytes.
    pub fn create(
        mut file: Box<dyn Disk>,
        bytes: u64,
        name: &BaseName,
    ) -> Result<Self, LayerError> {
        check(file.as_ref(), bytes)?;
        let map = Map::new(bytes);
        file.write(HEADER_BYTES, map.bytes())?;
        file.write(0, &header(bytes, name))?;
        Ok(Self::with(file, bytes, map))
    }

    /// One as it was flushed last, or later. It is not to be trusted, since a guest may have taken
    /// over the process that wrote it.
    pub fn open(mut file: Box<dyn Disk>, bytes: u64, name: &BaseName) -> Result<Self, LayerError> {
        check(file.as_ref(), bytes)?;
        let expected = header(bytes, name);
        let mut found = expected.clone();
        file.read(0, &mut found)?;
        check_header(&found, &expected)?;
        let mut map = Map::new(bytes);
        map.read(|bits| file.read(HEADER_BYTES, bits))?;
        if map.is_beyond(clusters(bytes)) {
            return Err(LayerError::Map);
        }
        Ok(Self::with(file, bytes, map))
    }

    const fn with(file: Box<dyn Disk>, bytes: u64, map: Map) -> Self {
        Self {
            file,
            map,
            bytes,
            start: data_start(bytes),
            has_failed: false,
        }
    }

    /// The disk's bytes.
    #[must_use]
    pub const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether its file can be written.
    #[must_use]
    pub fn access(&self) -> Access {
        self.file.access()
    }

    /// Which clusters are in it.
    #[must_use]
    pub const fn map(&self) -> &Map {
        &self.map
    }

    /// Reads a range of the disk, all of whose clusters are in it.
    pub fn read(&mut self, at: u64, into: &mut [u8]) -> io::Result<()> {
        self.file.read(self.start + at, into)
    }

    /// Writes a range of the disk in one cluster, which is in it or is written whole.
    pub fn write(&mut self, at: u64, from: &[u8]) -> io::Result<()> {
        self.file.write(self.start + at, from)?;
        self.map.set(at / CLUSTER_BYTES);
        Ok(())
    }

    /// Returns when all of it is where a loss of power leaves it. After an error, never again.
    pub fn flush(&mut self) -> io::Result<()> {
        if self.access() == Access::ReadOnly {
            return Ok(());
        }
        if self.has_failed {
            return Err(io::Error::other("an earlier flush has failed"));
        }
        let flushed = self.write_map();
        self.has_failed = flushed.is_err();
        flushed
    }

    fn write_map(&mut self) -> io::Result<()> {
        self.file.flush()?;
        if !self.map.is_changed() {
            return Ok(());
        }
        for (offset, page) in self.map.changed_pages() {
            self.file.write(HEADER_BYTES + offset, page)?;
        }
        self.file.flush()?;
        self.map.settle();
        Ok(())
    }
}

/// Whether a file can be a layer of a disk of so many bytes.
fn check(file: &dyn Disk, bytes: u64) -> Result<(), LayerError> {
    if bytes == 0 || bytes > DISK_BYTES_MAX {
        return Err(LayerError::Disk { bytes });
    }
    let (found, expected) = (file.bytes(), layer_bytes(bytes));
    if found != expected {
        return Err(LayerError::Length { found, expected });
    }
    Ok(())
}

pub(super) fn header(bytes: u64, name: &BaseName) -> Vec<u8> {
    let mut header = MAGIC.to_vec();
    header.extend(FORMAT.to_le_bytes());
    header.extend(CLUSTER_BYTES.to_le_bytes());
    header.extend(bytes.to_le_bytes());
    header.extend(name);
    header.extend(crc32fast::hash(&header).to_le_bytes());
    // A whole sector, which is the least that an encrypted layer has.
    header.resize(SECTOR, 0);
    header
}

/// Compares a header with the one that is needed, and says in which way it is another.
fn check_header(found: &[u8], expected: &[u8]) -> Result<(), LayerError> {
    if found == expected {
        return Ok(());
    }
    let mut fields = Fields::new(found);
    let head = fields.clone().take(FIELD_BYTES).unwrap_or_default();
    if fields.array::<4>().ok() != Some(MAGIC) {
        return Err(LayerError::Header);
    }
    match fields.u32() {
        Ok(FORMAT) => {}
        Ok(found) => return Err(LayerError::Format { found }),
        Err(_) => return Err(LayerError::Header),
    }
    let checksum = found.get(FIELD_BYTES..FIELD_BYTES + 4).unwrap_or_default();
    if crc32fast::hash(head).to_le_bytes() == checksum {
        Err(LayerError::Base)
    } else {
        Err(LayerError::Header)
    }
}

/// A layer outlives the release that wrote it.
const _: () = assert!(FORMAT == 1 && CLUSTER_BYTES == 65536 && HEADER_BYTES == 4096);
