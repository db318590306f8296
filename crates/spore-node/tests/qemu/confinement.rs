//! What a VMM that was taken over would have: looked up in `/proc` of a real one.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use spore_node::cgroup::Cgroups;
use spore_node::hypervisor::fork::Afterwards;
use spore_node::hypervisor::{Identity, Prepared};
use spore_wire::id::VmId;
use tokio::time::timeout;

use crate::driver::is_kvm;
use crate::guest::{FILL_MIB, Then, WORD};
use crate::host::{HANG, TestHost, new_id, said};

/// What the VMM may have open, by the kernel's name of it, and how often at most. Two of each disk:
/// QEMU keeps the one of its fd set and a copy.
fn expected(host: &TestHost) -> BTreeMap<String, usize> {
    if is_kvm() {
        return expected_of_kvm(host);
    }
    let root = host.runtime("..").canonicalize().unwrap();
    let file = |name: &str| root.join(name).display().to_string();
    BTreeMap::from([
        ("/dev/null".to_owned(), 1),
        ("/memfd:vmm-output (deleted)".to_owned(), 2),
        ("/dev/net/tun".to_owned(), 1),
        // Two of the memory: the node's descriptor, and QEMU's own, opened through it.
        ("/memfd:guest-memory (deleted)".to_owned(), 2),
        (file("image"), 2),
        (file("folder"), 2),
        // What the scratch disk is over: an empty one, or the layers of a source.
        (file("data/scratch/empty-1-64.ext4"), 2),
        (format!("{}/# (deleted)", file("data/scratch")), 2),
        ("/memfd:disk-key (deleted)".to_owned(), 1),
        // Two that listen, and the monitor's connection.
        ("socket".to_owned(), 3),
        ("anon_inode:[eventfd]".to_owned(), 16),
        ("anon_inode:[eventpoll]".to_owned(), 4),
        ("anon_inode:[signalfd]".to_owned(), 1),
    ])
}

/// The same of our own VMM, which opens nothing itself.
fn expected_of_kvm(host: &TestHost) -> BTreeMap<String, usize> {
    let root = host.runtime("..").canonicalize().unwrap();
    let file = |name: &str| root.join(name).display().to_string();
    BTreeMap::from([
        ("/dev/null".to_owned(), 1),
        ("/memfd:vmm-output (deleted)".to_owned(), 2),
        ("/dev/kvm".to_owned(), 1),
        ("anon_inode:kvm-vm".to_owned(), 1),
        ("anon_inode:kvm-vcpu:0".to_owned(), 1),
        // What its first process waits at.
        ("pipe".to_owned(), 1),
        ("/dev/net/tun".to_owned(), 1),
        (file("image"), 1),
        (file("folder"), 1),
        // One to read and write, and one for the copies of what is frozen.
        (file("data/scratch/empty-1-64.ext4"), 2),
        (format!("{}/# (deleted)", file("data/scratch")), 2),
        // Two that listen, and the node's connections.
        ("socket".to_owned(), 4),
        ("anon_inode:[eventfd]".to_owned(), 24),
        ("anon_inode:[eventpoll]".to_owned(), 1),
    ])
}

fn open_files(proc: &Path, vm: &str) -> BTreeMap<String, usize> {
    let mut open = BTreeMap::new();
    for entry in fs::read_dir(proc.join("fd")).unwrap() {
        let target: PathBuf = fs::read_link(entry.unwrap().path()).unwrap();
        let target = target.display().to_string().replace(vm, "VM");
        let name = if target.starts_with("socket:") {
            "socket".to_owned()
        } else if target.starts_with("pipe:") {
            "pipe".to_owned()
        } else if let Some((folder, _number)) = target.split_once("/#") {
            format!("{folder}/# (deleted)")
        } else {
            target
        };
        *open.entry(name).or_default() += 1;
    }
    open
}

fn fields(text: &str) -> BTreeMap<&str, String> {
    let pairs = text.lines().filter_map(|line| line.split_once(':'));
    pairs
        .map(|(key, value)| (key, value.split_whitespace().collect::<Vec<_>>().join(" ")))
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_vm_process_has_exactly_its_fds_uid_and_filter() {
    let Some(host) = TestHost::new(Then::Wait) else {
        return;
    };
    let driver = host.driver().await;
    let (vm, machine) = (new_id(), host.machine());
    let prepared = driver.prepare(vm, &machine).await.unwrap();
    let identity = driver.boot(vm, &machine, &prepared).await.unwrap();
    let held = driver.attach(vm, &prepared, &identity).await.unwrap();
    said(&*held, WORD).await;
    // The other one of our own VMM is the first of its pid namespace, which does nothing.
    assert_eq!(host.processes().len(), if is_kvm() { 2 } else { 1 });
    assert!(host.processes().contains(&identity.pid));
    let mut allowed = expected(&host);
    check_process(&host, vm, &prepared, &identity, &allowed);

    held.pause().await.unwrap();
    let capture = held.capture(Afterwards::Ends).await.unwrap();
    driver.release(vm).await.unwrap();
    let source = capture.into_source(None).await.unwrap();
    let fork = new_id();
    let prepared = driver.prepare(fork, &machine).await.unwrap();
    let identity = driver
        .fork(fork, &machine, &prepared, &source)
        .await
        .unwrap();
    let held = driver.attach(fork, &prepared, &identity).await.unwrap();
    held.resume().await.unwrap();
    allowed.insert("/memfd:device-state (deleted)".to_owned(), 1);
    let layers = allowed.keys().find(|name| name.contains("/#")).cloned();
    allowed.insert(layers.unwrap(), 4);
    check_process(&host, fork, &prepared, &identity, &allowed);
    driver.release(fork).await.unwrap();
    assert_eq!(host.left(), Vec::<String>::new());
}

/// What the process of a VM is and has.
fn check_process(
    host: &TestHost,
    vm: VmId,
    prepared: &Prepared,
    identity: &Identity,
    allowed: &BTreeMap<String, usize>,
) {
    let proc = Path::new("/proc").join(identity.pid.to_string());
    let read = |name: &str| fs::read_to_string(proc.join(name)).unwrap();
    for (name, count) in open_files(&proc, &vm.to_string()) {
        let most = allowed.get(&name).copied().unwrap_or(0);
        assert!(count <= most, "{count} of {name}, {most} at most");
    }
    let uid = prepared.uid;
    for thread in fs::read_dir(proc.join("task")).unwrap() {
        let status = fs::read_to_string(thread.unwrap().path().join("status")).unwrap();
        let status = fields(&status);
        for key in ["Uid", "Gid"] {
            assert_eq!(status[key], format!("{uid} {uid} {uid} {uid}"), "{key}");
        }
        for key in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            assert_eq!(status[key], "0000000000000000", "{key}");
        }
        assert_eq!(status["Groups"], "");
        assert_eq!((&*status["NoNewPrivs"], &*status["Seccomp"]), ("1", "2"));
    }
    let status = read("status");
    let inner = if is_kvm() { 2 } else { 1 };
    let pids = format!("{} {inner}", identity.pid);
    assert_eq!(fields(&status)["NSpid"], pids);
    assert_eq!(read("environ"), "");
    assert!(!read("cmdline").contains(&host.runtime("").display().to_string()));
    check_limits(&read("limits"));
    check_root(&proc);
    assert_eq!(
        read("net/dev")
            .lines()
            .skip(2)
            .map(interface)
            .collect::<Vec<_>>(),
        ["lo"]
    );
    for kind in ["mnt", "net", "ipc", "uts", "pid", "cgroup"] {
        let theirs = fs::read_link(proc.join("ns").join(kind)).unwrap();
        let ours = fs::read_link(Path::new("/proc/self/ns").join(kind)).unwrap();
        assert_ne!(theirs, ours, "{kind}");
    }
    let cgroups = Cgroups::open(&host.config.room.cgroup_parent).unwrap();
    assert!(cgroups.holds(&identity.cgroup, &read("cgroup")));
    assert_eq!(read("oom_score_adj").trim(), "500");
}

/// A file of the VM's cgroup: by its name on v1, or on v2.
fn limit(host: &TestHost, cgroup: &str, v1: (&str, &str), v2: &str) -> String {
    let root = Path::new("/sys/fs/cgroup");
    let inside = |tree: &Path, file: &str| {
        let folder = tree.join(&host.config.room.cgroup_parent).join(cgroup);
        fs::read_to_string(folder.join(file))
    };
    let text = inside(&root.join(v1.0), v1.1).or_else(|_none| inside(root, v2));
    text.unwrap().trim().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_uses_all_its_memory_stays_within_the_limits_of_its_vm() {
    let Some(host) = TestHost::new(Then::Fill) else {
        return;
    };
    let driver = host.driver().await;
    let (vm, machine) = (new_id(), host.machine());
    let prepared = driver.prepare(vm, &machine).await.unwrap();
    let identity = driver.boot(vm, &machine, &prepared).await.unwrap();
    let held = driver.attach(vm, &prepared, &identity).await.unwrap();
    said(&*held, WORD).await;
    let filled = async {
        while held.stats().await.unwrap().memory_bytes < u64::from(FILL_MIB) << 20 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(HANG, filled).await.unwrap();
    let of = |v1, v2| limit(&host, &identity.cgroup, v1, v2);
    let number = |text: String| text.parse::<u64>().unwrap();
    // The guest's 128 MiB and what the driver says that its VMM takes.
    let memory = number(of(("memory", "memory.limit_in_bytes"), "memory.max"));
    let overhead = u64::from(driver.caps().overhead_mib);
    assert_eq!(memory, (128 + overhead) << 20);
    let peak = number(of(("memory", "memory.max_usage_in_bytes"), "memory.peak"));
    assert!(peak < memory, "{peak} of {memory}");
    let swap = of(("memory", "memory.swappiness"), "memory.swap.max");
    assert_eq!(swap, "0");
    let cpu = of(("cpu", "cpu.cfs_quota_us"), "cpu.max");
    assert_eq!(cpu.split(' ').next(), Some("100000"));
    let pids = number(of(("pids", "pids.max"), "pids.max"));
    let used = held.stats().await.unwrap().pids;
    assert!((2..pids).contains(&used) && pids < 100, "{used} of {pids}");
    assert!(process_is_there(identity.pid));
    driver.release(vm).await.unwrap();
    assert_eq!(host.left(), Vec::<String>::new());
}

fn process_is_there(pid: u32) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let state = status.lines().find_map(|line| line.strip_prefix("State:"));
    state.is_some_and(|state| !state.trim().starts_with('Z'))
}

fn interface(line: &str) -> &str {
    line.split(':').next().unwrap().trim()
}

fn check_limits(limits: &str) {
    let line = |name: &str| {
        let line = limits
            .lines()
            .find_map(|line| line.strip_prefix(name))
            .unwrap();
        line.split_whitespace().take(2).collect::<Vec<_>>()
    };
    assert_eq!(line("Max core file size"), ["1", "1"]);
    let (files, bytes) = match is_kvm() {
        true => ("256", "150994944"),
        false => ("128", "83951616"),
    };
    assert_eq!(line("Max open files"), [files, files]);
    assert_eq!(line("Max locked memory"), ["0", "0"]);
    assert_eq!(line("Max file size"), [bytes, bytes]);
}

/// The root is one empty, read-only tmpfs.
fn check_root(proc: &Path) {
    let mounts = fs::read_to_string(proc.join("mountinfo")).unwrap();
    let mounts: Vec<&str> = mounts.lines().collect();
    assert_eq!(mounts.len(), 1, "{mounts:?}");
    assert!(
        mounts[0].contains(" / / ro,nosuid,nodev,noexec"),
        "{mounts:?}"
    );
    assert!(mounts[0].contains("tmpfs"), "{mounts:?}");
    assert_eq!(fs::read_dir(proc.join("root")).unwrap().count(), 0);
    assert_eq!(fs::read_dir(proc.join("cwd")).unwrap().count(), 0);
}
