//! Apps that keep what they hold in memory while they sleep.
//!
//! An idle app whose release says so is suspended instead of stopped; its next VM goes on from the
//! snapshot. That something may go on from a snapshot, and the snapshot's key, are written down
//! before it is taken and deleted together, once a VM serves: whatever dies meanwhile, there is
//! the VM, or a snapshot that somebody knows, and the node lets one VM go on from it and no more.
//! A VM that serves is always newer than what is written down, so that is forgotten then.

use spore_api::name::AccountName;
use spore_wire::cause::chain;
use spore_wire::id::{SnapshotId, VmId};
use spore_wire::node::Owner;

use super::life::{Begin, Event, Failure};
use super::snapshot::SnapshotError;
use super::start::refused;
use super::{AppRef, Converge};
use crate::nodes::{Dependents, NodesError, Note, Removal, SnapshotKeys, TakeSnapshot};
use crate::secrets::SecretsError;
use crate::store::record::app::{AppRecord, Suspended, app_key};
use crate::store::record::snapshot_key::snapshot_key_key;
use crate::store::record::{Versioned, encode};
use crate::store::{CommitError, StoreError, Transaction};

/// Why an app was not suspended.
#[derive(Debug, thiserror::Error)]
enum SuspendError {
    #[error("the app was removed")]
    NoApp,
    #[error("a secret was changed, and it may hold the value that was")]
    Secrets,
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("there is no key for it")]
    Key(#[from] SecretsError),
    #[error(transparent)]
    Nodes(#[from] NodesError),
}

impl Converge {
    /// Suspends a VM that the gateway has closed to. One that cannot be is stopped.
    pub(super) fn spawn_suspend(&self, app: &AppRef, vm: VmId, release: u64) {
        let (converge, app) = (self.clone(), app.clone());
        tokio::spawn(async move {
            let event = match converge.suspend(&app, vm, release).await {
                Ok(()) => Event::Suspended(vm),
                Err(error) => {
                    let why = format!("not suspended but stopped: {}", chain(&error));
                    converge.note(&app, vm, release, why).await;
                    Event::NotSuspended(vm)
                }
            };
            converge.event(&app, event);
        });
    }

    async fn suspend(&self, app: &AppRef, vm: VmId, release: u64) -> Result<(), SuspendError> {
        let account = &app.account;
        let stored = self.app_record(app).await?;
        if stored.is_some_and(|stored| stored.record.secrets_changed) {
            return Err(SuspendError::Secrets);
        }
        let snapshot = SnapshotId::from_bytes(self.inner.chance.bits());
        let (key, sealed) = self
            .inner
            .vault
            .make_snapshot_key(account, snapshot)
            .await?;
        let suspended = Suspended {
            snapshot,
            release,
            tried: false,
        };
        let key_at = snapshot_key_key(account, snapshot);
        let write = Transaction::default().put(key_at, encode(&sealed));
        let suspends = |record: &mut AppRecord| record.suspended = Some(suspended.clone());
        if !self.write_suspended(app, write, suspends).await? {
            return Err(SuspendError::NoApp);
        }
        let take = TakeSnapshot {
            vm,
            id: snapshot,
            key: Some(key),
            made_at_s: u64::try_from(self.now_ms() / 1000).unwrap_or(0),
        };
        let taken = self.inner.nodes.suspend(take).await;
        if taken.is_err() {
            let kept = self.app_record(app).await?;
            let kept = kept.and_then(|stored| stored.record.suspended);
            if kept.is_some_and(|kept| kept.snapshot == snapshot) {
                self.forget_suspended(app).await?;
            }
        }
        Ok(taken?)
    }

    /// Changes what an app goes on from, and writes it beside `with`. `false` when there is no such
    /// app.
    async fn write_suspended(
        &self,
        app: &AppRef,
        with: Transaction,
        change: impl Fn(&mut AppRecord) + Send,
    ) -> Result<bool, StoreError> {
        loop {
            let Some(stored) = self.app_record(app).await? else {
                return Ok(false);
            };
            let mut record: AppRecord = stored.record.clone();
            change(&mut record);
            let is_written = record == stored.record
                || self
                    .write_app(app, Some(&stored), &record, with.clone())
                    .await?;
            if is_written {
                return Ok(true);
            }
        }
    }

    /// Writes an app's record beside `with`; the key of what it went on from before goes in the
    /// same step, and its snapshot after it. `false` when something of that was changed meanwhile.
    ///
    /// # Errors
    /// When the store did not serve.
    pub(crate) async fn write_app(
        &self,
        app: &AppRef,
        was: Option<&Versioned<AppRecord>>,
        record: &AppRecord,
        with: Transaction,
    ) -> Result<bool, StoreError> {
        let at = app_key(&app.account, &app.app);
        let of = |record: &AppRecord| Some(record.suspended.as_ref()?.snapshot);
        let before = was.and_then(|was| of(&was.record));
        let before = before.filter(|before| of(record) != Some(*before));
        let mut write = with.when(&at, was.map_or(0, |was| was.version));
        write = write.put(&at, encode(record));
        if let Some(before) = before {
            write = write.delete(snapshot_key_key(&app.account, before));
        }
        match self.inner.store.commit(write).await {
            Ok(_) => {
                if let Some(before) = before {
                    self.remove_suspended(&app.account, before).await;
                }
                Ok(true)
            }
            Err(CommitError::Conflict { .. }) => Ok(false),
            Err(CommitError::Store(error)) => Err(error),
        }
    }

    /// Forgets what an app would go on from: its next VM begins anew.
    ///
    /// # Errors
    /// When the store did not serve.
    pub(crate) async fn forget_suspended(&self, app: &AppRef) -> Result<(), StoreError> {
        let forgets = |record: &mut AppRecord| record.suspended = None;
        let nothing = Transaction::default();
        self.write_suspended(app, nothing, forgets).await.map(drop)
    }

    /// Removes a snapshot that nothing goes on from any more. Without its key it is of no use, and
    /// what cannot be removed now is collected.
    pub(super) async fn remove_suspended(&self, account: &AccountName, id: SnapshotId) {
        let removal = Removal {
            account: account.to_string(),
            id,
            dependents: Dependents::Keep,
            in_use: Default::default(),
        };
        match self.inner.nodes.remove_snapshot(removal).await {
            // The node removes what a VM went on from, and refuses while that VM is there.
            Ok(_) | Err(NodesError::NotFound { .. } | NodesError::Conflict { .. }) => {}
            Err(error) => tracing::warn!(%id, %error, "a suspended app's snapshot is left"),
        }
    }

    /// What a VM that is to serve goes on from, if its app was suspended. What cannot be gone on
    /// from is tried once more, and then forgotten; the owner is told.
    pub(super) async fn goes_on_from(
        &self,
        app: &AppRef,
        vm: VmId,
        release: u64,
        begin: Begin,
    ) -> Result<Option<(SnapshotId, SnapshotKeys)>, Failure> {
        let failed = |error: StoreError| refused_by_store(&error);
        let is_tried_out = {
            let slots = self.slots();
            let slot = slots.get(app);
            slot.is_some_and(|slot| slot.life.operation_of(vm).is_some())
        };
        let stored = self.app_record(app).await.map_err(failed)?;
        let suspended = stored.and_then(|stored| stored.record.suspended);
        let Some(suspended) = suspended.filter(|it| it.release == release && !is_tried_out) else {
            return Ok(None);
        };
        let id = suspended.snapshot;
        let lost = match begin {
            Begin::Warm => self.keys_of_suspended(app, id).await?,
            Begin::Cold if !suspended.tried => {
                let tried = |record: &mut AppRecord| {
                    if let Some(kept) = &mut record.suspended {
                        kept.tried |= kept.snapshot == id;
                    }
                };
                let written = self.write_suspended(app, Transaction::default(), tried);
                written.await.map_err(failed)?;
                self.keys_of_suspended(app, id).await?
            }
            Begin::Cold => Err("it did not go on where it was suspended".to_owned()),
        };
        match lost {
            Ok(keys) => Ok(Some((id, keys))),
            Err(why) => {
                self.begins_anew(app, vm, release, &why).await?;
                Ok(None)
            }
        }
    }

    /// What an app was suspended with is lost, and its owner is told.
    pub(super) async fn begins_anew(
        &self,
        app: &AppRef,
        vm: VmId,
        release: u64,
        why: &str,
    ) -> Result<(), Failure> {
        let text = format!("started anew, without what it held in memory: {why}");
        self.note(app, vm, release, text).await;
        let forgotten = self.forget_suspended(app).await;
        forgotten.map_err(|error| refused_by_store(&error))
    }

    /// The keys of what an app goes on from, or why nothing does.
    async fn keys_of_suspended(
        &self,
        app: &AppRef,
        id: SnapshotId,
    ) -> Result<Result<SnapshotKeys, String>, Failure> {
        let account = app.account.to_string();
        let info = match self.inner.nodes.snapshot(account, id).await {
            Ok(info) => info,
            Err(error @ (NodesError::NotFound { .. } | NodesError::Snapshot { .. })) => {
                return Ok(Err(error.to_string()));
            }
            Err(error) => return Err(refused(&error)),
        };
        match self.keys_of(&app.account, &info).await {
            Ok(keys) => Ok(Ok(keys)),
            Err(SnapshotError::Store(error)) => Err(refused_by_store(&error)),
            Err(error) => Ok(Err(chain(&error))),
        }
    }

    /// Tells an app's owner something, in the app's log.
    pub(super) async fn note(&self, app: &AppRef, vm: VmId, release: u64, text: String) {
        tracing::warn!(%app, %vm, text);
        let note = Note {
            owner: Owner {
                account: app.account.to_string(),
                app: app.app.to_string(),
                release,
                secrets_version: 0,
            },
            vm,
            text,
        };
        if let Err(error) = self.inner.nodes.note(note).await {
            tracing::warn!(%app, %error, "the owner is not told");
        }
    }
}

fn refused_by_store(error: &StoreError) -> Failure {
    Failure::new(spore_api::error::ErrorCode::Internal, chain(error))
}
