//! Bells: counters in the kernel that KVM rings when the guest writes somewhere, and that ring an
//! interrupt in the guest when we do. Neither is an ioctl, and nobody waits in them.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::{EventfdFlags, eventfd};
use rustix::io::retry_on_intr;

use super::KvmError;
use super::vm::Vm;
use crate::device::Interrupt;
use crate::memory::Gpa;

/// A bell that KVM or a thread of ours hears.
#[derive(Debug)]
pub struct Bell {
    event: OwnedFd,
}

impl Bell {
    /// A bell that has not rung.
    pub fn new() -> Result<Self, KvmError> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let event = event.map_err(|source| KvmError::Ioctl {
            ioctl: "eventfd2",
            source: source.into(),
        })?;
        Ok(Self { event })
    }

    /// Rings it, once for all rings that are not heard yet.
    pub fn ring(&self) {
        // It can only be too full to count further, and then it rings.
        let _full = retry_on_intr(|| rustix::io::write(&self.event, &1_u64.to_ne_bytes()));
    }

    /// Hears it; says whether it has rung since it was heard last.
    pub fn hear(&self) -> bool {
        let mut count = [0; 8];
        retry_on_intr(|| rustix::io::read(&self.event, &mut count)).is_ok()
    }
}

impl AsFd for Bell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

/// The bell of a queue: rings when the guest writes the queue's number to a place.
///
/// KVM rings it once it is hung, and waits for that until no processor sees its bus as it was. So
/// one of a guest that is started at once is hung when the guest has rung it: until then, each ring
/// brings its processor out of the guest.
#[derive(Debug)]
pub struct Doorbell {
    bell: Bell,
    at: Gpa,
    queue: u16,
    is_hung: AtomicBool,
    is_wanted: AtomicBool,
    /// Rung when it is wanted.
    asks: Option<Arc<Bell>>,
}

impl Doorbell {
    /// One that is not hung.
    pub fn new(at: Gpa, queue: u16, asks: Option<Arc<Bell>>) -> Result<Self, KvmError> {
        Ok(Self {
            bell: Bell::new()?,
            at,
            queue,
            is_hung: AtomicBool::new(false),
            is_wanted: AtomicBool::new(false),
            asks,
        })
    }

    /// Lets KVM ring it from now on. Once.
    pub fn hang(&self, vm: &Vm) -> Result<(), KvmError> {
        vm.tell_write_by(&self.bell, self.at, u32::from(self.queue))?;
        self.is_hung.store(true, Ordering::SeqCst);
        Ok(())
    }

    /// Rings it for a write that KVM did not take.
    pub fn ring(&self) {
        self.bell.ring();
        let is_hung = self.is_hung.load(Ordering::SeqCst);
        if let Some(asks) = &self.asks
            && !is_hung
            && !self.is_wanted.swap(true, Ordering::SeqCst)
        {
            asks.ring();
        }
    }

    /// Whether it should be hung, and is not.
    pub fn is_wanted(&self) -> bool {
        self.is_wanted.load(Ordering::SeqCst) && !self.is_hung.load(Ordering::SeqCst)
    }

    /// Hears it; says whether it has rung since it was heard last.
    pub fn hear(&self) -> bool {
        self.bell.hear()
    }
}

impl AsFd for Doorbell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }
}

/// A line of a VM's interrupt controller.
#[derive(Debug)]
pub struct Line {
    bell: Bell,
}

impl Line {
    /// The line of a number. The VM's interrupt controller is there before.
    pub fn new(vm: &Vm, gsi: u32) -> Result<Self, KvmError> {
        let bell = Bell::new()?;
        vm.raise_by(&bell, gsi)?;
        Ok(Self { bell })
    }
}

impl Interrupt for Line {
    fn raise(&self) {
        self.bell.ring();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::{Bell, Doorbell};
    use crate::memory::Gpa;

    #[test]
    fn a_doorbell_asks_once_to_be_hung() {
        let asks = Arc::new(Bell::new().unwrap());
        let bell = Doorbell::new(Gpa(0xd000_0050), 0, Some(Arc::clone(&asks))).unwrap();
        assert!(!bell.is_wanted());
        for first in [true, false] {
            bell.ring();
            assert!(bell.hear());
            assert!(bell.is_wanted());
            assert_eq!(asks.hear(), first);
        }
        let nobody = Doorbell::new(Gpa(0xd000_0050), 0, None).unwrap();
        nobody.ring();
        assert!(nobody.hear() && !nobody.is_wanted());
    }

    #[test]
    fn rings_are_heard_once_and_never_waited_for() {
        let bell = Bell::new().unwrap();
        assert!(!bell.hear());
        bell.ring();
        bell.ring();
        assert!(bell.hear());
        assert!(!bell.hear());
    }
}
