//! QEMU's command line: a microvm in software emulation whose every resource is a descriptor.
//!
//! Called by the `qemu` driver. Pure: numbers and text in, text out. Never names a path of the
//! host; what has a path here has it inside the jail.

use spore_wire::guest::PORT_NAME;
use spore_wire::node::Resources;

use crate::net::tap::GUEST_MAC_TEXT;

/// Where the VMM finds the guest's kernel while it starts.
pub(super) const KERNEL: &str = "/kernel";

/// Where it finds the initramfs.
pub(super) const INITRAMFS: &str = "/initramfs";

/// The descriptors of a VMM, in order: what a launcher places at 0, 1, 2 …
pub(super) const FD_TAP: usize = 3;
pub(super) const FD_QMP: usize = 4;
pub(super) const FD_AGENT: usize = 5;
pub(super) const FD_MEMORY: usize = 6;
pub(super) const FD_DISKS: usize = 7;

/// Where a VMM begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Begin {
    /// With a kernel, in memory of its own.
    Boot,
    /// Paused, with an image's memory as far as it does not write to it, and device state that is
    /// loaded once its root is empty: it was written by a VMM that a guest may have taken over.
    Fork,
}

/// The descriptor of a fork's device state: behind its disks.
pub(super) const fn fd_state(disks: usize) -> usize {
    FD_DISKS + disks
}

/// The character device of the guest's console: a ring in QEMU's memory, which can neither block
/// the guest nor fill a disk.
pub(super) const CONSOLE: &str = "console";

/// Its size; QEMU wants a power of two.
pub(super) const CONSOLE_BYTES: usize = 64 * 1024;

/// The cache of translated code. A part of the driver's overhead beyond the guest's memory.
const TRANSLATION_MIB: u32 = 64;

/// What a guest sees: what x86-64-v2 has, since prebuilt programs expect it, and RDRAND for the
/// first entropy.
pub(super) const CPU: &str = "qemu64,+ssse3,+sse4.1,+sse4.2,+popcnt,+rdrand";

/// Ticks per second of the guest's kernel (Debian's cloud kernel).
const GUEST_HZ: u64 = 250;

/// A disk, in the order in which the guest names them: vda, vdb, vdc.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Disk {
    /// The root image.
    Image,
    /// The app's folder, or what stands in for it.
    Folder,
    /// Gone with the VM.
    Scratch,
}

impl Disk {
    /// The disks of a machine, with a folder or without: a fork has its source's devices, and may
    /// be of another app.
    pub(super) fn of(resources: &Resources) -> Vec<Self> {
        let mut disks = vec![Self::Image, Self::Folder];
        disks.extend((resources.disk_mib > 0).then_some(Self::Scratch));
        disks
    }

    /// The serial number by which the guest tells it from the others.
    const fn serial(self) -> &'static str {
        match self {
            Self::Image => "image",
            Self::Folder => "folder",
            Self::Scratch => "scratch",
        }
    }

    /// Formats are explicit: QEMU would else guess from what a guest wrote. A scratch disk is gone
    /// with its VM, so nothing is gained by flushing it; freed blocks are given back to the host.
    /// Without `auto-read-only=off` QEMU would open it read-only first, which its descriptor is
    /// not.
    const fn access(self) -> &'static str {
        match self {
            Self::Image | Self::Folder => "read-only=on,auto-read-only=off",
            Self::Scratch => "auto-read-only=off,cache.no-flush=on,discard=unmap",
        }
    }

    /// What the guest is told of a failure of the host's disk.
    const fn on_error(self) -> &'static str {
        match self {
            Self::Image | Self::Folder => "",
            Self::Scratch => ",werror=report,rerror=report",
        }
    }
}

/// The guest's kernel command line.
///
/// The rate of the time stamp counter must be told, and right: in software emulation the guest's
/// is the host's, and a guest that measures it gives up ("Marking TSC unstable") and hangs.
/// `mitigations=off` and `nokaslr` weaken the guest's kernel; they are here because this driver
/// has no boundary that they could weaken, and they save a quarter of the boot.
pub(super) fn kernel_line(tsc_khz: u64) -> String {
    let lpj = tsc_khz * 1000 / GUEST_HZ;
    format!(
        "console=ttyS0 quiet panic=-1 tsc_early_khz={tsc_khz} tsc=reliable no_timer_check \
         lpj={lpj} mitigations=off random.trust_cpu=on raid=noautodetect cryptomgr.notests \
         8250.nr_uarts=1 nokaslr lsm=lockdown audit=0"
    )
}

/// The whole command line, without the program.
pub(super) fn arguments(
    begin: Begin,
    resources: &Resources,
    disks: &[Disk],
    tsc_khz: u64,
) -> Vec<String> {
    let mut line = Line::default();
    line.flag("-no-user-config")
        .flag("-nodefaults")
        .flag("-no-reboot");
    line.option("-display", "none");
    add_machine(&mut line, begin, resources);
    line.option(
        "-accel",
        format!("tcg,thread=multi,tb-size={TRANSLATION_MIB}"),
    );
    line.option("-cpu", CPU);
    line.option("-smp", resources.cpus.to_string());
    // After the guest's end QEMU waits, so that the console can be read before it quits.
    line.option("-action", "shutdown=pause,panic=pause");
    line.option(
        "-sandbox",
        "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
    );
    match begin {
        Begin::Boot => {
            line.option("-kernel", KERNEL).option("-initrd", INITRAMFS);
            line.option("-append", kernel_line(tsc_khz));
        }
        // What xen-save-devices-state writes does not say whether the VM ran.
        Begin::Fork => {
            line.flag("-S").option("-incoming", "defer");
        }
    }
    // Modern registers have 1024 queues per device, each of which is saved and loaded: ten times
    // the state and five times the time, for nothing that these devices would use.
    line.option("-global", "virtio-mmio.force-legacy=true");
    line.option(
        "-chardev",
        format!("socket,id=qmp,fd={FD_QMP},server=on,wait=off"),
    );
    line.option("-mon", "chardev=qmp,mode=control");
    line.option(
        "-chardev",
        format!("ringbuf,id={CONSOLE},size={CONSOLE_BYTES}"),
    );
    line.option("-serial", format!("chardev:{CONSOLE}"));
    for (index, disk) in disks.iter().enumerate() {
        add_disk(&mut line, index, *disk);
    }
    line.option("-netdev", format!("tap,id=net,fd={FD_TAP},vhost=off"));
    line.option(
        "-device",
        format!("virtio-net-device,netdev=net,mac={GUEST_MAC_TEXT}"),
    );
    line.option("-device", "virtio-serial-device,max_ports=2");
    line.option(
        "-chardev",
        format!("socket,id=agent,fd={FD_AGENT},server=on,wait=off"),
    );
    line.option(
        "-device",
        format!("virtserialport,chardev=agent,nr=1,name={PORT_NAME}"),
    );
    line.option("-object", "rng-builtin,id=rng");
    line.option("-device", "virtio-rng-device,rng=rng");
    line.words
}

/// Memory is a file of the node's, so that it can be read and sealed from outside. A fork's is the
/// sealed one that it shares with others, mapped privately; QEMU opens it for writing all the same,
/// and by a path, which `/proc` gives it until its root is emptied.
fn add_machine(line: &mut Line, begin: Begin, resources: &Resources) {
    line.option(
        "-machine",
        "microvm,mem-merge=off,dump-guest-core=off,memory-backend=mem,suppress-vmdesc=on",
    );
    // A description of the configuration, which what is loaded here does not have.
    line.option("-global", "migration.send-configuration=off");
    let share = match begin {
        Begin::Boot => "on",
        Begin::Fork => "off",
    };
    let mib = resources.memory_mib;
    line.option("-m", format!("{mib}M"));
    line.option(
        "-object",
        format!(
            "memory-backend-file,id=mem,size={mib}M,mem-path=/proc/self/fd/{FD_MEMORY},\
             share={share},merge=off,dump=off"
        ),
    );
}

/// A disk is two nodes of QEMU's block graph, so that a layer can be put over it while it runs.
fn add_disk(line: &mut Line, index: usize, disk: Disk) {
    let (fd, serial) = (FD_DISKS + index, disk.serial());
    let (access, on_error) = (disk.access(), disk.on_error());
    line.option("-add-fd", format!("fd={fd},set={fd}"));
    line.option(
        "-blockdev",
        format!("driver=file,node-name=f{index},filename=/dev/fdset/{fd},locking=off,{access}"),
    );
    line.option(
        "-blockdev",
        format!("driver=raw,node-name=d{index},file=f{index},{access}"),
    );
    line.option(
        "-device",
        format!("virtio-blk-device,drive=d{index},serial={serial}{on_error}"),
    );
}

#[derive(Debug, Default)]
struct Line {
    words: Vec<String>,
}

impl Line {
    fn flag(&mut self, name: &str) -> &mut Self {
        self.words.push(name.to_owned());
        self
    }

    fn option(&mut self, name: &str, value: impl Into<String>) -> &mut Self {
        self.flag(name);
        self.words.push(value.into());
        self
    }
}

#[cfg(test)]
mod tests {
    use spore_wire::node::Resources;

    use super::{Begin, Disk, INITRAMFS, KERNEL, arguments, kernel_line};

    const RESOURCES: Resources = Resources {
        cpus: 2,
        memory_mib: 256,
        disk_mib: 1024,
    };

    fn golden(begin: Begin) -> String {
        let disks = Disk::of(&RESOURCES);
        arguments(begin, &RESOURCES, &disks, 2_100_000).join("\n")
    }

    #[test]
    fn the_command_lines_are_the_golden_ones() {
        for (begin, name) in [(Begin::Boot, "arguments"), (Begin::Fork, "fork")] {
            let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/src/hypervisor/qemu");
            let path = format!("{folder}/{name}.golden.txt");
            let line = golden(begin);
            if std::env::var_os("SPORE_GOLDEN").is_some() {
                std::fs::write(&path, format!("{line}\n")).unwrap();
            }
            let expected = std::fs::read_to_string(&path).unwrap();
            assert_eq!(line, expected.trim_end(), "{path}");
        }
    }

    #[test]
    fn a_machine_without_scratch_has_its_image_and_a_folder() {
        let resources = Resources {
            disk_mib: 0,
            ..RESOURCES
        };
        assert_eq!(Disk::of(&resources), [Disk::Image, Disk::Folder]);
    }

    #[test]
    fn no_word_names_a_path_outside_the_jail() {
        let disks = Disk::of(&RESOURCES);
        for begin in [Begin::Boot, Begin::Fork] {
            for word in arguments(begin, &RESOURCES, &disks, 1) {
                let path = word.split(['=', ',']).find(|part| part.starts_with('/'));
                let of_a_descriptor = ["/dev/fdset/", "/proc/self/fd/"];
                let known = |path: &str| {
                    let is_of = |start: &&str| path.starts_with(*start);
                    of_a_descriptor.iter().any(is_of) || path == KERNEL || path == INITRAMFS
                };
                assert!(path.is_none_or(known), "{word}");
            }
        }
    }

    #[test]
    fn loops_per_jiffy_follow_the_time_stamp_counter() {
        assert!(kernel_line(1_000_000).contains("tsc_early_khz=1000000 "));
        assert!(kernel_line(1_000_000).contains("lpj=4000000 "));
    }
}
