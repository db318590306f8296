//! A Debian with systemd, to be booted by `cargo xtask systemd-test`: kernel, initrd and a root
//! file system. Made by `deps --systemd`; nothing else needs it.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, Result, ensure};

use super::packages::BUILD_USER;
use crate::command;
use crate::progress::{say, step};

/// Beyond Debian's essential packages: what Spore's own package would depend on, and what the
/// story looks with. Nothing else, so that what the daemon silently needs comes to light.
const PACKAGES: &str = "ca-certificates,curl,e2fsprogs,initramfs-tools,iproute2,kmod,\
    linux-image-cloud-amd64,nftables,passwd,procps,qemu-system-x86,sudo,systemd-sysv,udev,\
    util-linux";

/// What no test reads.
const EXCLUDED: &[&str] = &[
    "path-exclude=/usr/share/doc/*",
    "path-exclude=/usr/share/locale/*",
    "path-exclude=/usr/share/man/*",
];

/// Far more than it holds; the file has holes.
const SIZE: &str = "3G";

/// Where it is put together, root's alone.
const SCRATCH: &str = "/var/tmp/spore-systemd-root";

/// The files of the machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Machine {
    pub(crate) kernel: PathBuf,
    pub(crate) initrd: PathBuf,
    pub(crate) root: PathBuf,
}

impl Machine {
    fn of(dir: &Path) -> Self {
        let folder = dir.join("systemd");
        Self {
            kernel: folder.join("vmlinuz"),
            initrd: folder.join("initrd.img"),
            root: folder.join("root.ext4"),
        }
    }

    fn is_there(&self) -> bool {
        [&self.kernel, &self.initrd, &self.root]
            .iter()
            .all(|file| file.is_file())
    }
}

/// The machine, if it was made.
pub(crate) fn machine(dir: &Path) -> Result<Machine> {
    let machine = Machine::of(dir);
    ensure!(
        machine.is_there(),
        "there is no Debian to boot in {}: run `cargo xtask deps --systemd`",
        dir.join("systemd").display()
    );
    Ok(machine)
}

/// Makes the machine unless it is there.
pub(crate) fn build_missing(dir: &Path) -> Result<()> {
    if Machine::of(dir).is_there() {
        say("Debian with systemd: here");
        return Ok(());
    }
    step("build a Debian with systemd", || {
        scratch(true)?;
        let built = build().and_then(|()| keep(dir));
        scratch(false)?;
        built
    })
}

/// Makes the folder anew, or removes it.
fn scratch(wanted: bool) -> Result<()> {
    command::run(command::as_root("rm").args(["-rf", "--one-file-system", SCRATCH]))?;
    if wanted {
        command::run(command::as_root("install").args(["-d", "-m", "0700", SCRATCH]))?;
        let tree = format!("{SCRATCH}/tree");
        command::run(command::as_root("install").args(["-d", "-m", "0755", &tree]))?;
    }
    Ok(())
}

/// Unpacks what mmdebstrap makes as the build user: maintainer scripts run in its namespace.
fn build() -> Result<()> {
    let mut mmdebstrap = command::as_root("setpriv");
    mmdebstrap
        .args(["--reuid", BUILD_USER, "--regid", BUILD_USER])
        .args(["--init-groups", "--reset-env", "mmdebstrap", "--quiet"])
        .args(["--mode=unshare", "--variant=minbase", "--format=tar"])
        .args(["--skip=output/dev,output/mknod"])
        .arg("--aptopt=Apt::Install-Recommends \"false\"")
        .arg(format!("--include={PACKAGES}"))
        .args(EXCLUDED.iter().map(|rule| format!("--dpkgopt={rule}")))
        .arg("--customize-hook=rm -rf \"$1/var/cache/apt\" \"$1/var/lib/apt/lists\"")
        .args(["bookworm", "-"])
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    let mut made = mmdebstrap.spawn().context("cannot start mmdebstrap")?;
    let tar = made.stdout.take().context("mmdebstrap has no output")?;
    let unpacked = command::as_root("tar")
        .args(["-x", "--numeric-owner", "-C", &format!("{SCRATCH}/tree")])
        .stdin(tar)
        .status()
        .context("cannot start tar")?;
    let made = made.wait()?;
    ensure!(
        made.success() && unpacked.success(),
        "mmdebstrap ended with {made}, tar with {unpacked}"
    );
    Ok(())
}

/// Makes the files of the tree and puts them where they are kept; the root last.
fn keep(dir: &Path) -> Result<()> {
    let machine = Machine::of(dir);
    let steps = "set -e; umask 022; mkdir -p \"$(dirname \"$1\")\"; cp tree/boot/vmlinuz-* \"$1\"; \
                 cp tree/boot/initrd.img-* \"$2\"; chmod 0644 \"$1\" \"$2\"; mkdir tree/dev; \
                 mke2fs -q -t ext4 -d tree root.ext4 \"$0\"; cp --sparse=always root.ext4 \"$3\"";
    command::run(
        command::as_root("env")
            .args(["-C", SCRATCH, "sh", "-c", steps, SIZE])
            .args([machine.kernel, machine.initrd, machine.root]),
    )
}
