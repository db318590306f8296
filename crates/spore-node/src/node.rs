//! The handle of a node: what control may ask of this host.
//!
//! Made once by the program, cloned by whoever needs it. Making it re-adopts what an earlier daemon
//! left: VMs that live go on, everything else is removed. A handle decides nothing about a VM; it
//! admits, spawns actors, and passes requests to them.

use core::time::Duration;
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use spore_wire::guest::{AgentStatus, AppSecrets, Exec, WriteFile};
use spore_wire::id::{ImageId, SnapshotId, VmId};
use spore_wire::node::{
    NodeStatus, Source, StartVm, StopMode, TemplateMiss, VmFailure, VmFailureKind, VmPhase,
    VmStatus,
};
use thiserror::Error;
use tokio::net::TcpStream;
use tokio::sync::Semaphore;

use crate::capacity::{Ask, Capacity, CapacityLimits, Egress, NoRoom};
use crate::config::{Config, Images};
use crate::hypervisor::{Hypervisor, Machine, ReleaseError, Swept, VmStats};
use crate::journal::{Journal, JournalError, Record};
use crate::log::{LogStore, is_name};
use crate::snapshot::StoreError;
use crate::snapshot::key::{Keys, SnapshotKey};
use crate::snapshot::memory::{NoImageRoom, Pin};
use crate::snapshots::{Snapshots, SnapshotsError};
use crate::take::asleep;
use crate::template::{Resolved, Templates};
use crate::vm::actor::{self, Access, ActorHandle, Adopted, Given, Host, VmRequest};
use crate::vm::board::{Board, Watch};
use crate::vm::guest::{ExecStream, FileReader, FileWriter, GuestError, chain};
use crate::vm::state::{Begin, VmEvent};
use crate::vm::tasks::Tasks;

/// How long something asked of a guest waits for a session with its agent.
const SESSION_WAIT: Duration = Duration::from_secs(20);

/// One host's VMs; clones are the same node.
#[derive(Clone, Debug)]
pub struct Node {
    host: Arc<Host>,
    images: Arc<dyn Images>,
    templates: Arc<Templates>,
}

/// How often what could not be removed at the start is tried again.
const QUARANTINE_PAUSE: Duration = Duration::from_secs(30);

/// What a node found when it was opened.
#[derive(Debug, Default)]
pub struct Adoption {
    /// VMs of the earlier daemon that live on.
    pub adopted: Vec<VmId>,
    /// VMs of which something was left, and why it was removed; some may still be under way.
    pub released: Vec<(VmId, String)>,
    /// VMs that could be neither adopted nor removed, and why. Their names and uids stay taken;
    /// removing them is tried again and again.
    pub quarantined: Vec<(VmId, String)>,
    /// What belonged to no VM.
    pub swept: Swept,
}

/// Why a node cannot be opened.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The journals.
    #[error("cannot open the journal")]
    Journal(#[from] JournalError),
    /// What an earlier daemon left cannot even be listed.
    #[error("cannot list what an earlier daemon left: check the runtime folder and the cgroups")]
    Sweep(#[from] ReleaseError),
    /// The snapshots.
    #[error("cannot open the store of snapshots")]
    Snapshots(#[from] SnapshotsError),
}

/// Why a VM was not started. Nothing was made for it.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum StartError {
    /// The host has no room.
    #[error("the host has no room: {0}")]
    NoRoom(#[from] NoRoom),
    /// The host does not say how much memory it has.
    #[error("cannot read how much memory the host has available: is /proc mounted?")]
    Memory(#[source] std::io::Error),
    /// The node does not have the image.
    #[error("this node does not have the image {0}: build or upload it first")]
    Image(ImageId),
    /// A name that cannot become a part of a path.
    #[error("`{0}` is not a name of an account or app: use a-z, 0-9 and -, at most 40")]
    Name(String),
    /// The driver of this node can only boot.
    #[error("VMs of this node cannot begin from a snapshot: start the VM without one")]
    NoForks,
    /// Memories of other snapshots are in use.
    #[error("the host has no room for the memory of the snapshot: {0}")]
    NoImageRoom(#[from] NoImageRoom),
    /// Another one that it was to start with has no room.
    #[error("not all VMs have room, so none is started")]
    NotAll,
    /// Not a key.
    #[error("the key of snapshot {id} has {bytes} bytes, and 32 are expected")]
    Key {
        /// Of which.
        id: SnapshotId,
        /// How long it is.
        bytes: usize,
    },
}

/// Whether several starts are one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Together {
    /// Each for itself, in their order.
    Each,
    /// All, or none.
    All,
}

/// Why it cannot be told which images are in use; then every one may be.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum InUseError {
    /// Those of VMs.
    #[error("cannot read what VMs need")]
    Journal(#[from] JournalError),
    /// Those of snapshots.
    #[error("cannot read what snapshots need")]
    Store(#[from] StoreError),
}

impl StartError {
    /// The same, as a VM's failure.
    #[must_use]
    pub fn failure(&self) -> VmFailure {
        VmFailure {
            kind: match self {
                Self::NoRoom(_) | Self::NoImageRoom(_) | Self::NotAll => VmFailureKind::NoCapacity,
                Self::NoForks | Self::Key { .. } => VmFailureKind::Snapshot,
                Self::Image(_) => VmFailureKind::Image,
                Self::Name(_) | Self::Memory(_) => VmFailureKind::Boot,
            },
            message: self.to_string(),
            last_lines: Vec::new(),
        }
    }
}

/// Why something asked of a VM was not done.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum VmError {
    /// The node does not know it.
    #[error("this node has no VM {0}")]
    Unknown(VmId),
    /// It is not in a state for that.
    #[error("the VM {vm} is {phase:?}: wait until it is ready, or start another")]
    NotReady {
        /// Which.
        vm: VmId,
        /// Where it stands.
        phase: VmPhase,
    },
    /// Its agent.
    #[error(transparent)]
    Guest(#[from] GuestError),
    /// Nobody said where something listens in it.
    #[error("the VM {0} was started without an app: it has no port to connect to")]
    NoPort(VmId),
    /// Its port.
    #[error("cannot connect to the app's port {port}")]
    Connect {
        /// Which.
        port: u16,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// Its cgroup.
    #[error("cannot read what the VM {vm} uses")]
    Stats {
        /// Which.
        vm: VmId,
        /// What the kernel said.
        source: std::io::Error,
    },
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every critical section leaves its value whole, so a poisoned one is still usable.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn ask_of(start: &StartVm) -> Ask {
    let egress = if start.egress.is_empty() {
        Egress::None
    } else {
        Egress::Proxy
    };
    Ask {
        resources: start.resources,
        egress,
        image_mib: 0,
    }
}

fn keys_of(start: &StartVm) -> Result<Keys, StartError> {
    let keys = start.keys.iter().map(|(id, key)| {
        let (id, bytes) = (*id, key.expose());
        let key = SnapshotKey::from_slice(bytes);
        let bytes = bytes.len();
        Ok((id, key.ok_or(StartError::Key { id, bytes })?))
    });
    keys.collect()
}

/// Removes a VM that nobody can take up, or says that it is to be quarantined.
async fn discard(host: &Host, vm: VmId, reason: String, adoption: &mut Adoption) {
    tracing::warn!(%vm, %reason, "a VM of an earlier daemon is removed");
    match remove(host, vm).await {
        Ok(()) => adoption.released.push((vm, reason)),
        Err(left) => adoption.quarantined.push((vm, format!("{reason}; {left}"))),
    }
}

async fn remove(host: &Host, vm: VmId) -> Result<(), String> {
    let released = host.hypervisor.release(vm).await;
    released.map_err(|error| chain(&error))?;
    host.journal.remove(vm).map_err(|error| chain(&error))
}

/// Tries until nothing is left of a VM that nobody lives.
async fn remove_in_the_end(host: Arc<Host>, vm: VmId) {
    loop {
        tokio::time::sleep(QUARANTINE_PAUSE).await;
        match remove(&host, vm).await {
            Ok(()) => {
                tracing::info!(%vm, "a VM that could not be removed is gone");
                return;
            }
            Err(reason) => tracing::debug!(%vm, %reason, "a VM still cannot be removed"),
        }
    }
}

impl Node {
    /// Opens the node: adopts what lives of an earlier daemon's VMs and removes the rest.
    ///
    /// # Errors
    /// [`OpenError`]; VMs that live are left alone then.
    pub async fn open(
        config: Config,
        hypervisor: Arc<dyn Hypervisor>,
        images: Arc<dyn Images>,
    ) -> Result<(Self, Adoption), OpenError> {
        let caps = hypervisor.caps().clone();
        let journal = Journal::open(&config.runtime, caps.name)?;
        let snapshots = Snapshots::open(
            config.snapshots.clone(),
            config.runtime.clone(),
            Arc::clone(&config.clock),
            journal.clone(),
        )?;
        let records = journal.read_all()?;
        let limits = CapacityLimits {
            overhead_mib: u64::from(caps.overhead_mib),
            proxy_mib: u64::from(caps.proxy_mib),
            ..config.capacity
        };
        let host = Arc::new(Host {
            journal,
            logs: LogStore::new(config.logs.clone()),
            snapshots,
            board: Board::default(),
            turns: Arc::new(Semaphore::new(config.boots_max)),
            capacity: Mutex::new(Capacity::new(limits)),
            actors: Mutex::default(),
            tasks: Tasks::default(),
            hypervisor,
            config,
        });
        let mut adoption = Adoption::default();
        let mut usable = Vec::new();
        for (vm, record) in records {
            match record {
                Ok(record) if record.start.purpose.is_serve() => usable.push(record),
                Ok(_builder) => {
                    let reason = "the template that it was for is not made".to_owned();
                    discard(&host, vm, reason, &mut adoption).await;
                }
                Err(error) => {
                    let reason = format!("its journal cannot be used: {}", chain(&error));
                    discard(&host, vm, reason, &mut adoption).await;
                }
            }
        }
        // The broom goes before the first new start could be taken for rubbish.
        let quarantined = adoption.quarantined.iter().map(|(vm, _reason)| *vm);
        let keep = usable.iter().map(|record| record.start.vm);
        let keep: BTreeSet<VmId> = keep.chain(quarantined).collect();
        adoption.swept = host.hypervisor.sweep(&keep).await?;
        for left in &adoption.swept.left {
            let reason = chain(&left.error);
            match left.vm {
                Some(vm) => adoption.quarantined.push((vm, reason)),
                None => tracing::error!(%reason, "something is left; the next start tries again"),
            }
        }
        // An opening that is given up leaves no actor behind.
        let unless_given_up = host.tasks.end_on_drop();
        for (vm, reason) in &adoption.quarantined {
            tracing::error!(%vm, %reason, "a VM of an earlier daemon cannot be removed");
            let removing = remove_in_the_end(Arc::clone(&host), *vm);
            host.tasks.spawn(removing);
        }
        let (templates, wanted) = Templates::new();
        let node = Self {
            host,
            images,
            templates: Arc::new(templates),
        };
        node.adopt(usable, &mut adoption).await?;
        node.serve_templates(wanted).await?;
        drop(unless_given_up.disarm());
        Ok((node, adoption))
    }

    async fn adopt(&self, records: Vec<Record>, adoption: &mut Adoption) -> Result<(), OpenError> {
        let mut actors = Vec::new();
        for record in records {
            let record = asleep(&self.host, record)?;
            let vm = record.start.vm;
            lock(&self.host.capacity).adopt(vm, ask_of(&record.start));
            let first = VmEvent::Adopt(record.milestone);
            let memories = self.host.snapshots.memories();
            let given = Given {
                pin: match record.start.source {
                    Source::Snapshot(id) => {
                        Some(memories.pin_stray(id, record.start.resources.memory_bytes()))
                    }
                    _ => None,
                },
                ..Given::default()
            };
            actors.push((vm, actor::spawn(&self.host, record, given, first)));
        }
        for (vm, mut handle) in actors {
            let settled = handle
                .adopted
                .wait_for(|adopted| *adopted != Adopted::Unknown)
                .await;
            if settled.is_ok_and(|adopted| *adopted == Adopted::Alive) {
                tracing::info!(%vm, "a VM of an earlier daemon goes on");
                adoption.adopted.push(vm);
            } else {
                let reason = "it was half made, gone or ending".to_owned();
                tracing::warn!(%vm, %reason, "a VM of an earlier daemon is removed");
                adoption.released.push((vm, reason));
            }
        }
        Ok(())
    }

    /// Ends this daemon's part and leaves the VMs as they are, for the next daemon to adopt.
    pub async fn detach(&self) {
        self.host.tasks.end().await;
    }

    /// Starts a VM. Starting one twice is one start; for a VM that was adopted, the second start
    /// tells its actor the secrets again, without which its output is not kept.
    ///
    /// # Errors
    /// [`StartError`]; nothing was made then, and the same id may be used again.
    pub fn start(&self, start: StartVm) -> Result<VmStatus, StartError> {
        // One lock from the look to the entry: two starts at once are one.
        self.start_in(&mut lock(&self.host.capacity), start)
    }

    /// Starts several VMs, as [`Self::start`] does each; nobody else gets room meanwhile. With
    /// [`Together::All`] none starts unless there is room for all.
    #[must_use]
    pub fn start_many(
        &self,
        starts: Vec<StartVm>,
        together: Together,
    ) -> Vec<Result<VmStatus, StartError>> {
        let mut capacity = lock(&self.host.capacity);
        // What they begin from takes room too, and keeps it until each has its own pin.
        let _pins = match together {
            Together::Each => Vec::new(),
            Together::All => match self.admit_all(&mut capacity, &starts) {
                Ok(pins) => pins,
                Err(error) => {
                    let others = starts.iter().skip(1).map(|_start| Err(StartError::NotAll));
                    return std::iter::once(Err(error)).chain(others).collect();
                }
            },
        };
        let start = |start| self.start_in(&mut capacity, start);
        starts.into_iter().map(start).collect()
    }

    /// Gives every start its share, which it then has, or none.
    fn admit_all(
        &self,
        capacity: &mut Capacity,
        starts: &[StartVm],
    ) -> Result<Vec<Option<Pin>>, StartError> {
        let pins = starts.iter().map(|start| self.pin(start));
        let pins = pins.collect::<Result<Vec<_>, _>>()?;
        for (index, start) in starts.iter().enumerate() {
            if let Err(error) = self.admit(capacity, start) {
                // One that is there already keeps what it has.
                let is_new = |start: &&StartVm| self.host.board.get(start.vm).is_none();
                let before = starts.iter().take(index).filter(is_new);
                before.for_each(|start| capacity.release(start.vm));
                return Err(error);
            }
        }
        Ok(pins)
    }

    fn start_in(
        &self,
        capacity: &mut Capacity,
        mut start: StartVm,
    ) -> Result<VmStatus, StartError> {
        let vm = start.vm;
        for name in [&start.owner.account, &start.owner.app] {
            if !is_name(name) {
                return Err(StartError::Name(name.chars().take(64).collect()));
            }
        }
        let secrets = start.process.as_ref();
        let secrets = secrets.map_or_else(AppSecrets::default, |process| AppSecrets {
            environment: process.secret_environment.clone(),
            files: process.secret_files.clone(),
        });
        if let Some(status) = self.host.board.get(vm) {
            if let Some(actor) = self.actor(vm) {
                let told = VmRequest::Secrets(Arc::new(secrets));
                if actor.requests.try_send(told).is_err() {
                    tracing::debug!(%vm, "the VM's actor is busy or gone; secrets not told");
                }
            }
            return Ok(status);
        }
        let machine = Machine {
            resources: start.resources,
            image: self.image(&start.image)?,
            folder: match &start.folder {
                Some(id) => Some(self.image(id)?),
                None => None,
            },
            egress: start.egress.clone(),
        };
        let keys = keys_of(&start)?;
        let resolved = self.resolve(&mut start, &machine);
        let admitted = self.give_room(capacity, &mut start, &resolved);
        self.templates.begun(&resolved, &start, admitted.is_ok());
        let (pin, missed) = admitted?;
        let mut record = Record::new(self.host.hypervisor.caps().name, &start, machine);
        record.missed = missed;
        let begin = match start.source {
            Source::Boot => Begin::Boot,
            _ => Begin::Fork,
        };
        let given = Given {
            secrets: Some(secrets),
            keys,
            pin,
        };
        actor::spawn(&self.host, record, given, VmEvent::Start(begin));
        self.host
            .board
            .get(vm)
            .ok_or_else(|| unreachable!("a VM is on the board from its start on"))
    }

    /// Gives `start` its share of the host, and what it begins from room. A template that finds
    /// none costs its VM a boot and nothing else.
    fn give_room(
        &self,
        capacity: &mut Capacity,
        start: &mut StartVm,
        resolved: &Resolved,
    ) -> Result<(Option<Pin>, Option<TemplateMiss>), StartError> {
        let admitted = self.pin(start).and_then(|pin| {
            self.admit(capacity, start)?;
            Ok(pin)
        });
        match admitted {
            Ok(pin) => Ok((pin, resolved.missed)),
            Err(_no_room) if resolved.is_hit() => {
                start.source = Source::Boot;
                self.admit(capacity, start)?;
                Ok((None, Some(TemplateMiss::NoRoom)))
            }
            Err(error) => Err(error),
        }
    }

    /// Room for what `start` begins from, before anything is made.
    fn pin(&self, start: &StartVm) -> Result<Option<Pin>, StartError> {
        if start.source.snapshot().is_some() && !self.host.hypervisor.caps().snapshots {
            return Err(StartError::NoForks);
        }
        // One that goes on has its memory for itself.
        let Source::Snapshot(id) = start.source else {
            return Ok(None);
        };
        let memories = self.host.snapshots.memories();
        Ok(Some(memories.pin(id, start.resources.memory_bytes())?))
    }

    /// Gives `start` its share, at the cost of memories that nobody begins from at the moment.
    fn admit(&self, capacity: &mut Capacity, start: &StartVm) -> Result<(), StartError> {
        const MIB: u64 = 1 << 20;
        let memories = self.host.snapshots.memories();
        let ask = Ask {
            image_mib: match start.source {
                Source::Snapshot(id) if !memories.has(id) => start.resources.memory_bytes() / MIB,
                _ => 0,
            },
            ..ask_of(start)
        };
        let now = || self.host.config.memory.now().map_err(StartError::Memory);
        capacity.set_images(memories.status().held_bytes.div_ceil(MIB));
        match capacity.admit(start.vm, ask, now()?) {
            Err(NoRoom::Available { .. } | NoRoom::Stalled { .. }) => {
                memories.shrink(0);
                capacity.admit(start.vm, ask, now()?)?;
            }
            answer => answer?,
        }
        memories.shrink(capacity.memory_mib_beside_vms().saturating_mul(MIB));
        Ok(())
    }

    fn image(&self, id: &ImageId) -> Result<PathBuf, StartError> {
        self.images.path(id).ok_or(StartError::Image(*id))
    }

    /// Asks a VM to stop. Asking again, or for one that is over, is no error; [`Self::watch`] or
    /// [`Self::stopped`] tell when nothing of it is left.
    ///
    /// # Errors
    /// [`VmError::Unknown`].
    pub async fn stop(&self, vm: VmId, mode: StopMode) -> Result<(), VmError> {
        let Some(actor) = self.actor(vm) else {
            return match self.status(vm) {
                Some(_over) => Ok(()),
                None => Err(VmError::Unknown(vm)),
            };
        };
        // An actor that ended meanwhile has nothing left to stop.
        drop(actor.requests.send(VmRequest::Stop(mode)).await);
        Ok(())
    }

    /// Waits until nothing of a VM is left.
    ///
    /// # Errors
    /// [`VmError::Unknown`].
    pub async fn stopped(&self, vm: VmId) -> Result<VmStatus, VmError> {
        let mut watch = self.watch();
        loop {
            let status = self.status(vm).ok_or(VmError::Unknown(vm))?;
            if status.phase.is_over() {
                return Ok(status);
            }
            watch.next().await;
        }
    }

    /// A VM as it is, or as it ended.
    #[must_use]
    pub fn status(&self, vm: VmId) -> Option<VmStatus> {
        self.host.board.get(vm)
    }

    /// All VMs, those lately over included.
    #[must_use]
    pub fn list(&self) -> Vec<VmStatus> {
        self.host.board.list()
    }

    /// Every VM as it is now, then every change.
    #[must_use]
    pub fn watch(&self) -> Watch {
        self.host.board.watch()
    }

    /// The images of all snapshots, and of all VMs of which something is left. One that is on its
    /// way may be missing: its release names its images too. Blocks.
    ///
    /// # Errors
    /// [`InUseError`]; then every image may be in use.
    pub fn images_in_use(&self) -> Result<BTreeSet<ImageId>, InUseError> {
        let records = self.host.journal.read_all()?;
        let starts = records.into_values().flatten().map(|record| record.start);
        let of_vms = starts.flat_map(|start| [Some(start.image), start.folder]);
        let mut images = self.host.snapshots.images()?;
        images.extend(of_vms.flatten());
        Ok(images)
    }

    /// The snapshots of this node.
    #[must_use]
    pub fn snapshots(&self) -> &Snapshots {
        &self.host.snapshots
    }

    /// The node as it is.
    #[must_use]
    pub fn node_status(&self) -> NodeStatus {
        let caps = self.host.hypervisor.caps();
        let mut capacity = lock(&self.host.capacity);
        let memories = self.host.snapshots.memories().status();
        capacity.set_images(memories.held_bytes.div_ceil(1 << 20));
        NodeStatus {
            hypervisor: caps.name.to_owned(),
            hypervisor_version: caps.version.clone(),
            boundary: caps.boundary,
            kernel: caps.kernel.clone(),
            memory_mib_total: capacity.memory_mib_total(),
            memory_mib_used: capacity.memory_mib_used(),
            vms: u32::try_from(capacity.vms()).unwrap_or(u32::MAX),
            templates: self.templates.status(),
            memories,
        }
    }

    /// A connection to the app's own port, and never to another. Waits while the VM is on its way
    /// to ready, as one is that was just adopted; the caller sets the limit.
    ///
    /// # Errors
    /// [`VmError`]; [`VmError::NotReady`] and [`VmError::Unknown`] mean that it never will be.
    pub async fn connect(&self, vm: VmId) -> Result<TcpStream, VmError> {
        let mut watch = self.watch();
        let access = loop {
            match self.ready(vm) {
                Err(VmError::NotReady { phase, .. }) if phase < VmPhase::Ready => {
                    watch.next().await;
                }
                answer => break answer?,
            }
        };
        let port = access.port.ok_or(VmError::NoPort(vm))?;
        let connected = access.vm.connect(port).await;
        connected.map_err(|source| VmError::Connect { port, source })
    }

    /// Runs a program beside the app.
    ///
    /// # Errors
    /// [`VmError`].
    pub async fn exec(&self, vm: VmId, exec: Exec) -> Result<ExecStream, VmError> {
        let access = self.running(vm).await?;
        Ok(access.link.exec(exec, SESSION_WAIT).await?)
    }

    /// Reads a file of the guest.
    ///
    /// # Errors
    /// [`VmError`].
    pub async fn read_file(&self, vm: VmId, path: String) -> Result<FileReader, VmError> {
        let access = self.running(vm).await?;
        Ok(access.link.read_file(path, SESSION_WAIT).await?)
    }

    /// Writes a file of the guest.
    ///
    /// # Errors
    /// [`VmError`].
    pub async fn write_file(&self, vm: VmId, file: WriteFile) -> Result<FileWriter, VmError> {
        let access = self.running(vm).await?;
        Ok(access.link.write_file(file, SESSION_WAIT).await?)
    }

    /// The guest's agent as it is.
    ///
    /// # Errors
    /// [`VmError`].
    pub async fn agent_status(&self, vm: VmId) -> Result<AgentStatus, VmError> {
        let access = self.ready(vm)?;
        Ok(access.link.status(SESSION_WAIT).await?)
    }

    /// What a VM uses of the host.
    ///
    /// # Errors
    /// [`VmError`].
    pub async fn stats(&self, vm: VmId) -> Result<VmStats, VmError> {
        let access = self.access(vm)?;
        let stats = access.vm.stats().await;
        stats.map_err(|source| VmError::Stats { vm, source })
    }

    pub(crate) const fn templates(&self) -> &Arc<Templates> {
        &self.templates
    }

    pub(crate) const fn host(&self) -> &Arc<Host> {
        &self.host
    }

    pub(crate) fn hypervisor(&self) -> &dyn Hypervisor {
        &*self.host.hypervisor
    }

    pub(crate) fn actor(&self, vm: VmId) -> Option<ActorHandle> {
        lock(&self.host.actors).get(&vm).cloned()
    }

    fn access(&self, vm: VmId) -> Result<Access, VmError> {
        let status = self.status(vm).ok_or(VmError::Unknown(vm))?;
        let access = self
            .actor(vm)
            .and_then(|actor| actor.access.borrow().clone());
        access.ok_or(VmError::NotReady {
            vm,
            phase: status.phase,
        })
    }

    /// The same, once nothing keeps the tenant's processes from running: a capture takes a moment.
    async fn running(&self, vm: VmId) -> Result<Access, VmError> {
        let access = self.ready(vm)?;
        let mut still = access.still.clone();
        let runs = tokio::time::timeout(SESSION_WAIT, still.wait_for(|still| !still));
        match runs.await {
            // Whether it lives, whoever asks it sees.
            Ok(_runs_or_gone) => Ok(access),
            Err(_elapsed) => Err(GuestError::Timeout(SESSION_WAIT).into()),
        }
    }

    /// The ways into a VM whose app is ready: before the thaw nothing may go in.
    pub(crate) fn ready(&self, vm: VmId) -> Result<Access, VmError> {
        let access = self.access(vm)?;
        match self.status(vm) {
            Some(status) if status.phase == VmPhase::Ready => Ok(access),
            Some(status) => Err(VmError::NotReady {
                vm,
                phase: status.phase,
            }),
            None => Err(VmError::Unknown(vm)),
        }
    }
}
