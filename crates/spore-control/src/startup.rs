//! What is put in order before anything runs: after a crash nothing is half-done.

use spore_api::limits::IDEMPOTENCY_S;
use spore_api::name::AccountName;

use crate::converge::Converge;
use crate::store::record::decode;
use crate::store::record::idempotency::{IdempotencyRecord, KEYS};
use crate::store::{CommitError, StoreError, Transaction, every};

/// How long an operation that is over can be read: a week.
const OPERATION_KEPT_MS: i64 = 7 * 24 * 60 * 60 * 1000;

/// Ends interrupted operations, forgets old ones, and makes the default account.
pub(crate) async fn prepare(converge: &Converge, account: &AccountName) -> Result<(), CommitError> {
    converge.ensure_account(account).await?;
    let forget_before_ms = converge.now_ms().saturating_sub(OPERATION_KEPT_MS);
    // Releases first: should this be interrupted too, the operation is still there to begin with.
    clear_tried(converge).await?;
    let operations = &converge.inner.operations;
    for (account, operation) in operations.after_restart(forget_before_ms).await? {
        let (kind, target) = (operation.kind, operation.target);
        tracing::warn!(%account, kind, target, "an operation was interrupted by the last end");
    }
    forget_keys(converge).await
}

/// No release is being tried: what an earlier daemon tried has failed.
async fn clear_tried(converge: &Converge) -> Result<(), CommitError> {
    for (app, record) in converge.all_apps().await? {
        let Some(operation) = record.deploying else {
            continue;
        };
        let message = "the daemon ended while this release was tried; deploy again";
        let nothing = Transaction::default();
        let failed = converge
            .no_longer_tried(&app, &operation, message, nothing)
            .await?;
        converge.inner.store.commit(failed).await?;
    }
    Ok(())
}

async fn forget_keys(converge: &Converge) -> Result<(), CommitError> {
    let kept_ms = i64::try_from(IDEMPOTENCY_S * 1000).unwrap_or(i64::MAX);
    let before = converge.now_ms().saturating_sub(kept_ms);
    let entries = every(&*converge.inner.store, KEYS).await?;
    let mut forget = Transaction::default();
    for entry in entries {
        let record: IdempotencyRecord = decode(&entry).map_err(StoreError::from)?;
        if record.created_at_ms < before {
            forget = forget.delete(entry.key);
        }
    }
    if !forget.writes.is_empty() {
        converge.inner.store.commit(forget).await?;
    }
    Ok(())
}
