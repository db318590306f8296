//! One daemon per folder: the lock that a second one runs into.
//!
//! Taken by the daemon and by `spore down` before either touches anything. The locks are the
//! kernel's (open file description locks, fcntl(2)), so a dead daemon holds none. There are two in
//! one file, since what a file says and who holds it change at different instants:
//!
//! ```text
//!   byte 0 locked             somebody is the daemon
//!   pid written, byte 1 locked    the pid in the file is that daemon's, not a dead one's
//! ```
//!
//! Asking takes no lock, so that whoever asks is never taken for a holder.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

const FILE: &str = "daemon.lock";

/// Locked by whoever is the daemon.
const HELD: i64 = 0;

/// Locked once the file has the holder's pid.
const NAMED: i64 = 1;

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
        let path = folder.join(FILE);
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .with_context(|| format!("cannot open {}", path.display()))?;
        match fcntl(&file, FcntlArg::F_OFD_SETLK(&exclusive(HELD)?)) {
            Ok(_) => {}
            Err(Errno::EAGAIN | Errno::EACCES) => {
                let pid = match holder(&mut file)? {
                    Holder::Process(Some(pid)) => format!(" (pid {pid})"),
                    _ => String::new(),
                };
                bail!(
                    "another Spore daemon{pid} already runs on {}: stop it with `spore down`, or \
                     give this one its own `runtime_dir`",
                    folder.display()
                );
            }
            Err(error) => {
                return Err(error).with_context(|| format!("cannot lock {}", path.display()));
            }
        }
        file.set_len(0).context("write the lock file")?;
        write!(file, "{}", std::process::id()).context("write the lock file")?;
        fcntl(&file, FcntlArg::F_OFD_SETLK(&exclusive(NAMED)?)).context("lock the lock file")?;
        Ok(Self { _file: file })
    }

    /// Who holds the lock of `folder` now.
    ///
    /// # Errors
    /// When the lock file cannot be read.
    pub(crate) fn holder(folder: &Path) -> Result<Holder> {
        let path = folder.join(FILE);
        match File::open(&path) {
            Ok(mut file) => holder(&mut file),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(Holder::Nobody),
            Err(error) => Err(error).with_context(|| format!("cannot open {}", path.display())),
        }
    }
}

fn holder(file: &mut File) -> Result<Holder> {
    if !is_locked(file, HELD)? {
        return Ok(Holder::Nobody);
    }
    if !is_locked(file, NAMED)? {
        return Ok(Holder::Process(None));
    }
    let mut text = String::new();
    file.take(16)
        .read_to_string(&mut text)
        .context("read the lock file")?;
    let pid = text.trim().parse().ok().filter(|pid| *pid > 1);
    // Whoever held it may have ended, and another begun, while the file was read.
    match is_locked(file, HELD)? {
        true => Ok(Holder::Process(pid)),
        false => Ok(Holder::Nobody),
    }
}

fn is_locked(file: &File, byte: i64) -> Result<bool> {
    let mut asked = exclusive(byte)?;
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut asked)).context("ask who holds the lock file")?;
    Ok(asked.l_type != short(libc::F_UNLCK)?)
}

/// An exclusive lock of one byte.
fn exclusive(byte: i64) -> Result<libc::flock> {
    Ok(libc::flock {
        l_type: short(libc::F_WRLCK)?,
        l_whence: short(libc::SEEK_SET)?,
        l_start: byte,
        l_len: 1,
        l_pid: 0,
    })
}

/// The kernel's structure has these as shorts, its constants are not.
fn short(constant: libc::c_int) -> Result<libc::c_short> {
    constant.try_into().context("a constant of fcntl(2)")
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;
    use std::io::Write as _;
    use std::sync::atomic::{AtomicBool, Ordering};

    use nix::fcntl::{FcntlArg, fcntl};

    use super::{DaemonLock, FILE, HELD, Holder, exclusive};

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

    #[test]
    fn the_pid_of_a_dead_daemon_is_nobodys() {
        let folder = tempfile::tempdir().unwrap();
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .open(folder.path().join(FILE))
            .unwrap();
        write!(file, "4242").unwrap();
        assert_eq!(DaemonLock::holder(folder.path()).unwrap(), Holder::Nobody);
        // As it is between a new daemon's lock and its pid.
        fcntl(&file, FcntlArg::F_OFD_SETLK(&exclusive(HELD).unwrap())).unwrap();
        assert_eq!(
            DaemonLock::holder(folder.path()).unwrap(),
            Holder::Process(None)
        );
    }

    #[test]
    fn who_asks_is_never_taken_for_a_holder() {
        let folder = tempfile::tempdir().unwrap();
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _asker in 0..2 {
                scope.spawn(|| {
                    while !done.load(Ordering::Relaxed) {
                        DaemonLock::holder(folder.path()).unwrap();
                    }
                });
            }
            let taken = (0..2_000).try_for_each(|_time| DaemonLock::take(folder.path()).map(drop));
            done.store(true, Ordering::Relaxed);
            taken.unwrap();
        });
    }
}
