//! Processes that outlived their tests. Called by the suite, before and after the tests; ends none.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// What processes of ours are called: VMs, and everything that is the program itself. The kernel
/// cuts names at 15 bytes.
const NAMES: [&str; 2] = ["qemu-system", "spore"];

/// Cgroups of the daemon that is installed on this machine, which may wake an app at any time.
const INSTALLED: [&str; 3] = [":/spore/", "/spore.slice/", "/spore.service"];

/// Our processes by pid, with their command lines.
pub(super) fn processes() -> BTreeMap<u32, String> {
    let Ok(entries) = fs::read_dir("/proc") else {
        return BTreeMap::new();
    };
    let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    pids.filter_map(|pid| Some((pid, ours(pid)?))).collect()
}

/// The command line of a process of ours; `None` for others and for what has ended.
fn ours(pid: u32) -> Option<String> {
    let folder = Path::new("/proc").join(pid.to_string());
    let read = |name: &str| fs::read(folder.join(name)).ok();
    let name = String::from_utf8(read("comm")?).ok()?;
    if !NAMES.iter().any(|ours| name.starts_with(ours)) {
        return None;
    }
    let cgroup = String::from_utf8(read("cgroup")?).ok()?;
    if INSTALLED.iter().any(|place| cgroup.contains(place)) {
        return None;
    }
    // What has ended and waits for its parent has no command line.
    let command = read("cmdline")?;
    let words: Vec<_> = command
        .split(|byte| *byte == 0)
        .map(String::from_utf8_lossy)
        .collect();
    let line = words.join(" ").trim().to_owned();
    (!line.is_empty()).then_some(line)
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};
    use std::time::Duration;

    use super::processes;

    #[test]
    fn a_process_with_our_name_is_found_while_it_runs() {
        let folder = tempfile::tempdir().unwrap();
        let program = folder.path().join("spore-left-over");
        std::os::unix::fs::symlink("/bin/sleep", &program).unwrap();
        let mut child = Command::new(&program)
            .arg("1000")
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        // A process has its new name a moment after whoever started it goes on.
        let found = (0..500).any(|_| {
            std::thread::sleep(Duration::from_millis(10));
            let line = processes().remove(&child.id());
            line.is_some_and(|line| line.ends_with("spore-left-over 1000"))
        });
        child.kill().unwrap();
        assert!(found);
        // Ended, and not yet collected.
        while processes().contains_key(&child.id()) {
            std::thread::yield_now();
        }
        child.wait().unwrap();
    }
}
