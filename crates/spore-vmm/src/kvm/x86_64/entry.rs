//! What a processor is before its first instruction: the boot processor as the x86/HVM direct boot
//! ABI (PVH) of Xen has it, in protected mode with flat segments and without paging. The others
//! wait for it to start them, as KVM makes them.

use kvm_bindings::{
    CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2, kvm_msr_entry, kvm_regs, kvm_segment,
    kvm_sregs,
};

use super::cpuid::{self, Place};
use crate::kvm::KvmError;
use crate::kvm::vm::Vcpu;
use crate::memory::Gpa;

/// Protected mode, and nothing else of the first control register.
const PE: u64 = 1;

/// Of the flags: the bit that is always set. No interrupts, no single steps, no virtual 8086.
const FLAGS: u64 = 1 << 1;

/// Kinds of segments: code to execute and read, data to read and write, each accessed, as KVM has
/// them when they are loaded; and a task that runs, of 32 bits.
const CODE: u8 = 0xb;
const DATA: u8 = 0x3;
const TASK: u8 = 0xb;

/// What the ABI wants a task's limit to be.
const TASK_LIMIT: u32 = 0x67;

/// Selectors. There is no table behind them: a kernel loads its own before it uses any.
const CODE_SELECTOR: u16 = 0x8;
const DATA_SELECTOR: u16 = 0x10;
const TASK_SELECTOR: u16 = 0x18;

/// The default memory type: enabled, and write-back. A kernel that finds none enabled takes all of
/// its memory for uncached and does without page attributes; firmware would have set it.
const MTRR_DEFAULT: u32 = 0x2ff;
const MTRR_ENABLED: u64 = 1 << 11;
const MTRR_WRITE_BACK: u64 = 6;

/// Whether a processor can save extended state at all, in leaf 1.
const ECX_XSAVE: u32 = 1 << 26;

/// The x87's part of the extended state, which is always enabled.
const X87: u64 = 1;

/// Makes a new processor one of a machine's, of what KVM can give.
pub fn set_up(vcpu: &Vcpu, supported: &[kvm_cpuid_entry2], place: Place) -> Result<(), KvmError> {
    let leaves = cpuid::guest(supported, place);
    let cpuid = CpuId::from_entries(&leaves).map_err(|_error| KvmError::Ioctl {
        ioctl: "KVM_SET_CPUID2",
        source: rustix::io::Errno::TOOBIG.into(),
    })?;
    vcpu.set_cpuid(&cpuid)?;
    if let Some(enabled) = extended_state(&leaves) {
        let mut xcrs = vcpu.xcrs()?;
        xcrs.xcrs[0].value = enabled;
        vcpu.set_xcrs(&xcrs)?;
    }
    vcpu.set_msrs(&msrs())
}

/// Lets the boot processor begin at a kernel's entry.
pub fn begin(vcpu: &Vcpu, entry: Gpa, start_info: Gpa) -> Result<(), KvmError> {
    vcpu.set_sregs(&sregs(vcpu.sregs()?))?;
    vcpu.set_regs(&regs(entry, start_info))
}

/// The general registers: where it begins, and where it finds the start info.
#[must_use]
pub fn regs(entry: Gpa, start_info: Gpa) -> kvm_regs {
    kvm_regs {
        rip: entry.0,
        rbx: start_info.0,
        rflags: FLAGS,
        ..Default::default()
    }
}

/// Segments and control registers, over those that KVM made: the APIC's base is among them.
#[must_use]
pub fn sregs(made: kvm_sregs) -> kvm_sregs {
    let segment = |selector, type_| kvm_segment {
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    let data = segment(DATA_SELECTOR, DATA);
    kvm_sregs {
        cs: segment(CODE_SELECTOR, CODE),
        ds: data,
        es: data,
        fs: data,
        gs: data,
        ss: data,
        tr: kvm_segment {
            limit: TASK_LIMIT,
            db: 0,
            s: 0,
            g: 0,
            ..segment(TASK_SELECTOR, TASK)
        },
        cr0: PE,
        cr3: 0,
        cr4: 0,
        efer: 0,
        ..made
    }
}

/// What firmware would have set. Of each processor: kernels compare them.
#[must_use]
pub fn msrs() -> [kvm_msr_entry; 1] {
    [kvm_msr_entry {
        index: MTRR_DEFAULT,
        data: MTRR_ENABLED | MTRR_WRITE_BACK,
        ..Default::default()
    }]
}

/// All extended state that a CPUID offers; `None` when it offers none.
///
/// A kernel enables by itself what it wants of it. That it is enabled before is for emulators of
/// KVM's own hardware, QEMU 7.2's among them, which do not tell KVM what a guest enabled: its next
/// exit would take it away again.
#[must_use]
pub fn extended_state(cpuid: &[kvm_cpuid_entry2]) -> Option<u64> {
    let leaf = |function| {
        cpuid.iter().find(|leaf| {
            let first = leaf.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX == 0 || leaf.index == 0;
            leaf.function == function && first
        })
    };
    leaf(0x1).filter(|leaf| leaf.ecx & ECX_XSAVE != 0)?;
    let offered = leaf(0xd)?;
    Some(u64::from(offered.edx) << 32 | u64::from(offered.eax) | X87)
}

#[cfg(test)]
mod tests {
    use kvm_bindings::{kvm_cpuid_entry2, kvm_sregs};

    use super::{extended_state, msrs, regs, sregs};
    use crate::memory::Gpa;

    #[test]
    fn the_boot_processor_begins_as_the_abi_wants_it() {
        let made = kvm_sregs {
            apic_base: 0xfee0_0900,
            cr0: 0x6000_0010,
            cr4: 1,
            efer: 1,
            ..Default::default()
        };
        let set = sregs(made);
        assert_eq!((set.cr0, set.cr3, set.cr4, set.efer), (1, 0, 0, 0));
        assert_eq!(set.apic_base, made.apic_base);
        for flat in [set.cs, set.ds, set.es, set.ss] {
            assert_eq!((flat.base, flat.limit, flat.g), (0, u32::MAX, 1));
            assert_eq!((flat.present, flat.db, flat.s, flat.l), (1, 1, 1, 0));
        }
        assert_eq!((set.cs.type_ & 0xa, set.ds.type_ & 0xa), (0xa, 2));
        let task = set.tr;
        assert_eq!(
            (task.base, task.limit, task.type_, task.s),
            (0, 0x67, 11, 0)
        );
        let set = regs(Gpa(0x10_0200), Gpa(0x6000));
        assert_eq!((set.rip, set.rbx), (0x10_0200, 0x6000));
        // VM, IF and TF are clear.
        assert_eq!(set.rflags, 2);
        assert_eq!((msrs()[0].index, msrs()[0].data), (0x2ff, 0x806));
    }

    #[test]
    fn extended_state_is_what_the_cpuid_offers() {
        let leaf = |function, index, eax, ecx, edx| kvm_cpuid_entry2 {
            function,
            index,
            flags: 1,
            eax,
            ecx,
            edx,
            ..Default::default()
        };
        let can = leaf(1, 0, 0, 1 << 26, 0);
        let second = leaf(0xd, 1, u32::MAX, 0, 0);
        let first = leaf(0xd, 0, 6, 0, 2);
        assert_eq!(extended_state(&[can, second, first]), Some(2 << 32 | 7));
        assert_eq!(extended_state(&[can, second]), None);
        assert_eq!(extended_state(&[leaf(1, 0, 0, 0, 0), first]), None);
    }
}
