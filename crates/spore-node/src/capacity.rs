//! What this host has to give, and who has it: a plain value without locks or IO.
//!
//! Used by the [`crate::node::Node`] before a start. Never gives more than there is: a VM counts
//! from its admission until nothing of it is left. Nor does it give what others on the host have
//! taken meanwhile: a start also needs that much memory to be available, beside what VMs that are
//! still booting have not taken yet.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use spore_wire::id::VmId;
use spore_wire::node::Resources;
use thiserror::Error;

use crate::memory::MemoryNow;

/// What a host has to give.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CapacityLimits {
    /// The host's memory.
    pub memory_mib: u64,
    /// Of it, kept for the host itself.
    pub memory_reserve_mib: u64,
    /// Host memory that a VM takes beyond its guest's, as the driver says.
    pub overhead_mib: u64,
    /// And its egress proxy, where it has one.
    pub proxy_mib: u64,
    /// vCPUs that may be given; more than the host has, since most VMs idle.
    pub cpus: u64,
    /// VMs that may be there at once, in any phase.
    pub vms: usize,
}

/// The least time, in percent, that a host waits for memory as a whole when it starts nothing more.
const STALLED_PERCENT: u32 = 10;

/// What a VM asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ask {
    /// As its release says.
    pub resources: Resources,
    /// Whether a proxy runs beside it.
    pub egress: Egress,
    /// The memory of the snapshot that it begins from, which has still to be made.
    pub image_mib: u64,
}

/// Whether a VM has a way out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Egress {
    /// None.
    None,
    /// A proxy of its own.
    Proxy,
}

/// Who has what of the host.
#[derive(Clone, Debug)]
pub struct Capacity {
    limits: CapacityLimits,
    given: BTreeMap<VmId, Share>,
    memory_mib: u64,
    /// Memories of snapshots that VMs share, each counted once.
    images_mib: u64,
    /// Of it, of VMs that are booting: what they will take is not missing from the host yet.
    booting_mib: u64,
    cpus: u64,
}

#[derive(Clone, Copy, Debug)]
struct Share {
    memory_mib: u64,
    cpus: u64,
    stage: Stage,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Booting,
    Settled,
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
    /// Memory that others on the host have.
    #[error(
        "{wanted} MiB of memory are needed, and of {available} MiB that the host has available \
         {kept} MiB are kept: stop something on the host, or try again later"
    )]
    Available {
        /// With the overhead, and of all that boot.
        wanted: u64,
        /// As the kernel says.
        available: u64,
        /// For the host.
        kept: u64,
    },
    /// The host waits for memory as a whole.
    #[error(
        "the host is short of memory: all of it waits {percent} % of the time; stop a VM, or try \
         again later"
    )]
    Stalled {
        /// Of the last ten seconds.
        percent: u32,
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
            images_mib: 0,
            booting_mib: 0,
            cpus: 0,
        }
    }

    /// Gives `vm` its share, or says what is missing. A VM that has its share keeps it.
    ///
    /// # Errors
    /// [`NoRoom`]; nothing is given then.
    pub fn admit(&mut self, vm: VmId, ask: Ask, now: MemoryNow) -> Result<(), NoRoom> {
        if self.given.contains_key(&vm) {
            return Ok(());
        }
        if self.given.len() >= self.limits.vms {
            return Err(NoRoom::Vms {
                max: self.limits.vms,
            });
        }
        let share = self.share(ask, Stage::Booting);
        let wanted = share.memory_mib;
        let free = self.memory_mib_total();
        let free = free.saturating_sub(self.memory_mib_used());
        if wanted > free {
            return Err(NoRoom::Memory { wanted, free });
        }
        let wanted = wanted.saturating_add(self.booting_mib);
        let wanted = wanted.saturating_add(ask.image_mib);
        let (available, kept) = (now.available_mib, self.limits.memory_reserve_mib / 4);
        if wanted.saturating_add(kept) > available {
            return Err(NoRoom::Available {
                wanted,
                available,
                kept,
            });
        }
        if now.stalled_percent >= STALLED_PERCENT {
            return Err(NoRoom::Stalled {
                percent: now.stalled_percent,
            });
        }
        let free = self.limits.cpus.saturating_sub(self.cpus);
        if share.cpus > free {
            let wanted = share.cpus;
            return Err(NoRoom::Cpus { wanted, free });
        }
        self.give(vm, share);
        Ok(())
    }

    /// Counts a VM that is there already, whether or not there is room for it.
    pub fn adopt(&mut self, vm: VmId, ask: Ask) {
        self.give(vm, self.share(ask, Stage::Settled));
    }

    fn give(&mut self, vm: VmId, share: Share) {
        if let Entry::Vacant(place) = self.given.entry(vm) {
            place.insert(share);
            self.memory_mib += share.memory_mib;
            self.booting_mib += share.booting_mib();
            self.cpus += share.cpus;
        }
    }

    /// `vm` has booted: what it takes is missing from what the host has available.
    pub fn settle(&mut self, vm: VmId) {
        if let Some(share) = self.given.get_mut(&vm) {
            self.booting_mib -= share.booting_mib();
            share.stage = Stage::Settled;
        }
    }

    /// Takes back what `vm` had.
    pub fn release(&mut self, vm: VmId) {
        if let Some(share) = self.given.remove(&vm) {
            self.memory_mib -= share.memory_mib;
            self.booting_mib -= share.booting_mib();
            self.cpus -= share.cpus;
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
        self.memory_mib.saturating_add(self.images_mib)
    }

    /// Of it, what memories of snapshots could take.
    #[must_use]
    pub const fn memory_mib_beside_vms(&self) -> u64 {
        self.memory_mib_total().saturating_sub(self.memory_mib)
    }

    /// Says what the memories of snapshots take that VMs begin from. A hole in one becomes a page
    /// when somebody touches it, so each counts as what its guest has.
    pub const fn set_images(&mut self, mib: u64) {
        self.images_mib = mib;
    }

    /// VMs that have a share.
    #[must_use]
    pub fn vms(&self) -> usize {
        self.given.len()
    }

    fn share(&self, ask: Ask, stage: Stage) -> Share {
        let proxy_mib = match ask.egress {
            Egress::None => 0,
            Egress::Proxy => self.limits.proxy_mib,
        };
        let beside_mib = self.limits.overhead_mib.saturating_add(proxy_mib);
        Share {
            memory_mib: u64::from(ask.resources.memory_mib).saturating_add(beside_mib),
            cpus: u64::from(ask.resources.cpus),
            stage,
        }
    }
}

impl Share {
    const fn booting_mib(&self) -> u64 {
        match self.stage {
            Stage::Booting => self.memory_mib,
            Stage::Settled => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{any, prop, prop_assert, prop_assert_eq, proptest};
    use spore_wire::id::VmId;
    use spore_wire::node::Resources;

    use super::{Ask, Capacity, CapacityLimits, Egress, NoRoom};
    use crate::memory::MemoryNow;

    const LIMITS: CapacityLimits = CapacityLimits {
        memory_mib: 4096,
        memory_reserve_mib: 1024,
        overhead_mib: 128,
        proxy_mib: 32,
        cpus: 8,
        vms: 6,
    };

    const PLENTY: MemoryNow = MemoryNow {
        available_mib: 1_000_000,
        stalled_percent: 0,
    };

    fn vm(number: u8) -> VmId {
        VmId::from_bytes([number; 16])
    }

    fn ask(cpus: u8, memory_mib: u32) -> Ask {
        Ask {
            resources: Resources {
                cpus,
                memory_mib,
                disk_mib: 64,
            },
            egress: Egress::None,
            image_mib: 0,
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
                } else if capacity.admit(vm, ask(cpus, memory_mib), PLENTY).is_ok() {
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
        let refused = capacity.admit(vm(1), ask(1, 3000), PLENTY);
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
        capacity.adopt(vm(1), ask(9, 9000));
        assert!(capacity.admit(vm(2), ask(1, 1), PLENTY).is_err());
        capacity.release(vm(1));
        assert!(capacity.admit(vm(2), ask(1, 1), PLENTY).is_ok());
    }

    #[test]
    fn memories_of_snapshots_that_vms_share_are_not_given_to_others() {
        let mut capacity = Capacity::new(LIMITS);
        capacity.set_images(1024);
        let refused = capacity.admit(vm(1), ask(1, 2000), PLENTY).unwrap_err();
        let (wanted, free) = (2128, 2048);
        assert_eq!(refused, NoRoom::Memory { wanted, free });
        capacity.admit(vm(1), ask(1, 1900), PLENTY).unwrap();
        assert_eq!(capacity.memory_mib_used(), 1024 + 2028);
        assert_eq!(capacity.memory_mib_beside_vms(), 3072 - 2028);
    }

    #[test]
    fn a_memory_that_has_still_to_be_made_must_be_available() {
        let mut capacity = Capacity::new(LIMITS);
        let available_mib = 100 + 128 + 256 + 99;
        let now = MemoryNow {
            available_mib,
            stalled_percent: 0,
        };
        let fork = Ask {
            image_mib: 100,
            ..ask(1, 100)
        };
        let refused = capacity.admit(vm(1), fork, now).unwrap_err();
        assert!(matches!(refused, NoRoom::Available { .. }), "{refused}");
        capacity.admit(vm(1), ask(1, 100), now).unwrap();
    }

    #[test]
    fn a_proxy_counts_with_its_vm() {
        let mut capacity = Capacity::new(LIMITS);
        let granted = Ask {
            egress: Egress::Proxy,
            ..ask(1, 100)
        };
        capacity.admit(vm(1), granted, PLENTY).unwrap();
        assert_eq!(capacity.memory_mib_used(), 100 + 128 + 32);
        capacity.release(vm(1));
        assert_eq!(capacity.memory_mib_used(), 0);
    }

    #[test]
    fn memory_that_others_took_is_not_given_nor_what_booting_vms_will_take() {
        let mut capacity = Capacity::new(LIMITS);
        let now = MemoryNow {
            available_mib: 1000,
            ..PLENTY
        };
        capacity.admit(vm(1), ask(1, 400), now).unwrap();
        let refused = capacity.admit(vm(2), ask(1, 400), now);
        let wanted = NoRoom::Available {
            wanted: 2 * (400 + 128),
            available: 1000,
            kept: 256,
        };
        assert_eq!(refused, Err(wanted));
        capacity.settle(vm(1));
        capacity.settle(vm(1));
        capacity.admit(vm(2), ask(1, 400), now).unwrap();
        capacity.release(vm(2));
        capacity.release(vm(1));
        assert_eq!(capacity.booting_mib, 0);
    }

    #[test]
    fn a_host_that_waits_for_memory_starts_nothing() {
        let stalled = MemoryNow {
            stalled_percent: 10,
            ..PLENTY
        };
        let refused = Capacity::new(LIMITS).admit(vm(1), ask(1, 1), stalled);
        assert_eq!(refused, Err(NoRoom::Stalled { percent: 10 }));
    }
}
