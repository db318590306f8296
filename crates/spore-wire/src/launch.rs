//! Node and VMM: what a VMM is made one guest's with, once, and what its disks are later.
//!
//! Travels as [`crate::vmm::ToVmm::Launch`], with the descriptors beside it: the VMM opens no path,
//! so everything that is not a number here came in open. A descriptor is named by its place among
//! those of the same packet. The VMM believes none of it before it has checked it: a wrong blob is
//! an answer, not half a guest.

use core::num::NonZeroU64;

use data_encoding::HEXLOWER;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::id::VmId;
use crate::secret::SecretBytes;

/// The most descriptors of one packet: Linux passes 253 at once (unix(7), `SCM_MAX_FD`).
pub const FDS_MAX: usize = 64;

/// The most layers below a scratch disk's own.
pub const LAYERS_MAX: usize = 32;

/// The most [`PageRun`]s of a launch, so that it is one packet.
pub const AHEAD_MAX: usize = 2048;

/// The bytes of a layer's key: two keys of AES-256 for XTS (IEEE 1619).
pub const LAYER_KEY_BYTES: usize = 64;

/// What is before each frame of a tap: what the kernel begins with when it was made with
/// `IFF_VNET_HDR` (tun(4) of Linux, `TUNSETVNETHDRSZ`).
pub const TAP_HEADER_BYTES: usize = 10;

/// How a layer's file is laid out: a header, a bit for each cluster in whole pages, and from the
/// next whole cluster on each cluster at its own place.
const LAYER_HEADER_BYTES: u64 = 4096;
const LAYER_PAGE_BYTES: u64 = 4096;
const LAYER_CLUSTER_BYTES: u64 = 64 * 1024;

/// How long the file of a layer is, of a disk of so many bytes: most of it holes, at first.
#[must_use]
pub const fn layer_bytes(disk: u64) -> u64 {
    let clusters = disk.div_ceil(LAYER_CLUSTER_BYTES);
    let map = clusters.div_ceil(8).next_multiple_of(LAYER_PAGE_BYTES);
    let data = (LAYER_HEADER_BYTES + map).next_multiple_of(LAYER_CLUSTER_BYTES);
    data + clusters * LAYER_CLUSTER_BYTES
}

/// A descriptor's place among those of its packet, from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct FdIndex(pub u8);

/// A guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Launch {
    /// Whose guest it is, for what the VMM says to people.
    pub vm: VmId,
    /// Processors, 1 to 4.
    pub vcpus: u8,
    /// Memory, 64 MiB to 32 GiB.
    pub memory_mib: u32,
    /// A file of exactly that size: its memory.
    pub memory: FdIndex,
    /// Where it begins.
    pub begin: Begin,
    /// The bytes of the VM Generation ID, never given to another start: what tells a guest that it
    /// is a copy.
    pub incarnation: Incarnation,
    /// The root image, read-only.
    pub image: FdIndex,
    /// The app's folder, read-only; a disk with nothing on it where there is none.
    pub folder: FdIndex,
    /// What it writes to, if it has a disk for that.
    pub scratch: Option<Scratch>,
    /// Its tap: one queue, without offloads, with headers of [`TAP_HEADER_BYTES`].
    pub tap: FdIndex,
    /// The address of its network device.
    pub mac: [u8; 6],
    /// A unix stream socket that listens: the host's end of the agent's port.
    pub agent: FdIndex,
    /// How much its devices do in a second at most.
    #[serde(default, skip_serializing_if = "Rates::are_none")]
    pub rates: Rates,
}

/// How much a guest's devices do in a second, and, after a pause, at once; `None` is no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Rates {
    /// Bytes that are read from and written to each disk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk_bytes: Option<NonZeroU64>,
    /// Reads, writes and flushes of each disk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk_operations: Option<NonZeroU64>,
    /// Bytes of frames, in each direction.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub network_bytes: Option<NonZeroU64>,
}

impl Rates {
    /// Whether nothing is limited.
    #[must_use]
    pub fn are_none(&self) -> bool {
        *self == Self::default()
    }
}

/// Where a guest begins.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "by", rename_all = "snake_case")]
pub enum Begin {
    /// With a kernel. Its memory is all zeros, and its own.
    Boot {
        /// An ELF file with a PVH entry.
        kernel: FdIndex,
        /// The first file system.
        initramfs: FdIndex,
        /// The kernel's command line, ASCII.
        command_line: String,
    },
    /// Where another stood.
    Restore {
        /// What [`crate::vmm::ToVmm::Save`] wrote.
        state: FdIndex,
        /// Whose the memory is.
        memory: MemoryOwner,
        /// What the guest is expected to write to first: copied before it runs, all at once, where
        /// the memory is shared. In the order of the memory, at most [`AHEAD_MAX`].
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        ahead: Vec<PageRun>,
    },
}

/// Some pages of a guest's memory beside each other, by their places in its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "(u32, u32)", into = "(u32, u32)")]
pub struct PageRun {
    /// The number of the first.
    pub first: u32,
    /// How many.
    pub pages: u32,
}

impl From<(u32, u32)> for PageRun {
    fn from((first, pages): (u32, u32)) -> Self {
        Self { first, pages }
    }
}

impl From<PageRun> for (u32, u32) {
    fn from(PageRun { first, pages }: PageRun) -> Self {
        (first, pages)
    }
}

/// Whether what a restored guest writes reaches the file of its memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MemoryOwner {
    /// It does not: any number of guests begin from the file.
    Shared,
    /// It does: the file is this guest's alone.
    Own,
}

/// A disk that a guest writes to: its own layer over others, over a base.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scratch {
    /// Its size as the guest sees it.
    pub bytes: u64,
    /// A file of that size below all layers; without one there are zeros.
    pub base: Option<FdIndex>,
    /// Layers that stay as they are, lowest first; at most [`LAYERS_MAX`].
    pub layers: Vec<Layer>,
    /// What it writes to, new: all zeros.
    pub own: Layer,
}

/// One layer of a scratch disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layer {
    /// Its file, of [`layer_bytes`].
    pub file: FdIndex,
    /// What is in it is encrypted with this, [`LAYER_KEY_BYTES`] bytes; `None` is in clear.
    pub key: Option<SecretBytes>,
}

/// The 16 bytes of a VM Generation ID (Microsoft, "Virtual Machine Generation ID"), shown as 32
/// hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Incarnation([u8; 16]);

impl Incarnation {
    /// A new one from the kernel's random numbers (`getrandom(2)`).
    ///
    /// # Errors
    /// When the kernel gives no random bytes.
    pub fn random() -> Result<Self, getrandom::Error> {
        let mut bytes = [0; 16];
        getrandom::fill(&mut bytes)?;
        Ok(Self(bytes))
    }

    /// The one with exactly these bytes.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// Its bytes, as the guest finds them in its memory.
    #[must_use]
    pub const fn bytes(self) -> [u8; 16] {
        self.0
    }
}

impl core::fmt::Debug for Incarnation {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        // A guest seeds its random numbers with it.
        f.write_str("Incarnation(***)")
    }
}

impl Serialize for Incarnation {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&HEXLOWER.encode(&self.0))
    }
}

impl<'de> Deserialize<'de> for Incarnation {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let bytes = HEXLOWER.decode(text.as_bytes()).ok();
        let bytes = bytes.and_then(|bytes| bytes.try_into().ok());
        bytes
            .map(Self)
            .ok_or_else(|| serde::de::Error::custom("an incarnation is 32 digits 0-9 and a-f"))
    }
}

#[cfg(test)]
mod tests {
    use super::Incarnation;

    #[test]
    fn an_incarnation_survives_its_encoding_and_is_not_printed() {
        let one = Incarnation::random().unwrap();
        let text = serde_json::to_string(&one).unwrap();
        assert_eq!(serde_json::from_str::<Incarnation>(&text).unwrap(), one);
        assert_eq!(format!("{one:?}"), "Incarnation(***)");
        for wrong in [
            "\"\"",
            "\"00\"",
            "\"ZZ112233445566778899aabbccddeeff\"",
            "7",
        ] {
            assert!(
                serde_json::from_str::<Incarnation>(wrong).is_err(),
                "{wrong}"
            );
        }
    }
}
