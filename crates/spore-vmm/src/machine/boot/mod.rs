//! Cold start: puts a kernel and what it is told into a guest's memory, as the x86/HVM direct boot
//! ABI (PVH) of Xen has it. Called once, before any processor runs.
//!
//! ```text
//!   ebx ──▶ start info ──▶ memory map
//!                     ├──▶ modules ──▶ the initramfs
//!                     ├──▶ command line
//!                     └──▶ RSDP ──▶ the other tables
//! ```
//!
//! Kernel and initramfs come as descriptors, are read at offsets of ours (a descriptor that others
//! hold too is not moved), and are copied into the guest through a buffer of ours. The platform
//! chose them; all the same nothing in their headers can do more than make this fail. What the
//! guest's first instructions see of the processor is `kvm/x86_64/entry.rs`.

#[cfg(test)]
pub(crate) mod tests;

use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::BorrowedFd;

use linux_loader::loader::elf::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use linux_loader::loader::elf::{Elf, PvhBootCapability};
use linux_loader::loader::{self, KernelLoader as _};
use spore_wire::launch::Incarnation;
use vm_memory::bitmap::BitmapSlice;
use vm_memory::{ByteValued as _, GuestAddress, ReadVolatile, VolatileMemoryError, VolatileSlice};

use super::acpi;
use super::layout::{
    ACPI, COMMAND_LINE, COMMAND_LINE_BYTES_MAX, KERNEL_START, Kind, Layout, LayoutError,
    MEMORY_MAP, MODULES, RESET_VECTOR, START_INFO,
};
use crate::memory::{Gpa, GuestMemory, OutOfMemory};

/// What the start info begins with: "xEn3" with the highest bit of the "E" set.
const MAGIC: u32 = 0x336e_c578;

/// The first version that has a memory map.
const VERSION: u32 = 1;

/// Kinds of memory in the map: the numbers of E820.
const RAM: u32 = 1;
const RESERVED: u32 = 2;

/// `mov al, 0xfe; out 0x64, al; hlt`: the reset line of the keyboard controller.
const RESET_CODE: [u8; 5] = [0xb0, 0xfe, 0xe6, 0x64, 0xf4];

/// What is copied at once.
const CHUNK_BYTES: usize = 64 * 1024;

/// What a machine starts with.
#[derive(Clone, Copy, Debug)]
pub struct Boot<'a> {
    /// An ELF file with a PVH entry.
    pub kernel: BorrowedFd<'a>,
    /// What the kernel unpacks as its first root; `None` for a kernel that needs none.
    pub initramfs: Option<BorrowedFd<'a>>,
    /// What the kernel is told, without a closing zero.
    pub command_line: &'a [u8],
    /// Never given to another guest: by another one, copies know that they are copies.
    pub incarnation: Incarnation,
}

/// Why a machine does not start.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The kernel's file is none that can be loaded.
    #[error("the kernel cannot be loaded: it must be an ELF file (vmlinux) that fits into memory")]
    Kernel(#[source] loader::Error),
    /// It has no way in that we know.
    #[error("the kernel has no PVH entry: it was built without CONFIG_PVH")]
    Entry,
    /// It begins outside of itself.
    #[error("the kernel begins at {entry}, and was loaded from {KERNEL_START} to {end}")]
    Outside {
        /// Where it says that it begins.
        entry: Gpa,
        /// Where what was loaded ends.
        end: Gpa,
    },
    /// Kernel and initramfs do not fit beside each other.
    #[error("the kernel ends at {end}, beyond {limit}: the guest needs more memory")]
    Full {
        /// Where the kernel ends.
        end: Gpa,
        /// Where the initramfs begins, or low memory ends.
        limit: Gpa,
    },
    /// The initramfs alone does not fit.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The initramfs cannot be read.
    #[error("the initramfs cannot be read")]
    Initramfs(#[source] io::Error),
    /// The command line is too long.
    #[error("a command line of {bytes} bytes: fewer than {COMMAND_LINE_BYTES_MAX} are possible")]
    Long {
        /// Of the line.
        bytes: usize,
    },
    /// The kernel would take the line for shorter than it is.
    #[error("the command line has a zero in it")]
    Zero,
    /// The memory is not that of the layout.
    #[error("the guest's memory is not that of its layout")]
    Memory(#[from] OutOfMemory),
}

/// Fills a machine's memory for its start. Gives where its first processor begins.
pub fn load(memory: &GuestMemory, layout: &Layout, boot: &Boot<'_>) -> Result<Gpa, BootError> {
    let line = command_line(boot.command_line)?;
    let module = boot.initramfs.map(|file| place(file, layout)).transpose()?;
    let limit = module.map_or(layout.low_bytes(), |module| module.paddr);
    // The kernel first: what it may have in the low megabyte is not what the guest is told.
    let entry = kernel(memory, boot.kernel, Gpa(limit))?;
    if let (Some(module), Some(file)) = (&module, boot.initramfs) {
        initramfs(memory, file, module)?;
        memory.write(MODULES, module.as_slice())?;
    }
    memory.write(COMMAND_LINE, &line)?;
    memory.write(Gpa(ACPI.start), &acpi::tables(layout))?;
    memory.write(RESET_VECTOR, &RESET_CODE)?;
    let map = memory_map(layout);
    for (number, entry) in (0_u64..).zip(&map) {
        let bytes = entry.as_slice();
        let at = Gpa(MEMORY_MAP.0 + number * bytes.len() as u64);
        memory.write(at, bytes)?;
    }
    memory.write(
        START_INFO,
        start_info(map.len(), module.is_some()).as_slice(),
    )?;
    Ok(entry)
}

/// The line with its closing zero.
fn command_line(line: &[u8]) -> Result<Vec<u8>, BootError> {
    if line.contains(&0) {
        return Err(BootError::Zero);
    }
    let mut closed = line.to_vec();
    closed.push(0);
    if closed.len() as u64 > COMMAND_LINE_BYTES_MAX {
        return Err(BootError::Long { bytes: line.len() });
    }
    Ok(closed)
}

/// Where an initramfs goes.
fn place(file: BorrowedFd<'_>, layout: &Layout) -> Result<hvm_modlist_entry, BootError> {
    let stat = rustix::fs::fstat(file);
    let stat = stat.map_err(|error| BootError::Initramfs(error.into()))?;
    let size = stat.st_size.unsigned_abs();
    Ok(hvm_modlist_entry {
        paddr: layout.initramfs_start(size)?.0,
        size,
        ..Default::default()
    })
}

/// Loads a kernel below `limit`; gives its PVH entry.
fn kernel(memory: &GuestMemory, file: BorrowedFd<'_>, limit: Gpa) -> Result<Gpa, BootError> {
    let mut source = Source::new(file);
    let lowest = Some(GuestAddress(KERNEL_START.0));
    let loaded = Elf::load(memory.backend(), None, &mut source, lowest);
    let loaded = loaded.map_err(BootError::Kernel)?;
    let end = Gpa(loaded.kernel_end);
    if end > limit {
        return Err(BootError::Full { end, limit });
    }
    let PvhBootCapability::PvhEntryPresent(entry) = loaded.pvh_boot_cap else {
        return Err(BootError::Entry);
    };
    let entry = Gpa(entry.0);
    if entry < KERNEL_START || entry >= end {
        return Err(BootError::Outside { entry, end });
    }
    Ok(entry)
}

/// Copies an initramfs to its place.
fn initramfs(
    memory: &GuestMemory,
    file: BorrowedFd<'_>,
    module: &hvm_modlist_entry,
) -> Result<(), BootError> {
    let mut place = memory.slice(Gpa(module.paddr), module.size)?;
    let copied = Source::new(file).read_exact_volatile(&mut place);
    copied.map_err(|error| BootError::Initramfs(io_error(error)))
}

fn io_error(error: VolatileMemoryError) -> io::Error {
    match error {
        VolatileMemoryError::IOError(error) => error,
        other => io::Error::other(other),
    }
}

fn start_info(entries: usize, has_module: bool) -> hvm_start_info {
    hvm_start_info {
        magic: MAGIC,
        version: VERSION,
        nr_modules: u32::from(has_module),
        modlist_paddr: if has_module { MODULES.0 } else { 0 },
        cmdline_paddr: COMMAND_LINE.0,
        rsdp_paddr: ACPI.start,
        memmap_paddr: MEMORY_MAP.0,
        memmap_entries: u32::try_from(entries).expect("a map has a handful of entries"),
        ..Default::default()
    }
}

fn memory_map(layout: &Layout) -> Vec<hvm_memmap_table_entry> {
    let map = layout.memory_map().into_iter();
    map.map(|(range, kind)| hvm_memmap_table_entry {
        addr: range.start,
        size: range.end - range.start,
        type_: match kind {
            Kind::Ram => RAM,
            Kind::Reserved => RESERVED,
        },
        reserved: 0,
    })
    .collect()
}

/// A file that is read from a place of our own.
struct Source<'a> {
    file: BorrowedFd<'a>,
    at: u64,
    buffer: Vec<u8>,
}

impl<'a> Source<'a> {
    const fn new(file: BorrowedFd<'a>) -> Self {
        Self {
            file,
            at: 0,
            buffer: Vec::new(),
        }
    }
}

impl Read for Source<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let count =
            rustix::io::retry_on_intr(|| rustix::io::pread(self.file, &mut *into, self.at))?;
        self.at += count as u64;
        Ok(count)
    }
}

impl Seek for Source<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let at = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::Current(by) => self.at.checked_add_signed(by),
            SeekFrom::End(_) => None,
        };
        self.at = at.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.at)
    }
}

impl ReadVolatile for Source<'_> {
    fn read_volatile<B: BitmapSlice>(
        &mut self,
        into: &mut VolatileSlice<'_, B>,
    ) -> Result<usize, VolatileMemoryError> {
        // All that there is: vm-memory takes a short answer for the end of the file.
        let mut done = 0;
        while done < into.len() {
            let rest = into.offset(done)?;
            self.buffer.resize(CHUNK_BYTES.min(rest.len()), 0);
            let mut buffer = std::mem::take(&mut self.buffer);
            let read = self.read(&mut buffer);
            let count = read.map_err(VolatileMemoryError::IOError)?;
            rest.copy_from(buffer.get(..count).unwrap_or_default());
            self.buffer = buffer;
            if count == 0 {
                break;
            }
            done += count;
        }
        Ok(done)
    }
}
