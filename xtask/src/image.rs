//! `cargo xtask image`: builds base images into `DIR/images`, as the daemon builds others. Compiled
//! with the feature `image` only.

use std::ffi::OsString;
use std::path::Path;

use anyhow::{Context, Result, bail};
use spore_node::cgroup::Cgroups;
use spore_node::image::debian::{self, DebianBuilder};
use spore_node::image::job::{BUILD_LIMITS, Job};
use spore_node::image::packer::Packer;
use spore_node::image::store::{Filing, ImageStore};
use spore_node::image::worker;

use crate::command;
use crate::deps::packages::BUILD_USER;
use crate::progress::{say, step};

/// The uid of the packer's worker here: in the range of VM uids, which nothing else has while the
/// machine is being set up.
const WORKER_UID: u32 = 200_000;

/// Where mmdebstrap works: all its uids must be able to enter.
const SCRATCH: &str = "/var/tmp";

/// The cgroup that builds lie in.
const CGROUP: &str = "spore-image";

/// Builds the images; becomes root for it, since the worker gives up what only root has.
pub(crate) fn build(recipes: &[String], dir: &Path) -> Result<()> {
    let program = std::env::current_exe().context("cannot tell which program this is")?;
    if !rustix::process::geteuid().is_root() {
        return command::run(
            command::as_root(&program)
                .arg("image")
                .args(recipes)
                .arg("--dir")
                .arg(dir),
        );
    }
    let store = ImageStore::open(dir.join("images"))?;
    let packer = Packer {
        program,
        arguments: vec![OsString::from("image-pack")],
        uid: Some(WORKER_UID),
    };
    let builder = DebianBuilder {
        user: BUILD_USER.to_owned(),
        scratch: SCRATCH.into(),
        owner: dir.to_owned(),
    };
    let cgroups = Cgroups::open(CGROUP)?;
    for recipe in recipes {
        let packages = debian::recipe(recipe)?;
        let info = step(&format!("build image {recipe}"), || {
            let filing = Filing {
                at_s: now_s()?,
                bytes_max: u64::MAX,
            };
            let job = Job::begin(&cgroups, &BUILD_LIMITS)?;
            Ok(builder.build(&packages, &packer, &store, filing, &job)?)
        })?;
        store.set_name(recipe, info.id)?;
        say(format!(
            "image {recipe}: {} ({} MiB, {} entries)",
            info.id,
            info.bytes / (1024 * 1024),
            info.entries
        ));
    }
    cgroups.remove_parent()?;
    Ok(())
}

/// The worker's verb. It answers on its own; an error here is only its exit code.
pub(crate) fn pack() -> Result<()> {
    if worker::serve() == std::process::ExitCode::SUCCESS {
        return Ok(());
    }
    bail!("the image worker refused or failed; its answer says why")
}

/// Wall-clock time, for the image's description.
fn now_s() -> Result<u64> {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
    u64::try_from(now.tv_sec).context("the clock is before 1970")
}
