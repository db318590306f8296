//! What a process of the platform takes of the host's memory, as the kernel counts it.

use anyhow::{Context, Result};

/// Memory of one process, in KiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// Resident pages, shared ones whole.
    pub rss_kib: u64,
    /// Resident pages, shared ones by their share.
    pub pss_kib: u64,
    /// Resident pages that belong to no file: heap and stacks.
    pub anon_kib: u64,
}

/// The memory of this process now.
///
/// # Errors
/// When it is gone.
pub fn of(pid: i32) -> Result<Memory> {
    let path = format!("/proc/{pid}/smaps_rollup");
    let text = std::fs::read_to_string(&path).with_context(|| path.clone())?;
    let kib = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        let kib = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
        kib.with_context(|| format!("no {name} in {path}"))
    };
    Ok(Memory {
        rss_kib: kib("Rss:")?,
        pss_kib: kib("Pss:")?,
        anon_kib: kib("Anonymous:")?,
    })
}
