//! VMs that are suspended again and again: what each of their snapshots has to hold.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use spore_node::snapshot::key::SnapshotKey;
use spore_node::snapshot::{Cascade, NoStorePoints, StoreError};
use spore_node::snapshots::SnapshotsError;
use spore_node::take::Take;
use spore_wire::guest::WriteFile;
use spore_wire::id::{SnapshotId, VmId};
use spore_wire::node::{Source, StartVm};
use spore_wire::secret::SecretBytes;
use spore_wire::snapshot::{SnapshotInfo, SnapshotKind};
use tokio::time::timeout;

use crate::host::{HANG, TestHost, new_id};
use crate::kill_points::counter;
use crate::takes::{Daemon, new_snapshot, nothing_is_left};

/// More than a guest that is left alone changes, and less than what it was begun with.
const CANARY_BYTES: usize = 4 << 20;

const PAGE_BYTES: u64 = 4096;

/// Something of each page's own, which nothing else in the guest's memory is.
fn canary() -> Vec<u8> {
    (0..CANARY_BYTES / 16)
        .flat_map(|line| format!("canary {line:08}\n").into_bytes())
        .collect()
}

async fn remember(daemon: &Daemon, vm: VmId) {
    let file = WriteFile {
        path: "/tmp/canary".to_owned(),
        mode: 0o600,
        user: None,
    };
    let writer = daemon.node.write_file(vm, file).await.unwrap();
    for piece in canary().chunks(64 * 1024) {
        writer.send(piece).await.unwrap();
    }
    writer.finish().await.unwrap();
}

async fn remembered(daemon: &Daemon, vm: VmId) -> Vec<u8> {
    let path = "/tmp/canary".to_owned();
    let reader = daemon.node.read_file(vm, path).await.unwrap();
    let mut read = Vec::new();
    while let Some(bytes) = reader.next().await.unwrap() {
        read.extend(bytes);
    }
    read
}

/// What is on the disk of a VM that was suspended, and how long it stood still for it.
async fn suspend(daemon: &Daemon, vm: VmId, id: SnapshotId) -> (SnapshotInfo, Duration) {
    let take = Take {
        id,
        kind: SnapshotKind::Suspend,
        key: SnapshotKey::from_slice(&[7; 32]),
        made_at_s: 1_700_000_000,
    };
    let taken = timeout(HANG, daemon.node.take(vm, take)).await;
    let taken = taken.unwrap().unwrap();
    daemon.node.stopped(vm).await.unwrap();
    (taken.info, taken.frozen)
}

fn suspended(id: SnapshotId) -> StartVm {
    StartVm {
        source: Source::Suspended(id),
        keys: vec![(id, SecretBytes::new(vec![7; 32]))],
        ..counter(new_id())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_suspend_writes_what_differs_from_what_the_first_vm_was_forked_from() {
    let Some((host, machine)) = TestHost::with_agent() else {
        return;
    };
    let open = async || Daemon::open(&host, &machine.image, Arc::new(NoStorePoints)).await;
    let daemon = open().await;
    let source = new_id();
    daemon.ready(counter(source)).await;
    let base = new_snapshot();
    let whole = daemon.take(source, base).await.unwrap().info;
    daemon.stop(source).await;
    daemon.close().await;

    let mut daemon = open().await;
    let mut start = StartVm {
        source: Source::Snapshot(base),
        ..counter(new_id())
    };
    let mut vm = start.vm;
    daemon.ready(start).await;
    remember(&daemon, vm).await;
    let (token, mut count, _starts) = daemon.ask(vm).await;
    for round in 1..=4 {
        let id = new_snapshot();
        let (info, frozen) = suspend(&daemon, vm, id).await;
        println!(
            "suspend {round}: {} of {} pages, {} KiB on the disk, frozen {frozen:?}",
            info.memory_pages,
            whole.memory_pages,
            info.bytes / 1024
        );
        assert_eq!(info.depth, 1, "it continues the same as the first one did");
        assert!(
            info.memory_pages * PAGE_BYTES > CANARY_BYTES as u64,
            "{info:?}"
        );
        assert!(info.memory_pages * 2 < whole.memory_pages, "{info:?}");
        daemon.close().await;
        daemon = open().await;
        start = suspended(id);
        vm = start.vm;
        daemon.ready(start).await;
        count += 1;
        assert_eq!(daemon.ask(vm).await, (token.clone(), count, 1));
        assert!(remembered(&daemon, vm).await == canary(), "round {round}");
        // What it was forked from is needed as long as it runs, whatever daemon there is.
        let snapshots = daemon.node.snapshots();
        let removed = snapshots.remove("me", base, Cascade::Refuse, BTreeSet::new());
        assert!(matches!(
            removed.await,
            Err(SnapshotsError::Store(StoreError::InUse(_)))
        ));
    }
    daemon.stop(vm).await;
    daemon.close().await;
    nothing_is_left(&host);
}
