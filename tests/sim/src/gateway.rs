//! The gateway without sockets: the real state machine of each app, driven as the real one is.
//!
//! Visitors enter by [`Gateway::serve`] (`visit.rs`), daemons by [`Gateway::accept`] (`feed.rs`).
//! This module holds the lock, runs [`AppMachine`] and does what it says. No lock is held while
//! something waits or while another is taken.
//!
//! What it checks itself: the machine answers a request once, and none that is not there.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use spore_gateway::wake::{
    AppEffect, AppEvent, AppMachine, AppState, ReapMode, RefuseReason, WaiterId,
};
use spore_wire::gateway::{Activity, AppKey, FromGateway, RoutePolicy, WakeFailure};
use spore_wire::id::VmId;
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::link::Stream;
use crate::trace::Trace;

/// A gateway process; clones are the same one.
#[derive(Clone)]
pub struct Gateway(pub(crate) Arc<Shared>);

impl core::fmt::Debug for Gateway {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("Gateway")
    }
}

pub(crate) struct Shared {
    pub(crate) trace: Trace,
    pub(crate) epoch: Instant,
    /// The process is over.
    pub(crate) over: CancellationToken,
    pub(crate) change: Notify,
    pub(crate) became_whole: Notify,
    pub(crate) inner: Mutex<Inner>,
}

#[derive(Default)]
pub(crate) struct Inner {
    pub(crate) apps: BTreeMap<AppKey, App>,
    pub(crate) routes: BTreeMap<String, Target>,
    pub(crate) table: u64,
    pub(crate) is_whole: bool,
    pub(crate) session: Option<mpsc::UnboundedSender<FromGateway>>,
    /// Ends the session of the moment.
    pub(crate) session_over: CancellationToken,
    pub(crate) asked: BTreeSet<AppKey>,
    pub(crate) connects: BTreeMap<u64, PendingConnect>,
    pub(crate) next_connect: u64,
    /// Never used twice: an app may be forgotten and come back while a waiter leaves.
    next_waiter: WaiterId,
    pub(crate) changed: Vec<AppKey>,
}

pub(crate) struct PendingConnect {
    pub(crate) vm: VmId,
    pub(crate) sender: oneshot::Sender<Result<Stream, ConnectError>>,
}

/// Why there is no connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ConnectError {
    Failed(String),
    Gone,
}

/// Where a host leads.
#[derive(Clone, Debug)]
pub(crate) struct Target {
    pub(crate) app: AppKey,
    pub(crate) policy: RoutePolicy,
    pub(crate) table: u64,
}

/// One app.
#[derive(Default)]
pub(crate) struct App {
    pub(crate) machine: AppMachine,
    waiting: BTreeMap<WaiterId, oneshot::Sender<Verdict>>,
    incarnations: BTreeMap<VmId, Arc<Incarnation>>,
    pub(crate) listed: bool,
    reported_busy: bool,
}

/// The connections to one VM, as in the gateway.
pub(crate) struct Incarnation {
    pub(crate) gone: CancellationToken,
    pub(crate) held: Mutex<Kept>,
}

#[derive(Default)]
pub(crate) struct Kept {
    pub(crate) idle: Vec<Stream>,
    pub(crate) retired: bool,
}

/// What a request that waited gets.
pub(crate) enum Verdict {
    Admitted(InFlight),
    Refused(Refused),
}

/// Why a request was refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refused {
    /// Too many wait.
    QueueFull,
    /// Too many are in flight.
    AppFull,
    /// Nothing leads there any more.
    Unrouted,
    /// The wake failed: the code of the failure.
    WakeFailed(String),
}

/// A request that was admitted; dropping it ends it.
pub(crate) struct InFlight {
    gateway: Gateway,
    app: AppKey,
    pub(crate) vm: VmId,
    pub(crate) incarnation: Arc<Incarnation>,
}

impl Drop for InFlight {
    fn drop(&mut self) {
        let now_ms = self.gateway.now_ms();
        let finished = AppEvent::Finished {
            vm: self.vm,
            now_ms,
        };
        self.gateway.event(&self.app, finished, None);
    }
}

/// A place in an app's queue; dropping it leaves the queue.
pub(crate) struct Waiter {
    gateway: Gateway,
    app: AppKey,
    id: WaiterId,
    pub(crate) receiver: oneshot::Receiver<Verdict>,
}

impl Drop for Waiter {
    fn drop(&mut self) {
        let left = AppEvent::Left { waiter: self.id };
        self.gateway.event(&self.app, left, None);
    }
}

/// What is done once the lock is released.
#[derive(Default)]
struct Outcome {
    verdicts: Vec<(oneshot::Sender<Verdict>, Verdict)>,
    retire: Vec<Arc<Incarnation>>,
    cut: Vec<Arc<Incarnation>>,
}

impl Gateway {
    /// A process that has just begun.
    #[must_use]
    pub fn new(trace: Trace) -> Self {
        Self(Arc::new(Shared {
            trace,
            epoch: Instant::now(),
            over: CancellationToken::new(),
            change: Notify::new(),
            became_whole: Notify::new(),
            inner: Mutex::default(),
        }))
    }

    /// Ends the process: every connection is cut.
    pub fn kill(&self) {
        self.0.over.cancel();
        let mut inner = self.inner();
        inner.session = None;
        inner.session_over.cancel();
        let connects = core::mem::take(&mut inner.connects);
        drop(inner);
        drop(connects);
    }

    pub(crate) fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn now_ms(&self) -> u64 {
        u64::try_from(self.0.epoch.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// A request comes in.
    pub(crate) fn enter(&self, app: &AppKey, policy: &RoutePolicy, in_flight_max: u32) -> Waiter {
        let (sender, receiver) = oneshot::channel();
        let id = {
            let mut inner = self.inner();
            inner.next_waiter += 1;
            let id = inner.next_waiter;
            let slot = inner.apps.entry(app.clone()).or_default();
            slot.waiting.insert(id, sender);
            id
        };
        let request = AppEvent::Request {
            waiter: id,
            waiters_max: policy.waiters_max,
            in_flight_max,
        };
        self.event(app, request, None);
        Waiter {
            gateway: self.clone(),
            app: app.clone(),
            id,
            receiver,
        }
    }

    pub(crate) fn awake(&self, app: &AppKey, vm: VmId) {
        let now_ms = self.now_ms();
        self.inner().apps.entry(app.clone()).or_default();
        self.event(app, AppEvent::Awake { vm, now_ms }, None);
    }

    pub(crate) fn reap(&self, app: &AppKey, vm: VmId, force: bool) {
        let mode = if force {
            ReapMode::Force
        } else {
            ReapMode::IfIdle
        };
        if self.inner().apps.contains_key(app) {
            self.event(app, AppEvent::Reap { vm, mode }, None);
        } else {
            let app = app.clone();
            self.inner().say(FromGateway::Reaped { app, vm });
        }
    }

    /// Runs the machine of an app, and does what it says.
    pub(crate) fn event(&self, app: &AppKey, event: AppEvent, failure: Option<&WakeFailure>) {
        let mut inner = self.inner();
        let Some(mut slot) = inner.apps.remove(app) else {
            return;
        };
        let mut effects = Vec::new();
        slot.machine.apply(event, &mut effects);
        if let AppEvent::Left { waiter } = event {
            drop(slot.waiting.remove(&waiter));
        }
        let mut outcome = Outcome::default();
        for effect in effects {
            self.apply(&mut inner, app, &mut slot, effect, failure, &mut outcome);
        }
        if let (AppEvent::Awake { .. }, AppState::Warm { vm }) = (event, slot.machine.state()) {
            lock(&slot.incarnation(vm).held).retired = false;
        }
        inner.apps.insert(app.clone(), slot);
        drop(inner);
        for incarnation in outcome.retire {
            incarnation.retire();
        }
        for incarnation in outcome.cut {
            incarnation.gone.cancel();
            incarnation.retire();
        }
        for (sender, verdict) in outcome.verdicts {
            // Whoever left gives its admission back by dropping it.
            drop(sender.send(verdict));
        }
    }

    fn apply(
        &self,
        inner: &mut Inner,
        app: &AppKey,
        slot: &mut App,
        effect: AppEffect,
        failure: Option<&WakeFailure>,
        outcome: &mut Outcome,
    ) {
        let key = || app.clone();
        match effect {
            AppEffect::Wake => inner.say(FromGateway::Wake {
                app: key(),
                trace: None,
            }),
            AppEffect::Admit { waiter, vm } => {
                let in_flight = InFlight {
                    gateway: self.clone(),
                    app: key(),
                    vm,
                    incarnation: slot.incarnation(vm),
                };
                match slot.waiting.remove(&waiter) {
                    Some(sender) => outcome
                        .verdicts
                        .push((sender, Verdict::Admitted(in_flight))),
                    None => {
                        // Counted off by nobody: the machine is wrong already.
                        core::mem::forget(in_flight);
                        self.twice(app, waiter);
                    }
                }
            }
            AppEffect::Refuse { waiter, why } => {
                let verdict = Verdict::Refused(refused(why, failure));
                match slot.waiting.remove(&waiter) {
                    Some(sender) => outcome.verdicts.push((sender, verdict)),
                    None => self.twice(app, waiter),
                }
            }
            AppEffect::Edge => {
                if !core::mem::replace(&mut slot.listed, true) {
                    inner.changed.push(key());
                    self.0.change.notify_one();
                }
            }
            AppEffect::Retire { vm } => outcome.retire.extend(slot.retired(vm)),
            AppEffect::Cut { vm } => outcome.cut.extend(slot.incarnations.remove(&vm)),
            AppEffect::Reaped { vm } => inner.say(FromGateway::Reaped { app: key(), vm }),
            AppEffect::Busy { vm } => inner.say(FromGateway::Busy { app: key(), vm }),
        }
    }

    fn twice(&self, app: &AppKey, waiter: WaiterId) {
        let text = format!("{app}: request {waiter} was answered and is not there");
        self.0.trace.violation(text);
    }

    /// What there is to report of an app since the last time.
    pub(crate) fn report(&self, app: &AppKey) -> Vec<Activity> {
        let now_ms = self.now_ms();
        let mut inner = self.inner();
        let Some(slot) = inner.apps.get_mut(app) else {
            return Vec::new();
        };
        slot.listed = false;
        let busy = slot.machine.loads().any(|load| load.in_flight > 0);
        let news = !(busy && slot.reported_busy);
        slot.reported_busy = busy;
        if news {
            slot.activities(app, now_ms)
        } else {
            Vec::new()
        }
    }
}

impl Inner {
    /// Queues a message; without a session it is dropped, since a new one begins with all that
    /// counts. A wake is said once until it is answered.
    pub(crate) fn say(&mut self, message: FromGateway) {
        if self.session.is_none() {
            return;
        }
        if let FromGateway::Wake { app, .. } = &message
            && !self.asked.insert(app.clone())
        {
            return;
        }
        self.push(message);
    }

    pub(crate) fn push(&self, message: FromGateway) {
        if let Some(session) = &self.session {
            // A session whose end is not noticed yet loses it, as it would on its way.
            drop(session.send(message));
        }
    }
}

impl App {
    fn incarnation(&mut self, vm: VmId) -> Arc<Incarnation> {
        let known = self.incarnations.entry(vm).or_insert_with(|| {
            Arc::new(Incarnation {
                gone: CancellationToken::new(),
                held: Mutex::default(),
            })
        });
        Arc::clone(known)
    }

    fn retired(&mut self, vm: VmId) -> Option<Arc<Incarnation>> {
        if self.machine.loads().any(|load| load.vm == vm) {
            return Some(self.incarnation(vm));
        }
        self.incarnations.remove(&vm)
    }

    pub(crate) fn activities(&self, app: &AppKey, now_ms: u64) -> Vec<Activity> {
        let loads = self.machine.loads();
        loads
            .map(|load| Activity {
                app: app.clone(),
                vm: load.vm,
                in_flight: load.in_flight,
                idle_ms: if load.in_flight > 0 {
                    0
                } else {
                    now_ms.saturating_sub(load.idle_since_ms)
                },
            })
            .collect()
    }
}

impl Incarnation {
    fn retire(&self) {
        let mut held = lock(&self.held);
        held.retired = true;
        let idle = core::mem::take(&mut held.idle);
        drop(held);
        drop(idle);
    }

    pub(crate) fn take(&self) -> Option<Stream> {
        lock(&self.held).idle.pop()
    }

    pub(crate) fn keep(&self, stream: Stream) {
        let mut held = lock(&self.held);
        if !held.retired {
            held.idle.push(stream);
        }
    }
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn refused(why: RefuseReason, failure: Option<&WakeFailure>) -> Refused {
    match (why, failure) {
        (RefuseReason::QueueFull, _) => Refused::QueueFull,
        (RefuseReason::AppFull, _) => Refused::AppFull,
        (RefuseReason::WakeFailed, Some(failure)) => Refused::WakeFailed(failure.code.clone()),
        (RefuseReason::WakeFailed | RefuseReason::Unrouted, _) => Refused::Unrouted,
    }
}
