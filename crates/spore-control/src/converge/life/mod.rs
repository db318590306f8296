//! The life of one app: a pure state machine.
//!
//! Used by the app reconciler, which feeds it what happened and does what it answers; wake, API
//! call and repair take the same path. It does no IO and reads no clock: time and new ids come in
//! as arguments, so every interleaving can be tested.
//!
//! # A VM of an app
//!
//! ```text
//!            Start                Ready                  idle | sleep | replaced
//!   (asleep) ─────▶ Starting ───────────────▶ Serving ─────────────────▶ Closing
//!                     │  │                     │   ▲ ▲── Busy, no answer ───┘ │ Reaped, or
//!                     │  │ Ready, a candidate  │   │             (Suspending) │ drain over
//!                     │  └──────▶ Healthy ─────┼───┘ Promoted                ▼
//!                     │             │          │                         Stopping ──▶ over
//!                     ▼ too long    ▼ refused  │                             ▲
//!                   Stopping      Stopping     │       sleep while Starting ─┘
//!                                              ▼ its node ends it, or it died
//!                                           Leaving ──Reaped, or FAREWELL_MAX / 2──▶ over
//! ```
//!
//! A VM that leaves is killed by its node only when it is told to stop: when the gateway has closed
//! and nothing is in flight, or too long is. What is in flight then is cut.
//!
//! Invariants, each a property in the tests: outside a deploy at most one VM of an app is not
//! over, and in one at most two; a wake is answered exactly once; an app that is idle and may
//! sleep is closed; nothing is stopped that the gateway was not told to close, unless its owner or
//! its end decided so.

use std::collections::BTreeMap;

use spore_api::error::ErrorCode;
use spore_wire::gateway::Phase;
use spore_wire::id::VmId;
use spore_wire::node::{StopMode, VmFailureKind, VmPhase, VmStatus};

use crate::config::Timing;

mod event;
mod settle;
#[cfg(test)]
mod tests;

pub use event::Event;

/// Milliseconds since the daemon's start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Moment(pub u64);

impl Moment {
    /// So much later.
    #[must_use]
    pub fn after(self, span: core::time::Duration) -> Self {
        let ms = u64::try_from(span.as_millis()).unwrap_or(u64::MAX);
        Self(self.0.saturating_add(ms))
    }

    /// So much later.
    #[must_use]
    pub const fn after_ms(self, ms: u64) -> Self {
        Self(self.0.saturating_add(ms))
    }
}

/// What the owner wants, as the store has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Intent {
    /// There is no such app.
    Removed,
    /// It may be woken or not.
    App {
        /// Whether it may.
        admission: Admission,
        /// The release that serves; `None` before the first healthy one.
        live: Option<Target>,
    },
}

/// Whether an app may be awake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admission {
    /// Yes.
    Enabled,
    /// Its owner disabled it.
    Disabled,
}

/// What the state machine needs to know of a release.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    /// Its number.
    pub release: u64,
    /// Put to sleep after so long; `None` never.
    pub idle_after_ms: Option<u64>,
    /// How long its app may take to become ready.
    pub ready_ms: u64,
    /// What copying it to the disk or back may take, if it is suspended when it is put to sleep for
    /// being idle.
    pub suspend_ms: Option<u64>,
}

/// How a VM is to begin.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Begin {
    /// From a template if there is one.
    #[default]
    Warm,
    /// With a boot, because the start before this one broke on its template.
    Cold,
}

/// What is to be done, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Start a VM of this release.
    Start {
        /// Its id, never used before.
        vm: VmId,
        /// What it runs.
        release: u64,
        /// How.
        begin: Begin,
    },
    /// Tell the node again what only control knows of a VM that it adopted: the secrets.
    Remind {
        /// Which.
        vm: VmId,
        /// What it runs.
        release: u64,
        /// Which values of them it was given.
        secrets_version: u64,
    },
    /// Stop a VM.
    Stop {
        /// Which.
        vm: VmId,
        /// How.
        mode: StopMode,
    },
    /// Suspend a VM that nothing is in flight to; answered by [`Event::Suspended`] or
    /// [`Event::NotSuspended`].
    Suspend {
        /// Which.
        vm: VmId,
        /// What it runs.
        release: u64,
    },
    /// Ask the gateway to close admission.
    Close {
        /// To which VM.
        vm: VmId,
        /// Whether also when requests are in flight.
        force: bool,
    },
    /// Tell everybody who waits, and the gateway, that the app is awake.
    Awake {
        /// Which.
        vm: VmId,
        /// What took how long; empty when nobody waited.
        phases: Vec<Phase>,
    },
    /// Tell everybody who waits that it could not be woken.
    WakeFailed(Failure),
    /// Tell the gateway that a VM is over.
    Gone {
        /// Which.
        vm: VmId,
        /// For people.
        reason: String,
    },
    /// Write down that a release is live now; answered by [`Event::Promoted`] or
    /// [`Event::NotPromoted`].
    Promote {
        /// The operation that tried it.
        operation: String,
        /// Which.
        release: u64,
        /// The VM that showed it healthy.
        vm: VmId,
    },
    /// Tell who waits for a deploy that its release is live: the gateway was told before.
    Live {
        /// The operation that tried it.
        operation: String,
    },
    /// Write down that a release did not become healthy.
    DeployFailed {
        /// The operation that tried it.
        operation: String,
        /// Which.
        release: u64,
        /// Why.
        failure: Failure,
    },
}

/// Why an app is not awake.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// For programs.
    pub code: ErrorCode,
    /// For the owner: what happened and what to do.
    pub message: String,
    /// What the app printed last, masked.
    pub last_lines: Vec<String>,
    /// When trying again may help.
    pub retry_after_ms: u64,
}

impl Failure {
    /// A failure without lines.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            last_lines: Vec::new(),
            retry_after_ms: 1000,
        }
    }
}

/// What runs for an app, and what is asked of it. An app at rest has an empty one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Life {
    /// Every VM that is not over.
    pub(super) vms: BTreeMap<VmId, Vm>,
    /// The VM that the gateway was told of last.
    pub(super) serving: Option<VmId>,
    /// Somebody waits for it to be awake.
    pub(super) wake: bool,
    /// It is to be put to sleep now.
    pub(super) sleep: bool,
    /// Its owner put it to sleep: it is not revived before somebody asks.
    pub(super) rest: bool,
    /// A release that is being tried.
    pub(super) deploy: Option<Deploy>,
    /// Calls of the API that use its VM.
    pub(super) holds: u32,
    /// How the next VM begins.
    pub(super) next: Begin,
    /// The crash-loop breaker.
    pub(super) breaker: Breaker,
    /// Why the last start failed.
    pub(super) last_failure: Option<Failure>,
    /// Effects of events, taken by the next step.
    outbox: Vec<Effect>,
}

/// A VM of the app.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Vm {
    pub(super) release: u64,
    pub(super) origin: Origin,
    pub(super) stage: Stage,
    pub(super) phase: VmPhase,
    /// When this stage is over at the latest.
    pub(super) until: Moment,
    /// When the node said that it has it; `None` while the start is under way.
    pub(super) accepted: Option<Moment>,
    pub(super) ready_at: Option<Moment>,
    /// `None` while something is in flight.
    pub(super) idle_since: Option<Moment>,
    pub(super) lease_until: Moment,
    /// What its suspending may take, if it was asked to close for that.
    pub(super) suspend_ms: Option<u64>,
    /// Whether the gateway was told of it.
    pub(super) told: bool,
    pub(super) status: Option<VmStatus>,
}

/// Who started a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    /// This daemon.
    Ours,
    /// An earlier one; the node told of it.
    Found,
}

/// Where a VM stands for control.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// The node has it and nobody here started it: adopted or stopped at the next step.
    Found,
    /// On its way to ready, to serve.
    Starting,
    /// On its way to ready, to be tried.
    Trying,
    /// Tried and ready; its promotion is being written down.
    Healthy,
    /// The gateway sends requests to it.
    Serving,
    /// The gateway was asked to close.
    Closing { force: bool },
    /// Its node ends it; the gateway was asked to close.
    Leaving,
    /// The node was asked to suspend it.
    Suspending,
    /// The node was asked to stop it.
    Stopping,
}

/// A release that is being tried.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Deploy {
    pub(super) operation: String,
    pub(super) target: Target,
    /// `None` before its start.
    pub(super) vm: Option<VmId>,
}

/// Counts starts that failed and ends that came too soon.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Breaker {
    pub(super) failures: u32,
    /// No start before.
    pub(super) until: Moment,
}

impl Breaker {
    fn failed(&mut self, now: Moment, timing: &Timing) {
        let doubled = timing
            .backoff_least
            .saturating_mul(1 << self.failures.min(16));
        self.failures = self.failures.saturating_add(1);
        self.until = now.after(doubled.min(timing.backoff_most));
    }
}

/// What a step decided.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Step {
    /// To be done now, in order.
    pub effects: Vec<Effect>,
    /// When to look again if nothing happens before; `None` never.
    pub due: Option<Moment>,
}

impl Step {
    pub(super) fn look_at(&mut self, at: Moment) {
        self.due = Some(self.due.map_or(at, |due| due.min(at)));
    }
}

impl Life {
    /// Whether there is nothing to remember: the app sleeps, and nothing is asked of it.
    #[must_use]
    pub fn is_blank(&self) -> bool {
        *self == Self::default()
    }

    /// The VM that requests may go to.
    #[must_use]
    pub fn awake(&self) -> Option<VmId> {
        let vm = self.serving?;
        (self.vms.get(&vm)?.stage == Stage::Serving).then_some(vm)
    }

    /// Whether nothing runs for it but a release that is being tried.
    #[must_use]
    pub fn is_asleep(&self) -> bool {
        let candidate = self.deploy.as_ref().and_then(|deploy| deploy.vm);
        self.vms.keys().all(|vm| Some(*vm) == candidate)
    }

    /// Whether no VM is left of it, and no release is being tried.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.vms.is_empty() && self.deploy.is_none()
    }

    /// The operation that tries a release now.
    #[must_use]
    pub fn deploying(&self) -> Option<&str> {
        self.deploy.as_ref().map(|deploy| deploy.operation.as_str())
    }

    /// The operation that tries a release in this VM.
    #[must_use]
    pub fn operation_of(&self, vm: VmId) -> Option<&str> {
        let deploy = self.deploy.as_ref()?;
        (deploy.vm == Some(vm)).then_some(deploy.operation.as_str())
    }

    /// Of each VM but `begins`, which values of the app's secrets it was given; `None` when that is
    /// not known yet.
    pub fn secrets_versions(&self, begins: Option<VmId>) -> impl Iterator<Item = Option<u64>> + '_ {
        let vms = self.vms.iter();
        let vms = vms.filter(move |(vm, _)| Some(**vm) != begins);
        vms.map(|(_, life)| Some(life.status.as_ref()?.owner.secrets_version))
    }

    /// The VMs that the node should have, with the moment it said so.
    pub fn accepted(&self) -> impl Iterator<Item = (VmId, Moment)> + '_ {
        let vms = self.vms.iter();
        vms.filter_map(|(vm, life)| Some((*vm, life.accepted?)))
    }

    /// How it looks from outside: the VM to show and where the app stands.
    #[must_use]
    pub fn view(&self) -> View<'_> {
        let candidate = self.deploy.as_ref().and_then(|deploy| deploy.vm);
        let own = |vm: &&VmId| Some(**vm) != candidate;
        let shown = self.serving.or_else(|| self.vms.keys().find(own).copied());
        let vm = shown.and_then(|vm| self.vms.get(&vm));
        let standing = match vm.map(|vm| vm.stage) {
            Some(Stage::Serving | Stage::Healthy) => Standing::Awake,
            Some(Stage::Closing { .. } | Stage::Leaving | Stage::Suspending | Stage::Stopping) => {
                Standing::Draining
            }
            Some(Stage::Starting | Stage::Trying | Stage::Found) => Standing::Waking,
            None if self.wake => Standing::Waking,
            None if self.breaker.failures > 0 => Standing::Failing,
            None => Standing::Asleep,
        };
        View {
            standing,
            status: vm.and_then(|vm| vm.status.as_ref()),
            lease_until: vm.map_or(Moment(0), |vm| vm.lease_until),
            last_failure: self.last_failure.as_ref(),
        }
    }

    /// Decides what is to be done now. `fresh` is the id of the next VM; it is taken when one is
    /// started.
    pub fn step(
        &mut self,
        intent: &Intent,
        now: Moment,
        timing: &Timing,
        fresh: &mut Option<VmId>,
    ) -> Step {
        let mut step = Step::default();
        self.settle_found(intent, now, timing);
        self.settle_removed(intent, now, timing);
        self.settle_deploy(now, timing, fresh, &mut step);
        self.settle_rest(intent, now, timing);
        self.settle_deadlines(now, timing, &mut step);
        self.settle_idle(intent, now, timing, &mut step);
        self.settle_wake(intent, now, timing, fresh, &mut step);
        step.effects = core::mem::take(&mut self.outbox);
        step
    }

    fn say(&mut self, effect: Effect) {
        self.outbox.push(effect);
    }

    fn fail_wake(&mut self, failure: Failure) {
        if core::mem::take(&mut self.wake) {
            self.say(Effect::WakeFailed(failure));
        }
    }

    fn stop(&mut self, vm: VmId, mode: StopMode, now: Moment, timing: &Timing) {
        if let Some(life) = self.vms.get_mut(&vm) {
            life.stage = Stage::Stopping;
            life.until = now.after(timing.stop_grace + STOP_ALLOWANCE);
            self.say(Effect::Stop { vm, mode });
        }
    }

    fn suspend(&mut self, vm: VmId, copying_ms: u64, now: Moment) {
        if let Some(life) = self.vms.get_mut(&vm) {
            life.stage = Stage::Suspending;
            life.until = now.after(SUSPEND_ALLOWANCE).after_ms(copying_ms);
            let release = life.release;
            self.say(Effect::Suspend { vm, release });
        }
    }

    fn close(&mut self, vm: VmId, force: bool, until: Moment) {
        if let Some(life) = self.vms.get_mut(&vm) {
            life.stage = Stage::Closing { force };
            life.until = until;
            self.say(Effect::Close { vm, force });
        }
    }

    /// Sends requests to `vm` from now on.
    fn serve(&mut self, vm: VmId, now: Moment) {
        let waited = core::mem::take(&mut self.wake);
        let Some(life) = self.vms.get_mut(&vm) else {
            return;
        };
        life.stage = Stage::Serving;
        life.idle_since = Some(now);
        life.ready_at.get_or_insert(now);
        life.told = true;
        let phases = match &life.status {
            Some(status) if waited => status.phases.clone(),
            _ => Vec::new(),
        };
        self.serving = Some(vm);
        self.last_failure = None;
        self.say(Effect::Awake { vm, phases });
    }
}

/// What a graceful stop may take beyond the app's own grace: sync and power off.
const STOP_ALLOWANCE: core::time::Duration = core::time::Duration::from_secs(20);

/// What suspending a VM may take beyond copying it.
const SUSPEND_ALLOWANCE: core::time::Duration = core::time::Duration::from_secs(120);

/// How an app looks from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct View<'a> {
    /// Where it stands.
    pub standing: Standing,
    /// Its VM, as the node told last.
    pub status: Option<&'a VmStatus>,
    /// When something inside stops asking to stay awake.
    pub lease_until: Moment,
    /// Why the last start failed.
    pub last_failure: Option<&'a Failure>,
}

/// Where an app stands, apart from what its owner wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Standing {
    /// No VM.
    Asleep,
    /// A VM is on its way.
    Waking,
    /// It serves.
    Awake,
    /// Its VM is being stopped.
    Draining,
    /// No VM, and the last starts failed.
    Failing,
}

fn failure_of(status: &VmStatus) -> Failure {
    let Some(failure) = &status.failure else {
        return Failure::new(
            ErrorCode::AppFailed,
            "the VM ended by itself; see `spore logs`",
        );
    };
    let code = match failure.kind {
        VmFailureKind::NoCapacity => ErrorCode::NoCapacity,
        VmFailureKind::App | VmFailureKind::Died => ErrorCode::AppFailed,
        VmFailureKind::Image
        | VmFailureKind::Boot
        | VmFailureKind::Thaw
        | VmFailureKind::Snapshot
        | VmFailureKind::Policy => ErrorCode::Internal,
    };
    Failure {
        code,
        message: failure.message.clone(),
        last_lines: failure.last_lines.clone(),
        retry_after_ms: 1000,
    }
}
