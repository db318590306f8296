//! The processor that guests are shown: what KVM can give on this host, without what a guest must
//! not have, and with the machine's own topology.
//!
//! | left out | why |
//! |---|---|
//! | VMX, SVM, SGX, SEV, PT | a guest runs neither guests nor enclaves |
//! | performance counters | they run on the host's processor and are saved by nobody |
//! | MONITOR | a guest that waits gives its processor back |
//! | AMX and XFD | the rest of the extended state fits into 4 KiB |
//! | MPX | no kernel uses it any more |
//! | invariant TSC | with it a guest takes the TSC for its clock, also after a fork |
//! | some of KVM's own | see below |
//!
//! KVM's asynchronous page faults, stolen time, unhalting and remote flushes are each memory that a
//! host shares with one guest; a fork would share it with two.

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// Bits of leaf 1.
const ECX_MONITOR: u32 = 1 << 3;
const ECX_VMX: u32 = 1 << 5;
const ECX_SMX: u32 = 1 << 6;
const ECX_PDCM: u32 = 1 << 15;
const ECX_TSC_DEADLINE: u32 = 1 << 24;
const ECX_HYPERVISOR: u32 = 1 << 31;
const EDX_HTT: u32 = 1 << 28;

/// Bits of leaf 6: the APIC's timer always runs, which is all that is true of a guest.
const EAX_ARAT: u32 = 1 << 2;

/// Bits of leaf 7.
const EBX_SGX: u32 = 1 << 2;
const EBX_MPX: u32 = 1 << 14;
const EBX_INTEL_PT: u32 = 1 << 25;
const ECX_SGX_LC: u32 = 1 << 30;
const EDX_AMX: u32 = 1 << 22 | 1 << 24 | 1 << 25;
/// And of its first subleaf.
const EAX_AMX_FP16: u32 = 1 << 21;

/// Components of the extended state: two of MPX, two of AMX.
const MPX_COMPONENTS: u32 = 1 << 3 | 1 << 4;
const AMX_COMPONENTS: u32 = 1 << 17 | 1 << 18;
/// Of leaf 0xd, subleaf 1.
const EAX_XFD: u32 = 1 << 4;

/// Bits of leaf 0x8000_0001.
const ECX_SVM: u32 = 1 << 2;
const ECX_IBS: u32 = 1 << 10;
const ECX_SKINIT: u32 = 1 << 12;
const ECX_PERFCTR: u32 = 1 << 23 | 1 << 24 | 1 << 28;

/// Of leaf 0x8000_0007.
const EDX_INVARIANT_TSC: u32 = 1 << 8;

/// What of KVM's own leaf is left: its clock, old and new and stable, no delay after port accesses,
/// and interrupts that end without an exit.
const KVM_FEATURES: u32 = 1 << 0 | 1 << 1 | 1 << 3 | 1 << 6 | 1 << 24;

/// Kinds of levels in leaf 0xb.
const LEVEL_THREAD: u32 = 1;
const LEVEL_CORE: u32 = 2;

/// Leaves that are shown empty.
const EMPTY: [u32; 8] = [
    0xa,
    0x12,
    0x14,
    0x1d,
    0x1e,
    0x8000_000a,
    0x8000_001f,
    0x8000_0022,
];

/// Which processor of how many.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Its number, which is its APIC's.
    pub vcpu: u8,
    /// How many the machine has.
    pub vcpus: u8,
}

impl Place {
    /// How many bits of an APIC's number tell the machine's processors apart.
    const fn bits(self) -> u32 {
        self.vcpus.next_power_of_two().trailing_zeros()
    }
}

/// The leaves of one processor, of those that KVM can give.
#[must_use]
pub fn guest(supported: &[kvm_cpuid_entry2], place: Place) -> Vec<kvm_cpuid_entry2> {
    let is_topology = |entry: &&kvm_cpuid_entry2| matches!(entry.function, 0xb | 0x1f);
    let has_topology = supported.iter().any(|entry| is_topology(&entry));
    let kept = supported
        .iter()
        .filter(|entry| !is_topology(entry) && is_kept(entry));
    let mut leaves: Vec<kvm_cpuid_entry2> = kept.copied().collect();
    for leaf in &mut leaves {
        restrict(leaf);
        describe(leaf, place);
    }
    if has_topology {
        leaves.extend(topology(place));
    }
    leaves
}

/// Subleaves of the extended state that is not shown.
const fn is_kept(entry: &kvm_cpuid_entry2) -> bool {
    !(entry.function == 0xd && matches!(entry.index, 3 | 4 | 17 | 18))
}

/// Takes away what no guest is shown.
fn restrict(leaf: &mut kvm_cpuid_entry2) {
    match (leaf.function, leaf.index) {
        (0x1, _) => {
            leaf.ecx &= !(ECX_MONITOR | ECX_VMX | ECX_SMX | ECX_PDCM);
            leaf.ecx |= ECX_TSC_DEADLINE | ECX_HYPERVISOR;
        }
        (0x6, _) => (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (leaf.eax & EAX_ARAT, 0, 0, 0),
        (0x7, 0) => {
            leaf.ebx &= !(EBX_SGX | EBX_MPX | EBX_INTEL_PT);
            leaf.ecx &= !ECX_SGX_LC;
            leaf.edx &= !EDX_AMX;
        }
        (0x7, 1) => leaf.eax &= !EAX_AMX_FP16,
        (0xd, 0) => leaf.eax &= !(MPX_COMPONENTS | AMX_COMPONENTS),
        (0xd, 1) => leaf.eax &= !EAX_XFD,
        (0x4000_0001, _) => (leaf.eax, leaf.edx) = (leaf.eax & KVM_FEATURES, 0),
        (0x8000_0001, _) => leaf.ecx &= !(ECX_SVM | ECX_IBS | ECX_SKINIT | ECX_PERFCTR),
        (0x8000_0007, _) => leaf.edx &= !EDX_INVARIANT_TSC,
        (function, _) if EMPTY.contains(&function) => {
            (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (0, 0, 0, 0);
        }
        _ => {}
    }
}

/// Says where the processor is: each is a core of one package, and all share its last cache.
fn describe(leaf: &mut kvm_cpuid_entry2, place: Place) {
    let (vcpu, vcpus) = (u32::from(place.vcpu), u32::from(place.vcpus));
    let numbers = 1 << place.bits();
    match leaf.function {
        0x1 => {
            // The APIC's number, how many numbers the package takes, and the line that clflush has.
            leaf.ebx = vcpu << 24 | numbers << 16 | leaf.ebx & 0xffff;
            leaf.edx = if vcpus > 1 {
                leaf.edx | EDX_HTT
            } else {
                leaf.edx & !EDX_HTT
            };
        }
        0x4 if leaf.eax & 0x1f != 0 => {
            leaf.eax = leaf.eax & 0x3fff | (numbers - 1) << 26 | sharing(leaf.eax, vcpus) << 14;
        }
        0x8000_0008 => leaf.ecx = place.bits() << 12 | (vcpus - 1),
        0x8000_001d if leaf.eax & 0x1f != 0 => {
            leaf.eax = leaf.eax & 0x3fff | sharing(leaf.eax, vcpus) << 14;
        }
        // One thread to a core, one node to the package.
        0x8000_001e => (leaf.eax, leaf.ebx, leaf.ecx) = (vcpu, vcpu, 0),
        _ => {}
    }
}

/// How many more processors share a cache, by its level: the last one's are all, others are a
/// core's own.
const fn sharing(eax: u32, vcpus: u32) -> u32 {
    let level = eax >> 5 & 0x7;
    if level >= 3 { vcpus - 1 } else { 0 }
}

/// Leaf 0xb: one thread to a core, and the cores.
fn topology(place: Place) -> [kvm_cpuid_entry2; 3] {
    let level = |index: u32, bits: u32, count: u8, kind: u32| kvm_cpuid_entry2 {
        function: 0xb,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: bits,
        ebx: u32::from(count),
        ecx: kind << 8 | index,
        edx: u32::from(place.vcpu),
        ..Default::default()
    };
    [
        level(0, 0, 1, LEVEL_THREAD),
        level(1, place.bits(), place.vcpus, LEVEL_CORE),
        level(2, 0, 0, 0),
    ]
}

#[cfg(test)]
mod tests {
    use kvm_bindings::kvm_cpuid_entry2;

    use super::{EMPTY, KVM_FEATURES, Place, guest};

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

    /// A processor with everything.
    fn everything() -> Vec<kvm_cpuid_entry2> {
        let all = [u32::MAX; 4];
        let mut leaves: Vec<kvm_cpuid_entry2> = [
            0x0,
            0x1,
            0x6,
            0xa,
            0x12,
            0x14,
            0x1d,
            0x1e,
            0x4000_0000,
            0x4000_0001,
            0x8000_0000,
            0x8000_0001,
            0x8000_0007,
            0x8000_0008,
            0x8000_000a,
            0x8000_001e,
            0x8000_001f,
            0x8000_0022,
        ]
        .map(|function| leaf(function, 0, all))
        .into();
        for (function, count) in [(0x7, 3), (0xd, 19), (0xb, 3), (0x1f, 4)] {
            leaves.extend((0..count).map(|index| leaf(function, index, all)));
        }
        // Caches: of level 1, of level 3, and the end.
        for function in [0x4, 0x8000_001d] {
            for (index, eax) in [(0, 0xfff_c021), (1, 0xfff_c063), (2, 0)] {
                leaves.push(leaf(function, index, [eax, 1, 2, 3]));
            }
        }
        leaves
    }

    fn get(leaves: &[kvm_cpuid_entry2], function: u32, index: u32) -> [u32; 4] {
        let found: Vec<&kvm_cpuid_entry2> = leaves
            .iter()
            .filter(|leaf| (leaf.function, leaf.index) == (function, index))
            .collect();
        assert_eq!(found.len(), 1, "{function:#x} {index}");
        [found[0].eax, found[0].ebx, found[0].ecx, found[0].edx]
    }

    const ONE: Place = Place { vcpu: 0, vcpus: 1 };

    #[test]
    fn what_no_guest_may_have_is_left_out() {
        let leaves = guest(&everything(), ONE);
        let unset = |function, index, register: usize, bits: &[u32]| {
            let value = get(&leaves, function, index)[register];
            for bit in bits {
                assert_eq!(value >> bit & 1, 0, "{function:#x} {register} {bit}");
            }
            let hidden = bits.iter().fold(0, |all, bit| all | 1 << bit);
            assert_eq!(value | hidden, u32::MAX, "{function:#x}: nothing else");
        };
        unset(0x1, 0, 2, &[3, 5, 6, 15]);
        unset(0x7, 0, 1, &[2, 14, 25]);
        unset(0x7, 0, 2, &[30]);
        unset(0x7, 0, 3, &[22, 24, 25]);
        unset(0x7, 1, 0, &[21]);
        unset(0xd, 0, 0, &[3, 4, 17, 18]);
        unset(0xd, 1, 0, &[4]);
        unset(0x8000_0001, 0, 2, &[2, 10, 12, 23, 24, 28]);
        unset(0x8000_0007, 0, 3, &[8]);
        assert_eq!(get(&leaves, 0x6, 0), [4, 0, 0, 0]);
        assert_eq!(get(&leaves, 0x4000_0001, 0)[0], KVM_FEATURES);
        assert_eq!(get(&leaves, 0x4000_0001, 0)[3], 0);
        for function in EMPTY {
            assert_eq!(get(&leaves, function, 0), [0; 4], "{function:#x}");
        }
        for index in [3, 4, 17, 18] {
            let is_there = |leaf: &kvm_cpuid_entry2| (leaf.function, leaf.index) == (0xd, index);
            assert!(!leaves.iter().any(is_there));
        }
        assert!(!leaves.iter().any(|leaf| leaf.function == 0x1f));
    }

    #[test]
    fn a_guest_knows_that_it_is_one_and_has_a_deadline_timer() {
        let bare = [leaf(0x1, 0, [0, 0x800, 0, 0])];
        let [_, ebx, ecx, edx] = get(&guest(&bare, ONE), 0x1, 0);
        assert_eq!((ebx, ecx, edx), (0x1_0800, 1 << 24 | 1 << 31, 0));
        assert_eq!(guest(&bare, ONE).len(), 1, "no leaf that KVM does not know");
    }

    #[test]
    fn each_processor_is_a_core_of_one_package() {
        for vcpus in 1..=4_u8 {
            let bits = [0, 0, 1, 2, 2][usize::from(vcpus)];
            for vcpu in 0..vcpus {
                let leaves = guest(&everything(), Place { vcpu, vcpus });
                let (id, count) = (u32::from(vcpu), u32::from(vcpus));
                let [_, ebx, _, edx] = get(&leaves, 0x1, 0);
                assert_eq!((ebx >> 24, ebx >> 16 & 0xff), (id, 1 << bits));
                assert_eq!(edx >> 28 & 1 == 1, vcpus > 1);
                assert_eq!(get(&leaves, 0xb, 0), [0, 1, 1 << 8, id]);
                assert_eq!(get(&leaves, 0xb, 1), [bits, count, 2 << 8 | 1, id]);
                assert_eq!(get(&leaves, 0xb, 2)[..2], [0, 0]);
                let cores = (1 << bits) - 1;
                for (index, sharing) in [(0, 0), (1, count - 1)] {
                    let [eax, ..] = get(&leaves, 0x4, index);
                    assert_eq!((eax >> 26, eax >> 14 & 0xfff), (cores, sharing));
                    let [eax, ..] = get(&leaves, 0x8000_001d, index);
                    assert_eq!(eax >> 14 & 0xfff, sharing);
                }
                assert_eq!(get(&leaves, 0x4, 2), [0, 1, 2, 3], "no cache");
                assert_eq!(get(&leaves, 0x8000_0008, 0)[2], bits << 12 | (count - 1));
                assert_eq!(get(&leaves, 0x8000_001e, 0)[..3], [id, id, 0]);
            }
        }
    }
}
