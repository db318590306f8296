//! A snapshot that is open: all of its files, and those of what it continues, by descriptor.
//!
//! Made by [`SnapshotStore::open_for`]. Whatever is removed or compacted meanwhile, an open
//! snapshot stays what it was. Nothing of it is handed out that was not compared with its header,
//! at the latest on the way.

use std::fs::File;
use std::io::{self, BufReader, Seek as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;

use data_encoding::{BASE64, HEXLOWER};
use rustix::fs::{MemfdFlags, Mode, OFlags, memfd_create, open};
use spore_wire::id::SnapshotId;
use zeroize::Zeroizing;

use super::blocks::{self, Difference};
use super::ground::Ground;
use super::hash::Hash;
use super::header::{
    DiskKeyPart, DiskLayerPart, Header, HeaderError, Protection, STATE_FILE_BYTES_MAX,
};
use super::key::{Keys, SnapshotKey, bond};
use super::pages::{CHUNK_BYTES, Index, Memory, PAGE_BYTES, ReadError, Trust};
use super::staging::{disk_key_bond, disk_layers};
use super::verified::Stamp;
use super::{
    Damage, PAGES, PAGES_INDEX, STATE, SnapshotStore, StoreError, damaged, disk_index_name,
    disk_name, file, read,
};
use crate::disk::overlay::DiskKey;
use crate::hypervisor::memory_image::{MemoryDraft, MemoryImage, MemoryImageError};

/// The most bytes of an index of memory.
const PAGES_INDEX_BYTES_MAX: u64 = pages_index_bytes_max(super::header::MEMORY_BYTES_MAX);

/// The most bytes of an index of that many: 40 for each chunk.
const fn pages_index_bytes_max(bytes: u64) -> u64 {
    bytes.div_ceil(CHUNK_BYTES as u64) * 40 + 64
}

/// A snapshot that is open.
#[derive(Debug)]
pub struct Opened {
    store: SnapshotStore,
    /// Itself first, then what it continues.
    layers: Vec<Layer>,
}

#[derive(Debug)]
struct Layer {
    header: Header,
    /// Where its files were when they were opened.
    folder: PathBuf,
    pages: File,
    index: File,
    state: File,
    /// File and index of each, lowest first.
    disks: Vec<(File, File)>,
}

/// Reads a file from its start, whatever its position is and whoever reads it too.
struct FromStart<'a> {
    file: &'a File,
    at: u64,
}

impl<'a> FromStart<'a> {
    const fn of(file: &'a File) -> Self {
        Self { file, at: 0 }
    }
}

impl io::Read for FromStart<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.file.read_at(buffer, self.at)?;
        self.at += count as u64;
        Ok(count)
    }
}

/// A disk that pages are put into; what no page says is a hole.
struct Disk(File);

impl Memory for Disk {
    fn write(&mut self, page: u64, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all_at(bytes, page * PAGE_BYTES as u64)
    }

    fn zero(&mut self, _page: u64, _pages: u64) -> io::Result<()> {
        Ok(())
    }
}

/// A disk layer that a VMM may be given.
#[derive(Debug)]
pub struct DiskLayer {
    /// Open to read.
    pub file: File,
    /// What its header says.
    pub part: DiskLayerPart,
    /// What opens it.
    pub key: Option<DiskKey>,
    pub(super) index: File,
}

impl SnapshotStore {
    /// Opens snapshot `id` for `account`, whose own it is or the platform's.
    ///
    /// # Errors
    /// [`StoreError::Missing`], also when it is another account's, and [`StoreError::Damaged`].
    pub fn open_for(&self, account: &str, id: SnapshotId) -> Result<Opened, StoreError> {
        let _alone = self.filing();
        let owner = self.owner_of(account, id)?;
        let chain = self.lineage(owner, id)?;
        let layers = chain.into_iter().map(|header| self.open_layer(header));
        Ok(Opened {
            store: self.clone(),
            layers: layers.collect::<Result<_, _>>()?,
        })
    }

    fn open_layer(&self, header: Header) -> Result<Layer, StoreError> {
        let id = header.meta.id;
        let folder = self.place(&header.meta.account, id)?;
        let open = |name: &str| {
            let path = folder.join(name);
            match File::open(&path) {
                Ok(found) => Ok(found),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    Err(damaged(id, Damage::File(name.to_owned())))
                }
                Err(error) => Err(file("open", &path)(error)),
            }
        };
        let disk_layers = header.disk.as_ref().map_or(0, |disk| disk.layers.len());
        let disks = (0..disk_layers)
            .map(|layer| Ok((open(&disk_name(layer))?, open(&disk_index_name(layer))?)))
            .collect::<Result<_, _>>()?;
        Ok(Layer {
            pages: open(PAGES)?,
            index: open(PAGES_INDEX)?,
            state: open(STATE)?,
            disks,
            header,
            folder,
        })
    }
}

impl Layer {
    const fn id(&self) -> SnapshotId {
        self.header.meta.id
    }

    /// Its key, if it needs one.
    fn key<'a>(&self, keys: &'a Keys) -> Result<Option<&'a SnapshotKey>, StoreError> {
        match self.header.protection {
            // Whoever keeps a key for it knows that it was encrypted.
            Protection::Plain if keys.contains_key(&self.id()) => {
                Err(damaged(self.id(), Damage::Header(HeaderError::Damaged)))
            }
            Protection::Plain => Ok(None),
            Protection::Sealed => {
                let key = keys.get(&self.id());
                key.map(Some).ok_or(StoreError::NoKey(self.id()))
            }
        }
    }

    /// How a file of it is called in the record of whole files.
    fn record_name(&self, name: &str) -> String {
        format!("{}/{}/{name}", self.header.meta.account, self.id())
    }

    fn read(&self, from: &File, name: &str, max: u64) -> Result<Vec<u8>, StoreError> {
        read(FromStart::of(from), max).map_err(file("read", &self.folder.join(name)))
    }

    fn apply(
        &self,
        store: &SnapshotStore,
        keys: &Keys,
        memory: &mut MemoryDraft,
    ) -> Result<(), StoreError> {
        let id = self.id();
        let key = self.key(keys)?;
        let part = &self.header.memory;
        let failed = |error| self.memory_error(error);
        let index = self.memory_index(key)?;
        let name = self.record_name(PAGES);
        let stamp = Stamp::of(&self.pages, part.index);
        let stamp = stamp.map_err(|error| failed(ReadError::Read(error)))?;
        let trust = if store.inner.verified.knows(&name, &stamp) {
            Trust::Checked
        } else {
            Trust::Check
        };
        let pages = BufReader::with_capacity(1 << 20, FromStart::of(&self.pages));
        index.apply(pages, id, key, trust, memory).map_err(failed)?;
        if trust == Trust::Check {
            let clock = &*store.inner.clock;
            store.inner.verified.remember(&name, stamp, clock);
        }
        Ok(())
    }

    /// What it holds of the memory, compared with its header.
    fn memory_index(&self, key: Option<&SnapshotKey>) -> Result<Index, StoreError> {
        let part = &self.header.memory;
        let bytes = self.read(&self.index, PAGES_INDEX, PAGES_INDEX_BYTES_MAX)?;
        let index = match Hash::of(&bytes) == part.index {
            true => Index::decode(&bytes, self.id(), part.bytes, key),
            false => Err(ReadError::Index),
        };
        index.map_err(|error| self.memory_error(error))
    }

    fn memory_error(&self, error: ReadError) -> StoreError {
        let id = self.id();
        match error {
            ReadError::Key => StoreError::WrongKey(id),
            ReadError::NoKey => StoreError::NoKey(id),
            ReadError::Read(error) => file("read", &self.folder.join(PAGES))(error),
            ReadError::Fill(source) => StoreError::Memory {
                id,
                bytes: self.header.memory.bytes,
                source,
            },
            error => damaged(id, Damage::Memory(error)),
        }
    }

    fn disk(
        &self,
        store: &SnapshotStore,
        number: usize,
        keys: &Keys,
    ) -> Result<DiskLayer, StoreError> {
        let id = self.id();
        let (name, index_name) = (disk_name(number), disk_index_name(number));
        let missing = || damaged(id, Damage::File(name.clone()));
        let (disk, index) = self.disks.get(number).ok_or_else(missing)?;
        let parts = self.header.disk.as_ref().map(|disk| &disk.layers);
        let part = parts
            .and_then(|parts| parts.get(number))
            .ok_or_else(missing)?;
        let path = self.folder.join(&name);
        let proof_max = blocks::index_bytes_max(part.bytes).max(pages_index_bytes_max(part.bytes));
        let proof = self.read(index, &index_name, proof_max)?;
        if Hash::of(&proof) != part.index {
            return Err(damaged(id, Damage::DiskIndex(number)));
        }
        if let (Some(key), None) = (self.key(keys)?, &part.key) {
            let key = key.of_disk(number);
            let unsealed = self.unseal_disk(store, disk, part.bytes, &key, &proof);
            let unsealed = unsealed.map_err(|error| match error {
                ReadError::Key | ReadError::NoKey => StoreError::WrongKey(id),
                ReadError::Chunk(chunk) => {
                    let layer = number;
                    damaged(id, Damage::Disk { layer, chunk })
                }
                ReadError::Length => damaged(id, Damage::DiskLength(number)),
                ReadError::Index => damaged(id, Damage::DiskIndex(number)),
                ReadError::Read(error) => file("read", &path)(error),
                ReadError::Fill(error) => file("open", &path)(error),
            });
            return Ok(DiskLayer {
                file: unsealed?,
                index: index.try_clone().map_err(file("open", &path))?,
                part: part.clone(),
                key: None,
            });
        }
        let record = self.record_name(&name);
        let stamp = Stamp::of(disk, part.index).map_err(file("look at", &path))?;
        if !store.inner.verified.knows(&record, &stamp) {
            let now = blocks::index(disk).map_err(file("read", &path))?;
            match blocks::difference(&proof, &now) {
                None => {}
                Some(Difference::Length) => return Err(damaged(id, Damage::DiskLength(number))),
                Some(Difference::Chunk(chunk)) => {
                    let layer = number;
                    return Err(damaged(id, Damage::Disk { layer, chunk }));
                }
            }
            let clock = &*store.inner.clock;
            store.inner.verified.remember(&record, stamp, clock);
        }
        let key = match &part.key {
            Some(key) => Some(self.disk_key(number, key, keys)?),
            None => None,
        };
        Ok(DiskLayer {
            file: disk.try_clone().map_err(file("open", &path))?,
            index: index.try_clone().map_err(file("open", &path))?,
            part: part.clone(),
            key,
        })
    }

    /// A layer that was encrypted as memory is, as it was: in a file without a name.
    fn unseal_disk(
        &self,
        store: &SnapshotStore,
        sealed: &File,
        bytes: u64,
        key: &SnapshotKey,
        index: &[u8],
    ) -> Result<File, ReadError> {
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        let made = open(store.staging(), flags, Mode::from_raw_mode(0o600));
        let mut disk = Disk(File::from(
            made.map_err(|error| ReadError::Fill(error.into()))?,
        ));
        disk.0.set_len(bytes).map_err(ReadError::Fill)?;
        let index = Index::decode(index, self.id(), bytes, Some(key))?;
        let pages = BufReader::with_capacity(1 << 20, FromStart::of(sealed));
        index.apply(pages, self.id(), Some(key), Trust::Check, &mut disk)?;
        Ok(disk.0)
    }

    fn disk_key(
        &self,
        number: usize,
        part: &DiskKeyPart,
        keys: &Keys,
    ) -> Result<DiskKey, StoreError> {
        let id = self.id();
        let bytes = match (part, self.key(keys)?) {
            (DiskKeyPart::Clear(text), None) => {
                HEXLOWER.decode(text.as_bytes()).ok().map(Zeroizing::new)
            }
            (DiskKeyPart::Sealed(text), Some(key)) => {
                let sealed = BASE64.decode(text.as_bytes()).ok();
                let bound = disk_key_bond(id, number);
                let opened = sealed.and_then(|sealed| key.open(&bound, &sealed));
                Some(opened.ok_or(StoreError::WrongKey(id))?)
            }
            (DiskKeyPart::Clear(_) | DiskKeyPart::Sealed(_), _) => None,
        };
        let bytes = bytes.and_then(|bytes| <[u8; 32]>::try_from(bytes.as_slice()).ok());
        let bytes = bytes.ok_or_else(|| damaged(id, Damage::Header(HeaderError::Damaged)))?;
        Ok(DiskKey::from_bytes(bytes))
    }
}

impl Opened {
    fn top(&self) -> &Layer {
        &self.layers[0]
    }

    /// What it is.
    #[must_use]
    pub fn header(&self) -> &Header {
        &self.top().header
    }

    /// How many snapshots it continues.
    #[must_use]
    pub fn depth(&self) -> usize {
        self.layers.len() - 1
    }

    /// Those whose key is needed, itself and what it continues.
    pub fn sealed(&self) -> impl Iterator<Item = SnapshotId> {
        let sealed = |layer: &&Layer| layer.header.protection == Protection::Sealed;
        self.layers.iter().filter(sealed).map(Layer::id)
    }

    /// The whole memory, compared and put together in one pass.
    ///
    /// # Errors
    /// [`StoreError::Damaged`], [`StoreError::NoKey`], [`StoreError::WrongKey`] and the like.
    pub fn memory(&self, keys: &Keys) -> Result<MemoryImage, StoreError> {
        let sealed = self.own_memory(keys)?.seal();
        sealed.map_err(|error| self.no_memory(error))
    }

    /// As [`Opened::memory`], for one VM that writes to it.
    ///
    /// # Errors
    /// As [`Opened::memory`].
    pub fn own_memory(&self, keys: &Keys) -> Result<MemoryDraft, StoreError> {
        let made = MemoryDraft::new(self.header().memory.bytes);
        let mut memory = made.map_err(|error| self.no_memory(error))?;
        for layer in self.layers.iter().rev() {
            layer.apply(&self.store, keys, &mut memory)?;
        }
        Ok(memory)
    }

    /// Its memory, to find out what of another one differs from it.
    ///
    /// # Errors
    /// [`StoreError::Damaged`], and [`StoreError::NoKey`] when it is encrypted or continues one
    /// that is.
    pub fn ground(&self) -> Result<Ground, StoreError> {
        let mut ground = Ground::default();
        for layer in &self.layers {
            let index = layer.memory_index(layer.key(&Keys::new())?)?;
            let pages = layer.pages.try_clone();
            let pages = pages.map_err(file("open", &layer.folder.join(PAGES)))?;
            ground.push(&index, pages);
        }
        Ok(ground)
    }

    fn no_memory(&self, error: MemoryImageError) -> StoreError {
        StoreError::Memory {
            id: self.top().id(),
            bytes: self.header().memory.bytes,
            source: error.into(),
        }
    }

    /// About what its memory would take more if it stood alone: what is below it has.
    pub(super) fn bytes_below(&self) -> u64 {
        let below = self.layers.iter().skip(1);
        below.map(|layer| layer.header.memory.file_bytes).sum()
    }

    /// The device state's bytes.
    pub(super) fn state_bytes(&self, keys: &Keys) -> Result<Zeroizing<Vec<u8>>, StoreError> {
        let layer = self.top();
        let part = &layer.header.state;
        let bytes = layer.read(&layer.state, STATE, STATE_FILE_BYTES_MAX)?;
        if Hash::of(&bytes) != part.hash {
            return Err(damaged(layer.id(), Damage::State));
        }
        let Some(key) = layer.key(keys)? else {
            return Ok(Zeroizing::new(bytes));
        };
        key.open(&bond("state", layer.id(), &[]), &bytes)
            .ok_or(StoreError::WrongKey(layer.id()))
    }

    /// The device state, in a file without a name that is read from its start.
    ///
    /// # Errors
    /// As [`Opened::memory`].
    pub fn state(&self, keys: &Keys) -> Result<OwnedFd, StoreError> {
        let bytes = self.state_bytes(keys)?;
        let made = || -> io::Result<OwnedFd> {
            let mut state = File::from(memfd_create("spore-state", MemfdFlags::CLOEXEC)?);
            state.write_all(&bytes)?;
            state.rewind()?;
            Ok(state.into())
        };
        made().map_err(|source| StoreError::Memory {
            id: self.top().id(),
            bytes: bytes.len() as u64,
            source,
        })
    }

    /// The layers of its disk, lowest first, each compared once per file and boot.
    ///
    /// # Errors
    /// As [`Opened::memory`].
    pub fn disks(&self, keys: &Keys) -> Result<Vec<DiskLayer>, StoreError> {
        let headers: Vec<Header> = self
            .layers
            .iter()
            .map(|layer| layer.header.clone())
            .collect();
        let layers = disk_layers(&headers);
        let open =
            |(header, layer): (usize, usize)| self.layers[header].disk(&self.store, layer, keys);
        layers.into_iter().rev().map(open).collect()
    }
}
