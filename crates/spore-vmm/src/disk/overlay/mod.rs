//! A disk that is written and a base that stays as it is: the scratch disk of a fork.
//!
//! ```text
//!   layer:  header 4 KiB │ map, a bit for each cluster │ (to a whole cluster) │ cluster 0, 1, 2, …
//! ```
//!
//! A cluster whose bit is set is in the layer, each at its own place, so that the layer is a file
//! with holes and the map is all there is to remember: 32 KiB for 16 GiB. Others are in the base. A
//! cluster comes into the layer whole: what a first write does not cover is copied from the base.
//!
//! The order that a loss of power is survived by: clusters, flush, map, flush. So a bit on the
//! disk never stands for a cluster that is not there. Bits are only ever set, and a page of the map
//! that was written in part is a page with fewer of them. What was not flushed may be lost, as on
//! any disk, in whole sectors and each by itself.
//!
//! Base and layer are disks, so that a base can be an overlay that nobody writes any more. Nothing
//! here makes files or changes their length.

#[cfg(test)]
mod tests;

use std::io;

use super::{Access, Disk};
use crate::snapshot::format::Fields;

/// What is copied into a layer at once.
pub const CLUSTER_BYTES: u64 = 64 * 1024;

/// The largest disk, whose map has 2 MiB.
pub const DISK_BYTES_MAX: u64 = 1024 * 1024 * 1024 * 1024;

/// The number of this form of a layer.
pub const FORMAT: u32 = 1;

/// What a layer begins with.
const MAGIC: [u8; 4] = *b"SPLY";

const HEADER_BYTES: u64 = 4096;
const PAGE_BYTES: u64 = 4096;
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

const fn clusters(disk: u64) -> u64 {
    disk.div_ceil(CLUSTER_BYTES)
}

/// The map's bytes in the file, in whole pages.
const fn map_bytes(disk: u64) -> u64 {
    clusters(disk).div_ceil(8).next_multiple_of(PAGE_BYTES)
}

/// Where cluster 0 is.
const fn data_start(disk: u64) -> u64 {
    (HEADER_BYTES + map_bytes(disk)).next_multiple_of(CLUSTER_BYTES)
}

/// The disk.
#[derive(Debug)]
pub struct Overlay {
    base: Box<dyn Disk>,
    layer: Box<dyn Disk>,
    map: Map,
    /// Where cluster 0 is in the layer.
    start: u64,
    /// One cluster, to be made whole.
    cluster: Box<[u8]>,
    /// The host has failed to flush. It may have dropped what it could not write and say the next
    /// time that all is well, so nothing is believed any more.
    has_failed: bool,
}

impl Overlay {
    /// A disk that is its base, with a layer that was nothing before: a file of
    /// [`layer_bytes`] bytes.
    pub fn create(
        base: Box<dyn Disk>,
        layer: Box<dyn Disk>,
        name: &BaseName,
    ) -> Result<Self, LayerError> {
        Self::over(base, layer, name).map_err(|(_base, error)| error)
    }

    /// As [`create`](Self::create), and gives the base back with an error.
    pub fn over(
        base: Box<dyn Disk>,
        mut layer: Box<dyn Disk>,
        name: &BaseName,
    ) -> Result<Self, (Box<dyn Disk>, LayerError)> {
        match begin(base.as_ref(), layer.as_mut(), name) {
            Ok(map) => Ok(Self::around(base, layer, map)),
            Err(error) => Err((base, error)),
        }
    }

    /// A disk as it was flushed last, or later: its layer is not to be trusted, since a guest may
    /// have taken over the process that wrote it.
    pub fn open(
        base: Box<dyn Disk>,
        mut layer: Box<dyn Disk>,
        name: &BaseName,
    ) -> Result<Self, LayerError> {
        let bytes = check(base.as_ref(), layer.as_ref())?;
        let expected = header(bytes, name);
        let mut found = expected.clone();
        layer.read(0, &mut found)?;
        check_header(&found, &expected)?;
        let mut map = Map::new(bytes);
        layer.read(HEADER_BYTES, &mut map.bits)?;
        if map.is_beyond(clusters(bytes)) {
            return Err(LayerError::Map);
        }
        Ok(Self::around(base, layer, map))
    }

    fn around(base: Box<dyn Disk>, layer: Box<dyn Disk>, map: Map) -> Self {
        let cluster = usize::try_from(CLUSTER_BYTES).unwrap_or(0);
        Self {
            start: data_start(base.bytes()),
            base,
            layer,
            map,
            cluster: vec![0; cluster].into(),
            has_failed: false,
        }
    }

    /// How many clusters are in the layer.
    #[must_use]
    pub fn written(&self) -> u64 {
        let ones = self
            .map
            .bits
            .iter()
            .map(|byte| u64::from(byte.count_ones()));
        ones.sum()
    }

    /// Puts a part of a cluster into the layer, with the rest of it where that is not there yet.
    fn write_part(&mut self, at: u64, from: &[u8]) -> io::Result<()> {
        let index = at / CLUSTER_BYTES;
        let first = index * CLUSTER_BYTES;
        let whole = CLUSTER_BYTES.min(self.bytes() - first);
        if self.map.has(index) || from.len() as u64 == whole {
            self.layer.write(self.start + at, from)?;
        } else {
            let whole = usize::try_from(whole).unwrap_or(0);
            let cluster = self.cluster.get_mut(..whole).unwrap_or_default();
            self.base.read(first, cluster)?;
            let skip = usize::try_from(at - first).unwrap_or(usize::MAX);
            let part = cluster.iter_mut().skip(skip);
            part.zip(from).for_each(|(to, from)| *to = *from);
            self.layer.write(self.start + first, cluster)?;
        }
        self.map.set(index);
        Ok(())
    }

    fn write_map(&mut self) -> io::Result<()> {
        self.layer.flush()?;
        if !self.map.is_changed() {
            return Ok(());
        }
        for (offset, page) in self.map.changed_pages() {
            self.layer.write(HEADER_BYTES + offset, page)?;
        }
        self.layer.flush()?;
        self.map.changed.fill(false);
        Ok(())
    }

    fn check_range(&self, at: u64, bytes: usize) -> io::Result<()> {
        let end = at.checked_add(bytes as u64);
        if end.is_some_and(|end| end <= self.bytes()) {
            Ok(())
        } else {
            Err(io::ErrorKind::UnexpectedEof.into())
        }
    }
}

impl Disk for Overlay {
    fn bytes(&self) -> u64 {
        self.base.bytes()
    }

    fn access(&self) -> Access {
        self.layer.access()
    }

    fn read(&mut self, mut at: u64, into: &mut [u8]) -> io::Result<()> {
        self.check_range(at, into.len())?;
        let mut rest = into;
        while !rest.is_empty() {
            let is_written = self.map.has(at / CLUSTER_BYTES);
            let mut count = to_end(at, rest.len());
            // What lies together is read together.
            while count < rest.len() {
                let next = at + count as u64;
                if self.map.has(next / CLUSTER_BYTES) != is_written {
                    break;
                }
                count += to_end(next, rest.len() - count);
            }
            let (part, behind) = rest.split_at_mut(count.min(rest.len()));
            match is_written {
                true => self.layer.read(self.start + at, part)?,
                false => self.base.read(at, part)?,
            }
            at += part.len() as u64;
            rest = behind;
        }
        Ok(())
    }

    fn write(&mut self, mut at: u64, from: &[u8]) -> io::Result<()> {
        self.check_range(at, from.len())?;
        let mut rest = from;
        while !rest.is_empty() {
            let (part, behind) = rest.split_at(to_end(at, rest.len()));
            self.write_part(at, part)?;
            at += part.len() as u64;
            rest = behind;
        }
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
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
}

/// How much of `most` bytes is in the cluster that `at` is in.
fn to_end(at: u64, most: usize) -> usize {
    let left = CLUSTER_BYTES - at % CLUSTER_BYTES;
    usize::try_from(left).unwrap_or(usize::MAX).min(most)
}

/// Writes a layer in which nothing is.
fn begin(base: &dyn Disk, layer: &mut dyn Disk, name: &BaseName) -> Result<Map, LayerError> {
    let bytes = check(base, layer)?;
    let map = Map::new(bytes);
    layer.write(HEADER_BYTES, &map.bits)?;
    layer.write(0, &header(bytes, name))?;
    Ok(map)
}

/// The disk's bytes, if base and layer go together.
fn check(base: &dyn Disk, layer: &dyn Disk) -> Result<u64, LayerError> {
    let bytes = base.bytes();
    if bytes == 0 || bytes > DISK_BYTES_MAX {
        return Err(LayerError::Disk { bytes });
    }
    let (found, expected) = (layer.bytes(), layer_bytes(bytes));
    if found != expected {
        return Err(LayerError::Length { found, expected });
    }
    Ok(bytes)
}

fn header(bytes: u64, name: &BaseName) -> Vec<u8> {
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

/// Which clusters are in the layer.
#[derive(Debug)]
struct Map {
    /// A bit for each cluster, the lowest first, in whole pages.
    bits: Vec<u8>,
    /// Pages that are not on the disk as they are here.
    changed: Vec<bool>,
}

impl Map {
    /// That of a layer with none, for a disk of so many bytes.
    fn new(disk: u64) -> Self {
        let bytes = map_bytes(disk);
        let count = |bytes| usize::try_from(bytes).unwrap_or(usize::MAX);
        Self {
            bits: vec![0; count(bytes)],
            changed: vec![false; count(bytes / PAGE_BYTES)],
        }
    }

    fn has(&self, cluster: u64) -> bool {
        let byte = usize::try_from(cluster / 8).ok();
        let byte = byte.and_then(|byte| self.bits.get(byte));
        byte.is_some_and(|byte| byte & (1 << (cluster % 8)) != 0)
    }

    fn set(&mut self, cluster: u64) {
        let Ok(at) = usize::try_from(cluster / 8) else {
            return;
        };
        let bit = 1 << (cluster % 8);
        if let Some(byte) = self.bits.get_mut(at)
            && *byte & bit == 0
        {
            *byte |= bit;
            let page = usize::try_from(cluster / 8 / PAGE_BYTES);
            if let Some(changed) = page.ok().and_then(|page| self.changed.get_mut(page)) {
                *changed = true;
            }
        }
    }

    /// Whether it has clusters from `count` on.
    fn is_beyond(&self, count: u64) -> bool {
        let bits = self.bits.len() as u64 * 8;
        (count..bits).any(|cluster| self.has(cluster))
    }

    fn is_changed(&self) -> bool {
        self.changed.contains(&true)
    }

    /// Pages to be written, and where in the map they are.
    fn changed_pages(&self) -> impl Iterator<Item = (u64, &[u8])> {
        let page = usize::try_from(PAGE_BYTES).unwrap_or(1);
        let pages = self.bits.chunks(page).zip(&self.changed);
        (0..)
            .map(|number| number * PAGE_BYTES)
            .zip(pages)
            .filter_map(|(offset, (page, changed))| changed.then_some((offset, page)))
    }
}

/// A layer outlives the release that wrote it.
const _: () = assert!(FORMAT == 1 && CLUSTER_BYTES == 65536 && HEADER_BYTES == 4096);
