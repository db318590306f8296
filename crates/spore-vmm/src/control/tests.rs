//! The control socket of a VMM that has no guest: who is told what, and what is refused.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::SocketAddr;
use std::thread::JoinHandle;

use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix,
    SocketFlags, SocketType,
};
use serde_json::{Value, json};
use spore_wire::vmm::{FromVmm, VmmState};

use super::Control;

/// A VMM without KVM, served by a thread.
struct Served {
    address: SocketAddrUnix,
    thread: JoinHandle<()>,
}

fn seqpacket() -> OwnedFd {
    let flags = SocketFlags::CLOEXEC;
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap()
}

impl Served {
    fn new(name: &str) -> Self {
        let name = format!("spore-control-{}-{name}", std::process::id());
        // Checked by the standard library, which knows no packets.
        SocketAddr::from_abstract_name(&name).unwrap();
        let address = SocketAddrUnix::new_abstract_name(name.as_bytes()).unwrap();
        let listener = seqpacket();
        rustix::net::bind(&listener, &address).unwrap();
        rustix::net::listen(&listener, 4).unwrap();
        let control = Control::new(listener, None).unwrap();
        let thread = std::thread::spawn(move || control.serve().unwrap());
        Self { address, thread }
    }

    fn connect(&self) -> Node {
        let socket = seqpacket();
        rustix::net::connect(&socket, &self.address).unwrap();
        let node = Node(socket);
        assert!(matches!(
            node.hears(),
            Some(FromVmm::Hello {
                state: VmmState::Parked,
                ..
            })
        ));
        node
    }

    fn quit(self) {
        self.connect().says(&json!({"type": "quit"}), &[]);
        self.thread.join().unwrap();
    }
}

/// The node's end of a connection.
struct Node(OwnedFd);

impl Node {
    fn says(&self, message: &Value, fds: &[BorrowedFd<'_>]) {
        self.sends(message.to_string().as_bytes(), fds);
    }

    fn sends(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(80))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
        let from = &[IoSlice::new(bytes)];
        rustix::net::sendmsg(&self.0, from, &mut control, SendFlags::NOSIGNAL).unwrap();
    }

    /// `None` when the VMM has closed.
    fn hears(&self) -> Option<FromVmm> {
        let mut bytes = vec![0; 64 * 1024];
        let mut none = rustix::net::RecvAncillaryBuffer::default();
        let into = &mut [IoSliceMut::new(&mut bytes)];
        let got = rustix::net::recvmsg(&self.0, into, &mut none, RecvFlags::empty());
        let count = got.map_or(0, |got| got.bytes);
        (count > 0).then(|| serde_json::from_slice(&bytes[..count]).unwrap())
    }

    fn is_refused(&self, message: &Value, fds: &[BorrowedFd<'_>]) -> String {
        self.says(message, fds);
        match self.hears() {
            Some(FromVmm::Failed { why }) => why,
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn what_needs_a_guest_is_refused_by_a_vmm_that_has_none() {
    let served = Served::new("none");
    let node = served.connect();
    let null = std::fs::File::open("/dev/null").unwrap();
    for (message, fds) in [
        (json!({"type": "resume"}), vec![]),
        (json!({"type": "pause", "limit_ms": 1}), vec![]),
        (json!({"type": "save"}), vec![null.as_fd()]),
        (json!({"type": "console"}), vec![null.as_fd()]),
        (
            json!({"type": "switch", "own": {"file": 0, "key": null}}),
            vec![null.as_fd()],
        ),
    ] {
        let why = node.is_refused(&message, &fds);
        assert!(why.ends_with("and this one has no guest"), "{why}");
    }
    let why = node.is_refused(&json!({"type": "resume"}), &[null.as_fd()]);
    assert!(why.contains("1 of the descriptors"), "{why}");
    served.quit();
}

#[test]
fn a_newer_connection_replaces_the_older_one() {
    let served = Served::new("newer");
    let one = served.connect();
    let other = served.connect();
    assert_eq!(one.hears(), None);
    other.is_refused(&json!({"type": "resume"}), &[]);
    served.quit();
}

#[test]
fn who_speaks_nonsense_is_not_heard_any_more_and_the_next_one_is() {
    let served = Served::new("nonsense");
    let null = std::fs::File::open("/dev/null").unwrap();
    for nonsense in [&b"{"[..], b"{\"type\":\"of_tomorrow\"}", &[b' '; 70_000]] {
        let node = served.connect();
        node.sends(nonsense, &[null.as_fd()]);
        assert_eq!(node.hears(), None);
    }
    let many = served.connect();
    many.says(&json!({"type": "resume"}), &[null.as_fd(); 70]);
    assert_eq!(many.hears(), None);
    served.quit();
}

#[test]
fn a_vmm_without_kvm_has_no_guest() {
    let served = Served::new("nokvm");
    let node = served.connect();
    let launch = json!({"type": "launch", "vm": "abcdefghijklmnopqrstuvwxya", "vcpus": 2,
        "memory_mib": 256, "memory": 0,
        "begin": {"by": "restore", "state": 5, "memory": "own"},
        "incarnation": "00112233445566778899aabbccddeeff", "image": 1, "folder": 2,
        "scratch": null, "tap": 3, "mac": [2, 0, 0, 0, 0, 1], "agent": 4});
    let why = node.is_refused(&launch, &[]);
    assert!(why.contains("without KVM"), "{why}");
    served.quit();
}
