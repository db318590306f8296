//! Devices and the buses that they are reached by. Called by the processors' threads for every
//! access that the guest makes outside of its memory.
//!
//! An access that no device takes reads as ones and writes nothing, as on a real bus: guests look
//! for what is there. An access that is only partly a device's is none of its accesses.

pub mod i8042;
pub mod power;
pub mod rate;
pub mod serial;
pub mod virtio;

use std::fmt;
use std::sync::Arc;

use crate::fault::GuestFault;

/// Registers at a place on a bus. Every device locks as little as it can: an access waits for
/// whatever else is done with the device, and the guest's processor with it.
pub trait Device: Send + Sync + fmt::Debug {
    /// Answers a read of `data.len()` bytes at `offset` of the device's own place. Sets all of
    /// them.
    fn read(&self, offset: u64, data: &mut [u8]);

    /// Takes a write, and says what it means for the machine.
    fn write(&self, offset: u64, data: &[u8]) -> Effect;
}

/// What an access means beyond the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Effect {
    /// Nothing.
    Nothing,
    /// The driver has put something into this queue and there was no quicker way to say so.
    Kick(u16),
    /// The guest wants to begin anew.
    Reset,
    /// The guest wants to end.
    PowerOff,
    /// The guest did what ends it.
    Fault(GuestFault),
}

/// A line to the guest's interrupt controller.
pub trait Interrupt: Send + Sync + fmt::Debug {
    /// Raises it, once.
    fn raise(&self);
}

/// Devices of one kind of access, in order of their places.
#[derive(Debug, Default)]
pub struct Bus {
    devices: Vec<Placed>,
}

#[derive(Debug)]
struct Placed {
    start: u64,
    bytes: u64,
    device: Arc<dyn Device>,
}

/// Two devices in one place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{bytes:#x} bytes at {start:#x} are not free on this bus")]
pub struct Taken {
    /// Where the second would begin.
    pub start: u64,
    /// How long it would be.
    pub bytes: u64,
}

impl Bus {
    /// Puts a device at a place that no other has.
    pub fn insert(&mut self, start: u64, bytes: u64, device: Arc<dyn Device>) -> Result<(), Taken> {
        let taken = Taken { start, bytes };
        let end = start.checked_add(bytes).filter(|end| *end > start);
        let end = end.ok_or(taken)?;
        let at = self.devices.partition_point(|placed| placed.start < start);
        let before = at
            .checked_sub(1)
            .and_then(|before| self.devices.get(before));
        let free = before.is_none_or(|before| before.start + before.bytes <= start)
            && self.devices.get(at).is_none_or(|after| end <= after.start);
        if !free {
            return Err(taken);
        }
        let placed = Placed {
            start,
            bytes,
            device,
        };
        self.devices.insert(at, placed);
        Ok(())
    }

    /// Reads.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address, data.len()) {
            Some((device, offset)) => device.read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// Writes.
    pub fn write(&self, address: u64, data: &[u8]) -> Effect {
        match self.find(address, data.len()) {
            Some((device, offset)) => device.write(offset, data),
            None => Effect::Nothing,
        }
    }

    /// The device that all bytes of an access belong to, and where in it they are.
    fn find(&self, address: u64, bytes: usize) -> Option<(&dyn Device, u64)> {
        let at = self
            .devices
            .partition_point(|placed| placed.start <= address);
        let placed = self.devices.get(at.checked_sub(1)?)?;
        let offset = address - placed.start;
        let end = offset.checked_add(u64::try_from(bytes).ok()?)?;
        (end <= placed.bytes).then_some((placed.device.as_ref(), offset))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use proptest::prelude::*;

    use super::{Bus, Device, Effect};

    /// Remembers what it was asked.
    #[derive(Debug, Default)]
    struct Memo {
        number: u8,
        writes: Mutex<Vec<(u64, Vec<u8>)>>,
    }

    impl Device for Memo {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(self.number);
            if let (Some(first), Ok(offset)) = (data.first_mut(), u8::try_from(offset)) {
                *first = offset;
            }
        }

        fn write(&self, offset: u64, data: &[u8]) -> Effect {
            self.writes.lock().unwrap().push((offset, data.to_vec()));
            Effect::Reset
        }
    }

    fn memo(number: u8) -> Arc<Memo> {
        Arc::new(Memo {
            number,
            ..Memo::default()
        })
    }

    #[test]
    fn an_access_reaches_the_device_that_it_is_wholly_in() {
        let (one, two) = (memo(1), memo(2));
        let mut bus = Bus::default();
        bus.insert(0x20, 8, two.clone()).unwrap();
        bus.insert(0x10, 8, one.clone()).unwrap();
        let read = |address, count: usize| {
            let mut data = vec![0; count];
            bus.read(address, &mut data);
            data
        };
        assert_eq!(read(0x10, 2), [0, 1]);
        assert_eq!(read(0x26, 2), [6, 2]);
        for (address, count) in [
            (0xf, 1),
            (0xf, 2),
            (0x17, 2),
            (0x18, 1),
            (0x28, 1),
            (u64::MAX, 8),
        ] {
            assert_eq!(read(address, count), vec![0xff; count], "{address:#x}");
        }
        assert_eq!(bus.write(0x12, &[7, 8]), Effect::Reset);
        assert_eq!(bus.write(0x17, &[7, 8]), Effect::Nothing);
        assert_eq!(*one.writes.lock().unwrap(), [(2, vec![7, 8])]);
        assert!(two.writes.lock().unwrap().is_empty());
    }

    #[test]
    fn two_devices_are_never_in_one_place() {
        let mut bus = Bus::default();
        bus.insert(0x10, 8, memo(1)).unwrap();
        for (start, bytes) in [
            (0x10, 8),
            (0x17, 1),
            (0xf, 2),
            (0, 0x100),
            (0x12, 2),
            (0x30, 0),
            (u64::MAX, 2),
        ] {
            assert!(bus.insert(start, bytes, memo(2)).is_err(), "{start:#x}");
        }
        bus.insert(0x18, 8, memo(3)).unwrap();
        bus.insert(0xf, 1, memo(4)).unwrap();
    }

    proptest! {
        #[test]
        fn a_bus_finds_what_a_search_finds(
            places in prop::collection::vec((0..200_u64, 1..20_u64), 0..12),
            address in 0..230_u64,
            count in 1..9_usize,
        ) {
            let mut bus = Bus::default();
            let mut placed: Vec<(u64, u64, u8)> = Vec::new();
            for (number, (start, bytes)) in (1..).zip(places) {
                let free = placed.iter().all(|(s, b, _)| start + bytes <= *s || s + b <= start);
                prop_assert_eq!(bus.insert(start, bytes, memo(number)).is_ok(), free);
                if free {
                    placed.push((start, bytes, number));
                }
            }
            let end = address + count as u64;
            let owner = placed.iter().find(|(s, b, _)| *s <= address && end <= s + b);
            let mut data = vec![0; count];
            bus.read(address, &mut data);
            let mut expected = vec![owner.map_or(0xff, |(_, _, number)| *number); count];
            if let Some((start, _, _)) = owner {
                expected[0] = u8::try_from(address - start).unwrap();
            }
            prop_assert_eq!(data, expected);
        }
    }
}
