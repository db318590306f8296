//! How our own helper processes give up what they do not need: gateway, egress proxy, image packer.
//!
//! Called by the internal verbs of the program, first thing in `main`, while the process has one
//! thread and before it has read a byte that somebody else wrote. Never used for a VMM: QEMU is
//! started by the jail, which confines from outside.
//!
//! The order is fixed, since each step needs a privilege that a later one gives up:
//!
//! 1. close every descriptor that was not announced (needs `/proc`);
//! 2. own mount, ipc, uts and, unless asked otherwise, network namespace (needs `CAP_SYS_ADMIN`);
//! 3. an empty, read-only root (`CAP_SYS_ADMIN`);
//! 4. limits ([`limits`]);
//! 5. an empty bounding set (`CAP_SETPCAP`), no supplementary groups, own gid and uid (which drops
//!    the other capability sets), `no_new_privs`, not dumpable;
//! 6. a seccomp filter (`filter.rs`) that ends the process at system calls it can have no use for.

use std::os::fd::{OwnedFd, RawFd};

use nix::mount::{MntFlags, MsFlags};
use nix::sched::CloneFlags;
use nix::unistd::{Gid, Uid};
use rustix::process::{PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use rustix::thread::CapabilitySet;
use thiserror::Error;

mod filter;
pub mod limits;

use limits::{LimitError, ProcessLimits, no_core_file};

/// What a helper process keeps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Confinement {
    /// The uid and gid it runs as; never 0.
    pub uid: u32,
    /// The descriptors it keeps, besides 0, 1 and 2.
    pub keep: Vec<RawFd>,
    /// The network it sees.
    pub network: Network,
    /// What it may use: a row of the table.
    pub limits: ProcessLimits,
}

/// The network a helper process sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Network {
    /// None: only sockets that it inherits or is passed.
    Empty,
    /// The host's, to dial from.
    Host,
}

/// Why a process could not be confined; it must end.
#[derive(Debug, Error)]
pub enum ConfineError {
    /// Running on as root is never meant.
    #[error("a helper process cannot run as uid 0")]
    Root,
    /// A step was refused.
    #[error("cannot confine the process: {what}")]
    Step {
        /// Which.
        what: &'static str,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// A limit was refused.
    #[error("cannot confine the process")]
    Limit(#[from] LimitError),
    /// The filter could not be built or installed.
    #[error("cannot confine the process: seccomp filter")]
    Filter(#[from] seccompiler::Error),
    /// The filter's rules are contradictory.
    #[error("cannot confine the process: seccomp rules")]
    Rules(#[from] seccompiler::BackendError),
}

/// Confines the calling process for good. Legal once, as root, while it has one thread.
///
/// # Errors
/// [`ConfineError`]; the process is then in an undefined state between root and confined and must
/// end.
pub fn confine(confinement: &Confinement) -> Result<(), ConfineError> {
    if confinement.uid == 0 {
        return Err(ConfineError::Root);
    }
    close_all_but(&confinement.keep)?;
    let mut flags = CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS;
    if confinement.network == Network::Empty {
        flags |= CloneFlags::CLONE_NEWNET;
    }
    nix::sched::unshare(flags).map_err(step("own namespaces"))?;
    empty_root()?;
    confinement.limits.set()?;
    drop_privileges(confinement.uid)?;
    filter::install()
}

/// Takes over an inherited descriptor under a new number; the old number is closed by [`confine`],
/// which closes whatever is not kept. Needs no unsafe code: the kernel makes the new one
/// (pidfd_getfd(2) on the process itself).
///
/// # Errors
/// When nothing was inherited under that number.
pub fn take_inherited(number: RawFd) -> std::io::Result<OwnedFd> {
    let pidfd = pidfd_open(rustix::process::getpid(), PidfdFlags::empty())?;
    Ok(pidfd_getfd(&pidfd, number, PidfdGetfdFlags::empty())?)
}

fn step<E: Into<std::io::Error>>(what: &'static str) -> impl FnOnce(E) -> ConfineError {
    move |source| ConfineError::Step {
        what,
        source: source.into(),
    }
}

fn close_all_but(keep: &[RawFd]) -> Result<(), ConfineError> {
    let open = std::fs::read_dir("/proc/self/fd")
        .map_err(step("list descriptors"))?
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<RawFd>().ok())
        .collect::<Vec<_>>();
    for fd in open {
        if fd > 2 && !keep.contains(&fd) {
            // The listing itself had a descriptor, which is closed by now: that error is expected.
            match nix::unistd::close(fd) {
                Ok(()) | Err(nix::Error::EBADF) => {}
                Err(error) => return Err(step("close descriptors")(error)),
            }
        }
    }
    Ok(())
}

/// Makes an empty, read-only file system the root of this process's own mount namespace.
fn empty_root() -> Result<(), ConfineError> {
    const NONE: Option<&str> = None;
    nix::mount::mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE)
        .map_err(step("own mounts"))?;
    // Any existing folder will do as the mount point: it is covered in this namespace only.
    let locked = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC | MsFlags::MS_RDONLY;
    nix::mount::mount(
        Some("none"),
        "/proc",
        Some("tmpfs"),
        locked,
        Some("size=4k,mode=0555"),
    )
    .map_err(step("empty root"))?;
    nix::unistd::chdir("/proc").map_err(step("enter the empty root"))?;
    // pivot_root(2): with both arguments ".", the old root ends up on top and is detached.
    nix::unistd::pivot_root(".", ".").map_err(step("pivot to the empty root"))?;
    nix::mount::umount2(".", MntFlags::MNT_DETACH).map_err(step("leave the old root"))?;
    nix::unistd::chdir("/").map_err(step("enter the root"))
}

fn drop_privileges(uid: u32) -> Result<(), ConfineError> {
    for capability in CapabilitySet::all().iter() {
        match rustix::thread::remove_capability_from_bounding_set(capability) {
            // A capability that this kernel does not know.
            Ok(()) | Err(rustix::io::Errno::INVAL) => {}
            Err(error) => return Err(step("bounding set")(error)),
        }
    }
    let (user, group) = (Uid::from_raw(uid), Gid::from_raw(uid));
    nix::unistd::setgroups(&[]).map_err(step("groups"))?;
    nix::unistd::setresgid(group, group, group).map_err(step("gid"))?;
    nix::unistd::setresuid(user, user, user).map_err(step("uid"))?;
    rustix::thread::set_no_new_privs(true).map_err(step("no_new_privs"))?;
    let none = CapabilitySet::empty();
    let sets = rustix::thread::capabilities(None).map_err(step("read capabilities"))?;
    if sets.effective != none || sets.permitted != none || sets.inheritable != none {
        let left = std::io::Error::other("capabilities are left");
        return Err(step("drop capabilities")(left));
    }
    Ok(no_core_file()?)
}

#[cfg(test)]
mod tests {
    use super::limits::ProcessLimits;
    use super::{ConfineError, Confinement, Network, confine};

    #[test]
    fn uid_zero_is_refused_before_anything_is_given_up() {
        let root = Confinement {
            uid: 0,
            keep: Vec::new(),
            network: Network::Empty,
            limits: ProcessLimits::PACKER,
        };
        assert!(matches!(confine(&root), Err(ConfineError::Root)));
        assert!(std::path::Path::new("/proc/self").exists());
    }
}
