//! What a saved machine holds, read whole before anything is made of it. Pure: bytes in, values or
//! a reason out.
//!
//! ```text
//!   machine · VM · a processor each · serial port · power · a transport each, and its device
//! ```
//!
//! What is in the devices' sections is read when they are put together again, by themselves.

use super::board::SavedDevices;
use super::layout::{Layout, LayoutError, SLOTS, Slot};
use crate::kvm::x86_64::msr;
use crate::kvm::x86_64::state::{VcpuState, VmState};
use crate::snapshot::Saved;
use crate::snapshot::format::{Fields, FormatError, Sections, Writer};
use crate::snapshot::kind::Kind;

/// Why a saved machine is none that could be gone on with anywhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SavedError {
    /// It cannot be read.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// It has a size that no machine has.
    #[error("a saved machine that cannot be")]
    Layout(#[from] LayoutError),
    /// It has a register that is never saved.
    #[error("MSR {index:#x} is saved of processor {vcpu}, and is none that may be")]
    Msr {
        /// Whose.
        vcpu: u8,
        /// Which.
        index: u32,
    },
}

/// How large a machine is and what is in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// Memory.
    pub memory_mib: u32,
    /// Processors.
    pub vcpus: u8,
    /// The rate of their TSCs.
    pub tsc_khz: u32,
    /// Slots that have a device, in their order.
    pub slots: Vec<Slot>,
}

impl Saved for Header {
    const VERSION: u16 = 1;

    fn put(&self, into: &mut Vec<u8>) {
        into.extend(self.memory_mib.to_le_bytes());
        into.push(self.vcpus);
        into.extend(self.tsc_khz.to_le_bytes());
        let bits = self.slots.iter().fold(0, |bits, slot| bits | bit(*slot));
        into.push(bits);
    }

    fn get(from: &mut Fields<'_>) -> Result<Self, FormatError> {
        let (memory_mib, vcpus, tsc_khz) = (from.u32()?, from.u8()?, from.u32()?);
        let value = from.u8()?;
        let known = SLOTS.iter().fold(0, |bits, slot| bits | bit(*slot));
        if value & !known != 0 {
            let what = "slots";
            return Err(FormatError::Name { what, value });
        }
        let slots = SLOTS.into_iter().filter(|slot| value & bit(*slot) != 0);
        Ok(Self {
            memory_mib,
            vcpus,
            tsc_khz,
            slots: slots.collect(),
        })
    }
}

const fn bit(slot: Slot) -> u8 {
    1 << slot.number()
}

/// A saved machine. What is in it was written by a process that a guest may have taken over: every
/// part is checked by whoever takes it.
#[derive(Debug)]
pub struct SavedMachine<'a> {
    /// Its size.
    pub layout: Layout,
    /// The rate of its TSCs.
    pub tsc_khz: u32,
    /// Interrupt controller and clock.
    pub vm: VmState,
    /// Its processors: as many as its size says.
    pub vcpus: Vec<VcpuState>,
    /// Its devices.
    pub devices: SavedDevices<'a>,
}

impl<'a> SavedMachine<'a> {
    /// Reads what [`Machine::save`](super::Machine::save) wrote.
    pub fn read(file: &'a [u8]) -> Result<Self, SavedError> {
        let mut sections = Sections::read(file)?;
        let header: Header = sections.get(Kind::Machine.only())?;
        let layout = Layout::new(header.memory_mib, header.vcpus)?;
        let vm = sections.get(Kind::Vm.only())?;
        let vcpus = (0..header.vcpus).map(|number| vcpu(&mut sections, number));
        Ok(Self {
            layout,
            tsc_khz: header.tsc_khz,
            vm,
            vcpus: vcpus.collect::<Result<_, _>>()?,
            devices: SavedDevices {
                serial: sections.get(Kind::Serial.only())?,
                power: sections.get(Kind::Power.only())?,
                slots: header.slots,
                sections,
            },
        })
    }
}

fn vcpu(sections: &mut Sections<'_>, number: u8) -> Result<VcpuState, SavedError> {
    let state: VcpuState = sections.get(Kind::Vcpu.of(number))?;
    let mut indices = state.msrs.iter().map(|entry| entry.index);
    match indices.find(|index| !msr::is_saved(*index)) {
        Some(index) => Err(SavedError::Msr {
            vcpu: number,
            index,
        }),
        None => Ok(state),
    }
}

/// Begins to write a machine. Its devices' sections come behind.
pub fn begin(header: &Header, vm: &VmState, vcpus: &[VcpuState]) -> Result<Writer, FormatError> {
    let mut writer = Writer::default();
    writer.put(Kind::Machine.only(), header)?;
    writer.put(Kind::Vm.only(), vm)?;
    for (number, vcpu) in (0..).zip(vcpus) {
        writer.put(Kind::Vcpu.of(number), vcpu)?;
    }
    Ok(writer)
}

#[cfg(test)]
mod tests {
    use kvm_bindings::kvm_msr_entry;
    use proptest::prelude::*;

    use super::{Header, SavedError, SavedMachine, begin};
    use crate::device::{power, serial};
    use crate::kvm::x86_64::saved::tests::{blank, blank_vm};
    use crate::machine::layout::{SLOTS, Slot};
    use crate::snapshot::kind::Kind;
    use crate::snapshot::tests::is_pinned;

    fn header(memory_mib: u32, vcpus: u8) -> Header {
        Header {
            memory_mib,
            vcpus,
            tsc_khz: 2_000_000,
            slots: vec![Slot::Image, Slot::Rng],
        }
    }

    /// A machine without what is in its slots.
    fn file(header: &Header, vcpus: usize, msrs: &[u32]) -> Vec<u8> {
        let mut states: Vec<_> = (0..vcpus).map(|_| blank()).collect();
        if let Some(last) = states.last_mut() {
            last.msrs = msrs
                .iter()
                .map(|index| kvm_msr_entry {
                    index: *index,
                    ..Default::default()
                })
                .collect();
        }
        let mut writer = begin(header, &blank_vm(), &states).unwrap();
        let serial = serial::State {
            registers: [0; 9],
            input: Vec::new(),
        };
        writer.put(Kind::Serial.only(), &serial).unwrap();
        let power = power::State { events: 1 };
        writer.put(Kind::Power.only(), &power).unwrap();
        writer.finish()
    }

    fn error(file: &[u8]) -> String {
        let error = SavedMachine::read(file).unwrap_err();
        spore_wire::cause::chain(&error)
    }

    #[test]
    fn a_header_is_written_as_in_every_release() {
        let header = Header {
            memory_mib: 0x0102,
            vcpus: 3,
            tsc_khz: 0x0403_0201,
            slots: vec![Slot::Folder, Slot::Rng],
        };
        is_pinned(&header, 1, &[2, 1, 0, 0, 3, 1, 2, 3, 4, 0b10_0010]);
        let all = Header {
            slots: SLOTS.to_vec(),
            ..header
        };
        is_pinned(&all, 1, &[2, 1, 0, 0, 3, 1, 2, 3, 4, 0b11_1111]);
    }

    #[test]
    fn what_was_saved_is_read() {
        let file = file(&header(128, 2), 2, &[0x174, 0x6e0]);
        let saved = SavedMachine::read(&file).unwrap();
        assert_eq!((saved.layout.memory_mib(), saved.layout.vcpus()), (128, 2));
        assert_eq!((saved.tsc_khz, saved.vcpus.len()), (2_000_000, 2));
        assert_eq!(saved.vcpus[1].msrs.len(), 2);
        assert_eq!(saved.devices.slots, [Slot::Image, Slot::Rng]);
        assert_eq!(saved.devices.power.events, 1);
        saved.devices.sections.finish().unwrap();
    }

    #[test]
    fn a_size_that_no_machine_has_is_refused() {
        for (memory_mib, vcpus, said) in [
            (1, 1, "1 MiB of memory"),
            (1 << 20, 1, "1048576 MiB of memory"),
            (128, 0, "0 processors"),
            (128, 5, "5 processors"),
        ] {
            let file = file(&header(memory_mib, vcpus), 1, &[]);
            assert!(error(&file).contains(said), "{}", error(&file));
        }
    }

    #[test]
    fn a_part_that_is_missing_is_named() {
        let said = error(&file(&header(128, 2), 1, &[]));
        assert_eq!(said, "section 3.1 (processor) is missing");
        // With a processor more than it has, something is left for the devices to refuse.
        let file = file(&header(128, 1), 2, &[]);
        let saved = SavedMachine::read(&file).unwrap();
        assert!(saved.devices.sections.finish().is_err());
    }

    #[test]
    fn a_register_that_is_never_saved_is_refused_by_its_number() {
        for index in [0x10, 0x1b, 0x4b56_4d02] {
            let file = file(&header(128, 2), 2, &[0x174, index]);
            let found = SavedMachine::read(&file).unwrap_err();
            assert_eq!(found, SavedError::Msr { vcpu: 1, index });
        }
    }

    #[test]
    fn another_layout_is_refused() {
        let mut file = file(&header(128, 1), 1, &[]);
        file[8] += 1;
        assert!(error(&file).contains("of layout"), "{}", error(&file));
    }

    #[test]
    fn slots_that_this_version_has_not_are_refused() {
        let mut file = file(&header(128, 1), 1, &[]);
        let at = 24 + 9;
        assert_eq!(file[at], 0b10_0001);
        file[at] |= 1 << 7;
        let crc = crc32fast::hash(&file[24..34]).to_le_bytes();
        file[20..24].copy_from_slice(&crc);
        assert_eq!(error(&file), "161 names no slots in a saved machine");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn a_machine_that_ends_early_or_was_changed_is_refused(
            cut in any::<prop::sample::Index>(),
            flip in any::<prop::sample::Index>(),
            bit in 0..8_u32,
        ) {
            let whole = file(&header(128, 2), 2, &[0x174]);
            let short = &whole[..cut.index(whole.len())];
            prop_assert!(SavedMachine::read(short).is_err());
            let mut changed = whole.clone();
            changed[flip.index(whole.len())] ^= 1 << bit;
            prop_assert!(SavedMachine::read(&changed).is_err());
        }
    }
}
