//! The machine that a guest sees: its physical map, the tables that tell the guest of it, what is
//! in its memory when it starts, and its devices; and all of it together, running.
//!
//! ```text
//!   Machine::boot ────▶ paused ◀──▶ running ──▶ ended, with a reason
//!                       │    ▲
//!                       └save┘
//!   Machine::restore ─▶ paused ◀──▶ …
//! ```

pub mod acpi;
pub mod attend;
pub mod bare;
pub mod board;
pub mod boot;
pub mod layout;
pub mod restore;
pub mod save;
pub mod saved;
pub mod wires;

use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use spore_wire::launch::Incarnation;

use self::acpi::GENERATION;
use self::attend::{AttendError, Begin};
use self::bare::Bare;
use self::board::{Board, BoardError, Panel, Plugged};
use self::boot::{Boot, BootError};
use self::layout::{Layout, START_INFO, Slot};
use self::saved::{SavedError, SavedMachine};
use crate::clock::Monotonic;
use crate::device::power::Event;
use crate::device::serial::Output;
use crate::device::virtio::Driven;
use crate::end::End;
use crate::kvm::bell::{Bell, Doorbell};
use crate::kvm::vm::Vm;
use crate::kvm::x86_64::features::Lacking;
use crate::kvm::x86_64::tsc::OtherRate;
use crate::kvm::x86_64::{entry, state};
use crate::kvm::{Kvm, KvmError};
use crate::memory::{GuestMemory, MapError, OutOfMemory, Sharing};
use crate::vcpu::exits::Core;
use crate::vcpu::{Buses, Processor as _};
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
    /// There is no place for its generation's number.
    #[error("the machine's generation cannot be told")]
    Generation(#[from] OutOfMemory),
    /// Its processors have more state than is saved.
    #[error("a processor's extended state takes {bytes} bytes on this host: 4096 are possible")]
    Wide {
        /// What KVM says.
        bytes: u32,
    },
    /// What was saved is no machine.
    #[error(transparent)]
    Saved(#[from] SavedError),
    /// What was saved is a machine of another size than the one that is there.
    #[error("a machine of {found} where the guest was saved in one of {saved}")]
    Size {
        /// What is there.
        found: Layout,
        /// What was saved.
        saved: Layout,
    },
    /// The guest uses what this host has not.
    #[error("the guest cannot go on here")]
    Lacking(#[from] Lacking),
    /// The guest's TSC has another rate than this host's.
    #[error(transparent)]
    Rate(#[from] OtherRate),
}

/// A guest's machine. Dropping it ends it, and waits until nothing of it runs.
#[derive(Debug)]
pub struct Machine {
    /// First, so that all threads are gone before what they work with.
    workers: Workers,
    cores: Vec<Arc<Mutex<Core>>>,
    panel: Panel,
    /// In the order of their slots, to be saved.
    devices: Vec<(Slot, Arc<dyn Driven>)>,
    /// Of its devices' queues.
    doorbells: Vec<Arc<[Doorbell]>>,
    /// Rung when one of them wants to be hung.
    asks: Arc<Bell>,
    /// The MSRs that its processors have.
    msrs: Vec<u32>,
    layout: Layout,
    memory: GuestMemory,
    vm: Vm,
}

impl Machine {
    /// A machine about to start a kernel, paused: [`Bare::boot`] in a new one.
    pub fn boot(
        kvm: &Kvm,
        layout: &Layout,
        file: BorrowedFd<'_>,
        boot: &Boot<'_>,
        plug: impl FnOnce(&mut Board<'_>) -> Result<(), BoardError>,
    ) -> Result<Self, StartError> {
        let bare = Bare::new(kvm, layout)?;
        bare.hang()?;
        bare.boot(file, boot, plug)
    }

    /// A machine that goes on where another was saved, paused: [`Bare::restore`] in a new one.
    /// `state` is what [`save`](Self::save) wrote.
    pub fn restore(
        kvm: &Kvm,
        state: &[u8],
        file: BorrowedFd<'_>,
        sharing: Sharing,
        incarnation: Incarnation,
        plug: impl FnOnce(&mut Board<'_>) -> Result<(), BoardError>,
    ) -> Result<Self, StartError> {
        let saved = SavedMachine::read(state)?;
        let bare = Bare::new(kvm, &saved.layout)?;
        bare.hang()?;
        bare.restore(saved, file, sharing, incarnation, plug)
    }

    /// Gives what was made to its threads, which wait to be let run.
    fn start(
        bare: Bare,
        memory: GuestMemory,
        msrs: Vec<u32>,
        (buses, plugged, panel): (Buses, Vec<Plugged>, Panel),
        begin: Begin,
    ) -> Result<Self, StartError> {
        let devices = plugged.iter().map(|of| (of.slot, Arc::clone(&of.device)));
        let devices = devices.collect();
        let doorbells = plugged.iter().map(|of| Arc::clone(&of.bells)).collect();
        let attended = bare.devices.give(plugged, Box::new(Monotonic), begin);
        attended.map_err(AttendError::Thread)?;
        let buses = Arc::new(buses);
        let mut cores = Vec::with_capacity(bare.vcpus.len());
        for (number, (vcpu, seat)) in (0..).zip(bare.vcpus) {
            let core = Arc::new(Mutex::new(Core::new(number, vcpu)));
            seat.give((Arc::clone(&core), Arc::clone(&buses)));
            cores.push(core);
        }
        Ok(Self {
            workers: bare.workers,
            cores,
            panel,
            devices,
            doorbells,
            asks: Arc::clone(bare.wires.asks()),
            msrs,
            layout: bare.layout,
            memory,
            vm: bare.vm,
        })
    }

    /// Lets it run.
    pub fn resume(&self) {
        self.workers.resume();
    }

    /// Lets it stand still, processors and devices; on an error it goes on or has ended. Its guest
    /// will know that it was stopped: its watchdogs do not take the pause for their guests' fault.
    pub fn pause(&self, limit: Duration) -> Result<(), PauseError> {
        self.workers.pause(limit)?;
        let told = self.workers.while_still(|| self.tell_paused());
        match told {
            Some(Err(end)) => {
                self.end(end);
                Err(PauseError::Ended(self.wait()))
            }
            Some(Ok(())) | None => Ok(()),
        }
    }

    fn tell_paused(&self) -> Result<(), End> {
        for core in &self.cores {
            let core = core.lock().unwrap_or_else(PoisonError::into_inner);
            let vcpu = core.number();
            let told = core.vcpu().tell_paused();
            told.map_err(|source| End::Kvm { vcpu, source })?;
        }
        Ok(())
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

    /// What is rung when the guest has rung bells that want to be hung.
    #[must_use]
    pub fn asks(&self) -> &Bell {
        &self.asks
    }

    /// Hangs the bells that want it. One that KVM does not take rings as it did.
    pub fn hang(&self) -> Result<(), KvmError> {
        let _asked = self.asks.hear();
        let bells = self.doorbells.iter().flat_map(|of| of.iter());
        let wanted = bells.filter(|bell| bell.is_wanted());
        let hung: Vec<_> = wanted.map(|bell| bell.hang(&self.vm)).collect();
        hung.into_iter().collect()
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

impl Bare {
    /// A machine about to start a kernel, paused. Its memory is the file, of the layout's size and
    /// all zeros. `plug` puts virtio devices into their slots.
    pub fn boot(
        self,
        file: BorrowedFd<'_>,
        boot: &Boot<'_>,
        plug: impl FnOnce(&mut Board<'_>) -> Result<(), BoardError>,
    ) -> Result<Machine, StartError> {
        for (place, vcpu) in self.places() {
            entry::set_up(vcpu, self.host.supported.as_slice(), place)?;
        }
        let regions = self.layout.regions();
        let memory = self.space.fill(file, Sharing::Shared, &regions)?;
        let begin = boot::load(&memory, &self.layout, boot)?;
        memory.write(GENERATION, &boot.incarnation.bytes())?;
        let mut msrs = Vec::new();
        if let Some(first) = self.processors().next() {
            entry::begin(first, begin, START_INFO)?;
            msrs = state::readable(first, &self.host.msrs)?;
        }
        let wired = self.wires.or(&self.vm);
        let mut board = Board::new(&wired, &memory, Box::new(Monotonic))?;
        plug(&mut board)?;
        let parts = board.finish()?;
        Machine::start(self, memory, msrs, parts, Begin::Cold)
    }
}
