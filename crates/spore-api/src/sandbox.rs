//! Sandboxes: VMs that one opens by forking a snapshot, and throws away.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::error::ApiError;
use crate::name::{AccountName, SandboxId};

/// A sandbox.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Sandbox {
    /// Its id, the same for as long as it is there.
    pub id: SandboxId,
    /// Whose.
    pub account: AccountName,
    /// Where it stands.
    pub state: SandboxState,
    /// What was forked: an app, a sandbox, a tag or a snapshot.
    pub from: String,
    /// The snapshot that it began from, and goes back to.
    pub snapshot: String,
    /// Its VM, which a rollback changes; absent once it has ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<String>,
    /// What stands between its VM and the host: `kvm`, `kvm-nested` or `none`; absent without one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boundary: Option<String>,
    /// The same for people, with what hosts the VM where there is no boundary.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boundary_text: Option<String>,
    /// Why its VM has ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended: Option<String>,
    /// RFC 3339, UTC.
    pub created_at: String,
}

/// Where a sandbox stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum SandboxState {
    /// Its VM is on its way.
    Opening,
    /// Programs can be run in it.
    Open,
    /// It is going back to a snapshot.
    RollingBack,
    /// Its VM is being ended; then it is gone.
    Closing,
    /// Its VM is gone: it can go back to its snapshot, or be removed.
    Ended,
}

/// `POST /api/v1/forks`: opens sandboxes. Answers a [`Fork`] for each.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ForkRequest {
    /// A tag, an app, or the id of a sandbox or snapshot. Where a tag and an app have one name,
    /// `tag:NAME` or `app:NAME`. An app or sandbox that runs is checkpointed for it.
    pub from: String,
    /// How many: 1 to 1000.
    #[serde(default = "one")]
    pub count: u32,
    /// Whether none is to be opened unless all are.
    #[serde(default)]
    pub all_or_nothing: bool,
    /// Whether an app or sandbox that holds secrets may be forked: each sandbox holds them then,
    /// and so does the checkpoint that they begin from.
    #[serde(default)]
    pub allow_secrets: bool,
}

const fn one() -> u32 {
    1
}

/// One of the sandboxes that were asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Fork {
    /// Its id.
    pub id: SandboxId,
    /// Why it was not opened: then there is no such sandbox. Absent when it is open.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<ApiError>,
}

/// `POST /api/v1/sandboxes/{id}/rollback`: back to a snapshot, under the same id.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RollbackSandbox {
    /// A tag or the id of a snapshot; absent for the one that it began from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub to: Option<String>,
}
