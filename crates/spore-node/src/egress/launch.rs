//! Starts an egress proxy from the node.
//!
//! Called by the driver that prepared the VM's namespace, on a thread that may block for a moment.
//! Never keeps the proxy: it belongs to the VM's cgroup and is killed with that, whichever daemon
//! lives then.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use command_fds::{CommandFdExt, FdMapping};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::Pid;
use spore_wire::egress::{DNS_FD, EgressBlob, TCP_FD};
use thiserror::Error;

use super::{READY, host};

/// How long a proxy may take to confine itself; it takes some milliseconds.
const READY_PATIENCE: Timespec = Timespec {
    tv_sec: 20,
    tv_nsec: 0,
};

/// Why there is no proxy. Nothing is left running then.
#[derive(Debug, Error)]
pub enum LaunchError {
    /// The program could not be started.
    #[error("cannot start the egress proxy `{program}`")]
    Spawn {
        /// What was to be started.
        program: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// Two sockets for one descriptor.
    #[error("cannot pass its sockets to the egress proxy")]
    Descriptors(#[from] command_fds::FdMappingCollision),
    /// The caller could not put it where it belongs.
    #[error("cannot put the egress proxy into its cgroup")]
    Place(#[source] io::Error),
    /// The blob could not be written.
    #[error("cannot give the egress proxy its grants")]
    Blob(#[source] io::Error),
    /// It ended, or did not say that it serves in time.
    #[error("the egress proxy did not start ({status}): its log says why")]
    NotReady {
        /// How it ended, or was made to.
        status: String,
    },
}

/// How proxies are started on this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EgressLauncher {
    program: PathBuf,
    arguments: Vec<OsString>,
    resolvers: Vec<SocketAddr>,
}

/// What one proxy is given.
#[derive(Debug)]
pub struct Launch<'a> {
    /// The uid and gid it runs as: this VM's own, not the VMM's, not 0.
    pub uid: u32,
    /// Its policy.
    pub blob: &'a EgressBlob,
    /// The listening socket, made inside the VM's namespace.
    pub tcp: OwnedFd,
    /// The socket for DNS, made inside the VM's namespace.
    pub dns: OwnedFd,
    /// A file opened for appending.
    pub log: File,
}

impl EgressLauncher {
    /// A launcher that runs `program` with `arguments` before its own: for the program `spore`,
    /// the verb `egress`.
    pub fn new(
        program: impl Into<PathBuf>,
        arguments: impl IntoIterator<Item = impl Into<OsString>>,
    ) -> Self {
        Self {
            program: program.into(),
            arguments: arguments.into_iter().map(Into::into).collect(),
            resolvers: Vec::new(),
        }
    }

    /// The same, with resolvers that its proxies ask; none are the host's own.
    #[must_use]
    pub fn asking(mut self, resolvers: Vec<SocketAddr>) -> Self {
        self.resolvers = resolvers;
        self
    }

    /// The resolvers that a proxy which is started now is to ask.
    ///
    /// # Errors
    /// When the host's own cannot be read.
    pub fn resolvers(&self) -> io::Result<Vec<SocketAddr>> {
        if self.resolvers.is_empty() {
            return host::resolvers();
        }
        Ok(self.resolvers.clone())
    }

    /// Starts a proxy and returns once it is confined and serves. `place` gets its pid before it
    /// has read anything, to put it into the VM's cgroup.
    ///
    /// The result is a child of this process, to be waited for when it ends.
    ///
    /// # Errors
    /// [`LaunchError`]; the process, if there was one, is dead and waited for.
    pub fn launch(
        &self,
        launch: Launch<'_>,
        place: impl FnOnce(Pid) -> io::Result<()>,
    ) -> Result<Child, LaunchError> {
        let mut command = Command::new(&self.program);
        command
            .args(&self.arguments)
            .arg("--uid")
            .arg(launch.uid.to_string())
            .env_clear()
            .current_dir("/")
            // A signal from the daemon's terminal is not meant for it.
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(launch.log);
        command.fd_mappings(vec![
            FdMapping {
                parent_fd: launch.tcp,
                child_fd: TCP_FD,
            },
            FdMapping {
                parent_fd: launch.dns,
                child_fd: DNS_FD,
            },
        ])?;
        let mut child = command.spawn().map_err(|source| LaunchError::Spawn {
            program: self.program.clone(),
            source,
        })?;
        match start(&mut child, launch.blob, place) {
            Ok(()) => Ok(child),
            Err(error) => Err(end(child, error)),
        }
    }
}

fn start(
    child: &mut Child,
    blob: &EgressBlob,
    place: impl FnOnce(Pid) -> io::Result<()>,
) -> Result<(), LaunchError> {
    place(Pid::from_child(child)).map_err(LaunchError::Place)?;
    let json = serde_json::to_vec(blob).map_err(|error| LaunchError::Blob(error.into()))?;
    let not_ready = |status: &str| LaunchError::NotReady {
        status: status.to_owned(),
    };
    let mut stdin = child.stdin.take().ok_or_else(|| not_ready("no pipe"))?;
    match stdin.write_all(&json) {
        // It ended before it read: how it ended says more than the broken pipe.
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            return Err(LaunchError::Blob(error));
        }
        _ => drop(stdin),
    }
    let mut stdout = child.stdout.take().ok_or_else(|| not_ready("no pipe"))?;
    let mut said = Vec::new();
    while !said.ends_with(READY) {
        let mut polled = [PollFd::new(&stdout, PollFlags::IN)];
        let ready = poll(&mut polled, Some(&READY_PATIENCE));
        if ready.map_err(|error| LaunchError::Blob(error.into()))? == 0 {
            return Err(not_ready("timed out"));
        }
        let mut piece = [0; READY.len()];
        let length = stdout.read(&mut piece).map_err(LaunchError::Blob)?;
        if length == 0 || said.len() > READY.len() {
            return Err(not_ready("ended"));
        }
        said.extend_from_slice(piece.get(..length).unwrap_or_default());
    }
    Ok(())
}

/// Makes sure that a proxy which did not start is gone, and adds how it ended to `error`.
fn end(mut child: Child, error: LaunchError) -> LaunchError {
    let killed = child.kill();
    match (child.wait(), error) {
        (Ok(status), LaunchError::NotReady { status: why }) => LaunchError::NotReady {
            status: format!("{why}, {status}"),
        },
        (Err(source), LaunchError::NotReady { .. }) if killed.is_err() => LaunchError::Blob(source),
        (_, error) => error,
    }
}
