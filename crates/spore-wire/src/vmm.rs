//! Node and VMM: what a VMM is asked for, and what it tells.
//!
//! Spoken over a unix `SOCK_SEQPACKET` socket that the *VMM* listens on, in a folder that only root
//! can enter, so that a new daemon connects to the VMMs its predecessor left. One packet is one
//! JSON message of at most [`PACKET_BYTES_MAX`] bytes; some carry descriptors (SCM_RIGHTS), as said
//! beside them. A newer connection replaces the older one.
//!
//! ```text
//!   node                                     VMM
//!    │                                        │  waits, with nothing of any guest
//!    │ ◀──────────── Hello{generation, state} │  whoever connects is told first
//!    │ Park ───────────────────────────────▶  │  ahead of need, if at all
//!    │ ◀──────────── Done | Failed            │
//!    │ Launch + fds ───────────────────────▶  │
//!    │ ◀──────────── Done | Failed            │  the guest is there, paused
//!    │ Resume ─────────────────────────────▶  │
//!    │ ◀──────────── Done                     │
//!    │ Pause, Save + fd, Switch + fd,         │  a checkpoint
//!    │ Freeze + socket, Resume ────────────▶  │
//!    │ Copy + fd ──────────────────────────▶  │  what was frozen of its disk
//!    │ ◀──────────── Done …… Copied           │  begun; and whole, or not, later
//!    │ ◀──────────── Ended                    │  at any time, once: the guest's end
//!    │ Quit ───────────────────────────────▶  │  gone
//! ```
//!
//! Each request has one answer, in the order in which they were asked; [`FromVmm::Ended`] and
//! [`FromVmm::Copied`] may come between. A VMM whose guest has ended waits for [`ToVmm::Quit`], so
//! that its console can be read.
//!
//! A guest may have taken its VMM over. So what a VMM says is text for people and numbers that are
//! checked; nothing that it says gives it anything.

use serde::{Deserialize, Serialize};

use crate::launch::{Launch, Layer};

/// The most bytes of one packet.
pub const PACKET_BYTES_MAX: usize = 64 * 1024;

/// What the node asks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ToVmm {
    /// Makes a machine of this size, before it is known for which guest: a launch of the same size
    /// takes it, and one of another makes its own. From now on, until there is a guest, whoever
    /// asked must stay: a VMM that nobody is connected to ends. Legal once, without a guest.
    Park {
        /// Memory of the machine.
        memory_mib: u32,
        /// Its processors.
        vcpus: u8,
    },
    /// Makes the guest, paused. Legal once. Carries all that the blob names.
    Launch(Box<Launch>),
    /// Lets the guest run. Idempotent.
    Resume,
    /// Lets the guest stand still, with nothing under way on its disks. Idempotent.
    Pause {
        /// After this it goes on, and the answer says what did not stand still.
        limit_ms: u64,
    },
    /// Writes what the machine is but for its memory into the file that comes with it, from its
    /// beginning. Legal while paused.
    Save,
    /// Freezes the scratch disk's own layer and goes on with a new one over it, whose file comes
    /// with the packet and is the VMM's alone. Legal while paused.
    Switch {
        /// The new one.
        own: Layer,
    },
    /// Begins to copy the scratch disk into one layer, whose file comes with the packet, new. Done
    /// when it has begun; [`FromVmm::Copied`] comes when it is over. There is one copy at a time:
    /// this takes the place of an earlier one, of which nothing is told after the answer.
    Copy {
        /// The layer.
        to: Layer,
        /// What it is to be over.
        below: Below,
        /// Up to where the disk is copied.
        of: CopyOf,
    },
    /// Ends the copy that is under way, or forgets the one that is over; nothing is told of it
    /// after the answer. Legal with a guest, idempotent.
    CancelCopy,
    /// Makes a copy of the process that does nothing: the guest's memory stays in it as it is now,
    /// whatever the guest writes later, for whoever may read a process's memory. One end of a pair
    /// of connected sockets comes with the packet. The copy writes one byte to it when it has
    /// nothing else left, and ends when the other end is closed. Done when there is one. Legal
    /// while paused, and where the memory is not the file's own ([`crate::launch::MemoryOwner`]).
    Freeze {
        /// After this it ends by itself.
        limit_ms: u64,
    },
    /// Copies the console's last output into the file that comes with it.
    Console,
    /// Ends the guest if it has not ended, and the process.
    Quit,
}

/// What the VMM says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum FromVmm {
    /// To whoever connects, before anything else.
    Hello {
        /// [`crate::generation::GENERATION`] of the VMM.
        generation: u32,
        /// How far it is.
        state: VmmState,
        /// How far the copy of its scratch disk is.
        #[serde(default, skip_serializing_if = "CopyState::is_none")]
        copy: CopyState,
        /// Layers that its scratch disk was launched with, without its own.
        #[serde(default, skip_serializing_if = "is_zero")]
        layers: usize,
    },
    /// What was asked for is done.
    Done {
        /// How many bytes were written to the file that came with the request, if one did.
        #[serde(default)]
        bytes: u64,
    },
    /// It is not done, and everything is as it was before, unless the text says otherwise.
    Failed {
        /// Each cause, outermost first.
        why: String,
    },
    /// A copy is over, and told to everybody who connects until another begins or it is cancelled.
    Copied {
        /// `None`: it is whole, and where a loss of power leaves it. Otherwise what became of it,
        /// each cause, outermost first.
        why: Option<String>,
    },
    /// The guest has ended.
    Ended {
        /// For people.
        why: String,
        /// Whose doing it was.
        by: EndedBy,
    },
}

/// What is below a copy of a scratch disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Below {
    /// Nothing: it is the whole disk, base and layers, without what is zeros.
    Nothing,
    /// The base and the layers that the VM was launched with: it is what the VM has written since.
    Source,
}

/// Up to where a scratch disk is copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CopyOf {
    /// Without the own layer: as it was at the last [`ToVmm::Switch`], whatever the guest does.
    Frozen,
    /// With it. Legal while paused; a guest that is resumed before it is whole ends the copy.
    Paused,
}

/// How far the copy of a scratch disk is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CopyState {
    /// There is none.
    #[default]
    None,
    /// [`FromVmm::Copied`] comes later.
    UnderWay,
    /// [`FromVmm::Copied`] comes next, or after [`FromVmm::Ended`].
    Over,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde gives a reference")]
const fn is_zero(number: &usize) -> bool {
    *number == 0
}

impl CopyState {
    /// Whether there is none: what a greeting does not mention.
    #[must_use]
    pub const fn is_none(&self) -> bool {
        matches!(self, Self::None)
    }
}

/// How far a VMM is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VmmState {
    /// It has no guest yet.
    Parked,
    /// Its guest stands still.
    Paused,
    /// Its guest runs.
    Running,
    /// Its guest has ended.
    Ended,
}

/// Whose doing a guest's end was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EndedBy {
    /// The guest: it powered off or reset, or its processor gave up, by which kernels reset too.
    Guest,
    /// The guest did what none should: a malformed ring, an instruction that KVM cannot emulate.
    Fault,
    /// The host: KVM or the kernel refused.
    Host,
    /// It was asked for.
    Asked,
}
