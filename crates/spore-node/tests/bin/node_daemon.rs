//! A daemon of a node and the tests' driver and nothing else, which kills itself where it is told.
//!
//! Started by `tests/qemu/kill_points.rs` with the file of its [`Orders`]. Never installed, never
//! used by anything else.

mod driver;
mod orders;

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use rustix::process::{Pid, Signal, getpid, kill_process};
use spore_node::config::{Config, Images, KillPoint, KillPoints, VmLimits};
use spore_node::egress::launch::EgressLauncher;
use spore_node::hypervisor::qemu::QemuConfig;
use spore_node::hypervisor::room::RoomConfig;
use spore_node::journal::Journal;
use spore_node::node::Node;
use spore_node::snapshot::key::SnapshotKey;
use spore_node::take::Take;
use spore_node::vm::state::VmEffect;
use spore_wire::id::{ImageId, SnapshotId, VmId};
use spore_wire::launch::Rates;
use spore_wire::node::{NodeEvent, Source, StartVm, StopMode, VmPhase};
use spore_wire::secret::SecretBytes;
use spore_wire::snapshot::{SnapshotInfo, SnapshotKind};
use tokio::io::AsyncReadExt as _;

use self::driver::{Driver, kernel_arguments};
use self::orders::{Answer, End, Orders, Point, Sighting, Task};

type Outcome<T> = Result<T, Box<dyn Error + Send + Sync>>;

/// Longer than anything takes on a busy machine; only a hang reaches it.
const HANG: Duration = Duration::from_secs(300);

#[tokio::main]
async fn main() -> Outcome<()> {
    let path = std::env::args().nth(1).ok_or("usage: node-daemon ORDERS")?;
    let orders: Orders = serde_json::from_slice(&fs::read(path)?)?;
    tracing_subscriber::fmt()
        .with_max_level(tracing::Level::INFO)
        .with_writer(std::io::stderr)
        .init();
    let log = Arc::new(SightingFile::new(orders.sighting.clone()));
    let death = Arc::new(Death::default());
    let qemu = Driver::open(driver_config(&orders), 0, Rates::default()).await?;
    let (runtime, logs) = (orders.runtime.clone(), orders.logs.clone());
    let snapshots = orders.room.data_dir.join("snapshots");
    let mut config = Config::new(runtime, logs, snapshots, 8192);
    // How slow the machine is says nothing of what is tested.
    config.limits = VmLimits {
        prepare: HANG / 2,
        boot: HANG / 2,
        agent: HANG / 2,
        agent_of_fork: HANG / 2,
        freeze: HANG / 2,
        capture: HANG / 2,
        answer: HANG,
        ready_slack: HANG / 2,
        secrets: HANG / 2,
        ..VmLimits::default()
    };
    config.kill_points = Arc::clone(&death) as Arc<dyn KillPoints>;
    let images = Arc::new(OneImage(orders.image.clone()));
    let (node, adoption) = Node::open(config, qemu.hypervisor(), images).await?;
    match &orders.task {
        Task::DieAt {
            start,
            effect,
            point,
            end,
        } => {
            if let Source::Snapshot(id) = start.source {
                tokio::time::timeout(HANG, file_template(&node, start, id)).await??;
            }
            death.at(effect, *point, &node, &log);
            let journals = Journal::open(&orders.runtime, qemu.caps().name)?;
            tokio::time::timeout(HANG, live(&node, start, *end, &journals, &log)).await??;
            Err(format!("{effect} {point:?} was never reached").into())
        }
        Task::GoOn { like } => {
            log.edit(|sighting| sighting.adopted = !adoption.adopted.is_empty())?;
            let suspended = suspended(&node).await?;
            log.edit(|sighting| sighting.suspended = suspended.len())?;
            for status in node.list() {
                tokio::time::timeout(HANG, go_on(&node, status.vm, &log)).await??;
            }
            go_on_from(&node, suspended, like, &log).await?;
            node.detach().await;
            qemu.close()?;
            Ok(())
        }
    }
}

fn driver_config(orders: &Orders) -> QemuConfig {
    QemuConfig {
        room: RoomConfig {
            runtime_dir: orders.room.runtime_dir.clone(),
            data_dir: orders.room.data_dir.clone(),
            cgroup_parent: orders.room.cgroup_parent.clone(),
            uid_first: orders.room.uid_first,
            uid_count: orders.room.uid_count,
            pool_size: 1,
        },
        kernel: orders.kernel.clone(),
        kernel_release: "of a test".to_owned(),
        kernel_arguments: kernel_arguments(),
        initramfs: orders.initramfs.clone(),
        qemu: QemuConfig::DEBIAN_QEMU.into(),
        libraries: QemuConfig::debian_libraries(),
        launcher: vec![orders.launcher.to_string_lossy().into_owned()],
        // The VMs of these tests have no grants.
        egress: EgressLauncher::new("egress-proxy", [""; 0]),
    }
}

/// Files what the VM of `start` begins from, unless an earlier daemon did: another one that was
/// thawed and ended for it.
async fn file_template(node: &Node, start: &StartVm, id: SnapshotId) -> Outcome<()> {
    let account = &start.owner.account;
    if node.snapshots().info(account, id).await.is_ok() {
        return Ok(());
    }
    let builder = StartVm {
        vm: VmId::random()?,
        process: None,
        source: Source::Boot,
        ..start.clone()
    };
    let vm = builder.vm;
    node.start(builder)?;
    until_ready(node, vm).await?;
    node.take(vm, taken_as(id, SnapshotKind::Template)).await?;
    node.stopped(vm).await?;
    Ok(())
}

const fn taken_as(id: SnapshotId, kind: SnapshotKind) -> Take {
    Take {
        id,
        kind,
        key: None,
        made_at_s: 1_600_000_000,
    }
}

/// A whole life, in the middle of which this process is killed.
async fn live(
    node: &Node,
    start: &StartVm,
    end: End,
    journals: &Journal,
    log: &SightingFile,
) -> Outcome<()> {
    let vm = start.vm;
    node.start(start.clone())?;
    until_ready(node, vm).await?;
    let answer = ask(node, vm).await?;
    log.edit(|sighting| sighting.answer = Some(answer))?;
    match end {
        End::Take => {
            let id = SnapshotId::random()?;
            node.take(vm, taken_as(id, SnapshotKind::Checkpoint))
                .await?;
        }
        End::Suspend => {
            let take = Take {
                key: Some(SnapshotKey::from_bytes([7; 32])),
                ..taken_as(SnapshotId::random()?, SnapshotKind::Suspend)
            };
            node.take(vm, take).await?;
        }
        End::Stop => node.stop(vm, StopMode::Graceful).await?,
        End::Crash => {
            let record = journals
                .read_all()?
                .remove(&vm)
                .ok_or("the VM is not journaled")??;
            let identity = record.identity.ok_or("the VM has no identity")?;
            let pid = Pid::from_raw(i32::try_from(identity.pid)?).ok_or("pid 0")?;
            kill_process(pid, Signal::KILL)?;
        }
    }
    node.stopped(vm).await?;
    Ok(())
}

/// What the next daemon makes of a VM that it found.
async fn go_on(node: &Node, vm: VmId, log: &SightingFile) -> Outcome<()> {
    if until_ready(node, vm).await? == VmPhase::Ready {
        let answer = ask(node, vm).await?;
        let boot_id = node.status(vm).and_then(|status| status.boot_id);
        log.edit(|sighting| {
            sighting.answer = Some(answer);
            sighting.boot_id = boot_id;
        })?;
        node.stop(vm, StopMode::Graceful).await?;
    }
    let ended = node.stopped(vm).await?;
    log.edit(|sighting| sighting.ended = Some(ended.phase))
}

/// Snapshots of suspended VMs.
async fn suspended(node: &Node) -> Outcome<Vec<SnapshotInfo>> {
    let mut all = node.snapshots().list("me").await?;
    all.retain(|info| {
        let kind = info.meta.as_ref().map(|meta| meta.kind);
        kind == Some(SnapshotKind::Suspend)
    });
    Ok(all)
}

/// Starts the VM that goes on from each, and ends it.
async fn go_on_from(
    node: &Node,
    all: Vec<SnapshotInfo>,
    like: &StartVm,
    log: &SightingFile,
) -> Outcome<()> {
    for info in all {
        let vm = VmId::random()?;
        node.start(StartVm {
            vm,
            source: Source::Suspended(info.id),
            keys: vec![(info.id, SecretBytes::new(vec![7; 32]))],
            ..like.clone()
        })?;
        tokio::time::timeout(HANG, go_on(node, vm, log)).await??;
    }
    match suspended(node).await?.is_empty() {
        true => Ok(()),
        false => Err("what was gone on from is left".into()),
    }
}

/// Waits until the VM is ready, or will never be.
async fn until_ready(node: &Node, vm: VmId) -> Outcome<VmPhase> {
    let mut watch = node.watch();
    loop {
        let NodeEvent::Vm(status) = watch.next().await;
        if status.vm == vm && status.phase >= VmPhase::Ready {
            return Ok(status.phase);
        }
    }
}

async fn ask(node: &Node, vm: VmId) -> Outcome<Answer> {
    let mut said = String::new();
    node.connect(vm).await?.read_to_string(&mut said).await?;
    let words: Vec<&str> = said.split_whitespace().collect();
    let [token, count, starts] = words[..] else {
        return Err(format!("the app said {said:?}").into());
    };
    Ok(Answer {
        token: token.to_owned(),
        count: count.parse()?,
        starts: starts.parse()?,
    })
}

/// Kills this process when an actor stands at the chosen point.
#[derive(Debug, Default)]
struct Death(Mutex<Option<Chosen>>);

#[derive(Clone, Debug)]
struct Chosen {
    effect: String,
    point: Point,
    node: Node,
    log: Arc<SightingFile>,
}

impl Death {
    fn at(&self, effect: &str, point: Point, node: &Node, log: &Arc<SightingFile>) {
        let chosen = Chosen {
            effect: effect.to_owned(),
            point,
            node: node.clone(),
            log: Arc::clone(log),
        };
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(chosen);
    }
}

#[async_trait]
impl KillPoints for Death {
    async fn reached(&self, vm: VmId, effect: VmEffect, point: KillPoint) {
        let chosen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(chosen) = chosen.as_ref() else {
            return;
        };
        let is_at = match chosen.point {
            Point::Before => point == KillPoint::Before,
            Point::After => point == KillPoint::After,
        };
        if !is_at || effect.name() != chosen.effect {
            return;
        }
        let boot_id = chosen.node.status(vm).and_then(|status| status.boot_id);
        let told = chosen.log.edit(|sighting| sighting.boot_id = boot_id);
        let killed = kill_process(getpid(), Signal::KILL);
        unreachable!("killed, and goes on: {told:?} {killed:?}");
    }
}

/// The file of what was seen, written anew with each change.
#[derive(Debug)]
struct SightingFile {
    path: PathBuf,
    seen: Mutex<Sighting>,
}

impl SightingFile {
    fn new(path: PathBuf) -> Self {
        Self {
            path,
            seen: Mutex::default(),
        }
    }

    fn edit(&self, change: impl FnOnce(&mut Sighting)) -> Outcome<()> {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut seen);
        Ok(fs::write(&self.path, serde_json::to_vec(&*seen)?)?)
    }
}

/// The same file for every image.
#[derive(Debug)]
struct OneImage(PathBuf);

impl Images for OneImage {
    fn path(&self, _id: &ImageId) -> Option<PathBuf> {
        let path: &Path = &self.0;
        Some(path.to_owned())
    }
}
