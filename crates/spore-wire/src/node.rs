//! Control and node: start, stop, watch, connect, images.
//!
//! Control decides *that* a VM runs and with which id; the node makes it so and reports. Names of
//! accounts and apps travel only as labels: a node decides nothing by them.

use core::time::Duration;

use serde::{Deserialize, Serialize};

use crate::egress::Grant;
use crate::gateway::Phase;
use crate::guest::{AppStatus, Readiness};
use crate::id::{ImageId, SnapshotId, TraceId, VmId};
use crate::secret::SecretBytes;

/// How long a VM goes on that its node ends while it lives: the node tells
/// [`VmPhase::Draining`] unasked, control has the gateway send nothing more to the VM and answers
/// with a stop, and only that stop, or this span, has it killed.
pub const FAREWELL_MAX: Duration = Duration::from_secs(1);

/// Between SIGTERM and SIGKILL in a VM that is stopped and was given no process that says so.
pub const STOP_GRACE_DEFAULT: Duration = Duration::from_secs(10);

/// Whose VM it is: labels for journals, logs and metrics.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Owner {
    /// The account's name.
    pub account: String,
    /// The app's name.
    pub app: String,
    /// The release's number.
    pub release: u64,
    /// Which values of the app's secrets it was given: how often they had been changed by then.
    #[serde(default)]
    pub secrets_version: u64,
}

/// A VM to start.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StartVm {
    /// Chosen by control, never used before: starting it twice is one start.
    pub vm: VmId,
    /// Whose.
    pub owner: Owner,
    /// The root file system.
    pub image: ImageId,
    /// The app's folder, mounted at `/app`; `None` when the image holds all.
    pub folder: Option<ImageId>,
    /// What it gets of the host.
    pub resources: Resources,
    /// The process to run. `None` starts nothing: the VM is ready once its network is open, for
    /// whoever runs something in it, or with what went on in what it begins from. Of what such a VM
    /// prints nothing is kept, since nobody says which secrets may be in it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub process: Option<Process>,
    /// Where it may connect to; empty means nowhere.
    pub egress: Vec<Grant>,
    /// Where it begins.
    #[serde(default, skip_serializing_if = "Source::is_boot")]
    pub source: Source,
    /// The keys of the snapshots that it begins from, of those that are encrypted.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub keys: Vec<(SnapshotId, SecretBytes)>,
    /// What for.
    #[serde(default, skip_serializing_if = "Purpose::is_serve")]
    pub purpose: Purpose,
    /// The request that it is started for, if one is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trace: Option<TraceId>,
}

impl StartVm {
    /// Whether its app may run already where it begins.
    #[must_use]
    pub fn begins_warm(&self) -> bool {
        let process = self.process.as_ref();
        process.is_some_and(|process| process.has_hooks)
    }

    /// Whether it is given secrets.
    #[must_use]
    pub fn has_secrets(&self) -> bool {
        self.process.as_ref().is_some_and(|process| {
            !process.secret_environment.is_empty() || !process.secret_files.is_empty()
        })
    }
}

/// Where a VM's memory begins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "from", content = "of", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Source {
    /// With the guest's kernel.
    #[default]
    Boot,
    /// Where the node's own template of this image and these resources stands, if it has one; else
    /// with the guest's kernel, and a template is built behind. The node decides, and its status
    /// tells which.
    Template(TemplateOf),
    /// Where the VM stood that this snapshot was taken of: one of the owner's account, or public.
    Snapshot(SnapshotId),
    /// Where the VM stood that was suspended to this snapshot of the same app. One VM goes on from
    /// it, and has its memory for itself.
    Suspended(SnapshotId),
}

/// Who may begin from a template.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TemplateOf {
    /// The owner's account: the image is its own.
    Account,
    /// Every account: the image is the platform's.
    Everybody,
    /// The owner's account, for this very release: its app was started in it and runs. Of a start
    /// without secrets alone.
    Release,
}

/// Why a VM that could have begun from a template was booted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TemplateMiss {
    /// There was none; one is built behind.
    None,
    /// It is being built.
    Building,
    /// It could not be built, or did not work; it is built again after a pause.
    Failed,
    /// Its memory has no room beside what runs.
    NoRoom,
    /// The driver takes no snapshots on this host, or none may be taken of what this is.
    Unsupported,
}

/// What a VM is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Purpose {
    /// Somebody wants it.
    #[default]
    Serve,
    /// The node made it for itself, to take a template of. Only the node starts and ends it, and
    /// nobody else is told of it.
    Template,
}

impl Purpose {
    /// Whether somebody wants it.
    #[must_use]
    pub const fn is_serve(&self) -> bool {
        matches!(self, Self::Serve)
    }
}

impl Source {
    /// Whether it is an ordinary boot.
    #[must_use]
    pub const fn is_boot(&self) -> bool {
        matches!(self, Self::Boot)
    }

    /// The snapshot that it names, whichever way.
    #[must_use]
    pub const fn snapshot(&self) -> Option<SnapshotId> {
        match *self {
            Self::Snapshot(id) | Self::Suspended(id) => Some(id),
            Self::Boot | Self::Template(_) => None,
        }
    }
}

/// What a VM gets of the host. Each is a hard cap.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resources {
    /// vCPUs.
    pub cpus: u8,
    /// Guest memory.
    pub memory_mib: u32,
    /// Scratch disk, gone with the VM.
    pub disk_mib: u32,
}

/// What a slow and busy host copies to its disk or back in a second.
const COPIED_MIB_PER_S: u32 = 16;

impl Resources {
    /// Guest memory in bytes: of a VM, and of a snapshot that it begins from.
    #[must_use]
    pub const fn memory_bytes(&self) -> u64 {
        (self.memory_mib as u64) << 20
    }

    /// What copying its whole memory and disk may take before it counts as stuck.
    #[must_use]
    pub const fn copying(&self) -> Duration {
        let mib = self.memory_mib.saturating_add(self.disk_mib);
        Duration::from_secs((mib / COPIED_MIB_PER_S) as u64)
    }
}

/// The app's process.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Process {
    /// Program and arguments.
    pub command: Vec<String>,
    /// Names and values that are no secrets.
    pub environment: Vec<(String, String)>,
    /// Secrets for the environment.
    pub secret_environment: Vec<(String, SecretBytes)>,
    /// Secrets for `/run/secrets`.
    pub secret_files: Vec<(String, SecretBytes)>,
    /// `None` is the image's default, else uid 1000.
    pub user: Option<String>,
    /// Where it listens.
    pub port: u16,
    /// When it counts as ready.
    pub ready: Readiness,
    /// How long that may take.
    pub ready_timeout_ms: u64,
    /// Between SIGTERM and SIGKILL when it is stopped.
    pub stop_grace_ms: u64,
    /// Whether it, and what it starts, find the ready-made hooks of forks in their environment:
    /// where a VM may begin from one in which it ran.
    #[serde(default)]
    pub has_hooks: bool,
}

/// Where a VM stands. The order is the order of a life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VmPhase {
    /// Namespace, cgroup, disks.
    Preparing,
    /// The guest's kernel is on its way to the agent.
    Booting,
    /// The same of a guest that begins where another stood.
    Forking,
    /// The guest is renewed and its app started.
    Thawing,
    /// The app is ready.
    Ready,
    /// It was asked to stop, or it failed and is ended ([`FAREWELL_MAX`]).
    Draining,
    /// It stopped as asked; nothing of it is left.
    Stopped,
    /// It ended otherwise; nothing of it is left.
    Failed,
}

impl VmPhase {
    /// Whether nothing of the VM is left.
    #[must_use]
    pub const fn is_over(self) -> bool {
        matches!(self, Self::Stopped | Self::Failed)
    }
}

/// What stands between the guest and the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Boundary {
    /// Hardware virtualisation.
    Kvm,
    /// Hardware virtualisation inside another hypervisor.
    KvmNested,
    /// None: QEMU's software emulation, confined as a process.
    None,
}

/// A VM as it is now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmStatus {
    /// Which.
    pub vm: VmId,
    /// Whose.
    pub owner: Owner,
    /// Where it stands.
    pub phase: VmPhase,
    /// Why it is over, once it is.
    pub failure: Option<VmFailure>,
    /// What the agent last said of the app.
    pub app: AppStatus,
    /// What took how long so far.
    pub phases: Vec<Phase>,
    /// What stands between it and the host.
    pub boundary: Boundary,
    /// `qemu`, `kvm` or `sim`.
    pub hypervisor: String,
    /// Where its memory began: with a boot, or in a snapshot.
    #[serde(default, skip_serializing_if = "Source::is_boot")]
    pub source: Source,
    /// Why it did not begin from a template, if it could have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub missed: Option<TemplateMiss>,
    /// Whether its app ran already where its memory began, for this very release.
    #[serde(default)]
    pub is_warm: bool,
    /// What for.
    #[serde(default, skip_serializing_if = "Purpose::is_serve")]
    pub purpose: Purpose,
    /// The guest's boot id, once the agent said it.
    pub boot_id: Option<String>,
    /// When the keep-awake lease ends, in milliseconds from now; 0 is no lease.
    pub awake_for_ms: u64,
}

/// Why a VM failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmFailure {
    /// Whose fault and what kind.
    pub kind: VmFailureKind,
    /// For people: what happened and what to do.
    pub message: String,
    /// The app's last lines, masked.
    pub last_lines: Vec<String>,
}

/// The kinds of failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VmFailureKind {
    /// The host has no room: nothing was started.
    NoCapacity,
    /// An image is missing or damaged.
    Image,
    /// The VMM or the guest's kernel did not come up, or the host refused something.
    Boot,
    /// The guest could not be renewed, so it was killed.
    Thaw,
    /// The snapshot that it was to begin from is missing, damaged or of another kind of machine.
    Snapshot,
    /// The app ended again and again, or was not ready in its time.
    App,
    /// The VM ended by itself.
    Died,
    /// Its network policy was not what it should be, so it was killed.
    Policy,
}

/// How a VM is asked to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StopMode {
    /// SIGTERM, grace, sync, power off; then killed.
    Graceful,
    /// Killed now.
    Kill,
}

/// What a node reports, in order per VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum NodeEvent {
    /// A VM changed.
    Vm(VmStatus),
}

/// A node as it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeStatus {
    /// `qemu`, `kvm` or `sim`.
    pub hypervisor: String,
    /// The driver's version, for people.
    pub hypervisor_version: String,
    /// What stands between its guests and the host.
    pub boundary: Boundary,
    /// The guest kernel's release.
    pub kernel: String,
    /// Memory that may be given to guests.
    pub memory_mib_total: u64,
    /// Of it, given.
    pub memory_mib_used: u64,
    /// VMs that are not over.
    pub vms: u32,
    /// Its templates.
    #[serde(default)]
    pub templates: TemplateStatus,
    /// Memories of snapshots that it keeps for forks.
    #[serde(default)]
    pub memories: MemoryStatus,
}

/// The templates of a node, and what they were good for since it began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TemplateStatus {
    /// Templates that a start may begin from.
    pub ready: u32,
    /// Starts that began from one.
    pub hits: u64,
    /// Starts that could have, and were booted.
    pub misses: u64,
}

/// How far the template is that a VM was started without, or from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TemplateStage {
    /// It is to be built: behind the start that missed it, and behind those asked for earlier.
    Waiting,
    /// Its VM is on its way to where others shall begin.
    Booting,
    /// That VM is being kept.
    Writing,
    /// A start may begin from it.
    Ready,
    /// It could not be built, or what began from it failed; it is tried again some time later.
    Failed,
}

/// What a node's cache of snapshots' memories did since the node began, and what it holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryStatus {
    /// Memories that were there when they were asked for, or on their way.
    pub hits: u64,
    /// Memories that had to be made from files.
    pub misses: u64,
    /// Memories that were given up for want of room.
    pub evictions: u64,
    /// Bytes of the guests whose memories are there.
    pub bytes: u64,
    /// Of it, what VMs map.
    pub held_bytes: u64,
    /// The most that may be there.
    pub budget_bytes: u64,
}

/// What a root image is made from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "from", rename_all = "snake_case")]
pub enum ImageRecipe {
    /// Debian packages and what they depend on.
    Packages {
        /// Names as apt knows them.
        packages: Vec<String>,
    },
    /// A base image, of the packages that the node's own recipe of this name has.
    Base {
        /// Such as `debian/python3`.
        name: String,
    },
}

/// What an image is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ImageKind {
    /// A root file system: owners and modes are kept.
    Root,
    /// An app's folder: owned by root, readable by all, no device nodes, nothing setuid.
    Folder,
}

/// An image that the node has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageInfo {
    /// Its content.
    pub id: ImageId,
    /// What it is for.
    pub kind: ImageKind,
    /// The file's size.
    pub bytes: u64,
    /// Files, folders and links in it.
    pub entries: u64,
    /// Seconds since the Unix epoch.
    pub made_at_s: u64,
}
