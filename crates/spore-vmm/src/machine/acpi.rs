//! The ACPI tables of a machine: pure bytes, the same for every machine of a shape.
//!
//! ```text
//!   RSDP ──▶ XSDT ──▶ FADT ──▶ DSDT: the serial port, virtio-mmio devices, the generation id,
//!                 │                  the event device
//!                 └─▶ MADT: a local APIC for each processor, the IO-APIC
//! ```
//!
//! Hardware-reduced: there is no PM timer, no SCI, and none of what a kernel waits for in vain. The
//! FADT says that there is no RTC (a kernel would look for one for nine seconds), no VGA, and no
//! keyboard controller, whose driver would probe for keyboards; its reset line works all the same.

use acpi_tables::aml::{
    self, Device, EISAName, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, IO,
    Interrupt, Memory32Fixed, Method, Name, Notify, OpRegion, OpRegionSpace, Package, Path,
    ResourceTemplate,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};

use super::layout::{
    ACPI, EVENT_GSI, IO_APIC, LOCAL_APIC, Layout, POWER_PORT, SERIAL_GSI, SERIAL_PORT, SLOTS, Slot,
    VIRTIO_BYTES,
};
use crate::device::power::{self, Event};
use crate::device::serial;
use crate::memory::Gpa;

const OEM: [u8; 6] = *b"SPORE ";
const TABLE: [u8; 8] = *b"SPOREVMM";
const REVISION: u32 = 1;

/// The bytes of a table's header.
const HEADER_BYTES: u32 = 36;

/// The first revision whose integers have 64 bits.
const DSDT_REVISION: u8 = 2;

/// In the FADT's boot flags: do not look for VGA, nor for an RTC. The bits that would say that
/// there are a keyboard controller and other old devices are not set.
const NO_VGA: u16 = 1 << 2;
const NO_CMOS_RTC: u16 = 1 << 5;

/// Tables begin at multiples of it.
const ALIGN: usize = 16;

/// The generation id's place: the last page of what is kept for the tables.
pub const GENERATION: Gpa = Gpa(ACPI.end - 0x1000);

/// The tables of a machine, as they lie in memory from [`ACPI`]'s start on: first the RSDP.
#[must_use]
pub fn tables(layout: &Layout) -> Vec<u8> {
    let start = ACPI.start;
    let mut bytes = vec![0; Rsdp::len().next_multiple_of(ALIGN)];
    let mut place = |table: &dyn Aml| {
        let at = start + bytes.len() as u64;
        table.to_aml_bytes(&mut Sink(&mut bytes));
        bytes.resize(bytes.len().next_multiple_of(ALIGN), 0);
        at
    };
    let dsdt = place(&Dsdt);
    let fadt = place(&fadt(dsdt));
    let madt = place(&madt(layout.vcpus()));
    let mut xsdt = XSDT::new(OEM, TABLE, REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = place(&xsdt);
    let mut first = Vec::with_capacity(Rsdp::len());
    Rsdp::new(OEM, xsdt).to_aml_bytes(&mut Sink(&mut first));
    for (to, from) in bytes.iter_mut().zip(first) {
        *to = from;
    }
    bytes
}

/// Bytes at the end of what there is.
struct Sink<'a>(&'a mut Vec<u8>);

impl AmlSink for Sink<'_> {
    fn byte(&mut self, byte: u8) {
        self.0.push(byte);
    }
}

fn fadt(dsdt: u64) -> impl Aml {
    let register = |offset: u16| {
        GAS::new(
            AddressSpace::SystemIo,
            8,
            0,
            AccessSize::ByteAccess,
            u64::from(POWER_PORT + offset),
        )
    };
    let mut fadt = FADTBuilder::new(OEM, TABLE, REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.iapc_boot_arch = (NO_VGA | NO_CMOS_RTC).into();
    fadt.sleep_control_reg = register(power::SLEEP_CONTROL);
    fadt.sleep_status_reg = register(power::SLEEP_STATUS);
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(TABLE).into();
    fadt.finalize()
}

fn madt(vcpus: u8) -> impl Aml {
    let local = LocalInterruptController::Address(low(LOCAL_APIC));
    let mut madt = MADT::new(OEM, TABLE, REVISION, local);
    for vcpu in 0..vcpus {
        madt.add_structure(ProcessorLocalApic::new(vcpu, vcpu, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, low(IO_APIC), 0));
    madt
}

/// A place below 4 GiB as the tables write it.
fn low(at: Gpa) -> u32 {
    u32::try_from(at.0).expect("the layout puts all devices below 4 GiB")
}

/// The definitions of devices.
struct Dsdt;

impl Aml for Dsdt {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let mut body = Vec::new();
        port(&mut Sink(&mut body));
        for slot in SLOTS {
            virtio(slot, &mut Sink(&mut body));
        }
        generation(&mut Sink(&mut body));
        events(&mut Sink(&mut body));
        let off = u64::from(power::S5);
        let off = Package::new(vec![&off]);
        Name::new("_S5_".into(), &off).to_aml_bytes(&mut Sink(&mut body));
        let mut table = Sdt::new(*b"DSDT", HEADER_BYTES, DSDT_REVISION, OEM, TABLE, REVISION);
        table.append_slice(&body);
        sink.vec(table.as_slice());
    }
}

/// The serial port. Kernels find it without, and then have no interrupt of it: without old
/// interrupt controllers there are no lines but those that are announced.
fn port(sink: &mut dyn AmlSink) {
    let count = u8::try_from(serial::PORTS).expect("a port has eight registers");
    let registers = IO::new(SERIAL_PORT, SERIAL_PORT, 1, count);
    let interrupt = Interrupt::new(true, true, false, false, SERIAL_GSI);
    let resources = ResourceTemplate::new(vec![&registers, &interrupt]);
    Device::new(
        "\\_SB_.COM1".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &aml::ZERO),
            &Name::new("_CRS".into(), &resources),
        ],
    )
    .to_aml_bytes(sink);
}

/// A virtio device, by the name that Linux's driver for them has.
fn virtio(slot: Slot, sink: &mut dyn AmlSink) {
    let number = slot.gsi() - SLOTS[0].gsi();
    let path = Path::new(&format!("\\_SB_.VR{number:02}"));
    let bytes = u32::try_from(VIRTIO_BYTES).expect("a page is small");
    let registers = Memory32Fixed::new(true, low(slot.start()), bytes);
    let interrupt = Interrupt::new(true, true, false, false, slot.gsi());
    let resources = ResourceTemplate::new(vec![&registers, &interrupt]);
    Device::new(
        path,
        vec![
            &Name::new("_HID".into(), &"LNRO0005"),
            &Name::new("_UID".into(), &number),
            &Name::new("_CCA".into(), &aml::ONE),
            &Name::new("_CRS".into(), &resources),
        ],
    )
    .to_aml_bytes(sink);
}

/// The generation id: where 16 bytes are that are others after each fork.
fn generation(sink: &mut dyn AmlSink) {
    let (low_half, high_half) = (low(GENERATION), 0_u32);
    let address = Package::new(vec![&low_half, &high_half]);
    Device::new(
        "\\_SB_.VGEN".into(),
        vec![
            &Name::new("_HID".into(), &"SPOR0001"),
            &Name::new("_CID".into(), &"VM_Gen_Counter"),
            &Name::new("_DDN".into(), &"VM_Gen_Counter"),
            &Name::new("ADDR".into(), &address),
        ],
    )
    .to_aml_bytes(sink);
}

/// The generic event device: when its interrupt comes, it reads which events there were, which
/// forgets them, and tells those whom they are for.
fn events(sink: &mut dyn AmlSink) {
    let interrupt = Interrupt::new(true, true, false, false, EVENT_GSI);
    let resources = ResourceTemplate::new(vec![&interrupt]);
    let port = u32::from(POWER_PORT + power::EVENT);
    let (region, field) = (Path::new("EVRG"), Path::new("EVST"));
    let field_bits = vec![FieldEntry::Named(*b"EVST", 8)];
    let registers = Field::new(
        "EVRG".into(),
        FieldAccessType::Byte,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        field_bits,
    );
    let bit = Event::Generation.bit();
    let clone = Path::new("\\_SB_.VGEN");
    // The value that a generation id's driver waits for.
    let changed = 0x80_u8;
    let notify = Notify::new(&clone, &changed);
    let read = aml::Local(0);
    let store = aml::Store::new(&read, &field);
    let found = aml::Local(1);
    let and = aml::And::new(&found, &read, &bit);
    let tell = aml::If::new(&found, vec![&notify]);
    Device::new(
        "\\_SB_.GED_".into(),
        vec![
            &Name::new("_HID".into(), &"ACPI0013"),
            &Name::new("_UID".into(), &aml::ZERO),
            &Name::new("_CRS".into(), &resources),
            &OpRegion::new(region, OpRegionSpace::SystemIO, &port, &aml::ONE),
            &registers,
            &Method::new("_EVT".into(), 1, true, vec![&store, &and, &tell]),
        ],
    )
    .to_aml_bytes(sink);
}

#[cfg(test)]
mod tests {
    use super::{ACPI, ALIGN, GENERATION, tables};
    use crate::machine::layout::{Layout, VCPUS_MAX};

    fn number(bytes: &[u8], at: usize, count: usize) -> u64 {
        let field = &bytes[at..at + count];
        field
            .iter()
            .rev()
            .fold(0, |n, byte| n << 8 | u64::from(*byte))
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    /// The table at a place of the guest's, whole.
    fn table(bytes: &[u8], at: u64) -> &[u8] {
        let at = usize::try_from(at - ACPI.start).unwrap();
        assert_eq!(at % ALIGN, 0);
        let length = usize::try_from(number(bytes, at + 4, 4)).unwrap();
        let table = &bytes[at..at + length];
        assert_eq!(sum(table), 0, "{:?}", &table[..4]);
        table
    }

    #[test]
    fn a_kernel_finds_every_table_from_the_first() {
        for vcpus in 1..=VCPUS_MAX {
            let bytes = tables(&Layout::new(128, vcpus).unwrap());
            assert!(ACPI.start + bytes.len() as u64 <= GENERATION.0);
            assert_eq!(&bytes[..8], b"RSD PTR ");
            assert_eq!((sum(&bytes[..20]), sum(&bytes[..36])), (0, 0));
            let xsdt = table(&bytes, number(&bytes, 24, 8));
            let entries: Vec<u64> = (36..xsdt.len())
                .step_by(8)
                .map(|at| number(xsdt, at, 8))
                .collect();
            let names: Vec<&[u8]> = entries.iter().map(|at| &table(&bytes, *at)[..4]).collect();
            assert_eq!(names, [b"FACP", b"APIC"]);
            let fadt = table(&bytes, entries[0]);
            let dsdt = table(&bytes, number(fadt, 140, 8));
            assert_eq!(&dsdt[..4], b"DSDT");
            let madt = table(&bytes, entries[1]);
            assert_eq!(madt.len(), 44 + usize::from(vcpus) * 8 + 12);
            assert_eq!(number(madt, 36, 4), 0xfee0_0000);
        }
    }

    #[test]
    fn the_fadt_says_what_there_is_not() {
        let bytes = tables(&Layout::new(128, 1).unwrap());
        let xsdt = table(&bytes, number(&bytes, 24, 8));
        let fadt = table(&bytes, number(xsdt, 36, 8));
        assert_eq!(fadt.len(), 276, "revision 6");
        assert_eq!((fadt[8], fadt[131]), (6, 5));
        // No VGA, no RTC, and no keyboard controller.
        assert_eq!(number(fadt, 109, 2), 0b10_0100);
        assert_ne!(number(fadt, 112, 4) & 1 << 20, 0, "hardware-reduced");
        assert_eq!(number(fadt, 36, 4), 0, "no FACS");
        // Sleep control: a port, 8 bits, byte access.
        assert_eq!(&fadt[244..248], [1, 8, 0, 1]);
        assert_eq!(number(fadt, 248, 8), 0x600);
        assert_eq!(number(fadt, 260, 8), 0x601);
    }

    /// A snapshot's guest has read them and goes on by them: a change of them is one of the layout.
    #[test]
    fn the_tables_are_those_of_this_layout() {
        let bytes = tables(&Layout::new(128, 2).unwrap());
        assert_eq!(
            (bytes.len(), crc32fast::hash(&bytes)),
            (1232, 0xfc4d_b7cc),
            "the tables changed: raise LAYOUT and set these anew"
        );
    }
}
