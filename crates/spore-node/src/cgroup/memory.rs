//! More memory for a cgroup than it was made with, for good or for a while.
//!
//! Used by drivers: a fork pays for the holes that it makes pages of, and a VM whose copy stands
//! still has each page twice that it writes to. Never gives a cgroup less than it was made with.

use std::fs;
use std::io;
use std::path::Path;

use super::{Cgroups, Controller, Version, read_if_there, write_if_there};

/// On v1 the limit with swap is never below the one without.
const WITH_SWAP: &str = "memory.memsw.limit_in_bytes";

impl Cgroups {
    /// Lets the cgroup `name` have so much memory, from now on.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn raise_memory(&self, name: &str, bytes: u64) -> io::Result<()> {
        self.each_memory(name, |version, path| match version {
            Version::One => {
                write_if_there(&path.join(WITH_SWAP), &bytes.to_string())?;
                fs::write(path.join(limit_of(version)), bytes.to_string())
            }
            Version::Two => fs::write(path.join(limit_of(version)), bytes.to_string()),
        })
    }

    /// Lets it have so much more memory until what this gives is dropped.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn lend_memory(&self, name: &str, more: u64) -> io::Result<LentMemory> {
        let lent = LentMemory {
            cgroups: self.clone(),
            name: name.to_owned(),
            before: self.memory_limit(name)?,
        };
        if let Some(before) = lent.before {
            self.raise_memory(name, before.saturating_add(more))?;
        }
        Ok(lent)
    }

    /// What it may have at most; `None` is without a limit.
    pub(super) fn memory_limit(&self, name: &str) -> io::Result<Option<u64>> {
        let Some((version, path)) = self.folder_of(Controller::Memory, name) else {
            return Ok(None);
        };
        let text = fs::read_to_string(path.join(limit_of(version)))?;
        Ok(text.trim().parse().ok())
    }

    fn lower_memory(&self, name: &str, bytes: u64) -> io::Result<()> {
        self.each_memory(name, |version, path| {
            if read_if_there(&path.join(limit_of(version)))?.is_none() {
                // It went with its VM.
                return Ok(());
            }
            // The kernel would end its processes, where v1 refuses.
            let used = read_if_there(&path.join("memory.current"))?;
            let used: Option<u64> = used.and_then(|text| text.trim().parse().ok());
            if used.is_some_and(|used| used > bytes) {
                return Err(io::ErrorKind::ResourceBusy.into());
            }
            fs::write(path.join(limit_of(version)), bytes.to_string())?;
            match version {
                Version::One => write_if_there(&path.join(WITH_SWAP), &bytes.to_string()),
                Version::Two => Ok(()),
            }
        })
    }

    fn each_memory(
        &self,
        name: &str,
        mut set: impl FnMut(Version, &Path) -> io::Result<()>,
    ) -> io::Result<()> {
        for (hierarchy, path) in self.folders(name) {
            if hierarchy.controllers.contains(&Controller::Memory) {
                set(hierarchy.version, &path)?;
            }
        }
        Ok(())
    }
}

const fn limit_of(version: Version) -> &'static str {
    match version {
        Version::One => "memory.limit_in_bytes",
        Version::Two => "memory.max",
    }
}

/// Memory that a cgroup has for a while.
#[derive(Debug)]
pub struct LentMemory {
    cgroups: Cgroups,
    name: String,
    before: Option<u64>,
}

impl Drop for LentMemory {
    fn drop(&mut self) {
        let Some(before) = self.before else { return };
        if let Err(error) = self.cgroups.lower_memory(&self.name, before) {
            let name = &self.name;
            tracing::warn!(name, %error, "a cgroup keeps memory that it had for a while");
        }
    }
}
