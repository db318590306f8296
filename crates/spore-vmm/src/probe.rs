//! The guest that tells a KVM that can run others from one that cannot.
//!
//! Some machines have a `/dev/kvm` that emulates what a guest's kernel does, a million instructions
//! a second, and knows not all of them. So a `/dev/kvm` that opens says little, and this runs a
//! guest of a hundred bytes in long mode: a compare-and-exchange of 16 bytes, extended state saved
//! and restored, and a counted loop that comes back every 65,536 rounds to be timed.
//!
//! Each return takes well under a second even where KVM is useless. A KVM that never comes back can
//! be ended from outside only, so whoever calls this does so in a process with a time limit.

use std::os::fd::{AsFd as _, OwnedFd};
use std::time::Duration;

use kvm_bindings::kvm_segment;
use kvm_ioctls::VcpuExit;
use rustix::fs::MemfdFlags;

use crate::clock::Clock;
use crate::kvm::vm::{Vcpu, Vm};
use crate::kvm::{Kvm, KvmError};
use crate::memory::{Gpa, GuestMemory, MapError, OutOfMemory, Region, Sharing, Space};

/// The fewest rounds a second with which a kernel boots in the time that apps are given. Processors
/// do a thousand million, emulation in KVM's place one million.
pub const ROUNDS_PER_S_MIN: u64 = 20_000_000;

/// How long a fast guest is looked at; a slow one is done when it comes back first.
const LOOK: Duration = Duration::from_millis(20);

/// Rounds between two returns.
const CHUNK_ROUNDS: u64 = 0x1_0000;

/// The port that the guest writes to, and what it says there.
const PORT: u16 = PORT_BYTE as u16;
const PORT_BYTE: u8 = 0x80;
const CHUNK_DONE: u8 = 1;
const WRONG: u8 = 2;

const MEMORY: Region = Region {
    start: Gpa(0),
    offset: 0,
    bytes: 0x8000,
};

/// Page tables that map the first 2 MiB to themselves.
const PML4: Gpa = Gpa(0x1000);
const PDPT: Gpa = Gpa(0x2000);
const PD: Gpa = Gpa(0x3000);
const OPERAND: Gpa = Gpa(0x4000);
const XSAVE_AREA: Gpa = Gpa(0x5000);
const ENTRY: Gpa = Gpa(0x7000);

/// x87 and SSE, enabled from outside: what the guest itself enables, some emulations of a processor
/// forget at its next exit, and that is not what is asked here.
const EXTENDED_STATE: u64 = 3;

/// `rdi` is [`OPERAND`], which holds 1 and 2; `rsi` is [`XSAVE_AREA`].
#[rustfmt::skip]
const CODE: &[u8] = &[
    0xb8, 0x01, 0x00, 0x00, 0x00,       //         mov eax, 1
    0xba, 0x02, 0x00, 0x00, 0x00,       //         mov edx, 2
    0xbb, 0x03, 0x00, 0x00, 0x00,       //         mov ebx, 3
    0xb9, 0x04, 0x00, 0x00, 0x00,       //         mov ecx, 4
    0xf0, 0x48, 0x0f, 0xc7, 0x0f,       //         lock cmpxchg16b [rdi]
    0x75, 0x3c,                         //         jne wrong
    0x48, 0x83, 0x3f, 0x03,             //         cmp qword ptr [rdi], 3
    0x75, 0x36,                         //         jne wrong
    0x48, 0x83, 0x7f, 0x08, 0x04,       //         cmp qword ptr [rdi + 8], 4
    0x75, 0x2f,                         //         jne wrong
    0xf3, 0x0f, 0x7e, 0x07,             //         movq xmm0, [rdi]
    0xb8, 0x03, 0x00, 0x00, 0x00,       //         mov eax, EXTENDED_STATE
    0x31, 0xd2,                         //         xor edx, edx
    0x0f, 0xae, 0x26,                   //         xsave [rsi]
    0x66, 0x0f, 0xef, 0xc0,             //         pxor xmm0, xmm0
    0x0f, 0xae, 0x2e,                   //         xrstor [rsi]
    0x66, 0x48, 0x0f, 0x7e, 0xc0,       //         movq rax, xmm0
    0x48, 0x83, 0xf8, 0x03,             //         cmp rax, 3
    0x75, 0x0f,                         //         jne wrong
    0xb9, 0x00, 0x00, 0x01, 0x00,       // chunk:  mov ecx, CHUNK_ROUNDS
    0xff, 0xc9,                         // again:  dec ecx
    0x75, 0xfc,                         //         jnz again
    0xb0, CHUNK_DONE,                   //         mov al, CHUNK_DONE
    0xe6, PORT_BYTE,                    //         out PORT, al
    0xeb, 0xf1,                         //         jmp chunk
    0xb0, WRONG,                        // wrong:  mov al, WRONG
    0xe6, PORT_BYTE,                    //         out PORT, al
    0xf4,                               //         hlt
];

/// Why guests cannot run here.
#[derive(Debug, thiserror::Error)]
pub enum Unusable {
    /// KVM refused something.
    #[error("KVM refuses a small guest")]
    Kvm(#[from] KvmError),
    /// There is no memory for it.
    #[error("there is no memory for a small guest")]
    Memory(#[from] MapError),
    /// Its code lies outside of its memory: the probe itself is wrong.
    #[error("the small guest does not fit into its memory")]
    Layout(#[from] OutOfMemory),
    /// The kernel gave no file for its memory.
    #[error("there is no file for a small guest's memory")]
    File(#[source] rustix::io::Errno),
    /// It ended as no processor ends it.
    #[error("a small guest ended with {exit}: KVM does not run it on the processor")]
    Exit {
        /// KVM's reason.
        exit: String,
    },
    /// An instruction did something else than processors do.
    #[error("instructions of a small guest had wrong results")]
    Wrong,
    /// It runs, and a kernel would take minutes to boot.
    #[error(
        "a small guest does {rounds_per_s} rounds a second, fewer than {ROUNDS_PER_S_MIN}: KVM \
         does not run it on the processor"
    )]
    Slow {
        /// What it does.
        rounds_per_s: u64,
    },
}

/// A KVM that runs guests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usable {
    /// Rounds of a loop of two instructions.
    pub rounds_per_s: u64,
}

/// Runs the small guest.
pub fn probe(kvm: &Kvm, clock: &dyn Clock) -> Result<Usable, Unusable> {
    let memory = memory()?;
    let vm = kvm.create_vm()?;
    vm.set_memory(memory.space(), &[MEMORY])?;
    let mut vcpu = long_mode(kvm, &vm)?;
    let rounds_per_s = time(&mut vcpu, clock)?;
    if rounds_per_s < ROUNDS_PER_S_MIN {
        return Err(Unusable::Slow { rounds_per_s });
    }
    Ok(Usable { rounds_per_s })
}

/// Code, operands and page tables.
fn memory() -> Result<GuestMemory, Unusable> {
    let file: OwnedFd =
        rustix::fs::memfd_create("probe", MemfdFlags::CLOEXEC).map_err(Unusable::File)?;
    rustix::fs::ftruncate(&file, MEMORY.bytes).map_err(Unusable::File)?;
    let space = Space::reserve(MEMORY.bytes)?;
    let memory = space.fill(file.as_fd(), Sharing::Private, &[MEMORY])?;
    // Present and writable; the last maps 2 MiB at once.
    for (table, entry) in [(PML4, PDPT.0 | 0x3), (PDPT, PD.0 | 0x3), (PD, 0x83)] {
        memory.write(table, &entry.to_le_bytes())?;
    }
    memory.write(OPERAND, &1_u64.to_le_bytes())?;
    memory.write(Gpa(OPERAND.0 + 8), &2_u64.to_le_bytes())?;
    memory.write(ENTRY, CODE)?;
    Ok(memory)
}

/// A processor in long mode, about to run the code.
fn long_mode(kvm: &Kvm, vm: &Vm) -> Result<Vcpu, Unusable> {
    let vcpu = vm.create_vcpu(0)?;
    vcpu.set_cpuid(&kvm.supported_cpuid()?)?;
    let mut sregs = vcpu.sregs()?;
    let flat = kvm_segment {
        limit: u32::MAX,
        selector: 0x10,
        // Data, read and write, accessed.
        type_: 3,
        present: 1,
        s: 1,
        db: 1,
        g: 1,
        ..Default::default()
    };
    for segment in [
        &mut sregs.ds,
        &mut sregs.es,
        &mut sregs.fs,
        &mut sregs.gs,
        &mut sregs.ss,
    ] {
        *segment = flat;
    }
    sregs.cs = kvm_segment {
        selector: 0x8,
        // Code, execute and read, accessed; of 64 bits.
        type_: 11,
        db: 0,
        l: 1,
        ..flat
    };
    // PE, MP, ET, NE and PG; PAE, OSFXSR, OSXMMEXCPT and OSXSAVE; LME and LMA.
    sregs.cr0 = 0x8000_0033;
    sregs.cr3 = PML4.0;
    sregs.cr4 = 0x4_0620;
    sregs.efer = 0x500;
    vcpu.set_sregs(&sregs)?;
    let mut xcrs = vcpu.xcrs()?;
    xcrs.xcrs[0].value = EXTENDED_STATE;
    vcpu.set_xcrs(&xcrs)?;
    let mut regs = vcpu.regs()?;
    regs.rip = ENTRY.0;
    regs.rdi = OPERAND.0;
    regs.rsi = XSAVE_AREA.0;
    // The bit that is always set.
    regs.rflags = 2;
    vcpu.set_regs(&regs)?;
    Ok(vcpu)
}

/// Rounds a second of the fastest chunk: in the others the host did something else meanwhile.
fn time(vcpu: &mut Vcpu, clock: &dyn Clock) -> Result<u64, Unusable> {
    // What comes before the first return is KVM's own start.
    come_back(vcpu)?;
    let start = clock.now();
    let (mut before, mut fastest) = (start, Duration::MAX);
    while before.saturating_sub(start) < LOOK {
        come_back(vcpu)?;
        let now = clock.now();
        fastest = fastest.min(now.saturating_sub(before));
        before = now;
    }
    let nanoseconds = fastest.as_nanos().max(1);
    let per_s = u128::from(CHUNK_ROUNDS) * 1_000_000_000 / nanoseconds;
    Ok(u64::try_from(per_s).unwrap_or(u64::MAX))
}

/// Runs the guest until it has done a chunk.
fn come_back(vcpu: &mut Vcpu) -> Result<(), Unusable> {
    match vcpu.run()? {
        VcpuExit::IoOut(PORT, [CHUNK_DONE]) => Ok(()),
        VcpuExit::IoOut(PORT, [WRONG]) => Err(Unusable::Wrong),
        exit => Err(Unusable::Exit {
            exit: format!("{exit:?}"),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::{CODE, ENTRY, MEMORY};

    #[test]
    fn jumps_go_where_the_comments_say() {
        // Each jump's displacement is from the byte behind it.
        let target = |at: usize| at.wrapping_add_signed(isize::from(CODE[at - 1].cast_signed()));
        let wrong = CODE.len() - 5;
        for jump in [0x1b, 0x21, 0x28, 0x48] {
            assert_eq!(CODE[jump - 2], 0x75);
            assert_eq!(target(jump), wrong, "{jump:#x}");
        }
        assert_eq!(target(0x51), 0x4d, "the loop");
        assert_eq!(target(0x57), 0x48, "the next chunk");
        assert!(ENTRY.0 + CODE.len() as u64 <= MEMORY.bytes);
    }
}
