//! The host's own programs, and the guest's files.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use super::{Examination, Finding};

/// Where tools are looked for, as those who run them say it.
const FOLDERS: [&str; 4] = ["usr/sbin", "sbin", "usr/bin", "bin"];

/// What a part of Spore runs: name of the finding, program, package, what for.
const TOOLS: [(&str, &str, &str, &str); 2] = [
    ("nftables", "nft", "nftables", "the network policy of a VM"),
    ("e2fsprogs", "mkfs.ext4", "e2fsprogs", "the disks of VMs"),
];

pub(super) fn examine(asked: &Examination, root: &Path) -> Vec<Finding> {
    let mut findings = Vec::from(TOOLS.map(|(name, program, package, what_for)| {
        let found = FOLDERS.map(|folder| root.join(folder).join(program));
        match found.iter().find(|path| is_program(path)) {
            Some(path) => Finding::good(name, shown(path, root)),
            None => Finding::missing(
                name,
                format!("there is no `{program}`, for {what_for}"),
                format!("`apt-get install {package}`"),
            ),
        }
    }));
    findings.push(guest(asked, root));
    findings.push(builds(asked, root));
    findings
}

pub(super) fn qemu(asked: &Examination, root: &Path) -> Finding {
    let path = below(root, &asked.qemu);
    if is_program(&path) {
        return Finding::good("qemu", asked.qemu.display().to_string());
    }
    Finding::missing(
        "qemu",
        format!("there is no program {}", asked.qemu.display()),
        "`apt-get install qemu-system-x86`",
    )
}

pub(super) fn vmm(asked: &Examination, root: &Path) -> Finding {
    let path = below(root, &asked.vmm);
    if is_program(&path) {
        return Finding::good("spore-vmm", asked.vmm.display().to_string());
    }
    Finding::missing(
        "spore-vmm",
        format!("there is no program {}", asked.vmm.display()),
        "`make up` installs it; where it is elsewhere, name it as `vmm` in /etc/spore/spore.toml",
    )
}

fn guest(asked: &Examination, root: &Path) -> Finding {
    for path in [&asked.kernel, &asked.initramfs] {
        if let Err(error) = fs::File::open(below(root, path)) {
            return Finding::missing(
                "guest",
                format!("cannot read {}: {error}", path.display()),
                "`make up` fetches and makes the guest's kernel and first file system; with \
                 others, name them as `kernel` and `initramfs` in /etc/spore/spore.toml",
            );
        }
    }
    Finding::good("guest", asked.kernel.display().to_string())
}

fn builds(asked: &Examination, root: &Path) -> Finding {
    let name = "image-builds";
    let found = FOLDERS.map(|folder| root.join(folder).join("mmdebstrap"));
    if !found.iter().any(|path| is_program(path)) {
        let says = "there is no `mmdebstrap`: images of uploaded folders are made, others are not";
        return Finding::advice(name, says, "`apt-get install mmdebstrap uidmap`");
    }
    let user = &asked.build_user;
    for file in ["passwd", "subuid", "subgid"] {
        let listed = fs::read_to_string(root.join("etc").join(file)).unwrap_or_default();
        let has = |line: &str| line.split(':').next() == Some(user);
        if !listed.lines().any(has) {
            let says = format!("the user `{user}`, who builds images, is not in /etc/{file}");
            return Finding::advice(name, says, "`make up` makes the user");
        }
    }
    Finding::good(name, format!("by the user `{user}`"))
}

fn is_program(path: &Path) -> bool {
    let found = fs::metadata(path);
    found.is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
}

fn below(root: &Path, path: &Path) -> std::path::PathBuf {
    root.join(path.strip_prefix("/").unwrap_or(path))
}

fn shown(path: &Path, root: &Path) -> String {
    let inside = path.strip_prefix(root).unwrap_or(path);
    format!("/{}", inside.display())
}
