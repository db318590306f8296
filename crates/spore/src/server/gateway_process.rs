//! The gateway's process: started once, found again by every later daemon.
//!
//! Called by `door.rs` and by `spore down`. The gateway listens on its feed socket in a folder only
//! root can enter; whoever can connect there is its daemon. Of the feed's protocol this speaks the
//! greeting and the farewell.
//!
//! The visitors' socket is made here once and lives on: a gateway hands it to every daemon that
//! greets it, and the daemon to the gateway that follows, so that no visitor is refused between two
//! of them.

use std::fs::DirBuilder;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use command_fds::{CommandFdExt, FdMapping};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, getsockname, listen,
    socket_with, sockopt,
};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use spore_gateway::packet::PacketSocket;
use spore_wire::gateway::{FromGateway, ToGateway};
use spore_wire::generation::GENERATION;

use crate::log::{self, LogConfig};

/// The descriptor of the gateway's HTTP listener.
pub(crate) const HTTP_FD: i32 = 3;

/// The descriptor of the gateway's feed listener.
pub(crate) const FEED_FD: i32 = 4;

/// The descriptor of the gateway's older log file; the newest is its standard error.
pub(crate) const OLDER_LOG_FD: i32 = 5;

/// How long a gateway may take to answer a hello.
const HELLO_PATIENCE: Duration = Duration::from_secs(5);

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
    /// What a gateway that this daemon starts calls itself: the program's file and all that the
    /// configuration says of it. Another stamp is another gateway.
    ///
    /// # Errors
    /// When the program's own file cannot be looked at.
    pub(crate) fn stamp(&self) -> Result<String> {
        let file = std::fs::metadata("/proc/self/exe").context("look at this program's file")?;
        Ok(format!(
            "{} {}.{}.{}.{} {} {} {} {}",
            env!("CARGO_PKG_VERSION"),
            file.dev(),
            file.ino(),
            file.mtime(),
            file.mtime_nsec(),
            self.address,
            self.uid,
            self.lines.filter,
            self.lines.format
        ))
    }

    /// Greets the gateway that runs; `None` when none does.
    ///
    /// # Errors
    /// When it does not answer as a gateway does.
    pub(crate) async fn greet(&self) -> Result<Option<Greeted>> {
        let Some(socket) = self.connect()? else {
            return Ok(None);
        };
        let socket = PacketSocket::new(socket)?;
        let hello = ToGateway::Hello {
            generation: GENERATION,
        };
        let mut buffer = Vec::new();
        let answer = async {
            socket.send(&hello, None).await?;
            socket.receive::<FromGateway>(&mut buffer).await
        };
        let Ok(answer) = tokio::time::timeout(HELLO_PATIENCE, answer).await else {
            bail!("the gateway does not answer within {HELLO_PATIENCE:?}");
        };
        let (hello, listener) = answer.context("greet the gateway")?;
        ensure!(
            matches!(hello, FromGateway::Hello { .. }),
            "the gateway does not begin with a hello"
        );
        Ok(Some(Greeted {
            socket,
            hello,
            listener,
        }))
    }

    /// Has the gateway that runs finish what is in flight and end, and kills one that does not.
    /// Returns once none runs.
    ///
    /// # Errors
    /// When it does not go.
    pub(crate) async fn quit(&self, drain: Duration) -> Result<()> {
        match self.greet().await {
            Ok(Some(greeted)) => greeted.quit(drain).await,
            Ok(None) => {}
            Err(error) => {
                tracing::debug!(error = %format!("{error:#}"), "the gateway is killed");
                return self.kill();
            }
        }
        self.see_off(drain)
    }

    /// Waits for a gateway that was told to quit, and kills one that does not.
    ///
    /// # Errors
    /// When it does not go.
    pub(crate) fn see_off(&self, drain: Duration) -> Result<()> {
        match self.wait_gone(drain + Duration::from_secs(1)) {
            Ok(()) => Ok(()),
            Err(_still_there) => self.kill(),
        }
    }

    /// The visitors' socket: the one that a gateway had, if it is the one that is wanted, else a
    /// new one.
    ///
    /// # Errors
    /// When the address is taken by another program.
    pub(crate) fn listener(&self, had: Option<OwnedFd>) -> Result<OwnedFd> {
        if let Some(had) = had
            && self.is_wanted(&had)
        {
            return Ok(had);
        }
        let http = TcpListener::bind(self.address).with_context(|| {
            format!(
                "the gateway cannot listen on {}: if another program has this port, stop it or \
                 set `gateway` to another one in the configuration",
                self.address
            )
        })?;
        http.set_nonblocking(true)
            .context("the gateway's listener")?;
        Ok(http.into())
    }

    /// Whether a socket listens where this gateway should: a gateway is not believed.
    fn is_wanted(&self, socket: &OwnedFd) -> bool {
        let address = getsockname(socket).ok().map(SocketAddr::try_from);
        let listens = sockopt::socket_acceptconn(socket).unwrap_or(false)
            && sockopt::socket_type(socket) == Ok(SocketType::STREAM);
        listens && matches!(address, Some(Ok(address)) if address == self.address)
    }

    fn connect(&self) -> Result<Option<OwnedFd>> {
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

    /// Starts a gateway that takes visitors from this socket. It outlives this process. Legal when
    /// none runs.
    ///
    /// # Errors
    /// When it cannot be started.
    pub(crate) fn start(&self, listener: &OwnedFd) -> Result<()> {
        let folder = self.folder();
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&folder)
            .with_context(|| format!("cannot make {}", folder.display()))?;
        let http = listener.try_clone().context("the gateway's listener")?;
        let feed = self.bind_feed()?;
        let mut command = Command::new(&self.program);
        command
            .args(["gateway", "--uid", &self.uid.to_string()])
            .args(["--log", &self.lines.filter])
            .args(["--log-format", &self.lines.format.to_string()])
            .args(["--stamp", &self.stamp()?])
            .env_clear()
            .current_dir("/")
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log::open(&self.log)?);
        command
            .fd_mappings(vec![
                FdMapping {
                    parent_fd: http,
                    child_fd: HTTP_FD,
                },
                FdMapping {
                    parent_fd: feed,
                    child_fd: FEED_FD,
                },
                FdMapping {
                    parent_fd: log::open_older(&self.log)?.into(),
                    child_fd: OLDER_LOG_FD,
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
    fn wait_gone(&self, patience: Duration) -> Result<()> {
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

/// A gateway that has said its hello.
#[derive(Debug)]
pub(crate) struct Greeted {
    /// The session.
    pub(crate) socket: PacketSocket,
    /// What it said.
    pub(crate) hello: FromGateway,
    /// The visitors' socket; `None` when it has quit already.
    pub(crate) listener: Option<OwnedFd>,
}

impl Greeted {
    /// Tells it to finish what is in flight and end. The session goes on until it has.
    pub(crate) async fn quit(&self, drain: Duration) {
        let drain_ms = u64::try_from(drain.as_millis()).unwrap_or(u64::MAX);
        let quit = ToGateway::Quit { drain_ms };
        if let Err(error) = self.socket.send(&quit, None).await {
            tracing::debug!(%error, "the gateway ends before it is told to");
        }
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
