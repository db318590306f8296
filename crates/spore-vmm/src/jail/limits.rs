//! What the processes of the jail may use by setrlimit(2). What all of a VM's use together is its
//! cgroup's to limit. Never raises a limit.

use std::io;

use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// The limits of one process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Limits {
    /// Open descriptors.
    files: u64,
    /// Threads and processes of its uid, which is its own.
    threads: u64,
}

impl Limits {
    /// A zygote: its own few, and those of one request. Its children have its uid until they have
    /// their own.
    pub(super) const ZYGOTE: Self = Self {
        files: 256,
        threads: 256,
    };

    /// A VMM with its sleeper and copies: four processors, the devices, and twice that. Of files
    /// those of a launch, a bell for each queue, and what KVM gives. A file's length is not
    /// limited: memory and disks are as long as they were given.
    pub(super) const VMM: Self = Self {
        files: 256,
        threads: 16,
    };

    /// A sleeper has one descriptor.
    pub(super) const SLEEPER: Self = Self {
        files: 1,
        threads: 16,
    };

    /// Limits the calling process for good.
    pub(super) fn set(self) -> Result<(), LimitError> {
        core()?;
        let rows = [
            (Resource::Memlock, 0),
            (Resource::Msgqueue, 0),
            (Resource::Nofile, self.files),
            (Resource::Nproc, self.threads),
        ];
        for (resource, most) in rows {
            lower(resource, most)?;
        }
        Ok(())
    }
}

/// A limit that could not be set.
#[derive(Debug, thiserror::Error)]
#[error("cannot limit {resource:?}")]
pub struct LimitError {
    /// Which.
    pub resource: Resource,
    /// What the kernel said.
    #[source]
    pub source: io::Error,
}

/// 1, not 0: the kernel writes core files under a limit of 0 to a piped `core_pattern`, and refuses
/// to when it is 1 (Linux `fs/coredump.c`). Where the limit is 0 for good, 1 is more, which takes a
/// privilege; then not being dumpable is what stops one.
fn core() -> Result<(), LimitError> {
    let one = Rlimit {
        current: Some(1),
        maximum: Some(1),
    };
    match setrlimit(Resource::Core, one) {
        Err(Errno::PERM) => lower(Resource::Core, 1),
        set => set.map_err(failed(Resource::Core)),
    }
}

fn lower(resource: Resource, most: u64) -> Result<(), LimitError> {
    let hard = getrlimit(resource).maximum;
    let most = hard.map_or(most, |hard| hard.min(most));
    let both = Rlimit {
        current: Some(most),
        maximum: Some(most),
    };
    setrlimit(resource, both).map_err(failed(resource))
}

fn failed(resource: Resource) -> impl FnOnce(Errno) -> LimitError {
    move |error| LimitError {
        resource,
        source: error.into(),
    }
}
