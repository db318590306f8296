//! Makes one app what it should be: reads what is wanted, steps its life, does the effects.
//!
//! Run by the driver, one task per app at a time. Slow effects (start, stop) are tasks of their
//! own whose outcome comes back as an event, so that a slow node holds up no other decision.

use std::sync::PoisonError;

use spore_api::error::ErrorCode;
use spore_wire::cause::chain;
use spore_wire::gateway::{ToGateway, WakeFailure};
use spore_wire::id::VmId;
use spore_wire::node::{StopMode, VmStatus};
use tracing::{Instrument as _, Span};

use super::life::{Admission, Begin, Effect, Event, Failure, Intent, Target};
use super::start::resources_of;
use super::{AppRef, Converge, Looking, Signal};
use crate::clock::next_vm;
use crate::nodes::NodesError;
use crate::store::StoreError;
use crate::store::record::app::{AppRecord, app_key};
use crate::store::record::load;
use crate::store::record::release::{ReleaseRecord, release_key};

/// Until a store that failed is asked again.
const STORE_PAUSE_MS: u64 = 1000;

/// VMs that are remembered as over: more than can end while one list is on its way.
const ENDED_KEPT: usize = 1024;

impl Converge {
    /// One look at one app: until nothing is left to do and nothing happened meanwhile.
    pub(super) async fn look_at(&self, app: &AppRef) {
        loop {
            self.begin_look(app);
            let intent = match self.intent(app).await {
                Ok(intent) => intent,
                Err(error) => {
                    tracing::error!(%app, error = %chain(&error), "an app cannot be looked at");
                    self.end_look(app, Some(self.now().after_ms(STORE_PAUSE_MS)));
                    return;
                }
            };
            self.route(app, &intent);
            let Some((effects, due)) = self.step(app, &intent) else {
                return;
            };
            if effects.is_empty() {
                if let Err(error) = self.forget_unheld(app, None).await {
                    let error = chain(&error);
                    tracing::warn!(%app, error, "what its secrets were is forgotten later");
                }
                if self.end_look(app, due) {
                    return;
                }
            }
            for effect in effects {
                self.perform(app, effect).await;
            }
            self.inner.changed.send_modify(|n| *n = n.wrapping_add(1));
        }
    }

    fn begin_look(&self, app: &AppRef) {
        if let Some(slot) = self.slots().get_mut(app) {
            slot.activity = Looking::Now;
        }
    }

    /// Ends the look, unless something happened since it began.
    fn end_look(&self, app: &AppRef, due: Option<super::Moment>) -> bool {
        let mut slots = self.slots();
        let Some(slot) = slots.get_mut(app) else {
            return true;
        };
        let due_now = due.is_some_and(|due| due <= self.now());
        if slot.activity == Looking::Again || due_now {
            return false;
        }
        slot.activity = Looking::Nobody;
        if slot.timer != due {
            slot.timer = due;
            self.tell(Signal::Timer(app.clone(), due));
        }
        if slot.life.is_blank() && slot.waiters.is_empty() {
            slots.remove(app);
        }
        drop(slots);
        self.inner.changed.send_modify(|n| *n = n.wrapping_add(1));
        true
    }

    fn step(&self, app: &AppRef, intent: &Intent) -> Option<(Vec<Effect>, Option<super::Moment>)> {
        let mut fresh = Some(next_vm(&*self.inner.chance));
        let now = self.now();
        let mut slots = self.slots();
        let slot = slots.get_mut(app)?;
        let timing = &self.inner.config.timing;
        let step = slot.life.step(intent, now, timing, &mut fresh);
        Some((step.effects, step.due))
    }

    /// What the owner wants.
    pub(super) async fn intent(&self, app: &AppRef) -> Result<Intent, StoreError> {
        let store = &*self.inner.store;
        let stored = load::<AppRecord>(store, &app_key(&app.account, &app.app)).await?;
        let Some(stored) = stored else {
            return Ok(Intent::Removed);
        };
        let admission = if stored.record.enabled {
            Admission::Enabled
        } else {
            Admission::Disabled
        };
        let live = match stored.record.release {
            None => None,
            Some(number) => self.release(app, number).await?.as_ref().map(target_of),
        };
        Ok(Intent::App { admission, live })
    }

    pub(super) async fn release(
        &self,
        app: &AppRef,
        number: u64,
    ) -> Result<Option<ReleaseRecord>, StoreError> {
        let key = release_key(&app.account, &app.app, number);
        Ok(load(&*self.inner.store, &key)
            .await?
            .map(|stored| stored.record))
    }

    async fn perform(&self, app: &AppRef, effect: Effect) {
        tracing::debug!(%app, ?effect, "effect");
        match effect {
            Effect::Start { vm, release, begin } => self.spawn_start(app, vm, release, begin),
            Effect::Remind {
                vm,
                release,
                secrets_version,
            } => self.spawn_remind(app, vm, release, secrets_version),
            Effect::Stop { vm, mode } => self.spawn_stop(app, vm, mode),
            Effect::Suspend { vm, release } => self.spawn_suspend(app, vm, release),
            Effect::Close { vm, force } => {
                let app = app.key();
                self.inner.door.send(ToGateway::Reap { app, vm, force });
            }
            Effect::Awake { vm, phases } => {
                if let Some(slot) = self.slots().get_mut(app) {
                    slot.trace.awake(vm, &phases);
                }
                let key = app.key();
                self.inner.door.send(ToGateway::Awake {
                    app: key,
                    vm,
                    phases,
                });
                self.answer(app, &Ok(vm));
                // What runs is what there is: nothing begins where it stood before.
                if let Err(error) = self.forget_suspended(app).await {
                    let error = chain(&error);
                    tracing::warn!(%app, error, "what an app went on from is forgotten later");
                }
            }
            Effect::WakeFailed(failure) => self.wake_failed(app, failure),
            Effect::Gone { vm, reason } => {
                let app = app.key();
                self.inner.door.send(ToGateway::Gone { app, vm, reason });
            }
            Effect::Promote {
                operation,
                release,
                vm,
            } => self.promote(app, &operation, release, vm).await,
            Effect::Live { operation } => self.tell_live(app, &operation).await,
            Effect::DeployFailed {
                operation,
                release,
                failure,
            } => self.deploy_failed(app, &operation, release, failure).await,
        }
    }

    fn wake_failed(&self, app: &AppRef, failure: Failure) {
        let code = code_name(failure.code);
        if let Some(slot) = self.slots().get_mut(app) {
            slot.trace.failed(&code, &failure.message);
        }
        self.inner.metrics.failed(&code);
        self.inner.door.send(ToGateway::WakeFailed {
            app: app.key(),
            failure: for_visitors(&failure),
        });
        self.answer(app, &Err(failure));
    }

    fn answer(&self, app: &AppRef, answer: &Result<VmId, Failure>) {
        let waiters = match self.slots().get_mut(app) {
            Some(slot) => core::mem::take(&mut slot.waiters),
            None => return,
        };
        for waiter in waiters {
            // Who does not wait any more needs no answer.
            drop(waiter.send(answer.clone()));
        }
    }

    fn spawn_start(&self, app: &AppRef, vm: VmId, release: u64, begin: Begin) {
        let (converge, app) = (self.clone(), app.clone());
        let (trace, span) = match self.slots().get_mut(&app) {
            Some(slot) => slot.trace.begin(&app, vm, release),
            None => (None, Span::none()),
        };
        let start = async move {
            let event = match converge.start(&app, vm, (release, begin), trace).await {
                Ok(()) => Event::Accepted(vm),
                Err(failure) => {
                    tracing::warn!(message = failure.message, "a start was refused");
                    Event::Refused(vm, failure)
                }
            };
            converge.event(&app, event);
        };
        tokio::spawn(start.instrument(span));
    }

    /// The node knows the VM, so this starts nothing: it only hears the secrets again.
    fn spawn_remind(&self, app: &AppRef, vm: VmId, release: u64, secrets_version: u64) {
        let (converge, app) = (self.clone(), app.clone());
        tokio::spawn(async move {
            if let Err(failure) = converge.remind(&app, vm, release, secrets_version).await {
                // A VM that needs them to go on is ended by its node, which says so.
                let message = failure.message;
                tracing::warn!(%app, %vm, message, "an adopted VM is not told its secrets again");
            }
        });
    }

    fn spawn_stop(&self, app: &AppRef, vm: VmId, mode: StopMode) {
        let (converge, app) = (self.clone(), app.clone());
        tokio::spawn(async move {
            match converge.inner.nodes.stop(vm, mode).await {
                Ok(()) => {}
                Err(NodesError::NoVm { .. }) => converge.event(&app, Event::Lost(vm)),
                // The deadline of the stop asks again, and then kills.
                Err(error) => tracing::warn!(%app, %vm, %error, "a stop was refused"),
            }
        });
    }

    /// The node told how a VM is.
    pub(super) fn vm_changed(&self, status: VmStatus) {
        if !self.is_news(&status) || self.sandbox_changed(&status) {
            return;
        }
        match AppRef::of(&status.owner.account, &status.owner.app) {
            Some(app) => self.event(&app, Event::Vm(status)),
            None => tracing::warn!(owner = ?status.owner, "a VM belongs to nobody known"),
        }
    }
}

impl Converge {
    /// Whether a VM is not known to be over already: a list that was on its way while the VM
    /// ended must not bring it back. Ids are used once.
    fn is_news(&self, status: &VmStatus) -> bool {
        let mut ended = self
            .inner
            .ended
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if ended.contains(&status.vm) {
            return status.phase.is_over();
        }
        if status.phase.is_over() {
            if ended.len() == ENDED_KEPT {
                ended.pop_front();
            }
            ended.push_back(status.vm);
        }
        true
    }
}

/// What the state machine needs to know of a release.
pub(super) fn target_of(release: &ReleaseRecord) -> Target {
    let rules = &release.rules;
    let copying = resources_of(rules).copying().as_millis();
    let copying = u64::try_from(copying).unwrap_or(u64::MAX);
    Target {
        release: release.number,
        idle_after_ms: rules.sleeps.then_some(rules.idle_after_ms),
        ready_ms: rules.health_timeout_ms,
        suspend_ms: rules.suspends.then_some(copying),
    }
}

/// A failure without anything that only the owner may know.
fn for_visitors(failure: &Failure) -> WakeFailure {
    let message = match failure.code {
        ErrorCode::NoCapacity => "The host has no room for this app right now.",
        ErrorCode::AppDisabled => "This app is switched off.",
        ErrorCode::NoRelease => "This app has not been deployed yet.",
        ErrorCode::NotFound => "There is no such app.",
        ErrorCode::Timeout => "This app did not start in time.",
        ErrorCode::AppFailed => "This app failed to start.",
        _ => "This app could not be started.",
    };
    let retry_after_s = failure.retry_after_ms.div_ceil(1000).clamp(1, 3600);
    WakeFailure {
        code: code_name(failure.code),
        message: message.to_owned(),
        retry_after_s: u32::try_from(retry_after_s).unwrap_or(3600),
    }
}

/// The code as in the public list.
pub(crate) fn code_name(code: ErrorCode) -> String {
    code_name_of(&code)
}

/// A plain variant as it is spelled on the wire.
pub(crate) fn code_name_of(value: &impl serde::Serialize) -> String {
    let name = serde_json::to_value(value).ok();
    let name = name.as_ref().and_then(|name| name.as_str());
    name.unwrap_or("internal").to_owned()
}
