//! Guests that are forked, and what they are launched with.
//!
//! The small one counts until a word in its memory says that it may stop; then it asks for a reset,
//! which is the only thing that it ever says. It touches three pages, so nearly all of a fork of it
//! is the VMM's and KVM's, and nothing hides behind the guest's own page faults. Both the floor and
//! the VMM tell of the same instruction.

use std::fs::File;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::fs::MemfdFlags;
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use spore_vmm::clock::{Clock as _, Monotonic};
use spore_wire::launch::{
    Begin, FdIndex, Incarnation, Launch, Layer, MemoryOwner, Rates, Scratch, layer_bytes,
};
use spore_wire::vmm::ToVmm;

use crate::linux;
use crate::node::{Vmm, Zygote, listener, rest};

/// Where a guest asks for a reset, and how.
pub(crate) const RESET_PORT: u16 = 0x64;
pub(crate) const RESET: u8 = 0xfe;

const SCRATCH_BYTES: u64 = 64 << 20;
const DISK_BYTES: u64 = 1 << 20;

/// Where the small guest's code and words are; all but two pages of its memory are zeros.
const ENTRY: u32 = 0x20_0000;
const COUNT: u64 = 0x30_0000;
const STOP: u64 = COUNT + 4;

/// What the small guest does.
#[rustfmt::skip]
const CODE: [u8; 23] = [
    0xbe, 0x00, 0x00, 0x30, 0x00, // mov esi, COUNT
    0x31, 0xc9,                   // xor ecx, ecx
    0x41,                         // again: inc ecx
    0x89, 0x0e,                   // mov [esi], ecx
    0x83, 0x7e, 0x04, 0x00,       // cmp dword [esi + 4], 0
    0x74, 0xf7,                   // je again
    0xb0, RESET, 0xe6, 0x64,      // mov al, RESET; out RESET_PORT, al
    0xf4, 0xeb, 0xfd,             // hlt; jmp back
];

/// Between two looks whether a kernel has started its process.
const LOOK: Duration = Duration::from_millis(200);

/// How long a guest may take for anything.
const LIMIT: Duration = Duration::from_secs(120);

/// A file in memory.
pub(crate) fn file(name: &str, bytes: u64) -> Result<OwnedFd> {
    let file = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC)?;
    rustix::fs::ftruncate(&file, bytes)?;
    Ok(file)
}

/// An ELF file with a PVH entry, of one segment with the small guest's code.
fn kernel() -> Result<OwnedFd> {
    let (note, start) = (0x100_u64, 0x200_u64);
    let mut bytes = b"\x7fELF\x02\x01\x01".to_vec();
    bytes.resize(16, 0);
    bytes.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    bytes.extend(u64::from(ENTRY).to_le_bytes());
    bytes.extend(64_u64.to_le_bytes());
    bytes.extend([0; 12]);
    bytes.extend([64, 0, 56, 0, 2, 0, 64, 0, 0, 0, 0, 0]);
    let code = CODE.len() as u64;
    for (kind, at, address, length) in [(1_u32, start, u64::from(ENTRY), code), (4, note, 0, 20)] {
        bytes.extend(kind.to_le_bytes());
        bytes.extend(5_u32.to_le_bytes());
        for number in [at, address, address, length, length, 4] {
            bytes.extend(number.to_le_bytes());
        }
    }
    bytes.resize(usize::try_from(note)?, 0);
    // The entry for 32 bits: XEN_ELFNOTE_PHYS32_ENTRY.
    for number in [4, 4, 18, u32::from_le_bytes(*b"Xen\0"), ENTRY] {
        bytes.extend(number.to_le_bytes());
    }
    bytes.resize(usize::try_from(start)?, 0);
    bytes.extend(CODE);
    let kernel = file("kernel", 0)?;
    rustix::io::pwrite(&kernel, &bytes, 0)?;
    Ok(kernel)
}

/// A guest that was saved: any number are forked of it.
#[derive(Debug)]
pub(crate) struct Source {
    pub(crate) memory_mib: u32,
    pub(crate) state: OwnedFd,
    pub(crate) memory: OwnedFd,
}

impl Source {
    /// The small guest, which says its word as soon as it goes on if it is to.
    pub(crate) fn small(zygote: &mut Zygote, memory_mib: u32, ends: bool) -> Result<Self> {
        let begins = vec![kernel()?, file("initramfs", 4096)?];
        let (vmm, memory) = boot(zygote, memory_mib, begins, "")?;
        let words = File::from(memory.try_clone()?);
        counts(&words, COUNT)?;
        let state = saved(vmm, zygote)?;
        if ends {
            words.write_all_at(&1_u32.to_le_bytes(), STOP)?;
        }
        Ok(Self {
            memory_mib,
            state,
            memory,
        })
    }

    /// Debian's kernel and a process, which says its word as soon as it goes on; `None` without a
    /// kernel.
    pub(crate) fn linux(zygote: &mut Zygote, memory_mib: u32) -> Result<Option<Self>> {
        let Some(begins) = linux::begins()? else {
            return Ok(None);
        };
        let (mut vmm, memory) = boot(zygote, memory_mib, begins, linux::COMMAND_LINE)?;
        let words = File::from(memory.try_clone()?);
        let start = Monotonic.now();
        let page = loop {
            if let Some(page) = linux::page(&words)? {
                break page;
            }
            if Monotonic.now() - start > LIMIT {
                bail!("the kernel does not start its process: {}", vmm.console()?);
            }
            rest(LOOK);
        };
        counts(&words, page + linux::COUNT)?;
        let state = saved(vmm, zygote)?;
        words.write_all_at(&1_u32.to_le_bytes(), page + linux::STOP)?;
        Ok(Some(Self {
            memory_mib,
            state,
            memory,
        }))
    }

    /// What a fork of it is launched with.
    pub(crate) fn fork(&self) -> Result<Given> {
        let begin = Begin::Restore {
            state: FdIndex(1),
            memory: MemoryOwner::Shared,
            ahead: Vec::new(),
        };
        let begins = vec![self.state.try_clone()?];
        Given::new(begin, self.memory_mib, self.memory.try_clone()?, begins)
    }
}

/// Waits until a guest counts there.
fn counts(words: &File, at: u64) -> Result<()> {
    let start = Monotonic.now();
    let mut count = [0; 4];
    while u32::from_le_bytes(count) < 1000 {
        words.read_exact_at(&mut count, at)?;
        ensure!(Monotonic.now() - start < LIMIT, "the guest does not count");
    }
    Ok(())
}

/// A guest that begins with a kernel, and its memory.
fn boot(
    zygote: &mut Zygote,
    memory_mib: u32,
    begins: Vec<OwnedFd>,
    command_line: &str,
) -> Result<(Vmm, OwnedFd)> {
    let memory = file("guest-memory", u64::from(memory_mib) << 20)?;
    let begin = Begin::Boot {
        kernel: FdIndex(1),
        initramfs: FdIndex(2),
        command_line: command_line.to_owned(),
    };
    let given = Given::new(begin, memory_mib, memory.try_clone()?, begins)?;
    let mut vmm = zygote.spawn()?;
    vmm.launch(&given)?;
    vmm.ask(&ToVmm::Resume, &[])?;
    Ok((vmm, memory))
}

/// Saves a guest and ends it.
fn saved(mut vmm: Vmm, zygote: &mut Zygote) -> Result<OwnedFd> {
    vmm.pause()?;
    let state = file("state", 0)?;
    vmm.ask(&ToVmm::Save, &[state.as_fd()])?;
    vmm.quit(zygote)?;
    Ok(state)
}

/// What a guest is launched with, as a node has it ready before it asks.
#[derive(Debug)]
pub(crate) struct Given {
    pub(crate) request: ToVmm,
    fds: Vec<OwnedFd>,
    /// The other end of what is the guest's tap.
    _wire: OwnedFd,
}

/// A layer behind this descriptor.
pub(crate) const fn layer(file: u8) -> Layer {
    Layer {
        file: FdIndex(file),
        key: None,
    }
}

/// An empty layer of a guest's scratch disk.
pub(crate) fn own_layer() -> Result<OwnedFd> {
    file("layer", layer_bytes(SCRATCH_BYTES))
}

impl Given {
    fn new(begin: Begin, memory_mib: u32, memory: OwnedFd, begins: Vec<OwnedFd>) -> Result<Self> {
        let next = u8::try_from(1 + begins.len())?;
        // For a device a tap is a descriptor with a frame in each read and write.
        let (kind, flags) = (SocketType::DGRAM, SocketFlags::CLOEXEC);
        let (tap, wire) = rustix::net::socketpair(AddressFamily::UNIX, kind, flags, None)?;
        let (_address, agent) = listener(SocketType::STREAM)?;
        let blob = Launch {
            vm: "abcdefghijklmnopqrstuvwxya"
                .parse()
                .ok()
                .context("a VM's id")?,
            vcpus: 1,
            memory_mib,
            memory: FdIndex(0),
            begin,
            incarnation: Incarnation::random().ok().context("no chance")?,
            image: FdIndex(next),
            folder: FdIndex(next + 1),
            scratch: Some(Scratch {
                bytes: SCRATCH_BYTES,
                base: None,
                layers: Vec::new(),
                own: layer(next + 2),
            }),
            tap: FdIndex(next + 3),
            mac: [2, 0x53, 0x50, 0, 0, 1],
            agent: FdIndex(next + 4),
            rates: Rates::default(),
        };
        let mut fds = vec![memory];
        fds.extend(begins);
        let disk = || file("disk", DISK_BYTES);
        fds.extend([disk()?, disk()?, own_layer()?, tap, agent]);
        Ok(Self {
            request: ToVmm::Launch(Box::new(blob)),
            fds,
            _wire: wire,
        })
    }

    pub(crate) fn fds(&self) -> Vec<BorrowedFd<'_>> {
        self.fds.iter().map(|fd| fd.as_fd()).collect()
    }
}
