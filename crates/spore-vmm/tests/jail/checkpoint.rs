//! Checkpoints of a guest that goes on: a frozen copy of its VMM, and what the VMM is afterwards.
//! The guest writes to the same pages over and over; its memory is read as the node reads it.

use std::fs::{self, File};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::time::Duration;

use rustix::net::{AddressFamily, SocketFlags, SocketType};
use spore_vmm::clock::{Clock as _, Monotonic};
use spore_wire::launch::{Begin, FdIndex, MemoryOwner};
use spore_wire::vmm::ToVmm;

use crate::launch::{Control, LIMIT, PROGRAM, check_threads, file, given, usable};
use crate::node::{Talk, Vmm, Zygote, wait_for};
use crate::process::Process;
use crate::tiny::kernel;

const PAGE_BYTES: u64 = 4096;
const MIB: u64 = 1 << 20;

/// How often it has been through its pages; how many it writes to, and how many it reads before.
const PASSES: u64 = 0x30_0000;
const WRITES: u64 = 0x30_0004;
const READS: u64 = 0x30_0008;

/// The first of its pages.
const PAGES: u64 = 0x40_0000;

/// Reads from pages, writes the number of the pass to pages, and again.
#[rustfmt::skip]
const CODE: [u8; 52] = [
    0xbe, 0x00, 0x00, 0x30, 0x00,       // mov esi, PASSES
    0x31, 0xd2,                         // xor edx, edx
    0xbf, 0x00, 0x00, 0x40, 0x00,       // again: mov edi, PAGES
    0x8b, 0x4e, 0x08, 0xe3, 0x0b,       // mov ecx, [READS]; jecxz write
    0x8b, 0x07,                         // read: mov eax, [edi]
    0x81, 0xc7, 0x00, 0x10, 0x00, 0x00, // add edi, 0x1000
    0x49, 0x75, 0xf5,                   // dec ecx; jnz read
    0xbf, 0x00, 0x00, 0x40, 0x00,       // write: mov edi, PAGES
    0x8b, 0x4e, 0x04, 0x42,             // mov ecx, [WRITES]; inc edx
    0x89, 0x17,                         // next: mov [edi], edx
    0x81, 0xc7, 0x00, 0x10, 0x00, 0x00, // add edi, 0x1000
    0x49, 0x75, 0xf5,                   // dec ecx; jnz next
    0xff, 0x06, 0xeb, 0xd3,             // inc dword [PASSES]; jmp again
];

/// The guest, by its size and by what it does.
#[derive(Clone, Copy)]
struct Shape {
    memory_mib: u32,
    writes: u32,
    reads: u32,
}

impl Shape {
    const fn bytes(self) -> u64 {
        self.memory_mib as u64 * MIB
    }
}

/// One that boots; it is never let run.
fn booted(control: &mut Control<'_>, shape: Shape) -> (OwnedFd, OwnedFd) {
    let memory = file(shape.bytes());
    let begin = Begin::Boot {
        kernel: FdIndex(1),
        initramfs: FdIndex(2),
        command_line: String::new(),
    };
    let begins = vec![kernel(&CODE), file(PAGE_BYTES)];
    let mut given = given(begin, memory.try_clone().unwrap(), begins);
    (given.blob.memory_mib, given.blob.vcpus) = (shape.memory_mib, 1);
    control.launch(&given).unwrap();
    let state = file(0);
    control.asks(&ToVmm::Save, &[state.as_fd()]);
    for (at, word) in [(WRITES, shape.writes), (READS, shape.reads)] {
        rustix::io::pwrite(&memory, &word.to_le_bytes(), at).unwrap();
    }
    (memory, state)
}

/// A fork that runs, in a VMM of its own.
fn forked<'a>(zygote: &'a Zygote, vmm: &Vmm, shape: Shape) -> Control<'a> {
    let source = zygote.spawn(1);
    let mut control = Control::new(zygote, &source);
    let (memory, state) = booted(&mut control, shape);
    let socket = pair().0;
    let refused = control.tries(&FREEZE, &[socket.as_fd()]).unwrap_err();
    assert!(refused.contains("does not stand still"), "{refused}");
    control.quit(&source);
    let begin = Begin::Restore {
        state: FdIndex(1),
        memory: MemoryOwner::Shared,
        ahead: Vec::new(),
    };
    let mut given = given(begin, memory, vec![state]);
    (given.blob.memory_mib, given.blob.vcpus) = (shape.memory_mib, 1);
    let mut control = Control::new(zygote, vmm);
    control.launch(&given).unwrap();
    control.asks(&ToVmm::Resume, &[]);
    control
}

const FREEZE: ToVmm = ToVmm::Freeze { limit_ms: 300_000 };
const PAUSE: ToVmm = ToVmm::Pause { limit_ms: 60_000 };

fn pair() -> (OwnedFd, OwnedFd) {
    let (kind, flags) = (SocketType::SEQPACKET, SocketFlags::CLOEXEC);
    rustix::net::socketpair(AddressFamily::UNIX, kind, flags, None).unwrap()
}

/// A guest's memory in a process.
struct Seen {
    memory: File,
    pagemap: File,
    start: u64,
    bytes: u64,
}

impl Seen {
    fn new(of: Process, bytes: u64) -> Self {
        let path = |name: &str| format!("/proc/{}/{name}", of.0);
        let maps = fs::read_to_string(path("maps")).unwrap();
        let found = maps.lines().find_map(|line| {
            let (range, rest) = line.split_once(' ')?;
            let (from, to) = range.split_once('-')?;
            let [from, to] = [from, to].map(|end| u64::from_str_radix(end, 16).unwrap());
            (to - from == bytes && rest.starts_with("rw-p") && rest.contains("/memfd:guest"))
                .then_some(from)
        });
        Self {
            memory: File::open(path("mem")).unwrap(),
            pagemap: File::open(path("pagemap")).unwrap(),
            start: found.unwrap_or_else(|| panic!("{maps}")),
            bytes,
        }
    }

    fn word(&self, at: u64) -> u32 {
        let mut word = [0; 4];
        self.memory
            .read_exact_at(&mut word, self.start + at)
            .unwrap();
        u32::from_le_bytes(word)
    }

    /// The pages that are the process's own, as runs of them, and what is in them.
    fn own(&self) -> (Vec<(u64, u64)>, Vec<u8>) {
        let mut entries = vec![0; usize::try_from(self.bytes / PAGE_BYTES).unwrap() * 8];
        let at = self.start / PAGE_BYTES * 8;
        self.pagemap.read_exact_at(&mut entries, at).unwrap();
        let mut runs: Vec<(u64, u64)> = Vec::new();
        for (page, entry) in (0..).zip(entries.as_chunks::<8>().0) {
            // Present, and no page of the file.
            if u64::from_ne_bytes(*entry) >> 61 & 0b101 == 0b100 {
                match runs.last_mut() {
                    Some((first, count)) if *first + *count == page => *count += 1,
                    _ => runs.push((page, 1)),
                }
            }
        }
        let total: u64 = runs.iter().map(|(_, count)| count * PAGE_BYTES).sum();
        let mut read = vec![0; usize::try_from(total).unwrap()];
        let mut rest = read.as_mut_slice();
        for (first, count) in &runs {
            let (now, behind) = rest.split_at_mut(usize::try_from(count * PAGE_BYTES).unwrap());
            let at = self.start + first * PAGE_BYTES;
            self.memory.read_exact_at(now, at).unwrap();
            rest = behind;
        }
        (runs, read)
    }

    /// Waits for so many more passes; gives how long they took.
    fn passes(&self, more: u32) -> Duration {
        let (start, before) = (Monotonic.now(), self.word(PASSES));
        loop {
            let took = Monotonic.now() - start;
            if self.word(PASSES).wrapping_sub(before) >= more {
                return took;
            }
            assert!(took < LIMIT, "the guest stands still");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// A frozen copy, and the socket that it lives by.
fn freeze(control: &mut Control<'_>) -> Talk {
    let (theirs, ours) = pair();
    control.asks(&FREEZE, &[theirs.as_fd()]);
    Talk(ours)
}

/// Every page has the number of the last pass or the one before, which has not come further.
fn check_pages(seen: &Seen, shape: Shape) {
    let word = |page: u32| seen.word(PAGES + u64::from(page) * PAGE_BYTES);
    let words: Vec<u32> = (0..shape.writes).map(word).collect();
    assert!(words.is_sorted_by(|one, next| one >= next), "{words:?}");
    assert!(words[0] - words[words.len() - 1] <= 1, "{words:?}");
    let passes = seen.word(PASSES);
    assert!(words[0] - passes <= 1, "{passes} {}", words[0]);
}

/// The medians, since any one is as long as the host likes.
fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

pub(crate) fn source_keeps_its_uid_filter_and_speed_after_checkpoint() {
    let kvm = match usable() {
        Ok(kvm) => kvm,
        Err(why) => return println!("SKIPPED: {why}"),
    };
    let shape = Shape {
        memory_mib: 64,
        writes: 2048,
        reads: 0,
    };
    let zygote = Zygote::start(Path::new(PROGRAM), &["zygote", "--uids"], Some(kvm));
    let vmm = zygote.spawn(2);
    let mut control = forked(&zygote, &vmm, shape);
    let seen = Seen::new(vmm.process, shape.bytes());
    let speed = || median((0..7).map(|_| seen.passes(10_000)).collect());
    seen.passes(10);
    let before = (speed(), vmm.process.open());
    for _ in 0..3 {
        control.asks(&PAUSE, &[]);
        let copy = freeze(&mut control);
        let at = seen.word(PASSES);
        control.asks(&ToVmm::Resume, &[]);
        wait_for(copy.0.as_fd());
        let frozen = vmm.process.child();
        frozen.check_jail(vmm.uid);
        frozen.check_vm(
            frozen
                .status("NSpid")
                .split(' ')
                .nth(1)
                .unwrap()
                .parse()
                .unwrap(),
        );
        assert_eq!(frozen.open().len(), 2, "{:?}", frozen.open());
        seen.passes(3);
        let then = Seen::new(frozen, shape.bytes());
        let (runs, read) = then.own();
        assert!(
            runs.contains(&(PAGES / PAGE_BYTES, shape.writes.into())),
            "{runs:?}"
        );
        check_pages(&then, shape);
        assert_eq!(then.word(PASSES), at);
        assert_eq!(then.own(), (runs, read), "it does not stand still");
        drop(copy);
        frozen.wait_end();
    }
    seen.passes(10);
    vmm.process.check_jail(vmm.uid);
    vmm.process.check_vm(2);
    check_threads(&vmm, 1);
    let after = (speed(), vmm.process.open());
    println!(
        "10,000 passes took {:?}, and {:?} afterwards",
        before.0, after.0
    );
    assert!(after.0 < 2 * before.0, "{before:?} {after:?}");
    assert_eq!(after.1, before.1);
    assert_eq!(vmm.process.children(), []);

    // A copy is whole whatever becomes of its source, and KVM's VM is not held by it.
    control.asks(&PAUSE, &[]);
    let copy = freeze(&mut control);
    wait_for(copy.0.as_fd());
    let frozen = Seen::new(vmm.process.child(), shape.bytes());
    vmm.kill();
    zygote.waits_end(&vmm);
    check_pages(&frozen, shape);
    drop(copy);
    zygote.waits_gone(&vmm);
    zygote.close();
}

/// How a checkpoint's memory is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum By {
    /// Not at all: an empty pause.
    Nothing,
    /// Read from the VMM in the pause.
    Pause,
    /// Read from a frozen copy behind the pause.
    Copy,
}

/// One checkpoint: the pause, all of it, and the next two passes of the guest.
fn one(control: &mut Control<'_>, vmm: &Vmm, seen: &Seen, by: By) -> [Duration; 3] {
    let state = file(0);
    let start = Monotonic.now();
    control.asks(&PAUSE, &[]);
    if by != By::Nothing {
        control.asks(&ToVmm::Save, &[state.as_fd()]);
    }
    let read = (by == By::Pause).then(|| seen.own());
    let copy = (by == By::Copy).then(|| freeze(control));
    control.asks(&ToVmm::Resume, &[]);
    let paused = Monotonic.now() - start;
    std::thread::scope(|scope| {
        let next = scope.spawn(|| seen.passes(2));
        if let Some(copy) = &copy {
            wait_for(copy.0.as_fd());
            let own = Seen::new(vmm.process.child(), seen.bytes).own();
            assert!(!own.0.is_empty());
        }
        let ended = copy.is_some().then(|| vmm.process.child());
        drop(copy);
        if let Some(ended) = ended {
            ended.wait_end();
        }
        let total = Monotonic.now() - start;
        drop(read);
        [paused, total, next.join().unwrap()]
    })
}

/// The figures of docs/adr/0005: not a test, but run like one where somebody asks for it.
pub(crate) fn measure_checkpoints() {
    const ROUNDS: usize = 7;
    let kvm = match usable() {
        Ok(kvm) => kvm,
        Err(why) => return println!("SKIPPED: {why}"),
    };
    let zygote = Zygote::start(Path::new(PROGRAM), &["zygote", "--uids"], Some(kvm));
    let rows = [
        (128, 2, 0),
        (128, 2, 100),
        (1024, 2, 0),
        (1024, 2, 960),
        (512, 8, 0),
        (512, 32, 0),
        (512, 256, 0),
    ];
    for (number, (memory_mib, writes, reads)) in (0..).zip(rows) {
        let shape = Shape {
            memory_mib,
            writes: writes * 256,
            reads: reads * 256,
        };
        let vmm = zygote.spawn(2 + number);
        let mut control = forked(&zygote, &vmm, shape);
        let seen = Seen::new(vmm.process, shape.bytes());
        seen.passes(3);
        let mut all = [By::Nothing, By::Pause, By::Copy].map(|by| (by, Vec::new()));
        let mut steady = Vec::new();
        for _ in 0..ROUNDS {
            for (by, figures) in &mut all {
                steady.push(seen.passes(2));
                figures.push(one(&mut control, &vmm, &seen, *by));
            }
        }
        let steady = median(steady);
        println!("{memory_mib} MiB, {writes} written, {reads} read: 2 passes {steady:?}");
        for (by, figures) in &all {
            let of = |at: usize| median(figures.iter().map(|figure| figure[at]).collect());
            let pauses: Vec<_> = figures.iter().map(|figure| figure[0]).collect();
            println!(
                "  {by:?}: pause {:?}, total {:?}, next 2 passes {:?}; pauses {pauses:?}",
                of(0),
                of(1),
                of(2),
            );
        }
        control.quit(&vmm);
    }
    zygote.close();
}
