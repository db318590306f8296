//! Releases: begun by the API, tried by the app's life, written down here when that is decided.
//!
//! A deploy is one commit at its beginning (release, operation, the app's mark) and one at its
//! end. Between the two a crash leaves a release that is pending and an operation that runs; the
//! next start writes both down as failed, and what served before serves on.

use spore_api::error::ErrorCode;
use spore_api::name::AccountName;
use spore_wire::cause::chain;
use spore_wire::id::{ImageId, VmId};

use super::life::{Event, Failure};
use super::repeat::{RepeatError, Repeatable};
use super::{AppRef, Converge};
use crate::clock::next_id;
use crate::domain::RuleError;
use crate::domain::app::{RollbackError, forgotten, one_more_app, rollback_to};
use crate::operations::{Operations, Outcome};
use crate::store::record::account::account_key;
use crate::store::record::app::{AppRecord, app_key, apps_of};
use crate::store::record::image::{IMAGES, ImageRecord};
use crate::store::record::operation::{OperationRecord, StoredOperationState, operation_key};
use crate::store::record::release::{ReleaseRecord, Rules, StoredState, release_key, releases_of};
use crate::store::record::removal::removal_key;
use crate::store::record::{Versioned, decode, encode, load};
use crate::store::{CommitError, StoreError, Transaction, every};

/// Tries of a commit that others are faster at.
const TRIES_MAX: usize = 16;

/// A release to make.
#[derive(Clone, Debug)]
pub struct NewRelease {
    /// What runs and how.
    pub rules: Rules,
    /// The root file system.
    pub image: Named,
    /// The app's folder.
    pub folder: Option<Named>,
}

/// An image that a release is to have.
#[derive(Clone, Debug)]
pub struct Named {
    /// Which.
    pub id: ImageId,
    /// Its size.
    pub bytes: u64,
    /// The key of the record that gives it to the account.
    pub key: String,
}

/// Why a deploy or rollback did not begin.
#[derive(Debug, thiserror::Error)]
pub enum DeployError {
    /// Another one is under way.
    #[error("the operation {operation} tries a release of `{app}` now: wait until it is over")]
    UnderWay {
        /// Which app.
        app: String,
        /// Which operation.
        operation: String,
    },
    /// No such app.
    #[error("there is no app `{app}`: `spore ps` lists them")]
    NoApp {
        /// Which.
        app: String,
    },
    /// An app of this name is not wholly removed.
    #[error(transparent)]
    Removing(#[from] Removing),
    /// The client's key.
    #[error(transparent)]
    Repeat(#[from] RepeatError),
    /// The account has as many as it may.
    #[error(transparent)]
    Rule(#[from] RuleError),
    /// There is nothing to roll back to.
    #[error(transparent)]
    Rollback(#[from] RollbackError),
    /// The store did not serve.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// What it is made of is not what was named any more.
    #[error("the release's {what} was removed or replaced meanwhile: deploy again")]
    Moved {
        /// Image or upload.
        what: &'static str,
    },
    /// Others changed the app at the same time, again and again.
    #[error("`{app}` is being changed by many calls at once: try again")]
    Contended {
        /// Which app.
        app: String,
    },
}

/// An app of this name was removed, and not everything of it is gone.
#[derive(Debug, thiserror::Error)]
#[error("an app `{app}` is still being removed: try again in a moment")]
pub struct Removing {
    /// Which.
    pub app: String,
}

impl Converge {
    /// Makes a release and begins to try it; answers the operation.
    ///
    /// # Errors
    /// When it may not begin; nothing was changed then.
    pub async fn deploy(
        &self,
        app: &AppRef,
        new: &NewRelease,
        repeatable: Option<&Repeatable>,
    ) -> Result<String, DeployError> {
        for _ in 0..TRIES_MAX {
            if let Some(operation) = self.repeated(app, repeatable).await? {
                return Ok(operation);
            }
            let stored = self.app_record(app).await?;
            if stored.is_none() {
                let used = self.inner.store.count(&apps_of(&app.account)).await?;
                one_more_app(used)?;
                if self.is_being_removed(app).await? {
                    let app = app.app.to_string();
                    return Err(Removing { app }.into());
                }
            }
            let (version, mut record) = match stored {
                Some(stored) => (stored.version, stored.record),
                None => (0, AppRecord::new(self.now_ms())),
            };
            let release = ReleaseRecord {
                number: record.next_release,
                state: StoredState::Pending,
                image: new.image.id,
                folder: new.folder.as_ref().map(|folder| folder.id),
                image_bytes: new.image.bytes,
                folder_bytes: new.folder.as_ref().map_or(0, |folder| folder.bytes),
                rules: new.rules.clone(),
                created_at_ms: self.now_ms(),
                failure: None,
            };
            record.next_release += 1;
            let key = release_key(&app.account, &app.app, release.number);
            let transaction = self.holding(new).await?.put(key, encode(&release));
            let kind = "deploy";
            let try_it = self
                .begin_try(
                    app,
                    version,
                    record,
                    &release,
                    kind,
                    transaction,
                    repeatable,
                )
                .await?;
            if let Some(operation) = try_it {
                return Ok(operation);
            }
        }
        let app = app.app.to_string();
        Err(DeployError::Contended { app })
    }

    /// A commit that is made only while the release's images are its account's: a collection that
    /// does not see the release has not forgotten them either (`image.rs`).
    async fn holding(&self, new: &NewRelease) -> Result<Transaction, DeployError> {
        let mut transaction = Transaction::default();
        let image = [("image", &new.image)];
        let folder = new.folder.as_ref().map(|folder| ("upload", folder));
        for (what, named) in image.into_iter().chain(folder) {
            let entry = self.inner.store.get(&named.key).await?;
            let entry = entry.ok_or(DeployError::Moved { what })?;
            let is_moved = named.key.starts_with(IMAGES)
                && decode::<ImageRecord>(&entry).map_err(StoreError::from)?.id != named.id;
            if is_moved {
                return Err(DeployError::Moved { what });
            }
            transaction = transaction.when(&named.key, entry.version);
        }
        Ok(transaction)
    }

    /// Begins to try an older release again; answers the operation.
    ///
    /// # Errors
    /// When it may not begin; nothing was changed then.
    pub async fn rollback(
        &self,
        app: &AppRef,
        wanted: Option<u64>,
        repeatable: Option<&Repeatable>,
    ) -> Result<String, DeployError> {
        for _ in 0..TRIES_MAX {
            if let Some(operation) = self.repeated(app, repeatable).await? {
                return Ok(operation);
            }
            let stored = self.app_record(app).await?;
            let name = || app.app.to_string();
            let stored = stored.ok_or_else(|| DeployError::NoApp { app: name() })?;
            let releases = self.releases(app).await?;
            let number = rollback_to(&releases, stored.record.release, wanted)?;
            let release = releases.iter().find(|release| release.number == number);
            let release = release.ok_or(RollbackError::NoneBefore)?;
            let (version, record) = (stored.version, stored.record);
            let nothing = Transaction::default();
            let try_it = self
                .begin_try(
                    app, version, record, release, "rollback", nothing, repeatable,
                )
                .await?;
            if let Some(operation) = try_it {
                return Ok(operation);
            }
        }
        let app = app.app.to_string();
        Err(DeployError::Contended { app })
    }

    /// `None` when somebody else was faster.
    #[expect(
        clippy::too_many_arguments,
        reason = "each is one part of the one commit"
    )]
    async fn begin_try(
        &self,
        app: &AppRef,
        version: u64,
        mut record: AppRecord,
        release: &ReleaseRecord,
        kind: &str,
        transaction: Transaction,
        repeatable: Option<&Repeatable>,
    ) -> Result<Option<String>, DeployError> {
        if let Some(operation) = record.deploying {
            if self.inner.operations.is_running(&app.account, &operation) {
                let app = app.app.to_string();
                return Err(DeployError::UnderWay { app, operation });
            }
            // Its end was not written down: that is done first.
            return match self.end_try(app, &operation, unwritten()).await {
                Ok(()) | Err(CommitError::Conflict { .. }) => Ok(None),
                Err(CommitError::Store(error)) => Err(error.into()),
            };
        }
        let id = next_id(&*self.inner.chance);
        record.deploying = Some(id.clone());
        let operation =
            Operations::record(kind, app.app.as_str(), Some(release.number), self.now_ms());
        let key = app_key(&app.account, &app.app);
        let mut transaction = transaction
            .when(&key, version)
            .put(&key, encode(&record))
            .put(operation_key(&app.account, &id), encode(&operation));
        if version == 0 {
            transaction = transaction.when(removal_key(&app.account, &app.app), 0);
        }
        if let Some(repeatable) = repeatable {
            transaction = self.remember(&app.account, transaction, repeatable, &id);
        }
        // Followed before it is committed: whoever sees the record sees its progress too.
        self.inner
            .operations
            .begin(&app.account, &id, operation.clone());
        match self.inner.store.commit(transaction).await {
            Ok(_) => {}
            Err(error) => {
                self.inner.operations.end(&app.account, &id, None);
                return match error {
                    CommitError::Conflict { .. } => Ok(None),
                    CommitError::Store(error) => Err(error.into()),
                };
            }
        }
        // The commit promised that the release is tried, whatever else fails now.
        let target = super::app::target_of(release);
        let operation = id.clone();
        self.event(app, Event::Deploy { operation, target });
        self.refresh(app).await?;
        Ok(Some(id))
    }

    /// The operation that an earlier call with the same key began.
    async fn repeated(
        &self,
        app: &AppRef,
        repeatable: Option<&Repeatable>,
    ) -> Result<Option<String>, DeployError> {
        let Some(repeatable) = repeatable else {
            return Ok(None);
        };
        Ok(self.earlier(&app.account, repeatable).await?)
    }

    /// Writes down that a release is live.
    pub(super) async fn promote(&self, app: &AppRef, operation: &str, release: u64, vm: VmId) {
        let event = match self.write_promotion(app, operation, release).await {
            Ok(()) => {
                tracing::info!(%app, release, %vm, "live");
                Event::Promoted(vm)
            }
            Err(failure) => Event::NotPromoted(vm, failure),
        };
        self.event(app, event);
    }

    async fn write_promotion(
        &self,
        app: &AppRef,
        operation: &str,
        release: u64,
    ) -> Result<(), Failure> {
        let store_failed = |error: StoreError| {
            let message = chain(&error);
            Failure::new(ErrorCode::Internal, message)
        };
        for _ in 0..TRIES_MAX {
            let promotion = self
                .promotion(app, operation, release)
                .await
                .map_err(store_failed)?;
            let Some(transaction) = promotion else {
                return Err(Failure::new(
                    ErrorCode::Conflict,
                    "the app was removed meanwhile",
                ));
            };
            match self.inner.store.commit(transaction).await {
                Ok(_) => {
                    if let Err(error) = self.refresh(app).await {
                        tracing::warn!(%app, %error, "the route is told later");
                    }
                    return Ok(());
                }
                Err(CommitError::Conflict { .. }) => {}
                Err(CommitError::Store(error)) => return Err(store_failed(error)),
            }
        }
        Err(Failure::new(
            ErrorCode::Conflict,
            "the app is being changed by many calls at once",
        ))
    }

    /// Tells who waits for a deploy how it ended, as it is written down. The gateway was told of
    /// the route and the VM before: whoever hears of the end and asks the app meets the new one.
    pub(super) async fn tell_live(&self, app: &AppRef, operation: &str) {
        let key = operation_key(&app.account, operation);
        let ended = match load::<OperationRecord>(&*self.inner.store, &key).await {
            Ok(stored) => stored.map(|stored| stored.record),
            Err(error) => {
                tracing::warn!(%app, error = chain(&error), "who waits for a deploy asks again");
                None
            }
        };
        self.inner.operations.end(&app.account, operation, ended);
    }

    async fn promotion(
        &self,
        app: &AppRef,
        operation: &str,
        number: u64,
    ) -> Result<Option<Transaction>, StoreError> {
        let (account, name) = (&app.account, &app.app);
        let Some(Versioned {
            version,
            mut record,
        }) = self.app_record(app).await?
        else {
            return Ok(None);
        };
        let at = app_key(account, name);
        let mut transaction = Transaction::default().when(&at, version);
        let mut releases = self.releases(app).await?;
        for release in &mut releases {
            let state = if release.number == number {
                StoredState::Live
            } else if release.state == StoredState::Live {
                StoredState::Retired
            } else {
                continue;
            };
            release.state = state;
            release.failure = None;
            let key = release_key(account, name, release.number);
            transaction = transaction.put(key, encode(release));
        }
        for old in forgotten(&releases, Some(number)) {
            transaction = transaction.delete(release_key(account, name, old));
        }
        record.release = Some(number);
        record.deploying = None;
        let key = operation_key(account, operation);
        let Some(stored) = load::<OperationRecord>(&*self.inner.store, &key).await? else {
            return Ok(None);
        };
        let result = number.to_string();
        let outcome = Outcome::Succeeded { result };
        let ended = self
            .inner
            .operations
            .ended(account, operation, stored.record, outcome);
        let transaction = transaction
            .put(&at, encode(&record))
            .put(key, encode(&ended));
        Ok(Some(transaction))
    }

    /// Writes down that a release did not become healthy.
    pub(super) async fn deploy_failed(
        &self,
        app: &AppRef,
        operation: &str,
        release: u64,
        failure: Failure,
    ) {
        tracing::info!(%app, release, message = failure.message, "a release did not go live");
        self.inner
            .metrics
            .failed(&super::app::code_name(failure.code));
        let outcome = Outcome::Failed {
            code: failure.code,
            message: with_last_lines(&failure),
        };
        for _ in 0..TRIES_MAX {
            match self.end_try(app, operation, outcome.clone()).await {
                Ok(()) => return,
                Err(CommitError::Conflict { .. }) => {}
                Err(CommitError::Store(error)) => {
                    let error = chain(&error);
                    tracing::error!(%app, error, "a failed deploy is written down later");
                    break;
                }
            }
        }
        self.inner.operations.over(&app.account, operation, outcome);
    }

    /// Writes down that a try is over and its release not live. Done twice it does nothing. What is
    /// told of the operation already counts more than `outcome`.
    async fn end_try(
        &self,
        app: &AppRef,
        operation: &str,
        outcome: Outcome,
    ) -> Result<(), CommitError> {
        let (account, operations) = (&app.account, &self.inner.operations);
        let at = operation_key(account, operation);
        let stored = load::<OperationRecord>(&*self.inner.store, &at).await?;
        let mut transaction = Transaction::default();
        let mut end = None;
        let mut message = "it was given up; deploy again".to_owned();
        if let Some(stored) = stored
            && stored.record.state == StoredOperationState::Running
        {
            let ended = operations.ended(account, operation, stored.record, outcome);
            if let Some((_, text)) = &ended.error {
                text.clone_into(&mut message);
            }
            transaction = transaction
                .when(&at, stored.version)
                .put(&at, encode(&ended));
            end = Some(ended);
        }
        transaction = self
            .no_longer_tried(app, operation, &message, transaction)
            .await?;
        if !transaction.writes.is_empty() {
            self.inner.store.commit(transaction).await?;
        }
        operations.end(account, operation, end);
        Ok(())
    }

    /// Adds to `transaction` that `operation` tries no release of the app any more, and that the
    /// one it tried is failed. A release that was healthy once stays what it was.
    pub(crate) async fn no_longer_tried(
        &self,
        app: &AppRef,
        operation: &str,
        message: &str,
        mut transaction: Transaction,
    ) -> Result<Transaction, StoreError> {
        let (account, name) = (&app.account, &app.app);
        let stored = self.app_record(app).await?;
        let is_tried =
            |stored: &Versioned<AppRecord>| stored.record.deploying.as_deref() == Some(operation);
        let Some(mut stored) = stored.filter(is_tried) else {
            return Ok(transaction);
        };
        stored.record.deploying = None;
        let at = app_key(account, name);
        transaction = transaction
            .when(&at, stored.version)
            .put(&at, encode(&stored.record));
        // One release is tried at a time, so whichever is pending is the one.
        for mut release in self.releases(app).await? {
            if release.state == StoredState::Pending {
                release.state = StoredState::Failed;
                release.failure = Some(message.to_owned());
                let at = release_key(account, name, release.number);
                transaction = transaction.put(at, encode(&release));
            }
        }
        Ok(transaction)
    }

    /// Writes down the ends of operations that the store did not take at their time.
    pub(super) async fn write_ends(&self) -> Result<(), StoreError> {
        for (account, id, record) in self.inner.operations.unwritten() {
            let app = record
                .release
                .and_then(|_| AppRef::of(account.as_str(), &record.target));
            let written = match app {
                Some(app) => self.end_try(&app, &id, unwritten()).await,
                None => {
                    let finished = self.inner.operations.finish(&account, &id, unwritten());
                    finished.await.map_err(CommitError::from)
                }
            };
            match written {
                Ok(()) => tracing::info!(%account, id, "the end of an operation is written down"),
                // The next repair looks again.
                Err(CommitError::Conflict { .. }) => {}
                Err(CommitError::Store(error)) => return Err(error),
            }
        }
        Ok(())
    }

    /// An app's record.
    ///
    /// # Errors
    /// When the store cannot serve.
    pub async fn app_record(
        &self,
        app: &AppRef,
    ) -> Result<Option<Versioned<AppRecord>>, StoreError> {
        load(&*self.inner.store, &app_key(&app.account, &app.app)).await
    }

    /// An app's releases, oldest first.
    ///
    /// # Errors
    /// When the store cannot serve.
    pub async fn releases(&self, app: &AppRef) -> Result<Vec<ReleaseRecord>, StoreError> {
        let prefix = releases_of(&app.account, &app.app);
        let entries = every(&*self.inner.store, &prefix).await?;
        let releases = entries.iter().map(decode).collect::<Result<_, _>>();
        Ok(releases?)
    }

    /// Writes down the account, if there is none.
    pub(crate) async fn ensure_account(&self, account: &AccountName) -> Result<(), StoreError> {
        let at = account_key(account);
        let record = crate::store::record::account::AccountRecord {
            created_at_ms: self.now_ms(),
        };
        let first = Transaction::default()
            .when(&at, 0)
            .put(&at, encode(&record));
        match self.inner.store.commit(first).await {
            Ok(_) | Err(CommitError::Conflict { .. }) => Ok(()),
            Err(CommitError::Store(error)) => Err(error),
        }
    }

    pub(crate) fn now_ms(&self) -> i64 {
        self.inner.clock.now().as_millisecond()
    }
}

/// What is told of a try that nobody runs and of whose end nothing is known.
fn unwritten() -> Outcome {
    Outcome::Failed {
        code: ErrorCode::Internal,
        message: "the daemon could not write down how this ended; what served before serves on"
            .to_owned(),
    }
}

fn with_last_lines(failure: &Failure) -> String {
    if failure.last_lines.is_empty() {
        return failure.message.clone();
    }
    let lines = failure.last_lines.join("\n  ");
    format!("{}\nThe app's last lines:\n  {lines}", failure.message)
}
