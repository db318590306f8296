//! What a wake from a template saves against a cold boot: both in one run, turn by turn, so that
//! whatever else the machine does meets both.

use std::io::Write;

use anyhow::{Context, Result, ensure};
use serde_json::json;
use spore_e2e::Platform;
use spore_e2e::app::{SELF_PORTRAIT, STAYS_AWAKE};
use spore_e2e::platform::Site;

use crate::{Limit, Report, median, wake};

/// The part of a cold wake of a Python app that a fork of its booted image may take: 1.6 times
/// faster.
const FORK_PART_MAX: f64 = 1.0 / 1.6;

/// The part that a fork of the app itself, where it was ready, may take: 6 times faster.
const READY_PART_MAX: f64 = 1.0 / 6.0;

/// The same app, whose wakes begin where it was ready.
const READY: &str = "warm = \"ready\"\n[idle]\nafter = \"10m\"\n";

/// Wakes one app with a boot, one from its image's template and one from its own, so many times
/// each.
pub(crate) async fn run(rounds: usize) -> Result<Report> {
    ensure!(rounds > 0, "no rounds");
    let cold = Platform::start().await?;
    let forked = Platform::start_at(Site::with_templates()).await?;
    let kinds = [
        (&cold, "hello", STAYS_AWAKE),
        (&forked, "hello", STAYS_AWAKE),
        (&forked, "ready", READY),
    ];
    for (platform, app, manifest) in kinds {
        platform.deploy(app, SELF_PORTRAIT, manifest)?;
    }
    spore_e2e::templates(&forked, 2).await?;
    let mut times = [const { Vec::new() }; 3];
    for _round in 0..rounds {
        for ((platform, app, _), times) in kinds.into_iter().zip(&mut times) {
            platform.cli(&["stop", app])?;
            times.push(wake::timed(platform, app).await?.0);
        }
    }
    for from in ["template", "ready_template"] {
        let name = format!("spore_starts_total{{from=\"{from}\"}}");
        let began = usize::try_from(forked.metric(&name).await?)?;
        // The first start of the second app had the image's template already, or had not.
        ensure!(
            (rounds..=rounds + 1).contains(&began),
            "{began} wakes of {rounds} began from a {from}"
        );
    }
    cold.end()?;
    forked.end()?;
    let [cold, forked, ready] = tell(&mut times)?;
    Ok(Report {
        json: json!({
            "bench": "fork-wake", "rounds": rounds,
            "cold_ms": cold, "forked_ms": forked, "ready_ms": ready,
        }),
        limits: vec![
            Limit::at_most(
                "fork of the image, part of a boot",
                forked / cold,
                FORK_PART_MAX,
            ),
            Limit::at_most(
                "fork of the app, part of a boot",
                ready / cold,
                READY_PART_MAX,
            ),
        ],
    })
}

/// Prints the times of each kind and how much faster than the first they are; gives their medians.
fn tell(times: &mut [Vec<f64>; 3]) -> Result<[f64; 3]> {
    let mut out = std::io::stdout().lock();
    writeln!(
        out,
        "{:<28} {:>10} {:>10} {:>10} {:>10}",
        "request to first byte, ms", "median", "least", "most", "faster"
    )?;
    let names = [
        "cold boot",
        "fork of the booted image",
        "fork of the ready app",
    ];
    let mut middles = [f64::NAN; 3];
    for (kind, (name, times)) in names.into_iter().zip(times).enumerate() {
        middles[kind] = median(times);
        let ends = times.first().zip(times.last()).context("no rounds")?;
        writeln!(
            out,
            "{name:<28} {:>10.1} {:>10.1} {:>10.1} {:>9.2}x",
            middles[kind],
            ends.0,
            ends.1,
            middles[0] / middles[kind]
        )?;
    }
    Ok(middles)
}
