//! More memory for a cgroup than it was made with, for good or for a while.
//!
//! Used by drivers: a fork pays for the holes that it makes pages of, and a VM whose copy stands
//! still has each page twice that it writes to. Never gives a cgroup less than it was made with.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::{Cgroups, Controller, Version, read_if_there, write_if_there};
use crate::hypervisor::room::{remove_if_there, write_whole};

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

    /// Lets it have so much more memory until what this gives is dropped. What it had before is in
    /// the file `note` until then: a process that ends meanwhile leaves it for the next, which
    /// calls [`Cgroups::take_memory_back`].
    ///
    /// # Errors
    /// What the kernel says.
    pub fn lend_memory(&self, name: &str, more: u64, note: PathBuf) -> io::Result<LentMemory> {
        let noted = read_note(&note)?;
        let limit = self.memory_limit(name)?;
        let lent = limit
            .map(|limit| noted.unwrap_or(limit))
            .map(|before| Lent {
                cgroups: self.clone(),
                name: name.to_owned(),
                before,
                note,
            });
        if let Some(Lent { before, note, .. }) = &lent {
            if noted.is_none() {
                write_whole(note, before.to_string().as_bytes())?;
            }
            let wanted = before.saturating_add(more);
            if limit < Some(wanted) {
                self.raise_memory(name, wanted)?;
            }
        }
        Ok(LentMemory(lent))
    }

    /// Takes back what somebody lent who ended since, by the file `note`, if there is one. What is
    /// used now stays lent, and so does the file, for another time.
    ///
    /// # Errors
    /// What the kernel says, or that the file says nothing.
    pub fn take_memory_back(&self, name: &str, note: &Path) -> io::Result<()> {
        let Some(before) = read_note(note)? else {
            return Ok(());
        };
        self.lower_memory(name, before)?;
        remove_if_there(fs::remove_file(note))
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

/// The limit that a note tells; `None` without one.
fn read_note(note: &Path) -> io::Result<Option<u64>> {
    let text = match fs::read_to_string(note) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let number = text.parse().map_err(|_wrong| {
        let why = format!("{} says {text:?} and no number of bytes", note.display());
        io::Error::new(io::ErrorKind::InvalidData, why)
    });
    number.map(Some)
}

/// Memory that a cgroup has for a while.
#[derive(Debug)]
pub struct LentMemory(Option<Lent>);

/// To whom, and what it had before.
#[derive(Debug)]
struct Lent {
    cgroups: Cgroups,
    name: String,
    before: u64,
    note: PathBuf,
}

impl Drop for LentMemory {
    fn drop(&mut self) {
        let Some(Lent {
            cgroups,
            name,
            before,
            note,
        }) = &self.0
        else {
            return;
        };
        let back = cgroups.lower_memory(name, *before);
        let back = back.and_then(|()| remove_if_there(fs::remove_file(note)));
        if let Err(error) = back {
            tracing::warn!(name, %error, "a cgroup keeps memory that it had for a while");
        }
    }
}
