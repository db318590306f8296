//! Debian's kernel, as `cargo xtask deps` unpacks it, from its first output to the agent's init.
//! Skipped without these files, and without a KVM that runs guests.

use std::fs::File;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::time::Duration;

use spore_vmm::clock::{Clock as _, Monotonic};
use spore_vmm::device::rate::Limit;
use spore_vmm::device::virtio::blk::Blk;
use spore_vmm::device::virtio::console::{Console, Listener};
use spore_vmm::device::virtio::rng::{self, Rng};
use spore_vmm::disk::{Access, Raw};
use spore_vmm::end::End;
use spore_vmm::kvm::Kvm;
use spore_vmm::machine::Machine;
use spore_vmm::machine::board::{Board, BoardError};
use spore_vmm::machine::boot::Boot;
use spore_vmm::machine::layout::{Layout, Slot};
use spore_wire::launch::Incarnation;

use crate::{file, usable};

/// Where `cargo xtask deps` puts them, unless it is told otherwise.
const KERNEL: &str = "/var/lib/spore-deps/guest/vmlinux";
const INITRAMFS: &str = "/var/lib/spore-deps/guest/initramfs.cpio";

/// What such a guest has.
pub(crate) const MEMORY_MIB: u32 = 192;
pub(crate) const BYTES: u64 = MEMORY_MIB as u64 * 1024 * 1024;

/// What the kernel is told. `nohz=off` is for the rig, where an interrupt can come between `sti`
/// and `hlt` (docs/internals/testing.md): an idle processor then sleeps over what it was woken
/// for, here until its next tick instead of for ever.
const COMMAND_LINE: &[u8] = b"console=ttyS0 panic=-1 nohz=off";

/// The rig emulates the processor that this runs on: a kernel takes half a minute there. Shorter
/// than what `make rig-test` gives a test, so that what the guest said is told.
pub(crate) const LIMIT: Duration = Duration::from_secs(150);

/// What the guest's first process says when it finds no port of the agent's, and ends the guest.
const NO_PORT: &str = "the guest did not come up: no agent's port appeared";

/// So it ends the guest: by a triple fault, the one way that works in every machine.
pub(crate) fn is_its_end(end: &End) -> bool {
    matches!(end, End::TripleFault { .. })
}

/// What it says when it has found its port and a disk, and no network interface.
pub(crate) const NO_NETWORK: &str = "the guest did not come up: no network interface appeared";

fn open(path: &str) -> Option<File> {
    match File::open(path) {
        Ok(file) => Some(file),
        Err(error) => {
            println!("SKIPPED: {path}: {error}; `make deps` fetches it");
            None
        }
    }
}

/// A machine with entropy and no other device.
fn machine(kvm: &Kvm, vcpus: u8) -> Option<Machine> {
    with(kvm, vcpus, &file(BYTES), |_board| Ok(()))
}

/// What a guest has on the host: a socket for its agent's port, and a disk.
pub(crate) struct Host {
    socket: UnixListener,
    disk: OwnedFd,
}

impl Host {
    pub(crate) fn new(test: &str) -> Self {
        let name = format!("spore-vmm-test-{}-{test}", std::process::id());
        let address = SocketAddr::from_abstract_name(name).unwrap();
        Self {
            socket: UnixListener::bind_addr(&address).unwrap(),
            disk: file(1 << 20),
        }
    }

    pub(crate) fn plug(&self, board: &mut Board<'_>) -> Result<(), BoardError> {
        let door = Listener::new(OwnedFd::from(self.socket.try_clone().unwrap())).unwrap();
        let port = Console::new("spore.agent", Box::new(door), Box::new(Monotonic));
        board.plug(Slot::Console, port)?;
        let disk = Raw::new(self.disk.try_clone().unwrap(), Access::ReadOnly).unwrap();
        let disk = Blk::new(
            Box::new(disk),
            "image",
            Limit::default(),
            Box::new(Monotonic),
        );
        board.plug(Slot::Image, disk)
    }
}

/// A machine with entropy and other devices, whose kernel is to say all it can.
pub(crate) fn with(
    kvm: &Kvm,
    vcpus: u8,
    memory: &OwnedFd,
    plug: impl FnOnce(&mut Board<'_>) -> Result<(), BoardError>,
) -> Option<Machine> {
    with_kernel(kvm, KERNEL, vcpus, memory, plug)
}

/// The same with another kernel.
pub(crate) fn with_kernel(
    kvm: &Kvm,
    kernel: &str,
    vcpus: u8,
    memory: &OwnedFd,
    plug: impl FnOnce(&mut Board<'_>) -> Result<(), BoardError>,
) -> Option<Machine> {
    let (kernel, initramfs) = (open(kernel)?, open(INITRAMFS)?);
    let layout = Layout::new(MEMORY_MIB, vcpus).unwrap();
    let boot = Boot {
        kernel: kernel.as_fd(),
        initramfs: Some(initramfs.as_fd()),
        command_line: COMMAND_LINE,
        incarnation: Incarnation::random().unwrap(),
    };
    let machine = Machine::boot(kvm, &layout, memory.as_fd(), &boot, |board| {
        board.plug(Slot::Rng, Rng::new(rng::host))?;
        plug(board)
    });
    Some(machine.unwrap())
}

pub(crate) fn text(machine: &Machine) -> String {
    String::from_utf8_lossy(&machine.output().bytes).into_owned()
}

/// Waits until the guest has said something.
pub(crate) fn says(machine: &Machine, what: &str) {
    let start = Monotonic.now();
    while !text(machine).contains(what) {
        let (said, waited) = (text(machine), Monotonic.now() - start);
        assert!(
            waited < LIMIT,
            "{what:?} was not said in {waited:?}:\n{said}"
        );
        if let Some(end) = machine.ended() {
            let said = text(machine);
            assert!(said.contains(what), "ended without {what:?}: {end}\n{said}");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Boots, is paused and goes on in the midst of it, and comes to its end by the agent's init.
fn boots(vcpus: u8) {
    let Some(kvm) = usable() else { return };
    let Some(machine) = machine(&kvm, vcpus) else {
        return;
    };
    let start = Monotonic.now();
    machine.resume();
    says(&machine, "Linux version");
    println!("first output after {:?}", Monotonic.now() - start);
    for _ in 0..10 {
        machine.pause(LIMIT).unwrap();
        let still = machine.output();
        std::thread::sleep(Duration::from_millis(10));
        assert_eq!(machine.output(), still);
        machine.resume();
    }
    says(&machine, NO_PORT);
    println!(
        "its first process spoke after {:?}",
        Monotonic.now() - start
    );
    let end = machine.wait();
    let said = text(&machine);
    println!("{said}");
    assert!(is_its_end(&end), "{end}");
    for wanted in [
        "Hypervisor detected: KVM",
        "kvm-clock",
        "printk: console [ttyS0] enabled",
        &format!("Brought up 1 node, {vcpus} CPU"),
    ] {
        assert!(said.contains(wanted), "{wanted:?} is missing");
    }
    for unwanted in [
        "rtc_cmos",
        "Probing ports directly",
        "ACPI Error",
        "ACPI BIOS Error",
        "Call Trace",
    ] {
        assert!(!said.contains(unwanted), "{unwanted:?} is there");
    }
}

#[test]
fn debians_kernel_starts_the_agents_init_on_one_processor() {
    boots(1);
}

#[test]
fn debians_kernel_starts_the_agents_init_on_two_processors() {
    boots(2);
}

#[test]
fn the_agents_init_finds_its_port_and_its_disk() {
    let Some(kvm) = usable() else { return };
    let host = Host::new("port");
    let memory = file(BYTES);
    let Some(machine) = with(&kvm, 2, &memory, |board| host.plug(board)) else {
        return;
    };
    machine.resume();
    says(&machine, "[vda]");
    says(&machine, NO_NETWORK);
    let end = machine.wait();
    assert!(is_its_end(&end), "{end}");
}

#[test]
fn a_kernel_is_ended_while_it_boots() {
    let Some(kvm) = usable() else { return };
    let Some(machine) = machine(&kvm, 2) else {
        return;
    };
    machine.resume();
    says(&machine, "Linux version");
    machine.end(End::Stopped);
    assert!(matches!(*machine.wait(), End::Stopped));
}

#[test]
fn a_kernel_that_panics_ends_its_machine() {
    let Some(kvm) = usable() else { return };
    let Some(kernel) = open(KERNEL) else { return };
    let layout = Layout::new(192, 1).unwrap();
    let boot = Boot {
        kernel: kernel.as_fd(),
        initramfs: None,
        command_line: COMMAND_LINE,
        incarnation: Incarnation::random().unwrap(),
    };
    let memory = file(layout.memory_bytes());
    let none = |_: &mut Board<'_>| Ok(());
    let machine = Machine::boot(&kvm, &layout, memory.as_fd(), &boot, none).unwrap();
    machine.resume();
    says(&machine, "Kernel panic");
    let end = machine.wait();
    assert!(matches!(*end, End::Reset), "{end}");
}
