//! The keys of encrypted snapshots: ciphertext only.
//!
//! Written before the snapshot is taken, deleted after it is removed.

use serde::{Deserialize, Serialize};
use spore_api::name::AccountName;
use spore_wire::id::SnapshotId;

use super::Record;

/// A snapshot's key, encrypted with its account's data key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotKeyRecord {
    /// Base64 of nonce and ciphertext.
    pub sealed: String,
    /// Milliseconds since the Unix epoch.
    pub created_at_ms: i64,
}

impl Record for SnapshotKeyRecord {
    const KIND: &'static str = "snapshot key";
    const VERSION: u32 = 1;
}

/// All keys of snapshots begin with it.
pub const SNAPSHOT_KEYS: &str = "snapshot-key/";

/// The key of a snapshot's key.
#[must_use]
pub fn snapshot_key_key(account: &AccountName, id: SnapshotId) -> String {
    format!("{SNAPSHOT_KEYS}{account}/{id}")
}

/// The snapshot of a key.
#[must_use]
pub fn snapshot_of(key: &str) -> Option<SnapshotId> {
    key.rsplit_once('/')?.1.parse().ok()
}
