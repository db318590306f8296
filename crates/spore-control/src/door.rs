//! What control needs of the gateway, and what it hears from it.
//!
//! The composition root owns the socket: it greets, queues what [`Door::send`] gives it while no
//! gateway is connected (or drops it: after every [`FromGateway::Hello`] control tells everything
//! again), answers [`FromGateway::Connect`] itself from the node, and hands every other message to
//! [`crate::Control::door_event`], in order.

use spore_wire::gateway::ToGateway;

#[cfg(doc)]
use spore_wire::gateway::FromGateway;

/// Towards the gateway. Never blocks.
pub trait Door: Send + Sync + 'static {
    /// Sends one message, in the order of the calls.
    fn send(&self, message: ToGateway);
}
