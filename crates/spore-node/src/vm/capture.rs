//! The effects of a capture, and what its caller is told.
//!
//! Begun by the VM's actor as the machine says (`vm/state/capture.rs`). What was captured is handed
//! to the caller, who seals it while the VM goes on.

use core::time::Duration;
use std::sync::Arc;

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use spore_wire::id::{SnapshotId, VmId};
use spore_wire::node::VmFailureKind;
use spore_wire::snapshot::SnapshotInfo;
use tokio::sync::oneshot;
use tokio::time::{Instant, timeout};

use super::actor::Actor;
use super::effect::{Gain, Outcome, failed, is_named, slow};
use super::guest::{AgentLink, chain};
use super::state::{VmEffect, VmEvent, VmState};
use crate::config::VmLimits;
use crate::hypervisor::Vm;
use crate::hypervisor::fork::{Afterwards, Capture};
use crate::take::{Sealing, TakeError};

/// How often a guest is asked to run again before its VM is given up.
const UNFREEZE_TRIES: u32 = 3;

/// What a VM was, and how long it stood still for that.
#[derive(Debug)]
pub(crate) struct Captured {
    pub(crate) what: What,
    /// From the request to the tenant's processes to their running again.
    pub(crate) frozen: Duration,
    /// Of it, the whole guest.
    pub(crate) pause: Duration,
}

/// What a capture comes to.
#[derive(Debug)]
pub(crate) enum What {
    /// The caller's to seal.
    Captured(Box<Capture>),
    /// A snapshot on the disk, for which the VM has ended.
    Sealed(Box<SnapshotInfo>),
}

/// A capture that somebody asked for.
#[derive(Debug)]
pub(crate) struct Taking {
    afterwards: Afterwards,
    /// Where it is sealed before the VM ends.
    into: Option<Sealing>,
    sealed: Option<Box<SnapshotInfo>>,
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
        into: Option<Sealing>,
        answer: oneshot::Sender<Result<Captured, TakeError>>,
    ) -> Self {
        Self {
            afterwards,
            into,
            sealed: None,
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

    /// The snapshot for which the VM is to end.
    pub(super) fn snapshot(&self) -> Option<SnapshotId> {
        self.into.as_ref().map(Sealing::id)
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

    pub(super) fn is_sealed(&mut self, sealed: Result<Box<SnapshotInfo>, TakeError>) {
        match sealed {
            Ok(info) => self.sealed = Some(info),
            Err(error) => self.result = Some(Err(error)),
        }
    }

    /// The VM runs again, or ends.
    pub(super) fn over(self) {
        let vm = self.vm;
        let ended = || TakeError::Ended(vm);
        let what = match (self.sealed, self.result) {
            (Some(info), _) => Ok(What::Sealed(info)),
            // It was asked to stop, or is gone.
            (None, None) => Err(ended()),
            (None, Some(Ok(_))) if self.afterwards == Afterwards::Sleeps => Err(ended()),
            (None, Some(result)) => result.map(|capture| What::Captured(Box::new(capture))),
        };
        let captured = what.map(|what| Captured {
            what,
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

impl Actor {
    /// Begins to put what was captured on the disk; the VM stands still until that is done. What
    /// was begun ends, whatever becomes of the VM.
    pub(super) fn seal(&mut self) -> BoxFuture<'static, Outcome> {
        let taking = self.taking.as_mut();
        let Some((into, Some(Ok(capture)))) =
            taking.and_then(|taking| Some((taking.into.take()?, taking.result.take())))
        else {
            unreachable!("nothing was captured to be sealed");
        };
        async move {
            let sealed = into.seal(capture).await.map(Box::new);
            Outcome {
                event: match sealed {
                    Ok(_) => VmEvent::Sealed,
                    Err(_) => VmEvent::CaptureFailed,
                },
                gain: Gain::Sealed(sealed),
            }
        }
        .boxed()
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
            let limit = limits.capture + actor.record.start.resources.copying();
            capture(id, vm, afterwards, limit).boxed()
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

async fn capture(id: VmId, vm: Arc<dyn Vm>, afterwards: Afterwards, limit: Duration) -> Outcome {
    match timeout(limit, vm.capture(afterwards)).await {
        Ok(Ok(capture)) => Outcome {
            event: VmEvent::Captured,
            gain: Gain::Capture(Ok(capture)),
        },
        Ok(Err(error)) => broken(id, chain(&error)),
        Err(_elapsed) => broken(id, slow("copying the guest", limit)),
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
        match link.unfreeze(vm.to_string(), limits.hooks, limit).await {
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
