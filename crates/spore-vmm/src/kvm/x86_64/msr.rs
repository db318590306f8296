//! Which MSRs are saved, and in which order they are set again.
//!
//! KVM lists those that it keeps for a guest and does not list all: memory types and machine checks
//! are missing. Some that it lists must not be set as MSRs:
//!
//! | left out | why |
//! |---|---|
//! | the APIC's base | it goes with the segment registers |
//! | the TSC | set one by one, processors would differ; the offset is set instead |
//! | performance counters | guests are shown none |
//! | asynchronous page faults, stolen time | guests are shown neither |
//! | Hyper-V's | guests are shown KVM |
//!
//! The deadline of the TSC's timer is set last: KVM drops it unless the local APIC is in deadline
//! mode and the TSC is right.

use kvm_bindings::kvm_msr_entry;

/// Set last.
pub const TSC_DEADLINE: u32 = 0x6e0;

/// The TSC: read, and never set.
pub const TSC: u32 = 0x10;

const APIC_BASE: u32 = 0x1b;

/// What KVM keeps and does not list: machine checks' control and state, the memory types of fixed
/// and of variable ranges, and their default.
const UNLISTED: [std::ops::RangeInclusive<u32>; 6] = [
    0x17a..=0x17b,
    0x200..=0x20f,
    0x250..=0x250,
    0x258..=0x259,
    0x268..=0x26f,
    0x2ff..=0x2ff,
];

/// Never saved.
const LEFT_OUT: [std::ops::RangeInclusive<u32>; 17] = [
    TSC..=TSC,
    APIC_BASE..=APIC_BASE,
    // Intel's counters, general and fixed, what they count, and their global control.
    0xc1..=0xc8,
    0x186..=0x18d,
    0x309..=0x30c,
    0x345..=0x345,
    0x38d..=0x390,
    0x3f1..=0x3f1,
    0x4c1..=0x4c8,
    // AMD's, old, new and newest.
    0xc000_0300..=0xc000_0303,
    0xc001_0000..=0xc001_0007,
    0xc001_0200..=0xc001_020b,
    // KVM's: asynchronous page faults, stolen time, and their interrupt.
    0x4b56_4d02..=0x4b56_4d03,
    0x4b56_4d06..=0x4b56_4d07,
    // Live migration's, and what a nested guest would have.
    0x4b56_4d08..=0x4b56_4d08,
    0x480..=0x491,
    // Hyper-V's, which count on by themselves.
    0x4000_0000..=0x4000_01ff,
];

/// Whether an MSR is part of a guest's state.
#[must_use]
pub fn is_saved(index: u32) -> bool {
    !LEFT_OUT.iter().any(|range| range.contains(&index))
}

/// The MSRs to try to save, of those that KVM lists on this host and those that it does not, in the
/// order of their numbers. Which of them a processor has is seen by reading them.
#[must_use]
pub fn candidates(listed: &[u32]) -> Vec<u32> {
    let unlisted = UNLISTED.iter().cloned().flatten();
    let mut all: Vec<u32> = listed.iter().copied().chain(unlisted).collect();
    all.retain(|index| is_saved(*index));
    all.sort_unstable();
    all.dedup();
    all
}

/// Puts saved MSRs into the order in which they are set.
pub fn arrange(entries: &mut [kvm_msr_entry]) {
    entries.sort_by_key(|entry| (entry.index == TSC_DEADLINE, entry.index));
}

#[cfg(test)]
mod tests {
    use kvm_bindings::kvm_msr_entry;
    use proptest::prelude::*;

    use super::{TSC_DEADLINE, arrange, candidates, is_saved};

    #[test]
    fn what_a_guest_lives_by_is_saved() {
        // SYSENTER, STAR to FMASK, FS, GS and KERNEL_GS bases, PAT, EFER's neighbours, TSC_AUX,
        // TSC_ADJUST, MISC_ENABLE, SPEC_CTRL, the deadline; KVM's clock, old and new, and EOI.
        for index in [
            0x174,
            0x175,
            0x176,
            0xc000_0081,
            0xc000_0082,
            0xc000_0084,
            0xc000_0100,
            0xc000_0101,
            0xc000_0102,
            0x277,
            0xc000_0103,
            0x3b,
            0x1a0,
            0x48,
            0x6e0,
            0x11,
            0x12,
            0x4b56_4d00,
            0x4b56_4d01,
            0x4b56_4d04,
            0x4b56_4d05,
        ] {
            assert!(is_saved(index), "{index:#x}");
        }
    }

    #[test]
    fn what_is_set_in_another_way_or_not_shown_is_left_out() {
        for index in [
            0x10,
            0x1b,
            0xc1,
            0x186,
            0xc001_0007,
            0x4b56_4d02,
            0x4b56_4d03,
            0x480,
            0x4000_0020,
            0x4000_0105,
        ] {
            assert!(!is_saved(index), "{index:#x}");
            assert!(!candidates(&[index]).contains(&index));
        }
    }

    #[test]
    fn memory_types_are_saved_though_kvm_does_not_list_them() {
        let found = candidates(&[]);
        for index in [0x200, 0x20f, 0x250, 0x259, 0x26f, 0x2ff] {
            assert!(found.contains(&index), "{index:#x}");
        }
    }

    proptest! {
        #[test]
        fn each_is_saved_once_and_the_deadline_is_set_last(
            listed in prop::collection::vec(prop_oneof![0..0x1000_u32, Just(TSC_DEADLINE)], 0..80),
        ) {
            let mut once = candidates(&listed);
            let before = once.len();
            once.dedup();
            prop_assert_eq!(once.len(), before);
            for index in listed.iter().filter(|index| is_saved(**index)) {
                prop_assert!(once.contains(index));
            }
            let entry = |index: &u32| kvm_msr_entry { index: *index, ..Default::default() };
            let mut entries: Vec<kvm_msr_entry> = once.iter().map(entry).collect();
            arrange(&mut entries);
            let at = entries.iter().position(|entry| entry.index == TSC_DEADLINE);
            prop_assert_eq!(at, listed.contains(&TSC_DEADLINE).then(|| entries.len() - 1));
        }
    }
}
