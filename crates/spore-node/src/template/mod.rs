//! Templates: VMs that were booted once, so that others need not be.
//!
//! Asked by the node at each start that may begin from one. A template is a snapshot of a VM that
//! was booted for it, with an image and nothing else: no folder, no secret, no account's process;
//! or, where a release asks for it, of one in which that release's app is ready, without secrets.
//! It is a cache: made behind the first start that missed it, checked at each fork, and made anew
//! when the host, the guest or the image changed. Never makes a start wait, and never fails one.

mod build;
mod index;

use core::time::Duration;
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use spore_wire::cause::chain;
use spore_wire::id::{ImageId, SnapshotId, VmId};
use spore_wire::node::{
    NodeEvent, Owner, Purpose, Resources, Source, StartVm, StopMode, TemplateMiss, TemplateOf,
    TemplateStage, TemplateStatus, VmFailureKind, VmPhase, VmStatus,
};
use spore_wire::snapshot::{PUBLIC_ACCOUNT, SnapshotInfo, SnapshotKind};
use tokio::sync::mpsc;
use tokio::time::Instant;

use self::build::build_all;
use self::index::{AGE_MAX, Answer, AppOf, Host, Index, Key};
use crate::hypervisor::Machine;
use crate::node::Node;
use crate::snapshot::Cascade;
use crate::snapshots::SnapshotsError;
use crate::vm::board::Watch;

/// Templates that may wait to be built; who misses one more asks again at its next start.
const QUEUE_MAX: usize = 16;

/// What the VM of a builder is called that is of no app, where an app's name stands; its release is
/// 0, which no app has.
const BUILDER: &str = "template";

/// What the templates there are mean for a start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Resolved {
    hit: Option<SnapshotId>,
    /// Of what kind of template it is, if it may begin from one.
    key: Option<Key>,
    /// Why it is booted although it could have begun from a template.
    pub(crate) missed: Option<TemplateMiss>,
    /// What is to be built because of it.
    wanted: Option<(Key, Plan)>,
}

impl Resolved {
    /// Whether it begins from a template.
    pub(crate) const fn is_hit(&self) -> bool {
        self.hit.is_some()
    }

    const fn unsupported() -> Self {
        Self {
            hit: None,
            key: None,
            missed: Some(TemplateMiss::Unsupported),
            wanted: None,
        }
    }
}

/// What a template is made of, and for whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Plan {
    of: TemplateOf,
    image: ImageId,
    resources: Resources,
}

/// A template to build.
#[derive(Debug)]
pub(crate) struct Wanted {
    key: Key,
    account: String,
    plan: Plan,
    /// Whose start missed it: it goes first.
    behind: VmId,
    /// What that was, if the template is of its release: it holds no secrets.
    release: Option<Box<StartVm>>,
}

/// The templates of one node.
#[derive(Debug)]
pub(crate) struct Templates {
    index: Mutex<Index>,
    queue: mpsc::Sender<Wanted>,
    /// What each VM could have begun from, until it is over.
    of_vms: Mutex<BTreeMap<VmId, Key>>,
    hits: AtomicU64,
    misses: AtomicU64,
}

impl Templates {
    /// None yet. What is to be built comes out of the queue.
    pub(crate) fn new() -> (Self, mpsc::Receiver<Wanted>) {
        let (queue, wanted) = mpsc::channel(QUEUE_MAX);
        let templates = Self {
            index: Mutex::default(),
            queue,
            of_vms: Mutex::default(),
            hits: AtomicU64::new(0),
            misses: AtomicU64::new(0),
        };
        (templates, wanted)
    }

    fn index(&self) -> MutexGuard<'_, Index> {
        // Every critical section leaves its value whole, so a poisoned one is still usable.
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes in a snapshot that is on the disk; answers those that are of no use.
    pub(crate) fn found(
        &self,
        info: &SnapshotInfo,
        host: impl Fn(Resources) -> Host,
        now_s: u64,
    ) -> Vec<SnapshotId> {
        let Some(meta) = info.meta.as_ref() else {
            // Whoever it was of: that is not this cache's to remove.
            return Vec::new();
        };
        let is_own = |of: &Owner| of.app == BUILDER && of.release == 0 || meta.release.is_some();
        if meta.kind != SnapshotKind::Template || !meta.taken_of.as_ref().is_some_and(is_own) {
            return Vec::new();
        }
        let release = meta.release.as_deref();
        let app = meta.taken_of.as_ref().filter(|_of| release.is_some());
        let now = host(meta.resources);
        let then = Host {
            shape: meta.shape.clone(),
            guest: meta.guest.clone(),
        };
        let (account, image, size) = (&meta.account, meta.image, meta.resources);
        let key = |host: &Host| Key::of(account, image, size, release, host);
        let age = Duration::from_secs(now_s.saturating_sub(meta.made_at_s));
        let left = AGE_MAX.saturating_sub(age);
        if info.damage.is_some() || key(&then) != key(&now) || left.is_zero() {
            return vec![info.id];
        }
        let until = Instant::now() + left;
        self.index()
            .found(key(&now), app.map(app_of), info.id, until)
    }

    /// What a VM begins from that may begin from a template.
    fn resolve(&self, start: &StartVm, of: TemplateOf, host: &Host) -> Resolved {
        let account = account_of(of, &start.owner.account);
        let (release, app) = match of {
            TemplateOf::Account | TemplateOf::Everybody => (None, None),
            // There is nothing that such a start could begin from, or leave to others.
            TemplateOf::Release if start.has_secrets() || !start.begins_warm() => {
                return Resolved::unsupported();
            }
            TemplateOf::Release => (release_of(start), Some(app_of(&start.owner))),
        };
        let release = release.as_deref();
        let key = Key::of(account, start.image, start.resources, release, host);
        let plan = Plan {
            of,
            image: start.image,
            resources: start.resources,
        };
        let (hit, missed, wanted) = match self.index().ask(key, app, Instant::now()) {
            Answer::Hit(id) => (Some(id), None, None),
            Answer::MissFirst(why) => (None, Some(why), Some((key, plan))),
            Answer::Miss(why) => (None, Some(why), None),
        };
        Resolved {
            hit,
            key: Some(key),
            missed,
            wanted,
        }
    }

    fn of_vms(&self) -> MutexGuard<'_, BTreeMap<VmId, Key>> {
        self.of_vms.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How far the template is that this VM began from, or could have.
    pub(crate) fn stage(&self, vm: VmId) -> Option<TemplateStage> {
        let key = self.of_vms().get(&vm).copied()?;
        self.index().stage(key)
    }

    /// The start that this was for is on its way, or was refused. What it wanted is built behind
    /// it; if it was refused, behind whoever asks next.
    pub(crate) fn begun(&self, resolved: &Resolved, start: &StartVm, taken: bool) {
        if taken && resolved.missed.is_some() {
            self.misses.fetch_add(1, Ordering::Relaxed);
        } else if taken && resolved.is_hit() {
            let count = match start.source {
                Source::Boot => &self.misses,
                _ => &self.hits,
            };
            count.fetch_add(1, Ordering::Relaxed);
        }
        if let Some(key) = resolved.key.filter(|_key| taken) {
            self.of_vms().insert(start.vm, key);
        }
        let Some((key, plan)) = resolved.wanted else {
            return;
        };
        let wanted = Wanted {
            key,
            account: account_of(plan.of, &start.owner.account).to_owned(),
            plan,
            behind: start.vm,
            release: (plan.of == TemplateOf::Release).then(|| Box::new(start.clone())),
        };
        if !taken || self.queue.try_send(wanted).is_err() {
            self.index().build_dropped(key);
        }
    }

    /// What is known of them, for status and metrics.
    pub(crate) fn status(&self) -> TemplateStatus {
        TemplateStatus {
            ready: u32::try_from(self.index().ids().len()).unwrap_or(u32::MAX),
            hits: self.hits.load(Ordering::Relaxed),
            misses: self.misses.load(Ordering::Relaxed),
        }
    }

    /// Listens how forks fare, and gives up a template that does not work.
    pub(crate) async fn watch(&self, mut forks: Watch) {
        loop {
            let NodeEvent::Vm(status) = forks.next().await;
            if status.phase.is_over() {
                self.of_vms().remove(&status.vm);
            }
            self.fared(&status);
        }
    }

    fn fared(&self, status: &VmStatus) {
        let Source::Snapshot(id) = status.source else {
            return;
        };
        if status.phase == VmPhase::Ready {
            self.index().fork_worked(id);
            return;
        }
        let kind = status.failure.as_ref().map(|failure| failure.kind);
        let broke = matches!(
            kind,
            Some(VmFailureKind::Snapshot | VmFailureKind::Thaw | VmFailureKind::Boot)
        );
        if broke && self.index().fork_failed(id, Instant::now()) {
            tracing::warn!(%id, "a template is given up: no VM came up from it");
        }
    }
}

impl Node {
    /// How far the template is that a VM began from, or could have begun from; `None` when there
    /// is none to be, and of VMs of an earlier daemon.
    #[must_use]
    pub fn template_stage(&self, vm: VmId) -> Option<TemplateStage> {
        self.templates().stage(vm)
    }

    /// The templates that starts begin from: nobody else knows that they are needed.
    #[must_use]
    pub fn template_ids(&self) -> Vec<SnapshotId> {
        self.templates().index().ids()
    }

    /// Takes in the templates that are on the disk, removes those that are of no use any more, and
    /// begins to build what starts miss.
    pub(crate) async fn serve_templates(
        &self,
        wanted: mpsc::Receiver<Wanted>,
    ) -> Result<(), SnapshotsError> {
        if !self.forks() {
            return Ok(());
        }
        for info in self.snapshots().templates().await? {
            let now_s = self.host().config.clock.realtime().as_secs();
            let host = |resources| self.host_of(resources);
            let useless = self.templates().found(&info, host, now_s);
            for id in useless {
                self.forget_template(&info.account, id).await;
            }
        }
        let tasks = &self.host().tasks;
        let (templates, forks) = (Arc::clone(self.templates()), self.watch());
        tasks.spawn(async move { templates.watch(forks).await });
        tasks.spawn(build_all(self.clone(), wanted));
        Ok(())
    }

    /// Whether VMs begin from templates here at all.
    fn forks(&self) -> bool {
        self.hypervisor().caps().snapshots && self.host().config.templates
    }

    /// Puts what a start begins from in the place of its wish to begin from a template.
    pub(crate) fn resolve(&self, start: &mut StartVm, machine: &Machine) -> Resolved {
        let Source::Template(of) = start.source else {
            return Resolved::default();
        };
        let resolved = if self.forks() {
            let host = self.host_of(machine.resources);
            self.templates().resolve(start, of, &host)
        } else {
            Resolved::unsupported()
        };
        start.source = resolved.hit.map_or(Source::Boot, Source::Snapshot);
        resolved
    }

    /// What a template for VMs of this size has of this host. Their files do not matter.
    fn host_of(&self, resources: Resources) -> Host {
        let machine = Machine {
            resources,
            image: PathBuf::new(),
            folder: None,
            egress: Vec::new(),
        };
        Host {
            shape: self.hypervisor().shape(&machine),
            guest: self.hypervisor().caps().guest.clone(),
        }
    }

    /// Removes what there is of an app's own memory: its template, and the VM of one that is being
    /// built. Its own VMs are over.
    pub async fn forget_warm(&self, account: &str, app: &str) {
        let app = (account.to_owned(), app.to_owned());
        let gone = self.templates().index().forget(&app);
        let builds = self
            .list()
            .into_iter()
            .filter(|status| status.purpose == Purpose::Template && app_of(&status.owner) == app);
        for status in builds {
            // One that is over needs no stop.
            drop(self.stop(status.vm, StopMode::Kill).await);
            drop(self.stopped(status.vm).await);
        }
        for id in gone {
            self.forget_template(account, id).await;
        }
    }

    /// Removes a template. One that a VM began from goes with the next opening of the node.
    async fn forget_template(&self, account: &str, id: SnapshotId) {
        let (cascade, in_use) = (Cascade::Refuse, BTreeSet::new());
        let removed = self.snapshots().remove(account, id, cascade, in_use).await;
        match removed {
            Ok(_removed) => tracing::info!(%id, account, "a template is removed"),
            Err(error) => {
                tracing::info!(%id, account, error = %chain(&error), "a template stays for now");
            }
        }
    }
}

fn app_of(owner: &Owner) -> AppOf {
    (owner.account.clone(), owner.app.clone())
}

/// A digest of everything that an app was begun with, for the templates in which one runs: what
/// differs in any of it begins by itself. `None` where no app may be inherited.
pub(crate) fn release_of(start: &StartVm) -> Option<String> {
    let process = start.process.as_ref().filter(|_| start.begins_warm())?;
    let begun = (
        (&start.owner.app, start.owner.release),
        start.folder,
        (&process.command, &process.environment, &process.user),
        (process.port, &process.ready, process.ready_timeout_ms),
    );
    let json = serde_json::to_vec(&begun).ok()?;
    Some(blake3::hash(&json).to_hex().to_string())
}

/// Whose a template is.
fn account_of(of: TemplateOf, owner: &str) -> &str {
    match of {
        TemplateOf::Account | TemplateOf::Release => owner,
        TemplateOf::Everybody => PUBLIC_ACCOUNT,
    }
}
