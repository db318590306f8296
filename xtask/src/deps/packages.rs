//! Debian packages that Spore is built, run and tested with, and the user that builds images.
//!
//! Called by `deps`, and by `clean-host` to remove what was installed. Never upgrades a package,
//! and never removes one that was there before or that another needs.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::command;
use crate::progress::{say, step};

/// What the daemon, the build and the tests need, each with its reason.
const PACKAGES: &[(&str, &str)] = &[
    ("ca-certificates", "apps that speak TLS"),
    ("curl", "`make up` shows a wake"),
    ("e2fsprogs", "empty ext4 disks"),
    ("gcc", "linking"),
    ("iproute2", "namespaces in tests"),
    ("kmod", "modules.dep of the guest kernel"),
    ("libc6-dev", "linking the static guest"),
    ("mmdebstrap", "Debian images, unprivileged"),
    ("nftables", "the network policy of a VM"),
    ("passwd", "the user that builds images"),
    ("procps", "tests that look at processes"),
    ("qemu-system-x86", "the qemu driver"),
    ("qemu-utils", "copy-on-write scratch disks"),
    (
        "squashfs-tools",
        "tests read images with a second implementation",
    ),
    ("uidmap", "uid ranges for unprivileged builds"),
    ("util-linux", "setpriv"),
    ("xz-utils", "compressed kernel modules"),
    ("zstd", "tests make uploads"),
];

/// What `bench/` compares with.
const BENCH_PACKAGES: &[(&str, &str)] = &[("nginx-light", "the gateway's peer"), ("wrk", "load")];

/// The user that mmdebstrap runs as; it owns nothing and has a range of uids for its namespace.
pub(crate) const BUILD_USER: &str = "spore-build";

/// In the folder of what was fetched: names of the packages that `install` brought, a line each.
const RECORD: &str = "packages";

/// Installs what is missing and makes the build user; `dir` keeps what was installed.
pub(crate) fn install(bench: bool, dir: &Path) -> Result<()> {
    let mut wanted: Vec<&str> = PACKAGES.iter().map(|(name, _)| *name).collect();
    if bench {
        wanted.extend(BENCH_PACKAGES.iter().map(|(name, _)| *name));
    }
    if !command::exists("dpkg-query") {
        bail!(
            "this is not a Debian system: install the equivalents of {} by hand",
            wanted.join(", ")
        );
    }
    let before = installed()?;
    let missing = missing(&wanted, &before);
    if missing.is_empty() {
        say("Debian packages: all here");
    } else {
        let what = format!("install {}", missing.join(" "));
        step(&what, || {
            command::run(command::as_root("apt-get").args(["-qq", "update"]))?;
            let outcome = command::run(
                apt()
                    .args(["--no-install-recommends", "install"])
                    .args(&missing),
            );
            // Also what a failed run left installed is to be removed one day.
            record(dir, installed()?.difference(&before))?;
            outcome
        })?;
    }
    make_build_user()
}

/// apt-get that asks nothing.
fn apt() -> Command {
    let mut apt = command::as_root("env");
    apt.args(["DEBIAN_FRONTEND=noninteractive", "apt-get", "-qq", "-y"]);
    apt
}

/// Adds names to the record, durably.
fn record<'a>(dir: &Path, names: impl Iterator<Item = &'a String>) -> Result<()> {
    let path = dir.join(RECORD);
    let mut file = fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(&path)
        .with_context(|| format!("cannot write {}", path.display()))?;
    for name in names {
        writeln!(file, "{name}")?;
    }
    Ok(file.sync_all()?)
}

/// Removes the packages that `install` brought and nothing else needs by now: apt says which these
/// are once they count as installed for others' sake only.
pub(crate) fn remove(dir: &Path) -> Result<()> {
    let recorded = fs::read_to_string(dir.join(RECORD)).unwrap_or_default();
    let installed = installed()?;
    let ours: BTreeSet<&str> = recorded
        .lines()
        .filter(|name| installed.contains(*name))
        .collect();
    if ours.is_empty() {
        return Ok(());
    }
    command::run(
        command::as_root("apt-mark")
            .args(["-qq", "auto"])
            .args(&ours),
    )?;
    let plan = command::output(apt().args(["--simulate", "autoremove"]))?;
    let going = removed(&plan, &ours);
    if going.is_empty() {
        return Ok(());
    }
    step(&format!("remove {}", going.join(" ")), || {
        command::run(apt().args(["--purge", "remove"]).args(&going))
    })
}

/// What of `ours` a plan that `apt-get --simulate` printed would remove.
fn removed<'a>(plan: &'a str, ours: &BTreeSet<&str>) -> Vec<&'a str> {
    plan.lines()
        .filter_map(|line| line.strip_prefix("Remv ")?.split_whitespace().next())
        .filter(|name| ours.contains(name))
        .collect()
}

/// Names of installed packages, without their architecture.
fn installed() -> Result<BTreeSet<String>> {
    let list = command::output(Command::new("dpkg-query").args([
        "-W",
        "-f",
        "${db:Status-Abbrev} ${Package}\n",
    ]))?;
    Ok(list
        .lines()
        .filter_map(|line| line.strip_prefix("ii "))
        .map(|name| name.trim().to_owned())
        .collect())
}

/// What of `wanted` is not installed.
fn missing<'a>(wanted: &[&'a str], installed: &BTreeSet<String>) -> Vec<&'a str> {
    wanted
        .iter()
        .copied()
        .filter(|name| !installed.contains(*name))
        .collect()
}

/// Makes the build user with a range of subordinate uids.
fn make_build_user() -> Result<()> {
    let ranges = fs::read_to_string("/etc/subuid").unwrap_or_default();
    let has_range = ranges
        .lines()
        .any(|line| line.starts_with(&format!("{BUILD_USER}:")));
    let is_there = Command::new("getent")
        .args(["passwd", BUILD_USER])
        .output()
        .context("cannot start `getent`")?
        .status
        .success();
    match (is_there, has_range) {
        (true, true) => Ok(()),
        (true, false) => bail!(
            "user {BUILD_USER} has no line in /etc/subuid: remove it with `userdel {BUILD_USER}` \
             and run this again"
        ),
        (false, _) => {
            say(format!("making user {BUILD_USER}"));
            command::run(command::as_root("useradd").args([
                "--system",
                "--add-subids-for-system",
                "--no-create-home",
                "--home-dir=/nonexistent",
                "--shell=/usr/sbin/nologin",
                BUILD_USER,
            ]))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::{PACKAGES, missing, removed};

    #[test]
    fn only_what_is_not_installed_is_missing() {
        let installed = BTreeSet::from(["kmod".to_owned()]);
        assert_eq!(missing(&["kmod", "zstd"], &installed), ["zstd"]);
    }

    #[test]
    fn only_what_was_installed_here_and_nobody_needs_is_removed() {
        let plan = "Remv uidmap [1:4.13]\nRemv others [1]\nRemv zstd [1.5.4]\n";
        let ours = BTreeSet::from(["kmod", "uidmap", "zstd"]);
        assert_eq!(removed(plan, &ours), ["uidmap", "zstd"]);
    }

    #[test]
    fn packages_are_sorted_and_named_once() {
        assert!(PACKAGES.windows(2).all(|pair| pair[0].0 < pair[1].0));
    }
}
