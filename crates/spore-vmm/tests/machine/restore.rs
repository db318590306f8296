//! Machines that go on where others were saved: a guest of a few instructions many times over, and
//! Debian's kernel in the midst of its start.

use std::os::fd::{AsFd as _, OwnedFd};
use std::time::Duration;

use spore_vmm::clock::{Clock as _, Monotonic};
use spore_vmm::device::rate::Limit;
use spore_vmm::device::virtio::net::{Net, Tap};
use spore_vmm::device::virtio::rng::{self, Rng};
use spore_vmm::end::End;
use spore_vmm::kvm::Kvm;
use spore_vmm::machine::acpi::GENERATION;
use spore_vmm::machine::bare::Bare;
use spore_vmm::machine::board::{Board, BoardError};
use spore_vmm::machine::boot::Boot;
use spore_vmm::machine::layout::{LAYOUT, Layout, Slot};
use spore_vmm::machine::save::SaveError;
use spore_vmm::machine::saved::SavedMachine;
use spore_vmm::machine::{Machine, StartError};
use spore_vmm::memory::{Gpa, Sharing};
use spore_vmm::snapshot::format::{FORMAT, Tag};
use spore_vmm::snapshot::kind::Kind;
use spore_wire::cause::chain;
use spore_wire::launch::Incarnation;

use crate::boot::{BYTES, Host, LIMIT, NO_NETWORK, is_its_end, says, text, with, with_kernel};
use crate::tiny::{ENTRY, kernel};
use crate::{file, usable};

const FORKS: u8 = 10;

/// What the tiny guest has, and where its words are.
const SMALL: u32 = 64;
const COUNT: Gpa = Gpa(0x30_0000);
const STOP: Gpa = Gpa(0x30_0004);
const NAME: Gpa = Gpa(0x30_0008);

/// Counts in a register and in memory until it is told to stop; says its name and resets.
#[rustfmt::skip]
const CODE: [u8; 31] = [
    0xbe, 0x00, 0x00, 0x30, 0x00, // mov esi, 0x300000
    0x31, 0xc9,                   // xor ecx, ecx
    0x41,                         // again: inc ecx
    0x89, 0x0e,                   // mov [esi], ecx
    0x83, 0x7e, 0x04, 0x00,       // cmp dword [esi + 4], 0
    0x74, 0xf7,                   // je again
    0x66, 0xba, 0xf8, 0x03,       // mov dx, 0x3f8
    0x8a, 0x46, 0x08,             // mov al, [esi + 8]
    0xee,                         // out dx, al
    0xb0, 0xfe, 0xe6, 0x64,       // mov al, 0xfe; out 0x64, al
    0xf4, 0xeb, 0xfd,             // hlt; jmp back
];

fn entropy(board: &mut Board<'_>) -> Result<(), BoardError> {
    board.plug(Slot::Rng, Rng::new(rng::host))
}

/// The tiny guest, and its memory.
pub(crate) fn tiny(kvm: &Kvm, vcpus: u8) -> (Machine, OwnedFd) {
    let layout = Layout::new(SMALL, vcpus).unwrap();
    let (kernel, memory) = (kernel(&CODE), file(layout.memory_bytes()));
    let boot = Boot {
        kernel: kernel.as_fd(),
        initramfs: None,
        command_line: b"",
        incarnation: Incarnation::from_bytes([1; 16]),
    };
    let machine = Machine::boot(kvm, &layout, memory.as_fd(), &boot, entropy);
    (machine.unwrap(), memory)
}

/// The number there.
pub(crate) fn word(machine: &Machine, at: Gpa) -> u32 {
    let mut bytes = [0; 4];
    machine.memory().read(at, &mut bytes).unwrap();
    u32::from_le_bytes(bytes)
}

/// Lets it run until it has counted further.
pub(crate) fn counts(machine: &Machine) {
    let before = word(machine, COUNT);
    let start = Monotonic.now();
    machine.resume();
    while word(machine, COUNT) < before.saturating_add(1000) {
        assert!(Monotonic.now() - start < LIMIT, "stuck at {before}");
        std::thread::yield_now();
    }
}

/// Tells it to say its name and stop.
fn stop(machine: &Machine, name: u8) {
    machine.memory().write(NAME, &[name]).unwrap();
    machine.memory().write(STOP, &[1]).unwrap();
    let end = machine.wait();
    assert!(matches!(*end, End::Reset), "{end}");
    assert_eq!(machine.output().bytes, [name]);
}

fn copy(file_of: &OwnedFd, bytes: u64) -> OwnedFd {
    let (copied, mut at) = (file(bytes), 0);
    let mut chunk = vec![0; 1 << 20];
    while at < bytes {
        let count = rustix::io::pread(file_of, &mut chunk, at).unwrap();
        if chunk[..count].iter().any(|byte| *byte != 0) {
            rustix::io::pwrite(&copied, &chunk[..count], at).unwrap();
        }
        at += count as u64;
    }
    copied
}

fn restore(
    kvm: &Kvm,
    state: &[u8],
    memory: &OwnedFd,
    incarnation: [u8; 16],
) -> Result<Machine, StartError> {
    let incarnation = Incarnation::from_bytes(incarnation);
    let memory = memory.as_fd();
    Machine::restore(kvm, state, memory, Sharing::Private, incarnation, entropy)
}

#[test]
fn ten_forks_of_one_guest_go_on_and_see_nothing_of_each_other() {
    let Some(kvm) = usable() else { return };
    let (source, memory) = tiny(&kvm, 1);
    counts(&source);
    source.pause(LIMIT).unwrap();
    let state = source.save().unwrap();
    println!("{} bytes", state.len());
    let saved = SavedMachine::read(&state).unwrap();
    let (rcx, rip) = (saved.vcpus[0].regs.rcx, saved.vcpus[0].regs.rip);
    assert!(
        (u64::from(ENTRY)..u64::from(ENTRY) + 31).contains(&rip),
        "{rip:#x}"
    );
    drop(source);
    let forks: Vec<Machine> = (0..FORKS)
        .map(|number| {
            let start = Monotonic.now();
            let fork = restore(&kvm, &state, &memory, [number + 2; 16]).unwrap();
            println!("fork {number} is there after {:?}", Monotonic.now() - start);
            fork
        })
        .collect();
    for (number, fork) in (0..).zip(&forks) {
        let mut generation = [0; 16];
        fork.memory().read(GENERATION, &mut generation).unwrap();
        assert_eq!(generation, [number + 2; 16]);
        assert!(u64::from(word(fork, COUNT)).abs_diff(rcx) <= 1);
        counts(fork);
    }
    for (number, fork) in (0..).zip(&forks) {
        stop(fork, b'a' + number);
    }
    let mut bytes = [0; 12];
    rustix::io::pread(&memory, &mut bytes, COUNT.0).unwrap();
    assert!(u64::from_le_bytes(bytes[..8].try_into().unwrap()).abs_diff(rcx) <= 1);
    assert_eq!(bytes[4..], [0; 8], "the file is as it was");
}

#[test]
fn a_saved_guest_is_as_it_was_and_goes_on_beside_its_fork() {
    let Some(kvm) = usable() else { return };
    let (source, memory) = tiny(&kvm, 2);
    counts(&source);
    assert!(matches!(source.save(), Err(SaveError::Moves)));
    source.pause(LIMIT).unwrap();
    let state = source.save().unwrap();
    let again = source.save().unwrap();
    assert_eq!(state.len(), again.len());
    let memory = copy(&memory, u64::from(SMALL) << 20);
    let fork = restore(&kvm, &state, &memory, [9; 16]).unwrap();
    counts(&source);
    counts(&fork);
    source.pause(LIMIT).unwrap();
    counts(&source);
    stop(&source, b's');
    assert!(matches!(source.save(), Err(SaveError::Moves)));
    stop(&fork, b'f');
}

#[test]
fn a_fork_of_a_fork_goes_on_and_its_time_too() {
    let Some(kvm) = usable() else { return };
    let (source, memory) = tiny(&kvm, 2);
    counts(&source);
    source.pause(LIMIT).unwrap();
    let first = source.save().unwrap();
    std::thread::sleep(Duration::from_secs(2));
    let fork = restore(&kvm, &first, &memory, [2; 16]).unwrap();
    fork.pause(LIMIT).unwrap();
    let second = fork.save().unwrap();
    let (before, after) = (
        SavedMachine::read(&first).unwrap(),
        SavedMachine::read(&second).unwrap(),
    );
    let clock = after.vm.clock.clock.checked_sub(before.vm.clock.clock);
    let clock = Duration::from_nanos(clock.expect("the clock went back"));
    assert!(clock < Duration::from_millis(1500), "{clock:?}");
    let khz = u64::from(before.tsc_khz);
    assert_eq!(before.tsc_khz, after.tsc_khz);
    for (one, two) in before.vcpus.iter().zip(&after.vcpus) {
        assert_eq!(one.tsc_offset, before.vcpus[0].tsc_offset);
        assert_eq!(two.tsc_offset, after.vcpus[0].tsc_offset);
        let ticks = two.tsc.checked_sub(one.tsc).expect("the TSC went back");
        assert!(ticks / khz < 1500, "{} ms", ticks / khz);
        assert_eq!(one.regs, two.regs);
        assert_eq!(one.sregs, two.sregs);
        assert_eq!(one.lapic.regs[..0x380], two.lapic.regs[..0x380]);
        let no_time = |index: u32| index != 0x6e0;
        let values = |state: &spore_vmm::kvm::x86_64::state::VcpuState| -> Vec<(u32, u64)> {
            let entries = state.msrs.iter().filter(|entry| no_time(entry.index));
            entries.map(|entry| (entry.index, entry.data)).collect()
        };
        assert_eq!(values(one), values(two));
    }
    fork.resume();
    counts(&fork);
    stop(&fork, b'x');
}

#[test]
fn a_guest_whose_memory_is_its_own_goes_on_in_its_file() {
    let Some(kvm) = usable() else { return };
    let (source, memory) = tiny(&kvm, 1);
    counts(&source);
    source.pause(LIMIT).unwrap();
    let state = source.save().unwrap();
    drop(source);
    let incarnation = Incarnation::from_bytes([7; 16]);
    let memory = memory.as_fd();
    let again = Machine::restore(&kvm, &state, memory, Sharing::Shared, incarnation, entropy);
    let again = again.unwrap();
    counts(&again);
    stop(&again, b'o');
    let mut bytes = [0; 16];
    rustix::io::pread(memory, &mut bytes, GENERATION.0).unwrap();
    assert_eq!(bytes, [7; 16]);
    rustix::io::pread(memory, &mut bytes[..1], NAME.0).unwrap();
    assert_eq!(bytes[0], b'o');
}

/// Each difference by itself: of size, form, map, and of a part's own version. What was found is
/// named, with what it should be.
#[test]
fn snapshot_of_another_layout_is_refused() {
    let Some(kvm) = usable() else { return };
    let (source, memory) = tiny(&kvm, 1);
    source.pause(LIMIT).unwrap();
    let state = source.save().unwrap();
    let one = Incarnation::from_bytes([1; 16]);
    for (memory_mib, vcpus) in [(SMALL, 2), (SMALL + 1, 1)] {
        let other = Layout::new(memory_mib, vcpus).unwrap();
        let bare = Bare::new(&kvm, &other).unwrap();
        let saved = SavedMachine::read(&state).unwrap();
        let error = bare.restore(saved, memory.as_fd(), Sharing::Private, one, entropy);
        let said = format!(
            "a machine of {memory_mib} MiB and {vcpus} processors where the guest was saved in \
             one of 64 MiB and 1 processors"
        );
        assert_eq!(error.unwrap_err().to_string(), said);
    }
    for (at, words) in [
        (0, "this is no saved machine".to_owned()),
        (
            4,
            format!(
                "a saved machine of form {}: this version reads {FORMAT}",
                FORMAT + 1
            ),
        ),
        (
            8,
            format!(
                "a saved machine of layout {}: this version has {LAYOUT}",
                LAYOUT + 1
            ),
        ),
        (
            14,
            "section 1.0 (machine) has version 2: this version reads 1".to_owned(),
        ),
    ] {
        let mut other = state.clone();
        other[at] += 1;
        assert_eq!(
            chain(&restore(&kvm, &other, &memory, [1; 16]).unwrap_err()),
            words
        );
    }
}

#[test]
fn a_memory_or_devices_of_another_size_or_kind_are_refused() {
    let Some(kvm) = usable() else { return };
    let (source, memory) = tiny(&kvm, 1);
    source.pause(LIMIT).unwrap();
    let state = source.save().unwrap();
    let one = Incarnation::from_bytes([1; 16]);
    let short = file(1 << 20);
    let said = chain(&restore(&kvm, &state, &short, [1; 16]).unwrap_err());
    assert!(
        said.contains("has 1048576 bytes where the guest has 67108864"),
        "{said}"
    );
    let nothing = |_board: &mut Board<'_>| Ok(());
    let bare = Machine::restore(&kvm, &state, memory.as_fd(), Sharing::Private, one, nothing);
    let said = chain(&bare.unwrap_err());
    assert!(
        said.contains("[] where the guest was saved with [Rng]"),
        "{said}"
    );
    let more = |board: &mut Board<'_>| {
        let (clock, wire) = (Box::new(Monotonic), file(0));
        let tap = Tap::new(wire, 12).unwrap();
        let none = Limit::default;
        board.plug(
            Slot::Net,
            Net::new(Box::new(tap), [2; 6], none(), none(), clock),
        )?;
        entropy(board)
    };
    let other = Machine::restore(&kvm, &state, memory.as_fd(), Sharing::Private, one, more);
    let said = chain(&other.unwrap_err());
    assert!(
        said.contains("slot net is not the one that the guest was saved with"),
        "{said}"
    );
    // What a process that waits has made ahead is as good.
    let bare = Bare::new(&kvm, &Layout::new(SMALL, 1).unwrap()).unwrap();
    let saved = SavedMachine::read(&state).unwrap();
    let fork = bare.restore(saved, memory.as_fd(), Sharing::Private, one, entropy);
    let fork = fork.unwrap();
    counts(&fork);
    stop(&fork, b'p');
}

/// Changes a section of a saved machine, and its checksum with it.
fn changed(state: &[u8], tag: Tag, change: impl FnOnce(&mut [u8])) -> Vec<u8> {
    let (mut state, mut at) = (state.to_vec(), 12);
    loop {
        let number = |at: usize| u32::from_le_bytes(state[at..at + 4].try_into().unwrap());
        let end = at + 12 + usize::try_from(number(at + 4)).unwrap();
        if state[at..at + 2] == [tag.kind, tag.number] {
            change(&mut state[at + 12..end]);
            let crc = crc32fast::hash(&state[at + 12..end]);
            state[at + 8..at + 12].copy_from_slice(&crc.to_le_bytes());
            return state;
        }
        at = end;
    }
}

#[test]
fn a_guest_that_wants_what_this_host_has_not_is_refused_with_the_reason() {
    let Some(kvm) = usable() else { return };
    let (source, memory) = tiny(&kvm, 1);
    source.pause(LIMIT).unwrap();
    let state = source.save().unwrap();
    let refused = |state: &[u8]| chain(&restore(&kvm, state, &memory, [1; 16]).unwrap_err());
    // The first leaf's vendor; each leaf is function, index, flags, then four registers.
    let said = refused(&changed(&state, Kind::Vcpu.of(0), |bytes| {
        assert_eq!(bytes[4..8], [0; 4]);
        bytes[20] ^= 1;
    }));
    assert!(said.contains("another vendor"), "{said}");
    let said = refused(&changed(&state, Kind::Vcpu.of(0), |bytes| {
        let leaf = bytes[4..].chunks_exact_mut(40);
        let mut leaf = leaf.skip_while(|leaf| leaf[..8] != [7, 0, 0, 0, 0, 0, 0, 0]);
        leaf.next().unwrap()[16..20].fill(0xff);
    }));
    assert!(said.contains("of ebx in CPUID leaf 0x7"), "{said}");
    // An MSR that may be saved and that no processor has.
    let said = refused(&changed(&state, Kind::Vcpu.of(0), |bytes| {
        let at = bytes.len() - 64 - 16;
        bytes[at..at + 4].copy_from_slice(&0xdead_0000_u32.to_le_bytes());
    }));
    assert!(
        said.contains("KVM_SET_MSRS stopped at MSR 0xdead0000"),
        "{said}"
    );
    let slow = changed(&state, Kind::Machine.only(), |bytes| {
        bytes[5..9].copy_from_slice(&1_000_000_u32.to_le_bytes());
    });
    if kvm.caps().tsc_control {
        restore(&kvm, &slow, &memory, [1; 16]).unwrap();
    } else {
        let said = refused(&slow);
        let rates = "runs at 1000000 kHz and this host's at ";
        assert!(said.contains(rates), "{said}");
    }
}

/// The times that a kernel says at the beginning of its lines.
fn times(said: &str) -> Vec<Duration> {
    let times = said.lines().filter_map(|line| {
        let (time, _) = line.strip_prefix('[')?.split_once(']')?;
        let seconds: f64 = time.trim().parse().ok()?;
        Some(Duration::from_secs_f64(seconds))
    });
    times.collect()
}

/// What the guest has not read of its events.
fn events(machine: &Machine) -> u8 {
    machine.pause(LIMIT).unwrap();
    let state = machine.save().unwrap();
    SavedMachine::read(&state).unwrap().devices.power.events
}

/// Lets it run until its event device has read that there is a new generation.
fn hears(machine: &Machine) {
    assert_eq!(events(machine), 1);
    let start = Monotonic.now();
    while events(machine) != 0 {
        assert!(Monotonic.now() - start < LIMIT, "the event was not read");
        machine.resume();
        std::thread::sleep(Duration::from_millis(50));
    }
    machine.resume();
}

/// Boots, is saved as it looks for its devices, and goes on in two other machines.
fn debian(vcpus: u8) {
    let Some(kvm) = usable() else { return };
    let host = Host::new(&format!("restore-{vcpus}"));
    let memory = file(BYTES);
    let Some(source) = with(&kvm, vcpus, &memory, |board| host.plug(board)) else {
        return;
    };
    source.resume();
    says(&source, "[vda]");
    let heard = Monotonic.now();
    source.pause(LIMIT).unwrap();
    let state = source.save().unwrap();
    let ran = Monotonic.now() - heard;
    let said = text(&source);
    assert!(!said.contains(NO_NETWORK), "too late to save");
    drop(source);
    let last = times(&said)
        .last()
        .copied()
        .expect("the kernel says the time");
    for number in 0..2_u8 {
        // Time that the guest is not to see.
        std::thread::sleep(Duration::from_secs(5));
        let start = Monotonic.now();
        let incarnation = Incarnation::from_bytes([number; 16]);
        let saved = SavedMachine::read(&state).unwrap();
        let bare = Bare::new(&kvm, &saved.layout).unwrap();
        let parked = Monotonic.now();
        let plug = |board: &mut Board<'_>| {
            board.plug(Slot::Rng, Rng::new(rng::host))?;
            host.plug(board)
        };
        let fork = bare.restore(saved, memory.as_fd(), Sharing::Private, incarnation, plug);
        let fork = fork.unwrap();
        let (ahead, then) = (parked - start, Monotonic.now() - parked);
        println!("{ahead:?} ahead, {then:?} then");
        hears(&fork);
        // The first one's bells are hung when its guest rings them, the other's never.
        if number == 0 {
            let start = Monotonic.now();
            while !fork.asks().hear() {
                assert!(Monotonic.now() - start < LIMIT, "no bell wants to be hung");
                std::thread::sleep(Duration::from_millis(1));
            }
            fork.hang().unwrap();
        }
        says(&fork, NO_NETWORK);
        let went = Monotonic.now() - start;
        let end = fork.wait();
        if number == 1 {
            assert!(fork.asks().hear(), "bells that are not hung");
        }
        let said = text(&fork);
        println!("{said}");
        assert!(is_its_end(&end), "{end}");
        for unwanted in ["Call Trace", "lockup", "stall", "unstable", "hung"] {
            assert!(!said.contains(unwanted), "{unwanted:?} is there");
        }
        let times = times(&said);
        assert!(times.is_sorted(), "{times:?}");
        if let (Some(first), Some(end)) = (times.first(), times.last()) {
            assert!(*first >= last, "{first:?} after {last:?}");
            let slack = Duration::from_millis(500);
            assert!(*end <= last + ran + went + slack, "{end:?} after {last:?}");
        }
    }
}

/// Debian's kernel for any machine, whose driver for generations is built in. The one for clouds
/// has none.
fn generic_kernel() -> Option<String> {
    let kernels = std::fs::read_dir("/var/lib/spore-deps/rig").ok()?;
    let mut paths = kernels.filter_map(|entry| entry.ok().map(|entry| entry.path()));
    let kernel = paths.find_map(|path| Some(path.join("vmlinux")).filter(|path| path.is_file()));
    kernel.map(|path| path.display().to_string())
}

#[test]
fn a_kernel_that_knows_generations_renews_its_randomness_in_each_fork() {
    const RESEEDED: &str = "crng reseeded due to virtual machine fork";
    let Some(kvm) = usable() else { return };
    let Some(kernel) = generic_kernel() else {
        println!("SKIPPED: there is no generic kernel; `make deps` fetches it");
        return;
    };
    let memory = file(BYTES);
    let Some(source) = with_kernel(&kvm, &kernel, 1, &memory, |_board| Ok(())) else {
        return;
    };
    source.resume();
    says(&source, "Run /init as init process");
    source.pause(LIMIT).unwrap();
    let state = source.save().unwrap();
    assert!(!text(&source).contains(RESEEDED));
    drop(source);
    for number in 2..4 {
        let fork = restore(&kvm, &state, &memory, [number; 16]).unwrap();
        fork.resume();
        says(&fork, RESEEDED);
    }
}

#[test]
fn debians_kernel_goes_on_in_other_machines_of_one_processor() {
    debian(1);
}

#[test]
fn debians_kernel_goes_on_in_other_machines_of_two_processors() {
    debian(2);
}
