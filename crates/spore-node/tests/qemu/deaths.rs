//! A VMM that is killed at every instant between two effects, and in the midst of them.
//!
//! The daemon lives on: it must notice, remove everything of the VM and go on with others, and no
//! snapshot may be filed that is not whole. `kill_points.rs` kills the daemon instead.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use async_trait::async_trait;
use rustix::process::{Pid, Signal, kill_process};
use spore_node::config::{KillPoint, KillPoints};
use spore_node::journal::Journal;
use spore_node::snapshot::key::SnapshotKey;
use spore_node::snapshot::{Cascade, NoStorePoints};
use spore_node::take::Take;
use spore_node::vm::state::{Milestone, VmEffect};
use spore_wire::id::{SnapshotId, VmId};
use spore_wire::node::{Source, StartVm, StopMode, VmPhase};
use spore_wire::secret::SecretBytes;
use spore_wire::snapshot::SnapshotKind;
use tokio::time::{Instant, timeout};

use crate::driver::is_kvm;
use crate::host::{HANG, TestHost, new_id, processes_of};
use crate::kill_points::counter;
use crate::takes::{Daemon, from, new_snapshot, nothing_is_left};

/// When the VMM dies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Moment {
    /// Before the effect begins.
    Before,
    /// While it is under way: so long after its beginning, or as soon as there is a VMM.
    During(Duration),
    /// When it is done.
    After,
}

/// Kills the VMM where it is told, once.
#[derive(Debug)]
struct Killer {
    /// Those of the VMMs.
    uids: Range<u32>,
    at: Mutex<Option<(VmEffect, Moment)>>,
    killed: Arc<AtomicBool>,
}

impl Killer {
    fn arm(&self, effect: VmEffect, moment: Moment) {
        self.killed.store(false, Ordering::Release);
        *self.at.lock().unwrap_or_else(PoisonError::into_inner) = Some((effect, moment));
    }
}

/// Kills every process of `uids`, and says whether there was one.
fn kill_all(uids: &Range<u32>) -> bool {
    let mut found = false;
    for pid in processes_of(uids) {
        let pid = Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
        // It may have ended by itself since.
        found |= kill_process(pid, Signal::KILL).is_ok();
    }
    found
}

#[async_trait]
impl KillPoints for Killer {
    async fn reached(&self, _vm: VmId, effect: VmEffect, point: KillPoint) {
        let is_here = |(at, moment): &mut (VmEffect, Moment)| {
            let is_after = *moment == Moment::After;
            *at == effect && is_after == (point == KillPoint::After)
        };
        let armed = self
            .at
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take_if(is_here);
        let Some((_effect, moment)) = armed else {
            return;
        };
        let (uids, killed) = (self.uids.clone(), Arc::clone(&self.killed));
        if let Moment::During(delay) = moment {
            thread::spawn(move || {
                thread::sleep(delay);
                // A boot has none at first.
                while !kill_all(&uids) {
                    thread::yield_now();
                }
                killed.store(true, Ordering::Release);
            });
        } else {
            self.killed.store(kill_all(&uids), Ordering::Release);
        }
    }
}

/// Effects in the midst of which there is a VMM to kill, with the time from their beginning.
const UNDER_WAY: [(VmEffect, u64); 10] = [
    (VmEffect::Boot, 0),
    (VmEffect::Fork, 0),
    (VmEffect::Fork, 20),
    (VmEffect::ConnectAgent, 20),
    (VmEffect::Thaw, 5),
    (VmEffect::StartApp, 2),
    (VmEffect::AwaitReady, 20),
    (VmEffect::Freeze, 2),
    (VmEffect::Capture, 5),
    (VmEffect::Shutdown, 20),
];

/// Whether there is a VMM at that instant.
fn has_vmm(effect: VmEffect, moment: Moment) -> bool {
    use VmEffect as E;
    match effect {
        E::Journal(Milestone::Preparing | Milestone::Prepared) | E::TakeTurn | E::Prepare => false,
        // Of a VM that failed by the end of its VMM, and of one that is known to have none.
        E::Journal(Milestone::EndingFailed) | E::Release | E::RemoveJournal => false,
        // Met only by a VM that fails and lives: the simulated machine has such.
        E::Farewell => false,
        E::Boot | E::Fork => moment != Moment::Before,
        // The guest has powered off: the VMM is there, or has ended by itself.
        E::Journal(Milestone::EndingStopped) | E::Kill => false,
        E::Shutdown => moment != Moment::After,
        _ => true,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vmm_killed_at_every_effect_is_over_and_leaves_nothing() {
    let Some((host, machine)) = TestHost::with_agent() else {
        return;
    };
    let killer = Arc::new(Killer {
        uids: host.uids(),
        at: Mutex::default(),
        killed: Arc::default(),
    });
    let points = Arc::clone(&killer) as Arc<dyn KillPoints>;
    let daemon = Daemon::open_with(&host, &machine.image, |config| config.kill_points = points);
    let daemon = daemon.await;
    // Without an app, so that each fork starts one.
    let source = new_id();
    let empty = StartVm {
        process: None,
        ..counter(source)
    };
    daemon.ready(empty).await;
    let template = new_snapshot();
    daemon.take(source, template).await.unwrap();
    daemon.stop(source).await;

    let between = VmEffect::ALL
        .into_iter()
        .flat_map(|effect| [(effect, Moment::Before), (effect, Moment::After)]);
    let under_way = UNDER_WAY
        .into_iter()
        .map(|(effect, ms)| (effect, Moment::During(Duration::from_millis(ms))));
    let deaths = between
        .chain(under_way)
        .filter(|(effect, moment)| has_vmm(*effect, *moment));
    let mut count = 0;
    for (effect, moment) in deaths {
        die_at(&daemon, &host, &killer, template, (effect, moment)).await;
        count += 1;
    }
    println!("{count} deaths");
    // Nothing of them keeps a VM from living.
    let last = from(template);
    let vm = last.vm;
    daemon.ready(last).await;
    daemon.stop(vm).await;
    daemon.close().await;
    nothing_is_left(&host);
}

/// Each process of a VM that would end it, killed while its app serves and another VM goes on.
#[tokio::test(flavor = "multi_thread")]
async fn vmm_sigkill_is_noticed_and_cleaned() {
    let Some((host, machine)) = TestHost::with_agent() else {
        return;
    };
    let daemon = Daemon::open(&host, &machine.image, Arc::new(NoStorePoints)).await;
    let beside = new_id();
    daemon.ready(counter(beside)).await;
    let (token, ..) = daemon.ask(beside).await;
    let (theirs, lasting) = (host.processes(), host.left());
    // On `kvm` the first process of the VM's pid namespace, then the VMM.
    let mut count = 1;
    for number in 0.. {
        let start = counter(new_id());
        let vm = start.vm;
        daemon.ready(start).await;
        let mut own = host.processes();
        own.retain(|pid| !theirs.contains(pid));
        own.sort_unstable();
        let folder = host.runtime("../node");
        let journal = Journal::open(&folder, if is_kvm() { "kvm" } else { "qemu" });
        let record = journal.unwrap().read_all().unwrap().remove(&vm).unwrap();
        let namespace = record.unwrap().prepared.unwrap().namespace;
        assert!(host.namespaces().contains(&namespace));
        let pid = Pid::from_raw(own[number].try_into().unwrap()).unwrap();
        let killed = Instant::now();
        kill_process(pid, Signal::KILL).unwrap();
        let over = daemon.settled(vm, VmPhase::Failed).await;
        println!(
            "{own:?}, process {number}: {over:?} {:?} after it",
            killed.elapsed()
        );
        assert_eq!(over.phase, VmPhase::Failed);
        let failure = over.failure.unwrap().message;
        assert!(failure.contains("signal 9"), "{failure}");
        // Cgroup, uid, scratch disk, folder and processes; and with the namespace its tap.
        assert_eq!(host.left(), lasting);
        assert!(!host.namespaces().contains(&namespace));
        count += 1;
        let (same, asked, starts) = daemon.ask(beside).await;
        assert_eq!((same, asked, starts), (token.clone(), count, 1));
        if number + 1 == own.len() {
            break;
        }
    }
    daemon.stop(beside).await;
    daemon.close().await;
    nothing_is_left(&host);
}

/// One death of a VMM, and what it left.
async fn die_at(
    daemon: &Daemon,
    host: &TestHost,
    killer: &Killer,
    template: SnapshotId,
    (effect, moment): (VmEffect, Moment),
) {
    let what = format!("{} {moment:?}", effect.name());
    let boots = matches!(
        effect,
        VmEffect::Boot | VmEffect::Journal(Milestone::Booted)
    );
    let start = match boots {
        true => counter(new_id()),
        false => from(template),
    };
    let vm = start.vm;
    // The first reports are made before there is a VMM.
    let is_met_late = effect == VmEffect::Report;
    if !is_met_late {
        killer.arm(effect, moment);
    }
    daemon.node.start(start).unwrap();
    let mut end = "on its way up";
    if daemon.settled(vm, VmPhase::Ready).await.phase == VmPhase::Ready {
        if is_met_late {
            killer.arm(effect, moment);
        }
        end = end_with(daemon, vm, effect).await;
    }
    // A death in the midst of an effect may come when that is done: before the VM is stopped here.
    let over = timeout(HANG, daemon.node.stopped(vm)).await;
    let over = over
        .unwrap_or_else(|_| unreachable!("{what} goes on"))
        .unwrap();
    let failure = over.failure.map(|failure| failure.message);
    println!("{what}, {end}: {:?}, {failure:?}", over.phase);
    let killed = async {
        while !killer.killed.load(Ordering::Acquire) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    let killed = timeout(HANG, killed).await;
    assert!(killed.is_ok(), "{what} is not met");
    let all = daemon.node.snapshots().list("me").await.unwrap();
    for info in all.iter().filter(|info| info.id != template) {
        assert_eq!(info.damage, None, "{what}: {info:?}");
        let suspended = info.meta.as_ref().map(|meta| meta.kind) == Some(SnapshotKind::Suspend);
        let start = match suspended {
            true => StartVm {
                source: Source::Suspended(info.id),
                keys: vec![(info.id, SecretBytes::new(vec![7; 32]))],
                ..counter(new_id())
            },
            false => from(info.id),
        };
        let next = start.vm;
        daemon.ready(start).await;
        let (_token, _count, starts) = daemon.ask(next).await;
        assert_eq!(starts, 1, "{what}: {info:?}");
        daemon.stop(next).await;
        if !suspended {
            let store = daemon.node.snapshots();
            let removed = store.remove("me", info.id, Cascade::Refuse, BTreeSet::new());
            removed.await.unwrap();
        }
    }
    nothing_is_left(host);
}

/// Brings a VM that is ready to the effect; says how.
async fn end_with(daemon: &Daemon, vm: VmId, effect: VmEffect) -> &'static str {
    if effect.is_of_captures() {
        let kind = match effect.is_of_suspends() {
            true => SnapshotKind::Suspend,
            false => SnapshotKind::Checkpoint,
        };
        let take = Take {
            id: new_snapshot(),
            kind,
            key: effect
                .is_of_suspends()
                .then(|| SnapshotKey::from_bytes([7; 32])),
            made_at_s: 1_700_000_000,
        };
        return match timeout(HANG, daemon.node.take(vm, take)).await.unwrap() {
            Ok(_taken) => "taken",
            Err(_refused) => "not taken",
        };
    }
    // It may have ended by now.
    let stopped = daemon.node.stop(vm, StopMode::Graceful).await;
    match stopped {
        Ok(()) => "stopped",
        Err(_gone) => "gone",
    }
}
