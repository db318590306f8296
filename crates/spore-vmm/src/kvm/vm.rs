//! A VM and its processors, as KVM holds them. Made by [`Kvm::create_vm`](super::Kvm::create_vm).
//!
//! The address space that the guest's memory is in lives at least as long as the VM and each of its
//! processors: KVM writes to it for the guest, at addresses of this process.
#![expect(
    unsafe_code,
    reason = "KVM is given addresses of this process, and a processor's extended state"
)]

use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, FromRawFd as _, IntoRawFd as _};
use std::ptr;
use std::sync::{Arc, OnceLock};

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_clock_data, kvm_debugregs, kvm_irqchip,
    kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_userspace_memory_region,
    kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{IoEventAddress, VcpuExit, VcpuFd, VmFd};
use rustix::mm::{Advice, madvise};
use vmm_sys_util::eventfd::EventFd;

use super::bell::Bell;
use super::kick::Recall;
use super::{KvmError, set_tsc_offset, tsc_offset};
use crate::machine::layout::{IDENTITY_MAP, KVM_TSS};
use crate::memory::{Gpa, Region, Space};

/// Which of the three chips of the interrupt controller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Chip {
    /// The first of the old pair.
    PicMaster,
    /// The second.
    PicSlave,
    /// The IO-APIC.
    IoApic,
}

/// All three, in the order in which they are saved.
pub const CHIPS: [Chip; 3] = [Chip::PicMaster, Chip::PicSlave, Chip::IoApic];

impl Chip {
    const fn id(self) -> u32 {
        match self {
            Self::PicMaster => kvm_bindings::KVM_IRQCHIP_PIC_MASTER,
            Self::PicSlave => kvm_bindings::KVM_IRQCHIP_PIC_SLAVE,
            Self::IoApic => kvm_bindings::KVM_IRQCHIP_IOAPIC,
        }
    }
}

/// A VM.
#[derive(Debug)]
pub struct Vm {
    fd: VmFd,
    home: Home,
}

/// What is behind every slot of a VM, from the first slot on. Held by the VM and by each of its
/// processors, those too that were made before.
type Home = Arc<OnceLock<Arc<Space>>>;

impl Vm {
    pub(super) fn new(fd: VmFd) -> Self {
        let home = Home::default();
        Self { fd, home }
    }

    /// Makes the interrupt controllers, and gives KVM the pages that Intel's real mode wants.
    /// Before any processor: each gets its local APIC as it is made.
    pub fn create_irqchip(&self) -> Result<(), KvmError> {
        let map = self.fd.set_identity_map_address(IDENTITY_MAP.0);
        map.map_err(KvmError::of("KVM_SET_IDENTITY_MAP_ADDR"))?;
        let tss = usize::try_from(KVM_TSS.0).unwrap_or(usize::MAX);
        let tss = self.fd.set_tss_address(tss);
        tss.map_err(KvmError::of("KVM_SET_TSS_ADDR"))?;
        let chip = self.fd.create_irq_chip();
        chip.map_err(KvmError::of("KVM_CREATE_IRQCHIP"))
    }

    /// Shows the guest its memory: one slot for each region of the space, which is the VM's only
    /// one. It may be filled later, before the guest runs.
    pub fn set_memory(&self, space: &Arc<Space>, regions: &[Region]) -> Result<(), KvmError> {
        if !Arc::ptr_eq(self.home.get_or_init(|| Arc::clone(space)), space) {
            return Err(KvmError::OtherSpace);
        }
        for (slot, region) in (0..).zip(regions) {
            let (offset, bytes) = (region.offset, region.bytes);
            let address = space.host_address(offset, bytes);
            let slot = kvm_userspace_memory_region {
                slot,
                // What the guest changes is found in this process's page tables.
                flags: 0,
                guest_phys_addr: region.start.0,
                memory_size: bytes,
                userspace_addr: address.ok_or(KvmError::Slot { offset, bytes })?,
            };
            // SAFETY: the range is inside of the space, which this VM and each of its processors
            // hold, and in which nothing has a reference.
            let set = unsafe { self.fd.set_user_memory_region(slot) };
            set.map_err(KvmError::of("KVM_SET_USER_MEMORY_REGION"))?;
        }
        Ok(())
    }

    /// Makes a processor. It runs on the thread that owns it.
    pub fn create_vcpu(&self, id: u8) -> Result<Vcpu, KvmError> {
        let fd = self.fd.create_vcpu(u64::from(id));
        let mut fd = fd.map_err(KvmError::of("KVM_CREATE_VCPU"))?;
        let run = ptr::from_mut(fd.get_kvm_run()).cast();
        // SAFETY: the range is what kvm-ioctls has mapped of the processor, and the advice changes
        // nothing of it here: only copies of the process are without. One that had it would keep
        // the VM for as long as it is there.
        let advised = unsafe { madvise(run, self.fd.run_size(), Advice::LinuxDontFork) };
        advised.map_err(|source| KvmError::Ioctl {
            ioctl: "madvise of a processor",
            source: source.into(),
        })?;
        Ok(Vcpu {
            fd,
            home: Arc::clone(&self.home),
        })
    }

    /// Lets a bell that rings raise the interrupt of a number, once for all rings that KVM has not
    /// seen yet. The interrupt controller is there before.
    pub fn raise_by(&self, bell: &Bell, gsi: u32) -> Result<(), KvmError> {
        let set = self.fd.register_irqfd(&event(bell)?, gsi);
        set.map_err(KvmError::of("KVM_IRQFD"))
    }

    /// Lets a write of `value`, as four bytes, to this place of the guest's map ring a bell and not
    /// end the processor's run.
    pub fn tell_write_by(&self, bell: &Bell, at: Gpa, value: u32) -> Result<(), KvmError> {
        let place = IoEventAddress::Mmio(at.0);
        let set = self.fd.register_ioevent(&event(bell)?, &place, value);
        set.map_err(KvmError::of("KVM_IOEVENTFD"))
    }

    /// The guest's clock, as its processors read it.
    pub fn clock(&self) -> Result<kvm_clock_data, KvmError> {
        self.fd.get_clock().map_err(KvmError::of("KVM_GET_CLOCK"))
    }

    /// Sets the guest's clock. Only before any of its processors has run.
    pub fn set_clock(&self, clock: &kvm_clock_data) -> Result<(), KvmError> {
        let set = self.fd.set_clock(clock);
        set.map_err(KvmError::of("KVM_SET_CLOCK"))
    }

    /// The state of one chip.
    pub fn irqchip(&self, chip: Chip) -> Result<kvm_irqchip, KvmError> {
        let mut state = kvm_irqchip {
            chip_id: chip.id(),
            ..Default::default()
        };
        let got = self.fd.get_irqchip(&mut state);
        got.map_err(KvmError::of("KVM_GET_IRQCHIP"))?;
        Ok(state)
    }

    /// Sets the state of one chip.
    pub fn set_irqchip(&self, chip: Chip, state: &kvm_irqchip) -> Result<(), KvmError> {
        let mut state = *state;
        state.chip_id = chip.id();
        let set = self.fd.set_irqchip(&state);
        set.map_err(KvmError::of("KVM_SET_IRQCHIP"))
    }
}

/// Reads one kind of state of a processor and writes it back: a getter and a setter of the same
/// type under the names of their ioctls.
macro_rules! state {
    ($(#[$doc:meta])* $get:ident, $set:ident: $type:ty,
     $fd_get:ident $ioctl_get:literal, $fd_set:ident $ioctl_set:literal) => {
        $(#[$doc])*
        pub fn $get(&self) -> Result<$type, KvmError> {
            self.fd.$fd_get().map_err(KvmError::of($ioctl_get))
        }

        /// Sets the same.
        pub fn $set(&self, state: &$type) -> Result<(), KvmError> {
            self.fd.$fd_set(state).map_err(KvmError::of($ioctl_set))
        }
    };
}

/// A processor of a VM.
#[derive(Debug)]
pub struct Vcpu {
    fd: VcpuFd,
    #[expect(
        dead_code,
        reason = "held, so that the guest's memory outlives the processor"
    )]
    home: Home,
}

impl Vcpu {
    state!(
        /// The general registers.
        regs, set_regs: kvm_regs,
        get_regs "KVM_GET_REGS", set_regs "KVM_SET_REGS"
    );
    state!(
        /// Segments, control registers, and the APIC's base.
        sregs, set_sregs: kvm_sregs,
        get_sregs "KVM_GET_SREGS", set_sregs "KVM_SET_SREGS"
    );
    state!(
        /// Which extended state is enabled.
        xcrs, set_xcrs: kvm_xcrs,
        get_xcrs "KVM_GET_XCRS", set_xcrs "KVM_SET_XCRS"
    );
    state!(
        /// The debug registers.
        debugregs, set_debugregs: kvm_debugregs,
        get_debug_regs "KVM_GET_DEBUGREGS", set_debug_regs "KVM_SET_DEBUGREGS"
    );
    state!(
        /// The local APIC's registers.
        lapic, set_lapic: kvm_lapic_state,
        get_lapic "KVM_GET_LAPIC", set_lapic "KVM_SET_LAPIC"
    );
    state!(
        /// Exceptions and interrupts that are on their way.
        events, set_events: kvm_vcpu_events,
        get_vcpu_events "KVM_GET_VCPU_EVENTS", set_vcpu_events "KVM_SET_VCPU_EVENTS"
    );

    /// Whether it runs, waits for an interrupt, or was never started. Asking makes KVM take an INIT
    /// or SIPI that is on its way, so that no other state is read before it counts.
    pub fn mp_state(&self) -> Result<kvm_mp_state, KvmError> {
        let state = self.fd.get_mp_state();
        state.map_err(KvmError::of("KVM_GET_MP_STATE"))
    }

    /// Sets the same.
    pub fn set_mp_state(&self, state: kvm_mp_state) -> Result<(), KvmError> {
        let set = self.fd.set_mp_state(state);
        set.map_err(KvmError::of("KVM_SET_MP_STATE"))
    }

    /// The CPUID that it was given.
    pub fn cpuid(&self) -> Result<CpuId, KvmError> {
        let cpuid = self.fd.get_cpuid2(KVM_MAX_CPUID_ENTRIES);
        cpuid.map_err(KvmError::of("KVM_GET_CPUID2"))
    }

    /// Gives it a CPUID. Once, before it runs: later ones are refused by kernels since 5.16.
    pub fn set_cpuid(&self, cpuid: &CpuId) -> Result<(), KvmError> {
        let set = self.fd.set_cpuid2(cpuid);
        set.map_err(KvmError::of("KVM_SET_CPUID2"))
    }

    /// The extended state, in the 4 KiB that hold all of it but AMX, which guests are not shown.
    pub fn xsave(&self) -> Result<kvm_xsave, KvmError> {
        self.fd.get_xsave().map_err(KvmError::of("KVM_GET_XSAVE"))
    }

    /// Sets the same.
    pub fn set_xsave(&self, xsave: &kvm_xsave) -> Result<(), KvmError> {
        // SAFETY: the kernel reads as much as its KVM_CAP_XSAVE2 says. That is more than the 4096
        // bytes of `kvm_xsave` only for a process that has asked for AMX with arch_prctl(2), which
        // this one never does.
        let set = unsafe { self.fd.set_xsave(xsave) };
        set.map_err(KvmError::of("KVM_SET_XSAVE"))
    }

    /// The values of so many MSRs, all of them or an error that names the first that has none.
    pub fn msrs(&self, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, KvmError> {
        let ioctl = "KVM_GET_MSRS";
        let entry = |index: &u32| kvm_msr_entry {
            index: *index,
            ..Default::default()
        };
        let entries: Vec<kvm_msr_entry> = indices.iter().map(entry).collect();
        let mut list = msr_list(ioctl, &entries)?;
        let read = self.fd.get_msrs(&mut list).map_err(KvmError::of(ioctl))?;
        match indices.get(read) {
            Some(index) => Err(KvmError::Msr {
                ioctl,
                index: *index,
            }),
            None => Ok(list.as_slice().to_vec()),
        }
    }

    /// Sets so many MSRs, all of them or an error that names the first that was refused.
    pub fn set_msrs(&self, entries: &[kvm_msr_entry]) -> Result<(), KvmError> {
        let ioctl = "KVM_SET_MSRS";
        let list = msr_list(ioctl, entries)?;
        let set = self.fd.set_msrs(&list).map_err(KvmError::of(ioctl))?;
        match entries.get(set) {
            Some(entry) => Err(KvmError::Msr {
                ioctl,
                index: entry.index,
            }),
            None => Ok(()),
        }
    }

    /// The rate of its TSC.
    pub fn tsc_khz(&self) -> Result<u32, KvmError> {
        let khz = self.fd.get_tsc_khz();
        khz.map_err(KvmError::of("KVM_GET_TSC_KHZ"))
    }

    /// Sets the same; where the host cannot scale, only to the host's own.
    pub fn set_tsc_khz(&self, khz: u32) -> Result<(), KvmError> {
        let set = self.fd.set_tsc_khz(khz);
        set.map_err(KvmError::of("KVM_SET_TSC_KHZ"))
    }

    /// What is added to the host's TSC, to the last tick.
    pub fn tsc_offset(&self) -> Result<u64, KvmError> {
        tsc_offset(&self.fd)
    }

    /// Sets the same.
    pub fn set_tsc_offset(&self, offset: u64) -> Result<(), KvmError> {
        set_tsc_offset(&self.fd, offset)
    }

    /// Tells a guest that uses KVM's clock that it was stopped, so that its watchdogs stay quiet.
    /// One that does not use it is not told, which is no error.
    pub fn tell_paused(&self) -> Result<(), KvmError> {
        match self.fd.kvmclock_ctrl() {
            Err(error) if error.errno() == EINVAL => Ok(()),
            told => told.map_err(KvmError::of("KVM_KVMCLOCK_CTRL")),
        }
    }

    /// What calls it back from its guest, from any thread.
    pub fn recall(&self) -> Result<Recall, KvmError> {
        // SAFETY: the processor's descriptor is open while `self` is borrowed.
        let fd = unsafe { BorrowedFd::borrow_raw(self.fd.as_raw_fd()) };
        Recall::new(fd)
    }

    /// What KVM says of the error inside of it that it came back with last; 1 is an instruction
    /// that it cannot emulate. Asked after [`VcpuExit::InternalError`], and nothing else then.
    pub fn internal_error(&mut self) -> u32 {
        let run = self.fd.get_kvm_run();
        // SAFETY: every part of this union is plain numbers, whichever of them KVM has set.
        unsafe { run.__bindgen_anon_1.internal.suberror }
    }

    /// Lets the next [`run`](Self::run) come back without entering the guest, once it has finished
    /// what the guest had begun.
    pub fn set_immediate_exit(&mut self, wanted: bool) {
        self.fd.set_kvm_immediate_exit(u8::from(wanted));
    }

    /// Runs the guest until it wants something.
    pub fn run(&mut self) -> Result<VcpuExit<'_>, KvmError> {
        self.fd.run().map_err(KvmError::of("KVM_RUN"))
    }
}

const EINVAL: i32 = rustix::io::Errno::INVAL.raw_os_error();

/// A bell as kvm-ioctls wants it. KVM keeps what is behind the descriptor, and not its number.
fn event(bell: &Bell) -> Result<EventFd, KvmError> {
    let copied = bell.as_fd().try_clone_to_owned();
    let copy = copied.map_err(|source| KvmError::Ioctl {
        ioctl: "dup of a bell",
        source,
    })?;
    // SAFETY: the descriptor is an eventfd, and from here on the value's own alone.
    Ok(unsafe { EventFd::from_raw_fd(copy.into_raw_fd()) })
}

fn msr_list(ioctl: &'static str, entries: &[kvm_msr_entry]) -> Result<Msrs, KvmError> {
    Msrs::from_entries(entries).map_err(|_error| KvmError::Ioctl {
        ioctl,
        source: std::io::Error::from(rustix::io::Errno::TOOBIG),
    })
}
