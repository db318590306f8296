//! `cargo xtask fuzz`: arbitrary bytes for whatever reads a guest's, an agent's or a disk's
//! (`fuzz/`). Run by people, and shortly by the suite.
//!
//! Needs cargo-fuzz and a nightly toolchain, and says so where one is missing: sanitizers are in no
//! stable one. What is found stays in `fuzz/artifacts`, what was learnt in `fuzz/corpus`.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};

use crate::progress::step;
use crate::{command, place};

/// How long the suite runs each target: enough to see that it starts and holds what it is made of.
pub(crate) const SUITE_SECONDS: u32 = 5;

/// The most memory of a target, in MiB: what a reader takes is bounded, and its sanitizer takes
/// some too.
const MEMORY_MIB: u32 = 1024;

/// How much of its words is shown when it fails.
const LAST_LINES: usize = 40;

/// What to run.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct FuzzOptions {
    /// Which targets, by the names of `fuzz/fuzz_targets` [default: all of them]
    targets: Vec<String>,
    /// How long each runs
    #[arg(long, default_value_t = 60)]
    seconds: u32,
}

/// Runs some targets, or all.
pub(crate) fn run(options: &FuzzOptions) -> Result<()> {
    if let Some(missing) = missing() {
        anyhow::bail!("{missing}");
    }
    let all = targets()?;
    for target in &options.targets {
        let known = all.join(", ");
        ensure!(
            all.contains(target),
            "there is no target `{target}`: {known} are there"
        );
    }
    let wanted = match options.targets.is_empty() {
        true => &all,
        false => &options.targets,
    };
    // A run of one builds that one alone: all at once, then each starts at once.
    step("build the fuzz targets", || {
        finished("build", &mut fuzz("build")?)
    })?;
    for target in wanted {
        step(&format!("fuzz {target}"), || one(target, options.seconds))?;
    }
    Ok(())
}

/// All targets, for so long each.
pub(crate) fn all(seconds: u32) -> Result<()> {
    let targets = Vec::new();
    run(&FuzzOptions { targets, seconds })
}

/// What is not here that fuzzing needs, and how to get it.
pub(crate) fn missing() -> Option<&'static str> {
    if !command::exists("cargo-fuzz") {
        return Some("cargo-fuzz is not installed: `cargo install cargo-fuzz`");
    }
    let mut nightly = Command::new("cargo");
    nightly.args(["+nightly", "--version"]);
    nightly
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let is_there = nightly.status().is_ok_and(|status| status.success());
    (!is_there).then_some("there is no nightly toolchain: `rustup toolchain install nightly`")
}

/// The crates of the targets, from outside.
pub(crate) fn fetch() -> Result<()> {
    let manifest = folder().join("Cargo.toml");
    let mut cargo = place::cargo();
    cargo.args(["fetch", "--locked", "--quiet", "--manifest-path"]);
    command::run(cargo.arg(manifest))
}

fn one(target: &str, seconds: u32) -> Result<()> {
    let mut run = fuzz("run")?;
    run.arg(target).arg("--");
    run.arg(format!("-max_total_time={seconds}"));
    run.arg(format!("-rss_limit_mb={MEMORY_MIB}"));
    finished(target, &mut run)
}

/// Runs cargo-fuzz, whose many words are for whoever looks for what went wrong.
fn finished(what: &str, command: &mut Command) -> Result<()> {
    let ended = command.stdin(Stdio::null()).output();
    let ended = ended.context("cannot start cargo-fuzz")?;
    let said = String::from_utf8_lossy(&ended.stderr);
    let last = said.lines().count().saturating_sub(LAST_LINES);
    let last: Vec<&str> = said.lines().skip(last).collect();
    ensure!(
        ended.status.success(),
        "{what} failed; what a target found is in {}:\n{}",
        folder().join("artifacts").display(),
        last.join("\n")
    );
    Ok(())
}

fn fuzz(verb: &str) -> Result<Command> {
    let mut cargo = Command::new("cargo");
    cargo.args(["+nightly", "fuzz", verb, "--fuzz-dir"]);
    cargo.arg(folder());
    // The toolchain that runs this task would be taken in place of the one that is named.
    cargo.env_remove("RUSTUP_TOOLCHAIN").env_remove("CARGO");
    cargo.env("CARGO_TARGET_DIR", place::target()?.join("fuzz"));
    cargo.current_dir(place::repository());
    Ok(cargo)
}

fn folder() -> PathBuf {
    place::repository().join("fuzz")
}

fn targets() -> Result<Vec<String>> {
    let folder = folder().join("fuzz_targets");
    let entries = std::fs::read_dir(&folder).with_context(|| folder.display().to_string())?;
    let mut targets = Vec::new();
    for entry in entries {
        let path = entry?.path();
        targets.extend(
            path.file_stem()
                .map(|stem| stem.to_string_lossy().into_owned()),
        );
    }
    targets.sort_unstable();
    Ok(targets)
}

#[cfg(test)]
mod tests {
    use super::{folder, targets};

    #[test]
    fn every_target_is_in_the_manifest() {
        let manifest = std::fs::read_to_string(folder().join("Cargo.toml")).unwrap();
        let targets = targets().unwrap();
        assert!(targets.len() >= 5, "{targets:?}");
        for target in &targets {
            assert!(
                manifest.contains(&format!("name = \"{target}\"")),
                "{target}"
            );
        }
        assert_eq!(manifest.matches("[[bin]]").count(), targets.len());
    }
}
