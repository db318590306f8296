//! Tags: the names that an account gave to its snapshots.

use serde::{Deserialize, Serialize};
use spore_api::name::{AccountName, TagName};
use spore_wire::id::SnapshotId;

use super::Record;

/// A named snapshot, of the same account.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TagRecord {
    /// Which.
    pub snapshot: SnapshotId,
    /// Milliseconds since the Unix epoch.
    pub created_at_ms: i64,
}

impl Record for TagRecord {
    const KIND: &'static str = "tag";
    const VERSION: u32 = 1;
}

/// All tags begin with it.
pub const TAGS: &str = "tag/";

/// The key of a tag.
#[must_use]
pub fn tag_key(account: &AccountName, name: &TagName) -> String {
    format!("{TAGS}{account}/{name}")
}

/// The keys of an account's tags begin with it.
#[must_use]
pub fn tags_of(account: &AccountName) -> String {
    format!("{TAGS}{account}/")
}

/// The account and name of a key.
#[must_use]
pub fn names_of(key: &str) -> Option<(AccountName, TagName)> {
    let (account, name) = key.strip_prefix(TAGS)?.split_once('/')?;
    Some((account.parse().ok()?, name.parse().ok()?))
}
