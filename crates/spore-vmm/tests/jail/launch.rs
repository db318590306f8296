//! Debian's kernel in a VMM that a zygote made: every thread in its cell, and none needs more than
//! its list has. Skipped without the kernel (`make deps`) and without a KVM that runs guests.

use std::fs::File;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use rustix::fs::MemfdFlags;
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use serde_json::json;
use spore_vmm::clock::{Clock as _, Monotonic};
use spore_vmm::disk::overlay::layer_bytes;
use spore_vmm::kvm::Kvm;
use spore_vmm::probe::probe;
use spore_wire::launch::{Begin, FdIndex, Incarnation, Launch, Layer, MemoryOwner, Rates, Scratch};
use spore_wire::vmm::{Below, CopyOf, FromVmm, ToVmm};
use spore_wire::zygote::ExitedBy;

use crate::node::{Talk, Vmm, Zygote, listener_of};

pub(crate) const PROGRAM: &str = env!("CARGO_BIN_EXE_spore-vmm");

const KERNEL: &str = "/var/lib/spore-deps/guest/vmlinux";
const INITRAMFS: &str = "/var/lib/spore-deps/guest/initramfs.cpio";

const MEMORY_MIB: u32 = 192;
const SCRATCH_BYTES: u64 = 64 << 20;

/// A kernel takes a minute in the rig.
pub(crate) const LIMIT: Duration = Duration::from_secs(300);

pub(crate) fn file(bytes: u64) -> OwnedFd {
    let file = rustix::fs::memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&file, bytes).unwrap();
    file
}

fn layer(file: u8) -> Layer {
    Layer {
        file: FdIndex(file),
        key: None,
    }
}

/// `/dev/kvm`, if it runs guests.
pub(crate) fn usable() -> Result<File, String> {
    let open = || File::options().read(true).write(true).open("/dev/kvm");
    let device = open().map_err(|error| format!("/dev/kvm: {error}"))?;
    let kvm = Kvm::new(device.into()).map_err(|error| error.to_string())?;
    probe(&kvm, &Monotonic).map_err(|error| error.to_string())?;
    open().map_err(|error| error.to_string())
}

/// What a guest is launched with; the rest of it is the test's to hold.
pub(crate) struct Given {
    fds: Vec<OwnedFd>,
    pub(crate) blob: Launch,
    /// The other end of what is the guest's tap.
    wire: OwnedFd,
    agent: Talk,
}

impl Given {
    pub(crate) fn request(&self) -> ToVmm {
        ToVmm::Launch(Box::new(self.blob.clone()))
    }

    pub(crate) fn fds(&self) -> Vec<BorrowedFd<'_>> {
        self.fds.iter().map(|fd| fd.as_fd()).collect()
    }
}

/// A guest that begins with the files behind its memory.
pub(crate) fn given(begin: Begin, memory: OwnedFd, begins: Vec<OwnedFd>) -> Given {
    let next = u8::try_from(1 + begins.len()).unwrap();
    // For a device a tap is a descriptor with a frame in each read and write.
    let (kind, flags) = (SocketType::DGRAM, SocketFlags::CLOEXEC);
    let pair = rustix::net::socketpair(AddressFamily::UNIX, kind, flags, None);
    let (tap, wire) = pair.unwrap();
    let (address, agent) = listener_of(SocketType::STREAM);
    let blob = Launch {
        vm: "abcdefghijklmnopqrstuvwxya".parse().unwrap(),
        vcpus: 2,
        memory_mib: MEMORY_MIB,
        memory: FdIndex(0),
        begin,
        incarnation: Incarnation::random().unwrap(),
        image: FdIndex(next),
        folder: FdIndex(next + 1),
        scratch: Some(Scratch {
            bytes: SCRATCH_BYTES,
            base: Some(FdIndex(next + 5)),
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
    fds.extend([
        file(1 << 20),
        file(1 << 20),
        file(layer_bytes(SCRATCH_BYTES)),
        tap,
        agent,
        file(SCRATCH_BYTES),
    ]);
    Given {
        fds,
        blob,
        wire,
        agent: Talk::to(SocketType::STREAM, &address),
    }
}

pub(crate) fn memory() -> OwnedFd {
    file(u64::from(MEMORY_MIB) << 20)
}

/// One that boots Debian's kernel; `None` without it.
pub(crate) fn boots(memory: OwnedFd) -> Option<Given> {
    let (Ok(kernel), Ok(initramfs)) = (File::open(KERNEL), File::open(INITRAMFS)) else {
        println!("SKIPPED: no kernel; `make deps` fetches it");
        return None;
    };
    let begin = Begin::Boot {
        kernel: FdIndex(1),
        initramfs: FdIndex(2),
        command_line: "console=ttyS0 panic=-1".to_owned(),
    };
    Some(given(begin, memory, vec![kernel.into(), initramfs.into()]))
}

/// The node's side of a VMM that serves its control socket.
pub(crate) struct Control<'a> {
    pub(crate) talk: Talk,
    zygote: &'a Zygote,
    /// How the guest ended.
    ended: Option<FromVmm>,
    /// A copy of its disk is whole.
    copied: bool,
}

impl<'a> Control<'a> {
    pub(crate) fn new(zygote: &'a Zygote, vmm: &Vmm) -> Self {
        let mut control = Self {
            talk: vmm.connect(),
            zygote,
            ended: None,
            copied: false,
        };
        assert!(matches!(control.hears(), FromVmm::Hello { .. }));
        control
    }

    pub(crate) fn launch(&mut self, given: &Given) -> Result<u64, String> {
        self.tries(&given.request(), &given.fds())
    }

    fn switch(&mut self) {
        let own = file(layer_bytes(SCRATCH_BYTES));
        self.asks(&ToVmm::Switch { own: layer(0) }, &[own.as_fd()]);
    }

    pub(crate) fn quit(self, vmm: &Vmm) {
        self.talk.says(&json!({"type": "quit"}).to_string());
        assert_eq!(self.zygote.waits(vmm), ExitedBy::Code { code: 0 });
    }

    /// The next message but that of the guest's end, which is kept.
    fn hears(&mut self) -> FromVmm {
        let heard = self.hears_if_there();
        heard.unwrap_or_else(|| panic!("the VMM is gone: {:?}", self.zygote.hears().0))
    }

    /// `None` when the VMM ended instead.
    fn hears_if_there(&mut self) -> Option<FromVmm> {
        loop {
            let text = self.talk.hears()?;
            match serde_json::from_str(&text).unwrap() {
                end @ FromVmm::Ended { .. } => self.ended = Some(end),
                FromVmm::Copied { why } => {
                    assert_eq!(why, None);
                    self.copied = true;
                }
                other => return Some(other),
            }
        }
    }

    pub(crate) fn asks(&mut self, what: &ToVmm, fds: &[BorrowedFd<'_>]) -> u64 {
        let done = self.tries(what, fds);
        done.unwrap_or_else(|why| panic!("{what:?}: {why}"))
    }

    /// As [`asks`](Self::asks), or why it was not done.
    pub(crate) fn tries(&mut self, what: &ToVmm, fds: &[BorrowedFd<'_>]) -> Result<u64, String> {
        let done = self.tries_if_there(what, fds);
        done.unwrap_or_else(|| panic!("the VMM is gone: {:?}", self.zygote.hears().0))
    }

    /// As [`tries`](Self::tries); `None` when the VMM ended instead.
    pub(crate) fn tries_if_there(
        &mut self,
        what: &ToVmm,
        fds: &[BorrowedFd<'_>],
    ) -> Option<Result<u64, String>> {
        self.talk.sends(&serde_json::to_vec(what).unwrap(), fds);
        Some(match self.hears_if_there()? {
            FromVmm::Done { bytes } => Ok(bytes),
            FromVmm::Failed { why } => Err(why),
            other => panic!("{what:?}: {other:?}"),
        })
    }

    fn console(&mut self) -> String {
        let into = file(0);
        let count = self.asks(&ToVmm::Console, &[into.as_fd()]);
        let mut text = vec![0; usize::try_from(count).unwrap()];
        let read = rustix::io::pread(&into, &mut text, 0).unwrap();
        assert_eq!(read, text.len());
        String::from_utf8_lossy(&text).into_owned()
    }

    /// Waits until the guest has said something.
    pub(crate) fn says(&mut self, what: &str) {
        let start = Monotonic.now();
        loop {
            let text = self.console();
            if text.contains(what) {
                return;
            }
            let waited = Monotonic.now() - start;
            let ended = &self.ended;
            assert!(
                waited < LIMIT && ended.is_none(),
                "no {what:?}, {ended:?}:\n{text}"
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// Each thread enters its cell as it begins, and does nothing before.
pub(crate) fn check_threads(vmm: &Vmm, vcpus: usize) {
    // The zygote's list, the first thread's until now, and one of its own.
    let row = |name: &&str| ((*name).to_owned(), "3".to_owned());
    let names = ["copy", "devices", "spore-vmm", "vcpu0", "vcpu1"];
    let expected: Vec<_> = names[..3 + vcpus].iter().map(row).collect();
    let start = Monotonic.now();
    loop {
        let threads = vmm.process.threads().into_iter();
        let lists = threads.map(|thread| {
            let of = |key: &str| thread.get(key).cloned().unwrap_or_default();
            (of("Name"), of("Seccomp_filters"))
        });
        let mut lists: Vec<(String, String)> = lists.collect();
        lists.sort();
        if lists == expected {
            return;
        }
        assert!(Monotonic.now() - start < LIMIT, "{lists:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

pub(crate) fn a_guest_runs_with_every_thread_in_its_cell() {
    let Some(given) = boots(memory()) else { return };
    let kvm = match usable() {
        Ok(kvm) => kvm,
        Err(why) => return println!("SKIPPED: {why}"),
    };
    let zygote = Zygote::start(Path::new(PROGRAM), &["zygote", "--uids"], Some(kvm));
    let vmm = zygote.spawn(1);
    let mut control = Control::new(&zygote, &vmm);
    control.launch(&given).unwrap();
    control.asks(&ToVmm::Resume, &[]);
    check_threads(&vmm, 2);
    vmm.process.check_jail(vmm.uid);
    vmm.process.check_vm(2);
    control.says("Linux version");
    for _ in 0..5 {
        control.asks(&ToVmm::Pause { limit_ms: 60_000 }, &[]);
        control.switch();
        control.asks(&ToVmm::Resume, &[]);
    }
    control.says("[vdc]");
    // Somebody writes to the agent and to the network meanwhile; who listens is the guest's.
    given.agent.sends(&[0; 4096], &[]);
    rustix::io::write(&given.wire, &[0xff; 76]).unwrap();
    control.says("the guest did not come up");
    while control.ended.is_none() {
        control.console();
    }
    let said = control.console();
    println!("{:?}\n{said}", control.ended);
    control.quit(&vmm);
    zygote.close();
}

/// A guest need not run for this, so that a KVM is enough that runs none.
pub(crate) fn a_paused_guest_is_saved_copied_and_restored_in_the_jail() {
    let memory = memory();
    let Some(given_boot) = boots(memory.try_clone().unwrap()) else {
        return;
    };
    let kvm = match File::options().read(true).write(true).open("/dev/kvm") {
        Ok(kvm) => kvm,
        Err(error) => return println!("SKIPPED: /dev/kvm: {error}"),
    };
    let zygote = Zygote::start(Path::new(PROGRAM), &["zygote", "--uids"], Some(kvm));
    let vmm = zygote.spawn(1);
    let mut control = Control::new(&zygote, &vmm);
    control.launch(&given_boot).unwrap();
    check_threads(&vmm, 2);
    let state = file(0);
    assert!(control.asks(&ToVmm::Save, &[state.as_fd()]) > 0);
    let to = file(layer_bytes(SCRATCH_BYTES));
    let copy = ToVmm::Copy {
        to: layer(0),
        below: Below::Nothing,
        of: CopyOf::Paused,
    };
    control.asks(&copy, &[to.as_fd()]);
    while !control.copied {
        control.console();
    }
    for _ in 0..3 {
        control.switch();
    }
    control.asks(&ToVmm::CancelCopy, &[]);
    control.quit(&vmm);

    let begin = Begin::Restore {
        state: FdIndex(1),
        memory: MemoryOwner::Shared,
        ahead: Vec::new(),
    };
    let restored = given(begin, memory, vec![state]);
    let vmm = zygote.spawn(2);
    let mut control = Control::new(&zygote, &vmm);
    match control.launch(&restored) {
        Ok(_) => {
            check_threads(&vmm, 2);
            let again = file(0);
            assert!(control.asks(&ToVmm::Save, &[again.as_fd()]) > 0);
        }
        // A KVM that runs no guests may not know the processor that it has shown.
        Err(why) => {
            assert!(why.contains("this host lacks"), "{why}");
            println!("SKIPPED: restored in the jail: {why}");
        }
    }
    control.quit(&vmm);
    zygote.close();
}
