//! What a wake from a template saves against a cold boot: both in one run, turn by turn, so that
//! whatever else the machine does meets both.

use std::io::Write;

use anyhow::{Context, Result, ensure};
use serde_json::json;
use spore_e2e::Platform;
use spore_e2e::app::{SELF_PORTRAIT, STAYS_AWAKE};
use spore_e2e::platform::Site;

use crate::{Limit, Report, median, wake};

/// The part of a cold wake of a Python app that one from a template may take: 1.6 times faster.
const PART_MAX: f64 = 1.0 / 1.6;

/// Wakes one app from a template and another with a boot, so many times each.
pub(crate) async fn run(rounds: usize) -> Result<Report> {
    ensure!(rounds > 0, "no rounds");
    let cold = Platform::start().await?;
    let forked = Site {
        templates: true,
        ..Site::default()
    };
    let forked = Platform::start_at(forked).await?;
    for platform in [&cold, &forked] {
        platform.deploy("hello", SELF_PORTRAIT, STAYS_AWAKE)?;
    }
    spore_e2e::templates(&forked, 1).await?;
    let mut times: [Vec<f64>; 2] = [Vec::new(), Vec::new()];
    for _round in 0..rounds {
        for (platform, times) in [&cold, &forked].into_iter().zip(&mut times) {
            platform.cli(&["stop", "hello"])?;
            times.push(wake::timed(platform).await?.0);
        }
    }
    let began = forked
        .metric("spore_starts_total{from=\"template\"}")
        .await?;
    ensure!(
        usize::try_from(began)? == rounds,
        "{began} wakes of {rounds} began from a template"
    );
    cold.end()?;
    forked.end()?;
    let [mut cold, mut forked] = times;
    let (cold_ms, forked_ms) = (median(&mut cold), median(&mut forked));
    let part = forked_ms / cold_ms;
    let mut out = std::io::stdout().lock();
    writeln!(
        out,
        "{:<32} {:>10} {:>10} {:>10}",
        "request to first byte, ms", "median", "least", "most"
    )?;
    for (name, times) in [("cold boot", &cold), ("fork of a template", &forked)] {
        let ends = times.first().zip(times.last()).context("no rounds")?;
        let middle = times[times.len() / 2];
        writeln!(
            out,
            "{name:<32} {middle:>10.1} {:>10.1} {:>10.1}",
            ends.0, ends.1
        )?;
    }
    writeln!(out, "{:<32} {:>10.2}", "times faster", 1.0 / part)?;
    Ok(Report {
        json: json!({
            "bench": "fork-wake", "rounds": rounds, "cold_ms": cold_ms, "forked_ms": forked_ms,
            "times_faster": 1.0 / part,
        }),
        limits: vec![Limit::at_most(
            "cold wake, part a fork takes",
            part,
            PART_MAX,
        )],
    })
}
