//! Ends what a test leaves behind, however the test's process dies. VMMs outlive their zygote and
//! whoever asked for them, as they must for the daemon; so a test that is killed would leave them
//! and their guests for ever.
//!
//! A process of this program that holds a pidfd of each VM's first process, with which all of the
//! VM ends, its copies too. It is told of each by the test, and kills them when the test's end of
//! its socket is closed, which the kernel does.
//!
//! ```text
//!   zygote spawns, test dies, warden is not told            the VM is left: a moment of each test
//!   zygote spawns, test hears, warden is told, test dies    all of the VM ends
//! ```

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::OnceLock;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};
use rustix::process::{Pid, PidfdFlags, Signal};

use crate::node::{Zygote, wait_for};
use crate::process::Process;

/// The word that makes this program a warden.
pub(crate) const WARDEN: &str = "warden";

/// The word that makes it a test that makes a VM, says what there is of it, and waits.
pub(crate) const LEAVES: &str = "leaves";

/// The test's end of the socket, which is open until the process ends, and the warden.
static HIRED: OnceLock<(OwnedFd, Child)> = OnceLock::new();

/// Has a VM end with the test's process, by the first process of its pid namespace.
pub(crate) fn watch(init: Process) {
    let pid = Pid::from_raw(init.0.cast_signed()).unwrap();
    // Gone already, all of it is.
    let Ok(pidfd) = rustix::process::pidfd_open(pid, PidfdFlags::empty()) else {
        return;
    };
    let fds = [pidfd.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
    let (socket, _child) = HIRED.get_or_init(start);
    let from = &[IoSlice::new(b"v")];
    rustix::net::sendmsg(socket, from, &mut control, SendFlags::NOSIGNAL).unwrap();
}

fn start() -> (OwnedFd, Child) {
    let (kind, flags) = (SocketType::SEQPACKET, SocketFlags::CLOEXEC);
    let pair = rustix::net::socketpair(AddressFamily::UNIX, kind, flags, None);
    let (ours, theirs) = pair.unwrap();
    let mut command = Command::new(std::env::current_exe().unwrap());
    // What ends the test by its process group must not end this.
    command.arg(WARDEN).process_group(0).stdin(theirs);
    (ours, command.stdout(Stdio::null()).spawn().unwrap())
}

/// This program as a warden.
pub(crate) fn main() -> ExitCode {
    let socket = rustix::stdio::stdin();
    let mut watched: Vec<OwnedFd> = Vec::new();
    while let Some(init) = next(socket) {
        watched.retain(|init| !has_ended(init));
        watched.push(init);
    }
    for init in watched {
        // One that has ended needs no signal.
        let _gone = rustix::process::pidfd_send_signal(&init, Signal::KILL);
    }
    ExitCode::SUCCESS
}

/// The next VM; `None` when there will be none.
fn next(socket: BorrowedFd<'_>) -> Option<OwnedFd> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    let into = &mut [IoSliceMut::new(&mut byte)];
    rustix::io::retry_on_intr(|| {
        rustix::net::recvmsg(socket, into, &mut control, RecvFlags::CMSG_CLOEXEC)
    })
    .ok()?;
    control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    })
}

fn has_ended(init: &OwnedFd) -> bool {
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    let mut watched = [PollFd::new(init, PollFlags::IN)];
    poll(&mut watched, Some(&now)) == Ok(1)
}

/// This program as a test that is about to be killed: nobody has connected to its VMM, so that
/// nothing but the warden ends it.
pub(crate) fn leaves() -> ExitCode {
    let zygote = Zygote::new();
    let vmm = zygote.spawn(1);
    println!("{} {} {}", zygote.process().0, vmm.process.0, vmm.init.0);
    loop {
        std::thread::park();
    }
}

pub(crate) fn a_test_that_is_killed_leaves_nothing_behind() {
    let mut command = Command::new(std::env::current_exe().unwrap());
    let mut test = command.arg(LEAVES).stdout(Stdio::piped()).spawn().unwrap();
    let said = test.stdout.take().unwrap();
    wait_for(said.as_fd());
    let mut line = [0; 64];
    let count = rustix::io::read(&said, &mut line).unwrap();
    let line = std::str::from_utf8(&line[..count]).unwrap();
    let pids = line.split_whitespace().map(|pid| pid.parse().unwrap());
    let left: Vec<Process> = pids.map(Process).collect();
    assert_eq!(left.len(), 3, "{line}");
    assert!(left.iter().all(|process| process.is_alive()), "{left:?}");
    test.kill().unwrap();
    test.wait().unwrap();
    left.into_iter().for_each(Process::wait_end);
}
