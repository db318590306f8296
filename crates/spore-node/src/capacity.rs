//! What this host has to give, and who has it: a plain value without locks or IO.
//!
//! Used by the [`crate::node::Node`] before a start. Never gives more than there is: a VM counts
//! from its admission until nothing of it is left.

use std::collections::BTreeMap;

use spore_wire::id::VmId;
use spore_wire::node::Resources;
use thiserror::Error;

/// What a host has to give.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CapacityLimits {
    /// The host's memory.
    pub memory_mib: u64,
    /// Of it, kept for the host itself.
    pub memory_reserve_mib: u64,
    /// Host memory that a VM takes beyond its guest's, as the driver says.
    pub overhead_mib: u64,
    /// vCPUs that may be given; more than the host has, since most VMs idle.
    pub cpus: u64,
    /// VMs that may be there at once, in any phase.
    pub vms: usize,
}

/// Who has what of the host.
#[derive(Clone, Debug)]
pub struct Capacity {
    limits: CapacityLimits,
    given: BTreeMap<VmId, Resources>,
    memory_mib: u64,
    cpus: u64,
}

/// Why a VM has no room.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum NoRoom {
    /// Memory.
    #[error(
        "{wanted} MiB of memory are needed and {free} MiB are free: stop a VM, or try again later"
    )]
    Memory {
        /// With the overhead.
        wanted: u64,
        /// Of what may be given.
        free: u64,
    },
    /// vCPUs.
    #[error("{wanted} vCPUs are needed and {free} are free: stop a VM, or try again later")]
    Cpus {
        /// Asked for.
        wanted: u64,
        /// Of what may be given.
        free: u64,
    },
    /// The number of VMs.
    #[error("{max} VMs are there, which is the most: stop one, or try again later")]
    Vms {
        /// The limit.
        max: usize,
    },
}

impl Capacity {
    /// All of it free.
    #[must_use]
    pub const fn new(limits: CapacityLimits) -> Self {
        Self {
            limits,
            given: BTreeMap::new(),
            memory_mib: 0,
            cpus: 0,
        }
    }

    /// Gives `vm` its share, or says what is missing. A VM that has its share keeps it.
    ///
    /// # Errors
    /// [`NoRoom`]; nothing is given then.
    pub fn admit(&mut self, vm: VmId, resources: Resources) -> Result<(), NoRoom> {
        if self.given.contains_key(&vm) {
            return Ok(());
        }
        if self.given.len() >= self.limits.vms {
            return Err(NoRoom::Vms {
                max: self.limits.vms,
            });
        }
        let wanted = self.memory_of(resources);
        let free = self.memory_mib_total().saturating_sub(self.memory_mib);
        if wanted > free {
            return Err(NoRoom::Memory { wanted, free });
        }
        let wanted = u64::from(resources.cpus);
        let free = self.limits.cpus.saturating_sub(self.cpus);
        if wanted > free {
            return Err(NoRoom::Cpus { wanted, free });
        }
        self.adopt(vm, resources);
        Ok(())
    }

    /// Counts a VM that is there already, whether or not there is room for it.
    pub fn adopt(&mut self, vm: VmId, resources: Resources) {
        if self.given.insert(vm, resources).is_none() {
            self.memory_mib += self.memory_of(resources);
            self.cpus += u64::from(resources.cpus);
        }
    }

    /// Takes back what `vm` had.
    pub fn release(&mut self, vm: VmId) {
        if let Some(resources) = self.given.remove(&vm) {
            self.memory_mib -= self.memory_of(resources);
            self.cpus -= u64::from(resources.cpus);
        }
    }

    /// Memory that may be given at all.
    #[must_use]
    pub const fn memory_mib_total(&self) -> u64 {
        self.limits
            .memory_mib
            .saturating_sub(self.limits.memory_reserve_mib)
    }

    /// Of it, given.
    #[must_use]
    pub const fn memory_mib_used(&self) -> u64 {
        self.memory_mib
    }

    /// VMs that have a share.
    #[must_use]
    pub fn vms(&self) -> usize {
        self.given.len()
    }

    fn memory_of(&self, resources: Resources) -> u64 {
        u64::from(resources.memory_mib).saturating_add(self.limits.overhead_mib)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{any, prop, prop_assert, prop_assert_eq, proptest};
    use spore_wire::id::VmId;
    use spore_wire::node::Resources;

    use super::{Capacity, CapacityLimits, NoRoom};

    const LIMITS: CapacityLimits = CapacityLimits {
        memory_mib: 4096,
        memory_reserve_mib: 1024,
        overhead_mib: 128,
        cpus: 8,
        vms: 6,
    };

    fn resources(cpus: u8, memory_mib: u32) -> Resources {
        Resources {
            cpus,
            memory_mib,
            disk_mib: 64,
        }
    }

    proptest! {
        #[test]
        fn it_never_gives_more_than_there_is(
            asks in prop::collection::vec((0_u8..12, any::<bool>(), 0_u8..6, 0_u32..2000), 0..80),
        ) {
            let mut capacity = Capacity::new(LIMITS);
            let mut model: std::collections::BTreeMap<u8, (u64, u64)> = Default::default();
            for (who, gives_back, cpus, memory_mib) in asks {
                let vm = VmId::from_bytes([who; 16]);
                if gives_back {
                    capacity.release(vm);
                    model.remove(&who);
                } else if capacity.admit(vm, resources(cpus, memory_mib)).is_ok() {
                    model.entry(who)
                        .or_insert((u64::from(memory_mib) + 128, u64::from(cpus)));
                }
                let memory: u64 = model.values().map(|share| share.0).sum();
                let cpus: u64 = model.values().map(|share| share.1).sum();
                prop_assert_eq!(capacity.memory_mib_used(), memory);
                prop_assert_eq!(capacity.vms(), model.len());
                prop_assert!(memory <= 3072 && cpus <= 8 && model.len() <= 6);
            }
        }
    }

    #[test]
    fn a_refusal_says_what_is_missing() {
        let mut capacity = Capacity::new(LIMITS);
        let refused = capacity.admit(VmId::from_bytes([1; 16]), resources(1, 3000));
        assert_eq!(
            refused,
            Err(NoRoom::Memory {
                wanted: 3128,
                free: 3072
            })
        );
    }

    #[test]
    fn an_adopted_vm_counts_even_over_the_limit() {
        let mut capacity = Capacity::new(LIMITS);
        capacity.adopt(VmId::from_bytes([1; 16]), resources(9, 9000));
        assert!(
            capacity
                .admit(VmId::from_bytes([2; 16]), resources(1, 1))
                .is_err()
        );
        capacity.release(VmId::from_bytes([1; 16]));
        assert!(
            capacity
                .admit(VmId::from_bytes([2; 16]), resources(1, 1))
                .is_ok()
        );
    }
}
