//! VMMs that are made ahead.

use std::collections::BTreeSet;
use std::fs;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use spore_node::hypervisor::fork::Afterwards;
use tokio::time::timeout;

use crate::driver::is_kvm;
use crate::fork::{boot, capture, fork, fork_into};
use crate::host::{HANG, TestHost, new_id};

/// How many are made.
const WAITING: usize = 2;

/// Those of the host's processes that have this name.
pub(crate) fn named(host: &TestHost, name: &str) -> BTreeSet<u32> {
    let of = |pid: &u32| fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    let all = host.processes().into_iter();
    all.filter(|pid| of(pid).trim() == name).collect()
}

/// Waits until as many wait as are to; their pids.
async fn waiting(host: &TestHost) -> BTreeSet<u32> {
    let full = async {
        loop {
            let waiting = named(host, "spore-parked");
            if waiting.len() == WAITING {
                // Its name is the first of it: the rest takes some milliseconds.
                tokio::time::sleep(Duration::from_millis(500)).await;
                return waiting;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(HANG, full).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fork_takes_a_vmm_that_waits_and_none_outlives_its_driver() {
    if !is_kvm() {
        return println!("SKIPPED: qemu makes no VMMs ahead");
    }
    let Some((mut host, machine)) = TestHost::with_agent() else {
        return;
    };
    host.parked = WAITING;
    let driver = host.driver().await;
    let mut source = boot(&driver, &machine).await;
    let before = waiting(&host).await;
    let taken = capture(&mut source, Afterwards::GoesOn, None).await;
    let one = fork(&driver, &machine, &taken.source, source.vm).await;
    let running = named(&host, "spore-vmm");
    let used: Vec<_> = running.intersection(&before).copied().collect();
    let [used] = used[..] else {
        panic!("{running:?} run, and {before:?} waited");
    };

    // Those that end while they wait are nobody's guest's.
    let after = waiting(&host).await;
    assert!(!after.contains(&used), "{after:?}");
    for pid in &after {
        let pid = Pid::from_raw(i32::try_from(*pid).unwrap()).unwrap();
        kill_process(pid, Signal::KILL).unwrap();
    }
    let gone = async {
        while !named(&host, "spore-parked").is_empty() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(HANG, gone).await.unwrap();
    let two = fork(&driver, &machine, &taken.source, source.vm).await;
    let again = waiting(&host).await;
    assert!(again.is_disjoint(&after), "{again:?}");

    for vm in [source.vm, one.vm, two.vm] {
        driver.release(vm).await.unwrap();
    }
    driver.close().unwrap();
    assert_eq!(host.left(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vmm_that_ends_as_it_is_taken_has_another_in_its_place() {
    if !is_kvm() {
        return println!("SKIPPED: qemu makes no VMMs ahead");
    }
    let Some((mut host, machine)) = TestHost::with_agent() else {
        return;
    };
    host.parked = WAITING;
    let driver = host.driver().await;
    let mut source = boot(&driver, &machine).await;
    waiting(&host).await;
    let taken = capture(&mut source, Afterwards::GoesOn, None).await;
    let mut vms = vec![source.vm];
    for is_gone in [true, false, false] {
        let waiting = waiting(&host).await;
        let vm = new_id();
        let prepared = driver.prepare(vm, &machine).await.unwrap();
        for pid in &waiting {
            let pid = Pid::from_raw(i32::try_from(*pid).unwrap()).unwrap();
            kill_process(pid, Signal::KILL).unwrap();
        }
        while is_gone && host.processes().iter().any(|pid| waiting.contains(pid)) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let room = (vm, prepared);
        let mut fork = fork_into(&driver, &machine, room, &taken.source, source.vm).await;
        fork.agent.thaw(vm, "fork").await.unwrap();
        assert!(named(&host, "spore-vmm").is_disjoint(&waiting));
        vms.push(vm);
    }
    for vm in vms {
        driver.release(vm).await.unwrap();
    }
    driver.close().unwrap();
    assert_eq!(host.left(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn vmms_that_are_nobodys_are_ended_before_their_uids_are_given_away() {
    if !is_kvm() {
        return println!("SKIPPED: qemu makes no VMMs ahead");
    }
    let Some((mut host, machine)) = TestHost::with_agent() else {
        return;
    };
    host.parked = WAITING;
    let driver = host.driver().await;
    let source = boot(&driver, &machine).await;
    for pid in waiting(&host).await {
        // It cannot see that whoever had it made is gone.
        let pid = Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
        kill_process(pid, Signal::STOP).unwrap();
    }
    let vm = source.vm;
    drop((source, driver));
    let driver = host.driver().await;
    let swept = driver.sweep(&BTreeSet::from([vm])).await.unwrap();
    let ended = swept.removed.iter().filter(|what| what.starts_with("VMM "));
    // Each has a first process of its pid namespace beside it.
    assert_eq!(ended.count(), 2 * WAITING, "{:?}", swept.removed);
    assert!(named(&host, "spore-parked").is_empty());
    assert_eq!(named(&host, "spore-vmm").len(), 1, "the VM goes on");
    driver.release(vm).await.unwrap();
    driver.close().unwrap();
    assert_eq!(host.left(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn vmms_that_wait_end_with_whoever_had_them_made() {
    if !is_kvm() {
        return println!("SKIPPED: qemu makes no VMMs ahead");
    }
    let Some((mut host, machine)) = TestHost::with_agent() else {
        return;
    };
    host.parked = WAITING;
    let driver = host.driver().await;
    let source = boot(&driver, &machine).await;
    waiting(&host).await;
    driver.release(source.vm).await.unwrap();
    // Not told to close, as a daemon that is killed is not.
    drop((source, driver));
    let gone = async {
        while !host.processes().is_empty() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(HANG, gone).await.unwrap();
    let driver = host.driver().await;
    driver.sweep(&BTreeSet::new()).await.unwrap();
    driver.close().unwrap();
    assert_eq!(host.left(), Vec::<String>::new());
}
