//! The life of one VM: a pure function from state and event to the next state and what to do.
//!
//! Called by the VM's actor (`vm/actor.rs`), which carries the effects out in order and feeds their
//! results back. Never waits, reads a clock or touches the host, so that every interleaving can be
//! tested.
//!
//! ```text
//!                    Start                            Adopt(booted … draining)
//!                      │                                        │
//!   Absent ──▶ Preparing ──prepared──▶ Booting ◀────────────────┘
//!                 │  turn, host           │  vmm, attach, (a fork: resume,) agent
//!                 │                       ├───────agent up───────┐
//!                 │                       ▼                      │ (adopted: the app runs)
//!                 │                    Thawing ──app ready──▶  Ready
//!                 │                       │ thaw, network,       │
//!                 │                       │ app, ready           │ Stop(graceful)
//!                 │                       │                      ▼
//!                 │  any failure, exit    ├── Stop ──────────▶ Draining
//!                 │  or Stop(kill)        │                      │
//!                 └───────────┬───────────┴──────────────────────┘
//!                             │   a failure of a VM that lives and may be sent requests
//!                             ├──▶ Leaving
//!                             ▼      │ Stop, exit, FAREWELL_MAX
//!                         Releasing ◀┘ ──released──▶ Stopped | Failed(reason)
//! ```
//!
//! Rules that the tests beside this file hold:
//!
//! - A step gives at most one *asking* effect, whose result comes back as an event, and it is the
//!   last one. A newer asking effect ends the one under way.
//! - The network opens only after the thaw, the app starts only after the network is open, and
//!   `Ready` comes only after both. A VM that is for no app is ready once its network is open.
//! - What must survive a crash is journaled before the effect that makes it so: a VM is named in
//!   the journal before anything is made for it, and it is journaled as ending before it is
//!   killed, so that no later daemon adopts what was meant to end.
//! - A VM that lives and may be sent requests is not killed for a failure before its end was told
//!   and control has stopped it, or had the time to.
//! - The journal goes only when nothing is left, and the final state is told once, after that.
//! - A fork's first instruction runs only once it is journaled as running, and its guest is
//!   renewed before it is anything else: until then it believes that it is its source.
//! - A VM that was captured runs again or is ended; only a stop that kills cuts a capture off.
//! - What only one VM may begin from is removed once that VM was renewed, before it reaches
//!   anything.
//! - `Prepare`, `Boot` and `Fork` are never cut off: a stop waits for them, since a driver cut in
//!   the middle might go on making things behind the release.

mod capture;
mod effect;

use serde::{Deserialize, Serialize};
use spore_wire::node::{StopMode, VmFailureKind, VmPhase};

pub use self::capture::CaptureStep;
use self::capture::Capturing;
pub use self::effect::VmEffect;
use crate::hypervisor::fork::Afterwards;

/// Where a VM stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VmState {
    /// Nothing was done yet.
    Absent,
    /// The host's side is being made.
    Preparing {
        /// Which step is under way.
        at: PrepareStep,
        /// How it is to begin.
        begin: Begin,
        /// A stop that waits for it.
        stop: Option<StopMode>,
    },
    /// On the way to the agent's first word.
    Booting {
        /// Which step is under way.
        at: BootStep,
        /// How it begins; of an earlier daemon's VM that was thawed it does not matter any more.
        begin: Begin,
        /// The last journaled milestone when an earlier daemon began this; `None` is our own VM.
        adopted: Option<Milestone>,
        /// A stop that waits for it.
        stop: Option<StopMode>,
    },
    /// The guest is renewed and its app started.
    Thawing {
        /// Which step is under way.
        at: ThawStep,
    },
    /// The app is ready, or there is none to wait for.
    Ready,
    /// It stands still, or is about to, and is copied.
    Capturing {
        /// Which step is under way.
        at: CaptureStep,
        /// What becomes of it then.
        afterwards: Afterwards,
        /// A stop that waits until it runs again.
        stop: Option<StopMode>,
    },
    /// The guest was asked to power off.
    Draining,
    /// Its end is told and it still runs, so that nobody meets a dead VM.
    Leaving(Failure),
    /// Everything of it is being removed.
    Releasing(Ending),
    /// It stopped as asked; nothing of it is left.
    Stopped,
    /// It ended otherwise; nothing of it is left.
    Failed(Failure),
}

/// How a VM begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Begin {
    /// With its kernel.
    Boot,
    /// Where another one stood.
    Fork,
}

/// What a VM is started for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// A process that its agent is told to start.
    App,
    /// One that goes on in what the VM was forked from.
    Inherited,
    /// Whatever is in it, or is put in later: nothing is started.
    Nothing,
}

/// The steps of [`VmState::Preparing`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PrepareStep {
    /// Waiting until few enough others boot.
    Turn,
    /// The driver makes namespace, cgroup and disks.
    Host,
}

/// The steps of [`VmState::Booting`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BootStep {
    /// The driver starts the VMM.
    Vmm,
    /// The node takes hold of the process.
    Attach,
    /// A fork's guest is let run, or one that an earlier daemon may have left paused.
    Resume,
    /// The agent is awaited.
    Agent,
}

/// The steps of [`VmState::Thawing`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ThawStep {
    /// Clock, entropy, names.
    Thaw,
    /// What only this VM may begin from is removed.
    Source,
    /// The tap opens and the policy is read back.
    Network,
    /// The app's process is started.
    App,
    /// The app is awaited.
    Ready,
}

/// How far a VM got, for the journal. The order is the order of a life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Milestone {
    /// Something may have been made for it.
    Preparing,
    /// The host's side is made; a VMM may have been started.
    Prepared,
    /// The VMM runs and its identity is known.
    Booted,
    /// The same of a fork, whose guest is paused.
    Forked,
    /// A fork's guest may have run.
    Running,
    /// The guest is renewed.
    Thawed,
    /// The network is open.
    Open,
    /// The app was started, or the VM is ready without one.
    Started,
    /// It stands still while its snapshot is put on the disk; once that is whole, it has ended.
    Sealing,
    /// It was asked to stop.
    Draining,
    /// It is being removed because it was stopped.
    EndingStopped,
    /// It is being removed because it failed.
    EndingFailed,
}

/// How a VM will have ended once it is released.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ending {
    /// As asked.
    Stopped,
    /// Otherwise.
    Failed(Failure),
}

/// Why a VM fails.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// Whose fault and what kind.
    pub kind: VmFailureKind,
    /// For people: what happened and what to do.
    pub message: String,
}

/// What the agent says of itself when a session begins; a claim of the guest, believed only where a
/// lie harms nobody but the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AgentSeen {
    /// Whether it was thawed as this VM, and its tenant may run.
    pub thawed: bool,
    /// Whether it stands still under this VM's own name.
    pub frozen: bool,
    /// What the VM is for, which is not the guest's to say; never inherited, which it is.
    pub work: Work,
    /// The app's process.
    pub app: AppSeen,
}

/// The app's process as the agent tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AppSeen {
    /// Never started.
    Absent,
    /// Started and not ready, now or at the moment.
    Starting,
    /// Ready.
    Ready,
    /// Stopped for good.
    Stopped,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VmEvent {
    /// It is wanted. Legal in `Absent`.
    Start(Begin),
    /// An earlier daemon left it, journaled so far. Legal in `Absent`.
    Adopt(Milestone),
    /// `TakeTurn` is done.
    TurnTaken,
    /// `Prepare` is done.
    Prepared,
    /// `Boot` is done.
    Booted,
    /// `Fork` is done.
    Forked,
    /// `Attach` is done.
    Attached,
    /// `Resume` is done.
    Resumed,
    /// `ConnectAgent` is done.
    AgentUp(AgentSeen),
    /// `Thaw` is done.
    Thawed,
    /// `DropSource` is done.
    SourceDropped,
    /// `OpenNetwork` is done.
    NetworkOpen(Work),
    /// `StartApp` is done.
    AppStarted,
    /// `AwaitReady` is done.
    AppReady,
    /// Somebody wants it captured. Legal in `Ready`.
    Capture(Afterwards),
    /// `Freeze` is done.
    Frozen,
    /// `Pause` is done.
    Paused,
    /// `Capture` is done.
    Captured,
    /// `Seal` is done.
    Sealed,
    /// One of them was not.
    CaptureFailed,
    /// `Unfreeze` is done.
    Unfrozen,
    /// `Shutdown` is done, or it took too long.
    ShutDown,
    /// `Farewell` took as long as it may.
    FarewellOver,
    /// `Release` is done.
    Released,
    /// `Release` left something; it is tried again.
    ReleaseFailed,
    /// The effect under way failed, or what ran is no longer sound.
    Failed(Failure),
    /// The VMM's process is gone. Ignored where nothing of it is expected to run.
    Exited(Failure),
    /// Somebody wants it stopped. Ignored once it ends.
    Stop(StopMode),
}

impl VmState {
    /// What is told of it outside.
    #[must_use]
    pub const fn phase(&self) -> VmPhase {
        match self {
            Self::Absent | Self::Preparing { .. } => VmPhase::Preparing,
            Self::Booting { begin, .. } => match begin {
                Begin::Boot => VmPhase::Booting,
                Begin::Fork => VmPhase::Forking,
            },
            Self::Thawing { .. } => VmPhase::Thawing,
            // It stands still for a moment, which is nobody's concern.
            Self::Ready | Self::Capturing { .. } => VmPhase::Ready,
            Self::Draining | Self::Leaving(_) | Self::Releasing(_) => VmPhase::Draining,
            Self::Stopped => VmPhase::Stopped,
            Self::Failed(_) => VmPhase::Failed,
        }
    }

    /// Whether nothing will happen any more.
    #[must_use]
    pub const fn is_over(&self) -> bool {
        matches!(self, Self::Stopped | Self::Failed(_))
    }

    /// Whether the node holds the VMM's process.
    const fn is_attached(&self) -> bool {
        matches!(
            self,
            Self::Booting {
                at: BootStep::Resume | BootStep::Agent,
                ..
            } | Self::Thawing { .. }
                | Self::Ready
                | Self::Capturing { .. }
                | Self::Draining
        )
    }

    /// Whether a gateway may have connections to it: its app was started, perhaps by an earlier
    /// daemon.
    fn may_be_visited(&self) -> bool {
        match self {
            Self::Booting {
                at: BootStep::Resume | BootStep::Agent,
                adopted: Some(milestone),
                ..
            } => *milestone >= Milestone::Started,
            Self::Thawing { at } => *at == ThawStep::Ready,
            Self::Ready | Self::Capturing { .. } => true,
            _ => false,
        }
    }

    /// The next state and what to do, in order.
    ///
    /// # Panics
    /// When the event cannot happen in this state: a bug of the actor, which is supervised.
    #[must_use]
    pub fn step(self, event: VmEvent) -> (Self, Vec<VmEffect>) {
        match self {
            Self::Absent => absent(event),
            Self::Preparing { at, begin, stop } => preparing(at, begin, stop, event),
            Self::Booting {
                at,
                begin,
                adopted,
                stop,
            } => booting(
                Boot {
                    begin,
                    adopted,
                    stop,
                },
                at,
                event,
            ),
            Self::Thawing { at } => thawing(at, event),
            Self::Ready => ready(event),
            Self::Capturing {
                at,
                afterwards,
                stop,
            } => capture::capturing(Capturing { afterwards, stop }, at, event),
            Self::Draining => draining(event),
            Self::Leaving(failure) => leaving(failure, &event),
            Self::Releasing(ending) => releasing(ending, &event),
            Self::Stopped | Self::Failed(_) => {
                assert!(
                    matches!(
                        event,
                        VmEvent::Stop(_) | VmEvent::Exited(_) | VmEvent::Failed(_)
                    ),
                    "{event:?} after the end"
                );
                (self, Vec::new())
            }
        }
    }

    /// Ends it for a failure while it runs: it is told, and killed only once no request comes.
    fn fail(self, failure: Failure) -> (Self, Vec<VmEffect>) {
        if !self.may_be_visited() {
            return self.end(Ending::Failed(failure));
        }
        let effects = vec![
            VmEffect::Journal(Milestone::EndingFailed),
            VmEffect::Report,
            VmEffect::Farewell,
        ];
        (Self::Leaving(failure), effects)
    }

    /// Ends it: journaled first, then killed, then released.
    fn end(self, ending: Ending) -> (Self, Vec<VmEffect>) {
        let milestone = match ending {
            Ending::Stopped => Milestone::EndingStopped,
            Ending::Failed(_) => Milestone::EndingFailed,
        };
        let mut effects = vec![VmEffect::Journal(milestone), VmEffect::Report];
        if self.is_attached() {
            effects.push(VmEffect::Kill);
        }
        effects.push(VmEffect::Release);
        (Self::Releasing(ending), effects)
    }
}

/// How a failure ends a VM that may have been asked to stop: then it is gone as asked.
fn ending_of(stop: Option<StopMode>, failure: Failure) -> Ending {
    match stop {
        Some(_) => Ending::Stopped,
        None => Ending::Failed(failure),
    }
}

/// A graceful request never weakens a kill.
fn stronger(one: Option<StopMode>, other: StopMode) -> Option<StopMode> {
    match (one, other) {
        (Some(StopMode::Kill), _) | (_, StopMode::Kill) => Some(StopMode::Kill),
        (_, StopMode::Graceful) => Some(StopMode::Graceful),
    }
}

fn absent(event: VmEvent) -> (VmState, Vec<VmEffect>) {
    let adopt = |milestone, stop| VmState::Booting {
        at: BootStep::Attach,
        begin: match milestone {
            Milestone::Forked | Milestone::Running => Begin::Fork,
            _ => Begin::Boot,
        },
        adopted: Some(milestone),
        stop,
    };
    match event {
        VmEvent::Start(begin) => (
            VmState::Preparing {
                at: PrepareStep::Turn,
                begin,
                stop: None,
            },
            vec![
                VmEffect::Journal(Milestone::Preparing),
                VmEffect::Report,
                VmEffect::TakeTurn,
            ],
        ),
        VmEvent::Adopt(Milestone::Preparing | Milestone::Prepared) => (
            VmState::Releasing(Ending::Failed(Failure {
                kind: VmFailureKind::Boot,
                message: "the node was restarted while this VM was being made: start another"
                    .to_owned(),
            })),
            vec![VmEffect::Release],
        ),
        VmEvent::Adopt(Milestone::EndingStopped) => {
            (VmState::Releasing(Ending::Stopped), vec![VmEffect::Release])
        }
        VmEvent::Adopt(Milestone::EndingFailed) => (
            VmState::Releasing(Ending::Failed(Failure {
                kind: VmFailureKind::Died,
                message: "the VM had failed when the node was restarted: see the node's log"
                    .to_owned(),
            })),
            vec![VmEffect::Release],
        ),
        VmEvent::Adopt(milestone @ Milestone::Draining) => (
            adopt(milestone, Some(StopMode::Graceful)),
            vec![VmEffect::Report, VmEffect::Attach],
        ),
        VmEvent::Adopt(milestone) => (
            adopt(milestone, None),
            vec![VmEffect::Report, VmEffect::Attach],
        ),
        other => unreachable!("{other:?} before the start"),
    }
}

fn preparing(
    at: PrepareStep,
    begin: Begin,
    stop: Option<StopMode>,
    event: VmEvent,
) -> (VmState, Vec<VmEffect>) {
    let state = VmState::Preparing { at, begin, stop };
    match (at, event) {
        (PrepareStep::Turn, VmEvent::Stop(_)) => state.end(Ending::Stopped),
        (PrepareStep::Turn, VmEvent::TurnTaken) => (
            VmState::Preparing {
                at: PrepareStep::Host,
                begin,
                stop,
            },
            vec![VmEffect::Prepare],
        ),
        (PrepareStep::Host, VmEvent::Prepared) if stop.is_some() => state.end(Ending::Stopped),
        (PrepareStep::Host, VmEvent::Prepared) => (
            VmState::Booting {
                at: BootStep::Vmm,
                begin,
                adopted: None,
                stop: None,
            },
            vec![
                VmEffect::Journal(Milestone::Prepared),
                VmEffect::Report,
                match begin {
                    Begin::Boot => VmEffect::Boot,
                    Begin::Fork => VmEffect::Fork,
                },
            ],
        ),
        (PrepareStep::Host, VmEvent::Stop(mode)) => (
            VmState::Preparing {
                at,
                begin,
                stop: stronger(stop, mode),
            },
            Vec::new(),
        ),
        (_, VmEvent::Failed(failure)) => state.end(ending_of(stop, failure)),
        (at, other) => unreachable!("{other:?} while preparing ({at:?})"),
    }
}

/// What stays the same while a VM begins.
#[derive(Clone, Copy)]
struct Boot {
    begin: Begin,
    adopted: Option<Milestone>,
    stop: Option<StopMode>,
}

impl Boot {
    const fn at(self, at: BootStep) -> VmState {
        VmState::Booting {
            at,
            begin: self.begin,
            adopted: self.adopted,
            stop: self.stop,
        }
    }
}

fn booting(boot: Boot, at: BootStep, event: VmEvent) -> (VmState, Vec<VmEffect>) {
    let Boot {
        begin,
        adopted,
        stop,
    } = boot;
    let state = boot.at(at);
    // Only a guest whose app may run has anything to lose by a kill.
    let worth_asking = adopted.is_some_and(|milestone| milestone >= Milestone::Started);
    match (at, event) {
        (_, VmEvent::Failed(failure)) if stop.is_none() => state.fail(failure),
        (_, VmEvent::Failed(failure) | VmEvent::Exited(failure)) => {
            state.end(ending_of(stop, failure))
        }
        (BootStep::Vmm, VmEvent::Booted | VmEvent::Forked) if stop.is_some() => {
            state.end(Ending::Stopped)
        }
        (BootStep::Vmm, VmEvent::Booted) => (
            boot.at(BootStep::Attach),
            vec![VmEffect::Journal(Milestone::Booted), VmEffect::Attach],
        ),
        (BootStep::Vmm, VmEvent::Forked) => (
            boot.at(BootStep::Attach),
            vec![VmEffect::Journal(Milestone::Forked), VmEffect::Attach],
        ),
        (BootStep::Attach, VmEvent::Attached) => match (stop, begin) {
            // It may have been paused to be captured.
            (None | Some(StopMode::Graceful), _) if worth_asking => {
                (boot.at(BootStep::Resume), vec![VmEffect::Resume])
            }
            (Some(_), _) => boot.at(BootStep::Agent).end(Ending::Stopped),
            (None, Begin::Boot) => (boot.at(BootStep::Agent), vec![VmEffect::ConnectAgent]),
            // Whoever finds it journaled so takes it for one that has run.
            (None, Begin::Fork) => (
                boot.at(BootStep::Resume),
                vec![VmEffect::Journal(Milestone::Running), VmEffect::Resume],
            ),
        },
        (BootStep::Resume, VmEvent::Resumed) => {
            (boot.at(BootStep::Agent), vec![VmEffect::ConnectAgent])
        }
        (BootStep::Agent, VmEvent::AgentUp(seen)) if stop.is_none() => agent_up(adopted, seen),
        (BootStep::Agent, VmEvent::AgentUp(seen)) if seen.frozen => capture::give_up(stop),
        (BootStep::Agent, VmEvent::AgentUp(_)) => drain(),
        (BootStep::Resume | BootStep::Agent, VmEvent::Stop(mode)) => {
            if mode == StopMode::Graceful && worth_asking && stop != Some(StopMode::Kill) {
                let stop = Some(StopMode::Graceful);
                (Boot { stop, ..boot }.at(at), Vec::new())
            } else {
                state.end(Ending::Stopped)
            }
        }
        (BootStep::Vmm | BootStep::Attach, VmEvent::Stop(mode)) => {
            let stop = stronger(stop, mode);
            (Boot { stop, ..boot }.at(at), Vec::new())
        }
        (at, other) => unreachable!("{other:?} while booting ({at:?})"),
    }
}

/// Where a VM goes on once its agent answers. Our own VM is always thawed, whatever the guest
/// claims; of an adopted one the journal says what was done for certain, and the guest's word
/// decides only about the one step that may have been under way.
fn agent_up(adopted: Option<Milestone>, seen: AgentSeen) -> (VmState, Vec<VmEffect>) {
    let reached = adopted.unwrap_or(Milestone::Booted);
    if reached < Milestone::Open {
        let thawed = reached == Milestone::Thawed || (adopted.is_some() && seen.thawed);
        return if thawed {
            to_source()
        } else {
            (
                VmState::Thawing { at: ThawStep::Thaw },
                vec![VmEffect::Report, VmEffect::Thaw],
            )
        };
    }
    let is_gone = match seen.app {
        AppSeen::Absent => reached > Milestone::Open,
        AppSeen::Stopped => true,
        AppSeen::Starting | AppSeen::Ready => false,
    };
    match (seen.work, seen.app) {
        (Work::App, _) if is_gone => VmState::Ready.fail(Failure {
            kind: VmFailureKind::Died,
            message: "the app no longer ran when the node was restarted: start another VM"
                .to_owned(),
        }),
        _ if seen.frozen => capture::give_up(None),
        (Work::App, AppSeen::Absent | AppSeen::Stopped) => (
            VmState::Thawing { at: ThawStep::App },
            vec![VmEffect::Report, VmEffect::StartApp],
        ),
        (Work::App, AppSeen::Starting) => to_await(),
        (Work::App, AppSeen::Ready) | (Work::Nothing | Work::Inherited, _) => to_ready(),
    }
}

fn to_await() -> (VmState, Vec<VmEffect>) {
    (
        VmState::Thawing {
            at: ThawStep::Ready,
        },
        vec![
            VmEffect::Journal(Milestone::Started),
            VmEffect::Report,
            VmEffect::AwaitReady,
        ],
    )
}

fn to_ready() -> (VmState, Vec<VmEffect>) {
    (
        VmState::Ready,
        vec![VmEffect::Journal(Milestone::Started), VmEffect::Report],
    )
}

fn to_source() -> (VmState, Vec<VmEffect>) {
    (
        VmState::Thawing {
            at: ThawStep::Source,
        },
        vec![
            VmEffect::Journal(Milestone::Thawed),
            VmEffect::Report,
            VmEffect::DropSource,
        ],
    )
}

fn to_network() -> (VmState, Vec<VmEffect>) {
    (
        VmState::Thawing {
            at: ThawStep::Network,
        },
        vec![VmEffect::OpenNetwork],
    )
}

fn drain() -> (VmState, Vec<VmEffect>) {
    (
        VmState::Draining,
        vec![
            VmEffect::Journal(Milestone::Draining),
            VmEffect::Report,
            VmEffect::Shutdown,
        ],
    )
}

fn thawing(at: ThawStep, event: VmEvent) -> (VmState, Vec<VmEffect>) {
    let state = VmState::Thawing { at };
    match (at, event) {
        (_, VmEvent::Failed(failure)) => state.fail(failure),
        (_, VmEvent::Exited(failure)) => state.end(Ending::Failed(failure)),
        (ThawStep::App | ThawStep::Ready, VmEvent::Stop(StopMode::Graceful)) => drain(),
        (_, VmEvent::Stop(_)) => state.end(Ending::Stopped),
        (ThawStep::Thaw, VmEvent::Thawed) => to_source(),
        (ThawStep::Source, VmEvent::SourceDropped) => to_network(),
        (ThawStep::Network, VmEvent::NetworkOpen(Work::Nothing)) => to_ready(),
        (ThawStep::Network, VmEvent::NetworkOpen(Work::Inherited)) => to_await(),
        (ThawStep::Network, VmEvent::NetworkOpen(Work::App)) => (
            VmState::Thawing { at: ThawStep::App },
            vec![
                VmEffect::Journal(Milestone::Open),
                VmEffect::Report,
                VmEffect::StartApp,
            ],
        ),
        (ThawStep::App, VmEvent::AppStarted) => to_await(),
        (ThawStep::Ready, VmEvent::AppReady) => (VmState::Ready, vec![VmEffect::Report]),
        (at, other) => unreachable!("{other:?} while thawing ({at:?})"),
    }
}

fn ready(event: VmEvent) -> (VmState, Vec<VmEffect>) {
    match event {
        VmEvent::Failed(failure) => VmState::Ready.fail(failure),
        VmEvent::Exited(failure) => VmState::Ready.end(Ending::Failed(failure)),
        VmEvent::Stop(StopMode::Graceful) => drain(),
        VmEvent::Stop(StopMode::Kill) => VmState::Ready.end(Ending::Stopped),
        VmEvent::Capture(afterwards) => capture::begin(afterwards),
        other => unreachable!("{other:?} while ready"),
    }
}

fn draining(event: VmEvent) -> (VmState, Vec<VmEffect>) {
    match event {
        // A guest that cannot be asked, or dies while it is, has stopped all the same.
        VmEvent::ShutDown
        | VmEvent::Exited(_)
        | VmEvent::Failed(_)
        | VmEvent::Stop(StopMode::Kill) => VmState::Draining.end(Ending::Stopped),
        VmEvent::Stop(StopMode::Graceful) => (VmState::Draining, Vec::new()),
        other => unreachable!("{other:?} while draining"),
    }
}

fn leaving(failure: Failure, event: &VmEvent) -> (VmState, Vec<VmEffect>) {
    match event {
        VmEvent::Stop(_) | VmEvent::FarewellOver | VmEvent::Exited(_) => (
            VmState::Releasing(Ending::Failed(failure)),
            vec![VmEffect::Kill, VmEffect::Release],
        ),
        // The first reason counts.
        VmEvent::Failed(_) => (VmState::Leaving(failure), Vec::new()),
        other => unreachable!("{other:?} while leaving"),
    }
}

fn releasing(ending: Ending, event: &VmEvent) -> (VmState, Vec<VmEffect>) {
    match event {
        VmEvent::Released => {
            let state = match ending {
                Ending::Stopped => VmState::Stopped,
                Ending::Failed(failure) => VmState::Failed(failure),
            };
            (state, vec![VmEffect::RemoveJournal, VmEffect::Report])
        }
        VmEvent::ReleaseFailed => (VmState::Releasing(ending), vec![VmEffect::Release]),
        VmEvent::Stop(_) | VmEvent::Exited(_) | VmEvent::Failed(_) => {
            (VmState::Releasing(ending), Vec::new())
        }
        other => unreachable!("{other:?} while releasing"),
    }
}

#[cfg(test)]
mod tests;
