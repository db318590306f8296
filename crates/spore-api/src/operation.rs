//! Operations: work that takes longer than a call should.
//!
//! `GET /api/v1/operations/{id}?wait_ms=N` answers as soon as something changed, or after N ms.

use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use crate::error::ApiError;

/// A piece of longer work.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Operation {
    /// Its id.
    pub id: String,
    /// What it does: `deploy`, `rollback`, `image_build`.
    pub kind: String,
    /// What it does it to: an app's or image's name.
    pub target: String,
    /// Where it stands.
    pub state: OperationState,
    /// Its steps so far, the current one last.
    pub steps: Vec<OperationStep>,
    /// Rises with every change: give it back as `after`.
    pub revision: u64,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<ApiError>,
    /// What it made: a release's number, an image's id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result: Option<String>,
    /// RFC 3339, UTC.
    pub created_at: String,
}

/// Where an operation stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum OperationState {
    /// Under way.
    Running,
    /// Done.
    Succeeded,
    /// Given up.
    Failed,
}

/// One step of an operation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct OperationStep {
    /// What is done, for people.
    pub text: String,
    /// How long it took; absent while it goes on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ms: Option<u64>,
}

/// How to wait.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
pub struct OperationQuery {
    /// At most 30000.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wait_ms: Option<u64>,
    /// The revision already seen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<u64>,
}
