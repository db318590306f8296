//! Lines and bells that are there before a machine's devices are. Hanging the bells of a machine
//! takes longer than all else that is done for its devices ([`Doorbell`]): in one that waits for a
//! guest that is done, and in one whose guest waits it is left until the guest rings.
//!
//! A bell of a slot that no device is put into is heard by nobody; nobody's driver rings it.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use super::board::Wiring;
use super::layout::{EVENT_GSI, SERIAL_GSI, SLOTS, Slot};
use crate::device::Interrupt;
use crate::device::virtio::mmio::QUEUE_NOTIFY;
use crate::kvm::KvmError;
use crate::kvm::bell::{Bell, Doorbell};
use crate::kvm::vm::Vm;
use crate::memory::Gpa;

/// Of all slots, and of what every machine has.
#[derive(Debug)]
pub struct Wires {
    lines: BTreeMap<u32, Arc<dyn Interrupt>>,
    /// Those that no device has taken.
    bells: Mutex<BTreeMap<(Gpa, u16), Doorbell>>,
    /// Rung when one wants to be hung.
    asks: Arc<Bell>,
}

impl Wires {
    /// Makes them. No bell is hung.
    pub fn new(from: &dyn Wiring) -> Result<Self, KvmError> {
        let lines = SLOTS.into_iter().map(Slot::gsi);
        let lines = lines.chain([SERIAL_GSI, EVENT_GSI]);
        let lines = lines.map(|gsi| Ok((gsi, from.line(gsi)?)));
        let bells = SLOTS.into_iter().flat_map(|slot| {
            let at = Gpa(slot.start().0 + QUEUE_NOTIFY);
            (0..queues(slot)).map(move |queue| (at, queue))
        });
        let asks = Arc::new(Bell::new()?);
        let bells = bells.map(|(at, queue)| {
            let bell = Doorbell::new(at, queue, Some(Arc::clone(&asks)))?;
            Ok(((at, queue), bell))
        });
        Ok(Self {
            lines: lines.collect::<Result<_, KvmError>>()?,
            bells: Mutex::new(bells.collect::<Result<_, KvmError>>()?),
            asks,
        })
    }

    /// Hangs all bells that no device has taken.
    pub fn hang(&self, vm: &Vm) -> Result<(), KvmError> {
        let bells = self.bells.lock().unwrap_or_else(PoisonError::into_inner);
        bells.values().try_for_each(|bell| bell.hang(vm))
    }

    /// What is rung when a bell wants to be hung.
    #[must_use]
    pub const fn asks(&self) -> &Arc<Bell> {
        &self.asks
    }

    /// The same, and what is missing among them from where they were made.
    #[must_use]
    pub const fn or<'a>(&'a self, from: &'a dyn Wiring) -> Wired<'a> {
        Wired { wires: self, from }
    }
}

/// How many queues a device in a slot has. One with more gets its bells when it is there.
const fn queues(slot: Slot) -> u16 {
    match slot {
        Slot::Image | Slot::Folder | Slot::Scratch | Slot::Rng => 1,
        Slot::Net => 2,
        Slot::Console => 4,
    }
}

/// Wires of both kinds.
pub struct Wired<'a> {
    wires: &'a Wires,
    from: &'a dyn Wiring,
}

impl fmt::Debug for Wired<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Wired")
            .field("wires", &self.wires)
            .finish_non_exhaustive()
    }
}

impl Wiring for Wired<'_> {
    fn line(&self, gsi: u32) -> Result<Arc<dyn Interrupt>, KvmError> {
        match self.wires.lines.get(&gsi) {
            Some(line) => Ok(Arc::clone(line)),
            None => self.from.line(gsi),
        }
    }

    fn bell(&self, at: Gpa, queue: u16) -> Result<Doorbell, KvmError> {
        let bells = self.wires.bells.lock();
        let bell = bells
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&(at, queue));
        bell.map_or_else(|| self.from.bell(at, queue), Ok)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::{Wires, queues};
    use crate::device::Interrupt;
    use crate::device::virtio::VirtioDevice as _;
    use crate::device::virtio::rng::{self, Rng};
    use crate::kvm::KvmError;
    use crate::kvm::bell::Doorbell;
    use crate::machine::board::Wiring;
    use crate::machine::layout::{EVENT_GSI, SERIAL_GSI, SLOTS, Slot};
    use crate::memory::Gpa;

    #[derive(Debug)]
    struct Mute;

    impl Interrupt for Mute {
        fn raise(&self) {}
    }

    /// Counts what is made.
    #[derive(Default)]
    struct Made {
        lines: Mutex<Vec<u32>>,
        bells: Mutex<Vec<(Gpa, u16)>>,
    }

    impl Wiring for Made {
        fn line(&self, gsi: u32) -> Result<Arc<dyn Interrupt>, KvmError> {
            self.lines.lock().unwrap().push(gsi);
            Ok(Arc::new(Mute))
        }

        fn bell(&self, at: Gpa, queue: u16) -> Result<Doorbell, KvmError> {
            self.bells.lock().unwrap().push((at, queue));
            Doorbell::new(at, queue, None)
        }
    }

    #[test]
    fn what_is_there_ahead_is_not_made_again() {
        let made = Made::default();
        let wires = Wires::new(&made).unwrap();
        let (lines, bells) = (
            made.lines.lock().unwrap().len(),
            made.bells.lock().unwrap().len(),
        );
        assert_eq!((lines, bells), (8, 0));
        let wired = wires.or(&made);
        for gsi in SLOTS
            .map(Slot::gsi)
            .into_iter()
            .chain([SERIAL_GSI, EVENT_GSI])
        {
            wired.line(gsi).unwrap();
        }
        for slot in SLOTS {
            for queue in 0..queues(slot) {
                let at = Gpa(slot.start().0 + 0x50);
                let bell = wired.bell(at, queue).unwrap();
                bell.ring();
                assert!(wires.asks().hear(), "it wants to be hung");
            }
        }
        assert_eq!(made.lines.lock().unwrap().len(), lines);
        assert_eq!(made.bells.lock().unwrap().len(), bells);
        // A bell is one device's, and what is not there ahead is made.
        wired.bell(Gpa(Slot::Rng.start().0 + 0x50), 0).unwrap();
        wired.bell(Gpa(Slot::Rng.start().0 + 0x50), 1).unwrap();
        wired.line(20).unwrap();
        assert_eq!(made.lines.lock().unwrap().last(), Some(&20));
        assert_eq!(made.bells.lock().unwrap().len(), bells + 2);
        let count = Rng::new(rng::host).queues().len();
        assert_eq!(count, usize::from(queues(Slot::Rng)));
    }
}
