//! Which driver hosts VMs here, and opening it.
//!
//! What a daemon chose is written down beside its sockets: `spore down` opens the same, whatever
//! the host has become since.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, Result, bail, ensure};
use spore_node::doctor::kvm;
use spore_node::egress::launch::EgressLauncher;
use spore_node::hypervisor::Driver;
use spore_node::hypervisor::kvm::{Kvm, KvmConfig};
use spore_node::hypervisor::qemu::{Qemu, QemuConfig};
use spore_node::hypervisor::room::RoomConfig;
use spore_wire::node::Boundary;

use super::parts::verb;
use crate::config::ServerConfig;

/// Namespaces made ahead: a burst of wakes does not wait for them.
const NAMESPACE_POOL: usize = 4;

/// VMMs made ahead, each some MiB: a wake or a fork does not wait for one.
const PARKED_VMMS: usize = 2;

/// From so much written memory on, a checkpoint copies the VMM instead of reading it in the pause
/// (docs/adr/0005).
const FREEZE_FROM_MIB: u32 = 32;

/// What hosts VMs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum HypervisorChoice {
    /// `kvm` where KVM runs guests, and else `qemu`.
    #[default]
    Auto,
    /// Spore's own VMM on KVM.
    Kvm,
    /// QEMU in software.
    Qemu,
}

impl HypervisorChoice {
    /// What it is called where it is chosen, and by what is chosen.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Kvm => "kvm",
            Self::Qemu => "qemu",
        }
    }
}

impl FromStr for HypervisorChoice {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut all = [Self::Auto, Self::Kvm, Self::Qemu].into_iter();
        let named = all.find(|choice| choice.name() == text);
        named.ok_or("it must be auto, kvm or qemu")
    }
}

/// Opens the driver that the configuration asks for.
///
/// # Errors
/// When the host lacks something; the message says what and what to do.
pub(super) async fn open(config: &ServerConfig, program: &Path) -> Result<Driver> {
    let choice = choose(config.hypervisor, hosting(config)?)?;
    let driver = match boundary(choice, program).await? {
        Some(boundary) => Kvm::open(kvm_config(config, program, boundary))
            .await?
            .into(),
        None => {
            limits_are_kept(config)?;
            Driver::from(Qemu::open(qemu_config(config, program)).await?)
        }
    };
    let name = driver.hypervisor.caps().name;
    fs::write(chosen(config), name).context("write down which driver hosts VMs")?;
    Ok(driver)
}

/// The driver of the daemon that was here, for stopping what it left.
///
/// # Errors
/// When the host's resources cannot be used.
pub(super) fn open_to_stop(config: &ServerConfig, program: &Path) -> Result<Driver> {
    let of_kvm = match fs::read_to_string(chosen(config)) {
        Ok(name) => name == "kvm",
        Err(_none) => config.hypervisor == HypervisorChoice::Kvm,
    };
    if of_kvm {
        // Nothing starts any more, so nothing is said of its boundary.
        return Ok(Kvm::open_to_stop(kvm_config(config, program, Boundary::Kvm))?.into());
    }
    Ok(Qemu::open_to_stop(qemu_config(config, program))?.into())
}

fn chosen(config: &ServerConfig) -> PathBuf {
    config.runtime_dir.join("hypervisor")
}

/// The driver of VMs that are there, which the daemon before this one left running.
fn hosting(config: &ServerConfig) -> Result<Option<HypervisorChoice>> {
    let vms = room(config).runtime_dir.join("vms");
    let is_there = match fs::read_dir(&vms) {
        Ok(mut entries) => entries.next().is_some(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => false,
        Err(error) => return Err(error).with_context(|| vms.display().to_string()),
    };
    let name = fs::read_to_string(chosen(config));
    Ok(name
        .ok()
        .filter(|_| is_there)
        .and_then(|name| name.parse().ok()))
}

/// What hosts VMs from now on. No driver takes up another's VMs, so what hosts some goes on.
fn choose(choice: HypervisorChoice, hosting: Option<HypervisorChoice>) -> Result<HypervisorChoice> {
    match hosting {
        Some(hosting) if choice == HypervisorChoice::Auto => Ok(hosting),
        Some(hosting) if choice != hosting => bail!(
            "VMs of `{hosting}` run here, and `hypervisor` is to be `{choice}`, which cannot take \
             them over: end them with `spore down`, or go on with `{hosting}`",
            hosting = hosting.name(),
            choice = choice.name(),
        ),
        Some(_) | None => Ok(choice),
    }
}

/// What stands between guests and the host, where they are to run on KVM.
async fn boundary(choice: HypervisorChoice, program: &Path) -> Result<Option<Boundary>> {
    if choice == HypervisorChoice::Qemu {
        return Ok(None);
    }
    let probe = vec![program.into(), OsString::from("kvm-probe")];
    let probed = tokio::task::spawn_blocking(move || kvm::boundary(&probe)).await?;
    match (probed, choice) {
        (Ok(boundary), _) => Ok(Some(boundary)),
        (Err(why), HypervisorChoice::Kvm) => bail!(
            "VMs are to be hosted by `kvm`, and KVM runs no guests here: {why}; see `spore doctor`"
        ),
        (Err(why), _) => {
            tracing::info!(why, "KVM runs no guests here: VMs are emulated");
            Ok(None)
        }
    }
}

/// QEMU's VMs have no limits of disk and network: whoever wants them must not believe that they
/// are there.
fn limits_are_kept(config: &ServerConfig) -> Result<()> {
    ensure!(
        config.rates.are_none(),
        "disk_bandwidth, disk_operations and network_bandwidth are kept by `kvm` only, and VMs are \
         emulated here: remove them, or use a host on which KVM runs guests (`spore doctor`)"
    );
    Ok(())
}

fn room(config: &ServerConfig) -> RoomConfig {
    RoomConfig {
        // Not the journals' folder: what the driver removes of a VM must not take its journal.
        runtime_dir: config.runtime_dir.join("host"),
        data_dir: config.data_dir.clone(),
        cgroup_parent: config.cgroup_parent.clone(),
        uid_first: config.uid_first,
        // The last is the image workers' own.
        uid_count: config.uid_count - 1,
        pool_size: NAMESPACE_POOL,
    }
}

fn egress(config: &ServerConfig, program: &Path) -> EgressLauncher {
    EgressLauncher::new(program, verb("egress")).asking(config.resolvers.clone())
}

fn kvm_config(config: &ServerConfig, program: &Path, boundary: Boundary) -> KvmConfig {
    KvmConfig {
        room: room(config),
        kernel: config.kernel.clone(),
        kernel_release: kernel_release(&config.kernel),
        kernel_arguments: config.kernel_arguments.clone(),
        initramfs: config.initramfs.clone(),
        vmm: config.vmm.clone(),
        device: "/dev/kvm".into(),
        boundary,
        parked: PARKED_VMMS,
        freeze_from_mib: FREEZE_FROM_MIB,
        rates: config.rates,
        egress: egress(config, program),
    }
}

fn qemu_config(config: &ServerConfig, program: &Path) -> QemuConfig {
    let launcher = [program.to_string_lossy().into_owned(), "jail".to_owned()];
    QemuConfig {
        room: room(config),
        kernel: config.kernel.clone(),
        kernel_release: kernel_release(&config.kernel),
        kernel_arguments: config.kernel_arguments.clone(),
        initramfs: config.initramfs.clone(),
        qemu: QemuConfig::DEBIAN_QEMU.into(),
        libraries: QemuConfig::debian_libraries(),
        launcher: launcher.to_vec(),
        egress: egress(config, program),
    }
}

/// The release beside the kernel, as the build wrote it; for people only.
fn kernel_release(kernel: &Path) -> String {
    let file = kernel.with_file_name("release");
    let text = fs::read_to_string(file).unwrap_or_default();
    if text.trim().is_empty() {
        "unknown".to_owned()
    } else {
        text.trim().to_owned()
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU64;

    use super::HypervisorChoice::{Auto, Kvm, Qemu};
    use super::{ServerConfig, choose, limits_are_kept};

    #[test]
    fn limits_that_nobody_keeps_are_refused() {
        let mut config = ServerConfig::default();
        limits_are_kept(&config).unwrap();
        config.rates.disk_operations = NonZeroU64::new(100);
        let refused = limits_are_kept(&config).unwrap_err().to_string();
        assert!(refused.contains("disk_operations"), "{refused}");
        assert!(refused.contains("remove them"), "{refused}");
    }

    #[test]
    fn what_hosts_vms_is_not_changed_under_them() {
        for choice in [Auto, Kvm, Qemu] {
            assert_eq!(choose(choice, None).unwrap(), choice);
        }
        for hosting in [Kvm, Qemu] {
            assert_eq!(choose(Auto, Some(hosting)).unwrap(), hosting);
            assert_eq!(choose(hosting, Some(hosting)).unwrap(), hosting);
        }
        let refused = choose(Kvm, Some(Qemu)).unwrap_err().to_string();
        assert!(refused.contains("VMs of `qemu` run here"), "{refused}");
        assert!(refused.contains("spore down"), "{refused}");
        assert!(choose(Qemu, Some(Kvm)).is_err());
    }

    #[test]
    fn a_choice_is_read_as_it_is_called() {
        for choice in [Auto, Kvm, Qemu] {
            assert_eq!(choice.name().parse(), Ok(choice));
        }
        assert_eq!("KVM".parse::<super::HypervisorChoice>().ok(), None);
    }
}
