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
//!
//! The same devices are put on a restored machine's board as on a new one's: there each goes on
//! from what was saved of it, and is refused when it is another than the guest knows.

use std::fmt;
use std::sync::Arc;

use super::layout::{
    EVENT_GSI, I8042_PORT, POWER_PORT, SERIAL_GSI, SERIAL_PORT, Slot, VIRTIO_BYTES,
};
use crate::clock::Clock;
use crate::device::i8042::{self, I8042};
use crate::device::power::{self, Event, Power};
use crate::device::serial::{self, Output, Serial};
use crate::device::virtio::mmio::{Mmio, QUEUE_NOTIFY};
use crate::device::virtio::{Driven, RestoreError, VirtioDevice};
use crate::device::{Device, Effect, Interrupt, Taken};
use crate::kvm::KvmError;
use crate::kvm::bell::{Doorbell, Line};
use crate::kvm::vm::Vm;
use crate::memory::{Gpa, GuestMemory};
use crate::snapshot::format::{FormatError, Sections};
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
    /// It is not the one that the guest was saved with.
    #[error("the device in slot {slot} is not the one that the guest was saved with")]
    Restore {
        /// Where it is.
        slot: Slot,
        /// Why.
        #[source]
        source: RestoreError,
    },
    /// The serial port cannot have been saved so.
    #[error(transparent)]
    Serial(#[from] serial::BadState),
    /// There are other devices than those that the guest was saved with.
    #[error("a machine with {found:?} where the guest was saved with {saved:?}")]
    Slots {
        /// What the guest knows.
        saved: Vec<Slot>,
        /// What there is.
        found: Vec<Slot>,
    },
    /// More was saved of the devices than they have.
    #[error(transparent)]
    Format(#[from] FormatError),
}

/// What was saved of a machine's devices.
#[derive(Clone, Debug)]
pub struct SavedDevices<'a> {
    /// Of the serial port.
    pub serial: serial::State,
    /// Of the events that the guest has not read.
    pub power: power::State,
    /// Which slots have a device, in their order.
    pub slots: Vec<Slot>,
    /// Of these.
    pub sections: Sections<'a>,
}

/// Lines into the guest, and bells out of it.
pub trait Wiring {
    /// The interrupt of a number.
    fn line(&self, gsi: u32) -> Result<Arc<dyn Interrupt>, KvmError>;

    /// What rings when the guest writes this queue's number to a place.
    fn bell(&self, at: Gpa, queue: u16) -> Result<Doorbell, KvmError>;
}

impl Wiring for Vm {
    fn line(&self, gsi: u32) -> Result<Arc<dyn Interrupt>, KvmError> {
        Ok(Arc::new(Line::new(self, gsi)?))
    }

    fn bell(&self, at: Gpa, queue: u16) -> Result<Doorbell, KvmError> {
        let bell = Doorbell::new(at, queue, None)?;
        bell.hang(self)?;
        Ok(bell)
    }
}

/// A device and its bells, one for each queue.
#[derive(Debug)]
pub struct Plugged {
    /// Where it is.
    pub slot: Slot,
    /// The device behind its transport.
    pub device: Arc<dyn Driven>,
    /// What rings when its driver kicks.
    pub bells: Arc<[Doorbell]>,
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
    /// What is saved of the serial port and of the events.
    #[must_use]
    pub fn save(&self) -> (serial::State, power::State) {
        (self.serial.save(), self.power.save())
    }

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
    memory: &'a GuestMemory,
    /// `None` for a guest that knows no device yet.
    saved: Option<(Vec<Slot>, Sections<'a>)>,
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
    pub fn new(
        wiring: &'a dyn Wiring,
        memory: &'a GuestMemory,
        clock: Box<dyn Clock + Send>,
    ) -> Result<Self, BoardError> {
        let serial = Serial::new(wiring.line(SERIAL_GSI)?, clock);
        Self::with(wiring, memory, serial, Power::default(), None)
    }

    /// The same for a guest that knows its devices. The chips that lines lead to are as they were
    /// saved: what was on its way is interrupted for again.
    pub fn restored(
        wiring: &'a dyn Wiring,
        memory: &'a GuestMemory,
        clock: Box<dyn Clock + Send>,
        saved: SavedDevices<'a>,
    ) -> Result<Self, BoardError> {
        let serial = Serial::restore(&saved.serial, wiring.line(SERIAL_GSI)?, clock)?;
        let power = Power::restore(saved.power);
        let devices = (saved.slots, saved.sections);
        Self::with(wiring, memory, serial, power, Some(devices))
    }

    fn with(
        wiring: &'a dyn Wiring,
        memory: &'a GuestMemory,
        serial: Serial,
        power: Power,
        saved: Option<(Vec<Slot>, Sections<'a>)>,
    ) -> Result<Self, BoardError> {
        let panel = Panel {
            serial: Arc::new(serial),
            power: Arc::new(power),
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
            memory,
            saved,
            buses,
            plugged: Vec::new(),
            panel,
        })
    }

    /// Puts a device into a slot, with the slot's interrupt: as a driver first sees it, or as the
    /// guest's driver left it.
    pub fn plug(
        &mut self,
        slot: Slot,
        device: impl VirtioDevice + 'static,
    ) -> Result<(), BoardError> {
        let (line, memory) = (self.wiring.line(slot.gsi())?, self.memory.clone());
        let device = match &mut self.saved {
            None => Mmio::new(device, memory, line),
            Some((_, from)) => Mmio::restore_from(from, slot.number(), device, memory, line)
                .map_err(|source| BoardError::Restore { slot, source })?,
        };
        let device: Arc<dyn Driven> = Arc::new(device);
        let kicked = Gpa(slot.start().0 + QUEUE_NOTIFY);
        let bells = (0..device.queues()).map(|queue| self.wiring.bell(kicked, queue));
        let bells: Arc<[Doorbell]> = bells.collect::<Result<_, _>>()?;
        let belled = Belled {
            device: Arc::clone(&device),
            bells: Arc::clone(&bells),
        };
        let place = slot.start().0;
        self.buses
            .memory
            .insert(place, VIRTIO_BYTES, Arc::new(belled))?;
        let plugged = Plugged {
            slot,
            device,
            bells,
        };
        self.plugged.push(plugged);
        Ok(())
    }

    /// For the processors, for the thread of the devices, and for the host; if the guest has all
    /// the devices that it knows.
    pub fn finish(mut self) -> Result<(Buses, Vec<Plugged>, Panel), BoardError> {
        self.plugged.sort_by_key(|plugged| plugged.slot);
        if let Some((saved, sections)) = self.saved {
            let found: Vec<Slot> = self.plugged.iter().map(|plugged| plugged.slot).collect();
            if found != saved {
                return Err(BoardError::Slots { saved, found });
            }
            sections.finish()?;
        }
        Ok((self.buses, self.plugged, self.panel))
    }
}

/// A device on its bus: a kick that came through a register rings the bell too.
#[derive(Debug)]
struct Belled {
    device: Arc<dyn Driven>,
    bells: Arc<[Doorbell]>,
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

    use super::{Board, BoardError, Event, Panel, SavedDevices, Wiring};
    use crate::clock::Monotonic;
    use crate::device::power;
    use crate::device::rate::Limit;
    use crate::device::virtio::blk::Blk;
    use crate::device::virtio::rng::{self, Rng};
    use crate::device::{Effect, Interrupt};
    use crate::disk::zeros::Zeros;
    use crate::kvm::KvmError;
    use crate::kvm::bell::Doorbell;
    use crate::machine::board::Plugged;
    use crate::machine::layout::Slot;
    use crate::memory::{Gpa, GuestMemory, Region, Sharing, Space};
    use crate::snapshot::format::{Sections, Writer};
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

        fn bell(&self, at: Gpa, queue: u16) -> Result<Doorbell, KvmError> {
            self.bells.lock().unwrap().push((at, queue));
            Doorbell::new(at, queue, None)
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
        board.plug(slot, Rng::new(rng::host))
    }

    #[test]
    fn a_device_gets_its_place_its_interrupt_and_its_bells() {
        let wiring = Loose::default();
        let memory = memory();
        let mut board = Board::new(&wiring, &memory, Box::new(Monotonic)).unwrap();
        plug(&mut board, Slot::Rng).unwrap();
        plug(&mut board, Slot::Image).unwrap();
        assert!(matches!(plug(&mut board, Slot::Net), Ok(())));
        let (buses, plugged, panel) = board.finish().unwrap();
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
            assert_eq!(plugged[2].bells[0].hear(), rings, "{queue}");
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

    fn disk(bytes: u64) -> Blk {
        let clock = Box::new(Monotonic);
        Blk::new(Box::new(Zeros(bytes)), "image", Limit::default(), clock)
    }

    /// What is saved of a board with a disk and entropy.
    fn saved(memory: &GuestMemory) -> (Vec<u8>, Panel) {
        let wiring = Loose::default();
        let mut board = Board::new(&wiring, memory, Box::new(Monotonic)).unwrap();
        plug(&mut board, Slot::Rng).unwrap();
        board.plug(Slot::Image, disk(4096)).unwrap();
        let (buses, plugged, panel) = board.finish().unwrap();
        assert_eq!(buses.ports.write(0x3ff, &[7]), Effect::Nothing);
        panel.power.note(Event::Generation);
        let mut writer = Writer::default();
        for Plugged { slot, device, .. } in plugged {
            device.settle().unwrap();
            device.save_into(&mut writer, slot.number()).unwrap();
        }
        (writer.finish(), panel)
    }

    /// Puts together what was saved in those slots with other devices.
    fn again(
        memory: &GuestMemory,
        slots: &[Slot],
        plug: impl FnOnce(&mut Board<'_>) -> Result<(), BoardError>,
    ) -> Result<u8, BoardError> {
        let (file, panel) = saved(memory);
        let (serial, power) = panel.save();
        let saved = SavedDevices {
            serial,
            power,
            slots: slots.to_vec(),
            sections: Sections::read(&file)?,
        };
        let wiring = Loose::default();
        let mut board = Board::restored(&wiring, memory, Box::new(Monotonic), saved)?;
        plug(&mut board)?;
        let (buses, _plugged, panel) = board.finish()?;
        assert_eq!(panel.save().1, power::State { events: 1 });
        let mut scratch = [0];
        buses.ports.read(0x3ff, &mut scratch);
        Ok(scratch[0])
    }

    #[test]
    fn a_restored_board_has_the_devices_that_the_guest_knows() {
        let memory = memory();
        let both = [Slot::Image, Slot::Rng];
        let same = |board: &mut Board<'_>| {
            board.plug(Slot::Image, disk(4096))?;
            plug(board, Slot::Rng)
        };
        assert_eq!(again(&memory, &both, same).unwrap(), 7);
        let error = |slots: &[Slot], put: &dyn Fn(&mut Board<'_>) -> Result<(), BoardError>| {
            let error = again(&memory, slots, put).unwrap_err();
            spore_wire::cause::chain(&error)
        };
        let said = error(&both, &|board| board.plug(Slot::Image, disk(8192)));
        assert!(
            said.contains("slot image") && said.contains("sectors: 16"),
            "{said}"
        );
        let said = error(&both, &|board| plug(board, Slot::Net));
        assert!(
            said.contains("section 6.3 (transport) is missing"),
            "{said}"
        );
        let said = error(&both, &|board| board.plug(Slot::Rng, disk(4096)));
        assert!(said.contains("section 7.5 (disk) is missing"), "{said}");
        let said = error(&both, &|board| plug(board, Slot::Rng));
        assert!(
            said.contains("[Rng] where the guest was saved with [Image, Rng]"),
            "{said}"
        );
        let said = error(&[Slot::Rng], &|board| plug(board, Slot::Rng));
        assert!(said.contains("left over"), "{said}");
        let said = error(&[Slot::Image, Slot::Rng], &|board| {
            plug(board, Slot::Image)?;
            plug(board, Slot::Rng)
        });
        assert!(said.contains("left over"), "{said}");
    }
}
