//! Where things are: the repository, and the folder for what was fetched or built for guests.
//!
//! ```text
//!   DIR/kernel/RELEASE/vmlinux          the guest kernel as an ELF file
//!   DIR/kernel/RELEASE/modules/…        NN-name.ko in load order, and `order`
//!   DIR/kernel/RELEASE/package          name and version of the Debian package
//!   DIR/kernel/current -> RELEASE       what new templates are made with
//!   DIR/rig/RELEASE/{vmlinux,modules/…,package}, DIR/rig/current, DIR/rig/busybox
//!                                       what `rig` boots
//!   DIR/guest/{vmlinux,initramfs.cpio,release}
//!   DIR/images/…                        an image store (see spore-node's `image/store.rs`)
//! ```
//!
//! DIR is outside of the working tree, so that a fresh clone on the same machine fetches nothing.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::command;

/// `DIR` when nobody says otherwise: beside the daemon's own folder, not in it, since that one is
/// closed to everybody but root.
pub(crate) const DEPS_DEFAULT: &str = "/var/lib/spore-deps";

/// The root of the repository that cargo runs this task in. Two clones may share a target folder,
/// so where this program was built says nothing.
pub(crate) fn repository() -> PathBuf {
    let built = || env!("CARGO_MANIFEST_DIR").into();
    let xtask = PathBuf::from(std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(built));
    match xtask.parent() {
        Some(root) => root.to_path_buf(),
        None => xtask,
    }
}

/// The cargo that runs this task, for more work in the repository.
pub(crate) fn cargo() -> Command {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(repository());
    cargo
}

/// The user who became root by sudo(8) for this run.
pub(crate) fn sudo_uid() -> Option<u32> {
    let uid = std::env::var("SUDO_UID").ok()?;
    uid.parse().ok().filter(|uid| *uid != 0)
}

/// Refuses to build as root in a tree of somebody who is not: their next build could not write to
/// its own target folder.
pub(crate) fn check_owner() -> Result<()> {
    let root = repository();
    let owner = std::fs::metadata(&root);
    let owner = owner.with_context(|| format!("cannot look at the repository {}", root.display()));
    let owner = owner?.uid();
    ensure!(
        !rustix::process::geteuid().is_root() || sudo_uid() != Some(owner),
        "run this without sudo: it asks for root where it needs it, and as root it would leave \
         files in the target folder that you cannot change. If that has happened: \
         `sudo chown -R {owner} {}`",
        target()?.display()
    );
    Ok(())
}

/// Cargo's target folder, wherever the environment or configuration put it.
pub(crate) fn target() -> Result<PathBuf> {
    let text = command::output(cargo().args([
        "metadata",
        "--no-deps",
        "--offline",
        "--format-version=1",
    ]))?;
    let metadata: serde_json::Value =
        serde_json::from_str(&text).context("cannot read the output of `cargo metadata`")?;
    let folder = metadata["target_directory"]
        .as_str()
        .context("`cargo metadata` names no target_directory")?;
    Ok(PathBuf::from(folder))
}

/// Makes `dir`, owned by whoever runs this task; one that is there must be writable.
pub(crate) fn make(dir: &Path) -> Result<()> {
    if dir.is_dir() || std::fs::create_dir_all(dir).is_ok() {
        return rustix::fs::access(dir, rustix::fs::Access::WRITE_OK).with_context(|| {
            format!(
                "{} was made by another user: `sudo chown -R \"$(id -u)\" {}`, or choose another \
                 with --dir",
                dir.display(),
                dir.display()
            )
        });
    }
    let owner = rustix::process::getuid().as_raw().to_string();
    command::run(
        command::as_root("install")
            .args(["-d", "-m", "0755", "-o"])
            .arg(owner)
            .arg(dir),
    )
    .with_context(|| format!("cannot make {}; choose another with --dir", dir.display()))
}
