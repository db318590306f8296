//! Images: built as operations, counted per account, collected by what still names them.
//!
//! A collection must not take what somebody is about to name. Three things see to that: the node
//! spares what it filed just now, so that a new image is written down first; an upload's record is
//! forgotten before the releases are read; and a release, or a name made of an upload, is committed
//! only while the record that gives it its images is the one that was read.

use std::collections::{BTreeMap, BTreeSet};

use spore_api::error::ErrorCode;
use spore_api::name::{AccountName, ImageName};
use spore_wire::cause::chain;
use spore_wire::id::ImageId;
use spore_wire::node::{ImageInfo, ImageKind, ImageRecipe};
use tokio::sync::{mpsc, watch};

use super::Converge;
use super::deploy::DeployError;
use super::repeat::Repeatable;
use crate::clock::next_id;
use crate::domain::RuleError;
use crate::nodes::{ByteStream, CollectMode, NodesError};
use crate::operations::{Operations, Outcome};
use crate::store::record::image::{IMAGES, ImageOrigin, ImageRecord, image_key, images_of};
use crate::store::record::operation::operation_key;
use crate::store::record::release::{RELEASES, ReleaseRecord, releases_of_account};
use crate::store::record::source::{SOURCES, SourceRecord, id_of, source_key, sources_of};
use crate::store::record::{decode, encode, load};
use crate::store::{CommitError, StoreError, Transaction, every};

/// An upload that nothing uses is kept so long: its deploy may be on the way.
const SOURCE_KEPT_MS: i64 = 24 * 60 * 60 * 1000;

/// Lines of progress that a build may be ahead.
const PROGRESS_LINES: usize = 64;

/// What an image is made from.
#[derive(Clone, Debug)]
pub enum ImageFromWhat {
    /// The node builds it.
    Recipe(ImageRecipe),
    /// It was uploaded as a root file system.
    Source(ImageId),
}

/// Tries of a commit that others are faster at.
const TRIES_MAX: usize = 16;

/// Why an image did not become the account's.
#[derive(Debug, thiserror::Error)]
pub enum KeepError {
    /// The account may have no more.
    #[error(transparent)]
    Rule(#[from] RuleError),
    /// The node did not make it.
    #[error(transparent)]
    Nodes(#[from] NodesError),
    /// The store did not serve.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// There is no such upload.
    #[error("`from.source` is no uploaded root file system: upload it with `?kind=root`")]
    NoSource,
}

impl KeepError {
    fn code(&self) -> ErrorCode {
        match self {
            Self::Rule(_) | Self::Nodes(NodesError::OverQuota { .. }) => ErrorCode::QuotaExceeded,
            Self::Nodes(NodesError::DiskFull { .. }) | Self::Store(StoreError::DiskFull) => {
                ErrorCode::DiskFull
            }
            Self::Nodes(NodesError::Invalid { .. } | NodesError::NotFound { .. })
            | Self::NoSource => ErrorCode::Invalid,
            Self::Nodes(NodesError::Timeout { .. }) => ErrorCode::Timeout,
            Self::Nodes(NodesError::Busy { .. }) => ErrorCode::TooManyRequests,
            Self::Nodes(_) | Self::Store(_) => ErrorCode::Internal,
        }
    }
}

impl From<CommitError> for KeepError {
    fn from(error: CommitError) -> Self {
        match error {
            // Whoever was faster took the upload away.
            CommitError::Conflict { .. } => Self::NoSource,
            CommitError::Store(error) => Self::Store(error),
        }
    }
}

/// What an account's images take.
#[derive(Debug)]
struct Ledger {
    held: BTreeMap<ImageId, u64>,
    most: u64,
}

impl Ledger {
    fn used(&self) -> u64 {
        self.held.values().sum()
    }

    /// How large a new image may be.
    fn left(&self) -> u64 {
        self.most.saturating_sub(self.used())
    }

    /// Whether the account may have `info` besides.
    fn admit(&self, info: &ImageInfo) -> Result<(), RuleError> {
        if self.held.contains_key(&info.id) || self.used() + info.bytes <= self.most {
            return Ok(());
        }
        Err(self.refusal(Some(info.bytes)))
    }

    fn refusal(&self, more: Option<u64>) -> RuleError {
        let (used, most) = (self.used(), self.most);
        RuleError::ImageBytes { used, more, most }
    }

    /// What the node said of a new image, with this account's figures.
    fn refused(&self, error: NodesError) -> KeepError {
        match error {
            NodesError::OverQuota { bytes } => self.refusal(Some(bytes)).into(),
            other => other.into(),
        }
    }
}

/// Why a collection failed.
#[derive(Debug, thiserror::Error)]
pub enum CollectError {
    /// What is in use is not known.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The node did not do it.
    #[error(transparent)]
    Nodes(#[from] NodesError),
}

impl Converge {
    /// Begins to build an image; answers the operation.
    ///
    /// # Errors
    /// When it may not begin.
    pub async fn build_image(
        &self,
        account: &AccountName,
        name: &ImageName,
        from: ImageFromWhat,
        repeatable: Option<&Repeatable>,
    ) -> Result<String, DeployError> {
        let id = loop {
            if let Some(repeatable) = repeatable
                && let Some(operation) = self.earlier(account, repeatable).await?
            {
                return Ok(operation);
            }
            let id = next_id(&*self.inner.chance);
            let record = Operations::record("image_build", name.as_str(), None, self.now_ms());
            let key = operation_key(account, &id);
            let mut begin = Transaction::default().put(key, encode(&record));
            if let Some(repeatable) = repeatable {
                begin = self.remember(account, begin, repeatable, &id);
            }
            self.inner.operations.begin(account, &id, record.clone());
            match self.inner.store.commit(begin).await {
                Ok(_) => break id,
                Err(error) => {
                    self.inner.operations.end(account, &id, None);
                    if let CommitError::Store(error) = error {
                        return Err(error.into());
                    }
                }
            }
        };
        let (converge, account, name) = (self.clone(), account.clone(), name.clone());
        let operation = id.clone();
        tokio::spawn(async move {
            let outcome = converge.made(&account, &name, from, &operation).await;
            let finished = converge
                .inner
                .operations
                .finish(&account, &operation, outcome)
                .await;
            if let Err(error) = finished {
                let error = chain(&error);
                tracing::error!(error, "the end of a build cannot be written down");
            }
        });
        Ok(id)
    }

    async fn made(
        &self,
        account: &AccountName,
        name: &ImageName,
        from: ImageFromWhat,
        operation: &str,
    ) -> Outcome {
        let made = match from {
            ImageFromWhat::Recipe(recipe) => self.built(account, name, recipe, operation).await,
            ImageFromWhat::Source(id) => self.uploaded(account, name, id).await,
        };
        match made {
            Ok(id) => Outcome::Succeeded {
                result: id.to_string(),
            },
            Err(error) => Outcome::Failed {
                code: error.code(),
                message: match error {
                    KeepError::Store(error) => chain(&error),
                    other => other.to_string(),
                },
            },
        }
    }

    async fn built(
        &self,
        account: &AccountName,
        name: &ImageName,
        recipe: ImageRecipe,
        operation: &str,
    ) -> Result<ImageId, KeepError> {
        let origin = match recipe {
            ImageRecipe::Base { .. } => ImageOrigin::Base,
            ImageRecipe::Packages { .. } => ImageOrigin::Own,
        };
        let ledger = self.ledger(account).await?;
        let (progress, mut lines) = mpsc::channel(PROGRESS_LINES);
        let left = ledger.left();
        if left == 0 {
            return Err(ledger.refusal(None).into());
        }
        let build = self.inner.nodes.build_image(recipe, left, progress);
        let tell = async {
            while let Some(line) = lines.recv().await {
                self.inner.operations.step(account, operation, &line);
            }
        };
        // Both: the last lines are told even when the build is over first.
        let (built, ()) = tokio::join!(build, tell);
        let info = built.map_err(|error| ledger.refused(error))?;
        let record = ImageRecord {
            id: info.id,
            bytes: info.bytes,
            created_at_ms: self.now_ms(),
            origin,
        };
        let write = Transaction::default().put(image_key(account, name), encode(&record));
        self.keep(account, &info, write).await?;
        Ok(info.id)
    }

    async fn uploaded(
        &self,
        account: &AccountName,
        name: &ImageName,
        id: ImageId,
    ) -> Result<ImageId, KeepError> {
        let from = source_key(account, id);
        for _ in 0..TRIES_MAX {
            let stored = load::<SourceRecord>(&*self.inner.store, &from).await?;
            let stored = stored.filter(|stored| stored.record.kind == ImageKind::Root);
            let stored = stored.ok_or(KeepError::NoSource)?;
            let record = ImageRecord {
                id,
                bytes: stored.record.bytes,
                created_at_ms: self.now_ms(),
                origin: ImageOrigin::Own,
            };
            let write = Transaction::default()
                .when(&from, stored.version)
                .put(image_key(account, name), encode(&record));
            match self.inner.store.commit(write).await {
                Ok(_) => return Ok(id),
                Err(CommitError::Conflict { .. }) => {}
                Err(CommitError::Store(error)) => return Err(error.into()),
            }
        }
        Err(KeepError::NoSource)
    }

    /// Has the node make an image of an upload, and writes down that this account may name it.
    ///
    /// # Errors
    /// [`KeepError`]; what is not written down is nobody's and is collected.
    pub(crate) async fn import(
        &self,
        account: &AccountName,
        kind: ImageKind,
        body: ByteStream,
    ) -> Result<ImageInfo, KeepError> {
        let ledger = self.ledger(account).await?;
        // With nothing left, what the account has already may still be deployed again.
        let imported = self.inner.nodes.import_source(body, kind, ledger.left());
        let info = imported.await.map_err(|error| ledger.refused(error))?;
        let record = SourceRecord {
            kind,
            bytes: info.bytes,
            entries: info.entries,
            created_at_ms: self.now_ms(),
        };
        let key = source_key(account, info.id);
        let write = Transaction::default().put(key, encode(&record));
        self.keep(account, &info, write).await?;
        Ok(info)
    }

    /// Writes down that an image is the account's, if that may still have it: others of its calls
    /// may have been faster.
    async fn keep(
        &self,
        account: &AccountName,
        info: &ImageInfo,
        write: Transaction,
    ) -> Result<(), KeepError> {
        let _alone = self.inner.image_ledger.lock().await;
        self.ledger(account).await?.admit(info)?;
        self.inner.store.commit(write).await?;
        Ok(())
    }

    /// What the account's names, uploads and releases take, each image once.
    async fn ledger(&self, account: &AccountName) -> Result<Ledger, StoreError> {
        let mut held = BTreeMap::new();
        for entry in every(&*self.inner.store, &sources_of(account)).await? {
            let source: SourceRecord = decode(&entry)?;
            held.extend(id_of(&entry.key).map(|id| (id, source.bytes)));
        }
        for entry in every(&*self.inner.store, &images_of(account)).await? {
            let image: ImageRecord = decode(&entry)?;
            held.insert(image.id, image.bytes);
        }
        for entry in every(&*self.inner.store, &releases_of_account(account)).await? {
            let release: ReleaseRecord = decode(&entry)?;
            held.entry(release.image).or_insert(release.image_bytes);
            if let Some(folder) = release.folder {
                held.entry(folder).or_insert(release.folder_bytes);
            }
        }
        let most = self.inner.config.image_bytes_max;
        Ok(Ledger { held, most })
    }

    /// Removes what nothing needs, every now and then, until control stops: releases that are
    /// forgotten and uploads that were never deployed leave images behind.
    pub(crate) async fn collect_now_and_then(self, mut stopped: watch::Receiver<bool>) {
        loop {
            tokio::select! {
                // An error says that control is gone, which is the same.
                _stop = stopped.wait_for(|stop| *stop) => return,
                () = tokio::time::sleep(self.inner.config.timing.collect) => {}
            }
            match self.collect_images(CollectMode::Remove).await {
                Ok(removed) if removed.is_empty() => {}
                Ok(removed) => tracing::info!(images = removed.len(), "unused images are removed"),
                Err(error) => {
                    tracing::warn!(error = chain(&error), "unused images are not removed");
                }
            }
            match self.collect_snapshots(CollectMode::Remove).await {
                Ok(gone) if gone.is_empty() => {}
                Ok(gone) => tracing::info!(snapshots = gone.len(), "unused snapshots are removed"),
                Err(error) => {
                    tracing::warn!(error = chain(&error), "unused snapshots are not removed");
                }
            }
        }
    }

    /// Removes what no name, no release and no fresh upload names, of all accounts.
    ///
    /// # Errors
    /// When what is in use is not known, or a file cannot be removed.
    pub async fn collect_images(&self, mode: CollectMode) -> Result<Vec<ImageInfo>, CollectError> {
        let mut keep = BTreeSet::new();
        let old = self.now_ms().saturating_sub(SOURCE_KEPT_MS);
        let mut forget = Transaction::default();
        let mut forgotten = Vec::new();
        // Uploads first: one that becomes a release meanwhile is found as a release.
        for entry in every(&*self.inner.store, SOURCES).await? {
            let source: SourceRecord = decode(&entry).map_err(StoreError::from)?;
            if source.created_at_ms < old {
                forget = forget.when(&entry.key, entry.version).delete(&entry.key);
                forgotten.extend(id_of(&entry.key));
            } else {
                keep.extend(id_of(&entry.key));
            }
        }
        if mode == CollectMode::Remove && !forgotten.is_empty() {
            match self.inner.store.commit(forget).await {
                Ok(_) => {}
                // One was uploaded again meanwhile: the next collection looks again.
                Err(CommitError::Conflict { .. }) => keep.extend(forgotten),
                Err(CommitError::Store(error)) => return Err(error.into()),
            }
        }
        for entry in every(&*self.inner.store, IMAGES).await? {
            keep.insert(decode::<ImageRecord>(&entry).map_err(StoreError::from)?.id);
        }
        for entry in every(&*self.inner.store, RELEASES).await? {
            let release: ReleaseRecord = decode(&entry).map_err(StoreError::from)?;
            keep.insert(release.image);
            keep.extend(release.folder);
        }
        Ok(self.inner.nodes.collect_images(keep, mode).await?)
    }
}

#[cfg(test)]
mod tests;
