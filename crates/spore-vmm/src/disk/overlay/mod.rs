//! A disk that is written and a base that stays as it is: the scratch disk of a fork.
//!
//! What is written is in a layer (`layer.rs`), in clusters; others are in the base. A cluster comes
//! into the layer whole: what a first write does not cover is copied from the base.
//!
//! Base and layer are disks, so that a base can be layers that nobody writes any more.

pub mod layer;
pub mod map;
#[cfg(test)]
mod tests;

use std::io;

pub use self::layer::{BaseName, CLUSTER_BYTES, LayerError, layer_bytes};

use self::layer::Layer;
use super::{Access, Disk};

/// The disk.
#[derive(Debug)]
pub struct Overlay<B> {
    base: B,
    layer: Layer,
    /// One cluster, to be made whole; nothing until the first is.
    cluster: Vec<u8>,
}

impl<B: Disk> Overlay<B> {
    /// A layer over its base.
    ///
    /// # Panics
    /// When they are not equally long.
    #[must_use]
    pub fn new(base: B, layer: Layer) -> Self {
        assert_eq!(base.bytes(), layer.bytes(), "a layer of another disk");
        Self {
            base,
            layer,
            cluster: Vec::new(),
        }
    }

    /// Goes on with a new layer, after what was the layer was put into the base by `settle`.
    ///
    /// # Panics
    /// When the new one is of another length.
    pub fn switch(&mut self, layer: Layer, settle: impl FnOnce(&mut B, Layer)) {
        assert_eq!(self.base.bytes(), layer.bytes(), "a layer of another disk");
        let old = std::mem::replace(&mut self.layer, layer);
        settle(&mut self.base, old);
    }

    /// The base, for whoever changes how it is kept and not what it reads as.
    pub const fn base_mut(&mut self) -> &mut B {
        &mut self.base
    }

    /// The layer.
    #[must_use]
    pub const fn layer(&self) -> &Layer {
        &self.layer
    }

    /// Puts a part of a cluster into the layer, with the rest of it where that is not there yet.
    fn write_part(&mut self, at: u64, from: &[u8]) -> io::Result<()> {
        let first = at - at % CLUSTER_BYTES;
        let whole = CLUSTER_BYTES.min(self.bytes() - first);
        if self.layer.map().has(at / CLUSTER_BYTES) || from.len() as u64 == whole {
            return self.layer.write(at, from);
        }
        self.cluster.resize(usize::try_from(whole).unwrap_or(0), 0);
        self.base.read(first, &mut self.cluster)?;
        let skip = usize::try_from(at - first).unwrap_or(usize::MAX);
        let part = self.cluster.iter_mut().skip(skip);
        part.zip(from).for_each(|(to, from)| *to = *from);
        self.layer.write(first, &self.cluster)
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

impl<B: Disk> Disk for Overlay<B> {
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
            let map = self.layer.map();
            let (is_written, count) = together(at, rest.len(), |cluster| map.has(cluster));
            let (part, behind) = rest.split_at_mut(count);
            match is_written {
                true => self.layer.read(at, part)?,
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
        self.layer.flush()
    }
}

/// Where the cluster that `at` is in lies, and how much of `most` bytes lies there with it: it is
/// read together.
pub(super) fn together<P: PartialEq>(at: u64, most: usize, place: impl Fn(u64) -> P) -> (P, usize) {
    let first = place(at / CLUSTER_BYTES);
    let mut count = to_end(at, most);
    while count < most {
        let next = at + count as u64;
        if place(next / CLUSTER_BYTES) != first {
            break;
        }
        count += to_end(next, most - count);
    }
    (first, count)
}

/// How much of `most` bytes is in the cluster that `at` is in.
fn to_end(at: u64, most: usize) -> usize {
    let left = CLUSTER_BYTES - at % CLUSTER_BYTES;
    usize::try_from(left).unwrap_or(usize::MAX).min(most)
}
