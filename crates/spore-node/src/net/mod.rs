//! The network of a VM: a namespace of its own with one tap and no way out.
//!
//! Used by the drivers through `hypervisor/room.rs`. Everything that must happen inside a namespace
//! happens on a thread of this module ([`thread`]), never on a runtime's worker, whose namespace
//! must not change under other tasks. Never makes a veth, a route or forwarding: see
//! [`policy`] for what may pass.
//!
//! # Life of a namespace
//!
//! ```text
//!   made, tap down, policy closed ─take─▶ of one VM ─open─▶ tap up, policy open ─remove─▶ gone
//!         (waits in the pool)                   └──────────────remove──────────────────────▶ gone
//! ```
//! It is never given to a second VM.

pub mod namespace;
pub mod policy;
pub mod pool;
pub mod tap;
pub mod thread;
