//! `spore up`: makes the daemon run, with systemd where that runs, without it elsewhere.
//!
//! Harmless when the daemon runs already. Never composes anything itself: it starts `spore server`
//! and waits until that answers.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use spore_api::client::{Client, Endpoint};
use spore_api::status::Status;

use super::down::stop_daemon;
use super::lock::{DaemonLock, Holder};
use crate::config::ServerConfig;

/// How long a daemon may take to answer: adopting many VMs takes a while.
const PATIENCE: Duration = Duration::from_secs(120);

const STEP: Duration = Duration::from_millis(50);

/// The unit's place; packages ship the same text.
const UNIT_FILE: &str = "/etc/systemd/system/spore.service";

/// What is there after `up`.
#[derive(Debug)]
pub(crate) struct Up {
    /// Whether this call started the daemon.
    pub(crate) started: bool,
    /// What the daemon says of itself.
    pub(crate) status: Status,
}

/// Starts the daemon unless it runs, and waits until it answers. `invoker` is the user besides root
/// who may use the API's socket; `None` is root alone.
///
/// # Errors
/// When it cannot be started or does not answer; the message has the last lines of its log.
pub(crate) fn up(config: &ServerConfig, file: Option<&Path>, invoker: Option<u32>) -> Result<Up> {
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
    let mut child = None;
    if !runs {
        make_folder(&config.log_dir, 0o750)?;
        if Path::new("/run/systemd/system").is_dir() && file.is_none() {
            start_unit(&program, invoker)?;
        } else {
            child = Some(start_detached(config, file, &program, invoker)?);
        }
    }
    let status = wait(config, child.as_mut())?;
    Ok(Up {
        started: !runs,
        status,
    })
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

fn start_unit(program: &Path, invoker: Option<u32>) -> Result<()> {
    let admit = invoker.map_or_else(String::new, |uid| format!(" --admit-uid {uid}"));
    let unit = include_str!("../../../../packaging/spore.service").replace(
        "/usr/local/lib/spore/spore server",
        &format!("{} server{admit}", program.display()),
    );
    std::fs::write(UNIT_FILE, unit).with_context(|| format!("cannot write {UNIT_FILE}"))?;
    for arguments in [
        ["daemon-reload", "--quiet"].as_slice(),
        &["start", "spore.service"],
    ] {
        let status = Command::new("systemctl")
            .args(arguments)
            .status()
            .context("systemctl")?;
        ensure!(
            status.success(),
            "systemctl {arguments:?} ended with {status}: see `journalctl -u spore`"
        );
    }
    Ok(())
}

fn start_detached(
    config: &ServerConfig,
    file: Option<&Path>,
    program: &Path,
    invoker: Option<u32>,
) -> Result<Child> {
    let log = open_log(&daemon_log(config))?;
    let mut command = Command::new(program);
    command.arg("server");
    if let Some(file) = file {
        command
            .arg("--config")
            .arg(file.canonicalize().context("the configuration's path")?);
    }
    if let Some(uid) = invoker {
        command.args(["--admit-uid", &uid.to_string()]);
    }
    command.env_clear().current_dir("/").process_group(0);
    command
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log);
    command.spawn().context("start the daemon")
}

fn daemon_log(config: &ServerConfig) -> PathBuf {
    config.log_dir.join("daemon.log")
}

fn open_log(path: &Path) -> Result<File> {
    let mut options = OpenOptions::new();
    options.create(true).append(true).mode(0o640);
    let mut file = options
        .open(path)
        .with_context(|| format!("cannot open {}", path.display()))?;
    writeln!(file).context("write the daemon's log")?;
    Ok(file)
}

fn wait(config: &ServerConfig, mut child: Option<&mut Child>) -> Result<Status> {
    let client = Client::new(Endpoint::Unix(config.runtime_dir.join("api.sock")));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        for _try in 0..PATIENCE.as_millis() / STEP.as_millis() {
            if let Ok(status) = client.status().await {
                return Ok(status);
            }
            if let Some(child) = child.as_mut()
                && let Some(status) = child.try_wait()?
            {
                bail!(
                    "the daemon ended with {status}:\n{}",
                    last_lines(&daemon_log(config))
                );
            }
            tokio::time::sleep(STEP).await;
        }
        bail!(
            "the daemon does not answer after {PATIENCE:?}; its log ends with:\n{}",
            last_lines(&daemon_log(config))
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
