//! The whole platform on virtual time and a seed: gateway, control and node, and what goes wrong.
//!
//! ```text
//!   visitors ─▶ gateway (its real state machine, no sockets)      owner ─▶ API (its real router)
//!                  ▲ │                                                        │
//!                  │ ▼  link: slow, breaks                                    ▼
//!               ┌──────────── daemon, behind a fuse that blows anywhere ────────────┐
//!               │   control (real) over a store in memory   node (real)             │
//!               └────────────────────────────────────────────────┬──────────────────┘
//!                                                                 ▼
//!                                             simulated machine with guests, by fault plan
//! ```
//!
//! | module | what |
//! |---|---|
//! | [`life`] | one seed: plan, faults, calm, the last look |
//! | `seam` | what visitors must not notice |
//! | [`world`] | the platform, its visitors and its owner |
//! | [`watch`] | what holds at every instant |
//! | [`daemon`], [`fuse`] | a daemon and its end |
//! | [`nodes`], [`link`] | its node, its way to the gateway |
//! | [`gateway`], `feed`, [`visit`] | the gateway's process |
//! | [`trace`], [`chance`] | the story with its hash; time and numbers |
#![forbid(unsafe_code)]

pub mod chance;
pub mod daemon;
mod feed;
pub mod fuse;
pub mod gateway;
pub mod life;
pub mod link;
pub mod nodes;
mod seam;
pub mod trace;
pub mod visit;
pub mod watch;
pub mod world;
