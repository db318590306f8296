//! The node as control sees it: a thin translation, through the daemon's fuse.
//!
//! What an app's owner does inside a VM (programs, files, logs), images and checkpoints are not
//! part of the simulation and are refused.

use std::collections::BTreeSet;
use std::sync::Arc;

use async_trait::async_trait;
use spore_api::log::LogLine;
use spore_api::name::AccountName;
use spore_control::nodes::{
    ByteStream, CollectMode, ExecSession, LogsWanted, Nodes, NodesError, Note, Removal, Room,
    SnapshotKeys, TakeSnapshot, TakenSnapshot, VmFeed, vm_feed,
};
use spore_control::store::record::app::{AppRecord, app_key};
use spore_control::store::record::load;
use spore_control::store::{SharedStore, StoreError};
use spore_node::node::{Node, StartError, VmError};
use spore_node::snapshot::key::SnapshotKey;
use spore_node::snapshot::{Cascade, StoreError as SnapshotStoreError};
use spore_node::snapshots::SnapshotsError;
use spore_node::take::Take;
use spore_wire::cause::chain;
use spore_wire::guest::{Exec, WriteFile};
use spore_wire::id::{ImageId, SnapshotId, VmId};
use spore_wire::node::{
    ImageInfo, ImageKind, ImageRecipe, NodeEvent, NodeStatus, Source, StartVm, StopMode,
    TemplateStage, VmPhase, VmStatus,
};
use spore_wire::snapshot::{SnapshotInfo, SnapshotKind};
use tokio::sync::mpsc;

use crate::fuse::Fuse;
use crate::trace::Trace;
use crate::watch::{Owner, Watcher};

/// What a node says of a VM that needs its secrets and is not told them.
const SECRETS_NOT_TOLD: &str = "was not told the app's secrets again";

/// A node and the fuse of the daemon that has it.
#[derive(Clone, Debug)]
pub struct SimNodes {
    /// The node.
    pub node: Node,
    /// The daemon's.
    pub fuse: Arc<Fuse>,
    /// The truth, read beside the daemon.
    pub store: SharedStore,
    /// Learns whose a VM is.
    pub watcher: Watcher,
    /// The story.
    pub trace: Trace,
}

impl SimNodes {
    /// A VM of a release that does not serve is stopped for its owner, who deployed another one:
    /// a daemon that finds it at its start does not ask the gateway first.
    async fn stopped(&self, vm: VmId) -> Result<(), StoreError> {
        let Some(owner) = self.watcher.owner(vm) else {
            return Ok(());
        };
        let Ok(name) = owner.app.parse() else {
            return Ok(());
        };
        let key = app_key(&AccountName::default_account(), &name);
        let stored = load::<AppRecord>(&*self.store, &key).await?;
        if stored.and_then(|stored| stored.record.release) != Some(owner.release) {
            self.watcher.forced(vm);
        }
        Ok(())
    }

    fn heard(&self, status: &VmStatus) {
        let (vm, app, phase) = (status.vm, &status.owner.app, status.phase);
        self.trace.say(format!("node: {vm} of {app} is {phase:?}"));
        if let (Source::Suspended(id), VmPhase::Ready) = (status.source, phase) {
            self.watcher.went_on(id, vm);
        }
        if let Some(failure) = &status.failure {
            let text = &failure.message;
            self.trace.say(format!("node: {vm}: {text}"));
            if text.contains(SECRETS_NOT_TOLD) {
                self.trace.violation(format!("{vm} of {app} {text}"));
            }
        }
    }
}

#[async_trait]
impl Nodes for SimNodes {
    async fn start(&self, start: StartVm) -> Result<(), NodesError> {
        let vm = start.vm;
        self.fuse.pass(|| format!("before start {vm}")).await;
        let owner = Owner {
            app: start.owner.app.clone(),
            release: start.owner.release,
        };
        self.trace
            .say(format!("start {vm} of {} {}", owner.app, owner.release));
        self.watcher.asked(vm, owner);
        let started = self.node.start(start);
        self.fuse.pass(|| format!("after start {vm}")).await;
        started.map(drop).map_err(|error| {
            self.trace.say(format!("start {vm}: {error}"));
            let message = error.to_string();
            match error {
                StartError::NoRoom(_) | StartError::NoImageRoom(_) => {
                    self.trace.count("no room");
                    NodesError::NoCapacity { message }
                }
                StartError::Image(_) => NodesError::Image { message },
                _ => NodesError::Invalid { message },
            }
        })
    }

    async fn stop(&self, vm: VmId, mode: StopMode) -> Result<(), NodesError> {
        self.fuse.pass(|| format!("before stop {vm}")).await;
        self.trace.say(format!("stop {vm} {mode:?}"));
        if let Err(error) = self.stopped(vm).await {
            self.trace.violation(format!("the store fails: {error}"));
        }
        let stopped = self.node.stop(vm, mode).await;
        self.fuse.pass(|| format!("after stop {vm}")).await;
        stopped.map_err(|error| match error {
            VmError::Unknown(vm) => NodesError::NoVm { vm },
            other => NodesError::Failed {
                message: other.to_string(),
            },
        })
    }

    async fn status(&self, vm: VmId) -> Result<Option<VmStatus>, NodesError> {
        self.fuse.pass(|| format!("status {vm}")).await;
        Ok(self.node.status(vm))
    }

    async fn list(&self) -> Result<Vec<VmStatus>, NodesError> {
        self.fuse.pass(|| "a list of VMs".to_owned()).await;
        let mut all = self.node.list();
        all.retain(|status| !status.phase.is_over());
        Ok(all)
    }

    fn subscribe(&self) -> VmFeed {
        let (publisher, feed) = vm_feed();
        let mut watch = self.node.watch();
        let nodes = self.clone();
        drop(tokio::spawn(async move {
            loop {
                let NodeEvent::Vm(status) = watch.next().await;
                nodes.fuse.pass(|| format!("news of {}", status.vm)).await;
                nodes.heard(&status);
                publisher.publish(status);
            }
        }));
        feed
    }

    async fn exec(&self, _vm: VmId, _exec: Exec) -> Result<ExecSession, NodesError> {
        Err(not_here())
    }

    async fn read_file(&self, _vm: VmId, _path: String) -> Result<ByteStream, NodesError> {
        Err(not_here())
    }

    async fn write_file(
        &self,
        _vm: VmId,
        _file: WriteFile,
        _body: ByteStream,
    ) -> Result<u64, NodesError> {
        Err(not_here())
    }

    async fn logs(&self, _wanted: LogsWanted) -> Result<mpsc::Receiver<LogLine>, NodesError> {
        Err(not_here())
    }

    async fn import_source(
        &self,
        _body: ByteStream,
        _kind: ImageKind,
        _bytes_max: u64,
    ) -> Result<ImageInfo, NodesError> {
        Err(not_here())
    }

    async fn build_image(
        &self,
        _recipe: ImageRecipe,
        _bytes_max: u64,
        _progress: mpsc::Sender<String>,
    ) -> Result<ImageInfo, NodesError> {
        Err(not_here())
    }

    async fn collect_images(
        &self,
        _keep: BTreeSet<ImageId>,
        _mode: CollectMode,
    ) -> Result<Vec<ImageInfo>, NodesError> {
        Err(not_here())
    }

    async fn start_many(&self, starts: Vec<StartVm>, _room: Room) -> Vec<Result<(), NodesError>> {
        starts.iter().map(|_start| Err(not_here())).collect()
    }

    async fn checkpoint(&self, _take: TakeSnapshot) -> Result<TakenSnapshot, NodesError> {
        Err(not_here())
    }

    async fn suspend(&self, take: TakeSnapshot) -> Result<(), NodesError> {
        let (vm, id) = (take.vm, take.id);
        self.fuse.pass(|| format!("before suspending {vm}")).await;
        let key = take
            .key
            .and_then(|key| SnapshotKey::from_slice(key.expose()));
        let take = Take {
            id,
            kind: SnapshotKind::Suspend,
            key,
            made_at_s: take.made_at_s,
        };
        let taken = self.node.take(vm, take).await;
        self.fuse.pass(|| format!("after suspending {vm}")).await;
        match taken {
            Ok(_) => {
                self.trace.say(format!("{vm} is suspended to {id}"));
                self.trace.count("suspended");
                Ok(())
            }
            Err(error) => {
                self.trace.say(format!("{vm} is not suspended: {error}"));
                self.trace.count("not suspended");
                Err(failed(&error))
            }
        }
    }

    async fn note(&self, note: Note) -> Result<(), NodesError> {
        self.fuse.pass(|| "a note".to_owned()).await;
        self.trace
            .say(format!("note of {}: {}", note.vm, note.text));
        self.trace.count("notes");
        let noted = self.node.note(&note.owner, note.vm, note.text);
        noted.map_err(|error| failed(&error))
    }

    async fn snapshots(&self, account: String) -> Result<Vec<SnapshotInfo>, NodesError> {
        let listed = self.node.snapshots().list(&account).await;
        listed.map_err(|error| failed(&error))
    }

    async fn snapshot(&self, account: String, id: SnapshotId) -> Result<SnapshotInfo, NodesError> {
        self.fuse.pass(|| format!("snapshot {id}")).await;
        let info = self.node.snapshots().info(&account, id).await;
        info.map_err(|error| snapshot_error(&error))
    }

    async fn remove_snapshot(&self, removal: Removal) -> Result<Vec<SnapshotId>, NodesError> {
        self.fuse
            .pass(|| format!("before removing {}", removal.id))
            .await;
        let (account, in_use) = (removal.account.as_str(), removal.in_use);
        let snapshots = self.node.snapshots();
        let removed = snapshots.remove(account, removal.id, Cascade::Refuse, in_use);
        let removed = removed.await;
        self.fuse
            .pass(|| format!("after removing {}", removal.id))
            .await;
        removed.map_err(|error| snapshot_error(&error))
    }

    async fn compact_snapshot(
        &self,
        _account: String,
        _id: SnapshotId,
        _keys: SnapshotKeys,
    ) -> Result<SnapshotInfo, NodesError> {
        Err(not_here())
    }

    async fn collect_snapshots(
        &self,
        _keep: BTreeSet<SnapshotId>,
        _mode: CollectMode,
    ) -> Result<Vec<SnapshotInfo>, NodesError> {
        Err(not_here())
    }

    async fn forget_logs(&self, account: String, app: String) -> Result<(), NodesError> {
        self.fuse.pass(|| "forgetting a log".to_owned()).await;
        let removed = self.node.log_remove(&account, &app);
        removed.map_err(|error| NodesError::Failed {
            message: error.to_string(),
        })
    }

    async fn template_stage(&self, vm: VmId) -> Result<Option<TemplateStage>, NodesError> {
        Ok(self.node.template_stage(vm))
    }

    async fn node_status(&self) -> Result<NodeStatus, NodesError> {
        Ok(self.node.node_status())
    }
}

fn failed(error: &(impl core::error::Error + 'static)) -> NodesError {
    NodesError::Failed {
        message: chain(error),
    }
}

fn snapshot_error(error: &SnapshotsError) -> NodesError {
    let message = chain(error);
    match error {
        SnapshotsError::Store(SnapshotStoreError::Missing(_)) => NodesError::NotFound { message },
        SnapshotsError::Store(SnapshotStoreError::InUse(_) | SnapshotStoreError::Busy(_)) => {
            NodesError::Conflict { message }
        }
        _ => NodesError::Failed { message },
    }
}

fn not_here() -> NodesError {
    NodesError::Failed {
        message: "the simulation has no such thing".to_owned(),
    }
}
