//! One daemon per folder: the lock that a second one runs into.
//!
//! Taken by the daemon and by `spore down` before either touches anything. The lock is the kernel's
//! (flock(2)), so a dead daemon holds none; the file only says whose it was, for people.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use anyhow::{Context, Result, bail};
use rustix::fs::{FlockOperation, flock};

/// Held as long as the value lives.
#[derive(Debug)]
pub(crate) struct DaemonLock {
    _file: File,
}

/// Who holds the lock, if anybody.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Holder {
    /// Nobody: no daemon runs here.
    Nobody,
    /// A process; `None` when it has not written its pid yet.
    Process(Option<i32>),
}

impl DaemonLock {
    /// Takes the lock of `folder`.
    ///
    /// # Errors
    /// When another process has it, naming that process and what to do.
    pub(crate) fn take(folder: &Path) -> Result<Self> {
        let mut file = open(folder)?;
        if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            let holder =
                read_pid(&mut file).map_or_else(String::new, |pid| format!(" (pid {pid})"));
            bail!(
                "another Spore daemon{holder} already runs on {}: stop it with `spore down`, or \
                 give this one its own runtime folder",
                folder.display()
            );
        }
        file.set_len(0).context("write the lock file")?;
        write!(file, "{}", std::process::id()).context("write the lock file")?;
        Ok(Self { _file: file })
    }

    /// Who holds the lock of `folder` now.
    ///
    /// # Errors
    /// When the lock file cannot be opened.
    pub(crate) fn holder(folder: &Path) -> Result<Holder> {
        if !folder.join(FILE).exists() {
            return Ok(Holder::Nobody);
        }
        let mut file = open(folder)?;
        if flock(&file, FlockOperation::NonBlockingLockShared).is_ok() {
            return Ok(Holder::Nobody);
        }
        Ok(Holder::Process(read_pid(&mut file)))
    }
}

const FILE: &str = "daemon.lock";

fn open(folder: &Path) -> Result<File> {
    let path = folder.join(FILE);
    let mut options = OpenOptions::new();
    options
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600);
    options
        .open(&path)
        .with_context(|| format!("cannot open {}", path.display()))
}

fn read_pid(file: &mut File) -> Option<i32> {
    let mut text = String::new();
    file.seek(SeekFrom::Start(0)).ok()?;
    file.take(16).read_to_string(&mut text).ok()?;
    text.trim().parse().ok().filter(|pid| *pid > 1)
}

#[cfg(test)]
mod tests {
    use super::{DaemonLock, Holder};

    #[test]
    fn a_second_daemon_is_told_who_was_first() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(DaemonLock::holder(folder.path()).unwrap(), Holder::Nobody);
        let first = DaemonLock::take(folder.path()).unwrap();
        let refused = DaemonLock::take(folder.path()).unwrap_err().to_string();
        assert!(
            refused.contains(&format!("pid {}", std::process::id())),
            "{refused}"
        );
        let pid = i32::try_from(std::process::id()).unwrap();
        assert_eq!(
            DaemonLock::holder(folder.path()).unwrap(),
            Holder::Process(Some(pid))
        );
        drop(first);
        assert_eq!(DaemonLock::holder(folder.path()).unwrap(), Holder::Nobody);
        drop(DaemonLock::take(folder.path()).unwrap());
    }
}
