//! VMs that begin where another stood, on the simulated host.

use core::time::Duration;

use spore_wire::guest::ThawStep;
use spore_wire::id::SnapshotId;
use spore_wire::node::{Source, StopMode, VmFailureKind, VmPhase};

use crate::bench::{
    Bench, exec, fork, on_virtual_time, start, until, until_phase, vm, with_secret,
};
use crate::takes::{ready, stop};

async fn said(bench: &Bench, number: u8, argv: &[&str]) -> String {
    let program = bench.node.exec(vm(number), exec(argv)).await.unwrap();
    let mut said = Vec::new();
    while let Some((_of, bytes)) = program.next_output().await.unwrap() {
        said.extend(bytes);
    }
    String::from_utf8(said).unwrap()
}

#[test]
fn forks_of_one_source_are_thawed_apart_and_serve() {
    on_virtual_time(async {
        let bench = Bench::new(21).await;
        bench.node.start(fork(vm(1), "hello")).unwrap();
        bench.node.start(fork(vm(2), "hello")).unwrap();
        let forking = until(&bench.node, vm(1), |status| {
            status.phase > VmPhase::Preparing
        });
        assert_eq!(forking.await.phase, VmPhase::Forking);
        for number in [1, 2] {
            let status = until_phase(&bench.node, vm(number), VmPhase::Ready).await;
            assert_eq!(status.phase, VmPhase::Ready, "{status:?}");
            let names = status.phases.iter().map(|phase| phase.name.as_str());
            let names: Vec<&str> = names.collect();
            assert_eq!(names, ["prepare", "fork", "agent", "thaw", "app"]);
        }
        let random = said(&bench, 1, &["random"]).await;
        assert!(random.len() > 1, "{random}");
        assert_ne!(random, said(&bench, 2, &["random"]).await);
        for number in [1, 2] {
            bench
                .node
                .stop(vm(number), StopMode::Graceful)
                .await
                .unwrap();
            bench.node.stopped(vm(number)).await.unwrap();
        }
        bench.nothing_is_left();
    });
}

#[test]
fn a_fork_is_quicker_than_a_boot() {
    on_virtual_time(async {
        let bench = Bench::new(22).await;
        bench.node.start(start(vm(1), "hello")).unwrap();
        bench.node.start(fork(vm(2), "hello")).unwrap();
        let mut agent_us = Vec::new();
        for number in [1, 2] {
            let status = until_phase(&bench.node, vm(number), VmPhase::Ready).await;
            let agent = status.phases.iter().find(|phase| phase.name == "agent");
            agent_us.push(agent.unwrap().us);
        }
        assert!(agent_us[1] < agent_us[0], "{agent_us:?}");
    });
}

#[test]
fn a_fork_of_what_is_not_there_or_another_accounts_or_of_another_size_fails_and_leaves_nothing() {
    on_virtual_time(async {
        let bench = Bench::new(23).await;
        let mut missing = fork(vm(1), "hello");
        missing.source = Source::Snapshot(SnapshotId::from_bytes([1; 16]));
        let mut foreign = fork(vm(2), "hello");
        foreign.owner.account = "other".to_owned();
        let mut larger = fork(vm(3), "hello");
        larger.resources.memory_mib *= 2;
        for (start, words) in [
            (
                missing,
                "the account `me` has no snapshot aeaqcaibaeaqcaibaeaqcaibae",
            ),
            (foreign, "the account `other` has no snapshot"),
            (
                larger,
                "512 MiB was asked for, and the snapshot has 256 MiB",
            ),
        ] {
            let vm = start.vm;
            bench.node.start(start).unwrap();
            let over = bench.node.stopped(vm).await.unwrap();
            let failure = over.failure.unwrap();
            assert_eq!(failure.kind, VmFailureKind::Snapshot, "{failure:?}");
            assert!(failure.message.contains(words), "{failure:?}");
        }
        bench.nothing_is_left();
    });
}

#[test]
fn withheld_thaw_step_kills_the_vm_before_its_network_opens() {
    for step in ThawStep::ALL {
        for begin in [start, fork] {
            on_virtual_time(async {
                let bench = Bench::new(90).await;
                bench.host.withhold(step);
                let start = with_secret(begin(vm(1), "hello"));
                bench.node.start(start).unwrap();
                let over = bench.node.stopped(vm(1)).await.unwrap();
                let failure = over.failure.unwrap();
                assert_eq!(failure.kind, VmFailureKind::Thaw, "{failure:?}");
                let words = format!("did not renew {step:?}");
                assert!(failure.message.contains(&words), "{failure:?}");
                assert!(!bench.host.was_open(vm(1)), "{step:?}");
                bench.nothing_is_left();
            });
        }
    }
}

#[test]
fn an_agent_that_takes_no_secrets_is_good_enough_for_who_has_none() {
    for begin in [start, fork] {
        on_virtual_time(async {
            let bench = Bench::new(91).await;
            bench.host.withhold(ThawStep::Secrets);
            ready(&bench, begin(vm(1), "hello")).await;
            stop(&bench, 1).await;
            bench.nothing_is_left();
        });
    }
}

#[test]
fn clock_is_right_before_the_apps_first_instruction_however_long_the_agent_was_kept_waiting() {
    for begin in [start, fork] {
        on_virtual_time(async {
            let bench = Bench::new(92).await;
            bench.host.delay_clock(vm(1), Duration::from_millis(300), 1);
            ready(&bench, begin(vm(1), "hello")).await;
            stop(&bench, 1).await;
            bench.nothing_is_left();
        });
    }
}

#[test]
fn a_host_that_is_overloaded_for_a_while_sets_the_clock_until_it_is_right() {
    for begin in [start, fork] {
        on_virtual_time(async {
            let bench = Bench::new(94).await;
            bench
                .host
                .delay_clock(vm(1), Duration::from_millis(1500), 8);
            ready(&bench, begin(vm(1), "hello")).await;
            stop(&bench, 1).await;
            bench.nothing_is_left();
        });
    }
}

#[test]
fn a_clock_that_cannot_be_set_right_ends_the_vm_before_its_network_opens() {
    for begin in [start, fork] {
        on_virtual_time(async {
            let bench = Bench::new(93).await;
            bench.host.delay_clocks(Duration::from_millis(1500));
            bench.node.start(begin(vm(1), "hello")).unwrap();
            let over = bench.node.stopped(vm(1)).await.unwrap();
            let failure = over.failure.unwrap();
            assert_eq!(failure.kind, VmFailureKind::Thaw, "{failure:?}");
            assert!(failure.message.contains("ms off"), "{failure:?}");
            assert!(!bench.host.was_open(vm(1)));
            bench.nothing_is_left();
        });
    }
}

#[test]
fn an_agent_of_generation_1_is_thawed_as_before_and_its_vm_goes_on_under_a_new_daemon() {
    on_virtual_time(async {
        let mut bench = Bench::new(91).await;
        bench.host.age_agents();
        bench.node.start(start(vm(1), "hello")).unwrap();
        let status = until_phase(&bench.node, vm(1), VmPhase::Ready).await;
        assert_eq!(status.phase, VmPhase::Ready, "{status:?}");
        assert!(bench.host.was_open(vm(1)));
        assert_eq!(bench.restart().await.adopted, [vm(1)]);
        let status = until_phase(&bench.node, vm(1), VmPhase::Ready).await;
        assert_eq!(status.phase, VmPhase::Ready, "{status:?}");
        bench.node.stop(vm(1), StopMode::Graceful).await.unwrap();
        bench.node.stopped(vm(1)).await.unwrap();
        bench.nothing_is_left();
    });
}

#[test]
fn a_fork_that_is_stopped_at_any_moment_of_its_beginning_leaves_nothing() {
    for ms in 0..60 {
        on_virtual_time(async {
            let bench = Bench::new(24 + ms).await;
            bench.node.start(fork(vm(1), "hello")).unwrap();
            tokio::time::sleep(Duration::from_millis(ms * 2)).await;
            bench.node.stop(vm(1), StopMode::Kill).await.unwrap();
            let over = bench.node.stopped(vm(1)).await.unwrap();
            assert_eq!(over.phase, VmPhase::Stopped, "after {ms} ms: {over:?}");
            bench.nothing_is_left();
        });
    }
}
