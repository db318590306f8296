//! Keeps one sandbox: a task that owns its life and does what that decides.
//!
//! Started by a fork, or for what an earlier daemon left. Starts and stops are tasks of their own
//! whose outcome comes back as an event; what is written down is waited for.

use core::time::Duration;

use spore_api::error::ErrorCode;
use spore_wire::cause::chain;
use spore_wire::id::VmId;
use spore_wire::node::StopMode;
use tokio::sync::{mpsc, oneshot, watch};

use super::life::{Change, Effect, Event, Life, Standing};
use super::{SandboxRef, View};
use crate::converge::Converge;
use crate::converge::life::Failure;
use crate::nodes::NodesError;
use crate::store::record::encode;
use crate::store::record::sandbox::{Base, SandboxRecord, sandbox_key};
use crate::store::{CommitError, Transaction};

/// Until something that failed is tried again.
const AGAIN: Duration = Duration::from_secs(1);

/// Who waits for the end of something.
pub(super) type Waiter = oneshot::Sender<Result<(), Failure>>;

/// What a keeper is told.
#[derive(Debug)]
pub(super) enum Message {
    /// Something happened.
    Event(Event),
    /// Its owner wants it back at a snapshot.
    Rollback(Base, Waiter),
}

/// What a keeper works with.
pub(super) struct Keeper {
    pub(super) converge: Converge,
    pub(super) sandbox: SandboxRef,
    pub(super) life: Life,
    pub(super) record: SandboxRecord,
    pub(super) messages: mpsc::UnboundedReceiver<Message>,
    /// For the outcomes of starts and stops.
    pub(super) itself: mpsc::UnboundedSender<Message>,
    pub(super) view: watch::Sender<View>,
    pub(super) opened: Option<Waiter>,
}

/// Whether there is still a sandbox.
#[derive(PartialEq, Eq)]
enum Then {
    GoOn,
    End,
}

impl Keeper {
    /// Runs until the sandbox is gone; `effects` are what its life wanted first.
    pub(super) async fn run(mut self, effects: Vec<Effect>) {
        let mut rolled: Option<Waiter> = None;
        let mut then = self.perform(effects, &mut rolled).await;
        while then == Then::GoOn {
            let Some(message) = self.messages.recv().await else {
                return;
            };
            let event = match message {
                Message::Event(event) => event,
                Message::Rollback(to, waiter) => {
                    if rolled.as_ref().is_some_and(|waiter| !waiter.is_closed()) {
                        let message = "it is going back to a snapshot already: wait for that";
                        let busy = Failure::new(ErrorCode::Conflict, message);
                        // Who does not wait any more needs no answer.
                        drop(waiter.send(Err(busy)));
                        continue;
                    }
                    rolled = Some(waiter);
                    let new = crate::clock::next_vm(&*self.converge.inner.chance);
                    Event::Rollback { new, to }
                }
            };
            let effects = self.life.on(event, self.converge.now());
            then = self.perform(effects, &mut rolled).await;
        }
    }

    async fn perform(&mut self, effects: Vec<Effect>, rolled: &mut Option<Waiter>) -> Then {
        let mut effects = effects;
        loop {
            // That it is gone is told when its record is, too.
            if self.life.standing() != Standing::Gone {
                self.show();
            }
            let mut outcome = None;
            for effect in effects {
                tracing::debug!(sandbox = %self.sandbox, ?effect, "effect");
                match effect {
                    Effect::Save(change) => outcome = Some(self.save(change).await),
                    Effect::Start { vm, from } => self.spawn_start(vm, from),
                    Effect::Stop(vm) => self.spawn_stop(vm),
                    // Who does not wait any more needs no answer.
                    Effect::Opened(result) => drop(self.opened.take().map(|to| to.send(result))),
                    Effect::RolledBack(result) => drop(rolled.take().map(|to| to.send(result))),
                    Effect::Forget => {
                        self.forget().await;
                        return Then::End;
                    }
                }
            }
            let Some((next, record)) = outcome else {
                return Then::GoOn;
            };
            effects = self.life.on(next, self.converge.now());
            // Without the old VM, the new one is its VM although that is not written down.
            if self.life.open() == Some(record.vm) {
                self.record = record;
            }
        }
    }

    /// Tells everybody how it looks.
    fn show(&self) {
        let view = View::of(&self.life);
        self.view.send_if_modified(|shown| {
            let is_news = *shown != view;
            *shown = view;
            is_news
        });
    }

    /// Writes a change down; what came of it, and the record with the change.
    async fn save(&mut self, change: Change) -> (Event, SandboxRecord) {
        let mut record = self.record.clone();
        change.write(&mut record);
        let key = sandbox_key(&self.sandbox.account, &self.sandbox.id);
        let write = Transaction::default().put(key, encode(&record));
        match self.converge.inner.store.commit(write).await {
            Ok(_) => {
                self.record = record.clone();
                (Event::Saved(change), record)
            }
            Err(error) => {
                let text = chain(&error);
                tracing::error!(sandbox = %self.sandbox, error = text, "cannot be written down");
                let failure = Failure::new(ErrorCode::Internal, error.to_string());
                (Event::Unsaved(change, failure), record)
            }
        }
    }

    fn spawn_start(&self, vm: VmId, from: Base) {
        let (converge, sandbox) = (self.converge.clone(), self.sandbox.clone());
        let keeper = self.itself.clone();
        tokio::spawn(async move {
            let event = match converge.start_sandbox(&sandbox, vm, &from).await {
                Ok(()) => Event::Accepted(vm),
                Err(failure) => Event::Refused(vm, failure),
            };
            // Nobody waits for it when control stops.
            drop(keeper.send(Message::Event(event)));
        });
    }

    fn spawn_stop(&self, vm: VmId) {
        let (converge, sandbox) = (self.converge.clone(), self.sandbox.clone());
        let keeper = self.itself.clone();
        tokio::spawn(async move {
            while !keeper.is_closed() {
                match converge.inner.nodes.stop(vm, StopMode::Kill).await {
                    Ok(()) => return,
                    Err(NodesError::NoVm { .. }) => {
                        let over = Event::Over(vm, lost());
                        drop(keeper.send(Message::Event(over)));
                        return;
                    }
                    Err(error) => tracing::warn!(%sandbox, %vm, %error, "a stop was refused"),
                }
                tokio::time::sleep(AGAIN).await;
            }
        });
    }

    /// Deletes the record; then nobody finds the sandbox any more.
    async fn forget(&mut self) {
        let key = sandbox_key(&self.sandbox.account, &self.sandbox.id);
        loop {
            let delete = Transaction::default().delete(&key);
            match self.converge.inner.store.commit(delete).await {
                Ok(_) | Err(CommitError::Conflict { .. }) => break,
                Err(CommitError::Store(error)) => {
                    let (sandbox, error) = (&self.sandbox, chain(&error));
                    tracing::warn!(%sandbox, error, "a sandbox that is gone is not forgotten yet");
                }
            }
            tokio::time::sleep(AGAIN).await;
        }
        self.converge.sandboxes().remove(&self.sandbox);
        self.converge.drop_unneeded(self.life.base()).await;
        self.show();
    }
}

/// Why a VM is over that vanished.
pub(super) fn lost() -> Failure {
    let message = "its VM is not on its node any more";
    Failure::new(ErrorCode::AppFailed, message)
}

impl Converge {
    /// Asks the node for a VM of a sandbox.
    async fn start_sandbox(
        &self,
        sandbox: &SandboxRef,
        vm: VmId,
        from: &Base,
    ) -> Result<(), Failure> {
        let plan = self.fork_plan(from).await;
        let plan = plan.map_err(|error| error.failure())?;
        self.begin(plan.start(sandbox, vm)).await
    }
}
