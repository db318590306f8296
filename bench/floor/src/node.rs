//! The node's side of a zygote and of its VMMs: the real path of a fork, each VMM in its jail.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use command_fds::{CommandFdExt as _, FdMapping};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};
use spore_wire::vmm::{self, EndedBy, FromVmm, ToVmm};
use spore_wire::zygote::{self, FdRole, FromZygote, ToZygote};

use crate::guest::{Given, file};

/// Ids of the zygote: far from those of stories and tests, and more than VMMs at once.
const FIRST_UID: u32 = 2_700_000;
const UIDS: u32 = 256;

/// Only a hang takes longer.
const HANG: Timespec = Timespec {
    tv_sec: 300,
    tv_nsec: 0,
};

const PAUSE_LIMIT_MS: u64 = 60_000;

/// Each socket gets a number of its own.
static NEXT: AtomicU32 = AtomicU32::new(0);

/// A unix socket that listens, under a name that only this process knows.
pub(crate) fn listener(kind: SocketType) -> Result<(SocketAddrUnix, OwnedFd)> {
    let number = NEXT.fetch_add(1, Ordering::SeqCst);
    let name = format!("spore-floor-{}-{number}", std::process::id());
    let address = SocketAddrUnix::new_abstract_name(name.as_bytes())?;
    let listener = socket(kind)?;
    rustix::net::bind(&listener, &address)?;
    rustix::net::listen(&listener, 4)?;
    Ok((address, listener))
}

fn socket(kind: SocketType) -> Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC;
    Ok(rustix::net::socket_with(
        AddressFamily::UNIX,
        kind,
        flags,
        None,
    )?)
}

fn send(socket: &OwnedFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(32))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fits = fds.is_empty() || control.push(SendAncillaryMessage::ScmRights(fds));
    ensure!(fits, "too many descriptors");
    let from = &[IoSlice::new(bytes)];
    rustix::net::sendmsg(socket, from, &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

fn wait_for(fd: BorrowedFd<'_>) -> Result<()> {
    let mut watched = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
    ensure!(poll(&mut watched, Some(&HANG))? == 1, "nothing comes");
    Ok(())
}

/// A zygote that runs, and the ids that it may give.
#[derive(Debug)]
pub(crate) struct Zygote {
    child: Child,
    socket: OwnedFd,
    free: BTreeSet<u32>,
}

impl Zygote {
    /// The one of `spore-vmm` beside this program.
    pub(crate) fn start() -> Result<Self> {
        let kvm = File::options().read(true).write(true).open("/dev/kvm")?;
        let (kind, flags) = (SocketType::SEQPACKET, SocketFlags::CLOEXEC);
        let (socket, theirs) = rustix::net::socketpair(AddressFamily::UNIX, kind, flags, None)?;
        let program = std::env::current_exe()?.with_file_name("spore-vmm");
        let ids = format!("{FIRST_UID}+{UIDS}");
        let mut command = Command::new(&program);
        command.args(["zygote", "--uids", &ids]).env_clear();
        command.process_group(0);
        command.stdin(Stdio::null()).stdout(Stdio::null());
        let fds = vec![
            FdMapping {
                parent_fd: theirs,
                child_fd: zygote::SOCKET_FD,
            },
            FdMapping {
                parent_fd: kvm.into(),
                child_fd: zygote::KVM_FD,
            },
        ];
        let child = command.fd_mappings(fds)?.spawn();
        let child = child.with_context(|| format!("{}: build it", program.display()))?;
        drop(command);
        let mut zygote = Self {
            child,
            socket,
            free: (FIRST_UID + 1..FIRST_UID + UIDS).collect(),
        };
        match zygote.hears()?.0 {
            FromZygote::Ready { .. } => Ok(zygote),
            other => bail!("the zygote says {other:?}"),
        }
    }

    fn hears(&mut self) -> Result<(FromZygote, Option<OwnedFd>)> {
        wait_for(self.socket.as_fd())?;
        let mut bytes = [0; zygote::PACKET_BYTES_MAX];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let into = &mut [IoSliceMut::new(&mut bytes)];
        let flags = RecvFlags::CMSG_CLOEXEC;
        let count = rustix::net::recvmsg(&self.socket, into, &mut control, flags)?.bytes;
        ensure!(count > 0, "the zygote has ended");
        let fds = control.drain().flat_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => fds.collect::<Vec<_>>(),
            _ => Vec::new(),
        });
        let fd = fds.last();
        let message = serde_json::from_slice(bytes.get(..count).unwrap_or_default())?;
        if let FromZygote::Gone { uid, .. } = message {
            self.free.insert(uid);
        }
        Ok((message, fd))
    }

    /// A VMM in its jail, which has said hello.
    pub(crate) fn spawn(&mut self) -> Result<Vmm> {
        let uid = self.free.pop_first().context("no uid is free")?;
        let (address, control) = listener(SocketType::SEQPACKET)?;
        let message = ToZygote::Spawn {
            request: u64::from(uid),
            uid,
            fds: vec![FdRole::Control],
        };
        send(
            &self.socket,
            &serde_json::to_vec(&message)?,
            &[control.as_fd()],
        )?;
        let pid = loop {
            match self.hears()?.0 {
                FromZygote::Spawned { pid, .. } => break pid,
                FromZygote::Ended { .. } | FromZygote::Gone { .. } => {}
                other => bail!("the zygote says {other:?}"),
            }
        };
        let talk = socket(SocketType::SEQPACKET)?;
        rustix::net::connect(&talk, &address)?;
        let mut vmm = Vmm {
            pid,
            uid,
            talk,
            ended: None,
        };
        match vmm.hears()? {
            FromVmm::Hello { .. } => Ok(vmm),
            other => bail!("the VMM says {other:?}"),
        }
    }

    /// Closes its socket; it ends by itself.
    pub(crate) fn close(self) -> Result<()> {
        let Self {
            mut child, socket, ..
        } = self;
        drop(socket);
        let ended = child.wait()?;
        ensure!(ended.success(), "the zygote: {ended}");
        Ok(())
    }
}

/// A VMM.
#[derive(Debug)]
pub(crate) struct Vmm {
    pub(crate) pid: u32,
    uid: u32,
    talk: OwnedFd,
    ended: Option<EndedBy>,
}

impl Vmm {
    fn hears(&mut self) -> Result<FromVmm> {
        wait_for(self.talk.as_fd())?;
        let mut bytes = [0; 4096];
        let (count, _whole) = rustix::net::recv(&self.talk, &mut bytes, RecvFlags::empty())?;
        ensure!(count > 0, "the VMM has ended");
        Ok(serde_json::from_slice(
            bytes.get(..count).unwrap_or_default(),
        )?)
    }

    /// Asks and waits for the answer; the guest's end may come between.
    pub(crate) fn ask(&mut self, what: &ToVmm, fds: &[BorrowedFd<'_>]) -> Result<u64> {
        let request = serde_json::to_vec(what)?;
        ensure!(request.len() <= vmm::PACKET_BYTES_MAX, "a long request");
        send(&self.talk, &request, fds)?;
        loop {
            match self.hears()? {
                FromVmm::Done { bytes } => return Ok(bytes),
                FromVmm::Ended { by, .. } => self.ended = Some(by),
                other => bail!("{what:?}: {other:?}"),
            }
        }
    }

    pub(crate) fn launch(&mut self, given: &Given) -> Result<()> {
        self.ask(&given.request, &given.fds())?;
        Ok(())
    }

    pub(crate) fn pause(&mut self) -> Result<()> {
        let limit_ms = PAUSE_LIMIT_MS;
        self.ask(&ToVmm::Pause { limit_ms }, &[])?;
        Ok(())
    }

    /// All that came out of its serial port.
    pub(crate) fn console(&mut self) -> Result<String> {
        let into = file("console", 0)?;
        let count = self.ask(&ToVmm::Console, &[into.as_fd()])?;
        let mut text = vec![0; usize::try_from(count)?];
        rustix::io::pread(&into, &mut text, 0)?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    }

    /// Waits until the guest has ended, by itself.
    pub(crate) fn wait_end(&mut self) -> Result<()> {
        let by = match self.ended {
            Some(by) => by,
            None => match self.hears()? {
                FromVmm::Ended { by, .. } => by,
                other => bail!("the VMM says {other:?}"),
            },
        };
        ensure!(by == EndedBy::Guest, "the guest was ended by {by:?}");
        Ok(())
    }

    /// Ends it, and waits until nothing of it is there.
    pub(crate) fn quit(self, zygote: &mut Zygote) -> Result<()> {
        send(&self.talk, &serde_json::to_vec(&ToVmm::Quit)?, &[])?;
        while !zygote.free.contains(&self.uid) {
            zygote.hears()?;
        }
        Ok(())
    }
}

/// For how long nothing happens.
pub(crate) fn rest(time: Duration) {
    std::thread::sleep(time);
}
