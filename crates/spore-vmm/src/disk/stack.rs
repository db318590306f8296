//! Layers that nobody writes any more, over a base, as one disk that is only read.

use std::io;
use std::ops::Range;

use super::overlay::layer::Layer;
use super::overlay::together;
use super::zeros::Zeros;
use super::{Access, Disk, Raw};

/// What is below all layers.
#[derive(Clone, Debug)]
pub enum Base {
    /// Nothing.
    Zeros(Zeros),
    /// A file, or a block device.
    File(Raw),
}

impl Base {
    /// The next bytes at or behind a place that may be other than zeros.
    pub fn data(&self, from: u64) -> io::Result<Option<Range<u64>>> {
        match self {
            Self::Zeros(_) => Ok(None),
            Self::File(file) => file.data(from),
        }
    }
}

impl Disk for Base {
    fn bytes(&self) -> u64 {
        match self {
            Self::Zeros(zeros) => zeros.bytes(),
            Self::File(file) => file.bytes(),
        }
    }

    fn access(&self) -> Access {
        Access::ReadOnly
    }

    fn read(&mut self, at: u64, into: &mut [u8]) -> io::Result<()> {
        match self {
            Self::Zeros(zeros) => zeros.read(at, into),
            Self::File(file) => file.read(at, into),
        }
    }

    fn write(&mut self, _at: u64, _from: &[u8]) -> io::Result<()> {
        Err(io::ErrorKind::PermissionDenied.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The disk.
#[derive(Debug)]
pub struct Stack {
    base: Base,
    /// Lowest first.
    layers: Vec<Layer>,
}

impl Stack {
    /// Layers over their base, lowest first.
    ///
    /// # Panics
    /// When they are not equally long.
    #[must_use]
    pub fn new(base: Base, layers: Vec<Layer>) -> Self {
        let mut stack = Self {
            base,
            layers: Vec::new(),
        };
        layers.into_iter().for_each(|layer| stack.push(layer));
        stack
    }

    /// Puts one over all.
    ///
    /// # Panics
    /// When it is of another length.
    pub fn push(&mut self, layer: Layer) {
        assert_eq!(self.base.bytes(), layer.bytes(), "a layer of another disk");
        self.layers.push(layer);
    }

    /// Takes `merged` for the layer of a number and the one over it, from what both of them had.
    pub fn merge(&mut self, number: usize, merged: Layer) {
        let two = number..number.saturating_add(2).min(self.layers.len());
        self.layers.splice(two, [merged]);
    }

    /// What is below the layers.
    #[must_use]
    pub const fn base(&self) -> &Base {
        &self.base
    }

    /// The layers, lowest first.
    #[must_use]
    pub fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// The number of the layer that has a cluster, if one has.
    fn place(&self, cluster: u64) -> Option<usize> {
        let has = |layer: &Layer| layer.map().has(cluster);
        self.layers.iter().rposition(has)
    }
}

impl Disk for Stack {
    fn bytes(&self) -> u64 {
        self.base.bytes()
    }

    fn access(&self) -> Access {
        Access::ReadOnly
    }

    fn read(&mut self, mut at: u64, into: &mut [u8]) -> io::Result<()> {
        let mut rest = into;
        while !rest.is_empty() {
            let (place, count) = together(at, rest.len(), |cluster| self.place(cluster));
            let (part, behind) = rest.split_at_mut(count);
            match place.and_then(|place| self.layers.get_mut(place)) {
                Some(layer) => layer.read(at, part)?,
                None => self.base.read(at, part)?,
            }
            at += part.len() as u64;
            rest = behind;
        }
        Ok(())
    }

    fn write(&mut self, _at: u64, _from: &[u8]) -> io::Result<()> {
        Err(io::ErrorKind::PermissionDenied.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
