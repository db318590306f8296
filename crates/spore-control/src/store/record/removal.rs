//! Apps that were removed and of which something may be left: a VM that ends, a log.
//!
//! Written by the commit that removes an app, removed when nothing of it is left. While it is
//! there, no app of that name is made.

use serde::{Deserialize, Serialize};
use spore_api::name::{AccountName, AppName};

use super::Record;

/// A removal that is not done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RemovalRecord {
    /// Milliseconds since the Unix epoch.
    pub removed_at_ms: i64,
}

impl Record for RemovalRecord {
    const KIND: &'static str = "removal";
    const VERSION: u32 = 1;
}

/// All removals begin with it.
pub const REMOVALS: &str = "removal/";

/// The key of an app's removal.
#[must_use]
pub fn removal_key(account: &AccountName, app: &AppName) -> String {
    format!("{REMOVALS}{account}/{app}")
}

/// The account and app of a key.
#[must_use]
pub fn names_of(key: &str) -> Option<(AccountName, AppName)> {
    let (account, app) = key.strip_prefix(REMOVALS)?.split_once('/')?;
    Some((account.parse().ok()?, app.parse().ok()?))
}
