//! `cargo xtask guest`: builds the guest's PID 1 and packs it with the kernel's modules.
//!
//! Run by `up` and by tests; the kernel must be there (`cargo xtask deps`).

pub(crate) mod initramfs;

use std::fs;
use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::deps::kernel::GUEST;
use crate::progress::{say, step};
use crate::{command, fixed, place};

/// Builds everything into `dir/guest`.
pub(crate) fn run(dir: &Path) -> Result<()> {
    let release = GUEST.current(dir)?;
    let init = step("build spore-guest (static)", || {
        fixed::build("spore-guest", "guest")
    })?;
    let hook = step("build the hook of Node.js", build_hook)?;
    let guest = dir.join("guest");
    fs::create_dir_all(&guest).with_context(|| format!("cannot make {}", guest.display()))?;

    let mut staged = tempfile::NamedTempFile::new_in(&guest)?;
    let modules = GUEST.kept(dir, &release).join("modules");
    initramfs::pack(&init, &modules, &hook, BufWriter::new(staged.as_file_mut()))?;
    publish(staged, &guest.join("initramfs.cpio"))?;

    let mut staged = tempfile::NamedTempFile::new_in(&guest)?;
    std::io::Write::write_all(&mut staged, format!("{release}\n").as_bytes())?;
    publish(staged, &guest.join("release"))?;

    let link = tempfile::Builder::new().make_in(&guest, |path| {
        std::os::unix::fs::symlink(format!("../kernel/{release}/vmlinux"), path)
    })?;
    link.persist(guest.join("vmlinux"))?;
    say(format!(
        "guest: {} for kernel {release}",
        guest.join("initramfs.cpio").display()
    ));
    Ok(())
}

/// Renames a staged file, readable by all since guests' processes have uids of their own.
fn publish(staged: tempfile::NamedTempFile, path: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    staged
        .as_file()
        .set_permissions(fs::Permissions::from_mode(0o644))?;
    staged
        .persist(path)
        .with_context(|| format!("cannot write {}", path.display()))?;
    Ok(())
}

/// Builds the addon by which the hook of Node.js reaches OpenSSL, and returns its path. It is
/// loaded into programs of any image, so it names no library and no version of one.
fn build_hook() -> Result<PathBuf> {
    let source = place::repository().join("crates/spore-guest/src/hook/spore_hook.c");
    let folder = place::target()?.join(fixed::TARGET).join("guest");
    let addon = folder.join("spore_hook.node");
    command::run(
        Command::new("cc")
            .args(["-m64", "-shared", "-fPIC", "-O2", "-Wall", "-Wextra"])
            .args(["-nostdlib", "-fno-stack-protector", "-s", "-o"])
            .arg(&addon)
            .arg(source),
    )?;
    Ok(addon)
}
