//! What a machine's devices are put on: each gets its place in the guest's map, its interrupt, and
//! for each of its queues a bell that KVM rings when the driver kicks it.
//!
//! ```text
//!   guest ──kick──▶ KVM ──bell──▶ the thread of the devices ──▶ handle
//!   guest ──access──▶ KVM ──▶ its processor's thread ──▶ bus ──▶ device
//!   device ──line──▶ KVM ──interrupt──▶ guest
//! ```
//!
//! A place that no device was put on reads as ones: the tables name it, and drivers pass it over.

use std::fmt;
use std::sync::Arc;

use super::layout::{
    EVENT_GSI, I8042_PORT, POWER_PORT, SERIAL_GSI, SERIAL_PORT, Slot, VIRTIO_BYTES,
};
use crate::clock::Clock;
use crate::device::i8042::{self, I8042};
use crate::device::power::{self, Event, Power};
use crate::device::serial::{self, Output, Serial};
use crate::device::virtio::Driven;
use crate::device::virtio::mmio::QUEUE_NOTIFY;
use crate::device::{Device, Effect, Interrupt, Taken};
use crate::kvm::KvmError;
use crate::kvm::bell::{Bell, Line};
use crate::kvm::vm::Vm;
use crate::memory::Gpa;
use crate::vcpu::Buses;

/// Why a device is not on the board.
#[derive(Debug, thiserror::Error)]
pub enum BoardError {
    /// KVM gave no line or no bell.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// Something is in its place.
    #[error(transparent)]
    Taken(#[from] Taken),
}

/// Lines into the guest, and bells out of it.
pub trait Wiring {
    /// The interrupt of a number.
    fn line(&self, gsi: u32) -> Result<Arc<dyn Interrupt>, KvmError>;

    /// What rings when the guest writes this queue's number to a place.
    fn bell(&self, at: Gpa, queue: u16) -> Result<Bell, KvmError>;
}

impl Wiring for Vm {
    fn line(&self, gsi: u32) -> Result<Arc<dyn Interrupt>, KvmError> {
        Ok(Arc::new(Line::new(self, gsi)?))
    }

    fn bell(&self, at: Gpa, queue: u16) -> Result<Bell, KvmError> {
        let bell = Bell::new()?;
        self.tell_write_by(&bell, at, u32::from(queue))?;
        Ok(bell)
    }
}

/// A device and its bells, one for each queue.
#[derive(Debug)]
pub struct Plugged {
    /// The device behind its transport.
    pub device: Arc<dyn Driven>,
    /// What rings when its driver kicks.
    pub bells: Arc<[Bell]>,
}

/// The devices that every machine has, from the host's side.
pub struct Panel {
    serial: Arc<Serial>,
    power: Arc<Power>,
    events: Arc<dyn Interrupt>,
}

impl fmt::Debug for Panel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Panel")
            .field("power", &self.power)
            .finish_non_exhaustive()
    }
}

impl Panel {
    /// What has come out of the serial port.
    #[must_use]
    pub fn output(&self) -> Output {
        self.serial.output()
    }

    /// Tells the guest of an event.
    pub fn tell(&self, event: Event) {
        self.power.note(event);
        self.events.raise();
    }
}

/// Devices in their places.
pub struct Board<'a> {
    wiring: &'a dyn Wiring,
    buses: Buses,
    plugged: Vec<Plugged>,
    panel: Panel,
}

impl fmt::Debug for Board<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Board")
            .field("plugged", &self.plugged)
            .finish_non_exhaustive()
    }
}

impl<'a> Board<'a> {
    /// A board with what every machine has: serial port, reset line and power.
    pub fn new(wiring: &'a dyn Wiring, clock: Box<dyn Clock + Send>) -> Result<Self, BoardError> {
        let panel = Panel {
            serial: Arc::new(Serial::new(wiring.line(SERIAL_GSI)?, clock)),
            power: Arc::new(Power::default()),
            events: wiring.line(EVENT_GSI)?,
        };
        let mut buses = Buses::default();
        for (port, count, device) in [
            (
                SERIAL_PORT,
                serial::PORTS,
                panel.serial.clone() as Arc<dyn Device>,
            ),
            (I8042_PORT, i8042::PORTS, Arc::new(I8042)),
            (POWER_PORT, power::PORTS, panel.power.clone()),
        ] {
            buses.ports.insert(u64::from(port), count, device)?;
        }
        Ok(Self {
            wiring,
            buses,
            plugged: Vec::new(),
            panel,
        })
    }

    /// Puts a device into a slot. It is made with the slot's interrupt.
    pub fn plug(
        &mut self,
        slot: Slot,
        make: impl FnOnce(Arc<dyn Interrupt>) -> Arc<dyn Driven>,
    ) -> Result<(), BoardError> {
        let device = make(self.wiring.line(slot.gsi())?);
        let kicked = Gpa(slot.start().0 + QUEUE_NOTIFY);
        let bells = (0..device.queues()).map(|queue| self.wiring.bell(kicked, queue));
        let bells: Arc<[Bell]> = bells.collect::<Result<_, _>>()?;
        let belled = Belled {
            device: Arc::clone(&device),
            bells: Arc::clone(&bells),
        };
        let place = slot.start().0;
        self.buses
            .memory
            .insert(place, VIRTIO_BYTES, Arc::new(belled))?;
        self.plugged.push(Plugged { device, bells });
        Ok(())
    }

    /// For the processors, for the thread of the devices, and for the host.
    #[must_use]
    pub fn finish(self) -> (Buses, Vec<Plugged>, Panel) {
        (self.buses, self.plugged, self.panel)
    }
}

/// A device on its bus: a kick that came through a register rings the bell too.
#[derive(Debug)]
struct Belled {
    device: Arc<dyn Driven>,
    bells: Arc<[Bell]>,
}

impl Device for Belled {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.device.read(offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) -> Effect {
        let effect = self.device.write(offset, data);
        let Effect::Kick(queue) = effect else {
            return effect;
        };
        if let Some(bell) = self.bells.get(usize::from(queue)) {
            bell.ring();
        }
        Effect::Nothing
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::os::fd::AsFd as _;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::sync::{Arc, Mutex};

    use super::{Board, BoardError, Event, Wiring};
    use crate::clock::Monotonic;
    use crate::device::virtio::mmio::Mmio;
    use crate::device::virtio::rng::{self, Rng};
    use crate::device::{Effect, Interrupt};
    use crate::kvm::KvmError;
    use crate::kvm::bell::Bell;
    use crate::machine::layout::Slot;
    use crate::memory::{Gpa, GuestMemory, Region, Sharing, Space};
    use rustix::fs::MemfdFlags;

    #[derive(Debug, Default)]
    struct Count(AtomicU64);

    impl Interrupt for Count {
        fn raise(&self) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    /// Wires that end here.
    #[derive(Debug, Default)]
    struct Loose {
        lines: Mutex<BTreeMap<u32, Arc<Count>>>,
        bells: Mutex<Vec<(Gpa, u16)>>,
    }

    impl Wiring for Loose {
        fn line(&self, gsi: u32) -> Result<Arc<dyn Interrupt>, KvmError> {
            let line = Arc::<Count>::default();
            let before = self.lines.lock().unwrap().insert(gsi, line.clone());
            assert!(before.is_none(), "line {gsi} is another's");
            Ok(line)
        }

        fn bell(&self, at: Gpa, queue: u16) -> Result<Bell, KvmError> {
            self.bells.lock().unwrap().push((at, queue));
            Bell::new()
        }
    }

    fn memory() -> GuestMemory {
        let file = rustix::fs::memfd_create("board", MemfdFlags::CLOEXEC).unwrap();
        let (start, offset, bytes) = (Gpa(0), 0, 0x1000);
        rustix::fs::ftruncate(&file, bytes).unwrap();
        let region = Region {
            start,
            offset,
            bytes,
        };
        let space = Space::reserve(bytes).unwrap();
        let memory = space.fill(file.as_fd(), Sharing::Shared, &[region]);
        memory.unwrap()
    }

    fn plug(board: &mut Board<'_>, slot: Slot) -> Result<(), BoardError> {
        board.plug(slot, |line| {
            Arc::new(Mmio::new(Rng::new(rng::host), memory(), line))
        })
    }

    #[test]
    fn a_device_gets_its_place_its_interrupt_and_its_bells() {
        let wiring = Loose::default();
        let mut board = Board::new(&wiring, Box::new(Monotonic)).unwrap();
        plug(&mut board, Slot::Rng).unwrap();
        plug(&mut board, Slot::Image).unwrap();
        assert!(matches!(plug(&mut board, Slot::Net), Ok(())));
        let (buses, plugged, panel) = board.finish();
        let lines: Vec<u32> = wiring.lines.lock().unwrap().keys().copied().collect();
        assert_eq!(lines, [4, 5, 8, 10, 11]);
        let bells = [
            (Gpa(0xd000_5050), 0),
            (Gpa(0xd000_0050), 0),
            (Gpa(0xd000_3050), 0),
        ];
        assert_eq!(*wiring.bells.lock().unwrap(), bells);
        let magic = |slot: Slot| {
            let mut data = [0; 4];
            buses.memory.read(slot.start().0, &mut data);
            data
        };
        assert_eq!(magic(Slot::Rng), *b"virt");
        assert_eq!(magic(Slot::Scratch), [0xff; 4], "an empty slot");
        // A kick that KVM did not tell of, of a queue that is there and of one that is not.
        for (queue, rings) in [(0_u32, true), (7, false), (u32::MAX, false)] {
            let at = Slot::Rng.start().0 + 0x50;
            let effect = buses.memory.write(at, &queue.to_le_bytes());
            assert_eq!(effect, Effect::Nothing);
            assert_eq!(plugged[0].bells[0].hear(), rings, "{queue}");
        }
        let effect = buses.ports.write(0x3f8, b"x");
        assert_eq!(effect, Effect::Nothing);
        assert_eq!(panel.output().bytes, b"x");
        assert_eq!(buses.ports.write(0x64, &[0xfe]), Effect::Reset);
        panel.tell(Event::Generation);
        let told = wiring.lines.lock().unwrap()[&11].0.load(Ordering::SeqCst);
        let mut data = [0];
        buses.ports.read(0x604, &mut data);
        assert_eq!((told, data), (1, [1]));
    }
}
