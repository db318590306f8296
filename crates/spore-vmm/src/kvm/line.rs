//! An interrupt's line: a counter that KVM waits on, so that raising it is no ioctl.

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::KvmError;
use super::vm::Vm;
use crate::device::Interrupt;

/// A line of a VM's interrupt controller.
#[derive(Debug)]
pub struct Line {
    event: EventFd,
}

impl Line {
    /// The line of a number. The VM's interrupt controller is there before.
    pub fn new(vm: &Vm, gsi: u32) -> Result<Self, KvmError> {
        let event = event()?;
        vm.raise_by(&event, gsi)?;
        Ok(Self { event })
    }
}

impl Interrupt for Line {
    fn raise(&self) {
        // It can only be too full to count further, and then KVM has not seen what is in it.
        drop(self.event.write(1));
    }
}

/// A counter that nobody waits in.
pub fn event() -> Result<EventFd, KvmError> {
    EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).map_err(|source| KvmError::Ioctl {
        ioctl: "eventfd2",
        source,
    })
}
