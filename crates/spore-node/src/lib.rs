//! One Spore host: starts, watches and stops VMs with the host's privileges.
//!
//! Used by the `spore` program, which connects it to the control plane. Never decides *that* a VM
//! should run, and never runs a tenant's code outside a VM.

mod app_log;
pub mod capacity;
pub mod cgroup;
pub mod clock;
pub mod config;
pub mod confine;
pub mod disk;
pub mod doctor;
pub mod egress;
pub mod hypervisor;
pub mod image;
pub mod jail;
pub mod journal;
pub mod log;
pub mod memory;
pub mod net;
pub mod node;
pub mod snapshot;
pub mod snapshots;
mod sys;
pub mod take;
mod template;
mod tool;
pub mod vm;
