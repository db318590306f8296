//! Whose fault it is: what a guest did that no driver does, which ends that guest and nothing else.

use crate::device::virtio::queue::QueueFault;

/// What a driver in the guest did, and in which of its queues.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the driver of {device} broke queue {queue}")]
pub struct GuestFault {
    /// The device whose driver it was.
    pub device: &'static str,
    /// Which of its queues.
    pub queue: u16,
    /// What it did.
    #[source]
    pub what: QueueFault,
}
