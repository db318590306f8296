//! A kernel of a few instructions, for tests whose guest is not Linux.

use std::os::fd::OwnedFd;

use rustix::fs::MemfdFlags;

/// Where its instructions are, and where it begins: in 32 bits, flat, without paging.
pub(crate) const ENTRY: u32 = 0x20_0000;

/// An ELF file with a PVH entry, of one segment.
pub(crate) fn kernel(code: &[u8]) -> OwnedFd {
    let mut bytes = b"\x7fELF\x02\x01\x01".to_vec();
    bytes.resize(16, 0);
    bytes.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    bytes.extend(u64::from(ENTRY).to_le_bytes());
    bytes.extend(64_u64.to_le_bytes());
    bytes.extend([0; 12]);
    bytes.extend([64, 0, 56, 0, 2, 0, 64, 0, 0, 0, 0, 0]);
    let (note, at) = (0x100_u64, 0x200_u64);
    for (kind, at, address, length) in [
        (1_u32, at, u64::from(ENTRY), code.len() as u64),
        (4, note, 0, 20),
    ] {
        bytes.extend(kind.to_le_bytes());
        bytes.extend(5_u32.to_le_bytes());
        for number in [at, address, address, length, length, 4] {
            bytes.extend(number.to_le_bytes());
        }
    }
    bytes.resize(0x100, 0);
    // The entry for 32 bits: XEN_ELFNOTE_PHYS32_ENTRY.
    for number in [4, 4, 18, u32::from_le_bytes(*b"Xen\0"), ENTRY] {
        bytes.extend(number.to_le_bytes());
    }
    bytes.resize(0x200, 0);
    bytes.extend(code);
    let kernel = rustix::fs::memfd_create("kernel", MemfdFlags::CLOEXEC).unwrap();
    let written = rustix::io::pwrite(&kernel, &bytes, 0).unwrap();
    assert_eq!(written, bytes.len());
    kernel
}
