//! The groups in which a tenant's processes run, so that they can be bounded and killed whole.
//!
//! Called by [`crate::init`] (once), [`crate::runner`], [`crate::exec`] and, to freeze them all, by
//! [`crate::agent`].
//!
//! ```text
//!   /sys/fs/cgroup            the agent (the root group has no limits)
//!   └── tenant                memory.max, pids.max, memory.events, cgroup.freeze
//!       ├── app               the app's processes; pids.max
//!       └── exec-N            one exec's processes; pids.max
//! ```
//! The limits sit on `tenant`, so that the agent always has memory and processes to say what
//! happened. They are shares of what the kernel has left at boot: were they more than there is, a
//! greedy app would not meet them but the kernel's own end, which thrashes for minutes before it
//! kills anybody, and nobody could start a process any more, the agent included. With
//! `memory.oom.group` the kernel ends a group as a whole instead of an arbitrary part of it.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use rustix::process::Pid;
use thiserror::Error;

use crate::sys;

/// What the agent and the kernel may take beyond what they hold at boot, at least: file systems'
/// caches, sockets, and what waits for the host.
const RESERVE_BYTES_MIN: u64 = 16 * 1024 * 1024;

/// The share of free memory kept, once that is more.
const RESERVE_DIVISOR: u64 = 16;

/// The most processes and threads of a tenant in one VM.
const PIDS_MAX: u64 = 8192;

/// A tenant whose files hold less than this share of its memory reads its programs again and again
/// when it stalls; one that holds more waits for its data.
const CACHE_DIVISOR: u64 = 8;

/// What a tenant may share out at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stock {
    /// Memory that neither the kernel nor the agent holds.
    pub memory_bytes: u64,
    /// Processes and threads that the kernel has room for, its own included.
    pub threads: u64,
}

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
    Unified {
        /// Whose groups they are.
        tenant: PathBuf,
        /// The most processes of one of them.
        pids_max: u64,
    },
    /// The kernel has no cgroup2 to use: a process group is all there is.
    ProcessGroups,
}

/// The processes of the app or of one exec.
#[derive(Debug, PartialEq, Eq)]
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
    pub fn make(mount: &Path, stock: Stock) -> Result<Self, CgroupError> {
        write(&mount.join("cgroup.subtree_control"), "+memory +pids")?;
        let tenant = mount.join("tenant");
        make(&tenant)?;
        let pids_max = stock.pids_max();
        write(&tenant.join("memory.max"), &stock.memory_max().to_string())?;
        write(&tenant.join("pids.max"), &pids_max.to_string())?;
        write(&tenant.join("cgroup.subtree_control"), "+memory +pids")?;
        Ok(Self::Unified {
            tenant,
            // An app at its limit leaves room for its owner's exec.
            pids_max: three_quarters(pids_max),
        })
    }

    /// Makes a group, or takes the one of that name that is left.
    ///
    /// # Errors
    /// [`CgroupError`] with the file that the kernel refused.
    pub fn group(&self, name: &str) -> Result<Group, CgroupError> {
        let Self::Unified { tenant, pids_max } = self else {
            return Ok(Group::Session(None));
        };
        let path = tenant.join(name);
        make(&path)?;
        write(&path.join("memory.oom.group"), "1")?;
        write(&path.join("pids.max"), &pids_max.to_string())?;
        Ok(Group::Cgroup(path))
    }

    /// Lets nobody of the tenant go on; [`Groups::is_frozen`] tells when they have all stopped.
    ///
    /// # Errors
    /// `Unsupported` without cgroup2, and whatever the kernel answers.
    pub fn freeze(&self) -> io::Result<()> {
        match self {
            Self::Unified { tenant, .. } => fs::write(tenant.join("cgroup.freeze"), "1"),
            Self::ProcessGroups => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    /// Lets everybody go on.
    ///
    /// # Errors
    /// Whatever the kernel answers.
    pub fn unfreeze(&self) -> io::Result<()> {
        match self {
            Self::Unified { tenant, .. } => fs::write(tenant.join("cgroup.freeze"), "0"),
            Self::ProcessGroups => Ok(()),
        }
    }

    /// Whether every process of the tenant stands still.
    ///
    /// # Errors
    /// When the kernel does not tell.
    pub fn is_frozen(&self) -> io::Result<bool> {
        let Self::Unified { tenant, .. } = self else {
            return Ok(false);
        };
        let events = fs::read_to_string(tenant.join("cgroup.events"))?;
        Ok(events.lines().any(|line| line == "frozen 1"))
    }

    /// Where the kernel counts what it killed, as a file that can be polled for `PRI`.
    ///
    /// # Errors
    /// When the kernel does not offer it.
    pub fn memory_events(&self) -> io::Result<Option<File>> {
        match self {
            Self::Unified { tenant, .. } => File::open(tenant.join("memory.events")).map(Some),
            Self::ProcessGroups => Ok(None),
        }
    }

    /// Where the kernel counts the time in which nobody went on for want of memory, as a file that
    /// takes a trigger and can then be polled for `PRI`.
    ///
    /// # Errors
    /// When the kernel does not offer it.
    pub fn memory_pressure(&self) -> io::Result<Option<File>> {
        match self {
            Self::Unified { tenant, .. } => File::options()
                .read(true)
                .write(true)
                .open(tenant.join("memory.pressure"))
                .map(Some),
            Self::ProcessGroups => Ok(None),
        }
    }

    /// Whether next to nothing of the tenant's memory is pages of files, which could be taken back.
    #[must_use]
    pub fn caches_little(&self) -> bool {
        let Self::Unified { tenant, .. } = self else {
            return false;
        };
        let read = |name| fs::read_to_string(tenant.join(name));
        let (Ok(stat), Ok(max)) = (read("memory.stat"), read("memory.max")) else {
            return false;
        };
        let max = max.trim().parse().unwrap_or(u64::MAX);
        cached_bytes(&stat) <= max / CACHE_DIVISOR
    }

    /// The group that holds the most memory.
    #[must_use]
    pub fn largest(&self) -> Option<Group> {
        let Self::Unified { tenant, .. } = self else {
            return None;
        };
        let groups = fs::read_dir(tenant).ok()?;
        let held = groups.flatten().filter_map(|entry| {
            let text = fs::read_to_string(entry.path().join("memory.current")).ok()?;
            Some((text.trim().parse::<u64>().ok()?, entry.path()))
        });
        held.max().map(|(_bytes, path)| Group::Cgroup(path))
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

    /// The kills for want of memory in it so far; none where the kernel does not count them.
    #[must_use]
    pub fn oom_kills(&self) -> u64 {
        match self {
            Self::Cgroup(path) => {
                let events = fs::read_to_string(path.join("memory.events"));
                events.map_or(0, |events| oom_kills(&events))
            }
            Self::Session(_) => 0,
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
    field(events, "oom_kill").unwrap_or(0)
}

/// The bytes that can be taken back, in the text of a `memory.stat` file: a tmpfs counts as files
/// too, but has nowhere else to be.
fn cached_bytes(stat: &str) -> u64 {
    let files = field(stat, "file").unwrap_or(0);
    files.saturating_sub(field(stat, "shmem").unwrap_or(0))
}

/// One number of a flat keyed file (Documentation/admin-guide/cgroup-v2.rst).
fn field(text: &str, name: &str) -> Option<u64> {
    let mut fields = text.lines().filter_map(|line| line.split_once(' '));
    let (_name, value) = fields.find(|(found, _value)| *found == name)?;
    value.trim().parse().ok()
}

impl Stock {
    /// The tenant's memory. A guest too small for the reserve gives half of what it has.
    const fn memory_max(self) -> u64 {
        let free = self.memory_bytes;
        let share = free / RESERVE_DIVISOR;
        let reserve = if share > RESERVE_BYTES_MIN {
            share
        } else {
            RESERVE_BYTES_MIN
        };
        let rest = free.saturating_sub(reserve);
        if rest > free / 2 { rest } else { free / 2 }
    }

    /// The tenant's processes and threads.
    const fn pids_max(self) -> u64 {
        let most = three_quarters(self.threads);
        if most < PIDS_MAX { most } else { PIDS_MAX }
    }
}

const fn three_quarters(number: u64) -> u64 {
    number - number / 4
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
    use super::{PIDS_MAX, Stock, cached_bytes, oom_kills};

    #[test]
    fn kills_are_read_and_group_kills_are_not_mistaken_for_them() {
        let text = "low 0\nhigh 0\nmax 31\noom 2\noom_kill 3\noom_group_kill 1\n";
        assert_eq!(oom_kills(text), 3);
        assert_eq!(oom_kills(""), 0);
        assert_eq!(oom_kills("oom_kill x"), 0);
    }

    #[test]
    fn pages_of_a_tmpfs_are_no_cache() {
        let stat = "anon 1\nfile 9000\nkernel 3\nshmem 8000\nfile_mapped 7\n";
        assert_eq!(cached_bytes(stat), 1000);
        assert_eq!(cached_bytes("file many\nshmem 4\n"), 0);
    }

    const fn memory_max_mib(free_mib: u64) -> u64 {
        let stock = Stock {
            memory_bytes: free_mib << 20,
            threads: 0,
        };
        stock.memory_max() >> 20
    }

    #[test]
    fn the_agent_keeps_a_reserve_and_the_tenant_at_least_half() {
        assert_eq!(memory_max_mib(20), 10);
        assert_eq!(memory_max_mib(66), 50);
        assert_eq!(memory_max_mib(1024), 1024 - 64);
    }

    #[test]
    fn the_kernel_has_room_for_more_processes_than_the_tenant_may_have() {
        let pids_max = |threads| {
            let memory_bytes = 0;
            let stock = Stock {
                memory_bytes,
                threads,
            };
            stock.pids_max()
        };
        assert_eq!(pids_max(1657), 1243);
        assert_eq!(pids_max(1_000_000), PIDS_MAX);
    }
}
