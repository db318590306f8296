//! virtio 1.x: what its devices have in common. The transport ([`mmio`]) speaks to the driver's
//! registers, a queue ([`queue`]) to its rings, and a device to neither.

#[cfg(test)]
mod driver;
pub mod mmio;
pub mod queue;
pub mod rng;

use std::fmt;

use self::queue::{Queue, QueueFault};
use crate::memory::GuestMemory;

/// The driver speaks virtio 1.0 or later. Always offered, and refused is a driver without it.
pub const F_VERSION_1: u64 = 1 << 32;

/// What a device is behind its transport.
pub trait VirtioDevice: Send + fmt::Debug {
    /// Its name, for reasons.
    fn name(&self) -> &'static str;

    /// Its number in the virtio specification.
    fn id(&self) -> u32;

    /// What it offers. [`F_VERSION_1`] is added by the transport.
    fn features(&self) -> u64;

    /// The most entries of each of its queues.
    fn queues(&self) -> &'static [u16];

    /// Answers a read of its configuration; beyond its end there are zeros.
    fn config(&self, offset: u64, data: &mut [u8]);

    /// The driver is ready: from now on queues are handled. `features` are what it took.
    fn activate(&mut self, features: u64);

    /// The driver begins anew, or is gone.
    fn reset(&mut self);

    /// Does what is in a queue, or as much of it as one turn may.
    fn handle(
        &mut self,
        index: u16,
        queues: &mut [Option<Queue>],
        memory: &GuestMemory,
    ) -> Result<Handled, QueueFault>;
}

/// What came of a turn.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[must_use]
pub struct Handled {
    /// Something was given back that the driver wants to be interrupted for.
    pub interrupt: bool,
    /// The turn was over before the queue was empty: another is due, kicked or not.
    pub more: bool,
}
