//! A guest's scratch disk: layers over a base, of which the guest writes the last. While the guest
//! stands still that one can be frozen, and the guest goes on with a new one over it.
//!
//! ```text
//!   base │ layers, lowest first │ own      ──switch──▶      base │ layers, what was own │ own
//! ```
//!
//! What is below what is said by whoever gives the files, and never read from them: a guest may
//! have taken over the process that wrote them.

use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::overlay::{BaseName, LayerError, Overlay};
use super::zeros::Zeros;
use super::{Access, Disk};

/// Files are told apart by who names them, so layers need no name of their own.
const NAME: BaseName = [0; 32];

/// The disk, shared between the device in front of it and whoever switches its layer.
#[derive(Clone)]
pub struct Scratch {
    disk: Arc<Mutex<Box<dyn Disk>>>,
    bytes: u64,
}

impl fmt::Debug for Scratch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Scratch")
            .field("bytes", &self.bytes)
            .finish_non_exhaustive()
    }
}

impl Scratch {
    /// A disk of layers that were written before, lowest first, and a new one.
    pub fn new(
        base: Box<dyn Disk>,
        layers: Vec<Box<dyn Disk>>,
        own: Box<dyn Disk>,
    ) -> Result<Self, LayerError> {
        let bytes = base.bytes();
        let mut below = base;
        for layer in layers {
            below = Box::new(Overlay::open(below, layer, &NAME)?);
        }
        let disk = Overlay::create(below, own, &NAME)?;
        Ok(Self {
            disk: Arc::new(Mutex::new(Box::new(disk))),
            bytes,
        })
    }

    /// Goes on with a new layer. What was written is flushed first; after an error everything is as
    /// it was. Called while no request is under way.
    pub fn switch(&self, own: Box<dyn Disk>) -> Result<(), LayerError> {
        let mut disk = self.lock();
        disk.flush()?;
        let frozen = std::mem::replace(&mut *disk, Box::new(Zeros(self.bytes)));
        // The layer's own part comes first, so that it fails before anything is over it.
        match Overlay::over(frozen, own, &NAME) {
            Ok(over) => {
                *disk = Box::new(over);
                Ok(())
            }
            Err((frozen, error)) => {
                *disk = frozen;
                Err(error)
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Box<dyn Disk>> {
        // A disk that a panic left is as good as one that the host's power left.
        self.disk.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Disk for Scratch {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn access(&self) -> Access {
        Access::ReadWrite
    }

    fn read(&mut self, at: u64, into: &mut [u8]) -> io::Result<()> {
        self.lock().read(at, into)
    }

    fn write(&mut self, at: u64, from: &[u8]) -> io::Result<()> {
        self.lock().write(at, from)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.lock().flush()
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;

    use super::Scratch;
    use crate::disk::locked::{KEY_BYTES, Locked};
    use crate::disk::overlay::{LayerError, layer_bytes};
    use crate::disk::tests::file;
    use crate::disk::zeros::Zeros;
    use crate::disk::{Access, Disk, Raw};

    const BYTES: u64 = 3 * 64 * 1024 + 1024;

    /// A layer, and its file once more.
    fn layer(key: Option<u8>) -> (Box<dyn Disk>, OwnedFd) {
        let (file, again) = file(layer_bytes(BYTES));
        (around(file, key, Access::ReadWrite), again)
    }

    fn around(file: OwnedFd, key: Option<u8>, access: Access) -> Box<dyn Disk> {
        let raw = Box::new(Raw::new(file, access).unwrap());
        match key {
            Some(key) => Box::new(Locked::new(raw, &[key; KEY_BYTES])),
            None => raw,
        }
    }

    fn read(disk: &mut dyn Disk, at: u64) -> u8 {
        let mut sector = [0; 512];
        disk.read(at, &mut sector).unwrap();
        assert!(sector.iter().all(|byte| *byte == sector[0]));
        sector[0]
    }

    #[test]
    fn a_frozen_layer_stays_as_it_was_and_others_begin_over_it() {
        let (own, first) = layer(Some(1));
        let mut disk = Scratch::new(Box::new(Zeros(BYTES)), Vec::new(), own).unwrap();
        disk.write(0, &[1; 512]).unwrap();
        disk.write(BYTES - 512, &[2; 512]).unwrap();
        let (own, second) = layer(Some(2));
        disk.switch(own).unwrap();
        disk.write(0, &[3; 512]).unwrap();
        disk.write(64 * 1024, &[4; 512]).unwrap();
        let seen = |disk: &mut dyn Disk| [0, 512, 64 * 1024, BYTES - 512].map(|at| read(disk, at));
        assert_eq!(seen(&mut disk), [3, 0, 4, 2]);
        disk.flush().unwrap();
        let below = |files: Vec<(OwnedFd, u8)>| {
            let below = files.into_iter();
            let below = below.map(|(file, key)| around(file, Some(key), Access::ReadOnly));
            Scratch::new(Box::new(Zeros(BYTES)), below.collect(), layer(None).0).unwrap()
        };
        let again = || first.try_clone().unwrap();
        assert_eq!(seen(&mut below(vec![(again(), 1)])), [1, 0, 0, 2]);
        assert_eq!(
            seen(&mut below(vec![(again(), 1), (second, 2)])),
            [3, 0, 4, 2]
        );
    }

    #[test]
    fn a_layer_that_cannot_be_leaves_the_disk_as_it_was() {
        let mut disk = Scratch::new(Box::new(Zeros(BYTES)), Vec::new(), layer(None).0).unwrap();
        disk.write(512, &[1; 512]).unwrap();
        let short = around(file(4096).0, None, Access::ReadWrite);
        let refused = disk.switch(short).unwrap_err();
        assert!(matches!(refused, LayerError::Length { .. }), "{refused}");
        let read_only = around(file(layer_bytes(BYTES)).0, None, Access::ReadOnly);
        assert!(matches!(disk.switch(read_only), Err(LayerError::Io(_))));
        disk.write(1024, &[2; 512]).unwrap();
        assert_eq!((read(&mut disk, 512), read(&mut disk, 1024)), (1, 2));
        disk.flush().unwrap();
    }

    #[test]
    fn another_key_opens_no_layer() {
        let (own, file) = layer(Some(1));
        let mut disk = Scratch::new(Box::new(Zeros(BYTES)), Vec::new(), own).unwrap();
        disk.flush().unwrap();
        let other = around(file, Some(2), Access::ReadOnly);
        let refused = Scratch::new(Box::new(Zeros(BYTES)), vec![other], layer(None).0);
        assert!(matches!(refused, Err(LayerError::Header)));
    }
}
