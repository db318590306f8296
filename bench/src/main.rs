//! `cargo run -p spore-bench -- cold-wake | fork-wake | engine | memory`: end-to-end figures on
//! platforms and nodes of its own.
//!
//! Prints a table for people and one line of JSON behind it, and fails when a figure is worse than
//! its floor. The floors are generous, since times scatter with what else the machine does; what
//! needs a peer in the same run is in `bench/gateway.sh`.

mod engine;
mod fork;
mod memory;
mod wake;

use std::io::Write;

use anyhow::{Result, bail, ensure};
use serde_json::{Value, json};

/// What a benchmark found.
#[derive(Debug)]
pub(crate) struct Report {
    /// For programs.
    pub(crate) json: Value,
    /// What must not be worse.
    pub(crate) limits: Vec<Limit>,
}

/// A figure that has a floor.
#[derive(Debug)]
pub(crate) struct Limit {
    name: &'static str,
    figure: f64,
    worst: f64,
}

impl Limit {
    pub(crate) const fn at_most(name: &'static str, figure: f64, worst: f64) -> Self {
        Self {
            name,
            figure,
            worst,
        }
    }
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
        ["engine"] => runtime.block_on(engine::run(10))?,
        ["engine", rounds] => runtime.block_on(engine::run(rounds.parse()?))?,
        ["memory"] => runtime.block_on(memory::run(1_000))?,
        ["memory", apps] => runtime.block_on(memory::run(apps.parse()?))?,
        _other => {
            bail!(
                "usage: spore-bench cold-wake [ROUNDS] | fork-wake [ROUNDS] | engine [ROUNDS] | \
                 memory [APPS]"
            )
        }
    };
    let mut out = std::io::stdout().lock();
    let mut missed = Vec::new();
    let mut json = report.json;
    for Limit {
        name,
        figure,
        worst,
    } in report.limits
    {
        writeln!(out, "{name:<36} {figure:>10.3}   at most {worst:.3}")?;
        json["limits"][name] = json!({ "figure": figure, "worst": worst });
        if figure.is_nan() || figure > worst {
            missed.push(name);
        }
    }
    writeln!(out, "{json}")?;
    ensure!(missed.is_empty(), "missed: {}", missed.join("; "));
    Ok(())
}

/// The middle of some numbers.
pub(crate) fn median(numbers: &mut [f64]) -> f64 {
    numbers.sort_by(f64::total_cmp);
    numbers.get(numbers.len() / 2).copied().unwrap_or(f64::NAN)
}
