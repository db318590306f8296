//! What a process of ours may use by setrlimit(2): one table, and the one way to set a row of it.
//!
//! Used by [`super::confine`] for helper processes, by `jail.rs` for VMMs, and by the daemon for
//! itself ([`no_core_file`]). What a process and its children use together is the cgroup's to
//! limit. Never raises a limit.

use std::io;

use rustix::io::Errno;
use rustix::process::{
    DumpableBehavior, Resource, Rlimit, getrlimit, set_dumpable_behavior, setrlimit,
};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::egress::blob::CONNECTIONS_MAX;

const MIB: u64 = 1024 * 1024;

/// The limits of one process; `None` is no limit beyond the one that is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessLimits {
    /// Open descriptors.
    pub files: u64,
    /// Threads and processes of its uid, with those of others that have the same.
    pub threads: u64,
    /// The end of what it may write in a file. One that outgrows it ends its writer (SIGXFSZ).
    pub file_bytes: Option<u64>,
    /// Heap and private mappings.
    pub data_bytes: Option<u64>,
    /// Address space.
    pub address_bytes: Option<u64>,
    /// CPU time.
    pub cpu_seconds: Option<u64>,
}

impl ProcessLimits {
    /// The gateway: a visitor's connection takes two descriptors; one thread serves them all, and
    /// another daemon's gateway may have the same uid.
    pub const GATEWAY: Self = Self {
        files: 65_536,
        threads: 16,
        ..Self::LEAST
    };

    /// An egress proxy: two descriptors per connection, and room for the rest. Its log is bounded
    /// by what it writes.
    pub const EGRESS: Self = Self {
        files: CONNECTIONS_MAX as u64 * 2 + 128,
        data_bytes: Some(256 * MIB),
        ..Self::LEAST
    };

    /// The image worker: names of the most entries, a zstd window and blocks fit into its memory;
    /// packing the largest image takes minutes, and a stream that makes it spin ends.
    pub const PACKER: Self = Self {
        files: 16,
        address_bytes: Some(2048 * MIB),
        cpu_seconds: Some(3600),
        ..Self::LEAST
    };

    /// A VMM: a quiet one has about thirty descriptors. Without an end to its files, one that was
    /// taken over could make its scratch disk larger than it was given.
    #[must_use]
    pub const fn vmm(threads: u64, file_bytes: u64) -> Self {
        Self {
            files: 128,
            threads,
            file_bytes: Some(file_bytes),
            ..Self::LEAST
        }
    }

    /// What the others are said to differ from: no thread beside the first, nothing else limited.
    const LEAST: Self = Self {
        files: 16,
        threads: 0,
        file_bytes: None,
        data_bytes: None,
        address_bytes: None,
        cpu_seconds: None,
    };

    /// Limits the calling process for good. What is lower already stays so: raising it may be
    /// refused, and is never needed.
    ///
    /// # Errors
    /// [`LimitError`].
    pub fn set(&self) -> Result<(), LimitError> {
        limit_core()?;
        let rows = [
            (Resource::Memlock, Some(0)),
            (Resource::Msgqueue, Some(0)),
            (Resource::Nofile, Some(self.files)),
            (Resource::Nproc, Some(self.threads)),
            (Resource::Fsize, self.file_bytes),
            (Resource::Data, self.data_bytes),
            (Resource::As, self.address_bytes),
            (Resource::Cpu, self.cpu_seconds),
        ];
        for (resource, most) in rows {
            if let Some(most) = most {
                lower(resource, most)?;
            }
        }
        Ok(())
    }
}

/// 1, not 0: the kernel writes core files under a limit of 0 to a piped `core_pattern`, and refuses
/// to when the limit is 1 (Linux `fs/coredump.c`).
const CORE: Rlimit = Rlimit {
    current: Some(1),
    maximum: Some(1),
};

/// A limit that could not be set.
#[derive(Debug, Error)]
#[error("cannot limit {what}")]
pub struct LimitError {
    /// Which.
    pub what: String,
    /// What the kernel said.
    pub source: io::Error,
}

/// Keeps the calling process's memory out of core files: for whoever holds a key or a secret. A
/// change of uid makes a process dumpable again, so it comes last.
///
/// # Errors
/// [`LimitError`].
pub fn no_core_file() -> Result<(), LimitError> {
    limit_core()?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(|errno| LimitError {
        what: "who may read its memory".to_owned(),
        source: errno.into(),
    })
}

/// Where the limit is 0 for good, 1 is more, which takes a privilege. Without that, not being
/// dumpable is what stops a core file.
fn limit_core() -> Result<(), LimitError> {
    match setrlimit(Resource::Core, CORE) {
        Err(Errno::PERM) => lower(Resource::Core, 1),
        other => other.map_err(|errno| LimitError {
            what: "core files".to_owned(),
            source: errno.into(),
        }),
    }
}

fn lower(resource: Resource, most: u64) -> Result<(), LimitError> {
    let most = getrlimit(resource)
        .maximum
        .map_or(most, |hard| hard.min(most));
    let both = Rlimit {
        current: Some(most),
        maximum: Some(most),
    };
    setrlimit(resource, both).map_err(|errno| LimitError {
        what: format!("{resource:?}"),
        source: errno.into(),
    })
}
