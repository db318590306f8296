//! Whether KVM is there and runs guests.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use spore_wire::node::Boundary;

use super::{Finding, ProbeReport};
use crate::tool::{self, ToolError};

const NAME: &str = "kvm";

/// The probe takes well under a second where KVM is of use, and a few where it is not.
const PROBE_LIMIT: Duration = Duration::from_secs(60);

const SWITCH_ON: &str = "use a machine whose processor has virtualisation (VT-x, AMD-V) switched \
     on in its firmware; in a VM, have its host allow nested virtualisation; then `modprobe \
     kvm_intel` or `modprobe kvm_amd`";

pub(super) fn examine(probe: &[OsString], root: &Path) -> Finding {
    let device = root.join("dev/kvm");
    match File::options().read(true).write(true).open(&device) {
        Ok(_device) => {}
        Err(error) if error.kind() == ErrorKind::NotFound => {
            return Finding::advice(NAME, "there is no /dev/kvm", SWITCH_ON);
        }
        Err(error) if error.kind() == ErrorKind::PermissionDenied => {
            let says = "/dev/kvm is not this user's to open";
            return Finding::advice(NAME, says, "run `sudo spore doctor`");
        }
        Err(error) => {
            return Finding::advice(NAME, format!("/dev/kvm does not open: {error}"), SWITCH_ON);
        }
    }
    let level = level(root);
    match report(probe) {
        Ok(ProbeReport::Usable { rounds_per_s }) => {
            let millions = rounds_per_s / 1_000_000;
            let says = format!("{level}: guests run on the processor ({millions} M rounds/s)");
            Finding::good(NAME, says)
        }
        Ok(ProbeReport::Unusable { why }) => Finding::advice(NAME, why, SWITCH_ON),
        Err(error) => {
            let says = format!("the guest that tells whether KVM is of use did not: {error}");
            Finding::advice(NAME, says, SWITCH_ON)
        }
    }
}

/// The boundary of guests that KVM runs, as everything of Spore calls it.
pub(super) fn level(root: &Path) -> &'static str {
    match is_nested(root) {
        true => "kvm-nested",
        false => "kvm",
    }
}

/// What stands between guests and the host where KVM runs them; otherwise why it does not. Blocks.
///
/// # Errors
/// Why KVM is of no use, for people.
pub fn boundary(probe: &[OsString]) -> Result<Boundary, String> {
    match report(probe)? {
        ProbeReport::Usable { .. } if is_nested(Path::new("/")) => Ok(Boundary::KvmNested),
        ProbeReport::Usable { .. } => Ok(Boundary::Kvm),
        ProbeReport::Unusable { why } => Err(why),
    }
}

/// Whether this host is a guest itself (the `hypervisor` flag, CPUID leaf 1, ECX bit 31).
fn is_nested(root: &Path) -> bool {
    let info = fs::read_to_string(root.join("proc/cpuinfo")).unwrap_or_default();
    let mut lines = info.lines();
    let flags = lines.find_map(|line| line.strip_prefix("flags"));
    flags.is_some_and(|flags| flags.split_whitespace().any(|flag| flag == "hypervisor"))
}

/// Asks a process of its own: a KVM that never comes back from a guest can only be ended.
fn report(probe: &[OsString]) -> Result<ProbeReport, String> {
    let Some((program, arguments)) = probe.split_first() else {
        return Err("no program is named for it".to_owned());
    };
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::null());
    let said =
        tool::run(command, PROBE_LIMIT, "install Spore again").map_err(|error| match error {
            ToolError::Slow { limit, .. } => format!("KVM did not come back within {limit:?}"),
            other => other.to_string(),
        })?;
    serde_json::from_slice(&said).map_err(|error| error.to_string())
}
