//! The control socket of a VMM that has no guest, or one that has done nothing yet: who is told
//! what, and what is refused.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::SocketAddr;
use std::thread::JoinHandle;

use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix,
    SocketFlags, SocketType,
};
use serde_json::{Value, json};
use spore_wire::vmm::{CopyState, FromVmm, VmmState};

use super::Control;
use crate::disk::overlay::layer_bytes;
use crate::disk::scratch::LayerFile;
use crate::disk::tests::file;
use crate::disk::{Access, Raw};
use crate::kvm::Kvm;
use crate::machine::boot::tests::kernel_of;

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
        Self::with(name, None)
    }

    fn with(name: &str, kvm: Option<Kvm>) -> Self {
        let name = format!("spore-control-{}-{name}", std::process::id());
        // Checked by the standard library, which knows no packets.
        SocketAddr::from_abstract_name(&name).unwrap();
        let address = SocketAddrUnix::new_abstract_name(name.as_bytes()).unwrap();
        let listener = seqpacket();
        rustix::net::bind(&listener, &address).unwrap();
        rustix::net::listen(&listener, 4).unwrap();
        let control = Control::new(listener, kvm).unwrap();
        let thread = std::thread::spawn(move || control.serve().unwrap());
        Self { address, thread }
    }

    fn connect(&self) -> Node {
        let (node, state, copy) = self.greeted();
        assert_eq!((state, copy), (VmmState::Parked, CopyState::None));
        node
    }

    /// A new connection, and what it is told.
    fn greeted(&self) -> (Node, VmmState, CopyState) {
        let socket = seqpacket();
        rustix::net::connect(&socket, &self.address).unwrap();
        let node = Node(socket);
        match node.hears() {
            Some(FromVmm::Hello { state, copy, .. }) => (node, state, copy),
            other => panic!("{other:?}"),
        }
    }

    fn quit(self) {
        let (node, ..) = self.greeted();
        node.says(&json!({"type": "quit"}), &[]);
        // A socket that is closed before all was heard takes back what was said.
        while node.hears().is_some() {}
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

    fn is_done(&self, message: &Value, fds: &[BorrowedFd<'_>]) {
        self.says(message, fds);
        match self.hears() {
            Some(FromVmm::Done { bytes: 0 }) => {}
            other => panic!("{other:?}"),
        }
    }

    /// What a copy that is over is told as.
    fn copied(&self) -> Option<String> {
        match self.hears() {
            Some(FromVmm::Copied { why }) => why,
            other => panic!("{other:?}"),
        }
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
        (copy("source", "frozen"), vec![null.as_fd()]),
        (copy("nothing", "paused"), vec![null.as_fd()]),
        (json!({"type": "cancel_copy"}), vec![]),
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
    served.quit();
}

#[test]
fn a_request_whose_descriptors_did_not_all_come_is_refused() {
    let served = Served::new("many");
    let null = std::fs::File::open("/dev/null").unwrap();
    let node = served.connect();
    for _ in 0..2 {
        let why = node.is_refused(&json!({"type": "resume"}), &[null.as_fd(); 70]);
        assert!(why.contains("over 64"), "{why}");
    }
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
    let park = json!({"type": "park", "memory_mib": 128, "vcpus": 1});
    for request in [launch, park] {
        let why = node.is_refused(&request, &[]);
        assert!(why.contains("without KVM"), "{why}");
    }
    served.quit();
}

#[test]
fn a_vmm_that_was_made_ahead_ends_with_whoever_had_it_made() {
    let Some(kvm) = kvm() else { return };
    let served = Served::with("ahead", Some(kvm));
    let node = served.connect();
    let why = node.is_refused(&json!({"type": "park", "memory_mib": 1, "vcpus": 1}), &[]);
    assert!(why.contains("MiB"), "{why}");
    // Nothing was made, so it waits for anybody.
    drop(node);
    let node = served.connect();
    let park = json!({"type": "park", "memory_mib": 128, "vcpus": 2});
    node.is_done(&park, &[]);
    node.is_refused(&park, &[]);
    // Somebody else takes its place, and is the one who counts.
    let newer = served.connect();
    drop(node);
    newer.is_refused(&park, &[]);
    drop(newer);
    served.thread.join().unwrap();
}

#[test]
fn a_vmm_that_nobody_comes_to_ends() {
    let listener = seqpacket();
    let name = format!("spore-control-{}-nobody", std::process::id());
    let address = SocketAddrUnix::new_abstract_name(name.as_bytes()).unwrap();
    rustix::net::bind(&listener, &address).unwrap();
    rustix::net::listen(&listener, 4).unwrap();
    let mut control = Control::new(listener, None).unwrap();
    control.alone_max = std::time::Duration::from_millis(50);
    let thread = std::thread::spawn(move || control.serve().unwrap());
    thread.join().unwrap();
}

fn kvm() -> Option<Kvm> {
    let opened = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm");
    match opened.map(|device| Kvm::new(device.into())) {
        Ok(Ok(kvm)) => Some(kvm),
        other => {
            println!("SKIPPED: {other:?}");
            None
        }
    }
}

fn copy(below: &str, of: &str) -> Value {
    json!({"type": "copy", "to": {"file": 0, "key": null}, "below": below, "of": of})
}

/// The scratch disk of the guests here, whose base is full of ones.
const DISK: u64 = 1024 * 1024;

fn layer_file() -> OwnedFd {
    file(layer_bytes(DISK)).0
}

/// A VMM with a guest that is paused and has done nothing, its connection, and the base of its
/// disk; `None` without KVM.
fn launched(name: &str) -> Option<(Served, Node, OwnedFd)> {
    let kvm = kvm()?;
    let served = Served::with(name, Some(kvm));
    let node = served.connect();
    let with = |content: &[u8]| {
        let (file, again) = file(content.len() as u64);
        rustix::io::pwrite(&again, content, 0).unwrap();
        file
    };
    let socket = |kind| {
        rustix::net::socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None).unwrap()
    };
    let (agent, tap) = (socket(SocketType::STREAM), socket(SocketType::DGRAM));
    let address = SocketAddrUnix::new_abstract_name(format!("{name}-agent").as_bytes()).unwrap();
    rustix::net::bind(&agent, &address).unwrap();
    rustix::net::listen(&agent, 1).unwrap();
    let base = with(&vec![1; usize::try_from(DISK).unwrap()]);
    let fds = [
        file(64 * 1024 * 1024).0,
        file(512).0,
        file(512).0,
        tap,
        agent,
        // It goes round in a circle.
        with(&kernel_of(&[0xeb, 0xfe])),
        with(&[0; 512]),
        base.try_clone().unwrap(),
        layer_file(),
    ];
    let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
    let launch = json!({"type": "launch", "vm": "abcdefghijklmnopqrstuvwxya", "vcpus": 1,
        "memory_mib": 64, "memory": 0,
        "begin": {"by": "boot", "kernel": 5, "initramfs": 6, "command_line": ""},
        "incarnation": "00112233445566778899aabbccddeeff", "image": 1, "folder": 2,
        "scratch": {"bytes": DISK, "base": 7, "layers": [], "own": {"file": 8, "key": null}},
        "tap": 3, "mac": [2, 0, 0, 0, 0, 1], "agent": 4});
    node.is_done(&launch, &fds);
    Some((served, node, base))
}

/// How many clusters a copy has.
fn clusters(file: OwnedFd) -> usize {
    let layer = LayerFile::new(Raw::new(file, Access::ReadOnly).unwrap(), None);
    let layer = layer.open(DISK, Access::ReadOnly).unwrap();
    (0..16).filter(|cluster| layer.map().has(*cluster)).count()
}

#[test]
fn a_copy_is_told_when_it_is_over_and_to_everybody_who_comes_later() {
    let Some((served, node, _base)) = launched("copied") else {
        return;
    };
    let to = layer_file();
    node.is_done(&copy("nothing", "frozen"), &[to.as_fd()]);
    assert_eq!(node.copied(), None);
    assert_eq!(clusters(to), 16);
    let (node, state, copies) = served.greeted();
    assert_eq!((state, copies), (VmmState::Paused, CopyState::Over));
    assert_eq!(node.copied(), None);
    // What it has written is nothing, and that is what is copied of it.
    let switch = json!({"type": "switch", "own": {"file": 0, "key": null}});
    node.is_done(&switch, &[layer_file().as_fd()]);
    let to = layer_file();
    node.is_done(&copy("source", "paused"), &[to.as_fd()]);
    assert_eq!(node.copied(), None);
    assert_eq!(clusters(to), 0);
    node.is_done(&json!({"type": "cancel_copy"}), &[]);
    node.is_done(&json!({"type": "cancel_copy"}), &[]);
    let (_node, _state, copies) = served.greeted();
    assert_eq!(copies, CopyState::None);
    served.quit();
}

#[test]
fn a_copy_that_cannot_be_is_refused_and_one_that_fails_is_told() {
    let Some((served, node, base)) = launched("uncopied") else {
        return;
    };
    let short = file(512).0;
    let why = node.is_refused(&copy("nothing", "frozen"), &[short.as_fd()]);
    assert!(why.contains("the copy's file cannot be used"), "{why}");
    let why = node.is_refused(&copy("nothing", "frozen"), &[]);
    assert!(why.contains("descriptor 0"), "{why}");
    let null = std::fs::File::open("/dev/null").unwrap();
    let why = node.is_refused(&copy("nothing", "paused"), &[null.as_fd(); 2]);
    assert!(why.contains("1 of the descriptors"), "{why}");
    let (node, _state, copies) = served.greeted();
    assert_eq!(copies, CopyState::None);
    rustix::fs::ftruncate(&base, 4096).unwrap();
    node.is_done(&copy("nothing", "paused"), &[layer_file().as_fd()]);
    let why = node.copied().unwrap();
    assert!(why.contains("cannot be looked through"), "{why}");
    node.is_done(&copy("source", "paused"), &[layer_file().as_fd()]);
    assert_eq!(node.copied(), None);
    served.quit();
}

#[test]
fn a_guest_that_runs_is_copied_as_it_was_frozen_and_not_as_it_is() {
    let Some((served, node, _base)) = launched("running") else {
        return;
    };
    node.is_done(&json!({"type": "resume"}), &[]);
    let to = layer_file();
    let why = node.is_refused(&copy("source", "paused"), &[to.as_fd()]);
    assert!(
        why.contains("is for a VMM that has a paused guest"),
        "{why}"
    );
    node.is_done(&copy("nothing", "frozen"), &[to.as_fd()]);
    assert_eq!(node.copied(), None);
    assert_eq!(clusters(to), 16);
    served.quit();
}
