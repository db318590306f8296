//! Numbers of the ioctls that lists let through, from <linux/kvm.h> and <asm/ioctls.h>.

use kvm_bindings::{
    kvm_clock_data, kvm_cpuid2, kvm_debugregs, kvm_device_attr, kvm_ioeventfd, kvm_irqchip,
    kvm_irqfd, kvm_lapic_state, kvm_mp_state, kvm_msr_list, kvm_msrs, kvm_regs, kvm_sregs,
    kvm_userspace_memory_region, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use rustix::ioctl::Opcode;
use rustix::ioctl::opcode::{none, read, read_write, write};

/// `KVMIO`.
const KVM: u8 = 0xae;

macro_rules! numbers {
    ($($name:ident = $opcode:expr;)*) => {
        $(pub(super) const $name: Opcode = $opcode;)*
    };
}

numbers! {
    KVM_GET_API_VERSION = none(KVM, 0x00);
    KVM_CREATE_VM = none(KVM, 0x01);
    KVM_GET_MSR_INDEX_LIST = read_write::<kvm_msr_list>(KVM, 0x02);
    KVM_CHECK_EXTENSION = none(KVM, 0x03);
    KVM_GET_VCPU_MMAP_SIZE = none(KVM, 0x04);
    KVM_GET_SUPPORTED_CPUID = read_write::<kvm_cpuid2>(KVM, 0x05);
    KVM_CREATE_VCPU = none(KVM, 0x41);
    KVM_SET_USER_MEMORY_REGION = write::<kvm_userspace_memory_region>(KVM, 0x46);
    KVM_SET_TSS_ADDR = none(KVM, 0x47);
    KVM_SET_IDENTITY_MAP_ADDR = write::<u64>(KVM, 0x48);
    KVM_CREATE_IRQCHIP = none(KVM, 0x60);
    KVM_GET_IRQCHIP = read_write::<kvm_irqchip>(KVM, 0x62);
    KVM_SET_IRQCHIP = read::<kvm_irqchip>(KVM, 0x63);
    KVM_IRQFD = write::<kvm_irqfd>(KVM, 0x76);
    KVM_IOEVENTFD = write::<kvm_ioeventfd>(KVM, 0x79);
    KVM_SET_CLOCK = write::<kvm_clock_data>(KVM, 0x7b);
    KVM_GET_CLOCK = read::<kvm_clock_data>(KVM, 0x7c);
    KVM_RUN = none(KVM, 0x80);
    KVM_GET_REGS = read::<kvm_regs>(KVM, 0x81);
    KVM_SET_REGS = write::<kvm_regs>(KVM, 0x82);
    KVM_GET_SREGS = read::<kvm_sregs>(KVM, 0x83);
    KVM_SET_SREGS = write::<kvm_sregs>(KVM, 0x84);
    KVM_GET_MSRS = read_write::<kvm_msrs>(KVM, 0x88);
    KVM_SET_MSRS = write::<kvm_msrs>(KVM, 0x89);
    KVM_GET_LAPIC = read::<kvm_lapic_state>(KVM, 0x8e);
    KVM_SET_LAPIC = write::<kvm_lapic_state>(KVM, 0x8f);
    KVM_SET_CPUID2 = write::<kvm_cpuid2>(KVM, 0x90);
    KVM_GET_CPUID2 = read_write::<kvm_cpuid2>(KVM, 0x91);
    KVM_GET_MP_STATE = read::<kvm_mp_state>(KVM, 0x98);
    KVM_SET_MP_STATE = write::<kvm_mp_state>(KVM, 0x99);
    KVM_GET_VCPU_EVENTS = read::<kvm_vcpu_events>(KVM, 0x9f);
    KVM_SET_VCPU_EVENTS = write::<kvm_vcpu_events>(KVM, 0xa0);
    KVM_GET_DEBUGREGS = read::<kvm_debugregs>(KVM, 0xa1);
    KVM_SET_DEBUGREGS = write::<kvm_debugregs>(KVM, 0xa2);
    KVM_SET_TSC_KHZ = none(KVM, 0xa2);
    KVM_GET_TSC_KHZ = none(KVM, 0xa3);
    KVM_GET_XSAVE = read::<kvm_xsave>(KVM, 0xa4);
    KVM_SET_XSAVE = write::<kvm_xsave>(KVM, 0xa5);
    KVM_GET_XCRS = read::<kvm_xcrs>(KVM, 0xa6);
    KVM_SET_XCRS = write::<kvm_xcrs>(KVM, 0xa7);
    KVM_KVMCLOCK_CTRL = none(KVM, 0xad);
    KVM_SET_DEVICE_ATTR = write::<kvm_device_attr>(KVM, 0xe1);
    KVM_GET_DEVICE_ATTR = write::<kvm_device_attr>(KVM, 0xe2);
}

/// Makes a descriptor one that nobody waits in, or not.
pub(super) const FIONBIO: u32 = 0x5421;

// As the kernel's headers have them on x86-64: a structure of another size is another call.
const _: () = assert!(KVM_CREATE_VM == 0xae01);
const _: () = assert!(KVM_SET_USER_MEMORY_REGION == 0x4020_ae46);
const _: () = assert!(KVM_GET_IRQCHIP == 0xc208_ae62);
const _: () = assert!(KVM_SET_IRQCHIP == 0x8208_ae63);
const _: () = assert!(KVM_IRQFD == 0x4020_ae76);
const _: () = assert!(KVM_IOEVENTFD == 0x4040_ae79);
const _: () = assert!(KVM_SET_CLOCK == 0x4030_ae7b);
const _: () = assert!(KVM_RUN == 0xae80);
const _: () = assert!(KVM_GET_REGS == 0x8090_ae81);
const _: () = assert!(KVM_GET_SREGS == 0x8138_ae83);
const _: () = assert!(KVM_GET_MSRS == 0xc008_ae88);
const _: () = assert!(KVM_GET_LAPIC == 0x8400_ae8e);
const _: () = assert!(KVM_SET_CPUID2 == 0x4008_ae90);
const _: () = assert!(KVM_GET_VCPU_EVENTS == 0x8040_ae9f);
const _: () = assert!(KVM_GET_DEBUGREGS == 0x8080_aea1);
const _: () = assert!(KVM_GET_XSAVE == 0x9000_aea4);
const _: () = assert!(KVM_GET_XCRS == 0x8188_aea6);
const _: () = assert!(KVM_SET_DEVICE_ATTR == 0x4018_aee1);
const _: () = assert!(FIONBIO as u64 == libc::FIONBIO);
