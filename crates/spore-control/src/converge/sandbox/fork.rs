//! Opens sandboxes: one to a thousand from one snapshot, in one call.
//!
//! Room is given by the node to all in one step; what it gave none is told so, each by itself. A
//! caller that leaves, and a call that wants all or none, have what was opened closed again.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use spore_api::error::ErrorCode;
use spore_api::limits::{FORKS_AT_ONCE_MAX, FORKS_MAX, SANDBOXES_PER_ACCOUNT_MAX};
use spore_api::name::{AccountName, SandboxId};
use spore_wire::id::VmId;
use spore_wire::node::{Purpose, Source, StartVm};
use spore_wire::snapshot::{SnapshotKind, SnapshotMeta};
use tokio::sync::{oneshot, watch};

use super::life::{Event, Life};
use super::{SandboxRef, Standing, Waiter};
use crate::clock::next_id;
use crate::converge::Converge;
use crate::converge::life::Failure;
use crate::converge::repeat::{RepeatError, Repeatable};
use crate::converge::snapshot::SnapshotError;
use crate::converge::start::refused;
use crate::domain::RuleError;
use crate::nodes::{Room, SnapshotKeys};
use crate::store::record::encode;
use crate::store::record::sandbox::{
    Base, SandboxRecord, StoredSandboxState, sandbox_key, sandboxes_of,
};
use crate::store::{CommitError, Transaction};

/// Sandboxes to open.
#[derive(Clone, Debug)]
pub(crate) struct ForkOrder {
    /// What from: an app, a sandbox, a tag or a snapshot.
    pub(crate) from: String,
    /// How many.
    pub(crate) count: u32,
    /// Whether they are one.
    pub(crate) room: Room,
    /// Whether an app or sandbox that holds secrets may be forked.
    pub(crate) allow_secrets: bool,
}

/// One of the sandboxes that were asked for, and why it is not open.
pub(crate) type ForkedOne = (SandboxId, Result<(), Failure>);

/// Tells when the caller does not wait for the answer any more.
#[derive(Clone, Debug)]
pub(crate) struct Left(watch::Receiver<()>);

impl Left {
    /// It tells once the sender is dropped.
    pub(crate) const fn new(receiver: watch::Receiver<()>) -> Self {
        Self(receiver)
    }

    /// Returns when the caller has left.
    pub(crate) async fn gone(&mut self) {
        while self.0.changed().await.is_ok() {}
    }
}

/// What all VMs from one snapshot have in common.
pub(crate) struct ForkPlan {
    base: Base,
    meta: SnapshotMeta,
    keys: SnapshotKeys,
}

impl ForkPlan {
    /// The start of one of them.
    pub(super) fn start(&self, sandbox: &SandboxRef, vm: VmId) -> StartVm {
        StartVm {
            vm,
            owner: sandbox.owner(),
            image: self.meta.image,
            folder: self.meta.folder,
            resources: self.meta.resources,
            process: None,
            egress: Vec::new(),
            source: Source::Snapshot(self.base.id),
            keys: self.keys.clone(),
            purpose: Purpose::Serve,
            trace: None,
        }
    }
}

/// How many forks of each account are under way.
#[derive(Debug, Default)]
pub(in crate::converge) struct Turns(Mutex<BTreeMap<AccountName, u32>>);

/// One of them; it counts until it is dropped.
struct Turn {
    turns: Arc<Turns>,
    account: AccountName,
}

impl Turns {
    fn take(self: &Arc<Self>, account: &AccountName) -> Result<Turn, SnapshotError> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count = all.entry(account.clone()).or_default();
        if *count >= FORKS_AT_ONCE_MAX {
            return Err(SnapshotError::ForksAtOnce);
        }
        *count += 1;
        drop(all);
        Ok(Turn {
            turns: Arc::clone(self),
            account: account.clone(),
        })
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut all = self.turns.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = all.get_mut(&self.account) {
            *count -= 1;
            if *count == 0 {
                all.remove(&self.account);
            }
        }
    }
}

/// What sandboxes begin from, and for whom.
struct Begin<'a> {
    account: &'a AccountName,
    base: &'a Base,
    /// Its name for people.
    from: &'a str,
    repeatable: Option<&'a Repeatable>,
}

/// A sandbox that is on its way.
struct Opening {
    sandbox: SandboxRef,
    vm: VmId,
    outcome: oneshot::Receiver<Result<(), Failure>>,
}

impl Converge {
    /// Opens sandboxes; answers for each whether it is open. Of those that are not, nothing is
    /// left.
    ///
    /// # Errors
    /// When none was opened: nothing is left then.
    pub(crate) async fn fork(
        &self,
        account: &AccountName,
        order: &ForkOrder,
        repeatable: Option<&Repeatable>,
        mut left: Left,
    ) -> Result<Vec<ForkedOne>, SnapshotError> {
        if !(1..=FORKS_MAX).contains(&order.count) {
            let rule = format!("1 to {FORKS_MAX} sandboxes can be opened at once");
            return Err(RuleError::invalid("count", order.count, rule).into());
        }
        let alone = repeatable.map(|repeatable| self.alone(account, repeatable));
        let _alone = alone.transpose()?;
        if let Some(repeatable) = repeatable
            && let Some(made) = self.earlier(account, repeatable).await?
        {
            if let Some(forked) = self.forked_earlier(account, &made)? {
                return Ok(forked);
            }
            self.forget_key(account, repeatable).await;
        }
        let _turn = self.inner.fork_turns.take(account)?;
        let (base, from) = self.fork_base(account, order).await?;
        let begin = Begin {
            account,
            base: &base,
            from: &from,
            repeatable,
        };
        let forked = self.fork_all(&begin, order, &mut left).await;
        // A snapshot that was taken for this fork goes with it.
        self.drop_unneeded(&base).await;
        if let (Err(_), Some(repeatable)) = (&forked, repeatable) {
            self.forget_key(account, repeatable).await;
        }
        forked
    }

    /// What became of the sandboxes of an earlier call; `None` when none is there, as after a
    /// daemon that did not live to see them open.
    fn forked_earlier(
        &self,
        account: &AccountName,
        made: &str,
    ) -> Result<Option<Vec<ForkedOne>>, SnapshotError> {
        let mut all = Vec::new();
        for id in made.split(' ') {
            let (id, account): (SandboxId, _) = (id.parse()?, account.clone());
            let sandbox = SandboxRef { account, id };
            let outcome = match self.sandbox(&sandbox).map(|view| view.standing) {
                Ok(Standing::Opening) => return Err(RepeatError::UnderWay.into()),
                Ok(Standing::Open | Standing::RollingBack | Standing::Ended(_)) => Ok(()),
                Ok(Standing::Closing | Standing::Gone) | Err(_) => {
                    let message = "it could not be opened, or was removed since";
                    Err(Failure::new(ErrorCode::NotFound, message))
                }
            };
            all.push((sandbox.id, outcome));
        }
        let is_one_there = all.iter().any(|(_, outcome)| outcome.is_ok());
        Ok(is_one_there.then_some(all))
    }

    async fn fork_all(
        &self,
        begin: &Begin<'_>,
        order: &ForkOrder,
        left: &mut Left,
    ) -> Result<Vec<ForkedOne>, SnapshotError> {
        let (account, base) = (begin.account, begin.base);
        let plan = self.fork_plan(base).await?;
        if plan.meta.kind == SnapshotKind::Suspend {
            return Err(SnapshotError::Suspended { id: base.id });
        }
        let all = self.write_down(begin, order.count).await?;
        let starts = all
            .iter()
            .map(|one| plan.start(&one.sandbox, one.vm))
            .collect();
        let answers = self.inner.nodes.start_many(starts, order.room).await;
        for (one, answer) in all.iter().zip(answers) {
            let event = match answer {
                Ok(()) => Event::Accepted(one.vm),
                Err(error) => Event::Refused(one.vm, refused(&error)),
            };
            self.tell_sandbox(&one.sandbox, event);
        }
        let refs: Vec<_> = all.iter().map(|one| one.sandbox.clone()).collect();
        let forked = tokio::select! {
            forked = outcomes(all) => forked,
            () = left.gone() => {
                self.close_sandboxes(refs).await;
                return Err(SnapshotError::Left);
            }
        };
        let is_lost = |(_, outcome): &&ForkedOne| outcome.is_err();
        let lost = forked.iter().filter(is_lost).map(|(id, _)| SandboxRef {
            account: account.clone(),
            id: id.clone(),
        });
        self.close_sandboxes(lost).await;
        let failed = forked.iter().find_map(|(_, outcome)| outcome.clone().err());
        if let Some(failure) = failed.filter(|_| order.room == Room::ForAll) {
            self.close_sandboxes(refs).await;
            return Err(SnapshotError::NotAll(failure));
        }
        Ok(forked)
    }

    /// Writes sandboxes down that are about to be opened, all at once, and has each kept.
    async fn write_down(
        &self,
        begin: &Begin<'_>,
        count: u32,
    ) -> Result<Vec<Opening>, SnapshotError> {
        let (account, base) = (begin.account, begin.base);
        // From the look at the snapshot until its sandboxes are known, nobody removes it.
        let _alone = self.inner.snapshot_ledger.lock().await;
        self.snapshot_info(base).await?;
        let used = self.inner.store.count(&sandboxes_of(account)).await?;
        if used + u64::from(count) > SANDBOXES_PER_ACCOUNT_MAX {
            let (what, most) = ("sandboxes", SANDBOXES_PER_ACCOUNT_MAX);
            return Err(RuleError::Quota { what, used, most }.into());
        }
        let mut write = Transaction::default();
        let mut all = Vec::new();
        for _ in 0..count {
            let (sandbox, record) = self.next_sandbox(account, base, begin.from)?;
            let key = sandbox_key(account, &sandbox.id);
            write = write.put(key, encode(&record));
            all.push((sandbox, record));
        }
        if let Some(repeatable) = begin.repeatable {
            let ids: Vec<_> = all.iter().map(|(one, _)| one.id.to_string()).collect();
            write = self.remember(account, write, repeatable, &ids.join(" "));
        }
        match self.inner.store.commit(write).await {
            Ok(_) => {}
            // The key is its only condition.
            Err(CommitError::Conflict { .. }) => return Err(RepeatError::UnderWay.into()),
            Err(CommitError::Store(error)) => return Err(error.into()),
        }
        let opening = |(sandbox, record): (SandboxRef, SandboxRecord)| {
            let (sender, outcome): (Waiter, _) = oneshot::channel();
            let vm = record.vm;
            let life = Life::new(vm, base.clone());
            self.keep_sandbox(sandbox.clone(), life, record, Some(sender), Vec::new());
            Opening {
                sandbox,
                vm,
                outcome,
            }
        };
        Ok(all.into_iter().map(opening).collect())
    }

    fn next_sandbox(
        &self,
        account: &AccountName,
        base: &Base,
        from: &str,
    ) -> Result<(SandboxRef, SandboxRecord), SnapshotError> {
        let sandbox = SandboxRef {
            account: account.clone(),
            id: next_id(&*self.inner.chance).parse()?,
        };
        let record = SandboxRecord {
            vm: crate::clock::next_vm(&*self.inner.chance),
            base: base.clone(),
            state: StoredSandboxState::Opening,
            next: None,
            from: from.to_owned(),
            created_at_ms: self.now_ms(),
        };
        Ok((sandbox, record))
    }

    /// What VMs from a snapshot have in common.
    pub(super) async fn fork_plan(&self, base: &Base) -> Result<ForkPlan, SnapshotError> {
        let info = self.snapshot_info(base).await?;
        let keys = self.keys_of(&base.account, &info).await?;
        let id = info.id;
        let meta = info.meta.ok_or_else(|| SnapshotError::Damaged {
            id,
            why: info.damage.unwrap_or_default(),
        })?;
        Ok(ForkPlan {
            base: base.clone(),
            meta,
            keys,
        })
    }
}

async fn outcomes(all: Vec<Opening>) -> Vec<ForkedOne> {
    let mut outcomes = Vec::with_capacity(all.len());
    for one in all {
        let outcome = one.outcome.await.unwrap_or_else(|_ended| {
            let message = "the daemon is stopping";
            Err(Failure::new(ErrorCode::Stopping, message))
        });
        outcomes.push((one.sandbox.id, outcome));
    }
    outcomes
}
