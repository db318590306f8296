//! The jail of VMMs, and the zygote that makes them. Called by `main`, once, in a process that was
//! just started and has one thread. Never opens anything for a guest: what a VMM has came with the
//! request for it.
//!
//! ```text
//!   node ──exec──▶ zygote   setup.rs: namespaces, empty root, ids of its own, few capabilities
//!                    │      zygote.rs: Spawn{uid} + descriptors
//!                    │
//!                    ├─clone(VM, VFORK)─▶ spawner   spawn.rs: a new pid namespace for its children
//!                    │                      │
//!                    ├── sleeper, pid 1 ◀───┤       both are the zygote's own children
//!                    └── VMM, pid 2     ◀───┘       child.rs: descriptors, limits, ids, filter
//! ```
//!
//! The order is fixed, since each step needs what a later one takes away. Of the zygote (`setup`):
//!
//! 1. descriptors; a copy that will write the map of ids, which needs the host's privileges and
//!    `/proc`; `oom_score_adj`, which needs `/proc` too;
//! 2. no groups: with `setgroups` denied in the map, none could be left later;
//! 3. mount, net, ipc and uts namespaces *before* the user namespace: they belong to the host's, so
//!    that no capability of the zygote's counts in them;
//! 4. an empty, read-only root;
//! 5. limits, landlock, the user namespace, the first id of the range, four capabilities,
//!    `no_new_privs`, not dumpable, a filter.
//!
//! Of a VMM (`child`): descriptors by number and no others; limits; its own cgroup namespace, which
//! needs a capability; an empty bounding set, which needs another; its own gid and uid; no
//! capability; not dumpable (a change of uid makes a process dumpable); the filter. Only then does
//! it read what anybody wrote.
//!
//! Why there is a spawner: a process cannot go back to the host's pid namespace, and the VMM must
//! not be the first of its own, since all end with that: a copy of it, made for a checkpoint,
//! outlives it. The spawner shares the zygote's memory and descriptors (so nothing is copied and
//! pidfds need not be passed) but not its namespaces, and its children are its parent's.

mod child;
pub mod copy;
mod limits;
mod packet;
pub mod seccomp;
mod setup;
mod spawn;
mod sys;
pub mod zygote;

use std::io;
use std::os::fd::OwnedFd;

use self::limits::LimitError;
use self::seccomp::FilterError;

/// A VMM's pid in its own namespace.
pub const VMM_PID: u32 = 2;

/// Where a VMM, and each copy of it, holds the end of a pipe whose other end the sleeper waits at.
/// When nobody holds it any more the sleeper ends, and with it whatever is left of the VM: so it is
/// nobody's to close.
pub const LIFE_FD: i32 = 5;

/// The exit code of a VMM that could not be jailed.
pub const UNJAILED: u8 = 5;

/// What a VMM has, beside its jail. Its first thread is in [`seccomp::Cell::Starting`].
#[derive(Debug)]
pub struct Inherited {
    /// The socket that listens for the node.
    pub control: OwnedFd,
    /// `/dev/kvm`; `None` when the zygote was started without.
    pub kvm: Option<OwnedFd>,
}

/// What a VMM does in its jail; gives the process's exit code.
pub type Run = fn(Inherited) -> u8;

/// Why a process is not jailed. It is in an undefined state, and must end.
#[derive(Debug, thiserror::Error)]
pub enum JailError {
    /// A step was refused.
    #[error("cannot jail the process: {what}")]
    Step {
        /// Which.
        what: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A step was done and is not seen to be.
    #[error("the process is not jailed: {what}")]
    Left {
        /// What is left.
        what: &'static str,
    },
    /// A limit was refused.
    #[error("cannot jail the process")]
    Limit(#[from] LimitError),
    /// A filter was refused.
    #[error("cannot jail the process")]
    Filter(#[from] FilterError),
}

/// A step's failure, with its name.
fn step<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> JailError {
    move |source| JailError::Step {
        what,
        source: source.into(),
    }
}

/// That something is as it must be.
fn check(what: &'static str, holds: bool) -> Result<(), JailError> {
    if holds {
        Ok(())
    } else {
        Err(JailError::Left { what })
    }
}
