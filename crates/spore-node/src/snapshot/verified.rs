//! Which files were found whole since the host started, so that a fork does not hash them again.
//!
//! Kept in the runtime folder, which is gone with the host. A file is known by inode, size and
//! times and by the index that it was compared with: another file, another proof or a changed file
//! is looked at again. A record that cannot be read or written costs time, nothing else.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use tracing::warn;

use super::hash::Hash;
use crate::clock::Clock;

/// A file that was changed this short a time ago may be changed once more under the same times: the
/// kernel's times of files go on by the tick.
const SETTLED_NS: i128 = 1_000_000_000;

/// What was seen of a file when it was whole.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    modified_ns: i64,
    changed_ns: i64,
    proof: Hash,
}

impl Stamp {
    /// Of `file` as it is before it is compared with the index of this hash.
    pub(super) fn of(file: &File, proof: Hash) -> io::Result<Self> {
        let found = file.metadata()?;
        let time = |seconds: i64, ns: i64| seconds.saturating_mul(1_000_000_000).saturating_add(ns);
        Ok(Self {
            device: found.dev(),
            inode: found.ino(),
            size: found.size(),
            modified_ns: time(found.mtime(), found.mtime_nsec()),
            changed_ns: time(found.ctime(), found.ctime_nsec()),
            proof,
        })
    }
}

/// The files that were found whole, by account, snapshot and name.
#[derive(Debug)]
pub(super) struct Verified {
    path: PathBuf,
    stamps: Mutex<BTreeMap<String, Stamp>>,
}

impl Verified {
    /// What an earlier daemon of this boot left.
    pub(super) fn load(path: PathBuf) -> Self {
        let stamps = fs::read(&path).ok();
        let stamps = stamps.and_then(|bytes| serde_json::from_slice(&bytes).ok());
        Self {
            path,
            stamps: Mutex::new(stamps.unwrap_or_default()),
        }
    }

    /// Whether the file was found whole and is still the same.
    pub(super) fn knows(&self, name: &str, stamp: &Stamp) -> bool {
        let stamps = self.stamps.lock().unwrap_or_else(PoisonError::into_inner);
        stamps.get(name) == Some(stamp)
    }

    /// Remembers a file that was whole after it had this stamp.
    pub(super) fn remember(&self, name: &str, stamp: Stamp, clock: &dyn Clock) {
        let now = i128::try_from(clock.realtime().as_nanos()).unwrap_or(i128::MAX);
        if now - i128::from(stamp.changed_ns) < SETTLED_NS {
            return;
        }
        let mut stamps = self.stamps.lock().unwrap_or_else(PoisonError::into_inner);
        stamps.insert(name.to_owned(), stamp);
        self.write(&stamps);
    }

    /// Forgets all files whose name starts like this.
    pub(super) fn forget(&self, start: &str) {
        let mut stamps = self.stamps.lock().unwrap_or_else(PoisonError::into_inner);
        let before = stamps.len();
        stamps.retain(|name, _stamp| !name.starts_with(start));
        if stamps.len() < before {
            self.write(&stamps);
        }
    }

    fn write(&self, stamps: &BTreeMap<String, Stamp>) {
        let beside = self.path.with_extension("new");
        let written = serde_json::to_vec(stamps)
            .map_err(io::Error::other)
            .and_then(|bytes| fs::write(&beside, bytes))
            .and_then(|()| fs::rename(&beside, &self.path));
        if let Err(error) = written {
            warn!(path = %self.path.display(), %error, "cannot remember which files are whole");
        }
    }
}
