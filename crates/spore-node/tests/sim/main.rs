//! Nodes on a simulated host, on virtual time.
//!
//! Every test owns its host, folder and clock. The kill-point test enumerates the effects
//! themselves, so a new effect is a new kill point.
#![cfg(test)]

mod bench;
mod forks;
mod life;
mod suspends;
mod takes;
mod templates;

use core::time::Duration;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use spore_node::config::KillPoint;
use spore_node::hypervisor::sim::{AppScript, FaultPlan};
use spore_node::node::{Node, StartError, VmError};
use spore_node::vm::state::{Milestone, VmEffect};
use spore_wire::guest::{Exit, OutputKind, WriteFile};
use spore_wire::id::{ImageId, SnapshotId, VmId};
use spore_wire::node::{FAREWELL_MAX, StartVm, StopMode, VmFailureKind, VmPhase, VmStatus};
use spore_wire::snapshot::SnapshotKind;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::Instant;

use bench::{
    Bench, exec, fork, on_virtual_time, start, suspended_as, taken_as, until, until_phase, vm,
    walk, with_secret,
};

#[test]
fn an_app_starts_serves_and_stops_and_leaves_nothing() {
    on_virtual_time(async {
        let bench = Bench::new(1).await;
        let node = &bench.node;
        node.start(start(vm(1), "hello")).unwrap();
        let early = tokio::time::timeout(Duration::from_millis(1), node.connect(vm(1))).await;
        assert!(early.is_err(), "connected before it was ready: {early:?}");
        let status = until_phase(node, vm(1), VmPhase::Ready).await;
        assert_eq!(status.phase, VmPhase::Ready, "{status:?}");
        let names: Vec<&str> = status
            .phases
            .iter()
            .map(|phase| phase.name.as_str())
            .collect();
        assert_eq!(names, ["prepare", "boot", "agent", "thaw", "app"]);
        assert!(
            status.phases.iter().all(|phase| phase.us > 0),
            "{:?}",
            status.phases
        );
        assert_eq!(status.boot_id.as_ref(), bench.host.running().get(&vm(1)));

        let mut stream = node.connect(vm(1)).await.unwrap();
        stream
            .write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            .await
            .unwrap();
        let mut answer = vec![0; 4096];
        let got = stream.read(&mut answer).await.unwrap();
        let answer = String::from_utf8_lossy(&answer[..got]).into_owned();
        assert!(answer.ends_with(&vm(1).to_string()), "{answer}");

        assert_eq!(node.node_status().vms, 1);
        assert_eq!(node.node_status().memory_mib_used, 256 + 32);
        node.stop(vm(1), StopMode::Graceful).await.unwrap();
        let status = node.stopped(vm(1)).await.unwrap();
        assert_eq!(status.phase, VmPhase::Stopped);
        assert_eq!(status.failure, None);
        bench.nothing_is_left();
    });
}

#[test]
fn programs_and_files_go_through_the_agent_however_large() {
    on_virtual_time(async {
        let bench = Bench::new(2).await;
        let node = &bench.node;
        node.start(start(vm(1), "hello")).unwrap();
        until_phase(node, vm(1), VmPhase::Ready).await;

        let big = vec![b'y'; 900_000];
        let cat = Arc::new(node.exec(vm(1), exec(&["cat"])).await.unwrap());
        let feeding = Arc::clone(&cat);
        let fed = big.clone();
        let feeder = tokio::spawn(async move {
            feeding.send_stdin(&fed).await.unwrap();
            feeding.close_stdin().await.unwrap();
        });
        let mut output = Vec::new();
        while let Some((of, bytes)) = cat.next_output().await.unwrap() {
            assert_eq!(of, OutputKind::Stdout);
            output.extend(bytes);
        }
        feeder.await.unwrap();
        assert_eq!(output.len(), big.len());
        assert_eq!(cat.wait().await.unwrap(), Exit::Code { code: 0 });

        let failing = node.exec(vm(1), exec(&["exit", "3"])).await.unwrap();
        assert_eq!(failing.wait().await.unwrap(), Exit::Code { code: 3 });
        let missing = node.exec(vm(1), exec(&["nonsense"])).await.unwrap();
        assert!(missing.wait().await.is_err());

        let file = WriteFile {
            path: "/tmp/x".to_owned(),
            mode: 0o644,
            user: None,
        };
        let writer = node.write_file(vm(1), file).await.unwrap();
        writer.send(&big).await.unwrap();
        writer.finish().await.unwrap();
        let reader = node.read_file(vm(1), "/tmp/x".to_owned()).await.unwrap();
        let mut read = Vec::new();
        while let Some(bytes) = reader.next().await.unwrap() {
            read.extend(bytes);
        }
        assert_eq!(reader.finish().await.unwrap(), (900_000, 0o644));
        assert_eq!(read, big);
        let gone = node.read_file(vm(1), "/tmp/none".to_owned()).await.unwrap();
        assert!(gone.finish().await.is_err());

        // More programs than may run at once, each dropped while it runs: the streams come back.
        for _round in 0..3 {
            let mut running = Vec::new();
            for _program in 0..60 {
                running.push(node.exec(vm(1), exec(&["sleep"])).await.unwrap());
            }
        }
        node.stop(vm(1), StopMode::Kill).await.unwrap();
        node.stopped(vm(1)).await.unwrap();
        bench.nothing_is_left();
    });
}

#[test]
fn starting_twice_is_one_start_and_a_full_host_says_so() {
    on_virtual_time(async {
        let bench = Bench::new(3).await;
        let node = &bench.node;
        node.start(start(vm(1), "hello")).unwrap();
        node.start(start(vm(1), "hello")).unwrap();
        let mut large = start(vm(2), "large");
        large.resources.memory_mib = 100_000;
        let refused = node.start(large).unwrap_err();
        assert_eq!(refused.failure().kind, VmFailureKind::NoCapacity);
        let mut imageless = start(vm(3), "hello");
        imageless.image = ImageId::from_hash([0xff; 32]);
        assert!(matches!(node.start(imageless), Err(StartError::Image(_))));
        assert!(matches!(
            node.start(start(vm(4), "../up")),
            Err(StartError::Name(_))
        ));
        assert_eq!(node.list().len(), 1);
        until_phase(node, vm(1), VmPhase::Ready).await;
        assert_eq!(bench.host.app_starts(vm(1)), 1);
        node.stop(vm(1), StopMode::Graceful).await.unwrap();
        node.stopped(vm(1)).await.unwrap();
        // Over stays over.
        assert_eq!(
            node.start(start(vm(1), "hello")).unwrap().phase,
            VmPhase::Stopped
        );
        bench.nothing_is_left();
    });
}

#[test]
fn a_vm_without_an_app_starts_nothing_and_serves_whoever_asks_for_it() {
    on_virtual_time(async {
        let mut bench = Bench::new(8).await;
        let mut bare = start(vm(1), "sandbox");
        bare.process = None;
        bench.node.start(bare.clone()).unwrap();
        let status = until_phase(&bench.node, vm(1), VmPhase::Ready).await;
        assert_eq!(status.phase, VmPhase::Ready, "{status:?}");
        assert_eq!(bench.restart().await.adopted, [vm(1)]);
        let status = until_phase(&bench.node, vm(1), VmPhase::Ready).await;
        assert_eq!(status.phase, VmPhase::Ready, "{status:?}");
        bench.node.start(bare).unwrap();
        let program = bench.node.exec(vm(1), exec(&["echo"])).await.unwrap();
        while program.next_output().await.unwrap().is_some() {}
        let refused = bench.node.connect(vm(1)).await.unwrap_err();
        assert!(matches!(refused, VmError::NoPort(_)), "{refused}");
        assert_eq!(bench.host.app_starts(vm(1)), 0);
        bench.node.stop(vm(1), StopMode::Graceful).await.unwrap();
        let over = bench.node.stopped(vm(1)).await.unwrap();
        assert_eq!(over.phase, VmPhase::Stopped, "{over:?}");
        bench.nothing_is_left();
    });
}

#[test]
fn an_app_that_never_comes_up_fails_with_its_last_lines() {
    on_virtual_time(async {
        let bench = Bench::new(4).await;
        let node = &bench.node;
        let silent = AppScript {
            ready_after: None,
            lines: vec!["warming up".to_owned()],
            ..AppScript::default()
        };
        bench.host.set_script("never", silent);
        let crashing = AppScript {
            ready_after: None,
            ends_after: Some(Duration::from_millis(10)),
            lines: vec!["no module named flask".to_owned()],
            ..AppScript::default()
        };
        bench.host.set_script("crashes", crashing);
        node.start(start(vm(1), "never")).unwrap();
        node.start(start(vm(2), "crashes")).unwrap();
        let mut missing = start(vm(3), "missing");
        missing.process.as_mut().unwrap().command = vec!["/none".to_owned()];
        node.start(missing).unwrap();
        for (number, line) in [
            (1, Some("warming up")),
            (2, Some("no module named flask")),
            (3, None),
        ] {
            let status = node.stopped(vm(number)).await.unwrap();
            let failure = status.failure.unwrap();
            assert_eq!(failure.kind, VmFailureKind::App, "{failure:?}");
            assert_eq!(
                failure.last_lines.last().map(String::as_str),
                line,
                "{failure:?}"
            );
        }
        bench.nothing_is_left();
    });
}

#[test]
fn a_ready_app_that_crashes_in_a_loop_ends_its_vm() {
    on_virtual_time(async {
        let bench = Bench::new(5).await;
        let script = AppScript {
            ends_after: Some(Duration::from_secs(2)),
            ..AppScript::default()
        };
        bench.host.set_script("hello", script);
        bench.node.start(start(vm(1), "hello")).unwrap();
        let ready = until_phase(&bench.node, vm(1), VmPhase::Ready).await;
        assert_eq!(ready.phase, VmPhase::Ready);
        let status = bench.node.stopped(vm(1)).await.unwrap();
        assert_eq!(status.failure.unwrap().kind, VmFailureKind::App);
        bench.nothing_is_left();
    });
}

#[test]
fn agents_that_are_silent_or_talk_rubbish_fail_their_vm_and_no_other() {
    on_virtual_time(async {
        for plan in [
            FaultPlan {
                silent: 1000,
                ..FaultPlan::default()
            },
            FaultPlan {
                malformed: 1000,
                ..FaultPlan::default()
            },
        ] {
            let bench = Bench::new(6).await;
            bench.node.start(start(vm(1), "good")).unwrap();
            until_phase(&bench.node, vm(1), VmPhase::Ready).await;
            bench.host.set_plan(plan);
            bench.node.start(start(vm(2), "bad")).unwrap();
            let status = bench.node.stopped(vm(2)).await.unwrap();
            assert_eq!(status.phase, VmPhase::Failed, "{status:?}");
            assert_eq!(bench.node.status(vm(1)).unwrap().phase, VmPhase::Ready);
            bench.node.stop(vm(1), StopMode::Graceful).await.unwrap();
            bench.node.stopped(vm(1)).await.unwrap();
            bench.nothing_is_left();
        }
    });
}

#[test]
fn a_lost_session_comes_back_and_a_dead_vm_is_told() {
    on_virtual_time(async {
        let bench = Bench::new(7).await;
        let node = &bench.node;
        node.start(start(vm(1), "hello")).unwrap();
        until_phase(node, vm(1), VmPhase::Ready).await;
        bench.host.break_session(vm(1));
        tokio::time::sleep(Duration::from_secs(2)).await;
        let echo = node
            .exec(vm(1), exec(&["echo", "still", "here"]))
            .await
            .unwrap();
        let (_of, bytes) = echo.next_output().await.unwrap().unwrap();
        assert_eq!(bytes, b"still here");
        bench.host.crash_vm(vm(1));
        let status = node.stopped(vm(1)).await.unwrap();
        assert_eq!(status.failure.unwrap().kind, VmFailureKind::Died);
        bench.nothing_is_left();
    });
}

#[test]
fn the_end_of_a_vm_that_must_not_go_on_is_told_before_it_is_killed() {
    on_virtual_time(async {
        let mut bench = Bench::new(16).await;
        bench.node.start(start(vm(1), "hello")).unwrap();
        until_phase(&bench.node, vm(1), VmPhase::Ready).await;
        *bench.crash.at.lock().unwrap() = Some((VmEffect::Kill, KillPoint::Before));
        bench.host.spoil_vm(vm(1), "its proxy ended");
        bench.crash.happened.notified().await;
        assert!(bench.host.running().contains_key(&vm(1)));
        assert_eq!(bench.node.status(vm(1)).unwrap().phase, VmPhase::Draining);
        bench.restart().await;
        let failure = bench.node.stopped(vm(1)).await.unwrap().failure.unwrap();
        assert_eq!(failure.kind, VmFailureKind::Died);
        bench.nothing_is_left();
        bench.node.start(start(vm(2), "hello")).unwrap();
        until_phase(&bench.node, vm(2), VmPhase::Ready).await;
        bench.host.spoil_vm(vm(2), "its proxy ended");
        let told = Instant::now();
        until_phase(&bench.node, vm(2), VmPhase::Draining).await;
        tokio::time::sleep(FAREWELL_MAX / 2).await;
        assert!(bench.host.running().contains_key(&vm(2)), "nobody answered");
        bench.node.stop(vm(2), StopMode::Kill).await.unwrap();
        let failure = bench.node.stopped(vm(2)).await.unwrap().failure.unwrap();
        assert!(failure.message.contains("its proxy ended"), "{failure:?}");
        assert!(told.elapsed() < FAREWELL_MAX, "the answer ends the wait");
    });
}

#[test]
fn a_keep_awake_lease_is_told_and_runs_down() {
    on_virtual_time(async {
        let bench = Bench::new(8).await;
        let script = AppScript {
            keep_awake_ms: Some(60_000),
            ..AppScript::default()
        };
        bench.host.set_script("hello", script);
        bench.node.start(start(vm(1), "hello")).unwrap();
        let leased = until(&bench.node, vm(1), |status| status.awake_for_ms > 0).await;
        assert!(leased.awake_for_ms <= 60_000);
        tokio::time::sleep(Duration::from_secs(61)).await;
        assert_eq!(bench.node.status(vm(1)).unwrap().awake_for_ms, 0);
    });
}

fn texts(node: &Node) -> Vec<String> {
    let lines = node.log_tail("me", "hello", 100).unwrap();
    lines.into_iter().map(|line| line.text).collect()
}

#[test]
fn secrets_are_masked_and_a_new_daemon_keeps_no_line_before_it_knows_them() {
    on_virtual_time(async {
        let mut bench = Bench::new(9).await;
        let wanted = with_secret(start(vm(1), "hello"));
        bench.node.start(wanted.clone()).unwrap();
        until_phase(&bench.node, vm(1), VmPhase::Ready).await;
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(texts(&bench.node), ["KEY is ***", "listening"]);
        std::fs::remove_dir_all(bench.folder.path().join("log")).unwrap();

        let adoption = bench.restart().await;
        assert_eq!(adoption.adopted, [vm(1)]);
        until_phase(&bench.node, vm(1), VmPhase::Ready).await;
        tokio::time::sleep(Duration::from_secs(5)).await;
        assert_eq!(texts(&bench.node), Vec::<String>::new());
        bench.node.start(wanted).unwrap();
        tokio::time::sleep(Duration::from_secs(5)).await;
        assert_eq!(texts(&bench.node), ["KEY is ***", "listening"]);
        // Not a third time by the next daemon: it goes on behind the last line kept.
        bench.restart().await;
        bench
            .node
            .start(with_secret(start(vm(1), "hello")))
            .unwrap();
        tokio::time::sleep(Duration::from_secs(5)).await;
        assert_eq!(texts(&bench.node), ["KEY is ***", "listening"]);
        for entry in walk(bench.folder.path()) {
            let bytes = std::fs::read(&entry).unwrap();
            let text = String::from_utf8_lossy(&bytes).into_owned();
            assert!(!text.contains("canary"), "a secret in {}", entry.display());
        }
    });
}

#[test]
fn what_an_adopted_app_prints_is_kept_whenever_its_secrets_are_told() {
    on_virtual_time(async {
        for (wanted, told, printed) in [
            (start(vm(1), "hello"), false, vec!["listening"]),
            (start(vm(1), "hello"), true, vec!["listening"]),
            // Before the agent is heard again: that the app is ready comes behind it.
            (
                with_secret(start(vm(1), "hello")),
                true,
                vec!["KEY is ***", "listening"],
            ),
        ] {
            let mut bench = Bench::new(12).await;
            bench.node.start(wanted.clone()).unwrap();
            until_phase(&bench.node, vm(1), VmPhase::Ready).await;
            tokio::time::sleep(Duration::from_secs(1)).await;
            std::fs::remove_dir_all(bench.folder.path().join("log")).unwrap();

            assert_eq!(bench.restart().await.adopted, [vm(1)]);
            if told {
                bench.node.start(wanted).unwrap();
            }
            tokio::time::sleep(Duration::from_secs(5)).await;
            assert_eq!(bench.node.status(vm(1)).unwrap().phase, VmPhase::Ready);
            assert_eq!(texts(&bench.node), printed, "told {told}");
        }
    });
}

/// Where a daemon may die between the first step of a thaw and the app's first instruction.
const WHILE_SECRETS_ARE_GIVEN: [(VmEffect, KillPoint); 5] = [
    (VmEffect::Thaw, KillPoint::Before),
    (VmEffect::Thaw, KillPoint::After),
    (VmEffect::OpenNetwork, KillPoint::Before),
    (VmEffect::OpenNetwork, KillPoint::After),
    (VmEffect::StartApp, KillPoint::Before),
];

#[test]
fn an_adopted_vm_waits_for_its_secrets_before_its_app_starts() {
    on_virtual_time(async {
        let cases = WHILE_SECRETS_ARE_GIVEN.map(|point| [true, false].map(|told| (point, told)));
        for (point, told) in cases.into_iter().flatten() {
            let mut bench = Bench::new(10).await;
            *bench.crash.at.lock().unwrap() = Some(point);
            let wanted = with_secret(start(vm(1), "hello"));
            bench.node.start(wanted.clone()).unwrap();
            bench.crash.happened.notified().await;
            assert_eq!(bench.restart().await.adopted, [vm(1)]);
            tokio::time::sleep(Duration::from_secs(10)).await;
            assert_eq!(bench.host.app_starts(vm(1)), 0);
            if told {
                bench.node.start(wanted).unwrap();
                let status = until_phase(&bench.node, vm(1), VmPhase::Ready).await;
                assert_eq!(status.phase, VmPhase::Ready, "{point:?}: {status:?}");
                tokio::time::sleep(Duration::from_secs(2)).await;
                assert_eq!(texts(&bench.node), ["KEY is ***", "listening"], "{point:?}");
            } else {
                let status = bench.node.stopped(vm(1)).await.unwrap();
                assert_eq!(
                    status.failure.unwrap().kind,
                    VmFailureKind::Thaw,
                    "{point:?}"
                );
                bench.nothing_is_left();
            }
        }
    });
}

#[test]
fn an_actor_with_a_bug_has_its_vm_released_and_reported() {
    on_virtual_time(async {
        for effect in [VmEffect::Boot, VmEffect::Thaw, VmEffect::AwaitReady] {
            let bench = Bench::new(11).await;
            *bench.crash.panic_at.lock().unwrap() = Some(effect);
            bench.node.start(start(vm(1), "hello")).unwrap();
            let status = bench.node.stopped(vm(1)).await.unwrap();
            assert_eq!(status.phase, VmPhase::Failed);
            bench.nothing_is_left();
            // The node goes on.
            bench.node.start(start(vm(2), "hello")).unwrap();
            until_phase(&bench.node, vm(2), VmPhase::Ready).await;
        }
    });
}

#[test]
fn a_broken_journal_and_a_vm_that_cannot_be_removed_keep_no_other_from_being_adopted() {
    on_virtual_time(async {
        let mut bench = Bench::new(14).await;
        for number in 1..=3 {
            bench.node.start(start(vm(number), "hello")).unwrap();
            until_phase(&bench.node, vm(number), VmPhase::Ready).await;
        }
        let folder = bench.folder.path().join("run/vms");
        // One says nothing, one is not there at all; neither can be removed for now.
        std::fs::write(folder.join(vm(1).to_string()).join("journal.json"), b"{").unwrap();
        std::fs::remove_dir_all(folder.join(vm(2).to_string())).unwrap();
        bench.host.set_plan(FaultPlan {
            release: 1000,
            ..FaultPlan::default()
        });
        let adoption = bench.restart().await;
        assert_eq!(adoption.adopted, [vm(3)]);
        let quarantined: Vec<_> = adoption.quarantined.iter().map(|(vm, _)| *vm).collect();
        assert_eq!(quarantined, [vm(1), vm(2)]);
        assert!(adoption.quarantined[0].1.contains("not a journal record"));
        let status = until_phase(&bench.node, vm(3), VmPhase::Ready).await;
        assert_eq!(status.phase, VmPhase::Ready);
        bench.host.set_plan(FaultPlan::default());
        bench.node.stop(vm(3), StopMode::Graceful).await.unwrap();
        bench.node.stopped(vm(3)).await.unwrap();
        tokio::time::sleep(Duration::from_secs(60)).await;
        bench.nothing_is_left();
    });
}

#[test]
fn waiting_for_a_turn_to_boot_is_told_apart_from_the_boot() {
    on_virtual_time(async {
        let bench = Bench::new(15).await;
        // One more than may boot at once.
        for number in 1..=5 {
            bench.node.start(start(vm(number), "hello")).unwrap();
        }
        let phases = |status: &VmStatus| -> Vec<(String, u64)> {
            let phases = status.phases.iter();
            phases.map(|phase| (phase.name.clone(), phase.us)).collect()
        };
        let mut queued = 0;
        for number in 1..=5 {
            let status = until_phase(&bench.node, vm(number), VmPhase::Ready).await;
            let phases = phases(&status);
            let (waited, rest) = match phases.split_first() {
                Some(((first, us), rest)) if first == "queue" => (*us, rest.to_vec()),
                _ => (0, phases.clone()),
            };
            queued += usize::from(waited > 0);
            let names: Vec<&str> = rest.iter().map(|(name, _us)| name.as_str()).collect();
            assert_eq!(names, ["prepare", "boot", "agent", "thaw", "app"]);
        }
        assert_eq!(queued, 1, "the fifth waited for its turn");
    });
}

#[test]
fn daemon_killed_at_every_effect_readopts_the_same_vm() {
    on_virtual_time(async {
        let mut adopted = 0;
        for (start, effect) in lives() {
            for point in [KillPoint::Before, KillPoint::After] {
                let mut bench = Bench::new(12).await;
                *bench.crash.at.lock().unwrap() = Some((effect, point));
                bench.node.start(start(vm(1), "hello")).unwrap();
                drive_into(&bench, effect).await;
                let journal = bench.journal().get(&vm(1)).copied();
                let before = bench.host.running().get(&vm(1)).cloned();
                let expected = before.is_some()
                    && journal.is_some_and(|milestone| bench.must_adopt(vm(1), milestone));
                let adoption = bench.restart().await;
                let what = format!("{} {point:?}, journaled {journal:?}", effect.name());
                assert_eq!(!adoption.adopted.is_empty(), expected, "{what}");
                if expected && journal != Some(Milestone::Draining) {
                    let status = until_phase(&bench.node, vm(1), VmPhase::Ready).await;
                    assert_eq!(status.phase, VmPhase::Ready, "{what}");
                    assert_eq!(status.boot_id, before, "{what}");
                    assert_eq!(bench.host.app_starts(vm(1)), 1, "{what}");
                    adopted += 1;
                    bench.node.stop(vm(1), StopMode::Graceful).await.unwrap();
                }
                if bench.node.status(vm(1)).is_some() {
                    bench.node.stopped(vm(1)).await.unwrap();
                }
                bench.nothing_is_left();
            }
        }
        assert!(adopted >= 18 + 22 + 16, "only {adopted} kill points adopt");
    });
}

#[test]
fn child_killed_at_every_effect_is_over_and_leaves_nothing() {
    on_virtual_time(async {
        let mut killed = 0;
        for (start, effect) in lives() {
            for point in [KillPoint::Before, KillPoint::After] {
                let bench = Bench::new(13).await;
                *bench.crash.strikes.lock().unwrap() = Some((effect, point, bench.host.clone()));
                bench.node.start(start(vm(1), "hello")).unwrap();
                drive_into(&bench, effect).await;
                let what = format!("{} {point:?}", effect.name());
                if bench.crash.struck.load(Ordering::Relaxed) {
                    killed += 1;
                } else if bench.node.status(vm(1)).is_some() {
                    // It had none yet, or none any more.
                    bench.node.stop(vm(1), StopMode::Graceful).await.unwrap();
                }
                if bench.node.status(vm(1)).is_some() {
                    let over =
                        tokio::time::timeout(Duration::from_secs(600), bench.node.stopped(vm(1)));
                    let over = over.await.unwrap_or_else(|_| panic!("{what} goes on"));
                    assert!(over.unwrap().phase.is_over(), "{what}");
                }
                let snapshots = bench.node.snapshots().list("me").await.unwrap();
                let broken = snapshots.iter().find(|info| info.damage.is_some());
                assert!(broken.is_none(), "{what}: {broken:?}");
                bench.nothing_is_left();
            }
        }
        assert!(killed >= 40, "only {killed} kills met a VM");
    });
}

/// Every effect of a VM that boots and of one that is forked.
fn lives() -> impl Iterator<Item = (fn(VmId, &str) -> StartVm, VmEffect)> {
    let all = VmEffect::ALL.into_iter();
    let boots = all.clone().filter(|effect| !effect.is_of_forks());
    let forks = all.filter(|effect| {
        !matches!(
            effect,
            VmEffect::Boot | VmEffect::Journal(Milestone::Booted)
        )
    });
    let boots = boots.map(|effect| (start as fn(VmId, &str) -> StartVm, effect));
    boots.chain(forks.map(|effect| (fork as fn(VmId, &str) -> StartVm, effect)))
}

/// Lives until the daemon is frozen at `effect`, which is met on the way up, in a stop, after a
/// crash of the VM or when it must not go on.
async fn drive_into(bench: &Bench, effect: VmEffect) {
    let frozen = bench.crash.happened.notified();
    tokio::pin!(frozen);
    tokio::select! {
        () = &mut frozen => return,
        _ready = until_phase(&bench.node, vm(1), VmPhase::Ready) => {}
    }
    if effect == VmEffect::Journal(Milestone::EndingFailed) {
        bench.host.crash_vm(vm(1));
    } else if effect.is_of_captures() {
        let id = SnapshotId::from_bytes([1; 16]);
        let taking = match effect.is_of_suspends() {
            true => suspended_as(id),
            false => taken_as(id, SnapshotKind::Checkpoint),
        };
        let node = bench.node.clone();
        drop(tokio::spawn(async move { node.take(vm(1), taking).await }));
    } else if effect == VmEffect::Farewell {
        bench.host.spoil_vm(vm(1), "its proxy ended");
    } else {
        bench.node.stop(vm(1), StopMode::Graceful).await.unwrap();
    }
    tokio::select! {
        () = &mut frozen => {}
        () = tokio::time::sleep(Duration::from_secs(600)) => {
            panic!("{} is never reached", effect.name());
        }
    }
}
