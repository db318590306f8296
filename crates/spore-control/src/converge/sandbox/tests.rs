//! Every interleaving that chance finds: a model of node and store around one sandbox.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::{Just, Strategy, any, prop_assert, prop_assert_eq, prop_oneof, proptest};
use proptest::test_runner::TestCaseError;
use spore_api::error::ErrorCode;
use spore_wire::id::{SnapshotId, VmId};

use super::life::{Change, Effect, Event, Life, Standing};
use crate::converge::life::{Failure, Moment};
use crate::store::record::sandbox::{Base, Kept, SandboxRecord, StoredSandboxState};

/// What chance may do.
#[derive(Clone, Copy, Debug)]
enum Act {
    /// The node answers a start: it has room, has none, or fails.
    Answer(u8),
    /// A VM of the node becomes ready.
    Ready(u8),
    /// The node is about to end one.
    Leave(u8),
    /// One dies.
    Die(u8),
    /// One that was stopped is over.
    Ended(u8),
    /// Something is told twice.
    Again(u8),
    Rollback,
    Close,
    /// The store is full, or has room again.
    Full(bool),
    /// The daemon ends and another begins.
    Crash,
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        6 => any::<u8>().prop_map(Act::Answer),
        6 => any::<u8>().prop_map(Act::Ready),
        1 => any::<u8>().prop_map(Act::Leave),
        1 => any::<u8>().prop_map(Act::Die),
        4 => any::<u8>().prop_map(Act::Ended),
        2 => any::<u8>().prop_map(Act::Again),
        3 => Just(Act::Rollback),
        1 => Just(Act::Close),
        1 => any::<bool>().prop_map(Act::Full),
        1 => Just(Act::Crash),
    ]
}

/// A VM of the node.
#[derive(Clone, Copy, Debug, Default)]
struct Vm {
    is_ready: bool,
    is_stopped: bool,
}

/// A node, a store and a caller, as small as they can be.
struct World {
    life: Life,
    record: Option<SandboxRecord>,
    full: bool,
    node: BTreeMap<VmId, Vm>,
    /// Starts that the node has not answered.
    asked: BTreeSet<VmId>,
    /// Ids that the node ever had.
    used: BTreeSet<VmId>,
    next_vm: u8,
    opening: u32,
    rolling: u32,
    /// While a list of the node is told, VMs that are not wanted may not be known yet.
    telling: bool,
    /// The VM that a rollback is to leave alone, while it is one beside the other.
    kept: Option<VmId>,
}

fn base(number: u8) -> Base {
    Base {
        account: "me".parse().unwrap(),
        id: SnapshotId::from_bytes([number; 16]),
        kept: Kept::ByOwner,
    }
}

fn vm(number: u8) -> VmId {
    VmId::from_bytes([number; 16])
}

fn failure(code: ErrorCode) -> Failure {
    Failure::new(code, "chance wants it")
}

impl World {
    fn new() -> Self {
        Self {
            life: Life::new(vm(0), base(0)),
            record: Some(SandboxRecord {
                vm: vm(0),
                base: base(0),
                state: StoredSandboxState::Opening,
                next: None,
                from: "notes".to_owned(),
                created_at_ms: 0,
            }),
            full: false,
            node: BTreeMap::new(),
            asked: BTreeSet::from([vm(0)]),
            used: BTreeSet::new(),
            next_vm: 1,
            opening: 1,
            rolling: 0,
            telling: false,
            kept: None,
        }
    }

    fn on(&mut self, event: Event) -> Result<(), TestCaseError> {
        let effects = self.life.on(event, Moment(1));
        self.perform(effects)
    }

    fn perform(&mut self, mut effects: Vec<Effect>) -> Result<(), TestCaseError> {
        loop {
            let mut next = None;
            for effect in effects {
                if let Some(event) = self.one(effect)? {
                    prop_assert!(next.is_none(), "two saves at once");
                    next = Some(event);
                }
            }
            self.check()?;
            match next {
                Some(event) => effects = self.life.on(event, Moment(1)),
                None => return Ok(()),
            }
        }
    }

    fn one(&mut self, effect: Effect) -> Result<Option<Event>, TestCaseError> {
        match effect {
            Effect::Save(change) => return Ok(Some(self.save(change))),
            Effect::Start { vm, from } => {
                let record = self.record.as_ref().unwrap();
                let next = record.next.as_ref();
                prop_assert_eq!(next, Some(&(vm, from)), "started before it is written down");
                prop_assert!(!self.used.contains(&vm), "an id was used twice");
                prop_assert!(self.asked.insert(vm));
            }
            Effect::Stop(vm) => {
                if let Some(vm) = self.node.get_mut(&vm) {
                    prop_assert!(!vm.is_stopped, "stopped twice");
                    vm.is_stopped = true;
                }
            }
            Effect::Opened(outcome) => {
                prop_assert_eq!(self.opening, 1, "answered twice");
                self.opening = 0;
                let state = self.record.as_ref().map(|record| record.state);
                if outcome.is_ok() {
                    prop_assert_eq!(state, Some(StoredSandboxState::Open));
                }
            }
            Effect::RolledBack(outcome) => {
                prop_assert!(self.rolling > 0, "nobody asked");
                self.rolling -= 1;
                let kept = self.kept.take();
                if let (Err(_), Some(kept), Standing::Open) = (outcome, kept, self.life.standing())
                {
                    prop_assert_eq!(self.life.open(), Some(kept), "a failed rollback changed it");
                }
            }
            Effect::Forget => {
                prop_assert!(
                    self.node.is_empty() && self.asked.is_empty(),
                    "a VM is left"
                );
                self.record = None;
            }
        }
        Ok(None)
    }

    fn save(&mut self, change: Change) -> Event {
        if self.full {
            return Event::Unsaved(change, failure(ErrorCode::DiskFull));
        }
        change.write(self.record.as_mut().unwrap());
        Event::Saved(change)
    }

    fn check(&self) -> Result<(), TestCaseError> {
        if self.telling {
            return Ok(());
        }
        let lives = |(_, vm): &(&VmId, &Vm)| !vm.is_stopped;
        let living = self.node.iter().filter(lives).count() + self.asked.len();
        let most = match self.life.standing() {
            Standing::RollingBack => 2,
            _ => 1,
        };
        prop_assert!(
            living <= most,
            "{living} VMs while {:?}",
            self.life.standing()
        );
        if let Some(open) = self.life.open() {
            let record = self.record.as_ref().unwrap();
            let next = record.next.as_ref().map(|(next, _)| *next);
            prop_assert!(record.vm == open || next == Some(open), "{record:?}");
        }
        Ok(())
    }

    fn pick(&self, number: u8, which: impl Fn(&Vm) -> bool) -> Option<VmId> {
        let all: Vec<_> = self.node.iter().filter(|(_, vm)| which(vm)).collect();
        let index = usize::from(number) % all.len().max(1);
        all.get(index).map(|(vm, _)| **vm)
    }

    fn over(&mut self, vm: VmId) -> Result<(), TestCaseError> {
        self.node.remove(&vm);
        if self.kept == Some(vm) {
            self.kept = None;
        }
        self.on(Event::Over(vm, failure(ErrorCode::AppFailed)))
    }

    fn answer(&mut self, number: u8) -> Result<(), TestCaseError> {
        let Some(vm) = self.asked.pop_first() else {
            return Ok(());
        };
        match number % 4 {
            0 => {
                // To make room, the old one is ended.
                if self.life.standing() == Standing::RollingBack {
                    self.kept = None;
                }
                self.on(Event::Refused(vm, failure(ErrorCode::NoCapacity)))
            }
            1 => self.on(Event::Refused(vm, failure(ErrorCode::Internal))),
            _ => {
                self.used.insert(vm);
                self.node.insert(vm, Vm::default());
                self.on(Event::Accepted(vm))
            }
        }
    }

    fn act(&mut self, act: Act) -> Result<(), TestCaseError> {
        let is_gone = self.life.standing() == Standing::Gone;
        match act {
            _ if is_gone => Ok(()),
            Act::Answer(number) => self.answer(number),
            Act::Ready(number) => match self.pick(number, |vm| !vm.is_stopped) {
                Some(vm) => {
                    self.node.get_mut(&vm).unwrap().is_ready = true;
                    self.on(Event::Ready(vm))
                }
                None => Ok(()),
            },
            Act::Leave(number) => match self.pick(number, |vm| !vm.is_stopped) {
                Some(vm) => {
                    if self.kept == Some(vm) {
                        self.kept = None;
                    }
                    self.on(Event::Leaving(vm))
                }
                None => Ok(()),
            },
            Act::Die(number) => match self.pick(number, |_| true) {
                Some(vm) => self.over(vm),
                None => Ok(()),
            },
            Act::Ended(number) => match self.pick(number, |vm| vm.is_stopped) {
                Some(vm) => self.over(vm),
                None => Ok(()),
            },
            Act::Again(number) => match self.pick(number, |vm| vm.is_ready && !vm.is_stopped) {
                Some(vm) => self.on(Event::Ready(vm)),
                None => Ok(()),
            },
            Act::Rollback => {
                let new = vm(self.next_vm);
                self.next_vm += 1;
                let kept = self.life.open();
                // The keeper asks for one at a time.
                if self.rolling > 0 {
                    return Ok(());
                }
                self.rolling += 1;
                self.kept = kept;
                self.on(Event::Rollback {
                    new,
                    to: base(new.as_bytes()[0]),
                })
            }
            Act::Close => self.on(Event::Close),
            Act::Full(full) => {
                self.full = full;
                Ok(())
            }
            Act::Crash => self.crash(),
        }
    }

    /// Starts that were on their way reach the node or do not; who waited is gone.
    fn crash(&mut self) -> Result<(), TestCaseError> {
        self.asked.clear();
        (self.opening, self.rolling, self.kept) = (0, 0, None);
        for vm in self.node.values_mut() {
            vm.is_stopped = false;
        }
        let record = self.record.clone().unwrap();
        let (life, effects) = Life::found(&record, |vm| self.node.contains_key(&vm), Moment(2));
        self.life = life;
        if record.state == StoredSandboxState::Opening {
            // An opening that nobody was told of: it is closed, whoever asked is gone.
            prop_assert!(self.life.open().is_none());
        }
        // Nobody waits for it any more, and it ends all the same.
        self.rolling = u32::from(self.life.standing() == Standing::RollingBack);
        self.telling = true;
        self.perform(effects)?;
        for (vm, status) in self.node.clone() {
            let event = if status.is_ready {
                Event::Ready(vm)
            } else {
                Event::Seen(vm)
            };
            if self.life.standing() != Standing::Gone {
                self.on(event)?;
            }
        }
        self.telling = false;
        self.check()?;
        Ok(())
    }

    /// Nothing more is asked, and everything that is on its way arrives.
    fn calm(&mut self) -> Result<(), TestCaseError> {
        self.full = false;
        for _ in 0..50 {
            self.answer(2)?;
            while let Some(vm) = self.pick(0, |vm| vm.is_stopped) {
                self.over(vm)?;
            }
            let coming = |vm: &Vm| !vm.is_ready && !vm.is_stopped;
            if let Some(vm) = self.pick(0, coming) {
                self.node.get_mut(&vm).unwrap().is_ready = true;
                self.on(Event::Ready(vm))?;
            }
        }
        prop_assert_eq!(
            (self.opening, self.rolling),
            (0, 0),
            "somebody waits for ever"
        );
        match self.life.standing() {
            Standing::Open => {
                let open = self.life.open().unwrap();
                prop_assert_eq!(self.node.keys().collect::<Vec<_>>(), vec![&open]);
                prop_assert!(self.node[&open].is_ready);
            }
            Standing::Ended(reason) => {
                prop_assert!(self.node.is_empty() && !reason.is_empty());
                prop_assert!(self.record.is_some());
            }
            Standing::Gone => {
                prop_assert!(self.node.is_empty() && self.record.is_none());
            }
            other => prop_assert!(false, "in calm it is {other:?}"),
        }
        Ok(())
    }
}

proptest! {
    #[test]
    fn a_sandbox_comes_to_rest_whatever_happens(
        acts in proptest::collection::vec(act(), 0..60),
    ) {
        let mut world = World::new();
        for act in acts {
            world.act(act)?;
        }
        world.calm()?;
    }

    #[test]
    fn a_sandbox_that_is_closed_leaves_nothing(
        acts in proptest::collection::vec(act(), 0..40),
    ) {
        let mut world = World::new();
        for act in acts {
            world.act(act)?;
        }
        if world.life.standing() != Standing::Gone {
            world.on(Event::Close)?;
        }
        world.calm()?;
        prop_assert_eq!(world.life.standing(), Standing::Gone);
    }
}

/// A sandbox that is open in the VM 0.
fn open() -> World {
    let mut world = World::new();
    for event in [Event::Accepted(vm(0)), Event::Ready(vm(0))] {
        world.asked.clear();
        world.node.entry(vm(0)).or_default().is_ready = true;
        world.on(event).unwrap();
    }
    assert_eq!(world.life.open(), Some(vm(0)));
    world
}

#[test]
fn a_rollback_without_room_for_two_ends_the_old_vm_first() {
    let mut world = open();
    world.act(Act::Rollback).unwrap();
    world.act(Act::Answer(0)).unwrap();
    assert!(world.node[&vm(0)].is_stopped, "the old VM makes room");
    assert!(
        world.asked.is_empty(),
        "nothing starts before there is room"
    );
    world.over(vm(0)).unwrap();
    assert_eq!(world.asked, BTreeSet::from([vm(1)]));
    world.act(Act::Answer(2)).unwrap();
    world.act(Act::Ready(0)).unwrap();
    assert_eq!(world.life.open(), Some(vm(1)));
    assert_eq!(world.life.base(), &base(1));
    assert_eq!(world.rolling, 0);
}

#[test]
fn a_rollback_that_fails_leaves_the_sandbox_as_it_was() {
    let mut world = open();
    world.act(Act::Rollback).unwrap();
    world.act(Act::Answer(2)).unwrap();
    world.over(vm(1)).unwrap();
    assert_eq!(world.life.open(), Some(vm(0)));
    assert_eq!(world.life.base(), &base(0));
    assert!(!world.node[&vm(0)].is_stopped);
    assert_eq!(world.record.unwrap().next, None);
}

#[test]
fn a_restart_finds_what_a_full_store_could_not_be_told_of() {
    for (fails, room_at) in [(true, 1), (true, 2), (false, 1), (false, 2)] {
        let mut world = open();
        world.act(Act::Rollback).unwrap();
        world.act(Act::Answer(2)).unwrap();
        world.over(vm(0)).unwrap();
        world.act(Act::Full(true)).unwrap();
        world.act(Act::Ready(0)).unwrap();
        assert_eq!(
            world.life.open(),
            Some(vm(1)),
            "it took the place all the same"
        );
        world.full = room_at > 1;
        world.act(Act::Rollback).unwrap();
        world.full = false;
        if fails {
            world.act(Act::Answer(1)).unwrap();
        }
        world.crash().unwrap();
        world.calm().unwrap();
        assert_eq!(world.life.open(), Some(vm(1)), "{fails} {room_at}");
        assert_eq!(world.life.base(), &base(1), "{fails} {room_at}");
    }
}

#[test]
fn a_restart_in_the_middle_of_a_rollback_keeps_the_vm_that_is_there() {
    for (old_lives, expected) in [(true, vm(0)), (false, vm(1))] {
        let mut world = open();
        world.act(Act::Rollback).unwrap();
        world.act(Act::Answer(2)).unwrap();
        if !old_lives {
            world.node.remove(&vm(0));
        }
        world.crash().unwrap();
        world.calm().unwrap();
        assert_eq!(world.life.open(), Some(expected), "{old_lives}");
    }
}
