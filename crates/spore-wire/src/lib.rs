//! Private contracts between Spore's own processes.
//!
//! Who speaks to whom:
//!
//! ```text
//!   control ──node──▶ node ──guest──▶ agent in the VM
//!   daemon  ◀─gateway─▶ gateway process (unix seqpacket, connected sockets by SCM_RIGHTS)
//!   node    ──egress──▶ per-VM egress proxy (one blob at start)
//!   node    ──zygote──▶ zygote, whose copies are VMMs (unix seqpacket)
//!   node    ──vmm──▶ VMM (unix seqpacket; one launch blob and what it names by SCM_RIGHTS)
//! ```
//!
//! | module | contract | may an old peer be on the other side? |
//! |---|---|---|
//! | [`frame`] | the outer frame of the agent's channel | yes: an agent frozen in a snapshot |
//! | [`guest`] | host and agent | yes |
//! | [`gateway`] | daemon and gateway | yes: a gateway outlives its daemon |
//! | [`egress`] | node and egress proxy | yes: a proxy outlives its daemon |
//! | [`vmm`], [`launch`] | node and VMM | yes: a VMM outlives its daemon |
//! | [`zygote`] | node and zygote | no: a zygote ends with its daemon |
//! | [`node`] | control and node | not yet: one process, one version |
//!
//! [`snapshot`] is what control sees of a node's snapshots; [`cause`] is how errors are told
//! between them.
//!
//! This crate never opens a file, a socket or a process: it holds types, limits and encodings.
#![forbid(unsafe_code)]

pub mod cause;
pub mod egress;
pub mod frame;
pub mod gateway;
pub mod generation;
pub mod guest;
pub mod id;
pub mod launch;
pub mod node;
pub mod secret;
pub mod snapshot;
mod tripwires;
pub mod vmm;
pub mod zygote;
