//! How a process that root has just started becomes a zygote. Why in this order: [`super`].

use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsRawFd as _, OwnedFd, RawFd};
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::Duration;

use landlock::{
    ABI, Access as _, AccessFs, AccessNet, CompatLevel, Compatible as _, Ruleset, RulesetAttr as _,
    RulesetError, Scope,
};
use rustix::fs::FileType;
use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, unmount,
};
use rustix::net::SocketType;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{DumpableBehavior, WaitOptions, set_dumpable_behavior, waitpid};
use rustix::thread::{CapabilitySet, Gid, Uid, UnshareFlags, disable_transparent_huge_pages};
use spore_wire::zygote::{KVM_FD, SOCKET_FD};

use super::child::{empty_bounding_set, set_capabilities};
use super::limits::Limits;
use super::seccomp::{self, Cell};
use super::sys::{self, Copied};
use super::zygote::Ids;
use super::{JailError, check, step};
use crate::clock::{Clock as _, Monotonic};

/// VMMs are killed for want of memory long before the daemon, whose score is 0 or less.
const OOM_SCORE: &str = "500";

/// What a zygote needs for its children's jail: a pid namespace and a cgroup namespace, their
/// uids and gids, and empty bounding sets. None counts in a namespace that it is in itself.
pub(super) const KEPT: CapabilitySet = CapabilitySet::SYS_ADMIN
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETPCAP);

/// What a zygote holds.
#[derive(Debug)]
pub(super) struct Held {
    /// `/dev/null`.
    pub(super) null: OwnedFd,
    /// To the node.
    pub(super) socket: OwnedFd,
    /// `/dev/kvm`, if it was given.
    pub(super) kvm: Option<OwnedFd>,
    /// Tells of the ends of children.
    pub(super) children: OwnedFd,
}

/// The devices', that of copies, and a processor's.
const THREADS: usize = 3;

/// Only a host that hangs takes longer to end a thread.
const ENDS_MAX: Duration = Duration::from_secs(60);

/// Where `children` is.
const CHILDREN_FD: RawFd = 5;

/// Jails the calling process as a zygote.
pub(super) fn set_up(ids: Ids) -> Result<Held, JailError> {
    let user = rustix::process::geteuid();
    check("it was not started by root", user == Uid::ROOT)?;
    check(
        "it was started with an environment",
        !sys::has_environment(),
    )?;
    sys::one_heap();
    // Where a stack happens to lie so, its first byte would take 2 MiB, for each VMM of its own.
    disable_transparent_huge_pages(true).map_err(step("huge pages"))?;
    // The first time, rustix looks for the vDSO, in a file of `/proc` where prctl(2) tells it not.
    let _now = Monotonic.now();
    rehearse()?;
    seccomp::prepare()?;
    let mut held = descriptors()?;
    // One that leads its session's group already need not leave it.
    if let Err(error) = rustix::process::setsid()
        && error != rustix::io::Errno::PERM
    {
        return Err(step("session")(error));
    }
    let _before = rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    let mapper = Mapper::start(ids)?;
    fs::write("/proc/self/oom_score_adj", OOM_SCORE).map_err(step("oom_score_adj"))?;
    rustix::thread::set_thread_groups(&[]).map_err(step("groups"))?;
    let spaces =
        UnshareFlags::NEWNS | UnshareFlags::NEWNET | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS;
    sys::unshare(spaces).map_err(step("namespaces"))?;
    empty_root()?;
    Limits::ZYGOTE.set()?;
    no_files().map_err(|error| step("landlock")(io::Error::other(error)))?;
    sys::unshare(UnshareFlags::NEWUSER).map_err(step("user namespace"))?;
    mapper.map()?;
    rustix::thread::set_thread_res_gid(Gid::ROOT, Gid::ROOT, Gid::ROOT).map_err(step("gid"))?;
    rustix::thread::set_thread_res_uid(Uid::ROOT, Uid::ROOT, Uid::ROOT).map_err(step("uid"))?;
    empty_bounding_set(CapabilitySet::all(), KEPT)?;
    set_capabilities(KEPT)?;
    rustix::thread::set_no_new_privs(true).map_err(step("no_new_privs"))?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(step("dumpable"))?;
    // Last, since it is where this process says why it could not go on.
    held.null = null_streams(held.null)?;
    seccomp::enter(Cell::Zygote)?;
    Ok(held)
}

/// Makes the threads of a VMM with one processor, and lets them end. What the libraries look up for
/// a process's first thread its copies then have, and the stacks are kept for theirs.
fn rehearse() -> Result<(), JailError> {
    let together = Arc::new(Barrier::new(THREADS));
    let threads = (0..THREADS).map(|_| {
        let together = Arc::clone(&together);
        let waits = move || {
            together.wait();
        };
        thread::Builder::new().spawn(waits)
    });
    // All at once: each has a stack of its own.
    let threads = threads
        .collect::<io::Result<Vec<_>>>()
        .map_err(step("threads"))?;
    for thread in threads {
        check("a thread that only waits failed", thread.join().is_ok())?;
    }
    // The kernel counts a thread for some time after it was waited for, and gives no namespace to
    // a process that has more than one.
    let until = Monotonic.now() + ENDS_MAX;
    while fs::read_dir("/proc/self/task")
        .map_err(step("threads"))?
        .count()
        > 1
    {
        check("a thread does not end", Monotonic.now() < until)?;
        thread::sleep(Duration::from_micros(100));
    }
    Ok(())
}

/// Takes what was given, makes what is missing, and closes everything else but standard error.
fn descriptors() -> Result<Held, JailError> {
    // Before anything that is opened here could take these numbers.
    check("descriptor 3 was not given", sys::is_open(SOCKET_FD))?;
    let given = sys::is_open(KVM_FD);
    let null = File::options().read(true).write(true).open("/dev/null");
    let null = null.map_err(step("/dev/null"))?;
    let children = sys::children().map_err(step("signals"))?;
    let mut pairs = vec![
        (null.as_raw_fd(), 0),
        (null.as_raw_fd(), 1),
        (2, 2),
        (SOCKET_FD, SOCKET_FD),
        (children.as_raw_fd(), CHILDREN_FD),
    ];
    if given {
        pairs.push((KVM_FD, KVM_FD));
    }
    // Both are at other numbers now.
    std::mem::forget(null);
    std::mem::forget(children);
    sys::place(&pairs).map_err(step("descriptors"))?;
    let held = Held {
        null: sys::placed(0),
        socket: sys::placed(SOCKET_FD),
        kvm: given.then(|| sys::placed(KVM_FD)),
        children: sys::placed(CHILDREN_FD),
    };
    let kind = rustix::net::sockopt::socket_type(&held.socket);
    let kind = kind.map_err(step("descriptor 3 is no socket"))?;
    check(
        "descriptor 3 is no socket of packets",
        kind == SocketType::SEQPACKET,
    )?;
    if let Some(kvm) = &held.kvm {
        let stat = rustix::fs::fstat(kvm).map_err(step("descriptor 4"))?;
        let kind = FileType::from_raw_mode(stat.st_mode);
        check(
            "descriptor 4 is no device",
            kind == FileType::CharacterDevice,
        )?;
    }
    Ok(held)
}

/// Lets standard error be `/dev/null` too.
fn null_streams(null: OwnedFd) -> Result<OwnedFd, JailError> {
    rustix::stdio::dup2_stderr(&null).map_err(step("standard error"))?;
    Ok(null)
}

/// Makes an empty, read-only file system the root of this process's own mount namespace.
fn empty_root() -> Result<(), JailError> {
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    mount_change("/", private).map_err(step("own mounts"))?;
    let locked = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC | MountFlags::RDONLY;
    // Any folder will do: it is covered in this namespace only.
    mount(
        "none",
        "/proc",
        "tmpfs",
        locked,
        c"size=4k,nr_inodes=2,mode=0555",
    )
    .map_err(step("empty root"))?;
    rustix::process::chdir("/proc").map_err(step("enter the empty root"))?;
    // pivot_root(2): with both arguments ".", the old root ends up on top and is detached.
    rustix::process::pivot_root(".", ".").map_err(step("pivot to the empty root"))?;
    unmount(".", UnmountFlags::DETACH).map_err(step("leave the old root"))?;
    rustix::process::chdir("/").map_err(step("enter the root"))
}

/// Forbids all that this kernel's landlock can: files, ports, and whoever is not in this zygote's
/// domain. A kernel without it forbids nothing here.
fn no_files() -> Result<(), RulesetError> {
    const NEWEST: ABI = ABI::V6;
    Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(NEWEST))?
        .handle_access(AccessNet::from_all(NEWEST))?
        .scope(Scope::from_all(NEWEST))?
        .create()?
        .restrict_self()?;
    Ok(())
}

/// A copy of this process from before it gave anything up: only who has the host's privileges may
/// say which of the host's ids a user namespace has.
#[derive(Debug)]
struct Mapper {
    pid: rustix::process::Pid,
    go: OwnedFd,
}

impl Mapper {
    fn start(ids: Ids) -> Result<Self, JailError> {
        let (waits, go) = pipe_with(PipeFlags::CLOEXEC).map_err(step("pipe"))?;
        let zygote = rustix::process::getpid();
        match sys::fork().map_err(step("the copy that maps ids"))? {
            Copied::Copy => {
                drop(go);
                let done = write_maps(waits, zygote, ids);
                sys::end(u8::from(done.is_err()))
            }
            Copied::Source(pid) => {
                let pid = rustix::process::Pid::from_raw(pid.cast_signed());
                let pid = pid.ok_or(JailError::Left {
                    what: "a copy without a pid",
                })?;
                Ok(Self { pid, go })
            }
        }
    }

    /// Lets it map, and waits until it has and is gone.
    fn map(self) -> Result<(), JailError> {
        rustix::io::write(&self.go, &[1]).map_err(step("ids"))?;
        let ended = waitpid(Some(self.pid), WaitOptions::empty()).map_err(step("ids"))?;
        let code = ended.and_then(|(_, status)| status.exit_status());
        check("ids are not mapped", code == Some(0))
    }
}

fn write_maps(waits: OwnedFd, zygote: rustix::process::Pid, ids: Ids) -> io::Result<()> {
    let mut go = [0];
    File::from(waits).read_exact(&mut go)?;
    if rustix::process::getppid() != Some(zygote) {
        return Err(io::ErrorKind::NotFound.into());
    }
    let proc = format!("/proc/{}", zygote.as_raw_pid());
    let write = |name: &str, text: &str| {
        let mut file = File::options().write(true).open(format!("{proc}/{name}"))?;
        file.write_all(text.as_bytes())
    };
    let map = format!("0 {} {}", ids.first(), ids.count());
    // Without it a process could leave a group that a file forbids something to.
    write("setgroups", "deny")?;
    for name in ["uid_map", "gid_map"] {
        write(name, &map)?;
        let now = fs::read_to_string(format!("{proc}/{name}"))?;
        if !now.split_whitespace().eq(map.split_whitespace()) {
            return Err(io::ErrorKind::InvalidData.into());
        }
    }
    Ok(())
}
