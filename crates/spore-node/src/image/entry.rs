//! Which entries of a tar stream an image may have, and what they become.
//!
//! Called by `pack.rs` in the confined process. Believes nothing in the stream and touches no file:
//! it turns a header into a [`Node`] or says why not.

use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Serialize};
use spore_wire::node::ImageKind;
use tar::EntryType;
use thiserror::Error;

/// The longest path in an image, as in Linux (`PATH_MAX` less its NUL).
pub const PATH_BYTES_MAX: usize = 4095;

/// The longest name in a folder, as in Linux (`NAME_MAX`) and in SquashFS.
pub const NAME_BYTES_MAX: usize = 255;

/// Permission bits.
const PERMISSIONS: u32 = 0o777;

/// Set-user-id and set-group-id.
const SET_ID: u32 = 0o6000;

/// How much an image may hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PackLimits {
    /// Files, folders and links.
    pub entries_max: u64,
    /// Bytes of one file.
    pub file_bytes_max: u64,
    /// Bytes of all files.
    pub total_bytes_max: u64,
}

impl PackLimits {
    /// What an image of this kind may hold unless the node is configured otherwise.
    #[must_use]
    pub const fn of(kind: ImageKind) -> Self {
        const GIB: u64 = 1024 * 1024 * 1024;
        match kind {
            ImageKind::Root => Self {
                entries_max: 500_000,
                file_bytes_max: 4 * GIB,
                total_bytes_max: 16 * GIB,
            },
            // What the interface promises (`spore_api::limits`): the program's tests compare.
            ImageKind::Folder => Self {
                entries_max: 200_000,
                file_bytes_max: 4 * GIB,
                total_bytes_max: 4 * GIB,
            },
        }
    }
}

/// Owner, mode and time of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attributes {
    /// Permission bits, with set-id and sticky bits where they are allowed.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Seconds since the Unix epoch.
    pub mtime_s: u32,
}

/// What an accepted entry is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Node {
    /// A folder.
    Folder,
    /// A file whose content follows in the stream.
    File,
    /// A symbolic link; its target means something only in the guest.
    Symlink(PathBuf),
    /// Another name of a file that came before.
    HardLink(PathBuf),
}

/// Why an entry is refused. The whole image is refused with it.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum EntryError {
    /// The path leads out of the image.
    #[error("`{0}` leads out of the image: make the archive with relative paths and without `..`")]
    Escapes(String),
    /// The path or a name in it is too long or empty.
    #[error("`{0}…` is not a usable path: at most 4095 bytes, each name at most 255")]
    Path(String),
    /// A device node, FIFO or something unknown.
    #[error("`{path}` is a {what}, which an image cannot have: leave it out")]
    Kind {
        /// Where.
        path: String,
        /// What it is.
        what: &'static str,
    },
    /// A set-id file in an app's folder.
    #[error("`{0}` is setuid or setgid, which an app's folder cannot have: chmod ug-s it")]
    SetId(String),
    /// A number in the header is out of range.
    #[error("`{path}` has a header that cannot be read: {what}")]
    Header {
        /// Where.
        path: String,
        /// Which field.
        what: &'static str,
    },
}

/// The path of an entry inside the image; empty is the image's root.
///
/// # Errors
/// [`EntryError::Escapes`] and [`EntryError::Path`].
pub fn image_path(path: &Path) -> Result<PathBuf, EntryError> {
    let shown = || path.to_string_lossy().chars().take(200).collect::<String>();
    let bytes = path.as_os_str().as_encoded_bytes();
    if bytes.is_empty() || bytes.len() > PATH_BYTES_MAX || bytes.contains(&0) {
        return Err(EntryError::Path(shown()));
    }
    let mut clean = PathBuf::new();
    for component in path.components() {
        match component {
            Component::CurDir => {}
            Component::Normal(name) if name.len() <= NAME_BYTES_MAX => clean.push(name),
            Component::Normal(_) => return Err(EntryError::Path(shown())),
            Component::ParentDir | Component::RootDir | Component::Prefix(_) => {
                return Err(EntryError::Escapes(shown()));
            }
        }
    }
    Ok(clean)
}

/// What a tar header becomes in an image of this kind.
///
/// # Errors
/// [`EntryError`].
pub fn judge(
    kind: ImageKind,
    path: &Path,
    header: &tar::Header,
    link: Option<&Path>,
) -> Result<(Node, Attributes), EntryError> {
    let shown = || path.to_string_lossy().into_owned();
    let wrong = |what| EntryError::Header {
        path: shown(),
        what,
    };
    let target = || {
        link.ok_or(EntryError::Header {
            path: shown(),
            what: "no link target",
        })
    };
    let node = match header.entry_type() {
        EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => Node::File,
        EntryType::Directory => Node::Folder,
        EntryType::Symlink => Node::Symlink(symlink_target(path, target()?)?),
        EntryType::Link => Node::HardLink(image_path(target()?)?),
        other => {
            return Err(EntryError::Kind {
                path: shown(),
                what: kind_name(other),
            });
        }
    };
    let mode = header.mode().map_err(|_e| wrong("mode"))?;
    let mtime = header.mtime().map_err(|_e| wrong("mtime"))?;
    let mtime_s = u32::try_from(mtime).unwrap_or(u32::MAX);
    let attributes = match kind {
        ImageKind::Root => Attributes {
            mode: low_bits(mode & (PERMISSIONS | SET_ID | 0o1000)),
            uid: id(header.uid()).ok_or_else(|| wrong("uid"))?,
            gid: id(header.gid()).ok_or_else(|| wrong("gid"))?,
            mtime_s,
        },
        ImageKind::Folder => {
            if node == Node::File && mode & SET_ID != 0 {
                return Err(EntryError::SetId(shown()));
            }
            Attributes {
                mode: folder_mode(&node, mode),
                uid: 0,
                gid: 0,
                mtime_s,
            }
        }
    };
    Ok((node, attributes))
}

/// The mode of an entry of an app's folder: root's, readable by all, executable if it was for
/// anybody.
fn folder_mode(node: &Node, mode: u32) -> u16 {
    match node {
        Node::Folder => 0o755,
        Node::Symlink(_) => 0o777,
        Node::File | Node::HardLink(_) if mode & 0o111 != 0 => 0o755,
        Node::File | Node::HardLink(_) => 0o644,
    }
}

/// A link's target is a text for the guest; only its length matters here.
fn symlink_target(path: &Path, target: &Path) -> Result<PathBuf, EntryError> {
    let bytes = target.as_os_str().as_encoded_bytes();
    if bytes.is_empty() || bytes.len() > PATH_BYTES_MAX || bytes.contains(&0) {
        let what = "link target is empty or too long";
        return Err(EntryError::Header {
            path: path.to_string_lossy().into_owned(),
            what,
        });
    }
    Ok(target.to_path_buf())
}

/// A uid or gid; `u32::MAX` means "no change" to chown(2) and is no id.
fn id(value: std::io::Result<u64>) -> Option<u32> {
    u32::try_from(value.ok()?).ok().filter(|id| *id != u32::MAX)
}

/// The low 16 bits, which a masked mode fits in.
fn low_bits(mode: u32) -> u16 {
    u16::try_from(mode & 0xffff).unwrap_or(0)
}

fn kind_name(kind: EntryType) -> &'static str {
    match kind {
        EntryType::Char => "character device",
        EntryType::Block => "block device",
        EntryType::Fifo => "FIFO",
        _ => "kind of entry that is not known here",
    }
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use spore_wire::node::ImageKind::{Folder, Root};
    use tar::{EntryType, Header};

    use super::{EntryError, Node, image_path, judge};

    fn header(kind: EntryType, mode: u32) -> Header {
        let mut header = Header::new_ustar();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(1234);
        header.set_gid(5678);
        header.set_mtime(99);
        header
    }

    #[test]
    fn a_path_is_relative_and_stays_inside() {
        assert_eq!(
            image_path(Path::new("./usr/bin/")).unwrap(),
            PathBuf::from("usr/bin")
        );
        assert_eq!(image_path(Path::new("./")).unwrap(), PathBuf::new());
        for path in ["/etc/passwd", "../x", "a/../../x", "a/.."] {
            assert!(
                matches!(image_path(Path::new(path)), Err(EntryError::Escapes(_))),
                "{path}"
            );
        }
        let long_name = "n".repeat(256);
        let long_path = "d/".repeat(3000);
        for path in ["", &long_name, &long_path, "a\0b"] {
            assert!(
                matches!(image_path(Path::new(path)), Err(EntryError::Path(_))),
                "{path:?}"
            );
        }
    }

    #[test]
    fn a_root_image_keeps_owners_and_modes() {
        let (node, kept) = judge(
            Root,
            Path::new("su"),
            &header(EntryType::Regular, 0o4755),
            None,
        )
        .unwrap();
        assert_eq!(node, Node::File);
        assert_eq!(
            (kept.mode, kept.uid, kept.gid, kept.mtime_s),
            (0o4755, 1234, 5678, 99)
        );
    }

    #[test]
    fn a_folder_belongs_to_root_and_is_readable_by_all() {
        let judged = |kind, mode| judge(Folder, Path::new("f"), &header(kind, mode), None);
        let (_, script) = judged(EntryType::Regular, 0o700).unwrap();
        assert_eq!(
            (script.mode, script.uid, script.gid, script.mtime_s),
            (0o755, 0, 0, 99)
        );
        assert_eq!(judged(EntryType::Regular, 0o600).unwrap().1.mode, 0o644);
        assert_eq!(judged(EntryType::Directory, 0o2700).unwrap().1.mode, 0o755);
    }

    #[test]
    fn nothing_setuid_enters_a_folder() {
        for mode in [0o4755, 0o2755] {
            let refused = judge(
                Folder,
                Path::new("f"),
                &header(EntryType::Regular, mode),
                None,
            )
            .unwrap_err();
            assert_eq!(refused, EntryError::SetId("f".to_owned()));
        }
    }

    #[test]
    fn device_nodes_and_fifos_are_refused_in_every_image() {
        for kind in [
            EntryType::Char,
            EntryType::Block,
            EntryType::Fifo,
            EntryType::new(b'Z'),
        ] {
            for image in [Root, Folder] {
                let refused = judge(image, Path::new("dev/x"), &header(kind, 0o600), None);
                assert!(matches!(refused, Err(EntryError::Kind { .. })), "{kind:?}");
            }
        }
    }

    #[test]
    fn a_hard_link_out_of_the_image_is_refused_and_a_symlink_is_only_a_text() {
        let out = Path::new("/etc/shadow");
        let hard = judge(
            Root,
            Path::new("l"),
            &header(EntryType::Link, 0o644),
            Some(out),
        );
        assert!(matches!(hard, Err(EntryError::Escapes(_))));
        let soft = judge(
            Root,
            Path::new("l"),
            &header(EntryType::Symlink, 0o777),
            Some(out),
        );
        assert_eq!(soft.unwrap().0, Node::Symlink(out.to_path_buf()));
    }
}
