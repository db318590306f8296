//! Calls about snapshots and sandboxes.

use std::time::Duration;

use http::Method;

use super::Client;
use super::call::{Call, Repeat, quoted};
use super::error::CallError;
use crate::image::{GcReport, GcRequest};
use crate::name::{AppName, SandboxId};
use crate::sandbox::{Fork, ForkRequest, RollbackSandbox, Sandbox};
use crate::snapshot::{Checkpoint, RemoveSnapshot, RemovedSnapshots, Snapshot, TakeCheckpoint};

/// How long what starts VMs or writes whole memories may take: a thousand forks on a small host.
const LONG_TIMEOUT: Duration = Duration::from_secs(60 * 60);

impl Client {
    /// The account's snapshots, and the platform's own.
    pub async fn snapshots(&self) -> Result<Vec<Snapshot>, CallError> {
        self.all("/api/v1/snapshots").await
    }

    /// One snapshot, by its tag or id.
    pub async fn snapshot(&self, name: &str) -> Result<Snapshot, CallError> {
        self.ask(Call::get(snapshot_path(name))).await
    }

    /// Removes a snapshot and its tags.
    pub async fn remove_snapshot(
        &self,
        name: &str,
        how: RemoveSnapshot,
    ) -> Result<RemovedSnapshots, CallError> {
        let path = format!("{}?cascade={}", snapshot_path(name), how.cascade);
        self.ask(long(Method::DELETE, path)).await
    }

    /// Makes a snapshot stand alone, so that what it continues can go.
    pub async fn compact_snapshot(&self, name: &str) -> Result<Snapshot, CallError> {
        let path = format!("{}/compact", snapshot_path(name));
        self.ask(long(Method::POST, path)).await
    }

    /// Removes snapshots that nothing names.
    pub async fn collect_snapshots(&self, request: GcRequest) -> Result<GcReport, CallError> {
        let call = long(Method::POST, "/api/v1/snapshots/gc".to_owned());
        self.ask(call.with_json(&request)).await
    }

    /// Takes a snapshot of an app that goes on; wakes it if it sleeps.
    pub async fn checkpoint_app(
        &self,
        app: &AppName,
        take: &TakeCheckpoint,
    ) -> Result<Checkpoint, CallError> {
        let path = format!("/api/v1/apps/{app}/checkpoint");
        let call = long(Method::POST, path).with_json(take);
        self.ask(call.with_new_key()?).await
    }

    /// Takes a snapshot of a sandbox that goes on.
    pub async fn checkpoint_sandbox(
        &self,
        sandbox: &SandboxId,
        take: &TakeCheckpoint,
    ) -> Result<Checkpoint, CallError> {
        let path = sandbox_path(sandbox, "/checkpoint");
        let call = long(Method::POST, path).with_json(take);
        self.ask(call.with_new_key()?).await
    }

    /// Opens sandboxes. A call that is dropped leaves none.
    pub async fn fork(&self, request: &ForkRequest) -> Result<Vec<Fork>, CallError> {
        let call = long(Method::POST, "/api/v1/forks".to_owned());
        self.ask(call.with_json(request).with_new_key()?).await
    }

    /// All sandboxes.
    pub async fn sandboxes(&self) -> Result<Vec<Sandbox>, CallError> {
        self.all("/api/v1/sandboxes").await
    }

    /// One sandbox.
    pub async fn sandbox(&self, sandbox: &SandboxId) -> Result<Sandbox, CallError> {
        self.ask(Call::get(sandbox_path(sandbox, ""))).await
    }

    /// Brings a sandbox back to a snapshot, under the same id.
    pub async fn rollback_sandbox(
        &self,
        sandbox: &SandboxId,
        to: &RollbackSandbox,
    ) -> Result<Sandbox, CallError> {
        let path = sandbox_path(sandbox, "/rollback");
        self.ask(long(Method::POST, path).with_json(to)).await
    }

    /// Ends a sandbox and removes it.
    pub async fn remove_sandbox(&self, sandbox: &SandboxId) -> Result<(), CallError> {
        self.tell(long(Method::DELETE, sandbox_path(sandbox, "")))
            .await
    }
}

fn snapshot_path(name: &str) -> String {
    format!("/api/v1/snapshots/{}", quoted(name))
}

fn sandbox_path(sandbox: &SandboxId, rest: &str) -> String {
    format!("/api/v1/sandboxes/{sandbox}{rest}")
}

/// A call that acts anew each time, and may take long.
fn long(method: Method, path: String) -> Call {
    let mut call = Call::new(method, path, Repeat::Once);
    call.timeout = LONG_TIMEOUT;
    call
}
