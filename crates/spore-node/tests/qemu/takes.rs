//! Snapshots of VMs that run, from the first request to forks under another daemon.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use spore_node::config::{Config, Images};
use spore_node::node::Node;
use spore_node::snapshot::key::SnapshotKey;
use spore_node::snapshot::{NoStorePoints, StorePoint, StorePoints};
use spore_node::take::{Take, TakeError, Taken};
use spore_wire::id::{ImageId, SnapshotId, VmId};
use spore_wire::node::{NodeEvent, Source, StartVm, StopMode, VmPhase, VmStatus};
use spore_wire::snapshot::SnapshotKind;
use tokio::io::AsyncReadExt as _;
use tokio::time::timeout;

use crate::driver::Driver;
use crate::host::{HANG, TestHost, new_id, patient};
use crate::kill_points::counter;

/// The same file for every image.
#[derive(Debug)]
struct OneImage(PathBuf);

impl Images for OneImage {
    fn path(&self, _id: &ImageId) -> Option<PathBuf> {
        Some(self.0.clone())
    }
}

/// A node on a host, with nothing in memory but what it was opened with.
pub(crate) struct Daemon {
    pub(crate) node: Node,
    qemu: Driver,
}

impl Daemon {
    pub(crate) async fn open(host: &TestHost, image: &Path, points: Arc<dyn StorePoints>) -> Self {
        Self::open_with(host, image, |config| config.snapshots.points = points).await
    }

    pub(crate) async fn open_with(
        host: &TestHost,
        image: &Path,
        edit: impl FnOnce(&mut Config),
    ) -> Self {
        let qemu = host.driver().await;
        let [node, logs, snapshots] =
            ["node", "logs", "snapshots"].map(|name| host.runtime("..").join(name));
        let mut config = Config::new(node, logs, snapshots, 8192);
        config.limits = patient();
        edit(&mut config);
        let images = Arc::new(OneImage(image.to_owned()));
        let opened = Node::open(config, qemu.hypervisor(), images).await;
        let (node, _adoption) = opened.unwrap();
        Self { node, qemu }
    }

    pub(crate) async fn close(self) {
        self.node.detach().await;
        self.qemu.close().unwrap();
    }

    /// Waits for a phase or, where it never comes to that, for the end, which says why.
    pub(crate) async fn settled(&self, vm: VmId, at_least: VmPhase) -> VmStatus {
        let mut watch = self.node.watch();
        let settled = async {
            loop {
                let NodeEvent::Vm(status) = watch.next().await;
                let settled = status.phase == at_least || status.phase.is_over();
                if status.vm == vm && settled {
                    return status;
                }
            }
        };
        timeout(HANG, settled).await.unwrap()
    }

    pub(crate) async fn ready(&self, start: StartVm) -> VmStatus {
        let vm = start.vm;
        self.node.start(start).unwrap();
        let status = self.settled(vm, VmPhase::Ready).await;
        assert_eq!(status.phase, VmPhase::Ready, "{status:#?}");
        status
    }

    pub(crate) async fn take(&self, vm: VmId, id: SnapshotId) -> Result<Taken, TakeError> {
        let taking = Take {
            id,
            kind: SnapshotKind::Checkpoint,
            key: None,
            made_at_s: 1_700_000_000,
        };
        let taken = timeout(HANG, self.node.take(vm, taking)).await.unwrap();
        if let Ok(taken) = &taken {
            println!(
                "depth {}: frozen {:?}, of it paused {:?}; {} pages, {} KiB on the disk",
                taken.info.depth,
                taken.frozen,
                taken.pause,
                taken.info.memory_pages,
                taken.info.bytes / 1024
            );
        }
        taken
    }

    /// What its app says to whoever connects.
    pub(crate) async fn hear(&self, vm: VmId) -> String {
        let mut said = String::new();
        let asked = async {
            let mut app = self.node.connect(vm).await.unwrap();
            app.read_to_string(&mut said).await.unwrap();
        };
        timeout(HANG, asked).await.unwrap();
        said
    }

    /// What its app says: what it drew at its start, how often it was asked, how often started.
    pub(crate) async fn ask(&self, vm: VmId) -> (String, u64, u64) {
        let said = self.hear(vm).await;
        let words: Vec<&str> = said.split_whitespace().collect();
        let [token, count, starts] = words[..] else {
            unreachable!("the app said {said:?}");
        };
        let number = |text: &str| text.parse().unwrap();
        (token.to_owned(), number(count), number(starts))
    }

    pub(crate) async fn stop(&self, vm: VmId) {
        self.node.stop(vm, StopMode::Graceful).await.unwrap();
        let over = self.settled(vm, VmPhase::Stopped).await;
        assert_eq!(over.phase, VmPhase::Stopped, "{over:#?}");
    }
}

pub(crate) fn from(snapshot: SnapshotId) -> StartVm {
    StartVm {
        source: Source::Snapshot(snapshot),
        ..counter(new_id())
    }
}

pub(crate) fn new_snapshot() -> SnapshotId {
    SnapshotId::random().unwrap()
}

pub(crate) fn nothing_is_left(host: &TestHost) {
    assert_eq!(host.left(), Vec::<String>::new());
    let staging = host.runtime("../snapshots/.staging");
    assert_eq!(fs::read_dir(staging).unwrap().count(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_app_is_taken_goes_on_and_is_forked_five_deep_by_later_daemons() {
    let Some((host, machine)) = TestHost::with_agent() else {
        return;
    };
    let open = async || Daemon::open(&host, &machine.image, Arc::new(NoStorePoints)).await;
    let daemon = open().await;
    let source = new_id();
    let before = daemon.ready(counter(source)).await;
    let (token, count, starts) = daemon.ask(source).await;
    assert_eq!((count, starts), (1, 1));
    let mut snapshot = new_snapshot();
    let taken = daemon.take(source, snapshot).await.unwrap();
    assert!(taken.pause <= taken.frozen, "{taken:?}");
    assert_eq!(daemon.ask(source).await, (token.clone(), 2, 1));
    daemon.close().await;

    for depth in 1..=5 {
        let daemon = open().await;
        let start = from(snapshot);
        let fork = start.vm;
        let status = daemon.ready(start).await;
        assert_eq!(
            status.boot_id, before.boot_id,
            "it is the same kernel's life"
        );
        // Each was asked once, before it was taken.
        assert_eq!(daemon.ask(fork).await, (token.clone(), depth + 1, 1));
        snapshot = new_snapshot();
        let taken = daemon.take(fork, snapshot).await.unwrap();
        assert_eq!(u64::from(taken.info.depth), depth);
        assert!(
            taken.info.memory_pages < 16 * 1024,
            "its own pages alone: {taken:?}"
        );
        daemon.stop(fork).await;
        daemon.close().await;
    }
    let daemon = open().await;
    let still = daemon.settled(source, VmPhase::Ready).await;
    assert_eq!(still.boot_id, before.boot_id);
    assert_eq!(daemon.ask(source).await, (token, 3, 1));
    daemon.stop(source).await;
    daemon.close().await;
    nothing_is_left(&host);
}

/// Turns a bit in the middle of a file over.
fn flip(path: &Path) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let at = file.metadata().unwrap().len() / 2;
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1], at).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn flipped_byte_is_named() {
    let Some((host, machine)) = TestHost::with_agent() else {
        return;
    };
    let daemon = Daemon::open(&host, &machine.image, Arc::new(NoStorePoints)).await;
    let (source, snapshot) = (new_id(), new_snapshot());
    daemon.ready(counter(source)).await;
    daemon.take(source, snapshot).await.unwrap();
    daemon.stop(source).await;
    daemon.close().await;
    // By another daemon: this one has the memory.
    let daemon = Daemon::open(&host, &machine.image, Arc::new(NoStorePoints)).await;
    let folder = host.runtime("../snapshots/me").join(snapshot.to_string());
    for (name, words) in [
        ("memory.pages", "memory chunk "),
        ("memory.index", "the index of its memory is damaged"),
        ("state", "its device state is damaged"),
        ("disk.0", " of disk layer 0 is damaged"),
        ("disk.0.index", "the index of disk layer 0 is damaged"),
        ("header.json", "its header is damaged"),
    ] {
        let file = folder.join(name);
        flip(&file);
        let start = from(snapshot);
        let vm = start.vm;
        daemon.node.start(start).unwrap();
        let over = daemon.settled(vm, VmPhase::Stopped).await;
        let failure = over.failure.unwrap();
        println!("{name}: {}", failure.message);
        let names_both = [words, &snapshot.to_string()];
        let named = names_both.iter().all(|part| failure.message.contains(part));
        assert!(named, "{name}: {failure:?}");
        flip(&file);
    }
    let start = from(snapshot);
    let vm = start.vm;
    daemon.ready(start).await;
    daemon.stop(vm).await;
    daemon.close().await;
    nothing_is_left(&host);
}

/// Takes all space that is left once a snapshot has begun.
#[derive(Debug)]
struct Filler(PathBuf);

impl StorePoints for Filler {
    fn reached(&self, _id: SnapshotId, point: StorePoint) {
        if point == StorePoint::Staged && !self.0.exists() {
            // Until there is no more.
            let full = fs::write(&self.0, vec![0; 200 << 20]);
            println!("the disk is full: {full:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_is_full_while_it_is_sealed_leaves_nothing_and_the_vm_goes_on() {
    let Some((host, machine)) = TestHost::with_agent() else {
        return;
    };
    let store = host.runtime("../snapshots");
    fs::create_dir_all(&store).unwrap();
    mount(
        "tmpfs",
        &store,
        "tmpfs",
        MountFlags::empty(),
        Some(c"size=160m"),
    )
    .unwrap();
    let filler = store.join("filler");
    let daemon = Daemon::open(&host, &machine.image, Arc::new(Filler(filler.clone()))).await;
    let source = new_id();
    daemon.ready(counter(source)).await;
    let (token, ..) = daemon.ask(source).await;
    let full = daemon.take(source, new_snapshot()).await.unwrap_err();
    assert!(matches!(full, TakeError::NoSpace(_)), "{full:?}");
    assert_eq!(daemon.ask(source).await, (token.clone(), 2, 1));
    // And with no room at all the VM does not even stand still.
    let full = daemon.take(source, new_snapshot()).await.unwrap_err();
    assert!(matches!(full, TakeError::NoSpace(_)), "{full:?}");
    nothing_is_staged(&store);
    // Nor does one end that was to be suspended and stood still for that.
    fs::remove_file(&filler).unwrap();
    let suspend = Take {
        id: new_snapshot(),
        kind: SnapshotKind::Suspend,
        key: SnapshotKey::from_slice(&[7; 32]),
        made_at_s: 1_700_000_000,
    };
    let full = timeout(HANG, daemon.node.take(source, suspend)).await;
    let full = full.unwrap().unwrap_err();
    assert!(matches!(full, TakeError::NoSpace(_)), "{full:?}");
    assert_eq!(daemon.ask(source).await, (token.clone(), 3, 1));
    nothing_is_staged(&store);
    fs::write(&filler, b"").unwrap();
    let snapshot = new_snapshot();
    daemon.take(source, snapshot).await.unwrap();
    assert_eq!(daemon.ask(source).await, (token, 4, 1));
    let all = daemon.node.snapshots().list("me").await.unwrap();
    assert_eq!(
        all.iter().map(|info| info.id).collect::<Vec<_>>(),
        [snapshot]
    );
    daemon.stop(source).await;
    daemon.close().await;
    nothing_is_staged(&store);
    unmount(&store, UnmountFlags::DETACH).unwrap();
    assert_eq!(host.left(), Vec::<String>::new());
}

fn nothing_is_staged(store: &Path) {
    assert_eq!(fs::read_dir(store.join(".staging")).unwrap().count(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn two_snapshots_at_once_are_one_and_a_vm_that_is_stopped_meanwhile_ends() {
    let Some((host, machine)) = TestHost::with_agent() else {
        return;
    };
    let daemon = Daemon::open(&host, &machine.image, Arc::new(NoStorePoints)).await;
    let source = new_id();
    daemon.ready(counter(source)).await;
    let (one, two) = tokio::join!(
        daemon.take(source, new_snapshot()),
        daemon.take(source, new_snapshot()),
    );
    let (first, busy) = match (one, two) {
        (Ok(taken), Err(busy)) | (Err(busy), Ok(taken)) => (taken.info.id, busy),
        other => unreachable!("{other:?}"),
    };
    assert!(matches!(busy, TakeError::Busy(_)), "{busy:?}");
    let second = new_snapshot();
    let (taken, ()) = tokio::join!(daemon.take(source, second), daemon.stop(source));
    println!("stopped meanwhile: {taken:?}");
    let all = daemon.node.snapshots().list("me").await.unwrap();
    let mut expected = BTreeSet::from([first]);
    expected.extend(taken.is_ok().then_some(second));
    assert_eq!(all.len(), expected.len(), "{all:?}");
    let ids: BTreeSet<SnapshotId> = all.iter().map(|info| info.id).collect();
    assert_eq!(ids, expected);
    assert!(all.iter().all(|info| info.damage.is_none()), "{all:?}");
    daemon.close().await;
    nothing_is_left(&host);
}
