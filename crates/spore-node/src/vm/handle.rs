//! What an actor is given, what may be asked of it, and the ways into its VM.
//!
//! Held by the node; the actor (`vm/actor.rs`) is behind it. Decides nothing.

use std::sync::Arc;

use spore_wire::guest::{AgentHello, AppSecrets};
use spore_wire::node::StopMode;
use tokio::sync::{mpsc, watch};

use super::capture::Taking;
use super::guest::AgentLink;
use crate::hypervisor::Vm;
use crate::journal::Record;
use crate::snapshot::key::Keys;
use crate::snapshot::memory::Pin;

/// What a VM begins with that its journal does not hold.
#[derive(Debug, Default)]
pub(crate) struct Given {
    /// `None` where they are not known yet.
    pub(crate) secrets: Option<AppSecrets>,
    /// Of what it is forked from.
    pub(crate) keys: Keys,
    /// The memory that it shares with others.
    pub(crate) pin: Option<Pin>,
}

/// What others ask of an actor.
#[derive(Debug)]
pub(crate) enum VmRequest {
    /// Stop it.
    Stop(StopMode),
    /// The app's secrets, again: an adopted VM's actor does not know them.
    Secrets(Arc<AppSecrets>),
    /// Capture it.
    Capture(Box<Taking>),
}

/// The ways into a VM that runs.
#[derive(Clone)]
pub(crate) struct Access {
    pub(crate) vm: Arc<dyn Vm>,
    pub(crate) link: AgentLink,
    /// Where its app listens, where it has one.
    pub(crate) port: Option<u16>,
    /// What it is.
    pub(crate) record: Arc<Record>,
    /// What the agent last said of itself.
    pub(crate) hello: watch::Receiver<Option<AgentHello>>,
    /// Whether the tenant's processes stand still for a moment.
    pub(crate) still: watch::Receiver<bool>,
}

impl core::fmt::Debug for Access {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Access").finish_non_exhaustive()
    }
}

/// How an adoption came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Adopted {
    /// It is not decided yet.
    Unknown,
    /// The VM lives and is ours.
    Alive,
    /// What was left of it is being removed, or is.
    Released,
}

/// How others reach an actor.
#[derive(Clone, Debug)]
pub(crate) struct ActorHandle {
    pub(crate) requests: mpsc::Sender<VmRequest>,
    pub(crate) access: watch::Receiver<Option<Access>>,
    pub(crate) adopted: watch::Receiver<Adopted>,
}
