//! `spore up`: makes the daemon run, with systemd where that runs, without it elsewhere.
//!
//! Harmless when the daemon runs already. Never composes anything itself: it starts `spore server`
//! and waits until that answers.

use std::fs::{DirBuilder, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use spore_api::client::{Client, Endpoint};
use spore_api::status::Status;

use super::down::stop_daemon;
use super::driver::HypervisorChoice;
use super::lock::{DaemonLock, Holder};
use super::unit::Unit;
use crate::config::ServerConfig;
use crate::log;

/// How long a daemon may take to answer: adopting many VMs takes a while.
const PATIENCE: Duration = Duration::from_secs(120);

const STEP: Duration = Duration::from_millis(50);

/// Steps between two looks at whether the daemon still runs, since systemd takes a while to tell.
const LOOK_EACH: u128 = 10;

/// What is there after `up`.
#[derive(Debug)]
pub(crate) struct Up {
    /// Whether this call started the daemon.
    pub(crate) started: bool,
    /// What the daemon says of itself.
    pub(crate) status: Status,
}

/// What a daemon is started with, beside what its configuration says.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StartOptions<'a> {
    /// The configuration, where it is not the host's own.
    pub(crate) file: Option<&'a Path>,
    /// The user besides root who may use the API's socket; `None` is root alone.
    pub(crate) invoker: Option<u32>,
    /// What hosts VMs, whatever the configuration says.
    pub(crate) hypervisor: Option<HypervisorChoice>,
}

impl StartOptions<'_> {
    /// As arguments of `spore server`; without the file.
    pub(super) fn arguments(self) -> Vec<String> {
        let mut arguments = Vec::new();
        if let Some(uid) = self.invoker {
            arguments.extend(["--admit-uid".to_owned(), uid.to_string()]);
        }
        if let Some(choice) = self.hypervisor {
            arguments.extend(["--hypervisor".to_owned(), choice.name().to_owned()]);
        }
        arguments
    }
}

/// Starts the daemon unless it runs, and waits until it answers.
///
/// # Errors
/// When it cannot be started or does not answer; the message has the last lines of its log. When
/// one runs whose VMs are hosted by something else than what is asked for.
pub(crate) fn up(config: &ServerConfig, options: StartOptions<'_>) -> Result<Up> {
    let file = options.file;
    ensure!(
        rustix::process::geteuid().is_root(),
        "Spore's daemon needs root for namespaces, cgroups and disks: run `sudo spore up`"
    );
    let program = trusted_program()?;
    let runs = match DaemonLock::holder(&config.runtime_dir)? {
        Holder::Nobody => false,
        Holder::Process(pid) if is_of(pid, &program) => true,
        Holder::Process(_) => {
            // Another build of this program was installed since: VMs stay, the daemon changes.
            stop_daemon(config, file)?;
            false
        }
    };
    let started = match (runs, Unit::of(file)) {
        (true, _) => Started::Earlier,
        (false, Some(unit)) => {
            unit.start(&program, options)?;
            Started::ByUnit(unit)
        }
        (false, None) => {
            make_folder(&config.log_dir, 0o750)?;
            Started::Here(start_detached(config, &program, options)?)
        }
    };
    let status = wait(config, started)?;
    if runs {
        check_hypervisor(&status.hypervisor, options.hypervisor)?;
    }
    Ok(Up {
        started: !runs,
        status,
    })
}

/// Whether a daemon that runs has what is asked for: it is not changed under its VMs. What it has
/// is followed by a version.
fn check_hypervisor(has: &str, wanted: Option<HypervisorChoice>) -> Result<()> {
    let has = has.split(' ').next().unwrap_or(has);
    match wanted {
        None | Some(HypervisorChoice::Auto) => Ok(()),
        Some(wanted) if has == wanted.name() => Ok(()),
        Some(wanted) => bail!(
            "Spore is up and hosts VMs with `{has}`, not `{wanted}`: end them with `spore down` \
             first, then `spore up --hypervisor {wanted}`",
            wanted = wanted.name()
        ),
    }
}

/// Who started the daemon, and so tells that it ended and where its log is.
#[derive(Debug)]
enum Started {
    Earlier,
    ByUnit(Unit),
    Here(Child),
}

impl Started {
    /// What became of a daemon that does not come up; `None` while it may still.
    fn failure(&mut self) -> Result<Option<String>> {
        match self {
            Self::Earlier => Ok(None),
            Self::ByUnit(unit) => unit.failure(),
            Self::Here(child) => Ok(child.try_wait()?.map(|status| status.to_string())),
        }
    }

    /// The end of the daemon's log.
    fn last_lines(&self, config: &ServerConfig) -> String {
        match self {
            Self::ByUnit(unit) => unit.last_lines(),
            Self::Earlier | Self::Here(_) => last_lines(&daemon_log(config)),
        }
    }

    /// A daemon that failed is not started again and again behind the back of whoever was told.
    fn give_up(&self) -> Result<()> {
        match self {
            Self::ByUnit(unit) => unit.stop(),
            Self::Earlier | Self::Here(_) => Ok(()),
        }
    }
}

/// Whether the daemon runs the file that is installed now. `None` is a daemon that just starts.
fn is_of(pid: Option<i32>, program: &Path) -> bool {
    let Some(pid) = pid else {
        return true;
    };
    let running = std::fs::metadata(format!("/proc/{pid}/exe"));
    let installed = std::fs::metadata(program);
    match (running, installed) {
        (Ok(running), Ok(installed)) => {
            (running.dev(), running.ino()) == (installed.dev(), installed.ino())
        }
        _unreadable => true,
    }
}

/// This program's path, if nobody but root could have replaced it.
///
/// # Errors
/// When somebody could; the message says which folder and what to do.
pub(crate) fn trusted_program() -> Result<PathBuf> {
    let program = std::env::current_exe().context("find this program's own file")?;
    for part in program.ancestors() {
        let found = std::fs::metadata(part).with_context(|| part.display().to_string())?;
        // In a sticky folder only the owner of an entry can replace it.
        let sticky = found.is_dir() && found.mode() & 0o1000 != 0;
        let open = found.mode() & 0o022 != 0 && !sticky;
        if found.uid() != 0 || open {
            bail!(
                "the daemon does not run from {}: users other than root can write {}. Install it \
                 first (`make up` does), or give that folder to root",
                program.display(),
                part.display()
            );
        }
    }
    Ok(program)
}

/// Makes a folder of root's with this mode, or gives an existing one this mode.
///
/// # Errors
/// When it cannot be made.
pub(crate) fn make_folder(path: &Path, mode: u32) -> Result<()> {
    DirBuilder::new()
        .recursive(true)
        .mode(mode)
        .create(path)
        .and_then(|()| {
            let permissions = std::os::unix::fs::PermissionsExt::from_mode(mode);
            std::fs::set_permissions(path, permissions)
        })
        .with_context(|| format!("cannot make {}", path.display()))
}

fn start_detached(
    config: &ServerConfig,
    program: &Path,
    options: StartOptions<'_>,
) -> Result<Child> {
    let mut log = log::open(&daemon_log(config))?;
    writeln!(log).context("write the daemon's log")?;
    let mut command = Command::new(program);
    command.arg("server");
    if let Some(file) = options.file {
        command
            .arg("--config")
            .arg(file.canonicalize().context("the configuration's path")?);
    }
    command.args(options.arguments());
    command.env_clear().current_dir("/").process_group(0);
    command
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log);
    command.spawn().context("start the daemon")
}

/// Where the daemon's log is without systemd.
pub(crate) fn daemon_log(config: &ServerConfig) -> PathBuf {
    config.log_dir.join("daemon.log")
}

fn wait(config: &ServerConfig, mut started: Started) -> Result<Status> {
    let client = Client::new(Endpoint::Unix(config.runtime_dir.join("api.sock")));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        for attempt in 1..=PATIENCE.as_millis() / STEP.as_millis() {
            if let Ok(status) = client.status().await {
                return Ok(status);
            }
            if attempt.is_multiple_of(LOOK_EACH)
                && let Some(why) = started.failure()?
            {
                started.give_up()?;
                bail!("the daemon ended ({why}):\n{}", started.last_lines(config));
            }
            tokio::time::sleep(STEP).await;
        }
        bail!(
            "the daemon does not answer after {PATIENCE:?}; its log ends with:\n{}",
            started.last_lines(config)
        )
    })
}

/// The end of a log, for a message.
fn last_lines(path: &Path) -> String {
    const BYTES: u64 = 4096;
    let read = || -> std::io::Result<String> {
        let mut file = File::open(path)?;
        let len = file.metadata()?.len();
        file.seek(SeekFrom::Start(len.saturating_sub(BYTES)))?;
        let mut bytes = Vec::new();
        file.take(BYTES).read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    read().unwrap_or_else(|error| format!("({} cannot be read: {error})", path.display()))
}

#[cfg(test)]
mod tests {
    use super::{StartOptions, check_hypervisor};
    use crate::server::HypervisorChoice::{Auto, Kvm, Qemu};

    #[test]
    fn a_daemon_is_started_with_what_up_was_asked_for() {
        let mut options = StartOptions {
            file: None,
            invoker: None,
            hypervisor: None,
        };
        assert_eq!(options.arguments(), Vec::<String>::new());
        options.invoker = Some(1000);
        options.hypervisor = Some(Kvm);
        let all = ["--admit-uid", "1000", "--hypervisor", "kvm"];
        assert_eq!(options.arguments(), all);
    }

    #[test]
    fn up_does_not_pass_over_a_daemon_that_hosts_vms_with_something_else() {
        for fine in [None, Some(Auto), Some(Qemu)] {
            check_hypervisor("qemu QEMU emulator version 7.2", fine).unwrap();
        }
        let refused = check_hypervisor("qemu", Some(Kvm)).unwrap_err().to_string();
        assert!(refused.contains("hosts VMs with `qemu`"), "{refused}");
        assert!(refused.contains("spore up --hypervisor kvm"), "{refused}");
    }
}
