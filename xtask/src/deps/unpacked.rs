//! Debian packages that are downloaded and unpacked, not installed. Called by `deps` for what runs
//! in machines and not on this one.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::command;

const MIB: u64 = 1024 * 1024;

/// Downloads a package into a folder and unpacks it there; returns the tree.
pub(crate) fn fetch(package: &str, staging: &Path) -> Result<PathBuf> {
    let attempt = || {
        command::run(
            Command::new("apt-get")
                .args(["-qq", "download", package])
                .current_dir(staging),
        )
    };
    // Lists that are older than the mirror name a file that is gone: update them once.
    if attempt().is_err() {
        command::run(command::as_root("apt-get").args(["-qq", "update"]))?;
        attempt()?;
    }
    let deb = fs::read_dir(staging)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .with_context(|| format!("apt-get downloaded no file for {package}"))?;
    let unpacked = staging.join("unpacked");
    command::run(Command::new("dpkg").arg("-x").arg(&deb).arg(&unpacked))?;
    Ok(unpacked)
}

/// How much a download of it is, in whole MiB.
pub(crate) fn size_mib(package: &str) -> Result<u64> {
    let bytes: u64 = field(package, "Size")?
        .parse()
        .with_context(|| format!("apt knows no size of {package}"))?;
    Ok(bytes.div_ceil(MIB))
}

/// Name and version of a package, for people and for rebuilding.
pub(crate) fn version_line(package: &str) -> Result<String> {
    let version = field(package, "Version")?;
    Ok(format!("{package} {version}\n"))
}

/// What apt knows of the package that it would download.
fn field(package: &str, name: &str) -> Result<String> {
    let text =
        command::output(Command::new("apt-cache").args(["show", "--no-all-versions", package]))?;
    let value = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
        .with_context(|| format!("apt knows no {name} of {package}"))?;
    Ok(value.to_owned())
}
