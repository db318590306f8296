//! The gateway's process: started once, found again by every later daemon.
//!
//! Called by `door.rs` and by `spore down`. The gateway listens on its feed socket in a folder only
//! root can enter; whoever can connect there is its daemon. Never speaks the feed's protocol.

use std::fs::{DirBuilder, File, OpenOptions};
use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use command_fds::{CommandFdExt, FdMapping};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with,
};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::log::LogConfig;

/// The descriptor of the gateway's HTTP listener.
pub(crate) const HTTP_FD: i32 = 3;

/// The descriptor of the gateway's feed listener.
pub(crate) const FEED_FD: i32 = 4;

/// What a gateway is started with.
#[derive(Clone, Debug)]
pub(crate) struct GatewayProcess {
    /// This program.
    pub(crate) program: PathBuf,
    /// The daemon's runtime folder.
    pub(crate) runtime: PathBuf,
    /// Where its log goes.
    pub(crate) log: PathBuf,
    /// What is in it.
    pub(crate) lines: LogConfig,
    /// Where it listens.
    pub(crate) address: SocketAddr,
    /// The uid it runs as.
    pub(crate) uid: u32,
}

impl GatewayProcess {
    /// A connection to the feed of the gateway that runs; `None` when none does.
    ///
    /// # Errors
    /// When a socket cannot be made.
    pub(crate) fn connect(&self) -> Result<Option<OwnedFd>> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
            .context("make a socket for the gateway's feed")?;
        let address = SocketAddrUnix::new(self.feed()).context("the feed's path")?;
        match connect(&socket, &address) {
            Ok(()) => Ok(Some(socket)),
            Err(Errno::NOENT | Errno::CONNREFUSED) => Ok(None),
            // A full backlog, for one: a gateway that serves visitors must not die of it.
            Err(error) => Err(error).context("connect to the gateway's feed"),
        }
    }

    /// Starts a gateway. It outlives this process. Legal when none runs.
    ///
    /// # Errors
    /// When its address is taken or it cannot be started.
    pub(crate) fn start(&self) -> Result<()> {
        let folder = self.folder();
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&folder)
            .with_context(|| format!("cannot make {}", folder.display()))?;
        let http = TcpListener::bind(self.address).with_context(|| {
            format!(
                "the gateway cannot listen on {}: if another program has this port, stop it or \
                 set `gateway` to another one in the configuration",
                self.address
            )
        })?;
        http.set_nonblocking(true)
            .context("the gateway's listener")?;
        let feed = self.bind_feed()?;
        let mut command = Command::new(&self.program);
        command
            .args(["gateway", "--uid", &self.uid.to_string()])
            .args(["--log", &self.lines.filter])
            .args(["--log-format", &self.lines.format.to_string()])
            .env_clear()
            .current_dir("/")
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(self.open_log()?);
        command
            .fd_mappings(vec![
                FdMapping {
                    parent_fd: http.into(),
                    child_fd: HTTP_FD,
                },
                FdMapping {
                    parent_fd: feed,
                    child_fd: FEED_FD,
                },
            ])
            .context("the gateway's descriptors")?;
        let mut child = command.spawn().context("start the gateway")?;
        std::fs::write(self.pid_file(), child.id().to_string())
            .context("note the gateway's pid")?;
        // Somebody has to collect it when it ends under this daemon.
        std::thread::Builder::new()
            .name("gateway-wait".to_owned())
            .spawn(move || match child.wait() {
                Ok(status) => tracing::warn!(%status, "the gateway ended"),
                Err(error) => tracing::warn!(%error, "cannot wait for the gateway"),
            })
            .context("watch the gateway")?;
        Ok(())
    }

    /// Kills the gateway that this runtime folder knows of, if it still is one. Returns once it is
    /// gone or was never there.
    ///
    /// # Errors
    /// When it does not go.
    pub(crate) fn kill(&self) -> Result<()> {
        let Some((_pid, pidfd)) = self.running()? else {
            return Ok(());
        };
        pidfd_send_signal(&pidfd, Signal::KILL).context("kill the gateway")?;
        self.wait_gone(Duration::from_secs(5))
    }

    /// Waits until no gateway runs.
    ///
    /// # Errors
    /// When it still runs after `patience`.
    pub(crate) fn wait_gone(&self, patience: Duration) -> Result<()> {
        let step = Duration::from_millis(20);
        for _try in 0..(patience.as_millis() / step.as_millis()).max(1) {
            if self.running()?.is_none() {
                return Ok(());
            }
            std::thread::sleep(step);
        }
        anyhow::bail!("the gateway does not end")
    }

    /// The gateway's process, checked behind its pidfd to be one of this program.
    fn running(&self) -> Result<Option<(i32, OwnedFd)>> {
        let Ok(text) = std::fs::read_to_string(self.pid_file()) else {
            return Ok(None);
        };
        let number = text
            .trim()
            .parse::<i32>()
            .context("the gateway's pid file")?;
        let pid = Pid::from_raw(number).context("the gateway's pid file")?;
        let Ok(pidfd) = pidfd_open(pid, PidfdFlags::empty()) else {
            return Ok(None);
        };
        let command = std::fs::read(format!("/proc/{number}/cmdline")).unwrap_or_default();
        let uid = self.uid.to_string();
        let parts = command
            .split(|byte| *byte == 0)
            .skip(1)
            .take(3)
            .collect::<Vec<_>>();
        let ours = parts == [b"gateway".as_slice(), b"--uid".as_slice(), uid.as_bytes()];
        Ok(ours.then_some((number, pidfd)))
    }

    fn bind_feed(&self) -> Result<OwnedFd> {
        let path = self.feed();
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("cannot replace {}", path.display()));
            }
            _gone => {}
        }
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
            .context("make the gateway's feed")?;
        let address = SocketAddrUnix::new(&path).context("the feed's path")?;
        bind(&socket, &address).with_context(|| format!("cannot listen on {}", path.display()))?;
        listen(&socket, 4).context("listen on the gateway's feed")?;
        Ok(socket)
    }

    fn open_log(&self) -> Result<File> {
        let mut options = OpenOptions::new();
        options.create(true).append(true).mode(0o600);
        options
            .open(&self.log)
            .with_context(|| format!("cannot open {}", self.log.display()))
    }

    fn folder(&self) -> PathBuf {
        self.runtime.join("gateway")
    }

    fn feed(&self) -> PathBuf {
        self.folder().join("feed.sock")
    }

    fn pid_file(&self) -> PathBuf {
        self.folder().join("pid")
    }

    /// Removes what a gateway that is gone left in the runtime folder.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub(crate) fn clear(&self) -> Result<()> {
        remove_folder(&self.folder())
    }
}

fn remove_folder(folder: &Path) -> Result<()> {
    match std::fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", folder.display()))
        }
        _gone => Ok(()),
    }
}
