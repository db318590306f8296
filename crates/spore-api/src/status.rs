//! The platform as it is.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// `GET /api/v1/status`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Status {
    /// Spore's version.
    pub version: String,
    /// The domain under which apps answer.
    pub base: String,
    /// Where the gateway listens, `address:port`.
    pub gateway: String,
    /// `qemu`, `kvm` or `sim`, with its version.
    pub hypervisor: String,
    /// `kvm`, `kvm-nested` or `none`.
    pub boundary: String,
    /// The boundary for people: `none (qemu-tcg)`.
    pub boundary_text: String,
    /// The guest kernel's release.
    pub kernel: String,
    /// Apps of this account.
    pub apps: u64,
    /// VMs that run.
    pub vms: u64,
    /// Memory that may be given to guests, in MiB.
    pub memory_mib_total: u64,
    /// Of it, given.
    pub memory_mib_used: u64,
    /// What wakes begin from instead of a boot.
    #[serde(default)]
    pub templates: Templates,
    /// The memories of snapshots that forks share.
    #[serde(default)]
    pub memories: Memories,
    /// How long the daemon runs, in milliseconds.
    pub uptime_ms: u64,
    /// What an operator should know.
    pub warnings: Vec<String>,
}

/// The templates of the host, and what they were good for since the daemon began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Templates {
    /// Templates that a start may begin from.
    pub ready: u32,
    /// Starts that began from one.
    pub hits: u64,
    /// Starts that could have, and were booted.
    pub misses: u64,
}

/// Memories of snapshots that are kept in the host's memory, least recently used first to go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Memories {
    /// Forks that found theirs there.
    pub hits: u64,
    /// Forks for which it was read from the disk.
    pub misses: u64,
    /// Memories that were given up for want of room.
    pub evictions: u64,
    /// What is there, in bytes.
    pub bytes: u64,
    /// Of it, what VMs use.
    pub held_bytes: u64,
    /// The most that may be there: `snapshot_memory` in the configuration.
    pub budget_bytes: u64,
}
