//! The groups in which a tenant's processes run, so that they can be bounded and killed whole.
//!
//! Called by [`crate::init`] (once), [`crate::runner`] and [`crate::exec`].
//!
//! ```text
//!   /sys/fs/cgroup            the agent (the root group has no limits)
//!   └── tenant                memory.max, pids.max, memory.events
//!       ├── app               the app's processes
//!       └── exec-N            one exec's processes
//! ```
//! The limit sits on `tenant`, so that the agent always has memory to say what happened. With
//! `memory.oom.group` the kernel ends a group as a whole instead of an arbitrary part of it.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use rustix::process::Pid;
use thiserror::Error;

use crate::sys;

/// What the agent and the kernel keep for themselves, at least.
const RESERVE_BYTES_MIN: u64 = 20 * 1024 * 1024;

/// The share of memory kept, once that is more.
const RESERVE_DIVISOR: u64 = 16;

/// The most processes and threads of a tenant in one VM.
const PIDS_MAX: u64 = 8192;

/// Why the groups could not be made.
#[derive(Debug, Error)]
#[error("cannot write `{value}` to {path}")]
pub struct CgroupError {
    path: PathBuf,
    value: String,
    #[source]
    source: io::Error,
}

/// Where groups are made.
#[derive(Clone, Debug)]
pub enum Groups {
    /// Under this folder of a cgroup2 file system.
    Unified(PathBuf),
    /// The kernel has no cgroup2 to use: a process group is all there is.
    ProcessGroups,
}

/// The processes of the app or of one exec.
#[derive(Debug)]
pub enum Group {
    /// A cgroup of their own.
    Cgroup(PathBuf),
    /// The process group of their first process.
    Session(Option<Pid>),
}

impl Groups {
    /// Makes the tenant's group in the cgroup2 file system at `mount`.
    ///
    /// # Errors
    /// [`CgroupError`] with the file that the kernel refused.
    pub fn make(mount: &Path, memory_total_bytes: u64) -> Result<Self, CgroupError> {
        write(&mount.join("cgroup.subtree_control"), "+memory +pids")?;
        let tenant = mount.join("tenant");
        make(&tenant)?;
        let max = memory_total_bytes.saturating_sub(reserve_bytes(memory_total_bytes));
        write(&tenant.join("memory.max"), &max.to_string())?;
        write(&tenant.join("pids.max"), &PIDS_MAX.to_string())?;
        write(&tenant.join("cgroup.subtree_control"), "+memory +pids")?;
        Ok(Self::Unified(tenant))
    }

    /// Makes a group, or takes the one of that name that is left.
    ///
    /// # Errors
    /// [`CgroupError`] with the file that the kernel refused.
    pub fn group(&self, name: &str) -> Result<Group, CgroupError> {
        let Self::Unified(tenant) = self else {
            return Ok(Group::Session(None));
        };
        let path = tenant.join(name);
        make(&path)?;
        write(&path.join("memory.oom.group"), "1")?;
        Ok(Group::Cgroup(path))
    }

    /// Where the kernel counts what it killed, as a file that can be polled for `PRI`.
    ///
    /// # Errors
    /// When the kernel does not offer it.
    pub fn memory_events(&self) -> io::Result<Option<File>> {
        match self {
            Self::Unified(tenant) => File::open(tenant.join("memory.events")).map(Some),
            Self::ProcessGroups => Ok(None),
        }
    }
}

impl Group {
    /// The file to which a process writes `0` to join, if there is one.
    #[must_use]
    pub fn procs(&self) -> Option<PathBuf> {
        match self {
            Self::Cgroup(path) => Some(path.join("cgroup.procs")),
            Self::Session(_) => None,
        }
    }

    /// Notes the first process.
    pub fn started(&mut self, first: Pid) {
        if let Self::Session(leader) = self {
            *leader = Some(first);
        }
    }

    /// Kills every process of it. A group that is gone is no failure.
    ///
    /// # Errors
    /// Whatever else the kernel answers.
    pub fn kill(&self) -> io::Result<()> {
        match self {
            Self::Cgroup(path) => match fs::write(path.join("cgroup.kill"), "1") {
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
                result => result,
            },
            Self::Session(None) => Ok(()),
            Self::Session(Some(leader)) => match sys::signal_group(*leader, libc::SIGKILL) {
                Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
                result => result,
            },
        }
    }

    /// Whether no process is left in it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        match self {
            Self::Cgroup(path) => match fs::read_to_string(path.join("cgroup.events")) {
                Ok(text) => text.lines().any(|line| line == "populated 0"),
                Err(_) => true,
            },
            Self::Session(None) => true,
            Self::Session(Some(leader)) => sys::signal_group(*leader, 0).is_err(),
        }
    }

    /// Takes the group away. False while a process is left in it.
    #[must_use]
    pub fn remove(&self) -> bool {
        match self {
            Self::Cgroup(path) => match fs::remove_dir(path) {
                Ok(()) => true,
                Err(error) => error.kind() == io::ErrorKind::NotFound,
            },
            Self::Session(_) => true,
        }
    }
}

/// The kills for want of memory in the text of a `memory.events` file.
#[must_use]
pub fn oom_kills(events: &str) -> u64 {
    events
        .lines()
        .find_map(|line| line.strip_prefix("oom_kill "))
        .and_then(|count| count.trim().parse().ok())
        .unwrap_or(0)
}

fn reserve_bytes(total: u64) -> u64 {
    (total / RESERVE_DIVISOR).max(RESERVE_BYTES_MIN)
}

fn make(path: &Path) -> Result<(), CgroupError> {
    match fs::create_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(CgroupError {
            path: path.to_owned(),
            value: "mkdir".to_owned(),
            source: error,
        }),
        _ => Ok(()),
    }
}

fn write(path: &Path, value: &str) -> Result<(), CgroupError> {
    fs::write(path, value).map_err(|source| CgroupError {
        path: path.to_owned(),
        value: value.to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::{oom_kills, reserve_bytes};

    #[test]
    fn kills_are_read_and_group_kills_are_not_mistaken_for_them() {
        let text = "low 0\nhigh 0\nmax 31\noom 2\noom_kill 3\noom_group_kill 1\n";
        assert_eq!(oom_kills(text), 3);
        assert_eq!(oom_kills(""), 0);
        assert_eq!(oom_kills("oom_kill x"), 0);
    }

    #[test]
    fn a_small_guest_keeps_at_least_what_the_agent_needs() {
        assert_eq!(reserve_bytes(100 << 20), 20 << 20);
        assert_eq!(reserve_bytes(1 << 30), 64 << 20);
    }
}
