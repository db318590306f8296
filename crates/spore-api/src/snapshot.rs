//! Snapshots: frozen VMs, and the tags that name them.
//!
//! Where a path or a field takes a snapshot it takes a tag or an id. A tag is looked for in the
//! account first, then among the platform's own (account `public`).

use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use crate::name::{AccountName, TagName};
use crate::span::Ms;

/// A snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Snapshot {
    /// 26 characters of base32.
    pub id: String,
    /// Whose; `public` is the platform's own.
    pub account: AccountName,
    /// Its names.
    pub tags: Vec<TagName>,
    /// What it was taken for; absent when its header is damaged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kind: Option<SnapshotKind>,
    /// The app or sandbox that it was taken of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub taken_of: Option<String>,
    /// What every VM from it gets of the host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resources: Option<SnapshotResources>,
    /// The snapshot that it continues.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<String>,
    /// How many it continues.
    pub depth: u32,
    /// The snapshots that continue it.
    pub children: Vec<String>,
    /// The sandboxes that began from it.
    pub sandboxes: u64,
    /// What it takes on the disk, without what it continues.
    pub bytes: u64,
    /// Whether its memory is encrypted, as that of one that holds secrets is.
    pub encrypted: bool,
    /// RFC 3339, UTC; absent when its header is damaged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created_at: Option<String>,
    /// Why it cannot be used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub damage: Option<String>,
}

/// What a snapshot was taken for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum SnapshotKind {
    /// To fork from.
    Template,
    /// Of a VM that went on.
    Checkpoint,
    /// Of an app that goes on from it, once.
    Suspend,
}

/// What a VM from a snapshot gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SnapshotResources {
    /// vCPUs.
    pub cpus: u8,
    /// Guest memory.
    pub memory_mib: u32,
    /// Scratch disk.
    pub disk_mib: u32,
}

/// `POST /api/v1/{apps,sandboxes}/{…}/checkpoint`: takes a snapshot of a VM that goes on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TakeCheckpoint {
    /// The name that it gets; it must be free.
    pub tag: TagName,
    /// Whether a VM that holds secrets may be taken. Its memory and its scratch disk are encrypted
    /// on the host's disk then.
    #[serde(default)]
    pub allow_secrets: bool,
}

/// A checkpoint that was taken.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Checkpoint {
    /// The snapshot.
    pub snapshot: Snapshot,
    /// How long the VM stood still.
    pub pause_ms: Ms,
    /// How long its programs did: the pause, and what the guest took around it.
    pub frozen_ms: Ms,
}

/// `DELETE /api/v1/snapshots/{id or tag}`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
pub struct RemoveSnapshot {
    /// Whether the snapshots that continue it go as well.
    #[serde(default)]
    pub cascade: bool,
}

/// What a removal removed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RemovedSnapshots {
    /// Ids, those that continue others first.
    pub removed: Vec<String>,
}
