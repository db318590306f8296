//! Every interleaving that chance finds: a model of node and gateway around one life.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::{Just, Strategy, prop_assert, prop_assert_eq, prop_oneof, proptest};
use proptest::test_runner::TestCaseError;
use spore_api::error::ErrorCode;
use spore_wire::gateway::{Activity, AppKey};
use spore_wire::guest::AppStatus;
use spore_wire::id::{SnapshotId, VmId};
use spore_wire::node::{
    Boundary, FAREWELL_MAX, Owner, Purpose, Source, StopMode, VmFailure, VmFailureKind, VmPhase,
    VmStatus,
};

use super::{
    Admission, Begin, Effect, Event, Failure, Intent, Life, Moment, Stage, Standing, Target,
};
use crate::config::Timing;

/// What chance may do.
#[derive(Clone, Copy, Debug)]
enum Act {
    Wake,
    Sleep,
    Restart,
    Deploy,
    Hold,
    LetGo,
    Disable,
    Enable,
    Remove,
    /// A VM of the node goes on by one phase.
    Move(u8),
    /// A VM of the node is ended by it, and lives until it is stopped.
    End(u8),
    /// A VM of the node dies.
    Die(u8),
    /// A VM of the node breaks on the template that it began from.
    Break(u8),
    /// A VM of the node vanishes and a list shows it.
    Vanish(u8),
    /// The gateway answers what it was asked last.
    Answer,
    Busy,
    Idle,
    DoorBack,
    /// The daemon ends and another begins.
    Crash,
    Pass(u16),
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        4 => Just(Act::Wake),
        1 => Just(Act::Sleep),
        1 => Just(Act::Restart),
        2 => Just(Act::Deploy),
        1 => Just(Act::Hold),
        1 => Just(Act::LetGo),
        1 => Just(Act::Disable),
        1 => Just(Act::Enable),
        1 => Just(Act::Remove),
        8 => proptest::prelude::any::<u8>().prop_map(Act::Move),
        1 => proptest::prelude::any::<u8>().prop_map(Act::End),
        1 => proptest::prelude::any::<u8>().prop_map(Act::Die),
        2 => proptest::prelude::any::<u8>().prop_map(Act::Break),
        1 => proptest::prelude::any::<u8>().prop_map(Act::Vanish),
        4 => Just(Act::Answer),
        2 => Just(Act::Busy),
        2 => Just(Act::Idle),
        1 => Just(Act::DoorBack),
        1 => Just(Act::Crash),
        4 => proptest::prelude::any::<u16>().prop_map(Act::Pass),
    ]
}

/// A node, a gateway and a store, as small as they can be.
struct World {
    life: Life,
    intent: Intent,
    now: Moment,
    next_vm: u8,
    releases: u64,
    node: BTreeMap<VmId, (u64, VmPhase)>,
    /// VMs that may have begun from a template.
    warm: BTreeSet<VmId>,
    asked: Option<(VmId, bool)>,
    in_flight: bool,
    /// Wakes that were asked for and not answered.
    waiting: u32,
    /// The gateway's belief.
    awake: Option<VmId>,
    holds: u32,
}

impl World {
    fn new(sleeps: bool) -> Self {
        Self {
            life: Life::default(),
            intent: Intent::App {
                admission: Admission::Enabled,
                live: Some(target(1, sleeps)),
            },
            now: Moment(1_000_000),
            next_vm: 0,
            releases: 1,
            node: BTreeMap::new(),
            warm: BTreeSet::new(),
            asked: None,
            in_flight: false,
            waiting: 0,
            awake: None,
            holds: 0,
        }
    }

    fn on(&mut self, event: Event) {
        self.life.on(event, self.now, &Timing::default());
    }

    fn vm(&self, n: u8) -> Option<VmId> {
        let count = self.node.len();
        (count > 0).then(|| *self.node.keys().nth(usize::from(n) % count).unwrap())
    }

    fn status(&self, vm: VmId, phase: VmPhase) -> VmStatus {
        let release = self.node.get(&vm).map_or(0, |(release, _)| *release);
        VmStatus {
            vm,
            owner: Owner {
                account: "me".to_owned(),
                app: "notes".to_owned(),
                release,
                secrets_version: 0,
            },
            phase,
            failure: (phase == VmPhase::Failed).then(|| VmFailure {
                kind: VmFailureKind::App,
                message: "it ended".to_owned(),
                last_lines: Vec::new(),
            }),
            app: AppStatus::Absent,
            phases: Vec::new(),
            boundary: Boundary::None,
            hypervisor: "sim".to_owned(),
            source: Source::Boot,
            missed: None,
            is_warm: false,
            purpose: Purpose::Serve,
            boot_id: None,
            awake_for_ms: 0,
        }
    }

    fn tell(&mut self, vm: VmId, phase: VmPhase) {
        let status = self.status(vm, phase);
        if phase.is_over() {
            self.node.remove(&vm);
        } else if let Some(at) = self.node.get_mut(&vm) {
            at.1 = phase;
        }
        self.on(Event::Vm(status));
    }

    /// What a booted VM cannot do, and one whose app is ready does not do.
    fn break_on_template(&mut self, vm: VmId) {
        let (_release, phase) = self.node[&vm];
        if !self.warm.contains(&vm) || phase >= VmPhase::Ready {
            return;
        }
        let mut status = self.status(vm, VmPhase::Failed);
        status.source = Source::Snapshot(SnapshotId::from_bytes([1; 16]));
        if let Some(failure) = &mut status.failure {
            failure.kind = VmFailureKind::Snapshot;
        }
        self.node.remove(&vm);
        self.on(Event::Vm(status));
    }

    fn activity(&mut self, in_flight: u32) {
        if let Some(vm) = self.awake {
            self.in_flight = in_flight > 0;
            let app = AppKey::new("me", "notes");
            self.on(Event::Activity(Activity {
                app,
                vm,
                in_flight,
                idle_ms: 0,
            }));
        }
    }

    fn act(&mut self, act: Act) {
        match act {
            Act::Wake => {
                self.waiting = 1;
                self.on(Event::Wake);
            }
            Act::Sleep => self.on(Event::Sleep),
            Act::Restart => {
                self.waiting = 1;
                self.on(Event::Restart);
            }
            Act::Deploy => self.deploy(),
            Act::Hold => {
                self.holds += 1;
                self.on(Event::Hold);
            }
            Act::LetGo if self.holds > 0 => {
                self.holds -= 1;
                self.on(Event::LetGo);
            }
            Act::LetGo => {}
            Act::Disable => self.admit(Admission::Disabled),
            Act::Enable => self.admit(Admission::Enabled),
            Act::Remove => self.intent = Intent::Removed,
            Act::Move(n) => self.advance(n),
            Act::End(n) => {
                if let Some(vm) = self.vm(n) {
                    self.tell(vm, VmPhase::Draining);
                }
            }
            Act::Die(n) => {
                if let Some(vm) = self.vm(n) {
                    self.tell(vm, VmPhase::Failed);
                }
            }
            Act::Break(n) => {
                if let Some(vm) = self.vm(n) {
                    self.break_on_template(vm);
                }
            }
            Act::Vanish(n) => {
                if let Some(vm) = self.vm(n) {
                    self.node.remove(&vm);
                    self.on(Event::Lost(vm));
                }
            }
            Act::Answer => self.answer(),
            Act::Busy => self.activity(1),
            Act::Idle => self.activity(0),
            Act::DoorBack => {
                self.asked = None;
                self.on(Event::DoorBack(Vec::new()));
            }
            Act::Crash => self.crash(),
            Act::Pass(ms) => self.now = self.now.after_ms(u64::from(ms) * 4),
        }
    }

    fn deploy(&mut self) {
        if self.life.deploying().is_some() || self.intent == Intent::Removed {
            return;
        }
        self.releases += 1;
        let operation = format!("op{}", self.releases);
        let target = target(self.releases, true);
        self.on(Event::Deploy { operation, target });
    }

    fn admit(&mut self, wanted: Admission) {
        if let Intent::App { admission, .. } = &mut self.intent {
            *admission = wanted;
        }
    }

    fn advance(&mut self, n: u8) {
        let Some(vm) = self.vm(n) else {
            return;
        };
        let next = match self.node[&vm].1 {
            VmPhase::Preparing => VmPhase::Booting,
            VmPhase::Booting | VmPhase::Forking => VmPhase::Thawing,
            VmPhase::Thawing => VmPhase::Ready,
            VmPhase::Draining => VmPhase::Stopped,
            other => other,
        };
        self.tell(vm, next);
    }

    fn answer(&mut self) {
        let Some((vm, force)) = self.asked else {
            return;
        };
        if self.in_flight && !force {
            self.asked = None;
            self.on(Event::Busy(vm));
        } else if !self.in_flight || self.awake != Some(vm) {
            self.asked = None;
            if self.awake == Some(vm) {
                self.awake = None;
            }
            self.on(Event::Reaped(vm));
        }
    }

    /// A new daemon knows only what store and node tell it; who waits asks again.
    fn crash(&mut self) {
        self.life = Life::default();
        self.asked = None;
        self.holds = 0;
        self.awake = None;
        self.in_flight = false;
        let vms: Vec<_> = self
            .node
            .iter()
            .map(|(vm, (_, phase))| (*vm, *phase))
            .collect();
        for (vm, phase) in vms {
            self.tell(vm, phase);
        }
        if self.waiting > 0 {
            self.on(Event::Wake);
        }
    }

    /// Steps until nothing is left to do, and does it.
    fn settle(&mut self) -> Result<Option<Moment>, TestCaseError> {
        for _ in 0..50 {
            self.next_vm = self.next_vm.wrapping_add(1);
            let mut bits = [self.next_vm; 16];
            bits[..8].copy_from_slice(&self.now.0.to_le_bytes());
            let mut fresh = Some(VmId::from_bytes(bits));
            let timing = Timing::default();
            let step = self.life.step(&self.intent, self.now, &timing, &mut fresh);
            if step.effects.is_empty() && step.due.is_none_or(|due| due > self.now) {
                return Ok(step.due);
            }
            for effect in step.effects {
                self.perform(effect)?;
            }
        }
        Err(TestCaseError::fail("it never settles"))
    }

    fn start(&mut self, vm: VmId, release: u64, begin: Begin) -> Result<(), TestCaseError> {
        if begin == Begin::Warm {
            self.warm.insert(vm);
        }
        let old = self.node.insert(vm, (release, VmPhase::Preparing));
        prop_assert!(old.is_none(), "an id was used twice");
        let allowed = if self.life.deploying().is_some() {
            2
        } else {
            1
        };
        let stopping = self.draining_old();
        prop_assert!(
            self.node.len() <= allowed + stopping,
            "{} VMs at once, {allowed} allowed",
            self.node.len()
        );
        self.on(Event::Accepted(vm));
        Ok(())
    }

    fn perform(&mut self, effect: Effect) -> Result<(), TestCaseError> {
        match effect {
            Effect::Start { vm, release, begin } => self.start(vm, release, begin)?,
            Effect::Remind { vm, .. } => {
                prop_assert!(self.node.contains_key(&vm), "a reminder to nobody");
            }
            Effect::Stop { vm, .. } => {
                let stage = self.life.vms.get(&vm).map(|life| life.stage);
                prop_assert!(
                    stage != Some(Stage::Leaving) || self.awake != Some(vm),
                    "a VM that leaves is stopped while the gateway sends requests to it"
                );
                if self.node.contains_key(&vm) {
                    self.tell(vm, VmPhase::Draining);
                } else {
                    self.on(Event::Lost(vm));
                }
            }
            Effect::Suspend { vm, .. } => {
                prop_assert!(self.awake != Some(vm), "suspended while requests come");
                if self.now.0.is_multiple_of(3) {
                    self.on(Event::NotSuspended(vm));
                } else if self.node.contains_key(&vm) {
                    self.on(Event::Suspended(vm));
                    self.tell(vm, VmPhase::Draining);
                }
            }
            Effect::Close { vm, force } => {
                self.asked = Some((vm, force));
                if force && self.awake == Some(vm) {
                    self.awake = None;
                    self.in_flight = false;
                }
            }
            Effect::Awake { vm, .. } => {
                prop_assert!(self.node.contains_key(&vm), "awake without a VM");
                if self.awake != Some(vm) {
                    self.in_flight = false;
                }
                self.awake = Some(vm);
                self.waiting = 0;
            }
            Effect::WakeFailed(_) => {
                prop_assert_eq!(self.waiting, 1, "an answer to nobody");
                self.waiting = 0;
            }
            Effect::Gone { vm, .. } => {
                if self.awake == Some(vm) {
                    self.awake = None;
                }
            }
            Effect::Promote { release, vm, .. } => {
                if let Intent::App { live, .. } = &mut self.intent {
                    *live = Some(target(release, true));
                    self.on(Event::Promoted(vm));
                } else {
                    let failure = Failure::new(ErrorCode::NotFound, "removed");
                    self.on(Event::NotPromoted(vm, failure));
                }
            }
            Effect::Live { .. } => {
                prop_assert!(
                    self.life.deploying().is_none(),
                    "it is live and still tried"
                );
            }
            Effect::DeployFailed { .. } => {}
        }
        Ok(())
    }

    /// VMs that were replaced by a deploy, or whose trial failed: they end on their own.
    fn draining_old(&self) -> usize {
        let serving = self.life.awake();
        let over = |stage| matches!(stage, Stage::Closing { .. } | Stage::Stopping);
        let vms = self.life.vms.iter();
        let others = vms.filter(|(vm, life)| Some(**vm) != serving && over(life.stage));
        others.count()
    }

    fn check(&self, due: Option<Moment>) -> Result<(), TestCaseError> {
        let trying = self.life.deploying().is_some();
        let active = |stage| matches!(stage, Stage::Starting | Stage::Serving);
        let serves = self.life.vms.values().filter(|vm| active(vm.stage)).count();
        prop_assert!(serves <= 1, "two VMs serve or start");
        prop_assert!(trying || !self.life.vms.values().any(|vm| vm.stage == Stage::Trying));
        for vm in self.node.keys() {
            prop_assert!(self.life.vms.contains_key(vm), "a VM that nobody knows");
        }
        let waits = self.waiting > 0;
        prop_assert_eq!(waits, self.life.wake, "a wake was forgotten");
        if waits || !self.life.is_asleep() {
            let idle_for_ever = self.life.awake().is_some();
            prop_assert!(
                due.is_some() || idle_for_ever || trying,
                "it waits for nothing: {:?}",
                self.life
            );
        }
        if self.intent == Intent::Removed {
            prop_assert!(self.life.awake().is_none());
        }
        Ok(())
    }

    /// Everything goes well from now on: chance has no say.
    fn calm(&mut self) -> Result<(), TestCaseError> {
        self.holds = 0;
        self.life.holds = 0;
        for _ in 0..150 {
            let due = self.settle()?;
            self.check(due)?;
            self.activity(0);
            let vms: Vec<_> = self.node.keys().copied().collect();
            for n in 0..vms.len() {
                self.advance(u8::try_from(n).unwrap());
            }
            self.settle()?;
            self.answer();
            let due = self.settle()?;
            let moving = |phase: &VmPhase| *phase != VmPhase::Ready;
            self.now = match due {
                Some(due) if !self.node.values().any(|(_, phase)| moving(phase)) => due,
                _ => self.now.after_ms(100),
            };
        }
        Ok(())
    }
}

fn target(release: u64, sleeps: bool) -> Target {
    Target {
        release,
        idle_after_ms: sleeps.then_some(60_000),
        suspend_ms: release.is_multiple_of(2).then_some(10_000),
        ready_ms: 30_000,
    }
}

proptest! {
    #![proptest_config(proptest::test_runner::Config {
        cases: 1500, failure_persistence: None, ..Default::default()
    })]

    #[test]
    fn one_vm_per_app_every_wake_answered_and_idle_implies_reaped(
        acts in proptest::collection::vec(act(), 1..60),
    ) {
        let mut world = World::new(true);
        for act in acts {
            world.act(act);
            let due = world.settle()?;
            world.check(due)?;
        }
        // With idle edges at every look nothing is ever idle for long, so time passes in between.
        world.calm()?;
        prop_assert_eq!(world.waiting, 0, "a wake was never answered: {:?}", world.life);
        prop_assert!(world.life.deploying().is_none(), "a deploy never ended");
        for _ in 0..20 {
            world.now = world.now.after_ms(61_000);
            world.settle()?;
            world.answer();
            world.settle()?;
            let vms = world.node.len();
            for n in 0..vms {
                world.advance(u8::try_from(n).unwrap());
            }
            world.settle()?;
        }
        prop_assert!(world.node.is_empty(), "idle and not reaped: {:?}", world.life);
    }

    #[test]
    fn an_app_that_never_sleeps_is_brought_back(
        acts in proptest::collection::vec(act(), 1..40),
    ) {
        let mut world = World::new(false);
        for act in acts {
            if matches!(act, Act::Deploy | Act::Remove | Act::Disable | Act::Sleep) {
                continue;
            }
            world.act(act);
            let due = world.settle()?;
            world.check(due)?;
        }
        world.calm()?;
        prop_assert!(world.life.awake().is_some(), "{:?}", world.life);
    }
}

fn run(world: &mut World, acts: &[Act]) {
    for act in acts {
        world.act(*act);
        world.settle().unwrap();
    }
}

#[test]
fn a_deploy_waits_for_a_vm_that_its_node_ends_beside_another() {
    let mut world = World::new(true);
    let acts = [
        Act::Deploy,
        Act::Restart,
        Act::Move(103),
        Act::Move(83),
        Act::Pass(0),
        Act::Move(19),
        Act::Move(84),
        Act::End(31),
        Act::Move(110),
        Act::Move(8),
        Act::Deploy,
    ];
    run(&mut world, &acts);
    assert_eq!(world.node.len(), 2, "{:?}", world.life);
    world.calm().unwrap();
    assert!(world.life.deploying().is_none(), "{:?}", world.life);
}

#[test]
fn a_crash_loop_is_paused_longer_each_time() {
    let mut world = World::new(true);
    let mut pauses = Vec::new();
    for _ in 0..8 {
        run(&mut world, &[Act::Wake, Act::Die(0)]);
        let failure = world.life.last_failure.clone().unwrap();
        pauses.push(failure.retry_after_ms);
        run(&mut world, &[Act::Wake]);
        assert!(world.node.is_empty(), "no start before the pause is over");
        world.now = world.life.breaker.until;
    }
    assert_eq!(
        pauses,
        [1000, 2000, 4000, 8000, 16_000, 32_000, 60_000, 60_000]
    );
    run(
        &mut world,
        &[Act::Wake, Act::Move(0), Act::Move(0), Act::Move(0)],
    );
    assert!(world.life.awake().is_some());
}

#[test]
fn a_wake_after_a_vm_that_died_waits_for_the_next_one() {
    let mut world = World::new(true);
    let ready = [Act::Wake, Act::Move(0), Act::Move(0), Act::Move(0)];
    run(&mut world, &ready);
    let first = world.life.awake().unwrap();
    run(&mut world, &[Act::Die(0), Act::Wake]);
    assert_eq!(world.waiting, 1, "it is held through the short pause");
    assert!(world.node.is_empty());
    world.now = world.life.breaker.until;
    world.settle().unwrap();
    run(&mut world, &[Act::Move(0), Act::Move(0), Act::Move(0)]);
    assert_eq!(world.waiting, 0);
    assert!(world.life.awake().is_some_and(|vm| vm != first));
}

/// An app whose VM is ended by its node; what was decided at once.
fn leaving() -> (World, VmId, Vec<Effect>) {
    let mut world = World::new(true);
    let ready = [Act::Wake, Act::Move(0), Act::Move(0), Act::Move(0)];
    run(&mut world, &ready);
    let vm = world.life.awake().unwrap();
    world.tell(vm, VmPhase::Draining);
    let effects = step(&mut world);
    (world, vm, effects)
}

fn step(world: &mut World) -> Vec<Effect> {
    let mut fresh = Some(VmId::from_bytes([99; 16]));
    let timing = Timing::default();
    let step = world
        .life
        .step(&world.intent, world.now, &timing, &mut fresh);
    step.effects
}

#[test]
fn a_vm_that_its_node_ends_is_stopped_once_the_gateway_has_closed() {
    let (mut world, vm, effects) = leaving();
    assert_eq!(effects, [Effect::Close { vm, force: true }]);
    world.tell(vm, VmPhase::Draining);
    world.on(Event::Wake);
    assert_eq!(step(&mut world), [], "told once, and who comes is held");
    assert_eq!(world.life.view().standing, Standing::Draining);
    world.on(Event::DoorBack(Vec::new()));
    let again = [Effect::Close { vm, force: true }];
    assert_eq!(step(&mut world), again, "the question may have been lost");
    world.on(Event::Reaped(vm));
    let mode = StopMode::Kill;
    assert_eq!(step(&mut world), [Effect::Stop { vm, mode }]);
    world.tell(vm, VmPhase::Failed);
    assert_eq!(world.life.breaker.failures, 1, "it counts as a death");
    assert!(world.life.wake);
}

#[test]
fn what_is_in_flight_in_a_vm_that_leaves_is_cut_before_its_node_kills_it() {
    let (mut world, vm, _closed) = leaving();
    world.now = world.now.after(FAREWELL_MAX / 2);
    let effects = step(&mut world);
    assert!(matches!(effects[0], Effect::Gone { vm: of, .. } if of == vm));
    let mode = StopMode::Kill;
    assert_eq!(effects[1..], [Effect::Stop { vm, mode }]);
    world.on(Event::DoorBack(Vec::new()));
    assert_eq!(step(&mut world), [], "who is gone is not named again");
}

#[test]
fn a_vm_that_no_gateway_knows_is_stopped_when_its_node_ends_it() {
    let mut world = World::new(true);
    run(&mut world, &[Act::Wake, Act::Move(0), Act::Move(0)]);
    let vm = *world.node.keys().next().unwrap();
    world.tell(vm, VmPhase::Draining);
    let mode = StopMode::Kill;
    assert_eq!(step(&mut world), [Effect::Stop { vm, mode }]);
}

#[test]
fn a_wake_that_meets_a_reap_waits_for_the_old_vm_to_be_gone() {
    let mut world = World::new(true);
    run(
        &mut world,
        &[Act::Wake, Act::Move(0), Act::Move(0), Act::Move(0)],
    );
    let first = world.life.awake().unwrap();
    world.now = world.now.after_ms(60_000);
    world.settle().unwrap();
    run(&mut world, &[Act::Answer, Act::Wake]);
    assert_eq!(world.node.len(), 1);
    run(&mut world, &[Act::Move(0)]);
    let second = *world.node.keys().next().unwrap();
    assert_ne!(first, second);
    run(&mut world, &[Act::Move(0), Act::Move(0), Act::Move(0)]);
    assert_eq!(world.life.awake(), Some(second));
    assert_eq!(world.waiting, 0);
}

#[test]
fn a_reap_answered_busy_is_asked_again_although_the_idle_edge_came_first() {
    let mut world = World::new(true);
    let ready = [Act::Wake, Act::Move(0), Act::Move(0), Act::Move(0)];
    run(&mut world, &ready);
    let vm = world.life.awake().unwrap();
    world.now = world.now.after_ms(60_000);
    world.settle().unwrap();
    assert_eq!(world.asked.take(), Some((vm, false)));
    // The gateway found a request, which ended, and its report overtook the answer to the reap.
    run(&mut world, &[Act::Busy, Act::Idle]);
    world.on(Event::Busy(vm));
    let due = world.settle().unwrap();
    assert_eq!(due, Some(world.now.after_ms(60_000)), "it is asked again");
    world.now = world.now.after_ms(60_000);
    world.settle().unwrap();
    assert_eq!(world.asked, Some((vm, false)));
}

#[test]
fn a_reap_answered_busy_waits_for_the_end_of_what_is_known_to_be_busy() {
    let mut world = World::new(true);
    let ready = [Act::Wake, Act::Move(0), Act::Move(0), Act::Move(0)];
    run(&mut world, &ready);
    world.now = world.now.after_ms(60_000);
    world.settle().unwrap();
    run(&mut world, &[Act::Busy, Act::Answer]);
    assert_eq!(world.settle().unwrap(), None, "the idle edge will come");
}

#[test]
fn a_wake_outlives_a_vm_that_a_restart_of_the_daemon_left_half_made() {
    let mut world = World::new(true);
    run(&mut world, &[Act::Wake]);
    let half_made = *world.node.keys().next().unwrap();
    // The next daemon lists it, the gateway asks again, and the node takes it away.
    run(&mut world, &[Act::Crash, Act::Die(0)]);
    assert_eq!(world.waiting, 1, "who waits is not told of a restart");
    let next = *world.node.keys().next().expect("another is started");
    assert_ne!(half_made, next);
    run(&mut world, &[Act::Die(0)]);
    assert_eq!(world.waiting, 0, "a start of its own that fails is told");
}

#[test]
fn a_list_that_was_on_its_way_does_not_turn_a_vm_back() {
    let mut world = World::new(true);
    run(
        &mut world,
        &[Act::Wake, Act::Move(0), Act::Move(0), Act::Move(0)],
    );
    let vm = world.life.awake().unwrap();
    let old = world.status(vm, VmPhase::Booting);
    world.on(Event::Vm(old));
    assert_eq!(world.life.vms[&vm].phase, VmPhase::Ready);
}

#[test]
fn a_template_that_breaks_delays_a_wake_and_never_fails_it() {
    let mut world = World::new(true);
    world.act(Act::Wake);
    world.settle().unwrap();
    let forked = *world.node.keys().next().unwrap();
    assert!(world.warm.contains(&forked));
    world.advance(0);
    world.act(Act::Break(0));
    let effects = step(&mut world);
    let [Effect::Start { vm, begin, .. }] = effects[..] else {
        panic!("{effects:?}");
    };
    assert_ne!(vm, forked);
    assert_eq!(begin, Begin::Cold);
    assert_eq!((world.waiting, world.life.breaker.failures), (1, 0));
}

#[test]
fn a_template_that_breaks_does_not_fail_a_deploy() {
    let mut world = World::new(true);
    world.act(Act::Deploy);
    world.settle().unwrap();
    world.act(Act::Break(0));
    let effects = step(&mut world);
    assert!(
        matches!(
            effects[..],
            [Effect::Start {
                release: 2,
                begin: Begin::Cold,
                ..
            }]
        ),
        "{effects:?}"
    );
}

#[test]
fn a_deploy_ends_for_who_waits_once_the_gateway_knows_its_vm() {
    let mut world = World::new(true);
    run(
        &mut world,
        &[Act::Wake, Act::Move(0), Act::Move(0), Act::Move(0)],
    );
    let old = world.life.awake().unwrap();
    world.act(Act::Deploy);
    world.settle().unwrap();
    let new = *world.node.keys().find(|vm| **vm != old).unwrap();
    for phase in [VmPhase::Booting, VmPhase::Thawing, VmPhase::Ready] {
        world.tell(new, phase);
    }
    let [Effect::Promote { vm, .. }] = step(&mut world)[..] else {
        panic!("it is not promoted");
    };
    assert_eq!(vm, new);
    world.on(Event::Promoted(new));
    let told = step(&mut world);
    assert!(
        matches!(
            told[..],
            [
                Effect::Awake { .. },
                Effect::Live { .. },
                Effect::Close { force: true, .. }
            ]
        ),
        "{told:?}"
    );
}
