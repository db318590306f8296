//! What an app is to the gateway: asleep, waking, awake, closing. Pure: no sockets, no clock.
//!
//! Driven by `wake/mod.rs` for real requests and by simulators directly; never does anything
//! itself, it only says what to do.
//!
//! # The states
//!
//! ```text
//!              Request (effect Wake, once)
//!    ┌──────┐ ───────────────────────────▶ ┌────────┐ ◀── Request: waits, up to waiters_max
//!    │ Cold │                              │ Waking │ ◀── Left: a waiter gave up
//!    └──────┘ ◀─────────────────────────── └────────┘
//!     ▲  │  ▲    WakeFailed, Unrouted           │ ▲
//!     │  │  │    (every waiter refused)          │ │ Request (effect Wake)
//!     │  │  │                              Awake │ │
//!     │  │  └──────── Gone ────────┐   (every    │ │
//!     │  │                         │    waiter   ▼ │
//!     │  │ Awake (unasked)      ┌──┴───┐ admitted) │
//!     │  └────────────────────▶ │ Warm │ ◀─────────┼─ Request: admitted
//!     │                         └──────┘           │
//!     │                             │ Reap when nothing is in flight, or forced
//!     │           Gone              ▼              │
//!     └──────────────────────── ┌─────────┐ ───────┘
//!                               │ Closing │
//!                               └─────────┘
//! ```
//!
//! # What holds
//!
//! - A waiter gets exactly one of `Admit` and `Refuse`, or it left before.
//! - `Wake` is said on the way into Waking only, and again only when a new session began.
//! - `Reaped` is said only when admission is closed and nothing is in flight.
//! - What is in flight is counted per VM: an older one may still be answering while the
//!   next one wakes.

use std::collections::BTreeSet;

use spore_wire::id::VmId;

/// A request that waits, as its driver names it; never used twice for an app.
pub type WaiterId = u64;

/// Where an app stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AppState {
    /// No VM may be connected to, and none was asked for.
    #[default]
    Cold,
    /// A wake was asked for and not answered.
    Waking,
    /// Requests are admitted to this VM.
    Warm {
        /// The VM.
        vm: VmId,
    },
    /// Admission to this VM is closed; it is not known to be gone.
    Closing {
        /// The VM.
        vm: VmId,
    },
}

/// What happens to an app.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AppEvent {
    /// A request came.
    Request {
        /// Its name, should it have to wait.
        waiter: WaiterId,
        /// The most that may wait, this one included.
        waiters_max: u32,
        /// The most that may be in flight, this one included.
        in_flight_max: u32,
    },
    /// A waiting request gave up: its client left or its deadline passed.
    Left {
        /// Which.
        waiter: WaiterId,
    },
    /// An admitted request, with its answer and whatever it was upgraded to, is over.
    Finished {
        /// The VM it was admitted to.
        vm: VmId,
        /// The driver's clock.
        now_ms: u64,
    },
    /// The daemon says that a VM may be connected to.
    Awake {
        /// Which.
        vm: VmId,
        /// The driver's clock.
        now_ms: u64,
    },
    /// The daemon could not wake the app.
    WakeFailed,
    /// Nothing leads to the app any more, or nobody may enter.
    Unrouted,
    /// The daemon wants admission closed.
    Reap {
        /// The VM.
        vm: VmId,
        /// Whether what is in flight does not keep it open.
        mode: ReapMode,
    },
    /// A VM is gone.
    Gone {
        /// Which.
        vm: VmId,
    },
    /// A new daemon connected, which knows nothing of wakes that its predecessor was asked for.
    SessionBegan,
}

/// How admission is closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReapMode {
    /// Only when nothing is in flight.
    IfIdle,
    /// In any case; what is in flight goes on.
    Force,
}

/// What the driver of a machine must do, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AppEffect {
    /// Ask the daemon to wake the app.
    Wake,
    /// Send this request to this VM; a `Finished` must follow.
    Admit {
        /// Which request.
        waiter: WaiterId,
        /// To where.
        vm: VmId,
    },
    /// Answer this request without the app.
    Refuse {
        /// Which request.
        waiter: WaiterId,
        /// Why.
        why: RefuseReason,
    },
    /// A VM became busy or idle.
    Edge,
    /// Close idle connections to this VM and keep no new ones.
    Retire {
        /// The VM.
        vm: VmId,
    },
    /// Cut every connection to this VM.
    Cut {
        /// The VM.
        vm: VmId,
    },
    /// Tell the daemon that admission is closed and nothing is in flight.
    Reaped {
        /// The VM.
        vm: VmId,
    },
    /// Tell the daemon that requests are in flight, so admission stays open.
    Busy {
        /// The VM.
        vm: VmId,
    },
}

/// Why a request is answered without the app.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RefuseReason {
    /// Too many wait already.
    QueueFull,
    /// Too many are in flight already.
    AppFull,
    /// The wake failed.
    WakeFailed,
    /// Nothing leads to the app any more.
    Unrouted,
}

/// How busy a VM is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Load {
    /// The VM.
    pub vm: VmId,
    /// Requests and upgrades in flight.
    pub in_flight: u32,
    /// When the last one ended, or the VM came awake, by the driver's clock.
    pub idle_since_ms: u64,
}

/// One app's state, its waiters and what is in flight.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AppMachine {
    state: AppState,
    waiters: BTreeSet<WaiterId>,
    live: Vec<Live>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Live {
    load: Load,
    owed: Owed,
}

/// Whether the daemon waits for a `Reaped`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Owed {
    Nothing,
    Reaped,
}

/// The transition as a function, for simulators and property tests.
#[must_use]
pub fn step(mut machine: AppMachine, event: AppEvent) -> (AppMachine, Vec<AppEffect>) {
    let mut effects = Vec::new();
    machine.apply(event, &mut effects);
    (machine, effects)
}

impl AppMachine {
    /// Where the app stands.
    #[must_use]
    pub const fn state(&self) -> AppState {
        self.state
    }

    /// How many requests wait.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.waiters.len()
    }

    /// The VMs that admit requests or still answer some.
    pub fn loads(&self) -> impl Iterator<Item = Load> + '_ {
        self.live.iter().map(|live| live.load)
    }

    /// Whether the machine holds nothing that a fresh one would not.
    #[must_use]
    pub fn is_blank(&self) -> bool {
        self.state == AppState::Cold && self.waiters.is_empty() && self.live.is_empty()
    }

    /// The VM that a request may be admitted to without waiting, if there is one: what
    /// `Request` does in Warm, without the list of effects. The second value says whether an
    /// `Edge` is due.
    pub fn admit(&mut self, in_flight_max: u32) -> Option<(VmId, bool)> {
        let AppState::Warm { vm } = self.state else {
            return None;
        };
        let live = self.live.iter_mut().find(|live| live.load.vm == vm)?;
        if live.load.in_flight >= in_flight_max {
            return None;
        }
        live.load.in_flight += 1;
        Some((vm, live.load.in_flight == 1))
    }

    /// Takes one event and appends what must be done.
    pub fn apply(&mut self, event: AppEvent, effects: &mut Vec<AppEffect>) {
        match event {
            AppEvent::Request {
                waiter,
                waiters_max,
                in_flight_max,
            } => self.request(waiter, waiters_max, in_flight_max, effects),
            AppEvent::Left { waiter } => {
                self.waiters.remove(&waiter);
            }
            AppEvent::Finished { vm, now_ms } => self.finished(vm, now_ms, effects),
            AppEvent::Awake { vm, now_ms } => self.awake(vm, now_ms, effects),
            AppEvent::WakeFailed => {
                if self.state == AppState::Waking {
                    self.state = AppState::Cold;
                    self.refuse_all(RefuseReason::WakeFailed, effects);
                }
            }
            AppEvent::Unrouted => {
                if self.state == AppState::Waking {
                    self.state = AppState::Cold;
                }
                self.refuse_all(RefuseReason::Unrouted, effects);
            }
            AppEvent::Reap { vm, mode } => self.reap(vm, mode, effects),
            AppEvent::Gone { vm } => {
                let known = self.live.iter().any(|live| live.load.vm == vm);
                self.live.retain(|live| live.load.vm != vm);
                match self.state {
                    AppState::Warm { vm: now } | AppState::Closing { vm: now } if now == vm => {
                        self.state = AppState::Cold;
                    }
                    _ => {}
                }
                if known {
                    effects.push(AppEffect::Cut { vm });
                }
            }
            AppEvent::SessionBegan => {
                if self.state == AppState::Waking {
                    effects.push(AppEffect::Wake);
                }
            }
        }
    }

    fn request(
        &mut self,
        waiter: WaiterId,
        waiters_max: u32,
        in_flight_max: u32,
        effects: &mut Vec<AppEffect>,
    ) {
        if let AppState::Warm { .. } = self.state {
            match self.admit(in_flight_max) {
                Some((vm, edge)) => {
                    effects.push(AppEffect::Admit { waiter, vm });
                    if edge {
                        effects.push(AppEffect::Edge);
                    }
                }
                None => effects.push(AppEffect::Refuse {
                    waiter,
                    why: RefuseReason::AppFull,
                }),
            }
            return;
        }
        if self.waiters.len() >= usize::try_from(waiters_max).unwrap_or(usize::MAX) {
            effects.push(AppEffect::Refuse {
                waiter,
                why: RefuseReason::QueueFull,
            });
            return;
        }
        self.waiters.insert(waiter);
        if self.state != AppState::Waking {
            self.state = AppState::Waking;
            effects.push(AppEffect::Wake);
        }
    }

    fn finished(&mut self, vm: VmId, now_ms: u64, effects: &mut Vec<AppEffect>) {
        // A request of a VM that is gone was written off together with it.
        let Some(live) = self.live.iter_mut().find(|live| live.load.vm == vm) else {
            return;
        };
        assert!(
            live.load.in_flight > 0,
            "more requests ended than were admitted"
        );
        live.load.in_flight -= 1;
        if live.load.in_flight > 0 {
            return;
        }
        live.load.idle_since_ms = now_ms;
        let owed = live.owed;
        effects.push(AppEffect::Edge);
        if self.state != (AppState::Warm { vm }) {
            self.live.retain(|live| live.load.vm != vm);
            effects.push(AppEffect::Retire { vm });
            if owed == Owed::Reaped {
                effects.push(AppEffect::Reaped { vm });
            }
        }
    }

    fn awake(&mut self, vm: VmId, now_ms: u64, effects: &mut Vec<AppEffect>) {
        if let AppState::Warm { vm: old } = self.state
            && old != vm
        {
            self.close(old, effects);
        }
        self.state = AppState::Warm { vm };
        let index = self.live.iter().position(|live| live.load.vm == vm);
        let index = index.unwrap_or_else(|| {
            self.live.push(Live {
                load: Load {
                    vm,
                    in_flight: 0,
                    idle_since_ms: now_ms,
                },
                owed: Owed::Nothing,
            });
            self.live.len() - 1
        });
        let live = &mut self.live[index];
        // The daemon opened again what it wanted closed.
        live.owed = Owed::Nothing;
        for waiter in std::mem::take(&mut self.waiters) {
            live.load.in_flight += 1;
            effects.push(AppEffect::Admit { waiter, vm });
        }
        effects.push(AppEffect::Edge);
    }

    fn reap(&mut self, vm: VmId, mode: ReapMode, effects: &mut Vec<AppEffect>) {
        let live = self.live.iter_mut().find(|live| live.load.vm == vm);
        let busy = live.as_ref().is_some_and(|live| live.load.in_flight > 0);
        match (busy, mode) {
            (true, ReapMode::IfIdle) => effects.push(AppEffect::Busy { vm }),
            (true, ReapMode::Force) => {
                if let Some(live) = live {
                    live.owed = Owed::Reaped;
                }
                if self.state == (AppState::Warm { vm }) {
                    self.state = AppState::Closing { vm };
                }
                effects.push(AppEffect::Retire { vm });
            }
            (false, _) => {
                if self.state == (AppState::Warm { vm }) {
                    self.state = AppState::Closing { vm };
                }
                self.live.retain(|live| live.load.vm != vm);
                effects.push(AppEffect::Retire { vm });
                effects.push(AppEffect::Reaped { vm });
            }
        }
    }

    /// Another VM took the place of `vm`.
    fn close(&mut self, vm: VmId, effects: &mut Vec<AppEffect>) {
        self.live
            .retain(|live| live.load.vm != vm || live.load.in_flight > 0);
        effects.push(AppEffect::Retire { vm });
    }

    fn refuse_all(&mut self, why: RefuseReason, effects: &mut Vec<AppEffect>) {
        for waiter in std::mem::take(&mut self.waiters) {
            effects.push(AppEffect::Refuse { waiter, why });
        }
    }
}
