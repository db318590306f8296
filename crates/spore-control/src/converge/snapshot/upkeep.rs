//! What keeps snapshots few: removal, compaction, collection.
//!
//! One at a time, and never while a fork writes down what it begins from: what is needed is known
//! when something goes.

use std::collections::{BTreeMap, BTreeSet};

use spore_api::name::AccountName;
use spore_wire::id::SnapshotId;
use spore_wire::snapshot::SnapshotInfo;

use super::{Shown, SnapshotError};
use crate::converge::Converge;
use crate::nodes::{CollectMode, Dependents, NodesError, Removal};
use crate::store::record::app::apps_of;
use crate::store::record::decode;
use crate::store::record::sandbox::{Base, Kept};
use crate::store::record::snapshot_key::{
    SNAPSHOT_KEYS, SnapshotKeyRecord, snapshot_key_key, snapshot_of,
};
use crate::store::record::tag::{TAGS, TagRecord, names_of, tag_key};
use crate::store::{StoreError, Transaction, every};
use spore_wire::cause::chain;

/// A key this young may be of a snapshot that is being taken.
const KEY_KEPT_MS: i64 = 60 * 60 * 1000;

impl Converge {
    /// Removes a snapshot with its tags and its key; answers all that were removed.
    pub(crate) async fn remove_snapshot(
        &self,
        account: &AccountName,
        text: &str,
        dependents: Dependents,
    ) -> Result<Vec<SnapshotId>, SnapshotError> {
        let _alone = self.inner.snapshot_ledger.lock().await;
        let base = self.own_snapshot(account, text).await?;
        let doomed = match dependents {
            Dependents::Keep => BTreeSet::from([base.id]),
            Dependents::Remove => self.descent(account, base.id).await?,
        };
        let needed = doomed.iter().map(|id| (*id, self.sandboxes_need(*id)));
        if let Some((id, count)) = needed.into_iter().find(|(_, count)| *count > 0) {
            return Err(SnapshotError::NeededBySandboxes { id, count });
        }
        let suspended = self.suspended_in(&apps_of(account)).await?;
        if let Some((id, app)) = suspended.into_iter().find(|(id, _)| doomed.contains(id)) {
            return Err(SnapshotError::NeededByApp { id, app });
        }
        let named = self.snapshots_in_use().await?;
        let removal = Removal {
            account: account.to_string(),
            id: base.id,
            dependents,
            in_use: named.difference(&doomed).copied().collect(),
        };
        let removed = self.inner.nodes.remove_snapshot(removal).await?;
        // A crash before this leaves names of nothing, which the next collection removes.
        self.forget_names(account, &removed).await?;
        Ok(removed)
    }

    /// Makes a snapshot stand alone.
    pub(crate) async fn compact_snapshot(
        &self,
        account: &AccountName,
        text: &str,
    ) -> Result<Shown, SnapshotError> {
        let base = self.own_snapshot(account, text).await?;
        let info = self.snapshot_info(&base).await?;
        let keys = self.keys_of(account, &info).await?;
        let nodes = &self.inner.nodes;
        nodes
            .compact_snapshot(account.to_string(), base.id, keys)
            .await?;
        self.show_snapshot(&base).await
    }

    /// Removes what no tag names and no sandbox began from, of all accounts, and names and keys of
    /// what is not there any more.
    pub(crate) async fn collect_snapshots(
        &self,
        mode: CollectMode,
    ) -> Result<Vec<SnapshotInfo>, SnapshotError> {
        let _alone = self.inner.snapshot_ledger.lock().await;
        let keep = self.snapshots_in_use().await?;
        let removed = self.inner.nodes.collect_snapshots(keep, mode).await?;
        if mode == CollectMode::Remove {
            self.sweep_names().await?;
        }
        Ok(removed)
    }

    /// Removes a snapshot that was taken for sandboxes, when none needs it any more.
    pub(in crate::converge) async fn drop_unneeded(&self, base: &Base) {
        if base.kept != Kept::BySandboxes {
            return;
        }
        let _alone = self.inner.snapshot_ledger.lock().await;
        if self.sandboxes_need(base.id) > 0 {
            return;
        }
        let dropped = async {
            let removal = Removal {
                account: base.account.to_string(),
                id: base.id,
                dependents: Dependents::Keep,
                in_use: self.snapshots_in_use().await?,
            };
            let removed = match self.inner.nodes.remove_snapshot(removal).await {
                // Another one continues it: it goes with that.
                Err(NodesError::NotFound { .. } | NodesError::Conflict { .. }) => return Ok(()),
                other => other?,
            };
            self.forget_names(&base.account, &removed).await?;
            Ok::<_, SnapshotError>(())
        };
        if let Err(error) = dropped.await {
            let (id, error) = (base.id, chain(&error));
            tracing::warn!(%id, error, "a snapshot that nothing needs is left to the collection");
        }
    }

    /// A snapshot that the account may change.
    async fn own_snapshot(&self, account: &AccountName, text: &str) -> Result<Base, SnapshotError> {
        let base = self.find_snapshot(account, "name", text).await?;
        if base.account == *account {
            return Ok(base);
        }
        let name = text.to_owned();
        Err(SnapshotError::NotYours { name })
    }

    /// A snapshot with all that continue it.
    async fn descent(
        &self,
        account: &AccountName,
        id: SnapshotId,
    ) -> Result<BTreeSet<SnapshotId>, SnapshotError> {
        let all = self.inner.nodes.snapshots(account.to_string()).await?;
        let children: BTreeMap<_, _> = all
            .into_iter()
            .map(|info| (info.id, info.children))
            .collect();
        let (mut found, mut next) = (BTreeSet::new(), vec![id]);
        while let Some(id) = next.pop() {
            if found.insert(id) {
                next.extend(children.get(&id).into_iter().flatten());
            }
        }
        Ok(found)
    }

    async fn forget_names(
        &self,
        account: &AccountName,
        removed: &[SnapshotId],
    ) -> Result<(), StoreError> {
        let tags = self.tags(account).await?;
        let mut forget = Transaction::default();
        for id in removed {
            forget = forget.delete(snapshot_key_key(account, *id));
            for tag in tags.get(id).into_iter().flatten() {
                forget = forget.delete(tag_key(account, tag));
            }
        }
        self.commit_alone(forget).await
    }

    /// Removes names and keys of what is not there any more.
    async fn sweep_names(&self) -> Result<(), SnapshotError> {
        let old = self.now_ms().saturating_sub(KEY_KEPT_MS);
        let mut names: BTreeMap<AccountName, Vec<(String, SnapshotId)>> = BTreeMap::new();
        for entry in every(&*self.inner.store, TAGS).await? {
            let id = decode::<TagRecord>(&entry)
                .map_err(StoreError::from)?
                .snapshot;
            if let Some((account, _)) = names_of(&entry.key) {
                names.entry(account).or_default().push((entry.key, id));
            }
        }
        for entry in every(&*self.inner.store, SNAPSHOT_KEYS).await? {
            let record: SnapshotKeyRecord = decode(&entry).map_err(StoreError::from)?;
            let account = entry
                .key
                .split('/')
                .nth(1)
                .and_then(|name| name.parse().ok());
            if let (Some(account), Some(id)) = (account, snapshot_of(&entry.key))
                && record.created_at_ms < old
            {
                names.entry(account).or_default().push((entry.key, id));
            }
        }
        let mut forget = Transaction::default();
        for (account, names) in names {
            // Asked after the names were read: a name is written when its snapshot is there.
            let there = self.inner.nodes.snapshots(account.to_string()).await?;
            let there: BTreeSet<_> = there.into_iter().map(|info| info.id).collect();
            for (key, _) in names.into_iter().filter(|(_, id)| !there.contains(id)) {
                tracing::info!(key, "a name or key of a snapshot that is gone is removed");
                forget = forget.delete(key);
            }
        }
        Ok(self.commit_alone(forget).await?)
    }
}
