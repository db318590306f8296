//! The rules of a step: each looks at what is, and asks for what is missing.
//!
//! They run in the order of [`Life::step`]; each is idempotent, since it marks what it asked for.

use spore_api::error::ErrorCode;
use spore_wire::id::VmId;
use spore_wire::node::{StopMode, VmPhase};

use super::{Admission, Effect, Failure, Intent, Life, Moment, Origin, Stage, Step, Target, Vm};
use crate::config::Timing;

impl Life {
    /// Adopts or stops what the node has and nobody here started.
    pub(super) fn settle_found(&mut self, intent: &Intent, now: Moment, timing: &Timing) {
        let found: Vec<_> = self.at(|stage| stage == Stage::Found);
        for vm in found {
            let mut others = self.vms.iter().filter(|(id, _)| **id != vm);
            let serves = |stage| {
                matches!(
                    stage,
                    Stage::Starting | Stage::Serving | Stage::Closing { .. }
                )
            };
            let alone = others.all(|(_, life)| !serves(life.stage));
            let life = &self.vms[&vm];
            let release = life.release;
            let live = live_of(intent);
            if life.phase == VmPhase::Draining {
                self.stop(vm, StopMode::Graceful, now, timing);
            } else if alone && live.is_some_and(|live| live.release == release) {
                self.adopt(vm, now, timing, live);
            } else {
                self.stop(vm, StopMode::Graceful, now, timing);
            }
        }
    }

    fn adopt(&mut self, vm: VmId, now: Moment, timing: &Timing, live: Option<Target>) {
        let Some(life) = self.vms.get(&vm) else {
            return;
        };
        let release = life.release;
        let status = life.status.as_ref();
        let secrets_version = status.map_or(0, |status| status.owner.secrets_version);
        self.say(Effect::Remind {
            vm,
            release,
            secrets_version,
        });
        let Some(life) = self.vms.get_mut(&vm) else {
            return;
        };
        if life.phase == VmPhase::Ready {
            self.serve(vm, now);
            return;
        }
        life.stage = Stage::Starting;
        let ready_ms = live.map_or(0, |live| live.ready_ms + live.suspend_ms.unwrap_or(0));
        life.until = now.after(timing.boot_allowance).after_ms(ready_ms);
    }

    /// An app that was removed has no VM, no deploy and no waiter.
    pub(super) fn settle_removed(&mut self, intent: &Intent, now: Moment, timing: &Timing) {
        if *intent != Intent::Removed {
            return;
        }
        self.fail_deploy(Failure::new(ErrorCode::NotFound, "the app was removed"));
        for vm in self.at(|stage| stage != Stage::Stopping) {
            self.stop(vm, StopMode::Graceful, now, timing);
        }
        self.fail_wake(Failure::new(ErrorCode::NotFound, "there is no such app"));
        self.sleep = false;
        self.breaker = super::Breaker::default();
        self.last_failure = None;
    }

    /// Starts a release that is to be tried, and has it written down once it is ready.
    pub(super) fn settle_deploy(
        &mut self,
        now: Moment,
        timing: &Timing,
        fresh: &mut Option<VmId>,
        step: &mut Step,
    ) {
        let Some(deploy) = &mut self.deploy else {
            return;
        };
        let (target, operation) = (deploy.target, deploy.operation.clone());
        let ending = |stage| {
            matches!(
                stage,
                Stage::Closing { force: true } | Stage::Suspending | Stage::Stopping
            )
        };
        let Some(vm) = deploy.vm else {
            // A switch begins when what was there before is over: never more than two VMs, and
            // never two of the release that is rolled back to. Their end is news of its own.
            if self.vms.len() > 1 || self.vms.values().any(|vm| ending(vm.stage)) {
                return;
            }
            let Some(vm) = fresh.take() else {
                step.look_at(now);
                return;
            };
            deploy.vm = Some(vm);
            self.begin(vm, target, Stage::Trying, now, timing);
            return;
        };
        let Some(life) = self.vms.get_mut(&vm) else {
            return;
        };
        if life.stage == Stage::Trying && life.phase == VmPhase::Ready {
            life.stage = Stage::Healthy;
            life.ready_at = Some(now);
            let release = target.release;
            self.say(Effect::Promote {
                operation,
                release,
                vm,
            });
        }
    }

    /// An app that is to sleep, and a start that became pointless.
    pub(super) fn settle_rest(&mut self, intent: &Intent, now: Moment, timing: &Timing) {
        if self.sleep && self.is_asleep() {
            self.sleep = false;
        }
        if self.is_asleep() && live_of(intent).is_some_and(|live| live.idle_after_ms.is_some()) {
            // Only an app that is always awake must remember that it is to rest.
            self.rest = false;
        }
        let disabled = matches!(
            intent,
            Intent::App {
                admission: Admission::Disabled,
                ..
            }
        );
        let sleeps = self.sleep || disabled;
        let live = live_of(intent).map(|live| live.release);
        for vm in self.at(|stage| stage == Stage::Starting) {
            if sleeps || Some(self.vms[&vm].release) != live {
                self.stop(vm, StopMode::Graceful, now, timing);
            }
        }
        if sleeps {
            let open = |stage| matches!(stage, Stage::Serving | Stage::Closing { force: false });
            for vm in self.at(open) {
                self.close(vm, true, now.after(timing.reap_answer));
            }
        }
    }

    /// What took too long.
    pub(super) fn settle_deadlines(&mut self, now: Moment, timing: &Timing, step: &mut Step) {
        let waiting = |stage| !matches!(stage, Stage::Serving | Stage::Healthy | Stage::Found);
        for vm in self.at(waiting) {
            let life = &self.vms[&vm];
            let (stage, until) = (life.stage, life.until);
            if until > now {
                step.look_at(until);
                continue;
            }
            self.too_late(vm, stage, now, timing);
            if let Some(life) = self.vms.get(&vm)
                && life.stage != Stage::Serving
            {
                step.look_at(life.until);
            }
        }
    }

    fn too_late(&mut self, vm: VmId, stage: Stage, now: Moment, timing: &Timing) {
        let late = || {
            let message = "the app was not ready in its time; see `spore logs`";
            Failure::new(ErrorCode::Timeout, message)
        };
        match stage {
            Stage::Starting => {
                self.stop(vm, StopMode::Kill, now, timing);
                self.start_failed(late(), now, timing);
            }
            Stage::Trying => {
                self.fail_deploy(late());
                self.stop(vm, StopMode::Kill, now, timing);
            }
            Stage::Closing { force: false } => {
                // The gateway is away; it is asked again once the app was idle for its time.
                if let Some(life) = self.vms.get_mut(&vm) {
                    life.stage = Stage::Serving;
                    life.idle_since = Some(now);
                }
            }
            Stage::Closing { force: true } => self.stop(vm, StopMode::Graceful, now, timing),
            Stage::Suspending | Stage::Stopping => self.stop(vm, StopMode::Kill, now, timing),
            Stage::Leaving => self.farewell_over(vm, now, timing),
            Stage::Found | Stage::Healthy | Stage::Serving => {}
        }
    }

    /// What is still in flight in a VM that its node ends goes with it.
    fn farewell_over(&mut self, vm: VmId, now: Moment, timing: &Timing) {
        let Some(life) = self.vms.get_mut(&vm) else {
            return;
        };
        life.until = now.after(timing.stop_grace + super::STOP_ALLOWANCE);
        if core::mem::take(&mut life.told) {
            let reason = "it ended by itself; see `spore logs`".to_owned();
            self.say(Effect::Gone { vm, reason });
        }
        let mode = StopMode::Kill;
        self.say(Effect::Stop { vm, mode });
    }

    /// Closes an app that is idle.
    pub(super) fn settle_idle(
        &mut self,
        intent: &Intent,
        now: Moment,
        timing: &Timing,
        step: &mut Step,
    ) {
        let (Some(vm), Some(live)) = (self.awake(), live_of(intent)) else {
            return;
        };
        let life = &self.vms[&vm];
        let (Some(after), Some(since), 0) = (live.idle_after_ms, life.idle_since, self.holds)
        else {
            return;
        };
        if self.wake {
            return;
        }
        let at = since.after_ms(after).max(life.lease_until);
        if at <= now {
            let until = now.after(timing.reap_answer);
            if let Some(life) = self.vms.get_mut(&vm) {
                let is_live = life.release == live.release;
                life.suspend_ms = live.suspend_ms.filter(|_ms| is_live);
            }
            self.close(vm, false, until);
            step.look_at(until);
        } else {
            step.look_at(at);
        }
    }

    /// Answers who waits: with the VM there is, with a new one, or with why not.
    pub(super) fn settle_wake(
        &mut self,
        intent: &Intent,
        now: Moment,
        timing: &Timing,
        fresh: &mut Option<VmId>,
        step: &mut Step,
    ) {
        let Some(target) = self.may_start(intent) else {
            return;
        };
        if let Some(vm) = self.awake() {
            if core::mem::take(&mut self.wake) {
                // It served already: nobody waited for it to start.
                let phases = Vec::new();
                self.say(Effect::Awake { vm, phases });
            }
            return;
        }
        // A VM that was just shown healthy answers in a moment.
        let promoting = self.vms.values().any(|vm| vm.stage == Stage::Healthy);
        if self.sleep || promoting || !self.is_asleep() {
            return;
        }
        if self.breaker.until > now {
            // A pause that is nearly over is waited out: whoever comes after a VM that died should
            // meet the next one, not the reason.
            let is_short = self.breaker.until <= now.after(timing.backoff_least);
            if !is_short {
                let failure = self.paused(now);
                self.fail_wake(failure);
            }
            if is_short || target.idle_after_ms.is_none() && !self.rest {
                step.look_at(self.breaker.until);
            }
            return;
        }
        let Some(vm) = fresh.take() else {
            step.look_at(now);
            return;
        };
        self.begin(vm, target, Stage::Starting, now, timing);
        step.look_at(self.vms[&vm].until);
    }

    /// What to start if there is nothing, when something is to run; answers who waits in vain.
    fn may_start(&mut self, intent: &Intent) -> Option<Target> {
        let Intent::App { admission, live } = intent else {
            return None;
        };
        if *admission == Admission::Disabled {
            let message = "the app is disabled: enable it first (`spore enable`)";
            self.fail_wake(Failure::new(ErrorCode::AppDisabled, message));
            return None;
        }
        let Some(live) = live else {
            if self.deploy.is_none() {
                let message = "the app has no healthy release yet: deploy one (`spore deploy`)";
                self.fail_wake(Failure::new(ErrorCode::NoRelease, message));
            }
            return None;
        };
        let always = live.idle_after_ms.is_none() && !self.rest;
        (self.wake || always).then_some(*live)
    }

    fn paused(&self, now: Moment) -> Failure {
        let mut failure = self.last_failure.clone().unwrap_or_else(|| {
            Failure::new(
                ErrorCode::AppFailed,
                "the app ended too soon; see `spore logs`",
            )
        });
        failure.retry_after_ms = self.breaker.until.0.saturating_sub(now.0).max(1);
        failure
    }

    fn begin(&mut self, vm: VmId, target: Target, stage: Stage, now: Moment, timing: &Timing) {
        let release = target.release;
        let ready_ms = target.ready_ms + target.suspend_ms.unwrap_or(0);
        let until = now.after(timing.boot_allowance).after_ms(ready_ms);
        let life = Vm {
            release,
            origin: Origin::Ours,
            stage,
            phase: VmPhase::Preparing,
            until,
            accepted: None,
            ready_at: None,
            idle_since: Some(now),
            lease_until: now,
            suspend_ms: None,
            told: false,
            status: None,
        };
        self.vms.insert(vm, life);
        let begin = core::mem::take(&mut self.next);
        self.say(Effect::Start { vm, release, begin });
    }

    fn at(&self, wanted: impl Fn(Stage) -> bool) -> Vec<VmId> {
        let vms = self.vms.iter();
        vms.filter(|(_, life)| wanted(life.stage))
            .map(|(vm, _)| *vm)
            .collect()
    }
}

fn live_of(intent: &Intent) -> Option<Target> {
    match intent {
        Intent::App { live, .. } => *live,
        Intent::Removed => None,
    }
}
