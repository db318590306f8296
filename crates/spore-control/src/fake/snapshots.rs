//! The snapshots of the scripted node: in memory, with the rules of the real ones.

use core::time::Duration;
use std::collections::{BTreeMap, BTreeSet};

use spore_wire::id::SnapshotId;
use spore_wire::node::{Owner, Source, StartVm};
use spore_wire::secret::SecretBytes;
use spore_wire::snapshot::{Shape, SnapshotInfo, SnapshotKind, SnapshotMeta, SnapshotParent};

use crate::nodes::{
    CollectMode, Dependents, NodesError, Removal, SnapshotKeys, TakeSnapshot, TakenSnapshot,
};

/// Snapshots, and what each is encrypted with.
#[derive(Default)]
pub(crate) struct Shelf {
    all: BTreeMap<SnapshotId, (SnapshotInfo, Option<SecretBytes>)>,
    served: Option<(SnapshotInfo, Option<SecretBytes>)>,
    /// What is told instead of a pause.
    pub(crate) refuses: Option<NodesError>,
}

impl Shelf {
    pub(crate) fn ids(&self) -> Vec<SnapshotId> {
        self.all.keys().copied().collect()
    }

    pub(super) fn of(&self, account: &str) -> Vec<SnapshotInfo> {
        let all = self.all.values().map(|(info, _)| self.told(info));
        all.filter(|info| info.account == account).collect()
    }

    pub(super) fn info(&self, account: &str, id: SnapshotId) -> Result<SnapshotInfo, NodesError> {
        let found = self.all.get(&id).map(|(info, _)| self.told(info));
        let found = found.filter(|info| info.account == account);
        found.ok_or_else(|| NodesError::NotFound {
            message: format!("there is no snapshot {id}"),
        })
    }

    fn told(&self, info: &SnapshotInfo) -> SnapshotInfo {
        let continues = |other: &SnapshotInfo| {
            let meta = other.meta.as_ref();
            meta.and_then(|meta| meta.parent.as_ref())
                .is_some_and(|parent| parent.id == info.id)
        };
        let children = self.all.values().map(|(info, _)| info);
        SnapshotInfo {
            children: children
                .filter(|other| continues(other))
                .map(|other| other.id)
                .collect(),
            ..info.clone()
        }
    }

    /// What a start needs of it: the right account, and the keys of all that it continues.
    pub(super) fn open(&self, start: &StartVm) -> Result<(), NodesError> {
        let mut next = start.source.snapshot();
        assert!(next.is_some(), "it begins from a snapshot");
        while let Some(id) = next {
            let Some((info, key)) = self.all.get(&id) else {
                let message = format!("there is no snapshot {id}");
                return Err(NodesError::Snapshot { message });
            };
            let account = &start.owner.account;
            assert!(info.account == *account || info.account == "public", "{id}");
            let given = start.keys.iter().find(|(of, _)| *of == id);
            assert_eq!(given.map(|(_, key)| key), key.as_ref(), "the key of {id}");
            if let Some(why) = &info.damage {
                let message = format!("snapshot {id} cannot be used: {why}");
                return Err(NodesError::Snapshot { message });
            }
            let meta = info.meta.as_ref().unwrap();
            next = meta.parent.as_ref().map(|parent| parent.id);
        }
        Ok(())
    }

    pub(super) fn take(
        &mut self,
        take: &TakeSnapshot,
        kind: SnapshotKind,
        start: &StartVm,
        owner: Owner,
    ) -> Result<TakenSnapshot, NodesError> {
        if let Some(error) = &self.refuses {
            return Err(error.clone());
        }
        let parent = match start.source {
            Source::Snapshot(id) => self.all.get(&id),
            _ => None,
        };
        let parent = parent.map(|(info, _)| info);
        let depth = parent.map_or(0, |parent| parent.depth + 1);
        let holds_secrets = take.key.is_some();
        let meta = SnapshotMeta {
            id: take.id,
            account: owner.account.clone(),
            parent: parent.map(|parent| SnapshotParent {
                account: parent.account.clone(),
                id: parent.id,
            }),
            kind,
            shape: shape(),
            agent_generation: 2,
            guest: String::new(),
            image: start.image,
            folder: start.folder,
            resources: start.resources,
            taken_of: Some(owner),
            app: None,
            release: None,
            holds_secrets,
            made_at_s: take.made_at_s,
        };
        let info = SnapshotInfo {
            id: take.id,
            account: meta.account.clone(),
            meta: Some(meta),
            encrypted: holds_secrets,
            depth,
            bytes: 4096,
            memory_pages: 1,
            children: Vec::new(),
            damage: None,
        };
        self.all.insert(take.id, (info.clone(), take.key.clone()));
        Ok(TakenSnapshot {
            info,
            pause: Duration::from_micros(2500),
            frozen: Duration::from_micros(9000),
        })
    }

    /// One VM went on from it.
    pub(super) fn serve(&mut self, id: SnapshotId) {
        self.served = self.all.remove(&id);
    }

    /// That VM never ran.
    pub(super) fn serve_again(&mut self) {
        let served = self.served.take();
        self.all.extend(served.map(|served| (served.0.id, served)));
    }

    /// Files a snapshot of another account, or damages one.
    pub(crate) fn change(&mut self, id: SnapshotId, change: impl FnOnce(&mut SnapshotInfo)) {
        change(&mut self.all.get_mut(&id).unwrap().0);
    }

    pub(super) fn remove(&mut self, removal: &Removal) -> Result<Vec<SnapshotId>, NodesError> {
        self.info(&removal.account, removal.id)?;
        let mut doomed = Vec::new();
        let mut next = vec![removal.id];
        while let Some(id) = next.pop() {
            doomed.insert(0, id);
            next.extend(self.told(&self.all[&id].0).children);
        }
        let message = "others need it: remove them first".to_owned();
        let keeps = removal.dependents == Dependents::Keep && doomed.len() > 1;
        if keeps || doomed.iter().any(|id| removal.in_use.contains(id)) {
            return Err(NodesError::Conflict { message });
        }
        self.all.retain(|id, _| !doomed.contains(id));
        Ok(doomed)
    }

    pub(super) fn compact(
        &mut self,
        account: &str,
        id: SnapshotId,
        keys: &SnapshotKeys,
    ) -> Result<SnapshotInfo, NodesError> {
        self.info(account, id)?;
        let (info, key) = self.all.get_mut(&id).unwrap();
        let given = keys.iter().find(|(of, _)| *of == id);
        assert_eq!(given.map(|(_, key)| key), key.as_ref());
        info.depth = 0;
        info.meta.as_mut().unwrap().parent = None;
        Ok(info.clone())
    }

    pub(super) fn collect(
        &mut self,
        keep: &BTreeSet<SnapshotId>,
        mode: CollectMode,
    ) -> Vec<SnapshotInfo> {
        let mut kept = keep.clone();
        let mut next: Vec<_> = keep.iter().copied().collect();
        while let Some(id) = next.pop() {
            let parent = self.all.get(&id).and_then(|(info, _)| info.meta.as_ref());
            let parent = parent.and_then(|meta| meta.parent.as_ref());
            if let Some(parent) = parent
                && kept.insert(parent.id)
            {
                next.push(parent.id);
            }
        }
        let garbage = self.all.iter().filter(|(id, _)| !kept.contains(id));
        let garbage: Vec<_> = garbage.map(|(_, (info, _))| info.clone()).collect();
        if mode == CollectMode::Remove {
            self.all.retain(|id, _| kept.contains(id));
        }
        garbage
    }
}

fn shape() -> Shape {
    Shape {
        driver: "sim".to_owned(),
        version: "1".to_owned(),
        cpu: "max".to_owned(),
        tsc_khz: 1,
        kernel: "6.1".to_owned(),
        devices: "d".to_owned(),
    }
}
