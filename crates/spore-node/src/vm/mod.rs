//! One VM of this node: its life, the task that lives it, and the channel to its agent.
//!
//! [`state`] is the pure machine, `actor` carries its effects out, [`guest`] speaks with the agent,
//! `logs` keeps what the app prints. Nothing here decides *that* a VM runs.

pub mod state;
