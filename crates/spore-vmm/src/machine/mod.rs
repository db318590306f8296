//! The machine that a guest sees, before anything of it runs: its physical map and the tables that
//! tell the guest of it.

pub mod acpi;
pub mod layout;
