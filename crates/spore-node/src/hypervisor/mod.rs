//! The seam between a node and what hosts its guests: a process per VM, about eight verbs.
//!
//! Called by the VM actors (`vm/actor.rs`) and at start-up by re-adoption. Drivers: `qemu.rs` for
//! hosts without usable KVM and `sim.rs` in memory for tests. A driver decides nothing about when a
//! VM runs, and never speaks the agent's protocol: it hands out the channel.
//!
//! # Life of what a driver makes
//!
//! ```text
//!   prepare ──▶ Prepared ──boot──▶ Identity ──attach──▶ Arc<dyn Vm> ──kill──▶ (process gone)
//!      │            │                  │                                          │
//!      └────────────┴───── release ◀───┴──────────────────────────────────────────┘
//! ```
//!
//! `Prepared` and `Identity` are plain data for the journal: whatever instant the daemon dies at,
//! the next one either attaches to the same VM or releases everything that bears its id. `release`
//! is idempotent and needs no memory of its own: names of cgroups, folders and the like are made
//! from the [`VmId`]. `sweep` removes what bears no id that is kept.

pub mod fork;
mod kernel_line;
pub mod kvm;
pub mod memory_image;
mod monitored;
pub mod process;
pub mod proxy;
pub mod qemu;
pub mod room;
pub mod sim;
mod tsc;

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use spore_wire::egress::Grant;
use spore_wire::id::VmId;
use spore_wire::node::{Boundary, Resources};
use spore_wire::snapshot::Shape;
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;

use self::fork::{Afterwards, Below, Capture, CaptureError, ForkError, ForkFrom, PauseError, Turn};
pub use self::kernel_line::KernelArguments;
use self::kvm::Kvm;
use self::qemu::Qemu;
use self::room::Rooms;
use crate::disk::overlay::DiskKey;
use crate::egress::launch::LaunchError;

/// A driver.
#[async_trait]
pub trait Hypervisor: Send + Sync + 'static {
    /// What this driver is and can do. Never changes while the daemon runs.
    fn caps(&self) -> &Caps;

    /// What must be equal between where a VM like this was captured and where it is forked.
    fn shape(&self, machine: &Machine) -> Shape;

    /// Makes what the VMM will need: namespace with tap and closed policy, cgroup with limits,
    /// scratch disk. Nothing runs yet.
    ///
    /// # Errors
    /// [`PrepareError`]; the caller calls `release`.
    async fn prepare(&self, vm: VmId, machine: &Machine) -> Result<Prepared, PrepareError>;

    /// Starts the VMM, jailed, with the guest's first instruction; returns once it runs and its
    /// control socket answers. Legal once, after `prepare`.
    ///
    /// # Errors
    /// [`BootError`]; the caller calls `release`.
    async fn boot(
        &self,
        vm: VmId,
        machine: &Machine,
        prepared: &Prepared,
    ) -> Result<Identity, BootError>;

    /// As [`Hypervisor::boot`], with the guest of `from` instead of a new one: it is loaded and
    /// paused, and its next instruction runs once it is resumed. Legal once, after `prepare`.
    ///
    /// # Errors
    /// [`ForkError`]; the caller calls `release`.
    async fn fork(
        &self,
        vm: VmId,
        machine: &Machine,
        prepared: &Prepared,
        from: &ForkFrom,
    ) -> Result<Identity, ForkError>;

    /// Takes hold of a VM that this or an earlier daemon booted. The process is the one of
    /// `identity` or the call fails: pid, start time and cgroup are checked behind a pidfd.
    ///
    /// # Errors
    /// [`AttachError`]; the caller calls `release`.
    async fn attach(
        &self,
        vm: VmId,
        prepared: &Prepared,
        identity: &Identity,
    ) -> Result<Arc<dyn Vm>, AttachError>;

    /// Kills what runs and removes everything that was made for `vm`, in whatever state it is.
    /// Idempotent. Returns when nothing is left.
    ///
    /// # Errors
    /// [`ReleaseError`] names what could not be removed; calling again may help.
    async fn release(&self, vm: VmId) -> Result<(), ReleaseError>;

    /// Removes everything of VMs not in `keep`: the start-up's broom. What cannot be removed is
    /// told, and keeps nothing else from being.
    ///
    /// # Errors
    /// [`ReleaseError`] when what there is cannot be listed.
    async fn sweep(&self, keep: &BTreeSet<VmId>) -> Result<Swept, ReleaseError>;
}

/// A driver whose VMMs are processes, and what they have of the host.
#[derive(Clone)]
pub struct Driver {
    /// The driver.
    pub hypervisor: Arc<dyn Hypervisor>,
    /// What VMs have of the host, for the parts of the node that enter a VM's namespace.
    pub rooms: Arc<Rooms>,
}

impl std::fmt::Debug for Driver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let name = self.hypervisor.caps().name;
        f.debug_struct("Driver")
            .field("name", &name)
            .finish_non_exhaustive()
    }
}

impl From<Qemu> for Driver {
    fn from(qemu: Qemu) -> Self {
        let rooms = Arc::clone(qemu.rooms());
        let hypervisor = Arc::new(qemu);
        Self { hypervisor, rooms }
    }
}

impl From<Kvm> for Driver {
    fn from(kvm: Kvm) -> Self {
        let rooms = Arc::clone(kvm.rooms());
        let hypervisor = Arc::new(kvm);
        Self { hypervisor, rooms }
    }
}

/// A VM that runs, held by its actor.
#[async_trait]
pub trait Vm: Send + Sync + 'static {
    /// A new connection to the agent's channel. The port is one byte stream: the newest caller
    /// has it, and the session rules of [`spore_wire::frame`] sort out what was under way.
    ///
    /// # Errors
    /// When the VMM's socket does not answer.
    async fn agent(&self) -> std::io::Result<Box<dyn AgentStream>>;

    /// A TCP connection from inside the VM's namespace to the guest's `port`.
    ///
    /// # Errors
    /// What connect(2) says.
    async fn connect(&self, port: u16) -> std::io::Result<TcpStream>;

    /// Opens the tap for traffic, as the machine's policy says, and reads the policy back. Until
    /// then no packet passes in either direction.
    /// Idempotent: the daemon after one that died right behind this call makes it again.
    ///
    /// # Errors
    /// [`PolicyError`]; the caller kills the VM.
    async fn open_network(&self) -> Result<(), PolicyError>;

    /// Lets the guest stand still, with nothing under way on its disks. Idempotent.
    ///
    /// # Errors
    /// [`PauseError`]; whether it runs is then not known.
    async fn pause(&self) -> Result<(), PauseError>;

    /// Lets it run. Idempotent.
    ///
    /// # Errors
    /// [`PauseError`]; whether it runs is then not known.
    async fn resume(&self) -> Result<(), PauseError>;

    /// Does what of a capture can be done while the guest runs, so that it stands still for less;
    /// the capture comes while the turn is held. With a key, what is copied of its scratch disk is
    /// encrypted with it. A capture that nobody prepared for prepares itself, and encrypts nothing.
    /// With `below`, that is what the copy is over, and else what the driver finds best.
    ///
    /// # Errors
    /// [`CaptureError`]; the VM goes on.
    async fn prepare_capture(
        &self,
        _key: Option<DiskKey>,
        _below: Option<Below>,
    ) -> Result<Turn, CaptureError> {
        Ok(Turn::default())
    }

    /// Takes down what makes this VM what it is, while it is paused; legal then.
    ///
    /// # Errors
    /// [`CaptureError`]; the VM stays paused, unless it has ended.
    async fn capture(&self, afterwards: Afterwards) -> Result<Capture, CaptureError>;

    /// What it uses of the host.
    ///
    /// # Errors
    /// When the cgroup cannot be read.
    async fn stats(&self) -> std::io::Result<VmStats>;

    /// The last lines of the guest's console, which tell what happened when the agent never came.
    /// Written by a tenant. Empty where the driver keeps none.
    async fn console_tail(&self) -> Vec<String> {
        Vec::new()
    }

    /// Kills the VMM now. Idempotent; returns at once, `exited` tells when it is gone.
    fn kill(&self);

    /// Resolves when the VMM's process is gone, however that came; at once if it already is.
    async fn exited(&self) -> VmExit;

    /// Resolves, with why, when the VM runs and must not go on. The caller ends it, and lets it run
    /// for [`spore_wire::node::FAREWELL_MAX`] at most while it tells so: what it may not keep that
    /// long is closed before.
    async fn unsound(&self) -> String {
        core::future::pending().await
    }
}

/// A byte stream to the agent.
pub trait AgentStream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> AgentStream for T {}

/// What a driver is and can do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caps {
    /// `qemu`, `kvm` or `sim`.
    pub name: &'static str,
    /// For people.
    pub version: String,
    /// What stands between its guests and the host.
    pub boundary: Boundary,
    /// Host memory that a VM takes beyond its guest's, in MiB.
    pub overhead_mib: u32,
    /// And that the egress proxy of one with grants takes, in MiB.
    pub proxy_mib: u32,
    /// The guest kernel's release.
    pub kernel: String,
    /// A digest of that kernel, what it is told beside a driver's own, and the first file system,
    /// which holds the agent.
    pub guest: String,
    /// Whether its VMs can be captured, and forked from captures. Where not, everything boots.
    pub snapshots: bool,
}

/// What a VM is made of, resolved to files of this host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// vCPUs, memory, scratch disk.
    pub resources: Resources,
    /// The root image's file, read-only.
    pub image: PathBuf,
    /// The app folder's image file, read-only.
    pub folder: Option<PathBuf>,
    /// Where the guest may connect to; empty means nowhere.
    pub egress: Vec<Grant>,
}

/// What `prepare` made, for the journal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Prepared {
    /// The namespace's name in the pool, bound under the runtime folder.
    pub namespace: String,
    /// The uid that the VMM runs as, its own.
    pub uid: u32,
    /// The uid that its egress proxy runs as, where it has grants.
    #[serde(default)]
    pub egress_uid: Option<u32>,
}

/// Which process hosts the VM, for the journal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// The host's `/proc/sys/kernel/random/boot_id`: pids mean nothing after another boot.
    pub host_boot_id: String,
    /// In the host's pid namespace.
    pub pid: u32,
    /// Field 22 of `/proc/PID/stat` (proc(5)), in clock ticks.
    pub start_time: u64,
    /// The cgroup's name, made from the VM's id.
    pub cgroup: String,
}

/// What a VM uses of the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VmStats {
    /// CPU time of the VMM and the guest.
    pub cpu_us: u64,
    /// Memory charged to the VM's cgroup.
    pub memory_bytes: u64,
    /// Processes and threads.
    pub pids: u64,
}

/// How a VMM ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmExit {
    /// For people: exit code or signal where it is known, and the last lines of the VMM's own
    /// output.
    pub reason: String,
    /// Whether the kernel killed it for exceeding its memory.
    pub out_of_memory: bool,
}

/// What a sweep removed.
#[derive(Debug, Default)]
pub struct Swept {
    /// Names of processes, namespaces, cgroups, mounts and files, for the log.
    pub removed: Vec<String>,
    /// What could not be removed, which kept nothing else from being.
    pub left: Vec<Left>,
}

/// Something that a sweep had to leave.
#[derive(Debug)]
pub struct Left {
    /// Whose it is; `None` is nobody's.
    pub vm: Option<VmId>,
    /// What and why.
    pub error: ReleaseError,
}

/// Why nothing could be prepared.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum PrepareError {
    /// A step on the host failed.
    #[error("cannot prepare {what} for the VM")]
    Step {
        /// Namespace, tap, cgroup, scratch disk.
        what: &'static str,
        /// What the kernel or tool said.
        source: std::io::Error,
    },
    /// The data disk is full.
    #[error("no room for a scratch disk of {mib} MiB: free space on the data disk")]
    DiskFull {
        /// What was asked.
        mib: u32,
    },
}

/// Why a VMM did not start.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum BootError {
    /// A step of starting it failed.
    #[error("cannot start the VMM: {what}")]
    Step {
        /// Which step.
        what: &'static str,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// It ended before its control socket answered.
    #[error("the VMM ended at once: {0}")]
    Ended(String),
    /// It runs, and does not make the guest.
    #[error("the VMM refuses the guest: {0}")]
    Refused(String),
    /// An image's file is not there.
    #[error("image {path} cannot be opened")]
    Image {
        /// Which.
        path: PathBuf,
        /// What the kernel said.
        source: std::io::Error,
    },
}

/// Why a VM could not be taken hold of.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum AttachError {
    /// Another process, or none, has that pid.
    #[error("the VMM (pid {0}) is gone")]
    Gone(u32),
    /// The host was restarted since.
    #[error("the host was restarted since the VM ran")]
    AnotherBoot,
    /// Its sockets do not answer.
    #[error("the VMM's {what} does not answer")]
    Silent {
        /// Which socket.
        what: &'static str,
        /// What the kernel said.
        source: std::io::Error,
    },
}

/// What could not be removed.
#[derive(Debug, Error)]
#[error("cannot remove {what}")]
pub struct ReleaseError {
    /// A process, namespace, cgroup, mount or file.
    pub what: String,
    /// What the kernel said.
    pub source: std::io::Error,
}

/// Why the network stays closed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum PolicyError {
    /// A step failed.
    #[error("cannot set the network policy: {what}")]
    Step {
        /// Which.
        what: &'static str,
        /// What the kernel or tool said.
        source: std::io::Error,
    },
    /// What was read back is not what was written.
    #[error("the network policy read back differs: {0}")]
    Differs(String),
    /// The way out did not start.
    #[error("the VM's way out did not start: {log}")]
    Proxy {
        /// The last lines of its log.
        log: String,
        /// How it ended.
        source: LaunchError,
    },
    /// The way out is gone from a VM whose network is open.
    #[error("the VM's egress proxy is gone")]
    NoProxy,
}

/// Addresses of this host's own interfaces: a guest's egress never reaches them unasked.
pub type HostAddresses = Vec<IpAddr>;

/// Descriptors that a VMM inherits, by purpose.
#[derive(Debug)]
pub struct VmFds {
    /// The tap, opened inside the VM's namespace.
    pub tap: OwnedFd,
    /// The guest's memory: its own, or the image that it shares with other forks.
    pub memory: OwnedFd,
    /// The root image, the folder's image, and the files of the scratch disk, lowest first; behind
    /// one that is locked, its key.
    pub disks: Vec<OwnedFd>,
    /// Of a fork, what its devices begin with.
    pub state: Option<OwnedFd>,
}
