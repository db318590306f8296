//! Bells: counters in the kernel that KVM rings when the guest writes somewhere, and that ring an
//! interrupt in the guest when we do. Neither is an ioctl, and nobody waits in them.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{EventfdFlags, eventfd};
use rustix::io::retry_on_intr;

use super::KvmError;
use super::vm::Vm;
use crate::device::Interrupt;

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
    use super::Bell;

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
