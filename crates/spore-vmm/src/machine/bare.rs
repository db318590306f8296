//! A machine without a guest: all that can be made before it is known which guest it is for. A
//! process that waits for one has it ready, since it costs more than all that comes after.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};

use kvm_bindings::CpuId;

use super::StartError;
use super::attend::{self, Attendant};
use super::layout::Layout;
use super::wires::Wires;
use crate::kvm::vm::{Vcpu, Vm};
use crate::kvm::x86_64::cpuid::Place;
use crate::kvm::{Kvm, kick};
use crate::memory::Space;
use crate::vcpu::exits::Core;
use crate::vcpu::{self, Run};
use crate::worker::{Seat, Workers};

/// The bytes of extended state that fit into KVM's first structure for it. There is more only for
/// processes that asked for AMX, which this one never does, and no guest is shown it.
const XSAVE_BYTES: u32 = 4096;

/// A machine of one size: its address space, without memory; its VM, with interrupt controller and
/// memory slots; its processors, which do not know yet what they are; the lines and bells of all
/// slots; its threads, in their cells.
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
        let begun = self.begun.recv().ok()?.ok()?;
        Some(Bare::of(begun, self.devices, self.workers, layout))
    }
}

impl Bare {
    /// Makes one. Nothing of `kvm` is used after that.
    pub fn new(kvm: &Kvm, layout: &Layout) -> Result<Self, StartError> {
        let workers = Workers::new();
        let devices = attend::ahead(&workers, || ())?;
        Self::of(Begun::new(kvm)?, devices, workers, layout)
    }

    fn of(
        begun: Begun,
        devices: Attendant,
        workers: Workers,
        layout: &Layout,
    ) -> Result<Self, StartError> {
        let Begun {
            first,
            wires,
            host,
            vm,
        } = begun;
        let space = Space::reserve(layout.memory_bytes())?;
        // Waits until no processor of the VM can see the old slots.
        vm.set_memory(&space, &layout.regions())?;
        let mut vcpus = Vec::with_capacity(layout.vcpus().into());
        let others = (1..layout.vcpus()).map(|number| vm.create_vcpu(number));
        for (number, vcpu) in (0..).zip(std::iter::once(Ok(first)).chain(others)) {
            let vcpu = vcpu?;
            let seat = vcpu::ahead(&workers, number, vcpu.recall()?);
            vcpus.push((vcpu, seat.map_err(StartError::Thread)?));
        }
        Ok(Self {
            layout: layout.clone(),
            space,
            devices,
            vcpus,
            workers,
            wires,
            host,
            vm,
        })
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
