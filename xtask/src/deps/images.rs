//! Base images, so that nothing is fetched later. Called by `deps` and by `image` of an xtask that
//! was built without the packer; never packs anything itself.

use std::path::Path;

use anyhow::Result;

use crate::command;
use crate::place;
use crate::progress::say;

/// The base images that every installation has.
const RECIPES: &[&str] = &["debian/base", "debian/node", "debian/python3"];

/// Builds the base images that are not in the store.
pub(crate) fn build_missing(dir: &Path) -> Result<()> {
    let missing: Vec<String> = RECIPES
        .iter()
        .filter(|recipe| !is_built(dir, recipe))
        .map(|recipe| (*recipe).to_owned())
        .collect();
    if missing.is_empty() {
        say("base images: all here");
        return Ok(());
    }
    build_with_feature(&missing, dir)
}

/// Whether the store has an image of that name.
fn is_built(dir: &Path, recipe: &str) -> bool {
    dir.join("images/names")
        .join(recipe.replace('/', "--"))
        .is_file()
}

/// Runs `cargo xtask image` of an xtask that has the packer in it.
pub(crate) fn build_with_feature(recipes: &[String], dir: &Path) -> Result<()> {
    command::run(
        place::cargo()
            .args([
                "run",
                "--quiet",
                "--package=xtask",
                "--features=image",
                "--",
                "image",
            ])
            .args(recipes)
            .arg("--dir")
            .arg(dir),
    )
}
