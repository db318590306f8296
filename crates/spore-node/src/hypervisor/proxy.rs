//! The egress proxy of one VM as a driver keeps it: started, found again, missed when it is gone.
//!
//! Used by drivers whose VMMs are processes, for VMs with grants. The proxy's uid is this VM's own
//! and nobody else's, and it lives in the VM's cgroup, so cgroup and uid together say which process
//! it is: no daemon has to remember it, and whatever ends the VM's cgroup ends it too.
//!
//! ```text
//!   tap down ── strays killed ▶ sockets ▶ proxy serves ──▶ policy written, tap up
//!   tap up   ── proxy found ──▶ kept
//!            └─ no proxy ─────▶ error: the caller kills the VM
//! ```
//!
//! The tap goes up only after a proxy served. So with the tap down whatever there is of a proxy was
//! left half started by a daemon that died, and with the tap up a missing one has ended. Never
//! starts a second one for a VM that runs: its redirected traffic meets a closed port meanwhile,
//! and an app whose way out vanished without a word is better started anew.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, pidfd_open};
use spore_wire::egress::{EgressBlob, Grant};
use spore_wire::generation::GENERATION;
use spore_wire::id::VmId;

use super::PolicyError;
use super::process::uid_of;
use super::room::{Rooms, blocking};
use crate::egress::host;
use crate::egress::launch::{EgressLauncher, Launch, LaunchError};
use crate::net::namespace::ProxySockets;

/// The most connections of one VM at once: many model calls beside each other, and a bounded share
/// of the VM's memory.
const CONNECTIONS_MAX: u32 = 128;

/// How often and how long the ports are waited for that a half-started proxy still holds.
const PORT_TRIES: u32 = 40;
const PORT_PAUSE: Duration = Duration::from_millis(50);

/// What of the proxy's log is shown when it does not start.
const LOG_TAIL_BYTES: i64 = 2048;

/// One VM's proxy, whether it runs or not.
#[derive(Debug)]
pub struct EgressProxy {
    /// How it is started.
    pub launcher: EgressLauncher,
    /// Where it belongs.
    pub rooms: Arc<Rooms>,
    /// Whose it is.
    pub vm: VmId,
    /// The VM's namespace.
    pub namespace: String,
    /// What it runs as: this VM's own uid, not the VMM's.
    pub uid: u32,
    /// What the VMM runs as.
    pub vmm_uid: u32,
    /// What it may dial; not empty.
    pub grants: Vec<Grant>,
}

impl EgressProxy {
    /// The proxy of a VM whose tap may be up already; `None` when the tap is down.
    ///
    /// # Errors
    /// [`PolicyError::NoProxy`] when the tap is up without one.
    pub async fn kept(&self) -> Result<Option<OwnedFd>, PolicyError> {
        let open = self.rooms.namespaces().is_open(&self.namespace).await;
        if !open.map_err(step("reading the tap's state"))? {
            return Ok(None);
        }
        let found = self
            .members()
            .map_err(step("looking for the egress proxy"))?;
        let proxy = found.into_iter().find(|member| member.uid == self.uid);
        proxy
            .map(|member| Some(member.pidfd))
            .ok_or(PolicyError::NoProxy)
    }

    /// Makes sure that the proxy serves, and gives its process.
    ///
    /// # Errors
    /// [`PolicyError`]; the caller kills the VM.
    pub async fn ensure(self: &Arc<Self>) -> Result<OwnedFd, PolicyError> {
        if let Some(pidfd) = self.kept().await? {
            return Ok(pidfd);
        }
        let strays = self.members().map_err(step("looking for strays"))?;
        for stray in strays.iter().filter(|one| one.uid != self.vmm_uid) {
            crate::cgroup::kill_process(&stray.pidfd).map_err(step("ending a stray"))?;
        }
        let sockets = self.sockets().await.map_err(step("the proxy's sockets"))?;
        let this = Arc::clone(self);
        let launched = blocking(move || this.launch(sockets)).await;
        launched.map_err(step("a worker thread"))?
    }

    /// The ports of a stray that was just killed are free a moment later.
    async fn sockets(&self) -> io::Result<ProxySockets> {
        let namespaces = self.rooms.namespaces();
        let mut tries = 0;
        loop {
            match namespaces.proxy_sockets(&self.namespace).await {
                Err(error) if error.kind() == io::ErrorKind::AddrInUse && tries < PORT_TRIES => {
                    tries += 1;
                    tokio::time::sleep(PORT_PAUSE).await;
                }
                done => return done,
            }
        }
    }

    /// Blocks until the proxy serves, on a thread in the host's namespaces.
    fn launch(&self, sockets: ProxySockets) -> Result<OwnedFd, PolicyError> {
        let blob = EgressBlob {
            generation: GENERATION,
            vm: self.vm,
            grants: self.grants.clone(),
            resolvers: self
                .launcher
                .resolvers()
                .map_err(step("reading /etc/resolv.conf"))?,
            host_addresses: host::addresses().map_err(step("listing the host's addresses"))?,
            connections_max: CONNECTIONS_MAX,
        };
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(self.log_path())
            .map_err(step("the egress proxy's log"))?;
        let launch = Launch {
            uid: self.uid,
            blob: &blob,
            tcp: sockets.tcp.into(),
            dns: sockets.dns.into(),
            log,
        };
        let entrances = self.rooms.cgroups().entrances(&self.vm.to_string());
        let place = |pid: Pid| {
            let pid = pid.as_raw_nonzero().to_string();
            entrances.iter().try_for_each(|path| fs::write(path, &pid))
        };
        let child = self
            .launcher
            .launch(launch, place)
            .map_err(|source| self.not_started(source))?;
        // A child that ended since is a zombie until it is waited for, so the pid is still its own.
        let pid = Pid::from_child(&child);
        pidfd_open(pid, PidfdFlags::empty())
            .map_err(|error| step("holding the egress proxy")(error.into()))
    }

    fn not_started(&self, source: LaunchError) -> PolicyError {
        PolicyError::Proxy {
            log: self.log_tail().unwrap_or_default(),
            source,
        }
    }

    fn log_tail(&self) -> io::Result<String> {
        let mut log = File::open(self.log_path())?;
        let len = i64::try_from(log.metadata()?.len()).unwrap_or(i64::MAX);
        log.seek(SeekFrom::End(-len.min(LOG_TAIL_BYTES)))?;
        let mut tail = Vec::new();
        log.read_to_end(&mut tail)?;
        Ok(String::from_utf8_lossy(&tail).trim().to_owned())
    }

    fn log_path(&self) -> PathBuf {
        self.rooms.folder(self.vm).join("egress.log")
    }

    /// Every process in the VM's cgroup, each with its uid.
    fn members(&self) -> io::Result<Vec<Member>> {
        let mut members = Vec::new();
        for (pid, pidfd) in self.rooms.cgroups().members(&self.vm.to_string())? {
            let status = fs::read_to_string(format!("/proc/{}/status", pid.as_raw_nonzero()));
            if let Some(uid) = status.ok().as_deref().and_then(uid_of) {
                members.push(Member { uid, pidfd });
            }
        }
        Ok(members)
    }
}

/// A process of a VM's cgroup.
#[derive(Debug)]
struct Member {
    uid: u32,
    pidfd: OwnedFd,
}

fn step(what: &'static str) -> impl FnOnce(io::Error) -> PolicyError {
    move |source| PolicyError::Step { what, source }
}
