//! Templates on the simulated host: built behind the first start, found again, made anew.

use core::time::Duration;
use std::path::PathBuf;

use spore_node::config::KillPoint;
use spore_node::vm::state::{Milestone, VmEffect};
use spore_wire::id::SnapshotId;
use spore_wire::node::{
    NodeEvent, Purpose, Source, StartVm, TemplateMiss, TemplateOf, TemplateStage, VmPhase, VmStatus,
};
use tokio::time::Instant;

use crate::bench::{Bench, on_virtual_time, start, vm, with_secret};
use crate::takes::{ready, stop};

fn warm(number: u8, app: &str) -> StartVm {
    StartVm {
        source: Source::Template(TemplateOf::Everybody),
        ..start(vm(number), app)
    }
}

/// Waits until there are so many templates, and no VM of a builder's.
async fn templates(bench: &Bench, count: u32) {
    let begun = Instant::now();
    let builds = |status: &VmStatus| !status.phase.is_over() && !status.purpose.is_serve();
    while bench.node.node_status().templates.ready != count || bench.node.list().iter().any(builds)
    {
        let waited = begun.elapsed();
        assert!(waited < Duration::from_secs(900), "{:?}", bench.node.list());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

fn template_of(status: &VmStatus) -> SnapshotId {
    match status.source {
        Source::Snapshot(id) => id,
        other => panic!("it began from {other:?}"),
    }
}

#[test]
fn the_first_start_boots_and_later_ones_of_any_account_fork() {
    on_virtual_time(async {
        let bench = Bench::new(1).await;
        let first = ready(&bench, with_secret(warm(1, "hello"))).await;
        assert_eq!(
            (first.source, first.missed),
            (Source::Boot, Some(TemplateMiss::None))
        );
        let mut stages = Vec::new();
        while stages.last() != Some(&TemplateStage::Ready) {
            let stage = bench.node.template_stage(vm(1)).unwrap();
            if stages.last() != Some(&stage) {
                stages.push(stage);
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        assert!(stages.is_sorted(), "{stages:?}");
        assert!(stages.contains(&TemplateStage::Booting), "{stages:?}");
        templates(&bench, 1).await;
        let mut other = warm(2, "other");
        other.owner.account = "neighbour".to_owned();
        let forks = [
            ready(&bench, warm(3, "hello")).await,
            ready(&bench, other).await,
        ];
        assert_eq!(template_of(&forks[0]), template_of(&forks[1]));

        // Another size, and an account's own image, are other templates.
        let mut large = warm(4, "large");
        large.resources.memory_mib = 512;
        let mut own = warm(5, "own");
        own.source = Source::Template(TemplateOf::Account);
        for start in [large, own] {
            assert_eq!(ready(&bench, start).await.missed, Some(TemplateMiss::None));
        }
        templates(&bench, 3).await;
        let status = bench.node.node_status().templates;
        assert_eq!((status.hits, status.misses), (2, 3));
        for number in [1, 3, 2, 4, 5] {
            stop(&bench, number).await;
        }
        assert_eq!(bench.node.template_stage(vm(1)), None, "it is over");
        bench.nothing_is_left();
    });
}

#[test]
fn a_template_outlives_its_daemon_and_not_its_kernel() {
    on_virtual_time(async {
        let mut bench = Bench::new(2).await;
        ready(&bench, warm(1, "hello")).await;
        templates(&bench, 1).await;
        stop(&bench, 1).await;
        bench.restart().await;
        let forked = ready(&bench, warm(2, "hello")).await;
        let id = template_of(&forked);
        stop(&bench, 2).await;

        bench.host.set_kernel("a newer one");
        bench.restart().await;
        assert_eq!(bench.node.node_status().templates.ready, 0);
        let infos = bench.node.snapshots().list("public").await.unwrap();
        assert!(infos.iter().all(|info| info.id != id), "{infos:?}");
        let booted = ready(&bench, warm(3, "hello")).await;
        assert_eq!(booted.missed, Some(TemplateMiss::None));
        templates(&bench, 1).await;
        stop(&bench, 3).await;
        bench.nothing_is_left();
    });
}

#[test]
fn a_template_that_is_half_made_when_its_daemon_dies_leaves_nothing() {
    on_virtual_time(async {
        let stages = [
            (VmEffect::Journal(Milestone::Prepared), KillPoint::After),
            (VmEffect::Journal(Milestone::Thawed), KillPoint::Before),
            (VmEffect::Journal(Milestone::Started), KillPoint::After),
            (VmEffect::Freeze, KillPoint::After),
        ];
        for (effect, point) in stages {
            let mut bench = Bench::new(3).await;
            ready(&bench, warm(1, "hello")).await;
            *bench.crash.at.lock().unwrap() = Some((effect, point));
            bench.crash.happened.notified().await;
            let adoption = bench.restart().await;
            assert_eq!(adoption.adopted, [vm(1)], "{adoption:?}");
            assert_eq!(adoption.released.len(), 1, "{adoption:?}");
            // The next start has it built.
            ready(&bench, warm(2, "hello")).await;
            templates(&bench, 1).await;
            for number in [1, 2] {
                stop(&bench, number).await;
            }
            bench.nothing_is_left();
        }
    });
}

#[test]
fn a_damaged_template_breaks_two_vms_and_is_made_anew() {
    on_virtual_time(async {
        let mut bench = Bench::new(4).await;
        ready(&bench, warm(1, "hello")).await;
        templates(&bench, 1).await;
        let infos = bench.node.snapshots().list("public").await.unwrap();
        let [info] = &infos[..] else {
            panic!("{infos:?}");
        };
        flip(
            bench
                .folder
                .path()
                .join(format!("snapshots/public/{}/state", info.id)),
        );
        bench.restart().await;
        for number in [2, 3] {
            bench.node.start(warm(number, "hello")).unwrap();
            let over = bench.node.stopped(vm(number)).await.unwrap();
            assert_eq!(template_of(&over), info.id, "{over:?}");
            assert_eq!(over.phase, VmPhase::Failed);
        }
        // What it came to is told by a watch of its own.
        tokio::time::sleep(Duration::from_secs(1)).await;
        let booted = ready(&bench, warm(4, "hello")).await;
        assert_eq!(booted.missed, Some(TemplateMiss::Failed), "{booted:?}");
        tokio::time::sleep(Duration::from_secs(60)).await;
        ready(&bench, warm(5, "hello")).await;
        templates(&bench, 1).await;
        let anew = ready(&bench, warm(6, "hello")).await;
        assert_ne!(template_of(&anew), info.id);
    });
}

#[test]
fn a_builders_vm_is_told_as_the_nodes_own() {
    on_virtual_time(async {
        let bench = Bench::new(5).await;
        let mut watch = bench.node.watch();
        ready(&bench, warm(1, "hello")).await;
        templates(&bench, 1).await;
        let mut own = 0;
        while let Ok(NodeEvent::Vm(status)) =
            tokio::time::timeout(Duration::from_secs(1), watch.next()).await
        {
            let builds = status.vm != vm(1);
            assert_eq!(builds, status.purpose == Purpose::Template, "{status:?}");
            own += u32::from(builds);
        }
        assert!(own > 0, "no builder was seen");
    });
}

/// One whose app may run already where it begins, of a release.
fn of_release(number: u8, release: u64) -> StartVm {
    let mut start = start(vm(number), "hello");
    start.source = Source::Template(TemplateOf::Release);
    start.owner.release = release;
    start.process.as_mut().unwrap().has_hooks = true;
    start
}

async fn kept(bench: &Bench) -> Vec<SnapshotId> {
    let infos = bench.node.snapshots().list("me").await.unwrap();
    let made = infos.into_iter().filter(|info| {
        let meta = info.meta.as_ref();
        meta.is_some_and(|meta| meta.release.is_some())
    });
    made.map(|info| info.id).collect()
}

#[test]
fn a_release_begins_where_its_app_was_ready_and_another_one_does_not() {
    on_virtual_time(async {
        let mut bench = Bench::new(6).await;
        let first = ready(&bench, of_release(1, 1)).await;
        assert_eq!(first.missed, Some(TemplateMiss::None));
        assert!(!first.is_warm);
        templates(&bench, 1).await;
        let second = ready(&bench, of_release(2, 1)).await;
        let old = template_of(&second);
        assert!(second.is_warm && second.missed.is_none(), "{second:?}");
        assert_eq!(kept(&bench).await, [old]);
        // What a VM began from stays as long as that.
        stop(&bench, 2).await;

        // Whatever the app was begun with makes another one.
        let mut told = of_release(3, 1);
        let process = told.process.as_mut().unwrap();
        process.environment = vec![("A".to_owned(), "b".to_owned())];
        let mut folder = of_release(4, 1);
        folder.folder = None;
        for start in [told, folder, of_release(5, 2)] {
            let missed = ready(&bench, start).await;
            assert_eq!(missed.missed, Some(TemplateMiss::None), "{missed:?}");
            assert!(!missed.is_warm);
            templates(&bench, 1).await;
        }
        let third = ready(&bench, of_release(6, 2)).await;
        let new = template_of(&third);
        assert!(third.is_warm && new != old);
        assert_eq!(kept(&bench).await, [new], "one of each app");

        for number in [1, 3, 4, 5, 6] {
            stop(&bench, number).await;
        }
        bench.restart().await;
        let found = ready(&bench, of_release(7, 2)).await;
        assert!(found.is_warm && template_of(&found) == new, "{found:?}");
        stop(&bench, 7).await;
        bench.host.set_kernel("a newer one");
        bench.restart().await;
        let stale = ready(&bench, of_release(8, 2)).await;
        assert_eq!(stale.missed, Some(TemplateMiss::None));
        templates(&bench, 1).await;
        stop(&bench, 8).await;
        assert_eq!(kept(&bench).await.len(), 1);
        bench.node.forget_warm("me", "other").await;
        assert_eq!(kept(&bench).await.len(), 1);
        bench.node.forget_warm("me", "hello").await;
        assert_eq!(kept(&bench).await, []);
        bench.nothing_is_left();
    });
}

#[test]
fn an_app_that_is_removed_while_its_template_is_built_leaves_none() {
    on_virtual_time(async {
        let bench = Bench::new(7).await;
        ready(&bench, of_release(1, 1)).await;
        stop(&bench, 1).await;
        let builds = |status: &VmStatus| !status.phase.is_over() && !status.purpose.is_serve();
        while !bench.node.list().iter().any(builds) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        bench.node.forget_warm("me", "hello").await;
        assert!(!bench.node.list().iter().any(builds));
        tokio::time::sleep(Duration::from_secs(60)).await;
        assert_eq!(kept(&bench).await, []);
        assert_eq!(bench.node.node_status().templates.ready, 0);
        bench.nothing_is_left();
    });
}

#[test]
fn of_an_app_with_secrets_no_memory_is_kept() {
    on_virtual_time(async {
        let bench = Bench::new(8).await;
        for number in [1, 2] {
            let status = ready(&bench, with_secret(of_release(number, 1))).await;
            assert_eq!(status.missed, Some(TemplateMiss::Unsupported));
            assert!(!status.is_warm);
            tokio::time::sleep(Duration::from_secs(60)).await;
        }
        assert_eq!(kept(&bench).await, []);
        for number in [1, 2] {
            stop(&bench, number).await;
        }
        bench.nothing_is_left();
    });
}

/// Changes one byte of a file.
fn flip(file: PathBuf) {
    let mut bytes = std::fs::read(&file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(file, bytes).unwrap();
}
