//! What a platform left on the host, read as an operator would: processes, mounts, namespaces,
//! cgroups, files.

use std::path::Path;

use anyhow::Result;

/// Everything that still bears the marks of the platform in `home` with uids from `uid_first` on
/// and the cgroup `cgroup`; empty when it left nothing.
///
/// # Errors
/// When `/proc` or `/sys` cannot be read.
pub fn of(home: &Path, uid_first: u32, uid_count: u32, cgroup: &str) -> Result<Vec<String>> {
    let mut left = processes(home, uid_first, uid_count)?;
    left.extend(mounts(home)?);
    left.extend(cgroups(Path::new("/sys/fs/cgroup"), cgroup, 0)?);
    for folder in [
        "run/host/vms",
        "run/host/netns",
        "run/host/uids",
        "run/node/vms",
        "data/scratch",
    ] {
        let Ok(entries) = std::fs::read_dir(home.join(folder)) else {
            continue;
        };
        for entry in entries {
            let path = entry?.path();
            // Empty scratch disks are kept for all; no guest has written to one.
            if !path.to_string_lossy().contains("/scratch/empty-") {
                left.push(format!("file {}", path.display()));
            }
        }
    }
    Ok(left)
}

/// Processes that run as one of the platform's uids or have its folder in their command line.
///
/// # Errors
/// When `/proc` cannot be read.
pub fn processes(home: &Path, uid_first: u32, uid_count: u32) -> Result<Vec<String>> {
    let home = home.to_string_lossy().into_owned();
    let mut left = Vec::new();
    for entry in std::fs::read_dir("/proc")? {
        let entry = entry?;
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse::<u32>().ok())
        else {
            continue;
        };
        // A process may end while it is looked at.
        let Ok(status) = std::fs::read_to_string(entry.path().join("status")) else {
            continue;
        };
        // A zombie is its parent's, and after a daemon's end that is the host's first process.
        if status.lines().any(|line| line.starts_with("State:\tZ")) {
            continue;
        }
        let command = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let command = String::from_utf8_lossy(&command).replace('\0', " ");
        let uid = status.lines().find_map(|line| line.strip_prefix("Uid:"));
        let uid = uid.and_then(|uids| uids.split_whitespace().next()?.parse::<u32>().ok());
        let ours = uid.is_some_and(|uid| (uid_first..uid_first + uid_count).contains(&uid));
        if (ours || command.contains(&home)) && pid != std::process::id() {
            let name = status.lines().next().unwrap_or_default().to_owned();
            left.push(format!("process {pid} {name} {command}"));
        }
    }
    Ok(left)
}

fn mounts(home: &Path) -> Result<Vec<String>> {
    let table = std::fs::read_to_string("/proc/self/mountinfo")?;
    let home = home.to_string_lossy();
    let ours = table.lines().filter(|line| line.contains(home.as_ref()));
    Ok(ours.map(|line| format!("mount {line}")).collect())
}

/// The platform's own cgroups, at most three levels down in any hierarchy.
fn cgroups(folder: &Path, name: &str, depth: u8) -> Result<Vec<String>> {
    let mut left = Vec::new();
    let Ok(entries) = std::fs::read_dir(folder) else {
        return Ok(left);
    };
    for entry in entries {
        let entry = entry?;
        if !entry.file_type()?.is_dir() {
            continue;
        }
        if entry.file_name().to_string_lossy() == name {
            left.push(format!("cgroup {}", entry.path().display()));
        } else if depth < 2 {
            left.extend(cgroups(&entry.path(), name, depth + 1)?);
        }
    }
    Ok(left)
}
