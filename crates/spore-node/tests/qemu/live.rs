//! Checkpoints of VMs that go on, with memory that is read from a frozen copy of their VMMs.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;

use rustix::process::{Pid, Signal, kill_process};
use spore_node::hypervisor::Machine;
use spore_node::hypervisor::fork::{Afterwards, Capture, CaptureError, MemoryCopy};
use spore_node::hypervisor::memory_image::CapturedMemory;
use spore_wire::cause::chain;
use spore_wire::id::VmId;
use tokio::time::{Instant, timeout};

use crate::driver::{Driver, is_kvm};
use crate::fork::{Running, boot, capture, fork};
use crate::host::{HANG, TestHost};

/// Pauses, captures and lets run, once the disk of the last one is copied.
async fn copied(of: &mut Running) -> Capture {
    let begun = Instant::now();
    let turn = loop {
        match of.held.prepare_capture(None, None).await {
            Err(CaptureError::Busy) if begun.elapsed() < HANG => {
                tokio::time::sleep(std::time::Duration::from_millis(10)).await;
            }
            prepared => break prepared.unwrap(),
        }
    };
    of.held.pause().await.unwrap();
    let capture = of.held.capture(Afterwards::GoesOn).await.unwrap();
    of.held.resume().await.unwrap();
    drop(turn);
    capture
}

/// The processes in a VM's cgroup.
fn processes(driver: &Driver, vm: VmId) -> BTreeSet<i32> {
    let cgroups = driver.rooms().cgroups();
    let members = cgroups.members(&vm.to_string()).unwrap().into_iter();
    members
        .map(|(pid, _pidfd)| pid.as_raw_nonzero().get())
        .collect()
}

/// Fills pages of a guest's memory with a word, and says it.
fn write(what: &str) -> String {
    format!("yes {what} | head -c 8000000 > /run/much; echo {what}")
}

/// A fork with so many pages of its own that they are not read in the pause.
async fn much(driver: &Driver, machine: &Machine) -> Running {
    let mut template = boot(driver, machine).await;
    let from = capture(&mut template, Afterwards::Ends, None).await.source;
    driver.release(template.vm).await.unwrap();
    let mut source = fork(driver, machine, &from, template.vm).await;
    assert_eq!(source.agent.sh(&write("old")).await, "old");
    source
}

/// Whether what was captured has a page full of these bytes.
fn has(memory: &CapturedMemory, what: &[u8]) -> bool {
    let is_full = |page: &[u8]| page.starts_with(what) && page.ends_with(what);
    match memory {
        CapturedMemory::Changed { pages, .. } => {
            pages.iter().any(|(_, run)| run.chunks(4096).any(is_full))
        }
        CapturedMemory::Whole(_) | CapturedMemory::Standing(_) => false,
    }
}

/// What a file of a VM's cgroup says.
fn cgroup_files(driver: &Driver, vm: VmId, name: &str) -> Vec<PathBuf> {
    let entrances = driver.rooms().cgroups().entrances(&vm.to_string());
    let files = entrances.iter().map(|path| path.with_file_name(name));
    files.filter(|path| path.exists()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn frozen_memory_is_what_it_was_and_its_copy_ends_with_whoever_wants_it() {
    if !is_kvm() {
        return println!("SKIPPED: QEMU makes no copy of itself");
    }
    let Some((host, machine)) = TestHost::with_agent() else {
        return;
    };
    let driver = host.driver().await;
    let mut source = much(&driver, &machine).await;
    let processes = |vm| processes(&driver, vm).len();
    let alone = processes(source.vm);

    // What is written later is in the source alone, and the copy is gone once it is read.
    let capture = copied(&mut source).await;
    let reading = capture.memory;
    let is_frozen = matches!(reading, MemoryCopy::Reading(_));
    assert!(is_frozen, "its memory was read in the pause");
    assert_eq!(source.agent.sh(&write("new")).await, "new");
    let memory = timeout(HANG, reading.finished()).await.unwrap().unwrap();
    assert!(has(&memory, b"old\nold\n") && !has(&memory, b"new\nnew\n"));
    assert_eq!(processes(source.vm), alone);

    // Nobody wants it: it ends, and the next one is made.
    drop(copied(&mut source).await);
    let begun = Instant::now();
    while processes(source.vm) > alone {
        assert!(begun.elapsed() < HANG, "the copy is left");
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    assert_eq!(source.agent.sh("head -n 1 /run/much").await, "new");

    // The VM is stopped meanwhile: nothing is left, and what was read is whole or refused.
    let capture = copied(&mut source).await;
    source.held.kill();
    timeout(HANG, source.held.exited()).await.unwrap();
    driver.release(source.vm).await.unwrap();
    match timeout(HANG, capture.memory.finished()).await.unwrap() {
        Ok(_) => println!("it was read before"),
        Err(error) => println!("{}", chain(&error)),
    }
    assert_eq!(host.left(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn where_no_copy_can_be_had_memory_is_read_in_the_pause() {
    if !is_kvm() {
        return println!("SKIPPED: QEMU makes no copy of itself");
    }
    let Some((host, machine)) = TestHost::with_agent() else {
        return;
    };
    let driver = host.driver().await;
    let mut source = much(&driver, &machine).await;
    let vm = source.vm;
    let read = |name: &str| {
        let files = cgroup_files(&driver, vm, name);
        files
            .iter()
            .map(|path| fs::read_to_string(path).unwrap())
            .collect::<Vec<_>>()
    };
    let [now, most, memory] = ["pids.current", "pids.max", "memory.max"].map(read);
    let limit_to = |limits: &[String]| {
        let files = cgroup_files(&driver, vm, "pids.max");
        assert!(
            !files.is_empty() && files.len() == limits.len(),
            "{limits:?}"
        );
        for (path, limit) in files.iter().zip(limits) {
            fs::write(path, limit).unwrap();
        }
    };

    // The kernel refuses the VMM another process.
    limit_to(&now);
    let refused = copied(&mut source).await.memory;
    let is_read = matches!(refused, MemoryCopy::Done(_));
    assert!(is_read, "a copy was made against the cgroup's limit");
    let pages = timeout(HANG, refused.finished()).await.unwrap().unwrap();
    assert!(has(&pages, b"old\nold\n"));
    assert_eq!(read("memory.max"), memory, "what was lent is given back");
    assert_eq!(source.agent.sh(&write("new")).await, "new");

    // It is asked for the next one all the same, and that one dies before it is read, or behind.
    limit_to(&most);
    let before = processes(&driver, vm);
    let frozen = copied(&mut source).await.memory;
    let is_frozen = matches!(frozen, MemoryCopy::Reading(_));
    assert!(is_frozen, "its memory was read in the pause");
    for pid in processes(&driver, vm).difference(&before) {
        // It may be read and gone by now.
        let _gone = kill_process(Pid::from_raw(*pid).unwrap(), Signal::KILL);
    }
    match timeout(HANG, frozen.finished()).await.unwrap() {
        Ok(pages) => assert!(has(&pages, b"new\nnew\n"), "read, and not whole"),
        Err(error) => println!("{}", chain(&error)),
    }
    assert_eq!(source.agent.sh("head -n 1 /run/much").await, "new");
    assert_eq!(processes(&driver, vm), before);
    assert_eq!(read("memory.max"), memory);
    driver.release(vm).await.unwrap();
    assert_eq!(host.left(), Vec::<String>::new());
}
