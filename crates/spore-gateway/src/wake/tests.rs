//! The machine against a model: whatever happens in whatever order, nobody who waits is lost.

use std::collections::{BTreeMap, BTreeSet};

use proptest::collection::vec;
use proptest::prelude::{Just, Strategy, prop_oneof};
use proptest::{prop_assert, prop_assert_eq, proptest};
use spore_wire::id::VmId;

use super::{AppEffect, AppEvent, AppMachine, AppState, ReapMode, RefuseReason, step};

const WAITERS_MAX: u32 = 4;
const IN_FLIGHT_MAX: u32 = 6;

/// What a trial does next; the model turns it into a legal event.
#[derive(Clone, Copy, Debug)]
enum Act {
    Request,
    Left(usize),
    Finish(usize),
    /// A VM that is new, or one that was there before.
    Awake(Option<u8>),
    WakeFailed,
    Unrouted,
    Reap(u8, ReapMode),
    Gone(u8),
    SessionBegan,
}

fn act() -> impl Strategy<Value = Act> {
    let mode = || prop_oneof![Just(ReapMode::IfIdle), Just(ReapMode::Force)];
    prop_oneof![
        8 => Just(Act::Request),
        2 => (0..8_usize).prop_map(Act::Left),
        6 => (0..8_usize).prop_map(Act::Finish),
        3 => Just(Act::Awake(None)),
        1 => (0..6_u8).prop_map(|vm| Act::Awake(Some(vm))),
        1 => Just(Act::WakeFailed),
        1 => Just(Act::Unrouted),
        4 => (0..6_u8, mode()).prop_map(|(vm, mode)| Act::Reap(vm, mode)),
        2 => (0..6_u8).prop_map(Act::Gone),
        1 => Just(Act::SessionBegan),
    ]
}

fn vm(number: u8) -> VmId {
    VmId::from_bytes([number; 16])
}

/// What an observer who only sees events and effects knows.
#[derive(Debug, Default)]
struct Observer {
    waiting: BTreeSet<u64>,
    in_flight: Vec<VmId>,
    gone: BTreeSet<VmId>,
    answered: BTreeMap<u64, usize>,
    wakes_open: u32,
    next_waiter: u64,
    next_vm: u8,
    now_ms: u64,
    reap_owed: BTreeSet<VmId>,
}

impl Observer {
    fn event(&mut self, act: Act) -> Option<AppEvent> {
        self.now_ms += 1;
        let now_ms = self.now_ms;
        Some(match act {
            Act::Request => {
                self.next_waiter += 1;
                self.waiting.insert(self.next_waiter);
                AppEvent::Request {
                    waiter: self.next_waiter,
                    waiters_max: WAITERS_MAX,
                    in_flight_max: IN_FLIGHT_MAX,
                }
            }
            Act::Left(index) => {
                let waiter = *self.waiting.iter().nth(index)?;
                self.waiting.remove(&waiter);
                AppEvent::Left { waiter }
            }
            Act::Finish(index) => {
                if index >= self.in_flight.len() {
                    return None;
                }
                let vm = self.in_flight.remove(index);
                AppEvent::Finished { vm, now_ms }
            }
            Act::Awake(known) => {
                self.wakes_open = 0;
                let number = known.unwrap_or_else(|| {
                    self.next_vm = self.next_vm.saturating_add(1);
                    self.next_vm
                });
                let vm = vm(number);
                // A daemon never speaks of a VM again once it said that it is gone.
                if self.gone.contains(&vm) {
                    return None;
                }
                self.reap_owed.remove(&vm);
                AppEvent::Awake { vm, now_ms }
            }
            Act::WakeFailed => {
                self.wakes_open = 0;
                AppEvent::WakeFailed
            }
            Act::Unrouted => {
                // The wake that may be under way answers nobody any more.
                self.wakes_open = 0;
                AppEvent::Unrouted
            }
            Act::Reap(number, mode) => AppEvent::Reap {
                vm: vm(number),
                mode,
            },
            Act::Gone(number) => {
                self.gone.insert(vm(number));
                self.reap_owed.remove(&vm(number));
                AppEvent::Gone { vm: vm(number) }
            }
            Act::SessionBegan => {
                self.wakes_open = 0;
                AppEvent::SessionBegan
            }
        })
    }

    fn in_flight_of(&self, vm: VmId) -> usize {
        if self.gone.contains(&vm) {
            return 0;
        }
        self.in_flight.iter().filter(|of| **of == vm).count()
    }

    fn observe(
        &mut self,
        event: AppEvent,
        effects: &[AppEffect],
        after: &AppMachine,
    ) -> Result<(), proptest::test_runner::TestCaseError> {
        let mut reap_answers = 0;
        for effect in effects {
            match *effect {
                AppEffect::Wake => {
                    self.wakes_open += 1;
                    prop_assert!(self.wakes_open <= 1, "two wakes in flight");
                    prop_assert_eq!(after.state(), AppState::Waking);
                }
                AppEffect::Admit { waiter, vm } => {
                    prop_assert!(self.waiting.remove(&waiter), "admitted, but did not wait");
                    prop_assert!(!self.gone.contains(&vm), "admitted to what is gone");
                    prop_assert_eq!(after.state(), AppState::Warm { vm });
                    *self.answered.entry(waiter).or_default() += 1;
                    self.in_flight.push(vm);
                }
                AppEffect::Refuse { waiter, why } => {
                    prop_assert!(self.waiting.remove(&waiter), "refused, but did not wait");
                    if why == RefuseReason::QueueFull {
                        prop_assert_eq!(after.waiting(), WAITERS_MAX as usize);
                    }
                    *self.answered.entry(waiter).or_default() += 1;
                }
                AppEffect::Reaped { vm } => {
                    reap_answers += 1;
                    self.reap_owed.remove(&vm);
                    prop_assert_eq!(self.in_flight_of(vm), 0, "reaped with requests in flight");
                    prop_assert!(after.state() != AppState::Warm { vm }, "reaped and open");
                }
                AppEffect::Busy { vm } => {
                    reap_answers += 1;
                    prop_assert!(self.in_flight_of(vm) > 0, "busy with nothing in flight");
                }
                AppEffect::Cut { vm } => prop_assert!(self.gone.contains(&vm)),
                AppEffect::Retire { vm } => {
                    prop_assert!(after.state() != AppState::Warm { vm }, "retired and open");
                }
                AppEffect::Edge => {}
            }
        }
        if let AppEvent::Reap { vm, mode } = event {
            if reap_answers == 0 {
                prop_assert_eq!(mode, ReapMode::Force);
                self.reap_owed.insert(vm);
            } else {
                prop_assert_eq!(reap_answers, 1);
            }
        }
        Ok(())
    }

    fn agree(&self, machine: &AppMachine) -> Result<(), proptest::test_runner::TestCaseError> {
        prop_assert_eq!(machine.waiting(), self.waiting.len());
        let waking = machine.state() == AppState::Waking;
        prop_assert!(waking || self.waiting.is_empty(), "waits for nothing");
        for load in machine.loads() {
            let counted = usize::try_from(load.in_flight).unwrap();
            prop_assert_eq!(counted, self.in_flight_of(load.vm));
        }
        for vm in &self.in_flight {
            let known = machine.loads().any(|load| load.vm == *vm);
            prop_assert!(known || self.gone.contains(vm), "in flight and forgotten");
        }
        // An owed answer to a forced reap is owed for what is in flight, and for nothing else.
        for vm in &self.reap_owed {
            prop_assert!(self.in_flight_of(*vm) > 0, "a reap was never answered");
        }
        Ok(())
    }
}

proptest! {
    #[test]
    fn every_waiter_is_answered_once_and_no_reap_closes_on_a_request(
        acts in vec(act(), 1..200),
    ) {
        let mut machine = AppMachine::default();
        let mut observer = Observer::default();
        for act in acts {
            let Some(event) = observer.event(act) else { continue };
            let (next, effects) = step(machine, event);
            observer.observe(event, &effects, &next)?;
            observer.agree(&next)?;
            machine = next;
        }
        // Whatever came before, one wake that succeeds answers everybody.
        observer.wakes_open = 0;
        let vm = vm(255);
        let awake = AppEvent::Awake { vm, now_ms: observer.now_ms };
        let (machine, effects) = step(machine, awake);
        observer.observe(awake, &effects, &machine)?;
        prop_assert!(observer.waiting.is_empty());
        prop_assert!(observer.answered.values().all(|times| *times == 1));
    }

    #[test]
    fn the_short_way_in_is_the_long_one(acts in vec(act(), 1..60)) {
        let mut machine = AppMachine::default();
        let mut observer = Observer::default();
        for act in acts {
            let Some(event) = observer.event(act) else { continue };
            let (next, effects) = step(machine.clone(), event);
            if let AppEvent::Request { waiter, .. } = event {
                let mut short = machine.clone();
                match short.admit(IN_FLIGHT_MAX) {
                    Some((vm, edge)) => {
                        prop_assert_eq!(&short, &next);
                        prop_assert_eq!(effects[0], AppEffect::Admit { waiter, vm });
                        prop_assert_eq!(effects.contains(&AppEffect::Edge), edge);
                    }
                    None => prop_assert_eq!(&short, &machine),
                }
            }
            observer.observe(event, &effects, &next)?;
            machine = next;
        }
    }
}

#[test]
fn an_app_wakes_serves_and_is_reaped() {
    let request = |waiter| AppEvent::Request {
        waiter,
        waiters_max: WAITERS_MAX,
        in_flight_max: IN_FLIGHT_MAX,
    };
    let (vm, waiter, now_ms) = (vm(1), 7, 0);
    let (asleep, effects) = step(AppMachine::default(), request(waiter));
    assert_eq!(effects, [AppEffect::Wake]);
    let (warm, effects) = step(asleep, AppEvent::Awake { vm, now_ms });
    assert_eq!(effects, [AppEffect::Admit { waiter, vm }, AppEffect::Edge]);
    let mode = ReapMode::IfIdle;
    let (warm, effects) = step(warm, AppEvent::Reap { vm, mode });
    assert_eq!(effects, [AppEffect::Busy { vm }]);
    let (idle, effects) = step(warm, AppEvent::Finished { vm, now_ms: 5 });
    assert_eq!(effects, [AppEffect::Edge]);
    assert_eq!(idle.loads().next().unwrap().idle_since_ms, 5);
    let (closing, effects) = step(idle, AppEvent::Reap { vm, mode });
    assert_eq!(
        effects,
        [AppEffect::Retire { vm }, AppEffect::Reaped { vm }]
    );
    assert_eq!(closing.state(), AppState::Closing { vm });
    let (_, effects) = step(closing, request(8));
    assert_eq!(effects, [AppEffect::Wake]);
}
