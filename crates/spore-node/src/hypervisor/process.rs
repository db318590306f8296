//! Which process is which: identities that a pid alone does not give.
//!
//! Used by drivers whose VMMs are processes. A pid is checked behind a pidfd: first opened, then
//! compared, so that the descriptor is of the process that was compared. Never sends a signal.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::{AttachError, Identity};
use crate::cgroup::Cgroups;

/// The id of this run of the host's kernel.
///
/// # Errors
/// When /proc is not mounted.
pub fn host_boot_id() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?
        .trim()
        .to_owned())
}

/// When the process `pid` started, in clock ticks since the host's boot.
///
/// # Errors
/// When it is gone.
pub fn start_time(pid: u32) -> io::Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    parse_start_time(&stat).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// Field 22 of proc(5)'s stat. The second is the program's name in parentheses, which may itself
/// hold spaces and parentheses, so fields are counted from the last one.
fn parse_start_time(stat: &str) -> Option<u64> {
    let (_, after) = stat.rsplit_once(')')?;
    after.split_whitespace().nth(19)?.parse().ok()
}

/// The real uid in a `/proc/PID/status`; none of a process that has ended and only waits to be
/// waited for.
pub(super) fn uid_of(status: &str) -> Option<u32> {
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name));
    let ended = field("State:").is_some_and(|state| state.trim_start().starts_with(['Z', 'X']));
    let uid = field("Uid:")?.split_whitespace().next()?.parse().ok();
    uid.filter(|_uid| !ended)
}

/// Whether a process ends within a time. Blocks.
pub(super) fn has_ended(pidfd: &OwnedFd, within: Duration) -> bool {
    let limit = Timespec::try_from(within).ok();
    let mut watched = [PollFd::new(pidfd, PollFlags::IN)];
    poll(&mut watched, limit.as_ref()).is_ok_and(|count| count > 0)
}

/// The identity of the process `pid`, which is alive and in the cgroup called `cgroup`.
///
/// # Errors
/// When it is gone.
pub fn identity(pid: u32, cgroup: &str) -> io::Result<Identity> {
    Ok(Identity {
        host_boot_id: host_boot_id()?,
        pid,
        start_time: start_time(pid)?,
        cgroup: cgroup.to_owned(),
    })
}

/// Opens the process of `identity`.
///
/// # Errors
/// [`AttachError::AnotherBoot`] or [`AttachError::Gone`] when it is not the same any more.
pub fn open(identity: &Identity, cgroups: &Cgroups) -> Result<OwnedFd, AttachError> {
    let gone = || AttachError::Gone(identity.pid);
    let boot_id = host_boot_id().map_err(|source| AttachError::Silent {
        what: "/proc",
        source,
    })?;
    if boot_id != identity.host_boot_id {
        return Err(AttachError::AnotherBoot);
    }
    let raw = i32::try_from(identity.pid)
        .ok()
        .and_then(Pid::from_raw)
        .ok_or_else(gone)?;
    let pidfd = pidfd_open(raw, PidfdFlags::empty()).map_err(|_errno| gone())?;
    let same_start = start_time(identity.pid).is_ok_and(|time| time == identity.start_time);
    let cgroup = fs::read_to_string(format!("/proc/{}/cgroup", identity.pid));
    let same_cgroup = cgroup.is_ok_and(|text| cgroups.holds(&identity.cgroup, &text));
    if same_start && same_cgroup {
        Ok(pidfd)
    } else {
        Err(gone())
    }
}

#[cfg(test)]
mod tests {
    use super::{parse_start_time, start_time, uid_of};

    #[test]
    fn a_zombie_has_no_uid() {
        let status = |state: &str| format!("Name:\tspore\nState:\t{state}\nUid:\t7\t7\t7\t7\n");
        assert_eq!(uid_of(&status("S (sleeping)")), Some(7));
        assert_eq!(uid_of(&status("Z (zombie)")), None);
        assert_eq!(uid_of("Name:\tspore\n"), None);
    }

    #[test]
    fn a_start_time_is_found_behind_any_program_name() {
        let rest = "S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4242 20 21";
        for name in ["(qemu)", "(a b)", "(a) S 1 2 3 (b)", "())"] {
            assert_eq!(
                parse_start_time(&format!("77 {name} {rest}")),
                Some(4242),
                "{name}"
            );
        }
        assert_eq!(parse_start_time("77 (cut"), None);
    }

    #[test]
    fn this_process_has_a_start_time() {
        assert!(start_time(std::process::id()).unwrap() > 0);
    }
}
