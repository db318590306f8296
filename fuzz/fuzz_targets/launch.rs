//! What a VMM is asked for, as bytes or as a message that names what it likes, with files of any
//! content: it is refused, or what the guest's devices are made of is there. KVM is not asked.
#![no_main]

use std::os::fd::OwnedFd;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use spore_fuzz::file;
use spore_vmm::control::files::Files;
use spore_vmm::control::launch::Devices;
use spore_vmm::disk::scratch::LayerFile;
use spore_vmm::disk::{Access, Raw};
use spore_vmm::machine::layout::Layout;
use spore_vmm::machine::saved::SavedMachine;
use spore_wire::launch::{
    Begin, FdIndex, Incarnation, Launch, Layer, MemoryOwner, Rates, Scratch, layer_bytes,
};
use spore_wire::secret::SecretBytes;
use spore_wire::vmm::ToVmm;

/// The most bytes of one file, and how many there are at most.
const FILE_BYTES_MAX: u64 = 1 << 22;
const FILES_MAX: usize = 40;

/// The disks that layers of these files are of: some clusters of 64 KiB.
const CLUSTER_BYTES: u64 = 64 << 10;
const CLUSTERS_MAX: u64 = 32;

#[derive(Arbitrary, Debug)]
enum Given {
    /// A file of some length that begins with these.
    File {
        begins: Vec<u8>,
        bytes: u32,
    },
    /// A layer as it was made, changed in some places.
    Layer {
        clusters: u8,
        changes: Vec<(u16, u8)>,
    },
    Listener,
    Socket,
    Folder,
}

#[derive(Arbitrary, Debug)]
struct Blob {
    size: (u8, u32),
    /// Whether there is a scratch disk, of so many clusters, with a base and so many layers.
    scratch: Option<(u8, bool, u8)>,
    key: Option<Vec<u8>>,
    /// Which descriptors are named instead of those that are.
    others: Vec<(u8, u8)>,
    state: Vec<u8>,
}

#[derive(Arbitrary, Debug)]
enum Input {
    Bytes(Vec<u8>),
    /// With descriptors instead of those that fit it, by their places.
    Blob(Blob, Vec<(u8, Given)>),
}

/// A descriptor each, in the order in which they are asked for.
struct Numbers {
    next: u8,
    others: Vec<(u8, u8)>,
}

impl Numbers {
    fn fd(&mut self) -> FdIndex {
        let number = self.next;
        self.next = self.next.saturating_add(1);
        let other = self.others.iter().find(|(of, _)| *of == number);
        FdIndex(other.map_or(number, |(_, other)| *other))
    }
}

fn disk_bytes(clusters: u8) -> u64 {
    (u64::from(clusters) % CLUSTERS_MAX + 1) * CLUSTER_BYTES
}

/// A layer in clear, with some bytes changed.
fn layer_file(clusters: u8, changes: &[(u16, u8)]) -> OwnedFd {
    let bytes = disk_bytes(clusters);
    let file = file(layer_bytes(bytes));
    let raw = Raw::new(file.try_clone().expect("a descriptor"), Access::ReadWrite);
    let made = LayerFile::new(raw.expect("a file"), None).create(bytes);
    made.expect("a layer");
    for (at, change) in changes {
        let mut byte = [0];
        rustix::io::pread(&file, &mut byte, u64::from(*at)).expect("it is read");
        byte[0] ^= change;
        rustix::io::pwrite(&file, &byte, u64::from(*at)).expect("it is written");
    }
    file
}

fn open(given: &Given) -> OwnedFd {
    match given {
        Given::File { begins, bytes } => {
            let file = file(u64::from(*bytes) % FILE_BYTES_MAX);
            // What does not fit makes it longer.
            rustix::io::pwrite(&file, begins, 0).expect("it is written");
            file
        }
        Given::Layer { clusters, changes } => layer_file(*clusters, changes),
        Given::Listener => {
            let socket = std::os::unix::net::UnixListener::bind_addr(&unnamed());
            socket.expect("a socket").into()
        }
        Given::Socket => std::os::unix::net::UnixStream::pair()
            .expect("sockets")
            .0
            .into(),
        Given::Folder => std::fs::File::open("/").expect("a folder").into(),
    }
}

/// An address that the kernel chooses.
fn unnamed() -> std::os::unix::net::SocketAddr {
    use std::os::linux::net::SocketAddrExt as _;
    static NEXT: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
    let next = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let name = format!("spore-fuzz-{}-{next}", std::process::id());
    std::os::unix::net::SocketAddr::from_abstract_name(name).expect("an address")
}

fn launch(blob: Blob) -> (Launch, Vec<u8>) {
    let mut numbers = Numbers {
        next: 0,
        others: blob.others,
    };
    let (image, folder) = (numbers.fd(), numbers.fd());
    let key = blob.key.map(SecretBytes::new);
    let layer = |numbers: &mut Numbers| Layer {
        file: numbers.fd(),
        key: key.clone(),
    };
    let scratch = blob.scratch.map(|(clusters, has_base, layers)| Scratch {
        bytes: disk_bytes(clusters),
        base: has_base.then(|| numbers.fd()),
        layers: (0..layers % 40).map(|_| layer(&mut numbers)).collect(),
        own: layer(&mut numbers),
    });
    let (vcpus, memory_mib) = blob.size;
    let launch = Launch {
        vm: "abcdefghijklmnopqrstuvwxya".parse().expect("a name"),
        vcpus,
        memory_mib,
        memory: FdIndex(0),
        begin: Begin::Restore {
            state: FdIndex(0),
            memory: MemoryOwner::Shared,
            ahead: Vec::new(),
        },
        incarnation: Incarnation::from_bytes([1; 16]),
        image,
        folder,
        scratch,
        tap: numbers.fd(),
        mac: [2; 6],
        agent: numbers.fd(),
        rates: Rates::default(),
    };
    (launch, blob.state)
}

/// What a node gives with such a blob, in the order in which it is asked for.
fn fitting(blob: &Launch) -> Vec<OwnedFd> {
    let mut fds = vec![file(CLUSTER_BYTES), file(CLUSTER_BYTES)];
    if let Some(scratch) = &blob.scratch {
        fds.extend(scratch.base.map(|_base| file(scratch.bytes)));
        let clusters = u8::try_from(scratch.bytes / CLUSTER_BYTES - 1).unwrap_or(0);
        let layers = scratch.layers.iter();
        fds.extend(layers.map(|_layer| layer_file(clusters, &[])));
        fds.push(file(layer_bytes(scratch.bytes)));
    }
    fds.extend([open(&Given::Socket), open(&Given::Listener)]);
    fds
}

fuzz_target!(|input: Input| {
    match input {
        Input::Bytes(bytes) => {
            if let Ok(request) = serde_json::from_slice::<ToVmm>(&bytes) {
                // What is understood is said in one way.
                let said = serde_json::to_vec(&request).expect("it is said");
                let again: ToVmm = serde_json::from_slice(&said).expect("it is heard");
                assert_eq!(again, request);
            }
        }
        Input::Blob(blob, given) => {
            let (blob, state) = launch(blob);
            let _no_such_machine = Layout::new(blob.memory_mib, blob.vcpus);
            let _none = SavedMachine::read(&state);
            let mut fds = fitting(&blob);
            for (at, given) in given.iter().take(FILES_MAX) {
                match fds.get_mut(usize::from(*at)) {
                    Some(fd) => *fd = open(given),
                    None => fds.push(open(given)),
                }
            }
            let mut files = Files::new(fds);
            if let Ok(devices) = Devices::new(&blob, &mut files) {
                drop(devices);
                let _left_over = files.finish();
            }
        }
    }
});
