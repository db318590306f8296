//! A store in memory: for simulations, where a crash is a decision of the plan.
//!
//! Used by tests only. It holds to the same suite as the durable one and keeps nothing.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use async_trait::async_trait;

use super::watch::Publisher;
use super::{
    CommitError, Entry, LIST_ITEMS_MAX, Order, Range, Store, StoreError, Transaction, Watch, Write,
};

/// Entries in a sorted map.
#[derive(Debug)]
pub struct MemoryStore {
    inner: Mutex<Inner>,
    publisher: Publisher,
}

#[derive(Debug, Default)]
struct Inner {
    revision: u64,
    entries: BTreeMap<String, (u64, Vec<u8>)>,
}

impl Default for MemoryStore {
    fn default() -> Self {
        Self {
            inner: Mutex::default(),
            publisher: Publisher::new(),
        }
    }
}

impl MemoryStore {
    fn inner(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl Store for MemoryStore {
    async fn get(&self, key: &str) -> Result<Option<Entry>, StoreError> {
        let inner = self.inner();
        Ok(inner.entries.get(key).map(|(version, value)| Entry {
            key: key.to_owned(),
            version: *version,
            value: value.clone(),
        }))
    }

    async fn list(&self, range: Range) -> Result<Vec<Entry>, StoreError> {
        let inner = self.inner();
        let within = inner
            .entries
            .range(range.prefix.clone()..)
            .take_while(|(key, _)| key.starts_with(&range.prefix));
        let entry = |(key, (version, value)): (&String, &(u64, Vec<u8>))| Entry {
            key: key.clone(),
            version: *version,
            value: value.clone(),
        };
        let mut all: Vec<_> = within.map(entry).collect();
        if range.order == Order::Falling {
            all.reverse();
        }
        if let Some(after) = &range.after {
            all.retain(|entry| match range.order {
                Order::Rising => entry.key > *after,
                Order::Falling => entry.key < *after,
            });
        }
        all.truncate(range.limit.min(LIST_ITEMS_MAX));
        Ok(all)
    }

    async fn count(&self, prefix: &str) -> Result<u64, StoreError> {
        let inner = self.inner();
        let from = inner.entries.range(prefix.to_owned()..);
        Ok(from.take_while(|(key, _)| key.starts_with(prefix)).count() as u64)
    }

    async fn commit(&self, transaction: Transaction) -> Result<u64, CommitError> {
        transaction.check()?;
        let mut inner = self.inner();
        for condition in &transaction.conditions {
            let version = inner.entries.get(&condition.key).map_or(0, |e| e.0);
            if version != condition.version {
                return Err(CommitError::Conflict {
                    key: condition.key.clone(),
                });
            }
        }
        inner.revision += 1;
        let version = inner.revision;
        for write in &transaction.writes {
            match write {
                Write::Put { key, value } => {
                    inner.entries.insert(key.clone(), (version, value.clone()));
                }
                Write::Delete { key } => {
                    inner.entries.remove(key);
                }
            }
        }
        self.publisher.publish(&transaction, version);
        Ok(version)
    }

    fn watch(&self, prefix: &str) -> Watch {
        self.publisher.watch(prefix)
    }
}
