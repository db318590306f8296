//! The node's side of a zygote and of what is in a VMM's place.

use std::fs::File;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use command_fds::{CommandFdExt as _, FdMapping};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};
use rustix::process::{Pid, Signal};
use spore_wire::zygote::{ExitedBy, FdRole, FromZygote, ToZygote};

use crate::process::Process;
use crate::warden;

/// How many ids each zygote of these tests has.
pub(crate) const IDS: u32 = 64;

/// Each zygote and each socket gets a number of its own.
static NEXT: AtomicU32 = AtomicU32::new(0);

fn next() -> u32 {
    NEXT.fetch_add(1, Ordering::SeqCst)
}

/// Waits until something can be read, or fails the test: long after what is right would have come,
/// on a machine that is busy with others too.
pub(crate) fn wait_for(fd: BorrowedFd<'_>) {
    let limit = Timespec {
        tv_sec: 60,
        tv_nsec: 0,
    };
    let mut watched = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
    let ready = poll(&mut watched, Some(&limit)).unwrap();
    assert_eq!(ready, 1, "nothing comes");
}

fn packets(flags: SocketFlags) -> (OwnedFd, OwnedFd) {
    let kind = SocketType::SEQPACKET;
    rustix::net::socketpair(AddressFamily::UNIX, kind, flags, None).unwrap()
}

/// A zygote that runs.
pub(crate) struct Zygote {
    pub(crate) first: u32,
    pub(crate) child: Child,
    pub(crate) socket: OwnedFd,
}

impl Zygote {
    /// This program, with `guest.rs` in the VMM's place.
    pub(crate) fn new() -> Self {
        let own = std::env::current_exe().unwrap();
        let kvm = File::open("/dev/null").unwrap();
        Self::start(&own, &["zygote"], Some(kvm))
    }

    /// Any program, with the range as its last argument.
    pub(crate) fn start(program: &Path, arguments: &[&str], kvm: Option<File>) -> Self {
        let first = 300_000 + IDS * next();
        let (socket, theirs) = packets(SocketFlags::CLOEXEC);
        let mut command = Command::new(program);
        command.args(arguments).arg(format!("{first}+{IDS}"));
        command
            .env_clear()
            // As the node does.
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        let mut fds = vec![FdMapping {
            parent_fd: theirs,
            child_fd: 3,
        }];
        fds.extend(kvm.map(|kvm| FdMapping {
            parent_fd: kvm.into(),
            child_fd: 4,
        }));
        let child = command.fd_mappings(fds).unwrap().spawn().unwrap();
        drop(command);
        let zygote = Self {
            first,
            child,
            socket,
        };
        assert!(matches!(zygote.hears().0, FromZygote::Ready { .. }));
        zygote
    }

    pub(crate) fn process(&self) -> Process {
        Process(self.child.id())
    }

    /// Sends a packet as it is.
    pub(crate) fn sends(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        send(&self.socket, bytes, fds);
    }

    pub(crate) fn asks(&self, uid: u32, fds: &[(FdRole, BorrowedFd<'_>)]) {
        let message = ToZygote::Spawn {
            request: u64::from(uid),
            uid,
            fds: fds.iter().map(|(role, _)| *role).collect(),
        };
        let fds: Vec<BorrowedFd<'_>> = fds.iter().map(|(_, fd)| *fd).collect();
        self.sends(&serde_json::to_vec(&message).unwrap(), &fds);
    }

    pub(crate) fn hears(&self) -> (FromZygote, Option<OwnedFd>) {
        wait_for(self.socket.as_fd());
        let mut bytes = [0; 4096];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let into = &mut [IoSliceMut::new(&mut bytes)];
        let flags = RecvFlags::CMSG_CLOEXEC;
        let count = rustix::net::recvmsg(&self.socket, into, &mut control, flags).unwrap();
        let fds = control.drain().flat_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => fds.collect::<Vec<_>>(),
            _ => Vec::new(),
        });
        let fds: Vec<OwnedFd> = fds.collect();
        assert!(fds.len() <= 1);
        assert_ne!(count.bytes, 0, "the zygote has closed its socket");
        let message = serde_json::from_slice(&bytes[..count.bytes]).unwrap();
        (message, fds.into_iter().next())
    }

    /// What it says instead of making a VMM.
    pub(crate) fn refuses(&self) -> (Option<u64>, String) {
        match self.hears().0 {
            FromZygote::Refused { request, why } => (request, why),
            other => panic!("{other:?}"),
        }
    }

    /// A VMM with the uid behind the zygote's own by `number`.
    pub(crate) fn spawn(&self, number: u32) -> Vmm {
        self.spawn_with(number, &[])
    }

    pub(crate) fn spawn_with(&self, number: u32, more: &[(FdRole, BorrowedFd<'_>)]) -> Vmm {
        let (address, listener) = listener();
        let uid = self.first + number;
        let mut fds = vec![(FdRole::Control, listener.as_fd())];
        fds.extend_from_slice(more);
        self.asks(uid, &fds);
        match self.hears() {
            (FromZygote::Spawned { request, pid, init }, Some(pidfd)) => {
                warden::watch(Process(init));
                assert_eq!(request, u64::from(uid));
                Vmm {
                    uid,
                    process: Process(pid),
                    init: Process(init),
                    pidfd,
                    address,
                }
            }
            other => panic!("{other:?}"),
        }
    }

    /// Waits until a VMM and all of it are gone; says how it ended.
    pub(crate) fn waits(&self, vmm: &Vmm) -> ExitedBy {
        let by = self.waits_end(vmm);
        self.waits_gone(vmm);
        by
    }

    pub(crate) fn waits_end(&self, vmm: &Vmm) -> ExitedBy {
        match self.hears().0 {
            FromZygote::Ended { pid, by } if pid == vmm.process.0 => by,
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn waits_gone(&self, vmm: &Vmm) {
        let (pid, uid) = (vmm.process.0, vmm.uid);
        assert_eq!(self.hears().0, FromZygote::Gone { pid, uid });
    }

    /// Closes its socket; it ends by itself.
    pub(crate) fn close(self) {
        let Self {
            mut child,
            socket,
            first: _,
        } = self;
        drop(socket);
        let ended = child.wait().unwrap();
        assert!(ended.success(), "{ended}");
    }
}

/// A socket that listens for packets.
pub(crate) fn listener() -> (SocketAddrUnix, OwnedFd) {
    listener_of(SocketType::SEQPACKET)
}

/// A socket that listens.
pub(crate) fn listener_of(kind: SocketType) -> (SocketAddrUnix, OwnedFd) {
    let name = format!("spore-jail-{}-{}", std::process::id(), next());
    let address = SocketAddrUnix::new_abstract_name(name.as_bytes()).unwrap();
    let listener = socket(kind);
    rustix::net::bind(&listener, &address).unwrap();
    rustix::net::listen(&listener, 4).unwrap();
    (address, listener)
}

pub(crate) fn socket(kind: SocketType) -> OwnedFd {
    rustix::net::socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None).unwrap()
}

/// Sends a packet as it is.
fn send(socket: &OwnedFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(32))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(fds.is_empty() || control.push(SendAncillaryMessage::ScmRights(fds)));
    let from = &[IoSlice::new(bytes)];
    rustix::net::sendmsg(socket, from, &mut control, SendFlags::NOSIGNAL).unwrap();
}

/// A VMM.
pub(crate) struct Vmm {
    pub(crate) uid: u32,
    pub(crate) process: Process,
    pub(crate) init: Process,
    pub(crate) pidfd: OwnedFd,
    address: SocketAddrUnix,
}

impl Vmm {
    pub(crate) fn connect(&self) -> Talk {
        Talk::to(SocketType::SEQPACKET, &self.address)
    }

    pub(crate) fn kill(&self) {
        self.signal(Signal::KILL);
    }

    pub(crate) fn signal(&self, signal: Signal) {
        rustix::process::pidfd_send_signal(&self.pidfd, signal).unwrap();
    }
}

/// A connection to what is in a VMM's place.
pub(crate) struct Talk(pub(crate) OwnedFd);

impl Talk {
    pub(crate) fn to(kind: SocketType, address: &SocketAddrUnix) -> Self {
        let socket = socket(kind);
        rustix::net::connect(&socket, address).unwrap();
        Self(socket)
    }

    pub(crate) fn sends(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        send(&self.0, bytes, fds);
    }

    pub(crate) fn says(&self, command: &str) {
        self.sends(command.as_bytes(), &[]);
    }

    /// `None` when it ended instead.
    pub(crate) fn hears(&self) -> Option<String> {
        wait_for(self.0.as_fd());
        let mut answer = [0; 4096];
        match rustix::net::recv(&self.0, &mut answer, RecvFlags::empty()) {
            Ok((0, _)) | Err(rustix::io::Errno::CONNRESET) => None,
            Ok((count, _)) => Some(String::from_utf8(answer[..count].to_vec()).unwrap()),
            Err(error) => panic!("{error}"),
        }
    }

    pub(crate) fn asks(&self, command: &str) -> String {
        self.says(command);
        self.hears().expect("it answers")
    }
}

/// Kills a process by its number.
pub(crate) fn kill(process: Process) {
    let pid = Pid::from_raw(process.0.cast_signed()).unwrap();
    rustix::process::kill_process(pid, Signal::KILL).unwrap();
}
