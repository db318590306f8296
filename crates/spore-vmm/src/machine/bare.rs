//! A machine without a guest: all that can be made before it is known which guest it is for. A
//! process that waits for one has it ready, since it costs more than all that comes after.

use std::iter::once;
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Arc, OnceLock};

use kvm_bindings::CpuId;

use super::StartError;
use super::attend::{self, Attendant};
use super::layout::Layout;
use super::wires::Wires;
use crate::kvm::kick::Recall;
use crate::kvm::vm::{Vcpu, Vm};
use crate::kvm::x86_64::cpuid::Place;
use crate::kvm::{Kvm, KvmError, kick};
use crate::memory::Space;
use crate::vcpu::exits::Core;
use crate::vcpu::{self, Run};
use crate::worker::{Seat, Workers};

/// The bytes of extended state that fit into KVM's first structure for it. There is more only for
/// processes that asked for AMX, which this one never does, and no guest is shown it.
const XSAVE_BYTES: u32 = 4096;

/// A machine of one size: its address space, without memory; its VM, with interrupt controller and
/// memory slots; its processors, which do not know yet what they are; the lines of all slots, and
/// their bells, which are not hung; its threads, in their cells.
#[derive(Debug)]
pub struct Bare {
    pub(super) layout: Layout,
    pub(super) space: Arc<Space>,
    pub(super) devices: Attendant,
    pub(super) vcpus: Vec<(Vcpu, Seat<Run<Core>>)>,
    pub(super) workers: Workers,
    pub(super) wires: Wires,
    pub(super) host: Host,
    pub(super) vm: Vm,
}

/// What all machines have, whichever their size.
#[derive(Debug)]
struct Begun {
    first: Vcpu,
    wires: Wires,
    host: Host,
    vm: Vm,
}

/// A machine that is begun, on the thread that will attend its devices, before anybody has said of
/// what size it is to be.
#[derive(Debug)]
pub struct Early {
    begun: Receiver<Result<Begun, StartError>>,
    devices: Attendant,
    workers: Workers,
}

/// A processor's thread, and how it will be called back.
#[derive(Debug)]
struct Chair {
    seat: Seat<Run<Core>>,
    recall: Arc<OnceLock<Recall>>,
}

/// What a machine of one size has that is not KVM's: made while KVM makes the rest.
#[derive(Debug)]
struct Frame {
    layout: Layout,
    space: Arc<Space>,
    seats: Vec<Chair>,
    devices: Attendant,
    workers: Workers,
}

/// What this host's KVM can do.
#[derive(Debug)]
pub(super) struct Host {
    /// What it can show a guest.
    pub(super) supported: CpuId,
    /// The MSRs that it keeps, by its own list.
    pub(super) msrs: Vec<u32>,
    /// Whether it can give a guest another TSC rate than its own.
    pub(super) can_scale: bool,
}

impl Begun {
    fn new(kvm: &Kvm) -> Result<Self, StartError> {
        let caps = kvm.caps();
        if caps.xsave_bytes > XSAVE_BYTES {
            let bytes = caps.xsave_bytes;
            return Err(StartError::Wide { bytes });
        }
        kick::take_signal()?;
        let vm = kvm.create_vm()?;
        // Before processors, which get their local APICs with it, and before lines.
        vm.create_irqchip()?;
        Ok(Self {
            first: vm.create_vcpu(0)?,
            wires: Wires::new(&vm)?,
            host: Host {
                supported: kvm.supported_cpuid()?,
                msrs: kvm.msr_indices()?,
                can_scale: caps.tsc_control,
            },
            vm,
        })
    }
}

impl Frame {
    fn new(devices: Attendant, workers: Workers, layout: &Layout) -> Result<Self, StartError> {
        let space = Space::reserve(layout.memory_bytes())?;
        let seats = (0..layout.vcpus()).map(|number| {
            let recall = Arc::<OnceLock<Recall>>::default();
            let seat = vcpu::ahead(&workers, number, Arc::clone(&recall));
            let seat = seat.map_err(StartError::Thread)?;
            Ok(Chair { seat, recall })
        });
        Ok(Self {
            seats: seats.collect::<Result<_, StartError>>()?,
            layout: layout.clone(),
            space,
            devices,
            workers,
        })
    }

    fn around(self, begun: Begun) -> Result<Bare, StartError> {
        let Begun {
            first,
            wires,
            host,
            vm,
        } = begun;
        // Waits until no processor of the VM can see the old slots.
        vm.set_memory(&self.space, &self.layout.regions())?;
        let mut vcpus = Vec::with_capacity(self.seats.len());
        let others = (1..self.layout.vcpus()).map(|number| vm.create_vcpu(number));
        for (vcpu, Chair { seat, recall }) in once(Ok(first)).chain(others).zip(self.seats) {
            let vcpu = vcpu?;
            let by = vcpu.recall()?;
            recall.get_or_init(|| by);
            vcpus.push((vcpu, seat));
        }
        Ok(Bare {
            layout: self.layout,
            space: self.space,
            devices: self.devices,
            vcpus,
            workers: self.workers,
            wires,
            host,
            vm,
        })
    }
}

impl Early {
    /// Begins one.
    pub fn new(kvm: Arc<Kvm>) -> Result<Self, StartError> {
        let workers = Workers::new();
        let (told, begun) = sync_channel(1);
        let first = move || {
            // Nobody waits for it any more when it cannot be told.
            let _unwanted = told.send(Begun::new(&kvm));
        };
        let devices = attend::ahead(&workers, first)?;
        Ok(Self {
            begun,
            devices,
            workers,
        })
    }

    /// Gives it a size. `None` when it could not be begun: another attempt says why.
    pub fn sized(self, layout: &Layout) -> Option<Result<Bare, StartError>> {
        let frame = Frame::new(self.devices, self.workers, layout).ok()?;
        let begun = self.begun.recv().ok()?.ok()?;
        Some(frame.around(begun))
    }
}

impl Bare {
    /// Makes one. Nothing of `kvm` is used after that.
    pub fn new(kvm: &Kvm, layout: &Layout) -> Result<Self, StartError> {
        let workers = Workers::new();
        let devices = attend::ahead(&workers, || ())?;
        let frame = Frame::new(devices, workers, layout)?;
        frame.around(Begun::new(kvm)?)
    }

    /// Hangs its bells: in one that has time, before there is a guest.
    pub fn hang(&self) -> Result<(), KvmError> {
        self.wires.hang(&self.vm)
    }

    /// Its size, which is the guest's that it is for.
    #[must_use]
    pub const fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Its processors.
    pub(super) fn processors(&self) -> impl Iterator<Item = &Vcpu> {
        self.vcpus.iter().map(|(vcpu, _seat)| vcpu)
    }

    /// Its processors with their places in the machine.
    pub(super) fn places(&self) -> impl Iterator<Item = (Place, &Vcpu)> {
        let vcpus = self.layout.vcpus();
        let place = move |vcpu| Place { vcpu, vcpus };
        (0..vcpus).map(place).zip(self.processors())
    }
}
