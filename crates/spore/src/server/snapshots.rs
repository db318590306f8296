//! Control's snapshots, made of the node's: taken, removed, and why not.
//!
//! Called by `host.rs`, which serves control; translates, and decides nothing.

use spore_control::nodes::{
    Dependents, NodesError, Removal, SnapshotKeys, TakeSnapshot, TakenSnapshot,
};
use spore_node::node::Node;
use spore_node::snapshot::key::{Keys, SnapshotKey};
use spore_node::snapshot::{Cascade, StoreError};
use spore_node::snapshots::SnapshotsError;
use spore_node::take::{Take, TakeError, Taken};
use spore_wire::cause::chain;
use spore_wire::id::SnapshotId;
use spore_wire::secret::SecretBytes;
use spore_wire::snapshot::SnapshotKind;

/// Takes a snapshot of a VM that goes on.
pub(super) async fn checkpoint(
    node: &Node,
    take: TakeSnapshot,
) -> Result<TakenSnapshot, NodesError> {
    taken(node, take, SnapshotKind::Checkpoint).await
}

/// Takes one of a VM that ends for it.
pub(super) async fn suspend(node: &Node, take: TakeSnapshot) -> Result<(), NodesError> {
    taken(node, take, SnapshotKind::Suspend).await.map(drop)
}

async fn taken(
    node: &Node,
    take: TakeSnapshot,
    kind: SnapshotKind,
) -> Result<TakenSnapshot, NodesError> {
    let TakeSnapshot {
        vm,
        id,
        key,
        made_at_s,
    } = take;
    let take = Take {
        id,
        kind,
        key: key.map(|key| read_key(id, &key)).transpose()?,
        made_at_s,
    };
    let taken = node.take(vm, take).await;
    let Taken {
        info,
        frozen,
        pause,
    } = taken.map_err(|error| take_error(&error))?;
    Ok(TakenSnapshot {
        info,
        pause,
        frozen,
    })
}

/// Removes a snapshot.
pub(super) async fn remove(node: &Node, removal: Removal) -> Result<Vec<SnapshotId>, NodesError> {
    let cascade = match removal.dependents {
        Dependents::Keep => Cascade::Refuse,
        Dependents::Remove => Cascade::Remove,
    };
    let snapshots = node.snapshots();
    let removed = snapshots.remove(&removal.account, removal.id, cascade, removal.in_use);
    removed.await.map_err(error)
}

/// The keys as the node has them.
pub(super) fn keys(keys: &SnapshotKeys) -> Result<Keys, NodesError> {
    let read = |(id, key): &(SnapshotId, SecretBytes)| Ok((*id, read_key(*id, key)?));
    keys.iter().map(read).collect()
}

fn read_key(id: SnapshotId, key: &SecretBytes) -> Result<SnapshotKey, NodesError> {
    SnapshotKey::from_slice(key.expose()).ok_or_else(|| NodesError::Failed {
        message: format!("the key of snapshot {id} has not the length of one"),
    })
}

/// Why the node did not do something about snapshots.
#[expect(
    clippy::needless_pass_by_value,
    reason = "it stands where a failure is mapped"
)]
pub(super) fn error(error: SnapshotsError) -> NodesError {
    match &error {
        SnapshotsError::Store(error) => store_error(error),
        other => NodesError::Failed {
            message: chain(other),
        },
    }
}

fn take_error(error: &TakeError) -> NodesError {
    let message = chain(error);
    match error {
        TakeError::NoVm(vm) | TakeError::Ended(vm) => NodesError::NoVm { vm: *vm },
        TakeError::NotReady { .. }
        | TakeError::Busy(_)
        | TakeError::HoldsSecrets(_)
        | TakeError::Unsupported { .. } => NodesError::Conflict { message },
        TakeError::NoSpace(error) | TakeError::Store(error) => store_error(error),
        _ => NodesError::Failed { message },
    }
}

fn store_error(error: &StoreError) -> NodesError {
    let message = chain(error);
    match error {
        StoreError::Missing(_) => NodesError::NotFound { message },
        StoreError::Damaged { .. } | StoreError::NoKey(_) | StoreError::WrongKey(_) => {
            NodesError::Snapshot { message }
        }
        StoreError::Dependents { .. }
        | StoreError::InUse(_)
        | StoreError::Claimed { .. }
        | StoreError::Busy(_)
        | StoreError::Depth { .. }
        | StoreError::DiskLayers(_) => NodesError::Conflict { message },
        StoreError::Quota { .. } => NodesError::SnapshotQuota { message },
        StoreError::DiskFull { .. } => NodesError::DiskFull { message },
        _ => NodesError::Failed { message },
    }
}
