//! What the rig is booted from: a kernel that has KVM and reads another machine's files, and a
//! static shell. Called by `deps`; `cargo xtask rig` needs nothing else from outside.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use super::{kernel, unpacked};
use crate::progress::step;

/// A shell and its tools in one static program, for the first process.
const BUSYBOX_PACKAGE: &str = "busybox-static";

/// The files of the rig.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Rig {
    pub(crate) vmlinux: PathBuf,
    /// Modules in load order, and `order`.
    pub(crate) modules: PathBuf,
    pub(crate) busybox: PathBuf,
}

/// Fetches what is missing; returns the kernel's release.
pub(crate) fn fetch(dir: &Path, refresh: bool) -> Result<String> {
    let release = kernel::RIG.fetch(dir, refresh)?;
    let busybox = busybox(dir);
    if refresh || !busybox.is_file() {
        let size = unpacked::size_mib(BUSYBOX_PACKAGE)?;
        step(&format!("fetch {BUSYBOX_PACKAGE} ({size} MiB)"), || {
            let folder = busybox.parent().context("a file is in a folder")?;
            let staging = tempfile::Builder::new()
                .prefix(".fetch-")
                .tempdir_in(folder)?;
            let tree = unpacked::fetch(BUSYBOX_PACKAGE, staging.path())?;
            let line = unpacked::version_line(BUSYBOX_PACKAGE)?;
            fs::write(busybox.with_extension("package"), line)?;
            fs::rename(tree.join("bin/busybox"), &busybox)?;
            Ok(())
        })?;
    }
    Ok(release)
}

/// The rig, if it was fetched.
pub(crate) fn current(dir: &Path) -> Result<Rig> {
    let release = kernel::RIG.current(dir)?;
    let kernel = kernel::RIG.kept(dir, &release);
    let busybox = busybox(dir);
    ensure!(
        busybox.is_file(),
        "{} is not there: run `cargo xtask deps` first",
        busybox.display()
    );
    Ok(Rig {
        vmlinux: kernel.join("vmlinux"),
        modules: kernel.join("modules"),
        busybox,
    })
}

fn busybox(dir: &Path) -> PathBuf {
    dir.join("rig/busybox")
}
