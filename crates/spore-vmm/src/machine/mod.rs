//! The machine that a guest sees: its physical map, the tables that tell the guest of it, and what
//! is in its memory when it starts.

pub mod acpi;
pub mod boot;
pub mod layout;
