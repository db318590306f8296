//! A snapshot that is being made: its parts are given one by one, then it is sealed.
//!
//! Made by [`SnapshotStore::stage`], for a capture and for a compaction. Dropped before it is
//! sealed, nothing is left of it. Whoever captures writes into it on a thread for blocking work.

use std::fs::{self, File};
use std::io::{self, BufWriter, Read};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{DirBuilderExt as _, FileExt as _};
use std::path::{Path, PathBuf};

use data_encoding::{BASE64, HEXLOWER};
use rustix::fs::{AtFlags, CWD, RenameFlags, linkat, renameat_with, statvfs};
use rustix::io::Errno;
use spore_wire::id::SnapshotId;
use spore_wire::snapshot::SnapshotMeta;
use tracing::warn;
use zeroize::Zeroizing;

use super::ground::{Ground, Sieve};
use super::hash::Hash;
use super::header::{
    DISK_LAYERS_MAX, DiskBacking, DiskKeyPart, DiskLayerPart, DiskPart, HEADER_GENERATION, Header,
    MemoryPart, Protection, STATE_BYTES_MAX, StatePart,
};
use super::key::{SnapshotKey, bond};
use super::lineage::DEPTH_MAX;
use super::opened::DiskLayer;
use super::pages::{CHUNK_BYTES, LayerWriter, PAGE_BYTES, WriteError, is_zero};
use super::{
    Filing, HEADER, PAGES, PAGES_INDEX, Reservation, STATE, SnapshotStore, StoreError, StorePoint,
    blocks, disk_index_name, disk_name, file, folder_bytes, is_full, make_folder, new_file,
    sync_folder, write_file,
};
use crate::disk::copy_sparse;
use crate::disk::overlay::DiskKey;
use crate::hypervisor::memory_image::{CapturedPages, Extents, MemoryDraft, MemoryImage};

/// A snapshot to be made.
#[derive(Debug)]
pub struct Order {
    /// What it is of.
    pub meta: SnapshotMeta,
    /// Its own key; `None` leaves it readable.
    pub key: Option<SnapshotKey>,
    /// About how much it will take.
    pub estimate_bytes: u64,
    /// The most that all snapshots of its account may take.
    pub quota_bytes: u64,
}

/// The disk layer that a capture froze.
#[derive(Debug)]
pub struct FrozenLayer<'a> {
    /// Its file, which nobody writes any more.
    pub file: &'a File,
    /// The driver's word for its format.
    pub format: &'a str,
    /// What opens it.
    pub key: Option<&'a DiskKey>,
}

/// Whether a snapshot takes a new place or that of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    New,
    Replace,
}

/// A snapshot that is being made.
#[derive(Debug)]
pub struct Staged {
    store: SnapshotStore,
    meta: SnapshotMeta,
    key: Option<SnapshotKey>,
    quota_bytes: u64,
    purpose: Purpose,
    folder: PathBuf,
    /// Until it is sealed.
    memory: Option<LayerWriter<BufWriter<File>>>,
    /// What it continues, if a whole memory is compared with that.
    ground: Option<Ground>,
    state: Option<StatePart>,
    disk: Option<DiskPart>,
    /// Of what it continues.
    disk_layers_below: usize,
}

impl SnapshotStore {
    /// Begins a snapshot. Until it is sealed or dropped, what it continues cannot be removed.
    ///
    /// # Errors
    /// When what it continues cannot be used, or there is no room.
    pub fn stage(&self, order: Order) -> Result<Staged, StoreError> {
        self.stage_for(order, Purpose::New)
    }

    pub(super) fn stage_for(&self, order: Order, purpose: Purpose) -> Result<Staged, StoreError> {
        let Order {
            meta,
            key,
            estimate_bytes,
            quota_bytes,
        } = order;
        let id = meta.id;
        let mut filing = self.filing();
        self.account_folder(&meta.account)?;
        if filing.staged.contains_key(&id) {
            return Err(StoreError::Busy(id));
        }
        match purpose {
            Purpose::New if self.is_anywhere(id)? => return Err(StoreError::Exists(id)),
            Purpose::Replace if !self.place(&meta.account, id)?.exists() => {
                return Err(StoreError::Missing(id));
            }
            Purpose::New | Purpose::Replace => {}
        }
        let below = self.check_parent(&meta, key.is_some())?;
        self.check_quota(&filing, &meta, estimate_bytes, quota_bytes)?;
        let folder = self.staging().join(id.to_string());
        let room =
            statvfs(self.staging()).map_err(|error| file("look at", &folder)(error.into()))?;
        if room.f_bavail.saturating_mul(room.f_frsize) < estimate_bytes {
            let folder = self.inner.folder.clone();
            return Err(StoreError::DiskFull { folder });
        }
        fs::DirBuilder::new()
            .mode(0o700)
            .create(&folder)
            .map_err(file("make", &folder))?;
        let reservation = Reservation {
            account: meta.account.clone(),
            parent: meta.parent.as_ref().map(|parent| parent.id),
            bytes: estimate_bytes,
        };
        filing.staged.insert(id, reservation);
        drop(filing);
        // From here on, dropping it removes the folder and the reservation.
        let mut staged = Staged {
            store: self.clone(),
            meta,
            key,
            quota_bytes,
            purpose,
            folder,
            memory: None,
            ground: None,
            state: None,
            disk: None,
            disk_layers_below: below,
        };
        let pages = BufWriter::with_capacity(1 << 20, new_file(&staged.folder.join(PAGES))?);
        let memory_bytes = staged.meta.resources.memory_bytes();
        let writer = LayerWriter::new(pages, id, memory_bytes, staged.key.clone());
        staged.memory = Some(writer.map_err(|source| StoreError::Pages { id, source })?);
        self.reached(id, StorePoint::Staged);
        Ok(staged)
    }

    /// Whether a snapshot may be what it says; how many disk layers are below it.
    fn check_parent(&self, meta: &SnapshotMeta, is_sealed: bool) -> Result<usize, StoreError> {
        let id = meta.id;
        if meta.holds_secrets && !is_sealed {
            return Err(StoreError::Unprotected(id));
        }
        let Some(parent) = &meta.parent else {
            return Ok(0);
        };
        // What it may continue is what its account may open: of another account's, not even
        // whether it is there is told.
        let owner = self.owner_of(&meta.account, parent.id)?;
        if owner != parent.account {
            return Err(StoreError::Missing(parent.id));
        }
        let chain = self.lineage(owner, parent.id)?;
        if chain.len() > DEPTH_MAX {
            return Err(StoreError::Depth { parent: parent.id });
        }
        for ancestor in &chain {
            if ancestor.protection == Protection::Sealed && !is_sealed
                || ancestor.meta.holds_secrets && !meta.holds_secrets
            {
                return Err(StoreError::Unprotected(id));
            }
            let (found, expected) = (meta.resources, ancestor.meta.resources);
            if found.memory_mib != expected.memory_mib {
                return Err(StoreError::MemorySize {
                    id,
                    found: found.memory_mib,
                    expected: expected.memory_mib,
                });
            }
        }
        Ok(disk_layers(&chain).len())
    }

    fn check_quota(
        &self,
        filing: &Filing,
        meta: &SnapshotMeta,
        more: u64,
        quota: u64,
    ) -> Result<(), StoreError> {
        let account = &meta.account;
        let others = filing.staged.iter().filter(|(id, _of)| **id != meta.id);
        let others = others.filter(|(_id, of)| of.account == *account);
        let staged: u64 = others.map(|(_id, of)| of.bytes).sum();
        let bytes = self.usage_bytes(account)?;
        let bytes = bytes.saturating_add(staged).saturating_add(more);
        if bytes > quota {
            let account = account.clone();
            return Err(StoreError::Quota {
                account,
                bytes,
                quota,
            });
        }
        Ok(())
    }
}

/// The disk layers of a chain of headers, topmost first: which header, and which of its layers.
pub(super) fn disk_layers(chain: &[Header]) -> Vec<(usize, usize)> {
    let mut layers = Vec::new();
    for (number, header) in chain.iter().enumerate() {
        let Some(disk) = &header.disk else {
            continue;
        };
        layers.extend((0..disk.layers.len()).rev().map(|layer| (number, layer)));
        if disk.backing == DiskBacking::Empty {
            break;
        }
    }
    layers
}

impl Staged {
    /// Which.
    #[must_use]
    pub const fn id(&self) -> SnapshotId {
        self.meta.id
    }

    /// The driver of the VM that it is of.
    #[must_use]
    pub fn driver(&self) -> &str {
        &self.meta.shape.driver
    }

    /// Whose.
    #[must_use]
    pub fn account(&self) -> &str {
        &self.meta.account
    }

    /// Whether it holds only what differs from another one.
    #[must_use]
    pub const fn continues(&self) -> bool {
        self.meta.parent.is_some()
    }

    /// Whether a whole memory may be given.
    #[must_use]
    pub const fn takes_whole(&self) -> bool {
        !self.continues() || self.ground.is_some()
    }

    /// Has a whole memory compared with this, which is what the snapshot continues.
    pub fn compare_with(&mut self, ground: Ground) {
        self.ground = Some(ground);
    }

    /// A page that differs from what the snapshot continues. They ascend.
    ///
    /// # Errors
    /// [`StoreError::Pages`] and [`StoreError::DiskFull`].
    pub fn page(&mut self, page: u64, bytes: &[u8]) -> Result<(), StoreError> {
        let id = self.id();
        let memory = self.memory.as_mut().ok_or(StoreError::Unfinished(id))?;
        let written = memory.page(page, bytes);
        written.map_err(|error| self.pages_error(error))
    }

    fn pages_error(&self, source: WriteError) -> StoreError {
        let id = self.id();
        match source {
            WriteError::Write(error) if is_full(&error) => StoreError::DiskFull {
                folder: self.store.inner.folder.clone(),
            },
            source => StoreError::Pages { id, source },
        }
    }

    /// The whole memory. Of a snapshot that continues another one, what differs from that is kept.
    ///
    /// # Errors
    /// [`StoreError::WholeMemory`] and those of [`Staged::page`].
    pub fn image(&mut self, image: &MemoryImage) -> Result<(), StoreError> {
        self.whole((image.file(), image.bytes()), &CapturedPages::default())
    }

    /// As [`Staged::image`], of a VM that stands still meanwhile.
    ///
    /// # Errors
    /// As [`Staged::image`].
    pub fn standing(&mut self, memory: &MemoryDraft) -> Result<(), StoreError> {
        self.whole((memory.file(), memory.bytes()), &CapturedPages::default())
    }

    /// As [`Staged::image`], of a VM that has changed these pages of one.
    ///
    /// # Errors
    /// As [`Staged::image`].
    pub fn changed(
        &mut self,
        image: &MemoryImage,
        pages: &CapturedPages,
    ) -> Result<(), StoreError> {
        self.whole((image.file(), image.bytes()), pages)
    }

    fn whole(
        &mut self,
        (file, bytes): (&File, u64),
        changed: &CapturedPages,
    ) -> Result<(), StoreError> {
        let id = self.id();
        if !self.takes_whole() {
            return Err(StoreError::WholeMemory(id));
        }
        let failed = |source| StoreError::Memory { id, bytes, source };
        let mut sieve = Sieve::over(self.ground.take().unwrap_or_default());
        let mut differs = |page, bytes: &[u8]| self.page(page, bytes);
        let mut changed = changed.each().peekable();
        each_page(file, bytes, failed, |page, bytes| {
            while let Some((other, changed)) = changed.next_if(|(other, _)| *other <= page) {
                sieve.page(other, changed, &mut differs)?;
                if other == page {
                    return Ok(());
                }
            }
            sieve.page(page, bytes, &mut differs)
        })?;
        changed.try_for_each(|(page, bytes)| sieve.page(page, bytes, &mut differs))?;
        sieve.finish(differs)
    }

    /// The devices as they stood.
    ///
    /// # Errors
    /// [`StoreError::StateSize`] and [`StoreError::File`].
    pub fn state(&mut self, state: impl Read) -> Result<(), StoreError> {
        let id = self.id();
        let path = self.folder.join(STATE);
        let state = super::read(state, STATE_BYTES_MAX).map_err(file("read", &path))?;
        let state = Zeroizing::new(state);
        if state.len() as u64 > STATE_BYTES_MAX {
            return Err(StoreError::StateSize(id));
        }
        let sealed = match &self.key {
            Some(key) => key.seal(&bond("state", id, &[]), &state),
            None => Ok(state.to_vec()),
        };
        let bytes = sealed.map_err(StoreError::Random)?;
        write_file(&path, &bytes)?;
        self.state = Some(StatePart {
            bytes: bytes.len() as u64,
            hash: Hash::of(&bytes),
        });
        self.store.reached(id, StorePoint::StateWritten);
        Ok(())
    }

    /// The next disk layer, above those that were given. What is below the first one is the disk
    /// of what the snapshot continues, or nothing.
    ///
    /// # Errors
    /// [`StoreError::DiskLayers`], [`StoreError::File`] and [`StoreError::DiskFull`].
    pub fn disk(
        &mut self,
        layer: &FrozenLayer<'_>,
        backing: DiskBacking,
    ) -> Result<(), StoreError> {
        let number = self.next_disk_layer(backing)?;
        if let (Some(key), None) = (&self.key, layer.key) {
            let part = self.seal_disk(number, layer, key.of_disk(number))?;
            self.add_disk_layer(backing, part);
            return Ok(());
        }
        let path = self.folder.join(disk_name(number));
        copy_sparse(layer.file, &path).map_err(file("write", &path))?;
        let copy = File::open(&path).map_err(file("open", &path))?;
        copy.sync_all().map_err(file("sync", &path))?;
        let index = blocks::index(&copy).map_err(file("read", &path))?;
        write_file(&self.folder.join(disk_index_name(number)), &index)?;
        let bytes = copy.metadata().map_err(file("look at", &path))?.len();
        let part = DiskLayerPart {
            format: layer.format.to_owned(),
            bytes,
            index: Hash::of(&index),
            key: self.file_key(number, layer.key)?,
        };
        self.add_disk_layer(backing, part);
        Ok(())
    }

    /// Files a layer that is readable, encrypted as memory is.
    fn seal_disk(
        &self,
        number: usize,
        layer: &FrozenLayer<'_>,
        key: SnapshotKey,
    ) -> Result<DiskLayerPart, StoreError> {
        let id = self.id();
        let path = self.folder.join(disk_name(number));
        let bytes = layer.file.metadata().map_err(file("look at", &path))?.len();
        let odd = usize::try_from(bytes % PAGE_BYTES as u64).unwrap_or(0);
        if odd != 0 {
            let source = WriteError::PageBytes(odd);
            return Err(StoreError::Pages { id, source });
        }
        let to = BufWriter::with_capacity(1 << 20, new_file(&path)?);
        let writer = LayerWriter::new(to, id, bytes, Some(key));
        let mut writer = writer.map_err(|error| self.pages_error(error))?;
        each_page(layer.file, bytes, file("read", &path), |page, bytes| {
            let written = writer.page(page, bytes);
            written.map_err(|error| self.pages_error(error))
        })?;
        let (to, _index, index) = writer.finish().map_err(|error| self.pages_error(error))?;
        let to = to.into_inner();
        let to = to.map_err(|error| file("write", &path)(error.into_error()))?;
        to.sync_all().map_err(file("sync", &path))?;
        write_file(&self.folder.join(disk_index_name(number)), &index)?;
        Ok(DiskLayerPart {
            format: layer.format.to_owned(),
            bytes,
            index: Hash::of(&index),
            key: None,
        })
    }

    /// A layer of another snapshot, which is the same file under another name from now on.
    pub(super) fn link_disk(&mut self, layer: &DiskLayer) -> Result<(), StoreError> {
        let number = self.next_disk_layer(DiskBacking::Empty)?;
        for (from, to) in [
            (&layer.file, disk_name(number)),
            (&layer.index, disk_index_name(number)),
        ] {
            let to = self.folder.join(to);
            link_open(from, &to).map_err(file("link", &to))?;
        }
        let part = DiskLayerPart {
            key: self.file_key(number, layer.key.as_ref())?,
            ..layer.part.clone()
        };
        self.add_disk_layer(DiskBacking::Empty, part);
        Ok(())
    }

    fn next_disk_layer(&self, backing: DiskBacking) -> Result<usize, StoreError> {
        let own = self.disk.as_ref().map_or(0, |disk| disk.layers.len());
        let below = match self.disk.as_ref().map_or(backing, |disk| disk.backing) {
            DiskBacking::Empty => 0,
            DiskBacking::Parent => self.disk_layers_below,
        };
        if below + own >= DISK_LAYERS_MAX {
            return Err(StoreError::DiskLayers(self.id()));
        }
        Ok(own)
    }

    fn add_disk_layer(&mut self, backing: DiskBacking, part: DiskLayerPart) {
        let disk = self.disk.get_or_insert_with(|| DiskPart {
            backing,
            layers: Vec::new(),
        });
        disk.layers.push(part);
        self.store.reached(self.meta.id, StorePoint::DiskWritten);
    }

    /// A disk layer's key as the header has it.
    fn file_key(
        &self,
        layer: usize,
        key: Option<&DiskKey>,
    ) -> Result<Option<DiskKeyPart>, StoreError> {
        let Some(disk_key) = key else {
            return Ok(None);
        };
        let part = match &self.key {
            None => DiskKeyPart::Clear(HEXLOWER.encode(disk_key.expose())),
            Some(key) => {
                let sealed = key.seal(&disk_key_bond(self.id(), layer), disk_key.expose());
                DiskKeyPart::Sealed(BASE64.encode(&sealed.map_err(StoreError::Random)?))
            }
        };
        Ok(Some(part))
    }

    /// Gives it its place: from now on it can be opened.
    ///
    /// # Errors
    /// [`StoreError::Unfinished`], [`StoreError::Quota`], [`StoreError::File`] and the like;
    /// nothing is left then.
    pub fn seal(mut self) -> Result<Header, StoreError> {
        let id = self.id();
        let state = self.state.ok_or(StoreError::Unfinished(id))?;
        let memory = self.finish_memory()?;
        self.store.reached(id, StorePoint::MemoryWritten);
        let header = Header {
            generation: HEADER_GENERATION,
            meta: self.meta.clone(),
            protection: match self.key {
                Some(_) => Protection::Sealed,
                None => Protection::Plain,
            },
            memory,
            state,
            disk: self.disk.take(),
        };
        let bytes = header
            .encode()
            .map_err(|source| StoreError::Header { id, source })?;
        write_file(&self.folder.join(HEADER), &bytes)?;
        self.store.reached(id, StorePoint::HeaderWritten);
        sync_folder(&self.folder)?;
        self.store.reached(id, StorePoint::Synced);
        self.file()?;
        Ok(header)
    }

    fn finish_memory(&mut self) -> Result<MemoryPart, StoreError> {
        let id = self.id();
        let writer = self.memory.take().ok_or(StoreError::Unfinished(id))?;
        let (pages, index, bytes) = writer.finish().map_err(|error| self.pages_error(error))?;
        let path = self.folder.join(PAGES);
        let pages = pages
            .into_inner()
            .map_err(|error| file("write", &path)(error.into_error()))?;
        pages.sync_all().map_err(file("sync", &path))?;
        write_file(&self.folder.join(PAGES_INDEX), &bytes)?;
        Ok(MemoryPart {
            bytes: self.meta.resources.memory_bytes(),
            chunks: index.chunks() as u64,
            pages: index.pages(),
            file_bytes: index.file_bytes(),
            index: Hash::of(&bytes),
        })
    }

    /// Moves the folder to its place.
    fn file(&self) -> Result<(), StoreError> {
        let (store, id) = (&self.store, self.id());
        let filing = store.filing();
        let owner = store.account_folder(&self.meta.account)?;
        let place = owner.join(id.to_string());
        // What is replaced is counted among what there is.
        let more = folder_bytes(&self.folder)?.saturating_sub(folder_bytes(&place)?);
        store.check_quota(&filing, &self.meta, more, self.quota_bytes)?;
        if !owner.exists() {
            make_folder(&owner)?;
            sync_folder(&store.inner.folder)?;
        }
        let flags = match self.purpose {
            Purpose::New => RenameFlags::NOREPLACE,
            Purpose::Replace => RenameFlags::EXCHANGE,
        };
        renameat_with(CWD, &self.folder, CWD, &place, flags)
            .map_err(|error| file("rename", &self.folder)(error.into()))?;
        store.reached(id, StorePoint::Renamed);
        for folder in [&owner, &store.staging()] {
            sync_folder(folder)?;
        }
        store.reached(id, StorePoint::Filed);
        drop(filing);
        if self.purpose == Purpose::Replace {
            store
                .inner
                .verified
                .forget(&format!("{}/{id}/", self.meta.account));
            fs::remove_dir_all(&self.folder).map_err(file("remove", &self.folder))?;
            store.reached(id, StorePoint::Replaced);
        }
        Ok(())
    }
}

/// Gives each page of a file that is not zero, in ascending order. Where nothing is below it, a
/// zero page has nothing to hide.
fn each_page(
    from: &File,
    bytes: u64,
    failed: impl Fn(io::Error) -> StoreError,
    mut to: impl FnMut(u64, &[u8]) -> Result<(), StoreError>,
) -> Result<(), StoreError> {
    let mut buffer = Zeroizing::new(vec![0; CHUNK_BYTES]);
    let page_bytes = PAGE_BYTES as u64;
    for extent in Extents::of(from, bytes) {
        let (start, end) = extent.map_err(&failed)?;
        let mut at = start / page_bytes * page_bytes;
        let end = end.next_multiple_of(page_bytes).min(bytes);
        while at < end {
            let length =
                usize::try_from(end - at).map_or(CHUNK_BYTES, |left| left.min(CHUNK_BYTES));
            let run = &mut buffer[..length];
            from.read_exact_at(run, at).map_err(&failed)?;
            for page in run.chunks_exact(PAGE_BYTES) {
                if !is_zero(page) {
                    to(at / page_bytes, page)?;
                }
                at += page_bytes;
            }
        }
    }
    Ok(())
}

/// Gives an open file another name, whatever its old one leads to by now: the folder that it was
/// opened in may have been replaced.
fn link_open(from: &File, to: &Path) -> io::Result<()> {
    let open = format!("/proc/self/fd/{}", from.as_raw_fd());
    match linkat(CWD, open, CWD, to, AtFlags::SYMLINK_FOLLOW) {
        Ok(()) => Ok(()),
        // Its last name is gone, and the kernel gives it no new one.
        Err(Errno::NOENT) => copy_sparse(from, to),
        Err(error) => Err(error.into()),
    }
}

/// What the key of a disk layer is bound to.
pub(super) fn disk_key_bond(id: SnapshotId, layer: usize) -> Vec<u8> {
    bond("disk key", id, &(layer as u64).to_le_bytes())
}

impl Drop for Staged {
    /// Removes what was not sealed. Only then may somebody stage the same again.
    fn drop(&mut self) {
        let mut filing = self.store.filing();
        filing.staged.remove(&self.meta.id);
        match fs::remove_dir_all(&self.folder) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                let path = self.folder.display();
                warn!(%path, %error, "cannot remove an unfinished snapshot: the next start will");
            }
            _ => {}
        }
    }
}
