//! `cargo run -p spore-bench -- cold-wake | fork-wake | memory`: end-to-end figures on platforms of
//! its own.
//!
//! Prints a table for people and one line of JSON behind it, and fails when a figure is worse than
//! its floor. The floors are generous, since times scatter with what else the machine does; what
//! needs a peer in the same run is in `bench/gateway.sh`.

mod fork;
mod memory;
mod wake;

use std::io::Write;

use anyhow::{Result, bail, ensure};
use serde_json::Value;

/// What a benchmark found.
#[derive(Debug)]
pub(crate) struct Report {
    /// For programs.
    pub(crate) json: Value,
    /// The figure that has a floor.
    pub(crate) figure: f64,
    /// The worst that it may be.
    pub(crate) worst: f64,
}

fn main() -> Result<()> {
    let arguments = std::env::args().skip(1).collect::<Vec<_>>();
    let arguments = arguments.iter().map(String::as_str).collect::<Vec<_>>();
    if !spore_e2e::available() {
        return Ok(());
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    let report = match arguments.as_slice() {
        ["cold-wake"] => runtime.block_on(wake::run(10))?,
        ["cold-wake", rounds] => runtime.block_on(wake::run(rounds.parse()?))?,
        ["fork-wake"] => runtime.block_on(fork::run(10))?,
        ["fork-wake", rounds] => runtime.block_on(fork::run(rounds.parse()?))?,
        ["memory"] => runtime.block_on(memory::run(1_000))?,
        ["memory", apps] => runtime.block_on(memory::run(apps.parse()?))?,
        _other => {
            bail!("usage: spore-bench cold-wake [ROUNDS] | fork-wake [ROUNDS] | memory [APPS]")
        }
    };
    let Report {
        json,
        figure,
        worst,
    } = report;
    writeln!(std::io::stdout(), "{json}")?;
    ensure!(
        figure <= worst,
        "the floor is missed: {figure:.2}, and at most {worst:.2} is allowed"
    );
    Ok(())
}

/// The middle of some numbers.
pub(crate) fn median(numbers: &mut [f64]) -> f64 {
    numbers.sort_by(f64::total_cmp);
    numbers.get(numbers.len() / 2).copied().unwrap_or(f64::NAN)
}
