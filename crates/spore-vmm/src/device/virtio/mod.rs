//! virtio 1.x: what its devices have in common. The transport ([`mmio`]) speaks to the driver's
//! registers, a queue ([`queue`]) to its rings, and a device to neither.
//!
//! ```text
//!   the guest kicks a queue        ──▶ handle(queue) ─┐
//!   a descriptor or the time comes ──▶ ready() ───────┴─▶ wants(): what to wait for now
//! ```
//!
//! A device never waits. What it cannot do now it leaves in its queue, and says what it waits for:
//! no request is in flight between two calls, so that a device can be saved between any two.

pub mod blk;
pub mod console;
#[cfg(test)]
mod driver;
pub mod mmio;
pub mod net;
pub mod queue;
pub mod rng;
#[cfg(test)]
mod tests;

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use self::queue::{Broken, Queues};
use super::Device;
use crate::fault::GuestFault;
use crate::snapshot::format::{FormatError, Sections, Writer};

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

    /// The driver is ready: from now on queues are handled. `features` are what it took. Called
    /// for a restored device too, which keeps what it was restored with.
    fn activate(&mut self, features: u64);

    /// The driver begins anew, or is gone.
    fn reset(&mut self);

    /// Does what is in a queue, or as much of it as one turn may. Nothing when it is not live.
    fn handle(&mut self, index: u16, queues: &mut Queues<'_>) -> Result<Handled, Broken>;

    /// Goes on with what it waited for. Called too often it does nothing.
    fn ready(&mut self, _queues: &mut Queues<'_>) -> Result<Handled, Broken> {
        Ok(Handled::default())
    }

    /// What it waits for now, besides its driver.
    fn wants(&self) -> Wants {
        Wants::default()
    }

    /// Makes everything last that was written through it.
    fn settle(&mut self) -> io::Result<()> {
        Ok(())
    }

    /// Writes what is saved of it, beside its transport, under its number. Called while the guest
    /// stands still, and changes nothing.
    fn save_into(&self, _into: &mut Writer, _number: u8) -> Result<(), FormatError> {
        Ok(())
    }

    /// The same device as the guest knew it, by what [`save_into`](Self::save_into) has written.
    fn restore_from(self, _from: &mut Sections<'_>, _number: u8) -> Result<Self, RestoreError>
    where
        Self: Sized,
    {
        Ok(self)
    }
}

/// Why a device is not the one that a guest was saved with.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// What was saved of it cannot be read.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// Its registers are not those of any driver.
    #[error(transparent)]
    Transport(#[from] mmio::BadState),
    /// It is another disk.
    #[error(transparent)]
    Blk(#[from] blk::BadState),
    /// It is another network device.
    #[error(transparent)]
    Net(#[from] net::BadState),
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

impl Handled {
    /// What came of two turns.
    pub const fn and(self, other: Self) -> Self {
        Self {
            interrupt: self.interrupt || other.interrupt,
            more: self.more || other.more,
        }
    }
}

/// What a device waits for. More than before only after [`Driven::handle`], [`Driven::ready`] or
/// [`Driven::resume`], so that whoever drives it asks after these.
#[derive(Clone, Debug, Default)]
pub struct Wants {
    /// A descriptor, and what of it, by level. Whoever watches it stops when it is not wanted any
    /// more: a descriptor that was hung up is ready for ever.
    pub descriptor: Option<(Arc<OwnedFd>, Interest)>,
    /// When to look at it again, by its clock.
    pub at: Option<Duration>,
}

/// What a descriptor is to be ready for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interest {
    /// Reading, or accepting.
    Read,
    /// Writing.
    Write,
    /// Either.
    Both,
}

/// A device behind its transport, for the loop that drives it.
pub trait Driven: Device {
    /// How many queues it has.
    fn queues(&self) -> u16;

    /// Handles a queue after a kick, and interrupts the driver if it wants that. `true` when
    /// another turn is due.
    fn handle(&self, index: u16) -> Result<bool, GuestFault>;

    /// Goes on with what it waited for. `true` when another turn is due.
    fn ready(&self) -> Result<bool, GuestFault>;

    /// What it waits for now.
    fn wants(&self) -> Wants;

    /// Looks at every queue once and interrupts the driver: whatever was on its way when it was
    /// saved, either way, is made up for. A driver bears it at any time. Says which queues are due
    /// another turn.
    fn resume(&self) -> Result<Vec<u16>, GuestFault>;

    /// Makes everything last that the guest has written through it. While the guest stands still.
    fn settle(&self) -> io::Result<()>;

    /// Writes what is saved of transport and device, under a number. While the guest stands still;
    /// changes nothing.
    fn save_into(&self, into: &mut Writer, number: u8) -> Result<(), FormatError>;
}

/// Answers a read of a configuration of so many bytes; beyond its end there are zeros.
fn config_bytes(config: &[u8], offset: u64, data: &mut [u8]) {
    data.fill(0);
    let there = usize::try_from(offset).ok().and_then(|at| config.get(at..));
    for (to, from) in data.iter_mut().zip(there.unwrap_or_default()) {
        *to = *from;
    }
}
