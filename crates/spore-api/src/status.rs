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
    /// How long the daemon runs, in milliseconds.
    pub uptime_ms: u64,
    /// What an operator should know.
    pub warnings: Vec<String>,
}
