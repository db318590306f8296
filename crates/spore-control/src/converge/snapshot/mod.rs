//! Snapshots: taken, named, removed. The node keeps them; their names and keys are control's.
//!
//! Nothing is ever found by a content or a guessed id: an account's snapshots are looked for in
//! that account, then among the platform's own.

use core::time::Duration;
use std::collections::{BTreeMap, BTreeSet};

use spore_api::error::ErrorCode;
use spore_api::name::{AccountName, AppName, NameError, TagName};
use spore_wire::cause::chain;
use spore_wire::id::{SnapshotId, VmId};
use spore_wire::snapshot::SnapshotInfo;

use super::life::Failure;
use super::repeat::{RepeatError, Repeatable};
use super::sandbox::{SandboxError, SandboxRef};
use super::{AppRef, Converge, Hold};
use crate::domain::RuleError;
use crate::domain::snapshot::{ForkFrom, SnapshotName, fork_from, snapshot_name};
use crate::nodes::{NodesError, SnapshotKeys, TakeSnapshot, TakenSnapshot};
use crate::secrets::SecretsError;
use crate::store::record::app::{self, AppRecord};
use crate::store::record::sandbox::{Base, Kept};
use crate::store::record::snapshot_key::{SnapshotKeyRecord, snapshot_key_key};
use crate::store::record::tag::{TagRecord, names_of, tag_key, tags_of};
use crate::store::record::{decode, encode, load};
use crate::store::{CommitError, StoreError, Transaction, every};

mod upkeep;

use super::sandbox::ForkOrder;

/// Why something about a snapshot, or a fork, was not done.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SnapshotError {
    /// The account has none of this name.
    #[error("there is no snapshot `{name}`: `spore snapshot ls` lists them")]
    Missing { name: String },
    /// Nothing has this name.
    #[error(
        "there is no app, tag, sandbox or snapshot `{name}`: `spore ps`, `spore snapshot ls` and \
         `spore sandbox ls` list them"
    )]
    Nothing { name: String },
    /// No such app.
    #[error("there is no app `{app}`: `spore ps` lists them")]
    NoApp { app: AppName },
    /// It names two things.
    #[error("`{name}` is an app and a tag: say `app:{name}` or `tag:{name}`")]
    Ambiguous { name: TagName },
    /// The tag names another snapshot.
    #[error(
        "the tag `{tag}` names a snapshot already: take another tag, or remove that one with \
         `spore snapshot rm {tag}`"
    )]
    TagTaken { tag: TagName },
    /// What it holds would be in the snapshot.
    #[error(
        "{of} holds secrets, and so would a snapshot of it and all that is forked from that: say \
         `--allow-secrets` (`allow_secrets`) to have it all the same; it is encrypted on the disk \
         then"
    )]
    HoldsSecrets { of: String },
    /// It goes on once, and by itself.
    #[error("snapshot {id} is that of a suspended app, which goes on from it once: fork the app")]
    Suspended { id: SnapshotId },
    /// It belongs to the platform.
    #[error("the snapshot `{name}` is the platform's own: it is not yours to change")]
    NotYours { name: String },
    /// Sandboxes began from it.
    #[error(
        "{count} sandboxes need snapshot {id}: remove them first; `spore sandbox ls` shows which"
    )]
    NeededBySandboxes { id: SnapshotId, count: usize },
    /// An app is in it.
    #[error(
        "the app `{app}` is suspended in snapshot {id} and goes on from it: `spore stop {app}` \
         first, which gives up what it holds in memory"
    )]
    NeededByApp { id: SnapshotId, app: AppName },
    /// It cannot be used.
    #[error("snapshot {id} is damaged and cannot be used: {why}; remove it and take it again")]
    Damaged { id: SnapshotId, why: String },
    /// Its key is gone.
    #[error("snapshot {id} is encrypted, and its key is not in the store any more: remove it")]
    NoKey { id: SnapshotId },
    /// Too many calls.
    #[error(
        "{} forks of this account are under way: try again in a moment",
        spore_api::limits::FORKS_AT_ONCE_MAX
    )]
    ForksAtOnce,
    /// All were wanted, and one was not to be had.
    #[error("not all sandboxes could be opened, so none is: {}", .0.message)]
    NotAll(Failure),
    /// Nobody waits for them any more.
    #[error("the caller left before the sandboxes were open: none is")]
    Left,
    /// The app or sandbox.
    #[error("{}", .0.message)]
    Source(Failure),
    /// The sandbox.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    /// A value.
    #[error(transparent)]
    Rule(#[from] RuleError),
    /// A name.
    #[error(transparent)]
    Name(#[from] NameError),
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The node.
    #[error(transparent)]
    Nodes(#[from] NodesError),
    /// A key.
    #[error(transparent)]
    Secrets(#[from] SecretsError),
    /// The client's key.
    #[error(transparent)]
    Repeat(#[from] RepeatError),
}

impl SnapshotError {
    /// The same, for who waits for a start.
    pub(super) fn failure(&self) -> Failure {
        let code = match self {
            Self::Missing { .. } => ErrorCode::NotFound,
            Self::Damaged { .. } | Self::NoKey { .. } => ErrorCode::SnapshotUnusable,
            Self::Nodes(error) => return super::start::refused(error),
            _ => ErrorCode::Internal,
        };
        Failure::new(code, chain(self))
    }
}

impl From<Failure> for SnapshotError {
    fn from(failure: Failure) -> Self {
        Self::Source(failure)
    }
}

/// A snapshot with what control knows of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Shown {
    /// What the node has.
    pub(crate) info: SnapshotInfo,
    /// Its names.
    pub(crate) tags: Vec<TagName>,
    /// How many sandboxes need it.
    pub(crate) sandboxes: usize,
}

/// A VM of which a snapshot is taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum CheckpointOf {
    /// An app's; it is woken.
    App(AppRef),
    /// A sandbox's.
    Sandbox(SandboxRef),
}

/// A snapshot that was taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Checkpointed {
    pub(crate) shown: Shown,
    pub(crate) pauses: Pauses,
}

/// How long the VM of a snapshot stood still, and its programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Pauses {
    pub(crate) pause_us: u64,
    pub(crate) frozen_us: u64,
}

impl Pauses {
    fn of(taken: &TakenSnapshot) -> Self {
        let us = |span: Duration| u64::try_from(span.as_micros()).unwrap_or(u64::MAX);
        Self {
            pause_us: us(taken.pause),
            frozen_us: us(taken.frozen),
        }
    }

    /// As they are written down behind the snapshot.
    fn with(self, id: SnapshotId) -> String {
        format!("{id} {} {}", self.pause_us, self.frozen_us)
    }

    fn read(made: &str) -> Option<(SnapshotId, Self)> {
        let mut words = made.split(' ');
        let id = words.next()?.parse().ok()?;
        let pauses = Self {
            pause_us: words.next()?.parse().ok()?,
            frozen_us: words.next()?.parse().ok()?,
        };
        Some((id, pauses))
    }
}

/// A VM that is about to be taken, kept awake until it is.
struct Source {
    vm: VmId,
    holds_secrets: bool,
    name: String,
    _hold: Option<Hold>,
}

impl Converge {
    /// The account's snapshots and the platform's own, each group by its ids.
    pub(crate) async fn snapshots(
        &self,
        account: &AccountName,
    ) -> Result<Vec<Shown>, SnapshotError> {
        let public = AccountName::public_account();
        let mut all = Vec::new();
        for of in [account, &public] {
            if of == &public && account == &public && !all.is_empty() {
                break;
            }
            let tags = self.tags(of).await?;
            for info in self.inner.nodes.snapshots(of.to_string()).await? {
                all.push(self.shown(info, &tags));
            }
        }
        Ok(all)
    }

    /// One snapshot that the account may fork.
    pub(crate) async fn snapshot_named(
        &self,
        account: &AccountName,
        text: &str,
    ) -> Result<Shown, SnapshotError> {
        let base = self.find_snapshot(account, "name", text).await?;
        self.show_snapshot(&base).await
    }

    async fn show_snapshot(&self, base: &Base) -> Result<Shown, SnapshotError> {
        let info = self.snapshot_info(base).await?;
        Ok(self.shown(info, &self.tags(&base.account).await?))
    }

    fn shown(&self, info: SnapshotInfo, tags: &BTreeMap<SnapshotId, Vec<TagName>>) -> Shown {
        Shown {
            tags: tags.get(&info.id).cloned().unwrap_or_default(),
            sandboxes: self.sandboxes_need(info.id),
            info,
        }
    }

    async fn tags(
        &self,
        account: &AccountName,
    ) -> Result<BTreeMap<SnapshotId, Vec<TagName>>, StoreError> {
        let mut tags: BTreeMap<SnapshotId, Vec<TagName>> = BTreeMap::new();
        for entry in every(&*self.inner.store, &tags_of(account)).await? {
            let record: TagRecord = decode(&entry)?;
            if let Some((_, name)) = names_of(&entry.key) {
                tags.entry(record.snapshot).or_default().push(name);
            }
        }
        Ok(tags)
    }

    /// What the node has of a snapshot.
    pub(super) async fn snapshot_info(&self, base: &Base) -> Result<SnapshotInfo, SnapshotError> {
        let account = base.account.to_string();
        match self.inner.nodes.snapshot(account, base.id).await {
            Err(NodesError::NotFound { .. }) => Err(SnapshotError::Missing {
                name: base.id.to_string(),
            }),
            other => Ok(other?),
        }
    }

    /// The snapshot that an account names by a tag or an id.
    pub(crate) async fn find_snapshot(
        &self,
        account: &AccountName,
        field: &str,
        text: &str,
    ) -> Result<Base, SnapshotError> {
        let found = match snapshot_name(field, text)? {
            SnapshotName::Tag(tag) => self.tagged(account, &tag).await?,
            SnapshotName::Id(id) => self.with_id(account, id).await?,
        };
        found.ok_or_else(|| SnapshotError::Missing {
            name: text.to_owned(),
        })
    }

    async fn tagged(
        &self,
        account: &AccountName,
        tag: &TagName,
    ) -> Result<Option<Base>, StoreError> {
        for account in [account.clone(), AccountName::public_account()] {
            let stored = load::<TagRecord>(&*self.inner.store, &tag_key(&account, tag)).await?;
            if let Some(stored) = stored {
                let (id, kept) = (stored.record.snapshot, Kept::ByOwner);
                return Ok(Some(Base { account, id, kept }));
            }
        }
        Ok(None)
    }

    async fn with_id(
        &self,
        account: &AccountName,
        id: SnapshotId,
    ) -> Result<Option<Base>, SnapshotError> {
        for account in [account.clone(), AccountName::public_account()] {
            let kept = Kept::ByOwner;
            let base = Base { account, id, kept };
            match self.snapshot_info(&base).await {
                Ok(_) => return Ok(Some(base)),
                Err(SnapshotError::Missing { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    /// What a fork begins from, and its name for people. Of what runs a snapshot is taken.
    pub(super) async fn fork_base(
        &self,
        account: &AccountName,
        order: &ForkOrder,
    ) -> Result<(Base, String), SnapshotError> {
        let app_of = |app| AppRef {
            account: account.clone(),
            app,
        };
        let nothing = || SnapshotError::Nothing {
            name: order.from.clone(),
        };
        let of = match fork_from(&order.from)? {
            ForkFrom::Tag(tag) => {
                let tagged = self.tagged(account, &tag).await?;
                let base = tagged.ok_or_else(|| SnapshotError::Missing {
                    name: tag.to_string(),
                })?;
                return Ok((base, tag.to_string()));
            }
            ForkFrom::App(app) => CheckpointOf::App(app_of(app)),
            ForkFrom::Name(name) => {
                let app = match name.as_str().parse() {
                    Ok(app) => self.app_record(&app_of(app)).await?.is_some(),
                    Err(_) => false,
                };
                match (self.tagged(account, &name).await?, app) {
                    (Some(_), true) => return Err(SnapshotError::Ambiguous { name }),
                    (Some(base), false) => return Ok((base, name.to_string())),
                    (None, true) => CheckpointOf::App(app_of(name.as_str().parse()?)),
                    (None, false) => return Err(nothing()),
                }
            }
            ForkFrom::Id(id) => {
                let account = account.clone();
                let sandbox = SandboxRef { account, id };
                if self.sandbox(&sandbox).is_ok() {
                    CheckpointOf::Sandbox(sandbox)
                } else {
                    let id = order.from.parse().map_err(|_e| nothing())?;
                    let base = self.with_id(&sandbox.account, id).await?;
                    return Ok((base.ok_or_else(nothing)?, order.from.clone()));
                }
            }
        };
        let source = self.source(&of, order.allow_secrets).await?;
        let taken = self.take(account, &source).await?;
        let base = Base {
            account: account.clone(),
            id: taken.info.id,
            kept: Kept::BySandboxes,
        };
        Ok((base, source.name))
    }

    /// Takes a snapshot of what runs, and names it.
    pub(crate) async fn checkpoint(
        &self,
        of: &CheckpointOf,
        tag: &TagName,
        allow_secrets: bool,
        repeatable: Option<&Repeatable>,
    ) -> Result<Checkpointed, SnapshotError> {
        let account = match of {
            CheckpointOf::App(app) => &app.account,
            CheckpointOf::Sandbox(sandbox) => &sandbox.account,
        };
        let alone = repeatable.map(|repeatable| self.alone(account, repeatable));
        let _alone = alone.transpose()?;
        if let Some(repeatable) = repeatable
            && let Some(made) = self.earlier(account, repeatable).await?
        {
            return self.taken_earlier(account, &made).await;
        }
        let (at, store) = (tag_key(account, tag), &self.inner.store);
        let taken_already = || SnapshotError::TagTaken { tag: tag.clone() };
        if store.get(&at).await?.is_some() {
            return Err(taken_already());
        }
        let (used, most) = (
            store.count(&tags_of(account)).await?,
            spore_api::limits::TAGS_PER_ACCOUNT_MAX,
        );
        if used >= most {
            let what = "tags";
            return Err(RuleError::Quota { what, used, most }.into());
        }
        let source = self.source(of, allow_secrets).await?;
        let taken = self.take(account, &source).await?;
        let record = TagRecord {
            snapshot: taken.info.id,
            created_at_ms: self.now_ms(),
        };
        let pauses = Pauses::of(&taken);
        let mut name = Transaction::default()
            .when(&at, 0)
            .put(&at, encode(&record));
        if let Some(repeatable) = repeatable {
            let made = pauses.with(taken.info.id);
            name = self.remember(account, name, repeatable, &made);
        }
        let named = store.commit(name).await;
        let base = Base {
            account: account.clone(),
            id: taken.info.id,
            kept: Kept::BySandboxes,
        };
        match named {
            Ok(_) => Ok(Checkpointed {
                shown: self.show_snapshot(&base).await?,
                pauses,
            }),
            Err(error) => {
                // Nobody can name it, so nobody needs it.
                self.drop_unneeded(&base).await;
                Err(match error {
                    CommitError::Conflict { .. } => taken_already(),
                    CommitError::Store(error) => error.into(),
                })
            }
        }
    }

    /// What an earlier call took, as long as it is there.
    async fn taken_earlier(
        &self,
        account: &AccountName,
        made: &str,
    ) -> Result<Checkpointed, SnapshotError> {
        let (id, pauses) = Pauses::read(made).ok_or_else(|| SnapshotError::Missing {
            name: made.to_owned(),
        })?;
        let base = Base {
            account: account.clone(),
            id,
            kept: Kept::ByOwner,
        };
        let shown = self.show_snapshot(&base).await?;
        Ok(Checkpointed { shown, pauses })
    }

    /// The VM to take, awake.
    async fn source(
        &self,
        of: &CheckpointOf,
        allow_secrets: bool,
    ) -> Result<Source, SnapshotError> {
        let source = match of {
            CheckpointOf::App(app) => {
                let exists = self.app_record(app).await?.is_some();
                if !exists {
                    let app = app.app.clone();
                    return Err(SnapshotError::NoApp { app });
                }
                let hold = self.hold(app);
                let vm = self.wake(app).await?;
                let status = self.inner.nodes.status(vm).await?;
                let number = status.ok_or(NodesError::NoVm { vm })?.owner.release;
                let rules = self
                    .release(app, number)
                    .await?
                    .map(|release| release.rules);
                Source {
                    vm,
                    // Of a release that is not known any more nobody can say that it has none.
                    holds_secrets: rules.is_none_or(|rules| {
                        !rules.secret_names.is_empty() || !rules.secret_files.is_empty()
                    }),
                    name: app.app.to_string(),
                    _hold: Some(hold),
                }
            }
            CheckpointOf::Sandbox(sandbox) => {
                let vm = self.open_sandbox(sandbox)?;
                let base = self.sandbox(sandbox)?.base;
                Source {
                    vm,
                    holds_secrets: self.snapshot_info(&base).await?.encrypted,
                    name: sandbox.id.to_string(),
                    _hold: None,
                }
            }
        };
        if source.holds_secrets && !allow_secrets {
            let of = source.name;
            return Err(SnapshotError::HoldsSecrets { of });
        }
        Ok(source)
    }

    /// Takes a snapshot of a VM; the key of an encrypted one is in the store before it is.
    async fn take(
        &self,
        account: &AccountName,
        source: &Source,
    ) -> Result<TakenSnapshot, SnapshotError> {
        let id = SnapshotId::from_bytes(self.inner.chance.bits());
        let mut key = None;
        if source.holds_secrets {
            let (made, record) = self.inner.vault.make_snapshot_key(account, id).await?;
            let at = snapshot_key_key(account, id);
            let write = Transaction::default().put(at, encode(&record));
            self.commit_alone(write).await?;
            key = Some(made);
        }
        let take = TakeSnapshot {
            vm: source.vm,
            id,
            key,
            made_at_s: u64::try_from(self.now_ms() / 1000).unwrap_or(0),
        };
        let taken = self.inner.nodes.checkpoint(take).await;
        if taken.is_err() && source.holds_secrets {
            let forget = Transaction::default().delete(snapshot_key_key(account, id));
            if let Err(error) = self.commit_alone(forget).await {
                // The next collection finds that it has no snapshot.
                tracing::warn!(%id, error = chain(&error), "the key of no snapshot is left");
            }
        }
        Ok(taken?)
    }

    /// The keys of a snapshot and of all that it continues.
    pub(super) async fn keys_of(
        &self,
        account: &AccountName,
        info: &SnapshotInfo,
    ) -> Result<SnapshotKeys, SnapshotError> {
        let mut keys = SnapshotKeys::new();
        let (mut account, mut info) = (account.clone(), info.clone());
        loop {
            if info.encrypted {
                let at = snapshot_key_key(&account, info.id);
                let stored = load::<SnapshotKeyRecord>(&*self.inner.store, &at).await?;
                let stored = stored.ok_or(SnapshotError::NoKey { id: info.id })?;
                let vault = &self.inner.vault;
                let key = vault.open_snapshot_key(&account, info.id, &stored.record);
                keys.push((info.id, key.await?));
            }
            let Some(parent) = info.meta.and_then(|meta| meta.parent) else {
                return Ok(keys);
            };
            account = parent.account.parse()?;
            let kept = Kept::ByOwner;
            let id = parent.id;
            let base = Base {
                account: account.clone(),
                id,
                kept,
            };
            info = self.snapshot_info(&base).await?;
        }
    }

    /// A commit that has no condition.
    pub(super) async fn commit_alone(&self, write: Transaction) -> Result<(), StoreError> {
        match self.inner.store.commit(write).await {
            Ok(_) | Err(CommitError::Conflict { .. }) => Ok(()),
            Err(CommitError::Store(error)) => Err(error),
        }
    }

    /// The snapshots of all accounts that a tag names, a sandbox began from, or an app goes on
    /// from.
    /// The snapshots that apps are suspended in, of those whose records begin like this.
    async fn suspended_in(
        &self,
        records: &str,
    ) -> Result<BTreeMap<SnapshotId, AppName>, StoreError> {
        let mut apps = BTreeMap::new();
        for entry in every(&*self.inner.store, records).await? {
            let suspended = decode::<AppRecord>(&entry)?.suspended;
            if let (Some(suspended), Some((_, app))) = (suspended, app::names_of(&entry.key)) {
                apps.insert(suspended.snapshot, app);
            }
        }
        Ok(apps)
    }

    async fn snapshots_in_use(&self) -> Result<BTreeSet<SnapshotId>, StoreError> {
        use crate::store::record::app::APPS;
        use crate::store::record::sandbox::{SANDBOXES, SandboxRecord};
        use crate::store::record::tag::TAGS;

        let mut named = BTreeSet::new();
        for entry in every(&*self.inner.store, TAGS).await? {
            named.insert(decode::<TagRecord>(&entry)?.snapshot);
        }
        named.extend(self.suspended_in(APPS).await?.into_keys());
        for entry in every(&*self.inner.store, SANDBOXES).await? {
            let record: SandboxRecord = decode(&entry)?;
            named.insert(record.base.id);
            named.extend(record.next.map(|(_, base)| base.id));
        }
        Ok(named)
    }
}
