//! The guest kernel: Debian's cloud kernel, downloaded and taken apart, not installed. Called by
//! `deps`; keeps every release that was ever fetched, since a snapshot may need it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::modules::{self, ModuleTable};
use super::vmlinux;
use crate::progress::step;
use crate::{command, place};

/// A metapackage that depends on the current kernel's package.
const METAPACKAGE: &str = "linux-image-cloud-amd64";

/// The list of modules that a kernel was taken apart for, beside them.
const WANTED: &str = "wanted";

/// Fetches the kernel unless there is one; returns its release.
pub(crate) fn fetch(dir: &Path, refresh: bool) -> Result<String> {
    let kernels = dir.join("kernel");
    if let (false, Ok(release)) = (refresh, current(dir)) {
        return Ok(release);
    }
    fs::create_dir_all(&kernels).with_context(|| format!("cannot make {}", kernels.display()))?;
    let package = resolve()?;
    let release = package
        .strip_prefix("linux-image-")
        .with_context(|| format!("{METAPACKAGE} depends on {package}, which is no kernel image"))?
        .to_owned();
    if !kernels.join(&release).is_dir() || !has_modules(&kernels.join(&release))? {
        step(&format!("fetch guest kernel {release}"), || {
            let staging = tempfile::Builder::new()
                .prefix(".fetch-")
                .tempdir_in(&kernels)?;
            let unpacked = download(&package, staging.path())?;
            let finished = staging.path().join("finished");
            take_apart(&unpacked, &release, &finished)?;
            fs::write(finished.join("package"), version_line(&package)?)?;
            // One that was taken apart for another list of modules.
            match fs::rename(kernels.join(&release), staging.path().join("before")) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
                _ => {}
            }
            fs::rename(&finished, kernels.join(&release))?;
            Ok(())
        })?;
    }
    point_current(&kernels, &release)?;
    Ok(release)
}

/// The release that `DIR/kernel/current` names, if it is whole.
pub(crate) fn current(dir: &Path) -> Result<String> {
    let link = dir.join("kernel/current");
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
    if !has_modules(&link)? {
        bail!(
            "{} has other modules than guest/modules names: run `cargo xtask deps` first",
            link.display()
        );
    }
    Ok(target.to_string_lossy().into_owned())
}

/// Whether a kernel was taken apart for the modules that are wanted now.
fn has_modules(kernel: &Path) -> Result<bool> {
    let taken = fs::read_to_string(kernel.join("modules").join(WANTED)).unwrap_or_default();
    Ok(taken == wanted_modules()?)
}

fn wanted_modules() -> Result<String> {
    let list = place::repository().join("guest/modules");
    fs::read_to_string(&list).with_context(|| format!("cannot read {}", list.display()))
}

/// The package that the metapackage stands for now.
fn resolve() -> Result<String> {
    if let Some(package) = depends()? {
        return Ok(package);
    }
    step("update package lists", || {
        command::run(command::as_root("apt-get").args(["-qq", "update"]))
    })?;
    depends()?.with_context(|| {
        format!("apt knows no {METAPACKAGE}: Debian 12 or newer on amd64 is expected")
    })
}

/// The first dependency of the metapackage, if apt knows it and can download it.
fn depends() -> Result<Option<String>> {
    let output = Command::new("apt-cache")
        .args(["depends", "--important", METAPACKAGE])
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

/// Downloads and unpacks the package; returns the folder.
fn download(package: &str, staging: &Path) -> Result<PathBuf> {
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

/// Writes `vmlinux` and `modules/` of an unpacked package.
fn take_apart(unpacked: &Path, release: &str, finished: &Path) -> Result<()> {
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
    let list = wanted_modules()?;
    let mut order = String::new();
    for (index, path) in table
        .load_order(&modules::wanted(&list))?
        .iter()
        .enumerate()
    {
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

/// Name and version of the package, for people and for rebuilding.
fn version_line(package: &str) -> Result<String> {
    let text =
        command::output(Command::new("apt-cache").args(["show", "--no-all-versions", package]))?;
    let version = text
        .lines()
        .find_map(|line| line.strip_prefix("Version: "))
        .with_context(|| format!("apt knows no version of {package}"))?;
    Ok(format!("{package} {version}\n"))
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
    use super::{current, first_dependency, point_current, wanted_modules};

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
            current(dir.path())
                .unwrap_err()
                .to_string()
                .contains("xtask deps")
        );
        point_current(&kernels, "1").unwrap();
        point_current(&kernels, "2").unwrap();
        assert!(
            current(dir.path())
                .unwrap_err()
                .to_string()
                .contains("--refresh")
        );
        std::fs::write(kernels.join("2/vmlinux"), b"\x7fELF").unwrap();
        std::fs::create_dir(kernels.join("2/modules")).unwrap();
        std::fs::write(kernels.join("2/modules/wanted"), "virtio_net\n").unwrap();
        let stale = current(dir.path()).unwrap_err().to_string();
        assert!(stale.contains("other modules"), "{stale}");
        std::fs::write(kernels.join("2/modules/wanted"), wanted_modules().unwrap()).unwrap();
        assert_eq!(current(dir.path()).unwrap(), "2");
    }
}
