//! The daemon as a systemd unit, where systemd runs.
//!
//! Used by `up.rs` and `down.rs`. Two units, since a cgroup that systemd delegates must hold VMs
//! and nothing else: the daemon's own, and one without a process above the VMs' cgroups.
//!
//! ```text
//!   system.slice/spore.service                 the daemon, the gateway
//!   spore.slice/spore-vms.service/VMID         a VM and its egress proxy
//! ```

use std::ffi::OsStr;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::up::StartOptions;
use crate::config::SYSTEMD;

/// Where units of the administrator are.
const FOLDER: &str = "/etc/systemd/system";

/// The daemon's.
const DAEMON: &str = "spore.service";

/// That of the VMs' cgroups.
const VMS: &str = "spore-vms.service";

/// Lines of the journal that a message has.
const LINES: &str = "20";

/// What the packaged unit starts.
const PACKAGED: &str = "/usr/local/lib/spore/spore server";

/// The daemon's unit on this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Unit(());

impl Unit {
    /// The unit, where systemd runs. A daemon with a configuration `file` of its own has none: the
    /// unit is that of the host's one daemon.
    pub(crate) fn of(file: Option<&Path>) -> Option<Self> {
        (file.is_none() && Path::new(SYSTEMD).is_dir()).then_some(Self(()))
    }

    /// Writes the units for `program`, and starts the daemon's now and at each start of the host.
    /// Does not wait until it is ready.
    ///
    /// # Errors
    /// When systemd refuses; the message says what to look at.
    pub(crate) fn start(self, program: &Path, options: StartOptions<'_>) -> Result<()> {
        let mut start = format!("{} server", program.display());
        for argument in options.arguments() {
            start.push(' ');
            start.push_str(&argument);
        }
        let daemon = include_str!("../../../../packaging/spore.service").replace(PACKAGED, &start);
        let vms = include_str!("../../../../packaging/spore-vms.service").to_owned();
        for (name, text) in [(DAEMON, daemon), (VMS, vms)] {
            let path = Path::new(FOLDER).join(name);
            std::fs::write(&path, text)
                .with_context(|| format!("cannot write {}", path.display()))?;
        }
        systemctl(["daemon-reload"])?;
        systemctl(["enable", "--quiet", DAEMON])?;
        // A daemon that was stopped while it failed leaves its count of restarts behind.
        systemctl(["reset-failed", DAEMON])?;
        systemctl(["start", "--no-block", DAEMON])
    }

    /// Stops the daemon; VMs and the gateway go on. Nothing to do where there is no unit.
    ///
    /// # Errors
    /// When systemd cannot stop it.
    pub(crate) fn stop(self) -> Result<()> {
        match is_known(DAEMON)? {
            true => systemctl(["stop", DAEMON]),
            false => Ok(()),
        }
    }

    /// The host's next start does not start the daemon any more.
    ///
    /// # Errors
    /// When systemd refuses.
    pub(crate) fn disable(self) -> Result<()> {
        match is_known(DAEMON)? {
            true => systemctl(["disable", "--quiet", DAEMON]),
            false => Ok(()),
        }
    }

    /// Gives the cgroup of the VMs back. Legal once no VM is left: what is in it would go on, and
    /// nobody would know of it.
    ///
    /// # Errors
    /// When systemd cannot stop it.
    pub(crate) fn stop_vms(self) -> Result<()> {
        match is_known(VMS)? {
            true => systemctl(["stop", VMS]),
            false => Ok(()),
        }
    }

    /// Why the daemon is not coming up, if it is not: it ended, or systemd starts it over and over.
    ///
    /// # Errors
    /// When systemd does not answer.
    pub(crate) fn failure(self) -> Result<Option<String>> {
        let shown = output(
            Command::new("systemctl")
                .args(["show", DAEMON])
                .arg("--property=ActiveState,SubState,NRestarts,Result,Job"),
        )?;
        let value = |name: &str| {
            let mut lines = shown.lines().filter_map(|line| line.split_once('='));
            lines.find_map(|(key, value)| (key == name).then_some(value))
        };
        // Until its turn comes, a unit that is to be started is inactive and has a job.
        let waits = !matches!(value("Job"), None | Some("" | "0"));
        let ended = matches!(value("ActiveState"), Some("failed" | "inactive")) && !waits;
        let again = value("SubState") == Some("auto-restart") || value("NRestarts") != Some("0");
        Ok((ended || again).then(|| value("Result").unwrap_or("unknown").to_owned()))
    }

    /// The end of what the daemon logged, for a message.
    pub(crate) fn last_lines(self) -> String {
        let mut journal = Command::new("journalctl");
        journal.args([
            "--unit",
            DAEMON,
            "--lines",
            LINES,
            "--output=cat",
            "--no-pager",
        ]);
        output(&mut journal).unwrap_or_else(|error| format!("(no journal: {error:#})"))
    }
}

/// Whether there is such a unit, written here or brought by a package.
fn is_known(unit: &str) -> Result<bool> {
    let state = ["show", unit, "--property=LoadState", "--value"];
    Ok(output(Command::new("systemctl").args(state))?.trim() == "loaded")
}

fn systemctl<const N: usize>(arguments: [&str; N]) -> Result<()> {
    let output = Command::new("systemctl")
        .args(arguments)
        .output()
        .context("cannot start systemctl")?;
    ensure!(
        output.status.success(),
        "`systemctl {}` ended with {}: {}; see `journalctl -u spore`",
        arguments.join(" "),
        output.status,
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(())
}

fn output(command: &mut Command) -> Result<String> {
    let output = command
        .output()
        .with_context(|| format!("cannot start {}", name(command.get_program())))?;
    ensure!(
        output.status.success(),
        "{} ended with {}",
        name(command.get_program()),
        output.status
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn name(program: &OsStr) -> String {
    program.to_string_lossy().into_owned()
}
