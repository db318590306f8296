//! VMs that are suspended and go on in others, on the simulated host: once, whatever dies.

use core::time::Duration;
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use spore_node::config::KillPoint;
use spore_node::hypervisor::sim::SimHost;
use spore_node::image::store::GcMode;
use spore_node::snapshot::{Cascade, StoreError, StorePoint};
use spore_node::snapshots::SnapshotsError;
use spore_node::take::TakeError;
use spore_node::vm::state::{Milestone, VmEffect};
use spore_wire::guest::WriteFile;
use spore_wire::id::SnapshotId;
use spore_wire::node::{Source, StartVm, StopMode, VmFailureKind, VmPhase, VmStatus};
use spore_wire::secret::SecretBytes;
use spore_wire::snapshot::{SnapshotInfo, SnapshotKind};

use crate::bench::{
    Bench, TEMPLATE_PAGES, fork, on_virtual_time, snapshot, start, suspended_as, until_phase, vm,
};

fn id(number: u8) -> SnapshotId {
    SnapshotId::from_bytes([number; 16])
}

/// A VM that goes on from a suspended one's snapshot.
fn from(number: u8, snapshot: u8) -> StartVm {
    StartVm {
        source: Source::Suspended(id(snapshot)),
        keys: vec![(id(snapshot), SecretBytes::new(vec![7; 32]))],
        ..start(vm(number), "hello")
    }
}

async fn begin(bench: &Bench, start: StartVm) -> VmStatus {
    let vm = start.vm;
    bench.node.start(start).unwrap();
    until_phase(&bench.node, vm, VmPhase::Ready).await
}

async fn ready(bench: &Bench, start: StartVm) {
    let status = begin(bench, start).await;
    assert_eq!(status.phase, VmPhase::Ready, "{status:?}");
}

/// Why nothing goes on.
async fn refused(bench: &Bench, start: StartVm) -> String {
    let over = begin(bench, start).await;
    let failure = over.failure.unwrap();
    assert_eq!(failure.kind, VmFailureKind::Snapshot, "{failure:?}");
    failure.message
}

async fn suspend(bench: &Bench, number: u8, to: u8) -> SnapshotInfo {
    let taken = bench.node.take(vm(number), suspended_as(id(to))).await;
    let info = taken.unwrap().info;
    assert!(info.encrypted && info.damage.is_none(), "{info:?}");
    let kind = info.meta.as_ref().map(|meta| meta.kind);
    assert_eq!(kind, Some(SnapshotKind::Suspend));
    let over = bench.node.stopped(vm(number)).await.unwrap();
    assert_eq!((over.phase, over.failure), (VmPhase::Stopped, None));
    info
}

/// As [`suspend`], of one that came from the template: it holds the page that is each VM's own.
async fn suspend_over_template(bench: &Bench, number: u8, to: u8) {
    let info = suspend(bench, number, to).await;
    assert_eq!((info.memory_pages, info.depth), (1, 1), "{info:?}");
    assert_eq!(info.meta.unwrap().parent.unwrap().id, snapshot());
}

async fn remember(bench: &Bench, number: u8, what: &str) {
    let file = WriteFile {
        path: "/tmp/login".to_owned(),
        mode: 0o600,
        user: None,
    };
    let writer = bench.node.write_file(vm(number), file).await.unwrap();
    writer.send(what.as_bytes()).await.unwrap();
    writer.finish().await.unwrap();
}

async fn remembered(bench: &Bench, number: u8) -> String {
    let path = "/tmp/login".to_owned();
    let reader = bench.node.read_file(vm(number), path).await.unwrap();
    let mut read = Vec::new();
    while let Some(bytes) = reader.next().await.unwrap() {
        read.extend(bytes);
    }
    String::from_utf8(read).unwrap()
}

async fn stop(bench: &Bench, number: u8) {
    let graceful = StopMode::Graceful;
    bench.node.stop(vm(number), graceful).await.unwrap();
    bench.node.stopped(vm(number)).await.unwrap();
}

/// Snapshots beside the one that every bench has.
async fn snapshots(bench: &Bench) -> usize {
    bench.node.snapshots().list("me").await.unwrap().len() - 1
}

#[test]
fn a_suspended_vm_goes_on_in_another_one_again_and_again_and_each_snapshot_serves_once() {
    on_virtual_time(async {
        let mut bench = Bench::new(61).await;
        ready(&bench, fork(vm(1), "hello")).await;
        remember(&bench, 1, "canary").await;
        for round in 1..=4 {
            suspend_over_template(&bench, round, round).await;
            assert!(bench.host.running().is_empty());
            assert_eq!(bench.node.snapshots().memories().status().held_bytes, 0);
            bench.restart().await;
            ready(&bench, from(round + 1, round)).await;
            assert_eq!(bench.host.app_starts(vm(round + 1)), 0, "it goes on");
            let memories = bench.node.snapshots().memories().status();
            assert_eq!(memories.held_bytes, 0, "it has its memory for itself");
            assert_eq!(remembered(&bench, round + 1).await, "canary");
            assert_eq!(snapshots(&bench).await, 0, "it has served");
            let why = refused(&bench, from(round + 50, round)).await;
            assert!(why.contains("has no snapshot"), "{why}");
        }
        stop(&bench, 5).await;
        bench.nothing_is_left();
    });
}

#[test]
fn a_template_is_kept_as_long_as_a_suspended_vm_or_the_one_that_goes_on_stands_on_it() {
    on_virtual_time(async {
        let mut bench = Bench::new(70).await;
        let remove = async |bench: &Bench| {
            let snapshots = bench.node.snapshots();
            let removed = snapshots.remove("me", snapshot(), Cascade::Refuse, BTreeSet::new());
            match removed.await {
                Err(SnapshotsError::Store(error)) => error,
                other => panic!("{other:?}"),
            }
        };
        let collect = async |bench: &Bench, keep: &[SnapshotId]| {
            let keep = keep.iter().copied().collect();
            let gone = bench.node.snapshots().gc(keep, GcMode::Remove).await;
            let gone: Vec<_> = gone.unwrap().into_iter().map(|info| info.id).collect();
            gone
        };
        tokio::time::sleep(Duration::from_secs(3600)).await;
        ready(&bench, fork(vm(1), "hello")).await;
        suspend_over_template(&bench, 1, 1).await;
        let why = remove(&bench).await;
        assert!(matches!(why, StoreError::Dependents { .. }), "{why}");
        assert_eq!(collect(&bench, &[id(1)]).await, []);
        ready(&bench, from(2, 1)).await;
        for _daemon in 0..2 {
            let why = remove(&bench).await;
            assert!(matches!(why, StoreError::InUse(_)), "{why}");
            tokio::time::sleep(Duration::from_secs(3600)).await;
            assert_eq!(collect(&bench, &[]).await, []);
            bench.restart().await;
        }
        suspend_over_template(&bench, 2, 2).await;
        ready(&bench, from(3, 2)).await;
        stop(&bench, 3).await;
        tokio::time::sleep(Duration::from_secs(3600)).await;
        assert_eq!(collect(&bench, &[]).await, [snapshot()]);
        bench.nothing_is_left();
    });
}

#[test]
fn without_what_it_stood_on_a_vm_is_suspended_with_all_of_its_memory() {
    on_virtual_time(async {
        let damage: [fn(&Path); 2] = [
            |template| fs::remove_dir_all(template).unwrap(),
            |template| fs::write(template.join("memory.index"), "damaged").unwrap(),
        ];
        for (seed, damage) in (71..).zip(damage) {
            let bench = Bench::new(seed).await;
            ready(&bench, fork(vm(1), "hello")).await;
            remember(&bench, 1, "canary").await;
            suspend_over_template(&bench, 1, 1).await;
            ready(&bench, from(2, 1)).await;
            let template = bench.folder.path().join("snapshots/me");
            damage(&template.join(snapshot().to_string()));
            for number in 2..=3 {
                let info = suspend(&bench, number, number).await;
                assert_eq!((info.memory_pages, info.depth), (TEMPLATE_PAGES + 1, 0));
                ready(&bench, from(number + 1, number)).await;
                assert_eq!(remembered(&bench, number + 1).await, "canary");
            }
            stop(&bench, 4).await;
            bench.nothing_is_left();
        }
    });
}

#[test]
fn only_its_own_app_goes_on_from_a_suspended_one_and_only_with_the_key() {
    on_virtual_time(async {
        let bench = Bench::new(62).await;
        ready(&bench, start(vm(1), "hello")).await;
        suspend(&bench, 1, 1).await;
        let other = StartVm {
            owner: start(vm(2), "other").owner,
            ..from(2, 1)
        };
        let why = refused(&bench, other).await;
        assert!(why.contains("app"), "{why}");
        let without = StartVm {
            keys: Vec::new(),
            ..from(3, 1)
        };
        let why = refused(&bench, without).await;
        assert!(why.contains("key"), "{why}");
        // They never ran, so nothing is lost.
        ready(&bench, from(4, 1)).await;
        stop(&bench, 4).await;
        bench.nothing_is_left();
    });
}

#[test]
fn a_vm_goes_on_when_it_cannot_be_suspended() {
    on_virtual_time(async {
        for (seed, at) in [
            StorePoint::MemoryWritten,
            StorePoint::StateWritten,
            StorePoint::HeaderWritten,
        ]
        .into_iter()
        .enumerate()
        {
            let bench = Bench::new(630 + seed as u64).await;
            ready(&bench, start(vm(1), "hello")).await;
            *bench.crash.break_at.lock().unwrap() = Some(at);
            let taken = bench.node.take(vm(1), suspended_as(id(1))).await;
            assert!(matches!(taken, Err(TakeError::Worker(_))), "{taken:?}");
            assert_eq!(snapshots(&bench).await, 0);
            assert_eq!(bench.journal()[&vm(1)], Milestone::Started);
            remember(&bench, 1, "it runs").await;
            suspend(&bench, 1, 2).await;
            ready(&bench, from(2, 2)).await;
            assert_eq!(remembered(&bench, 2).await, "it runs");
            stop(&bench, 2).await;
            bench.nothing_is_left();
        }
    });
}

/// The effects of a VM that is suspended, from its first one on.
const SUSPENDING: [VmEffect; 9] = [
    VmEffect::Freeze,
    VmEffect::Pause,
    VmEffect::Capture,
    VmEffect::Journal(Milestone::Sealing),
    VmEffect::Seal,
    VmEffect::Journal(Milestone::EndingStopped),
    VmEffect::Kill,
    VmEffect::Release,
    VmEffect::RemoveJournal,
];

#[test]
fn a_daemon_killed_at_every_effect_of_a_suspend_leaves_the_vm_or_its_snapshot() {
    on_virtual_time(async {
        let (mut awake, mut asleep) = (0, 0);
        for effect in SUSPENDING {
            for point in [KillPoint::Before, KillPoint::After] {
                let what = format!("{} {point:?}", effect.name());
                let mut bench = Bench::new(64).await;
                ready(&bench, start(vm(1), "hello")).await;
                remember(&bench, 1, "canary").await;
                *bench.crash.at.lock().unwrap() = Some((effect, point));
                let node = bench.node.clone();
                let taking = async move { node.take(vm(1), suspended_as(id(1))).await };
                let taking = tokio::spawn(taking);
                bench.crash.happened.notified().await;
                taking.abort();
                bench.restart().await;
                let goes_on = snapshots(&bench).await == 0;
                let number = if goes_on {
                    until_phase(&bench.node, vm(1), VmPhase::Ready).await;
                    awake += 1;
                    1
                } else {
                    if bench.node.status(vm(1)).is_some() {
                        let over = bench.node.stopped(vm(1)).await.unwrap();
                        assert_eq!(over.phase, VmPhase::Stopped, "{what}");
                    }
                    ready(&bench, from(2, 1)).await;
                    asleep += 1;
                    2
                };
                assert_eq!(bench.host.running().len(), 1, "{what}");
                assert_eq!(remembered(&bench, number).await, "canary", "{what}");
                stop(&bench, number).await;
                bench.nothing_is_left();
            }
        }
        assert_eq!((awake, asleep), (9, 9));
    });
}

#[test]
fn a_daemon_killed_at_every_effect_of_a_resume_lets_one_vm_go_on_and_never_two() {
    on_virtual_time(async {
        let (mut same, mut another) = (0, 0);
        let ups = VmEffect::ALL.into_iter().take_while(|effect| {
            // What follows is of a VM that is ready.
            *effect != VmEffect::Freeze
        });
        let of_this = |effect: &VmEffect| {
            let not = [
                VmEffect::Boot,
                VmEffect::Journal(Milestone::Booted),
                VmEffect::Journal(Milestone::Open),
                VmEffect::StartApp,
            ];
            !not.contains(effect)
        };
        for effect in ups.filter(of_this) {
            for point in [KillPoint::Before, KillPoint::After] {
                let what = format!("{} {point:?}", effect.name());
                let mut bench = Bench::new(65).await;
                ready(&bench, fork(vm(1), "hello")).await;
                remember(&bench, 1, "canary").await;
                suspend_over_template(&bench, 1, 1).await;
                *bench.crash.at.lock().unwrap() = Some((effect, point));
                bench.node.start(from(2, 1)).unwrap();
                bench.crash.happened.notified().await;
                bench.restart().await;
                let status = bench.node.status(vm(2));
                let over = match status {
                    Some(_) => until_phase(&bench.node, vm(2), VmPhase::Ready).await.phase,
                    None => VmPhase::Failed,
                };
                let number = if over == VmPhase::Ready {
                    same += 1;
                    assert_eq!(snapshots(&bench).await, 0, "{what}");
                    refused(&bench, from(3, 1)).await;
                    2
                } else {
                    // It had not run: nothing is lost.
                    another += 1;
                    ready(&bench, from(3, 1)).await;
                    3
                };
                assert_eq!(bench.host.running().len(), 1, "{what}");
                assert_eq!(remembered(&bench, number).await, "canary", "{what}");
                assert_eq!(bench.host.app_starts(vm(number)), 0, "{what}");
                suspend_over_template(&bench, number, 2).await;
                bench.nothing_is_left();
            }
        }
        assert!(same >= 20 && another >= 8, "{same} {another}");
    });
}

#[test]
fn a_resume_that_cannot_be_thawed_loses_nothing() {
    on_virtual_time(async {
        let bench = Bench::new(68).await;
        ready(&bench, start(vm(1), "hello")).await;
        remember(&bench, 1, "canary").await;
        suspend(&bench, 1, 1).await;
        // A host that is too busy to answer in time.
        bench.host.delay_clocks(Duration::from_secs(2));
        for number in 2..=3 {
            bench.node.start(from(number, 1)).unwrap();
            let over = bench.node.stopped(vm(number)).await.unwrap();
            let failure = over.failure.unwrap();
            assert_eq!(failure.kind, VmFailureKind::Thaw, "{failure:?}");
        }
        bench.host.delay_clocks(Duration::ZERO);
        ready(&bench, from(4, 1)).await;
        assert_eq!(remembered(&bench, 4).await, "canary");
        refused(&bench, from(5, 1)).await;
        stop(&bench, 4).await;
        bench.nothing_is_left();
    });
}

#[test]
fn behind_a_reboot_of_the_host_nobody_goes_on_from_what_another_may_have() {
    on_virtual_time(async {
        for (effect, free) in [(VmEffect::Prepare, true), (VmEffect::Fork, false)] {
            let mut bench = Bench::new(66).await;
            ready(&bench, start(vm(1), "hello")).await;
            suspend(&bench, 1, 1).await;
            *bench.crash.at.lock().unwrap() = Some((effect, KillPoint::After));
            bench.node.start(from(2, 1)).unwrap();
            bench.crash.happened.notified().await;
            bench.node.detach().await;
            bench.host = SimHost::new(67);
            fs::remove_dir_all(bench.folder.path().join("run/vms")).unwrap();
            bench.restart().await;
            if free {
                ready(&bench, from(3, 1)).await;
                stop(&bench, 3).await;
            } else {
                let why = refused(&bench, from(3, 1)).await;
                assert!(why.contains(&vm(2).to_string()), "{why}");
            }
            bench.nothing_is_left();
        }
    });
}
