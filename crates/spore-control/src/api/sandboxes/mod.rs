//! Sandboxes: forked, listed, shown, used, brought back, removed.

use axum::Json as Answer;
use axum::extract::ws::WebSocketUpgrade;
use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::extract::{Extension, Path, State};
use axum::response::Response;
use http::StatusCode;
use spore_api::error::{ApiError, ErrorCode};
use spore_api::exec::ExecExit;
use spore_api::name::SandboxId;
use spore_api::page::{Page, PageQuery};
use spore_api::sandbox::{Fork, ForkRequest, RollbackSandbox, Sandbox, SandboxState};

use crate::api::body::{Create, Json, Query};
use crate::api::error::Fault;
use crate::api::exec::{Beside, upgraded};
use crate::api::page::page;
use crate::api::status::{boundary_name, boundary_text};
use crate::api::{Caller, Shared};
use crate::clock::{next_id, rfc3339};
use crate::converge::sandbox::{ForkOrder, ForkedOne, Left, SandboxRef, Standing, View};
use crate::nodes::Room;
use crate::store::record::sandbox::{SandboxRecord, names_of, sandbox_key, sandboxes_of};
use crate::store::record::{decode, load};
use crate::store::{Order, StoreError};

/// Opens sandboxes; answers when each is open or has failed. A caller that leaves leaves none.
#[utoipa::path(post, path = "/api/v1/forks", tag = "sandboxes",
    params(("Idempotency-Key" = Option<String>, Header)),
    request_body = ForkRequest, responses((status = 200, body = Vec<Fork>)))]
pub(in crate::api) async fn fork(
    State(api): State<Shared>,
    caller: Caller,
    Extension(left): Extension<Left>,
    body: Create<ForkRequest>,
) -> Result<Answer<Vec<Fork>>, Fault> {
    let (request, repeatable) = (body.value, body.repeatable.as_ref());
    let order = ForkOrder {
        from: request.from,
        count: request.count,
        room: if request.all_or_nothing {
            Room::ForAll
        } else {
            Room::ForSome
        },
        allow_secrets: request.allow_secrets,
    };
    let account = &caller.account;
    let forked = api.converge.fork(account, &order, repeatable, left).await?;
    // Each failure can be found in the log by an id of its own.
    let one = |(id, outcome): ForkedOne| Fork {
        id,
        error: outcome.err().map(|failure| told(&api, failure.into())),
    };
    Ok(Answer(forked.into_iter().map(one).collect()))
}

fn told(api: &Shared, fault: Fault) -> ApiError {
    let request_id = next_id(&*api.converge.inner.chance);
    fault.log(&request_id);
    fault.public(&request_id)
}

/// Lists the account's sandboxes.
#[utoipa::path(get, path = "/api/v1/sandboxes", tag = "sandboxes", params(PageQuery),
    responses((status = 200, body = Page<Sandbox>)))]
pub(in crate::api) async fn list(
    State(api): State<Shared>,
    caller: Caller,
    Query(query): Query<PageQuery>,
) -> Result<Answer<Page<Sandbox>>, Fault> {
    let prefix = sandboxes_of(&caller.account);
    let (entries, next) = page(&api, &query, prefix, Order::Rising).await?;
    let mut items = Vec::with_capacity(entries.len());
    for entry in &entries {
        let Some((account, id)) = names_of(&entry.key) else {
            continue;
        };
        let record: SandboxRecord = decode(entry).map_err(StoreError::from)?;
        let sandbox = SandboxRef { account, id };
        // One that went since the list was read is not shown.
        if let Ok(view) = api.converge.sandbox(&sandbox) {
            items.push(public(&api, sandbox, view, record));
        }
    }
    Ok(Answer(Page { items, next }))
}

/// Shows a sandbox.
#[utoipa::path(get, path = "/api/v1/sandboxes/{sandbox}", tag = "sandboxes",
    params(("sandbox" = String, Path)), responses((status = 200, body = Sandbox)))]
pub(in crate::api) async fn show(
    State(api): State<Shared>,
    caller: Caller,
    Path(id): Path<String>,
) -> Result<Answer<Sandbox>, Fault> {
    shown(&api, named(caller, &id)?).await
}

/// Ends a sandbox; answers when nothing of it is left.
#[utoipa::path(delete, path = "/api/v1/sandboxes/{sandbox}", tag = "sandboxes",
    params(("sandbox" = String, Path)), responses((status = 204)))]
pub(in crate::api) async fn remove(
    State(api): State<Shared>,
    caller: Caller,
    Path(id): Path<String>,
) -> Result<StatusCode, Fault> {
    let sandbox = named(caller, &id)?;
    api.converge.sandbox(&sandbox)?;
    api.converge.close_sandboxes([sandbox]).await;
    Ok(StatusCode::NO_CONTENT)
}

/// Brings a sandbox back to a snapshot, under the same id.
#[utoipa::path(post, path = "/api/v1/sandboxes/{sandbox}/rollback", tag = "sandboxes",
    params(("sandbox" = String, Path)), request_body = RollbackSandbox,
    responses((status = 200, body = Sandbox)))]
pub(in crate::api) async fn rollback(
    State(api): State<Shared>,
    caller: Caller,
    Path(id): Path<String>,
    Json(request): Json<RollbackSandbox>,
) -> Result<Answer<Sandbox>, Fault> {
    let sandbox = named(caller, &id)?;
    api.converge
        .roll_back_sandbox(&sandbox, request.to.as_deref())
        .await?;
    shown(&api, sandbox).await
}

/// Runs a program in a sandbox.
#[utoipa::path(get, path = "/api/v1/sandboxes/{sandbox}/exec", tag = "exec",
    params(("sandbox" = String, Path)), responses((status = 101, body = ExecExit)))]
pub(in crate::api) async fn exec(
    State(api): State<Shared>,
    caller: Caller,
    Path(id): Path<String>,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Result<Response, Fault> {
    let sandbox = named(caller, &id)?;
    api.converge.sandbox(&sandbox)?;
    upgraded(api, Beside::Sandbox(sandbox), upgrade)
}

fn named(caller: Caller, id: &str) -> Result<SandboxRef, Fault> {
    let id: SandboxId = id.parse()?;
    let account = caller.account;
    Ok(SandboxRef { account, id })
}

async fn shown(api: &Shared, sandbox: SandboxRef) -> Result<Answer<Sandbox>, Fault> {
    let view = api.converge.sandbox(&sandbox)?;
    let key = sandbox_key(&sandbox.account, &sandbox.id);
    let stored = load::<SandboxRecord>(&*api.converge.inner.store, &key).await?;
    let stored = stored.ok_or_else(|| {
        let message = "the sandbox was removed just now";
        Fault::new(ErrorCode::NotFound, message)
    })?;
    Ok(Answer(public(api, sandbox, view, stored.record)))
}

fn public(api: &Shared, sandbox: SandboxRef, view: View, record: SandboxRecord) -> Sandbox {
    let (state, ended) = match view.standing {
        Standing::Opening => (SandboxState::Opening, None),
        Standing::Open => (SandboxState::Open, None),
        Standing::RollingBack => (SandboxState::RollingBack, None),
        Standing::Closing | Standing::Gone => (SandboxState::Closing, None),
        Standing::Ended(reason) => (SandboxState::Ended, Some(reason)),
    };
    let host = view
        .vm
        .and_then(|vm| api.converge.host_of_sandbox(&sandbox, vm));
    let host = host.as_ref();
    Sandbox {
        boundary: host.map(|host| boundary_name(host.boundary).to_owned()),
        boundary_text: host.map(|host| boundary_text(host.boundary, &host.hypervisor)),
        id: sandbox.id,
        account: sandbox.account,
        state,
        from: record.from,
        snapshot: view.base.id.to_string(),
        vm: view.vm.map(|vm| vm.to_string()),
        ended,
        created_at: rfc3339(record.created_at_ms),
    }
}

#[cfg(test)]
mod tests;
