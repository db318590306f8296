//! What control and node know of a snapshot alike: what it is of, and what may start from it.
//!
//! Filed by the node as part of a snapshot's header (generation-numbered there), told to control.
//! Holds no key and no hash: neither is a name here.

use serde::{Deserialize, Serialize};

use crate::id::{ImageId, SnapshotId};
use crate::node::{Owner, Resources};

/// The account of the platform: every account may start from its snapshots, which hold no secrets.
pub const PUBLIC_ACCOUNT: &str = "public";

/// What a snapshot was taken for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SnapshotKind {
    /// To start VMs from: its source ended with it.
    Template,
    /// Of a VM that went on.
    Checkpoint,
    /// Of a VM that goes on from it, once.
    Suspend,
}

/// What must be equal between the host that took a snapshot and one that starts from it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shape {
    /// `qemu`, `kvm` or `sim`.
    pub driver: String,
    /// The driver's program and its version.
    pub version: String,
    /// Model and features that the guest was shown.
    pub cpu: String,
    /// The rate of the guest's time-stamp counter.
    pub tsc_khz: u32,
    /// The guest kernel's release.
    pub kernel: String,
    /// A digest of the devices and their order.
    pub devices: String,
}

/// The snapshot whose memory and disk another one continues.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotParent {
    /// The same account, or [`PUBLIC_ACCOUNT`].
    pub account: String,
    /// Which.
    pub id: SnapshotId,
}

/// The app in a snapshot that was taken when the app ran.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotApp {
    /// Where it listens.
    pub port: u16,
    /// Whether it was ready.
    pub ready: bool,
}

/// What whoever takes a snapshot says of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotMeta {
    /// Chosen by control, never used before.
    pub id: SnapshotId,
    /// Whose it is: nobody else can name it.
    pub account: String,
    /// What it is a delta to; `None` holds everything itself.
    pub parent: Option<SnapshotParent>,
    /// What it is for.
    pub kind: SnapshotKind,
    /// What a host must be to start from it.
    pub shape: Shape,
    /// The generation of the agent inside, which stays old for ever.
    pub agent_generation: u32,
    /// A digest of the kernel and the first file system that its guest was booted with.
    #[serde(default)]
    pub guest: String,
    /// The root file system, which must be kept as long.
    pub image: ImageId,
    /// The app's folder, if it was mounted.
    pub folder: Option<ImageId>,
    /// What its VM had, and what every VM from it gets.
    pub resources: Resources,
    /// The VM that it was taken of: labels.
    pub taken_of: Option<Owner>,
    /// The app inside, if one ran.
    pub app: Option<SnapshotApp>,
    /// A digest of the release inside and of how its app was begun, of a template of one release.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub release: Option<String>,
    /// Whether secrets were in that VM or in one that it descends from: then it is encrypted.
    pub holds_secrets: bool,
    /// Seconds since the Unix epoch.
    pub made_at_s: u64,
}

/// A snapshot as it is on a node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotInfo {
    /// Which, and whose.
    pub id: SnapshotId,
    /// Whose.
    pub account: String,
    /// What it says of itself; `None` when its header is damaged.
    pub meta: Option<SnapshotMeta>,
    /// Whether it can only be opened with a key.
    pub encrypted: bool,
    /// How many snapshots it continues.
    pub depth: u32,
    /// What it takes on the disk, without what it continues.
    pub bytes: u64,
    /// The 4 KiB pages of memory that it holds itself.
    pub memory_pages: u64,
    /// What continues it directly, of whatever account.
    pub children: Vec<SnapshotId>,
    /// Why it cannot be used, if it is known.
    pub damage: Option<String>,
}
