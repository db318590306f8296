//! Tests of the cold start, with a kernel of a few bytes made here.

use std::os::fd::{AsFd as _, OwnedFd};

use proptest::prelude::*;
use rustix::fs::MemfdFlags;
use spore_wire::launch::Incarnation;

use super::{Boot, BootError, load};
use crate::machine::layout::{ACPI, COMMAND_LINE, Layout, MEMORY_MAP, MODULES, START_INFO};
use crate::memory::{Gpa, GuestMemory, Sharing, Space};

/// Where the kernel made here is loaded, and where its entry is.
const LOADED: u64 = 0x100_0000;
const ENTRY: u64 = LOADED + 0x10;
const CODE: &[u8] = b"the kernel's first instructions";

const HEADER_BYTES: usize = 64;
const SEGMENT_BYTES: usize = 56;

fn file(bytes: &[u8]) -> OwnedFd {
    let file = rustix::fs::memfd_create("boot", MemfdFlags::CLOEXEC).unwrap();
    let written = rustix::io::pwrite(&file, bytes, 0).unwrap();
    assert_eq!(written, bytes.len());
    file
}

/// A segment of an ELF file.
struct Segment {
    kind: u32,
    address: u64,
    /// Its length in memory.
    bytes: u64,
    content: Vec<u8>,
}

fn code(address: u64, bytes: u64) -> Segment {
    let content = CODE.to_vec();
    Segment {
        kind: 1,
        address,
        bytes,
        content,
    }
}

/// The note that says where PVH begins, behind one that says something else.
fn note(entry: u64) -> Segment {
    let mut content = Vec::new();
    for (name, kind, value) in [(b"GNU\0", 3_u32, 0_u64), (b"Xen\0", 18, entry)] {
        for number in [4, 8, kind] {
            content.extend(number.to_le_bytes());
        }
        content.extend(name);
        content.extend(value.to_le_bytes());
    }
    Segment {
        kind: 4,
        address: 0,
        bytes: 0,
        content,
    }
}

/// A kernel that is some code, for a machine that is to run it.
pub(crate) fn kernel_of(code: &[u8]) -> Vec<u8> {
    let mut content = vec![0x90; 0x10];
    content.extend(code);
    let bytes = content.len() as u64;
    let kernel = Segment {
        kind: 1,
        address: LOADED,
        bytes,
        content,
    };
    elf(&[kernel, note(ENTRY)])
}

fn elf(segments: &[Segment]) -> Vec<u8> {
    let mut bytes = b"\x7fELF\x02\x01\x01".to_vec();
    bytes.resize(16, 0);
    // An executable, of x86-64, version 1.
    bytes.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    bytes.extend(LOADED.to_le_bytes());
    bytes.extend((HEADER_BYTES as u64).to_le_bytes());
    bytes.extend([0; 12]);
    let count = u16::try_from(segments.len()).unwrap();
    for number in [64, 56, count, 0, 0, 0] {
        bytes.extend(number.to_le_bytes());
    }
    assert_eq!(bytes.len(), HEADER_BYTES);
    let mut offset = HEADER_BYTES + segments.len() * SEGMENT_BYTES;
    for segment in segments {
        bytes.extend(segment.kind.to_le_bytes());
        bytes.extend([7, 0, 0, 0]);
        let length = segment.content.len();
        for number in [
            offset as u64,
            0,
            segment.address,
            length as u64,
            segment.bytes,
            16,
        ] {
            bytes.extend(number.to_le_bytes());
        }
        offset += length;
    }
    for segment in segments {
        bytes.extend(&segment.content);
    }
    bytes
}

fn kernel() -> Vec<u8> {
    elf(&[code(LOADED, 0x10_0000), note(ENTRY)])
}

struct Guest {
    layout: Layout,
    memory: GuestMemory,
}

impl Guest {
    fn new(memory_mib: u32) -> Self {
        let layout = Layout::new(memory_mib, 2).unwrap();
        let bytes = layout.memory_bytes();
        let file = rustix::fs::memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&file, bytes).unwrap();
        let space = Space::reserve(bytes).unwrap();
        let memory = space
            .fill(file.as_fd(), Sharing::Shared, &layout.regions())
            .unwrap();
        Self { layout, memory }
    }

    fn load(
        &self,
        kernel: &[u8],
        initramfs: Option<&[u8]>,
        command_line: &[u8],
    ) -> Result<Gpa, BootError> {
        let (kernel, initramfs) = (file(kernel), initramfs.map(file));
        let boot = Boot {
            incarnation: Incarnation::from_bytes([0; 16]),
            kernel: kernel.as_fd(),
            initramfs: initramfs.as_ref().map(OwnedFd::as_fd),
            command_line,
        };
        load(&self.memory, &self.layout, &boot)
    }

    fn bytes(&self, at: u64, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        self.memory.read(Gpa(at), &mut bytes).unwrap();
        bytes
    }

    fn number(&self, at: u64, count: usize) -> u64 {
        let bytes = self.bytes(at, count);
        bytes
            .iter()
            .rev()
            .fold(0, |n, byte| n << 8 | u64::from(*byte))
    }
}

#[test]
fn a_kernel_finds_everything_from_its_start_info() {
    let guest = Guest::new(4 * 1024);
    let initramfs = vec![7; 200_000];
    let entry = guest.load(&kernel(), Some(&initramfs), b"console=ttyS0");
    assert_eq!(entry.unwrap(), Gpa(ENTRY));
    assert_eq!(guest.bytes(LOADED, CODE.len()), CODE);
    let field = |offset, count| guest.number(START_INFO.0 + offset, count);
    assert_eq!((field(0, 4), field(4, 4), field(8, 4)), (0x336e_c578, 1, 0));
    assert_eq!((field(12, 4), field(16, 8)), (1, MODULES.0));
    assert_eq!((field(24, 8), field(32, 8)), (COMMAND_LINE.0, ACPI.start));
    assert_eq!((field(40, 8), field(48, 4)), (MEMORY_MAP.0, 4));
    assert_eq!(guest.bytes(COMMAND_LINE.0, 14), b"console=ttyS0\0");
    assert_eq!(guest.bytes(ACPI.start, 8), b"RSD PTR ");
    let module = |offset| guest.number(MODULES.0 + offset, 8);
    assert_eq!((module(8), module(16), module(24)), (200_000, 0, 0));
    assert_eq!(guest.bytes(module(0), initramfs.len()), initramfs);
    let map: Vec<(u64, u64, u64)> = (0..4)
        .map(|entry| MEMORY_MAP.0 + entry * 24)
        .map(|at| {
            assert_eq!(guest.number(at + 20, 4), 0);
            let end = guest.number(at, 8) + guest.number(at + 8, 8);
            (guest.number(at, 8), end, guest.number(at + 16, 4))
        })
        .collect();
    let expected = [
        (0, 0xe_0000, 1),
        (0xe_0000, 0x10_0000, 2),
        (0x10_0000, 0xc000_0000, 1),
        (0x1_0000_0000, 0x1_4000_0000, 1),
    ];
    assert_eq!(map, expected);
}

#[test]
fn a_kernel_of_many_pieces_is_copied_whole() {
    let guest = Guest::new(64);
    let mut large = code(LOADED, 0x10_0000);
    large.content = (0..0x4_5678_u32)
        .map(|n| u8::try_from(n % 251).unwrap())
        .collect();
    let content = large.content.clone();
    guest.load(&elf(&[large, note(ENTRY)]), None, b"").unwrap();
    assert_eq!(guest.bytes(LOADED, content.len()), content);
}

#[test]
fn without_an_initramfs_there_is_no_module() {
    let guest = Guest::new(64);
    guest.load(&kernel(), None, b"").unwrap();
    assert_eq!(guest.number(START_INFO.0 + 12, 4), 0);
    assert_eq!(guest.number(START_INFO.0 + 16, 8), 0);
    assert_eq!(guest.number(COMMAND_LINE.0, 1), 0);
}

#[test]
fn files_are_read_from_their_beginning_and_not_moved() {
    let guest = Guest::new(64);
    let kernel = file(&kernel());
    rustix::fs::seek(&kernel, rustix::fs::SeekFrom::Start(5)).unwrap();
    let boot = Boot {
        incarnation: Incarnation::from_bytes([0; 16]),
        kernel: kernel.as_fd(),
        initramfs: None,
        command_line: b"",
    };
    load(&guest.memory, &guest.layout, &boot).unwrap();
    let at = rustix::fs::seek(&kernel, rustix::fs::SeekFrom::Current(0));
    assert_eq!(at.unwrap(), 5);
}

#[test]
fn what_is_no_kernel_of_ours_is_refused_with_the_reason() {
    let guest = Guest::new(64);
    let refused = |kernel: &[u8]| guest.load(kernel, None, b"").unwrap_err();
    for bad in [&b""[..], b"MZ and so on", &kernel()[..HEADER_BYTES + 3]] {
        let error = refused(bad);
        assert!(matches!(error, BootError::Kernel(_)), "{error}");
    }
    let error = refused(&elf(&[code(LOADED, 100)]));
    assert!(matches!(error, BootError::Entry), "{error}");
    for entry in [0x1000, LOADED + 0x10_0000, u64::from(u32::MAX)] {
        let error = refused(&elf(&[code(LOADED, 0x10_0000), note(entry)]));
        assert!(matches!(error, BootError::Outside { .. }), "{error}");
    }
    // Outside of the memory at its beginning, and at its end.
    let error = refused(&elf(&[code(64 << 20, 0x1000), note(64 << 20)]));
    assert!(matches!(error, BootError::Kernel(_)), "{error}");
    let error = refused(&elf(&[code(LOADED, 64 << 20), note(ENTRY)]));
    assert!(matches!(error, BootError::Full { .. }), "{error}");
}

#[test]
fn kernel_and_initramfs_are_never_in_one_place() {
    let guest = Guest::new(64);
    let kernel = elf(&[code(LOADED, 40 << 20), note(ENTRY)]);
    assert!(guest.load(&kernel, Some(&vec![1; 7 << 20]), b"").is_ok());
    let error = guest.load(&kernel, Some(&vec![1; 9 << 20]), b"");
    assert!(matches!(error, Err(BootError::Full { .. })), "{error:?}");
    let error = guest.load(&kernel, Some(&vec![1; 64 << 20]), b"");
    assert!(matches!(error, Err(BootError::Layout(_))), "{error:?}");
}

#[test]
fn a_command_line_that_a_kernel_would_cut_is_refused() {
    let guest = Guest::new(64);
    assert!(guest.load(&kernel(), None, &[b'a'; 2047]).is_ok());
    let error = guest.load(&kernel(), None, &[b'a'; 2048]);
    assert!(matches!(error, Err(BootError::Long { bytes: 2048 })));
    let error = guest.load(&kernel(), None, b"quiet\0debug");
    assert!(matches!(error, Err(BootError::Zero)));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn no_header_is_more_than_an_error(
        at in 0..kernel().len(),
        with in prop::collection::vec(any::<u8>(), 1..9),
    ) {
        let mut changed = kernel();
        for (to, from) in changed.iter_mut().skip(at).zip(with) {
            *to = from;
        }
        // What begins is in the guest's memory, whatever was in the file.
        if let Ok(entry) = Guest::new(64).load(&changed, None, b"") {
            prop_assert!(entry.0 >= 0x10_0000 && entry.0 < 64 << 20);
        }
    }
}
