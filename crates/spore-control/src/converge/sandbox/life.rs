//! The life of one sandbox: a pure state machine.
//!
//! Used by the sandbox's keeper, which feeds it what happened and does what it answers. It does no
//! IO: time and new ids come in as arguments, so every interleaving can be tested.
//!
//! ```text
//!          Ready, written down        Rollback, written down
//!   Opening ──────────────▶ Open ──────────────────────▶ RollingBack
//!      │                    │  ▲ ◀── new one failed, old one lives ─┤ Beside: the old VM waits
//!      │                    │  │ ◀── new one Ready, written down ───┤ MakingRoom: none for both,
//!      │ failed             │  │                                    │   the old one is ended
//!      │        its VM ended│  │                                    │ Alone: only the new one
//!      │                    ▼  │ Rollback                           │
//!      │                   Ended ◀── new one failed, none is left ──┘
//!      ▼   Close, from everywhere
//!   Closing ── its last VM is over ──▶ Gone
//! ```
//!
//! Invariants, each a property in the tests: there are two VMs only while one takes the other's
//! place; a VM that is not the sandbox's any more is stopped; while the old VM waits, a rollback
//! that fails leaves it untouched; the record leads a restart to what is Open; whoever waits is
//! answered once; when it is gone, so are its VMs and its record.

use std::collections::BTreeMap;

use spore_api::error::ErrorCode;
use spore_wire::id::VmId;

use crate::converge::life::{Failure, Moment};
use crate::store::record::sandbox::{Base, SandboxRecord, StoredSandboxState};

/// One sandbox.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Life {
    state: State,
    /// What its VM began from.
    base: Base,
    /// Its VMs that are not over.
    vms: BTreeMap<VmId, Known>,
}

/// Where it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
enum State {
    Opening {
        vm: VmId,
    },
    Open {
        vm: VmId,
    },
    RollingBack {
        old: Option<VmId>,
        new: VmId,
        to: Base,
        way: Way,
    },
    Closing,
    Ended {
        reason: String,
    },
    Gone,
}

/// How a VM takes the place of another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Beside,
    MakingRoom,
    Alone,
}

/// What is known of a VM that is not over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Known {
    /// When the node said that it has it; `None` while the start is under way.
    accepted: Option<Moment>,
    /// Whether the node was told to stop it.
    stopped: bool,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// The node starts the VM, which may be over already.
    Accepted(VmId),
    /// The node told of it, whoever asked for it.
    Seen(VmId),
    /// The node does not start it.
    Refused(VmId, Failure),
    /// Programs can be run in it.
    Ready(VmId),
    /// Its node is about to end it.
    Leaving(VmId),
    /// Nothing of it is left.
    Over(VmId, Failure),
    /// The owner wants it back at a snapshot; `new` is the id of the VM that this takes.
    Rollback {
        /// Never used before.
        new: VmId,
        /// Where to.
        to: Base,
    },
    /// The owner wants it gone, or who asked for it has left.
    Close,
    /// A change is written down.
    Saved(Change),
    /// The store did not take it.
    Unsaved(Change, Failure),
}

/// What is to be done, in order. The outcome of a [`Effect::Save`] is the next event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Effect {
    /// Write a change down.
    Save(Change),
    /// Start a VM.
    Start {
        /// Its id.
        vm: VmId,
        /// What it begins from.
        from: Base,
    },
    /// End a VM.
    Stop(VmId),
    /// Tell who opened it.
    Opened(Result<(), Failure>),
    /// Tell who wanted it back at a snapshot.
    RolledBack(Result<(), Failure>),
    /// Delete the record: nothing else is left.
    Forget,
}

/// A change of the record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    /// It is there until it is removed.
    Opened,
    /// A VM is about to take the place of its own.
    Rolling {
        /// What is there.
        now: Place,
        /// Which.
        new: VmId,
        /// What it begins from.
        to: Base,
    },
    /// That VM took the place.
    Swapped {
        /// Which.
        new: VmId,
        /// What it began from.
        to: Base,
    },
    /// That VM did not.
    Stayed {
        /// What is there.
        now: Place,
    },
}

/// What is there while the place of a VM is in question.
///
/// It is written down with every such change: the record may name another VM since it last took one
/// in that the store had no room for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    /// The sandbox's VM; `None` when it ended.
    vm: Option<VmId>,
    /// What the last one began from.
    base: Base,
}

impl Place {
    fn write(&self, record: &mut SandboxRecord) {
        if let Some(vm) = self.vm {
            record.vm = vm;
        }
        record.base = self.base.clone();
    }
}

/// Where a sandbox stands, for others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Standing {
    Opening,
    Open,
    RollingBack,
    Closing,
    Ended(String),
    Gone,
}

impl Change {
    /// Writes it into the record.
    pub(crate) fn write(&self, record: &mut SandboxRecord) {
        match self {
            Self::Opened => record.state = StoredSandboxState::Open,
            Self::Rolling { now, new, to } => {
                now.write(record);
                record.next = Some((*new, to.clone()));
            }
            Self::Swapped { new, to } => {
                record.vm = *new;
                record.base = to.clone();
                record.next = None;
            }
            Self::Stayed { now } => {
                now.write(record);
                record.next = None;
            }
        }
    }
}

impl Life {
    /// A sandbox whose VM is being asked for.
    pub(crate) fn new(vm: VmId, base: Base) -> Self {
        Self {
            state: State::Opening { vm },
            base,
            vms: BTreeMap::from([(vm, Known::default())]),
        }
    }

    /// A sandbox of an earlier daemon, of which the node has the VMs that `has` says.
    pub(crate) fn found(
        record: &SandboxRecord,
        has: impl Fn(VmId) -> bool,
        now: Moment,
    ) -> (Self, Vec<Effect>) {
        let vm = record.vm;
        let next = record.next.as_ref().filter(|(next, _)| has(*next));
        let state = match (record.state, next) {
            // Whoever asked for it was never told of it.
            (StoredSandboxState::Opening, _) => State::Closing,
            // Of two, the one that was there before; whoever wanted the other was not told.
            (StoredSandboxState::Open, _) if has(vm) => State::Open { vm },
            (StoredSandboxState::Open, Some((new, to))) => State::RollingBack {
                old: None,
                new: *new,
                to: to.clone(),
                way: Way::Alone,
            },
            (StoredSandboxState::Open, None) => State::Ended {
                reason: "its VM ended while no daemon ran: the host was restarted, or Spore was \
                         taken down"
                    .to_owned(),
            },
        };
        let known = Known {
            accepted: Some(now),
            stopped: false,
        };
        let there = [Some(vm), next.map(|(next, _)| *next)];
        let there = there.into_iter().flatten().filter(|vm| has(*vm));
        let mut life = Self {
            state,
            base: record.base.clone(),
            vms: there.map(|vm| (vm, known)).collect(),
        };
        let mut effects = Vec::new();
        life.settle(&mut effects);
        (life, effects)
    }

    /// Something happened.
    pub(crate) fn on(&mut self, event: Event, now: Moment) -> Vec<Effect> {
        let mut effects = Vec::new();
        match event {
            Event::Accepted(vm) => {
                if let Some(known) = self.vms.get_mut(&vm) {
                    known.accepted.get_or_insert(now);
                }
            }
            Event::Seen(vm) => {
                self.seen(vm, now);
            }
            Event::Refused(vm, failure) | Event::Over(vm, failure) => {
                if self.vms.remove(&vm).is_some() {
                    self.lost(vm, failure, &mut effects);
                }
            }
            Event::Ready(vm) => {
                self.seen(vm, now);
                self.ready(vm, &mut effects);
            }
            Event::Leaving(vm) => {
                let known = self.seen(vm, now);
                if !core::mem::replace(&mut known.stopped, true) {
                    effects.push(Effect::Stop(vm));
                }
            }
            Event::Rollback { new, to } => self.roll_back(new, to, &mut effects),
            Event::Close => self.close(&mut effects),
            Event::Saved(change) => self.saved(change, &mut effects),
            Event::Unsaved(change, failure) => self.unsaved(change, failure, &mut effects),
        }
        self.settle(&mut effects);
        effects
    }

    /// The VM in which programs can be run.
    pub(crate) fn open(&self) -> Option<VmId> {
        match self.state {
            State::Open { vm } => Some(vm),
            _ => None,
        }
    }

    /// The VM to show.
    pub(crate) fn vm(&self) -> Option<VmId> {
        match self.state {
            State::Opening { vm } | State::Open { vm } => Some(vm),
            State::RollingBack { old, new, .. } => Some(old.unwrap_or(new)),
            State::Closing | State::Ended { .. } | State::Gone => None,
        }
    }

    /// What its VM began from.
    pub(crate) const fn base(&self) -> &Base {
        &self.base
    }

    /// What it needs of snapshots: what it began from, and what it goes back to.
    pub(crate) fn bases(&self) -> impl Iterator<Item = &Base> {
        let to = match &self.state {
            State::RollingBack { to, .. } => Some(to),
            _ => None,
        };
        core::iter::once(&self.base).chain(to)
    }

    /// Where it stands.
    pub(crate) fn standing(&self) -> Standing {
        match &self.state {
            State::Opening { .. } => Standing::Opening,
            State::Open { .. } => Standing::Open,
            State::RollingBack { .. } => Standing::RollingBack,
            State::Closing => Standing::Closing,
            State::Ended { reason } => Standing::Ended(reason.clone()),
            State::Gone => Standing::Gone,
        }
    }

    /// The VMs that the node should have, with the moment it said so.
    pub(crate) fn accepted(&self) -> impl Iterator<Item = (VmId, Moment)> + '_ {
        let vms = self.vms.iter();
        vms.filter_map(|(vm, known)| Some((*vm, known.accepted?)))
    }

    fn seen(&mut self, vm: VmId, now: Moment) -> &mut Known {
        let known = self.vms.entry(vm).or_default();
        known.accepted.get_or_insert(now);
        known
    }

    fn ready(&mut self, ready: VmId, effects: &mut Vec<Effect>) {
        match &self.state {
            State::Opening { vm } if *vm == ready => effects.push(Effect::Save(Change::Opened)),
            State::RollingBack { new, to, .. } if *new == ready => {
                let (new, to) = (*new, to.clone());
                effects.push(Effect::Save(Change::Swapped { new, to }));
            }
            _ => {}
        }
    }

    /// A VM did not start, or is over.
    fn lost(&mut self, lost: VmId, failure: Failure, effects: &mut Vec<Effect>) {
        match &mut self.state {
            State::Opening { vm } if *vm == lost => {
                self.state = State::Closing;
                effects.push(Effect::Opened(Err(failure)));
            }
            State::Open { vm } if *vm == lost => {
                let reason = failure.message;
                self.state = State::Ended { reason };
            }
            State::RollingBack { old, new, to, way } => {
                if *new == lost {
                    let for_room = failure.code == ErrorCode::NoCapacity && *way == Way::Beside;
                    if for_room && old.is_some() {
                        *way = Way::MakingRoom;
                    } else {
                        self.stay(failure, effects);
                    }
                } else if *old == Some(lost) {
                    *old = None;
                    if core::mem::replace(way, Way::Alone) == Way::MakingRoom {
                        let (vm, from) = (*new, to.clone());
                        self.vms.insert(vm, Known::default());
                        effects.push(Effect::Start { vm, from });
                    }
                }
            }
            _ => {}
        }
    }

    fn roll_back(&mut self, new: VmId, to: Base, effects: &mut Vec<Effect>) {
        let (old, way) = match &self.state {
            State::Open { vm } => (Some(*vm), Way::Beside),
            State::Ended { .. } => (None, Way::Alone),
            State::Opening { .. } | State::RollingBack { .. } | State::Closing | State::Gone => {
                let message = "the sandbox is neither open nor ended: try again in a moment";
                let failure = Failure::new(ErrorCode::Conflict, message);
                effects.push(Effect::RolledBack(Err(failure)));
                return;
            }
        };
        let base = self.base.clone();
        effects.push(Effect::Save(Change::Rolling {
            now: Place { vm: old, base },
            new,
            to: to.clone(),
        }));
        self.state = State::RollingBack { old, new, to, way };
    }

    /// The rollback came to nothing.
    fn stay(&mut self, failure: Failure, effects: &mut Vec<Effect>) {
        let State::RollingBack { old, .. } = self.state else {
            return;
        };
        self.state = match old {
            Some(vm) => State::Open { vm },
            None => State::Ended {
                reason: format!("it could not go back: {}", failure.message),
            },
        };
        let base = self.base.clone();
        let now = Place { vm: old, base };
        effects.push(Effect::Save(Change::Stayed { now }));
        effects.push(Effect::RolledBack(Err(failure)));
    }

    fn close(&mut self, effects: &mut Vec<Effect>) {
        let message = "the sandbox was removed meanwhile";
        let failure = || Err(Failure::new(ErrorCode::Conflict, message));
        match self.state {
            State::Closing | State::Gone => return,
            State::Opening { .. } => effects.push(Effect::Opened(failure())),
            State::RollingBack { .. } => effects.push(Effect::RolledBack(failure())),
            State::Open { .. } | State::Ended { .. } => {}
        }
        self.state = State::Closing;
    }

    fn saved(&mut self, change: Change, effects: &mut Vec<Effect>) {
        match (change, &self.state) {
            (Change::Opened, State::Opening { vm }) => {
                self.state = State::Open { vm: *vm };
                effects.push(Effect::Opened(Ok(())));
            }
            (Change::Rolling { new, to, .. }, State::RollingBack { .. }) => {
                self.vms.insert(new, Known::default());
                effects.push(Effect::Start { vm: new, from: to });
            }
            (Change::Swapped { new, to }, State::RollingBack { .. }) => {
                self.swap(new, to, effects);
            }
            _ => {}
        }
    }

    fn unsaved(&mut self, change: Change, failure: Failure, effects: &mut Vec<Effect>) {
        match (change, &self.state) {
            (Change::Opened, State::Opening { .. }) => {
                self.state = State::Closing;
                effects.push(Effect::Opened(Err(failure)));
            }
            // Without the old VM the record leads a restart to the new one as well.
            (Change::Swapped { new, to }, State::RollingBack { old: None, .. }) => {
                self.swap(new, to, effects);
            }
            (Change::Rolling { .. } | Change::Swapped { .. }, State::RollingBack { .. }) => {
                self.stay(failure, effects);
            }
            _ => {}
        }
    }

    fn swap(&mut self, new: VmId, to: Base, effects: &mut Vec<Effect>) {
        self.state = State::Open { vm: new };
        self.base = to;
        effects.push(Effect::RolledBack(Ok(())));
    }

    /// Has every VM stopped that is not wanted any more, and ends when there is none.
    fn settle(&mut self, effects: &mut Vec<Effect>) {
        let wanted = match self.state {
            State::Opening { vm } | State::Open { vm } => [Some(vm), None],
            State::RollingBack {
                new,
                way: Way::MakingRoom,
                ..
            } => [Some(new), None],
            State::RollingBack { old, new, .. } => [old, Some(new)],
            State::Closing | State::Ended { .. } | State::Gone => [None, None],
        };
        for (vm, known) in &mut self.vms {
            // One whose start is under way is stopped when the node has it.
            let there = known.accepted.is_some() && !known.stopped;
            if there && !wanted.contains(&Some(*vm)) {
                known.stopped = true;
                effects.push(Effect::Stop(*vm));
            }
        }
        if self.state == State::Closing && self.vms.is_empty() {
            self.state = State::Gone;
            effects.push(Effect::Forget);
        }
    }
}
