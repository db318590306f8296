//! VMMs that are nobody's: of a daemon that died between making one and giving it to a VM, when it
//! is in no VM's cgroup yet.
//!
//! Used by the driver's broom and by whoever waits until a uid is free. A VMM is known by its uid,
//! which is one of the node's own, and by its program: neither can be changed from within its jail,
//! and no other program is ended where an installation was given uids that are not its own.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::thread;
use std::time::Duration;

use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::cgroup::kill_process;
use crate::hypervisor::process::{has_ended, uid_of};

/// How long processes that are killed are waited for.
const ENDING: Duration = Duration::from_secs(5);

/// How often it is looked whether a uid is free.
const STEP: Duration = Duration::from_millis(5);

/// What the kernel says behind the path of a program that was replaced or removed.
const DELETED: &[u8] = b" (deleted)";

/// A process with one of the node's uids.
#[derive(Debug)]
struct Stray {
    pid: u32,
    uid: u32,
    pidfd: OwnedFd,
}

/// Ends the processes of `program` that have one of `uids` and none of those in use; says which.
/// Blocks.
///
/// # Errors
/// When one cannot be found out about, or does not end.
pub(super) fn end(
    program: &Path,
    uids: Range<u32>,
    in_use: &BTreeSet<u32>,
) -> io::Result<Vec<String>> {
    let name = program.file_name().unwrap_or_default();
    let is_stray = |uid: u32| uids.contains(&uid) && !in_use.contains(&uid);
    let mut strays = with_uid(is_stray)?;
    strays.retain(|stray| is_of(stray.pid, name));
    for stray in &strays {
        kill_process(&stray.pidfd)?;
    }
    for Stray { pid, pidfd, .. } in &strays {
        if !has_ended(pidfd, ENDING) {
            let text = format!("process {pid}, a VMM of nobody's, does not end");
            return Err(io::Error::new(io::ErrorKind::TimedOut, text));
        }
    }
    let told = |Stray { pid, uid, .. }: Stray| format!("VMM {pid} of uid {uid}");
    Ok(strays.into_iter().map(told).collect())
}

/// Whether no process has this uid, or none has any more within a time. Blocks.
pub(super) fn is_free(uid: u32, within: Duration) -> bool {
    let mut waited = Duration::ZERO;
    while !with_uid(|other| other == uid).is_ok_and(|found| found.is_empty()) {
        if waited >= within {
            return false;
        }
        thread::sleep(STEP);
        waited += STEP;
    }
    true
}

/// The processes whose uid is wanted. Each is opened first and looked at then, so that a number
/// that is given anew meanwhile ends nobody else.
fn with_uid(is_wanted: impl Fn(u32) -> bool) -> io::Result<Vec<Stray>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let pid = name.to_str().and_then(|name| name.parse().ok());
        let Some(pid) = pid.and_then(Pid::from_raw) else {
            continue;
        };
        let pidfd = match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(pidfd) => pidfd,
            // It ended meanwhile.
            Err(Errno::SRCH) => continue,
            Err(error) => return Err(error.into()),
        };
        let pid = pid.as_raw_nonzero().get().unsigned_abs();
        let status = fs::read_to_string(format!("/proc/{pid}/status"));
        let uid = status.ok().as_deref().and_then(uid_of);
        if let Some(uid) = uid.filter(|uid| is_wanted(*uid)) {
            found.push(Stray { pid, uid, pidfd });
        }
    }
    Ok(found)
}

/// Whether a process runs a program of this name.
fn is_of(pid: u32, name: &OsStr) -> bool {
    let Ok(path) = fs::read_link(format!("/proc/{pid}/exe")) else {
        return false;
    };
    let path = path.as_os_str().as_bytes();
    let path = path.strip_suffix(DELETED).unwrap_or(path);
    Path::new(OsStr::from_bytes(path)).file_name() == Some(name)
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::CommandExt as _;
    use std::process::{Child, Command};

    use super::*;

    /// Uids that no other test and no installation uses.
    const UIDS: Range<u32> = 1_730_100_000..1_730_100_003;

    /// A process that sleeps, with a uid.
    fn sleeper(program: &Path, uid: u32) -> Child {
        let mut command = Command::new(program);
        command.arg("600").uid(uid).gid(uid).current_dir("/");
        command.spawn().unwrap()
    }

    fn is_alive(child: &mut Child) -> bool {
        child.try_wait().unwrap().is_none()
    }

    #[test]
    fn what_is_in_use_or_another_program_is_let_be() {
        if !rustix::process::getuid().is_root() {
            return println!("SKIPPED: not root");
        }
        let folder = tempfile::tempdir().unwrap();
        let program = folder.path().join("spore-vmm");
        fs::copy("/bin/sleep", &program).unwrap();
        let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        fs::set_permissions(folder.path(), open).unwrap();
        let [used, stray, beyond] = [UIDS.start, UIDS.start + 1, UIDS.end];
        let mut children = [
            sleeper(&program, used),
            sleeper(&program, stray),
            sleeper(Path::new("/bin/sleep"), stray),
            sleeper(&program, beyond),
        ];
        // A newer one was installed.
        fs::remove_file(&program).unwrap();
        assert!(!is_free(stray, Duration::from_millis(20)));
        let ended = end(&program, UIDS, &BTreeSet::from([used])).unwrap();
        let expected = format!("VMM {} of uid {stray}", children[1].id());
        assert_eq!(ended, [expected]);
        let alive: Vec<_> = children.iter_mut().map(is_alive).collect();
        assert_eq!(alive, [true, false, true, true]);
        for child in &mut children {
            child.kill().unwrap();
            child.wait().unwrap();
        }
        assert!(is_free(stray, ENDING));
        assert_eq!(end(&program, UIDS, &BTreeSet::new()).unwrap(), [""; 0]);
    }
}
