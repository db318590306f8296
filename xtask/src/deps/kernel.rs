//! The kernels of guests and of the rig: Debian's, downloaded and taken apart, not installed.
//! Called by `deps`; keeps every release that was ever fetched, since a snapshot may need it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::modules::{self, ModuleTable};
use super::{unpacked, vmlinux};
use crate::progress::step;
use crate::{command, place};

/// A kernel that is kept, release by release.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Kernel {
    /// What people call it.
    what: &'static str,
    /// A metapackage that depends on the current kernel's package.
    metapackage: &'static str,
    /// Where its releases are, in the folder of what was fetched.
    folder: &'static str,
    /// The list of its modules, in the repository.
    list: &'static str,
}

/// What apps and sandboxes run on.
pub(crate) const GUEST: Kernel = Kernel {
    what: "guest kernel",
    metapackage: "linux-image-cloud-amd64",
    folder: "kernel",
    list: "guest/modules",
};

/// What the rig runs on: the cloud kernel cannot read another machine's files.
pub(crate) const RIG: Kernel = Kernel {
    what: "rig kernel",
    metapackage: "linux-image-amd64",
    folder: "rig",
    list: "guest/rig/modules",
};

/// The list of modules that a kernel was taken apart for, beside them.
const WANTED: &str = "wanted";

impl Kernel {
    /// Fetches the kernel unless there is one; returns its release.
    pub(crate) fn fetch(&self, dir: &Path, refresh: bool) -> Result<String> {
        let kernels = dir.join(self.folder);
        if let (false, Ok(release)) = (refresh, self.current(dir)) {
            return Ok(release);
        }
        fs::create_dir_all(&kernels)
            .with_context(|| format!("cannot make {}", kernels.display()))?;
        let package = resolve(self.metapackage)?;
        let release = package
            .strip_prefix("linux-image-")
            .with_context(|| {
                let metapackage = self.metapackage;
                format!("{metapackage} depends on {package}, which is no kernel image")
            })?
            .to_owned();
        let kept = kernels.join(&release);
        if !kept.is_dir() || !self.has_modules(&kept)? {
            let size = unpacked::size_mib(&package)?;
            let what = format!("fetch {} {release} ({size} MiB)", self.what);
            step(&what, || {
                let staging = tempfile::Builder::new()
                    .prefix(".fetch-")
                    .tempdir_in(&kernels)?;
                let unpacked = unpacked::fetch(&package, staging.path())?;
                let finished = staging.path().join("finished");
                take_apart(&unpacked, &release, &self.wanted_modules()?, &finished)?;
                fs::write(finished.join("package"), unpacked::version_line(&package)?)?;
                // One that was taken apart for another list of modules.
                match fs::rename(&kept, staging.path().join("before")) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => {
                        return Err(error.into());
                    }
                    _ => {}
                }
                fs::rename(&finished, &kept)?;
                Ok(())
            })?;
        }
        point_current(&kernels, &release)?;
        Ok(release)
    }

    /// The release that `current` in its folder names, if it is whole.
    pub(crate) fn current(&self, dir: &Path) -> Result<String> {
        let link = dir.join(self.folder).join("current");
        let target = fs::read_link(&link).with_context(|| {
            format!(
                "{} is not there: run `cargo xtask deps` first",
                link.display()
            )
        })?;
        let vmlinux = link.join("vmlinux");
        if !vmlinux.is_file() {
            bail!(
                "{} is not there: run `cargo xtask deps --refresh`",
                vmlinux.display()
            );
        }
        if !self.has_modules(&link)? {
            bail!(
                "{} has other modules than {} names: run `cargo xtask deps` first",
                link.display(),
                self.list
            );
        }
        Ok(target.to_string_lossy().into_owned())
    }

    /// Where a release is kept.
    pub(crate) fn kept(&self, dir: &Path, release: &str) -> PathBuf {
        dir.join(self.folder).join(release)
    }

    /// Whether a kernel was taken apart for the modules that are wanted now.
    fn has_modules(&self, kernel: &Path) -> Result<bool> {
        let taken = fs::read_to_string(kernel.join("modules").join(WANTED)).unwrap_or_default();
        Ok(taken == self.wanted_modules()?)
    }

    fn wanted_modules(&self) -> Result<String> {
        let list = place::repository().join(self.list);
        fs::read_to_string(&list).with_context(|| format!("cannot read {}", list.display()))
    }
}

/// The package that the metapackage stands for now.
fn resolve(metapackage: &str) -> Result<String> {
    if let Some(package) = depends(metapackage)? {
        return Ok(package);
    }
    step("update package lists", || {
        command::run(command::as_root("apt-get").args(["-qq", "update"]))
    })?;
    depends(metapackage)?.with_context(|| {
        format!("apt knows no {metapackage}: Debian 12 or newer on amd64 is expected")
    })
}

/// The first dependency of the metapackage, if apt knows it and can download it.
fn depends(metapackage: &str) -> Result<Option<String>> {
    let output = Command::new("apt-cache")
        .args(["depends", "--important", metapackage])
        .output()
        .context("cannot start `apt-cache`")?;
    Ok(first_dependency(&String::from_utf8_lossy(&output.stdout)))
}

/// The first `Depends:` line of `apt-cache depends`.
fn first_dependency(text: &str) -> Option<String> {
    text.lines()
        .filter_map(|line| line.trim().strip_prefix("Depends:"))
        .map(|package| package.trim().to_owned())
        .next()
}

/// Writes `vmlinux` and `modules/` of an unpacked package.
fn take_apart(unpacked: &Path, release: &str, list: &str, finished: &Path) -> Result<()> {
    let modules = finished.join("modules");
    fs::create_dir_all(&modules)?;
    let bzimage = unpacked.join(format!("boot/vmlinuz-{release}"));
    let image = fs::read(&bzimage).with_context(|| format!("cannot read {}", bzimage.display()))?;
    let elf = vmlinux::extract(&image)
        .with_context(|| format!("cannot take the kernel out of {}", bzimage.display()))?;
    fs::write(finished.join("vmlinux"), elf)?;

    command::run(Command::new("depmod").arg("-b").arg(unpacked).arg(release))?;
    let tree = unpacked.join("lib/modules").join(release);
    let table = ModuleTable::parse(
        &fs::read_to_string(tree.join("modules.dep"))?,
        &fs::read_to_string(tree.join("modules.builtin"))?,
    );
    let mut order = String::new();
    for (index, path) in table.load_order(&modules::wanted(list))?.iter().enumerate() {
        let file = format!("{index:02}-{}.ko", modules::name(path));
        fs::write(modules.join(&file), plain(&tree.join(path))?)?;
        order.push_str(&file);
        order.push('\n');
    }
    fs::write(modules.join("order"), order)?;
    fs::write(modules.join(WANTED), list)?;
    Ok(())
}

/// A module's bytes, decompressed.
fn plain(path: &Path) -> Result<Vec<u8>> {
    let tool = match path.extension().and_then(|extension| extension.to_str()) {
        Some("ko") => return fs::read(path).with_context(|| format!("cannot read {path:?}")),
        Some("xz") => "xz",
        Some("zst") => "zstd",
        _ => bail!(
            "{} is compressed in a way that is not known here",
            path.display()
        ),
    };
    let output = Command::new(tool)
        .arg("-dc")
        .arg(path)
        .output()
        .with_context(|| format!("cannot start `{tool}`"))?;
    if !output.status.success() {
        bail!("`{tool} -dc {}` failed: {}", path.display(), output.status);
    }
    Ok(output.stdout)
}

/// Points `current` at a release, in one step.
fn point_current(kernels: &Path, release: &str) -> Result<()> {
    let next = kernels.join(".current");
    match fs::remove_file(&next) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
        _ => {}
    }
    std::os::unix::fs::symlink(release, &next)?;
    fs::rename(&next, kernels.join("current"))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{GUEST, first_dependency, point_current};

    #[test]
    fn the_metapackage_names_its_kernel() {
        let text = "linux-image-cloud-amd64\n  Depends: linux-image-6.1.0-56-cloud-amd64\n";
        assert_eq!(
            first_dependency(text).unwrap(),
            "linux-image-6.1.0-56-cloud-amd64"
        );
        assert_eq!(first_dependency("N: Unable to locate package\n"), None);
    }

    #[test]
    fn current_moves_to_a_newer_release_and_must_be_whole() {
        let dir = tempfile::tempdir().unwrap();
        let kernels = dir.path().join("kernel");
        std::fs::create_dir_all(kernels.join("2")).unwrap();
        assert!(
            GUEST
                .current(dir.path())
                .unwrap_err()
                .to_string()
                .contains("xtask deps")
        );
        point_current(&kernels, "1").unwrap();
        point_current(&kernels, "2").unwrap();
        assert!(
            GUEST
                .current(dir.path())
                .unwrap_err()
                .to_string()
                .contains("--refresh")
        );
        std::fs::write(kernels.join("2/vmlinux"), b"\x7fELF").unwrap();
        std::fs::create_dir(kernels.join("2/modules")).unwrap();
        std::fs::write(kernels.join("2/modules/wanted"), "virtio_net\n").unwrap();
        let stale = GUEST.current(dir.path()).unwrap_err().to_string();
        assert!(stale.contains("other modules"), "{stale}");
        std::fs::write(
            kernels.join("2/modules/wanted"),
            GUEST.wanted_modules().unwrap(),
        )
        .unwrap();
        assert_eq!(GUEST.current(dir.path()).unwrap(), "2");
    }
}
