//! `cargo xtask deps`: fetches everything from outside once. Run by people, by `make up` and by CI.
//!
//! Run again it fetches nothing, and needs no network. Never removes what an older run fetched: a
//! snapshot may still need an older kernel.

pub(crate) mod debian;
pub(crate) mod images;
pub(crate) mod kernel;
mod modules;
pub(crate) mod packages;
pub(crate) mod rig;
mod unpacked;
mod vmlinux;

use std::fs::File;
use std::path::Path;

use anyhow::{Context, Result};
use rustix::fs::FlockOperation;

use crate::DepsOptions;
use crate::progress::{say, step};
use crate::{command, fuzz, place};

/// Fetches what is missing.
pub(crate) fn run(options: &DepsOptions) -> Result<()> {
    let dir = &options.folder.dir;
    place::make(dir)?;
    let _alone = lock(dir)?;
    packages::install(options.bench, dir)?;
    let kernel = kernel::GUEST.fetch(dir, options.refresh)?;
    say(format!("guest kernel: {kernel}"));
    if !options.no_rig {
        let rig = rig::fetch(dir, options.refresh)?;
        say(format!("rig kernel: {rig}"));
    }
    step("fetch crates", || {
        // Without a network, crates that are already here are enough.
        let offline = place::cargo()
            .args(["fetch", "--locked", "--offline", "--quiet"])
            .output()?;
        if offline.status.success() {
            return Ok(());
        }
        command::run(place::cargo().args(["fetch", "--locked"]))
    })?;
    if fuzz::missing().is_none() {
        step("fetch crates of the fuzz targets", fuzz::fetch)?;
    }
    if !options.no_images {
        images::build_missing(dir)?;
    }
    if options.systemd {
        debian::build_missing(dir)?;
    }
    say(format!("everything is in {}", dir.display()));
    Ok(())
}

/// Waits until no other run fetches into `dir`; the lock ends with the file.
fn lock(dir: &Path) -> Result<File> {
    let path = dir.join("lock");
    let file = File::create(&path).with_context(|| format!("cannot make {}", path.display()))?;
    if rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
        step("wait for another run that fetches", || {
            Ok(rustix::fs::flock(&file, FlockOperation::LockExclusive)?)
        })?;
    }
    Ok(file)
}
