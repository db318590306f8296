//! Keeps each emulated processor of the rig on a processor of this machine. Where the kernel moves
//! them, it puts one that wakes beside the one that woke it, and both take turns of some
//! milliseconds while another processor idles. Called by `boot`.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::process::Pid;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// Looks for the processors of the QEMU whose number comes into a file, and keeps each where it is
/// to be; until they are found, or the boot is over. Does nothing where there are too few.
pub(super) fn keep(pid: &Path, cpus: u32, is_over: &AtomicBool) -> Result<()> {
    let ours = sched_getaffinity(None).context("cannot tell which processors are ours")?;
    let ours: Vec<usize> = (0..CpuSet::MAX_CPU)
        .filter(|number| ours.is_set(*number))
        .collect();
    let cpus = usize::try_from(cpus)?;
    if ours.len() < cpus {
        return Ok(());
    }
    while !is_over.load(Ordering::SeqCst) {
        let threads = threads(pid).unwrap_or_default();
        if threads.len() == cpus {
            for (number, thread) in threads.into_iter() {
                let place = ours.get(number).context("a processor too many")?;
                let mut only = CpuSet::new();
                only.set(*place);
                sched_setaffinity(Some(thread), &only)
                    .with_context(|| format!("cannot keep the rig's processor {number}"))?;
            }
            return Ok(());
        }
        thread::sleep(LOOK_AGAIN);
    }
    Ok(())
}

/// By the number of the processor. `None` while there is no such process.
fn threads(pid: &Path) -> Option<BTreeMap<usize, Pid>> {
    let pid: u32 = fs::read_to_string(pid).ok()?.trim().parse().ok()?;
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).ok()?;
    let found = tasks.filter_map(|task| {
        let task = task.ok()?;
        let name = fs::read_to_string(task.path().join("comm")).ok()?;
        let number = processor(name.trim_end())?;
        let thread = task.file_name().to_str()?.parse().ok()?;
        Some((number, Pid::from_raw(thread)?))
    });
    Some(found.collect())
}

/// Which processor's a thread of this name is, where QEMU names its threads.
fn processor(name: &str) -> Option<usize> {
    let (number, _accelerator) = name.strip_prefix("CPU ")?.split_once('/')?;
    number.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::processor;

    #[test]
    fn a_processors_thread_is_known_by_its_name() {
        assert_eq!(processor("CPU 0/TCG"), Some(0));
        assert_eq!(processor("CPU 11/KVM"), Some(11));
        for other in ["qemu-system-x86", "call_rcu", "CPU", "CPU x/TCG", "CPU 1"] {
            assert_eq!(processor(other), None, "{other}");
        }
    }
}
