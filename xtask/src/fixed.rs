//! Programs that bring all their libraries: the guest's PID 1, which finds none where it runs, and
//! the VMM, of which each brings into memory what it uses of them.

use std::path::PathBuf;

use anyhow::Result;

use crate::{command, place};

/// Static linking with glibc works only with an explicit target: without one the flag would reach
/// proc-macros, which cannot be static.
pub(crate) const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Builds the program of a package, in the profile of its own; returns its path.
pub(crate) fn build(package: &str, profile: &str) -> Result<PathBuf> {
    let flags = ["--package", package, "--profile", profile];
    command::run(
        place::cargo()
            .args(["build", "--quiet", "--locked", "--target", TARGET])
            .args(flags)
            .env("RUSTFLAGS", "-C target-feature=+crt-static"),
    )?;
    Ok(place::target()?.join(TARGET).join(profile).join(package))
}
