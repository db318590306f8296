//! Starts, ends and what they leave.

use std::time::Duration;

use spore_node::hypervisor::{BootError, PrepareError};
use tokio::time::{Instant, timeout};

use crate::fork::boot;
use crate::guest::{Then, WORD};
use crate::host::{HANG, TestHost, new_id, said};

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_runs_until_it_is_killed_and_leaves_nothing() {
    let Some(host) = TestHost::new(Then::Wait) else {
        return;
    };
    let driver = host.driver().await;
    let (vm, machine) = (new_id(), host.machine());
    let started = Instant::now();
    let prepared = driver.prepare(vm, &machine).await.unwrap();
    println!("prepare took {:?}", started.elapsed());
    let started = Instant::now();
    let identity = driver.boot(vm, &machine, &prepared).await.unwrap();
    println!(
        "boot until the monitor answered and the root was empty took {:?}",
        started.elapsed()
    );
    let held = driver.attach(vm, &prepared, &identity).await.unwrap();
    said(&*held, WORD).await;
    println!("spawn to init took {:?}", started.elapsed());
    let stats = held.stats().await.unwrap();
    assert!(stats.cpu_us > 0 && stats.pids > 1, "{stats:?}");
    assert!(stats.memory_bytes > 16 << 20, "{stats:?}");
    held.kill();
    held.kill();
    let exit = timeout(HANG, held.exited()).await.unwrap();
    assert!(
        exit.reason.contains("signal 9") && exit.reason.contains(WORD),
        "{exit:?}"
    );
    assert!(!exit.out_of_memory);
    let again = timeout(HANG, held.exited()).await.unwrap();
    assert_eq!(again, exit);
    driver.release(vm).await.unwrap();
    driver.release(vm).await.unwrap();
    assert_eq!(host.left(), Vec::<String>::new());
    assert!(!host.namespaces().contains(&prepared.namespace));
    driver.close().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_powers_off_or_panics_ends_its_vm_and_its_last_words_are_kept() {
    for (then, words) in [(Then::PowerOff, WORD), (Then::End, "Kernel panic")] {
        let Some(host) = TestHost::new(then) else {
            return;
        };
        let driver = host.driver().await;
        let (vm, machine) = (new_id(), host.machine());
        let prepared = driver.prepare(vm, &machine).await.unwrap();
        let identity = driver.boot(vm, &machine, &prepared).await.unwrap();
        let held = driver.attach(vm, &prepared, &identity).await.unwrap();
        let Ok(exit) = timeout(HANG, held.exited()).await else {
            panic!(
                "{then:?}: it goes on, and said {:#?}",
                held.console_tail().await
            );
        };
        assert!(exit.reason.contains("code 0"), "{then:?}: {exit:?}");
        assert!(exit.reason.contains(words), "{then:?}: {exit:?}");
        driver.release(vm).await.unwrap();
        assert_eq!(host.left(), Vec::<String>::new());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_only_prepared_is_released_and_a_boot_without_image_says_which() {
    let Some(host) = TestHost::new(Then::Wait) else {
        return;
    };
    let driver = host.driver().await;
    let vm = new_id();
    let mut machine = host.machine();
    machine.image.push("missing");
    let prepared = driver.prepare(vm, &machine).await.unwrap();
    let refused = driver.boot(vm, &machine, &prepared).await.unwrap_err();
    assert!(matches!(refused, BootError::Image { .. }), "{refused:?}");
    driver.release(vm).await.unwrap();
    assert_eq!(host.left(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_scratch_disk_that_does_not_fit_is_refused_and_leaves_nothing() {
    let Some(host) = TestHost::new(Then::Wait) else {
        return;
    };
    let driver = host.driver().await;
    let vm = new_id();
    let mut machine = host.machine();
    machine.resources.disk_mib = u32::MAX;
    let refused = driver.prepare(vm, &machine).await.unwrap_err();
    assert!(
        matches!(refused, PrepareError::DiskFull { .. }),
        "{refused:?}"
    );
    driver.release(vm).await.unwrap();
    assert_eq!(host.left(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn two_vms_never_share_a_uid_or_a_namespace() {
    let Some(host) = TestHost::new(Then::Wait) else {
        return;
    };
    let driver = host.driver().await;
    let machine = host.machine();
    let mut uids = std::collections::BTreeSet::new();
    let mut namespaces = std::collections::BTreeSet::new();
    let vms = [new_id(), new_id(), new_id(), new_id()];
    for vm in vms {
        let prepared = driver.prepare(vm, &machine).await.unwrap();
        assert!(uids.insert(prepared.uid), "{}", prepared.uid);
        assert!(namespaces.insert(prepared.namespace));
    }
    for vm in vms {
        driver.release(vm).await.unwrap();
    }
    assert_eq!(host.left(), Vec::<String>::new());
    let later = driver.prepare(vms[0], &machine).await.unwrap();
    assert!(!namespaces.contains(&later.namespace));
    driver.release(vms[0]).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_release_while_the_vm_boots_leaves_nothing() {
    let Some(host) = TestHost::new(Then::Wait) else {
        return;
    };
    let driver = host.driver().await;
    let (vm, machine) = (new_id(), host.machine());
    let prepared = driver.prepare(vm, &machine).await.unwrap();
    // The caller gives up at once; the boot goes on behind its lock, and the release waits for it.
    let boot = driver.boot(vm, &machine, &prepared);
    assert!(timeout(Duration::from_millis(5), boot).await.is_err());
    driver.release(vm).await.unwrap();
    assert_eq!(host.left(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn guests_kernels_are_told_what_their_host_adds_and_templates_of_others_do_not_fit() {
    let Some((mut host, machine)) = TestHost::with_agent() else {
        return;
    };
    let before = host.driver().await.caps().guest.clone();
    host.config.kernel_arguments = "nohz=off spore.test=a,b".parse().unwrap();
    let driver = host.driver().await;
    assert_ne!(driver.caps().guest, before);
    let mut one = boot(&driver, &machine).await;
    let told = one.agent.sh("cat /proc/cmdline").await;
    assert!(
        told.trim_end().ends_with(" nohz=off spore.test=a,b"),
        "{told}"
    );
    driver.release(one.vm).await.unwrap();
    assert_eq!(host.left(), Vec::<String>::new());
}
