//! Taking a snapshot of a VM that runs: staged, captured, and sealed while the VM goes on.
//!
//! Called by control, for a checkpoint or at the end of a template's builder. Whatever can be
//! refused is refused before the VM stands still, and everything that takes time but the copy
//! itself comes after it runs again.

use core::time::Duration;
use std::collections::BTreeSet;
use std::fs::File;
use std::sync::Arc;

use spore_wire::cause::chain;
use spore_wire::generation::{GENERATION, GENERATION_FORKS};
use spore_wire::id::{SnapshotId, VmId};
use spore_wire::node::{Source, VmPhase};
use spore_wire::snapshot::{
    Shape, SnapshotApp, SnapshotInfo, SnapshotKind, SnapshotMeta, SnapshotParent,
};
use thiserror::Error;
use tokio::sync::oneshot;
use tokio::task;

use crate::disk::overlay::DiskKey;
use crate::hypervisor::fork::{Afterwards, Below, Capture, CaptureError, CapturedScratch, Turn};
use crate::hypervisor::memory_image::{CapturedMemory, MemoryImage};
use crate::journal::{Record, SecretsKept};
use crate::node::{Node, OpenError, VmError};
use crate::snapshot::ground::Ground;
use crate::snapshot::header::{DiskBacking, Header, Protection};
use crate::snapshot::key::SnapshotKey;
use crate::snapshot::staging::{FrozenLayer, Order, Staged};
use crate::snapshot::{Cascade, Removal, SnapshotStore, StoreError};
use crate::snapshots::{Snapshots, SnapshotsError, layer_format};
use crate::template::release_of;
use crate::vm::actor::{Access, Host, Taking, VmRequest};
use crate::vm::capture::What;
use crate::vm::state::Milestone;

/// A snapshot to be taken.
#[derive(Debug)]
pub struct Take {
    /// Chosen by control, never used before.
    pub id: SnapshotId,
    /// What it is for: a VM goes on behind a checkpoint, and ends with a template or when it is
    /// suspended.
    pub kind: SnapshotKind,
    /// What encrypts it. Needed when the VM, or what it began from, holds secrets, and of one that
    /// is suspended always.
    pub key: Option<SnapshotKey>,
    /// Seconds since the Unix epoch.
    pub made_at_s: u64,
}

/// A snapshot that was taken.
#[derive(Debug)]
pub struct Taken {
    /// What it is.
    pub info: SnapshotInfo,
    /// How long the tenant's processes stood still.
    pub frozen: Duration,
    /// Of it, how long the whole guest did.
    pub pause: Duration,
}

/// Why no snapshot was taken. A VM that goes on does so, unless it has ended.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TakeError {
    /// The node does not know it.
    #[error("this node has no VM {0}")]
    NoVm(VmId),
    /// It is not in a state for that.
    #[error("the VM {vm} is {phase:?}: wait until it is ready")]
    NotReady {
        /// Which.
        vm: VmId,
        /// Where it stands.
        phase: VmPhase,
    },
    /// Another snapshot of it is under way.
    #[error("a snapshot of the VM {0} is being taken: wait until it is done")]
    Busy(VmId),
    /// Secrets would be readable on the disk.
    #[error(
        "the VM {0} holds secrets, or began from a snapshot that does: its snapshot must be \
         encrypted, so give a key"
    )]
    HoldsSecrets(VmId),
    /// A VM that goes on from it holds what its visitors told it.
    #[error("the snapshot of a suspended VM must be encrypted, so give a key")]
    NoKey,
    /// The disk or the account's share of it is full.
    #[error("there is no room for the snapshot")]
    NoSpace(#[source] StoreError),
    /// This cannot be done here.
    #[error("no such snapshot can be taken of the VM {vm}: {reason}")]
    Unsupported {
        /// Which.
        vm: VmId,
        /// Why not.
        reason: &'static str,
    },
    /// The guest or its VMM did not do as it should.
    #[error("the VM {vm} could not be captured: {reason}")]
    Failed {
        /// Which.
        vm: VmId,
        /// What happened.
        reason: String,
    },
    /// The kernel gives no random bytes.
    #[error("the kernel gives no random bytes for a key")]
    Random(#[source] getrandom::Error),
    /// The VM ended meanwhile.
    #[error("the VM {0} ended before its snapshot was taken")]
    Ended(VmId),
    /// The store.
    #[error("cannot file the snapshot")]
    Store(#[source] StoreError),
    /// A worker thread ended.
    #[error("a worker thread ended")]
    Worker(#[source] task::JoinError),
}

impl From<StoreError> for TakeError {
    fn from(error: StoreError) -> Self {
        match error {
            error @ (StoreError::DiskFull { .. } | StoreError::Quota { .. }) => {
                Self::NoSpace(error)
            }
            error => Self::Store(error),
        }
    }
}

impl Node {
    /// Takes a snapshot of a ready VM. A checkpoint's VM stands still for a moment and goes on; a
    /// template's ends, and so does one that is suspended, once its snapshot is on the disk: if
    /// that fails, it goes on. The snapshot is whole and on the disk when this is done.
    ///
    /// # Errors
    /// [`TakeError`]; nothing is left of the snapshot then. Of a VM that was killed while it was
    /// being suspended, it may be filed all the same.
    pub async fn take(&self, vm: VmId, take: Take) -> Result<Taken, TakeError> {
        let access = self.ready(vm).map_err(|error| match error {
            VmError::NotReady { vm, phase } => TakeError::NotReady { vm, phase },
            _ => TakeError::NoVm(vm),
        })?;
        let afterwards = match take.kind {
            SnapshotKind::Checkpoint => Afterwards::GoesOn,
            SnapshotKind::Template => Afterwards::Ends,
            SnapshotKind::Suspend if take.key.is_none() => return Err(TakeError::NoKey),
            SnapshotKind::Suspend => Afterwards::Sleeps,
        };
        let _copy = match afterwards {
            Afterwards::GoesOn => self.snapshots().copy().await,
            Afterwards::Ends | Afterwards::Sleeps => None,
        };
        let key = match &take.key {
            Some(_) => Some(DiskKey::random().map_err(TakeError::Random)?),
            None => None,
        };
        let staged = self.stage(&access, take).await?;
        // Below the disk of a VM that continues nothing there may be files that are gone, and those
        // of a suspended one are.
        let went_on = matches!(access.record.start.source, Source::Suspended(_));
        let below = (went_on || !staged.continues()).then_some(Below::Nothing);
        let turn = access.vm.prepare_capture(key, below).await;
        let turn = turn.map_err(|error| failed(vm, error))?;
        let mut sealing = Some(Sealing {
            snapshots: self.snapshots().clone(),
            vm,
            staged,
            turn,
        });
        let into = match afterwards {
            Afterwards::Sleeps => sealing.take(),
            Afterwards::GoesOn | Afterwards::Ends => None,
        };
        let (answer, answered) = oneshot::channel();
        let taking = Box::new(Taking::new(vm, afterwards, into, answer));
        let actor = self.actor(vm).ok_or(TakeError::Ended(vm))?;
        let sent = actor.requests.send(VmRequest::Capture(taking)).await;
        sent.map_err(|_ended| TakeError::Ended(vm))?;
        let captured = answered.await.map_err(|_ended| TakeError::Ended(vm))??;
        let info = match (captured.what, sealing) {
            (What::Sealed(info), _) => *info,
            (What::Captured(capture), Some(sealing)) => sealing.seal(*capture).await?,
            (What::Captured(_), None) => return Err(TakeError::Ended(vm)),
        };
        Ok(Taken {
            info,
            frozen: captured.frozen,
            pause: captured.pause,
        })
    }

    /// Everything that can be refused before the VM stands still.
    async fn stage(&self, access: &Access, take: Take) -> Result<Staged, TakeError> {
        let vm = access.record.start.vm;
        let unsupported = |reason| TakeError::Unsupported { vm, reason };
        if !self.hypervisor().caps().snapshots {
            return Err(unsupported("this node's driver captures none"));
        }
        let hello = access.hello.borrow().as_ref().map(|hello| hello.generation);
        let agent_generation = hello.unwrap_or(GENERATION);
        if agent_generation < GENERATION_FORKS {
            return Err(unsupported("its agent is too old, start it anew"));
        }
        // Its memory, and what its VMM takes: about what has to be written.
        let stats = access.vm.stats().await;
        let estimate = stats.map_or(0, |stats| stats.memory_bytes);
        let facts = Facts {
            record: Arc::clone(&access.record),
            shape: self.hypervisor().shape(&access.record.machine),
            agent_generation,
            guest: self.hypervisor().caps().guest.clone(),
            estimate_bytes: estimate.min(access.record.start.resources.memory_bytes()),
            quota_bytes: self.snapshots().quota_bytes(),
        };
        let store = self.snapshots().store().clone();
        let staged = task::spawn_blocking(move || facts.stage(&store, take));
        staged.await.map_err(TakeError::Worker)?
    }
}

/// A VM that was being suspended when its daemon died has ended if its snapshot is whole: from now
/// on another one goes on from that. Else it goes on itself.
pub(crate) fn asleep(host: &Host, mut record: Record) -> Result<Record, OpenError> {
    let Some(id) = record.sealing else {
        return Ok(record);
    };
    let account = &record.start.owner.account;
    match host.snapshots.store().header(account, id) {
        Err(StoreError::Missing(_)) => {}
        Err(error @ StoreError::File { .. }) => {
            return Err(SnapshotsError::from(error).into());
        }
        // A damaged one was whole once.
        Ok(_) | Err(_) => {
            record.milestone = Milestone::EndingStopped;
            record.sealing = None;
            host.journal.write(&record)?;
        }
    }
    Ok(record)
}

/// What is known of a VM before it is captured.
struct Facts {
    record: Arc<Record>,
    shape: Shape,
    agent_generation: u32,
    guest: String,
    estimate_bytes: u64,
    quota_bytes: u64,
}

impl Facts {
    fn stage(self, store: &SnapshotStore, take: Take) -> Result<Staged, TakeError> {
        let start = &self.record.start;
        let (parent, ground) = match start.source {
            Source::Snapshot(id) => match store.find(&start.owner.account, id) {
                Err(StoreError::Missing(_)) => (None, None),
                found => (Some(found?), None),
            },
            // The suspended one is removed once another VM runs; what that continued is there.
            _ => self.ground(store).unzip(),
        };
        let of_parent = |what: fn(&Header) -> bool| parent.as_ref().is_some_and(what);
        let holds_secrets = self.record.secrets == SecretsKept::Elsewhere
            || self.record.inherited == SecretsKept::Elsewhere
            || of_parent(|parent| parent.meta.holds_secrets);
        let sealed = of_parent(|parent| parent.protection == Protection::Sealed);
        if (holds_secrets || sealed) && take.key.is_none() {
            return Err(TakeError::HoldsSecrets(start.vm));
        }
        let meta = SnapshotMeta {
            id: take.id,
            account: start.owner.account.clone(),
            parent: parent.map(|parent| SnapshotParent {
                account: parent.meta.account,
                id: parent.meta.id,
            }),
            kind: take.kind,
            shape: self.shape,
            agent_generation: self.agent_generation,
            guest: self.guest,
            image: start.image,
            folder: start.folder,
            resources: start.resources,
            taken_of: Some(start.owner.clone()),
            app: start.process.as_ref().map(|process| SnapshotApp {
                port: process.port,
                ready: true,
            }),
            release: (take.kind == SnapshotKind::Template)
                .then(|| release_of(start))
                .flatten(),
            holds_secrets,
            made_at_s: take.made_at_s,
        };
        let below = ground.as_ref().map_or(0, Ground::bytes);
        let order = Order {
            meta,
            key: take.key,
            estimate_bytes: self.estimate_bytes.saturating_sub(below),
            quota_bytes: self.quota_bytes,
        };
        let mut staged = store.stage(order)?;
        if let Some(ground) = ground {
            staged.compare_with(ground);
        }
        Ok(staged)
    }

    /// What a VM that went on from a suspended one differs from in what it changed, if that can
    /// still be told; else its snapshot holds everything.
    fn ground(&self, store: &SnapshotStore) -> Option<(Header, Ground)> {
        let (vm, base) = (self.record.start.vm, self.record.base?);
        let opened = store.open_for(&self.record.start.owner.account, base);
        let ground = opened.and_then(|opened| Ok((opened.header().clone(), opened.ground()?)));
        let said = |error: &StoreError| {
            tracing::warn!(%vm, %base, error = chain(error), "all of its memory is written");
        };
        ground.inspect_err(said).ok()
    }
}

/// Where something captured is filed.
#[derive(Debug)]
pub(crate) struct Sealing {
    snapshots: Snapshots,
    vm: VmId,
    staged: Staged,
    /// Until it is filed, nobody else captures that VM.
    turn: Turn,
}

impl Sealing {
    pub(crate) const fn id(&self) -> SnapshotId {
        self.staged.id()
    }

    /// Files what was captured. What was begun ends, also when this is dropped.
    pub(crate) async fn seal(self, capture: Capture) -> Result<SnapshotInfo, TakeError> {
        let Self {
            snapshots,
            vm,
            staged,
            turn,
        } = self;
        let store = snapshots.store().clone();
        let Capture {
            memory,
            state,
            scratch,
        } = capture;
        let memory = memory.finished().await.map_err(|error| failed(vm, error))?;
        let scratch = match scratch {
            Some(copy) => Some(copy.finished().await.map_err(|error| failed(vm, error))?),
            None => None,
        };
        let sealing = task::spawn_blocking(move || file(&store, staged, memory, &state, scratch));
        let (info, image) = sealing.await.map_err(TakeError::Worker)??;
        drop(turn);
        // What is suspended is out of memory, and not in the clear.
        let is_shared = info.meta.as_ref().map(|meta| meta.kind) != Some(SnapshotKind::Suspend);
        if let (Some(image), true) = (image, is_shared) {
            snapshots.memories().offer(info.id, &image);
        }
        Ok(info)
    }
}

type Filed = (SnapshotInfo, Option<Arc<MemoryImage>>);

/// Blocks.
fn file(
    store: &SnapshotStore,
    staged: Staged,
    memory: CapturedMemory,
    state: &File,
    scratch: Option<CapturedScratch>,
) -> Result<Filed, StoreError> {
    let (account, id) = (staged.account().to_owned(), staged.id());
    let filled = fill(staged, memory, state, scratch);
    let filed = filled.and_then(|image| Ok((store.info(&account, id)?, image)));
    if filed.is_err() {
        // It may have its place, and whoever it was taken of goes on.
        let left = store.remove(Removal {
            account: &account,
            id,
            cascade: Cascade::Refuse,
            in_use: &BTreeSet::new(),
        });
        match left {
            Ok(_) | Err(StoreError::Missing(_)) => {}
            Err(error) => tracing::warn!(%id, error = chain(&error), "half a snapshot is left"),
        }
    }
    filed
}

/// Blocks. The whole memory is given back where there is one: forks may begin at once.
fn fill(
    mut staged: Staged,
    memory: CapturedMemory,
    state: &File,
    scratch: Option<CapturedScratch>,
) -> Result<Option<Arc<MemoryImage>>, StoreError> {
    let image = match memory {
        CapturedMemory::Whole(image) => {
            staged.image(&image)?;
            Some(image)
        }
        CapturedMemory::Standing(memory) => {
            staged.standing(&memory)?;
            None
        }
        // What its VM began from is not there any more.
        CapturedMemory::Changed { base, pages } if staged.takes_whole() => {
            staged.changed(&base, &pages)?;
            None
        }
        CapturedMemory::Changed { pages, .. } => {
            for (page, bytes) in pages.each() {
                staged.page(page, bytes)?;
            }
            None
        }
    };
    staged.state(state)?;
    if let Some(scratch) = scratch {
        let layer = FrozenLayer {
            file: &scratch.layer.file,
            format: layer_format(staged.driver()),
            key: scratch.layer.key.as_ref(),
        };
        let backing = match scratch.below {
            Below::Nothing => DiskBacking::Empty,
            Below::Source => DiskBacking::Parent,
        };
        staged.disk(&layer, backing)?;
    }
    staged.seal()?;
    Ok(image)
}

fn failed(vm: VmId, error: CaptureError) -> TakeError {
    match error {
        CaptureError::Busy => TakeError::Busy(vm),
        CaptureError::DiskFull { folder } => TakeError::NoSpace(StoreError::DiskFull { folder }),
        other => TakeError::Failed {
            vm,
            reason: chain(&other),
        },
    }
}
