//! One app of the gateway: its machine, the requests that wait, the VMs it has.
//!
//! `forward.rs` enters here with every request, `feed.rs` with every word of the daemon. The
//! decisions are [`machine`]'s, which is pure; this module holds the lock, wakes who waits and
//! sends what is to be said. No lock is held across an await, and none while another is taken.

mod machine;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};

use http::header::HeaderValue;
use spore_wire::gateway::{Activity, AppKey, FromGateway, Phase, RoutePolicy, WakeFailure};
use spore_wire::id::{TraceId, VmId};
use tokio::sync::oneshot;

pub use machine::{
    AppEffect, AppEvent, AppMachine, AppState, Load, ReapMode, RefuseReason, WaiterId, step,
};

use crate::activity::InFlight;
use crate::feed::Feed;
use crate::lock;
use crate::pool::Incarnation;
use crate::request_id;

/// One app.
#[derive(Debug)]
pub(crate) struct App {
    key: AppKey,
    feed: Arc<Feed>,
    next_waiter: AtomicU64,
    /// How many hosts lead here.
    pub(crate) routes: AtomicU32,
    cell: Mutex<Cell>,
}

#[derive(Debug, Default)]
struct Cell {
    machine: AppMachine,
    waiting: HashMap<WaiterId, oneshot::Sender<Verdict>>,
    incarnations: Vec<Arc<Incarnation>>,
    /// Whether the feed has this app on its list of changed ones.
    listed: bool,
    /// Whether the last report said busy.
    reported_busy: bool,
    /// The first of the requests that wait.
    trace: Option<TraceId>,
}

/// What a request that waited gets.
#[derive(Debug)]
pub(crate) enum Verdict {
    /// The app is awake.
    Admitted {
        in_flight: InFlight,
        /// What the wake took.
        phases: Arc<[Phase]>,
    },
    /// It will not be.
    Refused(Refused),
}

/// Why a request was refused.
#[derive(Clone, Debug)]
pub(crate) enum Refused {
    QueueFull,
    AppFull,
    Unrouted,
    WakeFailed(Arc<WakeFailure>),
}

/// What a request gets at once.
#[derive(Debug)]
pub(crate) enum Entry {
    Now(InFlight),
    Wait(Waiter),
    Refused(Refused),
}

/// What becomes of the effects of one event, once the lock is released.
#[derive(Debug, Default)]
struct Outcome {
    verdicts: Vec<(oneshot::Sender<Verdict>, Verdict)>,
    retire: Vec<Arc<Incarnation>>,
    cut: Vec<Arc<Incarnation>>,
    say: Vec<FromGateway>,
    changed: bool,
}

/// What came with the event, for those who wait.
#[derive(Debug, Default)]
struct Tidings {
    phases: Option<Arc<[Phase]>>,
    failure: Option<Arc<WakeFailure>>,
}

impl App {
    pub(crate) fn new(key: AppKey, feed: Arc<Feed>) -> Self {
        Self {
            key,
            feed,
            next_waiter: AtomicU64::new(0),
            routes: AtomicU32::new(0),
            cell: Mutex::new(Cell::default()),
        }
    }

    pub(crate) const fn key(&self) -> &AppKey {
        &self.key
    }

    /// Whether forgetting the app would lose nothing.
    pub(crate) fn is_blank(&self) -> bool {
        self.routes.load(Ordering::Relaxed) == 0 && lock(&self.cell).machine.is_blank()
    }

    /// A request comes in.
    pub(crate) fn enter(
        self: &Arc<Self>,
        policy: &RoutePolicy,
        in_flight_max: u32,
        request_id: &HeaderValue,
    ) -> Entry {
        let mut cell = lock(&self.cell);
        if let Some((vm, edge)) = cell.machine.admit(in_flight_max) {
            let incarnation = cell.incarnation(vm);
            let list = edge && !std::mem::replace(&mut cell.listed, true);
            drop(cell);
            if list {
                self.feed.list_changed(Arc::clone(self));
            }
            return Entry::Now(InFlight::new(Arc::clone(self), incarnation));
        }
        let waiter = self.next_waiter.fetch_add(1, Ordering::Relaxed);
        let (sender, receiver) = oneshot::channel();
        if cell.waiting.is_empty() {
            cell.trace = request_id::trace_of(request_id);
        }
        cell.waiting.insert(waiter, sender);
        let event = AppEvent::Request {
            waiter,
            waiters_max: policy.waiters_max,
            in_flight_max,
        };
        let outcome = self.apply(&mut cell, event, &Tidings::default());
        drop(cell);
        self.carry_out(outcome);
        let mut waiter = Waiter {
            app: Arc::clone(self),
            id: waiter,
            receiver,
        };
        match waiter.receiver.try_recv() {
            Ok(Verdict::Admitted { in_flight, .. }) => Entry::Now(in_flight),
            Ok(Verdict::Refused(why)) => Entry::Refused(why),
            Err(_) => Entry::Wait(waiter),
        }
    }

    /// An admitted request is over.
    pub(crate) fn finished(self: &Arc<Self>, vm: VmId) {
        let now_ms = self.feed.now_ms();
        self.event(AppEvent::Finished { vm, now_ms }, &Tidings::default());
    }

    pub(crate) fn awake(self: &Arc<Self>, vm: VmId, phases: Vec<Phase>) {
        let context = Tidings {
            phases: Some(phases.into()),
            failure: None,
        };
        let now_ms = self.feed.now_ms();
        self.event(AppEvent::Awake { vm, now_ms }, &context);
    }

    pub(crate) fn wake_failed(self: &Arc<Self>, failure: WakeFailure) {
        let context = Tidings {
            phases: None,
            failure: Some(Arc::new(failure)),
        };
        self.event(AppEvent::WakeFailed, &context);
    }

    pub(crate) fn unrouted(self: &Arc<Self>) {
        self.event(AppEvent::Unrouted, &Tidings::default());
    }

    pub(crate) fn reap(self: &Arc<Self>, vm: VmId, mode: ReapMode) {
        self.event(AppEvent::Reap { vm, mode }, &Tidings::default());
    }

    pub(crate) fn gone(self: &Arc<Self>, vm: VmId) {
        self.event(AppEvent::Gone { vm }, &Tidings::default());
    }

    pub(crate) fn session_began(self: &Arc<Self>) {
        self.event(AppEvent::SessionBegan, &Tidings::default());
    }

    pub(crate) fn count_death(&self, vm: VmId) {
        tracing::warn!(app = %self.key, %vm, "a VM ended under a request");
        self.feed.counters().count_death();
    }

    /// Drops idle connections that are of no use any more.
    pub(crate) fn sweep(&self, limits: &crate::limits::Limits) {
        let incarnations = lock(&self.cell).incarnations.clone();
        for incarnation in incarnations {
            incarnation.sweep(limits);
        }
    }

    /// How busy each VM is.
    pub(crate) fn activities(&self, now_ms: u64) -> Vec<Activity> {
        let cell = lock(&self.cell);
        cell.machine
            .loads()
            .map(|load| self.activity(load, now_ms))
            .collect()
    }

    /// What there is to report since the last time; takes the app off the list of changed ones.
    pub(crate) fn report(&self, now_ms: u64) -> Vec<Activity> {
        let mut cell = lock(&self.cell);
        cell.listed = false;
        let busy = cell.machine.loads().any(|load| load.in_flight > 0);
        // Busy again is no news; idle again is, since the time of idleness begins anew.
        let news = !(busy && cell.reported_busy);
        cell.reported_busy = busy;
        if !news {
            return Vec::new();
        }
        cell.machine
            .loads()
            .map(|load| self.activity(load, now_ms))
            .collect()
    }

    fn activity(&self, load: Load, now_ms: u64) -> Activity {
        Activity {
            app: self.key.clone(),
            vm: load.vm,
            in_flight: load.in_flight,
            idle_ms: if load.in_flight > 0 {
                0
            } else {
                now_ms.saturating_sub(load.idle_since_ms)
            },
        }
    }

    fn event(self: &Arc<Self>, event: AppEvent, context: &Tidings) {
        let mut cell = lock(&self.cell);
        let outcome = self.apply(&mut cell, event, context);
        drop(cell);
        self.carry_out(outcome);
    }

    /// Runs the machine and turns its effects into what is to be done without the lock.
    fn apply(self: &Arc<Self>, cell: &mut Cell, event: AppEvent, context: &Tidings) -> Outcome {
        let mut effects = Vec::new();
        cell.machine.apply(event, &mut effects);
        let mut outcome = Outcome::default();
        if let AppEvent::Left { waiter } = event {
            cell.waiting.remove(&waiter);
        }
        for effect in effects {
            match effect {
                AppEffect::Wake => outcome.say.push(FromGateway::Wake {
                    app: self.key.clone(),
                    trace: cell.trace,
                }),
                AppEffect::Admit { waiter, vm } => {
                    let incarnation = cell.incarnation(vm);
                    let in_flight = InFlight::new(Arc::clone(self), incarnation);
                    let phases = context.phases.clone().unwrap_or_default();
                    if let Some(sender) = cell.waiting.remove(&waiter) {
                        let verdict = Verdict::Admitted { in_flight, phases };
                        outcome.verdicts.push((sender, verdict));
                    }
                }
                AppEffect::Refuse { waiter, why } => {
                    let refused = Refused::new(why, context);
                    if let Some(sender) = cell.waiting.remove(&waiter) {
                        outcome.verdicts.push((sender, Verdict::Refused(refused)));
                    }
                }
                AppEffect::Edge => {
                    outcome.changed = !std::mem::replace(&mut cell.listed, true);
                }
                AppEffect::Retire { vm } => outcome.retire.extend(cell.retired(vm)),
                AppEffect::Cut { vm } => outcome.cut.extend(cell.forget(vm)),
                AppEffect::Reaped { vm } => outcome.say.push(FromGateway::Reaped {
                    app: self.key.clone(),
                    vm,
                }),
                AppEffect::Busy { vm } => outcome.say.push(FromGateway::Busy {
                    app: self.key.clone(),
                    vm,
                }),
            }
        }
        if let AppState::Warm { vm } = cell.machine.state()
            && matches!(event, AppEvent::Awake { .. })
        {
            cell.incarnation(vm).reopen();
        }
        outcome
    }

    fn carry_out(self: &Arc<Self>, outcome: Outcome) {
        for incarnation in outcome.retire {
            incarnation.retire();
        }
        for incarnation in outcome.cut {
            incarnation.cut();
        }
        for (sender, verdict) in outcome.verdicts {
            // A request that left meanwhile gives its admission back by dropping it.
            drop(sender.send(verdict));
        }
        for message in outcome.say {
            self.feed.send(message);
        }
        if outcome.changed {
            self.feed.list_changed(Arc::clone(self));
        }
    }
}

impl Cell {
    fn incarnation(&mut self, vm: VmId) -> Arc<Incarnation> {
        if let Some(known) = self.incarnations.iter().find(|known| known.vm() == vm) {
            return Arc::clone(known);
        }
        let incarnation = Arc::new(Incarnation::new(vm));
        self.incarnations.push(Arc::clone(&incarnation));
        incarnation
    }

    /// The VM, forgotten unless requests of it are still in flight: those must be found
    /// again should it end under them.
    fn retired(&mut self, vm: VmId) -> Option<Arc<Incarnation>> {
        if self.machine.loads().any(|load| load.vm == vm) {
            return Some(self.incarnation(vm));
        }
        self.forget(vm)
    }

    fn forget(&mut self, vm: VmId) -> Option<Arc<Incarnation>> {
        let index = self
            .incarnations
            .iter()
            .position(|known| known.vm() == vm)?;
        Some(self.incarnations.swap_remove(index))
    }
}

impl Refused {
    fn new(why: RefuseReason, context: &Tidings) -> Self {
        match (why, &context.failure) {
            (RefuseReason::QueueFull, _) => Self::QueueFull,
            (RefuseReason::AppFull, _) => Self::AppFull,
            (RefuseReason::WakeFailed, Some(failure)) => Self::WakeFailed(Arc::clone(failure)),
            (RefuseReason::Unrouted | RefuseReason::WakeFailed, _) => Self::Unrouted,
        }
    }
}

/// A request that waits; dropping it leaves the queue.
#[derive(Debug)]
pub(crate) struct Waiter {
    app: Arc<App>,
    id: WaiterId,
    receiver: oneshot::Receiver<Verdict>,
}

impl Future for Waiter {
    /// `None` does not happen while the app exists, which the waiter sees to.
    type Output = Option<Verdict>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Verdict>> {
        Pin::new(&mut self.receiver).poll(cx).map(Result::ok)
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        let left = AppEvent::Left { waiter: self.id };
        self.app.event(left, &Tidings::default());
    }
}
