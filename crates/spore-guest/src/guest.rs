//! The guest as the agent's parts share it: the tenant's root, how to start something in it, who
//! ended.
//!
//! Made by [`crate::init`] (or by a test, over a folder of its own), owned by [`crate::agent`].
//! Paths given here are the tenant's and never lead out of its root: the kernel resolves them
//! (openat2 with `RESOLVE_IN_ROOT`), symlinks included.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::path::PathBuf;

use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Uid, chownat, fstat, mkdirat, openat2,
};
use rustix::io::Errno;
use rustix::process::Pid;
use spore_wire::guest::{AgentError, AgentErrorCode, DEFAULT_UID};

use crate::cgroup::{Group, Groups};
use crate::launch::{DEFAULT_PATH, Launch, LaunchError, Launcher, launch};
use crate::reap::Reaper;
use crate::user::{DEFAULT_HOME, DEFAULT_NAME, Identity};

/// The most bytes of the image's user and group files that are read.
const USER_FILE_BYTES_MAX: u64 = 1024 * 1024;

/// What the parts of the agent share.
#[derive(Debug)]
pub struct Guest {
    /// The tenant's root folder.
    pub root: OwnedFd,
    /// How its processes are started.
    pub launcher: Launcher,
    /// How they are bounded.
    pub groups: Groups,
    /// How their ends are seen.
    pub reaper: Reaper,
    /// The address at which the host reaches the app.
    pub address: Ipv4Addr,
    /// Where the second face listens; `None` where there is no tenant to talk to.
    pub face: Option<PathBuf>,
    /// Groups whose stream is over but whose folder is still there.
    pub leftovers: Vec<Group>,
}

/// An environment, as a program gets it.
pub type Environment = BTreeMap<OsString, OsString>;

impl Guest {
    /// Opens a path of the tenant.
    ///
    /// # Errors
    /// `NotFound` or `Refused`, with the path.
    pub fn open(&self, path: &str, flags: OFlags) -> Result<OwnedFd, AgentError> {
        if !path.starts_with('/') || path.contains('\0') {
            return Err(AgentError {
                code: AgentErrorCode::Invalid,
                message: format!("path `{path}` is not absolute: begin it with `/`"),
            });
        }
        self.open_raw(path, flags)
            .map_err(|errno| path_error(path, errno))
    }

    fn open_raw(&self, path: &str, flags: OFlags) -> rustix::io::Result<OwnedFd> {
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        // openat2 refuses what open ignores: a path descriptor with a flag about terminals.
        let more = match flags.contains(OFlags::PATH) {
            true => OFlags::CLOEXEC,
            false => OFlags::CLOEXEC | OFlags::NOCTTY,
        };
        let flags = flags | more;
        openat2(&self.root, path, flags, Mode::empty(), resolve)
    }

    /// Opens a plain file of the tenant for reading; never waits for a fifo's other end.
    ///
    /// # Errors
    /// `NotFound`, `Refused`, or `Invalid` for what is no plain file.
    pub fn open_file(&self, path: &str) -> Result<File, AgentError> {
        let file = self.open(path, OFlags::RDONLY | OFlags::NONBLOCK)?;
        let stat = fstat(&file).map_err(|errno| path_error(path, errno))?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(AgentError {
                code: AgentErrorCode::Invalid,
                message: format!("`{path}` is not a plain file"),
            });
        }
        Ok(File::from(file))
    }

    /// Finds who `user` is in the image.
    ///
    /// # Errors
    /// `NotFound` with the name.
    pub fn identity(&self, user: Option<&str>) -> Result<Identity, AgentError> {
        let text = |path| {
            let mut text = Vec::new();
            if let Ok(file) = self.open_file(path)
                && file
                    .take(USER_FILE_BYTES_MAX)
                    .read_to_end(&mut text)
                    .is_err()
            {
                text.clear();
            }
            String::from_utf8_lossy(&text).into_owned()
        };
        Identity::resolve(user, &text("/etc/passwd"), &text("/etc/group")).map_err(|error| {
            AgentError {
                code: AgentErrorCode::NotFound,
                message: error.to_string(),
            }
        })
    }

    /// Gives the default user a home and a name, when the image has neither.
    ///
    /// # Errors
    /// `Refused` when the tenant's disk refuses.
    pub fn settle(&self, identity: &Identity) -> Result<(), AgentError> {
        if identity.uid != DEFAULT_UID || identity.known_as.is_some() {
            return Ok(());
        }
        let made = |result: rustix::io::Result<()>| match result {
            Ok(()) | Err(Errno::EXIST) => Ok(()),
            Err(errno) => Err(path_error(DEFAULT_HOME, errno)),
        };
        made(mkdirat(&self.root, "home", Mode::from_raw_mode(0o755)))?;
        let parent = self.open("/home", OFlags::PATH | OFlags::DIRECTORY)?;
        let name = DEFAULT_HOME.trim_start_matches("/home/");
        made(mkdirat(&parent, name, Mode::from_raw_mode(0o700)))?;
        let (uid, gid) = (Uid::from_raw(identity.uid), Gid::from_raw(identity.gid));
        chownat(
            &parent,
            name,
            Some(uid),
            Some(gid),
            AtFlags::SYMLINK_NOFOLLOW,
        )
        .map_err(|errno| path_error(DEFAULT_HOME, errno))?;
        let line = format!(
            "{DEFAULT_NAME}:x:{}:{}::{DEFAULT_HOME}:/bin/sh\n",
            identity.uid, identity.gid
        );
        // An image without a user file has no program that would read it.
        match self.open_raw(
            "/etc/passwd",
            OFlags::WRONLY | OFlags::APPEND | OFlags::NONBLOCK,
        ) {
            Ok(file) => File::from(file)
                .write_all(line.as_bytes())
                .map_err(|error| refused("add the user to /etc/passwd", &error)),
            Err(_none) => Ok(()),
        }
    }

    /// Starts a program in the tenant's view, in `group`.
    ///
    /// # Errors
    /// As the agent is to answer them.
    pub fn start(&mut self, group: &mut Group, what: Launch<'_>) -> Result<Pid, AgentError> {
        match launch(&self.launcher, what) {
            Ok(pid) => {
                group.started(pid);
                self.reaper
                    .expect(pid)
                    .map_err(|error| refused("watch the process", &error))?;
                Ok(pid)
            }
            Err(LaunchError::Told { code, message, pid }) => {
                group.started(pid);
                let killed = group.kill();
                self.reaper
                    .expect(pid)
                    .and(killed)
                    .map_err(|error| refused("clean up behind the process", &error))?;
                Err(AgentError { code, message })
            }
            Err(error @ LaunchError::Empty) => Err(AgentError {
                code: AgentErrorCode::Invalid,
                message: error.to_string(),
            }),
            Err(LaunchError::Spawn(error)) => Err(refused("spawn a process", &error)),
        }
    }

    /// Kills a group and takes its folder away as soon as it is empty.
    ///
    /// # Errors
    /// Whatever the kernel answers to the kill; the folder is still taken care of.
    pub fn discard(&mut self, group: Group) -> io::Result<()> {
        let killed = group.kill();
        self.leftovers.push(group);
        self.sweep();
        killed
    }

    /// Takes away the folders of groups that have become empty.
    pub fn sweep(&mut self) {
        self.leftovers.retain(|group| !group.remove());
    }
}

/// The environment of a program of `identity`, before anybody's wishes.
#[must_use]
pub fn base_environment(identity: &Identity) -> Environment {
    let mut environment = Environment::new();
    environment.insert("PATH".into(), DEFAULT_PATH.into());
    environment.insert("HOME".into(), identity.home.clone().into());
    environment
}

/// Adds a variable.
///
/// # Errors
/// As of [`check_variable`].
pub fn set(environment: &mut Environment, name: &str, value: &[u8]) -> Result<(), AgentError> {
    check_variable(name, value)?;
    environment.insert(name.into(), OsStr::from_bytes(value).to_owned());
    Ok(())
}

/// Whether a program can be given this variable.
///
/// # Errors
/// `Invalid` for a name or value that cannot be one; the value is not quoted.
pub fn check_variable(name: &str, value: &[u8]) -> Result<(), AgentError> {
    if name.is_empty() || name.contains(['=', '\0']) || value.contains(&0) {
        return Err(AgentError {
            code: AgentErrorCode::Invalid,
            message: format!("variable `{name}`: a name has no `=`, and neither has a zero byte"),
        });
    }
    Ok(())
}

/// An error of the kernel, for the host.
#[must_use]
pub fn refused(what: &str, error: &io::Error) -> AgentError {
    AgentError {
        code: AgentErrorCode::Refused,
        message: format!("cannot {what}: {error}"),
    }
}

/// An error of the kernel about a path, for the host.
#[must_use]
pub fn path_error(path: &str, errno: Errno) -> AgentError {
    let code = match errno {
        Errno::NOENT | Errno::NOTDIR => AgentErrorCode::NotFound,
        _ => AgentErrorCode::Refused,
    };
    AgentError {
        code,
        message: format!("`{path}`: {}", io::Error::from(errno)),
    }
}
