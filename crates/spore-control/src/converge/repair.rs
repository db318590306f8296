//! Compares what the node has with what is believed: at the start, and now and then.

use std::collections::HashSet;

use super::life::Event;
use super::{AppRef, Converge};
use crate::nodes::NodesError;
use crate::store::StoreError;
use spore_wire::cause::chain;

/// Why what runs cannot be taken over.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AdoptError {
    /// The node does not tell.
    #[error(transparent)]
    Nodes(#[from] NodesError),
    /// The store does not.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl Converge {
    /// Takes over what the node has, at the start. Nothing else has happened yet.
    pub(crate) async fn adopt(&self) -> Result<usize, AdoptError> {
        let vms = self.inner.nodes.list().await?;
        let count = vms.len();
        let sandboxes = self.adopt_sandboxes(&vms).await?;
        tracing::debug!(sandboxes, "sandboxes of the store are kept again");
        for status in vms {
            self.vm_changed(status);
        }
        Ok(count)
    }

    /// Looks at every app once: those that are always awake are started.
    pub(crate) async fn look_at_all(&self) -> Result<usize, StoreError> {
        let apps = self.all_apps().await?;
        for (app, _) in &apps {
            self.signal(app);
        }
        Ok(apps.len())
    }

    /// Puts right what was lost on its way or could not be done at its time.
    pub(super) async fn repair(&self) {
        self.repair_vms().await;
        let removals = self.finish_removals().await;
        let ends = self.write_ends().await;
        if let Err(error) = removals.and(ends) {
            let error = chain(&error);
            tracing::warn!(error, "what is left to be written waits for the store");
        }
    }

    /// Takes in the node's list: states whose news were lost, VMs that are gone.
    async fn repair_vms(&self) {
        let began = self.now();
        let vms = match self.inner.nodes.list().await {
            Ok(vms) => vms,
            Err(error) => {
                tracing::warn!(%error, "the node does not list its VMs");
                return;
            }
        };
        let listed: HashSet<_> = vms.iter().map(|status| status.vm).collect();
        for status in vms {
            self.vm_changed(status);
        }
        self.lose_sandboxes(|vm| listed.contains(&vm), began);
        for (app, vm) in self.missing(&listed, began) {
            tracing::warn!(%app, %vm, "a VM is not on its node any more");
            self.event(&app, Event::Lost(vm));
        }
    }

    /// VMs that the node had before the list was asked for, and that are not in it.
    fn missing(
        &self,
        listed: &HashSet<spore_wire::id::VmId>,
        began: super::Moment,
    ) -> Vec<(AppRef, spore_wire::id::VmId)> {
        let slots = self.slots();
        let mut missing = Vec::new();
        for (app, slot) in slots.iter() {
            for (vm, accepted) in slot.life.accepted() {
                if accepted < began && !listed.contains(&vm) {
                    missing.push((app.clone(), vm));
                }
            }
        }
        missing
    }
}
