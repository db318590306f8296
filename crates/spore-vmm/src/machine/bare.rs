//! A machine without a guest: all that can be made before it is known which guest it is for. A
//! process that waits for one has it ready, since it costs more than all that comes after.

use std::sync::Arc;

use kvm_bindings::CpuId;

use super::StartError;
use super::layout::Layout;
use super::wires::Wires;
use crate::kvm::vm::{Vcpu, Vm};
use crate::kvm::x86_64::cpuid::Place;
use crate::kvm::{Kvm, kick};
use crate::memory::Space;

/// The bytes of extended state that fit into KVM's first structure for it. There is more only for
/// processes that asked for AMX, which this one never does, and no guest is shown it.
const XSAVE_BYTES: u32 = 4096;

/// A machine of one size: its address space, without memory; its VM, with interrupt controller and
/// memory slots; its processors, which do not know yet what they are; the lines and bells of all
/// slots.
#[derive(Debug)]
pub struct Bare {
    pub(super) layout: Layout,
    pub(super) space: Arc<Space>,
    pub(super) vm: Vm,
    pub(super) vcpus: Vec<Vcpu>,
    pub(super) wires: Wires,
    pub(super) host: Host,
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

impl Bare {
    /// Makes one. Nothing of `kvm` is used after that.
    pub fn new(kvm: &Kvm, layout: &Layout) -> Result<Self, StartError> {
        let caps = kvm.caps();
        if caps.xsave_bytes > XSAVE_BYTES {
            let bytes = caps.xsave_bytes;
            return Err(StartError::Wide { bytes });
        }
        kick::take_signal()?;
        let space = Space::reserve(layout.memory_bytes())?;
        let vm = kvm.create_vm(Arc::clone(&space))?;
        // Before processors, which get their local APICs with it, and before lines.
        vm.create_irqchip()?;
        // Waits until no processor of the VM can see the old slots: the dearest step of all.
        vm.set_memory(&layout.regions())?;
        let vcpus = (0..layout.vcpus()).map(|number| vm.create_vcpu(number));
        let vcpus = vcpus.collect::<Result<_, _>>()?;
        let wires = Wires::new(&vm)?;
        Ok(Self {
            layout: layout.clone(),
            space,
            vm,
            vcpus,
            wires,
            host: Host {
                supported: kvm.supported_cpuid()?,
                msrs: kvm.msr_indices()?,
                can_scale: caps.tsc_control,
            },
        })
    }

    /// Its size, which is the guest's that it is for.
    #[must_use]
    pub const fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Its processors with their places in the machine.
    pub(super) fn places(&self) -> impl Iterator<Item = (Place, &Vcpu)> {
        let vcpus = self.layout.vcpus();
        let place = move |vcpu| Place { vcpu, vcpus };
        (0..vcpus).map(place).zip(&self.vcpus)
    }
}
