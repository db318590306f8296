//! Which driver hosts VMs here, and opening it.
//!
//! What a daemon chose is written down beside its sockets: `spore down` opens the same, whatever
//! the host has become since.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, Result, bail};
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

/// What hosts VMs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum HypervisorChoice {
    /// `kvm` where KVM runs guests, and else `qemu`.
    Auto,
    /// Spore's own VMM on KVM.
    Kvm,
    /// QEMU in software.
    #[default]
    Qemu,
}

impl FromStr for HypervisorChoice {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "auto" => Ok(Self::Auto),
            "kvm" => Ok(Self::Kvm),
            "qemu" => Ok(Self::Qemu),
            _ => Err("it must be auto, kvm or qemu"),
        }
    }
}

/// Opens the driver that the configuration asks for.
///
/// # Errors
/// When the host lacks something; the message says what and what to do.
pub(super) async fn open(config: &ServerConfig, program: &Path) -> Result<Driver> {
    let driver = match boundary(config, program).await? {
        Some(boundary) => Kvm::open(kvm_config(config, program, boundary))
            .await?
            .into(),
        None => Driver::from(Qemu::open(qemu_config(config, program)).await?),
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

/// What stands between guests and the host, where they are to run on KVM.
async fn boundary(config: &ServerConfig, program: &Path) -> Result<Option<Boundary>> {
    if config.hypervisor == HypervisorChoice::Qemu {
        return Ok(None);
    }
    let probe = vec![program.into(), OsString::from("kvm-probe")];
    let probed = tokio::task::spawn_blocking(move || kvm::boundary(&probe)).await?;
    match (probed, config.hypervisor) {
        (Ok(boundary), _) => Ok(Some(boundary)),
        (Err(why), HypervisorChoice::Kvm) => bail!(
            "`hypervisor = \"kvm\"` is asked for, and KVM runs no guests here: {why}; see \
             `spore doctor`"
        ),
        (Err(why), _) => {
            tracing::info!(why, "KVM runs no guests here: VMs are emulated");
            Ok(None)
        }
    }
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
        initramfs: config.initramfs.clone(),
        vmm: config.vmm.clone(),
        device: "/dev/kvm".into(),
        boundary,
        egress: egress(config, program),
    }
}

fn qemu_config(config: &ServerConfig, program: &Path) -> QemuConfig {
    let launcher = [program.to_string_lossy().into_owned(), "jail".to_owned()];
    QemuConfig {
        room: room(config),
        kernel: config.kernel.clone(),
        kernel_release: kernel_release(&config.kernel),
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
