//! The daemon: control, node and the gateway's link in one process, and the verbs around it.
//!
//! ```text
//!   up.rs ──starts──▶ daemon.rs ──┬── control (spore-control) ── host.rs ──┐
//!   down.rs  unit.rs              ├── node (spore-node) ◀─────────────────┘
//!                                 ├── door.rs ── gateway_process.rs ──▶ spore gateway
//!                                 └── listen.rs: API on a unix socket and TCP
//! ```
//!
//! This module connects; what happens is decided in the crates that it connects.

mod daemon;
mod door;
mod down;
mod driver;
mod gateway_process;
mod host;
mod internal;
mod linger;
mod listen;
mod lock;
mod parts;
mod snapshots;
mod token;
mod unit;
mod up;

pub(crate) use self::driver::HypervisorChoice;
pub(crate) use daemon::{ServerOptions, serve};
pub(crate) use down::down;
pub(crate) use internal::{egress, gateway, image_pack, jail, keep_token};
pub(crate) use parts::BUILD_USER;
pub(crate) use up::{StartOptions, up};
