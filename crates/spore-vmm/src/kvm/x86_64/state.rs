//! All that is saved of a VM and of its processors, and in which order it is read and set.
//!
//! Read, with every processor stopped and what it had begun finished:
//!
//! 1. whether it runs: asking lets an INIT or SIPI that is on its way take effect, and with it
//!    change the registers that are read next
//! 2. everything else, in any order
//!
//! Set, on a VM that has its interrupt controller and memory and has never run:
//!
//! | what | before | since |
//! |---|---|---|
//! | CPUID | all | what may be set depends on it |
//! | TSC rate and offset | the clock's MSRs | these are computed by it |
//! | memory | MSRs | KVM's clock looks for the guest's page when its MSR is set |
//! | segments | local APIC | the APIC's base and mode are among them |
//! | enabled extended state (XCR0) | extended state | what is not enabled is not taken |
//! | local APIC | MSRs | the timer's deadline is dropped in another mode |
//! | general registers, segments | events | setting them forgets what is pending |
//! | all | whether it runs | KVM looks at the APIC for it |
//!
//! The VM's own, chips and clock, are set after its processors: interrupts go to local APICs. What
//! raises a line comes after that: it would be forgotten.
//!
//! Time: a guest's clock and its TSC go on from where they were saved, as if no time had passed.
//! The clock is read first and the TSC after it, both after the guest's last instruction; so
//! neither ever shows less than it did. The TSC is not set by its MSR: each processor's would be at
//! another instant, and KVM would guess which were meant to be the same. One shift is added to the
//! offsets of all processors instead (see [`super::tsc`]).

use kvm_bindings::{
    CpuId, kvm_clock_data, kvm_cpuid_entry2, kvm_debugregs, kvm_irqchip, kvm_lapic_state,
    kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};

use super::msr;
use super::tsc::Reading;
use crate::kvm::KvmError;
use crate::kvm::vm::{CHIPS, Vcpu, Vm};

/// A processor's.
#[derive(Debug)]
pub struct VcpuState {
    /// What it was shown.
    pub cpuid: Vec<kvm_cpuid_entry2>,
    /// What its TSC read.
    pub tsc: u64,
    /// What was added to the host's TSC, which tells its processors' apart.
    pub tsc_offset: u64,
    /// Whether it runs.
    pub mp_state: kvm_mp_state,
    /// General registers.
    pub regs: kvm_regs,
    /// Segments, control registers, the APIC's base.
    pub sregs: kvm_sregs,
    /// Which extended state is enabled.
    pub xcrs: kvm_xcrs,
    /// The extended state, x87 and SSE included.
    pub xsave: kvm_xsave,
    /// Debug registers.
    pub debugregs: kvm_debugregs,
    /// Its local APIC.
    pub lapic: kvm_lapic_state,
    /// Its MSRs, in the order in which they are set.
    pub msrs: Vec<kvm_msr_entry>,
    /// Exceptions and interrupts on their way.
    pub events: kvm_vcpu_events,
}

impl VcpuState {
    /// Reads it. `msrs` are those that this host's processors have (see [`readable`]).
    pub fn save(vcpu: &Vcpu, msrs: &[u32]) -> Result<Self, KvmError> {
        let mp_state = vcpu.mp_state()?;
        let mut msrs = vcpu.msrs(msrs)?;
        msr::arrange(&mut msrs);
        let Reading { tsc, offset } = reading(vcpu)?;
        Ok(Self {
            cpuid: vcpu.cpuid()?.as_slice().to_vec(),
            tsc,
            tsc_offset: offset,
            mp_state,
            regs: vcpu.regs()?,
            sregs: vcpu.sregs()?,
            xcrs: vcpu.xcrs()?,
            xsave: vcpu.xsave()?,
            debugregs: vcpu.debugregs()?,
            lapic: vcpu.lapic()?,
            msrs,
            events: vcpu.events()?,
        })
    }

    /// Which MSRs it has.
    #[must_use]
    pub fn indices(&self) -> Vec<u32> {
        self.msrs.iter().map(|entry| entry.index).collect()
    }

    /// What it read of its TSC.
    #[must_use]
    pub const fn reading(&self) -> Reading {
        Reading {
            tsc: self.tsc,
            offset: self.tsc_offset,
        }
    }

    /// Sets it, on a processor that was just made and has the saved rate; `shift` is what the
    /// machine's TSCs are moved by.
    pub fn restore(&self, vcpu: &Vcpu, shift: u64) -> Result<(), KvmError> {
        let cpuid = CpuId::from_entries(&self.cpuid).map_err(|_error| KvmError::Ioctl {
            ioctl: "KVM_SET_CPUID2",
            source: rustix::io::Errno::TOOBIG.into(),
        })?;
        vcpu.set_cpuid(&cpuid)?;
        vcpu.set_tsc_offset(self.tsc_offset.wrapping_add(shift))?;
        vcpu.set_regs(&self.regs)?;
        vcpu.set_sregs(&self.sregs)?;
        vcpu.set_xcrs(&self.xcrs)?;
        vcpu.set_xsave(&self.xsave)?;
        vcpu.set_debugregs(&self.debugregs)?;
        vcpu.set_lapic(&self.lapic)?;
        vcpu.set_msrs(&self.msrs)?;
        vcpu.set_events(&self.events)?;
        vcpu.set_mp_state(self.mp_state)
    }
}

/// What a processor's TSC reads now.
pub fn reading(vcpu: &Vcpu) -> Result<Reading, KvmError> {
    let read = vcpu.msrs(&[msr::TSC])?;
    Ok(Reading {
        tsc: read.first().map_or(0, |entry| entry.data),
        offset: vcpu.tsc_offset()?,
    })
}

/// Those of a host's MSRs that its processors can be asked for: KVM lists some that it then does
/// not know for a guest of this CPUID. Asked once, of a processor that has its CPUID.
pub fn readable(vcpu: &Vcpu, listed: &[u32]) -> Result<Vec<u32>, KvmError> {
    let mut readable = msr::candidates(listed);
    loop {
        match vcpu.msrs(&readable) {
            Ok(_values) => return Ok(readable),
            // Each turn takes one away.
            Err(KvmError::Msr { index, .. }) => readable.retain(|msr| *msr != index),
            Err(error) => return Err(error),
        }
    }
}

/// A VM's own.
#[derive(Debug)]
pub struct VmState {
    /// The three chips of the interrupt controller, in the order of [`CHIPS`].
    pub chips: [kvm_irqchip; 3],
    /// The guest's clock.
    pub clock: kvm_clock_data,
}

impl VmState {
    /// Reads it.
    pub fn save(vm: &Vm) -> Result<Self, KvmError> {
        let [first, second, third] = CHIPS;
        Ok(Self {
            chips: [vm.irqchip(first)?, vm.irqchip(second)?, vm.irqchip(third)?],
            clock: vm.clock()?,
        })
    }

    /// Sets it: the clock goes on from where it was.
    pub fn restore(&self, vm: &Vm) -> Result<(), KvmError> {
        for (chip, state) in CHIPS.into_iter().zip(&self.chips) {
            vm.set_irqchip(chip, state)?;
        }
        // With flags, KVM would add the time that has passed on the host's clock.
        vm.set_clock(&kvm_clock_data {
            clock: self.clock.clock,
            ..Default::default()
        })
    }
}
