//! Snapshots of VMs that run, on the simulated host: taken, forked from, refused, removed.

use std::collections::BTreeSet;

use spore_node::image::store::GcMode;
use spore_node::node::{StartError, Together};
use spore_node::snapshot::key::SnapshotKey;
use spore_node::snapshot::{Cascade, StoreError};
use spore_node::snapshots::SnapshotsError;
use spore_node::take::{Take, TakeError, Taken};
use spore_wire::id::SnapshotId;
use spore_wire::node::{Source, StartVm, StopMode, VmFailureKind, VmPhase, VmStatus};
use spore_wire::secret::SecretBytes;
use spore_wire::snapshot::SnapshotKind;

use crate::bench::{Bench, on_virtual_time, start, taken_as, until_phase, vm, with_secret};

fn id(number: u8) -> SnapshotId {
    SnapshotId::from_bytes([number; 16])
}

async fn take(bench: &Bench, of: u8, kind: SnapshotKind, to: u8) -> Result<Taken, TakeError> {
    bench.node.take(vm(of), taken_as(id(to), kind)).await
}

async fn checkpoint(bench: &Bench, of: u8, to: u8) -> Taken {
    take(bench, of, SnapshotKind::Checkpoint, to).await.unwrap()
}

fn from(number: u8, snapshot: u8) -> StartVm {
    StartVm {
        source: Source::Snapshot(id(snapshot)),
        ..start(vm(number), "hello")
    }
}

/// Starts one, and waits until it serves.
pub(crate) async fn ready(bench: &Bench, start: StartVm) -> VmStatus {
    let vm = start.vm;
    bench.node.start(start).unwrap();
    let status = until_phase(&bench.node, vm, VmPhase::Ready).await;
    assert_eq!(status.phase, VmPhase::Ready, "{status:?}");
    status
}

pub(crate) async fn stop(bench: &Bench, number: u8) {
    bench
        .node
        .stop(vm(number), StopMode::Graceful)
        .await
        .unwrap();
    let over = bench.node.stopped(vm(number)).await.unwrap();
    assert_eq!(over.phase, VmPhase::Stopped, "{over:?}");
}

/// Why a VM that was started does not become ready.
async fn refused(bench: &Bench, start: StartVm) -> String {
    let vm = start.vm;
    bench.node.start(start).unwrap();
    let over = bench.node.stopped(vm).await.unwrap();
    let failure = over.failure.unwrap();
    assert_eq!(failure.kind, VmFailureKind::Snapshot, "{failure:?}");
    failure.message
}

#[test]
fn a_checkpoint_is_forked_by_a_later_daemon_and_its_source_goes_on() {
    on_virtual_time(async {
        let mut bench = Bench::new(31).await;
        let before = ready(&bench, start(vm(1), "hello")).await;
        let taken = checkpoint(&bench, 1, 1).await;
        assert!(taken.pause <= taken.frozen, "{taken:?}");
        let meta = taken.info.meta.unwrap();
        assert_eq!((taken.info.depth, taken.info.encrypted), (0, false));
        assert_eq!(meta.app.unwrap().port, 8000);
        assert_eq!(bench.restart().await.adopted, [vm(1)]);
        ready(&bench, from(2, 1)).await;
        assert_eq!(bench.host.app_starts(vm(2)), 0, "it goes on");
        let after = until_phase(&bench.node, vm(1), VmPhase::Ready).await;
        assert_eq!(after.boot_id, before.boot_id);
        assert_eq!(bench.host.app_starts(vm(1)), 1);
        let info = bench.node.snapshots().info("me", id(1)).await.unwrap();
        assert_eq!(info.damage, None);
        stop(&bench, 1).await;
        stop(&bench, 2).await;
        bench.nothing_is_left();
    });
}

#[test]
fn forks_of_forks_go_five_deep_and_each_holds_its_own_pages_alone() {
    on_virtual_time(async {
        let mut bench = Bench::new(32).await;
        ready(&bench, start(vm(1), "hello")).await;
        for depth in 0..5 {
            let level = depth + 1;
            let taken = checkpoint(&bench, level, level).await;
            assert_eq!(taken.info.depth, u32::from(depth));
            assert_eq!(taken.info.memory_pages, u64::from(depth > 0));
            stop(&bench, level).await;
            bench.restart().await;
            ready(&bench, from(level + 1, level)).await;
        }
        stop(&bench, 6).await;
        bench.nothing_is_left();
    });
}

#[test]
fn a_templates_vm_ends_with_it_and_forks_begin_from_it() {
    on_virtual_time(async {
        let bench = Bench::new(33).await;
        let mut builder = start(vm(1), "builder");
        builder.process = None;
        ready(&bench, builder).await;
        let taken = take(&bench, 1, SnapshotKind::Template, 1).await.unwrap();
        assert!(taken.info.meta.unwrap().app.is_none());
        let over = bench.node.stopped(vm(1)).await.unwrap();
        assert_eq!(over.phase, VmPhase::Stopped, "{over:?}");
        assert_eq!(bench.node.snapshots().memories().status().bytes, 256 << 20);
        let (one, two) = (from(2, 1), from(3, 1));
        ready(&bench, one).await;
        ready(&bench, two).await;
        let used = bench.node.node_status().memory_mib_used;
        assert_eq!(used, 2 * (256 + 32) + 256, "the memory that they share too");
        for number in [2, 3] {
            assert_eq!(bench.host.app_starts(vm(number)), 1);
            stop(&bench, number).await;
        }
        bench.nothing_is_left();
    });
}

#[test]
fn what_holds_secrets_is_taken_with_a_key_alone_and_so_is_what_comes_from_it() {
    on_virtual_time(async {
        let bench = Bench::new(34).await;
        ready(&bench, with_secret(start(vm(1), "hello"))).await;
        let open = take(&bench, 1, SnapshotKind::Checkpoint, 1).await;
        assert!(matches!(open, Err(TakeError::HoldsSecrets(_))), "{open:?}");
        let with_key = Take {
            key: Some(SnapshotKey::from_bytes([7; 32])),
            ..taken_as(id(1), SnapshotKind::Checkpoint)
        };
        let taken = bench.node.take(vm(1), with_key).await.unwrap();
        assert!(taken.info.encrypted && taken.info.meta.unwrap().holds_secrets);
        let message = refused(&bench, from(2, 1)).await;
        assert!(message.contains("its key is not there"), "{message}");
        let short = StartVm {
            keys: vec![(id(1), SecretBytes::new(vec![7; 31]))],
            ..from(3, 1)
        };
        let short = bench.node.start(short).unwrap_err();
        assert!(
            matches!(short, StartError::Key { bytes: 31, .. }),
            "{short}"
        );
        let fork = StartVm {
            keys: vec![(id(1), SecretBytes::new(vec![7; 32]))],
            ..from(3, 1)
        };
        ready(&bench, fork).await;
        let child = take(&bench, 3, SnapshotKind::Checkpoint, 2).await;
        assert!(
            matches!(child, Err(TakeError::HoldsSecrets(_))),
            "{child:?}"
        );
        for entry in crate::bench::walk(bench.folder.path()) {
            let bytes = std::fs::read(&entry).unwrap();
            let text = String::from_utf8_lossy(&bytes);
            assert!(!text.contains("canary"), "a secret in {}", entry.display());
        }
        stop(&bench, 1).await;
        stop(&bench, 3).await;
        bench.nothing_is_left();
    });
}

#[test]
fn one_snapshot_of_a_vm_is_taken_at_a_time_and_only_of_one_that_is_ready() {
    on_virtual_time(async {
        let bench = Bench::new(35).await;
        let none = take(&bench, 1, SnapshotKind::Checkpoint, 1).await;
        assert!(matches!(none, Err(TakeError::NoVm(_))), "{none:?}");
        bench.node.start(start(vm(1), "hello")).unwrap();
        let early = take(&bench, 1, SnapshotKind::Checkpoint, 1).await;
        assert!(
            matches!(early, Err(TakeError::NotReady { .. })),
            "{early:?}"
        );
        until_phase(&bench.node, vm(1), VmPhase::Ready).await;
        let (one, two) = tokio::join!(
            take(&bench, 1, SnapshotKind::Checkpoint, 1),
            take(&bench, 1, SnapshotKind::Checkpoint, 2),
        );
        let (taken, busy) = match (one, two) {
            (Ok(taken), Err(busy)) | (Err(busy), Ok(taken)) => (taken, busy),
            other => panic!("{other:?}"),
        };
        assert!(matches!(busy, TakeError::Busy(_)), "{busy}");
        let all = bench.node.snapshots().list("me").await.unwrap();
        let ids: BTreeSet<_> = all.iter().map(|info| info.id).collect();
        assert_eq!(ids, [taken.info.id, crate::bench::snapshot()].into());
        let suspend = take(&bench, 1, SnapshotKind::Suspend, 3).await;
        assert!(matches!(suspend, Err(TakeError::NoKey)), "{suspend:?}");
        stop(&bench, 1).await;
        bench.nothing_is_left();
    });
}

#[test]
fn of_many_checkpoints_two_are_taken_at_a_time() {
    on_virtual_time(async {
        let bench = Bench::new(37).await;
        for number in 1..=6 {
            ready(&bench, start(vm(number), "hello")).await;
        }
        let takes = (1..=6).map(|number| take(&bench, number, SnapshotKind::Checkpoint, number));
        let mut takes = std::pin::pin!(futures_util::future::join_all(takes));
        let staging = bench.folder.path().join("snapshots/.staging");
        let mut most = 0;
        let taken = loop {
            tokio::select! {
                biased;
                taken = &mut takes => break taken,
                () = tokio::time::sleep(core::time::Duration::from_millis(1)) => {}
            }
            most = most.max(std::fs::read_dir(&staging).unwrap().count());
        };
        assert!(taken.iter().all(Result::is_ok), "{taken:?}");
        assert!((1..=2).contains(&most), "{most}");
        for number in 1..=6 {
            stop(&bench, number).await;
        }
        bench.nothing_is_left();
    });
}

#[test]
fn a_vm_that_is_stopped_while_its_snapshot_is_taken_ends_and_leaves_a_whole_one_or_none() {
    let mut taken = 0;
    for ms in 0..30 {
        for mode in [StopMode::Graceful, StopMode::Kill] {
            on_virtual_time(async {
                let bench = Bench::new(100 + ms).await;
                ready(&bench, start(vm(1), "hello")).await;
                let stop = async {
                    tokio::time::sleep(core::time::Duration::from_millis(ms)).await;
                    bench.node.stop(vm(1), mode).await.unwrap();
                };
                let (answer, ()) = tokio::join!(take(&bench, 1, SnapshotKind::Checkpoint, 1), stop);
                let over = bench.node.stopped(vm(1)).await.unwrap();
                assert_eq!(over.phase, VmPhase::Stopped, "after {ms} ms: {over:?}");
                let found = bench.node.snapshots().info("me", id(1)).await;
                assert_eq!(answer.is_ok(), found.is_ok(), "{answer:?}");
                taken += u32::from(answer.is_ok());
                bench.nothing_is_left();
            });
        }
    }
    assert!((5..55).contains(&taken), "{taken} of 60");
}

#[test]
fn a_guest_that_does_not_stand_still_goes_on_and_its_owner_is_told() {
    on_virtual_time(async {
        let bench = Bench::new(36).await;
        ready(&bench, start(vm(1), "hello")).await;
        bench.host.refuse_freezes(true);
        let answer = take(&bench, 1, SnapshotKind::Checkpoint, 1)
            .await
            .unwrap_err();
        assert!(
            answer.to_string().contains("does not stand still"),
            "{answer}"
        );
        assert_eq!(bench.node.status(vm(1)).unwrap().phase, VmPhase::Ready);
        bench.host.refuse_freezes(false);
        checkpoint(&bench, 1, 1).await;
        stop(&bench, 1).await;
        bench.nothing_is_left();
    });
}

#[test]
fn a_snapshot_of_another_kernel_is_refused_with_the_reason() {
    on_virtual_time(async {
        let mut bench = Bench::new(37).await;
        ready(&bench, start(vm(1), "hello")).await;
        checkpoint(&bench, 1, 1).await;
        stop(&bench, 1).await;
        bench.host.set_kernel("6.12.0-1");
        bench.restart().await;
        let message = refused(&bench, from(2, 1)).await;
        let words = "the guest kernel `simulated`, and this host has `6.12.0-1`";
        assert!(message.contains(words), "{message}");
        let mut other = from(3, 1);
        other.image = spore_wire::id::ImageId::from_hash([3; 32]);
        let message = refused(&bench, other).await;
        assert!(message.contains("a VM has the image of"), "{message}");
        bench.nothing_is_left();
    });
}

#[test]
fn a_snapshot_that_a_vm_began_from_is_neither_removed_nor_collected() {
    on_virtual_time(async {
        let mut bench = Bench::new(38).await;
        ready(&bench, start(vm(1), "hello")).await;
        checkpoint(&bench, 1, 1).await;
        stop(&bench, 1).await;
        ready(&bench, from(2, 1)).await;
        checkpoint(&bench, 2, 2).await;
        bench.restart().await;
        let snapshots = bench.node.snapshots().clone();
        let remove = async |cascade| {
            snapshots
                .remove("me", id(1), cascade, BTreeSet::new())
                .await
        };
        let children = remove(Cascade::Refuse).await.unwrap_err();
        let is_dependents = |error: &SnapshotsError| {
            matches!(error, SnapshotsError::Store(StoreError::Dependents { .. }))
        };
        assert!(is_dependents(&children), "{children}");
        let used = remove(Cascade::Remove).await.unwrap_err();
        assert!(
            matches!(used, SnapshotsError::Store(StoreError::InUse(_))),
            "{used}"
        );
        let images = bench.node.images_in_use().unwrap();
        assert_eq!(images.len(), 2, "root and folder");

        let all = BTreeSet::from([crate::bench::snapshot()]);
        let gone = snapshots.gc(all.clone(), GcMode::Remove).await.unwrap();
        let gone: Vec<_> = gone.into_iter().map(|info| info.id).collect();
        assert_eq!(gone, [id(2)], "nothing needs it, and it is not new");
        stop(&bench, 2).await;
        let gone = snapshots.gc(all, GcMode::DryRun).await.unwrap();
        assert_eq!(gone.len(), 1);
        assert_eq!(remove(Cascade::Refuse).await.unwrap(), [id(1)]);
        bench.nothing_is_left();
    });
}

#[test]
fn a_memory_that_has_no_room_refuses_the_start_and_one_that_is_idle_makes_room() {
    on_virtual_time(async {
        let bench = Bench::new(39).await;
        ready(&bench, crate::bench::fork(vm(1), "hello")).await;
        let memories = bench.node.snapshots().memories();
        assert_eq!(memories.status().held_bytes, 256 << 20);
        stop(&bench, 1).await;
        assert_eq!(
            (memories.status().held_bytes, memories.status().bytes),
            (0, 256 << 20)
        );
        // All that the host has to give: what nobody begins from is given up for it.
        let mut large = start(vm(2), "large");
        large.folder = None;
        large.resources.memory_mib = 3584 - 32;
        ready(&bench, large).await;
        assert_eq!(memories.status().bytes, 0);
        let refused = bench
            .node
            .start(crate::bench::fork(vm(3), "hello"))
            .unwrap_err();
        assert_eq!(refused.failure().kind, VmFailureKind::NoCapacity);
        assert_eq!(memories.status().bytes, 0, "nothing is kept for it");
        stop(&bench, 2).await;
        bench.nothing_is_left();
    });
}

#[test]
fn of_many_forks_those_start_that_have_room_or_none() {
    on_virtual_time(async {
        let bench = Bench::new(47).await;
        ready(&bench, start(vm(1), "hello")).await;
        checkpoint(&bench, 1, 1).await;
        stop(&bench, 1).await;
        let starts = |from_number: u8, count: u8| -> Vec<StartVm> {
            let numbers = from_number..from_number + count;
            numbers.map(|number| from(number, 1)).collect()
        };
        let each = bench.node.start_many(starts(10, 60), Together::Each);
        let fit = each.iter().filter(|one| one.is_ok()).count();
        assert!((1..60).contains(&fit), "{fit}");
        assert!(
            each[..fit].iter().all(Result::is_ok),
            "the first have the room"
        );
        let no_room = |one: &Result<VmStatus, StartError>| {
            matches!(one, Err(StartError::NoRoom(_) | StartError::NoImageRoom(_)))
        };
        assert!(each[fit..].iter().all(no_room));
        let fit = u8::try_from(fit).unwrap();
        for number in 10..10 + fit {
            until_phase(&bench.node, vm(number), VmPhase::Ready).await;
            stop(&bench, number).await;
        }

        let before = bench.node.node_status();
        let all = bench.node.start_many(starts(80, fit + 1), Together::All);
        assert!(no_room(&all[0]), "the first says why: {:?}", all[0]);
        let others = all[1..].iter();
        let not_all = |one: &Result<VmStatus, StartError>| matches!(one, Err(StartError::NotAll));
        assert!(others.clone().all(not_all));
        let after = bench.node.node_status();
        assert_eq!(
            (after.vms, after.memory_mib_used),
            (before.vms, before.memory_mib_used)
        );

        let all = bench.node.start_many(starts(80, fit), Together::All);
        assert!(all.iter().all(Result::is_ok), "{all:?}");
        for number in 80..80 + fit {
            until_phase(&bench.node, vm(number), VmPhase::Ready).await;
            stop(&bench, number).await;
        }
        bench.nothing_is_left();
    });
}
