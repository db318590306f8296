//! The store as a whole: what it keeps, what it refuses, and what is left whenever it ends.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::Read as _;
use std::os::unix::fs::FileExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use rustix::process::{Signal, getpid, kill_process};
use spore_wire::cause::chain;
use spore_wire::id::{ImageId, SnapshotId, VmId};
use spore_wire::snapshot::{PUBLIC_ACCOUNT, SnapshotKind, SnapshotMeta, SnapshotParent};
use zeroize::Zeroizing;

use super::hash::Hash;
use super::header::tests::meta;
use super::header::{DISK_LAYERS_MAX, DiskBacking};
use super::key::{Keys, SnapshotKey};
use super::lineage::DEPTH_MAX;
use super::memory::MemoryCache;
use super::opened::Opened;
use super::staging::{FrozenLayer, Order, Staged};
use super::verified::Stamp;
use super::{
    Cascade, NoStorePoints, Removal, Settings, SnapshotStore, StoreError, StorePoint, StorePoints,
};
use crate::clock::{Clock, HostClock};
use crate::disk::overlay::DiskKey;
use crate::hypervisor::memory_image::{CapturedMemory, CapturedPages, MemoryImage, PageRun};
use crate::image::store::GcMode;
use crate::sys::probe::in_child;

const PAGE: usize = 4096;
const PLENTY: u64 = 1 << 40;

/// Later than any file was made, so that what is whole is remembered at once.
#[derive(Debug)]
struct Later;

impl Clock for Later {
    fn realtime(&self) -> Duration {
        HostClock.realtime() + Duration::from_secs(3600)
    }
}

fn open(folder: &Path, points: Arc<dyn StorePoints>) -> SnapshotStore {
    let settings = Settings {
        folder: folder.join("snapshots"),
        runtime: folder.to_path_buf(),
        clock: Arc::new(Later),
        points,
    };
    SnapshotStore::open(settings).unwrap()
}

fn store() -> (tempfile::TempDir, SnapshotStore) {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path(), Arc::new(NoStorePoints));
    (folder, store)
}

fn id(n: u8) -> SnapshotId {
    SnapshotId::from_bytes([n; 16])
}

fn key(n: u8) -> SnapshotKey {
    SnapshotKey::from_bytes([n; 32])
}

fn keys(of: &[u8]) -> Keys {
    of.iter().map(|n| (id(*n), key(*n))).collect()
}

/// The description of a snapshot of `account` with number `n` that continues `parent`.
fn described(account: &str, n: u8, parent: Option<(&str, u8)>) -> SnapshotMeta {
    let mut meta = meta(account, id(n));
    meta.parent = parent.map(|(account, n)| SnapshotParent {
        account: account.to_owned(),
        id: id(n),
    });
    meta
}

fn order(meta: SnapshotMeta, key: Option<SnapshotKey>) -> Order {
    Order {
        meta,
        key,
        estimate_bytes: 0,
        quota_bytes: PLENTY,
    }
}

/// Snapshot `n` has page `n` and page 100 full of `n`, its state says so, and so does its disk.
fn fill(staged: &mut Staged, n: u8) -> Result<(), StoreError> {
    for page in [u64::from(n), 100] {
        staged.page(page, &[n; PAGE])?;
    }
    staged.state(&[n; 300][..])?;
    let frozen = tempfile::tempfile().unwrap();
    frozen.set_len(1 << 20).unwrap();
    frozen.write_all_at(&[n; 10_000], 70_000).unwrap();
    let layer = FrozenLayer {
        file: &frozen,
        format: "qcow2",
        key: Some(&DiskKey::from_bytes([n; 32])),
    };
    staged.disk(&layer, DiskBacking::Parent)
}

fn try_make(store: &SnapshotStore, order: Order) -> Result<(), StoreError> {
    let [n, ..] = *order.meta.id.as_bytes();
    let mut staged = store.stage(order)?;
    fill(&mut staged, n)?;
    staged.seal().map(drop)
}

fn make(store: &SnapshotStore, account: &str, n: u8, parent: Option<u8>) {
    let meta = described(account, n, parent.map(|parent| (account, parent)));
    try_make(store, order(meta, None)).unwrap();
}

fn make_sealed(store: &SnapshotStore, n: u8, parent: Option<u8>) {
    let meta = described("me", n, parent.map(|parent| ("me", parent)));
    try_make(store, order(meta, Some(key(n)))).unwrap();
}

/// Compares all that `opened` gives with what `fill` gave to these, the lowest first.
fn assert_holds(opened: &Opened, of: &[u8], keys: &Keys) -> Result<(), StoreError> {
    let mut expected = vec![0; 1 << 20];
    for n in of {
        for page in [usize::from(*n), 100] {
            expected[page * PAGE..(page + 1) * PAGE].fill(*n);
        }
    }
    let memory = opened.memory(keys)?;
    let mut found = vec![1; 1 << 20];
    memory.file().read_exact_at(&mut found, 0).unwrap();
    assert!(found == expected, "{of:?}");
    let top = *of.last().unwrap();
    let mut state = Vec::new();
    File::from(opened.state(keys)?)
        .read_to_end(&mut state)
        .unwrap();
    assert_eq!(state, [top; 300]);
    let disks = opened.disks(keys)?;
    assert_eq!(disks.len(), of.len());
    for (n, disk) in of.iter().zip(disks) {
        let mut found = [0; 10_000];
        disk.file.read_exact_at(&mut found, 70_000).unwrap();
        assert_eq!(found, [*n; 10_000]);
        assert_eq!(disk.part.format, "qcow2");
        assert_eq!(disk.key.unwrap(), DiskKey::from_bytes([*n; 32]));
    }
    Ok(())
}

fn staging_is_empty(folder: &Path) -> bool {
    let staging = fs::read_dir(folder.join("snapshots/.staging")).unwrap();
    staging.count() == 0
}

fn place(folder: &Path, account: &str, n: u8) -> PathBuf {
    folder
        .join("snapshots")
        .join(account)
        .join(id(n).to_string())
}

fn ids(store: &SnapshotStore) -> Vec<SnapshotId> {
    let all = ["me", "other", PUBLIC_ACCOUNT].map(|account| store.list(account).unwrap());
    all.into_iter().flatten().map(|info| info.id).collect()
}

fn remove(store: &SnapshotStore, n: u8, cascade: Cascade) -> Result<Vec<SnapshotId>, StoreError> {
    store.remove(Removal {
        account: "me",
        id: id(n),
        cascade,
        in_use: &BTreeSet::new(),
    })
}

#[test]
fn a_chain_gives_back_memory_state_and_disks() {
    let (_folder, store) = store();
    make(&store, "me", 1, None);
    make(&store, "me", 2, Some(1));
    make_sealed(&store, 3, Some(2));
    make_sealed(&store, 4, Some(3));
    let opened = store.open_for("me", id(4)).unwrap();
    assert_eq!(opened.depth(), 3);
    assert_eq!(opened.sealed().collect::<Vec<_>>(), [id(4), id(3)]);
    assert_holds(&opened, &[1, 2, 3, 4], &keys(&[3, 4])).unwrap();
    let refused = opened.memory(&keys(&[4])).unwrap_err();
    assert!(
        matches!(refused, StoreError::NoKey(of) if of == id(3)),
        "{refused}"
    );
    let wrong = Keys::from([(id(3), key(3)), (id(4), key(3))]);
    for refused in [
        opened.memory(&wrong).map(drop),
        opened.state(&wrong).map(drop),
    ] {
        assert!(matches!(refused, Err(StoreError::WrongKey(of)) if of == id(4)));
    }
    assert!(matches!(opened.disks(&wrong), Err(StoreError::WrongKey(_))));
    let info = store.info("me", id(3)).unwrap();
    assert_eq!(
        (info.depth, info.encrypted, info.memory_pages),
        (2, true, 2)
    );
    assert_eq!(info.children, [id(4)]);
    assert!(info.bytes >= 2 * PAGE as u64 && info.damage.is_none());
}

#[test]
fn nothing_of_a_sealed_snapshot_is_readable() {
    let (folder, store) = store();
    make_sealed(&store, 7, None);
    for entry in fs::read_dir(place(folder.path(), "me", 7)).unwrap() {
        let path = entry.unwrap().path();
        // A disk layer has its own key, and its driver encrypts it.
        if path.file_name().is_some_and(|name| name == "disk.0") {
            continue;
        }
        let bytes = fs::read(&path).unwrap();
        let runs = bytes.windows(20).filter(|run| **run == [7; 20]).count();
        assert_eq!(runs, 0, "{}", path.display());
        assert!(!String::from_utf8_lossy(&bytes).contains(&"07".repeat(16)));
    }
}

/// A disk that its driver does not encrypt: 1 MiB, of which a part is full of `n`.
fn readable_disk(n: u8) -> File {
    let disk = tempfile::tempfile().unwrap();
    disk.set_len(1 << 20).unwrap();
    disk.write_all_at(&[n; 10_000], 70_000).unwrap();
    disk
}

fn make_with_readable_disk(store: &SnapshotStore, n: u8, parent: Option<u8>, sealed: bool) {
    let meta = described("me", n, parent.map(|parent| ("me", parent)));
    let mut staged = store.stage(order(meta, sealed.then(|| key(n)))).unwrap();
    staged.page(u64::from(n), &[n; PAGE]).unwrap();
    staged.state(&[n; 300][..]).unwrap();
    let layer = FrozenLayer {
        file: &readable_disk(n),
        format: "raw",
        key: None,
    };
    staged.disk(&layer, DiskBacking::Empty).unwrap();
    staged.seal().unwrap();
}

#[test]
fn a_readable_disk_is_encrypted_with_its_snapshot_and_stays_so() {
    let (folder, store) = store();
    make_with_readable_disk(&store, 1, None, false);
    make_with_readable_disk(&store, 7, Some(1), true);
    let is_hidden = |n: u8| {
        for entry in fs::read_dir(place(folder.path(), "me", n)).unwrap() {
            let bytes = fs::read(entry.unwrap().path()).unwrap();
            assert!(!bytes.windows(20).any(|run| *run == [n; 20]));
        }
    };
    is_hidden(7);
    let read = |n: u8, keys: &Keys| {
        let disks = store.open_for("me", id(n)).unwrap().disks(keys)?;
        let [disk] = &disks[..] else {
            unreachable!("{disks:?}");
        };
        let mut bytes = vec![0; 1 << 20];
        disk.file.read_exact_at(&mut bytes, 0).unwrap();
        assert_eq!(disk.file.metadata().unwrap().len(), 1 << 20);
        Ok(bytes)
    };
    let mut expected = vec![0; 1 << 20];
    expected[70_000..80_000].fill(7);
    assert!(read(7, &keys(&[7])).unwrap() == expected);
    let none: StoreError = read(7, &Keys::new()).unwrap_err();
    assert!(matches!(none, StoreError::NoKey(_)), "{none}");
    let wrong = read(7, &Keys::from([(id(7), key(8))])).unwrap_err();
    assert!(matches!(wrong, StoreError::WrongKey(_)), "{wrong}");

    store.compact("me", id(7), &keys(&[7]), PLENTY).unwrap();
    is_hidden(7);
    assert!(read(7, &keys(&[7])).unwrap() == expected);
    let sealed = place(folder.path(), "me", 7).join("disk.0");
    flip(&sealed, 5000);
    let damaged = chain(&read(7, &keys(&[7])).unwrap_err());
    assert!(
        damaged.contains("chunk 1 of disk layer 0 is damaged"),
        "{damaged}"
    );
}

#[test]
fn a_whole_memory_is_filed_as_it_is_and_only_where_nothing_is_below() {
    let (_folder, store) = store();
    make(&store, "me", 1, None);
    make(&store, "me", 2, Some(1));
    let image = store
        .open_for("me", id(2))
        .unwrap()
        .memory(&Keys::new())
        .unwrap();
    let mut staged = store.stage(order(described("me", 3, None), None)).unwrap();
    staged.image(&image).unwrap();
    staged.state(&[3; 10][..]).unwrap();
    assert_eq!(staged.seal().unwrap().memory.pages, 3);
    let again = store
        .open_for("me", id(3))
        .unwrap()
        .memory(&Keys::new())
        .unwrap();
    assert!(bytes(&image) == bytes(&again));
    let below = described("me", 4, Some(("me", 1)));
    let refused = store
        .stage(order(below, None))
        .unwrap()
        .image(&image)
        .unwrap_err();
    assert!(matches!(refused, StoreError::WholeMemory(_)), "{refused}");

    let ground = || store.open_for("me", id(2)).unwrap().ground();
    let continues = described("me", 5, Some(("me", 2)));
    let mut staged = store.stage(order(continues, Some(key(5)))).unwrap();
    staged.compare_with(ground().unwrap());
    let run = PageRun { first: 7, pages: 1 };
    let changed = CapturedPages::new(vec![run], Zeroizing::new(vec![7; PAGE]));
    staged.changed(&image, &changed).unwrap();
    staged.state(&[5; 10][..]).unwrap();
    assert_eq!(staged.seal().unwrap().memory.pages, 1);
    let mut expected = bytes(&image);
    expected[7 * PAGE..8 * PAGE].fill(7);
    let above = store.open_for("me", id(5)).unwrap();
    assert!(bytes(&above.memory(&keys(&[5])).unwrap()) == expected);
    // What is encrypted cannot be compared with.
    let refused = above.ground().unwrap_err();
    assert!(matches!(refused, StoreError::NoKey(_)), "{refused}");
}

fn bytes(image: &MemoryImage) -> Vec<u8> {
    let mut bytes = vec![1; 1 << 20];
    image.file().read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

#[test]
fn a_memory_with_its_changes_is_filed_as_if_it_were_merged() {
    let (_folder, store) = store();
    make(&store, "me", 1, None);
    let memory = |n| {
        let opened = store.open_for("me", id(n)).unwrap();
        opened.memory(&Keys::new()).unwrap()
    };
    let image = Arc::new(memory(1));
    for (n, step) in [(2, 1), (3, 2), (4, 3), (5, 255)] {
        let first = (0..256).step_by(step);
        let runs: Vec<_> = first.map(|first| PageRun { first, pages: 1 }).collect();
        let page = |index: usize| vec![u8::try_from(index % 3).unwrap(); PAGE];
        let changes = Zeroizing::new((0..runs.len()).flat_map(page).collect());
        let pages = CapturedPages::new(runs, changes);
        let mut staged = store.stage(order(described("me", n, None), None)).unwrap();
        staged.changed(&image, &pages).unwrap();
        staged.state(&[3; 10][..]).unwrap();
        staged.seal().unwrap();
        let base = Arc::clone(&image);
        let merged = CapturedMemory::Changed { base, pages }.merge().unwrap();
        assert!(bytes(&merged) == bytes(&memory(n)), "every {step}");
    }
}

#[test]
fn another_accounts_snapshot_is_not_there() {
    let (folder, store) = store();
    make(&store, "other", 1, None);
    make(&store, PUBLIC_ACCOUNT, 2, None);
    let missing = |result: Result<(), StoreError>| match result {
        Err(StoreError::Missing(gone)) => assert_eq!(gone, id(1)),
        other => panic!("{other:?}"),
    };
    missing(store.open_for("me", id(1)).map(drop));
    missing(store.info("me", id(1)).map(drop));
    missing(store.header("me", id(1)).map(drop));
    missing(remove(&store, 1, Cascade::Remove).map(drop));
    missing(store.compact("me", id(1), &Keys::new(), PLENTY).map(drop));
    // Naming it as a parent is no way in, whoever it is said to belong to.
    for account in ["me", "other", PUBLIC_ACCOUNT] {
        let meta = described("me", 3, Some((account, 1)));
        missing(store.stage(order(meta, None)).map(drop));
    }
    // Nor is knowing all of its bytes: the same content is filed again, and nothing is found by it.
    let stolen = place(folder.path(), "me", 1);
    fs::create_dir_all(stolen.parent().unwrap()).unwrap();
    let copied = std::process::Command::new("cp")
        .arg("-r")
        .args([place(folder.path(), "other", 1), stolen])
        .status();
    assert!(copied.unwrap().success());
    let refused = store.open_for("me", id(1)).unwrap_err();
    assert!(
        chain(&refused).contains("account `other`"),
        "{}",
        chain(&refused)
    );
    // The platform's own is everybody's.
    assert_holds(&store.open_for("me", id(2)).unwrap(), &[2], &Keys::new()).unwrap();
    let meta = described("me", 4, Some((PUBLIC_ACCOUNT, 2)));
    try_make(&store, order(meta, None)).unwrap();
    assert_holds(&store.open_for("me", id(4)).unwrap(), &[2, 4], &Keys::new()).unwrap();
    let refused = store.open_for("other", id(4)).unwrap_err();
    assert!(matches!(refused, StoreError::Missing(_)), "{refused}");
}

#[test]
fn a_header_that_continues_another_accounts_snapshot_is_refused() {
    let (folder, store) = store();
    make(&store, "other", 1, None);
    make(&store, PUBLIC_ACCOUNT, 2, None);
    try_make(
        &store,
        order(described("me", 3, Some((PUBLIC_ACCOUNT, 2))), None),
    )
    .unwrap();
    // As whoever could write there would have it, hash and all.
    let path = place(folder.path(), "me", 3).join("header.json");
    let text = fs::read_to_string(&path).unwrap();
    let forged = text.lines().next().unwrap().replace(
        &format!("\"account\":\"public\",\"id\":\"{}\"", id(2)),
        &format!("\"account\":\"other\",\"id\":\"{}\"", id(1)),
    ) + "\n";
    assert_ne!(forged, text);
    fs::write(
        &path,
        format!("{forged}\"{}\"\n", Hash::of(forged.as_bytes())),
    )
    .unwrap();
    let refused = store.open_for("me", id(3)).unwrap_err();
    assert!(chain(&refused).contains("continues a snapshot of account `other`"));
}

#[test]
fn names_that_could_leave_the_folder_are_no_accounts() {
    let (_folder, store) = store();
    for account in [
        "",
        "..",
        ".staging",
        "a/b",
        "A",
        "me.",
        "1me",
        &"a".repeat(41),
    ] {
        let refused = store
            .stage(order(described(account, 1, None), None))
            .unwrap_err();
        assert!(matches!(refused, StoreError::Account(_)), "{refused}");
        assert!(matches!(store.list(account), Err(StoreError::Account(_))));
    }
}

fn flip(path: &Path, at: u64) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 4], at).unwrap();
}

#[test]
fn flipped_byte_is_named() {
    for is_sealed in [false, true] {
        let (folder, store) = store();
        let keys = if is_sealed {
            keys(&[1, 2])
        } else {
            Keys::new()
        };
        if is_sealed {
            make_sealed(&store, 1, None);
            make_sealed(&store, 2, Some(1));
        } else {
            make(&store, "me", 1, None);
            make(&store, "me", 2, Some(1));
        }
        let whole = |store: &SnapshotStore| -> Result<(), StoreError> {
            assert_holds(&store.open_for("me", id(2))?, &[1, 2], &keys)
        };
        // Found whole once: damage that comes later must not be believed away.
        whole(&store).unwrap();
        for n in [1, 2] {
            for (name, said) in [
                ("header.json", "its header is damaged"),
                ("memory.index", "the index of its memory is damaged"),
                ("memory.pages", "memory chunk"),
                ("state", "its device state is damaged"),
                ("disk.0", "of disk layer 0 is damaged"),
                ("disk.0.index", "the index of disk layer 0 is damaged"),
            ] {
                // The state of what is continued is nobody's way to start.
                if n == 1 && name == "state" {
                    continue;
                }
                let path = place(folder.path(), "me", n).join(name);
                let length = fs::metadata(&path).unwrap().len();
                for at in [0, length / 7, length / 2, length - 1] {
                    flip(&path, at);
                    let refused = whole(&store).unwrap_err();
                    let told = chain(&refused);
                    let named = format!("snapshot {} cannot be used", id(n));
                    assert!(told.contains(&named), "{name} {at}: {told}");
                    assert!(told.contains(said), "{name} {at}: {told}");
                    flip(&path, at);
                }
                let bytes = fs::read(&path).unwrap();
                fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
                assert!(
                    matches!(whole(&store), Err(StoreError::Damaged { .. })),
                    "{name}"
                );
                fs::write(&path, [&bytes[..], &[0]].concat()).unwrap();
                assert!(
                    matches!(whole(&store), Err(StoreError::Damaged { .. })),
                    "{name}"
                );
                fs::remove_file(&path).unwrap();
                let told = chain(&whole(&store).unwrap_err());
                assert!(
                    told.contains(&format!("its file `{name}` is missing")),
                    "{told}"
                );
                fs::write(&path, &bytes).unwrap();
            }
        }
        whole(&store).unwrap();
        let path = place(folder.path(), "me", 1).join("memory.pages");
        flip(&path, 3);
        let told = chain(&whole(&store).unwrap_err());
        assert!(told.contains("memory chunk 0 is damaged"), "{told}");
    }
}

#[test]
fn a_file_is_hashed_once_and_again_when_it_changed() {
    let (folder, store) = store();
    make(&store, "me", 1, None);
    let memory = |store: &SnapshotStore| store.open_for("me", id(1)).unwrap().memory(&Keys::new());
    memory(&store).unwrap();
    let path = place(folder.path(), "me", 1).join("memory.pages");
    flip(&path, 3);
    memory(&store).unwrap_err();
    // The record is told that the damaged file is whole: nobody looks again, nor does the next
    // daemon of this boot.
    let proof = store.header("me", id(1)).unwrap().memory.index;
    let stamp = Stamp::of(&File::open(&path).unwrap(), proof).unwrap();
    let name = format!("me/{}/memory.pages", id(1));
    store.inner.verified.remember(&name, stamp, &Later);
    memory(&store).unwrap();
    drop(store);
    let store = open(folder.path(), Arc::new(NoStorePoints));
    memory(&store).unwrap();
    // After a boot there is no record.
    fs::remove_file(folder.path().join("verified.json")).unwrap();
    let store = open(folder.path(), Arc::new(NoStorePoints));
    memory(&store).unwrap_err();
}

#[test]
fn a_file_that_changed_just_now_is_not_remembered() {
    let folder = tempfile::tempdir().unwrap();
    let settings = Settings {
        folder: folder.path().join("snapshots"),
        runtime: folder.path().to_path_buf(),
        clock: Arc::new(HostClock),
        points: Arc::new(NoStorePoints),
    };
    let store = SnapshotStore::open(settings).unwrap();
    make(&store, "me", 1, None);
    assert_holds(&store.open_for("me", id(1)).unwrap(), &[1], &Keys::new()).unwrap();
    assert!(!folder.path().join("verified.json").exists());
}

#[test]
fn what_others_continue_is_removed_after_them_or_not_at_all() {
    let (folder, store) = store();
    make(&store, "me", 1, None);
    make(&store, "me", 2, Some(1));
    make(&store, "me", 3, Some(2));
    make(&store, "me", 4, None);
    let refused = remove(&store, 1, Cascade::Refuse).unwrap_err();
    assert!(
        matches!(&refused, StoreError::Dependents { children, .. } if children == &[id(2)]),
        "{refused}"
    );
    let used = store.remove(Removal {
        account: "me",
        id: id(1),
        cascade: Cascade::Remove,
        in_use: &BTreeSet::from([id(3)]),
    });
    assert!(matches!(used, Err(StoreError::InUse(of)) if of == id(3)));
    let below = described("me", 5, Some(("me", 3)));
    let staged = store.stage(order(below, None)).unwrap();
    let refused = remove(&store, 1, Cascade::Remove).unwrap_err();
    assert!(
        matches!(refused, StoreError::Busy(of) if of == id(3)),
        "{refused}"
    );
    drop(staged);
    assert_eq!(ids(&store).len(), 4);
    assert_eq!(
        remove(&store, 1, Cascade::Remove).unwrap(),
        [id(3), id(2), id(1)]
    );
    assert_eq!(ids(&store), [id(4)]);
    assert_eq!(remove(&store, 4, Cascade::Refuse).unwrap(), [id(4)]);
    assert!(matches!(
        remove(&store, 4, Cascade::Refuse),
        Err(StoreError::Missing(_))
    ));
    assert!(staging_is_empty(folder.path()) && !folder.path().join("snapshots/me").exists());
}

#[test]
fn an_open_snapshot_stays_what_it_was() {
    let (_folder, store) = store();
    make(&store, "me", 1, None);
    make(&store, "me", 2, Some(1));
    let opened = store.open_for("me", id(2)).unwrap();
    remove(&store, 1, Cascade::Remove).unwrap();
    assert_holds(&opened, &[1, 2], &Keys::new()).unwrap();
}

#[test]
fn a_parent_that_was_deleted_by_hand_is_named() {
    let (folder, store) = store();
    make(&store, "me", 1, None);
    make(&store, "me", 2, Some(1));
    fs::remove_dir_all(place(folder.path(), "me", 1)).unwrap();
    let told = chain(&store.open_for("me", id(2)).unwrap_err());
    assert!(
        told.contains(&format!("snapshot {}, is missing", id(1))),
        "{told}"
    );
    let below = described("me", 3, Some(("me", 2)));
    assert!(matches!(
        store.stage(order(below, None)),
        Err(StoreError::Damaged { .. })
    ));
    remove(&store, 2, Cascade::Refuse).unwrap();
}

#[test]
fn a_damaged_snapshot_is_listed_and_can_be_removed() {
    let (folder, store) = store();
    make(&store, "me", 1, None);
    make(&store, "me", 2, None);
    flip(&place(folder.path(), "me", 1).join("header.json"), 5);
    let info = store.info("me", id(1)).unwrap();
    assert!(info.meta.is_none() && info.damage.unwrap().contains("header is damaged"));
    assert!(store.info("me", id(2)).unwrap().damage.is_none());
    remove(&store, 1, Cascade::Refuse).unwrap();
    assert_eq!(ids(&store), [id(2)]);
}

#[test]
fn a_collection_keeps_roots_their_ancestors_and_what_is_young() {
    let (_folder, store) = store();
    for (n, parent) in [(1, None), (2, Some(1)), (3, Some(2)), (4, Some(1))] {
        make(&store, "me", n, parent);
    }
    let mut young = described("me", 5, None);
    young.made_at_s += 1000;
    try_make(&store, order(young, None)).unwrap();
    let before = meta("me", id(0)).made_at_s + 1;
    let collect = |roots: &[u8], mode| {
        let roots = roots.iter().map(|n| id(*n)).collect();
        let found = store.gc(&roots, before, mode).unwrap();
        found.into_iter().map(|info| info.id).collect::<Vec<_>>()
    };
    assert_eq!(collect(&[2], GcMode::DryRun), [id(3), id(4)]);
    assert_eq!(ids(&store).len(), 5);
    // One that is being made keeps what it continues.
    let below = described("me", 6, Some(("me", 4)));
    let staged = store.stage(order(below, None)).unwrap();
    assert_eq!(collect(&[2], GcMode::DryRun), [id(3)]);
    drop(staged);
    assert_eq!(collect(&[2], GcMode::Remove), [id(3), id(4)]);
    assert_eq!(ids(&store), [id(1), id(2), id(5)]);
    assert_eq!(collect(&[], GcMode::Remove), [id(2), id(1)]);
    assert_eq!(ids(&store), [id(5)]);
}

#[test]
fn an_account_keeps_to_its_quota() {
    let (folder, store) = store();
    make(&store, "me", 1, None);
    make(&store, "other", 9, None);
    let used = store.usage_bytes("me").unwrap();
    assert_eq!(used, store.info("me", id(1)).unwrap().bytes);
    let with = |n, estimate_bytes, quota_bytes| Order {
        meta: described("me", n, None),
        key: None,
        estimate_bytes,
        quota_bytes,
    };
    let refused = store.stage(with(2, 1000, used)).unwrap_err();
    assert!(matches!(refused, StoreError::Quota { bytes, .. } if bytes == used + 1000));
    assert!(
        refused.to_string().contains("spore snapshot rm"),
        "{refused}"
    );
    // What others of the account are about to take counts; what it takes in the end, too.
    let held = store.stage(with(2, 10 * used, 20 * used)).unwrap();
    assert!(matches!(
        store.stage(with(3, 10 * used, 20 * used)),
        Err(StoreError::Quota { .. })
    ));
    drop(held);
    let refused = try_make(&store, with(3, 0, used + 100)).unwrap_err();
    assert!(matches!(refused, StoreError::Quota { .. }), "{refused}");
    assert!(staging_is_empty(folder.path()));
    assert_eq!(store.usage_bytes("me").unwrap(), used);
    try_make(&store, with(3, used, 2 * used)).unwrap();
}

#[test]
fn secrets_are_encrypted_and_stay_so_in_what_continues_them() {
    let (_folder, store) = store();
    let mut secret = described("me", 1, None);
    secret.holds_secrets = true;
    let refused = store.stage(order(secret.clone(), None)).unwrap_err();
    assert!(matches!(refused, StoreError::Unprotected(_)), "{refused}");
    try_make(&store, order(secret, Some(key(1)))).unwrap();
    let mut below = described("me", 2, Some(("me", 1)));
    for (holds_secrets, key) in [(false, None), (true, None), (false, Some(key(2)))] {
        below.holds_secrets = holds_secrets;
        let refused = store.stage(order(below.clone(), key)).unwrap_err();
        assert!(matches!(refused, StoreError::Unprotected(_)), "{refused}");
    }
    below.holds_secrets = true;
    try_make(&store, order(below, Some(key(2)))).unwrap();
    // Encrypted without secrets, as a suspended VM is: what continues it is encrypted, too.
    make_sealed(&store, 3, None);
    let below = described("me", 4, Some(("me", 3)));
    assert!(matches!(
        store.stage(order(below, None)),
        Err(StoreError::Unprotected(_))
    ));
}

#[test]
fn ids_are_used_once_and_memories_keep_their_size() {
    let (_folder, store) = store();
    make(&store, "other", 1, None);
    let refused = store
        .stage(order(described("me", 1, None), None))
        .unwrap_err();
    assert!(matches!(refused, StoreError::Exists(_)), "{refused}");
    let staged = store.stage(order(described("me", 2, None), None)).unwrap();
    let refused = store
        .stage(order(described("me", 2, None), None))
        .unwrap_err();
    assert!(matches!(refused, StoreError::Busy(_)), "{refused}");
    let refused = staged.seal().unwrap_err();
    assert!(matches!(refused, StoreError::Unfinished(_)), "{refused}");
    let mut other = described("other", 3, Some(("other", 1)));
    other.resources.memory_mib = 2;
    let refused = store.stage(order(other, None)).unwrap_err();
    assert!(
        matches!(
            refused,
            StoreError::MemorySize {
                found: 2,
                expected: 1,
                ..
            }
        ),
        "{refused}"
    );
    assert_eq!(ids(&store), [id(1)]);
}

#[test]
fn lineages_and_disks_have_a_most_depth() {
    let (_folder, store) = store();
    let mut parent = None;
    for n in 0..=u8::try_from(DEPTH_MAX).unwrap() {
        let meta = described("me", n, parent.map(|parent| ("me", parent)));
        let mut staged = store.stage(order(meta, None)).unwrap();
        staged.state(&[n][..]).unwrap();
        let frozen = tempfile::tempfile().unwrap();
        let layer = FrozenLayer {
            file: &frozen,
            format: "qcow2",
            key: None,
        };
        if n == 0 || usize::from(n) % DISK_LAYERS_MAX > 0 {
            staged.disk(&layer, DiskBacking::Parent).unwrap();
        } else {
            let refused = staged.disk(&layer, DiskBacking::Parent).unwrap_err();
            assert!(matches!(refused, StoreError::DiskLayers(_)), "{refused}");
            // The VM merged its disk: what is below is not its any more.
            staged.disk(&layer, DiskBacking::Empty).unwrap();
        }
        staged.seal().unwrap();
        parent = Some(n);
    }
    let deepest = parent.unwrap();
    let opened = store.open_for("me", id(deepest)).unwrap();
    assert_eq!(opened.disks(&Keys::new()).unwrap().len(), 1);
    assert_eq!(opened.depth(), DEPTH_MAX);
    opened.memory(&Keys::new()).unwrap();
    let below = || order(described("me", 200, Some(("me", deepest))), None);
    let refused = store.stage(below()).unwrap_err();
    assert!(matches!(refused, StoreError::Depth { parent } if parent == id(deepest)));
    store
        .compact("me", id(deepest), &Keys::new(), PLENTY)
        .unwrap();
    store.stage(below()).unwrap();
}

#[test]
fn a_compacted_snapshot_stands_alone_and_those_above_notice_nothing() {
    for is_sealed in [false, true] {
        let (folder, store) = store();
        let keys = if is_sealed {
            keys(&[2, 3, 4])
        } else {
            Keys::new()
        };
        make(&store, "me", 1, None);
        for n in 2..5 {
            if is_sealed {
                make_sealed(&store, n, Some(n - 1));
            } else {
                make(&store, "me", n, Some(n - 1));
            }
        }
        let before = store.open_for("me", id(3)).unwrap();
        let header = store.compact("me", id(3), &keys, PLENTY).unwrap();
        assert!(header.meta.parent.is_none());
        assert_eq!(header.disk.unwrap().layers.len(), 3);
        assert!(staging_is_empty(folder.path()));
        // Again is nothing to do, and what was open is what it was.
        store.compact("me", id(3), &keys, 0).unwrap();
        assert_holds(&before, &[1, 2, 3], &keys).unwrap();
        let whole = |n: u8, of: &[u8], store: &SnapshotStore| {
            assert_holds(&store.open_for("me", id(n)).unwrap(), of, &keys).unwrap();
        };
        whole(3, &[1, 2, 3], &store);
        whole(4, &[1, 2, 3, 4], &store);
        assert_eq!(store.info("me", id(4)).unwrap().depth, 1);
        remove(&store, 1, Cascade::Remove).unwrap();
        let store = open(folder.path(), Arc::new(NoStorePoints));
        whole(3, &[1, 2, 3], &store);
        whole(4, &[1, 2, 3, 4], &store);
        // Its own key is enough: those of what it was made of are not needed any more.
        let own = keys.into_iter().filter(|(of, _key)| *of == id(3)).collect();
        assert_holds(&store.open_for("me", id(3)).unwrap(), &[1, 2, 3], &own).unwrap();
    }
}

#[test]
fn a_compaction_that_fails_leaves_the_snapshot_as_it_was() {
    let (folder, store) = store();
    make(&store, "me", 1, None);
    make(&store, "me", 2, Some(1));
    let used = store.usage_bytes("me").unwrap();
    let refused = store.compact("me", id(2), &Keys::new(), used).unwrap_err();
    assert!(matches!(refused, StoreError::Quota { .. }), "{refused}");
    flip(&place(folder.path(), "me", 1).join("memory.pages"), 0);
    let refused = store
        .compact("me", id(2), &Keys::new(), PLENTY)
        .unwrap_err();
    assert!(matches!(refused, StoreError::Damaged { .. }), "{refused}");
    flip(&place(folder.path(), "me", 1).join("memory.pages"), 0);
    assert!(staging_is_empty(folder.path()));
    assert_holds(&store.open_for("me", id(2)).unwrap(), &[1, 2], &Keys::new()).unwrap();
}

#[test]
fn a_compacted_parent_is_the_same_for_a_compaction_that_is_under_way() {
    let (_folder, store) = store();
    make(&store, "me", 1, None);
    make(&store, "me", 2, Some(1));
    make(&store, "me", 3, Some(2));
    let opened = store.open_for("me", id(3)).unwrap();
    store.compact("me", id(2), &Keys::new(), PLENTY).unwrap();
    // In its new folder, snapshot 2 has another file of each name.
    let meta = described("me", 4, None);
    let mut staged = store.stage(order(meta, None)).unwrap();
    staged.image(&opened.memory(&Keys::new()).unwrap()).unwrap();
    staged.state(&[3; 300][..]).unwrap();
    for layer in opened.disks(&Keys::new()).unwrap() {
        staged.link_disk(&layer).unwrap();
    }
    staged.seal().unwrap();
    assert_holds(
        &store.open_for("me", id(4)).unwrap(),
        &[1, 2, 3],
        &Keys::new(),
    )
    .unwrap();
}

#[test]
fn what_was_encrypted_is_not_believed_in_clear() {
    let (folder, store) = store();
    make_sealed(&store, 1, None);
    let (with_key, sealed) = (keys(&[1]), place(folder.path(), "me", 1));
    fs::rename(&sealed, folder.path().join("sealed")).unwrap();
    make(&store, "me", 1, None);
    let opened = store.open_for("me", id(1)).unwrap();
    for refused in [
        opened.memory(&with_key).map(drop),
        opened.state(&with_key).map(drop),
    ] {
        assert!(
            matches!(refused, Err(StoreError::Damaged { .. })),
            "{refused:?}"
        );
    }
    assert!(matches!(
        opened.disks(&with_key),
        Err(StoreError::Damaged { .. })
    ));
}

#[test]
fn one_vm_goes_on_from_a_suspended_one() {
    let (folder, store) = store();
    make(&store, "me", 1, None);
    let mut suspended = described("me", 2, Some(("me", 1)));
    suspended.kind = SnapshotKind::Suspend;
    try_make(&store, order(suspended, None)).unwrap();
    let vms = [1, 2].map(|n| VmId::from_bytes([n; 16]));
    assert_eq!(store.claimed_by("me", id(2)).unwrap(), None);
    store.claim("me", id(2), vms[0]).unwrap();
    store.claim("me", id(2), vms[0]).unwrap();
    let refused = store.claim("me", id(2), vms[1]).unwrap_err();
    assert!(
        matches!(refused, StoreError::Claimed { by, .. } if by == vms[0]),
        "{refused}"
    );
    store.give_up_claim("me", id(2), vms[1]).unwrap();
    let refused = store
        .compact("me", id(2), &Keys::new(), PLENTY)
        .unwrap_err();
    assert!(matches!(refused, StoreError::InUse(_)), "{refused}");
    let store = open(folder.path(), Arc::new(NoStorePoints));
    assert_eq!(store.claimed_by("me", id(2)).unwrap(), Some(vms[0]));
    assert_holds(&store.open_for("me", id(2)).unwrap(), &[1, 2], &Keys::new()).unwrap();
    let claim = place(folder.path(), "me", 2).join("claimed-by");
    for torn in [&b""[..], b"aeaqcai", b"\xff"] {
        fs::write(&claim, torn).unwrap();
        let refused = store.claim("me", id(2), vms[1]).unwrap_err();
        assert!(matches!(refused, StoreError::Damaged { .. }), "{refused}");
    }
    fs::write(&claim, vms[0].to_string()).unwrap();
    store.give_up_claim("me", id(2), vms[0]).unwrap();
    store.claim("me", id(2), vms[1]).unwrap();
    for (account, n) in [("other", 2), ("me", 3)] {
        let refused = store.claim(account, id(n), vms[1]).unwrap_err();
        assert!(matches!(refused, StoreError::Missing(_)), "{refused}");
    }
    remove(&store, 2, Cascade::Refuse).unwrap();
    assert!(staging_is_empty(folder.path()));
}

#[test]
fn whenever_a_daemon_dies_while_it_claims_a_snapshot_the_next_one_can() {
    let contents = Contents::from([(id(1), vec![1])]);
    let seen = kill_anywhere(
        2,
        &contents,
        |store| make(store, "me", 1, None),
        |store| {
            let vm = VmId::from_bytes([7; 16]);
            store.claim("me", id(1), vm).unwrap();
            assert_eq!(store.claimed_by("me", id(1)).unwrap(), Some(vm));
        },
    );
    assert!(seen.iter().all(|ids| ids.len() == 1));
}

#[test]
fn images_of_snapshots_are_needed() {
    let (_folder, store) = store();
    make(&store, "me", 1, None);
    let mut meta = described("other", 2, None);
    meta.image = ImageId::from_hash([8; 32]);
    meta.folder = Some(ImageId::from_hash([9; 32]));
    try_make(&store, order(meta, None)).unwrap();
    let expected = [3, 8, 9].map(|n| ImageId::from_hash([n; 32]));
    assert_eq!(store.images().unwrap(), BTreeSet::from(expected));
}

#[tokio::test]
async fn a_memory_comes_from_the_cache_and_damage_is_told_through_it() {
    let (folder, store) = store();
    make(&store, "me", 1, None);
    let cache = MemoryCache::new(1 << 20);
    let ask = || {
        let opened = store.open_for("me", id(1)).unwrap();
        cache.get_or_build(id(1), 1 << 20, move || opened.memory(&Keys::new()))
    };
    let first = ask().await.unwrap();
    flip(&place(folder.path(), "me", 1).join("memory.pages"), 0);
    assert!(Arc::ptr_eq(&first, &ask().await.unwrap()));
    drop(first);
    cache.forget(id(1));
    let told = chain(&ask().await.unwrap_err());
    assert!(told.contains("memory chunk 0 is damaged"), "{told}");
    assert_eq!(cache.status().bytes, 0);
}

/// What may come of work that others are in the way of.
fn is_in_the_way<T>(result: Result<T, StoreError>) {
    match result {
        Ok(_)
        | Err(
            StoreError::Missing(_)
            | StoreError::Exists(_)
            | StoreError::Busy(_)
            | StoreError::Dependents { .. },
        ) => {}
        Err(other) => panic!("{}", chain(&other)),
    }
}

#[test]
fn many_at_once_leave_every_snapshot_whole() {
    let (folder, store) = store();
    std::thread::scope(|scope| {
        for worker in 0..4_u8 {
            let store = &store;
            scope.spawn(move || {
                for step in 0..24_u8 {
                    // Each worker meets the others at another snapshot each time.
                    let n = 1 + (step * (2 * worker + 1) + worker) % 4;
                    let none = Keys::new();
                    match (step + worker) % 8 {
                        0 => is_in_the_way(remove(store, n, Cascade::Remove)),
                        1 => is_in_the_way(store.compact("me", id(n), &none, PLENTY)),
                        2 => is_in_the_way(remove(store, n, Cascade::Refuse)),
                        3 => is_in_the_way(store.open_for("me", id(n)).and_then(|opened| {
                            assert_holds(&opened, &(1..=n).collect::<Vec<_>>(), &none)
                        })),
                        _ => {
                            let parent = (n > 1).then(|| ("me", n - 1));
                            let meta = described("me", n, parent);
                            is_in_the_way(try_make(store, order(meta, None)));
                        }
                    }
                }
            });
        }
    });
    let contents = (1..5).map(|n| (id(n), (1..=n).collect())).collect();
    assert!(staging_is_empty(folder.path()));
    for found in assert_whole(folder.path(), &contents) {
        remove(&store, found.as_bytes()[0], Cascade::Remove).map_or_else(
            |error| assert!(matches!(error, StoreError::Missing(_)), "{error}"),
            |removed| assert!(!removed.is_empty()),
        );
    }
    assert!(ids(&store).is_empty());
}

#[test]
fn what_is_not_sealed_leaves_nothing() {
    let (folder, store) = store();
    let mut staged = store.stage(order(described("me", 1, None), None)).unwrap();
    fill(&mut staged, 1).unwrap();
    drop(staged);
    assert!(staging_is_empty(folder.path()) && ids(&store).is_empty());
    make(&store, "me", 1, None);
}

/// Kills the process after so many steps.
#[derive(Debug)]
struct DieAt {
    left: AtomicU32,
}

impl StorePoints for DieAt {
    fn reached(&self, _id: SnapshotId, _point: StorePoint) {
        if self.left.fetch_sub(1, Ordering::SeqCst) == 0 {
            kill_process(getpid(), Signal::KILL).unwrap();
        }
    }
}

/// Does `work` on the store of `folder` in a process that dies after `steps` steps; whether it did.
fn dies(folder: &Path, steps: u32, work: impl Fn(&SnapshotStore)) -> bool {
    let ended = in_child(|| {
        let left = AtomicU32::new(steps);
        work(&open(folder, Arc::new(DieAt { left })));
        0
    });
    assert!(
        ended.signal() == Some(9) || ended.code() == Some(0),
        "{ended}"
    );
    ended.signal().is_some()
}

/// What each snapshot is made of, the lowest first.
type Contents = BTreeMap<SnapshotId, Vec<u8>>;

/// Opens the store as the next daemon does: nothing is staged, and all that is there is whole.
fn assert_whole(folder: &Path, contents: &Contents) -> Vec<SnapshotId> {
    let store = open(folder, Arc::new(NoStorePoints));
    assert!(staging_is_empty(folder));
    let found = ids(&store);
    for id in &found {
        let opened = store.open_for("me", *id).unwrap();
        assert_holds(&opened, &contents[id], &Keys::new()).unwrap();
    }
    found
}

/// Kills `work` after every step it has, each time on a new store that `before` made; what was
/// there afterwards, step by step. At least `steps` of them.
fn kill_anywhere(
    steps: usize,
    contents: &Contents,
    before: impl Fn(&SnapshotStore),
    work: impl Fn(&SnapshotStore),
) -> Vec<Vec<SnapshotId>> {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path(), Arc::new(NoStorePoints));
    before(&store);
    work(&store);
    let done = Some(ids(&store));
    let mut seen = Vec::new();
    loop {
        let folder = tempfile::tempdir().unwrap();
        before(&open(folder.path(), Arc::new(NoStorePoints)));
        let died = dies(folder.path(), u32::try_from(seen.len()).unwrap(), &work);
        seen.push(assert_whole(folder.path(), contents));
        if !died {
            assert!(seen.len() > steps, "only {} steps", seen.len());
            return seen;
        }
        // The next daemon does the same work on what was left.
        work(&open(folder.path(), Arc::new(NoStorePoints)));
        let last = assert_whole(folder.path(), contents);
        assert_eq!(Some(&last), done.as_ref());
    }
}

/// Snapshots 1 to 3, each continuing the one before it.
fn three() -> (Contents, impl Fn(&SnapshotStore)) {
    let contents = (1..4).map(|n| (id(n), (1..=n).collect())).collect();
    let before = |store: &SnapshotStore| {
        make(store, "me", 1, None);
        make(store, "me", 2, Some(1));
        make(store, "me", 3, Some(2));
    };
    (contents, before)
}

#[test]
fn whenever_a_daemon_dies_while_it_makes_a_snapshot_that_is_whole_or_absent() {
    let (contents, _three) = three();
    let seen = kill_anywhere(
        8,
        &contents,
        |store| make(store, "me", 1, None),
        |store| {
            let meta = described("me", 2, Some(("me", 1)));
            match try_make(store, order(meta, None)) {
                Ok(()) | Err(StoreError::Exists(_)) => {}
                Err(other) => panic!("{other}"),
            }
        },
    );
    let is_there: Vec<bool> = seen.iter().map(|ids| ids.len() == 2).collect();
    assert!(is_there.is_sorted() && !is_there[0] && is_there[is_there.len() - 1]);
}

#[test]
fn whenever_a_daemon_dies_while_it_removes_a_lineage_what_is_left_is_whole() {
    let (contents, before) = three();
    let seen = kill_anywhere(6, &contents, before, |store| {
        match remove(store, 1, Cascade::Remove) {
            Ok(_) | Err(StoreError::Missing(_)) => {}
            Err(other) => panic!("{other}"),
        }
    });
    let left: Vec<usize> = seen.iter().map(Vec::len).collect();
    assert_eq!(left, [2, 1, 0, 0, 0, 0, 0]);
}

#[test]
fn whenever_a_daemon_dies_while_it_compacts_a_snapshot_that_is_the_same() {
    let (contents, before) = three();
    let seen = kill_anywhere(10, &contents, before, |store| {
        store.compact("me", id(2), &Keys::new(), PLENTY).unwrap();
    });
    assert!(seen.iter().all(|ids| ids.len() == 3));
}

/// A disk of its own, as large as that; taken away when dropped.
struct SmallDisk {
    folder: tempfile::TempDir,
}

impl SmallDisk {
    fn new(kib: u32) -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            println!("SKIPPED: mounting a small disk needs root");
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        let options = std::ffi::CString::new(format!("size={kib}k")).unwrap();
        let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
        mount("tmpfs", folder.path(), "tmpfs", flags, options.as_c_str()).unwrap();
        Some(Self { folder })
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        unmount(self.folder.path(), UnmountFlags::DETACH).unwrap();
    }
}

#[test]
fn a_full_disk_is_named_with_its_remedy_and_nothing_is_left_of_what_did_not_fit() {
    let Some(disk) = SmallDisk::new(400) else {
        return;
    };
    let folder = disk.folder.path();
    let store = open(folder, Arc::new(NoStorePoints));
    make(&store, "me", 1, None);
    let used = store.usage_bytes("me").unwrap();
    let filler = File::create(folder.join("filler")).unwrap();
    let mut failed = 0;
    // Ever less room, so that each file in turn is the one that does not fit.
    for kib in 0.. {
        let grown = filler.write_all_at(&[1; 1024], kib * 1024);
        let below = described("me", 2, Some(("me", 1)));
        match try_make(&store, order(below, None)) {
            Ok(()) => drop(remove(&store, 2, Cascade::Refuse).unwrap()),
            Err(error @ StoreError::DiskFull { .. }) => {
                assert!(error.to_string().contains("spore snapshot gc"), "{error}");
                failed += 1;
            }
            Err(other) => panic!("{}", chain(&other)),
        }
        assert!(staging_is_empty(folder));
        assert_eq!(store.usage_bytes("me").unwrap(), used);
        if grown.is_err() {
            break;
        }
    }
    assert!(failed > 20, "{failed}");
    assert_holds(&store.open_for("me", id(1)).unwrap(), &[1], &Keys::new()).unwrap();
    let much = Order {
        estimate_bytes: 1 << 30,
        ..order(described("me", 3, None), None)
    };
    assert!(matches!(
        store.stage(much),
        Err(StoreError::DiskFull { .. })
    ));
    filler.set_len(0).unwrap();
    make(&store, "me", 2, Some(1));
}
