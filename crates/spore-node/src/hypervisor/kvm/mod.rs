//! The `kvm` driver: microVMs in Spore's own VMM (`spore-vmm`), for hosts with usable KVM.
//!
//! Used through the traits of [`super`]. A VMM is started with nothing but `/dev/kvm` and a socket
//! that listens in the VM's folder; what its guest is made of comes over that socket, with open
//! descriptors. It opens nothing itself.
//!
//! ```text
//!   boot: zygote ▶ VMM, jailed ▶ cgroup ▶ it greets ▶ blob and files ▶ Resume ▶ Identity
//!   fork: the same with a source's memory, devices and disk, and without Resume
//! ```

mod client;
mod files;
mod monitor;
mod packet;
mod parked;
mod start;
mod strays;
mod zygote;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use async_trait::async_trait;
use spore_wire::id::VmId;
use spore_wire::launch::Rates;
use spore_wire::node::Boundary;
use spore_wire::snapshot::Shape;
use spore_wire::vmm::ToVmm;

use self::monitor::KvmMonitor;
use self::parked::Parking;
use self::zygote::{ZygoteConfig, Zygotes};
use super::fork::{ForkError, ForkFrom, ForkMemory};
use super::memory_image::MemoryImage;
use super::monitored::capture::open_through;
use super::monitored::vm::{How, MonitoredVm, Process, VmHost};
use super::monitored::{Ends, allow_holes, pages};
use super::room::{RoomConfig, RoomError, Rooms, blocking, uncancelled};
use super::tsc;
use super::{
    AttachError, BootError, Caps, Hypervisor, Identity, KernelArguments, Machine, PrepareError,
    Prepared, ReleaseError, Swept, Vm, process,
};
use crate::cgroup::Limits;
use crate::egress::launch::EgressLauncher;
use crate::snapshot::hash::Hash;

/// Memory of a VMM beyond its guest's: its own, and what KVM and the kernel keep for it.
const OVERHEAD_MIB: u32 = 48;

/// Threads of a VMM beyond its vCPUs: the first, its devices', one that copies a disk, and two that
/// the kernel makes for KVM.
const OVERHEAD_THREADS: u32 = 8;

/// Memory of an egress proxy beside its VMM, socket buffers included where the kernel counts them.
const PROXY_MIB: u32 = 32;

/// How long a VMM may take until it greets; usually some milliseconds.
const GREETING_TIMEOUT: Duration = Duration::from_secs(30);

/// How long it may take to make a guest, beside what each request may.
const LAUNCH_TIMEOUT: Duration = Duration::from_secs(20);

/// The control socket in the VM's folder.
const CONTROL_SOCKET: &str = "vmm.sock";

const MIB: u64 = 1024 * 1024;

/// What the driver is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KvmConfig {
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
    /// `spore-vmm`, an absolute path.
    pub vmm: PathBuf,
    /// `/dev/kvm`.
    pub device: PathBuf,
    /// What stands between guests and the host: [`Boundary::Kvm`] or [`Boundary::KvmNested`].
    pub boundary: Boundary,
    /// VMMs that are made ahead, at most.
    pub parked: usize,
    /// From so much own memory on, a checkpoint reads it from a frozen copy of the VMM.
    pub freeze_from_mib: u32,
    /// How much the devices of each VM do at most, from its start on.
    pub rates: Rates,
    /// What calls [`crate::egress::main`].
    pub egress: EgressLauncher,
}

/// Why the driver cannot be used on this host.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KvmError {
    /// The host's resources.
    #[error(transparent)]
    Room(#[from] RoomError),
    /// KVM is not there.
    #[error("{path} cannot be opened: load the module kvm_intel or kvm_amd, or force `qemu`")]
    Device {
        /// Where it should be.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A file of the guest's or the VMM is missing.
    #[error("the file {path} cannot be opened: run `make up`")]
    File {
        /// Which.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The host's processor cannot be told.
    #[error("the host's processor cannot be told")]
    Processor(#[source] io::Error),
    /// The runtime is shutting down.
    #[error("a worker thread ended")]
    Worker(#[source] io::Error),
}

/// The driver.
#[derive(Clone, Debug)]
pub struct Kvm {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    config: KvmConfig,
    caps: Caps,
    rooms: Arc<Rooms>,
    zygotes: Zygotes,
    parking: Parking,
    firsts: Firsts,
    /// A digest of the host's processor: what a guest sees is made of it.
    cpu: String,
    tsc_khz: u32,
}

impl Kvm {
    /// Looks at the host and starts filling the pool.
    ///
    /// # Errors
    /// [`KvmError`].
    pub async fn open(config: KvmConfig) -> Result<Self, KvmError> {
        let opened = |path: &PathBuf| {
            File::open(path).map_err(|source| KvmError::File {
                path: path.clone(),
                source,
            })
        };
        File::options()
            .read(true)
            .write(true)
            .open(&config.device)
            .map_err(|source| KvmError::Device {
                path: config.device.clone(),
                source,
            })?;
        opened(&config.vmm)?;
        let mut guest = blake3::Hasher::new();
        for path in [&config.kernel, &config.initramfs] {
            let hashed = guest.update_reader(opened(path)?);
            hashed.map_err(|source| KvmError::File {
                path: path.clone(),
                source,
            })?;
        }
        guest.update(config.kernel_arguments.to_string().as_bytes());
        let guest = guest.finalize().to_hex().to_string();
        let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").map_err(KvmError::Processor)?;
        let tsc_khz = blocking(tsc::measure_khz).await.map_err(KvmError::Worker)?;
        Self::with(config, guest, processor(&cpuinfo), tsc_khz)
    }

    /// The driver for stopping and removing VMs only. A boot fails on what is missing.
    ///
    /// # Errors
    /// [`KvmError::Room`].
    pub fn open_to_stop(config: KvmConfig) -> Result<Self, KvmError> {
        Self::with(config, String::new(), String::new(), 0)
    }

    fn with(config: KvmConfig, guest: String, cpu: String, tsc_khz: u64) -> Result<Self, KvmError> {
        let rooms = Arc::new(Rooms::open(config.room.clone())?);
        let caps = Caps {
            name: "kvm",
            version: env!("CARGO_PKG_VERSION").to_owned(),
            boundary: config.boundary,
            overhead_mib: OVERHEAD_MIB,
            proxy_mib: PROXY_MIB,
            kernel: config.kernel_release.clone(),
            guest,
            snapshots: true,
        };
        let tsc_khz = u32::try_from(tsc_khz).unwrap_or(u32::MAX);
        let zygotes = Zygotes::new(ZygoteConfig {
            program: config.vmm.clone(),
            device: config.device.clone(),
            uids: (config.room.uid_first, config.room.uid_count),
        });
        let parking = Parking::new(config.parked);
        Ok(Self {
            shared: Arc::new(Shared {
                config,
                caps,
                rooms,
                zygotes,
                parking,
                firsts: Firsts::default(),
                cpu,
                tsc_khz,
            }),
        })
    }

    /// What VMs have of the host, for the parts of the node that enter a VM's namespace.
    #[must_use]
    pub fn rooms(&self) -> &Arc<Rooms> {
        &self.shared.rooms
    }

    /// Ends the VMMs that were made ahead. Blocks.
    pub fn close(&self) {
        self.shared.empty_parking();
    }
}

/// What of a host's processor a guest may see: who made it, which it is and what it can. A digest,
/// since it is only compared.
fn processor(cpuinfo: &str) -> String {
    let told = ["vendor_id", "cpu family", "model", "stepping", "flags"];
    let first = cpuinfo.split("\n\n").next().unwrap_or_default();
    let lines = first.lines().filter(|line| {
        let name = line.split(':').next().unwrap_or_default().trim();
        told.contains(&name)
    });
    let text = lines.collect::<Vec<_>>().join("\n");
    Hash::of(text.as_bytes()).to_string()
}

#[async_trait]
impl Hypervisor for Kvm {
    fn caps(&self) -> &Caps {
        &self.shared.caps
    }

    fn shape(&self, machine: &Machine) -> Shape {
        let Shared {
            caps, cpu, tsc_khz, ..
        } = &*self.shared;
        let resources = &machine.resources;
        let (cpus, memory) = (resources.cpus, resources.memory_mib);
        let devices = format!("{cpus} {memory} {}", resources.disk_mib > 0);
        Shape {
            driver: caps.name.to_owned(),
            version: caps.version.clone(),
            cpu: cpu.clone(),
            tsc_khz: *tsc_khz,
            kernel: caps.kernel.clone(),
            devices: Hash::of(devices.as_bytes()).to_string(),
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
            let waits = shared.hand(vm, &machine);
            let limits = limits(&machine);
            let prepared = shared.rooms.prepare(vm, &machine, limits, waits).await;
            if prepared.is_err() {
                let this = Arc::clone(&shared);
                // Its end is waited for; a runtime that ends lets go of it too.
                let _forgone = blocking(move || this.forgo(vm)).await;
            }
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
            let booted = shared.boot(vm, &machine, &prepared).await;
            drop(guard);
            booted
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
            rooms: Arc::clone(&self.shared.rooms),
            egress: self.shared.config.egress.clone(),
            how: How {
                open_memory,
                new_layer: files::new_layer,
                freeze_from: Some(u64::from(self.shared.config.freeze_from_mib) * MIB),
            },
            ends: Some(Arc::clone(self.shared.zygotes.ends()) as Arc<dyn Ends>),
            teaches: self.shared.firsts.take(vm),
        };
        let process = Process {
            pid: identity.pid,
            pidfd,
        };
        let disks = host.rooms.disks().clone();
        let socket = host.rooms.folder(vm).join(CONTROL_SOCKET);
        let monitor = KvmMonitor::connect(socket, disks);
        let attached = MonitoredVm::attach(host, vm, prepared, process, monitor).await?;
        Ok(Arc::new(attached))
    }

    async fn release(&self, vm: VmId) -> Result<(), ReleaseError> {
        let shared = Arc::clone(&self.shared);
        let guard = shared.rooms.lock(vm).await;
        let work = async move {
            let this = Arc::clone(&shared);
            // Its end is waited for.
            let forgone = blocking(move || this.forgo(vm)).await;
            if let Err(error) = forgone {
                tracing::error!(%vm, %error, "a VMM that waited for a guest is left");
            }
            // One that was never attached to teaches nothing.
            drop(shared.firsts.take(vm));
            let released = shared.rooms.release(vm).await;
            drop(guard);
            released
        };
        uncancelled(work).await.map_err(|source| ReleaseError {
            what: format!("VM {vm}"),
            source,
        })?
    }

    async fn sweep(&self, keep: &BTreeSet<VmId>) -> Result<Swept, ReleaseError> {
        let (shared, keep) = (Arc::clone(&self.shared), keep.clone());
        uncancelled(async move { shared.sweep(&keep).await })
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

/// The forks that were made since they were attached to last, with the memories that do not know
/// yet what their forks write to.
#[derive(Debug, Default)]
struct Firsts(Mutex<BTreeMap<VmId, Weak<MemoryImage>>>);

impl Firsts {
    fn note(&self, vm: VmId, memory: &ForkMemory) {
        let ForkMemory::Shared(image) = memory else {
            return;
        };
        if image.ahead().is_none() {
            self.lock().insert(vm, Arc::downgrade(image));
        }
    }

    fn take(&self, vm: VmId) -> Option<Weak<MemoryImage>> {
        self.lock().remove(&vm)
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<VmId, Weak<MemoryImage>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Shared {
    async fn boot(
        self: &Arc<Self>,
        vm: VmId,
        machine: &Machine,
        prepared: &Prepared,
    ) -> Result<Identity, BootError> {
        let mut started = self.launch(vm, machine, prepared, None).await?;
        let resumed = started.client.ask(&ToVmm::Resume, &[], Duration::ZERO);
        match resumed.await {
            Ok(_) => Ok(started.identity),
            Err(error) => Err(self.refused(&started, &error).await),
        }
    }

    async fn fork(
        self: &Arc<Self>,
        vm: VmId,
        machine: &Machine,
        prepared: &Prepared,
        from: ForkFrom,
    ) -> Result<Identity, ForkError> {
        from.check(machine)?;
        allow_holes(&self.rooms, vm, limits(machine).memory_bytes, &from)?;
        let memory = from.memory.clone();
        match self.launch(vm, machine, prepared, Some(from)).await {
            Ok(started) => {
                self.firsts.note(vm, &memory);
                Ok(started.identity)
            }
            Err(BootError::Refused(why)) => Err(ForkError::Load(why)),
            Err(error) => Err(error.into()),
        }
    }
}

impl Shared {
    /// VMMs in no cgroup go first: what follows frees their uids.
    async fn sweep(self: &Arc<Self>, keep: &BTreeSet<VmId>) -> Result<Swept, ReleaseError> {
        let failed = |source| ReleaseError {
            what: "VMMs of nobody's".to_owned(),
            source,
        };
        let in_use = self.rooms.uids_of(keep).map_err(failed)?;
        let (program, uids) = (self.config.vmm.clone(), self.rooms.uids());
        let ended = blocking(move || strays::end(&program, uids, &in_use)).await;
        let ended = ended.flatten().map_err(failed)?;
        let mut swept = self.rooms.sweep(keep).await?;
        swept.removed.extend(ended);
        Ok(swept)
    }
}

/// The file that the VMM has mapped as its guest's memory, opened through it.
fn open_memory(pid: u32, bytes: u64) -> io::Result<File> {
    let (from, to) = pages::find_memory(pid, bytes)?;
    open_through(&format!("/proc/{pid}/map_files/{from:x}-{to:x}"))
}

#[cfg(test)]
mod tests {
    use super::processor;

    #[test]
    fn a_processor_is_told_by_what_it_is_and_can() {
        let one = "processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel\t\t: 1\ncpu MHz\t: 2000.1\n\
                   flags\t\t: fpu vme\n\nprocessor\t: 1\nflags\t\t: other\n";
        let same = one.replace("2000.1", "1999.9").replace("other", "another");
        assert_eq!(processor(one), processor(&same));
        for (from, to) in [("vme", "vme de"), ("model\t\t: 1", "model\t\t: 2")] {
            assert_ne!(processor(one), processor(&one.replace(from, to)));
        }
    }
}
