//! What is asked of KVM, thinly over `kvm-ioctls`: every answer checked, every error with its
//! ioctl.
//!
//! Begins with an open `/dev/kvm`: nothing here opens it. Which ioctl follows which, and why, is
//! said where an order matters; here each is by itself.
#![expect(
    unsafe_code,
    reason = "a descriptor becomes a Kvm, and one ioctl has no wrapper on x86-64"
)]

pub mod bell;
pub mod kick;
pub mod vm;
pub mod x86_64;

use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, IntoRawFd as _, OwnedFd};

use kvm_bindings::{CpuId, KVM_API_VERSION, KVM_MAX_CPUID_ENTRIES, kvm_device_attr};
use kvm_ioctls::{Cap, VcpuFd};
use rustix::ioctl;

use self::vm::Vm;

/// How often KVM_CREATE_VM is tried anew when a signal ended it.
const CREATE_ATTEMPTS: u32 = 5;

/// KVM's error: what was asked, and what the kernel said.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// What was given is no `/dev/kvm`, or one of another age.
    #[error("the descriptor speaks version {found} of KVM's interface, not {KVM_API_VERSION}")]
    Version {
        /// What it said; negative when it is no KVM at all.
        found: i32,
    },
    /// This kernel's KVM cannot do what every guest needs.
    #[error("this kernel's KVM lacks {}", .missing.join(", "))]
    Missing {
        /// The names of what it lacks.
        missing: Vec<&'static str>,
    },
    /// An ioctl failed.
    #[error("{ioctl} failed")]
    Ioctl {
        /// Its name.
        ioctl: &'static str,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// Some of a list were set or read, and then one was refused.
    #[error("{ioctl} stopped at MSR {index:#x}")]
    Msr {
        /// Its name.
        ioctl: &'static str,
        /// The one that was refused.
        index: u32,
    },
    /// A slot outside of the space that was reserved for it.
    #[error("a memory slot of {bytes} bytes at {offset:#x} is outside of the guest's memory")]
    Slot {
        /// Where it begins in the space.
        offset: u64,
        /// How long it is.
        bytes: u64,
    },
    /// A VM's slots are all of one space.
    #[error("a memory slot of another space than the VM's")]
    OtherSpace,
}

impl KvmError {
    /// An ioctl's failure, with its name.
    fn of(ioctl: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |error| Self::Ioctl {
            ioctl,
            source: error.into(),
        }
    }
}

/// What every guest needs, with the names that people find it by.
const REQUIRED: &[(Cap, &str)] = &[
    (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK"),
    (Cap::Debugregs, "KVM_CAP_DEBUGREGS"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::GetTscKhz, "KVM_CAP_GET_TSC_KHZ"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::KvmclockCtrl, "KVM_CAP_KVMCLOCK_CTRL"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::SetIdentityMapAddr, "KVM_CAP_SET_IDENTITY_MAP_ADDR"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::TscDeadlineTimer, "KVM_CAP_TSC_DEADLINE_TIMER"),
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
    (Cap::Xcrs, "KVM_CAP_XCRS"),
    (Cap::Xsave, "KVM_CAP_XSAVE"),
];

/// What this kernel's KVM can do beyond that.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caps {
    /// A guest's TSC may run at another rate than the host's.
    pub tsc_control: bool,
    /// The bytes that all of a processor's XSAVE state takes.
    pub xsave_bytes: u32,
    /// The most processors of a VM.
    pub vcpus_max: u32,
    /// The most memory slots of a VM.
    pub slots_max: u32,
}

/// An open `/dev/kvm` that can do what guests need.
#[derive(Debug)]
pub struct Kvm {
    inner: kvm_ioctls::Kvm,
}

impl Kvm {
    /// Takes an open `/dev/kvm`, if it is one and can do what every guest needs.
    pub fn new(device: OwnedFd) -> Result<Self, KvmError> {
        // SAFETY: the descriptor is open and now owned by `inner` alone. If it is no KVM its ioctls
        // fail, and the first of them is asked below.
        let inner = unsafe { kvm_ioctls::Kvm::from_raw_fd(device.into_raw_fd()) };
        let found = inner.get_api_version();
        if i64::from(found) != i64::from(KVM_API_VERSION) {
            return Err(KvmError::Version { found });
        }
        let missing = REQUIRED
            .iter()
            .filter(|(cap, _)| !inner.check_extension(*cap));
        let missing: Vec<&'static str> = missing.map(|(_, name)| *name).collect();
        if missing.is_empty() {
            Ok(Self { inner })
        } else {
            Err(KvmError::Missing { missing })
        }
    }

    /// What it can do beyond what every guest needs.
    #[must_use]
    pub fn caps(&self) -> Caps {
        let number = |cap| u32::try_from(self.inner.check_extension_int(cap)).unwrap_or(0);
        Caps {
            tsc_control: self.inner.check_extension(Cap::TscControl),
            // Before KVM_CAP_XSAVE2 there was no state that KVM_GET_XSAVE could not hold.
            xsave_bytes: number(Cap::Xsave2).max(4096),
            vcpus_max: number(Cap::MaxVcpus),
            slots_max: number(Cap::NrMemslots),
        }
    }

    /// A VM without memory.
    pub fn create_vm(&self) -> Result<Vm, KvmError> {
        let mut attempt = 1;
        loop {
            match self.inner.create_vm() {
                Ok(fd) => return Ok(Vm::new(fd)),
                // It gives up on any signal, one to another thread's timer too.
                Err(error) if error.errno() == EINTR && attempt < CREATE_ATTEMPTS => attempt += 1,
                Err(error) => return Err(KvmError::of("KVM_CREATE_VM")(error)),
            }
        }
    }

    /// The CPUID that KVM can give a guest on this host.
    pub fn supported_cpuid(&self) -> Result<CpuId, KvmError> {
        let supported = self.inner.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES);
        supported.map_err(KvmError::of("KVM_GET_SUPPORTED_CPUID"))
    }

    /// The MSRs that KVM saves and restores on this host, by its own list.
    pub fn msr_indices(&self) -> Result<Vec<u32>, KvmError> {
        let list = self.inner.get_msr_index_list();
        let list = list.map_err(KvmError::of("KVM_GET_MSR_INDEX_LIST"))?;
        Ok(list.as_slice().to_vec())
    }
}

const EINTR: i32 = rustix::io::Errno::INTR.raw_os_error();

/// `KVMIO` of <linux/kvm.h>.
const KVMIO: u8 = 0xae;

/// Of an attribute of a processor.
const SET_DEVICE_ATTR: ioctl::Opcode = ioctl::opcode::write::<kvm_device_attr>(KVMIO, 0xe1);
const GET_DEVICE_ATTR: ioctl::Opcode = ioctl::opcode::write::<kvm_device_attr>(KVMIO, 0xe2);

/// `KVM_VCPU_TSC_CTRL` and `KVM_VCPU_TSC_OFFSET` of <asm/kvm.h>, since Linux 5.16.
const TSC_CTRL: u32 = 0;
const TSC_OFFSET: u64 = 0;

/// What is added to the host's TSC for this processor of the guest.
///
/// Written as an MSR, the TSC of each processor would be set at another instant, and KVM would
/// guess which were meant to be the same.
fn tsc_offset(vcpu: &VcpuFd) -> Result<u64, KvmError> {
    let mut offset = 0_u64;
    let attribute = kvm_device_attr {
        group: TSC_CTRL,
        attr: TSC_OFFSET,
        addr: (&raw mut offset).expose_provenance() as u64,
        ..Default::default()
    };
    // SAFETY: the processor's descriptor is open while `vcpu` is borrowed.
    let fd = unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) };
    // SAFETY: the opcode is that of `kvm_device_attr`, which the kernel only reads.
    let call = unsafe { ioctl::Setter::<GET_DEVICE_ATTR, kvm_device_attr>::new(attribute) };
    // SAFETY: the kernel writes eight bytes to `addr`, which is `offset`, alive until after it.
    let done = unsafe { ioctl::ioctl(fd, call) };
    done.map_err(|error| KvmError::Ioctl {
        ioctl: "KVM_GET_DEVICE_ATTR",
        source: error.into(),
    })?;
    Ok(offset)
}

/// Sets what [`tsc_offset`] tells.
fn set_tsc_offset(vcpu: &VcpuFd, offset: u64) -> Result<(), KvmError> {
    let attribute = kvm_device_attr {
        group: TSC_CTRL,
        attr: TSC_OFFSET,
        addr: (&raw const offset).expose_provenance() as u64,
        ..Default::default()
    };
    // SAFETY: the processor's descriptor is open while `vcpu` is borrowed.
    let fd = unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) };
    // SAFETY: the opcode is that of `kvm_device_attr`, which the kernel only reads.
    let call = unsafe { ioctl::Setter::<SET_DEVICE_ATTR, kvm_device_attr>::new(attribute) };
    // SAFETY: the kernel reads eight bytes at `addr`, which is `offset`, alive until after it.
    let done = unsafe { ioctl::ioctl(fd, call) };
    done.map_err(|error| KvmError::Ioctl {
        ioctl: "KVM_SET_DEVICE_ATTR",
        source: error.into(),
    })
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;

    use super::{GET_DEVICE_ATTR, Kvm, KvmError, SET_DEVICE_ATTR};

    #[test]
    fn the_ioctls_are_those_of_the_kernels_header() {
        assert_eq!(SET_DEVICE_ATTR, 0x4018_aee1);
        assert_eq!(GET_DEVICE_ATTR, 0x4018_aee2);
    }

    #[test]
    fn a_descriptor_that_is_no_kvm_is_refused() {
        let null = OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        let error = Kvm::new(null).unwrap_err();
        assert!(
            matches!(error, KvmError::Version { found } if found < 0),
            "{error}"
        );
    }
}
