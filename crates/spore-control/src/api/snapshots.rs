//! Snapshots: taken, listed, shown, removed, compacted, collected.

use axum::Json as Answer;
use axum::extract::{Path, State};
use spore_api::image::{GcReport, GcRequest};
use spore_api::name::SandboxId;
use spore_api::page::{Page, PageQuery};
use spore_api::snapshot::{
    Checkpoint, RemoveSnapshot, RemovedSnapshots, Snapshot, SnapshotKind, SnapshotResources,
    TakeCheckpoint,
};
use spore_api::span::Ms;
use spore_wire::snapshot::SnapshotKind as Kind;

use super::body::{Create, InPath, Json, Query};
use super::error::Fault;
use super::page::page_of;
use super::{Caller, Shared};
use crate::clock::rfc3339;
use crate::converge::sandbox::SandboxRef;
use crate::converge::snapshot::{CheckpointOf, Shown};
use crate::nodes::{CollectMode, Dependents};

/// Lists the account's snapshots, and the platform's own.
#[utoipa::path(get, path = "/api/v1/snapshots", tag = "snapshots", params(PageQuery),
    responses((status = 200, body = Page<Snapshot>)))]
pub(super) async fn list(
    State(api): State<Shared>,
    caller: Caller,
    Query(query): Query<PageQuery>,
) -> Result<Answer<Page<Snapshot>>, Fault> {
    let all = api.converge.snapshots(&caller.account).await?;
    let key = |shown: &Shown| format!("{}/{}", shown.info.account, shown.info.id);
    let (shown, next) = page_of(&query, all, key)?;
    let items = shown.into_iter().map(public).collect::<Result<_, _>>()?;
    Ok(Answer(Page { items, next }))
}

/// Shows a snapshot.
#[utoipa::path(get, path = "/api/v1/snapshots/{snapshot}", tag = "snapshots",
    params(("snapshot" = String, Path, description = "a tag or an id")),
    responses((status = 200, body = Snapshot)))]
pub(super) async fn show(
    State(api): State<Shared>,
    caller: Caller,
    Path(name): Path<String>,
) -> Result<Answer<Snapshot>, Fault> {
    let shown = api.converge.snapshot_named(&caller.account, &name).await?;
    Ok(Answer(public(shown)?))
}

/// Removes a snapshot with its tags. Refused while another one continues it, unless `cascade`,
/// and while a sandbox needs it.
#[utoipa::path(delete, path = "/api/v1/snapshots/{snapshot}", tag = "snapshots",
    params(("snapshot" = String, Path, description = "a tag or an id"), RemoveSnapshot),
    responses((status = 200, body = RemovedSnapshots)))]
pub(super) async fn remove(
    State(api): State<Shared>,
    caller: Caller,
    Path(name): Path<String>,
    Query(query): Query<RemoveSnapshot>,
) -> Result<Answer<RemovedSnapshots>, Fault> {
    let dependents = if query.cascade {
        Dependents::Remove
    } else {
        Dependents::Keep
    };
    let removed = api
        .converge
        .remove_snapshot(&caller.account, &name, dependents)
        .await?;
    Ok(Answer(RemovedSnapshots {
        removed: removed.iter().map(ToString::to_string).collect(),
    }))
}

/// Makes a snapshot stand alone, so that what it continues can be removed.
#[utoipa::path(post, path = "/api/v1/snapshots/{snapshot}/compact", tag = "snapshots",
    params(("snapshot" = String, Path, description = "a tag or an id")),
    responses((status = 200, body = Snapshot)))]
pub(super) async fn compact(
    State(api): State<Shared>,
    caller: Caller,
    Path(name): Path<String>,
) -> Result<Answer<Snapshot>, Fault> {
    let shown = api
        .converge
        .compact_snapshot(&caller.account, &name)
        .await?;
    Ok(Answer(public(shown)?))
}

/// Removes snapshots that nothing names.
#[utoipa::path(post, path = "/api/v1/snapshots/gc", tag = "snapshots",
    request_body = GcRequest, responses((status = 200, body = GcReport)))]
pub(super) async fn collect(
    State(api): State<Shared>,
    caller: Caller,
    Json(request): Json<GcRequest>,
) -> Result<Answer<GcReport>, Fault> {
    caller.may_collect("snapshots")?;
    let mode = CollectMode::of(request.dry_run);
    let removed = api.converge.collect_snapshots(mode).await?;
    Ok(Answer(GcReport {
        bytes: removed.iter().map(|info| info.bytes).sum(),
        removed: removed.iter().map(|info| info.id.to_string()).collect(),
        dry_run: request.dry_run,
    }))
}

/// Takes a snapshot of an app, which goes on. One that sleeps is woken.
#[utoipa::path(post, path = "/api/v1/apps/{app}/checkpoint", tag = "snapshots",
    params(("app" = String, Path), ("Idempotency-Key" = Option<String>, Header)),
    request_body = TakeCheckpoint,
    responses((status = 200, body = Checkpoint)))]
pub(super) async fn checkpoint_app(
    State(api): State<Shared>,
    InPath(app): InPath,
    body: Create<TakeCheckpoint>,
) -> Result<Answer<Checkpoint>, Fault> {
    checkpoint(&api, &CheckpointOf::App(app), &body).await
}

/// Takes a snapshot of a sandbox, which goes on.
#[utoipa::path(post, path = "/api/v1/sandboxes/{sandbox}/checkpoint", tag = "snapshots",
    params(("sandbox" = String, Path), ("Idempotency-Key" = Option<String>, Header)),
    request_body = TakeCheckpoint,
    responses((status = 200, body = Checkpoint)))]
pub(super) async fn checkpoint_sandbox(
    State(api): State<Shared>,
    caller: Caller,
    Path(id): Path<String>,
    body: Create<TakeCheckpoint>,
) -> Result<Answer<Checkpoint>, Fault> {
    let id: SandboxId = id.parse()?;
    let account = caller.account;
    let of = CheckpointOf::Sandbox(SandboxRef { account, id });
    checkpoint(&api, &of, &body).await
}

async fn checkpoint(
    api: &Shared,
    of: &CheckpointOf,
    body: &Create<TakeCheckpoint>,
) -> Result<Answer<Checkpoint>, Fault> {
    let (take, repeatable) = (&body.value, body.repeatable.as_ref());
    let taken = api
        .converge
        .checkpoint(of, &take.tag, take.allow_secrets, repeatable)
        .await?;
    Ok(Answer(Checkpoint {
        snapshot: public(taken.shown)?,
        pause_ms: Ms(taken.pauses.pause_us),
        frozen_ms: Ms(taken.pauses.frozen_us),
    }))
}

fn public(shown: Shown) -> Result<Snapshot, Fault> {
    let Shown {
        info,
        tags,
        sandboxes,
    } = shown;
    let meta = info.meta.as_ref();
    let made_at_ms = |made_at_s: u64| i64::try_from(made_at_s.saturating_mul(1000)).ok();
    let of = |app: &str| app.strip_prefix("sandbox-").unwrap_or(app).to_owned();
    Ok(Snapshot {
        id: info.id.to_string(),
        account: info.account.parse()?,
        tags,
        kind: meta.map(|meta| match meta.kind {
            Kind::Template => SnapshotKind::Template,
            Kind::Checkpoint => SnapshotKind::Checkpoint,
            Kind::Suspend => SnapshotKind::Suspend,
        }),
        taken_of: meta.and_then(|meta| meta.taken_of.as_ref().map(|owner| of(&owner.app))),
        resources: meta.map(|meta| SnapshotResources {
            cpus: meta.resources.cpus,
            memory_mib: meta.resources.memory_mib,
            disk_mib: meta.resources.disk_mib,
        }),
        parent: meta.and_then(|meta| meta.parent.as_ref().map(|parent| parent.id.to_string())),
        depth: info.depth,
        children: info.children.iter().map(ToString::to_string).collect(),
        sandboxes: sandboxes as u64,
        bytes: info.bytes,
        encrypted: info.encrypted,
        created_at: meta
            .and_then(|meta| made_at_ms(meta.made_at_s))
            .map(rfc3339),
        damage: info.damage,
    })
}
