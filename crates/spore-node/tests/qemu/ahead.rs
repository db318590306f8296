//! What forks of one memory write to before their programs run: learnt from the first of them, and
//! there before the others run.

use core::time::Duration;
use std::sync::Arc;

use spore_node::hypervisor::KernelArguments;
use spore_node::hypervisor::fork::{Afterwards, ForkFrom, ForkMemory};
use spore_node::hypervisor::memory_image::MemoryImage;
use spore_wire::id::VmId;
use tokio::time::Instant;

use crate::driver::{Driver, is_kvm};
use crate::fork::{boot, capture, fork, fork_only};
use crate::host::{TestHost, new_id};

/// What a VM's VMM has of its guest's memory for itself, in KiB.
fn own_kib(driver: &Driver, vm: VmId) -> u64 {
    let members = driver.rooms().cgroups().members(&vm.to_string());
    members
        .unwrap()
        .into_iter()
        .filter_map(|(pid, _pidfd)| {
            let path = format!("/proc/{}/smaps", pid.as_raw_nonzero());
            std::fs::read_to_string(path).ok()
        })
        .map(|smaps| {
            let memory = smaps
                .lines()
                .skip_while(|line| !line.contains("guest-memory"));
            let own = memory.filter(|line| line.starts_with("Anonymous:")).take(1);
            let kib = own.filter_map(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok());
            kib.sum::<u64>()
        })
        .sum()
}

/// The same memory, which knows nothing of its forks.
fn unknowing(from: &ForkFrom) -> ForkFrom {
    let fd = from.memory.fd().try_clone_to_owned().unwrap();
    let image = MemoryImage::from_sealed_memfd(fd, from.memory.bytes()).unwrap();
    ForkFrom {
        memory: ForkMemory::Shared(Arc::new(image)),
        ..from.clone()
    }
}

fn ahead(from: &ForkFrom) -> Option<u64> {
    let ForkMemory::Shared(image) = &from.memory else {
        return None;
    };
    let runs = image.ahead()?;
    Some(runs.iter().map(|run| run.pages).sum())
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_that_every_fork_writes_to_are_its_own_before_it_runs() {
    if !is_kvm() {
        return println!("SKIPPED: QEMU copies each page when it is written to");
    }
    let Some((host, machine)) = TestHost::with_agent() else {
        return;
    };
    let driver = host.driver().await;
    let mut template = boot(&driver, &machine).await;
    let from = capture(&mut template, Afterwards::Ends, None).await.source;
    driver.release(template.vm).await.unwrap();

    let first = fork(&driver, &machine, &from, template.vm).await;
    assert_eq!(ahead(&from), None, "it is known when the fork is renewed");
    first.held.open_network().await.unwrap();
    let pages = ahead(&from).unwrap();
    let known = pages * 4;
    assert!(known > 256 && known < 32 * 1024, "{known} KiB");
    assert!(own_kib(&driver, first.vm) >= known);

    // The next has them before it runs, and one of a memory that knows nothing has not.
    for (from, least, most) in [(&from, known, u64::MAX), (&unknowing(&from), 0, 64)] {
        let vm = new_id();
        let prepared = driver.prepare(vm, &machine).await.unwrap();
        let identity = driver.fork(vm, &machine, &prepared, from).await.unwrap();
        let _held = driver.attach(vm, &prepared, &identity).await.unwrap();
        let own = own_kib(&driver, vm);
        assert!((least..=most).contains(&own), "{own} KiB of {known}");
        driver.release(vm).await.unwrap();
    }

    let mut second = fork(&driver, &machine, &from, template.vm).await;
    assert_eq!(second.agent.sh("echo here").await, "here");
    second.held.open_network().await.unwrap();
    assert_eq!(ahead(&from), Some(pages), "the first one taught it");
    for vm in [first.vm, second.vm] {
        driver.release(vm).await.unwrap();
    }
    assert_eq!(host.left(), Vec::<String>::new());
}

/// How long forks take until their agent has renewed them, turn by turn with those pages and
/// without.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "a measurement: minutes, and a calm machine"]
async fn measure_forks_with_pages_ahead_and_without() {
    let Some((host, machine)) = TestHost::with_agent() else {
        return;
    };
    let driver = host.driver().await;
    let mut template = boot(&driver, &machine).await;
    let from = capture(&mut template, Afterwards::Ends, None).await.source;
    driver.release(template.vm).await.unwrap();
    let first = fork(&driver, &machine, &from, template.vm).await;
    first.held.open_network().await.unwrap();
    driver.release(first.vm).await.unwrap();
    println!("{:?} pages", ahead(&from));
    let mut took: [Vec<[Duration; 2]>; 2] = Default::default();
    for _round in 0..20 {
        for (from, took) in [from.clone(), unknowing(&from)].into_iter().zip(&mut took) {
            let begun = Instant::now();
            let mut one = fork_only(&driver, &machine, &from, template.vm).await;
            let answered = begun.elapsed();
            one.agent.thaw(one.vm, "fork").await.unwrap();
            took.push([answered, begun.elapsed()]);
            println!("own {} KiB", own_kib(&driver, one.vm));
            driver.release(one.vm).await.unwrap();
        }
    }
    for (name, took) in ["with", "without"].into_iter().zip(&mut took) {
        for (at, what) in ["answered", "thawed"].into_iter().enumerate() {
            took.sort_by_key(|times| times[at]);
            let [least, median] = [0, took.len() / 2].map(|place| took[place][at]);
            println!("{name}: {what} in {median:?}, {least:?} at least");
        }
    }
}

/// What forks have of their own that were thawed, have answered and then did nothing: all of it,
/// and of that the guest's memory. They stand beside each other, as sandboxes do.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "a measurement: a minute, and a VMM as it is shipped"]
async fn measure_forks_that_are_thawed_and_idle() {
    let Some((mut host, machine)) = TestHost::with_agent() else {
        return;
    };
    host.config.kernel_arguments = KernelArguments::default();
    let driver = host.driver().await;
    let mut template = boot(&driver, &machine).await;
    let from = capture(&mut template, Afterwards::Ends, None).await.source;
    driver.release(template.vm).await.unwrap();
    let mut forks = Vec::new();
    for _ in 0..6 {
        let one = fork(&driver, &machine, &from, template.vm).await;
        one.held.open_network().await.unwrap();
        forks.push(one);
    }
    for has_run in ["nothing", "a shell"] {
        if has_run != "nothing" {
            for one in &mut forks {
                assert_eq!(one.agent.sh("echo here").await, "here");
            }
        }
        tokio::time::sleep(Duration::from_secs(10)).await;
        for one in &forks {
            let private = private_kib(&driver, one.vm);
            let own = own_kib(&driver, one.vm);
            println!("has run {has_run}: {private} KiB private, {own} of it the guest's");
        }
    }
    for one in forks {
        driver.release(one.vm).await.unwrap();
    }
}

/// All that a VM's VMM has for itself, in KiB.
fn private_kib(driver: &Driver, vm: VmId) -> u64 {
    let members = driver.rooms().cgroups().members(&vm.to_string());
    let smaps = members.unwrap().into_iter().filter_map(|(pid, _pidfd)| {
        let path = format!("/proc/{}/smaps_rollup", pid.as_raw_nonzero());
        std::fs::read_to_string(path).ok()
    });
    let private = |smaps: String| {
        let lines = smaps.lines().filter(|line| line.starts_with("Private_"));
        let kib = lines.filter_map(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok());
        kib.sum::<u64>()
    };
    smaps.map(private).sum()
}
