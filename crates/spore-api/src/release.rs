//! Releases: immutable versions of an app, and the folders they are made from.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::name::{ImageName, SecretName};

/// `POST /api/v1/apps/{app}/releases`: makes a release; it goes live when healthy. Answers an
/// operation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateRelease {
    /// What to run and how.
    pub spec: ReleaseSpec,
    /// The app's folder, from `POST /api/v1/sources`; absent when the image holds all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
}

/// What to run and how: the manifest, validated.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ReleaseSpec {
    /// The root file system.
    pub image: ImageName,
    /// Program and arguments, run in `/app`.
    pub command: Vec<String>,
    /// Where it listens, 1 to 65535.
    pub port: u16,
    /// What it gets of the host.
    #[serde(default)]
    pub resources: ResourceSpec,
    /// When it is put to sleep.
    #[serde(default)]
    pub idle: IdleSpec,
    /// When it counts as ready.
    #[serde(default)]
    pub health: HealthSpec,
    /// Where it may connect to: `host:port` or `address:port`; default nowhere.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub egress: Vec<String>,
    /// Which secrets it gets.
    #[serde(default)]
    pub secrets: SecretSpec,
    /// Names and values that are no secrets.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub environment: Vec<(String, String)>,
    /// Where its VMs begin.
    #[serde(default, skip_serializing_if = "Warm::is_boot")]
    pub warm: Warm,
}

/// Where a VM begins that need not be booted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Warm {
    /// Before the app is started.
    #[default]
    Boot,
    /// Where the app of this release was ready once; for an app that gets no secrets.
    Ready,
}

impl Warm {
    const fn is_boot(&self) -> bool {
        matches!(self, Self::Boot)
    }
}

/// What a VM gets of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ResourceSpec {
    /// vCPUs, 1 to 4.
    pub cpus: u8,
    /// MiB, 64 to 32768.
    pub memory_mib: u32,
    /// Scratch disk in MiB, 16 to 65536; gone with the VM.
    pub disk_mib: u32,
}

impl Default for ResourceSpec {
    fn default() -> Self {
        Self {
            cpus: 1,
            memory_mib: crate::limits::MEMORY_MIB_DEFAULT,
            disk_mib: crate::limits::DISK_MIB_DEFAULT,
        }
    }
}

/// When an app is put to sleep.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct IdleSpec {
    /// After so long without request, open connection or keep-awake lease.
    pub after_ms: u64,
    /// What happens then.
    pub mode: IdleMode,
}

impl Default for IdleSpec {
    fn default() -> Self {
        Self {
            after_ms: 60_000,
            mode: IdleMode::Stop,
        }
    }
}

/// What happens to an idle app.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum IdleMode {
    /// Its VM is stopped.
    Stop,
    /// Its VM is put on the disk, encrypted, and goes on from there at the next request: what it
    /// holds in memory stays.
    Suspend,
    /// It stays awake; it is woken again when it dies.
    Never,
}

/// When an app counts as ready.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct HealthSpec {
    /// A GET of this path answers 2xx; absent: the port accepts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// How long it may take.
    pub timeout_ms: u64,
}

impl Default for HealthSpec {
    fn default() -> Self {
        Self {
            path: None,
            timeout_ms: 30_000,
        }
    }
}

/// Which secrets an app gets.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct SecretSpec {
    /// As environment variables.
    pub names: Vec<SecretName>,
    /// As files under `/run/secrets`.
    pub files: Vec<SecretName>,
}

/// `POST /api/v1/sources` answers this: a folder as an image, ready to be named by a release.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Source {
    /// Names it in `CreateRelease::source`; content-addressed.
    pub id: String,
    /// The image's size.
    pub bytes: u64,
    /// Files, folders and links.
    pub entries: u64,
}

/// A release as it is now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Release {
    /// From 1 on, per app.
    pub number: u64,
    /// Where it stands.
    pub state: ReleaseState,
    /// What it runs and how.
    pub spec: ReleaseSpec,
    /// The app's folder.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// RFC 3339, UTC.
    pub created_at: String,
    /// Why it never went live.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<String>,
}

/// Where a release stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ReleaseState {
    /// Being tried.
    Pending,
    /// It serves.
    Live,
    /// It was healthy and may be rolled back to.
    Retired,
    /// It never became healthy.
    Failed,
}
