//! What is x86-64's own of a guest's processor: what it says that it can do, what it is before its
//! first instruction, and which of its registers are saved. Pure: what KVM offers comes in, what
//! the guest gets goes out.

pub mod cpuid;
pub mod entry;
pub mod msr;
