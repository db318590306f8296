//! An app's folder, or a root file system, as a list of what goes up.
//!
//! Used by `deploy` and `image build`. It decides what is left out and refuses what cannot go;
//! `archive.rs` turns the list into a stream. It never follows a link and never reads a file's
//! content.

mod archive;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::fs::{FileType, Metadata};
use std::io;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use ignore::{DirEntry, WalkBuilder};
use spore_api::limits::{SOURCE_ENTRIES_MAX, SOURCE_UNPACKED_BYTES_MAX};
use thiserror::Error;

pub(crate) use self::archive::Archive;

/// The name of the file that says what stays behind, beside `.gitignore`.
const IGNORE_FILE: &str = ".sporeignore";

/// What a folder is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FolderKind {
    /// The folder of an app: private files stay behind, links stay inside.
    App,
    /// A root file system: all of it goes, and links mean what they mean inside the VM.
    Root,
}

/// What goes up, in the order of its paths.
#[derive(Debug)]
pub(crate) struct Listing {
    root: PathBuf,
    items: Vec<Item>,
    /// What stays behind because it is likely private, relative to the folder.
    pub(crate) left_out: Vec<String>,
    /// The bytes of all files.
    pub(crate) bytes: u64,
}

#[derive(Debug)]
struct Item {
    path: PathBuf,
    what: What,
    mode: u32,
    modified: u64,
}

#[derive(Debug)]
enum What {
    File { bytes: u64 },
    Folder,
    Link { target: PathBuf },
}

/// Why a folder cannot go up.
#[derive(Debug, Error)]
pub(crate) enum PackError {
    #[error("cannot read {path}: check its owner and mode, or name it in {IGNORE_FILE}")]
    Read { path: String, source: io::Error },
    #[error("cannot walk the folder")]
    Walk { source: ignore::Error },
    #[error(
        "{path} is a link to {target}, which is outside of the folder and would be missing in the \
         VM. Copy what it points to, or name it in {IGNORE_FILE}"
    )]
    LinkOut { path: String, target: String },
    #[error(
        "{path} is a link to {target}, an absolute path, which means another place in the VM. Make \
         it relative, or name it in {IGNORE_FILE}"
    )]
    LinkAbsolute { path: String, target: String },
    #[error("{path} is {what}, which cannot go up. Remove it, or name it in {IGNORE_FILE}")]
    Special { path: String, what: &'static str },
    #[error("{folder} has nothing to deploy: it is empty, or all of it is ignored")]
    Empty { folder: String },
    #[error(
        "{folder} has more than {limit} files, folders and links. Name what the app does not need \
         in {IGNORE_FILE}"
    )]
    TooMany { folder: String, limit: u64 },
    #[error(
        "{folder} holds more than {limit} bytes. Name what the app does not need in {IGNORE_FILE}"
    )]
    TooLarge { folder: String, limit: u64 },
    #[error("{path} changed while it was read. Deploy again when nothing writes to it")]
    Changed { path: String },
    #[error("cannot pack {path}")]
    Write { path: String, source: io::Error },
}

impl Listing {
    /// Lists a folder. `apart` is a folder inside of it that goes up by itself.
    pub(crate) fn read(
        folder: &Path,
        kind: FolderKind,
        apart: Option<&Path>,
    ) -> Result<Self, PackError> {
        let read = |source| PackError::Read {
            path: folder.display().to_string(),
            source,
        };
        let root = folder.canonicalize().map_err(read)?;
        let apart = apart.and_then(|apart| apart.canonicalize().ok());
        let private = Arc::new(Mutex::new(BTreeSet::new()));
        let noted = Arc::clone(&private);
        let base = root.clone();
        let mut walk = WalkBuilder::new(&root);
        let ignores = kind == FolderKind::App;
        walk.standard_filters(false)
            .git_ignore(ignores)
            .require_git(false)
            .follow_links(false)
            .sort_by_file_path(Path::cmp)
            .filter_entry(move |entry| {
                if kind == FolderKind::Root || entry.depth() == 0 {
                    return true;
                }
                if apart.as_deref() == Some(entry.path()) {
                    return false;
                }
                if !is_private(&entry.file_name().to_string_lossy()) {
                    return true;
                }
                let path = entry.path().strip_prefix(&base).unwrap_or(entry.path());
                let mut noted = noted.lock().unwrap_or_else(PoisonError::into_inner);
                noted.insert(path.display().to_string());
                false
            });
        if ignores {
            walk.add_custom_ignore_filename(IGNORE_FILE);
        }
        let mut listing = Self {
            root,
            items: Vec::new(),
            left_out: Vec::new(),
            bytes: 0,
        };
        for entry in walk.build() {
            listing.add(entry.map_err(|error| unreadable(error, folder))?, kind)?;
        }
        if listing.items.is_empty() {
            return Err(PackError::Empty {
                folder: folder.display().to_string(),
            });
        }
        let private = private.lock().unwrap_or_else(PoisonError::into_inner);
        listing.left_out = private.iter().cloned().collect();
        Ok(listing)
    }

    /// How many files and links there are.
    pub(crate) fn files(&self) -> usize {
        self.items
            .iter()
            .filter(|item| !matches!(item.what, What::Folder))
            .count()
    }

    fn add(&mut self, entry: DirEntry, kind: FolderKind) -> Result<(), PackError> {
        let full = entry.path();
        let path = full.strip_prefix(&self.root).unwrap_or(full).to_owned();
        if path.as_os_str().is_empty() {
            return Ok(());
        }
        let shown = path.display().to_string();
        let found = full.symlink_metadata();
        let found = found.map_err(|source| PackError::Read {
            path: shown.clone(),
            source,
        })?;
        let what = if found.is_dir() {
            What::Folder
        } else if found.is_file() {
            rustix::fs::access(full, rustix::fs::Access::READ_OK).map_err(|errno| {
                PackError::Read {
                    path: shown.clone(),
                    source: errno.into(),
                }
            })?;
            What::File { bytes: found.len() }
        } else if found.is_symlink() {
            let target = std::fs::read_link(full);
            let target = target.map_err(|source| PackError::Read {
                path: shown,
                source,
            })?;
            if kind == FolderKind::App {
                self.check_link(&path, &target)?;
            }
            What::Link { target }
        } else if kind == FolderKind::Root && path.starts_with("dev") {
            // The guest's kernel makes its own devices there.
            return Ok(());
        } else {
            return Err(PackError::Special {
                path: shown,
                what: special(found.file_type()),
            });
        };
        if let What::File { bytes } = what {
            self.bytes = self.bytes.saturating_add(bytes);
        }
        let modified = u64::try_from(found.mtime()).unwrap_or(0);
        let mode = mode_of(&found, kind);
        self.items.push(Item {
            path,
            what,
            mode,
            modified,
        });
        self.check_limits()
    }

    fn check_limits(&self) -> Result<(), PackError> {
        let folder = || self.root.display().to_string();
        if self.items.len() as u64 > SOURCE_ENTRIES_MAX {
            return Err(PackError::TooMany {
                folder: folder(),
                limit: SOURCE_ENTRIES_MAX,
            });
        }
        if self.bytes > SOURCE_UNPACKED_BYTES_MAX {
            return Err(PackError::TooLarge {
                folder: folder(),
                limit: SOURCE_UNPACKED_BYTES_MAX,
            });
        }
        Ok(())
    }

    /// A link must lead to a place inside, both as it is spelled and as the file system sees it.
    fn check_link(&self, path: &Path, target: &Path) -> Result<(), PackError> {
        let (shown, to) = (path.display().to_string(), target.display().to_string());
        if target.is_absolute() {
            let inside = target.starts_with(&self.root);
            return Err(match inside {
                true => PackError::LinkAbsolute {
                    path: shown,
                    target: to,
                },
                false => PackError::LinkOut {
                    path: shown,
                    target: to,
                },
            });
        }
        let mut depth = path.components().count() - 1;
        for part in target.components() {
            match part {
                Component::Normal(_) => depth += 1,
                Component::ParentDir if depth == 0 => {
                    return Err(PackError::LinkOut {
                        path: shown,
                        target: to,
                    });
                }
                Component::ParentDir => depth -= 1,
                Component::CurDir | Component::RootDir | Component::Prefix(_) => {}
            }
        }
        match self.root.join(path).canonicalize() {
            Ok(real) if !real.starts_with(&self.root) => Err(PackError::LinkOut {
                path: shown,
                target: to,
            }),
            // A link to nothing inside stays a link to nothing inside.
            Ok(_) | Err(_) => Ok(()),
        }
    }
}

fn unreadable(error: ignore::Error, folder: &Path) -> PackError {
    let mut inner = &error;
    let mut path = None;
    loop {
        match inner {
            ignore::Error::WithPath { path: at, err } => {
                path = Some(at.clone());
                inner = err.as_ref();
            }
            ignore::Error::WithDepth { err, .. } | ignore::Error::WithLineNumber { err, .. } => {
                inner = err.as_ref();
            }
            _ => break,
        }
    }
    let path = path
        .unwrap_or_else(|| folder.to_owned())
        .display()
        .to_string();
    match error.into_io_error() {
        Some(source) => PackError::Read { path, source },
        None => PackError::Walk {
            source: ignore::Error::InvalidDefinition,
        },
    }
}

/// Only what means something in the VM is kept of a mode, so that the same folder is the same
/// upload on every machine.
fn mode_of(found: &Metadata, kind: FolderKind) -> u32 {
    let mode = found.permissions().mode();
    match kind {
        // The sticky bit of /tmp is kept; setuid and setgid are not, as nothing may gain by them.
        FolderKind::Root => mode & 0o1777,
        FolderKind::App if found.is_dir() || mode & 0o111 != 0 => 0o755,
        FolderKind::App => 0o644,
    }
}

fn special(file_type: FileType) -> &'static str {
    if file_type.is_socket() {
        "a socket"
    } else if file_type.is_fifo() {
        "a named pipe"
    } else {
        "a device"
    }
}

/// Names of what is likely private: histories, keys, passwords.
fn is_private(name: &str) -> bool {
    const NAMES: [&str; 9] = [
        ".git",
        ".hg",
        ".svn",
        ".ssh",
        ".aws",
        ".gnupg",
        ".netrc",
        ".pypirc",
        ".git-credentials",
    ];
    const BEGINNINGS: [&str; 5] = [".env", "id_rsa", "id_ed25519", "id_ecdsa", "id_dsa"];
    const ENDS: [&str; 4] = [".pem", ".key", ".p12", ".pfx"];
    let name = name.to_ascii_lowercase();
    NAMES.contains(&name.as_str())
        || BEGINNINGS
            .iter()
            .any(|beginning| name.starts_with(beginning))
        || ENDS.iter().any(|end| name.ends_with(end))
}
