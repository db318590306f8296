//! What must hold at every instant, looked at whenever a daemon does anything.
//!
//! Called by the fuse at every pass and by the node's adapter at every start. It sees the machine
//! itself, not what anybody believes of it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use spore_node::hypervisor::sim::SimHost;
use spore_wire::id::{SnapshotId, VmId};

use crate::trace::Trace;

/// Whose VM it is.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Owner {
    /// Of which app.
    pub app: String,
    /// Of which release.
    pub release: u64,
}

/// Looks at the machine; clones are the same.
#[derive(Clone, Debug)]
pub struct Watcher(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    host: SimHost,
    trace: Trace,
    held: Mutex<Held>,
}

#[derive(Debug, Default)]
struct Held {
    owners: BTreeMap<VmId, Owner>,
    /// VMs that control ended for their owner, whatever was in flight.
    forced: BTreeSet<VmId>,
    told: BTreeSet<String>,
    /// Who went on from which suspended one's snapshot.
    went_on: BTreeMap<SnapshotId, VmId>,
    violations: usize,
}

impl Watcher {
    /// Looks at `host`.
    #[must_use]
    pub fn new(host: SimHost, trace: Trace) -> Self {
        Self(Arc::new(Shared {
            host,
            trace,
            held: Mutex::default(),
        }))
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.0.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Control asked for a VM.
    pub fn asked(&self, vm: VmId, owner: Owner) {
        self.held().owners.insert(vm, owner);
    }

    /// A VM that goes on where another was suspended serves, or is heard to do so again.
    pub fn went_on(&self, from: SnapshotId, vm: VmId) {
        let before = self.held().went_on.insert(from, vm);
        match before {
            None => self.0.trace.count("went on"),
            Some(before) if before != vm => {
                self.once(format!("{vm} goes on from {from}, and {before} did before"));
            }
            Some(_) => {}
        }
    }

    /// Whose VM this is.
    #[must_use]
    pub fn owner(&self, vm: VmId) -> Option<Owner> {
        self.held().owners.get(&vm).cloned()
    }

    /// Control ends a VM for its owner, whatever is in flight: what serves changed, or it is to
    /// sleep, to restart or to be off.
    pub fn forced(&self, vm: VmId) {
        self.held().forced.insert(vm);
    }

    /// Whether a request may fail in this VM: a fault of the plan hit it, or its owner's wish did.
    #[must_use]
    pub fn may_fail(&self, vm: VmId) -> bool {
        self.0.host.was_struck(vm) || self.held().forced.contains(&vm)
    }

    /// The VMs whose process runs, by app.
    #[must_use]
    pub fn running(&self) -> BTreeMap<String, Vec<(VmId, u64)>> {
        let running = self.0.host.running();
        let held = self.held();
        let mut by_app: BTreeMap<_, Vec<_>> = BTreeMap::new();
        for vm in running.keys() {
            if let Some(owner) = held.owners.get(vm) {
                let vms = by_app.entry(owner.app.clone()).or_default();
                vms.push((*vm, owner.release));
            }
        }
        by_app
    }

    /// Looks once.
    pub fn look(&self) {
        for (app, vms) in self.running() {
            let releases: BTreeSet<_> = vms.iter().map(|(_, release)| release).collect();
            if releases.len() < vms.len() {
                self.once(format!("{app}: one release runs twice: {vms:?}"));
            }
            if vms.len() > 2 {
                self.once(format!("{app}: more than two VMs run: {vms:?}"));
            }
        }
        let violations = self.0.host.violations();
        let known = core::mem::replace(&mut self.held().violations, violations.len());
        for text in violations.into_iter().skip(known) {
            self.0.trace.violation(format!("the machine says: {text}"));
        }
    }

    fn once(&self, text: String) {
        if self.held().told.insert(text.clone()) {
            self.0.trace.violation(text);
        }
    }
}
