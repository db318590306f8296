//! How processors and a VM are written into a saved machine: as the structures of the kernel's
//! interface (<linux/kvm.h>, <asm/kvm.h>), which are the same for every kernel of x86-64, one after
//! the other; a list has its length before it.
//!
//! | processor | bytes |
//! |---|---|
//! | CPUID: count, entries | 4, 40 each |
//! | TSC: what it read, its offset | 8, 8 |
//! | whether it runs | 4 |
//! | general registers | 144 |
//! | segments and control registers | 312 |
//! | enabled extended state, extended state | 392, 4096 |
//! | debug registers | 128 |
//! | local APIC | 1024 |
//! | MSRs: count, entries | 4, 16 each |
//! | events | 64 |
//!
//! | VM | bytes |
//! |---|---|
//! | the interrupt controller's three chips | 520 each |
//! | the clock | 48 |
//!
//! Whether a state is one that a processor can be in is for KVM to say, which takes all of it from
//! programs that it does not trust.

use kvm_bindings::{
    KVM_MAX_CPUID_ENTRIES, KVM_MAX_MSR_ENTRIES, kvm_clock_data, kvm_cpuid_entry2, kvm_debugregs,
    kvm_irqchip, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::state::{VcpuState, VmState};
use crate::snapshot::Saved;
use crate::snapshot::format::{Fields, FormatError};

/// A structure of the kernel's interface, with the size that it has in every saved machine.
trait Abi: IntoBytes + FromBytes + Immutable + Sized {
    const BYTES: usize;

    fn put(&self, into: &mut Vec<u8>) {
        into.extend(self.as_bytes());
    }

    fn get(from: &mut Fields<'_>) -> Result<Self, FormatError> {
        let bytes = from.take(Self::BYTES)?;
        let mut value = Self::new_zeroed();
        value.as_mut_bytes().copy_from_slice(bytes);
        Ok(value)
    }
}

/// Pins sizes, here and when the bindings change.
macro_rules! abi {
    ($($type:ty: $bytes:literal;)*) => {
        $(
            impl Abi for $type {
                const BYTES: usize = $bytes;
            }
            const _: () = assert!(size_of::<$type>() == $bytes);
        )*
    };
}

abi! {
    kvm_clock_data: 48;
    kvm_cpuid_entry2: 40;
    kvm_debugregs: 128;
    kvm_irqchip: 520;
    kvm_lapic_state: 1024;
    kvm_mp_state: 4;
    kvm_msr_entry: 16;
    kvm_regs: 144;
    kvm_sregs: 312;
    kvm_vcpu_events: 64;
    kvm_xcrs: 392;
    kvm_xsave: 4096;
}

fn put_all<T: Abi>(list: &[T], into: &mut Vec<u8>) {
    let count = u32::try_from(list.len()).unwrap_or(u32::MAX);
    into.extend(count.to_le_bytes());
    for entry in list {
        entry.put(into);
    }
}

fn get_all<T: Abi>(
    from: &mut Fields<'_>,
    what: &'static str,
    most: usize,
) -> Result<Vec<T>, FormatError> {
    let count = from.count(what, u32::try_from(most).unwrap_or(u32::MAX))?;
    (0..count).map(|_| T::get(from)).collect()
}

impl Saved for VcpuState {
    const VERSION: u16 = 1;

    fn put(&self, into: &mut Vec<u8>) {
        put_all(&self.cpuid, into);
        into.extend(self.tsc.to_le_bytes());
        into.extend(self.tsc_offset.to_le_bytes());
        self.mp_state.put(into);
        self.regs.put(into);
        self.sregs.put(into);
        self.xcrs.put(into);
        self.xsave.put(into);
        self.debugregs.put(into);
        self.lapic.put(into);
        put_all(&self.msrs, into);
        self.events.put(into);
    }

    fn get(from: &mut Fields<'_>) -> Result<Self, FormatError> {
        Ok(Self {
            cpuid: get_all(from, "leaves of CPUID", KVM_MAX_CPUID_ENTRIES)?,
            tsc: from.u64()?,
            tsc_offset: from.u64()?,
            mp_state: Abi::get(from)?,
            regs: Abi::get(from)?,
            sregs: Abi::get(from)?,
            xcrs: Abi::get(from)?,
            xsave: Abi::get(from)?,
            debugregs: Abi::get(from)?,
            lapic: Abi::get(from)?,
            msrs: get_all(from, "MSRs", KVM_MAX_MSR_ENTRIES)?,
            events: Abi::get(from)?,
        })
    }
}

impl Saved for VmState {
    const VERSION: u16 = 1;

    fn put(&self, into: &mut Vec<u8>) {
        for chip in &self.chips {
            chip.put(into);
        }
        self.clock.put(into);
    }

    fn get(from: &mut Fields<'_>) -> Result<Self, FormatError> {
        Ok(Self {
            chips: [Abi::get(from)?, Abi::get(from)?, Abi::get(from)?],
            clock: Abi::get(from)?,
        })
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use kvm_bindings::{kvm_cpuid_entry2, kvm_msr_entry};
    use proptest::prelude::*;
    use zerocopy::{FromBytes, FromZeros, IntoBytes};

    use super::{Abi, KVM_MAX_CPUID_ENTRIES, KVM_MAX_MSR_ENTRIES};
    use crate::kvm::x86_64::state::{VcpuState, VmState};
    use crate::snapshot::Saved;
    use crate::snapshot::format::{Fields, FormatError};

    /// A structure all of whose bytes are this.
    fn filled<T: FromBytes + IntoBytes>(with: u8) -> T {
        let mut value = T::new_zeroed();
        value.as_mut_bytes().fill(with);
        value
    }

    fn vcpu() -> VcpuState {
        VcpuState {
            cpuid: vec![filled(1), filled(2)],
            tsc: 0x1716_1514_1312_1110,
            tsc_offset: 0x2726_2524_2322_2120,
            mp_state: filled(3),
            regs: filled(4),
            sregs: filled(5),
            xcrs: filled(6),
            xsave: filled(7),
            debugregs: filled(8),
            lapic: filled(9),
            msrs: vec![filled(10), filled(11), filled(12)],
            events: filled(13),
        }
    }

    fn vm() -> VmState {
        VmState {
            chips: [filled(1), filled(2), filled(3)],
            clock: filled(4),
        }
    }

    /// A processor that no KVM has made, for those who save one without.
    pub(crate) fn blank() -> VcpuState {
        VcpuState {
            cpuid: Vec::new(),
            tsc: 0,
            tsc_offset: 0,
            mp_state: FromZeros::new_zeroed(),
            regs: FromZeros::new_zeroed(),
            sregs: FromZeros::new_zeroed(),
            xcrs: FromZeros::new_zeroed(),
            xsave: FromZeros::new_zeroed(),
            debugregs: FromZeros::new_zeroed(),
            lapic: FromZeros::new_zeroed(),
            msrs: Vec::new(),
            events: FromZeros::new_zeroed(),
        }
    }

    /// A VM likewise.
    pub(crate) fn blank_vm() -> VmState {
        VmState {
            chips: [(); 3].map(|()| FromZeros::new_zeroed()),
            clock: FromZeros::new_zeroed(),
        }
    }

    fn bytes(state: &impl Saved) -> Vec<u8> {
        let mut bytes = Vec::new();
        state.put(&mut bytes);
        bytes
    }

    /// The bytes of every release, read and written again; none of them can be left out.
    fn is_pinned<S: Saved>(state: &S, parts: &[(&[u8], usize)]) {
        assert_eq!(S::VERSION, 1);
        let expected: Vec<u8> = parts.iter().flat_map(|(part, n)| part.repeat(*n)).collect();
        assert_eq!(bytes(state), expected);
        let mut fields = Fields::new(&expected);
        let again = S::get(&mut fields).unwrap();
        fields.finish().unwrap();
        assert_eq!(bytes(&again), expected);
        for end in 0..expected.len() {
            let short = S::get(&mut Fields::new(&expected[..end]));
            assert!(matches!(short, Err(FormatError::Short { .. })), "{end}");
        }
    }

    #[test]
    fn a_processor_is_written_as_in_every_release() {
        let tsc: Vec<u8> = (0x10..0x18).chain(0x20..0x28).collect();
        let parts: [(&[u8], usize); 16] = [
            (&[2, 0, 0, 0], 1),
            (&[1], 40),
            (&[2], 40),
            (&tsc, 1),
            (&[3], 4),
            (&[4], 144),
            (&[5], 312),
            (&[6], 392),
            (&[7], 4096),
            (&[8], 128),
            (&[9], 1024),
            (&[3, 0, 0, 0], 1),
            (&[10], 16),
            (&[11], 16),
            (&[12], 16),
            (&[13], 64),
        ];
        is_pinned(&vcpu(), &parts);
    }

    #[test]
    fn a_vm_is_written_as_in_every_release() {
        let parts: [(&[u8], usize); 4] = [(&[1], 520), (&[2], 520), (&[3], 520), (&[4], 48)];
        is_pinned(&vm(), &parts);
    }

    /// Where a few things are that a guest would miss.
    #[test]
    fn fields_are_where_the_kernel_has_them() {
        let mut state = blank();
        state.regs.rip = 0x1122_3344_5566_7788;
        state.sregs.apic_base = 0x99aa;
        state.events.nmi.masked = 1;
        state.msrs = vec![kvm_msr_entry {
            index: 0xc000_0081,
            data: 0x0102_0304_0506_0708,
            ..Default::default()
        }];
        let mut leaf = kvm_cpuid_entry2 {
            function: 7,
            edx: 5,
            ..Default::default()
        };
        leaf.index = 1;
        assert_eq!(leaf.as_bytes()[..8], [7, 0, 0, 0, 1, 0, 0, 0]);
        assert_eq!(leaf.as_bytes()[24..28], [5, 0, 0, 0]);
        let bytes = bytes(&state);
        let after_tsc = 4 + 16 + 4;
        assert_eq!(
            bytes[after_tsc + 128..][..8],
            0x1122_3344_5566_7788_u64.to_le_bytes()
        );
        let sregs = after_tsc + 144;
        assert_eq!(bytes[sregs + 272..][..8], 0x99aa_u64.to_le_bytes());
        let msrs = bytes.len() - 64 - 16;
        assert_eq!(bytes[msrs..][..4], 0xc000_0081_u32.to_le_bytes());
        assert_eq!(bytes[msrs + 8..][..8], [8, 7, 6, 5, 4, 3, 2, 1]);
        assert_eq!(bytes[bytes.len() - 64 + 14], 1);
    }

    #[test]
    fn lists_that_no_kernel_has_are_refused_before_they_are_read() {
        let mut state = bytes(&vcpu());
        let most = u32::try_from(KVM_MAX_CPUID_ENTRIES).unwrap();
        state[..4].copy_from_slice(&(most + 1).to_le_bytes());
        let error = VcpuState::get(&mut Fields::new(&state)).unwrap_err();
        assert!(error.to_string().contains("257 leaves of CPUID"), "{error}");
        let mut many = vcpu();
        many.msrs = vec![filled(0); KVM_MAX_MSR_ENTRIES];
        let mut state = bytes(&many);
        assert!(VcpuState::get(&mut Fields::new(&state)).is_ok());
        let at = state.len() - 64 - KVM_MAX_MSR_ENTRIES * 16 - 4;
        state[at..at + 4].copy_from_slice(&u32::MAX.to_le_bytes());
        let error = VcpuState::get(&mut Fields::new(&state)).unwrap_err();
        assert!(error.to_string().contains("MSRs"), "{error}");
    }

    proptest! {
        #[test]
        fn no_bytes_are_more_than_an_error(
            bytes in prop::collection::vec(any::<u8>(), 0..8000),
            counted in any::<bool>(),
        ) {
            let mut bytes = bytes;
            if counted && bytes.len() >= 4 {
                bytes[..4].copy_from_slice(&3_u32.to_le_bytes());
            }
            let mut fields = Fields::new(&bytes);
            if let Ok(state) = VcpuState::get(&mut fields) {
                let mut again = Vec::new();
                state.put(&mut again);
                prop_assert_eq!(&again, &bytes[..again.len()]);
            }
            prop_assert_eq!(
                VmState::get(&mut Fields::new(&bytes)).is_ok(),
                bytes.len() >= 3 * kvm_bindings::kvm_irqchip::BYTES + 48
            );
        }
    }
}
