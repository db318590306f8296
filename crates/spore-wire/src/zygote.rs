//! Node and zygote: VMMs that are asked for, and what became of them.
//!
//! A zygote is a process of `spore-vmm` that never runs a guest: it is jailed once, and each VMM is
//! a copy of it. Spoken over the unix `SOCK_SEQPACKET` socket that a zygote is started with. One
//! packet is one JSON message of at most [`PACKET_BYTES_MAX`] bytes; descriptors come and go with
//! it (SCM_RIGHTS), as said beside each.
//!
//! ```text
//!   node                                     zygote
//!    │ ◀─────────────── Ready{generation}     │  it is jailed
//!    │ Spawn{request, uid, fds} + fds ─────▶  │
//!    │ ◀──── Spawned{request, pid, init} + fd │  or Refused
//!    │ ◀─────────────────── Ended{pid}        │  the VMM's end
//!    │ ◀─────────────────── Gone{pid, uid}    │  nothing of it runs any more
//! ```
//!
//! A zygote whose socket is closed ends, and its VMMs go on: the next daemon starts another. So
//! both ends are always of one build.

use serde::{Deserialize, Serialize};

/// The most bytes of one packet.
pub const PACKET_BYTES_MAX: usize = 4096;

/// The most descriptors of one packet.
pub const FDS_MAX: usize = 8;

/// Where a zygote finds its socket.
pub const SOCKET_FD: i32 = 3;

/// Where a zygote finds `/dev/kvm`, and each of its VMMs too.
pub const KVM_FD: i32 = 4;

/// What the node asks of a zygote.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ToZygote {
    /// Makes a VMM. Carries one descriptor for each of `fds`, in their order.
    Spawn {
        /// Any number; the answer has it again.
        request: u64,
        /// The VMM's uid and gid, as the host counts them. In the zygote's range, not its first,
        /// and nobody's until [`FromZygote::Gone`].
        uid: u32,
        /// What each descriptor is: one control socket, and at most one of each other.
        fds: Vec<FdRole>,
    },
}

/// What a descriptor is to a VMM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FdRole {
    /// A unix `SOCK_SEQPACKET` socket that listens: the one of [`crate::vmm`].
    Control,
    /// Where it says why it cannot go on. Nothing that can be full for ever: a bounded memfd.
    Output,
    /// The folder of a cgroup2 that it is born in. The zygote needs write permission to its
    /// `cgroup.procs` and to that of what both are in; without this one the node moves VMM and init
    /// by their pids, and does so before it launches a guest.
    Cgroup,
}

/// What a zygote says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum FromZygote {
    /// It is jailed, and waits. Its first message.
    Ready {
        /// [`crate::generation::GENERATION`] of the zygote.
        generation: u32,
    },
    /// A VMM is on its way into its jail. Carries its pidfd.
    Spawned {
        /// Of the one that asked.
        request: u64,
        /// The VMM's, as the host counts.
        pid: u32,
        /// The first process of its pid namespace: it does nothing, and all end with it.
        init: u32,
    },
    /// Nothing was made.
    Refused {
        /// Of the one that asked; `None` when that could not be read.
        request: Option<u64>,
        /// Each cause, outermost first.
        why: String,
    },
    /// A VMM has ended. Copies of it may be there still.
    Ended {
        /// Whose.
        pid: u32,
        /// How.
        by: ExitedBy,
    },
    /// Nothing of a VMM is there any more: its uid may be given away.
    Gone {
        /// Whose.
        pid: u32,
        /// As it was asked for.
        uid: u32,
    },
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "by", rename_all = "snake_case")]
pub enum ExitedBy {
    /// By itself.
    Code {
        /// One of `spore-vmm`'s table.
        code: u8,
    },
    /// By a signal. SIGSYS is a call that its filter forbids.
    Signal {
        /// Its number.
        signal: u8,
    },
}
