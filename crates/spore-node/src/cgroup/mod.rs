//! The cgroup of a VM: what it may use at most, and the list of what to kill.
//!
//! Used by `hypervisor/room.rs` and the drivers. Works on cgroup v2 and on hosts where memory, cpu
//! and pids are v1 hierarchies of their own (also with a v2 tree beside them, which then serves
//! to kill). Own code, since all it takes is a dozen small files whose names
//! and order matter. Never moves a process that runs: a launcher enters by itself before it starts
//! anything, an egress proxy is put there before it has read anything.
//!
//! ```text
//!   v2      /sys/fs/cgroup/PARENT/VMID
//!   v1      /sys/fs/cgroup/memory/PARENT/VMID, …/cpu/PARENT/VMID, …/pids/PARENT/VMID
//! ```

mod memory;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::OwnedFd;
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, pidfd_open, pidfd_send_signal, waitid,
};

pub use self::memory::LentMemory;
use crate::hypervisor::VmStats;

/// The period of the cpu limit, the kernel's own default.
const CPU_PERIOD_US: u64 = 100_000;

/// How long a cgroup that is still populated is killed again before it is called stuck: on a busy
/// host what was killed waits for its turn to die, like all others.
const KILL_LIMIT: Duration = Duration::from_secs(30);

/// When a populated cgroup is looked at again, at first and later.
const KILL_STEPS: [Duration; 2] = [Duration::from_millis(2), Duration::from_millis(50)];

/// How long one round waits for a killed process.
const KILL_WAIT: Duration = Duration::from_millis(50);

/// The caps of one VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Guest memory and the VMM's own; there is no swap beside it.
    pub memory_bytes: u64,
    /// Whole cpus' worth of time.
    pub cpus: u8,
    /// Processes and threads.
    pub pids: u32,
}

/// The cgroups of all VMs of this daemon.
#[derive(Clone, Debug)]
pub struct Cgroups {
    hierarchies: Vec<Hierarchy>,
    parent: String,
}

/// One mounted tree that VMs are placed in.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Hierarchy {
    root: PathBuf,
    /// The controllers that it limits with, of the three that matter.
    controllers: Vec<Controller>,
    version: Version,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    One,
    Two,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Controller {
    Memory,
    Cpu,
    /// Counts cpu time on v1; part of `Cpu` on v2.
    CpuAccounting,
    Pids,
}

impl Controller {
    const REQUIRED: [Self; 3] = [Self::Memory, Self::Cpu, Self::Pids];

    fn from_name(name: &str) -> Option<Self> {
        match name {
            "memory" => Some(Self::Memory),
            "cpu" => Some(Self::Cpu),
            "cpuacct" => Some(Self::CpuAccounting),
            "pids" => Some(Self::Pids),
            _ => None,
        }
    }

    const fn name(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Cpu => "cpu",
            Self::CpuAccounting => "cpuacct",
            Self::Pids => "pids",
        }
    }
}

/// Why cgroups cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CgroupError {
    /// A controller is mounted nowhere.
    #[error(
        "the cgroup controller `{0}` is not available: mount cgroup2 at /sys/fs/cgroup, and \
         enable it on the kernel's command line if it is disabled there"
    )]
    Missing(&'static str),
    /// A file of the cgroup tree said no.
    #[error("cannot set up the cgroup {path}")]
    File {
        /// Which.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

impl Cgroups {
    /// Finds the host's layout and makes the parent of all VMs, `parent` under each root.
    ///
    /// # Errors
    /// [`CgroupError`].
    pub fn open(parent: &str) -> Result<Self, CgroupError> {
        let mounts = PathBuf::from("/proc/self/mountinfo");
        let text = fs::read_to_string(&mounts).map_err(|source| CgroupError::File {
            path: mounts,
            source,
        })?;
        let controllers = |root: &Path| fs::read_to_string(root.join("cgroup.controllers"));
        let hierarchies = detect(&text, |root| controllers(root).unwrap_or_default())?;
        let this = Self {
            hierarchies,
            parent: parent.to_owned(),
        };
        for hierarchy in &this.hierarchies {
            this.make_parent(hierarchy)?;
        }
        Ok(this)
    }

    fn make_parent(&self, hierarchy: &Hierarchy) -> Result<(), CgroupError> {
        let path = hierarchy.root.join(&self.parent);
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| CgroupError::File { path, source }
        };
        fs::create_dir_all(&path).map_err(failed(&path))?;
        if hierarchy.version == Version::Two && !hierarchy.controllers.is_empty() {
            let names: Vec<String> = hierarchy
                .controllers
                .iter()
                .map(|one| format!("+{}", one.name()))
                .collect();
            let levels: Vec<&Path> = path
                .ancestors()
                .take_while(|level| level.starts_with(&hierarchy.root))
                .collect();
            for level in levels.iter().rev() {
                let control = level.join("cgroup.subtree_control");
                fs::write(&control, names.join(" ")).map_err(failed(&control))?;
            }
        }
        Ok(())
    }

    /// Where the cgroup `name` lies in each tree.
    fn folders(&self, name: &str) -> impl Iterator<Item = (&Hierarchy, PathBuf)> {
        self.hierarchies
            .iter()
            .map(move |one| (one, one.root.join(&self.parent).join(name)))
    }

    fn folder_of(&self, controller: Controller, name: &str) -> Option<(Version, PathBuf)> {
        self.folders(name)
            .find(|(hierarchy, _)| hierarchy.controllers.contains(&controller))
            .map(|(hierarchy, path)| (hierarchy.version, path))
    }

    /// Makes the cgroup `name` with its limits; nothing is in it yet.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn create(&self, name: &str, limits: &Limits) -> io::Result<()> {
        for (hierarchy, path) in self.folders(name) {
            match fs::create_dir(&path) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
                _ => {}
            }
            for controller in &hierarchy.controllers {
                write_limits(&path, *controller, hierarchy.version, limits)?;
            }
        }
        Ok(())
    }

    /// The files that a process writes `0` to in order to be in the cgroup `name`.
    #[must_use]
    pub fn entrances(&self, name: &str) -> Vec<PathBuf> {
        self.folders(name)
            .map(|(_, path)| path.join("cgroup.procs"))
            .collect()
    }

    /// The cgroup's name as `/proc/PID/cgroup` shows it.
    #[must_use]
    pub fn shown(&self, name: &str) -> String {
        format!("/{}/{name}", self.parent)
    }

    /// Whether a process with this `/proc/PID/cgroup` is in the cgroup `name`, in every tree.
    #[must_use]
    pub fn holds(&self, name: &str, proc_cgroup: &str) -> bool {
        let shown = self.shown(name);
        let placed = proc_cgroup
            .lines()
            .filter(|line| line.splitn(3, ':').nth(2) == Some(shown.as_str()))
            .count();
        placed >= self.hierarchies.len()
    }

    /// The names of all VMs' cgroups.
    ///
    /// # Errors
    /// When a tree cannot be read.
    pub fn list(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for (_, parent) in self.folders("") {
            for entry in fs::read_dir(parent)? {
                let entry = entry?;
                if entry.file_type()?.is_dir() {
                    names.push(entry.file_name().to_string_lossy().into_owned());
                }
            }
        }
        names.sort();
        names.dedup();
        Ok(names)
    }

    /// Kills everything in the cgroup `name` and removes it; nothing to do if it is gone. Blocks.
    ///
    /// # Errors
    /// What the kernel says, `EBUSY` when a process does not die in half a minute or a little more.
    pub fn remove(&self, name: &str) -> io::Result<()> {
        let mut waited = Duration::ZERO;
        let [mut pace, slowest] = KILL_STEPS;
        loop {
            self.kill_once(name)?;
            let mut busy = None;
            for (_, path) in self.folders(name) {
                match fs::remove_dir(&path) {
                    Ok(()) => {}
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                    // A process that is being killed, or a launcher that enters just now.
                    Err(error) if error.kind() == io::ErrorKind::ResourceBusy => busy = Some(error),
                    Err(error) => return Err(error),
                }
            }
            match busy {
                None => return Ok(()),
                Some(error) if waited >= KILL_LIMIT => return Err(error),
                Some(_populated) => {}
            }
            std::thread::sleep(pace);
            waited += pace;
            pace = slowest.min(pace * 2);
        }
    }

    /// Kills what is in the cgroup `name` now. Whoever started it waits for it, and removes the
    /// cgroup.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn kill(&self, name: &str) -> io::Result<()> {
        self.signal(name).map(drop)
    }

    /// Kills what is in the cgroup now, waits a moment for it to be gone and reaps it where it is
    /// a child of this process.
    fn kill_once(&self, name: &str) -> io::Result<()> {
        for (_pid, pidfd) in &self.signal(name)? {
            await_end(pidfd)?;
        }
        Ok(())
    }

    /// Kills what is in the cgroup now; answers what that was.
    fn signal(&self, name: &str) -> io::Result<Vec<(Pid, OwnedFd)>> {
        let killed = self.members(name)?;
        for (_pid, pidfd) in &killed {
            kill_process(pidfd)?;
        }
        for (_, path) in self.folders(name) {
            // Atomic where the kernel has it; above all for what was forked meanwhile.
            match fs::write(path.join("cgroup.kill"), "1") {
                Err(error)
                    if error.kind() != io::ErrorKind::NotFound
                        && error.kind() != io::ErrorKind::PermissionDenied =>
                {
                    return Err(error);
                }
                _ => {}
            }
        }
        Ok(killed)
    }

    /// Every process in the cgroup `name`, in whichever tree it is there.
    ///
    /// # Errors
    /// When a tree cannot be read.
    pub fn members(&self, name: &str) -> io::Result<Vec<(Pid, OwnedFd)>> {
        let mut members: Vec<(Pid, OwnedFd)> = Vec::new();
        let shown = self.shown(name);
        for (_, path) in self.folders(name) {
            let pids = read_if_there(&path.join("cgroup.procs"))?.unwrap_or_default();
            let pids = pids
                .lines()
                .filter_map(|line| line.parse().ok().and_then(Pid::from_raw));
            for pid in pids {
                if members.iter().any(|(known, _)| *known == pid) {
                    continue;
                }
                let Ok(pidfd) = pidfd_open(pid, PidfdFlags::empty()) else {
                    continue;
                };
                // The pid may have been given to another process before it was opened.
                let there = fs::read_to_string(format!("/proc/{}/cgroup", pid.as_raw_nonzero()));
                if there.is_ok_and(|text| text.lines().any(|line| line.ends_with(&shown))) {
                    members.push((pid, pidfd));
                }
            }
        }
        Ok(members)
    }

    /// What the cgroup `name` uses.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn stats(&self, name: &str) -> io::Result<VmStats> {
        let mut stats = VmStats::default();
        if let Some((version, path)) = self.folder_of(Controller::Memory, name) {
            let file = match version {
                Version::One => "memory.usage_in_bytes",
                Version::Two => "memory.current",
            };
            stats.memory_bytes = number(&path.join(file))?;
        }
        if let Some((_, path)) = self.folder_of(Controller::Pids, name) {
            stats.pids = number(&path.join("pids.current"))?;
        }
        if let Some((Version::One, path)) = self.folder_of(Controller::CpuAccounting, name) {
            stats.cpu_us = number(&path.join("cpuacct.usage"))? / 1000;
        } else if let Some((Version::Two, path)) = self.folder_of(Controller::Cpu, name) {
            let text = fs::read_to_string(path.join("cpu.stat"))?;
            stats.cpu_us = keyed(&text, "usage_usec").unwrap_or(0);
        }
        Ok(stats)
    }

    /// Whether the kernel killed a process of the cgroup `name` for want of memory.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn was_out_of_memory(&self, name: &str) -> io::Result<bool> {
        let Some((version, path)) = self.folder_of(Controller::Memory, name) else {
            return Ok(false);
        };
        let file = match version {
            Version::One => "memory.oom_control",
            Version::Two => "memory.events",
        };
        let text = fs::read_to_string(path.join(file))?;
        Ok(keyed(&text, "oom_kill").unwrap_or(0) > 0)
    }

    /// Removes the parent, once no VM is left: for `clean-host` and tests.
    ///
    /// # Errors
    /// When a VM is left.
    pub fn remove_parent(&self) -> io::Result<()> {
        for hierarchy in &self.hierarchies {
            let path = hierarchy.root.join(&self.parent);
            match fs::remove_dir(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }
}

/// Kills a process, which may have ended by itself.
pub(crate) fn kill_process(pidfd: &OwnedFd) -> io::Result<()> {
    match pidfd_send_signal(pidfd, Signal::KILL) {
        Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Waits a moment for a killed process, then reaps it if it ended and is ours.
fn await_end(pidfd: &OwnedFd) -> io::Result<()> {
    let mut waited = [PollFd::new(pidfd, PollFlags::IN)];
    let wait = Timespec {
        tv_sec: 0,
        tv_nsec: i64::from(KILL_WAIT.subsec_nanos()),
    };
    match poll(&mut waited, Some(&wait)) {
        Ok(_) | Err(rustix::io::Errno::INTR) => {}
        Err(error) => return Err(error.into()),
    }
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
    match waitid(WaitId::PidFd(rustix::fd::AsFd::as_fd(pidfd)), options) {
        Ok(_) | Err(rustix::io::Errno::CHILD) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn write_limits(
    path: &Path,
    controller: Controller,
    version: Version,
    limits: &Limits,
) -> io::Result<()> {
    let memory = limits.memory_bytes.to_string();
    let cpu_us = u64::from(limits.cpus) * CPU_PERIOD_US;
    match (controller, version) {
        (Controller::Memory, Version::One) => {
            // The limit with swap must not be below the one without at any moment.
            fs::write(path.join("memory.limit_in_bytes"), &memory)?;
            write_if_there(&path.join("memory.memsw.limit_in_bytes"), &memory)?;
            write_if_there(&path.join("memory.swappiness"), "0")
        }
        (Controller::Memory, Version::Two) => {
            fs::write(path.join("memory.max"), &memory)?;
            write_if_there(&path.join("memory.swap.max"), "0")?;
            write_if_there(&path.join("memory.oom.group"), "1")
        }
        (Controller::Cpu, Version::One) => {
            fs::write(path.join("cpu.cfs_period_us"), CPU_PERIOD_US.to_string())?;
            fs::write(path.join("cpu.cfs_quota_us"), cpu_us.to_string())
        }
        (Controller::Cpu, Version::Two) => {
            fs::write(path.join("cpu.max"), format!("{cpu_us} {CPU_PERIOD_US}"))
        }
        (Controller::Pids, _) => fs::write(path.join("pids.max"), limits.pids.to_string()),
        (Controller::CpuAccounting, _) => Ok(()),
    }
}

/// Files of swap are missing on a kernel that accounts none, which then has none to limit.
fn write_if_there(path: &Path, value: &str) -> io::Result<()> {
    if path.exists() {
        fs::write(path, value)
    } else {
        Ok(())
    }
}

fn read_if_there(path: &Path) -> io::Result<Option<String>> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        // ENODEV: the cgroup was removed while the file was open.
        Err(error)
            if error.kind() == io::ErrorKind::NotFound
                || error.raw_os_error() == Some(rustix::io::Errno::NODEV.raw_os_error()) =>
        {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

fn number(path: &Path) -> io::Result<u64> {
    fs::read_to_string(path)?
        .trim()
        .parse()
        .map_err(io::Error::other)
}

/// The number behind `key` in a file of lines `key number`.
fn keyed(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| {
        line.strip_prefix(key)?
            .strip_prefix(' ')?
            .trim()
            .parse()
            .ok()
    })
}

/// The trees that the three controllers are in, from `/proc/self/mountinfo` (proc(5)).
fn detect(
    mountinfo: &str,
    controllers_of: impl Fn(&Path) -> String,
) -> Result<Vec<Hierarchy>, CgroupError> {
    let mut found: Vec<Hierarchy> = Vec::new();
    let mut unified: Option<Hierarchy> = None;
    for line in mountinfo.lines() {
        let Some((root, kind, options)) = mount(line) else {
            continue;
        };
        let named = |names: &str, separator: fn(char) -> bool| -> Vec<Controller> {
            names
                .split(separator)
                .filter_map(Controller::from_name)
                .collect()
        };
        if kind == "cgroup2" && unified.is_none() {
            let controllers = named(&controllers_of(&root), char::is_whitespace);
            unified = Some(Hierarchy {
                root,
                controllers,
                version: Version::Two,
            });
        } else if kind == "cgroup" {
            let controllers = named(options, |separator| separator == ',');
            let known = found.iter().any(|one| one.controllers == controllers);
            if !controllers.is_empty() && !known {
                found.push(Hierarchy {
                    root,
                    controllers,
                    version: Version::One,
                });
            }
        }
    }
    found.extend(unified);
    for needed in Controller::REQUIRED {
        if !found
            .iter()
            .any(|hierarchy| hierarchy.controllers.contains(&needed))
        {
            return Err(CgroupError::Missing(needed.name()));
        }
    }
    Ok(found)
}

/// Mount point, file system and its options of one line of mountinfo.
fn mount(line: &str) -> Option<(PathBuf, &str, &str)> {
    let (before, after) = line.split_once(" - ")?;
    let point = before.split(' ').nth(4)?;
    let mut after = after.split(' ');
    let kind = after.next()?;
    let options = after.nth(1)?;
    Some((PathBuf::from(point.replace("\\040", " ")), kind, options))
}

#[cfg(test)]
mod tests;
