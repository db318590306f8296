//! The `qemu` driver: microVMs in software emulation, for hosts without usable KVM.
//!
//! Used through the traits of [`super`]. QEMU is confined like a process (see `jail.rs`), but its
//! software emulation is no security boundary, and the driver says so ([`Boundary::None`]). Every
//! resource of a VMM is a descriptor that the node opened; its sockets listen in the VM's folder,
//! so that the next daemon can connect.
//!
//! ```text
//!   boot: open files ▶ launcher ▶ QMP answers ▶ root and keys emptied ▶ Identity
//!   fork: the same with a source's memory and disk ▶ its devices loaded, paused ▶ Identity
//! ```

mod arguments;
mod copy;
mod files;
mod monitor;
mod program;
mod qmp;

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use serde_json::{Value, json};
use spore_wire::id::VmId;
use spore_wire::node::Boundary;
use spore_wire::snapshot::Shape;
use tokio::time::{sleep, timeout};

use self::arguments::{Begin, CPU, FD_MEMORY, Scratch, arguments, kernel_line};
use self::files::Files;
use self::monitor::QemuMonitor;
use self::program::{SAVE, can_capture, version};
use self::qmp::Qmp;
use super::fork::{ForkError, ForkFrom};
use super::monitored::allow_holes;
use super::monitored::capture::open_through;
use super::monitored::tail::log_tail;
use super::monitored::vm::{ENDING, How, MonitoredVm, Process, VmHost};
use super::room::{RoomConfig, RoomError, Rooms, blocking, uncancelled};
use super::tsc;
use super::{
    AttachError, BootError, Caps, Hypervisor, Identity, KernelArguments, Machine, PrepareError,
    Prepared, ReleaseError, Swept, Vm, process,
};
use crate::cgroup::Limits;
use crate::disk::Disks;
use crate::egress::launch::EgressLauncher;
use crate::jail;
use crate::snapshot::hash::Hash;
use crate::sys;

/// Memory of a VMM beyond its guest's: QEMU itself and its translated code.
const OVERHEAD_MIB: u32 = 128;

/// Threads of a VMM beyond its vCPUs: main loop, RCU, and up to 64 that wait for disks.
const OVERHEAD_THREADS: u32 = 80;

/// Memory of an egress proxy beside its VMM, socket buffers included where the kernel counts them.
const PROXY_MIB: u32 = 32;

/// How long QEMU may take until its monitor answers; usually 30 ms.
const QMP_TIMEOUT: Duration = Duration::from_secs(30);

/// How long QEMU may take to load its devices; usually 10 ms.
const LOAD_TIMEOUT: Duration = Duration::from_secs(30);

/// How often it is asked whether it has.
const LOAD_STEP: Duration = Duration::from_millis(1);

/// The monitor's socket in the VM's folder.
const QMP_SOCKET: &str = "qmp.sock";

const MIB: u64 = 1024 * 1024;

/// What the driver is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QemuConfig {
    /// Folders, cgroup, uids and pool.
    pub room: RoomConfig,
    /// The guest's kernel, an uncompressed ELF with a PVH entry.
    pub kernel: PathBuf,
    /// Its release, for people.
    pub kernel_release: String,
    /// What the kernel is told beside the driver's own.
    pub kernel_arguments: KernelArguments,
    /// The initramfs with the agent.
    pub initramfs: PathBuf,
    /// QEMU's program, an absolute path.
    pub qemu: PathBuf,
    /// Files and folders that QEMU is loaded from, beside its program: bound read-only into the
    /// jail, at the same paths, until it runs.
    pub libraries: Vec<PathBuf>,
    /// Program and arguments that call [`jail::main`].
    pub launcher: Vec<String>,
    /// What calls [`crate::egress::main`].
    pub egress: EgressLauncher,
}

impl QemuConfig {
    /// Where Debian's `qemu-system-x86` has its program.
    pub const DEBIAN_QEMU: &str = "/usr/bin/qemu-system-x86_64";

    /// What Debian's `qemu-system-x86` is loaded from.
    #[must_use]
    pub fn debian_libraries() -> Vec<PathBuf> {
        let all = [
            "/lib64/ld-linux-x86-64.so.2",
            "/usr/lib/x86_64-linux-gnu",
            "/usr/share/qemu",
            "/usr/share/seabios",
        ];
        all.map(PathBuf::from).to_vec()
    }
}

/// Why the driver cannot be used on this host.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum QemuError {
    /// The host's resources.
    #[error(transparent)]
    Room(#[from] RoomError),
    /// QEMU is missing or does not run.
    #[error("cannot run {program}: install the package qemu-system-x86")]
    Program {
        /// Which.
        program: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A file of the guest is missing.
    #[error("the guest's file {path} cannot be opened: run `make deps`")]
    Guest {
        /// Which.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The runtime is shutting down.
    #[error("a worker thread ended")]
    Worker(#[source] io::Error),
}

/// The driver.
#[derive(Clone, Debug)]
pub struct Qemu {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    config: QemuConfig,
    caps: Caps,
    rooms: Arc<Rooms>,
    tsc_khz: u64,
    /// What the kernel of a guest that boots is told.
    kernel_line: String,
}

/// What was found out about QEMU and the guest's files.
#[derive(Debug, Default)]
struct Found {
    version: String,
    snapshots: bool,
    guest: String,
}

impl Qemu {
    /// Looks at the host, measures its time stamp counter and starts filling the pool.
    ///
    /// # Errors
    /// [`QemuError`].
    pub async fn open(config: QemuConfig) -> Result<Self, QemuError> {
        let mut guest = blake3::Hasher::new();
        for path in [&config.kernel, &config.initramfs] {
            let failed = |source| QemuError::Guest {
                path: path.clone(),
                source,
            };
            let file = File::open(path).map_err(failed)?;
            guest.update_reader(file).map_err(failed)?;
        }
        guest.update(config.kernel_arguments.to_string().as_bytes());
        let program = config.qemu.clone();
        let told = blocking(move || Ok((version(&program)?, can_capture(&program)?)))
            .await
            .map_err(QemuError::Worker)?;
        let told = told.map_err(|source| {
            let program = config.qemu.clone();
            QemuError::Program { program, source }
        })?;
        let found = Found {
            version: told.0,
            snapshots: told.1,
            guest: guest.finalize().to_hex().to_string(),
        };
        if !found.snapshots {
            tracing::warn!(
                "this QEMU has no `{SAVE}`: VMs are booted each time, and no snapshots are taken"
            );
        }
        let tsc_khz = blocking(tsc::measure_khz)
            .await
            .map_err(QemuError::Worker)?;
        Self::with(config, found, tsc_khz)
    }

    /// The driver for stopping and removing VMs only, on a host where QEMU or the guest's files may
    /// be gone. A boot fails on what is missing.
    ///
    /// # Errors
    /// [`QemuError::Room`].
    pub fn open_to_stop(config: QemuConfig) -> Result<Self, QemuError> {
        let found = Found {
            version: "unknown".to_owned(),
            ..Found::default()
        };
        Self::with(config, found, 0)
    }

    fn with(config: QemuConfig, found: Found, tsc_khz: u64) -> Result<Self, QemuError> {
        let rooms = Arc::new(Rooms::open(config.room.clone())?);
        let caps = Caps {
            name: "qemu",
            version: found.version,
            boundary: Boundary::None,
            overhead_mib: OVERHEAD_MIB,
            proxy_mib: PROXY_MIB,
            kernel: config.kernel_release.clone(),
            guest: found.guest,
            snapshots: found.snapshots,
        };
        let kernel_line = config.kernel_arguments.after(&kernel_line(tsc_khz));
        Ok(Self {
            shared: Arc::new(Shared {
                config,
                caps,
                rooms,
                tsc_khz,
                kernel_line,
            }),
        })
    }

    /// What VMs have of the host, for the parts of the node that enter a VM's namespace.
    #[must_use]
    pub fn rooms(&self) -> &Arc<Rooms> {
        &self.shared.rooms
    }

    /// Removes the namespaces that were made ahead. VMs go on.
    ///
    /// # Errors
    /// What could not be removed; the next start's sweep does.
    pub fn close(&self) -> io::Result<()> {
        self.shared.rooms.close()
    }
}

#[async_trait]
impl Hypervisor for Qemu {
    fn caps(&self) -> &Caps {
        &self.shared.caps
    }

    fn shape(&self, machine: &Machine) -> Shape {
        let Shared { caps, tsc_khz, .. } = &*self.shared;
        let scratch = Scratch::of(&machine.resources);
        // It names neither the counter's rate nor a kernel nor the layers of a disk, and everything
        // else that counts.
        let line = arguments(Begin::Fork, &machine.resources, &scratch, "");
        let line = line.words.join("\n");
        Shape {
            driver: caps.name.to_owned(),
            version: caps.version.clone(),
            cpu: CPU.to_owned(),
            tsc_khz: u32::try_from(*tsc_khz).unwrap_or(u32::MAX),
            kernel: caps.kernel.clone(),
            devices: Hash::of(line.as_bytes()).to_string(),
        }
    }

    async fn prepare(&self, vm: VmId, machine: &Machine) -> Result<Prepared, PrepareError> {
        let (shared, machine) = (Arc::clone(&self.shared), machine.clone());
        let guard = shared.rooms.lock(vm).await;
        let step = |source| PrepareError::Step {
            what: "a task",
            source,
        };
        let work = async move {
            let prepared = shared
                .rooms
                .prepare(vm, &machine, limits(&machine), None)
                .await;
            drop(guard);
            prepared
        };
        uncancelled(work).await.map_err(step)?
    }

    async fn boot(
        &self,
        vm: VmId,
        machine: &Machine,
        prepared: &Prepared,
    ) -> Result<Identity, BootError> {
        let shared = Arc::clone(&self.shared);
        let (machine, prepared) = (machine.clone(), prepared.clone());
        let guard = shared.rooms.lock(vm).await;
        let work = async move {
            let booted = shared.start(vm, &machine, &prepared, None).await;
            drop(guard);
            booted.map(|started| started.identity)
        };
        uncancelled(work).await.map_err(|source| BootError::Step {
            what: "a task",
            source,
        })?
    }

    async fn fork(
        &self,
        vm: VmId,
        machine: &Machine,
        prepared: &Prepared,
        from: &ForkFrom,
    ) -> Result<Identity, ForkError> {
        let shared = Arc::clone(&self.shared);
        let (machine, prepared, from) = (machine.clone(), prepared.clone(), from.clone());
        let guard = shared.rooms.lock(vm).await;
        let work = async move {
            let forked = shared.fork(vm, &machine, &prepared, from).await;
            drop(guard);
            forked
        };
        let failed = |source| BootError::Step {
            what: "a task",
            source,
        };
        uncancelled(work).await.map_err(failed)?
    }

    async fn attach(
        &self,
        vm: VmId,
        prepared: &Prepared,
        identity: &Identity,
    ) -> Result<Arc<dyn Vm>, AttachError> {
        let pidfd = process::open(identity, self.shared.rooms.cgroups())?;
        let host = VmHost {
            teaches: None,
            rooms: Arc::clone(&self.shared.rooms),
            egress: self.shared.config.egress.clone(),
            how: How {
                open_memory,
                new_layer: Disks::new_layer,
                freeze_from: None,
            },
            ends: None,
        };
        let process = Process {
            pid: identity.pid,
            pidfd,
        };
        let monitor = QemuMonitor::connect(host.rooms.folder(vm).join(QMP_SOCKET));
        let attached = MonitoredVm::attach(host, vm, prepared, process, monitor).await?;
        Ok(Arc::new(attached))
    }

    async fn release(&self, vm: VmId) -> Result<(), ReleaseError> {
        let rooms = Arc::clone(&self.shared.rooms);
        let guard = rooms.lock(vm).await;
        let work = async move {
            let released = rooms.release(vm).await;
            drop(guard);
            released
        };
        uncancelled(work).await.map_err(|source| ReleaseError {
            what: format!("VM {vm}"),
            source,
        })?
    }

    async fn sweep(&self, keep: &BTreeSet<VmId>) -> Result<Swept, ReleaseError> {
        let (rooms, keep) = (Arc::clone(&self.shared.rooms), keep.clone());
        uncancelled(async move { rooms.sweep(&keep).await })
            .await
            .map_err(|source| ReleaseError {
                what: "strays".to_owned(),
                source,
            })?
    }
}

fn limits(machine: &Machine) -> Limits {
    let resources = &machine.resources;
    let (proxy_mib, proxies) = if machine.egress.is_empty() {
        (0, 0)
    } else {
        (PROXY_MIB, 1)
    };
    Limits {
        memory_bytes: u64::from(resources.memory_mib + OVERHEAD_MIB + proxy_mib) * MIB,
        cpus: resources.cpus,
        pids: u32::from(resources.cpus) + OVERHEAD_THREADS + proxies,
    }
}

/// A VMM that runs and whose root is empty.
#[derive(Debug)]
struct Started {
    identity: Identity,
    monitor: Qmp,
    log: OwnedFd,
    /// How many descriptors it was given.
    fds: usize,
}

/// What was launched, and what of its files the node needs further.
#[derive(Debug)]
struct Launched {
    pid: u32,
    log: OwnedFd,
    keys: Vec<File>,
}

impl Shared {
    async fn start(
        self: &Arc<Self>,
        vm: VmId,
        machine: &Machine,
        prepared: &Prepared,
        from: Option<ForkFrom>,
    ) -> Result<Started, BootError> {
        let step = |what| move |source| BootError::Step { what, source };
        let tap = self.rooms.namespaces().open_tap(&prepared.namespace).await;
        let tap = tap.map_err(step("opening the tap"))?;
        let (this, machine) = (Arc::clone(self), machine.clone());
        let jail = self.jail(vm, &machine, prepared, from.as_ref());
        let launched = {
            let jail = jail.clone();
            blocking(move || {
                let files = this.open_files(vm, &machine, tap, from.as_ref())?;
                let launched = this.launch(&jail, &files);
                let Files { log, keys, .. } = files;
                launched
                    .map(|pid| Launched { pid, log, keys })
                    .map_err(|error| step("the jail")(io::Error::other(error)))
            })
            .await
        };
        let Launched { pid, log, keys } = launched.map_err(step("a worker thread"))??;
        let identity = process::identity(pid, &vm.to_string());
        let identity = identity.map_err(|_gone| BootError::Ended(log_tail(&log)))?;
        let monitor = self.await_monitor(vm, &identity, &log).await?;
        // The VMM has read them; from now on it alone has them, and nobody after it.
        let emptied = keys.iter().try_for_each(|key| key.set_len(0));
        emptied.map_err(step("emptying the files of keys"))?;
        let fds = jail.fds;
        let emptied = blocking(move || jail::empty_root(pid, &jail)).await;
        emptied
            .and_then(|done| done)
            .map_err(step("emptying its root"))?;
        Ok(Started {
            identity,
            monitor,
            log,
            fds,
        })
    }

    async fn fork(
        self: &Arc<Self>,
        vm: VmId,
        machine: &Machine,
        prepared: &Prepared,
        from: ForkFrom,
    ) -> Result<Identity, ForkError> {
        from.check(machine)?;
        let bytes = limits(machine).memory_bytes;
        allow_holes(&self.rooms, vm, bytes, &from)?;
        let started = self.start(vm, machine, prepared, Some(from)).await?;
        let Started {
            identity,
            mut monitor,
            log,
            fds,
        } = started;
        let loaded = load(&mut monitor, fds - 1).await;
        loaded.map_err(|error| ForkError::Load(format!("{error}; {}", log_tail(&log))))?;
        Ok(identity)
    }

    /// Waits until the monitor answers, or the VMM ends.
    async fn await_monitor(
        &self,
        vm: VmId,
        identity: &Identity,
        log: &OwnedFd,
    ) -> Result<Qmp, BootError> {
        let ended = || BootError::Ended(log_tail(log));
        let step = |what| move |source| BootError::Step { what, source };
        let pidfd = process::open(identity, self.rooms.cgroups()).map_err(|_gone| ended())?;
        let pidfd = sys::watch(pidfd).map_err(step("watching it"))?;
        let socket = self.rooms.folder(vm).join(QMP_SOCKET);
        tokio::select! {
            biased;
            _readable = pidfd.readable() => Err(ended()),
            monitor = Qmp::connect(&socket, QMP_TIMEOUT) => match monitor {
                Ok(monitor) => Ok(monitor),
                // A VMM that ends resets the connection a moment before its pidfd tells.
                Err(source) => match timeout(ENDING, pidfd.readable()).await {
                    Ok(_readable) => Err(ended()),
                    Err(_elapsed) => Err(step("its control socket")(source)),
                },
            },
        }
    }
}

/// Loads the devices of a fork; its guest is paused before and after.
async fn load(monitor: &mut Qmp, state: usize) -> io::Result<()> {
    let uri = format!("fd:{state}");
    monitor
        .execute("migrate-incoming", json!({"uri": uri}))
        .await?;
    let loaded = async {
        loop {
            let told = monitor.execute("query-migrate", json!({})).await?;
            match told.get("status").and_then(Value::as_str) {
                Some("completed") => return Ok(()),
                Some("failed") => return Err(io::Error::other(told.to_string())),
                _ => sleep(LOAD_STEP).await,
            }
        }
    };
    timeout(LOAD_TIMEOUT, loaded)
        .await
        .map_err(|_elapsed| io::Error::from(io::ErrorKind::TimedOut))?
}

/// The descriptor that the VMM was given for its memory, opened again.
fn open_memory(pid: u32, _bytes: u64) -> io::Result<File> {
    open_through(&format!("/proc/{pid}/fd/{FD_MEMORY}"))
}
