//! The effects of a capture, and what its caller is told.
//!
//! Begun by the VM's actor as the machine says (`vm/state/capture.rs`). What was captured is handed
//! to the caller, who seals it while the VM goes on.

use core::time::Duration;
use std::sync::Arc;

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use spore_wire::id::VmId;
use spore_wire::node::VmFailureKind;
use tokio::sync::oneshot;
use tokio::time::{Instant, timeout};

use super::actor::Actor;
use super::effect::{Gain, Outcome, failed, is_named, slow};
use super::guest::{AgentLink, chain};
use super::state::{VmEffect, VmEvent, VmState};
use crate::config::VmLimits;
use crate::hypervisor::Vm;
use crate::hypervisor::fork::{Afterwards, Capture};
use crate::take::TakeError;

/// How often a guest is asked to run again before its VM is given up.
const UNFREEZE_TRIES: u32 = 3;

/// What a VM was, and how long it stood still for that.
#[derive(Debug)]
pub(crate) struct Captured {
    pub(crate) capture: Capture,
    /// From the request to the tenant's processes to their running again.
    pub(crate) frozen: Duration,
    /// Of it, the whole guest.
    pub(crate) pause: Duration,
}

/// A capture that somebody asked for.
#[derive(Debug)]
pub(crate) struct Taking {
    afterwards: Afterwards,
    answer: oneshot::Sender<Result<Captured, TakeError>>,
    vm: VmId,
    frozen_at: Option<Instant>,
    paused_at: Option<Instant>,
    pause: Duration,
    result: Option<Result<Capture, TakeError>>,
}

impl Taking {
    pub(crate) const fn new(
        vm: VmId,
        afterwards: Afterwards,
        answer: oneshot::Sender<Result<Captured, TakeError>>,
    ) -> Self {
        Self {
            afterwards,
            answer,
            vm,
            frozen_at: None,
            paused_at: None,
            pause: Duration::ZERO,
            result: None,
        }
    }

    pub(super) const fn afterwards(&self) -> Afterwards {
        self.afterwards
    }

    pub(super) fn refuse(self, error: TakeError) {
        // Whoever asked may have given up.
        drop(self.answer.send(Err(error)));
    }

    pub(super) fn begun(&mut self, effect: VmEffect) {
        match effect {
            VmEffect::Freeze => self.frozen_at = Some(Instant::now()),
            VmEffect::Pause => self.paused_at = Some(Instant::now()),
            _ => {}
        }
    }

    pub(super) fn done(&mut self, effect: VmEffect) {
        if let (VmEffect::Capture | VmEffect::Resume, Some(at)) = (effect, self.paused_at) {
            self.pause = at.elapsed();
        }
    }

    /// The first word counts: a VM that could not be paused has nothing more to say.
    pub(super) fn has(&mut self, result: Result<Capture, TakeError>) {
        self.result.get_or_insert(result);
    }

    /// The VM runs again, or ends.
    pub(super) fn over(self) {
        let vm = self.vm;
        let result = self.result.unwrap_or(Err(TakeError::Ended(vm)));
        let captured = result.map(|capture| Captured {
            capture,
            frozen: self.frozen_at.map_or(Duration::ZERO, |at| at.elapsed()),
            pause: self.pause,
        });
        drop(self.answer.send(captured));
    }
}

impl Actor {
    /// Begins a capture, or says why it does not.
    pub(super) fn capture(&mut self, taking: Taking) {
        if self.taking.is_some() {
            taking.refuse(TakeError::Busy(self.record.start.vm));
        } else if self.state == VmState::Ready && self.events.is_empty() {
            self.events.push_back(VmEvent::Capture(taking.afterwards()));
            self.taking = Some(taking);
        } else {
            taking.refuse(TakeError::NotReady {
                vm: self.record.start.vm,
                phase: self.state.phase(),
            });
        }
    }
}

/// The future of an effect of a capture.
pub(super) fn begin(actor: &Actor, effect: VmEffect) -> BoxFuture<'static, Outcome> {
    let (Some(vm), Some(link)) = (actor.vm.clone(), actor.link.clone()) else {
        unreachable!("{effect:?} without a VM that was attached");
    };
    let limits = actor.host.config.limits;
    let id = actor.record.start.vm;
    let taking = actor.taking.as_ref();
    match effect {
        VmEffect::Freeze => freeze(id, link, limits).boxed(),
        VmEffect::Pause => pause(id, vm, limits).boxed(),
        VmEffect::Capture => {
            let afterwards = taking.map_or(Afterwards::GoesOn, Taking::afterwards);
            capture(id, vm, afterwards, limits).boxed()
        }
        _ => {
            // Where the freeze was refused, it may be frozen all the same.
            let stillness = match taking.map(|taking| &taking.result) {
                Some(Some(Err(_))) => Stillness::Unknown,
                _ => Stillness::Sure,
            };
            unfreeze(id, link, stillness, limits).boxed()
        }
    }
}

fn gave_nothing(error: TakeError) -> Outcome {
    Outcome {
        event: VmEvent::CaptureFailed,
        gain: Gain::Capture(Err(error)),
    }
}

fn broken(vm: VmId, reason: String) -> Outcome {
    gave_nothing(TakeError::Failed { vm, reason })
}

async fn freeze(vm: VmId, link: AgentLink, limits: VmLimits) -> Outcome {
    match link.freeze(limits.freeze).await {
        Ok(()) => VmEvent::Frozen.into(),
        Err(error) => broken(vm, chain(&error)),
    }
}

async fn pause(id: VmId, vm: Arc<dyn Vm>, limits: VmLimits) -> Outcome {
    match timeout(limits.answer, vm.pause()).await {
        Ok(Ok(())) => VmEvent::Paused.into(),
        Ok(Err(error)) => broken(id, chain(&error)),
        Err(_elapsed) => broken(id, slow("pausing the guest", limits.answer)),
    }
}

async fn capture(id: VmId, vm: Arc<dyn Vm>, afterwards: Afterwards, limits: VmLimits) -> Outcome {
    match timeout(limits.capture, vm.capture(afterwards)).await {
        Ok(Ok(capture)) => Outcome {
            event: VmEvent::Captured,
            gain: Gain::Capture(Ok(capture)),
        },
        Ok(Err(error)) => broken(id, chain(&error)),
        Err(_elapsed) => broken(id, slow("copying the guest", limits.capture)),
    }
}

/// Whether the tenant's processes stand still.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stillness {
    Sure,
    Unknown,
}

async fn unfreeze(
    vm: VmId,
    link: AgentLink,
    mut stillness: Stillness,
    limits: VmLimits,
) -> Outcome {
    let limit = limits.answer;
    let mut last = String::new();
    for _attempt in 0..UNFREEZE_TRIES {
        // An answer may have been lost, and not the work.
        if stillness == Stillness::Unknown {
            match link.status(limit).await {
                Ok(status)
                    if status.thawed
                        && !status.frozen
                        && is_named(status.incarnation.as_deref(), vm) =>
                {
                    return VmEvent::Unfrozen.into();
                }
                Ok(_frozen) => {}
                Err(error) => {
                    last = chain(&error);
                    continue;
                }
            }
        }
        match link.unfreeze(vm.to_string(), limit).await {
            Ok(_late) => return VmEvent::Unfrozen.into(),
            Err(error) => {
                last = chain(&error);
                stillness = Stillness::Unknown;
            }
        }
    }
    let message = format!("the guest does not go on behind its capture: {last}");
    failed(VmFailureKind::Died, message)
}
