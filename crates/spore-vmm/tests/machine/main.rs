//! Guests of a few instructions on a real KVM. Where there is none that runs guests, each test says
//! so and is skipped; `cargo xtask rig` has one.
#![cfg(test)]

mod boot;
mod hostile;
mod restore;
mod running;
#[path = "../tiny/mod.rs"]
mod tiny;

use std::fs::File;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;

use kvm_bindings::{kvm_msr_entry, kvm_segment};
use kvm_ioctls::VcpuExit;
use rustix::fs::MemfdFlags;
use spore_vmm::clock::{Clock as _, Monotonic};
use spore_vmm::kvm::Kvm;
use spore_vmm::kvm::vm::{CHIPS, Vcpu, Vm};
use spore_vmm::machine::layout::Layout;
use spore_vmm::memory::{Gpa, GuestMemory, PAGE_BYTES, Region, Sharing, Space};
use spore_vmm::probe::{Unusable, probe};

const BYTES: u64 = 16 * PAGE_BYTES;

const REGION: Region = Region {
    start: Gpa(0),
    offset: 0,
    bytes: BYTES,
};

/// Where the instructions are; real mode, everything flat at 0.
const CODE: Gpa = Gpa(0x1000);

/// The same in long mode.
const CODE_64: Gpa = Gpa(0x7000);

/// Opens the host's KVM and lets the probe say whether it runs guests.
fn usable() -> Option<Kvm> {
    let opened = File::options().read(true).write(true).open("/dev/kvm");
    let kvm = match opened {
        Ok(device) => Kvm::new(OwnedFd::from(device)).map_err(|error| error.to_string()),
        Err(error) => Err(format!("/dev/kvm: {error}")),
    };
    let probed = kvm.and_then(|kvm| match probe(&kvm, &Monotonic) {
        Ok(_usable) => Ok(kvm),
        Err(unusable) => Err(unusable.to_string()),
    });
    match probed {
        Ok(kvm) => Some(kvm),
        Err(why) => {
            println!("SKIPPED: {why}");
            None
        }
    }
}

fn file(bytes: u64) -> OwnedFd {
    let file = rustix::fs::memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&file, bytes).unwrap();
    file
}

/// A machine with an interrupt controller and one processor, in real mode at the code.
struct Machine {
    vm: Vm,
    vcpu: Vcpu,
    space: Arc<Space>,
}

impl Machine {
    fn new(kvm: &Kvm) -> Self {
        let machine = Self::bare(kvm);
        let cpuid = kvm.supported_cpuid().unwrap();
        machine.vcpu.set_cpuid(&cpuid).unwrap();
        machine
    }

    /// One whose processor was not told what it is.
    fn bare(kvm: &Kvm) -> Self {
        let space = Space::reserve(BYTES).unwrap();
        let vm = kvm.create_vm().unwrap();
        vm.create_irqchip().unwrap();
        // Before there is a file behind it.
        vm.set_memory(&space, &[REGION]).unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        Self { vm, vcpu, space }
    }

    fn fill(&self, file: &OwnedFd, sharing: Sharing) -> GuestMemory {
        self.space.fill(file.as_fd(), sharing, &[REGION]).unwrap()
    }

    fn start(&self) {
        let mut sregs = self.vcpu.sregs().unwrap();
        for segment in [&mut sregs.cs, &mut sregs.ds, &mut sregs.es, &mut sregs.ss] {
            (segment.base, segment.selector) = (0, 0);
        }
        self.vcpu.set_sregs(&sregs).unwrap();
        let mut regs = self.vcpu.regs().unwrap();
        (regs.rip, regs.rflags, regs.rsp) = (CODE.0, 2, 0x8000);
        self.vcpu.set_regs(&regs).unwrap();
    }

    /// Runs until the guest says a byte at port 0x80.
    fn said(&mut self) -> u8 {
        match self.vcpu.run().unwrap() {
            VcpuExit::IoOut(0x80, [byte]) => *byte,
            exit => panic!("the guest ended with {exit:?}"),
        }
    }
}

#[test]
fn the_probe_says_how_fast_guests_run_or_why_they_do_not() {
    let Ok(device) = File::options().read(true).write(true).open("/dev/kvm") else {
        println!("SKIPPED: there is no /dev/kvm");
        return;
    };
    let kvm = match Kvm::new(OwnedFd::from(device)) {
        Ok(kvm) => kvm,
        Err(error) => {
            println!("SKIPPED: {error}");
            return;
        }
    };
    println!("caps: {:?}", kvm.caps());
    println!("msrs: {}", kvm.msr_indices().unwrap().len());
    let start = Monotonic.now();
    let probed = probe(&kvm, &Monotonic);
    println!("{probed:?} after {:?}", Monotonic.now() - start);
    if let Err(unusable) = probed {
        let about_kvm = matches!(
            unusable,
            Unusable::Exit { .. } | Unusable::Slow { .. } | Unusable::Wrong | Unusable::Kvm(_)
        );
        assert!(about_kvm, "{unusable}");
    }
}

#[test]
fn memory_that_comes_after_its_slot_is_the_guests() {
    let Some(kvm) = usable() else { return };
    let mut machine = Machine::new(&kvm);
    let file = file(BYTES);
    // mov al, [0x2000]; out 0x80, al; inc byte [0x2000]; jmp back
    let code = [
        0xa0, 0x00, 0x20, 0xe6, 0x80, 0xfe, 0x06, 0x00, 0x20, 0xeb, 0xf5,
    ];
    rustix::io::pwrite(&file, &code, CODE.0).unwrap();
    rustix::io::pwrite(&file, &[7], 0x2000).unwrap();
    machine.start();
    let memory = machine.fill(&file, Sharing::Private);
    assert_eq!([machine.said(), machine.said(), machine.said()], [7, 8, 9]);
    memory.write(Gpa(0x2000), &[100]).unwrap();
    assert_eq!(machine.said(), 101, "the write is seen, and counted up");
    let mut kept = [0];
    rustix::io::pread(&file, &mut kept, 0x2000).unwrap();
    assert_eq!(kept, [7], "the file is as it was");
}

/// Page tables, segments and a stack for a guest in long mode, whose code is at [`CODE_64`].
fn long_mode(memory: &GuestMemory, vcpu: &Vcpu, code: &[u8]) {
    // The first page of 2 MiB is itself; the second is what is at 4 GiB; the local APIC is itself.
    for (table, entry) in [
        (0x1000, 0x2003_u64),
        (0x2000, 0x3003),
        (0x2018, 0x4003),
        (0x3000, 0x83),
        (0x3008, 0x1_0000_0083),
        (0x4fb8, 0xfee0_009b),
        // Code and data of 64 bits, as a return from an interrupt wants them.
        (0x6008, 0x00af_9a00_0000_ffff),
        (0x6010, 0x00cf_9200_0000_ffff),
        // Interrupt 0x40 is at 0x8000.
        (0x5400, 0x0000_8e00_0008_8000),
    ] {
        memory.write(Gpa(table), &entry.to_le_bytes()).unwrap();
    }
    memory.write(CODE_64, code).unwrap();
    let mut sregs = vcpu.sregs().unwrap();
    let flat = kvm_segment {
        limit: u32::MAX,
        selector: 0x10,
        type_: 3,
        present: 1,
        s: 1,
        db: 1,
        g: 1,
        ..Default::default()
    };
    (sregs.ds, sregs.es, sregs.ss) = (flat, flat, flat);
    sregs.cs = kvm_segment {
        selector: 8,
        type_: 11,
        db: 0,
        l: 1,
        ..flat
    };
    (sregs.cr0, sregs.cr3, sregs.cr4) = (0x8000_0011, 0x1000, 0x20);
    sregs.efer = 0x500;
    (sregs.gdt.base, sregs.gdt.limit) = (0x6000, 0x17);
    (sregs.idt.base, sregs.idt.limit) = (0x5000, 0xfff);
    vcpu.set_sregs(&sregs).unwrap();
}

#[test]
fn memory_above_four_gib_is_the_guests() {
    let Some(kvm) = usable() else { return };
    let layout = Layout::new(5 * 1024, 1).unwrap();
    let regions = layout.regions();
    let space = Space::reserve(layout.memory_bytes()).unwrap();
    let vm = kvm.create_vm().unwrap();
    vm.set_memory(&space, &regions).unwrap();
    let mut vcpu = vm.create_vcpu(0).unwrap();
    vcpu.set_cpuid(&kvm.supported_cpuid().unwrap()).unwrap();
    let file = file(layout.memory_bytes());
    let memory = space.fill(file.as_fd(), Sharing::Shared, &regions).unwrap();
    memory.write(Gpa(0x1_0000_1234), &[99]).unwrap();
    // mov al, [rdi]; out 0x80, al; mov byte [rdi], 1; out 0x80, al
    let code = [0x8a, 0x07, 0xe6, 0x80, 0xc6, 0x07, 0x01, 0xe6, 0x80];
    long_mode(&memory, &vcpu, &code);
    let mut regs = vcpu.regs().unwrap();
    (regs.rip, regs.rflags, regs.rdi) = (CODE_64.0, 2, 0x20_1234);
    vcpu.set_regs(&regs).unwrap();
    for _ in 0..2 {
        let exit = vcpu.run().unwrap();
        assert!(matches!(exit, VcpuExit::IoOut(0x80, [99])), "{exit:?}");
    }
    let mut seen = [0];
    memory.read(Gpa(0x1_0000_1234), &mut seen).unwrap();
    assert_eq!(seen, [1]);
}

/// Each `sti; hlt` waits for one interrupt of the timer. No interrupt may come between the two, so
/// on a processor the handler never finds the `hlt` still to be done. QEMU's emulation forgets that
/// when the host was interrupted there, and then the guest would wait for ever for what has been:
/// the handler skips that `hlt` and counts it apart. As many interrupts as times armed it stays.
#[test]
fn a_timer_interrupts_as_often_as_it_is_armed() {
    const TIMES: u64 = 2000;
    let Some(kvm) = usable() else { return };
    let mut machine = Machine::new(&kvm);
    let file = file(BYTES);
    let memory = machine.fill(&file, Sharing::Private);
    #[rustfmt::skip]
    let code = [
        0xc7, 0x87, 0xf0, 0x00, 0x00, 0x00, 0xff, 0x01, 0x00, 0x00, // enable the APIC
        0xc7, 0x87, 0xe0, 0x03, 0x00, 0x00, 0x0b, 0x00, 0x00, 0x00, // count every tick
        0xc7, 0x87, 0x20, 0x03, 0x00, 0x00, 0x40, 0x00, 0x00, 0x00, // once, interrupt 0x40
        0xc7, 0x87, 0x80, 0x03, 0x00, 0x00, 0xe8, 0x03, 0x00, 0x00, // again: 1000 ticks
        0xfb, 0xf4, 0xfa,                                           // sti; hlt; cli
        0x39, 0xcb, 0x75, 0xef,                                     // cmp ebx, ecx; jne again
        0xb0, 0x01, 0xe6, 0x80,                                     // mov al, 1; out 0x80, al
    ];
    #[rustfmt::skip]
    let handler = [
        0xff, 0xc3,                                                 // inc ebx
        0x48, 0x81, 0x3c, 0x24, 0x29, 0x70, 0x00, 0x00,             // cmp [rsp], the hlt
        0x75, 0x06,                                                 // jne to the end
        0xff, 0xc2, 0x48, 0xff, 0x04, 0x24,                         // inc edx; inc [rsp]
        0xc7, 0x87, 0xb0, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, // end of interrupt
        0x48, 0xcf,                                                 // iretq
    ];
    long_mode(&memory, &machine.vcpu, &code);
    memory.write(Gpa(0x8000), &handler).unwrap();
    let mut regs = machine.vcpu.regs().unwrap();
    (regs.rip, regs.rflags, regs.rsp) = (CODE_64.0, 2, 0xf000);
    (regs.rdi, regs.rbx, regs.rcx, regs.rdx) = (0xfee0_0000, 0, TIMES, 0);
    machine.vcpu.set_regs(&regs).unwrap();
    let start = Monotonic.now();
    assert_eq!(machine.said(), 1);
    let (regs, took) = (machine.vcpu.regs().unwrap(), Monotonic.now() - start);
    assert_eq!(regs.rbx, TIMES);
    println!(
        "{TIMES} interrupts in {took:?}, {} of them too early",
        regs.rdx
    );
}

#[test]
fn what_is_set_of_a_processor_is_what_is_got() {
    let Some(kvm) = usable() else { return };
    let machine = Machine::new(&kvm);
    let _memory = machine.fill(&file(BYTES), Sharing::Private);
    machine.start();
    let (from, to) = (&machine.vcpu, Machine::new(&kvm));
    let to = &to.vcpu;
    let mut regs = from.regs().unwrap();
    (regs.rax, regs.r15) = (0x1234_5678_9abc_def0, 77);
    from.set_regs(&regs).unwrap();
    to.set_mp_state(from.mp_state().unwrap()).unwrap();
    to.set_regs(&from.regs().unwrap()).unwrap();
    assert_eq!(to.regs().unwrap(), regs);
    to.set_sregs(&from.sregs().unwrap()).unwrap();
    assert_eq!(to.sregs().unwrap(), from.sregs().unwrap());
    to.set_xsave(&from.xsave().unwrap()).unwrap();
    assert_eq!(to.xsave().unwrap().region, from.xsave().unwrap().region);
    to.set_xcrs(&from.xcrs().unwrap()).unwrap();
    assert_eq!(
        to.xcrs().unwrap().xcrs[0].value,
        from.xcrs().unwrap().xcrs[0].value
    );
    to.set_debugregs(&from.debugregs().unwrap()).unwrap();
    to.set_lapic(&from.lapic().unwrap()).unwrap();
    assert_eq!(to.lapic().unwrap().regs, from.lapic().unwrap().regs);
    to.set_events(&from.events().unwrap()).unwrap();
    assert_eq!(from.tsc_khz().unwrap(), to.tsc_khz().unwrap());
    to.set_tsc_khz(from.tsc_khz().unwrap()).unwrap();
    for chip in CHIPS {
        machine
            .vm
            .set_irqchip(chip, &machine.vm.irqchip(chip).unwrap())
            .unwrap();
    }
}

#[test]
fn an_msr_that_is_refused_is_named() {
    let Some(kvm) = usable() else { return };
    let machine = Machine::new(&kvm);
    let indices = kvm.msr_indices().unwrap();
    let entry = |index, data| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    };
    // STAR is every 64-bit processor's; the other is nobody's.
    const STAR: u32 = 0xc000_0081;
    const NOBODYS: u32 = 0xdead_0000;
    assert!(indices.contains(&STAR));
    machine.vcpu.set_msrs(&[entry(STAR, 0x10 << 32)]).unwrap();
    assert_eq!(machine.vcpu.msrs(&[STAR]).unwrap()[0].data, 0x10 << 32);
    let error = machine.vcpu.set_msrs(&[entry(STAR, 0), entry(NOBODYS, 1)]);
    assert!(error.unwrap_err().to_string().contains("0xdead0000"));
    let error = machine.vcpu.msrs(&[STAR, NOBODYS]);
    assert!(error.unwrap_err().to_string().contains("0xdead0000"));
}

#[test]
fn a_processors_tsc_goes_on_from_where_its_offset_says() {
    let Some(kvm) = usable() else { return };
    let mut machine = Machine::new(&kvm);
    let file = file(BYTES);
    // rdtsc; mov [0x2000], eax; mov [0x2004], edx (of 32 bits); out 0x80, al; jmp back
    let code = [
        0x0f, 0x31, 0x66, 0xa3, 0x00, 0x20, 0x66, 0x89, 0x16, 0x04, 0x20, 0xe6, 0x80, 0xeb, 0xf1,
    ];
    rustix::io::pwrite(&file, &code, CODE.0).unwrap();
    machine.start();
    let memory = machine.fill(&file, Sharing::Private);
    let tsc = |machine: &mut Machine| {
        machine.said();
        let mut bytes = [0; 8];
        memory.read(Gpa(0x2000), &mut bytes).unwrap();
        u64::from_le_bytes(bytes)
    };
    let first = tsc(&mut machine);
    let offset = machine.vcpu.tsc_offset().unwrap();
    const HOUR: u64 = 3600 * 2_000_000_000;
    machine
        .vcpu
        .set_tsc_offset(offset.wrapping_add(HOUR))
        .unwrap();
    assert_eq!(
        machine.vcpu.tsc_offset().unwrap(),
        offset.wrapping_add(HOUR)
    );
    let later = tsc(&mut machine);
    assert!(later >= first + HOUR, "{first} {later}");
    machine.vcpu.set_tsc_offset(offset).unwrap();
    let back = tsc(&mut machine);
    assert!(back > first && back < later, "{first} {back} {later}");
}

#[test]
fn the_guests_clock_goes_on_from_where_it_was_set() {
    let Some(kvm) = usable() else { return };
    let machine = Machine::new(&kvm);
    let saved = machine.vm.clock().unwrap();
    let mut set = saved;
    set.flags = 0;
    set.clock += 1_000_000_000_000;
    let again = Machine::new(&kvm);
    again.vm.set_clock(&set).unwrap();
    let now = again.vm.clock().unwrap().clock;
    assert!(now >= set.clock, "{now} {}", set.clock);
}

#[test]
fn an_immediate_exit_comes_back_without_running_the_guest() {
    let Some(kvm) = usable() else { return };
    let mut machine = Machine::new(&kvm);
    let file = file(BYTES);
    // jmp to itself
    rustix::io::pwrite(&file, &[0xeb, 0xfe], CODE.0).unwrap();
    machine.start();
    let _memory = machine.fill(&file, Sharing::Private);
    machine.vcpu.set_immediate_exit(true);
    let error = machine.vcpu.run().unwrap_err();
    let source = std::error::Error::source(&error).unwrap().to_string();
    assert!(source.contains("Interrupted"), "{source}");
    assert_eq!(machine.vcpu.regs().unwrap().rip, CODE.0);
}
