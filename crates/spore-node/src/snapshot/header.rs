//! The header of a snapshot: what it is of, who may start from it, and what its files must hash to.
//!
//! Written once, when a snapshot is sealed, and read before anything else of it. Pure. The file is
//! two JSON values, a line each: the header, and the BLAKE3 of the first line. That frame is the
//! same in every generation, so that damage and age are told apart.

use serde::{Deserialize, Serialize};
use spore_wire::generation;
use spore_wire::id::SnapshotId;
use spore_wire::snapshot::{PUBLIC_ACCOUNT, Shape, SnapshotMeta};
use thiserror::Error;

use super::hash::Hash;
use super::key::{NONCE_BYTES, TAG_BYTES};
use super::pages::PAGE_BYTES;

/// The version of the header and of all files that it describes. Another one is refused, never
/// guessed at.
pub const HEADER_GENERATION: u32 = 2;

/// The most bytes of a header.
pub const HEADER_BYTES_MAX: usize = 64 * 1024;

/// The most bytes of device state: the largest seen has 306 kB.
pub const STATE_BYTES_MAX: u64 = 64 * 1024 * 1024;

/// The most bytes of its file, which encryption makes longer by a nonce and a tag.
pub(super) const STATE_FILE_BYTES_MAX: u64 = STATE_BYTES_MAX + (NONCE_BYTES + TAG_BYTES) as u64;

/// The most memory of a VM.
pub const MEMORY_BYTES_MAX: u64 = 1 << 40;

/// The most disk layers that a snapshot and what it continues have together.
pub const DISK_LAYERS_MAX: usize = 16;

/// The most characters of a text in a header.
const TEXT_MAX: usize = 256;

/// By how many parts of a thousand two rates of a time-stamp counter may differ: each is measured,
/// and the measurement scatters.
const TSC_TOLERANCE: u64 = 1;

/// What is known of a snapshot before any other file of it is opened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    /// [`HEADER_GENERATION`].
    pub generation: u32,
    /// What it is of.
    pub meta: SnapshotMeta,
    /// Whether a key is needed.
    pub protection: Protection,
    /// Its own pages.
    pub memory: MemoryPart,
    /// The devices as they stood.
    pub state: StatePart,
    /// Its own disk layers; `None` has no disk of its own.
    pub disk: Option<DiskPart>,
}

/// Whether a snapshot's files can be read without a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Protection {
    /// They can.
    Plain,
    /// Memory, state and keys of disk layers are encrypted with the snapshot's key.
    Sealed,
}

/// The memory of a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryPart {
    /// Of the whole guest.
    pub bytes: u64,
    /// Chunks of which it holds a page.
    pub chunks: u64,
    /// Pages that it holds.
    pub pages: u64,
    /// The length of `memory.pages`.
    pub file_bytes: u64,
    /// Of `memory.index`.
    pub index: Hash,
}

/// The device state of a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StatePart {
    /// The length of `state`.
    pub bytes: u64,
    /// Of `state`.
    pub hash: Hash,
}

/// The disk of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskPart {
    /// What is below the first layer.
    pub backing: DiskBacking,
    /// Lowest first: `disk.0`, `disk.1` and so on.
    pub layers: Vec<DiskLayerPart>,
}

/// What a snapshot's lowest disk layer stands on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DiskBacking {
    /// An empty disk.
    Empty,
    /// The disk of what the snapshot continues.
    Parent,
}

/// One file of a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskLayerPart {
    /// The driver's word for its format.
    pub format: String,
    /// The length of the file, holes included.
    pub bytes: u64,
    /// Of `disk.N.index`.
    pub index: Hash,
    /// What opens it; `None` is not encrypted.
    pub key: Option<DiskKeyPart>,
}

/// The key of a disk layer as it is filed. Not in clear means nothing where the snapshot holds no
/// secrets: encryption is there because the file was a running VM's.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DiskKeyPart {
    /// Hexadecimal digits, in a plain snapshot.
    Clear(String),
    /// Encrypted with the snapshot's key, as base64.
    Sealed(String),
}

impl std::fmt::Debug for DiskKeyPart {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Clear(_key) => "Clear(***)",
            Self::Sealed(_key) => "Sealed(***)",
        })
    }
}

/// Why bytes are no header that can be used.
#[derive(Debug, Error)]
pub enum HeaderError {
    /// They are not what was written.
    #[error("its header is damaged")]
    Damaged,
    /// Another version of Spore wrote it.
    #[error(
        "its header is of generation {0}, and this version reads generation {HEADER_GENERATION}: \
         remove it and make it again"
    )]
    Generation(u32),
    /// It is whole, and says what this version never writes.
    #[error("its header says what no version writes")]
    Content(#[source] serde_json::Error),
    /// A value is beyond what is possible.
    #[error("its header says {value} for `{field}`, and {max} is the most")]
    Limit {
        /// Which.
        field: &'static str,
        /// What it says.
        value: u64,
        /// The most.
        max: u64,
    },
    /// It lies where another snapshot belongs.
    #[error("its header is that of {id} of account `{account}`, which does not belong there")]
    Foreign {
        /// Which it is.
        id: SnapshotId,
        /// Whose it is.
        account: String,
    },
    /// It continues what its account has no right to.
    #[error("it continues a snapshot of account `{0}`")]
    Parent(String),
}

/// Why a snapshot cannot be started from here.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum Mismatch {
    /// A property of the host.
    #[error("it was taken with the {what} `{snapshot}`, and this host has `{host}`: make it again")]
    Host {
        /// Which.
        what: &'static str,
        /// What it was.
        snapshot: String,
        /// What it is.
        host: String,
    },
    /// The agent inside is not understood any more, or not yet.
    #[error(
        "the agent in it is of generation {0}, and {oldest} to {newest} are served: make it again",
        oldest = generation::GENERATION_OLDEST_SERVED,
        newest = generation::GENERATION
    )]
    Agent(u32),
}

impl Header {
    /// The file's bytes.
    ///
    /// # Errors
    /// [`HeaderError::Content`] when a value has no JSON, and [`HeaderError::Limit`].
    pub fn encode(&self) -> Result<Vec<u8>, HeaderError> {
        self.check_limits()?;
        let mut bytes = serde_json::to_vec(self).map_err(HeaderError::Content)?;
        bytes.push(b'\n');
        let frame = format!("\"{}\"\n", Hash::of(&bytes));
        bytes.extend(frame.bytes());
        within("header", bytes.len() as u64, HEADER_BYTES_MAX as u64)?;
        Ok(bytes)
    }

    /// The header in a file's bytes.
    ///
    /// # Errors
    /// [`HeaderError`].
    pub fn decode(bytes: &[u8]) -> Result<Self, HeaderError> {
        /// What every generation has.
        #[derive(Deserialize)]
        struct Any {
            generation: u32,
        }
        if bytes.len() > HEADER_BYTES_MAX {
            return Err(HeaderError::Damaged);
        }
        let line = bytes.iter().position(|byte| *byte == b'\n');
        let (line, frame) = bytes.split_at(line.ok_or(HeaderError::Damaged)? + 1);
        if frame != format!("\"{}\"\n", Hash::of(line)).as_bytes() {
            return Err(HeaderError::Damaged);
        }
        let any: Any = serde_json::from_slice(line).map_err(HeaderError::Content)?;
        if any.generation != HEADER_GENERATION {
            return Err(HeaderError::Generation(any.generation));
        }
        let header: Self = serde_json::from_slice(line).map_err(HeaderError::Content)?;
        header.check_limits()?;
        Ok(header)
    }

    /// Whether this is the header of `id` of `account`, and continues only what that account may
    /// use.
    ///
    /// # Errors
    /// [`HeaderError::Foreign`] and [`HeaderError::Parent`].
    pub fn check_place(&self, account: &str, id: SnapshotId) -> Result<(), HeaderError> {
        let meta = &self.meta;
        if meta.id != id || meta.account != account {
            return Err(HeaderError::Foreign {
                id: meta.id,
                account: meta.account.clone(),
            });
        }
        match &meta.parent {
            Some(parent) if parent.account != account && parent.account != PUBLIC_ACCOUNT => {
                Err(HeaderError::Parent(parent.account.clone()))
            }
            _ => Ok(()),
        }
    }

    /// Whether a VM can start from it on a host like this.
    ///
    /// # Errors
    /// [`Mismatch`]: the first that differs.
    pub fn check_host(&self, host: &Shape) -> Result<(), Mismatch> {
        let was = &self.meta.shape;
        for (what, snapshot, host) in [
            ("driver", &was.driver, &host.driver),
            ("driver's version", &was.version, &host.version),
            ("CPU", &was.cpu, &host.cpu),
            ("guest kernel", &was.kernel, &host.kernel),
            ("devices", &was.devices, &host.devices),
        ] {
            if snapshot != host {
                let (snapshot, host) = (snapshot.clone(), host.clone());
                return Err(Mismatch::Host {
                    what,
                    snapshot,
                    host,
                });
            }
        }
        let difference = u64::from(was.tsc_khz.abs_diff(host.tsc_khz));
        if difference * 1000 > u64::from(was.tsc_khz) * TSC_TOLERANCE {
            return Err(Mismatch::Host {
                what: "time-stamp counter of",
                snapshot: format!("{} kHz", was.tsc_khz),
                host: format!("{} kHz", host.tsc_khz),
            });
        }
        let agent = self.meta.agent_generation;
        if generation::is_served(agent) {
            Ok(())
        } else {
            Err(Mismatch::Agent(agent))
        }
    }

    fn check_limits(&self) -> Result<(), HeaderError> {
        let shape = &self.meta.shape;
        for (field, text) in [
            ("driver", &shape.driver),
            ("version", &shape.version),
            ("cpu", &shape.cpu),
            ("kernel", &shape.kernel),
            ("devices", &shape.devices),
        ] {
            within(field, text.len() as u64, TEXT_MAX as u64)?;
        }
        within("memory.bytes", self.memory.bytes, MEMORY_BYTES_MAX)?;
        let pages = self.memory.bytes / PAGE_BYTES as u64;
        within("memory.pages", self.memory.pages, pages)?;
        within("memory.chunks", self.memory.chunks, pages.div_ceil(16))?;
        // A tag for each chunk, and room for nothing else.
        let file_bytes = self.memory.bytes.saturating_add(self.memory.chunks * 16);
        within("memory.file_bytes", self.memory.file_bytes, file_bytes)?;
        within("state.bytes", self.state.bytes, STATE_FILE_BYTES_MAX)?;
        let layers = self.disk.as_ref().map_or(0, |disk| disk.layers.len());
        within("disk.layers", layers as u64, DISK_LAYERS_MAX as u64)
    }
}

const fn within(field: &'static str, value: u64, max: u64) -> Result<(), HeaderError> {
    if value <= max {
        Ok(())
    } else {
        Err(HeaderError::Limit { field, value, max })
    }
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;
    use spore_wire::id::{ImageId, SnapshotId};
    use spore_wire::node::{Owner, Resources};
    use spore_wire::snapshot::{Shape, SnapshotApp, SnapshotKind, SnapshotMeta, SnapshotParent};

    use super::{
        DISK_LAYERS_MAX, DiskBacking, DiskKeyPart, DiskLayerPart, DiskPart, HEADER_GENERATION,
        Hash, Header, HeaderError, MemoryPart, Mismatch, Protection, StatePart,
    };

    pub(in crate::snapshot) fn shape() -> Shape {
        Shape {
            driver: "qemu".to_owned(),
            version: "7.2.22".to_owned(),
            cpu: "qemu64".to_owned(),
            tsc_khz: 2_100_000,
            kernel: "6.1.0-56-cloud-amd64".to_owned(),
            devices: "cd".repeat(32),
        }
    }

    pub(in crate::snapshot) fn meta(account: &str, id: SnapshotId) -> SnapshotMeta {
        SnapshotMeta {
            id,
            account: account.to_owned(),
            parent: None,
            kind: SnapshotKind::Template,
            shape: shape(),
            agent_generation: 1,
            guest: "guest".to_owned(),
            image: ImageId::from_hash([3; 32]),
            folder: None,
            resources: Resources {
                cpus: 1,
                memory_mib: 1,
                disk_mib: 64,
            },
            taken_of: None,
            app: None,
            release: None,
            holds_secrets: false,
            made_at_s: 1_790_000_000,
        }
    }

    fn full() -> Header {
        let mut meta = meta("me", SnapshotId::from_bytes([1; 16]));
        meta.parent = Some(SnapshotParent {
            account: "public".to_owned(),
            id: SnapshotId::from_bytes([2; 16]),
        });
        meta.kind = SnapshotKind::Checkpoint;
        meta.folder = Some(ImageId::from_hash([4; 32]));
        meta.taken_of = Some(Owner {
            account: "me".to_owned(),
            app: "notes".to_owned(),
            release: 7,
            secrets_version: 5,
        });
        meta.app = Some(SnapshotApp {
            port: 8000,
            ready: true,
        });
        meta.holds_secrets = true;
        let layer = |key| DiskLayerPart {
            format: "qcow2".to_owned(),
            bytes: 2_359_296,
            index: Hash::of(b"disk.0.index"),
            key,
        };
        Header {
            generation: HEADER_GENERATION,
            meta,
            protection: Protection::Sealed,
            memory: MemoryPart {
                bytes: 1 << 20,
                chunks: 2,
                pages: 20,
                file_bytes: 20 * 4096 + 32,
                index: Hash::of(b"memory.index"),
            },
            state: StatePart {
                bytes: 25_900,
                hash: Hash::of(b"state"),
            },
            disk: Some(DiskPart {
                backing: DiskBacking::Parent,
                layers: vec![
                    layer(Some(DiskKeyPart::Sealed("c2VhbGVk".to_owned()))),
                    layer(Some(DiskKeyPart::Clear("ab".repeat(32)))),
                    layer(None),
                ],
            }),
        }
    }

    #[test]
    fn a_header_is_read_as_every_version_of_this_generation_wrote_it() {
        let golden = include_bytes!("header.golden.json");
        let text = String::from_utf8(full().encode().unwrap()).unwrap();
        assert_eq!(text, String::from_utf8_lossy(golden));
        assert_eq!(Header::decode(golden).unwrap(), full());
        let first = include_bytes!("header.first.json");
        let mut expected = full();
        expected.meta.taken_of.as_mut().unwrap().secrets_version = 0;
        assert_eq!(Header::decode(first).unwrap(), expected);
    }

    #[test]
    fn every_flipped_byte_of_a_header_is_damage() {
        let whole = full().encode().unwrap();
        for at in 0..whole.len() {
            for flip in [1, 0x20, 0x80] {
                let mut bytes = whole.clone();
                bytes[at] ^= flip;
                let refused = Header::decode(&bytes).unwrap_err();
                assert!(matches!(refused, HeaderError::Damaged), "{at}: {refused}");
            }
        }
        for end in 0..whole.len() {
            let refused = Header::decode(&whole[..end]).unwrap_err();
            assert!(matches!(refused, HeaderError::Damaged), "{end}: {refused}");
        }
    }

    #[test]
    fn another_generation_is_named_and_not_guessed_at() {
        let mut line = b"{\"generation\":1,\"unheard\":\"of\"}\n".to_vec();
        let frame = format!("\"{}\"\n", Hash::of(&line));
        line.extend(frame.bytes());
        let refused = Header::decode(&line).unwrap_err();
        assert!(matches!(refused, HeaderError::Generation(1)), "{refused}");
        assert!(refused.to_string().contains("make it again"), "{refused}");
    }

    #[test]
    fn values_beyond_their_limits_are_neither_written_nor_read() {
        type Change = fn(&mut Header);
        let changes: [(&str, Change); 6] = [
            ("cpu", |header| header.meta.shape.cpu = "x".repeat(257)),
            ("memory.bytes", |header| header.memory.bytes = u64::MAX),
            ("memory.pages", |header| header.memory.pages = 257),
            ("memory.file_bytes", |header| {
                header.memory.file_bytes = 2 << 20
            }),
            ("state.bytes", |header| header.state.bytes = 1 << 40),
            ("disk.layers", |header| {
                let disk = header.disk.as_mut().unwrap();
                disk.layers = vec![disk.layers[0].clone(); DISK_LAYERS_MAX + 1];
            }),
        ];
        for (named, change) in changes {
            let mut header = full();
            change(&mut header);
            let refused = header.encode().unwrap_err();
            assert!(
                matches!(refused, HeaderError::Limit { field, .. } if field == named),
                "{named}: {refused}"
            );
            let mut line = serde_json::to_vec(&header).unwrap();
            line.push(b'\n');
            line.extend(format!("\"{}\"\n", Hash::of(&line)).bytes());
            assert!(matches!(
                Header::decode(&line),
                Err(HeaderError::Limit { .. })
            ));
        }
    }

    #[test]
    fn a_header_belongs_to_one_place() {
        let header = full();
        let id = header.meta.id;
        header.check_place("me", id).unwrap();
        for (account, id) in [("other", id), ("me", SnapshotId::from_bytes([9; 16]))] {
            let refused = header.check_place(account, id).unwrap_err();
            assert!(matches!(refused, HeaderError::Foreign { .. }), "{refused}");
        }
        let mut thief = full();
        thief.meta.parent.as_mut().unwrap().account = "other".to_owned();
        let refused = thief.check_place("me", id).unwrap_err();
        assert!(
            matches!(&refused, HeaderError::Parent(of) if of == "other"),
            "{refused}"
        );
        thief.meta.account = "public".to_owned();
        thief.meta.parent.as_mut().unwrap().account = "me".to_owned();
        thief.check_place("public", id).unwrap_err();
    }

    #[test]
    fn a_host_that_differs_is_told_in_what() {
        type Change = fn(&mut Shape);
        let changes: [(&str, Change); 6] = [
            ("driver `qemu`", |host| host.driver = "kvm".to_owned()),
            ("version", |host| host.version = "8.0.0".to_owned()),
            ("CPU", |host| host.cpu = "max".to_owned()),
            ("kernel", |host| host.kernel = "6.1.0-57".to_owned()),
            ("devices", |host| host.devices = "other".to_owned()),
            ("2102101 kHz", |host| host.tsc_khz += 2_101),
        ];
        for (named, change) in changes {
            let mut host = shape();
            change(&mut host);
            let refused = full().check_host(&host).unwrap_err();
            assert!(refused.to_string().contains(named), "{refused}");
        }
        let mut host = shape();
        host.tsc_khz += 2_100;
        full().check_host(&host).unwrap();
        host.tsc_khz -= 4_200;
        full().check_host(&host).unwrap();
    }

    #[test]
    fn an_agent_that_is_not_served_is_told() {
        let mut header = full();
        header.meta.agent_generation = u32::MAX;
        let refused = header.check_host(&shape()).unwrap_err();
        assert_eq!(refused, Mismatch::Agent(u32::MAX));
    }

    #[test]
    fn keys_are_not_printed() {
        let text = format!("{:?}", full());
        assert!(
            !text.contains("abababab\"") && !text.contains("c2VhbGVk"),
            "{text}"
        );
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(
            id: [u8; 16],
            account in "[a-z][a-z0-9-]{0,39}",
            parent in proptest::option::of(any::<[u8; 16]>()),
            kernel in ".{0,60}",
            tsc_khz: u32,
            made_at_s: u64,
            memory_mib in 1..4096_u64,
            layers in 0..5_usize,
        ) {
            let mut header = full();
            header.meta.id = SnapshotId::from_bytes(id);
            header.meta.account.clone_from(&account);
            header.meta.parent = parent.map(|id| SnapshotParent {
                account,
                id: SnapshotId::from_bytes(id),
            });
            header.meta.shape.kernel = kernel;
            header.meta.shape.tsc_khz = tsc_khz;
            header.meta.made_at_s = made_at_s;
            header.memory.bytes = memory_mib << 20;
            header.disk.as_mut().unwrap().layers.truncate(layers);
            prop_assert_eq!(Header::decode(&header.encode().unwrap()).unwrap(), header);
        }

        #[test]
        fn no_bytes_make_decoding_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            prop_assert!(Header::decode(&bytes).is_err());
        }
    }
}
