//! The host's memory as it is now, beside what was promised of it.
//!
//! Looked at by the node before a start: promises are kept to what the host has, but others on the
//! host use memory too. Decides nothing; see `capacity.rs`.

use std::fmt::Debug;
use std::fs;
use std::io;

/// How the host's memory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryNow {
    /// What could be given to programs without swapping.
    pub available_mib: u64,
    /// Of the last ten seconds, the part in which every task waited for memory; 0 where the kernel
    /// does not tell.
    pub stalled_percent: u32,
}

/// Tells how the host's memory is.
pub trait HostMemory: Debug + Send + Sync + 'static {
    /// As it is now. Takes microseconds.
    ///
    /// # Errors
    /// When the kernel does not tell.
    fn now(&self) -> io::Result<MemoryNow>;
}

/// What the kernel tells in `/proc`.
#[derive(Clone, Copy, Debug, Default)]
pub struct ProcMemory;

impl HostMemory for ProcMemory {
    fn now(&self) -> io::Result<MemoryNow> {
        let meminfo = fs::read_to_string("/proc/meminfo")?;
        // Kernels without pressure stall information, or with it switched off, have nothing here.
        let pressure = fs::read_to_string("/proc/pressure/memory").unwrap_or_default();
        let missing = || io::Error::other("no MemAvailable in /proc/meminfo");
        Ok(MemoryNow {
            available_mib: available_mib(&meminfo).ok_or_else(missing)?,
            stalled_percent: stalled_percent(&pressure).unwrap_or(0),
        })
    }
}

fn available_mib(meminfo: &str) -> Option<u64> {
    let mut lines = meminfo.lines();
    let line = lines.find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kib / 1024)
}

/// The whole part of `full avg10` (Documentation/accounting/psi.rst).
fn stalled_percent(pressure: &str) -> Option<u32> {
    let mut lines = pressure.lines();
    let line = lines.find_map(|line| line.strip_prefix("full "))?;
    let mut fields = line.split_whitespace();
    let average = fields.find_map(|field| field.strip_prefix("avg10="))?;
    average.split('.').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::{HostMemory, ProcMemory, available_mib, stalled_percent};

    #[test]
    fn the_kernels_words_are_read() {
        let meminfo = "MemTotal:  245504 kB\nMemFree:  1 kB\nMemAvailable:   180000 kB\n";
        assert_eq!(available_mib(meminfo), Some(175));
        assert_eq!(available_mib("MemTotal:  245504 kB\n"), None);
        let pressure = "some avg10=80.00 avg60=1.00 avg300=0.19 total=29\n\
                        full avg10=12.34 avg60=0.00 avg300=0.04 total=14\n";
        assert_eq!(stalled_percent(pressure), Some(12));
        assert_eq!(stalled_percent(""), None);
    }

    #[test]
    fn this_host_has_memory() {
        assert!(ProcMemory.now().unwrap().available_mib > 0);
    }
}
