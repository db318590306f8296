//! Every interleaving of results, stops, deaths and daemon crashes that a short life can have.

use proptest::prelude::{
    Just, Strategy, any, prop, prop_assert, prop_assert_eq, prop_oneof, proptest,
};
use spore_wire::node::{StopMode, VmFailureKind, VmPhase};

use super::{AgentSeen, AppSeen, Begin, Failure, Milestone, VmEffect, VmEvent, VmState, Work};
use crate::hypervisor::fork::Afterwards;

/// What the world does next to the machine under test.
#[derive(Clone, Copy, Debug)]
enum Move {
    /// The asking effect under way succeeds.
    Succeed,
    /// It fails.
    Fail,
    /// The VMM's process ends.
    Exit,
    /// Somebody asks for a stop.
    Stop(StopMode),
    /// The app crashes for good, or the agent is lost.
    Unsound,
    /// Somebody wants a ready VM captured.
    Capture(Afterwards),
    /// The daemon dies and the next one reads the journal.
    Crash,
}

fn moves() -> impl Strategy<Value = Vec<Move>> {
    prop::collection::vec(
        prop_oneof![
            12 => Just(Move::Succeed),
            1 => Just(Move::Fail),
            1 => Just(Move::Exit),
            1 => Just(Move::Stop(StopMode::Graceful)),
            1 => Just(Move::Stop(StopMode::Kill)),
            1 => Just(Move::Unsound),
            2 => Just(Move::Capture(Afterwards::GoesOn)),
            1 => Just(Move::Capture(Afterwards::Ends)),
            2 => Just(Move::Capture(Afterwards::Sleeps)),
            2 => Just(Move::Crash),
        ],
        0..60,
    )
}

fn begins() -> impl Strategy<Value = Begin> {
    prop_oneof![Just(Begin::Boot), Just(Begin::Fork)]
}

fn works() -> impl Strategy<Value = Work> {
    prop_oneof![Just(Work::App), Just(Work::Nothing), Just(Work::Inherited)]
}

/// The host as the effects leave it, and the checks on the way.
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is one independent fact of a model"
)]
#[derive(Default)]
struct World {
    journal: Option<Milestone>,
    made: bool,
    runs: bool,
    /// It was not let run, or no more.
    paused: bool,
    /// Its tenant's processes stand still.
    frozen: bool,
    attached: bool,
    thawed: bool,
    open: bool,
    app: bool,
    /// Its snapshot is whole: another VM may go on from it.
    sealed: bool,
    doomed: bool,
    finals: u32,
    releases: u32,
}

fn failure() -> Failure {
    Failure {
        kind: VmFailureKind::Died,
        message: "in a test".to_owned(),
    }
}

impl World {
    fn release(&mut self) {
        self.made = false;
        self.runs = false;
        self.paused = false;
        self.frozen = false;
        self.releases += 1;
    }

    fn complete_capture(&mut self, effect: VmEffect) -> VmEvent {
        match effect {
            VmEffect::Freeze => {
                self.frozen = true;
                VmEvent::Frozen
            }
            VmEffect::Pause => {
                self.paused = true;
                VmEvent::Paused
            }
            VmEffect::Capture => {
                self.runs &= !self.doomed;
                VmEvent::Captured
            }
            VmEffect::Seal => {
                self.sealed = true;
                VmEvent::Sealed
            }
            _ => {
                self.frozen = false;
                VmEvent::Unfrozen
            }
        }
    }
}

struct Run {
    work: Work,
    world: World,
    state: VmState,
    pending: Option<VmEffect>,
}

impl Run {
    fn new(begin: Begin, work: Work) -> Self {
        let mut run = Self {
            work,
            world: World::default(),
            state: VmState::Absent,
            pending: None,
        };
        run.feed(VmEvent::Start(begin));
        run
    }

    fn feed(&mut self, event: VmEvent) {
        let (state, effects) = self.state.clone().step(event);
        self.state = state;
        for (at, effect) in effects.iter().enumerate() {
            if effect.asks() {
                assert_eq!(at + 1, effects.len(), "an asking effect is the last");
                assert!(
                    !matches!(
                        self.pending,
                        Some(VmEffect::Prepare | VmEffect::Boot | VmEffect::Fork)
                    ),
                    "{effect:?} cuts {:?} off",
                    self.pending
                );
                self.pending = Some(*effect);
            }
            self.begin(*effect);
        }
        if self.state.is_over() {
            self.pending = None;
        }
    }

    /// What is true at the instant an effect begins.
    fn begin(&mut self, effect: VmEffect) {
        let world = &mut self.world;
        match effect {
            VmEffect::Journal(milestone) => {
                let wakes = world.journal == Some(Milestone::Sealing)
                    && milestone == Milestone::Started
                    && !world.sealed;
                let goes_back = world.journal > Some(milestone);
                assert!(wakes || !goes_back, "the journal goes back");
                world.doomed |= milestone >= Milestone::EndingStopped;
                world.journal = Some(milestone);
            }
            VmEffect::Prepare => assert_eq!(world.journal, Some(Milestone::Preparing)),
            VmEffect::Boot | VmEffect::Fork => {
                assert_eq!(world.journal, Some(Milestone::Prepared));
            }
            VmEffect::Resume => {
                assert!(world.journal >= Some(Milestone::Running));
                assert!(!world.sealed, "it goes on twice");
                assert!(world.attached, "nobody holds it");
            }
            VmEffect::ConnectAgent => assert!(!world.paused, "it cannot answer"),
            VmEffect::Attach => assert!(world.journal >= Some(Milestone::Booted)),
            VmEffect::Thaw => assert!(!world.thawed, "thawed twice"),
            VmEffect::DropSource => assert!(world.journal >= Some(Milestone::Thawed)),
            VmEffect::OpenNetwork => assert!(world.thawed, "opened before the thaw"),
            VmEffect::StartApp => {
                assert!(world.thawed && world.open && !world.app);
                assert_eq!(self.work, Work::App);
                assert!(world.journal >= Some(Milestone::Open));
            }
            VmEffect::Kill => {
                assert!(world.attached && world.doomed, "killed without a word");
                world.runs = false;
            }
            VmEffect::RemoveJournal => {
                assert!(!world.made && !world.runs, "forgot what is left");
                world.journal = None;
            }
            VmEffect::Report => {
                if self.state.phase() == VmPhase::Ready {
                    let worked = world.app || self.work != Work::App;
                    assert!(world.thawed && world.open && worked, "ready too early");
                }
                if self.state == VmState::Ready {
                    assert!(!world.paused && !world.frozen, "a VM that stands still");
                }
                if self.state.is_over() {
                    assert!(world.journal.is_none());
                    world.finals += 1;
                }
            }
            VmEffect::AwaitReady => assert_ne!(self.work, Work::Nothing),
            VmEffect::Freeze | VmEffect::Pause | VmEffect::Capture | VmEffect::Seal => {
                self.begin_capture(effect);
            }
            VmEffect::Unfreeze => assert!(!world.paused, "it cannot answer"),
            VmEffect::Shutdown => assert!(!world.paused && !world.frozen, "it cannot end"),
            VmEffect::TakeTurn | VmEffect::Release => {}
            VmEffect::Farewell => {
                assert!(world.runs, "nobody is there to wait for");
                assert_eq!(self.state.phase(), VmPhase::Draining);
                assert_eq!(world.journal, Some(Milestone::EndingFailed));
            }
        }
    }

    fn begin_capture(&self, effect: VmEffect) {
        let world = &self.world;
        match effect {
            VmEffect::Freeze => assert!(!world.frozen && !world.paused),
            VmEffect::Pause => assert!(world.frozen && !world.paused),
            VmEffect::Capture => {
                assert!(world.frozen && world.paused, "copied while it runs");
                let ends = matches!(
                    self.state,
                    VmState::Capturing {
                        afterwards: Afterwards::Ends,
                        ..
                    }
                );
                assert!(world.doomed || !ends, "killed without a word");
            }
            _ => {
                assert!(world.frozen && world.paused, "sealed while it runs");
                assert_eq!(world.journal, Some(Milestone::Sealing));
            }
        }
    }

    /// The effect under way has its result in the world; gives the event that tells of it.
    fn complete(&mut self, effect: VmEffect) -> VmEvent {
        let world = &mut self.world;
        match effect {
            VmEffect::TakeTurn => VmEvent::TurnTaken,
            VmEffect::Prepare => {
                world.made = true;
                VmEvent::Prepared
            }
            VmEffect::Boot => {
                world.runs = true;
                VmEvent::Booted
            }
            VmEffect::Fork => {
                world.runs = true;
                world.paused = true;
                VmEvent::Forked
            }
            VmEffect::Resume => {
                world.paused = false;
                VmEvent::Resumed
            }
            VmEffect::Attach => {
                if !world.runs {
                    return VmEvent::Failed(failure());
                }
                world.attached = true;
                VmEvent::Attached
            }
            VmEffect::ConnectAgent => VmEvent::AgentUp(AgentSeen {
                thawed: world.thawed && !world.frozen,
                frozen: world.frozen,
                work: match self.work {
                    Work::Inherited => Work::App,
                    work => work,
                },
                app: if world.app || self.work == Work::Inherited {
                    AppSeen::Ready
                } else {
                    AppSeen::Absent
                },
            }),
            VmEffect::Thaw => {
                world.thawed = true;
                VmEvent::Thawed
            }
            VmEffect::DropSource => VmEvent::SourceDropped,
            VmEffect::OpenNetwork => {
                world.open = true;
                VmEvent::NetworkOpen(self.work)
            }
            VmEffect::StartApp => {
                world.app = true;
                VmEvent::AppStarted
            }
            VmEffect::AwaitReady => VmEvent::AppReady,
            VmEffect::Freeze
            | VmEffect::Pause
            | VmEffect::Capture
            | VmEffect::Seal
            | VmEffect::Unfreeze => world.complete_capture(effect),
            VmEffect::Shutdown => VmEvent::ShutDown,
            VmEffect::Farewell => VmEvent::FarewellOver,
            VmEffect::Release => {
                world.release();
                VmEvent::Released
            }
            VmEffect::Journal(_) | VmEffect::RemoveJournal | VmEffect::Report | VmEffect::Kill => {
                unreachable!("asks nothing")
            }
        }
    }

    fn make(&mut self, a_move: Move) {
        if self.state.is_over() {
            return;
        }
        match a_move {
            Move::Succeed => {
                if let Some(effect) = self.pending.take() {
                    let event = self.complete(effect);
                    self.feed(event);
                }
            }
            Move::Fail => match self.pending.take() {
                None | Some(VmEffect::TakeTurn) => {}
                Some(VmEffect::Release) => self.feed(VmEvent::ReleaseFailed),
                // Its answer was lost, and not its work.
                Some(effect @ (VmEffect::Freeze | VmEffect::Pause)) => {
                    self.complete(effect);
                    self.feed(VmEvent::CaptureFailed);
                }
                Some(VmEffect::Capture | VmEffect::Seal) => self.feed(VmEvent::CaptureFailed),
                Some(_) => self.feed(VmEvent::Failed(failure())),
            },
            Move::Exit => {
                if self.world.attached {
                    self.world.runs = false;
                    self.feed(VmEvent::Exited(failure()));
                }
            }
            Move::Stop(mode) => self.feed(VmEvent::Stop(mode)),
            Move::Unsound => {
                if self.state == VmState::Ready {
                    self.feed(VmEvent::Failed(failure()));
                }
            }
            Move::Capture(afterwards) => {
                if self.state == VmState::Ready {
                    self.feed(VmEvent::Capture(afterwards));
                }
            }
            Move::Crash => self.crash(),
        }
    }

    fn crash(&mut self) {
        self.pending = None;
        self.world.attached = false;
        self.state = VmState::Absent;
        if self.world.sealed && self.world.journal == Some(Milestone::Sealing) {
            // The node finds the snapshot.
            self.world.journal = Some(Milestone::EndingStopped);
            self.world.doomed = true;
        }
        match self.world.journal {
            Some(milestone) => self.feed(VmEvent::Adopt(milestone)),
            // What is journaled as nothing is left as nothing.
            None => assert!(!self.world.made && !self.world.runs),
        }
    }
}

proptest! {
    #[test]
    fn every_life_ends_once_with_nothing_left(
        begin in begins(),
        work in works(),
        moves in moves(),
        kill in any::<bool>(),
    ) {
        let mut run = Run::new(begin, work);
        for a_move in moves {
            run.make(a_move);
        }
        let mode = if kill { StopMode::Kill } else { StopMode::Graceful };
        if run.state != VmState::Absent {
            run.make(Move::Stop(mode));
            for _step in 0..20 {
                if run.pending.is_none() && !run.state.is_over() {
                    // A move ate the turn that was waited for.
                    run.make(Move::Crash);
                    run.make(Move::Stop(mode));
                }
                run.make(Move::Succeed);
            }
            prop_assert!(run.state.is_over(), "stuck in {:?}", run.state);
            prop_assert_eq!(run.world.finals, 1);
            prop_assert!(run.world.releases >= 1);
        }
        prop_assert!(!run.world.made && !run.world.runs);
        prop_assert!(run.world.journal.is_none());
    }

    #[test]
    fn without_crashes_it_is_released_exactly_once(
        begin in begins(),
        work in works(),
        moves in moves(),
    ) {
        let mut run = Run::new(begin, work);
        for a_move in moves {
            if !matches!(a_move, Move::Crash) {
                run.make(a_move);
            }
        }
        run.make(Move::Stop(StopMode::Kill));
        for _step in 0..10 {
            run.make(Move::Succeed);
        }
        if run.state.is_over() {
            prop_assert_eq!(run.world.releases, 1);
            prop_assert_eq!(run.world.finals, 1);
        }
    }
}

/// A run that has begun `effect`.
fn run_until(effect: VmEffect) -> Run {
    let begin = match effect.is_of_forks() {
        true => Begin::Fork,
        false => Begin::Boot,
    };
    run_from(begin, effect)
}

fn run_from(begin: Begin, effect: VmEffect) -> Run {
    let mut run = Run::new(begin, Work::App);
    while run.pending != Some(effect) {
        run.make(Move::Succeed);
        run.make(Move::Capture(match effect.is_of_suspends() {
            true => Afterwards::Sleeps,
            false => Afterwards::GoesOn,
        }));
    }
    run
}

#[test]
fn a_life_without_incident_goes_through_every_phase_in_order() {
    for (begin, beginning) in [
        (Begin::Boot, VmPhase::Booting),
        (Begin::Fork, VmPhase::Forking),
    ] {
        let mut run = Run::new(begin, Work::App);
        let mut phases = vec![run.state.phase()];
        while run.state != VmState::Ready {
            run.make(Move::Succeed);
            phases.push(run.state.phase());
        }
        phases.dedup();
        let (preparing, thawing) = (VmPhase::Preparing, VmPhase::Thawing);
        assert_eq!(phases, [preparing, beginning, thawing, VmPhase::Ready]);
        assert!(phases.is_sorted());
    }
}

#[test]
fn a_daemon_killed_under_any_effect_after_the_identity_adopts_the_vm() {
    let mut seen = 0;
    let begins = [Begin::Boot, Begin::Fork];
    let lives = begins
        .into_iter()
        .flat_map(|begin| VmEffect::ALL.map(|effect| (begin, effect)));
    for (begin, effect) in lives {
        let of_an_end = matches!(
            effect,
            VmEffect::Shutdown | VmEffect::Farewell | VmEffect::Release
        );
        let of_another = match begin {
            Begin::Boot => effect.is_of_forks(),
            Begin::Fork => effect == VmEffect::Boot,
        };
        if !effect.asks() || of_an_end || of_another {
            continue;
        }
        for done in [false, true] {
            let mut run = run_from(begin, effect);
            if done {
                run.complete(effect);
            }
            let known = run.world.journal >= Some(Milestone::Booted);
            run.crash();
            while run.state != VmState::Ready && !run.state.is_over() {
                run.make(Move::Succeed);
            }
            // What is left of it is its snapshot.
            let sleeps = done && effect == VmEffect::Seal;
            let goes_on = known && !sleeps;
            assert_eq!(run.state == VmState::Ready, goes_on, "{effect:?}");
            seen += 1;
        }
    }
    assert_eq!(seen, 20 + 22 + 2 * 10);
}

#[test]
fn stop_is_ignored_after_failure() {
    let mut run = run_until(VmEffect::Boot);
    run.make(Move::Fail);
    run.make(Move::Stop(StopMode::Graceful));
    run.make(Move::Succeed);
    assert!(matches!(run.state, VmState::Failed(_)));
    let (state, effects) = run.state.clone().step(VmEvent::Stop(StopMode::Kill));
    assert_eq!(state, run.state);
    assert!(effects.is_empty());
}

#[test]
fn a_stop_waits_for_a_boot_under_way_and_then_takes_it_back() {
    for start in [VmEffect::Boot, VmEffect::Fork] {
        let mut run = run_until(start);
        run.make(Move::Stop(StopMode::Kill));
        assert_eq!(run.pending, Some(start));
        run.make(Move::Succeed);
        assert_eq!(run.pending, Some(VmEffect::Release));
        run.make(Move::Succeed);
        assert_eq!(run.state, VmState::Stopped);
    }
}

#[test]
fn a_fork_that_is_stopped_before_it_runs_never_runs() {
    for mode in [StopMode::Graceful, StopMode::Kill] {
        for under_way in [VmEffect::Attach, VmEffect::Resume] {
            let mut run = run_from(Begin::Fork, under_way);
            run.make(Move::Stop(mode));
            while !run.state.is_over() {
                assert_ne!(run.pending, Some(VmEffect::ConnectAgent));
                run.make(Move::Succeed);
            }
            assert_eq!(run.state, VmState::Stopped);
        }
    }
}

#[test]
fn a_fork_of_an_earlier_daemon_is_thawed_unless_it_was_under_its_own_name() {
    for thawed in [false, true] {
        let mut run = run_from(Begin::Fork, VmEffect::Thaw);
        run.world.thawed = thawed;
        run.crash();
        for effect in [VmEffect::Attach, VmEffect::Resume, VmEffect::ConnectAgent] {
            assert_eq!(run.pending, Some(effect));
            run.make(Move::Succeed);
        }
        let next = match thawed {
            true => VmEffect::DropSource,
            false => VmEffect::Thaw,
        };
        assert_eq!(run.pending, Some(next));
    }
}

#[test]
fn a_kill_overtakes_a_drain() {
    let mut run = run_until(VmEffect::AwaitReady);
    run.make(Move::Succeed);
    run.make(Move::Stop(StopMode::Graceful));
    assert_eq!(run.pending, Some(VmEffect::Shutdown));
    run.make(Move::Stop(StopMode::Kill));
    assert_eq!(run.pending, Some(VmEffect::Release));
}

#[test]
fn a_vm_that_fails_while_it_serves_runs_until_control_has_stopped_it_or_its_time_is_over() {
    for stopped in [true, false] {
        let mut run = run_until(VmEffect::AwaitReady);
        run.make(Move::Succeed);
        run.make(Move::Unsound);
        assert_eq!(run.pending, Some(VmEffect::Farewell));
        assert_eq!(run.state.phase(), VmPhase::Draining);
        assert!(run.world.runs, "nobody was told yet");
        run.feed(VmEvent::Failed(failure()));
        assert!(run.world.runs, "a second reason shortens nothing");
        if stopped {
            run.make(Move::Stop(StopMode::Kill));
        } else {
            run.make(Move::Succeed);
        }
        assert!(!run.world.runs);
        assert_eq!(run.pending, Some(VmEffect::Release));
        run.make(Move::Succeed);
        assert_eq!(run.state, VmState::Failed(failure()));
    }
}

#[test]
fn a_vm_that_nobody_can_have_visited_or_that_is_dead_gets_no_farewell() {
    let mut run = run_until(VmEffect::OpenNetwork);
    run.make(Move::Fail);
    assert_eq!(run.pending, Some(VmEffect::Release), "its policy is wrong");
    let mut run = run_until(VmEffect::AwaitReady);
    run.make(Move::Succeed);
    run.make(Move::Exit);
    assert_eq!(run.pending, Some(VmEffect::Release));
}

#[test]
fn a_vm_of_an_earlier_daemon_gets_its_farewell_when_its_agent_is_lost() {
    let mut run = run_until(VmEffect::AwaitReady);
    run.make(Move::Succeed);
    run.crash();
    run.make(Move::Succeed);
    run.make(Move::Succeed);
    assert_eq!(run.pending, Some(VmEffect::ConnectAgent));
    run.make(Move::Fail);
    assert_eq!(run.pending, Some(VmEffect::Farewell));
}

#[test]
fn a_drain_that_a_crash_interrupted_goes_on() {
    let mut run = run_until(VmEffect::AwaitReady);
    run.make(Move::Succeed);
    run.make(Move::Stop(StopMode::Graceful));
    run.crash();
    for effect in [VmEffect::Attach, VmEffect::Resume, VmEffect::ConnectAgent] {
        assert_eq!(run.pending, Some(effect));
        run.make(Move::Succeed);
    }
    assert_eq!(run.pending, Some(VmEffect::Shutdown));
}

#[test]
fn a_new_guest_that_claims_to_be_thawed_is_thawed_all_the_same() {
    let mut run = run_until(VmEffect::ConnectAgent);
    run.pending = None;
    run.feed(VmEvent::AgentUp(AgentSeen {
        thawed: true,
        frozen: false,
        work: Work::App,
        app: AppSeen::Ready,
    }));
    assert_eq!(run.pending, Some(VmEffect::Thaw));
}

#[test]
fn a_vm_without_an_app_is_ready_once_its_network_is_open_and_again_after_a_crash() {
    for begin in [Begin::Boot, Begin::Fork] {
        let mut run = Run::new(begin, Work::Nothing);
        while run.state != VmState::Ready {
            run.make(Move::Succeed);
        }
        assert_eq!(run.world.journal, Some(Milestone::Started));
        assert!(run.world.open && !run.world.app);
        run.crash();
        while run.state != VmState::Ready {
            run.make(Move::Succeed);
        }
        run.make(Move::Stop(StopMode::Graceful));
        assert_eq!(
            run.pending,
            Some(VmEffect::Shutdown),
            "it may have much to lose"
        );
    }
}

#[test]
fn an_app_that_goes_on_in_a_fork_is_awaited_and_not_started() {
    let mut run = Run::new(Begin::Fork, Work::Inherited);
    while run.pending != Some(VmEffect::OpenNetwork) {
        run.make(Move::Succeed);
    }
    run.make(Move::Succeed);
    assert_eq!(run.pending, Some(VmEffect::AwaitReady));
    assert_eq!(run.world.journal, Some(Milestone::Started));
}

/// A ready VM of which a capture has begun `effect`.
fn run_to_capture(effect: VmEffect, afterwards: Afterwards) -> Run {
    let mut run = run_until(VmEffect::AwaitReady);
    run.make(Move::Succeed);
    run.make(Move::Capture(afterwards));
    while run.pending != Some(effect) {
        run.make(Move::Succeed);
    }
    run
}

#[test]
fn a_captured_vm_goes_on_and_is_told_as_ready_all_the_while() {
    let mut run = run_to_capture(VmEffect::Freeze, Afterwards::GoesOn);
    for effect in [
        VmEffect::Freeze,
        VmEffect::Pause,
        VmEffect::Capture,
        VmEffect::Resume,
        VmEffect::Unfreeze,
    ] {
        assert_eq!(run.pending, Some(effect));
        assert_eq!(run.state.phase(), VmPhase::Ready);
        run.make(Move::Succeed);
    }
    assert_eq!(run.state, VmState::Ready);
    assert_eq!(run.world.journal, Some(Milestone::Started));
}

#[test]
fn whatever_fails_on_the_way_to_a_capture_the_vm_runs_again() {
    for failing in [VmEffect::Freeze, VmEffect::Pause, VmEffect::Capture] {
        let mut run = run_to_capture(failing, Afterwards::GoesOn);
        run.make(Move::Fail);
        while run.pending.is_some() {
            run.make(Move::Succeed);
        }
        assert_eq!(run.state, VmState::Ready, "{failing:?}");
        assert!(!run.world.paused && !run.world.frozen, "{failing:?}");
    }
}

#[test]
fn a_vm_that_does_not_run_again_is_ended() {
    for failing in [VmEffect::Resume, VmEffect::Unfreeze] {
        let mut run = run_to_capture(failing, Afterwards::GoesOn);
        run.make(Move::Fail);
        assert_eq!(run.pending, Some(VmEffect::Farewell), "{failing:?}");
        run.make(Move::Succeed);
        run.make(Move::Succeed);
        assert_eq!(run.state, VmState::Failed(failure()));
    }
}

#[test]
fn a_vm_that_ends_with_its_capture_is_journaled_so_and_its_end_cuts_nothing_off() {
    for fails in [false, true] {
        let mut run = run_to_capture(VmEffect::Capture, Afterwards::Ends);
        assert_eq!(run.world.journal, Some(Milestone::EndingStopped));
        run.make(Move::Exit);
        assert_eq!(run.pending, Some(VmEffect::Capture));
        run.make(if fails { Move::Fail } else { Move::Succeed });
        assert_eq!(run.pending, Some(VmEffect::Release));
        run.make(Move::Succeed);
        assert_eq!(run.state, VmState::Stopped);
    }
}

#[test]
fn a_vm_that_sleeps_ends_once_its_snapshot_is_whole_and_goes_on_if_it_is_not() {
    let mut run = run_to_capture(VmEffect::Seal, Afterwards::Sleeps);
    assert_eq!(run.world.journal, Some(Milestone::Sealing));
    run.make(Move::Succeed);
    assert_eq!(run.pending, Some(VmEffect::Release));
    run.make(Move::Succeed);
    assert_eq!(run.state, VmState::Stopped);

    let mut run = run_to_capture(VmEffect::Seal, Afterwards::Sleeps);
    run.make(Move::Fail);
    for effect in [VmEffect::Resume, VmEffect::Unfreeze] {
        assert_eq!(run.pending, Some(effect));
        run.make(Move::Succeed);
    }
    assert_eq!(run.state, VmState::Ready);
    assert_eq!(run.world.journal, Some(Milestone::Started));
}

#[test]
fn whatever_a_daemon_left_of_a_vm_that_was_to_sleep_it_is_its_snapshot_or_itself() {
    for sealed in [true, false] {
        let mut run = run_to_capture(VmEffect::Seal, Afterwards::Sleeps);
        run.world.sealed = sealed;
        run.crash();
        while run.pending.is_some() {
            run.make(Move::Succeed);
        }
        let state = match sealed {
            true => VmState::Stopped,
            false => VmState::Ready,
        };
        assert_eq!(run.state, state);
    }
}

#[test]
fn a_vm_that_is_to_sleep_and_to_stop_does_what_it_can_still_do() {
    let mut run = run_to_capture(VmEffect::Capture, Afterwards::Sleeps);
    run.make(Move::Stop(StopMode::Graceful));
    run.make(Move::Succeed);
    assert_eq!(run.pending, Some(VmEffect::Resume), "it is asked to stop");
    let mut run = run_to_capture(VmEffect::Seal, Afterwards::Sleeps);
    run.make(Move::Exit);
    run.make(Move::Unsound);
    assert_eq!(run.pending, Some(VmEffect::Seal), "all of it is captured");
    run.make(Move::Stop(StopMode::Kill));
    assert_eq!(run.pending, Some(VmEffect::Release));
}

#[test]
fn a_stop_waits_until_a_captured_vm_can_be_asked_and_a_kill_does_not() {
    for effect in [
        VmEffect::Freeze,
        VmEffect::Pause,
        VmEffect::Capture,
        VmEffect::Resume,
        VmEffect::Unfreeze,
    ] {
        let mut run = run_to_capture(effect, Afterwards::GoesOn);
        run.make(Move::Stop(StopMode::Graceful));
        assert_eq!(run.pending, Some(effect));
        while run.pending != Some(VmEffect::Shutdown) {
            run.make(Move::Succeed);
        }
        let mut run = run_to_capture(effect, Afterwards::GoesOn);
        run.make(Move::Stop(StopMode::Kill));
        assert_eq!(run.pending, Some(VmEffect::Release), "{effect:?}");
    }
}

#[test]
fn a_vm_that_an_earlier_daemon_left_standing_still_runs_before_it_is_told_as_ready() {
    for stop in [None, Some(StopMode::Graceful)] {
        let mut run = run_to_capture(VmEffect::Capture, Afterwards::GoesOn);
        run.crash();
        for effect in [VmEffect::Attach, VmEffect::Resume, VmEffect::ConnectAgent] {
            assert_eq!(run.pending, Some(effect));
            run.make(Move::Succeed);
            if let (VmEffect::Attach, Some(mode)) = (effect, stop) {
                run.make(Move::Stop(mode));
            }
        }
        assert_eq!(run.pending, Some(VmEffect::Unfreeze));
        run.make(Move::Succeed);
        match stop {
            None => assert_eq!(run.state, VmState::Ready),
            Some(_) => assert_eq!(run.pending, Some(VmEffect::Shutdown)),
        }
    }
}

#[test]
fn effect_names_are_unique() {
    let names: std::collections::BTreeSet<_> =
        VmEffect::ALL.iter().map(|effect| effect.name()).collect();
    assert_eq!(names.len(), VmEffect::ALL.len());
}
