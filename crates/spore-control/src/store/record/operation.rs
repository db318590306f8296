//! Operations: longer work, written when it begins and when it ends.

use serde::{Deserialize, Serialize};
use spore_api::error::ErrorCode;
use spore_api::name::AccountName;

use super::Record;

/// A piece of longer work.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OperationRecord {
    /// `deploy`, `rollback`, `image_build`.
    pub kind: String,
    /// An app's or image's name.
    pub target: String,
    /// The release that a deploy or rollback tries.
    pub release: Option<u64>,
    /// Where it stands.
    pub state: StoredOperationState,
    /// What was done, with milliseconds.
    pub steps: Vec<(String, Option<u64>)>,
    /// Rises with every change.
    pub revision: u64,
    /// Why it failed.
    pub error: Option<(ErrorCode, String)>,
    /// What it made.
    pub result: Option<String>,
    /// Milliseconds since the Unix epoch.
    pub created_at_ms: i64,
}

/// Where an operation stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StoredOperationState {
    /// Under way.
    Running,
    /// Done.
    Succeeded,
    /// Given up.
    Failed,
}

impl Record for OperationRecord {
    const KIND: &'static str = "operation";
    const VERSION: u32 = 1;
}

/// All operations begin with it.
pub const OPERATIONS: &str = "operation/";

/// The key of an operation.
#[must_use]
pub fn operation_key(account: &AccountName, id: &str) -> String {
    format!("{OPERATIONS}{account}/{id}")
}

/// The account and id of a key.
#[must_use]
pub fn names_of(key: &str) -> Option<(AccountName, &str)> {
    let (account, id) = key.strip_prefix(OPERATIONS)?.split_once('/')?;
    Some((account.parse().ok()?, id))
}
