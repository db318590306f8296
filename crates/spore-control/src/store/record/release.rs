//! Releases: immutable versions of an app.

use serde::{Deserialize, Serialize};
use spore_api::name::{AccountName, AppName, ImageName, SecretName};
use spore_wire::egress::Grant;
use spore_wire::id::ImageId;

use super::Record;

/// A release.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReleaseRecord {
    /// From 1 on.
    pub number: u64,
    /// Where it stands.
    pub state: StoredState,
    /// The root file system, fixed when the release was made.
    pub image: ImageId,
    /// The app's folder.
    pub folder: Option<ImageId>,
    /// Bytes of the root file system; 0 in records of a version that did not count.
    #[serde(default)]
    pub image_bytes: u64,
    /// Bytes of the folder, likewise.
    #[serde(default)]
    pub folder_bytes: u64,
    /// What runs and how.
    pub rules: Rules,
    /// Milliseconds since the Unix epoch.
    pub created_at_ms: i64,
    /// Why it never went live.
    pub failure: Option<String>,
}

/// What runs and how, validated.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rules {
    /// The name under which the image was asked for.
    pub image_name: ImageName,
    /// Program and arguments.
    pub command: Vec<String>,
    /// Where it listens.
    pub port: u16,
    /// vCPUs.
    pub cpus: u8,
    /// Guest memory.
    pub memory_mib: u32,
    /// Scratch disk.
    pub disk_mib: u32,
    /// Put to sleep after so long.
    pub idle_after_ms: u64,
    /// Whether it is put to sleep at all.
    pub sleeps: bool,
    /// Whether what it holds in memory is kept meanwhile.
    #[serde(default)]
    pub suspends: bool,
    /// `None`: ready when the port accepts.
    pub health_path: Option<String>,
    /// How long it may take to become ready.
    pub health_timeout_ms: u64,
    /// Where it may connect to.
    pub egress: Vec<Grant>,
    /// Secrets for the environment.
    pub secret_names: Vec<SecretName>,
    /// Secrets for files.
    pub secret_files: Vec<SecretName>,
    /// Names and values that are no secrets.
    pub environment: Vec<(String, String)>,
    /// Where its VMs may begin.
    #[serde(default)]
    pub warm: StoredWarm,
}

/// Where an app's VMs may begin, if the node has a template for it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StoredWarm {
    /// Before the app is started.
    #[default]
    Boot,
    /// Where the release's app was ready.
    Ready,
}

/// Where a release stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StoredState {
    /// Being tried.
    Pending,
    /// It serves.
    Live,
    /// It was healthy.
    Retired,
    /// It never became healthy.
    Failed,
}

impl Record for ReleaseRecord {
    const KIND: &'static str = "release";
    const VERSION: u32 = 1;
}

/// All releases begin with it.
pub const RELEASES: &str = "release/";

/// The key of a release; numbers sort as they count.
#[must_use]
pub fn release_key(account: &AccountName, app: &AppName, number: u64) -> String {
    format!("{RELEASES}{account}/{app}/{number:020}")
}

/// The keys of an app's releases begin with it.
#[must_use]
pub fn releases_of(account: &AccountName, app: &AppName) -> String {
    format!("{RELEASES}{account}/{app}/")
}

/// The keys of an account's releases begin with it.
#[must_use]
pub fn releases_of_account(account: &AccountName) -> String {
    format!("{RELEASES}{account}/")
}

/// The app of a release's key.
#[must_use]
pub fn app_of(key: &str) -> Option<&str> {
    key.strip_prefix(RELEASES)?.split('/').nth(1)
}
