//! The simulated hypervisor: VMs in memory, time from tokio, chance from a seed, faults by plan.
//!
//! Used by tests, here and of the whole platform. A [`SimHost`] is the machine under the daemon: it
//! outlives any number of [`SimHypervisor`]s and so any number of daemons, as a host does. Its
//! guests speak the agent's real protocol (`agent.rs`), so nothing above this seam knows that it is
//! simulated. Never touches the real host, but for a loopback listener per VM that is connected to.
//!
//! Chance is drawn per VM and verb, not in the order in which tasks happen to run, so a seed gives
//! the same faults whatever the scheduling. On a paused clock (`tokio::time::pause`, current-thread
//! runtime) a run takes no real time; `connect` gives a real loopback socket, whose bytes arrive
//! before the clock moves on, since tokio polls its sockets before it advances a paused clock.

mod agent;
mod copy;
mod guest;
mod web;

use core::fmt::Write as _;
use core::time::Duration;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use spore_wire::guest::ThawStep;
use spore_wire::id::VmId;
use spore_wire::node::Boundary;
use spore_wire::snapshot::Shape;
use tokio::io::DuplexStream;
use tokio::net::TcpStream;

use super::fork::{Afterwards, Capture, CaptureError, ForkError, ForkFrom, ForkMemory, PauseError};
use super::{
    AgentStream, AttachError, BootError, Caps, Hypervisor, Identity, Left, Machine, PolicyError,
    PrepareError, Prepared, ReleaseError, Swept, Vm, VmExit, VmStats,
};
use crate::memory::{HostMemory, MemoryNow};
use guest::{Guest, Life};

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every critical section leaves its value whole, so a poisoned one is still usable.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What goes wrong, each in thousandths of the occasions for it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FaultPlan {
    /// `prepare` fails half way.
    pub prepare: u16,
    /// `boot` fails; half of the time a process is left.
    pub boot: u16,
    /// `release` leaves something, and must be called again.
    pub release: u16,
    /// `open_network` reads back another policy.
    pub policy: u16,
    /// A verb takes fifty times as long.
    pub slow: u16,
    /// The VM dies within its first minute.
    pub dies: u16,
    /// The agent never says a word.
    pub silent: u16,
    /// A session turns to rubbish after its hello.
    pub malformed: u16,
    /// A session breaks off within a few seconds.
    pub breaks: u16,
}

/// What the app of a simulated guest does.
#[derive(Clone, Debug)]
pub struct AppScript {
    /// From its start to its port; `None` never listens.
    pub ready_after: Option<Duration>,
    /// It ends so long after its start, each time; `None` never.
    pub ends_after: Option<Duration>,
    /// What it prints at each start.
    pub lines: Vec<String>,
    /// The keep-awake lease it asks for once it is ready.
    pub keep_awake_ms: Option<u64>,
}

impl Default for AppScript {
    fn default() -> Self {
        Self {
            ready_after: Some(Duration::from_millis(200)),
            ends_after: None,
            lines: vec!["listening".to_owned()],
            keep_awake_ms: None,
        }
    }
}

/// The machine under the daemons; clones are the same machine.
#[derive(Clone, Debug)]
pub struct SimHost {
    world: Arc<World>,
}

#[derive(Debug)]
struct World {
    seed: u64,
    held: Mutex<Held>,
}

#[derive(Debug, Default)]
struct Held {
    plan: FaultPlan,
    vms: BTreeMap<VmId, SimMachine>,
    scripts: HashMap<String, AppScript>,
    draws: HashMap<(VmId, &'static str), u64>,
    next_pid: u32,
    violations: Vec<String>,
    randoms: BTreeSet<u64>,
    opened: BTreeSet<VmId>,
    withheld: Option<ThawStep>,
    delay: Duration,
    delays: BTreeMap<VmId, (Duration, u32)>,
    oldest: bool,
    restless: bool,
    kernel: String,
    died: BTreeSet<VmId>,
    struck: BTreeSet<VmId>,
}

/// What the host has of one VM.
#[derive(Debug, Default)]
struct SimMachine {
    namespace: bool,
    cgroup: bool,
    disk: bool,
    guest: Option<Arc<Guest>>,
}

/// Nobody else is on it.
impl HostMemory for SimHost {
    fn now(&self) -> io::Result<MemoryNow> {
        Ok(MemoryNow {
            available_mib: u64::MAX,
            stalled_percent: 0,
        })
    }
}

impl SimHost {
    /// A machine whose chance comes from `seed`, without faults.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self {
            world: Arc::new(World {
                seed,
                held: Mutex::new(Held {
                    next_pid: 1000,
                    kernel: "simulated".to_owned(),
                    ..Held::default()
                }),
            }),
        }
    }

    /// From now on this goes wrong.
    pub fn set_plan(&self, plan: FaultPlan) {
        lock(&self.world.held).plan = plan;
    }

    /// What the app with this host name does, or any that runs this program; the host name goes
    /// first. The others follow the default script.
    pub fn set_script(&self, name: &str, script: AppScript) {
        lock(&self.world.held)
            .scripts
            .insert(name.to_owned(), script);
    }

    /// From now on agents leave this step of a thaw out, and say so.
    pub fn withhold(&self, step: ThawStep) {
        lock(&self.world.held).withheld = Some(step);
    }

    /// Every agent is kept waiting each time, before it sets the clock.
    pub fn delay_clocks(&self, by: Duration) {
        lock(&self.world.held).delay = by;
    }

    /// The agent of this VM is kept waiting so many times, before it sets the clock.
    pub fn delay_clock(&self, vm: VmId, by: Duration, times: u32) {
        lock(&self.world.held).delays.insert(vm, (by, times));
    }

    /// Whether tenants' processes do not stand still when they are told to.
    pub fn refuse_freezes(&self, refuse: bool) {
        lock(&self.world.held).restless = refuse;
    }

    /// The drivers of later daemons boot this kernel.
    pub fn set_kernel(&self, release: &str) {
        lock(&self.world.held).kernel = release.to_owned();
    }

    /// From now on agents are of the oldest generation that is served.
    pub fn age_agents(&self) {
        lock(&self.world.held).oldest = true;
    }

    /// A connection to the app of a VM that passes no socket: for simulations that must be the
    /// same in every run, since a socket's readiness is the kernel's.
    ///
    /// # Errors
    /// When nothing listens there.
    pub fn dial(&self, vm: VmId) -> io::Result<DuplexStream> {
        let guest = self.guest(vm);
        guest
            .ok_or_else(|| io::Error::from(io::ErrorKind::ConnectionRefused))?
            .dial()
    }

    /// A driver for one daemon.
    #[must_use]
    pub fn hypervisor(&self) -> SimHypervisor {
        SimHypervisor {
            host: self.clone(),
            caps: Caps {
                name: "sim",
                version: "simulated".to_owned(),
                boundary: Boundary::None,
                overhead_mib: 32,
                proxy_mib: 8,
                kernel: lock(&self.world.held).kernel.clone(),
                guest: "simulated".to_owned(),
                snapshots: true,
            },
        }
    }

    /// Everything there is of any VM: processes, namespaces, cgroups, disks. A machine on which all
    /// VMs are over has none.
    #[must_use]
    pub fn leftovers(&self) -> Vec<String> {
        let held = lock(&self.world.held);
        let mut left = Vec::new();
        for (vm, machine) in &held.vms {
            left.extend(
                machine
                    .things()
                    .into_iter()
                    .map(|what| format!("{what} of {vm}")),
            );
        }
        left
    }

    /// VMs whose process runs, with their guest's boot id.
    #[must_use]
    pub fn running(&self) -> BTreeMap<VmId, String> {
        let held = lock(&self.world.held);
        let mut running = BTreeMap::new();
        for (vm, machine) in &held.vms {
            if let Some(guest) = machine.guest.as_ref().filter(|guest| guest.is_alive()) {
                running.insert(*vm, guest.boot_id.clone());
            }
        }
        running
    }

    /// What was done in an order that the contracts forbid, as the guests and this driver saw it.
    #[must_use]
    pub fn violations(&self) -> Vec<String> {
        lock(&self.world.held).violations.clone()
    }

    /// VMs that ended by themselves: by plan, by [`Self::crash_vm`], or powered off when asked.
    #[must_use]
    pub fn died(&self) -> BTreeSet<VmId> {
        lock(&self.world.held).died.clone()
    }

    fn note_death(&self, vm: VmId) {
        lock(&self.world.held).died.insert(vm);
    }

    /// Whether a packet may ever have passed this VM's tap.
    #[must_use]
    pub fn was_open(&self, vm: VmId) -> bool {
        lock(&self.world.held).opened.contains(&vm)
    }

    /// Whether a fault took this VM's process or agent: by plan, [`Self::crash_vm`] or
    /// [`Self::break_session`]. Any other end is a daemon's doing.
    #[must_use]
    pub fn was_struck(&self, vm: VmId) -> bool {
        lock(&self.world.held).struck.contains(&vm)
    }

    fn strike(&self, vm: VmId) {
        lock(&self.world.held).struck.insert(vm);
    }

    /// What a builder would leave: a guest that was thawed as `of`, then frozen and captured.
    ///
    /// # Errors
    /// When the kernel has no memory for it.
    pub fn template(&self, of: VmId, memory_mib: u32) -> Result<ForkFrom, CaptureError> {
        let guest = Guest::boot(self, of, 0, memory_mib);
        lock(&guest.state).life = Life::Frozen(of.to_string());
        let parts = copy::parts(&guest);
        guest.end("captured", false);
        let (memory, state) = parts?;
        Ok(ForkFrom {
            memory: ForkMemory::Shared(memory.merge()?),
            state: Arc::new(state),
            scratch: None,
        })
    }

    /// How often the app of this VM was started by its agent.
    #[must_use]
    pub fn app_starts(&self, vm: VmId) -> u32 {
        self.guest(vm).map_or(0, |guest| lock(&guest.state).starts)
    }

    /// Ends a VM's process, as a bug of the VMM or the host's kernel would.
    pub fn crash_vm(&self, vm: VmId) {
        if let Some(guest) = self.guest(vm) {
            self.strike(vm);
            guest.end_itself("crashed");
        }
    }

    /// Takes away what a VM cannot go on without, as the end of its egress proxy would.
    pub fn spoil_vm(&self, vm: VmId, cause: &str) {
        if let Some(guest) = self.guest(vm) {
            guest.unsound.send_replace(Some(cause.to_owned()));
        }
    }

    /// Breaks the agent's session off, as a reset of its port would.
    pub fn break_session(&self, vm: VmId) {
        if let Some(guest) = self.guest(vm) {
            self.strike(vm);
            guest.break_session();
        }
    }

    fn guest(&self, vm: VmId) -> Option<Arc<Guest>> {
        lock(&self.world.held).vms.get(&vm)?.guest.clone()
    }

    fn violation(&self, text: String) {
        lock(&self.world.held).violations.push(text);
    }

    /// The next number of chance for this VM and purpose.
    fn draw(&self, vm: VmId, what: &'static str) -> u64 {
        let mut held = lock(&self.world.held);
        let count = held.draws.entry((vm, what)).or_insert(0);
        *count += 1;
        let mut mixed = mix(self.world.seed ^ mix(*count));
        for byte in vm.to_string().bytes().chain(what.bytes()) {
            mixed = mix(mixed ^ u64::from(byte));
        }
        mixed
    }

    fn happens(&self, vm: VmId, what: &'static str, of: impl Fn(&FaultPlan) -> u16) -> bool {
        let permille = of(&lock(&self.world.held).plan);
        permille > 0 && self.draw(vm, what) % 1000 < u64::from(permille)
    }

    /// A step of a verb: 1 to 10 ms, or fifty times that.
    async fn step(&self, vm: VmId, what: &'static str) {
        let slow = if self.happens(vm, "slow", |plan| plan.slow) {
            50
        } else {
            1
        };
        let ms = (1 + self.draw(vm, what) % 10) * slow;
        tokio::time::sleep(Duration::from_millis(ms)).await;
    }

    fn change(&self, vm: VmId, change: impl FnOnce(&mut SimMachine)) {
        let mut held = lock(&self.world.held);
        let machine = held.vms.entry(vm).or_default();
        change(machine);
        if machine.things().is_empty() {
            held.vms.remove(&vm);
        }
    }

    fn script(&self, app: &str, program: &str) -> AppScript {
        let held = lock(&self.world.held);
        let script = held.scripts.get(app).or_else(|| held.scripts.get(program));
        script.cloned().unwrap_or_default()
    }
}

/// One round of splitmix64.
const fn mix(seed: u64) -> u64 {
    let z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

impl SimMachine {
    fn things(&self) -> Vec<&'static str> {
        let mut things = Vec::new();
        if self.guest.as_ref().is_some_and(|guest| guest.is_alive()) {
            things.push("process");
        }
        if self.namespace {
            things.push("namespace");
        }
        if self.cgroup {
            things.push("cgroup");
        }
        if self.disk {
            things.push("disk");
        }
        things
    }
}

/// The driver that one daemon has.
#[derive(Clone, Debug)]
pub struct SimHypervisor {
    host: SimHost,
    caps: Caps,
}

const HOST_BOOT_ID: &str = "5a5a5a5a-0000-4000-8000-000000000000";

impl SimHypervisor {
    /// Starts the VMM with the guest that `make` gives for its pid.
    async fn begin(
        &self,
        vm: VmId,
        prepared: &Prepared,
        make: impl FnOnce(u32) -> Arc<Guest> + Send,
    ) -> Result<Identity, BootError> {
        let host = &self.host;
        if prepared.namespace != format!("sim-{vm}") {
            host.violation(format!("{vm} booted in another's namespace"));
        }
        host.step(vm, "spawn").await;
        let fails = host.happens(vm, "boot", |plan| plan.boot);
        if fails && host.draw(vm, "left").is_multiple_of(2) {
            return Err(BootError::Ended("it ended before its socket".to_owned()));
        }
        let pid = {
            let mut held = lock(&host.world.held);
            held.next_pid += 1;
            held.next_pid
        };
        let guest = make(pid);
        let mut twice = false;
        host.change(vm, |machine| {
            twice = machine.guest.is_some();
            machine.guest = Some(guest);
        });
        if twice {
            host.violation(format!("{vm} booted twice"));
        }
        host.step(vm, "control socket").await;
        if fails {
            return Err(BootError::Ended("its socket never answered".to_owned()));
        }
        Ok(Identity {
            host_boot_id: HOST_BOOT_ID.to_owned(),
            pid,
            start_time: u64::from(pid),
            cgroup: format!("sim-{vm}"),
        })
    }
}

#[async_trait]
impl Hypervisor for SimHypervisor {
    fn caps(&self) -> &Caps {
        &self.caps
    }

    fn shape(&self, _machine: &Machine) -> Shape {
        Shape {
            driver: self.caps.name.to_owned(),
            version: self.caps.version.clone(),
            cpu: "simulated".to_owned(),
            tsc_khz: 1_000_000,
            kernel: self.caps.kernel.clone(),
            devices: "simulated".to_owned(),
        }
    }

    async fn prepare(&self, vm: VmId, _machine: &Machine) -> Result<Prepared, PrepareError> {
        let host = &self.host;
        if lock(&host.world.held).vms.contains_key(&vm) {
            host.violation(format!("{vm} prepared twice"));
        }
        host.step(vm, "namespace").await;
        host.change(vm, |machine| machine.namespace = true);
        host.step(vm, "cgroup").await;
        host.change(vm, |machine| machine.cgroup = true);
        if host.happens(vm, "prepare", |plan| plan.prepare) {
            return Err(PrepareError::DiskFull { mib: 1 });
        }
        host.step(vm, "disk").await;
        host.change(vm, |machine| machine.disk = true);
        Ok(Prepared {
            namespace: format!("sim-{vm}"),
            uid: 200_000,
            egress_uid: None,
        })
    }

    async fn boot(
        &self,
        vm: VmId,
        machine: &Machine,
        prepared: &Prepared,
    ) -> Result<Identity, BootError> {
        let memory_mib = machine.resources.memory_mib;
        let boot = |pid| Guest::boot(&self.host, vm, pid, memory_mib);
        self.begin(vm, prepared, boot).await
    }

    async fn fork(
        &self,
        vm: VmId,
        machine: &Machine,
        prepared: &Prepared,
        from: &ForkFrom,
    ) -> Result<Identity, ForkError> {
        let copy = copy::read(from, machine.resources.memory_mib)?;
        let memory = from.memory.clone();
        let memory_mib = machine.resources.memory_mib;
        let fork = |pid| Guest::fork(&self.host, vm, (pid, memory_mib), memory, copy);
        Ok(self.begin(vm, prepared, fork).await?)
    }

    async fn attach(
        &self,
        vm: VmId,
        _prepared: &Prepared,
        identity: &Identity,
    ) -> Result<Arc<dyn Vm>, AttachError> {
        self.host.step(vm, "attach").await;
        if identity.host_boot_id != HOST_BOOT_ID {
            return Err(AttachError::AnotherBoot);
        }
        match self.host.guest(vm) {
            Some(guest) if guest.is_alive() && guest.pid == identity.pid => Ok(Arc::new(SimVm {
                host: self.host.clone(),
                guest,
            })),
            _ => Err(AttachError::Gone(identity.pid)),
        }
    }

    async fn release(&self, vm: VmId) -> Result<(), ReleaseError> {
        let host = &self.host;
        if let Some(guest) = host.guest(vm) {
            guest.end("released", false);
        }
        host.step(vm, "release").await;
        host.change(vm, |machine| {
            machine.guest = None;
            machine.disk = false;
            machine.cgroup = false;
        });
        if host.happens(vm, "release fails", |plan| plan.release) {
            return Err(ReleaseError {
                what: format!("namespace sim-{vm}"),
                source: io::Error::from(io::ErrorKind::ResourceBusy),
            });
        }
        host.step(vm, "namespace goes").await;
        host.change(vm, |machine| machine.namespace = false);
        Ok(())
    }

    async fn sweep(&self, keep: &BTreeSet<VmId>) -> Result<Swept, ReleaseError> {
        let rubbish: Vec<VmId> = {
            let held = lock(&self.host.world.held);
            let all = held.vms.keys();
            all.filter(|vm| !keep.contains(vm)).copied().collect()
        };
        let mut swept = Swept::default();
        for vm in rubbish {
            match self.release(vm).await {
                Ok(()) => swept.removed.push(vm.to_string()),
                Err(error) => swept.left.push(Left {
                    vm: Some(vm),
                    error,
                }),
            }
        }
        Ok(swept)
    }
}

/// A simulated VM, as its actor holds it.
struct SimVm {
    host: SimHost,
    guest: Arc<Guest>,
}

#[async_trait]
impl Vm for SimVm {
    async fn agent(&self) -> io::Result<Box<dyn AgentStream>> {
        if !self.guest.is_alive() {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        Ok(Box::new(self.guest.connect_agent(&self.host)))
    }

    async fn connect(&self, port: u16) -> io::Result<TcpStream> {
        let address = self.guest.web(port).await?;
        TcpStream::connect(address).await
    }

    async fn open_network(&self) -> Result<(), PolicyError> {
        let vm = self.guest.vm;
        self.host.step(vm, "network").await;
        if self.host.happens(vm, "policy", |plan| plan.policy) {
            return Err(PolicyError::Differs("one rule is missing".to_owned()));
        }
        lock(&self.host.world.held).opened.insert(vm);
        let mut state = lock(&self.guest.state);
        state.network_open = true;
        if !matches!(state.life, Life::Running(_)) {
            drop(state);
            self.host
                .violation(format!("{vm}: network opened before the thaw"));
        }
        Ok(())
    }

    async fn pause(&self) -> Result<(), PauseError> {
        self.host.step(self.guest.vm, "pause").await;
        self.guest.paused.send_replace(true);
        Ok(())
    }

    async fn resume(&self) -> Result<(), PauseError> {
        self.host.step(self.guest.vm, "resume").await;
        self.guest.paused.send_replace(false);
        Ok(())
    }

    async fn capture(&self, afterwards: Afterwards) -> Result<Capture, CaptureError> {
        let guest = &self.guest;
        self.host.step(guest.vm, "capture").await;
        if !guest.is_alive() || !*guest.paused.borrow() {
            return Err(CaptureError::NotPaused("running".to_owned()));
        }
        let capture = copy::write(guest)?;
        if afterwards == Afterwards::Ends {
            guest.end("captured", false);
        }
        Ok(capture)
    }

    async fn stats(&self) -> io::Result<VmStats> {
        Ok(VmStats {
            cpu_us: 0,
            memory_bytes: 64 * 1024 * 1024,
            pids: 3,
        })
    }

    async fn console_tail(&self) -> Vec<String> {
        let mut line = String::new();
        let written = write!(
            line,
            "[    0.000000] simulated guest {}",
            self.guest.boot_id
        );
        written.map(|()| vec![line]).unwrap_or_default()
    }

    fn kill(&self) {
        self.guest.end("killed", false);
    }

    async fn unsound(&self) -> String {
        let mut unsound = self.guest.unsound.subscribe();
        let said = unsound.wait_for(Option::is_some).await;
        match said.ok().and_then(|cause| cause.clone()) {
            Some(cause) => cause,
            None => core::future::pending().await,
        }
    }

    async fn exited(&self) -> VmExit {
        self.guest.exited().await
    }
}
