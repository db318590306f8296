//! The virtio-mmio transport, version 2: a page of registers between a driver and a device.
//!
//! ```text
//!            ACKNOWLEDGE ──▶ DRIVER ──▶ FEATURES_OK ──▶ DRIVER_OK
//!   (reset)                  features    queues          live: the queues are handled
//!      ▲ └───────── any of them, FAILED too ────────────────┘
//!      └── writing 0 to the status
//! ```
//!
//! Each step only adds a bit to the status. Features are written after DRIVER, queues after
//! FEATURES_OK; writes at other times, to other places or of other sizes change nothing. A queue
//! that makes no sense when its driver says it is ready ends the guest.
//!
//! The interrupt's status is outside of the lock: a driver reads it at every interrupt, and must
//! not wait for a disk.

#[cfg(test)]
mod tests;

use std::io;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::queue::{Broken, Queue, QueueState, Queues};
use super::{Driven, F_VERSION_1, Handled, RestoreError, VirtioDevice, Wants};
use crate::device::{Device, Effect, Interrupt};
use crate::fault::GuestFault;
use crate::memory::GuestMemory;
use crate::snapshot::Saved;
use crate::snapshot::format::{Fields, FormatError, Sections, Writer};
use crate::snapshot::kind::Kind;

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;

/// Nobody's, as the specification has it for devices without one.
const VENDOR: u32 = 0;

/// Bits of the status.
pub mod status {
    /// The guest has seen the device.
    pub const ACKNOWLEDGE: u32 = 1;
    /// It has a driver for it.
    pub const DRIVER: u32 = 2;
    /// The driver is set up.
    pub const DRIVER_OK: u32 = 4;
    /// Features are agreed on.
    pub const FEATURES_OK: u32 = 8;
    /// The driver has given up.
    pub const FAILED: u32 = 128;
}

/// Bits of the interrupt's status: something was used.
const USED_RING: u32 = 1;

/// Registers of 4 bytes, by their offsets.
mod register {
    pub(super) const MAGIC: u64 = 0x00;
    pub(super) const VERSION: u64 = 0x04;
    pub(super) const DEVICE_ID: u64 = 0x08;
    pub(super) const VENDOR_ID: u64 = 0x0c;
    pub(super) const DEVICE_FEATURES: u64 = 0x10;
    pub(super) const DEVICE_FEATURES_SELECT: u64 = 0x14;
    pub(super) const DRIVER_FEATURES: u64 = 0x20;
    pub(super) const DRIVER_FEATURES_SELECT: u64 = 0x24;
    pub(super) const QUEUE_SELECT: u64 = 0x30;
    pub(super) const QUEUE_SIZE_MAX: u64 = 0x34;
    pub(super) const QUEUE_SIZE: u64 = 0x38;
    pub(super) const QUEUE_READY: u64 = 0x44;
    pub(super) const QUEUE_NOTIFY: u64 = 0x50;
    pub(super) const INTERRUPT_STATUS: u64 = 0x60;
    pub(super) const INTERRUPT_ACK: u64 = 0x64;
    pub(super) const STATUS: u64 = 0x70;
    pub(super) const QUEUE_DESCRIPTORS: u64 = 0x80;
    pub(super) const QUEUE_AVAILABLE: u64 = 0x90;
    pub(super) const QUEUE_USED: u64 = 0xa0;
    /// Length and place of shared memory, which no device of ours has: ones say so.
    pub(super) const SHARED_MEMORY: std::ops::Range<u64> = 0xb0..0xc0;
}

/// Where drivers write a queue's number, for KVM to tell us without asking this transport.
pub const QUEUE_NOTIFY: u64 = register::QUEUE_NOTIFY;

/// Where a device's configuration begins.
pub const CONFIG: u64 = 0x100;

/// What is saved of a transport.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// How far the driver is.
    pub status: u32,
    /// What it has not yet acknowledged.
    pub interrupt: u32,
    /// Which half of the features it reads, and which it writes.
    pub selects: [u32; 2],
    /// What it took.
    pub features: u64,
    /// Which queue it describes.
    pub queue_select: u32,
    /// What it said of each queue.
    pub queues: Vec<QueueState>,
}

/// The most queues of any device of ours.
const QUEUES_MAX: u32 = 8;

impl Saved for State {
    const VERSION: u16 = 1;

    fn put(&self, into: &mut Vec<u8>) {
        let [device_select, driver_select] = self.selects;
        for number in [self.status, self.interrupt, device_select, driver_select] {
            into.extend(number.to_le_bytes());
        }
        into.extend(self.features.to_le_bytes());
        into.extend(self.queue_select.to_le_bytes());
        let count = u32::try_from(self.queues.len()).unwrap_or(u32::MAX);
        into.extend(count.to_le_bytes());
        for queue in &self.queues {
            queue.put(into);
        }
    }

    fn get(from: &mut Fields<'_>) -> Result<Self, FormatError> {
        let (status, interrupt) = (from.u32()?, from.u32()?);
        let selects = [from.u32()?, from.u32()?];
        let (features, queue_select) = (from.u64()?, from.u32()?);
        let count = from.count("queues", QUEUES_MAX)?;
        let queues = (0..count).map(|_| QueueState::get(from));
        Ok(Self {
            status,
            interrupt,
            selects,
            features,
            queue_select,
            queues: queues.collect::<Result<_, _>>()?,
        })
    }
}

/// A saved transport that this device cannot have come to.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadState {
    /// Steps that are not in order.
    #[error("{device} was saved with status {status:#x}, which no driver comes to")]
    Status {
        /// The device's name.
        device: &'static str,
        /// What was saved.
        status: u32,
    },
    /// Features that are not offered.
    #[error("{device} was saved with features {features:#x} and offers {offered:#x}")]
    Features {
        /// The device's name.
        device: &'static str,
        /// What was saved.
        features: u64,
        /// What it offers.
        offered: u64,
    },
    /// Another number of queues.
    #[error("{device} was saved with {found} queues and has {expected}")]
    Queues {
        /// The device's name.
        device: &'static str,
        /// What was saved.
        found: usize,
        /// What it has.
        expected: usize,
    },
    /// A queue that makes no sense.
    #[error("a saved queue makes no sense")]
    Queue(#[from] GuestFault),
}

/// A device behind its registers.
#[derive(Debug)]
pub struct Mmio<D> {
    memory: GuestMemory,
    line: Arc<dyn Interrupt>,
    interrupt: AtomicU32,
    /// Kicks that came through a register, where KVM should have told of them.
    kicks: AtomicU64,
    inner: Mutex<Inner<D>>,
}

#[derive(Debug)]
struct Inner<D> {
    device: D,
    registers: Registers,
    /// Those that are live, by number.
    live: Vec<Option<Queue>>,
}

/// What the driver has written.
#[derive(Clone, Debug)]
struct Registers {
    status: u32,
    device_features_select: u32,
    driver_features_select: u32,
    features: u64,
    queue_select: u32,
    queues: Vec<QueueState>,
}

impl Registers {
    fn new(queues: usize) -> Self {
        Self {
            status: 0,
            device_features_select: 0,
            driver_features_select: 0,
            features: 0,
            queue_select: 0,
            queues: vec![QueueState::default(); queues],
        }
    }

    fn is(&self, set: u32, unset: u32) -> bool {
        self.status & set == set && self.status & unset == 0
    }
}

impl<D: VirtioDevice> Mmio<D> {
    /// A device that no driver has touched.
    pub fn new(device: D, memory: GuestMemory, line: Arc<dyn Interrupt>) -> Self {
        let queues = device.queues().len();
        Self {
            memory,
            line,
            interrupt: AtomicU32::new(0),
            kicks: AtomicU64::new(0),
            inner: Mutex::new(Inner {
                device,
                registers: Registers::new(queues),
                live: vec![None; queues],
            }),
        }
    }

    /// A device as its driver left it, in the memory that it left it in.
    ///
    /// What the driver did just before is not known: whoever goes on calls
    /// [`resume`](Driven::resume) once.
    pub fn restore(
        state: &State,
        device: D,
        memory: GuestMemory,
        line: Arc<dyn Interrupt>,
    ) -> Result<Self, BadState> {
        let name = device.name();
        let (found, expected) = (state.queues.len(), device.queues().len());
        if found != expected {
            return Err(BadState::Queues {
                device: name,
                found,
                expected,
            });
        }
        if !is_possible(state.status) {
            let status = state.status;
            return Err(BadState::Status {
                device: name,
                status,
            });
        }
        let (features, offered) = (state.features, offered(&device));
        let agreed = state.status & status::FEATURES_OK != 0;
        if features & !offered != 0 || (agreed && features & F_VERSION_1 == 0) {
            return Err(BadState::Features {
                device: name,
                features,
                offered,
            });
        }
        let restored = Self::new(device, memory, line);
        restored
            .interrupt
            .store(state.interrupt & USED_RING, Ordering::SeqCst);
        restored.lock().continue_with(state, &restored.memory)?;
        Ok(restored)
    }

    /// A device as it was saved under a number by [`Driven::save_into`].
    pub fn restore_from(
        from: &mut Sections<'_>,
        number: u8,
        device: D,
        memory: GuestMemory,
        line: Arc<dyn Interrupt>,
    ) -> Result<Self, RestoreError> {
        let state = from.get(Kind::Transport.of(number))?;
        let device = device.restore_from(from, number)?;
        Ok(Self::restore(&state, device, memory, line)?)
    }

    /// What is saved, of the transport: the device is saved beside it, with the guest stopped. No
    /// request is in flight between two calls.
    #[must_use]
    pub fn save(&self) -> State {
        let inner = self.lock();
        let registers = &inner.registers;
        let queues = registers.queues.iter().zip(&inner.live);
        State {
            status: registers.status,
            interrupt: self.interrupt.load(Ordering::SeqCst),
            selects: [
                registers.device_features_select,
                registers.driver_features_select,
            ],
            features: registers.features,
            queue_select: registers.queue_select,
            queues: queues
                .map(|(said, live)| live.as_ref().map_or(*said, Queue::state))
                .collect(),
        }
    }

    /// Lends the device, to save it or to tell it what only its own kind is told.
    pub fn with<R>(&self, work: impl FnOnce(&mut D) -> R) -> R {
        work(&mut self.lock().device)
    }

    /// One turn of the device's, and the interrupt that it asks for. `true` when another is due.
    fn turn(
        &self,
        work: impl FnOnce(&mut D, &mut Queues<'_>) -> Result<Handled, Broken>,
    ) -> Result<bool, GuestFault> {
        let inner = &mut *self.lock();
        let device = inner.device.name();
        let mut queues = Queues::new(&mut inner.live, &self.memory);
        let handled = work(&mut inner.device, &mut queues);
        let handled = handled.map_err(|Broken { queue, what }| GuestFault {
            device,
            queue,
            what,
        })?;
        if handled.interrupt {
            self.signal();
        }
        Ok(handled.more)
    }

    /// Interrupts the driver.
    pub fn signal(&self) {
        self.interrupt.fetch_or(USED_RING, Ordering::SeqCst);
        self.line.raise();
    }

    /// How many kicks came through a register.
    pub fn kicks(&self) -> u64 {
        self.kicks.load(Ordering::Relaxed)
    }

    fn lock(&self) -> MutexGuard<'_, Inner<D>> {
        // After a panic the process is on its way out; until then no driver sees half a change.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read_register(&self, offset: u64) -> u32 {
        if offset == register::INTERRUPT_STATUS {
            return self.interrupt.load(Ordering::SeqCst);
        }
        let inner = self.lock();
        let registers = &inner.registers;
        match offset {
            register::MAGIC => MAGIC,
            register::VERSION => VERSION,
            register::DEVICE_ID => inner.device.id(),
            register::VENDOR_ID => VENDOR,
            register::DEVICE_FEATURES => {
                half(offered(&inner.device), registers.device_features_select)
            }
            register::QUEUE_SIZE_MAX => inner.most().map_or(0, u32::from),
            register::QUEUE_READY => inner.selected().map_or(0, |queue| u32::from(queue.ready)),
            register::STATUS => registers.status,
            offset if register::SHARED_MEMORY.contains(&offset) => u32::MAX,
            // Of the generation too: no configuration changes while its driver looks at it.
            _ => 0,
        }
    }

    fn write_register(&self, offset: u64, value: u32) -> Effect {
        match offset {
            register::INTERRUPT_ACK => {
                self.interrupt.fetch_and(!value, Ordering::SeqCst);
                return Effect::Nothing;
            }
            register::QUEUE_NOTIFY => {
                self.kicks.fetch_add(1, Ordering::Relaxed);
                return u16::try_from(value).map_or(Effect::Nothing, Effect::Kick);
            }
            _ => {}
        }
        let inner = &mut *self.lock();
        if offset == register::STATUS {
            if value == 0 {
                inner.reset();
                self.interrupt.store(0, Ordering::SeqCst);
                return Effect::Nothing;
            }
            return fault(inner.step(value, &self.memory));
        }
        if offset == register::QUEUE_READY {
            return fault(inner.ready(value, &self.memory));
        }
        inner.write(offset, value);
        Effect::Nothing
    }
}

fn fault(done: Result<(), GuestFault>) -> Effect {
    done.map_or_else(Effect::Fault, |()| Effect::Nothing)
}

fn offered(device: &impl VirtioDevice) -> u64 {
    device.features() | F_VERSION_1
}

/// The half of the features that a driver has selected.
fn half(features: u64, select: u32) -> u32 {
    let shifted = match select {
        0 => features,
        1 => features >> 32,
        _ => 0,
    };
    u32::try_from(shifted & u64::from(u32::MAX)).unwrap_or(0)
}

/// Whether a driver can have come to a status: each step needs those before it.
fn is_possible(value: u32) -> bool {
    use status::{ACKNOWLEDGE, DRIVER, DRIVER_OK, FAILED, FEATURES_OK};
    let steps = [
        0,
        ACKNOWLEDGE,
        ACKNOWLEDGE | DRIVER,
        ACKNOWLEDGE | DRIVER | FEATURES_OK,
        ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK,
    ];
    steps.contains(&(value & !FAILED))
}

impl<D: VirtioDevice> Inner<D> {
    fn selected(&self) -> Option<&QueueState> {
        let index = usize::try_from(self.registers.queue_select).ok()?;
        self.registers.queues.get(index)
    }

    /// The selected queue, while the driver may describe it.
    fn described(&mut self) -> Option<&mut QueueState> {
        let may = self
            .registers
            .is(status::FEATURES_OK, status::DRIVER_OK | status::FAILED);
        let index = usize::try_from(self.registers.queue_select).ok()?;
        let queue = self.registers.queues.get_mut(index)?;
        may.then_some(queue)
    }

    /// The most entries of the selected queue.
    fn most(&self) -> Option<u16> {
        let index = usize::try_from(self.registers.queue_select).ok()?;
        self.device.queues().get(index).copied()
    }

    /// Takes what was saved for what the driver has written.
    fn continue_with(&mut self, state: &State, memory: &GuestMemory) -> Result<(), GuestFault> {
        let [device_features_select, driver_features_select] = state.selects;
        self.registers = Registers {
            status: state.status,
            device_features_select,
            driver_features_select,
            features: state.features,
            queue_select: state.queue_select,
            queues: state.queues.clone(),
        };
        if self.registers.is(status::DRIVER_OK, status::FAILED) {
            self.activate(memory)?;
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.registers = Registers::new(self.registers.queues.len());
        self.live.fill(None);
        self.device.reset();
    }

    /// Takes a step of the driver's, if it is the next one.
    fn step(&mut self, value: u32, memory: &GuestMemory) -> Result<(), GuestFault> {
        let before = self.registers.status;
        let mut after = value;
        if before & !value != 0 || !is_possible(value) {
            return Ok(());
        }
        let new = value & !before;
        if new & status::FEATURES_OK != 0 {
            let features = self.registers.features;
            let agreed = features & !offered(&self.device) == 0 && features & F_VERSION_1 != 0;
            if !agreed {
                // The driver reads the status back, and sees that it was refused.
                after &= !status::FEATURES_OK;
            }
        }
        if !is_possible(after) {
            return Ok(());
        }
        self.registers.status = after;
        if new & after & status::DRIVER_OK != 0 && after & status::FAILED == 0 {
            return self.activate(memory);
        }
        if after & status::FAILED != 0 {
            self.live.fill(None);
            self.device.reset();
        }
        Ok(())
    }

    /// Makes the queues that the driver has made ready.
    fn activate(&mut self, memory: &GuestMemory) -> Result<(), GuestFault> {
        for index in 0..self.registers.queues.len() {
            let queue = self.queue(index, memory)?;
            if let Some(live) = self.live.get_mut(index) {
                *live = queue;
            }
        }
        self.device.activate(self.registers.features);
        Ok(())
    }

    /// A queue as it was described, if it is ready.
    fn queue(&self, index: usize, memory: &GuestMemory) -> Result<Option<Queue>, GuestFault> {
        let said = self.registers.queues.get(index);
        let most = self.device.queues().get(index);
        let (Some(said), Some(most)) = (said.filter(|said| said.ready), most) else {
            return Ok(None);
        };
        let queue = Queue::new(memory, said, *most).map_err(|what| GuestFault {
            device: self.device.name(),
            queue: u16::try_from(index).unwrap_or(u16::MAX),
            what,
        })?;
        Ok(Some(queue))
    }

    /// The driver has described a queue, or takes it back.
    fn ready(&mut self, value: u32, memory: &GuestMemory) -> Result<(), GuestFault> {
        let Some(queue) = self.described() else {
            return Ok(());
        };
        queue.ready = value == 1;
        let index = usize::try_from(self.registers.queue_select).unwrap_or(usize::MAX);
        self.queue(index, memory).map(drop)
    }

    /// Every other register.
    fn write(&mut self, offset: u64, value: u32) {
        match offset {
            register::DEVICE_FEATURES_SELECT => self.registers.device_features_select = value,
            register::DRIVER_FEATURES_SELECT => self.registers.driver_features_select = value,
            register::QUEUE_SELECT => self.registers.queue_select = value,
            register::DRIVER_FEATURES => {
                let locked = status::FEATURES_OK | status::FAILED;
                if self.registers.is(status::DRIVER, locked) {
                    let select = self.registers.driver_features_select;
                    put_half(&mut self.registers.features, select, value);
                }
            }
            _ => self.describe(offset, value),
        }
    }

    /// What a driver says of the selected queue before it is ready.
    fn describe(&mut self, offset: u64, value: u32) {
        let Some(queue) = self.described().filter(|queue| !queue.ready) else {
            return;
        };
        let place = match offset {
            register::QUEUE_SIZE => {
                // What does not fit is no power of two up to the most, and refused when it is
                // ready.
                queue.size = u16::try_from(value).unwrap_or(0);
                return;
            }
            _ if offset & !4 == register::QUEUE_DESCRIPTORS => &mut queue.descriptors,
            _ if offset & !4 == register::QUEUE_AVAILABLE => &mut queue.available,
            _ if offset & !4 == register::QUEUE_USED => &mut queue.used,
            _ => return,
        };
        put_half(place, u32::from(offset & 4 != 0), value);
    }
}

/// Sets the low or the high half of a number.
fn put_half(number: &mut u64, select: u32, value: u32) {
    let value = u64::from(value);
    *number = match select {
        0 => (*number & !u64::from(u32::MAX)) | value,
        1 => (*number & u64::from(u32::MAX)) | value << 32,
        _ => *number,
    };
}

impl<D: VirtioDevice> Device for Mmio<D> {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if let Some(offset) = offset.checked_sub(CONFIG) {
            self.lock().device.config(offset, data);
            return;
        }
        data.fill(0);
        if let (0, Ok(data)) = (offset % 4, <&mut [u8; 4]>::try_from(data)) {
            *data = self.read_register(offset).to_le_bytes();
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> Effect {
        // No device of ours has a configuration that its driver writes.
        match (
            offset < CONFIG && offset.is_multiple_of(4),
            <[u8; 4]>::try_from(data),
        ) {
            (true, Ok(data)) => self.write_register(offset, u32::from_le_bytes(data)),
            _ => Effect::Nothing,
        }
    }
}

impl<D: VirtioDevice> Driven for Mmio<D> {
    fn queues(&self) -> u16 {
        u16::try_from(self.lock().device.queues().len()).unwrap_or(u16::MAX)
    }

    fn handle(&self, index: u16) -> Result<bool, GuestFault> {
        self.turn(|device, queues| device.handle(index, queues))
    }

    fn ready(&self) -> Result<bool, GuestFault> {
        self.turn(VirtioDevice::ready)
    }

    fn wants(&self) -> Wants {
        self.lock().device.wants()
    }

    fn resume(&self) -> Result<Vec<u16>, GuestFault> {
        let mut due = Vec::new();
        for index in 0..self.queues() {
            if self.handle(index)? {
                due.push(index);
            }
        }
        // What is not live has no driver that could be waiting.
        if self.lock().live.iter().any(Option::is_some) {
            self.signal();
        }
        Ok(due)
    }

    fn settle(&self) -> io::Result<()> {
        self.lock().device.settle()
    }

    fn save_into(&self, into: &mut Writer, number: u8) -> Result<(), FormatError> {
        into.put(Kind::Transport.of(number), &self.save())?;
        self.lock().device.save_into(into, number)
    }
}
