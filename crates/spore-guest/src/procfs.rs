//! The few numbers that the agent takes from `/proc`.
//!
//! Called for a status and once at boot.

use std::fs;

/// A value of `/proc/meminfo`, in KiB.
#[must_use]
pub fn memory_kib(name: &str) -> Option<u64> {
    value(&fs::read_to_string("/proc/meminfo").ok()?, name)
}

/// The processes and threads that the kernel has room for.
#[must_use]
pub fn threads_max() -> Option<u64> {
    let text = fs::read_to_string("/proc/sys/kernel/threads-max").ok()?;
    text.trim().parse().ok()
}

/// The processes with a command line, the caller aside: kernel threads and zombies have none.
#[must_use]
pub fn processes() -> u32 {
    let Ok(entries) = fs::read_dir("/proc") else {
        return 0;
    };
    let own = std::process::id();
    let others = entries.filter_map(Result::ok).filter(|entry| {
        let pid: Option<u32> = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok());
        pid.is_some_and(|pid| pid != own)
            && fs::read(entry.path().join("cmdline")).is_ok_and(|line| !line.is_empty())
    });
    u32::try_from(others.count()).unwrap_or(u32::MAX)
}

fn value(meminfo: &str, name: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    line.trim().trim_end_matches("kB").trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::value;

    #[test]
    fn a_value_is_found_by_its_whole_name() {
        let text = "MemTotal:         245504 kB\nMemFree:  1 kB\nMemAvailable:   180000 kB\n";
        assert_eq!(value(text, "MemTotal"), Some(245_504));
        assert_eq!(value(text, "Mem"), None);
        assert_eq!(value("MemTotal: x kB\n", "MemTotal"), None);
    }
}
