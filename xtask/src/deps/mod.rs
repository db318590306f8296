//! `cargo xtask deps`: fetches everything from outside once. Run by people, by `make up` and by CI.
//!
//! Run again it fetches nothing, and needs no network. Never removes what an older run fetched: a
//! snapshot may still need an older kernel.

pub(crate) mod images;
pub(crate) mod kernel;
mod modules;
pub(crate) mod packages;
mod vmlinux;

use anyhow::Result;

use crate::DepsOptions;
use crate::progress::{say, step};
use crate::{command, place};

/// Fetches what is missing.
pub(crate) fn run(options: &DepsOptions) -> Result<()> {
    let dir = &options.folder.dir;
    packages::install(options.bench)?;
    place::make(dir)?;
    let kernel = kernel::fetch(dir, options.refresh)?;
    say(format!("guest kernel: {kernel}"));
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
    if !options.no_images {
        images::build_missing(dir)?;
    }
    say(format!("everything is in {}", dir.display()));
    Ok(())
}
