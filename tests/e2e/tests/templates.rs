//! Wakes that fork: a template is built behind the first start, and the next ones begin from it.
#![expect(clippy::tests_outside_test_module, reason = "this is a test crate")]

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use spore_e2e::app::STAYS_AWAKE;
use spore_e2e::{Platform, Site, available, templates};

/// An app that tells what must be its VM's own, and what is in its folder.
const INDIVIDUAL: &str = include_str!("../apps/individual.py");

#[tokio::test(flavor = "multi_thread")]
async fn the_first_wake_boots_and_the_next_ones_fork() -> Result<()> {
    if !available() {
        return Ok(());
    }
    let site = Site {
        templates: true,
        ..Site::default()
    };
    let mut platform = Platform::start_at(site).await?;
    let one = platform.deploy("one", INDIVIDUAL, STAYS_AWAKE)?;
    ensure!(begun(&platform, "one")? == "boot", "there was no template");
    let mut seen = BTreeSet::new();
    let booted = individual(&platform, "one", &mut seen).await?;
    ensure!(booted["folder"] == folder_of(&one)?, "{booted}");
    templates(&platform, 1).await?;

    // The template is of the image: the first start of another app has it already.
    let two = platform.deploy("two", INDIVIDUAL, STAYS_AWAKE)?;
    std::fs::write(two.path().join("extra.txt"), "x".repeat(3 << 20))?;
    platform.cli(&["deploy", &two.argument()])?;
    ensure!(begun(&platform, "two")? == "fork", "there was a template");
    let answer = individual(&platform, "two", &mut seen).await?;
    ensure!(answer["folder"] == folder_of(&two)?, "{answer}");

    for _wake in 0..2 {
        platform.cli(&["stop", "one"])?;
        let answer = individual(&platform, "one", &mut seen).await?;
        ensure!(begun(&platform, "one")? == "fork", "there is a template");
        ensure!(answer["folder"] == folder_of(&one)?, "{answer}");
    }
    let starts = |from| format!("spore_starts_total{{from=\"{from}\"}}");
    let forked = platform.metric(&starts("template")).await?;
    let booted = platform.metric(&starts("boot_no_template")).await?;
    ensure!(
        (forked, booted) == (4, 1),
        "{forked} forked, {booted} booted"
    );

    // It is on the disk: the next daemon has it, and the VMs that began from it go on.
    let before = individual(&platform, "two", &mut BTreeSet::new()).await?;
    platform.kill_daemon()?;
    platform.start_daemon().await?;
    templates(&platform, 1).await?;
    let after = individual(&platform, "two", &mut BTreeSet::new()).await?;
    ensure!(
        after["machine_id"] == before["machine_id"],
        "{before} {after}"
    );
    platform.cli(&["stop", "one"])?;
    individual(&platform, "one", &mut seen).await?;
    ensure!(begun(&platform, "one")? == "fork", "the template is kept");
    platform.end()
}

/// What the app tells of itself; nothing that must be its VM's own was seen before.
async fn individual(platform: &Platform, name: &str, seen: &mut BTreeSet<String>) -> Result<Value> {
    let host = format!("{name}.localhost");
    let answer = platform.visitor().get(&host, "/").await?;
    ensure!(answer.status == 200, "{answer:?}");
    let told: Value = serde_json::from_str(&answer.body)?;
    for own in ["machine_id", "boot_id", "urandom", "uuid"] {
        let value = told[own].as_str().context("it tells it")?;
        ensure!(!value.is_empty(), "{own} is empty: {told}");
        ensure!(
            seen.insert(format!("{own} {value}")),
            "{own} is not its own: {told}"
        );
    }
    Ok(told)
}

/// The step in which the app's VM began.
fn begun(platform: &Platform, name: &str) -> Result<String> {
    let status = platform.json(&["status", name])?;
    let phases = status["vm"]["phases"].as_array().context("a VM")?;
    let mut names = phases.iter().filter_map(|phase| phase["name"].as_str());
    let step = names.rfind(|name| ["boot", "fork"].contains(name));
    Ok(step
        .with_context(|| format!("no beginning: {status}"))?
        .to_owned())
}

/// Names and sizes of an app's files.
fn folder_of(app: &spore_e2e::AppFolder) -> Result<Value> {
    let mut files = serde_json::Map::new();
    for entry in std::fs::read_dir(app.path())? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        files.insert(name, entry.metadata()?.len().into());
    }
    Ok(Value::Object(files))
}
