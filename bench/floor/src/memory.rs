//! What the kernel says of a process's memory (proc(5), smaps), in KiB.

use std::fs;

use anyhow::{Context, Result};

/// How the file of a guest's memory is called in the maps of its VMM.
const GUEST: &str = "/memfd:guest-memory";

/// A process's memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Memory {
    /// No other process has it. Of the guest's memory, what is not in the file that forks share: a
    /// page of that may be mapped by one of them only, and is nobody's own.
    pub(crate) private_kib: f64,
    /// All that is in memory, the guest's left out.
    pub(crate) own_resident_kib: f64,
}

/// Of this process, now.
pub(crate) fn of(pid: u32) -> Result<Memory> {
    let path = format!("/proc/{pid}/smaps");
    let maps = fs::read_to_string(&path).context(path)?;
    let (mut is_guest, mut private_kib, mut own_resident_kib) = (false, 0.0, 0.0);
    for line in maps.lines() {
        let mut words = line.split_whitespace();
        let (Some(key), Some(value)) = (words.next(), words.next()) else {
            continue;
        };
        if !key.ends_with(':') {
            // Of a mapping the first line, with its addresses and its file.
            is_guest = line.contains(GUEST);
            continue;
        }
        match key {
            "Anonymous:" if is_guest => private_kib += value.parse::<f64>()?,
            "Private_Clean:" | "Private_Dirty:" if !is_guest => {
                private_kib += value.parse::<f64>()?;
            }
            "Rss:" if !is_guest => own_resident_kib += value.parse::<f64>()?,
            _ => {}
        }
    }
    Ok(Memory {
        private_kib,
        own_resident_kib,
    })
}
