//! Guests of a few instructions on threads: each way in which they end, pausing them wherever they
//! are, and going on with one from what was saved of it.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use spore_vmm::device::i8042::{self, I8042};
use spore_vmm::device::power::{self, Power};
use spore_vmm::device::{Device, Effect, Interrupt as _};
use spore_vmm::end::End;
use spore_vmm::kvm::bell::{Bell, Line};
use spore_vmm::kvm::kick;
use spore_vmm::kvm::x86_64::state::{VcpuState, VmState, readable, reading};
use spore_vmm::machine::layout::{I8042_PORT, POWER_PORT};
use spore_vmm::memory::{Gpa, GuestMemory, Sharing};
use spore_vmm::vcpu::exits::Core;
use spore_vmm::vcpu::{self, Buses};
use spore_vmm::worker::Workers;

use crate::{BYTES, CODE, Machine, file, usable};

const LIMIT: Duration = Duration::from_secs(60);

/// Ports that count their reads and answer with the count; ports and places that remember what was
/// written last.
#[derive(Debug, Default)]
struct Counter {
    reads: AtomicU8,
    wrote: Mutex<Vec<u8>>,
}

impl Device for Counter {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(self.reads.fetch_add(1, Ordering::SeqCst).wrapping_add(1));
    }

    fn write(&self, _offset: u64, data: &[u8]) -> Effect {
        *self.wrote.lock().unwrap() = data.to_vec();
        Effect::Nothing
    }
}

/// A machine of one processor on its thread.
struct Running {
    workers: Workers,
    core: Arc<Mutex<Core>>,
    counter: Arc<Counter>,
    memory: GuestMemory,
    vm: spore_vmm::kvm::vm::Vm,
}

impl Running {
    /// One that is about to run some code; `None` where there is no KVM.
    fn new(code: &[u8]) -> Option<Self> {
        let kvm = usable()?;
        let machine = Machine::new(&kvm);
        let memory = machine.fill(&file(BYTES), Sharing::Private);
        memory.write(CODE, code).unwrap();
        machine.start();
        Some(Self::of(machine, memory))
    }

    fn of(machine: Machine, memory: GuestMemory) -> Self {
        kick::take_signal().unwrap();
        let Machine { vm, vcpu, .. } = machine;
        let counter = Arc::<Counter>::default();
        let mut buses = Buses::default();
        let power = Arc::new(Power::default());
        for (at, bytes, device) in [
            (0x80, 1, counter.clone() as Arc<dyn Device>),
            (I8042_PORT.into(), i8042::PORTS, Arc::new(I8042)),
            (POWER_PORT.into(), power::PORTS, power),
        ] {
            buses.ports.insert(at, bytes, device).unwrap();
        }
        buses
            .memory
            .insert(0x2_0000, 0x100, counter.clone())
            .unwrap();
        let recall = vcpu.recall().unwrap();
        let core = Arc::new(Mutex::new(Core::new(0, vcpu)));
        let workers = Workers::new();
        let seat = vcpu::ahead(&workers, 0, recall).unwrap();
        seat.give((Arc::clone(&core), Arc::new(buses)));
        Self {
            workers,
            core,
            counter,
            memory,
            vm,
        }
    }

    /// Runs it to its end.
    fn end(&self) -> Arc<End> {
        self.workers.resume();
        self.workers.wait()
    }

    fn wait_for_reads(&self, more: u8) {
        let before = self.counter.reads.load(Ordering::SeqCst);
        while self
            .counter
            .reads
            .load(Ordering::SeqCst)
            .wrapping_sub(before)
            < more
        {
            std::thread::yield_now();
        }
    }
}

#[test]
fn a_guest_ends_by_its_reset_line_and_by_acpi() {
    // mov al, 0xfe; out 0x64, al
    let Some(guest) = Running::new(&[0xb0, 0xfe, 0xe6, 0x64, 0xf4]) else {
        return;
    };
    assert!(matches!(*guest.end(), End::Reset));
    // mov dx, 0x600; mov al, 0x34; out dx, al
    let code = [0xba, 0x00, 0x06, 0xb0, 0x34, 0xee, 0xf4];
    let guest = Running::new(&code).unwrap();
    assert!(matches!(*guest.end(), End::PowerOff));
}

#[test]
fn a_guest_that_faults_in_its_faults_ends_itself() {
    // lidt [0x2000], which is all zeros; ud2
    let code = [0x0f, 0x01, 0x1e, 0x00, 0x20, 0x0f, 0x0b];
    let Some(guest) = Running::new(&code) else {
        return;
    };
    let end = guest.end();
    assert!(matches!(*end, End::TripleFault { vcpu: 0 }), "{end}");
}

#[test]
fn a_guest_that_runs_where_there_is_no_memory_ends_itself() {
    // jmp 0x3000:0
    let Some(guest) = Running::new(&[0xea, 0x00, 0x00, 0x00, 0x30]) else {
        return;
    };
    let end = guest.end();
    assert!(matches!(*end, End::Internal { vcpu: 0, .. }), "{end}");
}

#[test]
fn accesses_reach_devices_and_their_answers_the_guest() {
    #[rustfmt::skip]
    let code = [
        0xb8, 0x00, 0x20, 0x8e, 0xd8, // mov ax, 0x2000; mov ds, ax
        0xe4, 0x80,                   // in al, 0x80
        0xa2, 0x08, 0x00,             // mov [8], al
        0xa1, 0x10, 0x00,             // mov ax, [0x10]
        0xa3, 0x08, 0x00,             // mov [8], ax
        0xb0, 0xfe, 0xe6, 0x64,       // mov al, 0xfe; out 0x64, al
    ];
    let Some(guest) = Running::new(&code) else {
        return;
    };
    assert!(matches!(*guest.end(), End::Reset));
    assert_eq!(*guest.counter.wrote.lock().unwrap(), [2, 2]);
    assert_eq!(guest.counter.reads.load(Ordering::SeqCst), 2);
}

#[test]
fn a_guest_that_spins_with_interrupts_off_is_paused_and_ended() {
    // cli; inc word [0x2000]; jmp back
    let code = [0xfa, 0xff, 0x06, 0x00, 0x20, 0xeb, 0xfa];
    let Some(guest) = Running::new(&code) else {
        return;
    };
    let count = || guest.memory.load_u16(Gpa(0x2000)).unwrap();
    for _ in 0..20 {
        let before = count();
        guest.workers.resume();
        while count() == before {
            std::thread::yield_now();
        }
        guest.workers.pause(LIMIT).unwrap();
        let still = count();
        std::thread::sleep(Duration::from_millis(2));
        assert_eq!(count(), still);
    }
    guest.workers.resume();
    guest.workers.end(End::Stopped);
    assert!(matches!(*guest.workers.wait(), End::Stopped));
}

#[test]
fn a_guest_that_waits_for_ever_is_paused_and_ended() {
    // cli; hlt
    let Some(guest) = Running::new(&[0xfa, 0xf4]) else {
        return;
    };
    for _ in 0..5 {
        guest.workers.resume();
        guest.workers.pause(LIMIT).unwrap();
    }
    guest.workers.resume();
}

#[test]
fn an_answer_is_in_the_registers_of_a_paused_guest() {
    // in al, 0x80; jmp back
    let Some(guest) = Running::new(&[0xe4, 0x80, 0xeb, 0xfc]) else {
        return;
    };
    for _ in 0..50 {
        guest.workers.resume();
        guest.wait_for_reads(3);
        guest.workers.pause(LIMIT).unwrap();
        let core = guest.core.lock().unwrap();
        let regs = core.vcpu().regs().unwrap();
        let last = guest.counter.reads.load(Ordering::SeqCst);
        assert_eq!(regs.rax & 0xff, u64::from(last));
    }
}

#[test]
fn a_guest_goes_on_from_what_was_saved_of_it() {
    // again: in al, 0x80; inc ebx; mov [0x2000], bx; jmp again
    let code = [0xe4, 0x80, 0x66, 0x43, 0x89, 0x1e, 0x00, 0x20, 0xeb, 0xf6];
    let Some(guest) = Running::new(&code) else {
        return;
    };
    guest.workers.resume();
    guest.wait_for_reads(20);
    guest.workers.pause(LIMIT).unwrap();
    let kvm = usable().unwrap();
    let (state, chips) = {
        let core = guest.core.lock().unwrap();
        let msrs = readable(core.vcpu(), &kvm.msr_indices().unwrap()).unwrap();
        println!("{} MSRs", msrs.len());
        let state = VcpuState::save(core.vcpu(), &msrs).unwrap();
        (state, VmState::save(&guest.vm).unwrap())
    };
    let machine = Machine::bare(&kvm);
    let memory = machine.fill(&file(BYTES), Sharing::Private);
    memory.write(CODE, &code).unwrap();
    let shift = reading(&machine.vcpu).unwrap().shift_to(state.reading());
    state.restore(&machine.vcpu, shift).unwrap();
    chips.restore(&machine.vm).unwrap();
    let again = VcpuState::save(&machine.vcpu, &[]).unwrap();
    assert_eq!(again.regs, state.regs);
    assert_eq!(again.sregs, state.sregs);
    assert!(again.tsc >= state.tsc, "{} {}", again.tsc, state.tsc);
    let now = machine.vm.clock().unwrap().clock;
    assert!(now >= chips.clock.clock, "{now} {}", chips.clock.clock);
    let fork = Running::of(machine, memory);
    fork.workers.resume();
    fork.wait_for_reads(5);
    fork.workers.pause(LIMIT).unwrap();
    let count = fork.memory.load_u16(Gpa(0x2000)).unwrap();
    assert!(u64::from(count) > state.regs.rbx, "{count}");
}

#[test]
fn kvm_tells_of_a_write_and_takes_an_interrupt_by_descriptors() {
    #[rustfmt::skip]
    let code = [
        0xb8, 0x00, 0x20, 0x8e, 0xd8,       // mov ax, 0x2000; mov ds, ax
        0x66, 0xb8, 0x01, 0x00, 0x00, 0x00, // mov eax, 1
        0x66, 0xa3, 0x50, 0x00,             // mov [0x50], eax
        0x66, 0x40,                         // inc eax
        0x66, 0xa3, 0x50, 0x00,             // mov [0x50], eax
        0xb0, 0xfe, 0xe6, 0x64,             // mov al, 0xfe; out 0x64, al
    ];
    let Some(guest) = Running::new(&code) else {
        return;
    };
    let told = Bell::new().unwrap();
    guest.vm.tell_write_by(&told, Gpa(0x2_0050), 1).unwrap();
    assert!(matches!(*guest.end(), End::Reset));
    assert!(told.hear());
    // The other value came through the bus.
    assert_eq!(*guest.counter.wrote.lock().unwrap(), [2, 0, 0, 0]);
    let line = Line::new(&guest.vm, 5).unwrap();
    line.raise();
    let same = Bell::new().unwrap();
    guest.vm.tell_write_by(&same, Gpa(0x2_0050), 1).unwrap_err();
}
