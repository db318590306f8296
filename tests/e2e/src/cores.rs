//! Core files of whatever crashes on this host, written by a program of a story's own.
//!
//! The kernel's `core_pattern` is the host's, so one story at a time has it, and a process of its
//! own puts back what was there, also once the story is killed.

use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};

const PATTERN: &str = "/proc/sys/kernel/core_pattern";

/// Held by whoever has the pattern.
const LOCK: &str = "/run/spore-e2e-core-pattern.lock";

/// Sets the pattern to its first argument until its input ends. No signal of a terminal ends it.
const KEEPER: &str = "trap '' INT TERM HUP
old=$(cat /proc/sys/kernel/core_pattern)
printf '%s' \"$1\" > /proc/sys/kernel/core_pattern && echo set
cat > /dev/null
printf '%s' \"$old\" > /proc/sys/kernel/core_pattern";

/// Where core files go for as long as this is there.
#[derive(Debug)]
pub struct Cores {
    folder: PathBuf,
    keeper: Child,
}

impl Cores {
    /// Has every core file piped into a file of this folder; `None` where that cannot be set.
    ///
    /// # Errors
    /// When the folder cannot be written to.
    pub fn into(folder: &Path) -> Result<Option<Self>> {
        std::fs::create_dir_all(folder)?;
        let program = folder.join("keep");
        let text = format!("#!/bin/sh\nexec cat > {}/core.$1\n", folder.display());
        std::fs::write(&program, text)?;
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755))?;
        let pattern = format!("|{} %p", program.display());
        // The kernel has room for so many bytes.
        ensure!(pattern.len() < 128, "{pattern} is too long a path");
        let mut keeper = Command::new("flock")
            .args([LOCK, "/bin/sh", "-c", KEEPER, "sh", &pattern])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("flock, of util-linux")?;
        let out = keeper.stdout.take().context("a pipe")?;
        let mut said = String::new();
        BufReader::new(out).read_line(&mut said)?;
        let cores = Self {
            folder: folder.to_owned(),
            keeper,
        };
        let works = said == "set\n" && cores.fence()?;
        Ok(works.then_some(cores))
    }

    /// Lets a process without any precaution crash, and tells whether its core file is there: if
    /// so, those of what crashed before are too.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn fence(&self) -> Result<bool> {
        let mut victim = Command::new("/bin/sh")
            .args(["-c", "kill -SEGV $$"])
            .spawn()?;
        let path = self.folder.join(format!("core.{}", victim.id()));
        victim.wait()?;
        Ok(std::fs::metadata(path).is_ok_and(|core| core.len() > 0))
    }

    /// The pids that left a core file with something in it.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub fn of(&self, pids: &[i32]) -> Result<Vec<i32>> {
        let mut left = Vec::new();
        for pid in pids {
            match std::fs::metadata(self.folder.join(format!("core.{pid}"))) {
                Ok(file) if file.len() > 0 => left.push(*pid),
                Ok(_empty) => {}
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(left)
    }

    /// Whose pattern is set now.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn pattern() -> Result<String> {
        Ok(std::fs::read_to_string(PATTERN)?)
    }
}

impl Drop for Cores {
    fn drop(&mut self) {
        drop(self.keeper.stdin.take());
        drop(self.keeper.wait());
    }
}
