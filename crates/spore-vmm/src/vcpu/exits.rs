//! KVM's exits as the run loop takes them.

use kvm_bindings::{KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN};
use kvm_ioctls::VcpuExit;

use super::{Exit, Processor};
use crate::end::End;
use crate::kvm::KvmError;
use crate::kvm::vm::Vcpu;

/// A processor that KVM runs.
#[derive(Debug)]
pub struct Core {
    number: u8,
    vcpu: Vcpu,
}

impl Core {
    /// The processor of a number.
    #[must_use]
    pub const fn new(number: u8, vcpu: Vcpu) -> Self {
        Self { number, vcpu }
    }

    /// KVM's side of it.
    #[must_use]
    pub const fn vcpu(&self) -> &Vcpu {
        &self.vcpu
    }
}

impl Processor for Core {
    fn number(&self) -> u8 {
        self.number
    }

    fn run(&mut self) -> Exit<'_> {
        let vcpu = self.number;
        match self.vcpu.run() {
            Ok(exit) => exit_of(vcpu, exit),
            Err(error) if is_interrupted(&error) => Exit::Interrupted,
            Err(source) => Exit::Ended(End::Kvm { vcpu, source }),
        }
    }

    fn stay_out(&mut self) {
        self.vcpu.set_immediate_exit(true);
    }

    fn internal_error(&mut self) -> u32 {
        self.vcpu.internal_error()
    }
}

/// A signal came; or the processor was not started yet and something woke it.
fn is_interrupted(error: &KvmError) -> bool {
    use std::io::ErrorKind::{Interrupted, WouldBlock};
    let KvmError::Ioctl { source, .. } = error else {
        return false;
    };
    matches!(source.kind(), Interrupted | WouldBlock)
}

fn exit_of(vcpu: u8, exit: VcpuExit<'_>) -> Exit<'_> {
    match exit {
        VcpuExit::IoIn(port, data) => Exit::PortRead(port, data),
        VcpuExit::IoOut(port, data) => Exit::PortWrite(port, data),
        VcpuExit::MmioRead(address, data) => Exit::Read(address, data),
        VcpuExit::MmioWrite(address, data) => Exit::Write(address, data),
        VcpuExit::Intr => Exit::Interrupted,
        VcpuExit::InternalError => Exit::Internal,
        VcpuExit::Shutdown => Exit::Ended(End::TripleFault { vcpu }),
        VcpuExit::FailEntry(reason, _cpu) => Exit::Ended(End::Refused { vcpu, reason }),
        VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, _) => Exit::Ended(End::PowerOff),
        VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _) => Exit::Ended(End::Reset),
        other => Exit::Ended(End::Unexpected {
            vcpu,
            exit: format!("{other:?}"),
        }),
    }
}

#[cfg(test)]
mod tests {
    use kvm_ioctls::VcpuExit;

    use super::{exit_of, is_interrupted};
    use crate::end::End;
    use crate::kvm::KvmError;
    use crate::vcpu::Exit;

    fn end(exit: VcpuExit<'_>) -> String {
        match exit_of(3, exit) {
            Exit::Ended(end) => end.to_string(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn accesses_are_passed_on_as_they_are() {
        let mut data = [1, 2];
        let exit = exit_of(0, VcpuExit::IoIn(0x3f8, &mut data));
        assert!(matches!(exit, Exit::PortRead(0x3f8, [1, 2])));
        let exit = exit_of(0, VcpuExit::IoOut(0x64, &[0xfe]));
        assert!(matches!(exit, Exit::PortWrite(0x64, [0xfe])));
        let exit = exit_of(0, VcpuExit::MmioRead(u64::MAX, &mut data));
        assert!(matches!(exit, Exit::Read(u64::MAX, [1, 2])));
        let exit = exit_of(0, VcpuExit::MmioWrite(8, &[3]));
        assert!(matches!(exit, Exit::Write(8, [3])));
        assert!(matches!(exit_of(0, VcpuExit::Intr), Exit::Interrupted));
        assert!(matches!(
            exit_of(0, VcpuExit::InternalError),
            Exit::Internal
        ));
    }

    #[test]
    fn each_end_says_which_processor_and_why() {
        let said = end(VcpuExit::Shutdown);
        assert_eq!(said, "processor 3 of the guest shut down (triple fault)");
        let said = end(VcpuExit::FailEntry(0x8000_0021, 0));
        assert!(
            said.ends_with("processor 3 of the guest: reason 0x80000021"),
            "{said}"
        );
        // With the controller in KVM, a guest that halts is waited for in there.
        let said = end(VcpuExit::Hlt);
        assert!(said.contains("processor 3 with Hlt"), "{said}");
        assert!(end(VcpuExit::Unsupported(99)).contains("99"));
        let event = |kind| match exit_of(0, VcpuExit::SystemEvent(kind, &[])) {
            Exit::Ended(end) => end,
            other => panic!("{other:?}"),
        };
        assert!(matches!(event(1), End::PowerOff));
        assert!(matches!(event(2), End::Reset));
        assert!(matches!(event(3), End::Unexpected { .. }));
    }

    #[test]
    fn only_a_signal_and_an_idle_processor_are_no_errors() {
        let of = |errno: rustix::io::Errno| KvmError::Ioctl {
            ioctl: "KVM_RUN",
            source: errno.into(),
        };
        assert!(is_interrupted(&of(rustix::io::Errno::INTR)));
        assert!(is_interrupted(&of(rustix::io::Errno::AGAIN)));
        assert!(!is_interrupted(&of(rustix::io::Errno::FAULT)));
    }
}
