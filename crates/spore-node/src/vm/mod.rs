//! One VM of this node: its life, the task that lives it, and the channel to its agent.
//!
//! [`state`] is the pure machine, `actor` carries its effects out (those that take time are in
//! `effect`, `thaw` and `capture`), [`guest`] speaks with the agent, `collect` keeps what the app
//! prints, [`mask`]ed, [`board`] tells who asks. Nothing here decides *that* a VM runs.

pub(crate) mod actor;
pub mod board;
pub(crate) mod capture;
mod collect;
mod effect;
pub mod guest;
mod handle;
pub mod mask;
mod record;
pub mod state;
mod supervise;
pub(crate) mod tasks;
mod thaw;
