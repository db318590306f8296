//! A guest's scratch disk: layers over a base, of which the guest writes the last. While the guest
//! stands still that one can be frozen, and the guest goes on with a new one over it.
//!
//! ```text
//!   base │ layers, lowest first │ own      ──switch──▶      base │ layers, what was own │ own
//! ```
//!
//! What is below what is said by whoever gives the files, and never read from them: a guest may
//! have taken over the process that wrote them.
//!
//! Layers that were own are this disk's alone, and too many of them are made fewer: the two oldest
//! become one ([`Scratch::merge`]). The upper one's clusters are written over the lower one's,
//! which nobody reads there any more while the upper one is over them; so the guest goes on
//! meanwhile, and an end at any point leaves layers that read as before.

use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use zeroize::Zeroizing;

use super::copy::{Content, CopyError, transfer};
use super::locked::{KEY_BYTES, Locked};
use super::overlay::layer::Layer;
use super::overlay::{BaseName, LayerError, Overlay};
use super::stack::{Base, Stack};
use super::zeros::Zeros;
use super::{Access, Disk, Raw};

/// Files are told apart by who names them, so layers need no name of their own.
const NAME: BaseName = [0; 32];

/// From more frozen layers of its own on the disk wants to have them merged. A guest that is
/// captured a few times pays nothing for that.
pub const LAYERS_AT_REST: usize = 8;

/// With so many there is no further one: they are not merged as fast as they come, or not at all.
pub const LAYERS_MAX: usize = 16;

/// Why the disk does not go on with a new layer. It goes on with the one that it has.
#[derive(Debug, thiserror::Error)]
pub enum SwitchError {
    /// The new one is none, or the host failed.
    #[error(transparent)]
    Layer(#[from] LayerError),
    /// It has [`LAYERS_MAX`] of its own.
    #[error("the disk has {LAYERS_MAX} frozen layers of its own, which are not merged yet")]
    Deep(#[source] Option<Arc<CopyError>>),
}

/// A layer's file and what opens it; clones are the same one.
#[derive(Clone)]
pub struct LayerFile {
    file: Raw,
    key: Option<Arc<Zeroizing<[u8; KEY_BYTES]>>>,
}

impl fmt::Debug for LayerFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LayerFile")
            .field("file", &self.file)
            .field("is_locked", &self.key.is_some())
            .finish()
    }
}

impl LayerFile {
    /// Encrypted with a key, or in clear without one.
    #[must_use]
    pub fn new(file: Raw, key: Option<&[u8; KEY_BYTES]>) -> Self {
        let key = key.map(|key| Arc::new(Zeroizing::new(*key)));
        Self { file, key }
    }

    /// A new layer in it, for a disk of so many bytes.
    pub fn create(&self, bytes: u64) -> Result<Layer, LayerError> {
        Layer::create(self.disk(Access::ReadWrite), bytes, &NAME)
    }

    /// The layer that was flushed into it.
    pub fn open(&self, bytes: u64, access: Access) -> Result<Layer, LayerError> {
        Layer::open(self.disk(access), bytes, &NAME)
    }

    fn disk(&self, access: Access) -> Box<dyn Disk> {
        let raw = Box::new(self.file.clone().with(access));
        match &self.key {
            Some(key) => Box::new(Locked::new(raw, key)),
            None => raw,
        }
    }
}

/// What is below what is copied of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Below {
    /// Nothing: the base and all layers are copied.
    Nothing,
    /// All that was frozen when the disk was made: the layers that came since are copied.
    Source,
}

/// Up to where a disk is copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UpTo {
    /// Without the layer that the guest writes.
    Frozen,
    /// With that one too, which is flushed for it. The guest stands still meanwhile.
    Written,
}

/// What is to be copied of a disk, as it was at one instant.
#[derive(Clone, Debug)]
pub struct Source {
    bytes: u64,
    /// `None` is not copied.
    base: Option<Base>,
    /// Lowest first.
    files: Vec<LayerFile>,
}

impl Source {
    /// Whether zeros need not be copied: they are what is below.
    #[must_use]
    pub const fn is_all(&self) -> bool {
        self.base.is_some()
    }

    /// Opens it, by itself: whoever reads it shares nothing with the guest's device.
    pub fn open(&self) -> Result<Stack, LayerError> {
        let open = |file: &LayerFile| file.open(self.bytes, Access::ReadOnly);
        let layers = self.files.iter().map(open).collect::<Result<_, _>>()?;
        let base = self.base.clone().unwrap_or(Base::Zeros(Zeros(self.bytes)));
        Ok(Stack::new(base, layers))
    }
}

/// The files of a disk.
#[derive(Debug)]
struct Files {
    base: Base,
    /// The frozen layers', lowest first, in the order of the stack.
    frozen: Vec<LayerFile>,
    /// How many of them were there at first, and are not this disk's alone.
    given: usize,
    own: LayerFile,
    /// Why its layers could not be merged the last time.
    unmerged: Option<Arc<CopyError>>,
}

impl Files {
    /// How many frozen layers are the disk's alone.
    const fn own_frozen(&self) -> usize {
        self.frozen.len().saturating_sub(self.given)
    }
}

/// The disk, shared between the device in front of it, whoever switches its layer, and whoever
/// copies it.
#[derive(Clone)]
pub struct Scratch {
    bytes: u64,
    /// Taken before the disk, by whoever takes both. Never waits for the guest's reads and writes.
    files: Arc<Mutex<Files>>,
    disk: Arc<Mutex<Overlay<Stack>>>,
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
    pub fn new(base: Base, layers: Vec<LayerFile>, own: LayerFile) -> Result<Self, LayerError> {
        let bytes = base.bytes();
        let open = |file: &LayerFile| file.open(bytes, Access::ReadOnly);
        let opened = layers.iter().map(open).collect::<Result<_, _>>()?;
        let stack = Stack::new(base.clone(), opened);
        let disk = Overlay::new(stack, own.create(bytes)?);
        let files = Files {
            base,
            given: layers.len(),
            frozen: layers,
            own,
            unmerged: None,
        };
        Ok(Self {
            bytes,
            files: Arc::new(Mutex::new(files)),
            disk: Arc::new(Mutex::new(disk)),
        })
    }

    /// Its bytes.
    #[must_use]
    pub const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Goes on with a new layer. What was written is flushed first; after an error everything is as
    /// it was. Called while no request is under way.
    pub fn switch(&self, own: LayerFile) -> Result<(), SwitchError> {
        let mut files = self.files();
        if files.own_frozen() >= LAYERS_MAX {
            return Err(SwitchError::Deep(files.unmerged.clone()));
        }
        let mut disk = self.disk();
        disk.flush().map_err(LayerError::Io)?;
        // All that can fail is before anything has changed.
        let layer = own.create(self.bytes)?;
        disk.switch(layer, Stack::push);
        let frozen = std::mem::replace(&mut files.own, own);
        files.frozen.push(frozen);
        Ok(())
    }

    /// What a copy is made of, as the disk is now.
    pub fn source(&self, below: Below, up_to: UpTo) -> io::Result<Source> {
        let files = self.files();
        let first = match below {
            Below::Nothing => 0,
            Below::Source => files.given,
        };
        let mut copied = files.frozen.get(first..).unwrap_or_default().to_vec();
        if up_to == UpTo::Written {
            self.disk().flush()?;
            copied.push(files.own.clone());
        }
        Ok(Source {
            bytes: self.bytes,
            base: (below == Below::Nothing).then(|| files.base.clone()),
            files: copied,
        })
    }

    /// Whether it has more layers of its own than it should have at rest.
    #[must_use]
    pub fn is_deep(&self) -> bool {
        self.files().own_frozen() > LAYERS_AT_REST
    }

    /// Makes one of the two oldest layers of its own, if it is deep, while the guest goes on.
    ///
    /// Called by one thread, and while nobody reads a [`Source`] that was made before the upper one
    /// was frozen: what is only in the lower one for them is written over. Ended by `is_wanted`
    /// between two clusters, it has done nothing, as after an error.
    pub fn merge(&self, is_wanted: impl Fn() -> bool) -> Result<(), Arc<CopyError>> {
        let (at, lower, upper) = {
            let files = self.files();
            let at = files.given;
            match files.frozen.get(at..at + 2) {
                Some([lower, upper]) if files.own_frozen() > LAYERS_AT_REST => {
                    (at, lower.clone(), upper.clone())
                }
                _ => return Ok(()),
            }
        };
        let merged = self.merged(&lower, &upper, is_wanted).map_err(Arc::new);
        let mut files = self.files();
        files.unmerged = merged.as_ref().err().map(Arc::clone);
        // Frozen layers are only ever added behind these, but by the one thread that is here.
        self.disk().base_mut().merge(at, merged?);
        files.frozen.remove(at + 1);
        Ok(())
    }

    /// The lower layer with the upper one's clusters, on the disk.
    fn merged(
        &self,
        lower: &LayerFile,
        upper: &LayerFile,
        is_wanted: impl Fn() -> bool,
    ) -> Result<Layer, CopyError> {
        let open = |file: &LayerFile, access| file.open(self.bytes, access);
        let mut lower = open(lower, Access::ReadWrite).map_err(CopyError::Open)?;
        let mut upper = open(upper, Access::ReadOnly).map_err(CopyError::Open)?;
        let clusters = upper.map().clone();
        let read = |at, cluster: &mut [u8]| upper.read(at, cluster);
        transfer(&clusters, read, &mut lower, Content::Any, is_wanted)?;
        Ok(lower)
    }

    fn files(&self) -> MutexGuard<'_, Files> {
        // Each change is whole at once.
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn disk(&self) -> MutexGuard<'_, Overlay<Stack>> {
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
        self.disk().read(at, into)
    }

    fn write(&mut self, at: u64, from: &[u8]) -> io::Result<()> {
        self.disk().write(at, from)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.disk().flush()
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;

    use super::{LAYERS_AT_REST, LAYERS_MAX, LayerFile, Scratch, SwitchError};
    use crate::disk::locked::KEY_BYTES;
    use crate::disk::overlay::{LayerError, layer_bytes};
    use crate::disk::stack::Base;
    use crate::disk::tests::file;
    use crate::disk::zeros::Zeros;
    use crate::disk::{Access, Disk, Raw};

    const BYTES: u64 = 3 * 64 * 1024 + 1024;

    const NOTHING: Base = Base::Zeros(Zeros(BYTES));

    /// A layer, and its file once more.
    fn layer(key: Option<u8>) -> (LayerFile, OwnedFd) {
        let (file, again) = file(layer_bytes(BYTES));
        (around(file, key, Access::ReadWrite), again)
    }

    fn around(file: OwnedFd, key: Option<u8>, access: Access) -> LayerFile {
        let raw = Raw::new(file, access).unwrap();
        LayerFile::new(raw, key.map(|key| [key; KEY_BYTES]).as_ref())
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
        let mut disk = Scratch::new(NOTHING, Vec::new(), own).unwrap();
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
            Scratch::new(NOTHING, below.collect(), layer(None).0).unwrap()
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
        let mut disk = Scratch::new(NOTHING, Vec::new(), layer(None).0).unwrap();
        disk.write(512, &[1; 512]).unwrap();
        let short = around(file(4096).0, None, Access::ReadWrite);
        let refused = disk.switch(short).unwrap_err();
        let short = LayerError::Length {
            found: 4096,
            expected: layer_bytes(BYTES),
        };
        assert_eq!(refused.to_string(), short.to_string());
        let (sealed, again) = file(layer_bytes(BYTES));
        rustix::fs::fcntl_add_seals(&again, rustix::fs::SealFlags::WRITE).unwrap();
        let refused = disk.switch(around(sealed, None, Access::ReadWrite));
        assert!(matches!(
            refused,
            Err(SwitchError::Layer(LayerError::Io(_)))
        ));
        disk.write(1024, &[2; 512]).unwrap();
        assert_eq!((read(&mut disk, 512), read(&mut disk, 1024)), (1, 2));
        disk.flush().unwrap();
    }

    #[test]
    fn another_key_opens_no_layer() {
        let (own, file) = layer(Some(1));
        let mut disk = Scratch::new(NOTHING, Vec::new(), own).unwrap();
        disk.flush().unwrap();
        let other = around(file, Some(2), Access::ReadOnly);
        let refused = Scratch::new(NOTHING, vec![other], layer(None).0);
        assert!(matches!(refused, Err(LayerError::Header)));
    }

    #[test]
    fn a_disk_that_is_switched_for_ever_has_few_layers() {
        let given = {
            let (own, file) = layer(None);
            let mut disk = Scratch::new(NOTHING, Vec::new(), own).unwrap();
            disk.write(1024, &[200; 512]).unwrap();
            disk.flush().unwrap();
            around(file, None, Access::ReadOnly)
        };
        let mut disk = Scratch::new(NOTHING, vec![given], layer(Some(1)).0).unwrap();
        for round in 1..=40_u8 {
            let at = u64::from(round % 4) * 64 * 1024;
            disk.write(at, &[round; 512]).unwrap();
            disk.switch(layer((round % 3 != 0).then_some(round)).0)
                .unwrap();
            disk.merge(|| true).unwrap();
            let wanted = |of: u64| {
                let last = (0..=u64::from(round)).rev().find(|round| round % 4 == of);
                u8::try_from(last.unwrap_or(0)).unwrap()
            };
            for of in 0..4 {
                assert_eq!(read(&mut disk, of * 64 * 1024), wanted(of), "{round}");
            }
            assert_eq!(read(&mut disk, 1024), 200);
            let frozen = disk.files().own_frozen();
            assert_eq!(frozen, LAYERS_AT_REST.min(usize::from(round)));
            assert_eq!(disk.disk().base_mut().layers().len(), frozen + 1);
        }
        disk.flush().unwrap();
    }

    #[test]
    fn layers_that_cannot_be_merged_are_kept_until_they_are_too_many() {
        let (own, oldest) = layer(None);
        let mut disk = Scratch::new(NOTHING, Vec::new(), own).unwrap();
        let mut switches = 0_u8;
        let refused = loop {
            disk.write(0, &[switches; 512]).unwrap();
            match disk.switch(layer(None).0) {
                Ok(()) => switches += 1,
                Err(error) => break error,
            }
            if switches == 1 {
                // The guest's own writes are elsewhere from now on.
                rustix::fs::fcntl_add_seals(&oldest, rustix::fs::SealFlags::WRITE).unwrap();
            }
            assert_eq!(disk.is_deep(), usize::from(switches) > LAYERS_AT_REST);
            assert_eq!(disk.merge(|| true).is_err(), disk.is_deep());
        };
        assert_eq!(usize::from(switches), LAYERS_MAX);
        let why = spore_wire::cause::chain(&refused);
        assert!(why.contains("not merged"), "{why}");
        assert!(why.contains("not permitted"), "{why}");
        assert_eq!(read(&mut disk, 0), switches);
        assert!(disk.merge(|| false).is_err());
        assert_eq!(disk.files().own_frozen(), LAYERS_MAX);
    }
}
