//! Leases: at most one owner of a name at a time, with an end.
//!
//! For several control processes over one store. Works on every engine by commit with compare;
//! the owner must stop acting before its lease ends, by its own clock.

use core::time::Duration;

use serde::{Deserialize, Serialize};

use super::record::{Record, decode, encode};
use super::{CommitError, Store, StoreError, Transaction};

/// Who has a name until when.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseRecord {
    /// Chosen by the owner, unique to its process.
    pub owner: String,
    /// Milliseconds since the Unix epoch.
    pub ends_at_ms: i64,
}

impl Record for LeaseRecord {
    const KIND: &'static str = "lease";
    const VERSION: u32 = 1;
}

/// What asking for a lease gave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Leased {
    /// It is ours until then, in milliseconds since the Unix epoch.
    Ours {
        /// When it ends unless renewed.
        ends_at_ms: i64,
    },
    /// Somebody else has it.
    Theirs(LeaseRecord),
}

/// Takes or renews the lease of `name` for `owner`, from `now_ms` on.
///
/// # Errors
/// When the store cannot serve.
pub async fn take(
    store: &dyn Store,
    name: &str,
    owner: &str,
    span: Duration,
    now_ms: i64,
) -> Result<Leased, StoreError> {
    let key = key(name);
    loop {
        let entry = store.get(&key).await?;
        let version = entry.as_ref().map_or(0, |entry| entry.version);
        if let Some(entry) = entry {
            let held: LeaseRecord = decode(&entry)?;
            if held.owner != owner && held.ends_at_ms > now_ms {
                return Ok(Leased::Theirs(held));
            }
        }
        let span_ms = i64::try_from(span.as_millis()).unwrap_or(i64::MAX);
        let ends_at_ms = now_ms.saturating_add(span_ms);
        let record = LeaseRecord {
            owner: owner.to_owned(),
            ends_at_ms,
        };
        let transaction = Transaction::default()
            .when(&key, version)
            .put(&key, encode(&record));
        match store.commit(transaction).await {
            Ok(_) => return Ok(Leased::Ours { ends_at_ms }),
            Err(CommitError::Conflict { .. }) => {}
            Err(CommitError::Store(error)) => return Err(error),
        }
    }
}

/// Gives the lease back, if `owner` has it.
///
/// # Errors
/// When the store cannot serve.
pub async fn give_back(store: &dyn Store, name: &str, owner: &str) -> Result<(), StoreError> {
    let key = key(name);
    let Some(entry) = store.get(&key).await? else {
        return Ok(());
    };
    let held: LeaseRecord = decode(&entry)?;
    if held.owner != owner {
        return Ok(());
    }
    let transaction = Transaction::default()
        .when(&key, entry.version)
        .delete(&key);
    match store.commit(transaction).await {
        // A conflict means that somebody else took it: it is not ours to give back.
        Ok(_) | Err(CommitError::Conflict { .. }) => Ok(()),
        Err(CommitError::Store(error)) => Err(error),
    }
}

fn key(name: &str) -> String {
    format!("lease/{name}")
}
