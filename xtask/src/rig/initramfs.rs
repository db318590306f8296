//! Packs what the rig's kernel starts with: a shell, modules and the scripts. Called by `rig`.

use std::fs;
use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::{Context, Result};

use crate::deps::rig::Rig;
use crate::guest::initramfs::{folder, modules, write};
use crate::place;

/// Folders that the scripts mount on.
const FOLDERS: &[&str] = &["bin", "dev", "modules", "proc", "root", "sys"];

/// Writes the archive.
pub(super) fn pack(rig: &Rig, out: impl Write) -> Result<()> {
    let scripts = place::repository().join("guest/rig");
    let program = |name: &str, path: &Path| -> Result<_> {
        let bytes = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        Ok((name.to_owned(), 0o755, bytes))
    };
    let mut files = modules(&rig.modules)?;
    for script in ["init", "stage", "limited", "look", "tests"] {
        files.push(program(script, &scripts.join(script))?);
    }
    files.push(program("bin/busybox", &rig.busybox)?);
    files.extend(FOLDERS.iter().map(|name| folder(name)));
    files.sort();
    write(&files, BufWriter::new(out))
}
