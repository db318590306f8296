//! Operations: looked at, or waited for.

use core::time::Duration;

use axum::Json as Answer;
use axum::extract::{Path, State};
use http::StatusCode;
use spore_api::error::{ApiError, ErrorCode};
use spore_api::name::AccountName;
use spore_api::operation::{Operation, OperationQuery, OperationState, OperationStep};

use super::body::Query;
use super::error::Fault;
use super::{Caller, Shared};
use crate::clock::rfc3339;
use crate::store::record::operation::{OperationRecord, StoredOperationState};

/// The longest a call may wait.
const WAIT_MS_MAX: u64 = 30_000;

/// Shows an operation, as soon as it is newer than `after` or the wait is over.
#[utoipa::path(get, path = "/api/v1/operations/{id}", tag = "operations",
    params(("id" = String, Path), OperationQuery),
    responses((status = 200, body = Operation)))]
pub(super) async fn show(
    State(api): State<Shared>,
    caller: Caller,
    Path(id): Path<String>,
    Query(query): Query<OperationQuery>,
) -> Result<Answer<Operation>, Fault> {
    let wait_ms = query.wait_ms.unwrap_or(0);
    if wait_ms > WAIT_MS_MAX {
        let message = format!("`wait_ms` is {wait_ms}: at most {WAIT_MS_MAX} are allowed");
        return Err(Fault::new(ErrorCode::Invalid, message));
    }
    let wait = Duration::from_millis(wait_ms);
    tokio::select! {
        operation = find(&api, &caller.account, &id, query.after.unwrap_or(0), wait) => operation,
        () = super::stopping(api.stopped.clone()) => {
            let message = "the daemon is stopping: ask again in a moment";
            Err(Fault::new(ErrorCode::Stopping, message))
        }
    }
}

/// The answer to a call that began an operation.
pub(super) async fn running(
    api: &Shared,
    account: &AccountName,
    id: &str,
) -> Result<(StatusCode, Answer<Operation>), Fault> {
    let operation = find(api, account, id, 0, Duration::ZERO).await?;
    Ok((StatusCode::ACCEPTED, operation))
}

async fn find(
    api: &Shared,
    account: &AccountName,
    id: &str,
    after: u64,
    wait: Duration,
) -> Result<Answer<Operation>, Fault> {
    let shown: String = id.chars().take(64).collect();
    let missing = || {
        Fault::new(
            ErrorCode::NotFound,
            format!("there is no operation `{shown}`"),
        )
    };
    if id.is_empty() || !id.bytes().all(|b| b.is_ascii_alphanumeric()) || id.len() > 64 {
        return Err(missing());
    }
    let operations = &api.converge.inner.operations;
    let record = operations.wait(account, id, after, wait).await?;
    Ok(Answer(public(id, record.ok_or_else(missing)?)))
}

fn public(id: &str, record: OperationRecord) -> Operation {
    let error = |(code, message): (ErrorCode, String)| ApiError {
        request_id: id.to_owned(),
        ..ApiError::new(code, message)
    };
    let steps = record.steps.into_iter();
    Operation {
        id: id.to_owned(),
        kind: record.kind,
        target: record.target,
        state: match record.state {
            StoredOperationState::Running => OperationState::Running,
            StoredOperationState::Succeeded => OperationState::Succeeded,
            StoredOperationState::Failed => OperationState::Failed,
        },
        steps: steps.map(|(text, ms)| OperationStep { text, ms }).collect(),
        revision: record.revision,
        error: record.error.map(error),
        result: record.result,
        created_at: rfc3339(record.created_at_ms),
    }
}
