//! The small mutable truth: accounts, apps, releases, secrets (as ciphertext), operations.
//!
//! Used by the API and the reconcilers. A [`Store`] is a small key-value contract: get, list by
//! prefix, commit with compare, watch, lease. Every engine passes one conformance suite. Keys and
//! records of a noun live in one file each under [`record`]; no other module writes a key.
//!
//! A commit is atomic and durable when it returns; a crash leaves all of it or nothing. Nothing
//! here is written when an app wakes.

use std::sync::Arc;

use async_trait::async_trait;

pub mod embedded;
pub mod lease;
pub mod memory;
pub mod migrate;
pub mod record;
mod watch;

#[cfg(test)]
mod conformance;
#[cfg(test)]
mod crash;

pub use watch::{Change, Watch};

/// The most bytes of a key.
pub const KEY_BYTES_MAX: usize = 512;

/// The most bytes of a value: a release with the longest command fits.
pub const VALUE_BYTES_MAX: usize = 16 * 1024 * 1024;

/// The most entries of one answer.
pub const LIST_ITEMS_MAX: usize = 10_000;

/// A store that several parts of control share.
pub type SharedStore = Arc<dyn Store>;

/// Get, list, commit with compare, watch.
#[async_trait]
pub trait Store: Send + Sync + core::fmt::Debug + 'static {
    /// The entry of `key`, or `None` when there is none.
    ///
    /// # Errors
    /// When the engine cannot read.
    async fn get(&self, key: &str) -> Result<Option<Entry>, StoreError>;

    /// Entries in the order of their keys.
    ///
    /// # Errors
    /// When the engine cannot read.
    async fn list(&self, range: Range) -> Result<Vec<Entry>, StoreError>;

    /// How many keys begin with `prefix`.
    ///
    /// # Errors
    /// When the engine cannot read.
    async fn count(&self, prefix: &str) -> Result<u64, StoreError>;

    /// Makes all changes of `transaction` iff all its conditions hold; durable on return. Answers
    /// the revision that the changed entries have.
    ///
    /// # Errors
    /// [`CommitError::Conflict`] when a condition does not hold: nothing was changed.
    async fn commit(&self, transaction: Transaction) -> Result<u64, CommitError>;

    /// Changes to keys that begin with `prefix`, from now on.
    fn watch(&self, prefix: &str) -> Watch;
}

/// A stored value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its key.
    pub key: String,
    /// The revision of the commit that wrote it last: never 0, never used twice.
    pub version: u64,
    /// What was written.
    pub value: Vec<u8>,
}

/// Which entries to list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Range {
    /// Keys begin with it.
    pub prefix: String,
    /// Only keys behind this one; `None` begins at the first.
    pub after: Option<String>,
    /// The most entries wanted.
    pub limit: usize,
    /// In which order.
    pub order: Order,
}

/// The order of a list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// From the least key on.
    Rising,
    /// From the greatest key on; `after` means before.
    Falling,
}

/// Every entry that begins with `prefix`, however many answers that takes.
///
/// # Errors
/// When the engine cannot read.
pub async fn every(store: &dyn Store, prefix: &str) -> Result<Vec<Entry>, StoreError> {
    let mut all: Vec<Entry> = Vec::new();
    loop {
        let range = Range {
            prefix: prefix.to_owned(),
            after: all.last().map(|entry| entry.key.clone()),
            limit: LIST_ITEMS_MAX,
            order: Order::Rising,
        };
        let entries = store.list(range).await?;
        let whole = entries.len() < LIST_ITEMS_MAX;
        all.extend(entries);
        if whole {
            return Ok(all);
        }
    }
}

/// Conditions and changes that are made together or not at all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Transaction {
    /// Each must hold.
    pub conditions: Vec<Condition>,
    /// Made in order.
    pub writes: Vec<Write>,
}

/// What must hold for a commit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Condition {
    /// Which key.
    pub key: String,
    /// [`Entry::version`] that it must have; 0 means that there must be no entry.
    pub version: u64,
}

/// One change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Write {
    /// Writes a value.
    Put {
        /// Where.
        key: String,
        /// What.
        value: Vec<u8>,
    },
    /// Removes an entry; nothing happens when there is none.
    Delete {
        /// Which.
        key: String,
    },
}

impl Transaction {
    /// Adds the condition that `key` has `version` (0: is absent).
    #[must_use]
    pub fn when(mut self, key: impl Into<String>, version: u64) -> Self {
        self.conditions.push(Condition {
            key: key.into(),
            version,
        });
        self
    }

    /// Adds a write.
    #[must_use]
    pub fn put(mut self, key: impl Into<String>, value: Vec<u8>) -> Self {
        self.writes.push(Write::Put {
            key: key.into(),
            value,
        });
        self
    }

    /// Adds a removal.
    #[must_use]
    pub fn delete(mut self, key: impl Into<String>) -> Self {
        self.writes.push(Write::Delete { key: key.into() });
        self
    }

    fn check(&self) -> Result<(), StoreError> {
        for write in &self.writes {
            let (key, bytes) = match write {
                Write::Put { key, value } => (key, value.len()),
                Write::Delete { key } => (key, 0),
            };
            if key.len() > KEY_BYTES_MAX || bytes > VALUE_BYTES_MAX {
                return Err(StoreError::TooLarge {
                    key: key.chars().take(80).collect(),
                    bytes,
                });
            }
        }
        Ok(())
    }
}

/// Why the store could not serve.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Another process has the file open.
    #[error(
        "the store {path} is in use by another Spore daemon: stop that one (`spore down`), or give \
         this one another folder"
    )]
    InUse {
        /// The file.
        path: String,
    },
    /// The file cannot be opened.
    #[error("the store {path} cannot be opened; look at its owner, its mode and the disk")]
    Open {
        /// The file.
        path: String,
        /// What the engine said.
        #[source]
        source: Box<redb::Error>,
    },
    /// Reading or writing failed.
    #[error("the store failed to {doing}; look at the disk and the system's log")]
    Engine {
        /// What was tried.
        doing: &'static str,
        /// What the engine said.
        #[source]
        source: Box<redb::Error>,
    },
    /// The disk is full: nothing was changed.
    #[error("the disk of the store is full: free some space, then try again")]
    DiskFull,
    /// It was written by a newer Spore.
    #[error(
        "the store has format {found}, and this Spore knows formats up to {known}: start the newer \
         Spore that wrote it, or restore a backup made before the upgrade"
    )]
    Newer {
        /// What was found.
        found: u64,
        /// The newest that this build knows.
        known: u64,
    },
    /// A value or key is over its limit.
    #[error("the entry `{key}` of {bytes} bytes is over the store's limits")]
    TooLarge {
        /// Cut at 80 characters.
        key: String,
        /// Of the value.
        bytes: usize,
    },
    /// A record cannot be read.
    #[error("a record of the store is not readable")]
    Record(#[from] record::RecordError),
    /// The thread that served the call ended.
    #[error("the store is stopping")]
    Stopping,
}

/// Why a commit was not made.
#[derive(Debug, thiserror::Error)]
pub enum CommitError {
    /// A condition did not hold: somebody else was faster.
    #[error("the entry `{key}` was changed by somebody else at the same time")]
    Conflict {
        /// Whose condition.
        key: String,
    },
    /// The store could not serve.
    #[error(transparent)]
    Store(#[from] StoreError),
}
