//! Starts a tenant's process: in its cgroup, session, mount namespace and identity.
//!
//! [`launch`] is called by [`crate::runner`] and [`crate::exec`]; [`become_tenant`] is the other
//! half, called by `main` in the process that [`launch`] spawns.
//!
//! Between fork and exec of a threaded process next to nothing is allowed, so nothing is done
//! there: the agent spawns its own binary once more with the environment of the program to come,
//! and that fresh single-threaded process turns itself into it step by step. It says what went
//! wrong through a pipe that a successful exec closes.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::Mode;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Gid, Pid, Resource, Rlimit, Uid, setrlimit, setsid, umask};
use rustix::thread::{
    CapabilitySet, LinkNameSpaceType, move_into_link_name_space,
    remove_capability_from_bounding_set, set_thread_groups, set_thread_res_gid, set_thread_res_uid,
};
use serde::{Deserialize, Serialize};
use spore_wire::guest::AgentErrorCode;
use spore_wire::secret::SecretBytes;
use thiserror::Error;

use crate::{clock, sys};

/// The first argument of the process in between.
pub const VERB: &str = "become-tenant";

/// Where a tenant's programs are looked up unless its environment says otherwise.
pub const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// How long the process in between may take; it touches the tenant's disk.
const LAUNCH_MS_MAX: u64 = 10_000;

/// The most bytes that it may say.
const FAILURE_BYTES_MAX: u64 = 4096;

const OPEN_FILES_SOFT: u64 = 16_384;
const OPEN_FILES_HARD: u64 = 524_288;

/// What root in a tenant's process may do: enough to install packages and run servers, not enough
/// to reach the agent (no `SYS_PTRACE`), its port (no `MKNOD`), its namespace (no `SYS_ADMIN`), the
/// modules or the power.
const KEPT: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::NET_RAW)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::SETFCAP)
    .union(CapabilitySet::SETPCAP)
    .union(CapabilitySet::NET_BIND_SERVICE)
    .union(CapabilitySet::SYS_CHROOT)
    .union(CapabilitySet::KILL)
    .union(CapabilitySet::AUDIT_WRITE);

/// What every launch needs to know about the guest.
#[derive(Debug)]
pub struct Launcher {
    /// The agent's own binary.
    pub program: PathBuf,
    /// The tenant's mount namespace; `None` is the agent's own.
    pub namespace: Option<OwnedFd>,
}

/// What is to be started, by whom and where.
#[derive(Debug)]
pub struct Launch<'a> {
    /// Program and arguments.
    pub argv: &'a [String],
    /// The whole environment but for the secrets in it.
    pub environment: &'a BTreeMap<OsString, OsString>,
    /// The secrets in it, which win.
    pub secrets: &'a [(String, SecretBytes)],
    /// The working directory, as the tenant sees it.
    pub directory: &'a str,
    /// The user, its group and its further groups.
    pub uid: u32,
    /// See `uid`.
    pub gid: u32,
    /// See `uid`.
    pub groups: &'a [u32],
    /// The file to join a cgroup by.
    pub procs: Option<PathBuf>,
    /// Standard input, output and error.
    pub stdio: Stdios,
}

/// Standard input, output and error.
#[derive(Debug)]
pub enum Stdios {
    /// Each its own.
    Pipes {
        /// Standard input; `None` is `/dev/null`.
        stdin: Option<OwnedFd>,
        /// Standard output.
        stdout: OwnedFd,
        /// Standard error.
        stderr: OwnedFd,
    },
    /// A terminal, which becomes the controlling one.
    Terminal(OwnedFd),
}

/// Why nothing was started.
#[derive(Debug, Error)]
pub enum LaunchError {
    /// The agent's side failed.
    #[error("cannot spawn a process")]
    Spawn(#[source] io::Error),
    /// There is no program.
    #[error("the command is empty: name a program")]
    Empty,
    /// The process in between said so.
    #[error("{message}")]
    Told {
        /// What it was about.
        code: AgentErrorCode,
        /// For people.
        message: String,
        /// It ends by itself.
        pid: Pid,
    },
}

#[derive(Debug, Serialize, Deserialize)]
struct Steps {
    status: RawFd,
    namespace: Option<RawFd>,
    procs: Option<PathBuf>,
    terminal: bool,
    directory: String,
    uid: u32,
    gid: u32,
    groups: Vec<u32>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Told {
    code: AgentErrorCode,
    message: String,
}

/// Starts it and returns once its program runs.
///
/// # Errors
/// [`LaunchError`]; `Told` names a child that has yet to be collected.
pub fn launch(launcher: &Launcher, what: Launch<'_>) -> Result<Pid, LaunchError> {
    if what.argv.first().is_none_or(String::is_empty) {
        return Err(LaunchError::Empty);
    }
    let (status, status_theirs) =
        pipe_with(PipeFlags::CLOEXEC).map_err(|errno| LaunchError::Spawn(errno.into()))?;
    let steps = Steps {
        status: status_theirs.as_raw_fd(),
        namespace: launcher.namespace.as_ref().map(|fd| fd.as_raw_fd()),
        procs: what.procs,
        terminal: matches!(what.stdio, Stdios::Terminal(_)),
        directory: what.directory.to_owned(),
        uid: what.uid,
        gid: what.gid,
        groups: what.groups.to_vec(),
    };
    let steps = serde_json::to_string(&steps)
        .map_err(|error| LaunchError::Spawn(io::Error::from(error)))?;
    let mut command = Command::new(&launcher.program);
    command.arg(VERB).arg(steps).args(what.argv);
    command.env_clear().envs(what.environment);
    for (name, value) in what.secrets {
        command.env(name, OsStr::from_bytes(value.expose()));
    }
    match what.stdio {
        Stdios::Pipes {
            stdin,
            stdout,
            stderr,
        } => {
            command.stdin(stdin.map_or_else(Stdio::null, Stdio::from));
            command.stdout(stdout).stderr(stderr);
        }
        Stdios::Terminal(terminal) => {
            let copies = terminal
                .try_clone()
                .and_then(|a| Ok((a, terminal.try_clone()?)));
            let (stdin, stdout) = copies.map_err(LaunchError::Spawn)?;
            command.stdin(stdin).stdout(stdout).stderr(terminal);
        }
    }
    let mut kept = vec![status_theirs.as_fd()];
    kept.extend(launcher.namespace.as_ref().map(OwnedFd::as_fd));
    sys::inherit(&mut command, &kept);
    let child = command.spawn().map_err(LaunchError::Spawn)?;
    drop(status_theirs);
    let pid = i32::try_from(child.id())
        .ok()
        .and_then(Pid::from_raw)
        .ok_or_else(|| LaunchError::Spawn(io::Error::from_raw_os_error(libc::ESRCH)))?;
    match heard(status) {
        None => Ok(pid),
        Some(Told { code, message }) => Err(LaunchError::Told { code, message, pid }),
    }
}

/// Waits for the exec or for what hindered it.
fn heard(status: OwnedFd) -> Option<Told> {
    let timeout = clock::timeout(LAUNCH_MS_MAX);
    let mut fds = [PollFd::new(&status, PollFlags::IN)];
    let refused = |message: &str| Told {
        code: AgentErrorCode::Refused,
        message: message.to_owned(),
    };
    loop {
        match poll(&mut fds, Some(&timeout)) {
            Err(rustix::io::Errno::INTR) => {}
            Ok(0) => {
                return Some(refused(
                    "the program did not start within 10 s: is the disk stuck?",
                ));
            }
            Err(errno) => return Some(refused(&format!("cannot wait for the program: {errno}"))),
            Ok(_) => break,
        }
    }
    let mut text = Vec::new();
    let read = fs::File::from(status)
        .take(FAILURE_BYTES_MAX)
        .read_to_end(&mut text);
    match read {
        Ok(0) => None,
        Ok(_) => Some(
            serde_json::from_slice(&text)
                .unwrap_or_else(|_malformed| refused("the program did not start")),
        ),
        Err(error) => Some(refused(&format!(
            "cannot learn whether the program runs: {error}"
        ))),
    }
}

/// The process in between: does the steps and becomes the program. Returns only when that failed,
/// with the code to exit with.
#[must_use]
pub fn become_tenant(arguments: &[OsString]) -> u8 {
    let Some((steps, argv)) = arguments.split_first() else {
        return 126;
    };
    let Some((program, arguments)) = argv.split_first() else {
        return 126;
    };
    let Some(Ok(steps)) = steps.to_str().map(serde_json::from_str::<Steps>) else {
        return 126;
    };
    let Ok(status) = sys::take_inherited(steps.status) else {
        return 126;
    };
    let told = match prepare(&steps) {
        Err(told) => told,
        Ok(()) => {
            let error = Command::new(program).args(arguments).exec();
            not_run(Path::new(program), &error)
        }
    };
    let mut status = fs::File::from(status);
    let text = serde_json::to_vec(&told).unwrap_or_default();
    // The agent may have given up waiting; then there is nobody left to tell.
    match status.write_all(&text) {
        Ok(()) | Err(_) => 127,
    }
}

fn prepare(steps: &Steps) -> Result<(), Told> {
    let refused = |what: &str, error: io::Error| Told {
        code: AgentErrorCode::Refused,
        message: format!("cannot {what}: {error}"),
    };
    if let Some(procs) = &steps.procs {
        fs::write(procs, "0").map_err(|error| refused("join the cgroup", error))?;
    }
    setsid().map_err(|errno| refused("begin a session", errno.into()))?;
    if steps.terminal {
        rustix::process::ioctl_tiocsctty(io::stdin())
            .map_err(|errno| refused("take the terminal", errno.into()))?;
    }
    if let Some(number) = steps.namespace {
        let namespace =
            sys::take_inherited(number).map_err(|error| refused("enter the app's view", error))?;
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Mount))
            .map_err(|errno| refused("enter the app's view", errno.into()))?;
    }
    bound().map_err(|errno| refused("bound the process", errno.into()))?;
    become_user(steps).map_err(|errno| refused("become the user", errno.into()))?;
    umask(Mode::from_raw_mode(0o022));
    rustix::process::chdir(steps.directory.as_str()).map_err(|errno| Told {
        code: AgentErrorCode::NotFound,
        message: format!(
            "cannot work in `{}`: {}: name a folder that the user may enter",
            steps.directory,
            io::Error::from(errno)
        ),
    })
}

fn bound() -> rustix::io::Result<()> {
    let core = Rlimit {
        current: Some(0),
        maximum: None,
    };
    setrlimit(Resource::Core, core)?;
    let files = Rlimit {
        current: Some(OPEN_FILES_SOFT),
        maximum: Some(OPEN_FILES_HARD),
    };
    // The kernel's own count is per user: an app at that limit would lock its owner's exec out.
    // Processes are bounded by their group.
    let processes = Rlimit {
        current: None,
        maximum: None,
    };
    for (resource, limit) in [(Resource::Nofile, files), (Resource::Nproc, processes)] {
        // Only a privileged process may raise a hard limit; without the right the old one stays.
        match setrlimit(resource, limit) {
            Ok(()) | Err(rustix::io::Errno::PERM) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

fn become_user(steps: &Steps) -> rustix::io::Result<()> {
    // An unprivileged agent (a test of the session loop) can only start what it is itself.
    if !rustix::process::geteuid().is_root() {
        return Ok(());
    }
    for bit in 0..64 {
        let capability = CapabilitySet::from_bits_retain(1 << bit);
        if KEPT.contains(capability) {
            continue;
        }
        match remove_capability_from_bounding_set(capability) {
            // A number that this kernel does not know.
            Ok(()) | Err(rustix::io::Errno::INVAL) => {}
            Err(errno) => return Err(errno),
        }
    }
    let groups: Vec<Gid> = steps.groups.iter().map(|gid| Gid::from_raw(*gid)).collect();
    set_thread_groups(&groups)?;
    let gid = Gid::from_raw(steps.gid);
    set_thread_res_gid(gid, gid, gid)?;
    let uid = Uid::from_raw(steps.uid);
    set_thread_res_uid(uid, uid, uid)
}

fn not_run(program: &Path, error: &io::Error) -> Told {
    let program = program.display();
    match error.kind() {
        io::ErrorKind::NotFound => Told {
            code: AgentErrorCode::NotFound,
            message: format!(
                "program `{program}` is not in the image (or its interpreter is not): give its \
                 path or add its folder to PATH"
            ),
        },
        io::ErrorKind::PermissionDenied => Told {
            code: AgentErrorCode::Refused,
            message: format!("the user may not execute `{program}`: is its x bit set?"),
        },
        _ => Told {
            code: AgentErrorCode::Refused,
            message: format!("cannot execute `{program}`: {error}"),
        },
    }
}
