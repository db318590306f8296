//! Another daemon's view: taking over what runs, and removing what is half made.

use std::collections::BTreeSet;
use std::fs;
use std::process::{Command, Stdio};

use serde::{Deserialize, Serialize};
use spore_node::cgroup::Limits;
use spore_node::hypervisor::{AttachError, Hypervisor, Identity, Machine, Prepared};
use spore_wire::id::VmId;
use tokio::time::timeout;

use crate::guest::{Then, WORD};
use crate::host::{HANG, TestHost, new_id, said};

/// The variable that tells the first daemon where its orders are.
const ORDERS: &str = "SPORE_TEST_ORDERS";

#[derive(Serialize, Deserialize)]
struct Orders {
    runtime_dir: std::path::PathBuf,
    data_dir: std::path::PathBuf,
    cgroup_parent: String,
    uid_first: u32,
    initramfs: std::path::PathBuf,
    vm: VmId,
    machine: Machine,
}

/// Not a test of its own: the daemon that the test below starts and kills.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "started by another test"]
async fn first_daemon() {
    let Some(path) = std::env::var_os(ORDERS) else {
        return;
    };
    let orders: Orders = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let host = TestHost::new(Then::Wait).unwrap();
    let mut config = host.config.clone();
    config.room.runtime_dir = orders.runtime_dir;
    config.room.data_dir = orders.data_dir;
    config.room.cgroup_parent = orders.cgroup_parent;
    config.room.uid_first = orders.uid_first;
    config.initramfs = orders.initramfs;
    let driver = crate::driver::Driver::open(config, 0, host.rates)
        .await
        .unwrap();
    let prepared = driver.prepare(orders.vm, &orders.machine).await.unwrap();
    let identity = driver
        .boot(orders.vm, &orders.machine, &prepared)
        .await
        .unwrap();
    drop(host);
    let draft = std::path::Path::new(&path).with_extension("draft");
    fs::write(&draft, serde_json::to_vec(&(prepared, identity)).unwrap()).unwrap();
    fs::rename(draft, std::path::Path::new(&path).with_extension("done")).unwrap();
    std::future::pending::<()>().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_outlives_the_killed_daemon_and_the_next_one_takes_hold_of_it() {
    let Some(host) = TestHost::new(Then::Wait) else {
        return;
    };
    let (vm, machine) = (new_id(), host.machine());
    let orders = host.runtime("../orders.json");
    fs::create_dir_all(host.runtime("")).unwrap();
    let room = host.config.room.clone();
    let text = Orders {
        runtime_dir: room.runtime_dir,
        data_dir: room.data_dir,
        cgroup_parent: room.cgroup_parent,
        uid_first: room.uid_first,
        initramfs: host.config.initramfs.clone(),
        vm,
        machine,
    };
    fs::write(&orders, serde_json::to_vec(&text).unwrap()).unwrap();
    let mut first = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "recovery::first_daemon", "--ignored"])
        .env(ORDERS, &orders)
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let done = orders.with_extension("done");
    let wait = async {
        while !done.exists() {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    };
    timeout(HANG, wait).await.unwrap();
    first.kill().unwrap();
    first.wait().unwrap();
    let (prepared, identity): (Prepared, Identity) =
        serde_json::from_slice(&fs::read(done).unwrap()).unwrap();

    let driver = host.driver().await;
    driver.sweep(&BTreeSet::from([vm])).await.unwrap();
    assert!(host.processes().contains(&identity.pid));
    let held = driver.attach(vm, &prepared, &identity).await.unwrap();
    said(&*held, WORD).await;
    held.open_network().await.unwrap();
    held.open_network().await.unwrap();
    refuses_another_identity(&*driver, vm, &prepared, &identity).await;
    held.kill();
    timeout(HANG, held.exited()).await.unwrap();
    let gone = driver.attach(vm, &prepared, &identity).await.err();
    assert!(matches!(gone, Some(AttachError::Gone(_))), "{gone:?}");
    driver.release(vm).await.unwrap();
    assert_eq!(host.left(), Vec::<String>::new());
    assert!(!host.namespaces().contains(&prepared.namespace));
}

async fn refuses_another_identity(
    driver: &dyn Hypervisor,
    vm: VmId,
    prepared: &Prepared,
    identity: &Identity,
) {
    let host_boot_id = "00000000-0000-0000-0000-000000000000".to_owned();
    let before = Identity {
        host_boot_id,
        ..identity.clone()
    };
    let refused = driver.attach(vm, prepared, &before).await.err();
    assert!(
        matches!(refused, Some(AttachError::AnotherBoot)),
        "{refused:?}"
    );
    let start_time = identity.start_time + 1;
    let reused = Identity {
        start_time,
        ..identity.clone()
    };
    let elsewhere = Identity {
        cgroup: "another".to_owned(),
        ..identity.clone()
    };
    for other in [reused, elsewhere] {
        let refused = driver.attach(vm, prepared, &other).await.err();
        assert!(matches!(refused, Some(AttachError::Gone(_))), "{refused:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_release_of_what_never_was_is_no_error() {
    let Some(host) = TestHost::new(Then::Wait) else {
        return;
    };
    host.driver().await.release(new_id()).await.unwrap();
    assert_eq!(host.left(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sweep_removes_half_made_things_of_every_kind_and_keeps_what_is_kept() {
    let Some(host) = TestHost::new(Then::Wait) else {
        return;
    };
    let kept = new_id();
    let driver = host.driver().await;
    let prepared = driver.prepare(kept, &host.machine()).await.unwrap();
    let rooms = driver.rooms();
    let limits = Limits {
        memory_bytes: 64 << 20,
        cpus: 1,
        pids: 8,
    };

    fs::create_dir(host.runtime("vms").join(new_id().to_string())).unwrap();
    fs::write(host.runtime("uids/4294967"), "cut").unwrap();
    fs::write(host.runtime("uids/4294968"), new_id().to_string()).unwrap();
    fs::write(host.runtime("netns/notmounted"), "").unwrap();
    rooms.namespaces().make("nobodys").await.unwrap();
    rooms.cgroups().create("nonsense", &limits).unwrap();
    let populated = new_id().to_string();
    rooms.cgroups().create(&populated, &limits).unwrap();
    let mut process = Command::new("sleep").arg("1000").spawn().unwrap();
    for entrance in rooms.cgroups().entrances(&populated) {
        fs::write(entrance, process.id().to_string()).unwrap();
    }
    let draft = host
        .runtime("../data/scratch")
        .join(format!("{}.draft", new_id()));
    fs::write(draft, "").unwrap();

    let swept = driver.sweep(&BTreeSet::from([kept])).await.unwrap();
    assert_eq!(swept.removed.len(), 8, "{swept:?}");
    assert!(process.wait().map_or(true, |status| !status.success()));
    let left = host.left();
    assert_eq!(
        left.len(),
        3,
        "record, uid and cgroup of the kept one: {left:?}"
    );
    let named = |name: &str| host.namespaces().iter().any(|one| one == name);
    assert!(named(&prepared.namespace) && !named("nobodys") && !named("notmounted"));
    let again = driver.sweep(&BTreeSet::from([kept])).await.unwrap();
    assert_eq!(again.removed, Vec::<String>::new());
    driver.sweep(&BTreeSet::new()).await.unwrap();
    assert_eq!(host.left(), Vec::<String>::new());
}
