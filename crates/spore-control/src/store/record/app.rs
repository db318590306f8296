//! Apps: what their owner wants.

use serde::{Deserialize, Serialize};
use spore_api::name::{AccountName, AppName};
use spore_wire::id::SnapshotId;

use super::Record;

/// An app.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AppRecord {
    /// Milliseconds since the Unix epoch.
    pub created_at_ms: i64,
    /// Whether it may be woken.
    pub enabled: bool,
    /// The release that serves; `None` before the first healthy one.
    pub release: Option<u64>,
    /// The number that the next release gets.
    pub next_release: u64,
    /// The operation that tries a release now: at most one at a time.
    pub deploying: Option<String>,
    /// What its next VM goes on from, or would: written before it is taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub suspended: Option<Suspended>,
    /// Whether a secret was changed since a VM was alone when it began: what runs may hold the
    /// value that was.
    #[serde(default, skip_serializing_if = "core::ops::Not::not")]
    pub secrets_changed: bool,
    /// How often one of its secrets was set or removed. A VM is started with it, so that it stays
    /// known which values it holds.
    #[serde(default)]
    pub secrets_version: u64,
}

/// The snapshot of a suspended app; its key is beside it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Suspended {
    /// Which, in the app's account.
    pub snapshot: SnapshotId,
    /// The release that goes on.
    pub release: u64,
    /// Whether a VM was to go on from it and did not get there.
    pub tried: bool,
}

impl AppRecord {
    /// An app without a release.
    #[must_use]
    pub const fn new(created_at_ms: i64) -> Self {
        Self {
            created_at_ms,
            enabled: true,
            release: None,
            next_release: 1,
            deploying: None,
            suspended: None,
            secrets_changed: false,
            secrets_version: 0,
        }
    }
}

impl Record for AppRecord {
    const KIND: &'static str = "app";
    const VERSION: u32 = 1;
}

/// All apps begin with it.
pub const APPS: &str = "app/";

/// The key of an app.
#[must_use]
pub fn app_key(account: &AccountName, app: &AppName) -> String {
    format!("{APPS}{account}/{app}")
}

/// The keys of an account's apps begin with it.
#[must_use]
pub fn apps_of(account: &AccountName) -> String {
    format!("{APPS}{account}/")
}

/// The account and app of a key.
#[must_use]
pub fn names_of(key: &str) -> Option<(AccountName, AppName)> {
    let (account, app) = key.strip_prefix(APPS)?.split_once('/')?;
    Some((account.parse().ok()?, app.parse().ok()?))
}
