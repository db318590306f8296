//! A store in memory that refuses or holds up what it is told to.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use async_trait::async_trait;
use tokio::sync::watch;

use crate::store::memory::MemoryStore;
use crate::store::record::app::APPS;
use crate::store::record::sandbox::SANDBOXES;
use crate::store::{CommitError, Entry, Range, Store, StoreError, Transaction, Watch, Write};

/// A store whose commits can be refused, or held up while they remove an app or a sandbox.
#[derive(Debug)]
pub(crate) struct MoodyStore {
    pub(crate) store: MemoryStore,
    pub(crate) is_full: AtomicBool,
    pub(crate) holds_removals: watch::Sender<bool>,
}

impl MoodyStore {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            store: MemoryStore::default(),
            is_full: AtomicBool::new(false),
            holds_removals: watch::Sender::new(false),
        })
    }

    pub(crate) fn fills(&self, is_full: bool) {
        self.is_full.store(is_full, Ordering::Relaxed);
    }
}

#[async_trait]
impl Store for MoodyStore {
    async fn get(&self, key: &str) -> Result<Option<Entry>, StoreError> {
        self.store.get(key).await
    }

    async fn list(&self, range: Range) -> Result<Vec<Entry>, StoreError> {
        self.store.list(range).await
    }

    async fn count(&self, prefix: &str) -> Result<u64, StoreError> {
        self.store.count(prefix).await
    }

    async fn commit(&self, transaction: Transaction) -> Result<u64, CommitError> {
        let is_held = |key: &str| key.starts_with(APPS) || key.starts_with(SANDBOXES);
        let removes = |write: &Write| matches!(write, Write::Delete { key } if is_held(key));
        if transaction.writes.iter().any(removes) {
            let mut held = self.holds_removals.subscribe();
            drop(held.wait_for(|held| !*held).await);
        }
        if self.is_full.load(Ordering::Relaxed) {
            return Err(CommitError::Store(StoreError::DiskFull));
        }
        self.store.commit(transaction).await
    }

    fn watch(&self, prefix: &str) -> Watch {
        self.store.watch(prefix)
    }
}
