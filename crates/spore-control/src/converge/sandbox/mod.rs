//! Sandboxes: VMs that are forked from a snapshot, used, brought back to it, and thrown away.
//!
//! ```text
//!   API ── fork ──▶ records ─▶ node: room for all at once ─▶ a keeper for each ─▶ open
//!   API ── rollback, remove ─▶ keeper ── life (pure) ──▶ store, node
//!   node ── news of VMs ─────▶ keeper
//! ```
//!
//! A sandbox is written down before its VM is started and forgotten after its last VM has ended,
//! so that nothing of it is ever without an owner.

use std::collections::BTreeMap;
use std::sync::{MutexGuard, PoisonError};

use spore_api::error::ErrorCode;
use spore_api::name::{AccountName, SandboxId};
use spore_wire::id::{SnapshotId, VmId};
use spore_wire::node::{Boundary, Owner, StopMode, VmFailureKind, VmPhase, VmStatus};
use tokio::sync::{mpsc, oneshot, watch};

use super::Converge;
use super::life::{Failure, Moment};
use super::snapshot::SnapshotError;
use crate::store::record::decode;
use crate::store::record::sandbox::{Base, SANDBOXES, SandboxRecord, names_of};
use crate::store::{StoreError, every};
use keeper::{Keeper, Message, Waiter, lost};
use life::{Effect, Event, Life};

mod fork;
mod keeper;
pub(crate) mod life;
#[cfg(test)]
mod tests;

pub(super) use fork::Turns;
pub(crate) use fork::{ForkOrder, ForkedOne, Left};
pub(crate) use life::Standing;

/// A VM whose owner is so named, without a release, is a sandbox's.
const OWNER_PREFIX: &str = "sandbox-";

/// A sandbox's key in the store.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct SandboxRef {
    /// Whose.
    pub(crate) account: AccountName,
    /// Which.
    pub(crate) id: SandboxId,
}

impl SandboxRef {
    /// As whose its VMs are known to the node.
    fn owner(&self) -> Owner {
        Owner {
            account: self.account.to_string(),
            app: format!("{OWNER_PREFIX}{}", self.id),
            release: 0,
            secrets_version: 0,
        }
    }

    /// The sandbox of a VM, if it is one's.
    fn of(owner: &Owner) -> Option<Self> {
        let id = owner.app.strip_prefix(OWNER_PREFIX)?.parse().ok()?;
        let account = owner.account.parse().ok()?;
        (owner.release == 0).then_some(Self { account, id })
    }
}

impl core::fmt::Display for SandboxRef {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{}/{}", self.account, self.id)
    }
}

/// The way to a sandbox's keeper. One that is gone has none.
#[derive(Debug)]
pub(super) struct Handle {
    messages: mpsc::UnboundedSender<Message>,
    view: watch::Receiver<View>,
    /// What hosts its VMs that are not over.
    hosted: BTreeMap<VmId, HostedBy>,
}

/// What stands between a VM and its host, as its node told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct HostedBy {
    /// What it is.
    pub(crate) boundary: Boundary,
    /// What hosts the VM.
    pub(crate) hypervisor: String,
}

impl HostedBy {
    fn of(status: &VmStatus) -> Self {
        Self {
            boundary: status.boundary,
            hypervisor: status.hypervisor.clone(),
        }
    }
}

/// How a sandbox looks to others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct View {
    /// Where it stands.
    pub(crate) standing: Standing,
    /// The VM to show.
    pub(crate) vm: Option<VmId>,
    /// What its VM began from.
    pub(crate) base: Base,
    /// The snapshots that it needs.
    needs: Vec<SnapshotId>,
    /// The VM in which programs can be run.
    open: Option<VmId>,
    /// VMs that the node should have, since when.
    accepted: Vec<(VmId, Moment)>,
}

impl View {
    fn of(life: &Life) -> Self {
        Self {
            standing: life.standing(),
            vm: life.vm(),
            base: life.base().clone(),
            needs: life.bases().map(|base| base.id).collect(),
            open: life.open(),
            accepted: life.accepted().collect(),
        }
    }
}

/// Why something asked of a sandbox was not done.
#[derive(Clone, Debug, thiserror::Error)]
pub(crate) enum SandboxError {
    /// The account has none of this id.
    #[error("there is no sandbox {0}: `spore sandbox ls` lists them")]
    Missing(SandboxId),
    /// No program can be run in it.
    #[error(
        "the sandbox {0} is not open: `spore sandbox ls` shows where it stands, and `spore \
         sandbox rollback` opens one that has ended again"
    )]
    NotOpen(SandboxId),
}

impl Converge {
    pub(super) fn sandboxes(&self) -> MutexGuard<'_, BTreeMap<SandboxRef, Handle>> {
        let sandboxes = self.inner.sandboxes.lock();
        sandboxes.unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes over the sandboxes of an earlier daemon; `vms` are those that the node has.
    pub(crate) async fn adopt_sandboxes(&self, vms: &[VmStatus]) -> Result<usize, StoreError> {
        let has = |vm| vms.iter().any(|status| status.vm == vm);
        let mut count = 0;
        for entry in every(&*self.inner.store, SANDBOXES).await? {
            let Some((account, id)) = names_of(&entry.key) else {
                continue;
            };
            let record: SandboxRecord = decode(&entry)?;
            let (life, effects) = Life::found(&record, has, self.now());
            let sandbox = SandboxRef { account, id };
            self.keep_sandbox(sandbox, life, record, None, effects);
            count += 1;
        }
        for status in vms {
            if let Some(sandbox) = SandboxRef::of(&status.owner) {
                self.note_host(&sandbox, status);
            }
        }
        Ok(count)
    }

    /// Has a task keep a sandbox from now on.
    fn keep_sandbox(
        &self,
        sandbox: SandboxRef,
        life: Life,
        record: SandboxRecord,
        opened: Option<Waiter>,
        effects: Vec<Effect>,
    ) {
        let (itself, messages) = mpsc::unbounded_channel();
        let (view, shown) = watch::channel(View::of(&life));
        let handle = Handle {
            messages: itself.clone(),
            view: shown,
            hosted: BTreeMap::new(),
        };
        self.sandboxes().insert(sandbox.clone(), handle);
        let keeper = Keeper {
            converge: self.clone(),
            sandbox,
            life,
            record,
            messages,
            itself,
            view,
            opened,
        };
        tokio::spawn(keeper.run(effects));
    }

    /// The node told how a VM is: whether that was a sandbox's.
    pub(super) fn sandbox_changed(&self, status: &VmStatus) -> bool {
        let Some(sandbox) = SandboxRef::of(&status.owner) else {
            return false;
        };
        let vm = status.vm;
        let event = match status.phase {
            VmPhase::Ready => Event::Ready(vm),
            VmPhase::Draining => Event::Leaving(vm),
            VmPhase::Stopped | VmPhase::Failed => Event::Over(vm, failure_of(status)),
            VmPhase::Preparing | VmPhase::Booting | VmPhase::Forking | VmPhase::Thawing => {
                Event::Seen(vm)
            }
        };
        self.note_host(&sandbox, status);
        if !self.tell_sandbox(&sandbox, event) && !status.phase.is_over() {
            tracing::warn!(%sandbox, %vm, "a VM of a sandbox that is gone is ended");
            let nodes = std::sync::Arc::clone(&self.inner.nodes);
            tokio::spawn(async move {
                if let Err(error) = nodes.stop(vm, StopMode::Kill).await {
                    // It is still there when the repair looks next.
                    tracing::warn!(%vm, %error, "a stop was refused");
                }
            });
        }
        true
    }

    /// VMs of sandboxes that the node had before the list was asked for, and that are not in it.
    pub(super) fn lose_sandboxes(&self, has: impl Fn(VmId) -> bool, began: Moment) {
        for (sandbox, handle) in self.sandboxes().iter() {
            for (vm, accepted) in &handle.view.borrow().accepted {
                if *accepted < began && !has(*vm) {
                    tracing::warn!(%sandbox, %vm, "a VM is not on its node any more");
                    let over = Message::Event(Event::Over(*vm, lost()));
                    // A keeper that has ended has lost it too.
                    drop(handle.messages.send(over));
                }
            }
        }
    }

    fn note_host(&self, sandbox: &SandboxRef, status: &VmStatus) {
        if let Some(handle) = self.sandboxes().get_mut(sandbox) {
            if status.phase.is_over() {
                handle.hosted.remove(&status.vm);
            } else {
                handle.hosted.insert(status.vm, HostedBy::of(status));
            }
        }
    }

    fn tell_sandbox(&self, sandbox: &SandboxRef, event: Event) -> bool {
        let sandboxes = self.sandboxes();
        let handle = sandboxes.get(sandbox);
        handle.is_some_and(|handle| handle.messages.send(Message::Event(event)).is_ok())
    }

    /// How a sandbox looks.
    ///
    /// # Errors
    /// [`SandboxError::Missing`].
    pub(crate) fn sandbox(&self, sandbox: &SandboxRef) -> Result<View, SandboxError> {
        let sandboxes = self.sandboxes();
        let view = sandboxes
            .get(sandbox)
            .map(|handle| handle.view.borrow().clone());
        view.ok_or_else(|| SandboxError::Missing(sandbox.id.clone()))
    }

    /// What hosts the VM of a sandbox, once its node has told.
    pub(crate) fn host_of_sandbox(&self, sandbox: &SandboxRef, vm: VmId) -> Option<HostedBy> {
        let sandboxes = self.sandboxes();
        sandboxes.get(sandbox)?.hosted.get(&vm).cloned()
    }

    /// The VM of a sandbox in which programs can be run.
    ///
    /// # Errors
    /// [`SandboxError`].
    pub(crate) fn open_sandbox(&self, sandbox: &SandboxRef) -> Result<VmId, SandboxError> {
        let open = self.sandbox(sandbox)?.open;
        open.ok_or_else(|| SandboxError::NotOpen(sandbox.id.clone()))
    }

    /// Brings a sandbox back to a snapshot, the one that it began from when none is named; returns
    /// when programs can be run in it again.
    ///
    /// # Errors
    /// Why it could not; where there was room for both, it is as it was then.
    pub(crate) async fn roll_back_sandbox(
        &self,
        sandbox: &SandboxRef,
        to: Option<&str>,
    ) -> Result<(), SnapshotError> {
        let base = self.sandbox(sandbox)?.base;
        // Until its keeper has it, nobody removes what it goes back to.
        let alone = self.inner.snapshot_ledger.lock().await;
        let to = match to {
            None => base,
            Some(name) => {
                let to = self.find_snapshot(&sandbox.account, "to", name).await?;
                if to.id == base.id { base } else { to }
            }
        };
        self.snapshot_info(&to).await?;
        let (sender, mut outcome) = oneshot::channel();
        let gone = || SandboxError::Missing(sandbox.id.clone());
        let mut view = {
            let sandboxes = self.sandboxes();
            let handle = sandboxes.get(sandbox).ok_or_else(gone)?;
            let asked = Message::Rollback(to.clone(), sender);
            handle.messages.send(asked).map_err(|_ended| gone())?;
            handle.view.clone()
        };
        tokio::select! {
            biased;
            outcome = &mut outcome => return Ok(outcome.map_err(|_ended| gone())??),
            // It ends with its keeper, and then there is an outcome.
            _needs = view.wait_for(|view| view.needs.contains(&to.id)) => {}
        }
        drop(alone);
        Ok(outcome.await.map_err(|_ended| gone())??)
    }

    /// Ends sandboxes and returns when nothing of them is left.
    pub(crate) async fn close_sandboxes(&self, all: impl IntoIterator<Item = SandboxRef>) {
        let mut views = Vec::new();
        for sandbox in all {
            if let Some(handle) = self.sandboxes().get(&sandbox) {
                // A keeper that has ended has nothing left.
                drop(handle.messages.send(Message::Event(Event::Close)));
                views.push(handle.view.clone());
            }
        }
        for mut view in views {
            // It ends with its keeper.
            drop(view.wait_for(|view| view.standing == Standing::Gone).await);
        }
    }

    /// Whether a sandbox of any account needs a snapshot.
    pub(super) fn sandboxes_need(&self, id: SnapshotId) -> usize {
        let sandboxes = self.sandboxes();
        let need = |handle: &&Handle| handle.view.borrow().needs.contains(&id);
        sandboxes.values().filter(need).count()
    }
}

/// Why a VM is over, for its sandbox's owner.
fn failure_of(status: &VmStatus) -> Failure {
    let Some(failure) = &status.failure else {
        return Failure::new(ErrorCode::AppFailed, "its VM ended by itself");
    };
    let code = match failure.kind {
        VmFailureKind::NoCapacity => ErrorCode::NoCapacity,
        VmFailureKind::Snapshot => ErrorCode::SnapshotUnusable,
        VmFailureKind::App | VmFailureKind::Died => ErrorCode::AppFailed,
        VmFailureKind::Image
        | VmFailureKind::Boot
        | VmFailureKind::Thaw
        | VmFailureKind::Policy => ErrorCode::Internal,
    };
    Failure::new(code, failure.message.clone())
}
