//! Control's nodes, made of the one node of this host.
//!
//! Called by `spore-control` through its trait [`Nodes`]; translates, and decides nothing. Work
//! that blocks (packing images) happens on threads that may.

use std::collections::BTreeSet;
use std::io;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::stream;
use spore_api::log::{LogLine, LogSource};
use spore_control::clock::rfc3339;
use spore_control::nodes::{
    AfterTail, ByteStream, CollectMode, ExecInput, ExecOutput, ExecSession, LogsWanted, Nodes,
    NodesError, Note, Removal, Room, SnapshotKeys, TakeSnapshot, TakenSnapshot, VmFeed, vm_feed,
};
use spore_node::image::debian::DebianError;
use spore_node::image::packer::BuildError;
use spore_node::image::store::{Filing, GcMode, ImageStore, StoreError};
use spore_node::image::workshop::{WorkError, Workshop, packages};
use spore_node::log::{Follow, Followed, LogError};
use spore_node::node::{Node, StartError, Together, VmError};
use spore_node::vm::guest::{ExecStream, FileReader, GuestError};
use spore_wire::cause::chain;
use spore_wire::guest::{AgentErrorCode, Exec, OutputKind, WriteFile};
use spore_wire::id::{ImageId, SnapshotId, VmId};
use spore_wire::node::{
    ImageInfo, ImageKind, ImageRecipe, NodeEvent, NodeStatus, StartVm, StopMode, TemplateStage,
    VmStatus,
};
use spore_wire::snapshot::SnapshotInfo;
use tokio::io::AsyncReadExt;
use tokio::sync::mpsc;
use tokio_util::io::StreamReader;

use super::snapshots;

/// Messages of an exec that may wait on either side before the other is held up.
const EXEC_QUEUE: usize = 16;

/// Log lines that may wait for a slow reader before it is held up.
const LOG_QUEUE: usize = 64;

/// An image that was made so lately is no garbage: control may be about to write down whose it is.
const UNCLAIMED_KEPT_S: u64 = 60;

/// The bytes of one piece of a file on its way to a guest.
const FILE_PIECE_BYTES: usize = 32 * 1024;

/// This host, as control sees it.
#[derive(Debug)]
pub(crate) struct Host {
    /// Its VMs.
    pub(crate) node: Node,
    /// Its images.
    pub(crate) images: ImageStore,
    /// How more are made.
    pub(crate) workshop: Workshop,
}

#[async_trait]
impl Nodes for Host {
    async fn start(&self, start: StartVm) -> Result<(), NodesError> {
        self.node.start(start).map(drop).map_err(start_error)
    }

    async fn start_many(&self, starts: Vec<StartVm>, room: Room) -> Vec<Result<(), NodesError>> {
        let together = match room {
            Room::ForSome => Together::Each,
            Room::ForAll => Together::All,
        };
        let started = self.node.start_many(starts, together).into_iter();
        started
            .map(|one| one.map(drop).map_err(start_error))
            .collect()
    }

    async fn stop(&self, vm: VmId, mode: StopMode) -> Result<(), NodesError> {
        self.node.stop(vm, mode).await.map_err(vm_error)
    }

    async fn status(&self, vm: VmId) -> Result<Option<VmStatus>, NodesError> {
        Ok(self.node.status(vm))
    }

    async fn list(&self) -> Result<Vec<VmStatus>, NodesError> {
        let mut all = self.node.list();
        all.retain(|status| !status.phase.is_over() && status.purpose.is_serve());
        Ok(all)
    }

    fn subscribe(&self) -> VmFeed {
        let (publisher, feed) = vm_feed();
        let mut watch = self.node.watch();
        tokio::spawn(async move {
            loop {
                let NodeEvent::Vm(status) = watch.next().await;
                // The node's own VMs are nobody else's to stop.
                if status.purpose.is_serve() {
                    publisher.publish(status);
                }
            }
        });
        feed
    }

    async fn exec(&self, vm: VmId, exec: Exec) -> Result<ExecSession, NodesError> {
        let program = self.node.exec(vm, exec).await.map_err(vm_error)?;
        let (input, orders) = mpsc::channel(EXEC_QUEUE);
        let (news, output) = mpsc::channel(EXEC_QUEUE);
        tokio::spawn(carry(program, orders, news));
        Ok(ExecSession { input, output })
    }

    async fn read_file(&self, vm: VmId, path: String) -> Result<ByteStream, NodesError> {
        let reader = self.node.read_file(vm, path).await.map_err(vm_error)?;
        // The first piece is fetched now, so that a file that cannot be opened is an error here.
        let first = match reader.next().await.map_err(guest_error)? {
            Some(bytes) => Some(bytes),
            None => {
                reader.finish().await.map_err(guest_error)?;
                return Ok(Box::new(tokio::io::empty()));
            }
        };
        let pieces = stream::unfold((reader, first), next_piece);
        Ok(Box::new(StreamReader::new(Box::pin(pieces))))
    }

    async fn write_file(
        &self,
        vm: VmId,
        file: WriteFile,
        mut body: ByteStream,
    ) -> Result<u64, NodesError> {
        let writer = self.node.write_file(vm, file).await.map_err(vm_error)?;
        let mut piece = vec![0; FILE_PIECE_BYTES];
        let mut total = 0_u64;
        loop {
            let bytes = body
                .read(&mut piece)
                .await
                .map_err(|error| NodesError::Invalid {
                    message: format!("the upload ended early: {error}; send it again"),
                })?;
            if bytes == 0 {
                break;
            }
            total += bytes as u64;
            if let Err(error) = writer.send(&piece[..bytes]).await {
                // The agent may have refused meanwhile, and its reason says more.
                return Err(guest_error(writer.finish().await.err().unwrap_or(error)));
            }
        }
        writer.finish().await.map_err(guest_error)?;
        Ok(total)
    }

    async fn logs(&self, wanted: LogsWanted) -> Result<mpsc::Receiver<LogLine>, NodesError> {
        let node = self.node.clone();
        let read = blocking(move || {
            let LogsWanted { account, app, .. } = &wanted;
            let tail = usize::try_from(wanted.tail).unwrap_or(usize::MAX);
            match wanted.then {
                AfterTail::End => Ok((node.log_tail(account, app, tail)?, None)),
                AfterTail::Follow => {
                    let (lines, follow) = node.log_follow(account, app, tail)?;
                    Ok((lines, Some(follow)))
                }
            }
        });
        let (lines, follow) = read.await?.map_err(|error| log_error(&error))?;
        let (sender, receiver) = mpsc::channel(LOG_QUEUE);
        tokio::spawn(tell_lines(lines, follow, sender));
        Ok(receiver)
    }

    async fn import_source(
        &self,
        body: ByteStream,
        kind: ImageKind,
        bytes_max: u64,
    ) -> Result<ImageInfo, NodesError> {
        let at_s = now_s();
        let filing = Filing { at_s, bytes_max };
        let imported = self.workshop.import(body, kind, filing).await;
        imported.map_err(|error| work_error(&error))
    }

    async fn build_image(
        &self,
        recipe: ImageRecipe,
        bytes_max: u64,
        progress: mpsc::Sender<String>,
    ) -> Result<ImageInfo, NodesError> {
        let recipe = packages(recipe).map_err(|error| debian_error(&error))?;
        let text = format!("install {} and what they need", recipe.join(", "));
        if progress.send(text).await.is_err() {
            tracing::debug!("nobody follows the build");
        }
        let at_s = now_s();
        let filing = Filing { at_s, bytes_max };
        let built = self.workshop.build(recipe, filing).await;
        built.map_err(|error| work_error(&error))
    }

    async fn collect_images(
        &self,
        mut keep: BTreeSet<ImageId>,
        mode: CollectMode,
    ) -> Result<Vec<ImageInfo>, NodesError> {
        let mode = gc_mode(mode);
        let node = self.node.clone();
        let in_use = blocking(move || node.images_in_use()).await?;
        keep.extend(in_use.map_err(|error| NodesError::Failed {
            message: chain(&error),
        })?);
        let images = self.images.clone();
        let filed_before_s = now_s().saturating_sub(UNCLAIMED_KEPT_S);
        blocking(move || images.gc(&keep, filed_before_s, mode))
            .await?
            .map_err(|error| store_error(&error))
    }

    async fn checkpoint(&self, take: TakeSnapshot) -> Result<TakenSnapshot, NodesError> {
        snapshots::checkpoint(&self.node, take).await
    }

    async fn suspend(&self, take: TakeSnapshot) -> Result<(), NodesError> {
        snapshots::suspend(&self.node, take).await
    }

    async fn note(&self, note: Note) -> Result<(), NodesError> {
        let node = self.node.clone();
        let Note { owner, vm, text } = note;
        blocking(move || node.note(&owner, vm, text))
            .await?
            .map_err(|error| log_error(&error))
    }

    async fn snapshots(&self, account: String) -> Result<Vec<SnapshotInfo>, NodesError> {
        let listed = self.node.snapshots().list(&account).await;
        listed.map_err(snapshots::error)
    }

    async fn snapshot(&self, account: String, id: SnapshotId) -> Result<SnapshotInfo, NodesError> {
        let info = self.node.snapshots().info(&account, id).await;
        info.map_err(snapshots::error)
    }

    async fn remove_snapshot(&self, removal: Removal) -> Result<Vec<SnapshotId>, NodesError> {
        snapshots::remove(&self.node, removal).await
    }

    async fn compact_snapshot(
        &self,
        account: String,
        id: SnapshotId,
        keys: SnapshotKeys,
    ) -> Result<SnapshotInfo, NodesError> {
        let keys = snapshots::keys(&keys)?;
        let compacted = self.node.snapshots().compact(&account, id, keys).await;
        compacted.map_err(snapshots::error)
    }

    async fn collect_snapshots(
        &self,
        mut keep: BTreeSet<SnapshotId>,
        mode: CollectMode,
    ) -> Result<Vec<SnapshotInfo>, NodesError> {
        // Control does not know of them.
        keep.extend(self.node.template_ids());
        let collected = self.node.snapshots().gc(keep, gc_mode(mode)).await;
        collected.map_err(snapshots::error)
    }

    async fn forget_logs(&self, account: String, app: String) -> Result<(), NodesError> {
        let node = self.node.clone();
        node.forget_warm(&account, &app).await;
        blocking(move || node.log_remove(&account, &app))
            .await?
            .map_err(|error| log_error(&error))
    }

    async fn template_stage(&self, vm: VmId) -> Result<Option<TemplateStage>, NodesError> {
        Ok(self.node.template_stage(vm))
    }

    async fn node_status(&self) -> Result<NodeStatus, NodesError> {
        Ok(self.node.node_status())
    }
}

const fn gc_mode(mode: CollectMode) -> GcMode {
    match mode {
        CollectMode::Remove => GcMode::Remove,
        CollectMode::DryRun => GcMode::DryRun,
    }
}

/// Carries an exec's input and output until it ends or nobody listens; dropping the stream ends
/// the program.
async fn carry(
    program: ExecStream,
    mut orders: mpsc::Receiver<ExecInput>,
    news: mpsc::Sender<ExecOutput>,
) {
    let feed = async {
        while let Some(order) = orders.recv().await {
            let told = match order {
                ExecInput::Stdin(bytes) => program.send_stdin(&bytes).await,
                ExecInput::StdinEnd => program.close_stdin().await,
                ExecInput::Resize(size) => program.resize(size).await,
                ExecInput::Signal(signal) => program.signal(signal).await,
            };
            if let Err(error) = told {
                // Its output says how it ended.
                tracing::debug!(%error, "a program does not take its input");
                std::future::pending::<()>().await;
            }
        }
        // The caller is gone, and the program goes with the stream.
    };
    let read = async {
        let ended = loop {
            match program.next_output().await {
                Ok(Some((of, bytes))) => {
                    let bytes = Bytes::from(bytes);
                    let output = match of {
                        OutputKind::Stdout => ExecOutput::Stdout(bytes),
                        OutputKind::Stderr => ExecOutput::Stderr(bytes),
                    };
                    if news.send(output).await.is_err() {
                        return;
                    }
                }
                Ok(None) => break program.wait().await,
                Err(error) => break Err(error),
            }
        };
        let last = match ended {
            Ok(exit) => ExecOutput::Exit(exit),
            Err(error) => ExecOutput::Failed(guest_error(error)),
        };
        drop(news.send(last).await);
    };
    tokio::select! {
        () = feed => {}
        () = read => {}
        () = news.closed() => {}
    }
}

type FilePieces = (FileReader, Option<Vec<u8>>);

async fn next_piece((reader, first): FilePieces) -> Option<(io::Result<Bytes>, FilePieces)> {
    if let Some(bytes) = first {
        return Some((Ok(Bytes::from(bytes)), (reader, None)));
    }
    let piece = match reader.next().await {
        Ok(Some(bytes)) => Ok(Bytes::from(bytes)),
        Ok(None) => match reader.finish().await {
            Ok(_whole) => return None,
            Err(error) => Err(io::Error::other(error)),
        },
        Err(error) => Err(io::Error::other(error)),
    };
    Some((piece, (reader, None)))
}

async fn tell_lines(
    lines: Vec<spore_node::log::LogLine>,
    follow: Option<Follow>,
    to: mpsc::Sender<LogLine>,
) {
    for line in lines {
        if to.send(api_line(&line, 0)).await.is_err() {
            return;
        }
    }
    let Some(mut follow) = follow else {
        return;
    };
    let mut missed = 0;
    loop {
        let next = tokio::select! {
            next = follow.next() => next,
            () = to.closed() => return,
        };
        match next {
            Some(Followed::Line(line)) => {
                let line = api_line(&line, std::mem::take(&mut missed));
                if to.send(line).await.is_err() {
                    return;
                }
            }
            Some(Followed::Missed(more)) => missed += more,
            None => return,
        }
    }
}

/// A line as it is shown, behind `missed` lines that its reader was too slow for.
fn api_line(line: &spore_node::log::LogLine, missed: u64) -> LogLine {
    let at_ms = i64::try_from(line.at_us / 1000).unwrap_or(i64::MAX);
    let from = match line.from {
        _ if line.of_platform => LogSource::Platform,
        OutputKind::Stdout => LogSource::Stdout,
        OutputKind::Stderr => LogSource::Stderr,
    };
    let mut text = String::new();
    if missed > 0 {
        text.push_str(&format!(
            "({missed} lines were passed over: this reader is slow) "
        ));
    }
    if line.dropped > 0 {
        let dropped = line.dropped;
        text.push_str(&format!("({dropped} lines were dropped before this one) "));
    }
    text.push_str(&line.text);
    LogLine {
        at: rfc3339(at_ms),
        vm: line.vm.to_string(),
        release: line.release,
        from,
        text,
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, NodesError> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| NodesError::Failed {
            message: format!("a worker ended: {error}"),
        })
}

fn now_s() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
    u64::try_from(now.tv_sec).unwrap_or(0)
}

fn start_error(error: StartError) -> NodesError {
    let message = error.to_string();
    match error {
        StartError::NoRoom(_) | StartError::NoImageRoom(_) | StartError::NotAll => {
            NodesError::NoCapacity { message }
        }
        StartError::NoForks | StartError::Key { .. } => NodesError::Snapshot { message },
        StartError::Image(_) => NodesError::Image { message },
        StartError::Name(_) => NodesError::Invalid { message },
        _ => NodesError::Failed { message },
    }
}

fn vm_error(error: VmError) -> NodesError {
    match error {
        VmError::Unknown(vm) => NodesError::NoVm { vm },
        VmError::Guest(error) => guest_error(error),
        other => NodesError::Failed {
            message: chain(&other),
        },
    }
}

fn guest_error(error: GuestError) -> NodesError {
    let message = error.to_string();
    match error {
        GuestError::Timeout(_) => NodesError::Timeout { message },
        GuestError::Refused {
            code: AgentErrorCode::NotFound,
            ..
        } => NodesError::NotFound { message },
        GuestError::Refused {
            code: AgentErrorCode::Invalid,
            ..
        }
        | GuestError::TooLarge => NodesError::Invalid { message },
        _ => NodesError::Failed { message },
    }
}

fn log_error(error: &LogError) -> NodesError {
    match error {
        LogError::Name(_) => NodesError::Invalid {
            message: error.to_string(),
        },
        LogError::File { .. } => NodesError::Failed {
            message: chain(error),
        },
    }
}

fn work_error(error: &WorkError) -> NodesError {
    let message = error.to_string();
    match error {
        WorkError::Busy { .. } => NodesError::Busy { message },
        WorkError::Build(error) => build_error(error),
        WorkError::Debian(error) => debian_error(error),
        WorkError::Cgroup(_) | WorkError::Thread(_) => NodesError::Failed {
            message: chain(error),
        },
    }
}

fn debian_error(error: &DebianError) -> NodesError {
    match error {
        DebianError::Build(error) => build_error(error),
        DebianError::Recipe(_) | DebianError::Package(_) | DebianError::TooMany(_) => {
            NodesError::Invalid {
                message: error.to_string(),
            }
        }
        other => NodesError::Failed {
            message: chain(other),
        },
    }
}

fn build_error(error: &BuildError) -> NodesError {
    let message = error.to_string();
    match error {
        BuildError::Source(cause) if cause.kind() == io::ErrorKind::FileTooLarge => {
            NodesError::TooLarge {
                message: cause.to_string(),
            }
        }
        // A silent sender reads why; how else a connection broke is nothing to act on.
        BuildError::Source(cause) if cause.kind() == io::ErrorKind::TimedOut => {
            NodesError::Invalid {
                message: chain(error),
            }
        }
        BuildError::Refused(_) | BuildError::Source(_) | BuildError::OutOfMemory => {
            NodesError::Invalid { message }
        }
        BuildError::Full => NodesError::DiskFull { message },
        BuildError::Ended(_) => NodesError::Timeout { message },
        BuildError::Store(error) => store_error(error),
        other => NodesError::Failed {
            message: chain(other),
        },
    }
}

fn store_error(error: &StoreError) -> NodesError {
    match error {
        StoreError::OverBudget { bytes, .. } => NodesError::OverQuota { bytes: *bytes },
        StoreError::File { source, .. } if source.kind() == io::ErrorKind::StorageFull => {
            NodesError::DiskFull {
                message: "the data disk is full: `spore image gc` or a larger disk helps".into(),
            }
        }
        StoreError::Missing(_) | StoreError::Damaged { .. } => NodesError::Image {
            message: error.to_string(),
        },
        other => NodesError::Failed {
            message: chain(other),
        },
    }
}
