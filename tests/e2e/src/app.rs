//! Apps that stories deploy: a folder with a manifest and one file of code.

use std::path::Path;

use anyhow::Result;
use tempfile::TempDir;

/// What most apps run on.
const PYTHON: &str = "debian/python3";

/// A folder to deploy; removed with the value.
#[derive(Debug)]
pub struct AppFolder {
    folder: TempDir,
}

impl AppFolder {
    /// A Python app. `manifest` is added behind the usual keys, so tables go there. Unless it says
    /// otherwise, the app has long to get ready: how fast it is depends on who else is on the
    /// machine.
    ///
    /// # Errors
    /// When the folder cannot be written.
    pub fn python(name: &str, code: &str, manifest: &str) -> Result<Self> {
        Self::of(name, PYTHON, ["python3", "app.py"], code, manifest)
    }

    /// A shell script, which is up much sooner than Python is; else as [`Self::python`].
    ///
    /// # Errors
    /// When the folder cannot be written.
    pub fn shell(name: &str, code: &str, manifest: &str) -> Result<Self> {
        Self::of(name, PYTHON, ["sh", "app.sh"], code, manifest)
    }

    /// A Node.js app; else as [`Self::python`].
    ///
    /// # Errors
    /// When the folder cannot be written.
    pub fn node(name: &str, code: &str, manifest: &str) -> Result<Self> {
        Self::of(name, "debian/node", ["node", "app.js"], code, manifest)
    }

    fn of(name: &str, image: &str, command: [&str; 2], code: &str, manifest: &str) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let health = if manifest.contains("[health]") {
            ""
        } else {
            "\n[health]\ntimeout = \"10m\"\n"
        };
        let text = format!(
            "name = \"{name}\"\nimage = \"{image}\"\n\
             command = {command:?}\nport = 8000\n{manifest}{health}"
        );
        std::fs::write(folder.path().join("spore.toml"), text)?;
        std::fs::write(folder.path().join(command[1]), code)?;
        Ok(Self { folder })
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Where it is, as an argument.
    #[must_use]
    pub fn argument(&self) -> String {
        self.folder.path().display().to_string()
    }
}

/// An app that answers with what it is: its counter in memory, its boot id, its environment.
pub const SELF_PORTRAIT: &str = include_str!("../apps/portrait.py");

/// An app that answers with its own name, streams, echoes and waits, and logs what it saw.
pub const WORDY: &str = include_str!("../apps/wordy.py");

/// An app that does to its VM what it is asked to: floods, fills, eats, forks, leaves.
pub const RECKLESS: &str = include_str!("../apps/reckless.py");

/// Tables of a manifest whose app outlasts its story awake.
pub const STAYS_AWAKE: &str = "[idle]\nafter = \"2h\"\n";
