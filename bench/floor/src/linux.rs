//! A guest with Debian's kernel, and one process of a few instructions in place of an init. It
//! counts until a word in its memory says that it may stop, writes a line to the serial port as any
//! process does, and then has the kernel reset the machine at once (SysRq). So a fork of it has
//! ended at its first output, and what it has of its own is no matter of how soon somebody stopped
//! it; the kernel's own line about the reset is in it.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt as _;

use anyhow::Result;

use crate::guest::file;

/// Where `cargo xtask deps` puts it, unless it is told otherwise.
const KERNEL: &str = "/var/lib/spore-deps/guest/vmlinux";

/// `nohz=off` is for the rig (docs/internals/testing.md).
pub(crate) const COMMAND_LINE: &str = "console=ttyS0 panic=-1 reboot=k nohz=off";

/// What the process writes first into a page of its own, in which nothing else is.
const MARK: [u8; 8] = *b"__spore_";

/// Where in that page it counts, and where it looks whether it may stop.
pub(crate) const COUNT: u64 = 8;
pub(crate) const STOP: u64 = 12;

const PAGE_BYTES: u64 = 4096;

/// Where the program is, its names and words behind it, and its page.
const TEXT: u32 = 0x40_1000;
const WORDS: usize = 0x80;
const DATA: u32 = 0x50_0000;

/// Names of a folder, of the file there and of the serial port; what is written to that, and to
/// the file.
const NAMES_AND_WORDS: &[u8; 38] = b"/proc\0/proc/sysrq-trigger\0\0\0/t\0spore\nb";

/// The process.
#[rustfmt::skip]
const CODE: [u8; 120] = [
    0xbf, 0x80, 0x10, 0x40, 0x00, // mov edi, "/proc"
    0x89, 0xfe,                   // mov esi, edi
    0x8d, 0x57, 0x01,             // lea edx, [rdi + 1]: "proc"
    0x45, 0x31, 0xd2,             // xor r10d, r10d
    0xb8, 0xa5, 0x00, 0x00, 0x00, // mov eax, mount
    0x0f, 0x05,                   // syscall
    0xbf, 0x9c, 0x10, 0x40, 0x00, // mov edi, "/t"
    0xbe, 0x01, 0x00, 0x00, 0x00, // mov esi, O_WRONLY
    0xb8, 0x02, 0x00, 0x00, 0x00, // mov eax, open
    0x0f, 0x05,                   // syscall
    0x89, 0xc3,                   // mov ebx, eax
    0xbf, 0x86, 0x10, 0x40, 0x00, // mov edi, "/proc/sysrq-trigger"
    0xb8, 0x02, 0x00, 0x00, 0x00, // mov eax, open
    0x0f, 0x05,                   // syscall
    0x89, 0xc5,                   // mov ebp, eax
    0x48, 0xb8, 0x5f, 0x5f, 0x73, 0x70, 0x6f, 0x72, 0x65, 0x5f, // mov rax, MARK
    0xbe, 0x00, 0x00, 0x50, 0x00, // mov esi, DATA
    0x48, 0x89, 0x06,             // mov [rsi], rax
    0xff, 0x46, 0x08,             // again: inc dword [rsi + COUNT]
    0x83, 0x7e, 0x0c, 0x00,       // cmp dword [rsi + STOP], 0
    0x74, 0xf7,                   // je again
    0x89, 0xdf,                   // mov edi, ebx
    0xbe, 0x9f, 0x10, 0x40, 0x00, // mov esi, "spore\n"
    0xba, 0x06, 0x00, 0x00, 0x00, // mov edx, 6
    0xb8, 0x01, 0x00, 0x00, 0x00, // mov eax, write
    0x0f, 0x05,                   // syscall
    0x89, 0xef,                   // mov edi, ebp
    0xbe, 0xa5, 0x10, 0x40, 0x00, // mov esi, "b"
    0xba, 0x01, 0x00, 0x00, 0x00, // mov edx, 1
    0xb8, 0x01, 0x00, 0x00, 0x00, // mov eax, write
    0x0f, 0x05,                   // syscall
    0xeb, 0xfe,                   // jmp here
];

/// A program of two segments: the code as above, and the page.
fn program() -> Vec<u8> {
    let mut bytes = b"\x7fELF\x02\x01\x01".to_vec();
    bytes.resize(16, 0);
    bytes.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    bytes.extend(u64::from(TEXT).to_le_bytes());
    bytes.extend(64_u64.to_le_bytes());
    bytes.extend([0; 12]);
    bytes.extend([64, 0, 56, 0, 2, 0, 64, 0, 0, 0, 0, 0]);
    let (begin, length) = (PAGE_BYTES, (WORDS + NAMES_AND_WORDS.len()) as u64);
    let (read_and_run, read_and_write) = (5_u32, 6_u32);
    for (flags, at, address, in_file, in_memory) in [
        (read_and_run, begin, TEXT, length, length),
        (read_and_write, begin, DATA, 0, PAGE_BYTES),
    ] {
        bytes.extend(1_u32.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        let address = u64::from(address);
        for number in [at, address, address, in_file, in_memory, PAGE_BYTES] {
            bytes.extend(number.to_le_bytes());
        }
    }
    // A page in the file too, so that its place there and in memory agree.
    bytes.resize(4096, 0);
    bytes.extend(CODE);
    bytes.resize(4096 + WORDS, 0);
    bytes.extend(NAMES_AND_WORDS);
    bytes
}

/// Adds a file to an archive for the kernel (its `Documentation/driver-api/early-userspace/
/// buffer-format.rst`, "newc").
fn add(archive: &mut Vec<u8>, name: &str, mode: u32, device: (u32, u32), bytes: &[u8]) {
    let (length, named) = (bytes.len(), name.len() + 1);
    let (major, minor) = device;
    let head = format!(
        "070701{:08x}{mode:08x}{:08x}{:08x}{:08x}{:08x}{length:08x}{:08x}{:08x}{major:08x}\
         {minor:08x}{named:08x}{:08x}{name}\0",
        0, 0, 0, 1, 0, 0, 0, 0
    );
    for part in [head.as_bytes(), bytes] {
        archive.extend(part);
        archive.resize(archive.len().next_multiple_of(4), 0);
    }
}

/// Kernel and first files; `None` without a kernel.
pub(crate) fn begins() -> Result<Option<Vec<OwnedFd>>> {
    let Ok(kernel) = File::open(KERNEL) else {
        return Ok(None);
    };
    let mut archive = Vec::new();
    add(&mut archive, "init", 0o100_755, (0, 0), &program());
    add(&mut archive, "t", 0o020_600, (4, 64), &[]);
    add(&mut archive, "proc", 0o040_755, (0, 0), &[]);
    add(&mut archive, "TRAILER!!!", 0, (0, 0), &[]);
    let initramfs = file("initramfs", 0)?;
    rustix::io::pwrite(&initramfs, &archive, 0)?;
    Ok(Some(vec![kernel.into(), initramfs]))
}

/// Where in a guest's memory the process has its page, if it runs.
pub(crate) fn page(memory: &File) -> Result<Option<u64>> {
    let mut piece = vec![0; 1 << 20];
    let (mut at, end) = (0, memory.metadata()?.len());
    while at < end {
        memory.read_exact_at(&mut piece, at)?;
        let mut pages = (at..).step_by(4096).zip(piece.chunks(4096));
        if let Some((found, _)) = pages.find(|(_, page)| page.starts_with(&MARK)) {
            return Ok(Some(found));
        }
        at += piece.len() as u64;
    }
    Ok(None)
}
