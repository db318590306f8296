//! The task that lives one VM: carries out effects in order and feeds back what came of them.
//!
//! Spawned by the node for a start and for each VM that re-adoption finds; everybody else sends it
//! requests. It alone writes the VM's journal and its entry on the board. It decides nothing: the
//! pure machine in [`super::state`] does. An actor that panics has its VM released and reported.
//!
//! ```text
//!   events ──▶ state.step ──▶ effects ──▶ done at once (journal, report, kill)
//!     ▲                          └──────▶ asking: one future at a time ──┐
//!     ├── the future's outcome ◀─────────────────────────────────────────┘
//!     ├── requests: stop, secrets
//!     ├── the agent's link: up, news, lost
//!     └── the VMM's exit
//! ```

use core::time::Duration;
use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use spore_wire::gateway::Phase;
use spore_wire::guest::{AgentHello, AppSecrets, AppStatus, Event};
use spore_wire::id::VmId;
use spore_wire::node::{Source, StartVm, VmFailure, VmFailureKind, VmStatus};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::time::Instant;
use tracing::field::display;
use tracing::{Instrument as _, Span};

use super::board::Board;
pub(crate) use super::capture::Taking;
use super::collect::{Collector, History, LastLines};
use super::effect::{self, AppView, Gain, Outcome};
use super::guest::{AgentLink, LinkEvent, Patience, SessionTimes, chain, clean};
pub(crate) use super::handle::{Access, ActorHandle, Adopted, Given, VmRequest};
use super::mask::Masking;
use super::state::{BootStep, Ending, Failure, ThawStep, VmEffect, VmEvent, VmState};
use super::supervise;
use super::tasks::{Scope, Tasks};
use crate::capacity::Capacity;
use crate::config::{Config, KillPoint};
use crate::hypervisor::{Hypervisor, Vm, VmExit};
use crate::journal::{Journal, Record, SecretsKept};
use crate::log::LogStore;
use crate::snapshot::key::Keys;
use crate::snapshot::memory::Pin;
use crate::snapshots::Snapshots;

/// The longest keep-awake lease.
const LEASE_MAX: Duration = Duration::from_secs(24 * 60 * 60);

/// What the actors of a node share.
pub(crate) struct Host {
    pub(crate) hypervisor: Arc<dyn Hypervisor>,
    pub(crate) config: Config,
    pub(crate) journal: Journal,
    pub(crate) logs: LogStore,
    pub(crate) snapshots: Snapshots,
    pub(crate) board: Board,
    pub(crate) turns: Arc<Semaphore>,
    pub(crate) capacity: Mutex<Capacity>,
    pub(crate) actors: Mutex<HashMap<VmId, ActorHandle>>,
    pub(crate) tasks: Tasks,
}

impl core::fmt::Debug for Host {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Host")
            .field("hypervisor", self.hypervisor.caps())
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

/// The effect under way.
struct Asking {
    effect: VmEffect,
    begun: Instant,
    future: BoxFuture<'static, Outcome>,
}

/// One VM's actor.
pub(crate) struct Actor {
    pub(super) host: Arc<Host>,
    pub(super) record: Record,
    pub(super) vm: Option<Arc<dyn Vm>>,
    pub(super) link: Option<AgentLink>,
    pub(super) hello: watch::Sender<Option<AgentHello>>,
    pub(super) app: watch::Sender<AppView>,
    pub(super) secrets: watch::Sender<Option<Arc<AppSecrets>>>,
    pub(super) masking: Masking,
    pub(super) releases: u32,
    /// Until it is forked.
    pub(super) keys: Keys,
    pin: Option<Pin>,
    pub(super) taking: Option<Taking>,
    still: watch::Sender<bool>,
    history: History,
    pub(super) state: VmState,
    pub(super) events: VecDeque<VmEvent>,
    asking: Option<Asking>,
    exited: Option<BoxFuture<'static, VmExit>>,
    unsound: Option<BoxFuture<'static, String>>,
    link_events: Option<mpsc::Receiver<LinkEvent>>,
    requests: mpsc::Receiver<VmRequest>,
    access: watch::Sender<Option<Access>>,
    adopted: watch::Sender<Adopted>,
    turn: Option<OwnedSemaphorePermit>,
    awake_until: Option<Instant>,
    out_of_memory_kills: u64,
    last_lines: LastLines,
    collector: Option<Scope>,
}

/// Spawns the supervised actor of a VM, and enters it in the register.
pub(crate) fn spawn(host: &Arc<Host>, record: Record, given: Given, first: VmEvent) -> ActorHandle {
    let Given { secrets, keys, pin } = given;
    let vm = record.start.vm;
    let (send_request, requests) = mpsc::channel(16);
    let (access, see_access) = watch::channel(None);
    let (adopted, see_adopted) = watch::channel(Adopted::Unknown);
    let actor = Actor {
        host: Arc::clone(host),
        vm: None,
        link: None,
        hello: watch::Sender::new(None),
        app: watch::Sender::new(AppView::default()),
        secrets: watch::Sender::new(secrets.map(Arc::new)),
        masking: Masking::default(),
        releases: 0,
        keys,
        pin,
        taking: None,
        still: watch::Sender::new(false),
        history: match first {
            VmEvent::Start(_) => History::None,
            _ => History::Some,
        },
        state: VmState::Absent,
        events: VecDeque::from([first]),
        asking: None,
        exited: None,
        unsound: None,
        link_events: None,
        requests,
        access,
        adopted,
        turn: None,
        awake_until: None,
        out_of_memory_kills: 0,
        last_lines: LastLines::default(),
        collector: None,
        record,
    };
    let handle = ActorHandle {
        requests: send_request,
        access: see_access,
        adopted: see_adopted,
    };
    // The first report comes before anybody can ask for the VM.
    actor.report();
    let register = || host.actors.lock().unwrap_or_else(PoisonError::into_inner);
    register().insert(vm, handle.clone());
    let span = span_of(&actor.record.start);
    host.tasks
        .spawn(supervise::run(Arc::clone(host), actor).instrument(span));
    handle
}

/// What every line about this VM stands in. It has no parent: a VM outlives the request it was
/// started for.
fn span_of(start: &StartVm) -> Span {
    let (vm, owner) = (start.vm, &start.owner);
    let trace = start.trace.as_ref().map(display);
    tracing::info_span!(parent: None, "vm", %vm, account = owner.account, app = owner.app, trace)
}

pub(super) fn give_back(host: &Host, vm: VmId) {
    let mut capacity = host.capacity.lock().unwrap_or_else(PoisonError::into_inner);
    capacity.release(vm);
}

pub(super) fn status_of(host: &Host, record: &Record) -> VmStatus {
    VmStatus {
        vm: record.start.vm,
        owner: record.start.owner.clone(),
        phase: spore_wire::node::VmPhase::Preparing,
        failure: None,
        app: AppStatus::Absent,
        phases: record.phases.clone(),
        boundary: host.hypervisor.caps().boundary,
        hypervisor: host.hypervisor.caps().name.to_owned(),
        source: record.start.source,
        missed: record.missed,
        is_warm: !record.start.source.is_boot() && record.start.begins_warm(),
        purpose: record.start.purpose,
        boot_id: None,
        awake_for_ms: 0,
    }
}

/// The result of a future that may not be there.
async fn of<T>(future: Option<&mut (impl Future<Output = T> + Unpin)>) -> T {
    match future {
        Some(future) => future.await,
        None => core::future::pending().await,
    }
}

async fn heard(events: Option<&mut mpsc::Receiver<LinkEvent>>) -> LinkEvent {
    let heard = match events {
        Some(events) => events.recv().await,
        None => None,
    };
    match heard {
        Some(event) => event,
        // A link that gave up has said so before; there is nothing more to hear.
        None => core::future::pending().await,
    }
}

impl Actor {
    pub(super) async fn run(mut self) {
        loop {
            while let Some(event) = self.events.pop_front() {
                self.step(event).await;
            }
            if self.state.is_over() {
                return;
            }
            // In this order, so that a seed decides the same in every run; what a guest tells comes
            // last, and its session slows a flood down.
            tokio::select! {
                biased;
                outcome = of(self.asking.as_mut().map(|asking| &mut asking.future)) => {
                    self.done(outcome).await;
                }
                exit = of(self.exited.as_mut()) => {
                    self.exited = None;
                    self.events.push_back(VmEvent::Exited(effect::exit_failure(exit)));
                }
                cause = of(self.unsound.as_mut()) => {
                    self.unsound = None;
                    self.fail(VmFailureKind::Died, format!("the VM was ended: {cause}"));
                }
                Some(request) = self.requests.recv() => self.request(request),
                event = heard(self.link_events.as_mut()) => self.link_event(event).await,
            }
        }
    }

    async fn step(&mut self, event: VmEvent) {
        tracing::debug!(vm = %self.record.start.vm, state = ?self.state, ?event, "a VM's event");
        let state = core::mem::replace(&mut self.state, VmState::Absent);
        let (state, effects) = state.step(event);
        self.state = state;
        let boots = matches!(
            self.state,
            VmState::Preparing { .. } | VmState::Booting { .. }
        );
        if !boots && self.turn.take().is_some() {
            let capacity = &self.host.capacity;
            let mut capacity = capacity.lock().unwrap_or_else(PoisonError::into_inner);
            capacity.settle(self.record.start.vm);
        }
        let is_capturing = matches!(self.state, VmState::Capturing { .. });
        self.still
            .send_if_modified(|still| core::mem::replace(still, is_capturing) != is_capturing);
        if !is_capturing && let Some(taking) = self.taking.take() {
            taking.over();
        }
        if matches!(self.state, VmState::Releasing(_)) {
            self.access.send_replace(None);
            self.settle(Adopted::Released);
        }
        self.collect();
        for effect in effects {
            self.point(effect, KillPoint::Before).await;
            if effect.asks() {
                self.ask(effect);
                continue;
            }
            if let Err(failure) = self.perform(effect) {
                // What was to follow stands on what failed.
                self.events.push_back(VmEvent::Failed(failure));
                return;
            }
            self.point(effect, KillPoint::After).await;
        }
    }

    /// Borrows nothing while it waits: an actor is not `Sync`.
    fn point(&self, effect: VmEffect, point: KillPoint) -> impl Future<Output = ()> + use<> {
        let hook = Arc::clone(&self.host.config.kill_points);
        let vm = self.record.start.vm;
        async move { hook.reached(vm, effect, point).await }
    }

    fn perform(&mut self, effect: VmEffect) -> Result<(), Failure> {
        match effect {
            VmEffect::Journal(milestone) => self.journal(milestone)?,
            VmEffect::RemoveJournal => {
                self.give_up_claim();
                let removed = self.host.journal.remove(self.record.start.vm);
                if let Err(error) = removed {
                    // The next start releases it again, which harms nobody.
                    tracing::error!(error = %chain(&error), "a journal is left");
                }
                give_back(&self.host, self.record.start.vm);
                self.pin = None;
            }
            VmEffect::Report => self.report(),
            VmEffect::Kill => {
                if let Some(vm) = &self.vm {
                    vm.kill();
                }
            }
            asks => unreachable!("{asks:?} asks"),
        }
        Ok(())
    }

    fn ask(&mut self, effect: VmEffect) {
        if effect == VmEffect::ConnectAgent {
            self.connect_agent();
        }
        if let Some(taking) = &mut self.taking {
            taking.begun(effect);
        }
        let span = tracing::debug_span!("effect", name = ?effect);
        let begun = Instant::now();
        let future = match effect {
            VmEffect::Seal => self.seal(),
            _ => effect::begin(self, effect),
        };
        self.asking = Some(Asking {
            effect,
            begun,
            future: future.instrument(span).boxed(),
        });
    }

    /// An asking effect came to its end.
    async fn done(&mut self, outcome: Outcome) {
        let Some(asking) = self.asking.take() else {
            return;
        };
        match outcome.gain {
            Gain::Nothing => {}
            Gain::Capture(capture) => {
                if let Some(taking) = &mut self.taking {
                    taking.has(capture);
                }
            }
            Gain::Sealed(sealed) => {
                if let Some(taking) = &mut self.taking {
                    taking.is_sealed(sealed);
                }
            }
            Gain::Turn(permit) => self.turn = Some(permit),
            Gain::Prepared(prepared) => self.record.prepared = Some(prepared),
            Gain::Identity(identity) => self.record.identity = Some(identity),
            Gain::Forked(identity, inherited) => {
                self.record.identity = Some(identity);
                self.record.inherited = inherited.secrets;
                self.record.base = inherited.base;
                self.keys.clear();
            }
            Gain::Vm(vm) => {
                let watched = Arc::clone(&vm);
                self.exited = Some(async move { watched.exited().await }.boxed());
                let watched = Arc::clone(&vm);
                self.unsound = Some(async move { watched.unsound().await }.boxed());
                self.vm = Some(vm);
            }
        }
        match outcome.event {
            VmEvent::ReleaseFailed => self.releases += 1,
            // Its last words were taken in while it was removed.
            VmEvent::Released => {
                self.link = None;
                self.link_events = None;
                self.collector = None;
                self.vm = None;
                self.exited = None;
                self.unsound = None;
            }
            _ => {}
        }
        if let Some(taking) = &mut self.taking {
            taking.done(asking.effect);
        }
        self.time(asking.effect, asking.begun.elapsed());
        self.point(asking.effect, KillPoint::After).await;
        self.events.push_back(outcome.event);
    }

    /// Adds what an effect took to the phases of the start.
    fn time(&mut self, effect: VmEffect, took: Duration) {
        let name = match effect {
            // Others boot: that is no fault of this start, and is not counted as its work.
            VmEffect::TakeTurn if took < Duration::from_millis(1) => return,
            VmEffect::TakeTurn => "queue",
            VmEffect::Prepare => "prepare",
            VmEffect::Fork | VmEffect::Resume => "fork",
            VmEffect::Attach if !self.record.start.source.is_boot() => "fork",
            VmEffect::Boot | VmEffect::Attach => "boot",
            VmEffect::ConnectAgent => "agent",
            VmEffect::Thaw | VmEffect::DropSource | VmEffect::OpenNetwork => "thaw",
            VmEffect::StartApp | VmEffect::AwaitReady => "app",
            _ => return,
        };
        let is_again = matches!(
            self.state,
            VmState::Booting {
                adopted: Some(_),
                ..
            }
        );
        if is_again || matches!(self.state, VmState::Capturing { .. }) {
            return;
        }
        let us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        match self
            .record
            .phases
            .iter_mut()
            .find(|phase| phase.name == name)
        {
            Some(phase) => phase.us = phase.us.saturating_add(us),
            None => self.record.phases.push(Phase {
                name: name.to_owned(),
                us,
            }),
        }
    }

    fn connect_agent(&mut self) {
        let Some(vm) = self.vm.clone() else {
            unreachable!("an agent without a VM that was attached");
        };
        let limits = &self.host.config.limits;
        let patience = Patience {
            times: SessionTimes::default(),
            first: match self.record.start.source {
                Source::Boot => limits.agent,
                _ => limits.agent_of_fork,
            },
            failures_max: limits.agent_failures_max,
        };
        let (link, events) = AgentLink::new(Arc::clone(&vm), patience, &self.host.tasks);
        self.link_events = Some(events);
        self.link = Some(link.clone());
        self.access.send_replace(Some(Access {
            vm,
            link,
            port: self
                .record
                .start
                .process
                .as_ref()
                .map(|process| process.port),
            record: Arc::new(self.record.clone()),
            hello: self.hello.subscribe(),
            still: self.still.subscribe(),
        }));
        self.settle(Adopted::Alive);
    }

    /// The first answer stays: a VM that was adopted and fails at once was adopted all the same.
    fn settle(&self, adopted: Adopted) {
        self.adopted.send_if_modified(|held| {
            let first = *held == Adopted::Unknown;
            if first {
                *held = adopted;
            }
            first
        });
    }

    /// Begins to collect what the app prints, once it may run and its secrets are known.
    fn collect(&mut self) {
        // An adopted guest may have much to say, even one that is about to go.
        if self.collector.is_some() || !self.app_may_run() {
            return;
        }
        let untold = self.record.secrets == SecretsKept::None
            && self.record.inherited == SecretsKept::Elsewhere;
        // Nobody said what would have to be masked, or it is what the app's own VMs say too.
        let told_twice = !self.record.start.purpose.is_serve();
        if self.record.start.process.is_none() || untold || told_twice {
            return;
        }
        let secrets = match (self.record.secrets, self.secrets.borrow().clone()) {
            (SecretsKept::None, _) => Arc::default(),
            (SecretsKept::Elsewhere, Some(secrets)) => secrets,
            // The agent keeps the lines until control has told the secrets again.
            (SecretsKept::Elsewhere, None) => return,
        };
        let Some(link) = self.link.clone() else {
            return;
        };
        let owner = self.record.start.owner.clone();
        let log = match self.host.logs.app(&owner.account, &owner.app) {
            Ok(log) => log,
            Err(error) => {
                tracing::error!(error = %chain(&error), "an app's output is not kept");
                return;
            }
        };
        let collector = Collector {
            vm: self.record.start.vm,
            owner,
            link,
            log,
            masking: self.masking.clone(),
            secrets,
            last_lines: self.last_lines.clone(),
            history: self.history,
        };
        let scope = self.host.tasks.scope();
        scope.tasks().spawn(collector.run());
        self.collector = Some(scope);
    }

    fn request(&mut self, request: VmRequest) {
        match request {
            VmRequest::Stop(mode) => self.events.push_back(VmEvent::Stop(mode)),
            VmRequest::Capture(taking) => self.capture(*taking),
            VmRequest::Secrets(secrets) => {
                let unknown = self.secrets.borrow().is_none();
                if unknown && self.record.secrets == SecretsKept::Elsewhere {
                    self.secrets.send_replace(Some(secrets));
                    self.collect();
                }
            }
        }
    }

    const fn app_may_run(&self) -> bool {
        matches!(
            self.state,
            VmState::Thawing {
                at: ThawStep::Ready
            } | VmState::Ready
                | VmState::Capturing { .. }
                | VmState::Draining
        )
    }

    async fn link_event(&mut self, event: LinkEvent) {
        match event {
            LinkEvent::Up(hello) => self.up(hello),
            LinkEvent::News(event) => self.news(event),
            LinkEvent::Lost(reason) => {
                let is_first = matches!(
                    self.state,
                    VmState::Booting {
                        at: BootStep::Agent,
                        adopted: None,
                        ..
                    }
                );
                let (kind, what) = if is_first {
                    self.read_console().await;
                    (VmFailureKind::Boot, "the guest's agent did not come up")
                } else {
                    (VmFailureKind::Died, "the guest's agent was lost")
                };
                self.fail(kind, format!("{what}: {reason}"));
            }
        }
    }

    /// Where the guest's agent never came, the console has the only words there are.
    async fn read_console(&mut self) {
        let Some(vm) = self.vm.clone() else {
            return;
        };
        let lines = tokio::time::timeout(Duration::from_secs(2), vm.console_tail()).await;
        for line in lines.unwrap_or_default() {
            self.last_lines.push(&self.masking.mask(&clean(&line)));
        }
    }

    fn up(&mut self, hello: AgentHello) {
        let known = self.hello.borrow().clone();
        if let Some(known) = known
            && known.boot_id != hello.boot_id
        {
            let message = "the guest restarted by itself: its app's state is gone".to_owned();
            self.fail(VmFailureKind::Died, message);
            return;
        }
        let app = hello.app.clone();
        self.hello.send_replace(Some(hello));
        self.app_is(app);
    }

    fn news(&mut self, event: Event) {
        match event {
            Event::App(status) => self.app_is(status),
            Event::AppUnready { reason } => self
                .app
                .send_modify(|view| view.unready = Some(clean(&reason))),
            Event::KeepAwake { for_ms } => {
                let lease = Duration::from_millis(for_ms).min(LEASE_MAX);
                self.awake_until = (!lease.is_zero()).then(|| Instant::now() + lease);
                self.report();
            }
            Event::OutOfMemory { kills } => self.out_of_memory_kills = kills,
            other => tracing::debug!(?other, "news of a later generation"),
        }
    }

    fn app_is(&mut self, status: AppStatus) {
        let limit = self.host.config.limits.app_failures_max;
        if let AppStatus::Backoff { failures, exit, .. } = &status
            && *failures >= limit
            && matches!(self.state, VmState::Ready | VmState::Capturing { .. })
            && self.record.start.process.is_some()
        {
            let memory = if self.out_of_memory_kills > 0 {
                "; the guest's kernel killed it for want of memory: give it more"
            } else {
                ": see its last lines"
            };
            let message = format!("the app ended {failures} times in a row, with {exit}{memory}");
            self.fail(VmFailureKind::App, message);
        }
        self.app.send_modify(|view| view.status = status);
        self.report();
    }

    fn fail(&mut self, kind: VmFailureKind, message: String) {
        self.events
            .push_back(VmEvent::Failed(Failure { kind, message }));
    }

    fn report(&self) {
        let failure = match &self.state {
            VmState::Failed(failure) => Some(VmFailure {
                kind: failure.kind,
                // It may quote the guest.
                message: self.masking.mask(&failure.message),
                last_lines: self.last_lines.get(),
            }),
            _ => None,
        };
        let status = VmStatus {
            phase: self.state.phase(),
            failure,
            app: self.app.borrow().status.clone(),
            boot_id: self
                .hello
                .borrow()
                .as_ref()
                .map(|hello| hello.boot_id.clone()),
            ..status_of(&self.host, &self.record)
        };
        self.host.board.publish(status, self.awake_until);
        if let VmState::Leaving(failure) | VmState::Releasing(Ending::Failed(failure)) = &self.state
        {
            let message = self.masking.mask(&failure.message);
            let vm = self.record.start.vm;
            // Quoted: a guest's lines must not look like the daemon's own.
            tracing::warn!(%vm, kind = ?failure.kind, ?message, "a VM fails");
        }
    }
}
