//! Images: built as operations, collected by what still names them.

use std::collections::BTreeSet;

use spore_api::error::ErrorCode;
use spore_api::name::{AccountName, ImageName};
use spore_wire::cause::chain;
use spore_wire::id::ImageId;
use spore_wire::node::{ImageInfo, ImageKind, ImageRecipe};
use tokio::sync::mpsc;

use super::Converge;
use super::deploy::{DeployError, Repeatable};
use crate::clock::next_id;
use crate::nodes::{CollectMode, NodesError};
use crate::operations::{Operations, Outcome};
use crate::store::record::image::{IMAGES, ImageRecord, image_key};
use crate::store::record::operation::operation_key;
use crate::store::record::release::{RELEASES, ReleaseRecord};
use crate::store::record::source::{SOURCES, SourceRecord, id_of, source_key};
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

/// Why a collection failed.
#[derive(Debug, thiserror::Error)]
pub enum CollectError {
    /// What is in use is not known.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A record could not be removed.
    #[error(transparent)]
    Commit(#[from] CommitError),
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
        let failed = |code, message: String| Outcome::Failed { code, message };
        let made = match from {
            ImageFromWhat::Recipe(recipe) => self.built(account, recipe, operation).await,
            ImageFromWhat::Source(id) => self.uploaded(account, id).await,
        };
        let (id, bytes) = match made {
            Ok(made) => made,
            Err((code, message)) => return failed(code, message),
        };
        let record = ImageRecord {
            id,
            bytes,
            created_at_ms: self.now_ms(),
        };
        let write = Transaction::default().put(image_key(account, name), encode(&record));
        match self.inner.store.commit(write).await {
            Ok(_) => Outcome::Succeeded {
                result: id.to_string(),
            },
            Err(error) => failed(ErrorCode::Internal, chain(&error)),
        }
    }

    async fn built(
        &self,
        account: &AccountName,
        recipe: ImageRecipe,
        operation: &str,
    ) -> Result<(ImageId, u64), (ErrorCode, String)> {
        let (progress, mut lines) = mpsc::channel(PROGRESS_LINES);
        let build = self.inner.nodes.build_image(recipe, progress);
        let tell = async {
            while let Some(line) = lines.recv().await {
                self.inner.operations.step(account, operation, &line);
            }
        };
        // Both: the last lines are told even when the build is over first.
        let (built, ()) = tokio::join!(build, tell);
        let info = built.map_err(|error| {
            let code = match error {
                NodesError::DiskFull { .. } => ErrorCode::DiskFull,
                NodesError::Invalid { .. } | NodesError::NotFound { .. } => ErrorCode::Invalid,
                NodesError::Timeout { .. } => ErrorCode::Timeout,
                _ => ErrorCode::Internal,
            };
            (code, error.to_string())
        })?;
        Ok((info.id, info.bytes))
    }

    async fn uploaded(
        &self,
        account: &AccountName,
        id: ImageId,
    ) -> Result<(ImageId, u64), (ErrorCode, String)> {
        let stored = load::<SourceRecord>(&*self.inner.store, &source_key(account, id)).await;
        match stored {
            Ok(Some(stored)) if stored.record.kind == ImageKind::Root => {
                Ok((id, stored.record.bytes))
            }
            Ok(_) => {
                let message = "`from.source` is no uploaded root file system: upload it with \
                               `?kind=root`";
                Err((ErrorCode::Invalid, message.to_owned()))
            }
            Err(error) => Err((ErrorCode::Internal, chain(&error))),
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
        // Uploads first: one that becomes a release meanwhile is found as a release.
        for entry in every(&*self.inner.store, SOURCES).await? {
            let source: SourceRecord = decode(&entry).map_err(StoreError::from)?;
            if source.created_at_ms < old {
                forget = forget.when(&entry.key, entry.version).delete(&entry.key);
            } else {
                keep.extend(id_of(&entry.key));
            }
        }
        if mode == CollectMode::Remove && !forget.writes.is_empty() {
            self.inner.store.commit(forget).await?;
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
