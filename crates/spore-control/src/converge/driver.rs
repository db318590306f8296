//! Runs the reconcilers: by signal, by timer, and all of them now and then.
//!
//! One task takes signals and keeps timers; each look at an app is a task of its own, at most
//! [`LOOKS_MAX`] at once and never two for one app.

use std::collections::{BTreeSet, HashMap};
use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use futures_util::FutureExt as _;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::life::Moment;
use super::{AppRef, Converge, Signal};
use crate::nodes::VmFeed;

/// Apps looked at at once: each look reads the store on a blocking thread.
const LOOKS_MAX: usize = 64;

/// Until an app whose look panicked is looked at again.
const AFTER_PANIC: core::time::Duration = core::time::Duration::from_secs(5);

/// What the driver owns.
pub(crate) struct Driver {
    pub(crate) converge: Converge,
    pub(crate) signals: mpsc::UnboundedReceiver<Signal>,
    pub(crate) feed: VmFeed,
    pub(crate) stop: watch::Receiver<bool>,
}

#[derive(Default)]
struct Timers {
    queue: BTreeSet<(Moment, AppRef)>,
    at: HashMap<AppRef, Moment>,
}

impl Timers {
    fn set(&mut self, app: AppRef, at: Option<Moment>) {
        if let Some(old) = self.at.remove(&app) {
            self.queue.remove(&(old, app.clone()));
        }
        if let Some(at) = at {
            self.queue.insert((at, app.clone()));
            self.at.insert(app, at);
        }
    }

    fn next(&self) -> Option<Moment> {
        self.queue.first().map(|(at, _)| *at)
    }

    fn due(&mut self, now: Moment) -> Vec<AppRef> {
        let mut due = Vec::new();
        while let Some((at, app)) = self.queue.pop_first() {
            if at > now {
                self.queue.insert((at, app));
                break;
            }
            self.at.remove(&app);
            due.push(app);
        }
        due
    }
}

impl Driver {
    /// Runs until it is told to stop; then waits for the looks under way.
    pub(crate) async fn run(mut self) {
        let mut timers = Timers::default();
        let mut looks = JoinSet::new();
        let permits = Arc::new(Semaphore::new(LOOKS_MAX));
        let mut repair = tokio::time::interval(self.converge.inner.config.timing.repair);
        repair.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        repair.reset();
        loop {
            let at = timers.next();
            // In this order, so that a seed decides the same in every run. A flood of signals is
            // one per app, and news of VMs come before them.
            tokio::select! {
                biased;
                _ = self.stop.wait_for(|stop| *stop) => break,
                () = self.converge.sleep_until(at), if at.is_some() => {
                    for app in timers.due(self.converge.now()) {
                        self.converge.timer_over(&app);
                    }
                }
                status = self.feed.next() => self.converge.vm_changed(status),
                Some(signal) = self.signals.recv() => match signal {
                    Signal::Look(app) => {
                        let (converge, permits) = (self.converge.clone(), Arc::clone(&permits));
                        looks.spawn(async move {
                            // The semaphore is never closed.
                            let _permit = permits.acquire_owned().await;
                            let look = AssertUnwindSafe(converge.look_at(&app));
                            if look.catch_unwind().await.is_err() {
                                converge.look_panicked(&app);
                            }
                        });
                    }
                    Signal::Timer(app, at) => timers.set(app, at),
                    Signal::DoorBack(warm) => {
                        let converge = self.converge.clone();
                        looks.spawn(async move { converge.door_back(warm).await });
                    }
                },
                _ = repair.tick() => {
                    let converge = self.converge.clone();
                    looks.spawn(async move { converge.repair().await });
                }
                Some(ended) = looks.join_next() => {
                    if let Err(error) = ended && error.is_panic() {
                        tracing::error!(%error, "a look at an app panicked");
                    }
                }
            }
        }
        while looks.join_next().await.is_some() {}
    }
}

impl Converge {
    async fn sleep_until(&self, at: Option<Moment>) {
        let at = at.unwrap_or_default();
        let when = self.inner.began + core::time::Duration::from_millis(at.0);
        tokio::time::sleep_until(when.max(Instant::now())).await;
    }

    /// A panic is a bug of ours; the app must not stay unattended because of it.
    fn look_panicked(&self, app: &AppRef) {
        tracing::error!(%app, "a look at an app panicked; it is looked at again");
        let at = Some(self.now().after(AFTER_PANIC));
        let mut slots = self.slots();
        if let Some(slot) = slots.get_mut(app) {
            slot.activity = super::Looking::Nobody;
            slot.timer = at;
            self.tell(Signal::Timer(app.clone(), at));
        }
    }

    fn timer_over(&self, app: &AppRef) {
        let mut slots = self.slots();
        if let Some(slot) = slots.get_mut(app) {
            slot.timer = None;
            self.look(app, slot);
        }
    }
}
