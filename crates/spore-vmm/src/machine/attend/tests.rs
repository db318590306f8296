//! Tests of the thread with devices that count their turns, without KVM.

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::{Begin, ahead};
use crate::clock::{Clock as _, Monotonic};
use crate::device::virtio::queue::QueueFault;
use crate::device::virtio::{Driven, Interest, Wants};
use crate::device::{Device, Effect};
use crate::end::End;
use crate::fault::GuestFault;
use crate::kvm::bell::Doorbell;
use crate::machine::board::Plugged;
use crate::machine::layout::Slot;
use crate::memory::Gpa;
use crate::snapshot::format::{FormatError, Writer};
use crate::worker::Workers;

const LIMIT: Duration = Duration::from_secs(20);

/// Counts its turns and does what it is told.
#[derive(Debug, Default)]
struct Fake {
    /// Of queue 0, of queue 1, of what it waited for, and how often it was gone on with.
    turns: [AtomicU64; 4],
    /// How often it says that another turn is due.
    more: AtomicU64,
    faults: Mutex<bool>,
    wants: Mutex<Wants>,
    /// Read at each turn for what it waited for.
    input: Mutex<Option<Arc<OwnedFd>>>,
    heard: Mutex<VecDeque<u8>>,
}

impl Fake {
    fn count(&self, of: usize) -> u64 {
        self.turns[of].load(Ordering::SeqCst)
    }

    fn turn(&self, of: usize) -> Result<bool, GuestFault> {
        self.turns[of].fetch_add(1, Ordering::SeqCst);
        if *self.faults.lock().unwrap() {
            return Err(GuestFault {
                device: "fake",
                queue: 1,
                what: QueueFault::Long,
            });
        }
        let take = |more: u64| more.checked_sub(1);
        let more = self
            .more
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, take);
        Ok(more.is_ok())
    }
}

impl Device for Fake {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, _offset: u64, _data: &[u8]) -> Effect {
        Effect::Nothing
    }
}

impl Driven for Fake {
    fn queues(&self) -> u16 {
        2
    }

    fn handle(&self, index: u16) -> Result<bool, GuestFault> {
        self.turn(usize::from(index))
    }

    fn ready(&self) -> Result<bool, GuestFault> {
        let mut byte = [0];
        let mut input = self.input.lock().unwrap();
        if let Some(from) = &*input {
            if rustix::io::read(from, &mut byte).unwrap() == 1 {
                self.heard.lock().unwrap().push_back(byte[0]);
            } else {
                // The other side is gone: nothing more is wanted of it.
                *input = None;
                self.wants.lock().unwrap().descriptor = None;
            }
        }
        self.wants.lock().unwrap().at = None;
        self.turn(2)
    }

    fn wants(&self) -> Wants {
        self.wants.lock().unwrap().clone()
    }

    fn resume(&self) -> Result<Vec<u16>, GuestFault> {
        self.turn(3)?;
        Ok(vec![1])
    }

    fn settle(&self) -> io::Result<()> {
        Ok(())
    }

    fn save_into(&self, _into: &mut Writer, _number: u8) -> Result<(), FormatError> {
        Ok(())
    }
}

struct Machine {
    workers: Workers,
    fake: Arc<Fake>,
    bells: Arc<[Doorbell]>,
}

/// One device of two queues, as it was set up before.
fn machine(begin: Begin, set_up: impl FnOnce(&Fake)) -> Machine {
    let fake = Arc::new(Fake::default());
    set_up(&fake);
    let bells = (0..2).map(|queue| Doorbell::new(Gpa(0), queue, None).unwrap());
    let bells: Arc<[Doorbell]> = bells.collect();
    let plugged = Plugged {
        slot: Slot::Rng,
        device: fake.clone(),
        bells: Arc::clone(&bells),
    };
    let workers = Workers::new();
    let attendant = ahead(&workers, || ()).unwrap();
    let clock = Box::new(Monotonic);
    attendant.give(vec![plugged], clock, begin).unwrap();
    Machine {
        workers,
        fake,
        bells,
    }
}

fn until(is: impl Fn() -> bool) {
    let start = Monotonic.now();
    while !is() {
        assert!(Monotonic.now() - start < LIMIT, "it never came");
        std::thread::yield_now();
    }
}

#[test]
fn a_bell_gives_its_queue_a_turn_and_no_other() {
    let machine = machine(Begin::Cold, |_| {});
    machine.workers.resume();
    for round in 1..50 {
        machine.bells[1].ring();
        until(|| machine.fake.count(1) == round);
    }
    machine.workers.pause(LIMIT).unwrap();
    assert_eq!((machine.fake.count(0), machine.fake.count(2)), (0, 0));
}

#[test]
fn a_paused_device_has_no_turns_and_the_bell_is_heard_later() {
    let machine = machine(Begin::Cold, |_| {});
    machine.workers.resume();
    machine.workers.pause(LIMIT).unwrap();
    machine.bells[0].ring();
    std::thread::sleep(Duration::from_millis(5));
    assert_eq!(machine.fake.count(0), 0);
    machine.workers.resume();
    until(|| machine.fake.count(0) == 1);
}

#[test]
fn a_device_that_has_more_gets_its_turns_without_a_bell() {
    let machine = machine(Begin::Cold, |fake| fake.more.store(9, Ordering::SeqCst));
    machine.workers.resume();
    machine.bells[0].ring();
    until(|| machine.fake.count(0) == 10);
}

#[test]
fn a_device_that_always_has_more_keeps_neither_others_nor_orders_waiting() {
    let machine = machine(Begin::Cold, |fake| {
        fake.more.store(u64::MAX, Ordering::SeqCst)
    });
    machine.workers.resume();
    machine.bells[0].ring();
    until(|| machine.fake.count(0) > 10);
    machine.bells[1].ring();
    until(|| machine.fake.count(1) > 10);
    machine.workers.pause(LIMIT).unwrap();
    let before = machine.fake.count(0);
    machine.workers.resume();
    until(|| machine.fake.count(0) > before);
    machine.workers.end(End::Stopped);
    assert!(matches!(*machine.workers.wait(), End::Stopped));
}

#[test]
fn a_descriptor_is_waited_for_while_it_is_wanted() {
    let (from, to) = rustix::pipe::pipe().unwrap();
    let from = Arc::new(from);
    let machine = machine(Begin::Cold, |fake| {
        fake.wants.lock().unwrap().descriptor = Some((Arc::clone(&from), Interest::Read));
        *fake.input.lock().unwrap() = Some(Arc::clone(&from));
    });
    machine.workers.resume();
    for byte in 0..20 {
        rustix::io::write(&to, &[byte]).unwrap();
        until(|| machine.fake.heard.lock().unwrap().back() == Some(&byte));
    }
    // Hung up, it is ready for ever; it is not looked at when nobody wants it.
    drop(to);
    until(|| machine.fake.input.lock().unwrap().is_none());
    std::thread::sleep(Duration::from_millis(5));
    let turns = machine.fake.count(2);
    std::thread::sleep(Duration::from_millis(5));
    assert_eq!(machine.fake.count(2), turns);
    assert!(turns <= 22, "{turns}");
}

#[test]
fn what_a_device_wants_after_a_turn_is_what_is_waited_for() {
    let (from, to) = rustix::pipe::pipe().unwrap();
    rustix::io::write(&to, &[1, 2]).unwrap();
    let machine = machine(Begin::Cold, |_| {});
    machine.workers.resume();
    machine.bells[0].ring();
    until(|| machine.fake.count(0) == 1);
    assert_eq!(machine.fake.count(2), 0);
    let from = Arc::new(from);
    *machine.fake.input.lock().unwrap() = Some(Arc::clone(&from));
    machine.fake.wants.lock().unwrap().descriptor = Some((from, Interest::Both));
    machine.bells[0].ring();
    until(|| machine.fake.heard.lock().unwrap().len() == 2);
}

#[test]
fn a_time_comes_once() {
    let now = Monotonic.now();
    let at = now + Duration::from_millis(20);
    let machine = machine(Begin::Cold, |fake| fake.wants.lock().unwrap().at = Some(at));
    machine.workers.resume();
    until(|| machine.fake.count(2) == 1);
    assert!(Monotonic.now() >= at);
    std::thread::sleep(Duration::from_millis(5));
    assert_eq!(machine.fake.count(2), 1);
}

#[test]
fn restored_devices_are_gone_on_with_before_anything_else() {
    let machine = machine(Begin::Restored, |_| {});
    std::thread::sleep(Duration::from_millis(2));
    assert_eq!(machine.fake.count(3), 0, "nothing before it is to run");
    machine.workers.resume();
    until(|| machine.fake.count(1) == 1);
    assert_eq!(machine.fake.count(3), 1);
    machine.workers.pause(LIMIT).unwrap();
    machine.workers.resume();
    machine.bells[1].ring();
    until(|| machine.fake.count(1) == 2);
    assert_eq!(machine.fake.count(3), 1, "once");
}

#[test]
fn a_driver_that_breaks_a_queue_ends_the_machine() {
    let machine = machine(Begin::Cold, |fake| *fake.faults.lock().unwrap() = true);
    machine.workers.resume();
    machine.bells[1].ring();
    let end = machine.workers.wait();
    assert!(
        matches!(&*end, End::Fault(fault) if fault.device == "fake"),
        "{end}"
    );
}
