//! The public contract over HTTP: `/api/v1/**`, `/healthz`, `/version`, `/metrics`.
//!
//! Served by whatever listener the composition root has; it never opens a socket. A handler
//! translates, calls one method, translates back. Another account's objects answer 404: every key
//! begins with the caller's account. Every failure is an `ApiError` as JSON.

use std::sync::Arc;

use axum::Router;
use axum::middleware::{from_fn, from_fn_with_state};
use axum::routing::{delete, get, post, put};
use spore_api::error::ErrorCode;
use tokio::sync::watch;

use crate::config::Config;
use crate::converge::Converge;

mod apps;
mod body;
mod error;
mod exec;
mod files;
mod guard;
mod images;
mod logs;
mod openapi;
mod operations;
mod page;
mod releases;
mod sandboxes;
mod secrets;
mod snapshots;
mod sources;
mod status;
#[cfg(test)]
mod tests;

pub use guard::{Caller, CallerBy};
pub use openapi::openapi;

use error::Fault;

/// Serves the contract.
#[derive(Clone, Debug)]
pub struct Api {
    pub(crate) converge: Converge,
    /// Becomes true when control stops: endless answers end then.
    pub(crate) stopped: watch::Receiver<bool>,
}

/// The state of every handler.
pub(crate) type Shared = Arc<Api>;

impl Api {
    pub(crate) const fn new(converge: Converge, stopped: watch::Receiver<bool>) -> Self {
        Self { converge, stopped }
    }

    fn shared_config(&self) -> &Config {
        &self.converge.inner.config
    }

    /// All routes, guarded.
    pub fn router(&self) -> Router {
        let api: Shared = Arc::new(self.clone());
        Router::new()
            .nest("/api/v1", routes())
            .route("/healthz", get(status::healthz))
            .route("/version", get(status::version))
            .route("/metrics", get(status::metrics))
            .fallback(|| async { Fault::new(ErrorCode::NotFound, "there is no such route") })
            .method_not_allowed_fallback(|| async {
                let message = "the route does not take this method";
                Fault::new(ErrorCode::MethodNotAllowed, message)
            })
            .layer(from_fn(guard::finish))
            .layer(from_fn_with_state(Arc::clone(&api), guard::caller))
            .layer(from_fn_with_state(Arc::clone(&api), guard::place))
            .layer(from_fn_with_state(Arc::clone(&api), guard::name))
            .with_state(api)
    }
}

/// Returns once control stops.
async fn stopping(mut stopped: watch::Receiver<bool>) {
    // An error says that control is gone, which is the same.
    drop(stopped.wait_for(|stop| *stop).await);
}

fn routes() -> Router<Shared> {
    let json = Router::new()
        .route("/status", get(status::status))
        .route("/apps", get(apps::list))
        .route("/apps/{app}", get(apps::show).delete(apps::remove))
        .route("/apps/{app}/stop", post(apps::stop))
        .route("/apps/{app}/wake", post(apps::wake))
        .route("/apps/{app}/restart", post(apps::restart))
        .route("/apps/{app}/enable", post(apps::enable))
        .route("/apps/{app}/disable", post(apps::disable))
        .route("/apps/{app}/rollback", post(releases::rollback))
        .route(
            "/apps/{app}/releases",
            get(releases::list).post(releases::create),
        )
        .route("/apps/{app}/secrets", get(secrets::list))
        .route(
            "/apps/{app}/secrets/{name}",
            put(secrets::set).delete(secrets::remove),
        )
        .route("/apps/{app}/logs", get(logs::read))
        .route("/apps/{app}/exec", get(exec::exec))
        .route("/images", get(images::list).post(images::build))
        .route("/images/gc", post(images::collect))
        .route("/images/{*name}", delete(images::remove))
        .route("/snapshots", get(snapshots::list))
        .route("/snapshots/gc", post(snapshots::collect))
        .route(
            "/snapshots/{snapshot}",
            get(snapshots::show).delete(snapshots::remove),
        )
        .route("/snapshots/{snapshot}/compact", post(snapshots::compact))
        .route("/apps/{app}/checkpoint", post(snapshots::checkpoint_app))
        .route("/forks", post(sandboxes::fork))
        .route("/sandboxes", get(sandboxes::list))
        .route(
            "/sandboxes/{sandbox}",
            get(sandboxes::show).delete(sandboxes::remove),
        )
        .route("/sandboxes/{sandbox}/exec", get(sandboxes::exec))
        .route("/sandboxes/{sandbox}/rollback", post(sandboxes::rollback))
        .route(
            "/sandboxes/{sandbox}/checkpoint",
            post(snapshots::checkpoint_sandbox),
        )
        .route("/operations/{id}", get(operations::show))
        .route_layer(from_fn(guard::json_only));
    let sources = Router::new()
        .route("/sources", post(sources::import))
        .route_layer(from_fn(guard::zstd_only));
    let files = Router::new()
        .route("/apps/{app}/files", get(files::read).put(files::write))
        .route_layer(from_fn(guard::bytes_only));
    json.merge(sources).merge(files)
}
