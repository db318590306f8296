//! The driver that tests run on: `qemu`, or `kvm` where `SPORE_TEST_DRIVER` says so.
//!
//! Shared by the tests of `tests/qemu` and by the daemon that they kill. For `kvm`, `spore-vmm` is
//! where `SPORE_VMM` says, or beside the tests' own programs.

use std::error::Error;
use std::ops::Deref;
use std::path::PathBuf;
use std::sync::Arc;

use spore_node::hypervisor::kvm::{Kvm, KvmConfig};
use spore_node::hypervisor::qemu::{Qemu, QemuConfig};
use spore_node::hypervisor::room::Rooms;
use spore_node::hypervisor::{Hypervisor, KernelArguments};
use spore_wire::launch::Rates;
use spore_wire::node::Boundary;

/// A driver.
#[derive(Clone, Debug)]
pub(crate) enum Driver {
    Qemu(Qemu),
    Kvm(Kvm),
}

/// Whether tests run on `kvm`.
pub(crate) fn is_kvm() -> bool {
    std::env::var_os("SPORE_TEST_DRIVER").is_some_and(|driver| driver == "kvm")
}

/// What guests' kernels are told. On `kvm`, tests run on an emulated processor, which can forget
/// that a guest is not to be interrupted between `sti` and `hlt` (`docs/internals/testing.md`).
/// What it then sleeps over, its next tick has it see.
pub(crate) fn kernel_arguments() -> KernelArguments {
    match is_kvm() {
        true => "nohz=off".parse().unwrap_or_default(),
        false => KernelArguments::default(),
    }
}

/// Where `spore-vmm` is.
pub(crate) fn vmm() -> PathBuf {
    let beside = || {
        // Tests are in `deps`, below their programs.
        let itself = std::env::current_exe().unwrap_or_default();
        let folder = itself.parent().unwrap_or(&itself);
        let above = match folder.ends_with("deps") {
            true => folder.parent().unwrap_or(folder),
            false => folder,
        };
        above.join("spore-vmm")
    };
    std::env::var_os("SPORE_VMM").map_or_else(beside, PathBuf::from)
}

impl Driver {
    /// With so many VMMs made ahead, where it makes any.
    pub(crate) async fn open(
        config: QemuConfig,
        parked: usize,
        rates: Rates,
    ) -> Result<Self, Box<dyn Error + Send + Sync>> {
        if !is_kvm() {
            return Ok(Self::Qemu(Qemu::open(config).await?));
        }
        let config = KvmConfig {
            room: config.room,
            kernel: config.kernel,
            kernel_release: config.kernel_release,
            kernel_arguments: config.kernel_arguments,
            initramfs: config.initramfs,
            vmm: vmm(),
            device: "/dev/kvm".into(),
            boundary: Boundary::Kvm,
            parked,
            // Nearly all forks have more, and QEMU's are read in the pause.
            freeze_from_mib: 1,
            rates,
            egress: config.egress,
        };
        Ok(Self::Kvm(Kvm::open(config).await?))
    }

    pub(crate) fn rooms(&self) -> &Arc<Rooms> {
        match self {
            Self::Qemu(qemu) => qemu.rooms(),
            Self::Kvm(kvm) => kvm.rooms(),
        }
    }

    pub(crate) fn close(&self) -> std::io::Result<()> {
        if let Self::Kvm(kvm) = self {
            kvm.close();
        }
        self.rooms().close()
    }

    pub(crate) fn hypervisor(&self) -> Arc<dyn Hypervisor> {
        match self {
            Self::Qemu(qemu) => Arc::new(qemu.clone()),
            Self::Kvm(kvm) => Arc::new(kvm.clone()),
        }
    }
}

impl Deref for Driver {
    type Target = dyn Hypervisor;

    fn deref(&self) -> &Self::Target {
        match self {
            Self::Qemu(qemu) => qemu,
            Self::Kvm(kvm) => kvm,
        }
    }
}
