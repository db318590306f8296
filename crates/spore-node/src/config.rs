//! What a node is started with: composed by the program, read by nobody else.
//!
//! Holds no secrets, and reads no file and no environment itself.

use core::fmt::Debug;
use core::time::Duration;
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use spore_wire::guest::ThawStep;
use spore_wire::id::{ImageId, VmId};

use crate::capacity::CapacityLimits;
use crate::clock::{Chance, Clock, HostClock, KernelChance};
use crate::memory::{HostMemory, ProcMemory};
use crate::snapshot::NoStorePoints;
use crate::snapshots::SnapshotConfig;
use crate::vm::state::VmEffect;

/// What a node is started with.
#[derive(Clone, Debug)]
pub struct Config {
    /// `/run/spore`: gone with the host, as VMs are.
    pub runtime: PathBuf,
    /// `/var/log/spore/apps`: what apps print.
    pub logs: PathBuf,
    /// What the host has to give. Its `overhead_mib` and `proxy_mib` are the driver's.
    pub capacity: CapacityLimits,
    /// VMs that may be on their way from nothing to their agent's first word at once.
    pub boots_max: usize,
    /// How long things may take.
    pub limits: VmLimits,
    /// What a guest's agent is asked to renew. A VM is ended that has not renewed all of
    /// [`ThawStep::ALL`], whatever this says: it is here for the test of that.
    pub thaw_steps: Vec<ThawStep>,
    /// The host's memory as it is.
    pub memory: Arc<dyn HostMemory>,
    /// The wall clock.
    pub clock: Arc<dyn Clock>,
    /// Names what the node makes of itself.
    pub chance: Arc<dyn Chance>,
    /// Told before and after each effect.
    pub kill_points: Arc<dyn KillPoints>,
    /// What VMs may begin from.
    pub snapshots: SnapshotConfig,
    /// Whether starts that may begin from a template do, and templates are built for them.
    pub templates: bool,
}

impl Config {
    /// The defaults, for these folders and this much memory.
    #[must_use]
    pub fn new(runtime: PathBuf, logs: PathBuf, snapshots: PathBuf, memory_mib: u64) -> Self {
        Self {
            runtime,
            logs,
            capacity: CapacityLimits {
                memory_mib,
                memory_reserve_mib: (memory_mib / 8).clamp(256, 4096),
                overhead_mib: 0,
                proxy_mib: 0,
                cpus: 256,
                vms: 512,
            },
            boots_max: 4,
            limits: VmLimits::default(),
            thaw_steps: ThawStep::ALL.to_vec(),
            memory: Arc::new(ProcMemory),
            clock: Arc::new(HostClock),
            chance: Arc::new(KernelChance),
            kill_points: Arc::new(NoKillPoints),
            snapshots: SnapshotConfig {
                folder: snapshots,
                memory_mib: (memory_mib / 4).min(2048),
                quota_bytes: 32 << 30,
                points: Arc::new(NoStorePoints),
            },
            templates: true,
        }
    }
}

/// How long the steps of a VM may take. A guest is a stranger: every wait for it ends.
#[derive(Clone, Copy, Debug)]
pub struct VmLimits {
    /// Namespace, cgroup and disks.
    pub prepare: Duration,
    /// From the VMM's start to its control socket; a fork's memory may take longer.
    pub boot: Duration,
    /// From then to the agent's first word.
    pub agent: Duration,
    /// The same of a fork, whose kernel and agent are up already.
    pub agent_of_fork: Duration,
    /// Until the processes of a fork that asked to hear of it have said that they know: all of them
    /// together, since a tenant must not hold its own VM up for longer.
    pub hooks: Duration,
    /// Until a tenant's processes stand still.
    pub freeze: Duration,
    /// From a paused guest to what makes it what it is, beyond copying all of it.
    pub capture: Duration,
    /// One answer of the agent that takes no work.
    pub answer: Duration,
    /// Added to what an app may take to be ready, before the guest's silence counts as a no.
    pub ready_slack: Duration,
    /// Added to an app's grace before a guest that does not power off is killed.
    pub shutdown_slack: Duration,
    /// How long a re-adopted VM waits for its secrets to be told again before its app starts.
    pub secrets: Duration,
    /// Sessions with the agent that may fail in a row before its VM counts as dead.
    pub agent_failures_max: u32,
    /// Ends of a ready app in a row before its VM is given up.
    pub app_failures_max: u32,
    /// The same before it was ever ready.
    pub app_start_failures_max: u32,
}

impl VmLimits {
    /// The limits of a host where a guest may take so long to boot: whatever else waits for a guest
    /// may take as many times longer. Never shorter than what is right elsewhere.
    #[must_use]
    pub fn of_boot(agent: Duration) -> Self {
        let default = Self::default();
        let times = (agent.as_secs_f64() / default.agent.as_secs_f64()).max(1.0);
        Self {
            boot: default.boot.mul_f64(times),
            agent,
            agent_of_fork: default.agent_of_fork.mul_f64(times),
            hooks: default.hooks.mul_f64(times),
            freeze: default.freeze.mul_f64(times),
            capture: default.capture.mul_f64(times),
            answer: default.answer.mul_f64(times),
            ..default
        }
    }
}

impl Default for VmLimits {
    fn default() -> Self {
        Self {
            prepare: Duration::from_secs(60),
            boot: Duration::from_secs(60),
            agent: Duration::from_secs(90),
            agent_of_fork: Duration::from_secs(30),
            hooks: Duration::from_secs(5),
            freeze: Duration::from_secs(10),
            capture: Duration::from_secs(60),
            answer: Duration::from_secs(20),
            ready_slack: Duration::from_secs(5),
            shutdown_slack: Duration::from_secs(10),
            secrets: Duration::from_secs(60),
            agent_failures_max: 5,
            app_failures_max: 5,
            app_start_failures_max: 3,
        }
    }
}

/// Where the files of images are; the image store answers.
pub trait Images: Debug + Send + Sync + 'static {
    /// The file of an image, or `None` when the node does not have it.
    fn path(&self, id: &ImageId) -> Option<PathBuf>;
}

/// Before or after an effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KillPoint {
    /// Nothing of it was done yet.
    Before,
    /// All of it was done, and nothing that follows from it.
    After,
}

/// Told at every instant between two effects, so that a test can end the daemon there.
#[async_trait]
pub trait KillPoints: Debug + Send + Sync + 'static {
    /// The actor of `vm` stands at this point; it goes on when the future is done.
    async fn reached(&self, vm: VmId, effect: VmEffect, point: KillPoint);
}

/// Lets every effect happen.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoKillPoints;

#[async_trait]
impl KillPoints for NoKillPoints {
    async fn reached(&self, _vm: VmId, _effect: VmEffect, _point: KillPoint) {}
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::VmLimits;

    #[test]
    fn on_a_slow_host_every_wait_for_a_guest_grows_and_none_ever_shrinks() {
        let (usual, slow) = (
            VmLimits::default(),
            VmLimits::of_boot(VmLimits::default().agent * 4),
        );
        assert_eq!(slow.agent, usual.agent * 4);
        assert_eq!(slow.agent_of_fork, usual.agent_of_fork * 4);
        assert_eq!(slow.answer, usual.answer * 4);
        assert_eq!(slow.secrets, usual.secrets, "control is no guest");
        let fast = VmLimits::of_boot(Duration::from_secs(10));
        assert_eq!(fast.agent, Duration::from_secs(10));
        assert_eq!(fast.freeze, usual.freeze);
    }
}
