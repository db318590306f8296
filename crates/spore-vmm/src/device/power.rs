//! The guest's way to end itself through ACPI, and ours to tell it of an event.
//!
//! ```text
//!   +0  sleep control   the guest writes S5 and the enable bit: it powers off
//!   +1  sleep status    reads as zero: nothing ever woke it
//!   +4  event           reads as what has happened since it was read last, a bit each
//! ```
//!
//! The tables have a method of the generic event device read the last one when its interrupt comes.

use std::sync::atomic::{AtomicU8, Ordering};

use super::{Device, Effect};
use crate::snapshot::Saved;
use crate::snapshot::format::{Fields, FormatError};

/// How many ports it has.
pub const PORTS: u64 = 8;

/// Where its registers are, for the tables.
pub const SLEEP_CONTROL: u16 = 0;
/// The second.
pub const SLEEP_STATUS: u16 = 1;
/// The third.
pub const EVENT: u16 = 4;

/// What the tables call powered off. The guest writes it at bit 2, with the enable bit 5.
pub const S5: u8 = 5;

const SLEEP_ENABLE: u8 = 1 << 5;
const SLEEP_TYPE_SHIFT: u8 = 2;
const SLEEP_TYPE_MASK: u8 = 0x7;

/// What the guest is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// Its generation id has changed: it is a clone.
    Generation,
}

impl Event {
    /// Its bit.
    #[must_use]
    pub const fn bit(self) -> u8 {
        match self {
            Self::Generation => 1,
        }
    }
}

/// What is saved: events that the guest has not read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// A bit each.
    pub events: u8,
}

impl Saved for State {
    const VERSION: u16 = 1;

    fn put(&self, into: &mut Vec<u8>) {
        into.push(self.events);
    }

    fn get(from: &mut Fields<'_>) -> Result<Self, FormatError> {
        let events = from.u8()?;
        Ok(Self { events })
    }
}

/// The registers.
#[derive(Debug, Default)]
pub struct Power {
    events: AtomicU8,
}

impl Power {
    /// As it was saved.
    #[must_use]
    pub const fn restore(state: State) -> Self {
        Self {
            events: AtomicU8::new(state.events),
        }
    }

    /// What is saved.
    #[must_use]
    pub fn save(&self) -> State {
        State {
            events: self.events.load(Ordering::SeqCst),
        }
    }

    /// Notes an event. Whoever does so raises the interrupt.
    pub fn note(&self, event: Event) {
        self.events.fetch_or(event.bit(), Ordering::SeqCst);
    }
}

impl Device for Power {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let (Ok(EVENT), [event]) = (u16::try_from(offset), data) {
            *event = self.events.swap(0, Ordering::SeqCst);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> Effect {
        let (Ok(SLEEP_CONTROL), [value]) = (u16::try_from(offset), data) else {
            return Effect::Nothing;
        };
        let kind = (value >> SLEEP_TYPE_SHIFT) & SLEEP_TYPE_MASK;
        if value & SLEEP_ENABLE != 0 && kind == S5 {
            Effect::PowerOff
        } else {
            Effect::Nothing
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Device as _, EVENT, Effect, Event, Power};
    use crate::snapshot::tests::is_pinned;

    fn event(power: &Power) -> u8 {
        let mut data = [0xff];
        power.read(u64::from(EVENT), &mut data);
        data[0]
    }

    #[test]
    fn an_event_is_read_once_and_lives_through_a_snapshot() {
        let power = Power::default();
        assert_eq!(event(&power), 0);
        power.note(Event::Generation);
        is_pinned(&power.save(), 1, &[1]);
        let restored = Power::restore(power.save());
        for power in [power, restored] {
            assert_eq!(event(&power), 1);
            assert_eq!(event(&power), 0);
        }
    }

    #[test]
    fn only_s5_with_its_enable_bit_powers_off() {
        let power = Power::default();
        assert_eq!(power.write(0, &[0x34]), Effect::PowerOff);
        for value in [0x14, 0x30, 0x2c, 0] {
            assert_eq!(power.write(0, &[value]), Effect::Nothing, "{value:#x}");
        }
        assert_eq!(power.write(1, &[0x34]), Effect::Nothing);
        assert_eq!(power.write(0, &[0x34, 0]), Effect::Nothing);
    }
}
