//! What keeps the store small: removal, collection, compaction.
//!
//! Called for `spore snapshot rm|gc|compact` and by control's timers, who say what is needed.
//! Always removes what continues another one before that one.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;

use spore_wire::id::{ImageId, SnapshotId};
use spore_wire::snapshot::{SnapshotInfo, SnapshotKind};

use super::header::{DiskBacking, Header, Protection};
use super::key::Keys;
use super::staging::{FrozenLayer, Order, Purpose};
use super::{Filing, Listed, SnapshotStore, StoreError, StorePoint, file, lineage_of, sync_folder};
use crate::image::store::GcMode;

/// What to do with those that continue a snapshot which is to be removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cascade {
    /// Nothing is removed.
    Refuse,
    /// They are removed as well, whosever they are.
    Remove,
}

/// A snapshot to be removed.
#[derive(Clone, Copy, Debug)]
pub struct Removal<'a> {
    /// Whose it is.
    pub account: &'a str,
    /// Which.
    pub id: SnapshotId,
    /// What about its dependents.
    pub cascade: Cascade,
    /// What tags, VMs, claims and suspended apps name.
    pub in_use: &'a BTreeSet<SnapshotId>,
}

impl SnapshotStore {
    /// Removes a snapshot, whole or damaged; all that were removed, in that order.
    ///
    /// # Errors
    /// [`StoreError::Dependents`], [`StoreError::InUse`], [`StoreError::Busy`] and
    /// [`StoreError::Missing`], and nothing was removed; [`StoreError::File`], and some may be.
    pub fn remove(&self, removal: Removal<'_>) -> Result<Vec<SnapshotId>, StoreError> {
        let Removal {
            account,
            id,
            cascade,
            in_use,
        } = removal;
        let filing = self.filing();
        if !self.place(account, id)?.exists() {
            return Err(StoreError::Missing(id));
        }
        let catalogue = self.catalogue()?;
        let lineage = lineage_of(&catalogue);
        let doomed = lineage.descent(id);
        if cascade == Cascade::Refuse && doomed.len() > 1 {
            let children = lineage.children(id);
            return Err(StoreError::Dependents { id, children });
        }
        let busy = |id: &&SnapshotId| filing.is_busy(**id);
        if let Some(busy) = doomed.iter().find(busy) {
            return Err(StoreError::Busy(*busy));
        }
        if let Some(used) = doomed.iter().find(|id| in_use.contains(id)) {
            return Err(StoreError::InUse(*used));
        }
        let gone = self.unlist(&catalogue, &doomed)?;
        drop(filing);
        self.erase(gone)?;
        Ok(doomed)
    }

    /// Removes, or only names, what nothing in `roots` continues and was made before
    /// `made_before_s`: of a younger one, whoever made it may not have said yet what for.
    ///
    /// # Errors
    /// [`StoreError::File`].
    pub fn gc(
        &self,
        roots: &BTreeSet<SnapshotId>,
        made_before_s: u64,
        mode: GcMode,
    ) -> Result<Vec<SnapshotInfo>, StoreError> {
        let filing = self.filing();
        let catalogue = self.catalogue()?;
        let lineage = lineage_of(&catalogue);
        let mut roots = roots.clone();
        for listed in &catalogue {
            if filing.is_busy(listed.id) || self.made_at_s(listed)? >= made_before_s {
                roots.insert(listed.id);
            }
        }
        let garbage = lineage.garbage(&roots);
        let by_id: BTreeMap<_, _> = catalogue.iter().map(|found| (found.id, found)).collect();
        let found = garbage.iter().filter_map(|id| by_id.get(id));
        let told = found.map(|listed| self.describe(listed, &lineage));
        let told = told.collect::<Result<_, _>>()?;
        if mode == GcMode::Remove {
            let gone = self.unlist(&catalogue, &garbage)?;
            drop(filing);
            self.erase(gone)?;
        }
        Ok(told)
    }

    /// When a snapshot was made; of a damaged one, when its folder was last touched.
    fn made_at_s(&self, listed: &Listed) -> Result<u64, StoreError> {
        if let Ok(header) = &listed.header {
            return Ok(header.meta.made_at_s);
        }
        let path = self.place(&listed.account, listed.id)?;
        let found = fs::metadata(&path).map_err(file("look at", &path))?;
        Ok(u64::try_from(found.mtime()).unwrap_or(0))
    }

    /// Takes snapshots out of their places, in this order; where their folders are now.
    fn unlist(
        &self,
        catalogue: &[Listed],
        doomed: &[SnapshotId],
    ) -> Result<Vec<(SnapshotId, PathBuf)>, StoreError> {
        let mut all_gone = Vec::new();
        for id in doomed {
            let Some(listed) = catalogue.iter().find(|listed| listed.id == *id) else {
                continue;
            };
            let owner = self.account_folder(&listed.account)?;
            let place = owner.join(id.to_string());
            let gone = self.staging().join(format!("{id}.removed"));
            fs::rename(&place, &gone).map_err(file("rename", &place))?;
            // On the disk before anything that this one continues goes.
            sync_folder(&owner)?;
            let record = format!("{}/{id}/", listed.account);
            self.inner.verified.forget(&record);
            match fs::remove_dir(&owner) {
                Err(error) if error.kind() != io::ErrorKind::DirectoryNotEmpty => {
                    return Err(file("remove", &owner)(error));
                }
                _ => {}
            }
            all_gone.push((*id, gone));
            self.reached(*id, StorePoint::Unlisted);
        }
        Ok(all_gone)
    }

    /// Removes files while others work on: large ones take their time.
    fn erase(&self, gone: Vec<(SnapshotId, PathBuf)>) -> Result<(), StoreError> {
        for (id, folder) in gone {
            fs::remove_dir_all(&folder).map_err(file("remove", &folder))?;
            self.reached(id, StorePoint::Removed);
        }
        Ok(())
    }

    /// The images that snapshots of any account need, and so must be kept.
    ///
    /// # Errors
    /// [`StoreError::File`].
    pub fn images(&self) -> Result<BTreeSet<ImageId>, StoreError> {
        let _alone = self.filing();
        let catalogue = self.catalogue()?;
        let metas = catalogue
            .iter()
            .filter_map(|listed| listed.header.as_ref().ok());
        let images = metas.flat_map(|header| [Some(header.meta.image), header.meta.folder]);
        Ok(images.flatten().collect())
    }

    /// Makes a snapshot of `account` stand alone, under its own id: its memory becomes one layer,
    /// and the disk layers below become its own as well, for which files are shared and not
    /// copied. Those that continue it notice nothing. Takes memory of the guest's size meanwhile.
    ///
    /// # Errors
    /// As opening and staging; the snapshot is then as it was.
    pub fn compact(
        &self,
        account: &str,
        id: SnapshotId,
        keys: &Keys,
        quota_bytes: u64,
    ) -> Result<Header, StoreError> {
        let opened = self.open_for(account, id)?;
        let header = opened.header().clone();
        // Its claim would not come along.
        if header.meta.kind == SnapshotKind::Suspend {
            return Err(StoreError::InUse(id));
        }
        if header.meta.parent.is_none() {
            return Ok(header);
        }
        let key = match header.protection {
            Protection::Plain => None,
            Protection::Sealed => Some(keys.get(&id).ok_or(StoreError::NoKey(id))?.clone()),
        };
        let memory = opened.memory(keys)?;
        let mut meta = header.meta;
        meta.parent = None;
        let order = Order {
            meta,
            key,
            estimate_bytes: opened.bytes_below(),
            quota_bytes,
        };
        let mut staged = self.stage_for(order, Purpose::Replace)?;
        staged.image(&memory)?;
        drop(memory);
        staged.state(&opened.state_bytes(keys)?[..])?;
        for layer in opened.disks(keys)? {
            if header.protection == Protection::Plain || layer.key.is_some() {
                staged.link_disk(&layer)?;
                continue;
            }
            // It was encrypted whole, for another place, or is readable.
            let layer = FrozenLayer {
                file: &layer.file,
                format: &layer.part.format,
                key: None,
            };
            staged.disk(&layer, DiskBacking::Empty)?;
        }
        staged.seal()
    }
}

impl Filing {
    /// Whether `id`, or one on top of it, is being made.
    pub(super) fn is_busy(&self, id: SnapshotId) -> bool {
        let on_top = self.staged.values().any(|staged| staged.parent == Some(id));
        on_top || self.staged.contains_key(&id)
    }
}
