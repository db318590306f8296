//! A host of one test: its own folders, cgroup parent and uid range, and a look at what is left.
//!
//! The kernel is that of `make deps`: `guest/vmlinux` and `guest/release` under the folder that
//! `SPORE_DEPS` names, by default `/var/lib/spore-deps`; the initramfs is that of `guest.rs`. A
//! test that misses something says `SKIPPED: reason` and passes.

use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use spore_node::cgroup::Cgroups;
use spore_node::config::VmLimits;
use spore_node::egress::launch::EgressLauncher;
use spore_node::hypervisor::qemu::QemuConfig;
use spore_node::hypervisor::room::RoomConfig;
use spore_node::hypervisor::{Machine, Vm};
use spore_wire::id::VmId;
use spore_wire::launch::Rates;
use spore_wire::node::Resources;

use crate::driver::{Driver, kernel_arguments};
use crate::guest::{Then, initramfs};

/// Uids of tests lie above those of a daemon that may run on the same host.
const UID_FIRST: u32 = 300_000;
const UIDS: u32 = 32;

static HOSTS: AtomicU32 = AtomicU32::new(0);

/// One test's host.
pub(crate) struct TestHost {
    pub(crate) config: QemuConfig,
    /// VMMs that its driver makes ahead.
    pub(crate) parked: usize,
    /// How much the devices of its VMs do, where the driver knows a limit.
    pub(crate) rates: Rates,
    root: PathBuf,
}

impl TestHost {
    /// `None` after saying why the test is skipped.
    pub(crate) fn new(then: Then) -> Option<Self> {
        let missing = |what: &str| {
            println!("SKIPPED: {what}");
            None
        };
        if !rustix::process::geteuid().is_root() {
            return missing("namespaces and cgroups need root");
        }
        let deps = std::env::var_os("SPORE_DEPS").unwrap_or_else(|| "/var/lib/spore-deps".into());
        let deps = PathBuf::from(deps);
        let guest = deps.join("guest");
        let Ok(kernel_release) = fs::read_to_string(guest.join("release")) else {
            return missing("no guest kernel: run `make deps`");
        };
        let kernel = guest.join("vmlinux");
        if !Path::new(QemuConfig::DEBIAN_QEMU).exists() {
            return missing("no QEMU: install qemu-system-x86");
        }
        let number = HOSTS.fetch_add(1, Ordering::Relaxed);
        let name = format!("spore-test-{}-{number}", std::process::id());
        let root = Path::new("/run").join(&name);
        // Ranges of test processes that run at once are apart with a good chance, and an overlap
        // only weakens the thread limit per uid.
        let uid_first = UID_FIRST + (std::process::id() % 4096) * 512 + number * UIDS;
        let room = RoomConfig {
            runtime_dir: root.join("run"),
            data_dir: root.join("data"),
            cgroup_parent: name,
            uid_first,
            uid_count: UIDS,
            pool_size: 2,
        };
        let launcher = vec![env!("CARGO_BIN_EXE_spore-node-jail").to_owned()];
        let config = QemuConfig {
            room,
            kernel,
            kernel_release: kernel_release.trim().to_owned(),
            kernel_arguments: kernel_arguments(),
            initramfs: root.join("initramfs"),
            qemu: QemuConfig::DEBIAN_QEMU.into(),
            libraries: QemuConfig::debian_libraries(),
            launcher,
            egress: EgressLauncher::new(env!("CARGO_BIN_EXE_egress-proxy"), [""; 0]),
        };
        fs::create_dir_all(&root).unwrap();
        fs::write(&config.initramfs, initramfs(then)).unwrap();
        Some(Self {
            config,
            parked: 0,
            rates: Rates::default(),
            root,
        })
    }

    /// One whose guests have the agent and an image that it can serve, with the machine for it.
    pub(crate) fn with_agent() -> Option<(Self, Machine)> {
        let mut host = Self::new(Then::Wait)?;
        let deps = host.config.kernel.ancestors().nth(2).unwrap().to_owned();
        let initramfs = deps.join("guest/initramfs.cpio");
        let image = base_image(&deps).unwrap_or_default();
        if !initramfs.is_file() || !image.is_file() {
            println!("SKIPPED: no initramfs or base image: run `make deps`");
            return None;
        }
        let mut machine = host.machine();
        machine.image = image;
        machine.folder = None;
        host.config.initramfs = initramfs;
        Some((host, machine))
    }

    pub(crate) async fn driver(&self) -> Driver {
        Driver::open(self.config.clone(), self.parked, self.rates)
            .await
            .unwrap()
    }

    /// A machine with an image and a folder, which hold nothing that a guest could mount.
    pub(crate) fn machine(&self) -> Machine {
        let image = self.root.join("image");
        let folder = self.root.join("folder");
        for path in [&image, &folder] {
            fs::write(path, vec![0; 1 << 20]).unwrap();
        }
        Machine {
            resources: Resources {
                cpus: 1,
                memory_mib: 128,
                disk_mib: 64,
            },
            image,
            folder: Some(folder),
            egress: Vec::new(),
        }
    }

    /// Everything of VMs that this host still has. Namespaces of the pool are not anybody's.
    pub(crate) fn left(&self) -> Vec<String> {
        let room = &self.config.room;
        let mut left = Vec::new();
        for folder in ["run/vms", "run/uids", "data/scratch"] {
            for name in names(&self.root.join(folder)) {
                if !name.starts_with("empty-") {
                    left.push(format!("{folder}/{name}"));
                }
            }
        }
        let cgroups = Cgroups::open(&room.cgroup_parent).unwrap();
        left.extend(
            cgroups
                .list()
                .unwrap()
                .into_iter()
                .map(|name| format!("cgroup {name}")),
        );
        left.extend(self.processes().iter().map(|pid| format!("process {pid}")));
        left
    }

    /// The pids of processes with a uid of this host's range that are no zombies.
    pub(crate) fn processes(&self) -> Vec<u32> {
        processes_of(&self.uids())
    }

    /// The uids of its VMs: the first of the range is that of what the node needs itself.
    pub(crate) fn uids(&self) -> Range<u32> {
        let room = &self.config.room;
        room.uid_first + 1..room.uid_first + room.uid_count
    }

    /// The names of namespaces, by file and by mount.
    pub(crate) fn namespaces(&self) -> Vec<String> {
        let folder = self.config.room.runtime_dir.join("netns");
        let mut all = names(&folder);
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let prefix = format!("{}/", folder.display());
        let mounted = mounts
            .split_whitespace()
            .filter_map(|word| word.strip_prefix(&prefix));
        all.extend(mounted.map(str::to_owned));
        all.sort();
        all.dedup();
        all
    }

    pub(crate) fn runtime(&self, name: &str) -> PathBuf {
        self.config.room.runtime_dir.join(name)
    }
}

impl Drop for TestHost {
    fn drop(&mut self) {
        let cgroups = Cgroups::open(&self.config.room.cgroup_parent).unwrap();
        for name in cgroups.list().unwrap() {
            cgroups.remove(&name).unwrap();
        }
        cgroups.remove_parent().unwrap();
        // The thread of a driver that was dropped may be making one more, which keeps the folder.
        for _round in 0..1500 {
            for name in self.namespaces() {
                let path = self.runtime("netns").join(name);
                // A file that is no mount point says so.
                let _errno = rustix::mount::unmount(&path, rustix::mount::UnmountFlags::DETACH);
            }
            if fs::remove_dir_all(&self.root).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        fs::remove_dir_all(&self.root).unwrap();
    }
}

/// The file of the image `debian/base`.
pub(crate) fn base_image(deps: &Path) -> Option<PathBuf> {
    image_in(deps, "debian--base")
}

/// The file of an image, by the name of the file that has its name.
pub(crate) fn image_named(host: &TestHost, name: &str) -> Option<PathBuf> {
    image_in(host.config.kernel.ancestors().nth(2)?, name)
}

fn image_in(deps: &Path, name: &str) -> Option<PathBuf> {
    let id = fs::read_to_string(deps.join("images/names").join(name)).ok()?;
    Some(deps.join(format!("images/{}.img", id.trim())))
}

/// The pids of processes with one of these uids that are no zombies.
pub(crate) fn processes_of(uids: &Range<u32>) -> Vec<u32> {
    let pids = names(Path::new("/proc"))
        .into_iter()
        .filter_map(|name| name.parse().ok());
    pids.filter(|pid: &u32| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let field = |key: &str| status.lines().find_map(|line| line.strip_prefix(key));
        let uid = field("Uid:").and_then(|rest| rest.split_whitespace().next()?.parse().ok());
        let zombie = field("State:").is_some_and(|state| state.trim().starts_with('Z'));
        uid.is_some_and(|uid: u32| uids.contains(&uid)) && !zombie
    })
    .collect()
}

fn names(folder: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(folder) else {
        return Vec::new();
    };
    entries
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .collect()
}

pub(crate) fn new_id() -> VmId {
    VmId::random().unwrap()
}

/// Longer than anything here takes on a busy machine; only a hang reaches it.
pub(crate) const HANG: Duration = Duration::from_secs(300);

/// Limits that only a hang reaches: how slow the machine is says nothing of what is tested.
pub(crate) fn patient() -> VmLimits {
    let long = HANG / 2;
    VmLimits {
        prepare: long,
        boot: long,
        agent: long,
        agent_of_fork: long,
        freeze: long,
        capture: long,
        answer: HANG,
        ready_slack: long,
        secrets: long,
        ..VmLimits::default()
    }
}

/// Waits until the guest's console holds `word`.
pub(crate) async fn said(vm: &dyn Vm, word: &str) {
    let wait = async {
        while !vm
            .console_tail()
            .await
            .iter()
            .any(|line| line.contains(word))
        {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    if tokio::time::timeout(HANG, wait).await.is_err() {
        let console = vm.console_tail().await;
        unreachable!("the guest never said {word}: {console:#?}");
    }
}
