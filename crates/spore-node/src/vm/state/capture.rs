//! A ready VM that is captured: it stands still, is copied, and goes on or ends.
//!
//! ```text
//!   Ready ─Capture─▶ Freeze ─▶ Pause ─▶ Take ──goes on──▶ Resume ─▶ Unfreeze ─▶ Ready | Draining
//!                      │         └─failed──┼─────────────────▲ ▲       ▲
//!                      └─refused or slow───┼─────────────────│─│───────┘
//!                                          ├──sleeps─▶ Seal ─┘ failed
//!                                          │             └──sealed──▶ Releasing(Stopped)
//!                                          └──ends──▶ Releasing(Stopped)
//! ```
//!
//! Whatever goes wrong on the way there, the VM runs again; one that does not is ended, since
//! nobody would ever find out that it stands still. A VM that ends with its capture is journaled as
//! ending before it is taken: its driver kills it for that. One that sleeps is journaled with its
//! snapshot before that is sealed: the next daemon finds it whole, and ends the VM, or does not,
//! and lets the VM go on. Never both.

use spore_wire::node::StopMode;

use super::{Ending, Milestone, VmEffect, VmEvent, VmState, drain, ending_of, stronger, to_ready};
use crate::hypervisor::fork::Afterwards;

/// The steps of [`VmState::Capturing`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CaptureStep {
    /// The tenant's processes are told to stand still.
    Freeze,
    /// The whole guest is.
    Pause,
    /// It is copied.
    Take,
    /// The copy is put on the disk, and the VM waits for it.
    Seal,
    /// The guest is let run.
    Resume,
    /// The tenant's processes are.
    Unfreeze,
}

/// A capture that is under way.
#[derive(Clone, Copy)]
pub(super) struct Capturing {
    pub(super) afterwards: Afterwards,
    pub(super) stop: Option<StopMode>,
}

impl Capturing {
    pub(super) const fn at(self, at: CaptureStep) -> VmState {
        VmState::Capturing {
            at,
            afterwards: self.afterwards,
            stop: self.stop,
        }
    }
}

/// The first step of a capture.
pub(super) fn begin(afterwards: Afterwards) -> (VmState, Vec<VmEffect>) {
    let capturing = Capturing {
        afterwards,
        stop: None,
    };
    (capturing.at(CaptureStep::Freeze), vec![VmEffect::Freeze])
}

/// The last step, of a capture that an earlier daemon began.
pub(super) fn give_up(stop: Option<StopMode>) -> (VmState, Vec<VmEffect>) {
    let capturing = Capturing {
        afterwards: Afterwards::GoesOn,
        stop,
    };
    (
        capturing.at(CaptureStep::Unfreeze),
        vec![VmEffect::Unfreeze],
    )
}

pub(super) fn capturing(
    capturing: Capturing,
    at: CaptureStep,
    event: VmEvent,
) -> (VmState, Vec<VmEffect>) {
    let Capturing { afterwards, stop } = capturing;
    let state = capturing.at(at);
    let ends = afterwards == Afterwards::Ends && at == CaptureStep::Take;
    match (at, event) {
        // Its driver kills it, which is told before the capture is whole. Of one that sleeps, all
        // is captured, and who waits for its agent waits for one that stands still.
        (_, VmEvent::Exited(_) | VmEvent::Failed(_)) if ends || at == CaptureStep::Seal => {
            (state, Vec::new())
        }
        (_, VmEvent::Exited(failure)) => state.end(ending_of(stop, failure)),
        (_, VmEvent::Failed(failure)) if stop.is_some() => state.end(ending_of(stop, failure)),
        (_, VmEvent::Failed(failure)) => state.fail(failure),
        (_, VmEvent::Stop(StopMode::Kill)) => state.end(Ending::Stopped),
        // It can be asked to end once it runs.
        (_, VmEvent::Stop(mode)) => {
            let stop = stronger(stop, mode);
            (Capturing { stop, ..capturing }.at(at), Vec::new())
        }
        (CaptureStep::Freeze, VmEvent::Frozen) => {
            (capturing.at(CaptureStep::Pause), vec![VmEffect::Pause])
        }
        // Whether it stands still is not known.
        (CaptureStep::Freeze, VmEvent::CaptureFailed) => to_unfreeze(capturing),
        (CaptureStep::Pause, VmEvent::Paused) => {
            let effects = match afterwards {
                Afterwards::GoesOn | Afterwards::Sleeps => vec![VmEffect::Capture],
                Afterwards::Ends => {
                    vec![
                        VmEffect::Journal(Milestone::EndingStopped),
                        VmEffect::Capture,
                    ]
                }
            };
            (capturing.at(CaptureStep::Take), effects)
        }
        (CaptureStep::Take, VmEvent::Captured | VmEvent::CaptureFailed) if ends => {
            state.end(Ending::Stopped)
        }
        (CaptureStep::Take, VmEvent::Captured)
            if afterwards == Afterwards::Sleeps && stop.is_none() =>
        {
            let effects = vec![VmEffect::Journal(Milestone::Sealing), VmEffect::Seal];
            (capturing.at(CaptureStep::Seal), effects)
        }
        (CaptureStep::Seal, VmEvent::Sealed) => state.end(Ending::Stopped),
        (CaptureStep::Pause | CaptureStep::Seal, VmEvent::CaptureFailed)
        | (CaptureStep::Take, VmEvent::Captured | VmEvent::CaptureFailed) => {
            (capturing.at(CaptureStep::Resume), vec![VmEffect::Resume])
        }
        (CaptureStep::Resume, VmEvent::Resumed) => to_unfreeze(capturing),
        (CaptureStep::Unfreeze, VmEvent::Unfrozen) => match stop {
            // It may have been journaled as about to sleep.
            None => to_ready(),
            Some(_) => drain(),
        },
        (at, other) => unreachable!("{other:?} while it is captured ({at:?})"),
    }
}

fn to_unfreeze(capturing: Capturing) -> (VmState, Vec<VmEffect>) {
    (
        capturing.at(CaptureStep::Unfreeze),
        vec![VmEffect::Unfreeze],
    )
}
