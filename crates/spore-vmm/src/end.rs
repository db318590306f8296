//! How a machine ends: whose doing it was, and what of it.

use crate::fault::GuestFault;
use crate::jail::seccomp::FilterError;
use crate::kvm::KvmError;

/// Why a machine does not run any more.
#[derive(Debug, thiserror::Error)]
pub enum End {
    /// The guest powered off.
    #[error("the guest powered off")]
    PowerOff,
    /// The guest wants to begin anew, by its reset line.
    #[error("the guest asked for a reset")]
    Reset,
    /// The guest's processor gave up: a fault while it handled a fault while it handled a fault.
    #[error("processor {vcpu} of the guest shut down (triple fault)")]
    TripleFault {
        /// Which one.
        vcpu: u8,
    },
    /// A driver in the guest did what none does.
    #[error("the guest broke a device")]
    Fault(#[from] GuestFault),
    /// Whoever owns the machine ended it.
    #[error("the machine was stopped")]
    Stopped,
    /// KVM could not go on with the guest. 1 is an instruction that it cannot emulate, which a
    /// guest can bring about.
    #[error("KVM cannot go on with processor {vcpu} of the guest: internal error {error}")]
    Internal {
        /// Which one.
        vcpu: u8,
        /// KVM's number, `KVM_INTERNAL_ERROR_*` of <linux/kvm.h>.
        error: u32,
    },
    /// The host's processor did not take the guest's state.
    #[error("the host's processor refuses processor {vcpu} of the guest: reason {reason:#x}")]
    Refused {
        /// Which one.
        vcpu: u8,
        /// The hardware's number.
        reason: u64,
    },
    /// KVM came back with what this machine has not asked for.
    #[error("KVM came back from processor {vcpu} with {exit}, which is not expected")]
    Unexpected {
        /// Which one.
        vcpu: u8,
        /// KVM's name for it.
        exit: String,
    },
    /// KVM refused to run a processor.
    #[error("processor {vcpu} cannot run")]
    Kvm {
        /// Which one.
        vcpu: u8,
        /// What it said.
        #[source]
        source: KvmError,
    },
    /// The host cannot wait for devices.
    #[error("the host cannot wait for the machine's devices")]
    Wait(#[source] std::io::Error),
    /// A thread could not be confined, and has done nothing.
    #[error(transparent)]
    Unconfined(#[from] FilterError),
    /// A bug of ours.
    #[error("{worker} panicked")]
    Panic {
        /// Which thread.
        worker: String,
    },
}
