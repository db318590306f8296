//! One guest, one process: the parts of Spore's microVM monitor on KVM.
//!
//! ```text
//!   machine/   the whole of it: physical map, tables, cold start, devices in their places
//!   kvm/       [unsafe] the few things that are asked of KVM, each checked; the guest's processor
//!   memory/    [unsafe] the guest's memory: one mapping, volatile access, checked ranges
//!   device/    registers on buses, and the virtio devices behind them
//!   disk/      what is behind a block device
//!   vcpu/      a processor's thread, and what it does when KVM comes back
//!   worker/    threads that run, pause and end together
//!   end        how a machine ends
//!   control/   what the node asks for, and who is told
//!   inherited  [unsafe] descriptors that the process was started with
//!   jail/      [unsafe] namespaces, ids and filters; the zygote, whose copies are VMMs
//!   snapshot/  the form of a saved machine
//!   probe      the guest that tells a KVM that can run others from one that cannot
//! ```
//!
//! What holds everywhere here:
//!
//! - Nothing opens a path, a socket or a process: what is used came in as a descriptor.
//! - The guest is hostile. Every number that it wrote is checked where it is read; a ring that
//!   makes no sense is a [`fault::GuestFault`], which ends this guest with a reason and nothing
//!   else.
//! - Guest memory is never a Rust reference. What is looked at twice is copied once first, since
//!   the guest changes it meanwhile.
//! - No time is read and no chance is taken but through what was given ([`clock::Clock`]).

pub mod clock;
pub mod control;
pub mod device;
pub mod disk;
pub mod end;
pub mod fault;
pub mod inherited;
pub mod jail;
pub mod kvm;
pub mod machine;
pub mod memory;
pub mod probe;
pub mod snapshot;
pub mod vcpu;
pub mod worker;
