//! The last known status of every VM, for whoever asks and whoever watches.
//!
//! Written by the actors, read through the node. A watcher that is slow misses states in between,
//! never the last one of a VM: what waits for it is a map by VM, not a queue.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use spore_wire::id::VmId;
use spore_wire::node::{NodeEvent, VmStatus};
use tokio::sync::Notify;
use tokio::time::Instant;

/// VMs that are over and still known; older ones are forgotten.
pub const OVER_KEPT_MAX: usize = 1024;

/// The statuses of a node's VMs.
#[derive(Debug, Default)]
pub(crate) struct Board {
    held: Mutex<Held>,
}

#[derive(Debug, Default)]
struct Held {
    vms: BTreeMap<VmId, Entry>,
    over: VecDeque<VmId>,
    watchers: Vec<Weak<Watcher>>,
}

#[derive(Clone, Debug)]
struct Entry {
    status: VmStatus,
    awake_until: Option<Instant>,
}

impl Entry {
    fn now(&self) -> VmStatus {
        let left = self
            .awake_until
            .map(|until| until.saturating_duration_since(Instant::now()));
        let left_ms = left.map_or(0, |left| left.as_millis());
        VmStatus {
            awake_for_ms: u64::try_from(left_ms).unwrap_or(u64::MAX),
            ..self.status.clone()
        }
    }
}

#[derive(Debug, Default)]
struct Watcher {
    pending: Mutex<BTreeMap<VmId, Entry>>,
    changed: Notify,
}

/// Tells every VM's changes; begins with how all of them are.
#[derive(Debug)]
pub struct Watch {
    watcher: Arc<Watcher>,
}

impl Watch {
    /// The next change. Dropping the future loses nothing.
    pub async fn next(&mut self) -> NodeEvent {
        loop {
            // One permit is kept when nobody waits, so no change falls between.
            if let Some((_vm, entry)) = lock(&self.watcher.pending).pop_first() {
                return NodeEvent::Vm(entry.now());
            }
            self.watcher.changed.notified().await;
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every critical section leaves its value whole, so a poisoned one is still usable.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Board {
    pub(crate) fn publish(&self, status: VmStatus, awake_until: Option<Instant>) {
        let vm = status.vm;
        let is_over = status.phase.is_over();
        let entry = Entry {
            status,
            awake_until,
        };
        let mut held = lock(&self.held);
        held.vms.insert(vm, entry.clone());
        if is_over {
            held.over.push_back(vm);
        }
        if held.over.len() > OVER_KEPT_MAX
            && let Some(oldest) = held.over.pop_front()
        {
            held.vms.remove(&oldest);
        }
        held.watchers.retain(|watcher| {
            let Some(watcher) = watcher.upgrade() else {
                return false;
            };
            lock(&watcher.pending).insert(vm, entry.clone());
            watcher.changed.notify_one();
            true
        });
    }

    pub(crate) fn get(&self, vm: VmId) -> Option<VmStatus> {
        lock(&self.held).vms.get(&vm).map(Entry::now)
    }

    pub(crate) fn list(&self) -> Vec<VmStatus> {
        lock(&self.held).vms.values().map(Entry::now).collect()
    }

    pub(crate) fn watch(&self) -> Watch {
        let mut held = lock(&self.held);
        let watcher = Arc::new(Watcher {
            pending: Mutex::new(held.vms.clone()),
            changed: Notify::new(),
        });
        held.watchers.push(Arc::downgrade(&watcher));
        Watch { watcher }
    }
}

#[cfg(test)]
mod tests {
    use spore_wire::guest::AppStatus;
    use spore_wire::id::VmId;
    use spore_wire::node::{Boundary, NodeEvent, Owner, Purpose, Source, VmPhase, VmStatus};

    use super::{Board, OVER_KEPT_MAX};

    fn status(vm: VmId, phase: VmPhase) -> VmStatus {
        VmStatus {
            vm,
            owner: Owner {
                account: "me".to_owned(),
                app: "notes".to_owned(),
                release: 1,
                secrets_version: 0,
            },
            phase,
            failure: None,
            app: AppStatus::Absent,
            phases: Vec::new(),
            boundary: Boundary::None,
            hypervisor: "sim".to_owned(),
            source: Source::Boot,
            missed: None,
            is_warm: false,
            purpose: Purpose::Serve,
            boot_id: None,
            awake_for_ms: 0,
        }
    }

    #[tokio::test]
    async fn a_slow_watcher_still_gets_the_last_state_of_each_vm() {
        let board = Board::default();
        let one = VmId::from_bytes([1; 16]);
        let two = VmId::from_bytes([2; 16]);
        board.publish(status(one, VmPhase::Preparing), None);
        let mut watch = board.watch();
        for phase in [VmPhase::Booting, VmPhase::Ready] {
            board.publish(status(one, phase), None);
            board.publish(status(two, phase), None);
        }
        let mut seen = Vec::new();
        for _event in 0..2 {
            let NodeEvent::Vm(status) = watch.next().await;
            seen.push((status.vm, status.phase));
        }
        assert_eq!(seen, [(one, VmPhase::Ready), (two, VmPhase::Ready)]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_lease_runs_down_while_nothing_happens() {
        let board = Board::default();
        let vm = VmId::from_bytes([1; 16]);
        let until = tokio::time::Instant::now() + core::time::Duration::from_secs(60);
        board.publish(status(vm, VmPhase::Ready), Some(until));
        tokio::time::sleep(core::time::Duration::from_secs(45)).await;
        assert_eq!(board.get(vm).unwrap().awake_for_ms, 15_000);
        tokio::time::sleep(core::time::Duration::from_secs(45)).await;
        assert_eq!(board.get(vm).unwrap().awake_for_ms, 0);
    }

    #[test]
    fn only_so_many_that_are_over_are_kept() {
        let board = Board::default();
        for number in 0..OVER_KEPT_MAX + 10 {
            let mut bytes = [0; 16];
            bytes[..8].copy_from_slice(&number.to_be_bytes());
            board.publish(status(VmId::from_bytes(bytes), VmPhase::Stopped), None);
        }
        assert_eq!(board.list().len(), OVER_KEPT_MAX);
    }
}
