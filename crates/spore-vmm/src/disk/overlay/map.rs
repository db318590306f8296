//! Which clusters of a disk are in a layer, in the form in which the layer's file has them.

use std::io;

use super::layer::{PAGE_BYTES, map_bytes};

/// A bit for each cluster.
#[derive(Clone, Debug)]
pub struct Map {
    /// A bit for each cluster, the lowest first, in whole pages.
    bits: Vec<u8>,
    /// Pages that are not on the disk as they are here.
    changed: Vec<bool>,
}

impl Map {
    /// That of a layer with none, for a disk of so many bytes.
    #[must_use]
    pub fn new(disk: u64) -> Self {
        let bytes = map_bytes(disk);
        let count = |bytes| usize::try_from(bytes).unwrap_or(usize::MAX);
        Self {
            bits: vec![0; count(bytes)],
            changed: vec![false; count(bytes / PAGE_BYTES)],
        }
    }

    /// Whether a cluster is in the layer.
    #[must_use]
    pub fn has(&self, cluster: u64) -> bool {
        let byte = usize::try_from(cluster / 8).ok();
        let byte = byte.and_then(|byte| self.bits.get(byte));
        byte.is_some_and(|byte| byte & (1 << (cluster % 8)) != 0)
    }

    /// Says that it is.
    pub fn set(&mut self, cluster: u64) {
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
    pub(super) fn is_beyond(&self, count: u64) -> bool {
        let bits = self.bits.len() as u64 * 8;
        (count..bits).any(|cluster| self.has(cluster))
    }

    pub(super) fn is_changed(&self) -> bool {
        self.changed.contains(&true)
    }

    /// Pages that are not on the disk as they are here, and where in the map they are.
    pub(super) fn changed_pages(&self) -> impl Iterator<Item = (u64, &[u8])> {
        let page = usize::try_from(PAGE_BYTES).unwrap_or(1);
        let pages = self.bits.chunks(page).zip(&self.changed);
        (0..)
            .map(|number| number * PAGE_BYTES)
            .zip(pages)
            .filter_map(|(offset, (page, changed))| changed.then_some((offset, page)))
    }

    /// All pages are on the disk as they are here.
    pub(super) fn settle(&mut self) {
        self.changed.fill(false);
    }

    /// The form on the disk.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bits
    }

    /// Takes it from the disk.
    pub(super) fn read(
        &mut self,
        read: impl FnOnce(&mut [u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        read(&mut self.bits)
    }

    /// Says of each cluster of another layer of the disk that it is in this one.
    pub fn add(&mut self, other: &Self) {
        let mut next = 0;
        while let Some(cluster) = other.next(next) {
            self.set(cluster);
            next = cluster + 1;
        }
    }

    /// The first cluster in the layer, from `from` on.
    #[must_use]
    pub fn next(&self, from: u64) -> Option<u64> {
        let first = usize::try_from(from / 8).ok()?;
        let bytes = (from / 8..).zip(self.bits.get(first..)?);
        let some = bytes.filter(|(_at, byte)| **byte != 0);
        let mut ones = some.flat_map(|(at, byte)| {
            let bits = (0..8).filter(move |bit| byte & (1 << bit) != 0);
            bits.map(move |bit| at * 8 + bit)
        });
        ones.find(|cluster| *cluster >= from)
    }
}
