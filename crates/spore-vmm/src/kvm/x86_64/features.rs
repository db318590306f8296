//! Whether a guest that was shown one processor can go on on another: pure tables.
//!
//! A guest chooses once, at its start, what of its processor it uses. So each bit that says what
//! the processor can do must be true here too. Numbers that only describe (caches, model, places of
//! registers) are the guest's as it was shown them, whatever is here.

use kvm_bindings::kvm_cpuid_entry2;

/// What a guest was shown and this host's KVM cannot give.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Lacking {
    /// A processor of another vendor.
    #[error("the guest was saved on a processor of another vendor")]
    Vendor,
    /// Features.
    #[error(
        "this host lacks what the guest's processor had: bits {bits:#x} of {register} in CPUID \
         leaf {function:#x}, subleaf {index}"
    )]
    Features {
        /// The leaf.
        function: u32,
        /// Its subleaf.
        index: u32,
        /// Which register of it.
        register: Register,
        /// What is missing.
        bits: u32,
    },
    /// Physical addresses that this host has not.
    #[error(
        "the guest's processor had physical addresses of {shown} bits and this host's has {here}"
    )]
    Addresses {
        /// What it was shown.
        shown: u32,
        /// What is here.
        here: u32,
    },
}

/// A register of a leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Register {
    /// The first.
    Eax,
    /// The second.
    Ebx,
    /// The third.
    Ecx,
    /// The fourth.
    Edx,
}

impl std::fmt::Display for Register {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Eax => "eax",
            Self::Ebx => "ebx",
            Self::Ecx => "ecx",
            Self::Edx => "edx",
        })
    }
}

impl Register {
    const fn of(self, leaf: &kvm_cpuid_entry2) -> u32 {
        match self {
            Self::Eax => leaf.eax,
            Self::Ebx => leaf.ebx,
            Self::Ecx => leaf.ecx,
            Self::Edx => leaf.edx,
        }
    }
}

/// Where bits say what a processor can do, and which of them KVM sets by what the guest does and
/// not by what there is: OSXSAVE and OSPKE, and that the APIC is enabled.
const FEATURES: [(u32, u32, Register, u32); 22] = [
    (0x1, 0, Register::Ecx, 1 << 27),
    (0x1, 0, Register::Edx, 1 << 9),
    (0x6, 0, Register::Eax, 0),
    (0x7, 0, Register::Ebx, 0),
    (0x7, 0, Register::Ecx, 1 << 4),
    (0x7, 0, Register::Edx, 0),
    (0x7, 1, Register::Eax, 0),
    (0x7, 1, Register::Ebx, 0),
    (0x7, 1, Register::Edx, 0),
    (0x7, 2, Register::Edx, 0),
    // Components of the extended state.
    (0xd, 0, Register::Eax, 0),
    (0xd, 0, Register::Edx, 0),
    (0xd, 1, Register::Eax, 0),
    (0xd, 1, Register::Ecx, 0),
    (0xd, 1, Register::Edx, 0),
    // KVM's own.
    (0x4000_0001, 0, Register::Eax, 0),
    (0x8000_0001, 0, Register::Ecx, 0),
    (0x8000_0001, 0, Register::Edx, 0),
    (0x8000_0007, 0, Register::Ebx, 0),
    (0x8000_0007, 0, Register::Edx, 0),
    (0x8000_0008, 0, Register::Ebx, 0),
    (0x8000_0021, 0, Register::Eax, 0),
];

const VENDOR: u32 = 0;
const ADDRESSES: u32 = 0x8000_0008;

/// Looks for what a guest was shown and a new guest here would not be.
pub fn check(shown: &[kvm_cpuid_entry2], here: &[kvm_cpuid_entry2]) -> Result<(), Lacking> {
    let vendor = |leaves| find(leaves, VENDOR, 0).map(|leaf| [leaf.ebx, leaf.ecx, leaf.edx]);
    if vendor(shown) != vendor(here) {
        return Err(Lacking::Vendor);
    }
    for (function, index, register, changing) in FEATURES {
        let of = |leaves| find(leaves, function, index).map_or(0, |leaf| register.of(leaf));
        let bits = of(shown) & !of(here) & !changing;
        if bits != 0 {
            return Err(Lacking::Features {
                function,
                index,
                register,
                bits,
            });
        }
    }
    let addresses = |leaves| find(leaves, ADDRESSES, 0).map_or(0, |leaf| leaf.eax & 0xff);
    let (shown, here) = (addresses(shown), addresses(here));
    if shown > here {
        return Err(Lacking::Addresses { shown, here });
    }
    Ok(())
}

fn find(leaves: &[kvm_cpuid_entry2], function: u32, index: u32) -> Option<&kvm_cpuid_entry2> {
    let is = |leaf: &&kvm_cpuid_entry2| (leaf.function, leaf.index) == (function, index);
    leaves.iter().find(is)
}

#[cfg(test)]
mod tests {
    use kvm_bindings::kvm_cpuid_entry2;
    use proptest::prelude::*;

    use super::{FEATURES, Lacking, Register, check};

    fn leaf(function: u32, index: u32, registers: [u32; 4]) -> kvm_cpuid_entry2 {
        let [eax, ebx, ecx, edx] = registers;
        kvm_cpuid_entry2 {
            function,
            index,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        }
    }

    #[test]
    fn what_is_missing_here_is_named() {
        let shown = [leaf(0, 0, [9, 1, 2, 3]), leaf(7, 0, [0, 0x20, 0, 0])];
        assert_eq!(check(&shown, &shown), Ok(()));
        let error = check(&shown, &shown[..1]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "this host lacks what the guest's processor had: bits 0x20 of ebx in CPUID leaf 0x7, \
             subleaf 0"
        );
        let other = [leaf(0, 0, [9, 1, 2, 4]), shown[1]];
        assert_eq!(check(&shown, &other), Err(Lacking::Vendor));
        let more = [leaf(0, 0, [5, 1, 2, 3]), leaf(7, 0, [1, u32::MAX, 1, 1])];
        assert_eq!(check(&shown, &more), Ok(()), "what is more does not matter");
        let wide = |bits| [leaf(0x8000_0008, 0, [bits, 0, 0, 0])];
        assert_eq!(check(&wide(0x3028), &wide(0x302e)), Ok(()));
        let narrow = check(&wide(0x302e), &wide(0x3028));
        let (shown, here) = (46, 40);
        assert_eq!(narrow, Err(Lacking::Addresses { shown, here }));
    }

    #[test]
    fn what_changes_while_a_guest_runs_is_not_compared() {
        let all = [
            leaf(1, 0, [0, 0, 1 << 27, 1 << 9]),
            leaf(7, 0, [0, 0, 1 << 4, 0]),
        ];
        assert_eq!(check(&all, &[]), Ok(()));
    }

    #[test]
    fn what_only_describes_is_not_compared() {
        let shown = [
            leaf(1, 0, [0x806f8, 0x0102_0800, 0, 0]),
            leaf(4, 0, [u32::MAX; 4]),
            leaf(0xb, 0, [1, 2, 3, 4]),
            leaf(0x8000_0002, 0, [5, 6, 7, 8]),
        ];
        assert_eq!(check(&shown, &[]), Ok(()));
    }

    proptest! {
        #[test]
        fn every_bit_that_is_missing_is_found(
            which in 0..FEATURES.len(),
            shown in any::<u32>(),
            here in any::<u32>(),
        ) {
            let (function, index, register, changing) = FEATURES[which];
            let only = |value| {
                let mut registers = [0; 4];
                registers[register as usize] = value;
                [leaf(function, index, registers)]
            };
            let found = check(&only(shown), &only(here));
            let bits = shown & !here & !changing;
            let expected = Lacking::Features { function, index, register, bits };
            prop_assert_eq!(found, if bits == 0 { Ok(()) } else { Err(expected) });
            prop_assert_eq!(Register::Eax as usize, 0);
        }
    }
}
