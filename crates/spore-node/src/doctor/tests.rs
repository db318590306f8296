//! A host made of files, good at first and then with one thing wrong.

use std::ffi::OsString;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use tempfile::TempDir;

use super::{Examination, Finding, Verdict};

const FILES: [(&str, &str); 9] = [
    ("dev/kvm", ""),
    ("proc/cpuinfo", "processor : 0\nflags\t\t: fpu vmx sse2\n"),
    (
        "proc/meminfo",
        "MemTotal:        8192000 kB\nMemFree: 1 kB\n",
    ),
    (
        "proc/self/mounts",
        "cgroup2 /sys/fs/cgroup cgroup2 rw,nosuid,favordynmods 0 0\n",
    ),
    (
        "sys/fs/cgroup/cgroup.controllers",
        "cpuset cpu io memory pids\n",
    ),
    ("sys/kernel/mm/ksm/run", "0\n"),
    ("sys/devices/system/cpu/smt/active", "0\n"),
    (
        "sys/devices/system/cpu/vulnerabilities/meltdown",
        "Mitigation: PTI\n",
    ),
    ("etc/subgid", "other:1:2\nspore-build:200000:65536\n"),
];

const PROGRAMS: [&str; 5] = [
    "usr/local/lib/spore/spore-vmm",
    "usr/bin/qemu-system-x86_64",
    "usr/sbin/nft",
    "sbin/mkfs.ext4",
    "usr/bin/mmdebstrap",
];

struct Host {
    root: TempDir,
    asked: Examination,
}

impl Host {
    fn new() -> Self {
        let host = Self {
            root: tempfile::tempdir().unwrap(),
            asked: Examination {
                probe: says(r#"{"usable":{"rounds_per_s":1200000000}}"#),
                emulates: false,
                qemu: "/usr/bin/qemu-system-x86_64".into(),
                vmm: "/usr/local/lib/spore/spore-vmm".into(),
                kernel: "/guest/vmlinux".into(),
                initramfs: "/guest/initramfs".into(),
                data_dir: "/var/lib/spore".into(),
                memory_reserve_mib: 512,
                build_user: "spore-build".to_owned(),
            },
        };
        for (path, text) in FILES {
            host.put(path, text);
        }
        for path in ["guest/vmlinux", "guest/initramfs"] {
            host.put(path, "");
        }
        for path in ["etc/passwd", "etc/subuid"] {
            host.put(
                path,
                "spore-build:x:900:900::/nonexistent:/usr/sbin/nologin\n",
            );
        }
        for path in PROGRAMS {
            host.put(path, "");
            fs::set_permissions(host.path(path), Permissions::from_mode(0o755)).unwrap();
        }
        host
    }

    fn path(&self, path: &str) -> std::path::PathBuf {
        self.root.path().join(path)
    }

    fn put(&self, path: &str, text: &str) {
        let path = self.path(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn remove(&self, path: &str) {
        fs::remove_file(self.path(path)).unwrap();
    }

    fn finding(&self, name: &str) -> Finding {
        let findings = self.asked.below(self.root.path());
        let found: Vec<Finding> = findings.into_iter().filter(|it| it.name == name).collect();
        assert_eq!(found.len(), 1, "{name}: {found:?}");
        found.into_iter().next().unwrap()
    }

    fn assert(&self, name: &str, verdict: Verdict, says: &str) {
        let finding = self.finding(name);
        assert_eq!(finding.verdict, verdict, "{finding:?}");
        assert!(finding.says.contains(says), "{finding:?}");
        assert_eq!(
            finding.remedy.is_empty(),
            verdict == Verdict::Good,
            "{finding:?}"
        );
    }
}

/// A program that prints this.
fn says(text: &str) -> Vec<OsString> {
    ["/bin/echo", text].map(OsString::from).to_vec()
}

#[test]
fn a_good_host_has_nothing_to_mend() {
    let host = Host::new();
    let findings = host.asked.below(host.root.path());
    // The disk's room is this machine's.
    let wrong: Vec<&str> = findings
        .iter()
        .filter(|finding| finding.verdict != Verdict::Good && finding.name != "disk")
        .map(|finding| finding.name)
        .collect();
    assert_eq!(wrong, Vec::<&str>::new(), "{findings:#?}");
    host.assert("boundary", Verdict::Good, "VMs run on KVM");
    host.assert("spore-vmm", Verdict::Good, "spore-vmm");
    host.assert(
        "kvm",
        Verdict::Good,
        "kvm: guests run on the processor (1200 M rounds/s)",
    );
}

#[test]
fn where_vms_are_emulated_that_is_said_and_qemu_is_needed() {
    let mut host = Host::new();
    host.remove("usr/local/lib/spore/spore-vmm");
    host.asked.emulates = true;
    host.assert("boundary", Verdict::Advice, "none (qemu-tcg)");
    host.assert("qemu", Verdict::Good, "/usr/bin/qemu-system-x86_64");
    assert!(host.finding("boundary").remedy.contains("hypervisor"));
    host.asked.emulates = false;
    host.remove("dev/kvm");
    host.remove("usr/bin/qemu-system-x86_64");
    host.assert("boundary", Verdict::Advice, "none (qemu-tcg)");
    host.assert("qemu", Verdict::Missing, "/usr/bin/qemu-system-x86_64");
}

#[test]
fn what_no_vm_runs_without_is_missing() {
    for (gone, name, says) in [
        (
            "usr/local/lib/spore/spore-vmm",
            "spore-vmm",
            "/usr/local/lib/spore/spore-vmm",
        ),
        ("usr/sbin/nft", "nftables", "`nft`"),
        ("sbin/mkfs.ext4", "e2fsprogs", "`mkfs.ext4`"),
        ("guest/vmlinux", "guest", "/guest/vmlinux"),
        ("guest/initramfs", "guest", "/guest/initramfs"),
        (
            "sys/fs/cgroup/cgroup.controllers",
            "cgroups",
            "cpu, memory, pids",
        ),
    ] {
        let host = Host::new();
        host.remove(gone);
        host.assert(name, Verdict::Missing, says);
    }
    let host = Host::new();
    host.put("proc/meminfo", "MemTotal: 524288 kB\n");
    host.assert("memory", Verdict::Missing, "0 MiB of 512");
    // A file that nobody may run is no program.
    fs::set_permissions(host.path("usr/sbin/nft"), Permissions::from_mode(0o644)).unwrap();
    host.assert("nftables", Verdict::Missing, "`nft`");
}

#[test]
fn what_leaks_or_slows_is_advice() {
    let vulnerable = "sys/devices/system/cpu/vulnerabilities/mds";
    for (path, text, name, says) in [
        (
            vulnerable,
            "Vulnerable: no microcode\n",
            "processor",
            "mitigate mds",
        ),
        ("sys/kernel/mm/ksm/run", "1\n", "ksm", "equal pages"),
        (
            "sys/devices/system/cpu/smt/active",
            "1\n",
            "smt",
            "share a core",
        ),
        (
            "proc/self/mounts",
            "cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n",
            "favordynmods",
            "slowly",
        ),
        (
            "etc/subuid",
            "somebody:1:2\n",
            "image-builds",
            "/etc/subuid",
        ),
    ] {
        let host = Host::new();
        host.put(path, text);
        host.assert(name, Verdict::Advice, says);
    }
    let host = Host::new();
    host.remove("usr/bin/mmdebstrap");
    host.assert("image-builds", Verdict::Advice, "mmdebstrap");
}

#[test]
fn controllers_of_the_first_version_serve() {
    let host = Host::new();
    host.put("sys/fs/cgroup/cgroup.controllers", "hugetlb\n");
    let mounts = "cgroup /sys/fs/cgroup/memory cgroup rw,memory 0 0\n\
                  cgroup /sys/fs/cgroup/cpu cgroup rw,cpu,cpuacct 0 0\n";
    host.put("proc/self/mounts", mounts);
    host.assert("cgroups", Verdict::Missing, "no controller pids");
    let pids = "cgroup /sys/fs/cgroup/pids cgroup rw,pids 0 0\n";
    host.put("proc/self/mounts", &format!("{mounts}{pids}"));
    host.assert("cgroups", Verdict::Good, "cpu, memory, pids");
}

#[test]
fn a_kvm_that_is_of_no_use_is_told_with_its_reason() {
    let mut host = Host::new();
    host.put("proc/cpuinfo", "flags : fpu hypervisor\n");
    host.assert("kvm", Verdict::Good, "kvm-nested:");
    host.asked.probe = says(r#"{"unusable":{"why":"a small guest is slow"}}"#);
    host.assert("kvm", Verdict::Advice, "a small guest is slow");
    // Where guests do not run on the processor, nobody shares one.
    let findings = host.asked.below(host.root.path());
    assert!(
        findings
            .iter()
            .all(|it| it.name != "smt" && it.name != "favordynmods")
    );
    host.asked.probe = says("not what was asked for");
    host.assert("kvm", Verdict::Advice, "did not");
    host.asked.probe = ["/bin/false"].map(OsString::from).to_vec();
    host.assert("kvm", Verdict::Advice, "ended with");
    host.asked.probe = Vec::new();
    host.assert("kvm", Verdict::Advice, "no program");
    host.remove("dev/kvm");
    host.assert("kvm", Verdict::Advice, "no /dev/kvm");
}

#[test]
fn this_host_can_be_looked_at() {
    let asked = Host::new().asked;
    let findings = asked.below(Path::new("/"));
    assert!(findings.len() >= 9, "{findings:#?}");
}
