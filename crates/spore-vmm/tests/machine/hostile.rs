//! Guests that do what no driver does: rings of random numbers, registers of every width in any
//! order, resets in use, floods, spinning, faults. Each ends itself with a reason or goes on and
//! stands still when it is told to; a guest beside goes on whatever they do.
//!
//! The guest's program reads steps from its memory, which a seed has made, and does them: an access
//! to memory, to a register or to a port. So what it does is written here and not in instructions.

use std::os::fd::{AsFd as _, OwnedFd};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener, UnixStream};
use std::sync::Arc;
use std::time::Duration;

use spore_vmm::clock::{Clock as _, Monotonic};
use spore_vmm::device::rate::Limit;
use spore_vmm::device::serial::OUTPUT_BYTES_MAX;
use spore_vmm::device::virtio::blk::Blk;
use spore_vmm::device::virtio::console::{Console, Listener};
use spore_vmm::device::virtio::net::{Net, Tap};
use spore_vmm::device::virtio::rng::{self, Rng};
use spore_vmm::disk::{Access, Raw};
use spore_vmm::end::End;
use spore_vmm::kvm::Kvm;
use spore_vmm::machine::Machine;
use spore_vmm::machine::bare::Bare;
use spore_vmm::machine::board::{Board, BoardError};
use spore_vmm::machine::boot::Boot;
use spore_vmm::machine::layout::{Layout, SERIAL_PORT, SLOTS, Slot};
use spore_vmm::memory::Gpa;
use spore_wire::cause::chain;
use spore_wire::launch::Incarnation;

use crate::boot::LIMIT;
use crate::restore::{counts, tiny, word};
use crate::tiny::kernel;
use crate::{file, usable};

const MEMORY_MIB: u32 = 64;

/// How many guests of random steps there are, and how many steps each does at most.
const GUESTS: u64 = 40;
const STEPS: u32 = 4000;

/// How long each may take for them: what it has done by then counts.
const EACH: Duration = Duration::from_secs(10);

/// Where it counts its steps, and where these are.
const DONE: Gpa = Gpa(0x30_0000);
const SCRIPT: Gpa = Gpa(0x40_0000);

/// Six zeros: a table of interrupts that has none.
const NO_TABLE: u32 = 0x30_8000;

/// Where its rings and buffers are, within one of so many bytes.
const RINGS: u32 = 0x100_0000;
const RINGS_BYTES: u32 = 0x1_0000;

/// Entries of each ring, which every device takes.
const QUEUE_SIZE: u32 = 16;

/// Reads the next step (what, where, how much), counts it and jumps to what does it, in 16 bytes
/// each.
#[rustfmt::skip]
const NEXT: [u8; 32] = [
    0xbe, 0x00, 0x00, 0x40, 0x00,       // mov esi, SCRIPT
    0x8b, 0x06,                         // next: mov eax, [esi]
    0x8b, 0x56, 0x04,                   // mov edx, [esi + 4]
    0x8b, 0x4e, 0x08,                   // mov ecx, [esi + 8]
    0x83, 0xc6, 0x10,                   // add esi, 16
    0xff, 0x05, 0x00, 0x00, 0x30, 0x00, // inc dword [DONE]
    0xc1, 0xe0, 0x04,                   // shl eax, 4
    0x05, 0x20, 0x00, 0x20, 0x00,       // add eax, ENTRY + 32
    0xff, 0xe0,                         // jmp eax
];

/// Where the next step is read.
const AGAIN: usize = 5;

/// What a step does, in the order of the instructions for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Do {
    Restart,
    Write1,
    Write2,
    Write4,
    Write8,
    Read1,
    Read2,
    Read4,
    Read8,
    Out1,
    Out2,
    Out4,
    In1,
    In2,
    In4,
    OutMany,
    InMany,
    Spin,
    Halt,
    Fault,
    Jump,
}

#[rustfmt::skip]
const DOES: [(Do, &[u8]); 21] = [
    (Do::Restart, &[0xbe, 0x00, 0x00, 0x40, 0x00]),       // mov esi, SCRIPT
    (Do::Write1, &[0x88, 0x0a]),                          // mov [edx], cl
    (Do::Write2, &[0x66, 0x89, 0x0a]),                    // mov [edx], cx
    (Do::Write4, &[0x89, 0x0a]),                          // mov [edx], ecx
    (Do::Write8, &[0x0f, 0x7f, 0x02]),                    // movq [edx], mm0
    (Do::Read1, &[0x8a, 0x0a]),                           // mov cl, [edx]
    (Do::Read2, &[0x66, 0x8b, 0x0a]),                     // mov cx, [edx]
    (Do::Read4, &[0x8b, 0x0a]),                           // mov ecx, [edx]
    (Do::Read8, &[0x0f, 0x6f, 0x02]),                     // movq mm0, [edx]
    (Do::Out1, &[0x89, 0xc8, 0xee]),                      // mov eax, ecx; out dx, al
    (Do::Out2, &[0x89, 0xc8, 0x66, 0xef]),                // mov eax, ecx; out dx, ax
    (Do::Out4, &[0x89, 0xc8, 0xef]),                      // mov eax, ecx; out dx, eax
    (Do::In1, &[0xec]),                                   // in al, dx
    (Do::In2, &[0x66, 0xed]),                             // in ax, dx
    (Do::In4, &[0xed]),                                   // in eax, dx
    // mov ebx, esi; mov esi, ENTRY; rep outsb; mov esi, ebx
    (Do::OutMany, &[0x89, 0xf3, 0xbe, 0x00, 0x00, 0x20, 0x00, 0xf3, 0x6e, 0x89, 0xde]),
    // mov edi, 0x310000; rep insb
    (Do::InMany, &[0xbf, 0x00, 0x00, 0x31, 0x00, 0xf3, 0x6c]),
    (Do::Spin, &[0xfa, 0xeb, 0xfe]),                      // cli; jmp to itself
    (Do::Halt, &[0xfa, 0xf4]),                            // cli; hlt
    (Do::Fault, &[0x0f, 0x01, 0x1a, 0x0f, 0x0b]),         // lidt [edx]; ud2
    (Do::Jump, &[0xff, 0xe2]),                            // jmp edx
];

/// The guest's program.
fn program() -> Vec<u8> {
    let mut code = NEXT.to_vec();
    for (number, (does, instructions)) in DOES.iter().enumerate() {
        assert_eq!(*does as usize, number, "{does:?} is in its place");
        code.extend(*instructions);
        // jmp next
        let back = i32::try_from(AGAIN).unwrap() - i32::try_from(code.len() + 5).unwrap();
        code.push(0xe9);
        code.extend(back.to_le_bytes());
        assert!(code.len() <= 32 + (number + 1) * 16, "{does:?} is too long");
        code.resize(32 + (number + 1) * 16, 0x90);
    }
    code
}

/// What a guest does: each step, where and how much.
#[derive(Debug, Default)]
struct Script(Vec<(Do, u32, u32)>);

impl Script {
    fn add(&mut self, does: Do, at: u32, value: u32) {
        self.0.push((does, at, value));
    }

    /// From its beginning again and again.
    fn put(&self, machine: &Machine) {
        let mut bytes = Vec::new();
        for (does, at, value) in self.0.iter().chain(&[(Do::Restart, 0, 0)]) {
            for number in [*does as u32, *at, *value, 0] {
                bytes.extend(number.to_le_bytes());
            }
        }
        machine.memory().write(SCRIPT, &bytes).unwrap();
    }
}

/// Random numbers of a seed (splitmix64).
#[derive(Debug)]
struct Chance(u64);

impl Chance {
    fn next(&mut self) -> u32 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        u32::try_from((mixed ^ (mixed >> 31)) >> 32).unwrap()
    }

    fn below(&mut self, end: u32) -> u32 {
        self.next() % end
    }

    fn of<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(u32::try_from(from.len()).unwrap()) as usize]
    }

    /// In so many of a hundred.
    fn percent(&mut self, count: u32) -> bool {
        self.below(100) < count
    }

    fn bytes<const N: usize>(&mut self) -> [u8; N] {
        std::array::from_fn(|_| self.next().to_le_bytes()[0])
    }
}

/// How many queues a device has.
const fn queues(slot: Slot) -> u32 {
    match slot {
        Slot::Image | Slot::Folder | Slot::Scratch | Slot::Rng => 1,
        Slot::Net => 2,
        Slot::Console => 4,
    }
}

/// Where a queue's descriptors, available and used rings and its buffers are.
fn places(slot: Slot, queue: u32) -> [u32; 4] {
    let at = RINGS + (u32::from(slot.number()) * 4 + queue) * RINGS_BYTES;
    [at, at + 0x2000, at + 0x3000, at + 0x4000]
}

fn register(slot: Slot, offset: u32) -> u32 {
    u32::try_from(slot.start().0).unwrap() + offset
}

/// Lengths of a request's buffers as a driver has them: what is read, then what is written.
type Request = (&'static [u32], &'static [u32]);

fn request(slot: Slot, queue: u32, chance: &mut Chance) -> Request {
    const DISK: [Request; 4] = [
        (&[16], &[512, 1]),
        (&[16, 512], &[1]),
        (&[16], &[1]),
        (&[16, 4096, 512], &[3]),
    ];
    match (slot, queue) {
        (Slot::Image | Slot::Folder | Slot::Scratch, _) => chance.of(&DISK),
        (Slot::Net, 0) => (&[], &[1530]),
        (Slot::Net, _) => (&[12, 64], &[]),
        (Slot::Console, 0 | 2) => (&[], &[128]),
        (Slot::Console, _) => (&[64], &[]),
        (Slot::Rng, _) => (&[], &[64, 8]),
    }
}

/// Writes a script. How wild its guest is says in how many of a hundred cases it does what no
/// driver does: without that it would come far, and with much of it it ends at once.
#[derive(Debug)]
struct Author {
    script: Script,
    chance: Chance,
    wild: u32,
}

impl Author {
    fn new(seed: u64) -> Self {
        let mut chance = Chance(seed);
        Self {
            wild: chance.of(&[0, 1, 5, 40]),
            chance,
            script: Script::default(),
        }
    }

    fn is_wild(&mut self) -> bool {
        self.chance.percent(self.wild)
    }

    fn register(&mut self, slot: Slot, offset: u32, value: u32) {
        self.script.add(Do::Write4, register(slot, offset), value);
    }

    fn all(mut self) -> Script {
        for _ in 0..12 {
            let slot = self.chance.of(&SLOTS);
            self.begin(slot);
            let mut turns = [0; 4];
            for _ in 0..1 + self.chance.below(30) {
                let queue = self.chance.below(queues(slot));
                let turn = &mut turns[queue as usize];
                // As many as the ring has, whether or not the device has taken any.
                if *turn == QUEUE_SIZE {
                    continue;
                }
                self.offer(slot, queue, *turn);
                *turn += 1;
                for _ in 0..self.chance.below(4) {
                    self.noise(slot);
                }
                if self.chance.percent(5) {
                    // While what was kicked is looked at.
                    let status = self.chance.of(&[0, 128]);
                    self.register(slot, 0x70, status);
                    self.begin(slot);
                    turns = [0; 4];
                }
            }
        }
        self.script
    }

    /// A device is reset, its rings are empty again, and it is set up as it should be, but for the
    /// queues' places now and then.
    fn begin(&mut self, slot: Slot) {
        self.register(slot, 0x70, 0);
        for queue in 0..queues(slot) {
            let [_, available, used, _] = places(slot, queue);
            self.script.add(Do::Write4, available, 0);
            self.script.add(Do::Write4, used, 0);
        }
        for status in [1, 3] {
            self.register(slot, 0x70, status);
        }
        let low = self.chance.of(&[0, 1 << 1, 1 << 9, 1 << 3]);
        for (select, half) in [(1, 1), (0, low)] {
            self.register(slot, 0x24, select);
            self.register(slot, 0x20, half);
        }
        self.register(slot, 0x70, 11);
        for queue in 0..queues(slot) {
            self.register(slot, 0x30, queue);
            let any = self.chance.next();
            let size = if self.is_wild() { any } else { QUEUE_SIZE };
            self.register(slot, 0x38, size);
            let [descriptors, available, used, _] = places(slot, queue);
            for (offset, at) in [(0x80, descriptors), (0x90, available), (0xa0, used)] {
                let any = self.chance.next();
                let at = if self.is_wild() { any } else { at };
                self.register(slot, offset, at);
                self.register(slot, offset + 4, 0);
            }
            self.register(slot, 0x44, 1);
        }
        self.register(slot, 0x70, 15);
    }

    /// A chain of descriptors, made available, and the kick. `turn` says how many there were in
    /// this queue.
    fn offer(&mut self, slot: Slot, queue: u32, turn: u32) {
        let [descriptors, available, _, buffers] = places(slot, queue);
        let (read, written) = request(slot, queue, &mut self.chance);
        let count = u32::try_from(read.len() + written.len()).unwrap();
        let lengths = read.iter().map(|bytes| (*bytes, 0));
        let lengths = lengths.chain(written.iter().map(|bytes| (*bytes, 2)));
        for (index, (bytes, writes)) in (0..).zip(lengths) {
            let buffer = buffers + index * 0x1000;
            let flags = u32::from(index + 1 < count) | writes;
            let mut words = [buffer, 0, bytes, flags | (index + 1) << 16];
            if self.is_wild() {
                self.spoil(&mut words, index);
            }
            for (number, value) in (0..).zip(words) {
                let at = descriptors + index * 16 + number * 4;
                self.script.add(Do::Write4, at, value);
            }
            // A header of a block request, or of a message of the port's.
            let message = self.chance.of(&[0, 3, 6, 1]) | 1 << 16;
            let kind = self.chance.of(&[0, 0, 1, 1, 4, 8, 99]);
            let header = [kind, message, self.chance.below(3000), 0];
            for (number, value) in (0..).zip(header) {
                self.script.add(Do::Write4, buffer + number * 4, value);
            }
        }
        let any = self.chance.next();
        let head = if self.is_wild() { any } else { 0 };
        let at = available + 4 + turn * 2;
        self.script.add(Do::Write2, at, head);
        let index = if self.is_wild() { any } else { turn + 1 };
        self.script.add(Do::Write2, available + 2, index);
        self.register(slot, 0x50, queue);
    }

    /// Makes a descriptor one that no driver writes.
    fn spoil(&mut self, descriptor: &mut [u32; 4], index: u32) {
        let chance = &mut self.chance;
        let any = chance.next();
        let [at, high, bytes, last] = descriptor;
        match chance.below(5) {
            0 => *at = chance.of(&[0, u32::MAX, 0x3ff_fff0, 0xd000_0000, 0xfee0_0000]),
            1 => *high = chance.of(&[1, u32::MAX, any]),
            2 => *bytes = chance.of(&[0, u32::MAX, 1 << 31, 0x1_0000, any]),
            // Indirect tables, and what is not defined.
            3 => *last = chance.of(&[0, 1, 2, 3, 4, 5, 0xffff]),
            // Loops, and what is in no table.
            _ => *last = 1 | chance.of(&[0, index, 15, 16, 0xffff]) << 16,
        }
    }

    /// Anything at any place, of any width.
    fn noise(&mut self, slot: Slot) {
        let is_wild = self.is_wild();
        let (chance, script) = (&mut self.chance, &mut self.script);
        let write = chance.of(&[Do::Write1, Do::Write2, Do::Write4, Do::Write8]);
        let read = chance.of(&[Do::Read1, Do::Read2, Do::Read4, Do::Read8]);
        let (value, other) = (chance.next(), chance.next());
        match chance.below(9) {
            // Its configuration, and what is behind it.
            0 => script.add(write, register(slot, 0x100 + value % 0x40), other),
            1 => script.add(read, register(slot, value % 0x1008), 0),
            2 if is_wild => script.add(write, register(slot, value % 0x110), other),
            // Where there is nothing.
            3 => script.add(write, 0xd000_6000 + value % 0x1000_0000, other),
            4 => script.add(read, 0xc000_0000 + value % 0x2000_0000, 0),
            // Not the two ports that end the guest: it would, and nothing would be seen.
            5 => {
                let out = chance.of(&[Do::Out1, Do::Out2, Do::Out4]);
                script.add(out, 0x1000 + value % 0xe000, other);
            }
            6 => {
                let input = chance.of(&[Do::In1, Do::In2, Do::In4]);
                script.add(input, value % 0x1_0000, 0);
            }
            7 => script.add(Do::InMany, value % 0x1_0000, 1 + other % 64),
            // Its rings, while they are used.
            _ if is_wild => {
                let part = chance.of(&places(slot, 0));
                script.add(write, part + value % 0x200, other);
            }
            _ => {}
        }
    }
}

/// What a guest's devices have on the host's side.
struct Host {
    socket: UnixListener,
    address: SocketAddr,
    disk: OwnedFd,
    tap: UnixDatagram,
    wire: UnixDatagram,
}

impl Host {
    fn new(seed: u64) -> Self {
        let name = format!("spore-vmm-hostile-{}-{seed}", std::process::id());
        let address = SocketAddr::from_abstract_name(name).unwrap();
        let (tap, wire) = UnixDatagram::pair().unwrap();
        wire.set_nonblocking(true).unwrap();
        Self {
            socket: UnixListener::bind_addr(&address).unwrap(),
            address,
            disk: file(1 << 20),
            tap,
            wire,
        }
    }

    fn plug(&self, board: &mut Board<'_>) -> Result<(), BoardError> {
        let clock = || Box::new(Monotonic);
        for (slot, access) in [
            (Slot::Image, Access::ReadOnly),
            (Slot::Folder, Access::ReadOnly),
            (Slot::Scratch, Access::ReadWrite),
        ] {
            let raw = Raw::new(self.disk.try_clone().unwrap(), access).unwrap();
            board.plug(
                slot,
                Blk::new(Box::new(raw), "disk", Limit::default(), clock()),
            )?;
        }
        let tap = Tap::new(self.tap.try_clone().unwrap().into(), 12).unwrap();
        let none = Limit::default;
        let net = Net::new(Box::new(tap), [2; 6], none(), none(), clock());
        board.plug(Slot::Net, net)?;
        let door = Listener::new(self.socket.try_clone().unwrap().into()).unwrap();
        board.plug(
            Slot::Console,
            Console::new("spore.agent", Box::new(door), clock()),
        )?;
        board.plug(Slot::Rng, Rng::new(rng::host))
    }

    /// Frames and bytes come and go meanwhile.
    fn disturb(&self, chance: &mut Chance, agent: &mut Option<UnixStream>) {
        // Full, closed, or nobody there: whatever it is.
        let _full = self.wire.send(&[0xff; 76]);
        while self.wire.recv(&mut [0; 2048]).is_ok() {}
        match agent {
            Some(open) if chance.percent(90) => {
                let _closed = std::io::Write::write(open, &[7; 100]);
                let _empty = std::io::Read::read(open, &mut [0; 4096]);
            }
            Some(_) => *agent = None,
            None => {
                let open = UnixStream::connect_addr(&self.address).ok();
                *agent = open.filter(|open| open.set_nonblocking(true).is_ok());
            }
        }
    }
}

/// A machine whose guest does a script.
fn machine(kvm: &Kvm, host: &Host, script: &Script) -> Machine {
    let layout = Layout::new(MEMORY_MIB, 1).unwrap();
    let (kernel, memory) = (kernel(&program()), file(layout.memory_bytes()));
    let boot = Boot {
        kernel: kernel.as_fd(),
        initramfs: None,
        command_line: b"",
        incarnation: Incarnation::from_bytes([1; 16]),
    };
    let plug = |board: &mut Board<'_>| host.plug(board);
    let machine = Bare::new(kvm, &layout).unwrap();
    let machine = machine.boot(memory.as_fd(), &boot, plug).unwrap();
    script.put(&machine);
    machine
}

/// That what ended a guest was its own doing.
fn is_its_own(end: &End) -> bool {
    use End::{Fault, Internal, PowerOff, Reset, TripleFault};
    matches!(
        end,
        Fault(_) | Internal { .. } | PowerOff | Reset | TripleFault { .. }
    )
}

/// Stands still when it is told to, is saved, goes on and is ended.
fn obeys(machine: &Machine, seed: u64) {
    match machine.pause(LIMIT) {
        Ok(()) => {
            machine.save().unwrap();
            machine.resume();
            machine.end(End::Stopped);
            check(&machine.wait(), seed);
        }
        Err(error) => {
            let end = machine.ended().unwrap_or_else(|| panic!("{seed}: {error}"));
            check(&end, seed);
        }
    }
}

fn check(end: &Arc<End>, seed: u64) {
    assert!(
        is_its_own(end) || matches!(**end, End::Stopped),
        "{seed}: {end}"
    );
}

/// One seed's guest; says how it ended, if it did, and how far it came.
fn hostile(kvm: &Kvm, seed: u64) -> (Option<Arc<End>>, u32) {
    let (host, author) = (Host::new(seed), Author::new(seed));
    let wild = author.wild > 0;
    let machine = machine(kvm, &host, &author.all());
    let (mut chance, mut agent) = (Chance(!seed), None);
    let start = Monotonic.now();
    machine.resume();
    while machine.ended().is_none() && word(&machine, DONE) < STEPS {
        host.disturb(&mut chance, &mut agent);
        if machine.asks().hear() && seed.is_multiple_of(2) {
            machine.hang().unwrap();
        }
        if wild && chance.percent(1) {
            // As another of its processors would, while the devices look at it.
            let slot = chance.of(&SLOTS);
            let at = chance.of(&places(slot, 0)) + chance.below(0x100);
            let written = machine.memory().write(Gpa(at.into()), &chance.bytes::<2>());
            written.unwrap();
        }
        if Monotonic.now() - start > EACH {
            break;
        }
        std::thread::yield_now();
    }
    let done = word(&machine, DONE);
    match machine.ended() {
        Some(end) => check(&end, seed),
        None => obeys(&machine, seed),
    }
    (
        machine.ended().filter(|end| !matches!(**end, End::Stopped)),
        done,
    )
}

#[test]
fn hostile_guest_stops_only_itself() {
    let Some(kvm) = usable() else { return };
    let (neighbour, _memory) = tiny(&kvm, 1);
    counts(&neighbour);
    let (mut ended, mut lasted) = (0, 0);
    for seed in 0..GUESTS {
        let (end, steps) = hostile(&kvm, seed);
        let how = end.map(|end| chain(&*end));
        println!("{seed}: {steps} steps, {how:?}");
        *(if how.is_some() {
            &mut ended
        } else {
            &mut lasted
        }) += 1;
        counts(&neighbour);
    }
    assert!(ended > 0 && lasted > 0, "{ended} ended, {lasted} lasted");
    for (does, at, value) in [
        (Do::Fault, NO_TABLE, 0),
        (Do::Jump, 0x3000_0000, 0),
        (Do::Jump, 0xd000_0000, 0),
        (Do::Jump, 0xffff_fff0, 0),
    ] {
        let (host, mut script) = (Host::new(GUESTS), Script::default());
        script.add(does, at, value);
        let machine = machine(&kvm, &host, &script);
        machine.resume();
        let end = machine.wait();
        println!("{does:?} {at:#x}: {end}");
        assert!(is_its_own(&end), "{does:?}: {end}");
        counts(&neighbour);
    }
    assert!(neighbour.ended().is_none());
}

#[test]
fn a_guest_that_floods_or_spins_obeys_and_costs_no_memory() {
    let Some(kvm) = usable() else { return };
    let (neighbour, _memory) = tiny(&kvm, 1);
    for (does, at, value) in [
        (Do::OutMany, u32::from(SERIAL_PORT), 4096),
        (Do::Out1, u32::from(SERIAL_PORT), 65),
        (Do::Write4, register(Slot::Net, 0x50), 1),
        (Do::Write4, register(Slot::Scratch, 0x50), 77),
        (Do::Write4, register(Slot::Console, 0x70), 0),
        (Do::Spin, 0, 0),
        (Do::Halt, 0, 0),
    ] {
        let (host, mut script) = (Host::new(GUESTS + 1), Script::default());
        script.add(does, at, value);
        let machine = machine(&kvm, &host, &script);
        machine.resume();
        for _ in 0..3 {
            std::thread::sleep(Duration::from_millis(300));
            machine.pause(LIMIT).unwrap();
            assert!(machine.output().bytes.len() <= OUTPUT_BYTES_MAX);
            machine.resume();
            counts(&neighbour);
        }
        println!("{does:?}: {} steps", word(&machine, DONE));
        obeys(&machine, GUESTS);
    }
}
