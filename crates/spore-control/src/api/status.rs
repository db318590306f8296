//! The platform as it is: status, health, version, metrics.

use std::collections::BTreeMap;

use axum::Json as Answer;
use axum::extract::State;
use http::header::CONTENT_TYPE;
use spore_api::error::ErrorCode;
use spore_api::status::{Memories, Status, Templates};
use spore_wire::node::Boundary;

use super::apps::state_of;
use super::error::Fault;
use super::{Caller, Shared};
use crate::converge::code_name_of;
use crate::store::record::app::apps_of;

/// The version of the API's text format for metrics.
const METRICS_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Tells how the platform is.
#[utoipa::path(get, path = "/api/v1/status", tag = "status",
    responses((status = 200, body = Status)))]
pub(super) async fn status(
    State(api): State<Shared>,
    caller: Caller,
) -> Result<Answer<Status>, Fault> {
    let inner = &api.converge.inner;
    let node = inner.nodes.node_status().await?;
    Ok(Answer(Status {
        version: inner.config.version.clone(),
        base: inner.config.base.clone(),
        gateway: inner.config.gateway.to_string(),
        boundary: boundary_name(node.boundary).to_owned(),
        boundary_text: boundary_text(node.boundary, &node.hypervisor),
        hypervisor: format!("{} {}", node.hypervisor, node.hypervisor_version),
        kernel: node.kernel,
        apps: inner.store.count(&apps_of(&caller.account)).await?,
        vms: u64::from(node.vms),
        memory_mib_total: node.memory_mib_total,
        memory_mib_used: node.memory_mib_used,
        templates: Templates {
            ready: node.templates.ready,
            hits: node.templates.hits,
            misses: node.templates.misses,
        },
        memories: Memories {
            hits: node.memories.hits,
            misses: node.memories.misses,
            evictions: node.memories.evictions,
            bytes: node.memories.bytes,
            held_bytes: node.memories.held_bytes,
            budget_bytes: node.memories.budget_bytes,
        },
        uptime_ms: api.converge.now().0,
        warnings: inner.config.warnings.clone(),
    }))
}

/// Says that the daemon serves. The only call that needs no token; it tells nothing else.
#[utoipa::path(get, path = "/healthz", tag = "status", security(()),
    responses((status = 200)))]
pub(super) async fn healthz() -> &'static str {
    "ok\n"
}

/// Tells the version.
#[utoipa::path(get, path = "/version", tag = "status", responses((status = 200)))]
pub(super) async fn version(State(api): State<Shared>) -> Answer<serde_json::Value> {
    let version = &api.converge.inner.config.version;
    Answer(serde_json::json!({ "version": version }))
}

/// Prometheus metrics of all accounts.
#[utoipa::path(get, path = "/metrics", tag = "status",
    responses((status = 200, content_type = "application/openmetrics-text")))]
pub(super) async fn metrics(
    State(api): State<Shared>,
    caller: Caller,
) -> Result<([(http::HeaderName, &'static str); 1], String), Fault> {
    if caller.account.as_str() != spore_api::name::DEFAULT_ACCOUNT {
        let message = "only the host's own account may read the metrics of all";
        return Err(Fault::new(ErrorCode::Forbidden, message));
    }
    let states = [
        "asleep",
        "suspended",
        "waking",
        "awake",
        "draining",
        "disabled",
        "new",
        "failing",
    ];
    let mut apps: BTreeMap<_, _> = states.map(|state| (state, 0)).into();
    for (app, record) in api.converge.all_apps().await? {
        let standing = api.converge.with_life(&app, |life, _| life.view().standing);
        let name = code_name_of(&state_of(&record, standing));
        if let Some(count) = apps.get_mut(name.as_str()) {
            *count += 1;
        }
    }
    let node = api.converge.inner.nodes.node_status().await?;
    let page = api.converge.inner.metrics.page(&apps, &node.memories);
    let page = page.map_err(|error| Fault::new(ErrorCode::Internal, error.to_string()))?;
    Ok(([(CONTENT_TYPE, METRICS_TYPE)], page))
}

/// A boundary, for programs.
pub(super) const fn boundary_name(boundary: Boundary) -> &'static str {
    match boundary {
        Boundary::Kvm => "kvm",
        Boundary::KvmNested => "kvm-nested",
        Boundary::None => "none",
    }
}

/// A boundary, for people: where there is none, what stands in its place.
pub(super) fn boundary_text(boundary: Boundary, hypervisor: &str) -> String {
    match boundary {
        Boundary::Kvm | Boundary::KvmNested => boundary_name(boundary).to_owned(),
        Boundary::None if hypervisor == "qemu" => "none (qemu-tcg)".to_owned(),
        Boundary::None => format!("none ({hypervisor})"),
    }
}
