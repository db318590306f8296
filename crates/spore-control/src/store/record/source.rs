//! Sources: uploaded folders. The hash resolves only inside the account that uploaded it.

use serde::{Deserialize, Serialize};
use spore_api::name::AccountName;
use spore_wire::id::ImageId;
use spore_wire::node::ImageKind;

use super::Record;

/// An uploaded folder.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceRecord {
    /// What it may be used for.
    pub kind: ImageKind,
    /// The image's size.
    pub bytes: u64,
    /// Files, folders and links.
    pub entries: u64,
    /// Milliseconds since the Unix epoch.
    pub created_at_ms: i64,
}

impl Record for SourceRecord {
    const KIND: &'static str = "source";
    const VERSION: u32 = 1;
}

/// All sources begin with it.
pub const SOURCES: &str = "source/";

/// The key of a source.
#[must_use]
pub fn source_key(account: &AccountName, id: ImageId) -> String {
    format!("{SOURCES}{account}/{id}")
}

/// The keys of an account's sources begin with it.
#[must_use]
pub fn sources_of(account: &AccountName) -> String {
    format!("{SOURCES}{account}/")
}

/// The id in a source's key.
#[must_use]
pub fn id_of(key: &str) -> Option<ImageId> {
    key.rsplit_once('/')?.1.parse().ok()
}
