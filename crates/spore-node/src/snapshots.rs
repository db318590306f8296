//! The snapshots of a node: what its VMs begin from, and what control lists and removes.
//!
//! Made by the node, once; everybody below shares it. Joins the store on the disk with the
//! memories that VMs map, on threads that may block. Adds to what control says is needed what only
//! the node knows: the snapshots that VMs began from.
//!
//! ```text
//!   start ── pin: room for the memory ──▶ fork ── header checked ── memory (made once, shared)
//!                                                              └── state, disk ──▶ ForkFrom
//! ```

use core::fmt;
use core::time::Duration;
use std::collections::BTreeSet;
use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;

use spore_wire::id::{ImageId, SnapshotId, VmId};
use spore_wire::node::{Resources, Source, StartVm};
use spore_wire::snapshot::{Shape, SnapshotInfo, SnapshotKind};
use thiserror::Error;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task;

use crate::clock::Clock;
use crate::hypervisor::fork::{ForkFrom, ForkMemory, Scratch, ScratchLayer};
use crate::image::store::GcMode;
use crate::journal::{Journal, JournalError, SecretsKept};
use crate::snapshot::header::{Header, Mismatch};
use crate::snapshot::key::Keys;
use crate::snapshot::memory::{CacheError, MemoryCache};
use crate::snapshot::opened::Opened;
use crate::snapshot::{Cascade, Removal, Settings, SnapshotStore, StoreError, StorePoints};

/// A driver's word for a layer of a scratch disk.
#[must_use]
pub fn layer_format(driver: &str) -> &'static str {
    match driver {
        "kvm" => "spore-layer",
        _ => "qcow2",
    }
}

/// Memories of VMs that are copied at once: they are in no VM's share of the host's.
const COPIES_MAX: usize = 2;

/// How old a snapshot is before it is collected: of a younger one, whoever made it may not have
/// said yet what for.
const UNCLAIMED_KEPT: Duration = Duration::from_secs(10 * 60);

/// Where a node's snapshots are and how much they may take.
#[derive(Clone, Debug)]
pub struct SnapshotConfig {
    /// `/var/lib/spore/snapshots`.
    pub folder: PathBuf,
    /// Memory of the host for memories of snapshots.
    pub memory_mib: u64,
    /// The most that the snapshots of one account take on the disk.
    pub quota_bytes: u64,
    /// Told after each step of the store.
    pub points: Arc<dyn StorePoints>,
}

/// What a VM wants to begin from, and what it is itself.
#[derive(Debug)]
pub(crate) struct Wanted {
    pub(crate) vm: VmId,
    pub(crate) account: String,
    pub(crate) app: String,
    pub(crate) id: SnapshotId,
    /// Whether it goes on where another VM was suspended.
    pub(crate) goes_on: bool,
    pub(crate) keys: Keys,
    pub(crate) shape: Shape,
    pub(crate) resources: Resources,
    pub(crate) image: ImageId,
    pub(crate) folder: Option<ImageId>,
}

/// What a VM begins from.
#[derive(Debug)]
pub(crate) struct Found {
    pub(crate) from: ForkFrom,
    pub(crate) inherited: Inherited,
}

/// What a VM has of what it began from.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Inherited {
    /// Whether there are some.
    pub(crate) secrets: SecretsKept,
    /// What that continued, if it is removed once the VM runs.
    pub(crate) base: Option<SnapshotId>,
}

impl Wanted {
    /// What `start` says that it wants; `None` wants to boot.
    pub(crate) fn of(start: &StartVm, keys: Keys, shape: Shape) -> Option<Self> {
        let id = start.source.snapshot()?;
        Some(Self {
            vm: start.vm,
            account: start.owner.account.clone(),
            app: start.owner.app.clone(),
            id,
            goes_on: matches!(start.source, Source::Suspended(_)),
            keys,
            shape,
            resources: start.resources,
            image: start.image,
            folder: start.folder,
        })
    }
}

/// Why nothing can begin from a snapshot.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SourceError {
    /// There is none.
    #[error("the account `{account}` has no snapshot {id}: start the VM without one")]
    Missing {
        /// Whose it should be.
        account: String,
        /// Which.
        id: SnapshotId,
    },
    /// It was taken on another host or of another version.
    #[error("nothing can begin from snapshot {id} here")]
    Host {
        /// Which.
        id: SnapshotId,
        /// What differs.
        source: Mismatch,
    },
    /// It was taken of a VM that is made otherwise.
    #[error(
        "a VM has the {what} of the snapshot {id} that it begins from: {wanted} was asked for, \
         and the snapshot has {actual}"
    )]
    Machine {
        /// Which.
        id: SnapshotId,
        /// What differs.
        what: &'static str,
        /// Of the VM.
        wanted: String,
        /// Of the snapshot.
        actual: String,
    },
    /// One VM goes on from a suspended one, and any number begin from others.
    #[error(
        "from the snapshot {0} of a suspended VM only that app goes on, by being woken: begin from \
         another one"
    )]
    Kind(SnapshotId),
    /// One VM goes on from it, and another one has, or may have.
    #[error(
        "the VM {by} went on from the suspended snapshot {id}, or may have: nobody else does, so \
         start the VM without it"
    )]
    Claimed {
        /// Which.
        id: SnapshotId,
        /// Who went on.
        by: VmId,
    },
    /// Its disk is another driver's.
    #[error("the disk of snapshot {0} is not in a form that this node knows: make it again")]
    Disk(SnapshotId),
    /// It is damaged, its key is missing, or there is no room: the source names it.
    #[error("cannot open what the VM is to begin from")]
    Unusable(#[source] Box<dyn core::error::Error + Send + Sync>),
}

/// Why something asked of snapshots was not done.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SnapshotsError {
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// What VMs need cannot be read, so that nothing is removed.
    #[error("cannot read which snapshots VMs need")]
    Journal(#[from] JournalError),
    /// The runtime is shutting down.
    #[error("a worker thread ended")]
    Worker(#[source] task::JoinError),
}

/// The snapshots of one node; clones are the same.
#[derive(Clone)]
pub struct Snapshots {
    store: SnapshotStore,
    memories: MemoryCache,
    journal: Journal,
    clock: Arc<dyn Clock>,
    quota_bytes: u64,
    /// For captures of VMs that go on: each has their memory once more until it is on the disk.
    copies: Arc<Semaphore>,
}

impl fmt::Debug for Snapshots {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Snapshots")
            .field("memories", &self.memories.status())
            .finish_non_exhaustive()
    }
}

impl Snapshots {
    /// Opens the store, and removes from it what a crash left. Legal once per folder. Blocks.
    pub(crate) fn open(
        config: SnapshotConfig,
        runtime: PathBuf,
        clock: Arc<dyn Clock>,
        journal: Journal,
    ) -> Result<Self, SnapshotsError> {
        let SnapshotConfig {
            folder,
            memory_mib,
            quota_bytes,
            points,
        } = config;
        let settings = Settings {
            folder,
            runtime,
            clock: Arc::clone(&clock),
            points,
        };
        let store = SnapshotStore::open(settings)?;
        Ok(Self {
            store,
            memories: MemoryCache::new(memory_mib << 20),
            journal,
            clock,
            quota_bytes,
            copies: Arc::new(Semaphore::new(COPIES_MAX)),
        })
    }

    /// Waits until a memory may be copied; it may until what this gives is dropped.
    pub(crate) async fn copy(&self) -> Option<OwnedSemaphorePermit> {
        // It is never closed.
        Arc::clone(&self.copies).acquire_owned().await.ok()
    }

    pub(crate) const fn store(&self) -> &SnapshotStore {
        &self.store
    }

    pub(crate) const fn quota_bytes(&self) -> u64 {
        self.quota_bytes
    }

    /// The memories that VMs map, for status and metrics.
    #[must_use]
    pub const fn memories(&self) -> &MemoryCache {
        &self.memories
    }

    /// Opens what a VM begins from. Compared once with what was written, and made once into a
    /// memory that others share; that of a suspended VM is for the one that goes on, which takes
    /// no more of the host than a VM that boots.
    pub(crate) async fn source(&self, wanted: Wanted) -> Result<Found, SourceError> {
        let id = wanted.id;
        let (store, memories) = (self.store.clone(), &self.memories);
        let opening = task::spawn_blocking(move || open(&store, wanted));
        let (opened, keys) = opening.await.map_err(unusable)??;
        let meta = &opened.header().meta;
        let goes = meta.kind == SnapshotKind::Suspend;
        let base = meta.parent.as_ref().filter(|_parent| goes);
        let inherited = Inherited {
            secrets: match meta.holds_secrets {
                true => SecretsKept::Elsewhere,
                false => SecretsKept::None,
            },
            base: base.map(|parent| parent.id),
        };
        let (from, with) = (Arc::clone(&opened), keys.clone());
        let memory = match opened.header().meta.kind {
            SnapshotKind::Suspend => {
                let own = task::spawn_blocking(move || from.own_memory(&with));
                let own = own.await.map_err(unusable)?;
                ForkMemory::Own(Arc::new(own.map_err(unusable)?))
            }
            SnapshotKind::Checkpoint | SnapshotKind::Template => {
                let bytes = opened.header().memory.bytes;
                let shared = memories.get_or_build(id, bytes, move || from.memory(&with));
                ForkMemory::Shared(shared.await.map_err(|error| match error {
                    CacheError::Build(error) => unusable(error),
                    error => unusable(error),
                })?)
            }
        };
        let rest = task::spawn_blocking(move || {
            let state = opened.state(&keys).map_err(unusable)?;
            Ok((state, scratch(&opened, &keys)?))
        });
        let (state, scratch) = rest.await.map_err(unusable)??;
        let from = ForkFrom {
            memory,
            state: Arc::new(File::from(state)),
            scratch: scratch.map(Arc::new),
        };
        Ok(Found { from, inherited })
    }

    /// The snapshots of `account`, in the order of their ids; damaged ones too.
    ///
    /// # Errors
    /// [`SnapshotsError`].
    pub async fn list(&self, account: &str) -> Result<Vec<SnapshotInfo>, SnapshotsError> {
        let (store, account) = (self.store.clone(), account.to_owned());
        blocking(move || store.list(&account)).await
    }

    /// The templates of all accounts.
    pub(crate) async fn templates(&self) -> Result<Vec<SnapshotInfo>, SnapshotsError> {
        let store = self.store.clone();
        let mut all = blocking(move || store.all()).await?;
        all.retain(|info| {
            let kind = info.meta.as_ref().map(|meta| meta.kind);
            kind == Some(SnapshotKind::Template)
        });
        Ok(all)
    }

    /// One snapshot of `account`.
    ///
    /// # Errors
    /// [`StoreError::Missing`] also when it is another account's.
    pub async fn info(
        &self,
        account: &str,
        id: SnapshotId,
    ) -> Result<SnapshotInfo, SnapshotsError> {
        let (store, account) = (self.store.clone(), account.to_owned());
        blocking(move || store.info(&account, id)).await
    }

    /// Removes a snapshot of `account` that nothing in `in_use` and no VM names; all that went.
    ///
    /// # Errors
    /// [`SnapshotsError`].
    pub async fn remove(
        &self,
        account: &str,
        id: SnapshotId,
        cascade: Cascade,
        mut in_use: BTreeSet<SnapshotId>,
    ) -> Result<Vec<SnapshotId>, SnapshotsError> {
        in_use.extend(self.of_vms()?);
        let (store, account) = (self.store.clone(), account.to_owned());
        let removed = blocking(move || {
            store.remove(Removal {
                account: &account,
                id,
                cascade,
                in_use: &in_use,
            })
        });
        let removed = removed.await?;
        for id in &removed {
            self.memories.forget(*id);
        }
        Ok(removed)
    }

    /// Makes a snapshot of `account` stand alone.
    ///
    /// # Errors
    /// [`SnapshotsError`]; the snapshot is then as it was.
    pub async fn compact(
        &self,
        account: &str,
        id: SnapshotId,
        keys: Keys,
    ) -> Result<SnapshotInfo, SnapshotsError> {
        let (store, account, quota) = (self.store.clone(), account.to_owned(), self.quota_bytes);
        blocking(move || {
            store.compact(&account, id, &keys, quota)?;
            store.info(&account, id)
        })
        .await
    }

    /// Removes, or only names, what neither `keep` nor a VM needs and is no longer new.
    ///
    /// # Errors
    /// [`SnapshotsError`].
    pub async fn gc(
        &self,
        mut keep: BTreeSet<SnapshotId>,
        mode: GcMode,
    ) -> Result<Vec<SnapshotInfo>, SnapshotsError> {
        keep.extend(self.of_vms()?);
        let now = self.clock.realtime().saturating_sub(UNCLAIMED_KEPT);
        let store = self.store.clone();
        let gone = blocking(move || store.gc(&keep, now.as_secs(), mode)).await?;
        if mode == GcMode::Remove {
            for info in &gone {
                self.memories.forget(info.id);
            }
        }
        Ok(gone)
    }

    /// Removes the suspended VM's snapshot that `vm` went on from, if it did from one.
    pub(crate) async fn drop_claimed(
        &self,
        account: &str,
        id: SnapshotId,
        vm: VmId,
    ) -> Result<(), SnapshotsError> {
        let (store, account) = (self.store.clone(), account.to_owned());
        let dropped = blocking(move || match store.claimed_by(&account, id) {
            Ok(Some(by)) if by == vm => store.remove(Removal {
                account: &account,
                id,
                cascade: Cascade::Refuse,
                in_use: &BTreeSet::new(),
            }),
            Ok(_) | Err(StoreError::Missing(_)) => Ok(Vec::new()),
            Err(error) => Err(error),
        });
        for id in dropped.await? {
            self.memories.forget(id);
        }
        Ok(())
    }

    /// The images that snapshots need. Blocks.
    pub(crate) fn images(&self) -> Result<BTreeSet<ImageId>, StoreError> {
        self.store.images()
    }

    /// What VMs of which something is left began from, and what their next snapshots continue.
    fn of_vms(&self) -> Result<BTreeSet<SnapshotId>, JournalError> {
        let records = self.journal.read_all()?.into_values().flatten();
        Ok(records
            .flat_map(|record| [record.start.source.snapshot(), record.base])
            .flatten()
            .collect())
    }
}

/// Runs on a thread that may block.
pub(crate) async fn blocking<T, E>(
    work: impl FnOnce() -> Result<T, E> + Send + 'static,
) -> Result<T, SnapshotsError>
where
    T: Send + 'static,
    E: Send + 'static,
    SnapshotsError: From<E>,
{
    let done = task::spawn_blocking(work).await;
    Ok(done.map_err(SnapshotsError::Worker)??)
}

fn unusable(source: impl core::error::Error + Send + Sync + 'static) -> SourceError {
    SourceError::Unusable(Box::new(source))
}

fn open(store: &SnapshotStore, wanted: Wanted) -> Result<(Arc<Opened>, Keys), SourceError> {
    let id = wanted.id;
    let opened = match store.open_for(&wanted.account, id) {
        Ok(opened) => opened,
        Err(StoreError::Missing(_)) => {
            let account = wanted.account;
            return Err(SourceError::Missing { account, id });
        }
        Err(error) => return Err(unusable(error)),
    };
    check(opened.header(), &wanted)?;
    if opened.header().meta.kind == SnapshotKind::Suspend {
        // On the disk before anything of it runs, and once for all.
        let claimed = store.claim(&wanted.account, id, wanted.vm);
        claimed.map_err(|error| match error {
            StoreError::Claimed { id, by } => SourceError::Claimed { id, by },
            error => unusable(error),
        })?;
    }
    Ok((Arc::new(opened), wanted.keys))
}

/// What is loaded says nothing of what it was taken of, and a guest that finds another machine
/// around it goes on in nonsense.
fn check(header: &Header, wanted: &Wanted) -> Result<(), SourceError> {
    let (id, meta) = (wanted.id, &header.meta);
    let differs = |what, wanted: String, actual: String| match wanted == actual {
        true => Ok(()),
        false => Err(SourceError::Machine {
            id,
            what,
            wanted,
            actual,
        }),
    };
    if wanted.goes_on != (meta.kind == SnapshotKind::Suspend) {
        return Err(SourceError::Kind(id));
    }
    if let (SnapshotKind::Suspend, Some(owner)) = (meta.kind, &meta.taken_of) {
        differs("app", wanted.app.clone(), owner.app.clone())?;
    }
    let (is, was) = (&wanted.resources, &meta.resources);
    differs("vCPUs", is.cpus.to_string(), was.cpus.to_string())?;
    let mib = |mib: u32| format!("{mib} MiB");
    differs("memory", mib(is.memory_mib), mib(was.memory_mib))?;
    differs("scratch disk", mib(is.disk_mib), mib(was.disk_mib))?;
    differs("image", wanted.image.to_string(), meta.image.to_string())?;
    // One that was taken before a folder was mounted is for any folder.
    if let Some(folder) = &meta.folder {
        let is = wanted.folder.as_ref().map(ImageId::to_string);
        differs("folder", is.unwrap_or_default(), folder.to_string())?;
    }
    header
        .check_host(&wanted.shape)
        .map_err(|source| SourceError::Host { id, source })
}

/// The scratch disk as the snapshot has it, where it has one.
fn scratch(opened: &Opened, keys: &Keys) -> Result<Option<Scratch>, SourceError> {
    let meta = &opened.header().meta;
    let mut layers = Vec::new();
    for layer in opened.disks(keys).map_err(unusable)? {
        if layer.part.format != layer_format(&meta.shape.driver) {
            return Err(SourceError::Disk(meta.id));
        }
        layers.push(ScratchLayer {
            file: Arc::new(layer.file),
            key: layer.key,
        });
    }
    let mib = meta.resources.disk_mib;
    Ok((!layers.is_empty()).then_some(Scratch { mib, layers }))
}
