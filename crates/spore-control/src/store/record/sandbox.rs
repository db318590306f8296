//! Sandboxes: which VM each is, and what it began from.
//!
//! Written before its VM is started, deleted after its last VM has ended.

use serde::{Deserialize, Serialize};
use spore_api::name::{AccountName, SandboxId};
use spore_wire::id::{SnapshotId, VmId};

use super::Record;

/// A sandbox.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SandboxRecord {
    /// Its VM.
    pub vm: VmId,
    /// What that began from.
    pub base: Base,
    /// Where it stands.
    pub state: StoredSandboxState,
    /// The VM that takes its place, and what that begins from, while it goes back.
    #[serde(default)]
    pub next: Option<(VmId, Base)>,
    /// What was forked, for people.
    pub from: String,
    /// Milliseconds since the Unix epoch.
    pub created_at_ms: i64,
}

/// A snapshot that sandboxes begin from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Base {
    /// Whose: the sandbox's account, or the platform's.
    pub account: AccountName,
    /// Which.
    pub id: SnapshotId,
    /// Who keeps it.
    pub kept: Kept,
}

/// Who keeps a snapshot that sandboxes began from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kept {
    /// Somebody took it, and removes it.
    ByOwner,
    /// It was taken for this fork, and goes with the last sandbox of it.
    BySandboxes,
}

/// Where a sandbox stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StoredSandboxState {
    /// Its caller was not told of it yet: whoever finds it so after a restart removes it.
    Opening,
    /// It is there until it is removed.
    Open,
}

impl Record for SandboxRecord {
    const KIND: &'static str = "sandbox";
    const VERSION: u32 = 1;
}

/// All sandboxes begin with it.
pub const SANDBOXES: &str = "sandbox/";

/// The key of a sandbox.
#[must_use]
pub fn sandbox_key(account: &AccountName, id: &SandboxId) -> String {
    format!("{SANDBOXES}{account}/{id}")
}

/// The keys of an account's sandboxes begin with it.
#[must_use]
pub fn sandboxes_of(account: &AccountName) -> String {
    format!("{SANDBOXES}{account}/")
}

/// The account and id of a key.
#[must_use]
pub fn names_of(key: &str) -> Option<(AccountName, SandboxId)> {
    let (account, id) = key.strip_prefix(SANDBOXES)?.split_once('/')?;
    Some((account.parse().ok()?, id.parse().ok()?))
}
