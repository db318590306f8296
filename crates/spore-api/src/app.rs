//! Apps: durable things with a URL.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::name::{AccountName, AppName};
use crate::span::Ms;

/// An app as it is now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct App {
    /// Its name.
    pub name: AppName,
    /// Whose it is.
    pub account: AccountName,
    /// Where it answers.
    pub url: String,
    /// Asleep, awake or on the way.
    pub state: AppState,
    /// Whether it may be woken.
    pub enabled: bool,
    /// The release that serves; absent before the first healthy one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub release: Option<u64>,
    /// Its VM, while there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<AppVm>,
    /// Why the last start failed; absent once it has succeeded again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_failure: Option<String>,
    /// RFC 3339, UTC.
    pub created_at: String,
}

/// Where an app stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum AppState {
    /// No VM; the next request wakes it.
    Asleep,
    /// No VM; the next request wakes it as it was, with what it held in memory.
    Suspended,
    /// A VM is on its way to ready.
    Waking,
    /// It serves.
    Awake,
    /// Its VM is being stopped.
    Draining,
    /// It will not be woken.
    Disabled,
    /// It has no healthy release yet.
    New,
    /// Its last starts failed; the next request tries again after a pause.
    Failing,
}

/// The VM of an app.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AppVm {
    /// 26 characters.
    pub id: String,
    /// `kvm`, `kvm-nested` or `none`.
    pub boundary: String,
    /// The boundary for people: `none (qemu-tcg)`.
    #[serde(default)]
    pub boundary_text: String,
    /// The guest's boot id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot_id: Option<String>,
    /// What took how long at its start.
    pub phases: Vec<WakePhase>,
    /// How long it may stay without a request because something inside asked so.
    #[serde(default)]
    pub awake_for_ms: u64,
    /// How far the template is that the app's next wake may begin from. Absent in lists, when
    /// wakes boot, and for a VM that was started by an earlier daemon.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub template: Option<AppTemplate>,
}

/// A template on its way: built behind the start that missed it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum AppTemplate {
    /// It waits for its turn.
    Waiting,
    /// Its VM boots; with `warm = "ready"`, the app in it gets ready.
    Booting,
    /// It is being written.
    Writing,
    /// The next wake forks it.
    Ready,
    /// It could not be built; it is tried again some time later, and wakes boot until then.
    Failed,
}

/// One timed step of a wake.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct WakePhase {
    /// `prepare`, `boot`, `agent`, `thaw`, `app`.
    pub name: String,
    /// Milliseconds.
    pub ms: Ms,
}

/// `POST …/rollback`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Rollback {
    /// Which release; absent is the healthy one before the current.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<u64>,
}
