//! Processes that outlived their tests. Called by the suite around the tests; ends none.
//!
//! What a run started stays below it: an orphan is handed to the run and not to the host's first
//! process. So nothing that another run, or an installed Spore, has on this machine is taken for
//! a leftover.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{Child, ExitStatus};

use anyhow::{Context as _, Result};
use rustix::process::{Pid, WaitOptions, getpid, set_child_subreaper, wait};

/// From now on orphans of this process's descendants become its children.
pub(super) fn keep_orphans() -> Result<()> {
    set_child_subreaper(Some(getpid())).context("cannot keep what tests leave running")
}

/// Waits for a child, and collects orphans that end meanwhile as the host's first process would.
pub(super) fn wait_for(child: &mut Child) -> Result<ExitStatus> {
    let awaited = Pid::from_child(child);
    loop {
        if let Some((pid, status)) = wait(WaitOptions::empty()).context("cannot wait for tests")?
            && pid == awaited
        {
            return Ok(ExitStatus::from_raw(status.as_raw()));
        }
    }
}

/// What runs below this process, however deep: pids with command lines.
pub(super) fn processes() -> Result<Vec<String>> {
    let mut parents = BTreeMap::new();
    for entry in fs::read_dir("/proc").context("cannot read /proc")? {
        let name = entry?.file_name();
        // A process may end while it is looked at.
        if let Some(pid) = name.to_str().and_then(|name| name.parse().ok())
            && let Some(parent) = parent_of(pid)
        {
            parents.insert(pid, parent);
        }
    }
    let run = std::process::id();
    let is_below = |pid: &&u32| {
        let above = |pid: &u32| parents.get(pid).copied();
        std::iter::successors(above(pid), above).any(|pid| pid == run)
    };
    Ok(parents
        .keys()
        .filter(is_below)
        .map(|pid| line(*pid))
        .collect())
}

/// The parent of a process that runs; `None` for one that has ended.
fn parent_of(pid: u32) -> Option<u32> {
    let stat = fs::read(Path::new("/proc").join(pid.to_string()).join("stat")).ok()?;
    let stat = String::from_utf8_lossy(&stat);
    // The name before the last bracket may have brackets and blanks of its own.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    let state = fields.next()?;
    (state != "Z" && state != "X").then(|| fields.next()?.parse().ok())?
}

fn line(pid: u32) -> String {
    let command = fs::read(Path::new("/proc").join(pid.to_string()).join("cmdline"));
    let command = command.unwrap_or_default();
    let words = command
        .split(|byte| *byte == 0)
        .map(String::from_utf8_lossy);
    format!("{pid} {}", words.collect::<Vec<_>>().join(" ").trim())
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use rustix::process::{Pid, Signal, kill_process};

    use super::{keep_orphans, processes, wait_for};

    /// Set for the process that plays a run of the suite.
    const RUN: &str = "XTASK_TEST_RUN";

    #[test]
    fn an_orphan_of_the_run_is_left_over_and_a_process_of_another_run_is_not() {
        if std::env::var_os(RUN).is_some() {
            be_the_run();
            return;
        }
        let mut foreign = Command::new("sleep").arg("1001").spawn().unwrap();
        let mut run = Command::new(std::env::current_exe().unwrap());
        let name = "an_orphan_of_the_run_is_left_over_and_a_process_of_another_run_is_not";
        let path = format!("suite::leftovers::tests::{name}");
        let run = run.args(["--exact", &path, "--nocapture"]).env(RUN, "1");
        let output = run.output();
        foreign.kill().unwrap();
        foreign.wait().unwrap();
        let output = output.unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{output:?}");
        assert!(said.contains("1 passed"), "{said}");
    }

    /// Runs a test that leaves a process behind.
    fn be_the_run() {
        keep_orphans().unwrap();
        assert_eq!(processes().unwrap(), [""; 0]);
        let leaving = "sleep 1000 >/dev/null 2>&1 & echo $!";
        let mut test = Command::new("sh");
        test.args(["-c", leaving]).stdout(Stdio::piped());
        let mut test = test.spawn().unwrap();
        let said = std::io::read_to_string(test.stdout.take().unwrap()).unwrap();
        assert!(wait_for(&mut test).unwrap().success());
        let left = format!("{} sleep 1000", said.trim());
        // The shell's child has its name a moment after the shell ends.
        while processes().unwrap() != [left.as_str()] {
            assert_eq!(processes().unwrap().len(), 1);
            std::thread::yield_now();
        }
        // Ended, and not yet collected.
        let pid = Pid::from_raw(said.trim().parse().unwrap()).unwrap();
        kill_process(pid, Signal::KILL).unwrap();
        while !processes().unwrap().is_empty() {
            std::thread::yield_now();
        }
        // Collected beside the child that is waited for.
        let mut child = Command::new("true").spawn().unwrap();
        assert!(wait_for(&mut child).unwrap().success());
    }
}
