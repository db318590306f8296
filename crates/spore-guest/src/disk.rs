//! The VM's disks: which is which, and what is on it.
//!
//! Called by [`crate::init`] and [`crate::view`]. A disk is known by its virtio-blk serial, a file
//! system by its superblock: the guest may look at what a tenant could have written, the host never
//! does.

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use thiserror::Error;

/// Serial of the image's disk; without one, the first disk is it.
pub const IMAGE: &str = "image";
/// Serial of the disk with the app's folder.
pub const FOLDER: &str = "folder";
/// Serial of the disk whose content is gone with the VM.
pub const SCRATCH: &str = "scratch";

/// Why a disk cannot be used.
#[derive(Debug, Error)]
pub enum DiskError {
    /// It cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// The device.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Its superblock is none that we know.
    #[error("{0} holds neither squashfs, erofs nor ext4: rebuild the image")]
    Unknown(PathBuf),
}

/// The file systems that the guest mounts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileSystem {
    /// Read-only.
    Squashfs,
    /// Read-only.
    Erofs,
    /// Scratch.
    Ext4,
}

impl FileSystem {
    /// The kernel's name for it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Squashfs => "squashfs",
            Self::Erofs => "erofs",
            Self::Ext4 => "ext4",
        }
    }

    /// Looks at the superblock of `device`.
    ///
    /// # Errors
    /// [`DiskError`].
    pub fn probe(device: &Path) -> Result<Self, DiskError> {
        let mut head = Vec::new();
        let read = File::open(device).and_then(|file| file.take(4096).read_to_end(&mut head));
        read.map_err(|source| DiskError::Read {
            path: device.to_owned(),
            source,
        })?;
        Self::of(&head).ok_or_else(|| DiskError::Unknown(device.to_owned()))
    }

    fn of(head: &[u8]) -> Option<Self> {
        let at = |from: usize, magic: &[u8]| head.get(from..from + magic.len()) == Some(magic);
        if at(0, b"hsqs") {
            Some(Self::Squashfs)
        } else if at(1024, &0xe0f5_e1e2_u32.to_le_bytes()) {
            Some(Self::Erofs)
        } else if at(1080, &0xef53_u16.to_le_bytes()) {
            Some(Self::Ext4)
        } else {
            None
        }
    }
}

/// The device of the disk with this serial, if there is one.
#[must_use]
pub fn find(serial: &str) -> Option<PathBuf> {
    let mut names: Vec<String> = fs::read_dir("/sys/block")
        .ok()?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name.starts_with("vd"))
        .collect();
    names.sort();
    let named = names.iter().find(|name| {
        let path = format!("/sys/block/{name}/serial");
        fs::read_to_string(path).is_ok_and(|text| text.trim() == serial)
    });
    let first = names.first().filter(|_name| serial == IMAGE);
    named.or(first).map(|name| Path::new("/dev").join(name))
}

#[cfg(test)]
mod tests {
    use super::FileSystem;

    #[test]
    fn a_superblock_is_known_by_its_magic_alone() {
        let mut head = vec![0; 4096];
        assert_eq!(FileSystem::of(&head), None);
        head[1080..1082].copy_from_slice(&[0x53, 0xef]);
        assert_eq!(FileSystem::of(&head), Some(FileSystem::Ext4));
        head[1024..1028].copy_from_slice(&[0xe2, 0xe1, 0xf5, 0xe0]);
        assert_eq!(FileSystem::of(&head), Some(FileSystem::Erofs));
        head[..4].copy_from_slice(b"hsqs");
        assert_eq!(FileSystem::of(&head), Some(FileSystem::Squashfs));
        assert_eq!(FileSystem::of(b"hsq"), None);
    }
}
