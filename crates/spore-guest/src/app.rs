//! The life of the app's process, as a pure state machine.
//!
//! Driven by [`crate::runner`], which does what the effects say and reports what happened. Knows
//! neither processes nor sockets, and takes the time as an argument.
//!
//! ```text
//!            Start                 BecameReady
//!   Absent ────────▶ Starting ───────────────▶ Ready
//!   Stopped           │  ▲ │                    │
//!      ▲        Exited│  │ │Tick: AppUnready    │Exited
//!      │              ▼  │Spawned               ▼
//!      │             Backoff ◀──────────────────┘
//!      │                │ Stop
//!      └──── Ending ◀───┴── Stop (from Starting and Ready too)
//!         GroupGone
//! ```
//! A failed first spawn goes back to where it came from, since nothing ever ran; a failed later one
//! counts as an end.

use spore_wire::guest::{AppStatus, Exit};

/// The pause before the first restart; it doubles with each end.
pub const BACKOFF_FIRST_MS: u64 = 100;

/// The longest pause before a restart.
pub const BACKOFF_MAX_MS: u64 = 30_000;

/// An app that was ready for so long starts again after the shortest pause.
pub const STEADY_MS: u64 = 60_000;

/// How a program that could not be started counts: the shell's "not found".
const SPAWN_FAILED: Exit = Exit::Code { code: 127 };

/// Where the app is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AppState {
    /// Nobody has started it.
    Absent,
    /// It runs and is not ready.
    Starting {
        /// Its main process.
        pid: u32,
        /// When [`AppEffect::TellUnready`] is due; `None` once it was told.
        unready_at_ms: Option<u64>,
    },
    /// It runs and is ready.
    Ready {
        /// Its main process.
        pid: u32,
        /// When it became ready.
        since_ms: u64,
    },
    /// It ended and will be started again.
    Backoff {
        /// When.
        restart_at_ms: u64,
        /// How the last one ended.
        exit: Exit,
    },
    /// It was told to stop, and something of it is left.
    Ending {
        /// Its main process, as long as it has not ended.
        pid: Option<u32>,
        /// When whatever is left is killed; `None` once it was.
        kill_at_ms: Option<u64>,
    },
    /// It was stopped and nothing is left.
    Stopped,
}

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AppEvent {
    /// The main process runs.
    Spawned {
        /// Its id.
        pid: u32,
        /// How long it may take to become ready.
        ready_timeout_ms: u64,
    },
    /// A restart failed before there was a process.
    SpawnFailed,
    /// It is ready.
    BecameReady,
    /// The main process ended.
    Exited {
        /// Which; one of an earlier life is ignored.
        pid: u32,
        /// How.
        exit: Exit,
    },
    /// Somebody wants it stopped.
    Stop {
        /// Between SIGTERM and SIGKILL.
        grace_ms: u64,
    },
    /// No process of the app is left.
    GroupGone,
    /// Time passed.
    Tick,
}

/// What is to be done about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AppEffect {
    /// Start the main process again.
    Spawn,
    /// Ask the app's process group to end.
    Terminate,
    /// Kill whatever is left of the app.
    Kill,
    /// Give back what was held for the process: probe and relay.
    Release,
    /// Tell the host the new status.
    Tell,
    /// Tell the host that the app was not ready in time.
    TellUnready,
    /// Answer those who wait for the end.
    AnswerStopped,
}

/// The app, with what it remembers of its ends.
#[derive(Clone, Debug)]
pub struct AppLife {
    state: AppState,
    /// Ends since it was ready last, which is what the host is told.
    failures: u32,
    /// Ends since it was ready for [`STEADY_MS`], which is what the pause grows by.
    unsteady: u32,
}

impl Default for AppLife {
    fn default() -> Self {
        Self {
            state: AppState::Absent,
            failures: 0,
            unsteady: 0,
        }
    }
}

impl AppLife {
    /// Where it is.
    #[must_use]
    pub const fn state(&self) -> AppState {
        self.state
    }

    /// Whether a new app may be started.
    #[must_use]
    pub const fn may_start(&self) -> bool {
        matches!(self.state, AppState::Absent | AppState::Stopped)
    }

    /// What the host is told. An app that is ending still counts as what it was: it has a process.
    #[must_use]
    pub fn status(&self, now_ms: u64) -> AppStatus {
        match self.state {
            AppState::Absent => AppStatus::Absent,
            AppState::Starting { pid, .. } => AppStatus::Starting { pid },
            AppState::Ready { pid, .. } => AppStatus::Ready { pid },
            AppState::Backoff {
                restart_at_ms,
                exit,
            } => AppStatus::Backoff {
                failures: self.failures,
                restart_in_ms: restart_at_ms.saturating_sub(now_ms),
                exit,
            },
            AppState::Ending { pid: Some(pid), .. } => AppStatus::Starting { pid },
            AppState::Ending { pid: None, .. } | AppState::Stopped => AppStatus::Stopped,
        }
    }

    /// When [`AppEvent::Tick`] is due.
    #[must_use]
    pub const fn deadline_ms(&self) -> Option<u64> {
        match self.state {
            AppState::Starting { unready_at_ms, .. } => unready_at_ms,
            AppState::Backoff { restart_at_ms, .. } => Some(restart_at_ms),
            AppState::Ending { kill_at_ms, .. } => kill_at_ms,
            AppState::Absent | AppState::Ready { .. } | AppState::Stopped => None,
        }
    }

    /// The transition table. What is not legal in a state changes nothing.
    #[must_use]
    pub fn step(&mut self, now_ms: u64, event: AppEvent) -> Vec<AppEffect> {
        match (self.state, event) {
            (
                AppState::Absent | AppState::Stopped | AppState::Backoff { .. },
                AppEvent::Spawned {
                    pid,
                    ready_timeout_ms,
                },
            ) => self.spawned(pid, now_ms.saturating_add(ready_timeout_ms)),
            (AppState::Backoff { .. }, AppEvent::SpawnFailed) => self.ended(now_ms, SPAWN_FAILED),
            (AppState::Starting { pid, .. }, AppEvent::BecameReady) => {
                self.failures = 0;
                self.state = AppState::Ready {
                    pid,
                    since_ms: now_ms,
                };
                vec![AppEffect::Tell]
            }
            (AppState::Starting { pid, .. }, AppEvent::Exited { pid: of, exit }) if pid == of => {
                self.ended(now_ms, exit)
            }
            (AppState::Ready { pid, since_ms }, AppEvent::Exited { pid: of, exit })
                if pid == of =>
            {
                if now_ms.saturating_sub(since_ms) >= STEADY_MS {
                    self.unsteady = 0;
                }
                self.ended(now_ms, exit)
            }
            (AppState::Ending { kill_at_ms, .. }, AppEvent::Exited { pid: of, .. })
                if self.runs(of) =>
            {
                // What outlives the main process has lost the one that would end it: no grace.
                self.state = AppState::Ending {
                    pid: None,
                    kill_at_ms: None,
                };
                let killed = kill_at_ms.is_none();
                if killed {
                    vec![]
                } else {
                    vec![AppEffect::Kill]
                }
            }
            (_, AppEvent::Stop { grace_ms }) => self.stop(now_ms, grace_ms),
            (AppState::Ending { pid: None, .. }, AppEvent::GroupGone) => {
                self.state = AppState::Stopped;
                self.failures = 0;
                self.unsteady = 0;
                vec![AppEffect::Tell, AppEffect::AnswerStopped]
            }
            (_, AppEvent::Tick) => self.tick(now_ms),
            _ => vec![],
        }
    }

    fn runs(&self, wanted: u32) -> bool {
        match self.state {
            AppState::Starting { pid, .. } | AppState::Ready { pid, .. } => pid == wanted,
            AppState::Ending { pid, .. } => pid == Some(wanted),
            AppState::Absent | AppState::Backoff { .. } | AppState::Stopped => false,
        }
    }

    fn spawned(&mut self, pid: u32, unready_at_ms: u64) -> Vec<AppEffect> {
        self.state = AppState::Starting {
            pid,
            unready_at_ms: Some(unready_at_ms),
        };
        vec![AppEffect::Tell]
    }

    fn ended(&mut self, now_ms: u64, exit: Exit) -> Vec<AppEffect> {
        self.failures = self.failures.saturating_add(1);
        let doublings = self.unsteady.min(16);
        self.unsteady = self.unsteady.saturating_add(1);
        let pause = (BACKOFF_FIRST_MS << doublings).min(BACKOFF_MAX_MS);
        self.state = AppState::Backoff {
            restart_at_ms: now_ms.saturating_add(pause),
            exit,
        };
        vec![AppEffect::Kill, AppEffect::Release, AppEffect::Tell]
    }

    fn stop(&mut self, now_ms: u64, grace_ms: u64) -> Vec<AppEffect> {
        match self.state {
            AppState::Absent | AppState::Stopped => vec![AppEffect::AnswerStopped],
            AppState::Backoff { .. } => {
                self.state = AppState::Ending {
                    pid: None,
                    kill_at_ms: None,
                };
                vec![AppEffect::Kill]
            }
            AppState::Starting { pid, .. } | AppState::Ready { pid, .. } => {
                self.state = AppState::Ending {
                    pid: Some(pid),
                    kill_at_ms: Some(now_ms.saturating_add(grace_ms)),
                };
                vec![AppEffect::Release, AppEffect::Terminate]
            }
            AppState::Ending { pid, kill_at_ms } => {
                // A second stop may hurry the first, never slow it.
                let sooner = now_ms.saturating_add(grace_ms);
                self.state = AppState::Ending {
                    pid,
                    kill_at_ms: kill_at_ms.map(|at| at.min(sooner)),
                };
                vec![]
            }
        }
    }

    fn tick(&mut self, now_ms: u64) -> Vec<AppEffect> {
        if self.deadline_ms().is_none_or(|at| now_ms < at) {
            return vec![];
        }
        match self.state {
            AppState::Starting { pid, .. } => {
                self.state = AppState::Starting {
                    pid,
                    unready_at_ms: None,
                };
                vec![AppEffect::TellUnready]
            }
            AppState::Backoff { .. } => vec![AppEffect::Spawn],
            AppState::Ending { pid, .. } => {
                self.state = AppState::Ending {
                    pid,
                    kill_at_ms: None,
                };
                vec![AppEffect::Kill]
            }
            AppState::Absent | AppState::Ready { .. } | AppState::Stopped => vec![],
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{Just, Strategy, any, prop, prop_assert, prop_assert_eq, prop_oneof};
    use proptest::proptest;
    use spore_wire::guest::{AppStatus, Exit};

    use super::{AppEffect, AppEvent, AppLife, AppState, BACKOFF_MAX_MS, STEADY_MS};

    const SPAWNED: AppEvent = AppEvent::Spawned {
        pid: 7,
        ready_timeout_ms: 1000,
    };
    const CRASHED: AppEvent = AppEvent::Exited {
        pid: 7,
        exit: Exit::Code { code: 1 },
    };

    fn ran(events: &[(u64, AppEvent)]) -> (AppLife, Vec<AppEffect>) {
        let mut life = AppLife::default();
        let mut last = vec![];
        for (now, event) in events {
            last = life.step(*now, *event);
        }
        (life, last)
    }

    #[test]
    fn pauses_double_up_to_the_limit() {
        let mut life = AppLife::default();
        let mut pauses = vec![];
        let _told = life.step(0, SPAWNED);
        for _end in 0..12 {
            let _ended = life.step(0, CRASHED);
            pauses.push(life.deadline_ms().unwrap());
            let _told = life.step(0, SPAWNED);
        }
        assert_eq!(&pauses[..4], [100, 200, 400, 800]);
        assert_eq!(pauses.last(), Some(&BACKOFF_MAX_MS));
    }

    #[test]
    fn an_app_that_was_ready_for_long_restarts_soon() {
        let (life, _) = ran(&[
            (0, SPAWNED),
            (0, CRASHED),
            (0, SPAWNED),
            (10, AppEvent::BecameReady),
            (10 + STEADY_MS, CRASHED),
        ]);
        assert_eq!(life.deadline_ms(), Some(10 + STEADY_MS + 100));
    }

    #[test]
    fn one_that_crashes_right_after_it_was_ready_still_backs_off() {
        let (life, _) = ran(&[
            (0, SPAWNED),
            (0, CRASHED),
            (0, SPAWNED),
            (1, AppEvent::BecameReady),
            (2, CRASHED),
        ]);
        assert_eq!(life.deadline_ms(), Some(202));
        let AppStatus::Backoff { failures, .. } = life.status(2) else {
            panic!("{:?}", life.status(2));
        };
        assert_eq!(failures, 1);
    }

    #[test]
    fn unready_is_told_once_and_the_app_goes_on() {
        let (mut life, last) = ran(&[(0, SPAWNED), (1000, AppEvent::Tick)]);
        assert_eq!(last, [AppEffect::TellUnready]);
        assert_eq!(life.step(5000, AppEvent::Tick), []);
        assert_eq!(life.step(6000, AppEvent::BecameReady), [AppEffect::Tell]);
    }

    #[test]
    fn a_stop_asks_waits_kills_and_answers_when_nothing_is_left() {
        let (mut life, last) = ran(&[(0, SPAWNED), (5, AppEvent::Stop { grace_ms: 100 })]);
        assert_eq!(last, [AppEffect::Release, AppEffect::Terminate]);
        assert_eq!(life.step(104, AppEvent::Tick), []);
        assert_eq!(life.step(105, AppEvent::Tick), [AppEffect::Kill]);
        assert_eq!(
            life.step(106, AppEvent::GroupGone),
            [],
            "the main process is still there"
        );
        assert_eq!(life.step(107, CRASHED), []);
        let last = life.step(108, AppEvent::GroupGone);
        assert_eq!(last, [AppEffect::Tell, AppEffect::AnswerStopped]);
        assert!(life.may_start());
    }

    #[test]
    fn the_end_of_an_earlier_process_is_ignored() {
        let (mut life, _) = ran(&[(0, SPAWNED)]);
        let other = AppEvent::Exited {
            pid: 6,
            exit: Exit::Code { code: 0 },
        };
        assert_eq!(life.step(1, other), []);
        assert!(matches!(life.state(), AppState::Starting { pid: 7, .. }));
    }

    fn event() -> impl Strategy<Value = AppEvent> {
        prop_oneof![
            (1_u32..4, 0_u64..500).prop_map(|(pid, ready_timeout_ms)| AppEvent::Spawned {
                pid,
                ready_timeout_ms
            }),
            Just(AppEvent::SpawnFailed),
            Just(AppEvent::BecameReady),
            (1_u32..4, any::<u8>()).prop_map(|(pid, code)| AppEvent::Exited {
                pid,
                exit: Exit::Code { code }
            }),
            (0_u64..500).prop_map(|grace_ms| AppEvent::Stop { grace_ms }),
            Just(AppEvent::GroupGone),
            Just(AppEvent::Tick),
        ]
    }

    proptest! {
        #[test]
        fn whatever_happens_a_stop_gets_its_answer(
            events in prop::collection::vec((0_u64..300, event()), 0..40),
        ) {
            let mut life = AppLife::default();
            let mut now = 0;
            for (passed, event) in events {
                now += passed;
                let effects = life.step(now, event);
                prop_assert!(!effects.contains(&AppEffect::Spawn) || event == AppEvent::Tick);
                if let Some(at) = life.deadline_ms() {
                    prop_assert!(at <= now + BACKOFF_MAX_MS);
                }
            }
            let mut answered = life
                .step(now, AppEvent::Stop { grace_ms: 10 })
                .contains(&AppEffect::AnswerStopped);
            now += 10;
            let _killed = life.step(now, AppEvent::Tick);
            if let AppState::Ending { pid: Some(pid), .. } = life.state() {
                let exit = Exit::Signal { signal: 9 };
                let _ended = life.step(now, AppEvent::Exited { pid, exit });
            }
            let last = life.step(now, AppEvent::GroupGone);
            answered |= last.contains(&AppEffect::AnswerStopped);
            prop_assert!(answered);
            prop_assert!(life.may_start());
            prop_assert_eq!(life.deadline_ms(), None);
        }
    }
}
