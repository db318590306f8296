//! Calls that are sent again: what the first one with a client's key made is what all of them did.
//!
//! Used by every call that makes something. The key is written down in the commit that makes it, so
//! that a crash leaves both or neither.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};

use spore_api::limits::IDEMPOTENCY_S;
use spore_api::name::AccountName;

use super::Converge;
use crate::store::record::idempotency::{IdempotencyRecord, idempotency_key};
use crate::store::record::{encode, load};
use crate::store::{CommitError, StoreError, Transaction};

/// The client's key of a create, so that a repetition is the same create.
#[derive(Clone, Debug)]
pub struct Repeatable {
    /// What the client sent.
    pub key: String,
    /// Of method, path and body.
    pub fingerprint: String,
}

/// Why a call with a key is not done.
#[derive(Debug, thiserror::Error)]
pub enum RepeatError {
    /// The key was used for another call.
    #[error("the Idempotency-Key was used for another call: use a new key for a new call")]
    Mismatch,
    /// The first one is not over.
    #[error("the first call with this Idempotency-Key is under way: try again in a moment")]
    UnderWay,
    /// The store did not serve.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// The keys of calls that are under way and are answered only when they are over.
#[derive(Debug, Default)]
pub(super) struct Repeats(Mutex<BTreeSet<String>>);

/// A call alone with its key, until it is dropped.
pub(super) struct Alone {
    repeats: Arc<Repeats>,
    key: String,
}

impl Drop for Alone {
    fn drop(&mut self) {
        let mut all = self
            .repeats
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        all.remove(&self.key);
    }
}

impl Converge {
    /// Keeps other calls with this key away.
    ///
    /// # Errors
    /// [`RepeatError::UnderWay`] while one is there.
    pub(super) fn alone(
        &self,
        account: &AccountName,
        repeatable: &Repeatable,
    ) -> Result<Alone, RepeatError> {
        let repeats = Arc::clone(&self.inner.repeats);
        let key = idempotency_key(account, &repeatable.key);
        let mut all = repeats.0.lock().unwrap_or_else(PoisonError::into_inner);
        let is_first = all.insert(key.clone());
        drop(all);
        match is_first {
            true => Ok(Alone { repeats, key }),
            false => Err(RepeatError::UnderWay),
        }
    }

    /// Writes a client's key down with what it makes.
    pub(crate) fn remember(
        &self,
        account: &AccountName,
        transaction: Transaction,
        repeatable: &Repeatable,
        made: &str,
    ) -> Transaction {
        let key = idempotency_key(account, &repeatable.key);
        let record = IdempotencyRecord {
            fingerprint: repeatable.fingerprint.clone(),
            operation: made.to_owned(),
            created_at_ms: self.now_ms(),
        };
        transaction.when(&key, 0).put(&key, encode(&record))
    }

    /// Nothing is left of what a call made: the next one with its key makes it anew.
    pub(super) async fn forget_key(&self, account: &AccountName, repeatable: &Repeatable) {
        let key = idempotency_key(account, &repeatable.key);
        if let Err(error) = self.commit_alone(Transaction::default().delete(key)).await {
            // A repetition is told that nothing is there.
            tracing::warn!(%account, %error, "the key of a call that failed is left");
        }
    }

    /// What an earlier call with this key began or made, if it was the same call.
    ///
    /// # Errors
    /// [`RepeatError::Mismatch`] when it was another.
    pub(crate) async fn earlier(
        &self,
        account: &AccountName,
        repeatable: &Repeatable,
    ) -> Result<Option<String>, RepeatError> {
        let key = idempotency_key(account, &repeatable.key);
        let Some(stored) = load::<IdempotencyRecord>(&*self.inner.store, &key).await? else {
            return Ok(None);
        };
        let age_ms = self.now_ms().saturating_sub(stored.record.created_at_ms);
        let kept_ms = i64::try_from(IDEMPOTENCY_S * 1000).unwrap_or(i64::MAX);
        if age_ms > kept_ms {
            let forget = Transaction::default()
                .when(&key, stored.version)
                .delete(&key);
            return match self.inner.store.commit(forget).await {
                Ok(_) | Err(CommitError::Conflict { .. }) => Ok(None),
                Err(CommitError::Store(error)) => Err(error.into()),
            };
        }
        if stored.record.fingerprint != repeatable.fingerprint {
            return Err(RepeatError::Mismatch);
        }
        Ok(Some(stored.record.operation))
    }
}
