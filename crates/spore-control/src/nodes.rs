//! What control needs of nodes: start, stop, watch, talk to a guest, images, snapshots.
//!
//! The composition root implements [`Nodes`] over `spore-node`; tests script it. Control never
//! opens a guest's disk, socket or process itself.

use core::fmt;
use core::time::Duration;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use bytes::Bytes;
use spore_api::log::LogLine;
use spore_wire::guest::{Exec, Exit, WindowSize, WriteFile};
use spore_wire::id::{ImageId, SnapshotId, VmId};
use spore_wire::node::{
    ImageInfo, ImageKind, ImageRecipe, NodeStatus, Owner, StartVm, StopMode, TemplateStage,
    VmStatus,
};
use spore_wire::secret::SecretBytes;
use spore_wire::snapshot::SnapshotInfo;
use tokio::io::AsyncRead;
use tokio::sync::{Notify, mpsc};

/// The node or nodes that run VMs.
#[async_trait]
pub trait Nodes: Send + Sync + 'static {
    /// Begins to start a VM; its progress comes by the feed. Starting an id twice is one start.
    ///
    /// # Errors
    /// When the node refused: then no VM of this id exists.
    async fn start(&self, start: StartVm) -> Result<(), NodesError>;

    /// Begins to start several VMs; an answer for each, in their order. Room is given to all of
    /// them in one step, so that what others start meanwhile does not come between.
    async fn start_many(&self, starts: Vec<StartVm>, room: Room) -> Vec<Result<(), NodesError>>;

    /// Begins to stop a VM; its end comes by the feed. A VM that is over is not an error.
    ///
    /// # Errors
    /// [`NodesError::NoVm`] when no such VM is known.
    async fn stop(&self, vm: VmId, mode: StopMode) -> Result<(), NodesError>;

    /// A VM as it is; `None` when the node has none of this id.
    ///
    /// # Errors
    /// When the node does not answer.
    async fn status(&self, vm: VmId) -> Result<Option<VmStatus>, NodesError>;

    /// Every VM that is not over.
    ///
    /// # Errors
    /// When the node does not answer.
    async fn list(&self) -> Result<Vec<VmStatus>, NodesError>;

    /// Changes of VMs from now on. The last state of a VM is never lost; states between may be.
    fn subscribe(&self) -> VmFeed;

    /// Runs a program in a VM. Dropping the session ends it.
    ///
    /// # Errors
    /// When it cannot be started.
    async fn exec(&self, vm: VmId, exec: Exec) -> Result<ExecSession, NodesError>;

    /// Reads a file of a guest.
    ///
    /// # Errors
    /// When it cannot be opened.
    async fn read_file(&self, vm: VmId, path: String) -> Result<ByteStream, NodesError>;

    /// Writes a file of a guest, whole or not at all; answers its bytes.
    ///
    /// # Errors
    /// When it cannot be written.
    async fn write_file(
        &self,
        vm: VmId,
        file: WriteFile,
        body: ByteStream,
    ) -> Result<u64, NodesError>;

    /// What an app printed: the last `tail` lines, then, if asked, what comes. Dropping the
    /// receiver ends it. It works for sleeping apps.
    ///
    /// # Errors
    /// When the log cannot be read.
    async fn logs(&self, wanted: LogsWanted) -> Result<mpsc::Receiver<LogLine>, NodesError>;

    /// Makes an image of a tar.zst stream, refusing what its kind forbids. A new one has at most
    /// `bytes_max` bytes; one that the node has already may be larger.
    ///
    /// # Errors
    /// When the stream is malformed, cut or over a limit; nothing is left then.
    async fn import_source(
        &self,
        body: ByteStream,
        kind: ImageKind,
        bytes_max: u64,
    ) -> Result<ImageInfo, NodesError>;

    /// Builds a root image of at most `bytes_max` bytes; `progress` gets a line per step.
    ///
    /// # Errors
    /// When it cannot be built; nothing is left then.
    async fn build_image(
        &self,
        recipe: ImageRecipe,
        bytes_max: u64,
        progress: mpsc::Sender<String>,
    ) -> Result<ImageInfo, NodesError>;

    /// Removes images that are neither in `keep` nor used by a VM nor made just now, which their
    /// maker may not have written down yet; answers what it removed, or would remove.
    ///
    /// # Errors
    /// When a file cannot be removed.
    async fn collect_images(
        &self,
        keep: BTreeSet<ImageId>,
        mode: CollectMode,
    ) -> Result<Vec<ImageInfo>, NodesError>;

    /// Takes a snapshot of a VM, which goes on.
    ///
    /// # Errors
    /// When it cannot be taken; nothing is left of it then, and the VM goes on all the same.
    async fn checkpoint(&self, take: TakeSnapshot) -> Result<TakenSnapshot, NodesError>;

    /// Suspends a VM: it ends when its snapshot is on the disk, and another one may go on from
    /// that, once. Needs a key.
    ///
    /// # Errors
    /// When it cannot be suspended; then it goes on.
    async fn suspend(&self, take: TakeSnapshot) -> Result<(), NodesError>;

    /// Adds a line of the platform's own to an app's log.
    ///
    /// # Errors
    /// When the log cannot be written.
    async fn note(&self, note: Note) -> Result<(), NodesError>;

    /// The snapshots of an account, by their ids.
    ///
    /// # Errors
    /// When they cannot be listed.
    async fn snapshots(&self, account: String) -> Result<Vec<SnapshotInfo>, NodesError>;

    /// One snapshot of an account.
    ///
    /// # Errors
    /// [`NodesError::NotFound`] when the account has none of this id.
    async fn snapshot(&self, account: String, id: SnapshotId) -> Result<SnapshotInfo, NodesError>;

    /// Removes a snapshot; answers all that were removed.
    ///
    /// # Errors
    /// [`NodesError::Conflict`] when something needs it, and nothing was removed.
    async fn remove_snapshot(&self, removal: Removal) -> Result<Vec<SnapshotId>, NodesError>;

    /// Makes a snapshot stand alone, under its own id.
    ///
    /// # Errors
    /// When it cannot be read or written; it is as it was then.
    async fn compact_snapshot(
        &self,
        account: String,
        id: SnapshotId,
        keys: SnapshotKeys,
    ) -> Result<SnapshotInfo, NodesError>;

    /// Removes snapshots that nothing in `keep` is or continues, that no VM uses, and that were
    /// not made just now; answers what it removed, or would remove.
    ///
    /// # Errors
    /// When a file cannot be removed.
    async fn collect_snapshots(
        &self,
        keep: BTreeSet<SnapshotId>,
        mode: CollectMode,
    ) -> Result<Vec<SnapshotInfo>, NodesError>;

    /// Forgets the log of an app that was removed.
    ///
    /// # Errors
    /// When it cannot be removed.
    async fn forget_logs(&self, account: String, app: String) -> Result<(), NodesError>;

    /// How far the template is that a VM began from, or could have.
    ///
    /// # Errors
    /// When the node does not answer.
    async fn template_stage(&self, vm: VmId) -> Result<Option<TemplateStage>, NodesError>;

    /// The node as it is.
    ///
    /// # Errors
    /// When the node does not answer.
    async fn node_status(&self) -> Result<NodeStatus, NodesError>;
}

/// Whether several starts are one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Room {
    /// As many start as have room, from the first on.
    ForSome,
    /// None starts unless there is room for all.
    ForAll,
}

/// The keys of encrypted snapshots.
pub type SnapshotKeys = Vec<(SnapshotId, SecretBytes)>;

/// A snapshot to take.
#[derive(Clone, Debug)]
pub struct TakeSnapshot {
    /// Of which VM.
    pub vm: VmId,
    /// Its id, never used before.
    pub id: SnapshotId,
    /// What it is encrypted with; `None` only when the VM holds no secrets.
    pub key: Option<SecretBytes>,
    /// Seconds since the Unix epoch.
    pub made_at_s: u64,
}

/// What the platform has to tell an app's owner.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Note {
    /// Of which app.
    pub owner: Owner,
    /// Of which VM.
    pub vm: VmId,
    /// What.
    pub text: String,
}

/// A snapshot that was taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TakenSnapshot {
    /// What it is.
    pub info: SnapshotInfo,
    /// How long the VM stood still.
    pub pause: Duration,
    /// How long its programs did.
    pub frozen: Duration,
}

/// A snapshot to remove.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Removal {
    /// Whose it is.
    pub account: String,
    /// Which.
    pub id: SnapshotId,
    /// What about those that continue it.
    pub dependents: Dependents,
    /// What must not be removed.
    pub in_use: BTreeSet<SnapshotId>,
}

/// What is done with those that continue a snapshot which is removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dependents {
    /// While there are any, nothing is removed.
    Keep,
    /// They are removed as well.
    Remove,
}

/// Bytes on their way.
pub type ByteStream = Box<dyn AsyncRead + Send + Unpin>;

/// Which log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogsWanted {
    /// Whose.
    pub account: String,
    /// Of which app.
    pub app: String,
    /// The last so many lines.
    pub tail: u32,
    /// What happens after them.
    pub then: AfterTail,
}

/// What a log does after the lines that there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AfterTail {
    /// It ends.
    End,
    /// It goes on with what comes.
    Follow,
}

/// Whether a collection removes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CollectMode {
    /// It removes.
    Remove,
    /// It only tells.
    DryRun,
}

impl CollectMode {
    /// The mode of a call that may be a rehearsal.
    #[must_use]
    pub const fn of(dry_run: bool) -> Self {
        if dry_run { Self::DryRun } else { Self::Remove }
    }
}

/// A running program.
pub struct ExecSession {
    /// To the program. Dropping it ends the session.
    pub input: mpsc::Sender<ExecInput>,
    /// From the program; the last message is `Exit` or `Failed`.
    pub output: mpsc::Receiver<ExecOutput>,
}

impl fmt::Debug for ExecSession {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ExecSession")
    }
}

/// To a program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExecInput {
    /// Bytes of its standard input.
    Stdin(Bytes),
    /// Its standard input ends.
    StdinEnd,
    /// Its terminal has another size.
    Resize(WindowSize),
    /// A signal for its group.
    Signal(i32),
}

/// From a program.
#[derive(Debug)]
pub enum ExecOutput {
    /// Standard output, or its terminal.
    Stdout(Bytes),
    /// Standard error.
    Stderr(Bytes),
    /// It ended.
    Exit(Exit),
    /// The session broke.
    Failed(NodesError),
}

/// Why a node did not do it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NodesError {
    /// The host has no room.
    #[error("{message}")]
    NoCapacity {
        /// What is short, and what to do.
        message: String,
    },
    /// So much is being done already that this would only wait.
    #[error("{message}")]
    Busy {
        /// How much, and what to do.
        message: String,
    },
    /// No such VM.
    #[error("the VM {vm} is not there any more")]
    NoVm {
        /// Which.
        vm: VmId,
    },
    /// No such file, user or program in the guest.
    #[error("{message}")]
    NotFound {
        /// What is missing.
        message: String,
    },
    /// A value or stream is wrong.
    #[error("{message}")]
    Invalid {
        /// What is wrong and what would be right.
        message: String,
    },
    /// A stream is over its limit.
    #[error("{message}")]
    TooLarge {
        /// Which limit.
        message: String,
    },
    /// A new image is larger than it may be; nothing of it is kept.
    #[error("the image has {bytes} bytes, more than are left")]
    OverQuota {
        /// How many it has.
        bytes: u64,
    },
    /// An image is missing or damaged.
    #[error("{message}")]
    Image {
        /// Which, and what to do.
        message: String,
    },
    /// Something needs it, or is being done with it.
    #[error("{message}")]
    Conflict {
        /// What, and what to do.
        message: String,
    },
    /// A snapshot is damaged, or of another kind of host.
    #[error("{message}")]
    Snapshot {
        /// Which, and why it cannot be used.
        message: String,
    },
    /// The account's snapshots would take more bytes than they may.
    #[error("{message}")]
    SnapshotQuota {
        /// How many, and what to do.
        message: String,
    },
    /// The host's disk is full.
    #[error("{message}")]
    DiskFull {
        /// Which disk, and what to do.
        message: String,
    },
    /// It did not answer in its time.
    #[error("{message}")]
    Timeout {
        /// What did not answer.
        message: String,
    },
    /// The node or host failed.
    #[error("{message}")]
    Failed {
        /// What happened and what to do.
        message: String,
    },
}

/// Makes a feed: the node publishes, control receives.
#[must_use]
pub fn vm_feed() -> (VmPublisher, VmFeed) {
    let shared = Arc::new(FeedShared::default());
    (VmPublisher(Arc::clone(&shared)), VmFeed(shared))
}

/// The node's side of a feed. It never waits and holds at most one state per VM.
#[derive(Clone, Debug)]
pub struct VmPublisher(Arc<FeedShared>);

/// Control's side of a feed.
#[derive(Debug)]
pub struct VmFeed(Arc<FeedShared>);

#[derive(Debug, Default)]
struct FeedShared {
    latest: Mutex<BTreeMap<VmId, VmStatus>>,
    news: Notify,
}

impl VmPublisher {
    /// Tells a VM's state; it replaces one that was not read yet.
    pub fn publish(&self, status: VmStatus) {
        let mut latest = self.0.latest.lock().unwrap_or_else(PoisonError::into_inner);
        latest.insert(status.vm, status);
        drop(latest);
        self.0.news.notify_one();
    }
}

impl VmFeed {
    /// The next state of some VM.
    pub async fn next(&mut self) -> VmStatus {
        loop {
            let first = {
                let mut latest = self.0.latest.lock().unwrap_or_else(PoisonError::into_inner);
                latest.pop_first()
            };
            if let Some((_, status)) = first {
                return status;
            }
            // A permit is kept when the news came between the look and the wait.
            self.0.news.notified().await;
        }
    }
}
