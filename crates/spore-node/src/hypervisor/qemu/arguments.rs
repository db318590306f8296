//! QEMU's command line: a microvm in software emulation whose every resource is a descriptor.
//!
//! Called by the `qemu` driver. Pure: numbers and text in, text out. Never names a path of the
//! host; what has a path here has it inside the jail.

use serde_json::{Value, json};
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
    /// As a fork, in memory of its own that holds everything already.
    GoOn,
}

/// The character device of the guest's console: a ring in QEMU's memory, which can neither block
/// the guest nor fill a disk.
pub(super) const CONSOLE: &str = "console";

/// Its size; QEMU wants a power of two.
pub(super) const CONSOLE_BYTES: usize = 64 * 1024;

/// No packet that the guest is given is larger than one of its buffers. For one that needs several,
/// QEMU before 9.1 can look for buffers while the guest adds some, find too few, and miss the
/// notification that it waits for: the guest then gets no packet any more, and no connection.
/// (QEMU's git: "virtio-net: Fix network stall at the host side waiting for kick".)
const ONE_BUFFER_A_PACKET: &str = "guest_tso4=off,guest_tso6=off,guest_ecn=off,guest_ufo=off";

/// The cache of translated code. A part of the driver's overhead beyond the guest's memory.
const TRANSLATION_MIB: u32 = 64;

/// What a guest sees: what x86-64-v2 has, since prebuilt programs expect it, and RDRAND for the
/// first entropy.
pub(super) const CPU: &str = "qemu64,+ssse3,+sse4.1,+sse4.2,+popcnt,+rdrand";

/// Ticks per second of the guest's kernel (Debian's cloud kernel).
const GUEST_HZ: u64 = 250;

/// The node of QEMU's block graph that the guest's scratch disk is.
pub(super) const SCRATCH: &str = "d2";

/// What the nodes of a source's layers begin with; a number follows.
pub(super) const LAYER: &str = "l";

/// A disk that is never written. In the order in which the guest names them: vda, vdb.
const READ_ONLY: [&str; 2] = ["image", "folder"];

/// Formats are explicit: QEMU would else guess from what a guest wrote. Without
/// `auto-read-only=off` it would open a file read-only first, which a descriptor may not be.
const UNCHANGED: &str = "read-only=on,auto-read-only=off";

/// The machine's own part of its scratch disk is gone with it, so nothing is gained by flushing it;
/// freed blocks are given back to the host.
const OWN: &str = "auto-read-only=off,cache.no-flush=on,discard=unmap";

/// Whether a file needs a key, whose descriptor follows its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lock {
    Open,
    Locked,
}

/// What a machine writes its scratch disk over. What it writes is locked, with a key of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Scratch {
    /// It has none.
    None,
    /// An empty file system.
    New,
    /// What it was forked with, lowest first.
    Forked(Vec<Lock>),
}

impl Scratch {
    /// That of a machine that boots.
    pub(super) const fn of(resources: &Resources) -> Self {
        match resources.disk_mib {
            0 => Self::None,
            _ => Self::New,
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

/// A command line, without the program.
#[derive(Debug)]
pub(super) struct CommandLine {
    pub(super) words: Vec<String>,
    /// How many descriptors it names.
    pub(super) fds: usize,
}

/// The whole command line; a fork has no use for the kernel's. A fork's device state is its last
/// descriptor.
pub(super) fn arguments(
    begin: Begin,
    resources: &Resources,
    scratch: &Scratch,
    kernel_line: &str,
) -> CommandLine {
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
            line.option("-append", kernel_line);
        }
        // What xen-save-devices-state writes does not say whether the VM ran.
        Begin::Fork | Begin::GoOn => {
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
    let mut fds = Numbers(FD_DISKS);
    for (index, serial) in READ_ONLY.into_iter().enumerate() {
        add_disk(&mut line, &mut fds, index, serial);
    }
    add_scratch(&mut line, &mut fds, scratch);
    line.option("-netdev", format!("tap,id=net,fd={FD_TAP},vhost=off"));
    line.option(
        "-device",
        format!("virtio-net-device,netdev=net,mac={GUEST_MAC_TEXT},{ONE_BUFFER_A_PACKET}"),
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
    let words = line.words;
    let fds = match begin {
        Begin::Boot => fds.0,
        Begin::Fork | Begin::GoOn => fds.0 + 1,
    };
    CommandLine { words, fds }
}

/// Memory is a file of the node's, so that it can be read and sealed from outside. That of most
/// forks is a sealed one that they share, mapped privately; QEMU opens it for writing all the same,
/// and by a path, which `/proc` gives it until its root is emptied.
fn add_machine(line: &mut Line, begin: Begin, resources: &Resources) {
    line.option(
        "-machine",
        "microvm,mem-merge=off,dump-guest-core=off,memory-backend=mem,suppress-vmdesc=on",
    );
    // A description of the configuration, which what is loaded here does not have.
    line.option("-global", "migration.send-configuration=off");
    let share = match begin {
        Begin::Boot | Begin::GoOn => "on",
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

/// The descriptors as they are given out.
#[derive(Debug)]
struct Numbers(usize);

impl Numbers {
    const fn next(&mut self) -> usize {
        let number = self.0;
        self.0 += 1;
        number
    }
}

/// A disk is two nodes of QEMU's block graph, a file and what is in it.
fn add_disk(line: &mut Line, fds: &mut Numbers, index: usize, serial: &str) {
    add_file(line, fds.next(), &format!("f{index}"), UNCHANGED);
    add_raw(line, &format!("d{index}"), &format!("f{index}"));
    line.option(
        "-device",
        format!("virtio-blk-device,drive=d{index},serial={serial}"),
    );
}

fn add_file(line: &mut Line, fd: usize, name: &str, access: &str) {
    line.option("-add-fd", format!("fd={fd},set={fd}"));
    line.option(
        "-blockdev",
        format!("driver=file,node-name={name},filename=/dev/fdset/{fd},locking=off,{access}"),
    );
}

fn add_raw(line: &mut Line, name: &str, file: &str) {
    line.option(
        "-blockdev",
        format!("driver=raw,node-name={name},file={file},{UNCHANGED}"),
    );
}

/// What is below a layer is said here and never read from it: whoever wrote it was a guest's VMM.
fn add_scratch(line: &mut Line, fds: &mut Numbers, scratch: &Scratch) {
    let below = match scratch {
        Scratch::None => return,
        Scratch::New => {
            add_file(line, fds.next(), "fb", UNCHANGED);
            add_raw(line, "b", "fb");
            Some("b".to_owned())
        }
        Scratch::Forked(layers) => {
            let mut below = None;
            for (index, lock) in layers.iter().enumerate() {
                let (file, name) = (format!("g{index}"), format!("{LAYER}{index}"));
                add_file(line, fds.next(), &file, UNCHANGED);
                let secret = add_secret(line, fds, *lock, &index.to_string());
                let mut node = layer(&name, &file, below.as_deref(), secret);
                node["read-only"] = json!(true);
                line.option("-blockdev", node.to_string());
                below = Some(name);
            }
            below
        }
    };
    add_file(line, fds.next(), "f2", OWN);
    let secret = add_secret(line, fds, Lock::Locked, "");
    let mut node = layer(SCRATCH, "f2", below.as_deref(), secret);
    node["cache"] = json!({"no-flush": true});
    node["discard"] = json!("unmap");
    line.option("-blockdev", node.to_string());
    line.option(
        "-device",
        format!("virtio-blk-device,drive={SCRATCH},serial=scratch,werror=report,rerror=report"),
    );
}

/// The name of the secret that opens a file, where it needs one. QEMU reads it by a path while it
/// has `/proc`, and its file is emptied once it has.
fn add_secret(line: &mut Line, fds: &mut Numbers, lock: Lock, name: &str) -> Option<String> {
    let Lock::Locked = lock else {
        return None;
    };
    let (id, fd) = (format!("k{name}"), fds.next());
    line.option("-object", format!("secret,id={id},file=/proc/self/fd/{fd}"));
    Some(id)
}

/// A layer as QMP and the command line have it: only JSON can say that nothing is below.
pub(super) fn layer(name: &str, file: &str, below: Option<&str>, secret: Option<String>) -> Value {
    let mut node = json!({
        "driver": "qcow2", "node-name": name, "file": file, "backing": below,
        "auto-read-only": false,
    });
    if let Some(secret) = secret {
        node["encrypt"] = json!({"format": "luks", "key-secret": secret});
    }
    node
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

    use super::{Begin, FD_DISKS, INITRAMFS, KERNEL, Lock, Scratch, arguments, kernel_line};

    const RESOURCES: Resources = Resources {
        cpus: 2,
        memory_mib: 256,
        disk_mib: 1024,
    };

    fn both() -> [(Begin, Scratch); 2] {
        let layers = vec![Lock::Open, Lock::Locked];
        [
            (Begin::Boot, Scratch::of(&RESOURCES)),
            (Begin::Fork, Scratch::Forked(layers)),
        ]
    }

    #[test]
    fn the_command_lines_are_the_golden_ones() {
        for ((begin, scratch), name) in both().into_iter().zip(["arguments", "fork"]) {
            let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/src/hypervisor/qemu");
            let path = format!("{folder}/{name}.golden.txt");
            let line = arguments(begin, &RESOURCES, &scratch, &kernel_line(2_100_000));
            let line = line.words.join("\n");
            if std::env::var_os("SPORE_GOLDEN").is_some() {
                std::fs::write(&path, format!("{line}\n")).unwrap();
            }
            let expected = std::fs::read_to_string(&path).unwrap();
            assert_eq!(line, expected.trim_end(), "{path}");
        }
    }

    #[test]
    fn a_vm_that_goes_on_is_a_fork_with_a_memory_of_its_own() {
        let scratch = Scratch::Forked(vec![Lock::Open]);
        let line = |begin| arguments(begin, &RESOURCES, &scratch, "quiet");
        let (fork, own) = (line(Begin::Fork), line(Begin::GoOn));
        assert_eq!(fork.fds, own.fds);
        let pairs = fork.words.iter().zip(&own.words);
        let others: Vec<_> = pairs.filter(|(fork, own)| fork != own).collect();
        let [(fork, own)] = others[..] else {
            panic!("{others:?}");
        };
        assert!(fork.contains("share=off"), "{fork}");
        assert_eq!(*own, fork.replace("share=off", "share=on"));
    }

    #[test]
    fn a_machine_without_scratch_has_its_image_and_a_folder() {
        let resources = Resources {
            disk_mib: 0,
            ..RESOURCES
        };
        let scratch = Scratch::of(&resources);
        assert_eq!(scratch, Scratch::None);
        let line = arguments(Begin::Boot, &resources, &scratch, "quiet");
        assert_eq!(line.fds, FD_DISKS + 2);
    }

    #[test]
    fn every_descriptor_is_named_once_and_keys_are_not_given_as_disks() {
        let [boot, fork] = both().map(|(begin, scratch)| {
            let line = arguments(begin, &RESOURCES, &scratch, "quiet");
            let numbers = |prefix: &str| -> Vec<usize> {
                let of = line
                    .words
                    .iter()
                    .filter_map(|word| word.strip_prefix(prefix));
                let first = of.filter_map(|rest| rest.split(',').next()?.parse().ok());
                first.collect()
            };
            let keys = line.words.iter().filter_map(|word| {
                let (_id, fd) = word.strip_prefix("secret,id=k")?.split_once("self/fd/")?;
                fd.parse::<usize>().ok()
            });
            (line.fds, numbers("fd="), keys.collect::<Vec<_>>())
        });
        assert_eq!(boot, (12, vec![7, 8, 9, 10], vec![11]));
        // The last one is the state, which only QMP names.
        assert_eq!(fork, (15, vec![7, 8, 9, 10, 12], vec![11, 13]));
    }

    #[test]
    fn no_word_names_a_path_outside_the_jail() {
        for (begin, scratch) in both() {
            for word in arguments(begin, &RESOURCES, &scratch, "quiet").words {
                let mut parts = word.split(['=', ',', '"']);
                let path = parts.find(|part| part.starts_with('/'));
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
