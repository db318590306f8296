//! The jail of a VMM, and the launcher that puts it there.
//!
//! The launcher is a freshly exec'd process with one thread (`spore jail`, [`main`]); drivers start
//! it with [`Launch::start`] and tell it everything in one message over its standard input, with
//! the descriptors. After the VMM's start [`empty_root`] takes away the files that it was loaded
//! from. Never runs inside the daemon: a process with threads cannot fork safely.
//!
//! ```text
//!   daemon ──exec──▶ launcher: cgroup, session, namespaces, root of read-only binds, pivot
//!                        │ clone3(CLONE_PARENT | CLONE_NEWPID)
//!                        ├──▶ child: /proc, rlimits, fds, uid, no capabilities,
//!                        │           no_new_privs ─exec─▶ VMM
//!                        └──▶ says the child's pid, ends
//! ```
//!
//! The VMM is a child of the daemon, not of the launcher: the daemon reaps it, and when the daemon
//! is killed it lives on and is pid 1's. See docs/internals/jail.md for why each step is there.

use std::fs::{self, Permissions};
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use rustix::fs::CWD;
use rustix::mount::{
    MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount,
    mount_bind, mount_change, mount_remount, move_mount, open_tree, unmount,
};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
    sockopt,
};
use rustix::process::{Gid, Uid, pivot_root, setsid, umask};
use rustix::thread::{
    CapabilitySet, CapabilitySets, LinkNameSpaceType, UnshareFlags, clear_ambient_capability_set,
    move_into_link_name_space, remove_capability_from_bounding_set, set_capabilities,
    set_no_new_privs, set_thread_gid, set_thread_groups, set_thread_res_uid,
};
use serde::{Deserialize, Serialize};

use crate::confine::limits::ProcessLimits;
use crate::sys::{self, Forked};

/// The most bytes of the launcher's message.
const MESSAGE_BYTES_MAX: usize = 64 * 1024;

/// The most descriptors that a VMM is given: two for each of the most layers of a disk, and others.
const FDS_MAX: usize = 64;

/// How long the daemon waits for a launcher; one takes some milliseconds.
const LAUNCH_TIMEOUT: Duration = Duration::from_secs(20);

/// Where the VMM finds itself until its root is emptied, to open its own descriptors by a path.
const PROC: &str = "/proc";

/// VMMs are killed for want of memory long before the daemon, whose score is 0 or less.
const OOM_SCORE: &str = "500";

/// Everything a launcher is told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Jail {
    /// Files to write `0` to: the VM's cgroup.
    pub cgroup: Vec<PathBuf>,
    /// An empty folder of the host on which the new root is put together; in the launcher's own
    /// mount namespace, so that one folder serves all.
    pub stage: PathBuf,
    /// Files and folders of the host that the VMM is loaded from, each at the same path inside.
    pub binds: Vec<PathBuf>,
    /// Names in the new root for the descriptors behind the first `fds`: files that the VMM reads
    /// once at its start by a path.
    pub files: Vec<PathBuf>,
    /// How many descriptors the VMM keeps; they are its 0, 1, 2 …
    pub fds: usize,
    /// The program, by its path inside.
    pub program: PathBuf,
    /// Its arguments.
    pub arguments: Vec<String>,
    /// Its uid and gid.
    pub uid: u32,
    /// What it may use, beyond its cgroup.
    pub limits: ProcessLimits,
}

/// What a launcher says to the daemon.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Said {
    /// The VMM's pid. The connection then ends when the program has been exec'd.
    Pid(u32),
    /// A step failed.
    Failed {
        step: String,
        errno: Option<i32>,
        message: String,
    },
}

/// Why no VMM was started.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LaunchError {
    /// The launcher could not be started or spoken to.
    #[error("the launcher {program} does not work")]
    Launcher {
        /// Its path.
        program: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A step inside the launcher failed.
    #[error("jail: {step}")]
    Step {
        /// Which.
        step: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// It ended without a word.
    #[error("the launcher ended without a word: {0}")]
    Silent(String),
}

/// A start of a VMM.
#[derive(Debug)]
pub struct Launch<'a> {
    /// The launcher's program and arguments.
    pub launcher: &'a [String],
    /// What it is told.
    pub jail: &'a Jail,
    /// The VMM's descriptors, then those of [`Jail::files`].
    pub fds: Vec<BorrowedFd<'a>>,
}

impl Launch<'_> {
    /// Starts the VMM and returns its pid once the program was exec'd. Blocks.
    ///
    /// # Errors
    /// [`LaunchError`]; a VMM that was forked by then is in its cgroup.
    pub fn start(self) -> Result<u32, LaunchError> {
        let [program, arguments @ ..] = self.launcher else {
            return Err(LaunchError::Silent("no launcher is configured".to_owned()));
        };
        let failed = |source: io::Error| LaunchError::Launcher {
            program: program.into(),
            source,
        };
        let (ours, theirs) = socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .map_err(|errno| failed(errno.into()))?;
        let mut child = Command::new(program)
            .args(arguments)
            .env_clear()
            .current_dir("/")
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map_err(failed)?;
        let said = self.talk(&ours);
        if said.is_err() {
            // It may hang; it cannot have ended and been reaped, so the pid is its own.
            child.kill().map_err(failed)?;
        }
        let status = child.wait().map_err(failed)?;
        match said.map_err(failed)? {
            Talk {
                failed: Some(error),
                ..
            } => Err(error),
            Talk { pid: Some(pid), .. } => Ok(pid),
            Talk { .. } => Err(LaunchError::Silent(status.to_string())),
        }
    }

    fn talk(&self, socket: &OwnedFd) -> io::Result<Talk> {
        sockopt::set_socket_timeout(socket, sockopt::Timeout::Recv, Some(LAUNCH_TIMEOUT))?;
        let message = serde_json::to_vec(self.jail)?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if message.len() > MESSAGE_BYTES_MAX
            || !ancillary.push(SendAncillaryMessage::ScmRights(&self.fds))
        {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        sendmsg(
            socket,
            &[IoSlice::new(&message)],
            &mut ancillary,
            SendFlags::NOSIGNAL,
        )?;
        let mut talk = Talk::default();
        let mut buffer = vec![0; MESSAGE_BYTES_MAX];
        loop {
            let len = rustix::net::recv(socket, &mut buffer[..], RecvFlags::empty())?.0;
            if len == 0 {
                return Ok(talk);
            }
            match serde_json::from_slice(&buffer[..len])? {
                Said::Pid(pid) => talk.pid = Some(pid),
                Said::Failed {
                    step,
                    errno,
                    message,
                } => {
                    let source = errno
                        .map_or_else(|| io::Error::other(message), io::Error::from_raw_os_error);
                    talk.failed = Some(LaunchError::Step { step, source });
                }
            }
        }
    }
}

/// What was heard of a launcher until it hung up.
#[derive(Debug, Default)]
struct Talk {
    pid: Option<u32>,
    failed: Option<LaunchError>,
}

/// A step of the launcher that failed.
#[derive(Debug)]
struct Failure {
    step: String,
    source: io::Error,
}

trait Step<T> {
    fn step(self, step: impl Into<String>) -> Result<T, Failure>;
}

impl<T, E: Into<io::Error>> Step<T> for Result<T, E> {
    fn step(self, step: impl Into<String>) -> Result<T, Failure> {
        self.map_err(|error| Failure {
            step: step.into(),
            source: error.into(),
        })
    }
}

/// The launcher: everything that the internal verb `jail` does. The process must have one thread,
/// so this is called before any runtime is made.
///
/// The exit code says only whether it went well; the reason goes to the daemon.
#[must_use]
pub fn main() -> ExitCode {
    let Ok(daemon) = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3) else {
        return ExitCode::FAILURE;
    };
    let entered = receive(&daemon).and_then(|(jail, fds)| Ok((enter(&jail, fds)?, jail)));
    let (fds, jail) = match entered {
        Ok(entered) => entered,
        Err(failure) => return tell_failure(&daemon, failure),
    };
    match sys::fork_vmm().step("forking") {
        Ok(Forked::Parent(pid)) => tell(&daemon, &Said::Pid(pid)),
        Ok(Forked::Child) => become_vmm(&jail, fds, daemon),
        Err(failure) => tell_failure(&daemon, failure),
    }
}

fn tell(daemon: impl AsFd, said: &Said) -> ExitCode {
    let sent = serde_json::to_vec(said)
        .map_err(io::Error::from)
        .and_then(|bytes| Ok(rustix::net::send(daemon, &bytes, SendFlags::NOSIGNAL)?));
    if sent.is_ok() && matches!(said, Said::Pid(_)) {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn tell_failure(daemon: impl AsFd, failure: Failure) -> ExitCode {
    let Failure { step, source } = failure;
    let (errno, message) = (source.raw_os_error(), source.to_string());
    tell(
        daemon,
        &Said::Failed {
            step,
            errno,
            message,
        },
    )
}

fn receive(daemon: &OwnedFd) -> Result<(Jail, Vec<OwnedFd>), Failure> {
    let mut bytes = vec![0; MESSAGE_BYTES_MAX];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(
        daemon,
        &mut [IoSliceMut::new(&mut bytes)],
        &mut ancillary,
        RecvFlags::CMSG_CLOEXEC,
    )
    .step("reading the message")?;
    let mut fds = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    let jail: Jail =
        serde_json::from_slice(&bytes[..received.bytes]).step("reading the message")?;
    if fds.len() != jail.fds + jail.files.len() {
        return Err(io::Error::from(io::ErrorKind::InvalidData)).step("counting the descriptors");
    }
    Ok((jail, fds))
}

/// Everything before the fork; returns the descriptors that the VMM keeps.
fn enter(jail: &Jail, mut fds: Vec<OwnedFd>) -> Result<Vec<OwnedFd>, Failure> {
    for entrance in &jail.cgroup {
        fs::write(entrance, "0").step(format!("entering {}", entrance.display()))?;
    }
    fs::write("/proc/self/oom_score_adj", OOM_SCORE).step("setting the oom score")?;
    // A terminal's interrupt key is meant for the daemon, not for VMs.
    setsid().step("making a session")?;
    umask(rustix::fs::Mode::from_raw_mode(0o077));
    // Only a mount of one's own namespace can be cloned, and these are of the daemon's: so before.
    let tree = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH;
    let files = fds
        .split_off(jail.fds)
        .into_iter()
        .map(|fd| open_tree(fd, "", tree));
    let files = files
        .collect::<Result<Vec<_>, _>>()
        .step("cloning the mounts of files")?;
    let namespaces = UnshareFlags::NEWNS
        | UnshareFlags::NEWIPC
        | UnshareFlags::NEWNET
        | UnshareFlags::NEWUTS
        | UnshareFlags::NEWCGROUP;
    sys::unshare(namespaces).step("unsharing namespaces")?;
    rustix::system::sethostname(b"vmm").step("naming the host")?;
    enter_root(jail, &files)?;
    Ok(fds)
}

/// Puts the root together and enters it; the host's tree is gone afterwards.
fn enter_root(jail: &Jail, files: &[OwnedFd]) -> Result<(), Failure> {
    // As a slave, this copy of the host's mounts loses what the host unmounts meanwhile, and so
    // keeps no other VM's namespace alive; it gives nothing back.
    let slave = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    mount_change("/", slave).step("making mounts private")?;
    let root = &jail.stage;
    let options = c"mode=0555,size=64k,nr_inodes=64";
    mount("tmpfs", root, "tmpfs", root_flags(), options).step("mounting the root")?;
    let under = |path: &Path| root.join(path.strip_prefix("/").unwrap_or(path));
    for path in &jail.binds {
        let folder = fs::metadata(path)
            .step(format!("finding {}", path.display()))?
            .is_dir();
        let to = under(path);
        stub(&to, folder).step(format!("making a place for {}", path.display()))?;
        bind(path, &to).step(format!("binding {}", path.display()))?;
    }
    for (path, fd) in jail.files.iter().zip(files) {
        let to = under(path);
        stub(&to, false).step(format!("making a place for {}", path.display()))?;
        move_mount(fd, "", CWD, &to, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
            .map_err(io::Error::from)
            .and_then(|()| close_bind(&to))
            .step(format!("binding {}", path.display()))?;
    }
    stub(&under(Path::new(PROC)), true).step("making a place for /proc")?;
    mount_remount(root, root_flags() | MountFlags::RDONLY, c"").step("closing the root")?;
    std::env::set_current_dir(root).step("entering the root")?;
    pivot_root(".", ".").step("pivoting the root")?;
    unmount(".", UnmountFlags::DETACH).step("leaving the host's root")?;
    std::env::set_current_dir("/").step("entering the root")
}

fn root_flags() -> MountFlags {
    MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC
}

/// Makes what a bind mount needs to be put on.
fn stub(path: &Path, folder: bool) -> io::Result<()> {
    let parents = if folder { Some(path) } else { path.parent() };
    // The umask keeps others out of new folders; the VMM is such another.
    for part in parents
        .into_iter()
        .flat_map(Path::ancestors)
        .collect::<Vec<_>>()
        .iter()
        .rev()
    {
        if !part.exists() {
            fs::create_dir(part)?;
            fs::set_permissions(part, Permissions::from_mode(0o555))?;
        }
    }
    if !folder {
        fs::write(path, "")?;
    }
    Ok(())
}

fn bind(from: &Path, to: &Path) -> io::Result<()> {
    mount_bind(from, to)?;
    close_bind(to)
}

fn close_bind(to: &Path) -> io::Result<()> {
    let flags = MountFlags::BIND | MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV;
    Ok(mount_remount(to, flags, c"")?)
}

/// The child: gives up everything and becomes the program. Returns only when that fails.
fn become_vmm(jail: &Jail, fds: Vec<OwnedFd>, daemon: OwnedFd) -> ExitCode {
    let shown = mount_proc().step("mounting /proc");
    let limited = jail.limits.set().map_err(|error| Failure {
        step: error.to_string(),
        source: error.source,
    });
    let given_up = shown.and(limited).and_then(|()| give_up_rights(jail.uid));
    if let Err(failure) = given_up {
        return tell_failure(&daemon, failure);
    }
    // From here on the connection has another number; a failure to place it cannot be told.
    let Ok(daemon) = sys::place_fds(fds, daemon) else {
        return ExitCode::FAILURE;
    };
    let source = Command::new(&jail.program)
        .args(&jail.arguments)
        .env_clear()
        .exec();
    tell_failure(
        daemon,
        Failure {
            step: format!("starting {}", jail.program.display()),
            source,
        },
    )
}

/// Processes only, of this pid namespace, which the child is the first of: so it is mounted here,
/// and shows the VMM nothing but itself.
fn mount_proc() -> rustix::io::Result<()> {
    mount("proc", PROC, "proc", root_flags(), c"subset=pid")
}

fn give_up_rights(uid: u32) -> Result<(), Failure> {
    // Only who has CAP_SETPCAP may empty the bounding set, so it comes first; capabilities that
    // this kernel does not know are refused with EINVAL.
    for bit in 0..64 {
        let one = CapabilitySet::from_bits_retain(1 << bit);
        match remove_capability_from_bounding_set(one) {
            Ok(()) | Err(rustix::io::Errno::INVAL) => {}
            Err(error) => return Err(error).step("emptying the bounding set"),
        }
    }
    clear_ambient_capability_set().step("clearing ambient capabilities")?;
    set_thread_groups(&[]).step("leaving all groups")?;
    set_thread_gid(Gid::from_raw(uid)).step("setting the gid")?;
    let uid = Uid::from_raw(uid);
    set_thread_res_uid(uid, uid, uid).step("setting the uid")?;
    let none = CapabilitySets {
        effective: CapabilitySet::empty(),
        permitted: CapabilitySet::empty(),
        inheritable: CapabilitySet::empty(),
    };
    set_capabilities(None, none).step("dropping capabilities")?;
    set_no_new_privs(true).step("setting no_new_privs")
}

/// Takes away the files that the VMM `pid` was loaded from: its root is then empty and read-only.
/// Blocks; the work is done on a thread that ends with it, since it joins the VMM's mount
/// namespace.
///
/// # Errors
/// What the kernel says; [`io::ErrorKind::DirectoryNotEmpty`] when something is left.
pub fn empty_root(pid: u32, jail: &Jail) -> io::Result<()> {
    let namespace = fs::File::open(format!("/proc/{pid}/ns/mnt"))?;
    let mut paths: Vec<PathBuf> = jail.files.iter().chain(&jail.binds).cloned().collect();
    paths.push(PROC.into());
    let worker = std::thread::Builder::new()
        .name("empty-root".to_owned())
        .spawn(move || {
            // A thread that shares its root and working directory with others may not change them.
            sys::unshare(UnshareFlags::FS)?;
            let kind = LinkNameSpaceType::Mount;
            move_into_link_name_space(namespace.as_fd(), Some(kind))?;
            for path in paths.iter().rev() {
                unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)?;
            }
            mount_remount("/", root_flags(), c"")?;
            for entry in fs::read_dir("/")? {
                let entry = entry?;
                if entry.file_type()?.is_dir() {
                    fs::remove_dir_all(entry.path())?;
                } else {
                    fs::remove_file(entry.path())?;
                }
            }
            mount_remount("/", root_flags() | MountFlags::RDONLY, c"")?;
            if fs::read_dir("/")?.next().is_some() {
                return Err(io::ErrorKind::DirectoryNotEmpty.into());
            }
            Ok(())
        })?;
    worker
        .join()
        .map_err(|_panic| io::Error::other("the thread that empties a root panicked"))?
}
