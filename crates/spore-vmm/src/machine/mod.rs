//! The machine that a guest sees: its physical map, the tables that tell the guest of it, what is
//! in its memory when it starts, and its devices; and all of it together, running.
//!
//! ```text
//!   Machine::boot ──▶ paused ◀──▶ running ──▶ ended, with a reason
//! ```

pub mod acpi;
pub mod attend;
pub mod board;
pub mod boot;
pub mod layout;

use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use self::attend::{AttendError, Begin};
use self::board::{Board, BoardError, Panel};
use self::boot::{Boot, BootError};
use self::layout::{Layout, START_INFO};
use crate::clock::Monotonic;
use crate::device::power::Event;
use crate::device::serial::Output;
use crate::end::End;
use crate::kvm::bell::Bell;
use crate::kvm::vm::{Vcpu, Vm};
use crate::kvm::x86_64::cpuid::Place;
use crate::kvm::x86_64::entry;
use crate::kvm::{Kvm, KvmError, kick};
use crate::memory::{GuestMemory, MapError, Sharing, Space};
use crate::vcpu::exits::Core;
use crate::vcpu::{self, Buses};
use crate::worker::{PauseError, Workers};

/// Why there is no machine.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// KVM refused a part of it.
    #[error("KVM refuses the machine")]
    Kvm(#[from] KvmError),
    /// There is no memory for it.
    #[error("there is no memory for the machine")]
    Memory(#[from] MapError),
    /// Its memory cannot be filled.
    #[error("the guest cannot be started")]
    Boot(#[from] BootError),
    /// A device is not in its place.
    #[error("the machine's devices cannot be put together")]
    Board(#[from] BoardError),
    /// Its devices have no thread.
    #[error(transparent)]
    Attend(#[from] AttendError),
    /// The kernel gave no thread for a processor.
    #[error("the machine's processors cannot be started")]
    Thread(#[source] std::io::Error),
}

/// A guest's machine. Dropping it ends it, and waits until nothing of it runs.
#[derive(Debug)]
pub struct Machine {
    /// First, so that all threads are gone before what they work with.
    workers: Workers,
    cores: Vec<Arc<Mutex<Core>>>,
    panel: Panel,
    memory: GuestMemory,
    vm: Vm,
}

impl Machine {
    /// A machine about to start a kernel, paused. Its memory is the file, of the layout's size and
    /// all zeros. `plug` puts virtio devices into their slots.
    pub fn boot(
        kvm: &Kvm,
        layout: &Layout,
        file: BorrowedFd<'_>,
        boot: &Boot<'_>,
        plug: impl FnOnce(&mut Board<'_>, &GuestMemory) -> Result<(), BoardError>,
    ) -> Result<Self, StartError> {
        let regions = layout.regions();
        let space = Space::reserve(layout.memory_bytes())?;
        let vm = kvm.create_vm(Arc::clone(&space))?;
        // Before processors, which get their local APICs with it, and before lines.
        vm.create_irqchip()?;
        vm.set_memory(&regions)?;
        let vcpus = processors(kvm, &vm, layout.vcpus())?;
        let memory = space.fill(file, Sharing::Shared, &regions)?;
        let begin = boot::load(&memory, layout, boot)?;
        if let Some(first) = vcpus.first() {
            entry::begin(first, begin, START_INFO)?;
        }
        let mut board = Board::new(&vm, Box::new(Monotonic))?;
        plug(&mut board, &memory)?;
        let (buses, plugged, panel) = board.finish();
        let workers = Workers::new();
        attend::start(&workers, plugged, Box::new(Monotonic), Begin::Cold)?;
        let cores = start(&workers, vcpus, buses)?;
        Ok(Self {
            workers,
            cores,
            panel,
            memory,
            vm,
        })
    }

    /// Lets it run.
    pub fn resume(&self) {
        self.workers.resume();
    }

    /// Lets it stand still, processors and devices; on an error it goes on or has ended.
    pub fn pause(&self, limit: Duration) -> Result<(), PauseError> {
        self.workers.pause(limit)
    }

    /// Ends it, if nothing has before.
    pub fn end(&self, end: End) {
        self.workers.end(end);
    }

    /// Waits until it has ended; says why.
    #[must_use]
    pub fn wait(&self) -> Arc<End> {
        self.workers.wait()
    }

    /// Rings a bell when it ends, or now if it has.
    pub fn ring_at_end(&self, bell: Arc<Bell>) {
        self.workers.ring_at_end(bell);
    }

    /// Why it has ended, if it has.
    #[must_use]
    pub fn ended(&self) -> Option<Arc<End>> {
        self.workers.ended()
    }

    /// What has come out of its serial port.
    #[must_use]
    pub fn output(&self) -> Output {
        self.panel.output()
    }

    /// Tells its guest of an event.
    pub fn tell(&self, event: Event) {
        self.panel.tell(event);
    }

    /// Its processors. While it runs each is its thread's, and locking one waits for a pause.
    #[must_use]
    pub fn cores(&self) -> &[Arc<Mutex<Core>>] {
        &self.cores
    }

    /// Its memory.
    #[must_use]
    pub const fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// KVM's side of it.
    #[must_use]
    pub const fn vm(&self) -> &Vm {
        &self.vm
    }
}

/// A machine's processors, each knowing its place.
fn processors(kvm: &Kvm, vm: &Vm, count: u8) -> Result<Vec<Vcpu>, KvmError> {
    kick::take_signal()?;
    let supported = kvm.supported_cpuid()?;
    let make = |number| {
        let vcpu = vm.create_vcpu(number)?;
        let place = Place {
            vcpu: number,
            vcpus: count,
        };
        entry::set_up(&vcpu, supported.as_slice(), place)?;
        Ok(vcpu)
    };
    (0..count).map(make).collect()
}

/// Puts each processor on its thread.
fn start(
    workers: &Workers,
    vcpus: Vec<Vcpu>,
    buses: Buses,
) -> Result<Vec<Arc<Mutex<Core>>>, StartError> {
    let buses = Arc::new(buses);
    let mut cores = Vec::with_capacity(vcpus.len());
    for (number, vcpu) in (0..).zip(vcpus) {
        let recall = vcpu.recall()?;
        let core = Arc::new(Mutex::new(Core::new(number, vcpu)));
        let started = vcpu::start(workers, Arc::clone(&core), recall, Arc::clone(&buses));
        started.map_err(StartError::Thread)?;
        cores.push(core);
    }
    Ok(cores)
}
