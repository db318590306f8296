//! `spore down`: stops every VM, the gateway and the daemon, and leaves nothing on the host.
//!
//! The daemon is told to end first (it leaves VMs and gateway alone); then this process takes the
//! daemon's lock and its part: it adopts what runs, stops it in good order and removes the rest. So
//! `down` works as well when the daemon is dead.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use spore_wire::node::StopMode;

use super::lock::{DaemonLock, Holder};
use super::parts::{self, NodeParts};
use super::unit::Unit;
use super::up;
use crate::config::ServerConfig;

/// How long the daemon may take to end.
const DAEMON_PATIENCE: Duration = Duration::from_secs(40);

/// How long VMs may take to stop before they are killed.
const VM_PATIENCE: Duration = Duration::from_secs(45);

/// How long the gateway may finish what is in flight.
const GATEWAY_DRAIN: Duration = Duration::from_secs(2);

const STEP: Duration = Duration::from_millis(50);

/// What `down` did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Down {
    /// Whether a daemon was running.
    pub(crate) daemon: bool,
    /// VMs that were stopped.
    pub(crate) vms: usize,
}

/// Stops everything of this configuration.
///
/// # Errors
/// When something does not stop; what is left is in the message.
pub(crate) fn down(config: &ServerConfig, file: Option<&Path>) -> Result<Down> {
    ensure!(
        rustix::process::geteuid().is_root(),
        "the daemon belongs to root: run `sudo spore down`"
    );
    if !config.runtime_dir.exists() {
        return Ok(Down::default());
    }
    super::daemon::harden()?;
    let daemon = stop_daemon(config, file)?;
    if let Some(unit) = Unit::of(file) {
        // Else the host's next start would bring back what was told to be down.
        unit.disable()?;
    }
    let lock = DaemonLock::take(&config.runtime_dir)?;
    let program = up::trusted_program()?;
    let gateway = parts::gateway(config, &program);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    let vms = runtime.block_on(async {
        gateway.quit(GATEWAY_DRAIN).await?;
        stop_vms(parts::open_to_stop(config, &program).await?).await
    })?;
    if let Some(unit) = Unit::of(file) {
        unit.stop_vms()?;
    }
    let builds = parts::builder(config).sweep();
    builds.context("remove what image builds left")?;
    gateway.clear()?;
    remove_socket(&config.runtime_dir.join("api.sock"))?;
    drop(lock);
    Ok(Down { daemon, vms })
}

/// Asks the daemon to end and waits until it has; says whether there was one.
///
/// # Errors
/// When it does not end in its time.
pub(crate) fn stop_daemon(config: &ServerConfig, file: Option<&Path>) -> Result<bool> {
    let found = DaemonLock::holder(&config.runtime_dir)?;
    if let Some(unit) = Unit::of(file) {
        // Also when nobody holds the lock: systemd may be about to start a daemon that failed.
        unit.stop()?;
    }
    if found == Holder::Nobody {
        return Ok(false);
    }
    let mut told = None;
    for _try in 0..DAEMON_PATIENCE.as_millis() / STEP.as_millis() {
        match DaemonLock::holder(&config.runtime_dir)? {
            Holder::Nobody => return Ok(true),
            Holder::Process(Some(pid)) if told != Some(pid) => {
                terminate(config, pid)?;
                told = Some(pid);
            }
            // It was told, or is just starting: then it says its pid in a moment.
            Holder::Process(_) => {}
        }
        std::thread::sleep(STEP);
    }
    bail!(
        "the daemon{} does not end: see its log in {}, then end it with `kill -9`; VMs survive \
         that, and `spore down` stops them",
        told.map_or_else(String::new, |pid| format!(" (pid {pid})")),
        config.log_dir.display()
    )
}

fn terminate(config: &ServerConfig, pid: i32) -> Result<()> {
    let process = Pid::from_raw(pid).context("a pid above 1")?;
    let pidfd = match pidfd_open(process, PidfdFlags::empty()) {
        Err(Errno::SRCH) => return Ok(()),
        opened => opened.context("the daemon's process")?,
    };
    // The pid may have become another's before it was opened.
    if DaemonLock::holder(&config.runtime_dir)? != Holder::Process(Some(pid)) {
        return Ok(());
    }
    match pidfd_send_signal(&pidfd, Signal::TERM) {
        Ok(()) | Err(Errno::SRCH) => Ok(()),
        Err(error) => Err(error).context("tell the daemon to end"),
    }
}

async fn stop_vms(parts: NodeParts) -> Result<usize> {
    let all = parts.node.list();
    let running = all
        .iter()
        .filter(|vm| !vm.phase.is_over())
        .map(|vm| vm.vm)
        .collect::<Vec<_>>();
    for vm in &running {
        parts.node.stop(*vm, StopMode::Graceful).await?;
    }
    for vm in &running {
        let stopped = tokio::time::timeout(VM_PATIENCE, parts.node.stopped(*vm)).await;
        if stopped.is_err() {
            parts.node.stop(*vm, StopMode::Kill).await?;
            let killed = tokio::time::timeout(VM_PATIENCE, parts.node.stopped(*vm)).await;
            killed.with_context(|| format!("the VM {vm} does not end"))??;
        }
    }
    parts.node.detach().await;
    let swept = parts
        .driver
        .hypervisor
        .sweep(&std::collections::BTreeSet::new())
        .await;
    let mut left = swept.context("list what is left")?.left;
    if let Some(first) = left.pop() {
        return Err(first.error).context("remove what is left");
    }
    let rooms = &parts.driver.rooms;
    rooms.close().context("remove what was made ahead")?;
    rooms
        .cgroups()
        .remove_parent()
        .context("remove the cgroup of all VMs")?;
    Ok(running.len())
}

fn remove_socket(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", path.display()))
        }
        _gone => Ok(()),
    }
}
