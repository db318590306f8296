//! Tests of the run loop with a processor that plays a script, without KVM.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use super::{Buses, Exit, Processor, ahead};
use crate::device::virtio::queue::QueueFault;
use crate::device::{Device, Effect};
use crate::end::End;
use crate::fault::GuestFault;
use crate::worker::{Kick, Workers};

const LIMIT: Duration = Duration::from_secs(20);

/// One thing that a scripted guest does.
#[derive(Clone, Debug)]
enum Act {
    In(u16, usize),
    Out(u16, Vec<u8>),
    Load(u64, usize),
    Store(u64, Vec<u8>),
    Internal,
    Shutdown,
    Panic,
    /// Runs until it is called back.
    Spin,
}

/// What calls a scripted processor back, as the page that KVM shares does.
#[derive(Clone, Debug, Default)]
struct Page(Arc<(Mutex<bool>, Condvar)>);

impl Page {
    fn set(&self, wanted: bool) {
        *self.0.0.lock().unwrap() = wanted;
        self.0.1.notify_all();
    }

    fn is_set(&self) -> bool {
        *self.0.0.lock().unwrap()
    }

    fn wait(&self) {
        let set = self.0.0.lock().unwrap();
        drop(self.0.1.wait_while(set, |set| !*set).unwrap());
    }
}

impl Kick for Page {
    fn kick(&self, _thread: &JoinHandle<()>) {
        self.set(true);
    }

    fn take_back(&self) {
        self.set(false);
    }
}

/// Plays its acts, then spins. What it read is in the guest only after the next run, as with KVM.
#[derive(Debug)]
struct Script {
    acts: VecDeque<Act>,
    page: Page,
    pending: Option<Vec<u8>>,
    got: Vec<Vec<u8>>,
}

impl Processor for Script {
    fn number(&self) -> u8 {
        2
    }

    fn run(&mut self) -> Exit<'_> {
        self.got.extend(self.pending.take());
        if self.page.is_set() {
            return Exit::Interrupted;
        }
        let read = |pending: &'_ mut Option<Vec<u8>>, count| {
            *pending = Some(vec![0; count]);
        };
        match self.acts.pop_front().unwrap_or(Act::Spin) {
            Act::In(port, count) => {
                read(&mut self.pending, count);
                Exit::PortRead(port, self.pending.as_mut().unwrap())
            }
            Act::Load(address, count) => {
                read(&mut self.pending, count);
                Exit::Read(address, self.pending.as_mut().unwrap())
            }
            Act::Out(port, data) => Exit::PortWrite(port, data.leak()),
            Act::Store(address, data) => Exit::Write(address, data.leak()),
            Act::Internal => Exit::Internal,
            Act::Shutdown => Exit::Ended(End::TripleFault { vcpu: 2 }),
            Act::Panic => panic!("a bug"),
            Act::Spin => {
                self.page.wait();
                Exit::Interrupted
            }
        }
    }

    fn stay_out(&mut self) {
        self.page.set(true);
    }

    fn internal_error(&mut self) -> u32 {
        1
    }
}

/// Says its number, and means what it is told to.
#[derive(Debug)]
struct Memo {
    means: Effect,
    wrote: Mutex<Vec<(u64, Vec<u8>)>>,
}

impl Device for Memo {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(u8::try_from(offset).unwrap() + 0x40);
    }

    fn write(&self, offset: u64, data: &[u8]) -> Effect {
        self.wrote.lock().unwrap().push((offset, data.to_vec()));
        self.means
    }
}

fn memo(means: Effect) -> Arc<Memo> {
    let wrote = Mutex::default();
    Arc::new(Memo { means, wrote })
}

struct Machine {
    workers: Workers,
    processor: Arc<Mutex<Script>>,
    plain: Arc<Memo>,
}

const FAULT: GuestFault = GuestFault {
    device: "test",
    queue: 1,
    what: QueueFault::Long,
};

fn machine(acts: &[Act]) -> Machine {
    let plain = memo(Effect::Nothing);
    let mut buses = Buses::default();
    buses.ports.insert(0x10, 4, plain.clone()).unwrap();
    buses.memory.insert(0x1000, 16, plain.clone()).unwrap();
    for (at, means) in [
        (0x20, Effect::Reset),
        (0x21, Effect::PowerOff),
        (0x22, Effect::Fault(FAULT)),
        (0x23, Effect::Kick(9)),
    ] {
        buses.ports.insert(at, 1, memo(means)).unwrap();
    }
    let page = Page::default();
    let script = Script {
        acts: acts.iter().cloned().collect(),
        page: page.clone(),
        pending: None,
        got: Vec::new(),
    };
    let processor = Arc::new(Mutex::new(script));
    let workers = Workers::new();
    let seat = ahead(&workers, 2, page).unwrap();
    seat.give((Arc::clone(&processor), Arc::new(buses)));
    Machine {
        workers,
        processor,
        plain,
    }
}

fn end(acts: &[Act]) -> String {
    let machine = machine(acts);
    machine.workers.resume();
    machine.workers.wait().to_string()
}

#[test]
fn accesses_go_to_their_bus_and_answers_back() {
    let machine = machine(&[
        Act::Out(0x11, vec![1]),
        Act::Store(0x1008, vec![2, 3]),
        Act::In(0x12, 1),
        Act::Load(0x1001, 2),
        // Nobody's.
        Act::In(0x1008, 1),
        Act::Out(0x23, vec![0]),
        Act::Shutdown,
    ]);
    machine.workers.resume();
    assert!(matches!(
        *machine.workers.wait(),
        End::TripleFault { vcpu: 2 }
    ));
    let wrote = machine.plain.wrote.lock().unwrap();
    assert_eq!(*wrote, [(1, vec![1]), (8, vec![2, 3])]);
    let got = &machine.processor.lock().unwrap().got;
    assert_eq!(*got, [vec![0x42], vec![0x41, 0x41], vec![0xff]]);
}

#[test]
fn each_end_is_told() {
    assert_eq!(
        end(&[Act::Out(0x20, vec![1])]),
        "the guest asked for a reset"
    );
    assert_eq!(end(&[Act::Out(0x21, vec![1])]), "the guest powered off");
    assert_eq!(end(&[Act::Out(0x22, vec![1])]), "the guest broke a device");
    assert!(end(&[Act::Internal]).ends_with("processor 2 of the guest: internal error 1"));
    assert_eq!(end(&[Act::Panic]), "vcpu2 panicked");
}

#[test]
fn what_was_begun_is_finished_before_it_stands_still() {
    let acts: Vec<Act> = (0..2000).map(|_| Act::In(0x10, 1)).collect();
    let machine = machine(&acts);
    let mut before = 0;
    while before < 2000 {
        machine.workers.resume();
        std::thread::yield_now();
        machine.workers.pause(LIMIT).unwrap();
        let processor = machine.processor.lock().unwrap();
        assert!(processor.pending.is_none(), "an answer is still on its way");
        let done = 2000 - processor.acts.len();
        assert_eq!(processor.got.len(), done);
        assert!(done >= before);
        before = done;
    }
}

#[test]
fn a_guest_that_never_comes_back_by_itself_is_paused_and_ended() {
    let machine = machine(&[Act::Spin]);
    machine.workers.pause(LIMIT).unwrap();
    assert_eq!(
        machine.processor.lock().unwrap().acts.len(),
        1,
        "it has not begun"
    );
    for _ in 0..100 {
        machine.workers.resume();
        machine.workers.pause(LIMIT).unwrap();
    }
    machine.workers.resume();
    machine.workers.end(End::Stopped);
    assert!(matches!(*machine.workers.wait(), End::Stopped));
}
