//! What a test tells `node_daemon.rs`, and what that tells back: both in files, since it is killed.
//!
//! Shared by the program and by `tests/qemu/kill_points.rs`. Holds no behaviour.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use spore_wire::node::{StartVm, VmPhase};

/// What a daemon is to do.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Orders {
    pub(crate) room: Room,
    pub(crate) kernel: PathBuf,
    pub(crate) initramfs: PathBuf,
    pub(crate) launcher: PathBuf,
    /// The node's own folder of journals.
    pub(crate) runtime: PathBuf,
    pub(crate) logs: PathBuf,
    /// The file of every image.
    pub(crate) image: PathBuf,
    pub(crate) task: Task,
    /// Where it writes its [`Sighting`].
    pub(crate) sighting: PathBuf,
}

/// The driver's folders and ranges.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Room {
    pub(crate) runtime_dir: PathBuf,
    pub(crate) data_dir: PathBuf,
    pub(crate) cgroup_parent: String,
    pub(crate) uid_first: u32,
    pub(crate) uid_count: u32,
}

/// What happens to the VM under this daemon.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Task {
    /// It is started, and lives until the daemon dies at the point.
    DieAt {
        start: Box<StartVm>,
        /// The effect's name.
        effect: String,
        point: Point,
        end: End,
    },
    /// What an earlier daemon left is adopted, brought to ready and stopped; what it suspended goes
    /// on, made as `like` is.
    GoOn { like: Box<StartVm> },
}

/// On which side of the effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Point {
    Before,
    After,
}

/// How a VM that became ready ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum End {
    /// It is asked to stop.
    Stop,
    /// Its VMM is killed, as a crash would.
    Crash,
    /// A snapshot of it is taken.
    Take,
    /// It is suspended.
    Suspend,
}

/// What a daemon saw of the VM.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Sighting {
    /// Whether it was adopted.
    pub(crate) adopted: bool,
    /// The guest's boot id, once it was known.
    pub(crate) boot_id: Option<String>,
    /// What the app said on its port, once it was ready.
    pub(crate) answer: Option<Answer>,
    /// Snapshots of suspended VMs that it found.
    #[serde(default)]
    pub(crate) suspended: usize,
    /// How it ended, once nothing of it was left.
    pub(crate) ended: Option<VmPhase>,
}

/// What the app says to whoever connects.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Answer {
    /// Made by chance when the process began, and kept in its memory.
    pub(crate) token: String,
    /// Connections so far, counted in its memory.
    pub(crate) count: u64,
    /// Processes of the app so far, counted in a file of the guest.
    pub(crate) starts: u64,
}
