//! What the host takes away from under a VM that runs: the files of its disks are shortened, its
//! tap is removed. The guest hears of an error and goes on, or ends; its VMM lives and obeys, and a
//! VM beside notices nothing.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use spore_node::hypervisor::{Machine, Prepared, Vm};
use spore_wire::id::VmId;

use crate::agent::Agent;
use crate::driver::{Driver, is_kvm};
use crate::folder::image;
use crate::host::{TestHost, new_id};

/// What the app's folder holds, and what is left of a file.
const FOLDER_BYTES: usize = 3 << 20;
const LEFT_BYTES: u64 = 64 << 10;

/// How long a VM that has nothing to do is looked at.
const LOOK: Duration = Duration::from_secs(3);

struct Running {
    vm: VmId,
    prepared: Prepared,
    held: Arc<dyn Vm>,
    agent: Agent,
    pid: u32,
}

async fn boot(driver: &Driver, machine: &Machine, folder: Option<&str>) -> Running {
    let vm = new_id();
    let prepared = driver.prepare(vm, machine).await.unwrap();
    let identity = driver.boot(vm, machine, &prepared).await.unwrap();
    let held = driver.attach(vm, &prepared, &identity).await.unwrap();
    let (mut agent, _hello) = Agent::greet(&*held).await;
    let thawed = agent.thaw_with(vm, "taken", folder).await;
    thawed.unwrap();
    Running {
        vm,
        prepared,
        held,
        agent,
        pid: identity.pid,
    }
}

impl Running {
    /// The processor's time that it takes while it has nothing to do.
    async fn takes(&self) -> Duration {
        let before = self.held.stats().await.unwrap().cpu_us;
        tokio::time::sleep(LOOK).await;
        let after = self.held.stats().await.unwrap().cpu_us;
        Duration::from_micros(after - before)
    }

    /// Has its VMM do what a node asks.
    async fn obeys(&self) {
        for _ in 0..2 {
            self.held.pause().await.unwrap();
            self.held.resume().await.unwrap();
        }
    }
}

/// Removes the tap from a VM's namespace.
fn remove_tap(host: &TestHost, prepared: &Prepared) {
    let namespace = host.runtime("netns").join(&prepared.namespace);
    let status = Command::new("nsenter")
        .arg(format!("--net={}", namespace.display()))
        .args(["ip", "link", "delete", "tap0"])
        .status();
    assert!(status.unwrap().success());
}

fn shorten(path: &Path) {
    let file = File::options().write(true).open(path).unwrap();
    assert!(file.metadata().unwrap().len() > LEFT_BYTES);
    file.set_len(LEFT_BYTES).unwrap();
}

/// The files that a VMM has of scratch disks, as paths through it.
fn scratch_files(host: &TestHost, pid: u32) -> Vec<PathBuf> {
    let folder = host.runtime("../data").canonicalize().unwrap();
    let open = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let open = open.map(|entry| entry.unwrap().path());
    let is_scratch = |path: &PathBuf| {
        let to = std::fs::read_link(path);
        to.is_ok_and(|to| to.starts_with(&folder))
    };
    open.filter(is_scratch).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_taken_from_a_vm_that_runs_harms_its_guest_at_most() {
    let Some((host, mut machine)) = TestHost::with_agent() else {
        return;
    };
    let driver = host.driver().await;
    let mut beside = boot(&driver, &machine, None).await;
    let folder = image(&host, "app", FOLDER_BYTES);
    machine.folder = Some(folder.clone());
    let mut of = boot(&driver, &machine, Some("app")).await;

    let said = of
        .agent
        .sh("cat /app/name; head -c 9 /app/fill | wc -c")
        .await;
    assert_eq!(said, "app\n9");
    shorten(&folder);
    let said = of
        .agent
        .sh("tail -c 1000000 /app/fill 2>&1 >/dev/null")
        .await;
    // QEMU has zeros there.
    assert!(said.contains("Input/output error") || !is_kvm(), "{said}");
    of.obeys().await;

    let idle = of.takes().await;
    remove_tap(&host, &of.prepared);
    let send = "for n in 1 2 3 4 5; do bash -c 'echo x > /dev/udp/10.42.0.1/9'; done 2>&1; echo on";
    let said = of.agent.sh(send).await;
    assert!(said.ends_with("on"), "{said}");
    let without = of.takes().await;
    println!("of {LOOK:?} it took {idle:?}, and without a tap {without:?}");
    // QEMU asks a tap that is gone all the time.
    assert!(
        without < idle + LOOK / 2 || !is_kvm(),
        "{idle:?} {without:?}"
    );
    of.obeys().await;
    assert_eq!(of.agent.sh("echo on").await, "on");

    // Its scratch disk is the guest's root: what becomes of the guest then is its own.
    if is_kvm() {
        let files = scratch_files(&host, of.pid);
        assert!(!files.is_empty());
        for file in &files {
            shorten(file);
        }
        let write = "dd if=/dev/zero of=/var/some bs=1M count=20 conv=fsync 2>&1";
        let said = of.agent.sh(write).await;
        assert!(said.contains("Input/output error"), "{said}");
        of.obeys().await;
        of.held.stats().await.unwrap();
    }
    assert_eq!(beside.agent.sh("echo on").await, "on");
    for vm in [of.vm, beside.vm] {
        driver.release(vm).await.unwrap();
    }
    assert_eq!(host.left(), Vec::<String>::new());
}
