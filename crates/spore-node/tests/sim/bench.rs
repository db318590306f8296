//! A simulated host with the daemon of the moment, and what tests ask of it.
//!
//! Used by the tests in this folder. Never touches the real host beyond a temp folder.

use core::time::Duration;
use std::collections::BTreeMap;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use spore_node::clock::Clock;
use spore_node::config::{Config, Images, KillPoint, KillPoints};
use spore_node::hypervisor::memory_image::MemoryDraft;
use spore_node::hypervisor::sim::SimHost;
use spore_node::hypervisor::{Hypervisor as _, Machine};
use spore_node::node::{Adoption, Node};
use spore_node::snapshot::key::SnapshotKey;
use spore_node::snapshot::staging::Order;
use spore_node::snapshot::{
    NoStorePoints, Settings, SnapshotStore, StoreError, StorePoint, StorePoints,
};
use spore_node::take::Take;
use spore_node::vm::state::{Milestone, VmEffect};
use spore_wire::generation::GENERATION;
use spore_wire::guest::{Exec, Readiness};
use spore_wire::id::{ImageId, SnapshotId, VmId};
use spore_wire::node::{
    NodeEvent, Owner, Process, Purpose, Resources, Source, StartVm, VmPhase, VmStatus,
};
use spore_wire::secret::SecretBytes;
use spore_wire::snapshot::{SnapshotKind, SnapshotMeta};
use tokio::sync::Notify;
use tokio::time::Instant;

#[derive(Debug)]
pub(crate) struct AnyImage;

impl Images for AnyImage {
    fn path(&self, id: &ImageId) -> Option<PathBuf> {
        (*id != ImageId::from_hash([0xff; 32])).then(|| PathBuf::from(format!("/images/{id}")))
    }
}

/// The pages of memory of the snapshot that every [`Bench`] has.
pub(crate) const TEMPLATE_PAGES: u64 = 64;

/// Files the snapshot that every [`Bench`] has, of the account `me`, unless it is there.
fn file_snapshot(host: &SimHost, folder: &Path, clock: Arc<dyn Clock>) {
    let settings = Settings {
        folder: folder.join("snapshots"),
        runtime: folder.join("run"),
        clock,
        points: Arc::new(NoStorePoints),
    };
    let store = SnapshotStore::open(settings).unwrap();
    let StartVm {
        owner,
        image,
        folder,
        resources,
        ..
    } = start(vm(0), "template");
    let machine = Machine {
        resources,
        image: PathBuf::from("/images/root"),
        folder: Some(PathBuf::from("/images/folder")),
        egress: Vec::new(),
    };
    let order = Order {
        meta: SnapshotMeta {
            id: snapshot(),
            account: owner.account.clone(),
            parent: None,
            kind: SnapshotKind::Template,
            shape: host.hypervisor().shape(&machine),
            agent_generation: GENERATION,
            guest: String::new(),
            image,
            folder,
            resources,
            taken_of: Some(owner),
            app: None,
            release: None,
            holds_secrets: false,
            made_at_s: 1_700_000_000,
        },
        key: None,
        estimate_bytes: 0,
        quota_bytes: u64::MAX,
    };
    let mut staged = match store.stage(order) {
        Ok(staged) => staged,
        Err(StoreError::Exists(_)) => return,
        Err(error) => panic!("{error}"),
    };
    let source = VmId::from_bytes([0xbb; 16]);
    let from = host.template(source, resources.memory_mib).unwrap();
    let mut memory = MemoryDraft::new(from.memory.bytes()).unwrap();
    for page in 1..=TEMPLATE_PAGES {
        memory.write(page, &[5; 4096]).unwrap();
    }
    staged.image(&memory.seal().unwrap()).unwrap();
    staged.state(&*from.state).unwrap();
    staged.seal().unwrap();
}

/// A wall clock that goes as the test's time does; each daemon's begins anew.
#[derive(Debug)]
struct VirtualClock(Instant);

impl Clock for VirtualClock {
    fn realtime(&self) -> Duration {
        Duration::from_secs(1_700_000_000) + self.0.elapsed()
    }
}

/// Freezes the daemon at the chosen point; the test then drops it.
#[derive(Debug, Default)]
pub(crate) struct Crash {
    pub(crate) at: Mutex<Option<(VmEffect, KillPoint)>>,
    pub(crate) in_points: AtomicU32,
    pub(crate) happened: Notify,
    /// There the VM's process ends instead, once.
    pub(crate) strikes: Mutex<Option<(VmEffect, KillPoint, SimHost)>>,
    /// Whether there was one to end.
    pub(crate) struck: AtomicBool,
    pub(crate) panic_at: Mutex<Option<VmEffect>>,
    /// The store fails there, once.
    pub(crate) break_at: Mutex<Option<StorePoint>>,
}

impl StorePoints for Crash {
    fn reached(&self, _id: SnapshotId, point: StorePoint) {
        let breaks = self.break_at.lock().unwrap().take_if(|at| *at == point);
        assert!(breaks.is_none(), "the disk is broken, in a test");
    }
}

#[async_trait]
impl KillPoints for Crash {
    async fn reached(&self, vm: VmId, effect: VmEffect, point: KillPoint) {
        if *self.panic_at.lock().unwrap() == Some(effect) {
            self.panic_at.lock().unwrap().take();
            panic!("a bug, in a test");
        }
        let strikes = |at: &mut (VmEffect, KillPoint, SimHost)| (at.0, at.1) == (effect, point);
        let strikes = self.strikes.lock().unwrap().take_if(strikes);
        if let Some((_, _, host)) = strikes {
            let is_there = host.running().contains_key(&vm);
            self.struck.store(is_there, Ordering::Relaxed);
            host.crash_vm(vm);
            self.happened.notify_one();
        }
        let named = *self.at.lock().unwrap() == Some((effect, point));
        let counted = self.in_points.load(Ordering::Relaxed) > 0
            && self.in_points.fetch_sub(1, Ordering::Relaxed) == 1;
        if named || counted {
            self.happened.notify_one();
            core::future::pending::<()>().await;
        }
    }
}

/// A host, its folder, and the daemon of the moment.
pub(crate) struct Bench {
    pub(crate) host: SimHost,
    pub(crate) folder: tempfile::TempDir,
    pub(crate) crash: Arc<Crash>,
    pub(crate) node: Node,
}

fn config(folder: &Path) -> Config {
    let [run, log, snapshots] = ["run", "log", "snapshots"].map(|name| folder.join(name));
    Config::new(run, log, snapshots, 4096)
}

pub(crate) async fn open(host: &SimHost, folder: &Path, crash: &Arc<Crash>) -> (Node, Adoption) {
    let mut config = config(folder);
    config.memory = Arc::new(host.clone());
    config.clock = Arc::new(VirtualClock(Instant::now()));
    file_snapshot(host, folder, Arc::clone(&config.clock));
    config.kill_points = Arc::clone(crash) as Arc<dyn KillPoints>;
    config.snapshots.points = Arc::clone(crash) as Arc<dyn StorePoints>;
    Node::open(config, Arc::new(host.hypervisor()), Arc::new(AnyImage))
        .await
        .unwrap()
}

impl Bench {
    pub(crate) async fn new(seed: u64) -> Self {
        let host = SimHost::new(seed);
        let folder = tempfile::tempdir().unwrap();
        let crash = Arc::new(Crash::default());
        let (node, _nothing) = open(&host, folder.path(), &crash).await;
        Self {
            host,
            folder,
            crash,
            node,
        }
    }

    /// The daemon is gone this instant, and the next one starts.
    pub(crate) async fn restart(&mut self) -> Adoption {
        self.node.detach().await;
        let crash = Arc::new(Crash::default());
        let (node, adoption) = open(&self.host, self.folder.path(), &crash).await;
        self.crash = crash;
        self.node = node;
        adoption
    }

    /// VMs that are journaled, with how far they got.
    pub(crate) fn journal(&self) -> BTreeMap<VmId, Milestone> {
        #[derive(serde::Deserialize)]
        struct Record {
            milestone: Milestone,
        }
        let mut journal = BTreeMap::new();
        for entry in std::fs::read_dir(self.folder.path().join("run/vms")).unwrap() {
            let entry = entry.unwrap();
            let vm = entry.file_name().to_str().unwrap().parse().unwrap();
            if let Ok(bytes) = std::fs::read(entry.path().join("journal.json")) {
                let record: Record = serde_json::from_slice(&bytes).unwrap();
                journal.insert(vm, record.milestone);
            }
        }
        journal
    }

    /// What the next daemon must make of a VM that is journaled so and runs.
    pub(crate) fn must_adopt(&self, vm: VmId, milestone: Milestone) -> bool {
        match milestone {
            // Its snapshot has its place, or not.
            Milestone::Sealing => {
                let journal = self
                    .folder
                    .path()
                    .join(format!("run/vms/{vm}/journal.json"));
                let record: serde_json::Value =
                    serde_json::from_slice(&std::fs::read(journal).unwrap()).unwrap();
                let id = record["sealing"].as_str().unwrap();
                !self.folder.path().join("snapshots/me").join(id).exists()
            }
            milestone => must_adopt(milestone),
        }
    }

    /// What must be true when all VMs are over.
    pub(crate) fn nothing_is_left(&self) {
        assert_eq!(self.host.leftovers(), Vec::<String>::new());
        assert_eq!(self.host.violations(), Vec::<String>::new());
        assert!(self.journal().is_empty(), "{:?}", self.journal());
        assert_eq!(self.node.node_status().vms, 0);
        assert_eq!(self.node.node_status().memory_mib_used, 0);
    }
}

pub(crate) fn vm(number: u8) -> VmId {
    VmId::from_bytes([number; 16])
}

pub(crate) fn start(vm: VmId, app: &str) -> StartVm {
    StartVm {
        vm,
        owner: Owner {
            account: "me".to_owned(),
            app: app.to_owned(),
            release: 7,
            secrets_version: 0,
        },
        image: ImageId::from_hash([1; 32]),
        folder: Some(ImageId::from_hash([2; 32])),
        resources: Resources {
            cpus: 1,
            memory_mib: 256,
            disk_mib: 64,
        },
        process: Some(Process {
            command: vec!["/bin/app".to_owned()],
            environment: Vec::new(),
            secret_environment: Vec::new(),
            secret_files: Vec::new(),
            user: None,
            port: 8000,
            ready: Readiness::Port,
            ready_timeout_ms: 5000,
            stop_grace_ms: 1000,
            has_hooks: false,
        }),
        egress: Vec::new(),
        source: Source::Boot,
        keys: Vec::new(),
        purpose: Purpose::Serve,
        trace: None,
    }
}

/// The snapshot that every [`Bench`] has.
pub(crate) fn snapshot() -> SnapshotId {
    SnapshotId::from_bytes([0xaa; 16])
}

/// A snapshot without a key; long ago, so that it can be collected.
pub(crate) const fn taken_as(id: SnapshotId, kind: SnapshotKind) -> Take {
    Take {
        id,
        kind,
        key: None,
        made_at_s: 1_600_000_000,
    }
}

/// One for which its VM ends, to go on from it.
pub(crate) fn suspended_as(id: SnapshotId) -> Take {
    Take {
        key: Some(SnapshotKey::from_bytes([7; 32])),
        ..taken_as(id, SnapshotKind::Suspend)
    }
}

pub(crate) fn fork(vm: VmId, app: &str) -> StartVm {
    StartVm {
        source: Source::Snapshot(snapshot()),
        ..start(vm, app)
    }
}

pub(crate) fn with_secret(mut start: StartVm) -> StartVm {
    let process = start.process.as_mut().unwrap();
    process.secret_environment =
        vec![("KEY".to_owned(), SecretBytes::new(b"canary-4711".to_vec()))];
    start
}

/// Waits, on the virtual clock, until the VM is so.
pub(crate) async fn until(node: &Node, vm: VmId, so: impl Fn(&VmStatus) -> bool) -> VmStatus {
    let mut watch = node.watch();
    let seen = tokio::time::timeout(Duration::from_secs(600), async {
        loop {
            let NodeEvent::Vm(status) = watch.next().await;
            if status.vm == vm && so(&status) {
                return status;
            }
        }
    });
    match seen.await {
        Ok(status) => status,
        Err(_elapsed) => panic!("{vm} stays {:?}", node.status(vm)),
    }
}

pub(crate) async fn until_phase(node: &Node, vm: VmId, phase: VmPhase) -> VmStatus {
    until(node, vm, |status| {
        status.phase == phase || status.phase.is_over()
    })
    .await
}

pub(crate) fn on_virtual_time<F: Future>(future: F) -> F::Output {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .start_paused(true)
        .build()
        .unwrap();
    runtime.block_on(future)
}

pub(crate) fn exec(argv: &[&str]) -> Exec {
    Exec {
        argv: argv.iter().map(|word| (*word).to_owned()).collect(),
        environment: Vec::new(),
        directory: None,
        user: None,
        pty: None,
        timeout_ms: None,
    }
}

const fn must_adopt(milestone: Milestone) -> bool {
    matches!(
        milestone,
        Milestone::Booted
            | Milestone::Forked
            | Milestone::Running
            | Milestone::Thawed
            | Milestone::Open
            | Milestone::Started
            | Milestone::Draining
    )
}

pub(crate) fn walk(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(walk(&path));
        } else {
            files.push(path);
        }
    }
    files
}
