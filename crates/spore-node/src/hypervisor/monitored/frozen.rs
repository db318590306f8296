//! A copy of a VMM that stands still, and what its guest's memory was when it was made.
//!
//! Made by `capture.rs` in the pause, of a fork that has written much; read while the guest goes
//! on. A VMM may be a tenant's by now: a copy is whoever writes to a socket that only this VMM was
//! given, and the kernel says which process that is. It must be another one than the VMM, with its
//! uid and in its cgroup, and alive behind the last byte that was read: then nobody else had its
//! pid meanwhile. It lives by the other end of that socket, so it ends with the daemon too.
//!
//! ```text
//!   asked for (pause) ──says one byte──▶ found ──read──▶ let go of ──▶ ended, memory given back
//!          └─ nothing in time, another's process, gone ─▶ the capture fails, the VM goes on
//! ```

use std::fs;
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::retry_on_intr;
use rustix::net::sockopt::set_socket_passcred;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketFlags, SocketType,
    recvmsg, socketpair,
};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use tokio::sync::OwnedMutexGuard;

use super::pages::{self, Reader, Sharing};
use crate::cgroup::{Cgroups, LentMemory, kill_process};
use crate::hypervisor::fork::Wanted;
use crate::hypervisor::memory_image::CapturedPages;
use crate::hypervisor::process::{has_ended, uid_of};

/// How long a copy lives, at most: the memory of the largest guest is read in much less.
pub(super) const LIMIT: Duration = Duration::from_secs(300);

/// How long it may take until a copy says that it is there, and until it is gone.
const STEP: Duration = Duration::from_secs(30);

/// The VMM that a copy is made of, and its guest's memory.
#[derive(Clone, Debug)]
pub(super) struct Origin {
    pub(super) cgroups: Cgroups,
    pub(super) cgroup: String,
    pub(super) pid: u32,
    pub(super) uid: u32,
    pub(super) inode: u64,
    /// The size of the memory.
    pub(super) bytes: u64,
}

/// What a copy is made with, and what it is heard by.
pub(super) fn sockets() -> io::Result<(OwnedFd, OwnedFd)> {
    let (kind, flags) = (SocketType::SEQPACKET, SocketFlags::CLOEXEC);
    let (theirs, ours) = socketpair(AddressFamily::UNIX, kind, flags, None)?;
    set_socket_passcred(&ours, true)?;
    Ok((theirs, ours))
}

/// A copy that was made. It ends when this is dropped.
#[derive(Debug)]
pub(super) struct Frozen {
    // Dropped in this order: what was lent is given back when nothing more is written twice.
    pub(super) socket: OwnedFd,
    pub(super) origin: Origin,
    pub(super) _lent: LentMemory,
    /// There is one copy of a VMM at a time.
    pub(super) _alone: OwnedMutexGuard<()>,
}

impl Frozen {
    /// Reads the pages that were the VMM's own, and ends the copy. Blocks.
    ///
    /// # Errors
    /// When there is none, or not to the end, or when nobody wants it any more.
    pub(super) fn read(self, wanted: &Wanted) -> io::Result<CapturedPages> {
        let pid = heard(&self.socket)?;
        let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
        let read = self.origin.read(pid, wanted);
        let whole = !has_ended(&pidfd, Duration::ZERO);
        drop(self.socket);
        if !has_ended(&pidfd, STEP) && self.origin.is_copy(pid) {
            kill_process(&pidfd)?;
            has_ended(&pidfd, STEP);
        }
        match whole {
            true => read,
            false => read.and(Err(io::Error::other("the copy ended while it was read"))),
        }
    }
}

impl Origin {
    fn read(&self, pid: Pid, wanted: &Wanted) -> io::Result<CapturedPages> {
        if !self.is_copy(pid) {
            let why = format!("the process {pid:?} is no copy of the VMM");
            return Err(io::Error::other(why));
        }
        let pid = number(pid);
        let mapping = pages::find(pid, self.inode, self.bytes)?;
        if mapping.sharing != Sharing::Private {
            return Err(io::Error::other("the copy's memory does not stand still"));
        }
        Reader::open(pid, mapping, self.bytes)?.copy(&|| wanted.is_so())
    }

    /// Whether it is the VM's, and not the VMM itself.
    fn is_copy(&self, pid: Pid) -> bool {
        let pid = number(pid);
        let text = |name: &str| fs::read_to_string(format!("/proc/{pid}/{name}")).ok();
        let cgroup = text("cgroup").is_some_and(|it| self.cgroups.holds(&self.cgroup, &it));
        let uid = text("status").as_deref().and_then(uid_of);
        pid != self.pid && cgroup && uid == Some(self.uid)
    }
}

/// Waits for a byte; gives the process that has written it.
fn heard(socket: &OwnedFd) -> io::Result<Pid> {
    let limit = Timespec::try_from(STEP).ok();
    let mut watched = [PollFd::new(socket, PollFlags::IN)];
    if retry_on_intr(|| poll(&mut watched, limit.as_ref()))? == 0 {
        return Err(io::ErrorKind::TimedOut.into());
    }
    let mut byte = [0];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmCredentials(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let into = &mut [IoSliceMut::new(&mut byte)];
    let got = recvmsg(socket, into, &mut control, flags)?;
    let who = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmCredentials(of) => Some(of.pid),
        _ => None,
    });
    let who = who.filter(|_pid| got.bytes == 1);
    who.ok_or_else(|| io::Error::new(io::ErrorKind::UnexpectedEof, "the copy ended at once"))
}

fn number(pid: Pid) -> u32 {
    pid.as_raw_nonzero().get().unsigned_abs()
}

#[cfg(test)]
mod tests {
    use std::io::ErrorKind;

    use rustix::process::{getpid, getuid};

    use super::{Origin, heard, number, sockets};
    use crate::cgroup::Cgroups;
    use crate::hypervisor::fork::Wanted;

    #[test]
    fn a_process_elsewhere_and_the_vmm_itself_are_no_copies() {
        let origin = Origin {
            cgroups: Cgroups::open("spore-test-frozen").unwrap(),
            cgroup: "one".to_owned(),
            pid: 1,
            uid: getuid().as_raw(),
            inode: 1,
            bytes: 4096,
        };
        for pid in [1, std::process::id()] {
            let origin = Origin {
                pid,
                ..origin.clone()
            };
            let refused = origin.read(getpid(), &Wanted::always()).unwrap_err();
            assert!(refused.to_string().contains("is no copy"), "{refused}");
        }
    }

    #[test]
    fn a_copy_is_whoever_writes_and_one_that_is_silent_is_none() {
        let (theirs, ours) = sockets().unwrap();
        rustix::io::write(&theirs, &[1]).unwrap();
        assert_eq!(number(heard(&ours).unwrap()), std::process::id());
        drop(theirs);
        assert_eq!(heard(&ours).unwrap_err().kind(), ErrorKind::UnexpectedEof);
    }
}
