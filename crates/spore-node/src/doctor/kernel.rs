//! What the kernel and the hardware give and leak.

use std::fs;
use std::path::Path;

use rustix::fs::statvfs;

use super::{Examination, Finding};

/// Controllers that bound a VM.
const CONTROLLERS: [&str; 3] = ["cpu", "memory", "pids"];

/// Below this no VM of any size has room.
const MEMORY_MIB_MIN: u64 = 256;

/// Below this images and snapshots soon find no room.
const DISK_GIB_LOW: u64 = 5;

pub(super) fn examine(asked: &Examination, root: &Path, kvm: bool) -> Vec<Finding> {
    let mut findings = vec![cgroups(root)];
    if kvm {
        findings.extend([favordynmods(root), threads(root)]);
    }
    findings.extend([
        vulnerabilities(root),
        ksm(root),
        memory(asked, root),
        disk(asked, root),
    ]);
    findings
}

/// Both layouts serve: of version 2, and controllers of version 1 mounted one by one (cgroups(7)).
fn cgroups(root: &Path) -> Finding {
    let name = "cgroups";
    let mounts = read(root, "proc/self/mounts");
    let unified = read(root, "sys/fs/cgroup/cgroup.controllers");
    let has = |controller: &str| {
        unified.split_whitespace().any(|it| it == controller)
            || mounts.lines().any(|line| is_first(line, controller))
    };
    let missing: Vec<&str> = CONTROLLERS.into_iter().filter(|it| !has(it)).collect();
    if missing.is_empty() {
        let version = if unified.is_empty() { 1 } else { 2 };
        let with = CONTROLLERS.join(", ");
        return Finding::good(name, format!("version {version} with {with}"));
    }
    Finding::missing(
        name,
        format!("there is no controller {}", missing.join(", ")),
        "mount cgroups (systemd does); on kernels that leave the controller of memory out, boot \
         with `cgroup_enable=memory`",
    )
}

/// Whether a line of proc_pid_mounts(5) is that of a hierarchy of version 1 with the controller.
fn is_first(line: &str, controller: &str) -> bool {
    let mut words = line.split_whitespace().skip(2);
    let (kind, options) = (words.next(), words.next().unwrap_or_default());
    kind == Some("cgroup") && options.split(',').any(|option| option == controller)
}

/// Moving processes into cgroups waits for a grace period each, unless the mount says otherwise
/// (cgroup v2, `favordynmods`).
fn favordynmods(root: &Path) -> Finding {
    let name = "favordynmods";
    let mounts = read(root, "proc/self/mounts");
    let of_second = |line: &&str| line.split_whitespace().nth(2) == Some("cgroup2");
    let mount = mounts.lines().find(of_second).unwrap_or_default();
    let options = mount.split_whitespace().nth(3).unwrap_or_default();
    if mount.is_empty() || options.split(',').any(|option| option == "favordynmods") {
        return Finding::good(name, "moving processes between cgroups is quick");
    }
    let at = mount.split_whitespace().nth(1).unwrap_or("/sys/fs/cgroup");
    Finding::advice(
        name,
        "many VMs at once start slowly, since cgroup2 is mounted without it",
        format!("`mount -o remount,favordynmods {at}`, at each boot"),
    )
}

/// Two threads of a core share its caches, and two VMs may be on them.
fn threads(root: &Path) -> Finding {
    let name = "smt";
    if read(root, "sys/devices/system/cpu/smt/active").trim() != "1" {
        return Finding::good(name, "no two threads share a core");
    }
    Finding::advice(
        name,
        "threads of two VMs may share a core, and what its caches tell",
        "for programs of strangers, boot with `nosmt`",
    )
}

/// What sysfs calls vulnerable (Documentation/admin-guide/hw-vuln).
fn vulnerabilities(root: &Path) -> Finding {
    let name = "processor";
    let folder = root.join("sys/devices/system/cpu/vulnerabilities");
    let mut open: Vec<String> = fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| {
            let said = fs::read_to_string(entry.path()).unwrap_or_default();
            said.starts_with("Vulnerable")
        })
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    open.sort_unstable();
    if open.is_empty() {
        return Finding::good(name, "the kernel mitigates what it knows of");
    }
    Finding::advice(
        name,
        format!("the kernel does not mitigate {}", open.join(", ")),
        "install the newest kernel and microcode, and boot without `mitigations=off`",
    )
}

/// Pages of equal content become one, and how long a write takes tells a stranger of it.
fn ksm(root: &Path) -> Finding {
    if read(root, "sys/kernel/mm/ksm/run").trim() != "1" {
        return Finding::good("ksm", "equal pages of different VMs stay apart");
    }
    Finding::advice(
        "ksm",
        "the kernel makes equal pages of different programs one, which tells each of the other",
        "`echo 2 > /sys/kernel/mm/ksm/run`, at each boot",
    )
}

fn memory(asked: &Examination, root: &Path) -> Finding {
    let name = "memory";
    let info = read(root, "proc/meminfo");
    let total = info.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let kib = total.and_then(|rest| rest.trim().trim_end_matches(" kB").parse::<u64>().ok());
    let mib = kib.unwrap_or(0) / 1024;
    let reserve = asked.memory_reserve_mib;
    let for_vms = mib.saturating_sub(reserve);
    if for_vms >= MEMORY_MIB_MIN {
        return Finding::good(
            name,
            format!("{for_vms} MiB for VMs, {reserve} for the host"),
        );
    }
    Finding::missing(
        name,
        format!("{for_vms} MiB of {mib} are left for VMs, which is too little for one"),
        "give the host more, or set a smaller `memory_reserve` in /etc/spore/spore.toml",
    )
}

fn disk(asked: &Examination, root: &Path) -> Finding {
    let name = "disk";
    let wanted = root.join(asked.data_dir.strip_prefix("/").unwrap_or(&asked.data_dir));
    let mut folders = wanted.ancestors();
    let Some(found) = folders.find_map(|folder| statvfs(folder).ok()) else {
        return Finding::advice(name, "its room cannot be asked", "see dmesg(1)");
    };
    let gib = found.f_bavail.saturating_mul(found.f_frsize) >> 30;
    let at = asked.data_dir.display();
    if gib >= DISK_GIB_LOW {
        return Finding::good(name, format!("{gib} GiB are free at {at}"));
    }
    Finding::advice(
        name,
        format!("{gib} GiB are free at {at}: images and snapshots soon find no room"),
        "`spore image gc`, `spore snapshot gc`, or a larger disk",
    )
}

fn read(root: &Path, path: &str) -> String {
    fs::read_to_string(root.join(path)).unwrap_or_default()
}
