//! What is x86-64's own of a guest's processor: what it says that it can do, what it is before its
//! first instruction, and what is saved of it in which order.

pub mod cpuid;
pub mod entry;
pub mod features;
pub mod msr;
pub mod saved;
pub mod state;
pub mod tsc;
