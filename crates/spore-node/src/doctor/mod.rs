//! What this host lacks for VMs, and what to do about it.
//!
//! Called by `spore doctor`, beside a daemon or without one. Looks and changes nothing: it makes no
//! VM, no cgroup and no rule. What the kernel says is read below a folder, `/` outside of tests.
//!
//! ```text
//!   kvm       /dev/kvm, and a guest of a hundred bytes in a process of its own
//!   kernel    cgroups, what the processor leaks, pages that are shared, memory, disk
//!   programs  the host's own tools, and the guest's kernel and first file system
//! ```

mod kernel;
pub mod kvm;
mod programs;
#[cfg(test)]
mod tests;

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use serde::Serialize;

/// How something stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// As it should be.
    Good,
    /// VMs run; they would be safer or faster otherwise.
    Advice,
    /// Without it no VM runs.
    Missing,
}

/// What was found of one thing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What was looked at; a name that stays the same over versions.
    pub name: &'static str,
    /// How it stands.
    pub verdict: Verdict,
    /// What was seen.
    pub says: String,
    /// What to do; empty where it is as it should be.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub remedy: String,
}

impl Finding {
    /// Something that is as it should be.
    #[must_use]
    pub fn good(name: &'static str, says: impl Into<String>) -> Self {
        let says = says.into();
        Self {
            name,
            verdict: Verdict::Good,
            says,
            remedy: String::new(),
        }
    }

    /// Something that could be better.
    #[must_use]
    pub fn advice(name: &'static str, says: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            verdict: Verdict::Advice,
            remedy: remedy.into(),
            ..Self::good(name, says)
        }
    }

    /// Something that no VM runs without.
    #[must_use]
    pub fn missing(name: &'static str, says: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            verdict: Verdict::Missing,
            ..Self::advice(name, says, remedy)
        }
    }
}

/// Where to look.
#[derive(Clone, Debug)]
pub struct Examination {
    /// What runs the guest that tells whether KVM is of use, and prints what it found
    /// ([`ProbeReport`]).
    pub probe: Vec<OsString>,
    /// Whether VMs are emulated, whatever KVM can.
    pub emulates: bool,
    /// QEMU's program, where VMs are emulated.
    pub qemu: PathBuf,
    /// `spore-vmm`, where they are not.
    pub vmm: PathBuf,
    /// The guest's kernel.
    pub kernel: PathBuf,
    /// The guest's first file system.
    pub initramfs: PathBuf,
    /// The disk of images, snapshots and the store; its nearest folder that is there is asked.
    pub data_dir: PathBuf,
    /// Memory that VMs do not get, in MiB.
    pub memory_reserve_mib: u64,
    /// The user who builds images.
    pub build_user: String,
}

/// What the probe's process prints, as one JSON document.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ProbeReport {
    /// KVM runs guests, a loop of two instructions so often a second.
    Usable {
        /// Rounds a second.
        rounds_per_s: u64,
    },
    /// It does not.
    Unusable {
        /// Why.
        why: String,
    },
}

impl Examination {
    /// Looks at everything, what matters most first.
    #[must_use]
    pub fn findings(&self) -> Vec<Finding> {
        self.below(Path::new("/"))
    }

    fn below(&self, root: &Path) -> Vec<Finding> {
        let kvm = kvm::examine(&self.probe, root);
        let is_usable = kvm.verdict == Verdict::Good;
        let hosts = is_usable && !self.emulates;
        let boundary = boundary(root, is_usable, self.emulates);
        let mut findings = vec![kvm, boundary];
        findings.push(match hosts {
            true => programs::vmm(self, root),
            false => programs::qemu(self, root),
        });
        findings.extend(programs::examine(self, root));
        findings.extend(kernel::examine(self, root, is_usable));
        findings
    }
}

/// What stands between VMs and this host.
fn boundary(root: &Path, is_usable: bool, emulates: bool) -> Finding {
    let emulated = "VMs run in QEMU's software emulation, in a jail each: none (qemu-tcg), which \
                    is no boundary of hardware";
    match (is_usable, emulates) {
        (true, false) => {
            let says = format!("VMs run on KVM, in a jail each: {}", kvm::level(root));
            Finding::good("boundary", says)
        }
        (true, true) => Finding::advice(
            "boundary",
            emulated,
            "KVM runs guests here: take `hypervisor = \"qemu\"` out of the configuration",
        ),
        (false, _) => Finding::advice(
            "boundary",
            emulated,
            "run only programs here whose authors you trust, until KVM is of use (above)",
        ),
    }
}
