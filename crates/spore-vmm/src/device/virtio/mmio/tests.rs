//! The transport against a driver that does as it should, and one that does anything.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use proptest::prelude::*;

use super::{BadState, CONFIG, F_VERSION_1, Mmio, State, register, status};
use crate::device::virtio::queue::{Broken, Chain, QueueFault, QueueState, Queues};
use crate::device::virtio::{Driven as _, Handled, VirtioDevice, driver};
use crate::device::{Device as _, Effect, Interrupt};
use crate::memory::GuestMemory;
use crate::snapshot::Saved as _;
use crate::snapshot::format::{Fields, FormatError};
use crate::snapshot::tests::is_pinned;

const QUEUES: [u16; 2] = [driver::QUEUE_SIZE, 4];
const FEATURES: u64 = 0b101;

/// Remembers what it was told.
#[derive(Debug, Default)]
struct Memo {
    active: Option<u64>,
    resets: u32,
}

impl VirtioDevice for Memo {
    fn name(&self) -> &'static str {
        "memo"
    }

    fn id(&self) -> u32 {
        42
    }

    fn features(&self) -> u64 {
        FEATURES
    }

    fn queues(&self) -> &'static [u16] {
        &QUEUES
    }

    fn config(&self, offset: u64, data: &mut [u8]) {
        data.fill(u8::try_from(offset & 0xff).unwrap());
    }

    fn activate(&mut self, features: u64) {
        assert_eq!(self.active, None, "live once until the next reset");
        self.active = Some(features);
    }

    fn reset(&mut self) {
        self.active = None;
        self.resets += 1;
    }

    fn handle(&mut self, index: u16, queues: &mut Queues<'_>) -> Result<Handled, Broken> {
        let mut chain = Chain::default();
        let mut handled = Handled::default();
        while queues.pop(index, &mut chain)? {
            queues.push(index, chain.head(), 0)?;
            handled.interrupt = true;
        }
        Ok(handled)
    }
}

#[derive(Debug, Default)]
struct Line(AtomicU64);

impl Interrupt for Line {
    fn raise(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

fn mmio() -> (Mmio<Memo>, Arc<Line>, GuestMemory) {
    let (memory, line) = (driver::memory(), Arc::new(Line::default()));
    let mmio = Mmio::new(Memo::default(), memory.clone(), line.clone());
    (mmio, line, memory)
}

fn read(mmio: &Mmio<Memo>, offset: u64) -> u32 {
    let mut data = [0xee; 4];
    mmio.read(offset, &mut data);
    u32::from_le_bytes(data)
}

fn write(mmio: &Mmio<Memo>, offset: u64, value: u32) {
    let effect = mmio.write(offset, &value.to_le_bytes());
    assert_eq!(effect, Effect::Nothing, "{offset:#x} {value:#x}");
}

/// Steps of the status, one after the other.
fn steps(mmio: &Mmio<Memo>, steps: &[u32]) {
    for step in steps {
        let now = read(mmio, register::STATUS);
        write(mmio, register::STATUS, now | step);
    }
}

fn take_features(mmio: &Mmio<Memo>, features: u64) {
    for (select, half) in [(0, features & 0xffff_ffff), (1, features >> 32)] {
        write(mmio, register::DRIVER_FEATURES_SELECT, select);
        write(
            mmio,
            register::DRIVER_FEATURES,
            u32::try_from(half).unwrap(),
        );
    }
}

fn describe(mmio: &Mmio<Memo>, queue: u32, state: &QueueState) -> Effect {
    write(mmio, register::QUEUE_SELECT, queue);
    write(mmio, register::QUEUE_SIZE, u32::from(state.size));
    for (offset, place) in [
        (register::QUEUE_DESCRIPTORS, state.descriptors),
        (register::QUEUE_AVAILABLE, state.available),
        (register::QUEUE_USED, state.used),
    ] {
        write(mmio, offset, u32::try_from(place & 0xffff_ffff).unwrap());
        write(mmio, offset + 4, u32::try_from(place >> 32).unwrap());
    }
    mmio.write(register::QUEUE_READY, &1_u32.to_le_bytes())
}

/// A whole driver's start.
fn start(mmio: &Mmio<Memo>) {
    steps(mmio, &[status::ACKNOWLEDGE, status::DRIVER]);
    take_features(mmio, F_VERSION_1 | 1);
    steps(mmio, &[status::FEATURES_OK]);
    assert_eq!(describe(mmio, 0, &driver::state()), Effect::Nothing);
    steps(mmio, &[status::DRIVER_OK]);
}

fn offer_one(memory: &GuestMemory) {
    let state = driver::state();
    let at = crate::memory::Gpa(state.available + 2);
    let index = memory.load_u16(at).unwrap();
    memory.store_u16(at, index + 1).unwrap();
}

#[test]
fn a_driver_finds_the_device_and_what_it_offers() {
    let (mmio, ..) = mmio();
    assert_eq!(read(&mmio, register::MAGIC), 0x7472_6976);
    assert_eq!(read(&mmio, register::VERSION), 2);
    assert_eq!(read(&mmio, register::DEVICE_ID), 42);
    let mut offered = 0;
    for select in [0, 1] {
        write(&mmio, register::DEVICE_FEATURES_SELECT, select);
        offered |= u64::from(read(&mmio, register::DEVICE_FEATURES)) << (32 * select);
    }
    assert_eq!(offered, FEATURES | F_VERSION_1);
    write(&mmio, register::DEVICE_FEATURES_SELECT, 2);
    assert_eq!(read(&mmio, register::DEVICE_FEATURES), 0);
    for (queue, most) in [(0, u32::from(QUEUES[0])), (1, 4), (2, 0), (u32::MAX, 0)] {
        write(&mmio, register::QUEUE_SELECT, queue);
        assert_eq!(read(&mmio, register::QUEUE_SIZE_MAX), most);
    }
    let mut config = [0; 2];
    mmio.read(CONFIG + 3, &mut config);
    assert_eq!(config, [3, 3]);
}

#[test]
fn a_driver_starts_and_its_requests_are_handled() {
    let (mmio, line, memory) = mmio();
    start(&mmio);
    assert_eq!(mmio.lock().device.active, Some(F_VERSION_1 | 1));
    offer_one(&memory);
    assert_eq!(mmio.handle(0), Ok(false));
    assert_eq!(line.0.load(Ordering::SeqCst), 1);
    assert_eq!(read(&mmio, register::INTERRUPT_STATUS), 1);
    write(&mmio, register::INTERRUPT_ACK, 1);
    assert_eq!(read(&mmio, register::INTERRUPT_STATUS), 0);
    assert_eq!(mmio.handle(0), Ok(false));
    assert_eq!(line.0.load(Ordering::SeqCst), 1, "nothing more was used");
    let kick = mmio.write(register::QUEUE_NOTIFY, &0_u32.to_le_bytes());
    assert_eq!((kick, mmio.kicks()), (Effect::Kick(0), 1));
}

#[test]
fn features_are_agreed_on_or_refused() {
    for (features, accepted) in [
        (F_VERSION_1, true),
        (F_VERSION_1 | FEATURES, true),
        (FEATURES, false),
        (F_VERSION_1 | 2, false),
        (0, false),
    ] {
        let (mmio, ..) = mmio();
        steps(&mmio, &[status::ACKNOWLEDGE, status::DRIVER]);
        take_features(&mmio, features);
        steps(&mmio, &[status::FEATURES_OK]);
        let now = read(&mmio, register::STATUS);
        assert_eq!(now & status::FEATURES_OK != 0, accepted, "{features:#x}");
        take_features(&mmio, F_VERSION_1);
        let expected = if accepted { features } else { F_VERSION_1 };
        assert_eq!(mmio.save().features, expected, "locked once agreed");
    }
}

#[test]
fn no_step_is_left_out_or_taken_back() {
    let (mmio, ..) = mmio();
    for step in [
        status::DRIVER,
        status::FEATURES_OK,
        status::DRIVER_OK,
        0x40,
        u32::MAX,
    ] {
        write(&mmio, register::STATUS, step);
        assert_eq!(read(&mmio, register::STATUS), 0, "{step:#x}");
    }
    steps(&mmio, &[status::ACKNOWLEDGE, status::DRIVER]);
    write(&mmio, register::STATUS, status::ACKNOWLEDGE);
    assert_eq!(read(&mmio, register::STATUS), 3);
    assert_eq!(mmio.lock().device.active, None);
}

#[test]
fn a_queue_that_makes_no_sense_ends_the_guest() {
    let (mmio, ..) = mmio();
    steps(&mmio, &[status::ACKNOWLEDGE, status::DRIVER]);
    take_features(&mmio, F_VERSION_1);
    steps(&mmio, &[status::FEATURES_OK]);
    let mut far = driver::state();
    far.used = 1 << 40;
    let Effect::Fault(fault) = describe(&mmio, 0, &far) else {
        panic!("it is outside of memory");
    };
    assert_eq!((fault.device, fault.queue), ("memo", 0));
    assert!(matches!(fault.what, QueueFault::Outside { .. }));
}

#[test]
fn a_live_queue_is_not_moved() {
    let (mmio, _line, memory) = mmio();
    start(&mmio);
    let before = mmio.save();
    let mut moved = driver::state();
    moved.used = 0x8000;
    assert_eq!(describe(&mmio, 0, &moved), Effect::Nothing);
    write(&mmio, register::QUEUE_READY, 0);
    assert_eq!(read(&mmio, register::QUEUE_READY), 1);
    assert_eq!(mmio.save(), before);
    offer_one(&memory);
    assert_eq!(mmio.handle(0), Ok(false));
}

#[test]
fn a_reset_forgets_everything() {
    let (mmio, line, memory) = mmio();
    start(&mmio);
    offer_one(&memory);
    mmio.signal();
    write(&mmio, register::STATUS, 0);
    let fresh = State {
        queues: vec![QueueState::default(); 2],
        ..State::default()
    };
    assert_eq!(mmio.save(), fresh);
    assert_eq!(mmio.lock().device.resets, 1);
    assert_eq!(mmio.handle(0), Ok(false));
    assert_eq!(line.0.load(Ordering::SeqCst), 1, "no queue is live");
    start(&mmio);
    assert_eq!(mmio.handle(0), Ok(false));
    assert_eq!(line.0.load(Ordering::SeqCst), 2);
}

#[test]
fn a_driver_that_fails_has_no_queues() {
    let (mmio, line, memory) = mmio();
    start(&mmio);
    steps(&mmio, &[status::FAILED]);
    offer_one(&memory);
    assert_eq!(mmio.handle(0), Ok(false));
    assert_eq!(line.0.load(Ordering::SeqCst), 0);
}

#[test]
fn a_saved_device_goes_on_where_it_was() {
    let (mmio, line, memory) = mmio();
    start(&mmio);
    for _ in 0..3 {
        offer_one(&memory);
    }
    assert_eq!(mmio.handle(0), Ok(false));
    offer_one(&memory);
    let state = mmio.save();
    let again = Mmio::restore(&state, Memo::default(), memory.clone(), line.clone()).unwrap();
    assert_eq!(again.save(), state);
    assert_eq!(read(&again, register::INTERRUPT_STATUS), 1);
    assert_eq!(again.lock().device.active, Some(F_VERSION_1 | 1));
    assert_eq!(again.resume(), Ok(vec![]));
    let raised = line.0.load(Ordering::SeqCst);
    assert_eq!(raised, 3, "the one that was not kicked, and once anyway");
    assert_eq!(again.save().queues[0].next_used, 4);
}

#[test]
fn a_saved_device_without_a_driver_interrupts_nobody() {
    let (mmio, line, memory) = mmio();
    let again = Mmio::restore(&mmio.save(), Memo::default(), memory, line.clone()).unwrap();
    assert_eq!(again.resume(), Ok(vec![]));
    assert_eq!(line.0.load(Ordering::SeqCst), 0);
}

#[test]
fn a_saved_device_that_cannot_be_is_refused() {
    let (mmio, line, memory) = mmio();
    start(&mmio);
    let refused = |change: fn(&mut State)| {
        let mut state = mmio.save();
        change(&mut state);
        Mmio::restore(&state, Memo::default(), memory.clone(), line.clone()).unwrap_err()
    };
    let error = refused(|state| state.status = status::DRIVER_OK);
    assert!(matches!(error, BadState::Status { .. }));
    let error = refused(|state| state.features |= 2);
    assert!(matches!(error, BadState::Features { .. }));
    let error = refused(|state| state.features = 1);
    assert!(matches!(error, BadState::Features { .. }));
    let error = refused(|state| state.queues.push(QueueState::default()));
    assert!(matches!(error, BadState::Queues { .. }));
    let error = refused(|state| state.queues[0].descriptors = 1 << 40);
    assert!(matches!(error, BadState::Queue(_)));
    let error = refused(|state| state.queues[0].next_used = 9);
    assert!(matches!(error, BadState::Queue(_)));
}

#[test]
fn a_saved_transport_is_read_as_every_release_wrote_it() {
    let queue = QueueState {
        size: 0x10,
        ready: true,
        descriptors: 1,
        available: 2,
        used: 3,
        next_available: 4,
        next_used: 0x105,
    };
    let state = State {
        status: 15,
        interrupt: 1,
        selects: [2, 3],
        features: 1 << 32,
        queue_select: 4,
        queues: vec![queue],
    };
    let mut bytes = vec![15, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0];
    bytes.extend([0, 0, 0, 0, 1, 0, 0, 0, 4, 0, 0, 0, 1, 0, 0, 0]);
    bytes.extend([0x10, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
    bytes.extend([3, 0, 0, 0, 0, 0, 0, 0, 4, 0, 5, 1]);
    is_pinned(&state, 1, &bytes);
    let read = |at: usize, value| {
        let mut bytes = bytes.clone();
        bytes[at] = value;
        State::get(&mut Fields::new(&bytes))
    };
    assert!(matches!(read(28, 9), Err(FormatError::Count { .. })));
    assert!(matches!(read(34, 2), Err(FormatError::Name { .. })));
}

#[test]
fn accesses_of_other_sizes_are_none() {
    let (mmio, ..) = mmio();
    for (offset, count) in [(0, 1), (0, 2), (0, 8), (2, 4), (1, 4)] {
        let mut data = vec![0xee; count];
        mmio.read(offset, &mut data);
        assert_eq!(data, vec![0; count], "{offset} {count}");
    }
    for data in [&[1][..], &[1, 0], &[1, 0, 0, 0, 0, 0, 0, 0]] {
        assert_eq!(mmio.write(register::STATUS, data), Effect::Nothing);
    }
    assert_eq!(read(&mmio, register::STATUS), 0);
}

proptest! {
    /// Registers in any order with values that mean something, and a guest's memory of zeros.
    #[test]
    fn whatever_a_driver_writes_no_queue_is_live_that_was_not_checked(
        accesses in prop::collection::vec(
            (0..0x40_u64, prop_oneof![0..20_u32, Just(0x1000), Just(0x2000), any::<u32>()]),
            1..200,
        ),
    ) {
        let (mmio, line, memory) = mmio();
        for (number, value) in accesses {
            let offset = number * 4;
            let effect = mmio.write(offset, &value.to_le_bytes());
            match effect {
                Effect::Nothing | Effect::Fault(_) => {}
                Effect::Kick(index) => {
                    prop_assert_eq!(offset, register::QUEUE_NOTIFY);
                    prop_assert!(mmio.handle(index).is_ok(), "memory is all zeros");
                }
                other => prop_assert!(false, "{:?}", other),
            }
            let state = mmio.save();
            let inner = mmio.lock();
            let is_live = state.status & status::DRIVER_OK != 0
                && state.status & status::FAILED == 0;
            if let Effect::Fault(_) = effect {
                // The guest ends here: nothing is asked of it any more.
                return Ok(());
            }
            prop_assert_eq!(inner.device.active.is_some(), is_live);
            for (live, said) in inner.live.iter().zip(&state.queues) {
                if let Some(live) = live {
                    prop_assert!(is_live);
                    prop_assert_eq!(&live.state(), said);
                }
            }
            drop(inner);
            let taken = state.features & !(FEATURES | F_VERSION_1) == 0;
            let agreed = state.status & status::FEATURES_OK != 0;
            prop_assert!(taken || !agreed);
            // What was saved can be gone on with, once features are agreed on or are possible ones.
            let again = Mmio::restore(&state, Memo::default(), memory.clone(), line.clone());
            match again {
                Ok(again) => prop_assert_eq!(again.save(), state),
                Err(error) => prop_assert!(!taken, "{}", error),
            }
        }
    }
}
