//! The guest's physical map: pure numbers, the same for every guest of a shape.
//!
//! ```text
//!   0                 RAM, up to 3 GiB
//!   0x6000            PVH start info, its modules behind it
//!   0x7000            PVH memory map
//!   0x2_0000          command line
//!   0xe_0000          ACPI: RSDP, then the tables, up to 1 MiB; reserved in the memory map
//!   0xf_fff0            where a processor of old begins after a reset: asks for one
//!   0x10_0000         the kernel
//!   (top of low RAM)  the initramfs, page-aligned
//!   0xc000_0000       the hole
//!   0xd000_0000         virtio-mmio, one page each
//!   0xfec0_0000         IO-APIC, in KVM
//!   0xfee0_0000         local APICs, in KVM
//!   0xfffb_c000         KVM's identity map (a page) and its TSS (three), for Intel's real mode
//!   0x1_0000_0000     the rest of the RAM
//! ```
//!
//! Ports: 0x60 and 0x64 i8042, 0x3f8 serial, 0x600 power. Interrupts: 4 serial, 5 to 10 virtio,
//! 11 the generic event device.
//!
//! A snapshot of one layout cannot be gone on with in another: whoever changes a number here
//! changes [`LAYOUT`] too.

use std::fmt;
use std::ops::Range;

use crate::memory::{Gpa, PAGE_BYTES, Region};

/// The number of this map. Snapshots name it.
pub const LAYOUT: u32 = 2;

const MIB: u64 = 1024 * 1024;

/// The least memory that a guest kernel and our first process start in.
pub const MEMORY_MIB_MIN: u32 = 64;

/// The most memory of one guest.
pub const MEMORY_MIB_MAX: u32 = 32 * 1024;

/// The most processors of one guest.
pub const VCPUS_MAX: u8 = 4;

/// Where the hole for devices begins, and so the most low RAM there is.
pub const HOLE_START: Gpa = Gpa(0xc000_0000);

/// Where the hole ends and high RAM begins.
pub const HOLE_END: Gpa = Gpa(0x1_0000_0000);

/// What the PVH entry finds in `ebx`.
pub const START_INFO: Gpa = Gpa(0x6000);

/// The modules that the start info points to, behind it in its page.
pub const MODULES: Gpa = Gpa(START_INFO.0 + 0x40);

/// The memory map that the start info points to.
pub const MEMORY_MAP: Gpa = Gpa(0x7000);

/// The kernel's command line, and how long it may be with its closing zero.
pub const COMMAND_LINE: Gpa = Gpa(0x2_0000);
/// The most bytes of it.
pub const COMMAND_LINE_BYTES_MAX: u64 = 2048;

/// Where kernels look for the RSDP, and where the tables and their end are.
pub const ACPI: Range<u64> = 0xe_0000..0x10_0000;

/// Where the first PCs began after a reset, in real mode. A kernel that wants one jumps here when
/// it believes that nothing else helps, as Linux does where ACPI has reduced hardware.
pub const RESET_VECTOR: Gpa = Gpa(0xf_fff0);

/// The lowest address of a kernel.
pub const KERNEL_START: Gpa = Gpa(0x10_0000);

/// The first virtio-mmio page.
pub const VIRTIO_START: Gpa = Gpa(0xd000_0000);

/// One device's registers and configuration.
pub const VIRTIO_BYTES: u64 = PAGE_BYTES;

/// The interrupt of the first virtio device; the next has the next.
pub const VIRTIO_GSI: u32 = 5;

/// KVM's IO-APIC: its place is the kernel's, not ours.
pub const IO_APIC: Gpa = Gpa(0xfec0_0000);

/// KVM's local APICs, likewise.
pub const LOCAL_APIC: Gpa = Gpa(0xfee0_0000);

/// A page that KVM needs for real mode on Intel.
pub const IDENTITY_MAP: Gpa = Gpa(0xfffb_c000);

/// Three pages that KVM needs for the same.
pub const KVM_TSS: Gpa = Gpa(0xfffb_d000);

/// The 16550's first port.
pub const SERIAL_PORT: u16 = 0x3f8;

/// Its interrupt.
pub const SERIAL_GSI: u32 = 4;

/// The keyboard controller's data port; its command port is the fourth after it.
pub const I8042_PORT: u16 = 0x60;

/// Sleep control and status, and what the generic event device tells.
pub const POWER_PORT: u16 = 0x600;

/// The generic event device's interrupt.
pub const EVENT_GSI: u32 = 11;

/// The devices on virtio-mmio, in the order of their pages. Every machine has all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Slot {
    /// The image, read-only.
    Image,
    /// The app's folder, read-only.
    Folder,
    /// The scratch disk.
    Scratch,
    /// The network.
    Net,
    /// The console, whose only port is the agent's.
    Console,
    /// Entropy.
    Rng,
}

/// All of them, in order.
pub const SLOTS: [Slot; 6] = [
    Slot::Image,
    Slot::Folder,
    Slot::Scratch,
    Slot::Net,
    Slot::Console,
    Slot::Rng,
];

impl Slot {
    /// Its number, by which a saved machine names it.
    #[must_use]
    pub const fn number(self) -> u8 {
        match self {
            Self::Image => 0,
            Self::Folder => 1,
            Self::Scratch => 2,
            Self::Net => 3,
            Self::Console => 4,
            Self::Rng => 5,
        }
    }

    /// Where its registers are.
    #[must_use]
    pub const fn start(self) -> Gpa {
        Gpa(VIRTIO_START.0 + self.number() as u64 * VIRTIO_BYTES)
    }

    /// Its interrupt.
    #[must_use]
    pub const fn gsi(self) -> u32 {
        VIRTIO_GSI + self.number() as u32
    }
}

impl fmt::Display for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Image => "image",
            Self::Folder => "folder",
            Self::Scratch => "scratch",
            Self::Net => "net",
            Self::Console => "console",
            Self::Rng => "rng",
        })
    }
}

/// A machine that cannot be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// Too little or too much memory.
    #[error("{memory_mib} MiB of memory: from {MEMORY_MIB_MIN} to {MEMORY_MIB_MAX} are possible")]
    Memory {
        /// What was asked for.
        memory_mib: u32,
    },
    /// No processor, or too many.
    #[error("{vcpus} processors: from 1 to {VCPUS_MAX} are possible")]
    Vcpus {
        /// What was asked for.
        vcpus: u8,
    },
    /// More at the top of low RAM than fits above the kernel's lowest address.
    #[error("{bytes} bytes of initramfs do not fit into {low} bytes of low memory")]
    Initramfs {
        /// What was asked for.
        bytes: u64,
        /// What there is.
        low: u64,
    },
}

/// Which kind of memory the guest is told of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Free for the kernel.
    Ram,
    /// Not to be touched but through ACPI.
    Reserved,
}

/// The physical map of one shape of machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    memory_mib: u32,
    vcpus: u8,
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} MiB and {} processors", self.memory_mib, self.vcpus)
    }
}

impl Layout {
    /// The map of a machine with so much memory and so many processors.
    pub const fn new(memory_mib: u32, vcpus: u8) -> Result<Self, LayoutError> {
        if memory_mib < MEMORY_MIB_MIN || memory_mib > MEMORY_MIB_MAX {
            return Err(LayoutError::Memory { memory_mib });
        }
        if vcpus == 0 || vcpus > VCPUS_MAX {
            return Err(LayoutError::Vcpus { vcpus });
        }
        Ok(Self { memory_mib, vcpus })
    }

    /// How much memory there is.
    #[must_use]
    pub const fn memory_mib(&self) -> u32 {
        self.memory_mib
    }

    /// How many processors there are.
    #[must_use]
    pub const fn vcpus(&self) -> u8 {
        self.vcpus
    }

    /// The length of the memory, and of its file.
    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        u64::from(self.memory_mib) * MIB
    }

    /// How much of it is below the hole.
    #[must_use]
    pub fn low_bytes(&self) -> u64 {
        self.memory_bytes().min(HOLE_START.0)
    }

    /// Where the file's parts are in the guest: low RAM, and high RAM if there is any.
    #[must_use]
    pub fn regions(&self) -> Vec<Region> {
        let low = self.low_bytes();
        let mut regions = vec![Region {
            start: Gpa(0),
            offset: 0,
            bytes: low,
        }];
        let high = self.memory_bytes() - low;
        if high > 0 {
            regions.push(Region {
                start: HOLE_END,
                offset: low,
                bytes: high,
            });
        }
        regions
    }

    /// What the guest is told of its memory, in order and without gaps within RAM.
    #[must_use]
    pub fn memory_map(&self) -> Vec<(Range<u64>, Kind)> {
        let mut map = vec![
            (0..ACPI.start, Kind::Ram),
            (ACPI, Kind::Reserved),
            (ACPI.end..self.low_bytes(), Kind::Ram),
        ];
        let high = self.memory_bytes() - self.low_bytes();
        if high > 0 {
            map.push((HOLE_END.0..HOLE_END.0 + high, Kind::Ram));
        }
        map
    }

    /// Where an initramfs goes: as high as it fits into low RAM, so that the kernel, which grows
    /// from its start when it unpacks itself, stays clear of it.
    pub fn initramfs_start(&self, bytes: u64) -> Result<Gpa, LayoutError> {
        let low = self.low_bytes();
        let start = low.checked_sub(bytes).map(|end| end & !(PAGE_BYTES - 1));
        match start {
            Some(start) if start > KERNEL_START.0 => Ok(Gpa(start)),
            _ => Err(LayoutError::Initramfs { bytes, low }),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use proptest::prelude::*;

    use super::{
        ACPI, COMMAND_LINE, COMMAND_LINE_BYTES_MAX, EVENT_GSI, HOLE_END, HOLE_START, IDENTITY_MAP,
        IO_APIC, KERNEL_START, KVM_TSS, Kind, LOCAL_APIC, Layout, LayoutError, MEMORY_MAP,
        MEMORY_MIB_MAX, MEMORY_MIB_MIN, MODULES, SERIAL_GSI, SLOTS, START_INFO, VIRTIO_BYTES,
    };
    use crate::memory::{Gpa, PAGE_BYTES};

    /// Everything in the map that is no RAM, but the tables.
    fn devices() -> Vec<Range<u64>> {
        let pages = |start: Gpa, count: u64| start.0..start.0 + count * PAGE_BYTES;
        let mut devices: Vec<Range<u64>> = SLOTS
            .map(|slot| slot.start().0..slot.start().0 + VIRTIO_BYTES)
            .into();
        devices.extend([pages(IO_APIC, 1), pages(LOCAL_APIC, 1)]);
        devices.extend([pages(IDENTITY_MAP, 1), pages(KVM_TSS, 3)]);
        devices
    }

    fn overlap(one: &Range<u64>, two: &Range<u64>) -> bool {
        one.start < two.end && two.start < one.end
    }

    #[test]
    fn devices_are_in_the_hole_and_apart() {
        let devices = devices();
        for (number, device) in devices.iter().enumerate() {
            assert!(overlap(device, &(HOLE_START.0..HOLE_END.0)), "{device:x?}");
            assert!(device.start >= HOLE_START.0 && device.end <= HOLE_END.0);
            for other in devices.iter().skip(number + 1) {
                assert!(!overlap(device, other), "{device:x?} {other:x?}");
            }
        }
    }

    #[test]
    fn interrupts_are_apart() {
        let mut lines: Vec<u32> = SLOTS.map(super::Slot::gsi).into();
        lines.extend([SERIAL_GSI, EVENT_GSI]);
        lines.sort_unstable();
        let before = lines.len();
        lines.dedup();
        assert_eq!(lines.len(), before);
        assert!(lines.iter().all(|line| *line < 24), "the IO-APIC has 24");
    }

    #[test]
    fn a_slot_is_where_its_number_says() {
        for (number, slot) in (0..).zip(SLOTS) {
            assert_eq!(slot.number(), number);
        }
    }

    #[test]
    fn what_is_put_into_low_memory_is_apart() {
        let places = [
            START_INFO.0..MODULES.0,
            MODULES.0..MEMORY_MAP.0,
            MEMORY_MAP.0..MEMORY_MAP.0 + PAGE_BYTES,
            COMMAND_LINE.0..COMMAND_LINE.0 + COMMAND_LINE_BYTES_MAX,
            ACPI,
            KERNEL_START.0..KERNEL_START.0 + 1,
        ];
        for pair in places.windows(2) {
            assert!(pair[0].end <= pair[1].start, "{pair:x?}");
        }
    }

    #[test]
    fn sizes_at_their_limits_are_possible_and_those_beyond_are_not() {
        for (memory_mib, vcpus) in [(MEMORY_MIB_MIN, 1), (MEMORY_MIB_MAX, 4)] {
            assert!(Layout::new(memory_mib, vcpus).is_ok());
        }
        for memory_mib in [0, MEMORY_MIB_MIN - 1, MEMORY_MIB_MAX + 1, u32::MAX] {
            let error = Layout::new(memory_mib, 1);
            assert_eq!(error, Err(LayoutError::Memory { memory_mib }));
        }
        for vcpus in [0, 5, u8::MAX] {
            assert_eq!(Layout::new(64, vcpus), Err(LayoutError::Vcpus { vcpus }));
        }
    }

    #[test]
    fn a_machine_of_three_gib_has_one_region_and_a_larger_one_two() {
        let starts = |memory_mib| -> Vec<u64> {
            let layout = Layout::new(memory_mib, 1).unwrap();
            let regions = layout.regions();
            regions.iter().map(|region| region.start.0).collect()
        };
        assert_eq!(starts(3 * 1024), [0]);
        assert_eq!(starts(3 * 1024 + 1), [0, HOLE_END.0]);
    }

    #[test]
    fn an_initramfs_that_does_not_fit_is_refused() {
        let layout = Layout::new(64, 1).unwrap();
        assert_eq!(layout.initramfs_start(1), Ok(Gpa(64 * 1024 * 1024 - 4096)));
        for bytes in [63 * 1024 * 1024, 64 * 1024 * 1024, u64::MAX] {
            assert!(layout.initramfs_start(bytes).is_err(), "{bytes}");
        }
    }

    proptest! {
        #[test]
        fn every_byte_of_the_memory_is_shown_once_and_outside_of_devices(
            memory_mib in MEMORY_MIB_MIN..=MEMORY_MIB_MAX,
        ) {
            let layout = Layout::new(memory_mib, 1).unwrap();
            let regions = layout.regions();
            prop_assert_eq!(
                regions.iter().map(|region| region.bytes).sum::<u64>(),
                layout.memory_bytes()
            );
            let shown: Vec<Range<u64>> = regions
                .iter()
                .map(|region| region.start.0..region.start.0 + region.bytes)
                .collect();
            for range in &shown {
                for device in devices() {
                    prop_assert!(!overlap(range, &device));
                }
            }
            let map = layout.memory_map();
            for pair in map.windows(2) {
                prop_assert!(pair[0].0.end <= pair[1].0.start);
            }
            let told: u64 = map.iter().map(|(range, _)| range.end - range.start).sum();
            prop_assert_eq!(told, layout.memory_bytes());
            for (range, kind) in &map {
                prop_assert!(shown.iter().any(|s| s.start <= range.start && range.end <= s.end));
                prop_assert_eq!(*kind == Kind::Reserved, *range == ACPI);
            }
        }
    }
}
