//! Who goes on from a suspended VM's snapshot: one VM, once.
//!
//! Called by the node before it starts a VM from such a snapshot. A claim is a file in the
//! snapshot's folder, which is there whole or not at all and is on the disk before the VM runs: two
//! VMs never go on from one memory, whatever dies meanwhile. Whether a claim still means something
//! is the node's to know, from its journal.

use std::fs;
use std::io;

use spore_wire::id::{SnapshotId, VmId};

use super::{
    CLAIM, Damage, SnapshotStore, StoreError, StorePoint, damaged, file, sync_folder, write_file,
};
use crate::disk::remove_if_there;

impl SnapshotStore {
    /// Makes `vm` the one that goes on from `account`'s snapshot `id`. Once more for the same VM is
    /// nothing to do.
    ///
    /// # Errors
    /// [`StoreError::Claimed`], [`StoreError::Missing`] and [`StoreError::File`].
    pub fn claim(&self, account: &str, id: SnapshotId, vm: VmId) -> Result<(), StoreError> {
        let filing = self.filing();
        if filing.is_busy(id) {
            return Err(StoreError::Busy(id));
        }
        match self.claimed_by(account, id)? {
            Some(by) if by == vm => return Ok(()),
            Some(by) => return Err(StoreError::Claimed { id, by }),
            None => {}
        }
        let place = self.place(account, id)?;
        let beside = self.staging().join(format!("{id}.claim"));
        let path = place.join(CLAIM);
        let claimed = write_file(&beside, vm.to_string().as_bytes()).and_then(|()| {
            self.reached(id, StorePoint::ClaimWritten);
            fs::rename(&beside, &path).map_err(file("write", &path))
        });
        if claimed.is_err() {
            remove_if_there(&beside).map_err(file("remove", &beside))?;
        }
        claimed?;
        sync_folder(&place)?;
        self.reached(id, StorePoint::Claimed);
        Ok(())
    }

    /// The VM that goes on, or went on, from `account`'s snapshot `id`.
    ///
    /// # Errors
    /// [`StoreError::Missing`], [`StoreError::Damaged`] when the claim cannot be read, and
    /// [`StoreError::File`].
    pub fn claimed_by(&self, account: &str, id: SnapshotId) -> Result<Option<VmId>, StoreError> {
        let place = self.place(account, id)?;
        let path = place.join(CLAIM);
        match fs::read_to_string(&path) {
            Ok(text) => {
                let vm = text.parse();
                vm.map(Some).map_err(|_e| damaged(id, Damage::Claim))
            }
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                Err(damaged(id, Damage::Claim))
            }
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(file("read", &path)(error))
            }
            Err(_no_claim) if place.exists() => Ok(None),
            Err(_no_snapshot) => Err(StoreError::Missing(id)),
        }
    }

    /// Gives the claim of `vm` up: it never ran. Somebody else's stays.
    ///
    /// # Errors
    /// As [`SnapshotStore::claimed_by`].
    pub fn give_up_claim(&self, account: &str, id: SnapshotId, vm: VmId) -> Result<(), StoreError> {
        let _alone = self.filing();
        if self.claimed_by(account, id)? != Some(vm) {
            return Ok(());
        }
        let place = self.place(account, id)?;
        let path = place.join(CLAIM);
        fs::remove_file(&path).map_err(file("remove", &path))?;
        sync_folder(&place)
    }
}
