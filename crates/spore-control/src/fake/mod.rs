//! A scripted node and a gateway of a few lines, for tests.
//!
//! The node obeys its contract: a VM moves through its phases in time, ends, and is told by the
//! feed. The gateway answers reaps by what is in flight. Both remember what was asked of them.

use core::time::Duration;
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::{Arc, Mutex, OnceLock};

use async_trait::async_trait;
use bytes::Bytes;
use spore_api::log::{LogLine, LogSource};
use spore_wire::gateway::{Activity, AppKey, FromGateway, Phase, ToGateway, WakeFailure};
use spore_wire::guest::{AppStatus, Exec, Exit, WriteFile};
use spore_wire::id::{ImageId, SnapshotId, VmId};
use spore_wire::node::{
    Boundary, ImageInfo, ImageKind, ImageRecipe, MemoryStatus, NodeStatus, Purpose, Source,
    StartVm, StopMode, TemplateStage, TemplateStatus, VmFailure, VmFailureKind, VmPhase, VmStatus,
};
use spore_wire::snapshot::{SnapshotInfo, SnapshotKind};
use tokio::io::AsyncReadExt as _;
use tokio::sync::{Notify, mpsc};

use crate::config::{Config, Timing};
use crate::converge::{AppRef, Converge};
use crate::door::Door;
use crate::nodes::{
    ByteStream, CollectMode, ExecInput, ExecOutput, ExecSession, LogsWanted, Nodes, NodesError,
    Note, Removal, Room, SnapshotKeys, TakeSnapshot, TakenSnapshot, VmFeed, VmPublisher, vm_feed,
};

mod snapshots;
mod store;

pub(crate) use store::MoodyStore;

/// What VMs of a release do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Act {
    /// Ready after so many milliseconds.
    Ready(u64),
    /// Never ready.
    Hang,
    /// The app ends before it is ready.
    Crash,
    /// Ready at once, then dead after so many milliseconds.
    Die(u64),
    /// The node refuses it for want of room.
    NoRoom,
    /// The node fails.
    Broken,
}

#[derive(Default)]
pub(crate) struct NodeState {
    pub(crate) acts: HashMap<(String, u64), Act>,
    pub(crate) vms: BTreeMap<VmId, VmStatus>,
    pub(crate) starts: Vec<StartVm>,
    /// What owners were told.
    pub(crate) notes: Vec<String>,
    pub(crate) stops: Vec<(VmId, StopMode)>,
    /// The most VMs that one app had at once.
    pub(crate) most_at_once: HashMap<String, usize>,
    pub(crate) files: BTreeMap<String, Vec<u8>>,
    pub(crate) kept: Option<BTreeSet<ImageId>>,
    /// Apps whose log was forgotten.
    pub(crate) logs_forgotten: Vec<String>,
    /// No log can be removed.
    pub(crate) logs_stay: bool,
    /// A stop changes nothing.
    pub(crate) stops_hang: bool,
    pub(crate) recipes: Vec<ImageRecipe>,
    pub(crate) images: BTreeSet<ImageId>,
    /// Snapshots, and what each is encrypted with.
    pub(crate) snapshots: snapshots::Shelf,
    /// The most sandboxes that there is room for.
    pub(crate) sandboxes_max: Option<usize>,
    /// What sandboxes do, in the order of their starts; the rest are ready in 10 ms.
    pub(crate) sandbox_acts: VecDeque<Act>,
}

impl NodeState {
    fn sandboxes_left(&self) -> Option<usize> {
        let there = self.vms.values().filter(|status| status.owner.release == 0);
        let there = there.count();
        self.sandboxes_max.map(|most| most.saturating_sub(there))
    }

    fn admit_sandbox(&self) -> Result<(), NodesError> {
        let message = "the host has no memory left: stop an app".to_owned();
        match self.sandboxes_left() {
            Some(0) => Err(NodesError::NoCapacity { message }),
            _ => Ok(()),
        }
    }
}

/// A node.
#[derive(Clone)]
pub(crate) struct FakeNodes {
    pub(crate) state: Arc<Mutex<NodeState>>,
    publisher: Arc<Mutex<VmPublisher>>,
}

impl FakeNodes {
    pub(crate) fn new() -> Self {
        Self {
            state: Arc::default(),
            publisher: Arc::new(Mutex::new(vm_feed().0)),
        }
    }

    pub(crate) fn act(&self, app: &str, release: u64, act: Act) {
        let mut state = self.state.lock().unwrap();
        state.acts.insert((app.to_owned(), release), act);
    }

    pub(crate) fn starts(&self) -> usize {
        self.state.lock().unwrap().starts.len()
    }

    pub(crate) fn running(&self) -> Vec<(VmId, u64)> {
        let state = self.state.lock().unwrap();
        state
            .vms
            .values()
            .map(|s| (s.vm, s.owner.release))
            .collect()
    }

    /// Moves a VM on; nothing happens to one that is over.
    pub(crate) fn set(&self, vm: VmId, change: impl FnOnce(&mut VmStatus)) {
        let mut state = self.state.lock().unwrap();
        let Some(status) = state.vms.get_mut(&vm) else {
            return;
        };
        change(status);
        let status = status.clone();
        if status.phase.is_over() {
            state.vms.remove(&vm);
        }
        drop(state);
        self.publisher.lock().unwrap().publish(status);
    }

    pub(crate) fn die(&self, vm: VmId, kind: VmFailureKind) {
        self.set(vm, |status| {
            status.phase = VmPhase::Failed;
            status.failure = Some(VmFailure {
                kind,
                message: "the app ended with code 1".to_owned(),
                last_lines: vec!["Traceback".to_owned(), "KeyError: 'X'".to_owned()],
            });
        });
    }

    /// The last VM that went on from a suspended one's snapshot never ran.
    pub(crate) fn shelve_again(&self) {
        self.state.lock().unwrap().snapshots.serve_again();
    }

    /// A VM that vanishes without a word.
    pub(crate) fn vanish(&self, vm: VmId) {
        self.state.lock().unwrap().vms.remove(&vm);
    }

    async fn live(self, vm: VmId, act: Act) {
        let wait = |ms| tokio::time::sleep(Duration::from_millis(ms));
        wait(1).await;
        self.set(vm, |s| s.phase = VmPhase::Booting);
        wait(1).await;
        if act == Act::Crash {
            return self.die(vm, VmFailureKind::App);
        }
        if act == Act::Hang {
            return;
        }
        wait(if let Act::Ready(ms) = act { ms } else { 1 }).await;
        let phase = |name: &str, us| Phase {
            name: name.to_owned(),
            us,
        };
        self.set(vm, |s| {
            if s.phase < VmPhase::Ready {
                s.phase = VmPhase::Ready;
                s.app = AppStatus::Ready { pid: 7 };
                s.phases = vec![phase("boot", 2000), phase("app", 500)];
                s.boot_id = Some("boot".to_owned());
            }
        });
        if let Act::Die(ms) = act {
            wait(ms).await;
            self.die(vm, VmFailureKind::Died);
        }
    }
}

#[async_trait]
impl Nodes for FakeNodes {
    async fn start(&self, start: StartVm) -> Result<(), NodesError> {
        let vm = start.vm;
        let key = (start.owner.app.clone(), start.owner.release);
        let mut state = self.state.lock().unwrap();
        if state.vms.contains_key(&vm) {
            // It only hears the secrets again.
            state.starts.push(start);
            return Ok(());
        }
        let given = state.acts.get(&key).copied();
        let act = given.or_else(|| match key.1 {
            0 => state.sandbox_acts.pop_front(),
            _ => None,
        });
        let act = act.unwrap_or(Act::Ready(10));
        if key.1 == 0 {
            state.admit_sandbox()?;
            state.snapshots.open(&start)?;
        } else if let Source::Suspended(id) = start.source {
            state.snapshots.open(&start)?;
            state.snapshots.serve(id);
        }
        let message = "the host has no memory left: stop an app".to_owned();
        match act {
            Act::NoRoom => return Err(NodesError::NoCapacity { message }),
            Act::Broken => {
                let message = "broken".to_owned();
                return Err(NodesError::Failed { message });
            }
            _ => {}
        }
        let status = VmStatus {
            vm,
            owner: start.owner.clone(),
            phase: VmPhase::Preparing,
            failure: None,
            app: AppStatus::Absent,
            phases: Vec::new(),
            boundary: Boundary::None,
            hypervisor: "sim".to_owned(),
            source: match start.source {
                Source::Template(_) => Source::Boot,
                source => source,
            },
            missed: None,
            is_warm: false,
            purpose: Purpose::Serve,
            boot_id: None,
            awake_for_ms: 0,
        };
        state.vms.insert(vm, status.clone());
        let at_once = state.vms.values().filter(|s| s.owner.app == key.0).count();
        let most = state.most_at_once.entry(key.0).or_default();
        *most = at_once.max(*most);
        state.starts.push(start);
        drop(state);
        self.publisher.lock().unwrap().publish(status);
        tokio::spawn(self.clone().live(vm, act));
        Ok(())
    }

    async fn start_many(&self, starts: Vec<StartVm>, room: Room) -> Vec<Result<(), NodesError>> {
        let message = "the host has no memory left: stop an app".to_owned();
        let left = self.state.lock().unwrap().sandboxes_left();
        if room == Room::ForAll && left.is_some_and(|left| left < starts.len()) {
            let refused = |_start| {
                Err(NodesError::NoCapacity {
                    message: message.clone(),
                })
            };
            return starts.into_iter().map(refused).collect();
        }
        let mut answers = Vec::new();
        for start in starts {
            answers.push(self.start(start).await);
        }
        answers
    }

    async fn stop(&self, vm: VmId, mode: StopMode) -> Result<(), NodesError> {
        let known = {
            let mut state = self.state.lock().unwrap();
            state.stops.push((vm, mode));
            if state.stops_hang {
                return Ok(());
            }
            state.vms.contains_key(&vm)
        };
        if !known {
            return Err(NodesError::NoVm { vm });
        }
        self.set(vm, |status| status.phase = VmPhase::Draining);
        let node = self.clone();
        tokio::spawn(async move {
            tokio::time::sleep(Duration::from_millis(5)).await;
            node.set(vm, |status| status.phase = VmPhase::Stopped);
        });
        Ok(())
    }

    async fn status(&self, vm: VmId) -> Result<Option<VmStatus>, NodesError> {
        Ok(self.state.lock().unwrap().vms.get(&vm).cloned())
    }

    async fn list(&self) -> Result<Vec<VmStatus>, NodesError> {
        Ok(self.state.lock().unwrap().vms.values().cloned().collect())
    }

    fn subscribe(&self) -> VmFeed {
        let (publisher, feed) = vm_feed();
        *self.publisher.lock().unwrap() = publisher;
        feed
    }

    async fn exec(&self, _vm: VmId, exec: Exec) -> Result<ExecSession, NodesError> {
        if exec.argv[0] == "missing" {
            let message = "no program `missing` in PATH".to_owned();
            return Err(NodesError::NotFound { message });
        }
        let (input, mut stdin) = mpsc::channel(4);
        let (out, output) = mpsc::channel(4);
        tokio::spawn(async move {
            // A `cat` that says on standard error what else it was told.
            while let Some(message) = stdin.recv().await {
                let sent = match message {
                    ExecInput::Stdin(bytes) => out.send(ExecOutput::Stdout(bytes)).await,
                    ExecInput::StdinEnd => break,
                    other => {
                        let text = format!("{other:?}").into_bytes();
                        out.send(ExecOutput::Stderr(Bytes::from(text))).await
                    }
                };
                if sent.is_err() {
                    return;
                }
            }
            drop(out.send(ExecOutput::Exit(Exit::Code { code: 3 })).await);
        });
        Ok(ExecSession { input, output })
    }

    async fn read_file(&self, _vm: VmId, path: String) -> Result<ByteStream, NodesError> {
        let state = self.state.lock().unwrap();
        match state.files.get(&path) {
            Some(bytes) => Ok(Box::new(std::io::Cursor::new(bytes.clone()))),
            None => {
                let message = format!("there is no file {path} in the app");
                Err(NodesError::NotFound { message })
            }
        }
    }

    async fn write_file(
        &self,
        _vm: VmId,
        file: WriteFile,
        mut body: ByteStream,
    ) -> Result<u64, NodesError> {
        let mut bytes = Vec::new();
        let message = "the upload broke off".to_owned();
        let read = body.read_to_end(&mut bytes).await;
        read.map_err(|_e| NodesError::Invalid { message })?;
        let count = bytes.len() as u64;
        self.state.lock().unwrap().files.insert(file.path, bytes);
        Ok(count)
    }

    async fn logs(&self, wanted: LogsWanted) -> Result<mpsc::Receiver<LogLine>, NodesError> {
        let (lines, receiver) = mpsc::channel(8);
        tokio::spawn(async move {
            for n in 0..wanted.tail.min(3) {
                let line = LogLine {
                    at: "2026-01-01T00:00:00Z".to_owned(),
                    vm: "v".to_owned(),
                    release: 1,
                    from: LogSource::Stdout,
                    text: format!("{} line {n}", wanted.app),
                };
                drop(lines.send(line).await);
            }
            if wanted.then == crate::nodes::AfterTail::Follow {
                lines.closed().await;
            }
        });
        Ok(receiver)
    }

    async fn import_source(
        &self,
        mut body: ByteStream,
        kind: ImageKind,
        bytes_max: u64,
    ) -> Result<ImageInfo, NodesError> {
        let mut bytes = Vec::new();
        body.read_to_end(&mut bytes).await.map_err(|error| {
            let message = error.to_string();
            match error.kind() {
                std::io::ErrorKind::FileTooLarge => NodesError::TooLarge { message },
                _ => NodesError::Invalid { message },
            }
        })?;
        let info = info(&bytes, kind);
        let images = &mut self.state.lock().unwrap().images;
        if info.bytes > bytes_max && !images.contains(&info.id) {
            return Err(NodesError::OverQuota { bytes: info.bytes });
        }
        images.insert(info.id);
        Ok(info)
    }

    async fn build_image(
        &self,
        recipe: ImageRecipe,
        _bytes_max: u64,
        progress: mpsc::Sender<String>,
    ) -> Result<ImageInfo, NodesError> {
        drop(progress.send("Fetching packages".to_owned()).await);
        tokio::time::sleep(Duration::from_millis(20)).await;
        drop(progress.send("Packing".to_owned()).await);
        let text = format!("{recipe:?}");
        self.state.lock().unwrap().recipes.push(recipe);
        if text.contains("nosuch") {
            let message = "there is no package `nosuch`".to_owned();
            return Err(NodesError::NotFound { message });
        }
        Ok(info(text.as_bytes(), ImageKind::Root))
    }

    async fn collect_images(
        &self,
        keep: BTreeSet<ImageId>,
        _mode: CollectMode,
    ) -> Result<Vec<ImageInfo>, NodesError> {
        self.state.lock().unwrap().kept = Some(keep);
        Ok(vec![info(b"old", ImageKind::Root)])
    }

    async fn checkpoint(&self, take: TakeSnapshot) -> Result<TakenSnapshot, NodesError> {
        let mut state = self.state.lock().unwrap();
        let status = state.vms.get(&take.vm);
        let status = status.cloned().ok_or(NodesError::NoVm { vm: take.vm })?;
        let of_vm = |start: &&StartVm| start.vm == take.vm;
        let start = state.starts.iter().find(of_vm).cloned();
        let kind = SnapshotKind::Checkpoint;
        state
            .snapshots
            .take(&take, kind, &start.unwrap(), status.owner)
    }

    async fn suspend(&self, take: TakeSnapshot) -> Result<(), NodesError> {
        {
            let mut state = self.state.lock().unwrap();
            let status = state.vms.get(&take.vm);
            let status = status.cloned().ok_or(NodesError::NoVm { vm: take.vm })?;
            let of_vm = |start: &&StartVm| start.vm == take.vm;
            let start = state.starts.iter().find(of_vm).cloned().unwrap();
            let kind = SnapshotKind::Suspend;
            state.snapshots.take(&take, kind, &start, status.owner)?;
        }
        self.set(take.vm, |status| status.phase = VmPhase::Draining);
        let node = self.clone();
        tokio::spawn(async move {
            tokio::time::sleep(Duration::from_millis(5)).await;
            node.set(take.vm, |status| status.phase = VmPhase::Stopped);
        });
        Ok(())
    }

    async fn note(&self, note: Note) -> Result<(), NodesError> {
        self.state.lock().unwrap().notes.push(note.text);
        Ok(())
    }

    async fn snapshots(&self, account: String) -> Result<Vec<SnapshotInfo>, NodesError> {
        Ok(self.state.lock().unwrap().snapshots.of(&account))
    }

    async fn snapshot(&self, account: String, id: SnapshotId) -> Result<SnapshotInfo, NodesError> {
        self.state.lock().unwrap().snapshots.info(&account, id)
    }

    async fn remove_snapshot(&self, removal: Removal) -> Result<Vec<SnapshotId>, NodesError> {
        self.state.lock().unwrap().snapshots.remove(&removal)
    }

    async fn compact_snapshot(
        &self,
        account: String,
        id: SnapshotId,
        keys: SnapshotKeys,
    ) -> Result<SnapshotInfo, NodesError> {
        let mut state = self.state.lock().unwrap();
        state.snapshots.compact(&account, id, &keys)
    }

    async fn collect_snapshots(
        &self,
        keep: BTreeSet<SnapshotId>,
        mode: CollectMode,
    ) -> Result<Vec<SnapshotInfo>, NodesError> {
        Ok(self.state.lock().unwrap().snapshots.collect(&keep, mode))
    }

    async fn forget_logs(&self, _account: String, app: String) -> Result<(), NodesError> {
        let mut state = self.state.lock().unwrap();
        if state.logs_stay {
            let message = "the log cannot be removed".to_owned();
            return Err(NodesError::Failed { message });
        }
        let runs = state.vms.values().any(|status| status.owner.app == app);
        assert!(!runs, "a VM of {app} could still print");
        state.logs_forgotten.push(app);
        Ok(())
    }

    async fn template_stage(&self, vm: VmId) -> Result<Option<TemplateStage>, NodesError> {
        let is_there = self.running().iter().any(|(running, _)| *running == vm);
        Ok(is_there.then_some(TemplateStage::Booting))
    }

    async fn node_status(&self) -> Result<NodeStatus, NodesError> {
        Ok(NodeStatus {
            hypervisor: "qemu".to_owned(),
            hypervisor_version: "7.2".to_owned(),
            boundary: Boundary::None,
            kernel: "6.1".to_owned(),
            memory_mib_total: 1024,
            memory_mib_used: 0,
            vms: u32::try_from(self.running().len()).unwrap(),
            templates: TemplateStatus::default(),
            memories: MemoryStatus::default(),
        })
    }
}

fn info(bytes: &[u8], kind: ImageKind) -> ImageInfo {
    ImageInfo {
        id: ImageId::from_hash(*blake3::hash(bytes).as_bytes()),
        kind,
        bytes: bytes.len() as u64,
        entries: 1,
        made_at_s: 0,
    }
}

#[derive(Default)]
pub(crate) struct DoorState {
    pub(crate) sent: Vec<ToGateway>,
    pub(crate) awake: HashMap<AppKey, VmId>,
    pub(crate) in_flight: HashMap<VmId, u32>,
    answers: HashMap<AppKey, Vec<Result<VmId, WakeFailure>>>,
}

/// A gateway.
#[derive(Clone, Default)]
pub(crate) struct FakeDoor {
    pub(crate) state: Arc<Mutex<DoorState>>,
    news: Arc<Notify>,
    control: Arc<OnceLock<Converge>>,
}

impl FakeDoor {
    pub(crate) fn attach(&self, converge: &Converge) {
        assert!(self.control.set(converge.clone()).is_ok());
    }

    /// A visitor's request: waits for the app to be awake.
    pub(crate) async fn request(&self, app: &AppRef) -> Result<VmId, WakeFailure> {
        let key = app.key();
        let news = self.news.notified();
        tokio::pin!(news);
        news.as_mut().enable();
        {
            let mut state = self.state.lock().unwrap();
            if let Some(vm) = state.awake.get(&key) {
                return Ok(*vm);
            }
            state.answers.entry(key.clone()).or_default().clear();
        }
        let ask = FromGateway::Wake {
            app: key.clone(),
            trace: None,
        };
        self.control.get().unwrap().door_event(ask);
        loop {
            news.as_mut().await;
            news.set(self.news.notified());
            news.as_mut().enable();
            let answer = self
                .state
                .lock()
                .unwrap()
                .answers
                .get_mut(&key)
                .and_then(Vec::pop);
            if let Some(answer) = answer {
                return answer;
            }
        }
    }

    /// Tells how busy a VM is.
    pub(crate) fn busy(&self, app: &AppRef, vm: VmId, in_flight: u32) {
        self.state.lock().unwrap().in_flight.insert(vm, in_flight);
        let activity = Activity {
            app: app.key(),
            vm,
            in_flight,
            idle_ms: 0,
        };
        let control = self.control.get().unwrap();
        control.door_event(FromGateway::Activity(activity));
    }

    pub(crate) fn sent(&self) -> Vec<ToGateway> {
        self.state.lock().unwrap().sent.clone()
    }
}

impl Door for FakeDoor {
    fn send(&self, message: ToGateway) {
        let mut state = self.state.lock().unwrap();
        state.sent.push(message.clone());
        let answer = match message {
            ToGateway::Awake { app, vm, .. } => {
                state.awake.insert(app.clone(), vm);
                state.answers.entry(app).or_default().push(Ok(vm));
                None
            }
            ToGateway::WakeFailed { app, failure } => {
                state.answers.entry(app).or_default().push(Err(failure));
                None
            }
            ToGateway::Gone { app, vm, .. } => {
                if state.awake.get(&app) == Some(&vm) {
                    state.awake.remove(&app);
                }
                None
            }
            ToGateway::Reap { app, vm, force } => {
                let in_flight = state.in_flight.get(&vm).copied().unwrap_or(0);
                let closes = force || in_flight == 0;
                if closes && state.awake.get(&app) == Some(&vm) {
                    state.awake.remove(&app);
                }
                if in_flight == 0 {
                    Some(FromGateway::Reaped { app, vm })
                } else {
                    (!force).then_some(FromGateway::Busy { app, vm })
                }
            }
            _ => None,
        };
        drop(state);
        self.news.notify_waiters();
        if let (Some(answer), Some(control)) = (answer, self.control.get().cloned()) {
            tokio::spawn(async move { control.door_event(answer) });
        }
    }
}

/// The token of the account `me` in tests.
pub(crate) const TOKEN: &str = "test-token-of-me";

/// Settings of tests.
pub(crate) fn config() -> Config {
    Config {
        base: "localhost".to_owned(),
        gateway: "127.0.0.1:8080".parse().unwrap(),
        public: ("http", 8080),
        api_port: 8889,
        api_hosts: Vec::new(),
        token: TOKEN.to_owned().into(),
        version: "0.1.0".to_owned(),
        warnings: Vec::new(),
        timing: Timing::default(),
        image_bytes_max: 1 << 30,
        waiters_max: 100,
    }
}
