//! What may happen to an app, and what it changes at once.
//!
//! Events come from the gateway, the node, the API and the reconciler itself, in any order and
//! more than once; each is harmless when it comes late.

use spore_api::error::ErrorCode;
use spore_wire::gateway::Activity;
use spore_wire::id::VmId;
use spore_wire::node::{FAREWELL_MAX, StopMode, VmFailureKind, VmPhase, VmStatus};

use super::{
    Begin, Breaker, Deploy, Effect, Failure, Life, Moment, Origin, STOP_ALLOWANCE, Stage, Target,
    Vm, failure_of,
};
use crate::config::Timing;

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Somebody waits for the app to be awake.
    Wake,
    /// Its owner wants it asleep; the next wake starts it again.
    Sleep,
    /// Its owner wants a fresh VM; an app that sleeps is woken.
    Restart,
    /// A call of the API uses the VM from now on.
    Hold,
    /// It does not any more.
    LetGo,
    /// The node told how a VM is.
    Vm(VmStatus),
    /// The node has no such VM.
    Lost(VmId),
    /// The node took the start.
    Accepted(VmId),
    /// It refused it.
    Refused(VmId, Failure),
    /// The gateway told how busy a VM is.
    Activity(Activity),
    /// The gateway closed admission, and nothing is in flight.
    Reaped(VmId),
    /// Something is in flight; admission stays open.
    Busy(VmId),
    /// A gateway connected, and believes these awake.
    DoorBack(Vec<Activity>),
    /// A release is to be tried.
    Deploy {
        /// The operation that does so.
        operation: String,
        /// Which.
        target: Target,
    },
    /// It was written down that this VM's release is live.
    Promoted(VmId),
    /// It could not be written down.
    NotPromoted(VmId, Failure),
    /// A VM was suspended, and ends.
    Suspended(VmId),
    /// It could not be.
    NotSuspended(VmId),
}

/// Whether a VM ended because of what it began from, before its app was ready.
fn broke_on_its_template(status: &VmStatus) -> bool {
    let kind = status.failure.as_ref().map(|failure| failure.kind);
    let before_the_app = matches!(
        kind,
        Some(
            VmFailureKind::Boot
                | VmFailureKind::Thaw
                | VmFailureKind::Snapshot
                | VmFailureKind::Died
        )
    );
    !status.source.is_boot() && before_the_app
}

impl Life {
    /// Takes in what happened; what follows is decided by the next step.
    pub fn on(&mut self, event: Event, now: Moment, timing: &Timing) {
        match event {
            Event::Wake => {
                self.wake = true;
                self.rest = false;
            }
            Event::Sleep => {
                self.sleep = !self.is_asleep();
                self.rest = true;
            }
            Event::Restart => {
                self.sleep = !self.is_asleep();
                self.wake = true;
                self.rest = false;
            }
            Event::Hold => self.holds += 1,
            Event::LetGo => {
                self.holds = self.holds.saturating_sub(1);
                let serving = self.serving.and_then(|vm| self.vms.get_mut(&vm));
                if let Some(idle_since) = serving.and_then(|vm| vm.idle_since.as_mut()) {
                    *idle_since = now;
                }
            }
            Event::Vm(status) => self.on_status(status, now, timing),
            Event::Lost(vm) => {
                let message = "the VM is not on its node any more; see `spore logs`";
                let failure = Failure::new(ErrorCode::AppFailed, message);
                self.over(vm, Some(failure), now, timing);
            }
            Event::Accepted(vm) => {
                if let Some(life) = self.vms.get_mut(&vm) {
                    life.accepted.get_or_insert(now);
                }
            }
            Event::Refused(vm, failure) => self.over(vm, Some(failure), now, timing),
            Event::Activity(activity) => self.on_activity(&activity, now),
            Event::Reaped(vm) => self.on_reaped(vm, now, timing),
            Event::Busy(vm) => {
                if let Some(life) = self.vms.get_mut(&vm)
                    && life.stage == (Stage::Closing { force: false })
                {
                    life.stage = Stage::Serving;
                    // Its idle edge may have come before this word: only what is told to be busy
                    // will tell of another.
                    life.idle_since = life.idle_since.map(|_| now);
                }
            }
            Event::DoorBack(warm) => self.on_door_back(&warm, now),
            Event::Deploy { operation, target } => self.on_deploy(operation, target),
            Event::Promoted(vm) => self.on_promoted(vm, now, timing),
            Event::NotPromoted(vm, failure) => {
                self.fail_deploy(failure);
                self.stop(vm, StopMode::Graceful, now, timing);
            }
            Event::Suspended(vm) => {
                if let Some(life) = self.is_suspending(vm) {
                    life.stage = Stage::Stopping;
                    life.until = now.after(timing.stop_grace + STOP_ALLOWANCE);
                }
            }
            Event::NotSuspended(vm) => {
                if self.is_suspending(vm).is_some() {
                    self.stop(vm, StopMode::Graceful, now, timing);
                }
            }
        }
    }

    fn is_suspending(&mut self, vm: VmId) -> Option<&mut Vm> {
        let life = self.vms.get_mut(&vm)?;
        (life.stage == Stage::Suspending).then_some(life)
    }

    fn on_status(&mut self, status: VmStatus, now: Moment, timing: &Timing) {
        let vm = status.vm;
        if status.phase.is_over() {
            if broke_on_its_template(&status) && self.begins_again(vm) {
                return;
            }
            let failed = status.phase == VmPhase::Failed || status.failure.is_some();
            let failure = failed.then(|| failure_of(&status));
            self.over(vm, failure, now, timing);
            return;
        }
        let life = self.vms.entry(vm).or_insert_with(|| Vm {
            release: status.owner.release,
            origin: Origin::Found,
            stage: Stage::Found,
            phase: status.phase,
            until: now.after(timing.boot_allowance),
            accepted: Some(now),
            ready_at: None,
            idle_since: Some(now),
            lease_until: now,
            suspend_ms: None,
            told: false,
            status: None,
        });
        life.accepted.get_or_insert(now);
        if status.phase < life.phase {
            // Phases come in the order of a life: this is old news.
            return;
        }
        let ends = status.phase == VmPhase::Draining && life.phase != status.phase;
        life.phase = status.phase;
        life.lease_until = now.after_ms(status.awake_for_ms);
        life.status = Some(status);
        if life.phase == VmPhase::Ready && life.stage == Stage::Starting {
            self.serve(vm, now);
        } else if ends {
            self.ends_unasked(vm, now);
        }
    }

    /// A VM that did not come up from its template tells nothing of the app: another is booted
    /// in its place, and who waits goes on waiting. A booted one has no template to break on, so
    /// this happens once in a row.
    fn begins_again(&mut self, vm: VmId) -> bool {
        let stage = self.vms.get(&vm).map(|life| (life.stage, life.origin));
        match stage {
            Some((Stage::Starting, Origin::Ours)) => {}
            Some((Stage::Trying, Origin::Ours)) => {
                if let Some(deploy) = &mut self.deploy {
                    deploy.vm = None;
                }
            }
            _ => return false,
        }
        self.vms.remove(&vm);
        self.next = Begin::Cold;
        true
    }

    /// A VM is ended by its node, which waits to hear that no request comes any more: the gateway
    /// closes, and what is in flight has half of that wait. What comes next begins once it is over.
    fn ends_unasked(&mut self, vm: VmId, now: Moment) {
        let Some(life) = self.vms.get_mut(&vm) else {
            return;
        };
        match life.stage {
            Stage::Serving | Stage::Closing { force: false } => {
                life.stage = Stage::Leaving;
                life.until = now.after(FAREWELL_MAX / 2);
            }
            Stage::Starting | Stage::Trying | Stage::Healthy => {}
            // It is closed or stopped already, or taken in by the next step.
            Stage::Closing { force: true }
            | Stage::Leaving
            | Stage::Suspending
            | Stage::Stopping
            | Stage::Found => return,
        }
        let told = life.told;
        if self.serving == Some(vm) {
            self.serving = None;
        }
        self.say(if told {
            Effect::Close { vm, force: true }
        } else {
            Effect::Stop {
                vm,
                mode: StopMode::Kill,
            }
        });
    }

    /// A VM is over: what that means depends on where it stood.
    fn over(&mut self, vm: VmId, failure: Option<Failure>, now: Moment, timing: &Timing) {
        let Some(life) = self.vms.remove(&vm) else {
            return;
        };
        if self.serving == Some(vm) {
            self.serving = None;
        }
        let ended = || Failure::new(ErrorCode::AppFailed, "the VM ended; see `spore logs`");
        match life.stage {
            Stage::Trying | Stage::Healthy => {
                self.fail_deploy(failure.clone().unwrap_or_else(ended));
            }
            // The restart of a daemon ends what was half made. That tells nothing of the app, so
            // who waits is told nothing of it: another is started.
            Stage::Starting if life.origin == Origin::Found => {}
            Stage::Starting => {
                self.start_failed(failure.clone().unwrap_or_else(ended), now, timing)
            }
            Stage::Serving | Stage::Leaving => {
                let lived = life
                    .ready_at
                    .map_or(now, |at| at.after(timing.healthy_after));
                if lived <= now {
                    self.breaker.failures = 0;
                }
                self.breaker.failed(now, timing);
                self.last_failure = Some(failure.clone().unwrap_or_else(ended));
            }
            Stage::Found | Stage::Closing { .. } | Stage::Suspending | Stage::Stopping => {
                if life.ready_at.is_some() {
                    self.breaker = Breaker::default();
                }
            }
        }
        if life.told {
            let reason = match (life.stage, failure) {
                (Stage::Stopping | Stage::Suspending | Stage::Closing { .. }, _) | (_, None) => {
                    "it was stopped".into()
                }
                (_, Some(failure)) => failure.message,
            };
            self.say(Effect::Gone { vm, reason });
        }
    }

    /// A VM that was to serve did not get there.
    pub(super) fn start_failed(&mut self, mut failure: Failure, now: Moment, timing: &Timing) {
        if failure.code == ErrorCode::NoCapacity {
            // The app is not to blame: the next try needs only a pause.
            self.breaker.until = now.after(timing.backoff_least);
        } else {
            self.breaker.failed(now, timing);
        }
        failure.retry_after_ms = self.breaker.until.0.saturating_sub(now.0);
        self.last_failure = Some(failure.clone());
        self.fail_wake(failure);
    }

    pub(super) fn fail_deploy(&mut self, failure: Failure) {
        if let Some(deploy) = self.deploy.take() {
            self.say(Effect::DeployFailed {
                operation: deploy.operation,
                release: deploy.target.release,
                failure,
            });
        }
    }

    fn on_activity(&mut self, activity: &Activity, now: Moment) {
        if let Some(life) = self.vms.get_mut(&activity.vm) {
            let since = Moment(now.0.saturating_sub(activity.idle_ms));
            life.idle_since = (activity.in_flight == 0).then_some(since);
        }
    }

    fn on_reaped(&mut self, vm: VmId, now: Moment, timing: &Timing) {
        // An answer that comes after its time still means that the gateway has closed.
        let Some(life) = self.vms.get(&vm) else {
            return;
        };
        match life.stage {
            Stage::Closing { .. } | Stage::Serving => match (life.stage, life.suspend_ms) {
                (Stage::Closing { force: false } | Stage::Serving, Some(copying_ms))
                    if !self.sleep =>
                {
                    self.suspend(vm, copying_ms, now);
                }
                _ => self.stop(vm, StopMode::Graceful, now, timing),
            },
            // Its node waits for this word. Why it ends is counted when it is over.
            Stage::Leaving | Stage::Starting if life.phase == VmPhase::Draining => {
                let mode = StopMode::Kill;
                self.say(Effect::Stop { vm, mode });
            }
            _ => {}
        }
    }

    fn on_door_back(&mut self, warm: &[Activity], now: Moment) {
        for activity in warm {
            let vm = activity.vm;
            match self.vms.get_mut(&vm) {
                // An earlier daemon told of it: its end must be told too.
                Some(life) => {
                    life.told = true;
                    if matches!(life.stage, Stage::Stopping | Stage::Suspending) {
                        self.say(Effect::Close { vm, force: true });
                    }
                }
                None => {
                    let reason = "it ended while the daemon was away".to_owned();
                    self.say(Effect::Gone { vm, reason });
                }
            }
        }
        let told: Vec<_> = self
            .vms
            .iter()
            .map(|(vm, life)| (*vm, life.stage))
            .collect();
        for (vm, stage) in told {
            match stage {
                Stage::Serving => {
                    let phases = Vec::new();
                    self.say(Effect::Awake { vm, phases });
                }
                // The question may have been lost with the connection.
                Stage::Closing { force } => self.say(Effect::Close { vm, force }),
                // Unless it was cut off and stopped already.
                Stage::Leaving if self.vms[&vm].told => {
                    self.say(Effect::Close { vm, force: true });
                }
                _ => {}
            }
        }
        for activity in warm {
            self.on_activity(activity, now);
        }
    }

    fn on_deploy(&mut self, operation: String, target: Target) {
        if let Some(running) = &self.deploy {
            let message = format!("the operation {} was faster", running.operation);
            self.say(Effect::DeployFailed {
                operation,
                release: target.release,
                failure: Failure::new(ErrorCode::Conflict, message),
            });
            return;
        }
        self.deploy = Some(Deploy {
            operation,
            target,
            vm: None,
        });
    }

    fn on_promoted(&mut self, vm: VmId, now: Moment, timing: &Timing) {
        let deploy = self.deploy.take();
        self.rest = false;
        // A fresh VM is what a sleep or restart under way would have led to.
        self.sleep = false;
        self.breaker = Breaker::default();
        let old = self.serving;
        if self
            .vms
            .get(&vm)
            .is_some_and(|life| life.stage == Stage::Healthy && life.phase == VmPhase::Ready)
        {
            self.serve(vm, now);
        }
        if let Some(Deploy { operation, .. }) = deploy {
            self.say(Effect::Live { operation });
        }
        if let Some(old) = old.filter(|old| *old != vm) {
            // From Closing too: what was asked without force is asked with it.
            if self
                .vms
                .get(&old)
                .is_some_and(|life| !matches!(life.stage, Stage::Stopping | Stage::Suspending))
            {
                self.close(old, true, now.after(timing.drain));
            }
        }
    }
}
