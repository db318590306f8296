//! Spore's build tasks: `cargo xtask TASK`. The Makefile and `.ci/run` only name them.
//!
//! Run by people and by CI on the machine that builds. Never part of the product: nothing here runs
//! where apps run, and no crate depends on it.
#![forbid(unsafe_code)]

mod command;
mod deps;
mod fixed;
mod fuzz;
mod guest;
mod host;
#[cfg(feature = "image")]
mod image;
mod place;
mod progress;
mod rig;
mod suite;
mod systemd;
mod tidy;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::fuzz::FuzzOptions;
use crate::place::DEPS_DEFAULT;
use crate::rig::RigOptions;
use crate::rig::lists::RigTestOptions;

/// What to do.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", about = "Spore's build tasks")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

/// The tasks, in the order in which a fresh clone needs them.
#[derive(Debug, Subcommand)]
enum Task {
    /// Fetches everything from outside once: Debian packages, guest kernel, crates, base images
    Deps(DepsOptions),
    /// Builds the static guest agent and packs it with its modules into an initramfs
    Guest(Folder),
    /// Builds a base image (`debian/base`, `debian/node` or `debian/python3`) into the folder's
    /// image store
    Image {
        /// Names of recipes
        #[arg(required = true)]
        recipes: Vec<String>,
        #[command(flatten)]
        folder: Folder,
    },
    /// The confined process that packs one image; started by `image` only
    #[command(name = "image-pack", hide = true)]
    ImagePack,
    /// Checks the house rules
    Tidy {
        /// Also counts the crates that the programs depend on
        #[arg(long)]
        deps: bool,
    },
    /// Runs the whole test suite
    Test,
    /// Gives arbitrary bytes to whatever reads a guest's; needs cargo-fuzz and a nightly toolchain
    Fuzz(FuzzOptions),
    /// Runs a command on a Linux with real KVM, which QEMU emulates; needs no KVM here
    Rig(RigOptions),
    /// Runs the tests that need KVM in the rig
    RigTest(RigTestOptions),
    /// Boots a Debian with systemd under QEMU and looks at Spore there (after `deps --systemd`)
    SystemdTest(Folder),
    /// What is looked at in that machine; started there only
    #[command(hide = true)]
    SystemdStory,
    /// Builds and installs Spore on this machine, starts it and deploys the example
    Up(Folder),
    /// Stops all VMs and the daemon
    Down,
    /// Removes everything that `up` and `deps` put on this machine
    CleanHost(Folder),
}

/// Where fetched and built things are kept.
#[derive(Clone, Debug, clap::Args)]
struct Folder {
    /// Where the guest kernel, the initramfs and the base images are kept
    #[arg(long, value_name = "FOLDER", default_value = DEPS_DEFAULT, env = "SPORE_DEPS")]
    dir: PathBuf,
}

/// How much `deps` fetches.
#[derive(Clone, Debug, clap::Args)]
#[expect(clippy::struct_excessive_bools, reason = "each is a flag of its own")]
struct DepsOptions {
    #[command(flatten)]
    folder: Folder,
    /// Looks for a newer guest kernel, even when there is one
    #[arg(long)]
    refresh: bool,
    /// Also installs what `bench/` compares with
    #[arg(long)]
    bench: bool,
    /// Also builds the Debian that `systemd-test` boots
    #[arg(long)]
    systemd: bool,
    /// Leaves out the base images
    #[arg(long)]
    no_images: bool,
    /// Leaves out the machine with KVM that `rig` boots
    #[arg(long)]
    no_rig: bool,
}

fn main() -> ExitCode {
    match run(Cli::parse().task) {
        Ok(code) => code,
        Err(error) => {
            progress::failed(&error);
            ExitCode::FAILURE
        }
    }
}

fn run(task: Task) -> anyhow::Result<ExitCode> {
    if !matches!(
        task,
        Task::Image { .. } | Task::ImagePack | Task::SystemdStory
    ) {
        place::check_owner()?;
    }
    match task {
        Task::Deps(options) => deps::run(&options),
        Task::Guest(folder) => guest::run(&folder.dir),
        Task::Image { recipes, folder } => run_image(&recipes, &folder.dir),
        Task::ImagePack => run_image_pack(),
        Task::Tidy { deps } => tidy::run(deps),
        Task::Test => suite::run(),
        Task::Fuzz(options) => fuzz::run(&options),
        Task::Rig(options) => return rig::run(&options),
        Task::RigTest(options) => return rig::lists::test(&options),
        Task::SystemdTest(folder) => systemd::run(&folder.dir),
        Task::SystemdStory => systemd::story::run(),
        Task::Up(folder) => host::up(&folder.dir),
        Task::Down => host::down(),
        Task::CleanHost(folder) => host::clean(&folder.dir),
    }?;
    Ok(ExitCode::SUCCESS)
}

#[cfg(feature = "image")]
fn run_image(recipes: &[String], dir: &std::path::Path) -> anyhow::Result<()> {
    image::build(recipes, dir)
}

#[cfg(feature = "image")]
fn run_image_pack() -> anyhow::Result<()> {
    image::pack()
}

#[cfg(not(feature = "image"))]
fn run_image(recipes: &[String], dir: &std::path::Path) -> anyhow::Result<()> {
    deps::images::build_with_feature(recipes, dir)
}

#[cfg(not(feature = "image"))]
fn run_image_pack() -> anyhow::Result<()> {
    anyhow::bail!("`image-pack` is started by `cargo xtask image` only")
}
