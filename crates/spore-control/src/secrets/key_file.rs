//! The outermost key in a file of 32 bytes, readable by the daemon's user only.
//!
//! Made once, by the first start. When the file is missing and something was already encrypted
//! with it, the start is refused: a new key would make the loss final and silent.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use async_trait::async_trait;
use rustix::fs::{Mode, OFlags};

use super::{KEY_BYTES, Key, KeyProvider, SecretsError, open, seal};
use crate::store::record::account::DATA_KEYS;
use crate::store::{Store, StoreError};

/// A key provider over a file.
pub struct KeyFile {
    name: String,
    key: Key,
}

impl core::fmt::Debug for KeyFile {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "KeyFile({})", self.name)
    }
}

/// Why the key file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeyFileError {
    /// It is gone, and secrets need it.
    #[error(
        "the key file {path} is missing, and the store holds secrets that only it opens: put the \
         file back from your backup; if it is lost for good, docs/runbook/backup.md says what is \
         left to do"
    )]
    Lost {
        /// Where it should be.
        path: String,
    },
    /// Others may read it.
    #[error(
        "the key file {path} has mode {mode:03o}: `chmod 600 {path}`, and set new secrets if \
         others may have read it"
    )]
    Mode {
        /// Which file.
        path: String,
        /// Its permission bits.
        mode: u32,
    },
    /// It belongs to somebody else.
    #[error(
        "the key file {path} belongs to user {owner}, and Spore runs as {us}: `chown {us} {path}`"
    )]
    Owner {
        /// Which file.
        path: String,
        /// Its owner.
        owner: u32,
        /// Our effective user.
        us: u32,
    },
    /// It is not a file of 32 bytes.
    #[error(
        "the key file {path} is not a regular file of {KEY_BYTES} bytes: put it back from \
         your backup"
    )]
    Shape {
        /// Which file.
        path: String,
    },
    /// The file system refused.
    #[error("the key file {path} cannot be {doing}; look at its folder")]
    File {
        /// Which file.
        path: String,
        /// `read` or `made`.
        doing: &'static str,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// The kernel gives no random bytes.
    #[error("the kernel gave no random bytes")]
    Random(#[source] getrandom::Error),
    /// Whether secrets exist is not known.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl KeyFile {
    /// Reads the key, or makes it when there is none and `store` holds nothing that needs it.
    ///
    /// # Errors
    /// When the file is lost, damaged, or open to others.
    pub async fn open_or_make(path: &Path, store: &dyn Store) -> Result<Self, KeyFileError> {
        let in_use = store.count(DATA_KEYS).await? > 0;
        let path = path.to_owned();
        let work = move || Self::open_or_make_here(&path, in_use);
        match tokio::task::spawn_blocking(work).await {
            Ok(result) => result,
            Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
            Err(_cancelled) => Err(StoreError::Stopping.into()),
        }
    }

    fn open_or_make_here(path: &Path, in_use: bool) -> Result<Self, KeyFileError> {
        let shown = path.display().to_string();
        match Self::read(path) {
            Err(KeyFileError::File { source, .. })
                if source.kind() == std::io::ErrorKind::NotFound =>
            {
                if in_use {
                    return Err(KeyFileError::Lost { path: shown });
                }
                make(path)?;
                Self::read(path)
            }
            result => result,
        }
    }

    fn read(path: &Path) -> Result<Self, KeyFileError> {
        let shown = path.display().to_string();
        let failed = |source| KeyFileError::File {
            path: shown.clone(),
            doing: "read",
            source,
        };
        // A link could lead to a file that another user may change.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let fd = rustix::fs::open(path, flags, Mode::empty()).map_err(|e| failed(e.into()))?;
        let mut file = File::from(fd);
        let found = file.metadata().map_err(failed)?;
        if !found.is_file() || found.len() != KEY_BYTES as u64 {
            return Err(KeyFileError::Shape { path: shown });
        }
        let us = rustix::process::geteuid().as_raw();
        if found.uid() != us {
            let owner = found.uid();
            return Err(KeyFileError::Owner {
                path: shown,
                owner,
                us,
            });
        }
        if found.mode() & 0o177 != 0 {
            let mode = found.mode() & 0o777;
            return Err(KeyFileError::Mode { path: shown, mode });
        }
        let mut key = Key::default();
        file.read_exact(&mut *key).map_err(failed)?;
        Ok(Self { name: shown, key })
    }
}

/// Writes a new key beside `path` and links it into place: complete or not at all, and never over
/// a file that is there.
fn make(path: &Path) -> Result<(), KeyFileError> {
    let failed = |source| KeyFileError::File {
        path: path.display().to_string(),
        doing: "made",
        source,
    };
    let mut key = Key::default();
    getrandom::fill(&mut *key).map_err(KeyFileError::Random)?;
    let beside = PathBuf::from(format!("{}.{}.new", path.display(), std::process::id()));
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd =
        rustix::fs::open(&beside, flags, Mode::RUSR | Mode::WUSR).map_err(|e| failed(e.into()))?;
    let mut file = File::from(fd);
    let written = file
        .write_all(&*key)
        .and_then(|()| file.sync_all())
        .and_then(|()| match std::fs::hard_link(&beside, path) {
            // Another start was faster; its key is read then.
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
            result => result,
        });
    std::fs::remove_file(&beside).map_err(failed)?;
    written.map_err(failed)?;
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty());
    let folder = File::open(folder.unwrap_or(Path::new("."))).map_err(failed)?;
    folder.sync_all().map_err(failed)
}

#[async_trait]
impl KeyProvider for KeyFile {
    fn key_name(&self) -> String {
        self.name.clone()
    }

    async fn wrap(&self, context: &[u8], key: &Key) -> Result<Vec<u8>, SecretsError> {
        seal(&self.key, context, &**key)
    }

    async fn unwrap(&self, context: &[u8], wrapped: &[u8]) -> Result<Key, SecretsError> {
        let wrong = || SecretsError::WrongKey {
            account: account_of(context),
            key: self.name.clone(),
        };
        let opened = zeroize::Zeroizing::new(open(&self.key, context, wrapped).ok_or_else(wrong)?);
        let mut key = Key::default();
        if opened.len() != KEY_BYTES {
            return Err(wrong());
        }
        key.copy_from_slice(&opened);
        Ok(key)
    }
}

/// The account is the last part of the context: everything behind the second length.
fn account_of(context: &[u8]) -> String {
    let tail = context.get(8 + 16 + 8..).unwrap_or_default();
    String::from_utf8_lossy(tail).into_owned()
}
