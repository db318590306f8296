//! The processes of one piece of image work: a cgroup of their own, and the way to end them all.
//!
//! Made by [`super::workshop`] and by the build task; `packer.rs` and `debian.rs` put what they
//! start into it. Blocking. Never decides how long work may take.
//!
//! A job's cgroup lies among those of VMs. Its name is no VM's, so what a killed daemon left in one
//! is ended by the next start, with everything else that is nobody's (`hypervisor/room.rs`).

use std::io;
use std::process::Child;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use rustix::process::Pid;
use thiserror::Error;

use crate::cgroup::{Cgroups, Limits};

const MIB: u64 = 1024 * 1024;

/// What packing one upload may use. Its spool and image are written through the page cache, which
/// the kernel takes back.
pub const UPLOAD_LIMITS: Limits = Limits {
    memory_bytes: 1024 * MIB,
    cpus: 1,
    pids: 8,
};

/// What building an image from packages may use: apt, dpkg and maintainer scripts, and the worker
/// that packs what they made.
pub const BUILD_LIMITS: Limits = Limits {
    memory_bytes: 2048 * MIB,
    cpus: 2,
    pids: 512,
};

/// Image work is killed for want of memory before VMs, which a visitor waits for.
const OOM_SCORE: &str = "800";

/// Work under way. Dropped, nothing of it runs any more and its cgroup is gone.
#[derive(Debug)]
pub struct Job {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    cgroups: Cgroups,
    name: String,
    ended: OnceLock<Ended>,
}

/// Why work was ended from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum Ended {
    /// It took too long.
    #[error("it took longer than {0} s and was ended: make it smaller, or try again later")]
    Timeout(u64),
    /// Nobody waits for it any more.
    #[error("it was cancelled")]
    Cancelled,
}

/// Ends a job from another thread.
#[derive(Clone, Debug)]
pub struct Ender {
    shared: Arc<Shared>,
}

impl Job {
    /// Makes the cgroup of a new job.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn begin(cgroups: &Cgroups, limits: &Limits) -> io::Result<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let shared = Arc::new(Shared {
            cgroups: cgroups.clone(),
            name: format!("image-{}", NEXT.fetch_add(1, Ordering::Relaxed)),
            ended: OnceLock::new(),
        });
        let job = Self { shared };
        job.shared.cgroups.create(&job.shared.name, limits)?;
        Ok(job)
    }

    /// Puts a process into the job. It must wait to be told before it starts others, or those
    /// escape.
    ///
    /// # Errors
    /// What the kernel says; [`io::ErrorKind::Interrupted`] when the job was ended before.
    pub fn place(&self, child: &Child) -> io::Result<()> {
        let pid = Pid::from_child(child).as_raw_nonzero().to_string();
        for entrance in self.shared.cgroups.entrances(&self.shared.name) {
            std::fs::write(entrance, &pid)?;
        }
        std::fs::write(format!("/proc/{pid}/oom_score_adj"), OOM_SCORE)?;
        // Whoever ends the job says so first and kills then: one of the two sees the other.
        match self.ended() {
            None => Ok(()),
            Some(_) => Err(io::ErrorKind::Interrupted.into()),
        }
    }

    /// Whether somebody ended it.
    #[must_use]
    pub fn ended(&self) -> Option<Ended> {
        self.shared.ended.get().copied()
    }

    /// Whether one of its processes was killed for want of memory.
    #[must_use]
    pub fn was_out_of_memory(&self) -> bool {
        let told = self.shared.cgroups.was_out_of_memory(&self.shared.name);
        told.unwrap_or(false)
    }

    /// For another thread.
    #[must_use]
    pub fn ender(&self) -> Ender {
        Ender {
            shared: Arc::clone(&self.shared),
        }
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        if let Err(error) = self.shared.cgroups.remove(&self.shared.name) {
            // The next start finds it.
            tracing::warn!(job = self.shared.name, %error, "image work does not end");
        }
    }
}

impl Ender {
    /// Kills the job's processes; the thread that works on it comes back with the reason. Only the
    /// first reason counts.
    pub fn end(&self, why: Ended) {
        if self.shared.ended.set(why).is_err() {
            return;
        }
        if let Err(error) = self.shared.cgroups.kill(&self.shared.name) {
            tracing::warn!(job = self.shared.name, %error, "image work cannot be ended");
        }
    }
}
