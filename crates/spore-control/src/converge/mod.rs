//! The reconcilers: they make each app what it should be.
//!
//! The only input is the key of an app; they run by signal and by timer. A wake, a call of the API
//! and a repair take the same path: an event goes into the app's [`life`], one step decides, and
//! the effects are done here. One app is looked at by one task at a time.
//!
//! ```text
//!   gateway ─┐                     ┌─▶ node: start, stop
//!   node ────┼─▶ event ─▶ life ────┼─▶ gateway: routes, awake, reap, gone
//!   API ─────┤   (lock)   (pure)   ├─▶ store: release live, deploy failed
//!   timer ───┘                     └─▶ who waits
//! ```
//!
//! A warm wake reads the store and writes nothing to it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use spore_api::error::ErrorCode;
use spore_api::name::{AccountName, AppName};
use spore_wire::gateway::{AppKey, FromGateway};
use spore_wire::id::VmId;
use spore_wire::node::VmPhase;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;

use crate::clock::{SharedChance, SharedClock};
use crate::config::Config;
use crate::door::Door;
use crate::metrics::Metrics;
use crate::nodes::Nodes;
use crate::operations::Operations;
use crate::secrets::Vault;
use crate::store::SharedStore;

mod app;
pub mod deploy;
mod driver;
mod given;
pub mod image;
pub mod life;
mod removal;
mod repair;
pub mod repeat;
mod route;
pub(crate) mod sandbox;
pub(crate) mod snapshot;
mod start;
mod suspend;
#[cfg(test)]
mod tests;
mod trace;

pub(crate) use app::code_name_of;
use life::{Event, Failure, Life, Moment};
pub use removal::RemovalError;
pub(crate) use repair::AdoptError;
use trace::StartTrace;

/// An app's key in the store and towards the gateway: `account/app`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AppRef {
    /// Whose.
    pub account: AccountName,
    /// Which.
    pub app: AppName,
}

impl AppRef {
    fn of(account: &str, app: &str) -> Option<Self> {
        let (account, app) = (account.parse().ok()?, app.parse().ok()?);
        Some(Self { account, app })
    }

    fn from_key(key: &AppKey) -> Option<Self> {
        let (account, app) = key.0.split_once('/')?;
        Self::of(account, app)
    }

    /// Towards the gateway.
    #[must_use]
    pub fn key(&self) -> AppKey {
        AppKey::new(self.account.as_str(), self.app.as_str())
    }
}

impl core::fmt::Display for AppRef {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{}/{}", self.account, self.app)
    }
}

/// Everything that runs, and the way to change it. Cheap to clone.
#[derive(Clone)]
pub struct Converge {
    pub(crate) inner: Arc<Inner>,
}

pub(crate) struct Inner {
    pub(crate) config: Arc<Config>,
    pub(crate) store: SharedStore,
    pub(crate) nodes: Arc<dyn Nodes>,
    pub(crate) door: Arc<dyn Door>,
    pub(crate) vault: Arc<Vault>,
    pub(crate) clock: SharedClock,
    pub(crate) chance: SharedChance,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) operations: Arc<Operations>,
    /// Held while an account's bytes of images are counted and one is written down.
    image_ledger: tokio::sync::Mutex<()>,
    /// In the order of names, so that a seed decides the same in every run.
    slots: Mutex<BTreeMap<AppRef, Slot>>,
    routes: Mutex<BTreeMap<AppRef, spore_wire::gateway::Admission>>,
    /// Held while it is found out which snapshots are needed, and one is removed or used.
    snapshot_ledger: tokio::sync::Mutex<()>,
    /// The sandboxes, each with the way to its keeper.
    sandboxes: Mutex<BTreeMap<sandbox::SandboxRef, sandbox::Handle>>,
    fork_turns: Arc<sandbox::Turns>,
    repeats: Arc<repeat::Repeats>,
    /// Held while the rest of a removed app is forgotten.
    forgetting: tokio::sync::Mutex<()>,
    /// The last VMs that were over.
    ended: Mutex<std::collections::VecDeque<VmId>>,
    signals: mpsc::UnboundedSender<Signal>,
    changed: watch::Sender<u64>,
    began: Instant,
}

/// What is kept of an app that is not at rest. An app at rest has no slot.
#[derive(Debug, Default)]
struct Slot {
    life: Life,
    waiters: Vec<oneshot::Sender<Result<VmId, Failure>>>,
    activity: Looking,
    /// When the driver looks again by itself.
    timer: Option<Moment>,
    trace: StartTrace,
}

/// Whether somebody looks at the app: keeps one app from being looked at twice at once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Looking {
    #[default]
    Nobody,
    /// The driver was told.
    Told,
    /// A task does.
    Now,
    /// A task does, and something happened since.
    Again,
}

/// What the driver is told. There is at most one `Look` under way per app.
#[derive(Debug)]
pub(crate) enum Signal {
    Look(AppRef),
    Timer(AppRef, Option<Moment>),
    DoorBack(Vec<spore_wire::gateway::Activity>),
}

impl core::fmt::Debug for Converge {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("Converge")
    }
}

impl Converge {
    pub(crate) fn new(
        config: Arc<Config>,
        parts: crate::Parts,
        signals: mpsc::UnboundedSender<Signal>,
    ) -> Self {
        let operations = Operations::new(Arc::clone(&parts.store));
        let store = Arc::clone(&parts.store);
        let vault = Vault::new(store, parts.keys, Arc::clone(&parts.clock));
        let inner = Inner {
            config,
            store: parts.store,
            nodes: parts.nodes,
            door: parts.door,
            vault: Arc::new(vault),
            clock: parts.clock,
            chance: parts.chance,
            metrics: Arc::default(),
            operations: Arc::new(operations),
            image_ledger: tokio::sync::Mutex::default(),
            snapshot_ledger: tokio::sync::Mutex::default(),
            sandboxes: Mutex::default(),
            fork_turns: Arc::default(),
            repeats: Arc::default(),
            slots: Mutex::default(),
            routes: Mutex::default(),
            forgetting: tokio::sync::Mutex::default(),
            ended: Mutex::default(),
            signals,
            changed: watch::Sender::new(0),
            began: Instant::now(),
        };
        Self {
            inner: Arc::new(inner),
        }
    }

    pub(crate) fn driver(
        &self,
        signals: mpsc::UnboundedReceiver<Signal>,
        feed: crate::nodes::VmFeed,
        stop: watch::Receiver<bool>,
    ) -> driver::Driver {
        driver::Driver {
            converge: self.clone(),
            signals,
            feed,
            stop,
        }
    }

    /// Takes a message of the gateway, in order. `Connect` is not for control.
    pub fn door_event(&self, message: FromGateway) {
        match message {
            FromGateway::Hello { warm, .. } => self.tell(Signal::DoorBack(warm)),
            FromGateway::Wake { app, trace } => match AppRef::from_key(&app) {
                Some(app) => {
                    let mut slots = self.slots();
                    let slot = slots.entry(app.clone()).or_default();
                    slot.trace.asked_by(trace);
                    drop(slots);
                    self.event(&app, Event::Wake);
                }
                None => tracing::warn!(%app, "the gateway named an app that cannot be"),
            },
            FromGateway::Activity(activity) => {
                if let Some(app) = AppRef::from_key(&activity.app) {
                    self.activity(&app, activity);
                }
            }
            FromGateway::Reaped { app, vm } => {
                if let Some(app) = AppRef::from_key(&app) {
                    self.event(&app, Event::Reaped(vm));
                }
            }
            FromGateway::Busy { app, vm } => {
                if let Some(app) = AppRef::from_key(&app) {
                    self.event(&app, Event::Busy(vm));
                }
            }
            FromGateway::Counts(counts) => self.inner.metrics.counted(&counts),
            FromGateway::Connect { .. } => {}
        }
    }

    /// Something happened to an app: it is looked at.
    pub fn event(&self, app: &AppRef, event: Event) {
        self.before(app, &event);
        let now = self.now();
        let mut slots = self.slots();
        let slot = slots.entry(app.clone()).or_default();
        slot.life.on(event, now, &self.inner.config.timing);
        self.look(app, slot);
    }

    /// Has an app looked at.
    pub fn signal(&self, app: &AppRef) {
        let mut slots = self.slots();
        let slot = slots.entry(app.clone()).or_default();
        self.look(app, slot);
    }

    /// Edges of activity come with every request: they only touch memory, and wake the driver
    /// when no timer will.
    fn activity(&self, app: &AppRef, activity: spore_wire::gateway::Activity) {
        let idle = activity.in_flight == 0;
        let now = self.now();
        let mut slots = self.slots();
        let Some(slot) = slots.get_mut(app) else {
            return;
        };
        let event = Event::Activity(activity);
        slot.life.on(event, now, &self.inner.config.timing);
        if idle && slot.timer.is_none() {
            self.look(app, slot);
        }
    }

    /// Wakes an app and answers its VM.
    ///
    /// # Errors
    /// Why it is not awake.
    pub async fn wake(&self, app: &AppRef) -> Result<VmId, Failure> {
        self.until_awake(app, Event::Wake).await
    }

    /// Gives an app that is awake a fresh VM, and answers it.
    ///
    /// # Errors
    /// Why it is not awake again.
    pub async fn restart(&self, app: &AppRef) -> Result<VmId, Failure> {
        self.until_awake(app, Event::Restart).await
    }

    async fn until_awake(&self, app: &AppRef, event: Event) -> Result<VmId, Failure> {
        let receiver = {
            let now = self.now();
            let mut slots = self.slots();
            let slot = slots.entry(app.clone()).or_default();
            let (sender, receiver) = oneshot::channel();
            slot.waiters.push(sender);
            slot.life.on(event, now, &self.inner.config.timing);
            self.look(app, slot);
            receiver
        };
        let deadline = self.inner.config.timing.wake_deadline;
        match tokio::time::timeout(deadline, receiver).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(_gone)) => Err(Failure::new(ErrorCode::Stopping, "the daemon is stopping")),
            Err(_elapsed) => {
                let message = "the app was not awake in time; see `spore logs`";
                Err(Failure::new(ErrorCode::Timeout, message))
            }
        }
    }

    /// Puts an app to sleep, or restarts it, and waits until that is done.
    ///
    /// # Errors
    /// When its VM does not end in time.
    pub async fn sleep(&self, app: &AppRef) -> Result<(), Failure> {
        self.event(app, Event::Sleep);
        self.until_asleep(app).await
    }

    /// Waits until nothing runs for an app but a release that is being tried.
    ///
    /// # Errors
    /// When its VM does not end in time.
    pub async fn until_asleep(&self, app: &AppRef) -> Result<(), Failure> {
        self.until(app, Life::is_asleep).await
    }

    async fn until(&self, app: &AppRef, is_so: impl Fn(&Life) -> bool) -> Result<(), Failure> {
        let timing = &self.inner.config.timing;
        let deadline = timing.reap_answer + timing.stop_grace * 4;
        let mut changed = self.inner.changed.subscribe();
        let asleep = async {
            while !self.with_life(app, |life, _| is_so(life)) {
                if changed.changed().await.is_err() {
                    return;
                }
            }
        };
        let message = "the VM has not ended yet; it will be killed, look again with `spore status`";
        let late = |_elapsed| Failure::new(ErrorCode::Timeout, message);
        tokio::time::timeout(deadline, asleep).await.map_err(late)
    }

    /// Keeps an app from being reaped until the guard is dropped.
    #[must_use]
    pub fn hold(&self, app: &AppRef) -> Hold {
        self.event(app, Event::Hold);
        Hold {
            converge: self.clone(),
            app: app.clone(),
        }
    }

    /// Reads something of an app's life; `read` is given an empty one when it is at rest.
    pub fn with_life<T>(&self, app: &AppRef, read: impl FnOnce(&Life, Moment) -> T) -> T {
        let now = self.now();
        let slots = self.slots();
        match slots.get(app) {
            Some(slot) => read(&slot.life, now),
            None => read(&Life::default(), now),
        }
    }

    /// How many apps have a slot: the others cost no memory here.
    #[must_use]
    pub fn slot_count(&self) -> usize {
        self.slots().len()
    }

    /// What is told and counted of an event before it changes the app's life.
    fn before(&self, app: &AppRef, event: &Event) {
        let Event::Vm(status) = event else {
            return;
        };
        let (operation, was_ready, known) = {
            let slots = self.slots();
            let Some(slot) = slots.get(app) else {
                return;
            };
            let vm = slot.life.vms.get(&status.vm);
            let was_ready = vm.is_some_and(|vm| vm.phase >= VmPhase::Ready);
            let operation = slot.life.operation_of(status.vm).map(str::to_owned);
            (operation, was_ready, vm.is_some())
        };
        if known && status.phase == VmPhase::Ready && !was_ready {
            self.inner.metrics.woken(status);
        }
        if known && status.phase == VmPhase::Failed {
            self.inner.metrics.failed("vm_failed");
        }
        if let Some(operation) = operation {
            let text = match status.phase {
                VmPhase::Preparing => "Preparing a VM",
                VmPhase::Booting => "Booting it",
                VmPhase::Forking => "Forking it",
                VmPhase::Thawing => "Starting the app and waiting until it is ready",
                VmPhase::Ready => "Ready: switching over",
                VmPhase::Draining | VmPhase::Stopped | VmPhase::Failed => return,
            };
            self.inner.operations.step(&app.account, &operation, text);
        }
    }

    fn look(&self, app: &AppRef, slot: &mut Slot) {
        match slot.activity {
            Looking::Nobody => {
                slot.activity = Looking::Told;
                self.tell(Signal::Look(app.clone()));
            }
            Looking::Now => slot.activity = Looking::Again,
            Looking::Told | Looking::Again => {}
        }
    }

    fn tell(&self, signal: Signal) {
        if self.inner.signals.send(signal).is_err() {
            tracing::debug!("the driver has stopped; the next start looks at every app");
        }
    }

    pub(crate) fn now(&self) -> Moment {
        let ms = self.inner.began.elapsed().as_millis();
        Moment(u64::try_from(ms).unwrap_or(u64::MAX))
    }

    fn slots(&self) -> std::sync::MutexGuard<'_, BTreeMap<AppRef, Slot>> {
        self.inner
            .slots
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// While it lives, the app is not reaped for being idle.
#[derive(Debug)]
pub struct Hold {
    converge: Converge,
    app: AppRef,
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.converge.event(&self.app, Event::LetGo);
    }
}
