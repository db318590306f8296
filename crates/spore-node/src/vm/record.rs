//! What an actor writes down of its VM, for the daemon after it.
//!
//! Called by the actor as the machine says, before whatever must not happen unknown.

use spore_wire::node::{Source, VmFailureKind};

use super::actor::{Actor, Taking};
use super::guest::chain;
use super::state::{Failure, Milestone, VmState};
use crate::snapshot::StoreError;

impl Actor {
    /// A VM that was never thawed leaves what only one VM may begin from to another. While it is
    /// journaled, nobody else takes it.
    pub(super) fn give_up_claim(&self) {
        let start = &self.record.start;
        let Source::Suspended(id) = start.source else {
            return;
        };
        if self.record.ran {
            return;
        }
        let store = self.host.snapshots.store();
        match store.give_up_claim(&start.owner.account, id, start.vm) {
            Ok(()) | Err(StoreError::Missing(_)) => {}
            Err(error) => tracing::warn!(%id, error = %chain(&error), "a claim is left"),
        }
    }

    pub(super) fn journal(&mut self, milestone: Milestone) -> Result<(), Failure> {
        self.record.milestone = milestone;
        // Until then nothing of it has left the VM: its network is closed, its disk goes with it.
        self.record.ran |= milestone == Milestone::Thawed;
        self.record.sealing = match milestone {
            Milestone::Sealing => self.taking.as_ref().and_then(Taking::snapshot),
            _ => None,
        };
        let Err(error) = self.host.journal.write(&self.record) else {
            return Ok(());
        };
        let message = chain(&error);
        if matches!(self.state, VmState::Leaving(_) | VmState::Releasing(_)) {
            // Nothing is worse than to leave it running.
            tracing::error!(vm = %self.record.start.vm, %message, "a VM ends unjournaled");
            return Ok(());
        }
        Err(Failure {
            kind: VmFailureKind::Boot,
            message,
        })
    }
}
