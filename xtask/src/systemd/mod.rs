//! `cargo xtask systemd-test`: Spore on a whole Debian whose first process is systemd, under QEMU.
//!
//! Run by people; not part of `cargo xtask test`, since it takes minutes and a Debian that nothing
//! else needs. Boots the machine that `deps/debian.rs` made, with the tree's program, the guest and
//! an image on a second disk. What is looked at in there is in `story.rs`.

pub(crate) mod story;

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

use crate::deps::debian;
use crate::progress::{say, step};
use crate::{command, place};

const QEMU: &str = "qemu-system-x86_64";

/// What the machine may take before it counts as hung, in seconds: far longer than it does.
const HANG_S: &str = "2400";

/// The machine's memory, in MiB: a VM inside, and copies of its files in the page cache.
const MEMORY_MIB: &str = "3072";

/// The size of the disk with our files.
const PAYLOAD_SIZE: &str = "1G";

/// Builds the program, boots the machine and counts what its story says.
pub(crate) fn run(dir: &Path) -> Result<()> {
    let machine = debian::machine(dir)?;
    let program = step("build spore", || {
        command::run(place::cargo().args(["build", "--quiet", "--locked", "--package=spore"]))?;
        Ok(place::target()?.join("debug/spore"))
    })?;
    let scratch = tempfile::tempdir()?;
    let payload = scratch.path().join("payload.ext4");
    step("pack the payload", || {
        pack(dir, &program, scratch.path(), &payload)
    })?;
    let console = place::target()?.join("systemd-test-console.log");
    say(format!("the machine's console: {}", console.display()));
    let told = step("boot and tell the story", || {
        boot(&machine, &payload, &console)
    })?;
    let passed = |name: &str| told.iter().any(|line| line == &format!("passed {name}"));
    let missing: Vec<&str> = story::NAMES
        .iter()
        .copied()
        .filter(|name| !passed(name))
        .collect();
    say(format!(
        "{} passed, {} failed, 0 skipped",
        story::NAMES.len() - missing.len(),
        missing.len()
    ));
    ensure!(missing.is_empty(), "not passed: {}", missing.join(", "));
    Ok(())
}

/// A disk with the program, the guest's files, one image and this task itself.
fn pack(dir: &Path, program: &Path, scratch: &Path, payload: &Path) -> Result<()> {
    let tree = scratch.join("tree");
    let spore = tree.join("spore");
    for folder in ["guest", "images/names"] {
        fs::create_dir_all(spore.join(folder))?;
    }
    let stripped = |from: &Path, to: PathBuf| {
        // Symbols are most of it, and the emulated machine has to copy them.
        command::run(Command::new("strip").arg("-o").arg(to).arg(from))
    };
    stripped(program, spore.join("spore"))?;
    let task = std::env::current_exe().context("cannot tell which program this is")?;
    stripped(&task, tree.join("xtask"))?;
    for name in ["vmlinux", "initramfs.cpio", "release"] {
        copy(
            &dir.join("guest").join(name),
            &spore.join("guest").join(name),
        )?;
    }
    let name = Path::new("images/names").join("debian--python3");
    copy(&dir.join(&name), &spore.join(&name))?;
    let id = fs::read_to_string(dir.join(&name))?;
    for extension in ["img", "json"] {
        let file = Path::new("images").join(format!("{}.{extension}", id.trim()));
        copy(&dir.join(&file), &spore.join(&file))?;
    }
    command::run(
        Command::new("mke2fs")
            .args(["-q", "-t", "ext4", "-E", "root_owner=0:0", "-d"])
            .arg(&tree)
            .arg(payload)
            .arg(PAYLOAD_SIZE),
    )
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::copy(from, to).with_context(|| {
        format!(
            "cannot copy {}: run `cargo xtask deps` and `guest`",
            from.display()
        )
    })?;
    Ok(())
}

/// Boots the machine and gives the lines that the story told.
fn boot(machine: &debian::Machine, payload: &Path, console: &Path) -> Result<Vec<String>> {
    let story = "mount /dev/vdb /mnt && exec /mnt/xtask systemd-story >/dev/ttyS1 2>&1";
    let append = format!(
        "console=ttyS0 root=/dev/vda rw quiet mitigations=off nokaslr audit=0 \
         systemd.run=\"/bin/sh -c '{story}'\" systemd.run_failure_action=poweroff \
         systemd.run_success_action=poweroff"
    );
    let drive =
        |path: &Path, more: &str| format!("file={},if=virtio,format=raw,{more}", path.display());
    let mut qemu = Command::new("timeout")
        .args([HANG_S, QEMU, "-M", "q35,accel=tcg", "-cpu", "max"])
        .args(["-smp", "2", "-m", MEMORY_MIB, "-nodefaults"])
        .args(["-no-user-config", "-display", "none", "-no-reboot"])
        .args(["-device", "virtio-rng-pci"])
        .arg("-serial")
        .arg(format!("file:{}", console.display()))
        .args(["-serial", "stdio", "-append", &append, "-kernel"])
        .arg(&machine.kernel)
        .arg("-initrd")
        .arg(&machine.initrd)
        .args(["-drive", &drive(&machine.root, "snapshot=on")])
        .args(["-drive", &drive(payload, "snapshot=on")])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start QEMU")?;
    let stdout = qemu.stdout.take().context("QEMU has no output")?;
    let mut told = Vec::new();
    for line in BufReader::new(stdout).split(b'\n') {
        let line = String::from_utf8_lossy(&line?).trim_end().to_owned();
        say(format!("    {line}"));
        told.push(line);
    }
    let status = qemu.wait()?;
    if !status.success() {
        bail!("the machine did not end by itself: {status}; see its console");
    }
    Ok(told)
}
