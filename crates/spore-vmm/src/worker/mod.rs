//! The threads of a running machine: they run, pause and end together. Each of its processors is
//! one, and the one that drives its devices.
//!
//! ```text
//!              resume            pause: every worker says that it stands still
//!   Paused ◀──────────▶ Running
//!      │                   │
//!      └──────▶ Ended ◀────┘     with the first reason that anyone gave
//! ```
//!
//! What is wanted and what each worker is at is behind one lock. A worker looks at a flag before
//! each piece of work, and only when it is set takes the lock. What it may be waiting in meanwhile
//! (a guest, a poll) it is called back from, by a [`Kick`] that it gave when it started:
//!
//! ```text
//!   flag, kick, look     it sees the flag
//!   look, flag, kick     it is kicked where it waits; a kick that comes before it waits there
//!                        counts all the same, until the worker takes it back under the lock
//! ```
//!
//! A worker that panics ends the machine. Whoever owns the machine waits until all have ended.

#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::end::End;
use crate::kvm::bell::Bell;

/// Calls a worker back from where it may be waiting.
pub trait Kick: Send + fmt::Debug {
    /// Does so; counts until it is taken back.
    fn kick(&self, thread: &JoinHandle<()>);

    /// Takes it back: called by the worker's own thread, before it goes on.
    fn take_back(&self);
}

/// What all workers are to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Go on.
    Run,
    /// Stand still, with nothing half done.
    Pause,
    /// Return.
    End,
}

/// Why a machine does not stand still.
#[derive(Debug, thiserror::Error)]
pub enum PauseError {
    /// It ended before or meanwhile.
    #[error("the machine has ended: {0}")]
    Ended(Arc<End>),
    /// A worker is in something that takes too long. All go on.
    #[error("{worker} did not stand still within {limit_ms} ms; the machine goes on")]
    Late {
        /// Its name.
        worker: String,
        /// How long it had.
        limit_ms: u128,
    },
}

/// The workers of a machine, from outside. Ends them when it is dropped, and waits for that.
#[derive(Debug)]
pub struct Workers {
    team: Arc<Team>,
}

#[derive(Debug)]
struct Team {
    state: Mutex<State>,
    /// Told whenever the state has changed.
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    order: Order,
    /// The first reason; set exactly when the order is to end.
    end: Option<Arc<End>>,
    /// Rung when there is a reason.
    bell: Option<Arc<Bell>>,
    members: Vec<Member>,
}

#[derive(Debug)]
struct Member {
    name: String,
    is: Is,
    called: Arc<AtomicBool>,
    kick: Box<dyn Kick>,
    /// Until it is waited for.
    thread: Option<JoinHandle<()>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Is {
    Busy,
    Still,
    Gone,
}

impl Member {
    fn call(&self) {
        self.called.store(true, Ordering::SeqCst);
        if let (Some(thread), Is::Busy) = (&self.thread, self.is) {
            self.kick.kick(thread);
        }
    }
}

impl Team {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Each change of the state is whole at once; a panic is told by the worker that has it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `by` is the worker that ends it, if it is one: nobody needs to call it back.
    fn end(&self, end: End, by: Option<usize>) {
        let mut state = self.lock();
        if state.end.is_none() {
            state.end = Some(Arc::new(end));
            // Whoever waits for the end has further to go than the others.
            if let Some(bell) = &state.bell {
                bell.ring();
            }
            state.give(Order::End, by);
        }
        self.changed.notify_all();
    }
}

impl State {
    /// Tells all workers but the one that `by` is the number of, which sees the order by itself.
    fn give(&mut self, order: Order, by: Option<usize>) {
        self.order = order;
        for (number, member) in self.members.iter().enumerate() {
            if by != Some(number) {
                member.call();
            }
        }
    }
}

impl Default for Workers {
    fn default() -> Self {
        Self::new()
    }
}

impl Workers {
    /// None yet, and paused.
    #[must_use]
    pub fn new() -> Self {
        let state = State {
            order: Order::Pause,
            end: None,
            bell: None,
            members: Vec::new(),
        };
        Self {
            team: Arc::new(Team {
                state: Mutex::new(state),
                changed: Condvar::new(),
            }),
        }
    }

    /// Starts a worker, which first waits until all are to run.
    pub fn start(
        &self,
        name: &str,
        kick: impl Kick + 'static,
        work: impl FnOnce(Post) + Send + 'static,
    ) -> std::io::Result<()> {
        // Held until the worker is in the list: it looks for itself there.
        let mut state = self.team.lock();
        let called = Arc::new(AtomicBool::new(true));
        let (team, number) = (Arc::clone(&self.team), state.members.len());
        let its = Arc::clone(&called);
        let builder = thread::Builder::new().name(name.to_owned());
        // The post is made in the thread: where the kernel gives none, what was to run there is
        // dropped here, and a post would lock the state once more.
        let thread = builder.spawn(move || {
            work(Post {
                team,
                number,
                called: its,
            });
        })?;
        state.members.push(Member {
            name: name.to_owned(),
            is: Is::Busy,
            called,
            kick: Box::new(kick),
            thread: Some(thread),
        });
        Ok(())
    }

    /// Starts a worker before there is what it works with. It does `first`, and then waits for
    /// what its seat is given, or for the end.
    pub fn ahead<T: Send + 'static>(
        &self,
        name: &str,
        kick: impl Kick + 'static,
        first: impl FnOnce() -> Result<(), End> + Send + 'static,
        work: impl FnOnce(&Post, T) + Send + 'static,
    ) -> std::io::Result<Seat<T>> {
        let place = Arc::new(Mutex::new(None));
        let comes = Arc::clone(&place);
        self.start(name, kick, move |post| match first() {
            Err(end) => post.end(end),
            Ok(()) => {
                if let Some(with) = post.take(&comes) {
                    work(&post, with);
                }
            }
        })?;
        let team = Arc::clone(&self.team);
        Ok(Seat { place, team })
    }

    /// Rings a bell when the machine ends, or now if it has.
    pub fn ring_at_end(&self, bell: Arc<Bell>) {
        let mut state = self.team.lock();
        if state.end.is_some() {
            bell.ring();
        }
        state.bell = Some(bell);
    }

    /// Lets all run. Nothing once the machine has ended.
    pub fn resume(&self) {
        let mut state = self.team.lock();
        if state.order == Order::Pause {
            state.give(Order::Run, None);
        }
        self.team.changed.notify_all();
    }

    /// Lets all stand still, and waits until they do. When one does not within the limit, all run
    /// again.
    pub fn pause(&self, limit: Duration) -> Result<(), PauseError> {
        let mut state = self.team.lock();
        if state.order == Order::Run {
            state.give(Order::Pause, None);
        }
        let is_moving = |state: &mut State| {
            let busy = |member: &Member| member.is == Is::Busy;
            state.order == Order::Pause && state.members.iter().any(busy)
        };
        let waited = self
            .team
            .changed
            .wait_timeout_while(state, limit, is_moving);
        let (mut state, _timeout) = waited.unwrap_or_else(PoisonError::into_inner);
        if let Some(end) = &state.end {
            return Err(PauseError::Ended(Arc::clone(end)));
        }
        let late = state.members.iter().find(|member| member.is == Is::Busy);
        let Some(worker) = late.map(|member| member.name.clone()) else {
            return Ok(());
        };
        state.give(Order::Run, None);
        self.team.changed.notify_all();
        Err(PauseError::Late {
            worker,
            limit_ms: limit.as_millis(),
        })
    }

    /// Does something while all stand still, and lets none go on meanwhile. `None`, with nothing
    /// done, when they do not.
    pub fn while_still<R>(&self, work: impl FnOnce() -> R) -> Option<R> {
        let state = self.team.lock();
        let is_still = |member: &Member| member.is == Is::Still;
        let still = state.order == Order::Pause && state.members.iter().all(is_still);
        still.then(work)
    }

    /// Ends the machine, if nothing has before.
    pub fn end(&self, end: End) {
        self.team.end(end, None);
    }

    /// Waits until the machine has ended and all its workers with it; says why.
    #[must_use]
    pub fn wait(&self) -> Arc<End> {
        let state = self.team.lock();
        let is_there = |state: &mut State| {
            let gone = |member: &Member| member.is == Is::Gone;
            state.end.is_none() || !state.members.iter().all(gone)
        };
        let waited = self.team.changed.wait_while(state, is_there);
        let mut state = waited.unwrap_or_else(PoisonError::into_inner);
        let members = state.members.iter_mut();
        let threads: Vec<JoinHandle<()>> =
            members.filter_map(|member| member.thread.take()).collect();
        let end = state.end.clone();
        drop(state);
        for thread in threads {
            // What it panicked with was printed, and is the machine's end.
            drop(thread.join());
        }
        end.expect("it was waited for")
    }

    /// The reason, once there is one.
    #[must_use]
    pub fn ended(&self) -> Option<Arc<End>> {
        self.team.lock().end.clone()
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.end(End::Stopped);
        drop(self.wait());
    }
}

/// A worker that waits for what it works with.
#[derive(Debug)]
pub struct Seat<T> {
    place: Arc<Mutex<Option<T>>>,
    team: Arc<Team>,
}

impl<T> Seat<T> {
    /// Lets it begin. One that could not has said so, and is gone.
    pub fn give(self, with: T) {
        *self.place.lock().unwrap_or_else(PoisonError::into_inner) = Some(with);
        // It looks there under this lock, or waits.
        drop(self.team.lock());
        self.team.changed.notify_all();
    }
}

/// A worker's own side. Dropping it says that the worker is gone.
#[derive(Debug)]
pub struct Post {
    team: Arc<Team>,
    number: usize,
    called: Arc<AtomicBool>,
}

impl Post {
    /// Whether there may be another order than to run. Looked at before each piece of work.
    #[must_use]
    pub fn is_called(&self) -> bool {
        self.called.load(Ordering::SeqCst)
    }

    /// What is wanted now.
    #[must_use]
    pub fn order(&self) -> Order {
        self.team.lock().order
    }

    /// Stands still while that is wanted; then says whether to go on: [`Order::Run`] or
    /// [`Order::End`].
    #[must_use]
    pub fn stand(&self) -> Order {
        let mut state = self.team.lock();
        loop {
            let order = state.order;
            let Some(member) = state.members.get_mut(self.number) else {
                return Order::End;
            };
            if order == Order::Pause {
                if member.is != Is::Still {
                    member.is = Is::Still;
                    self.team.changed.notify_all();
                }
                let waited = self.team.changed.wait(state);
                state = waited.unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            member.is = Is::Busy;
            if order == Order::Run {
                // Under the lock: whoever wants something else comes after this.
                member.called.store(false, Ordering::SeqCst);
                member.kick.take_back();
            }
            return order;
        }
    }

    /// Waits for what its seat is given; `None` at the end.
    fn take<T>(&self, place: &Mutex<Option<T>>) -> Option<T> {
        let mut state = self.team.lock();
        while state.order != Order::End {
            let mut place = place.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(with) = place.take() {
                return Some(with);
            }
            drop(place);
            let waited = self.team.changed.wait(state);
            state = waited.unwrap_or_else(PoisonError::into_inner);
        }
        None
    }

    /// Ends the machine, if nothing has before.
    pub fn end(&self, end: End) {
        self.called.store(true, Ordering::SeqCst);
        self.team.end(end, Some(self.number));
        // This thread has only its own end left to do, and whoever waits may have been woken on the
        // same processor.
        thread::yield_now();
    }
}

impl Drop for Post {
    fn drop(&mut self) {
        if thread::panicking() {
            let worker = thread::current().name().unwrap_or_default().to_owned();
            self.team.end(End::Panic { worker }, Some(self.number));
        }
        let mut state = self.team.lock();
        if let Some(member) = state.members.get_mut(self.number) {
            member.is = Is::Gone;
        }
        drop(state);
        self.team.changed.notify_all();
    }
}
