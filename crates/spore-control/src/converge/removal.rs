//! Removes an app with everything of it, however long that takes.
//!
//! The commit that removes the records leaves a note; it goes when the VM has ended and the log is
//! forgotten. Whatever comes between (a slow stop, a log that cannot be removed, a daemon's end),
//! the repair goes on from the note. An app of the same name is not made before.

use super::life::{Failure, Life};
use super::{AppRef, Converge};
use crate::nodes::NodesError;
use crate::store::record::app::app_key;
use crate::store::record::encode;
use crate::store::record::former_secret::former_secrets_of;
use crate::store::record::release::releases_of;
use crate::store::record::removal::{REMOVALS, RemovalRecord, names_of, removal_key};
use crate::store::record::secret::secrets_of;
use crate::store::record::snapshot_key::snapshot_key_key;
use crate::store::{CommitError, StoreError, Transaction, every};
use spore_wire::cause::chain;

/// Why an app is not removed, or not wholly yet.
#[derive(Debug, thiserror::Error)]
pub enum RemovalError {
    /// No such app.
    #[error("there is no app `{app}`: `spore ps` lists them")]
    NoApp {
        /// Which.
        app: String,
    },
    /// Its VM has not ended.
    #[error("`{app}` is removed, and the rest of it goes when its VM has ended: {}", .why.message)]
    Slow {
        /// Which.
        app: String,
        /// What is waited for.
        why: Failure,
    },
    /// The store did not serve.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The node did not forget its log.
    #[error("`{app}` is removed but for its log, which is tried again")]
    Log {
        /// Which.
        app: String,
        /// What the node said.
        #[source]
        source: NodesError,
    },
}

impl Converge {
    /// Removes an app and returns when nothing of it is left. Asked again meanwhile, it waits on.
    ///
    /// # Errors
    /// When there is none, or the rest of it takes longer; the repair removes that all the same.
    pub async fn remove(&self, app: &AppRef) -> Result<(), RemovalError> {
        let name = || app.app.to_string();
        if self.remove_records(app).await? {
            self.refresh(app).await?;
        } else if !self.is_being_removed(app).await? {
            return Err(RemovalError::NoApp { app: name() });
        }
        let over = self.until(app, Life::is_over).await;
        over.map_err(|why| RemovalError::Slow { app: name(), why })?;
        self.forget(app).await
    }

    /// Whether something of an app of this name is still to be removed.
    pub(crate) async fn is_being_removed(&self, app: &AppRef) -> Result<bool, StoreError> {
        let key = removal_key(&app.account, &app.app);
        Ok(self.inner.store.get(&key).await?.is_some())
    }

    /// Goes on with removals that were interrupted or took too long.
    pub(super) async fn finish_removals(&self) -> Result<(), StoreError> {
        for entry in every(&*self.inner.store, REMOVALS).await? {
            let Some((account, app)) = names_of(&entry.key) else {
                continue;
            };
            let app = AppRef { account, app };
            if !self.with_life(&app, |life, _| life.is_over()) {
                continue;
            }
            match self.forget(&app).await {
                Ok(()) => tracing::info!(%app, "the rest of a removed app is gone"),
                Err(error) => {
                    let error = chain(&error);
                    tracing::warn!(%app, error, "the rest of a removed app is left for now");
                }
            }
        }
        Ok(())
    }

    /// `false` when there is no such app.
    async fn remove_records(&self, app: &AppRef) -> Result<bool, StoreError> {
        let (account, name, store) = (&app.account, &app.app, &*self.inner.store);
        let at = app_key(account, name);
        loop {
            let Some(stored) = self.app_record(app).await? else {
                return Ok(false);
            };
            let removal = RemovalRecord {
                removed_at_ms: self.now_ms(),
            };
            let mut transaction = Transaction::default()
                .when(&at, stored.version)
                .delete(&at)
                .put(removal_key(account, name), encode(&removal));
            for prefix in [
                releases_of(account, name),
                secrets_of(account, name),
                former_secrets_of(account, name),
            ] {
                for entry in every(store, &prefix).await? {
                    transaction = transaction.delete(entry.key);
                }
            }
            let suspended = stored.record.suspended.map(|suspended| suspended.snapshot);
            if let Some(id) = suspended {
                transaction = transaction.delete(snapshot_key_key(account, id));
            }
            match store.commit(transaction).await {
                Ok(_) => {
                    if let Some(id) = suspended {
                        self.remove_suspended(account, id).await;
                    }
                    return Ok(true);
                }
                Err(CommitError::Conflict { .. }) => {}
                Err(CommitError::Store(error)) => return Err(error),
            }
        }
    }

    /// Removes what is left of an app that has no record and no VM.
    async fn forget(&self, app: &AppRef) -> Result<(), RemovalError> {
        // One at a time: behind the end of another removal, an app of this name may be there again.
        let _one = self.inner.forgetting.lock().await;
        if !self.is_being_removed(app).await? {
            return Ok(());
        }
        let (account, name) = (app.account.to_string(), app.app.to_string());
        let forgotten = self.inner.nodes.forget_logs(account, name).await;
        forgotten.map_err(|source| RemovalError::Log {
            app: app.app.to_string(),
            source,
        })?;
        let done = Transaction::default().delete(removal_key(&app.account, &app.app));
        Ok(self.commit_alone(done).await?)
    }
}
