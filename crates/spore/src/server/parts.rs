//! What the daemon and `spore down` are both made of: folders, driver, node, gateway.
//!
//! The only place that turns [`ServerConfig`] into the configurations of the crates.

use std::ffi::OsString;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use spore_node::config::{Config as NodeConfig, Images, VmLimits};
use spore_node::hypervisor::Driver;
use spore_node::image::debian::DebianBuilder;
use spore_node::image::packer::Packer;
use spore_node::image::store::{Filing, ImageStore};
use spore_node::image::workshop::{Bounds, Workshop, WorkshopConfig};
use spore_node::node::{Adoption, Node};
use spore_wire::id::ImageId;
use spore_wire::node::ImageInfo;

use super::driver;
use super::gateway_process::GatewayProcess;
use super::up::make_folder;
use crate::config::ServerConfig;

/// The user that builds images from packages.
pub(crate) const BUILD_USER: &str = "spore-build";

/// Where image builds work: all their uids must be able to enter.
const BUILD_SCRATCH: &str = "/var/tmp";

/// What a daemon and `spore down` both work with.
#[derive(Debug)]
pub(crate) struct NodeParts {
    /// The driver.
    pub(crate) driver: Driver,
    /// The node on it.
    pub(crate) node: Node,
    /// What the node found.
    pub(crate) adoption: Adoption,
}

/// Everything that is there while a daemon works on a runtime folder.
#[derive(Debug)]
pub(crate) struct Parts {
    /// This program's file.
    pub(crate) program: PathBuf,
    /// The node.
    pub(crate) node: Node,
    /// What the node found.
    pub(crate) adoption: Adoption,
    /// The node's images.
    pub(crate) images: ImageStore,
    /// How more are made.
    pub(crate) workshop: Workshop,
}

/// Makes the folders that everything else stands in.
///
/// # Errors
/// When one cannot be made.
pub(crate) fn folders(config: &ServerConfig) -> Result<()> {
    ensure!(
        rustix::process::geteuid().is_root(),
        "Spore's daemon needs root for namespaces, cgroups and disks: run it with `sudo`"
    );
    make_folder(&config.config_dir, 0o755)?;
    make_folder(&config.data_dir, 0o700)?;
    // The API's socket is reached by the invoking user; everything else inside is closed.
    make_folder(&config.runtime_dir, 0o711)?;
    make_folder(&config.log_dir, 0o750)?;
    make_folder(&config.log_dir.join("apps"), 0o700)
}

/// The gateway of this configuration.
pub(crate) fn gateway(config: &ServerConfig, program: &Path) -> GatewayProcess {
    GatewayProcess {
        program: program.to_owned(),
        runtime: config.runtime_dir.clone(),
        log: config.log_dir.join("gateway.log"),
        lines: config.log.clone(),
        address: config.gateway,
        uid: config.gateway_uid,
    }
}

/// Opens driver and node; VMs of an earlier daemon are adopted.
///
/// # Errors
/// When the host lacks something; the message says what and what to do.
pub(crate) async fn open(config: &ServerConfig, program: PathBuf) -> Result<Parts> {
    let images = ImageStore::open(config.data_dir.join("images")).context("the image store")?;
    let opened = driver::open(config, &program).await;
    let opened = opened.context("the hypervisor")?;
    let files = Arc::new(ImageFiles(images.clone()));
    let NodeParts {
        driver,
        node,
        adoption,
    } = open_node(config, opened, files).await?;
    // Work that an earlier daemon left was ended with the VMs that were not adopted.
    let workshop = workshop(config, &program, &images, &driver);
    workshop.sweep().context("the image store")?;
    Ok(Parts {
        program,
        node,
        adoption,
        images,
        workshop,
    })
}

/// Opens driver and node to stop what they find: neither QEMU nor kernel nor images need be there.
///
/// # Errors
/// When what runs cannot be found out.
pub(crate) async fn open_to_stop(config: &ServerConfig, program: &Path) -> Result<NodeParts> {
    let opened = driver::open_to_stop(config, program).context("the hypervisor")?;
    open_node(config, opened, Arc::new(NoImages)).await
}

async fn open_node(
    config: &ServerConfig,
    driver: Driver,
    files: Arc<dyn Images>,
) -> Result<NodeParts> {
    let mut node_config = NodeConfig::new(
        config.runtime_dir.join("node"),
        config.log_dir.join("apps"),
        config.data_dir.join("snapshots"),
        host_memory_mib()?,
    );
    node_config.limits = VmLimits::of_boot(config.boot_timeout);
    node_config.templates = config.templates;
    if let Some(mib) = config.snapshot_memory_mib {
        node_config.snapshots.memory_mib = mib.into();
    }
    node_config.capacity.memory_reserve_mib = u64::from(config.memory_reserve_mib);
    let (node, adoption) = Node::open(node_config, Arc::clone(&driver.hypervisor), files)
        .await
        .context("the node")?;
    Ok(NodeParts {
        driver,
        node,
        adoption,
    })
}

/// How images are made here.
fn workshop(
    config: &ServerConfig,
    program: &Path,
    images: &ImageStore,
    driver: &Driver,
) -> Workshop {
    Workshop::new(WorkshopConfig {
        images: images.clone(),
        packer: Packer {
            program: program.to_owned(),
            arguments: verb("image-pack"),
            uid: Some(config.uid_first + config.uid_count - 1),
        },
        builder: builder(config),
        cgroups: driver.rooms.cgroups().clone(),
        bounds: Bounds::default(),
    })
}

/// How images are built from packages here.
pub(crate) fn builder(config: &ServerConfig) -> DebianBuilder {
    DebianBuilder {
        user: BUILD_USER.to_owned(),
        scratch: BUILD_SCRATCH.into(),
        owner: config.data_dir.clone(),
    }
}

/// The verb's arguments for a helper of this program.
pub(crate) fn verb(name: &str) -> Vec<OsString> {
    vec![OsString::from(name)]
}

#[derive(Debug)]
struct ImageFiles(ImageStore);

impl Images for ImageFiles {
    fn path(&self, id: &ImageId) -> Option<PathBuf> {
        self.0.get(*id).ok().map(|info| self.0.path(info.id))
    }
}

/// Nothing starts any more.
#[derive(Debug)]
struct NoImages;

impl Images for NoImages {
    fn path(&self, _id: &ImageId) -> Option<PathBuf> {
        None
    }
}

/// The base images that came with the installation, by name.
///
/// # Errors
/// When they cannot be read.
pub(crate) fn installed_images(from: &Path) -> Result<Vec<(String, ImageInfo)>> {
    if !from.is_dir() {
        tracing::warn!(folder = %from.display(), "no base images are installed there");
        return Ok(Vec::new());
    }
    let installed = ImageStore::open(from).context("the installed images")?;
    let mut all = Vec::new();
    for (name, id) in installed.names().context("the installed images")? {
        all.push((name, installed.get(id).context("the installed images")?));
    }
    Ok(all)
}

/// Copies an installed image into the store, unless it is there.
///
/// # Errors
/// When it cannot be copied, or is damaged.
pub(crate) fn copy_installed(images: &ImageStore, from: &Path, info: &ImageInfo) -> Result<()> {
    if images.get(info.id).is_ok() {
        return Ok(());
    }
    let path = ImageStore::open(from)?.path(info.id);
    let filing = Filing {
        at_s: info.made_at_s,
        bytes_max: u64::MAX,
    };
    let staged = images.stage()?;
    let mut file = File::open(&path).with_context(|| format!("open {}", path.display()))?;
    std::io::copy(&mut file, &mut staged.file()).context("copy an installed image")?;
    let copied = staged.commit(info.kind, info.entries, filing)?;
    let whole = copied.id == info.id;
    ensure!(whole, "{} is damaged: run `make up` again", path.display());
    Ok(())
}

fn host_memory_mib() -> Result<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").context("read /proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    Ok(kib.context("MemTotal in /proc/meminfo")? / 1024)
}
