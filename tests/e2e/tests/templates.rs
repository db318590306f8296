//! Wakes that fork: a template is built behind the first start, and the next ones begin from it.
#![expect(clippy::tests_outside_test_module, reason = "this is a test crate")]

use std::collections::BTreeSet;
use std::time::UNIX_EPOCH;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use spore_e2e::app::{AppFolder, STAYS_AWAKE};
use spore_e2e::{Platform, Site, available, templates};

/// An app that tells what must be its VM's own, and what is in its folder.
const INDIVIDUAL: &str = include_str!("../apps/individual.py");

#[tokio::test(flavor = "multi_thread")]
async fn the_first_wake_boots_and_the_next_ones_fork() -> Result<()> {
    if !available() {
        return Ok(());
    }
    let mut platform = Platform::start_at(Site::with_templates()).await?;
    let one = platform.deploy("one", INDIVIDUAL, STAYS_AWAKE)?;
    ensure!(begun(&platform, "one")? == "boot", "there was no template");
    let mut seen = BTreeSet::new();
    let booted = individual(&platform, "one", &mut seen).await?;
    ensure!(booted["folder"] == folder_of(&one)?, "{booted}");
    templates(&platform, 1).await?;
    let shown = platform.json(&["status", "one"])?;
    ensure!(shown["vm"]["template"] == "ready", "{shown}");

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

/// An app that tells what it drew when it started, and what it draws now.
const READY: &str = include_str!("../apps/ready.py");

/// Its releases are woken where they were ready, and sleep only when they are told to.
const WARM: &str = "warm = \"ready\"\n[idle]\nafter = \"2h\"\n";

#[tokio::test(flavor = "multi_thread")]
async fn a_ready_app_wakes_where_it_was_ready_and_draws_its_own() -> Result<()> {
    if !available() {
        return Ok(());
    }
    let platform = Platform::start_at(Site::with_templates()).await?;
    let app = platform.deploy("warm", READY, WARM)?;
    let mut seen = BTreeSet::new();
    two_wakes_have_one_memory(&platform, &mut seen).await?;
    // What a template's VM printed is not an app's.
    let printed = platform.cli(&["logs", "warm"])?;
    ensure!(printed.matches("started").count() == 1, "{printed}");

    // The old release's memory serves nobody from the deploy on.
    let code = READY.replace("VERSION = 1", "VERSION = 2");
    std::fs::write(app.path().join("app.py"), code)?;
    platform.cli(&["deploy", &app.argument()])?;
    ensure!(begun(&platform, "warm")? == "boot", "it is another release");
    let booted = drawn(&platform, 2, &mut seen).await?;
    let mut forked = None;
    for _wake in 0..100 {
        platform.cli(&["stop", "warm"])?;
        let started = drawn(&platform, 2, &mut seen).await?;
        if begun(&platform, "warm")? == "fork" {
            forked = Some(started);
            break;
        }
    }
    let forked = forked.with_context(|| platform.log_tail())?;
    ensure!(forked != booted, "it is the first VM's memory");

    let with_secret = format!("{WARM}[secrets]\nnames = [\"KEY\"]\n");
    let refused = platform.deploy("warm", READY, &with_secret).err();
    let refused = format!("{:#}", refused.context("it was deployed")?);
    ensure!(refused.contains("leave [secrets] out"), "{refused}");

    // An app that is removed leaves nothing of its memory.
    let listed = platform.json(&["snapshot", "ls"])?;
    ensure!(listed.to_string().contains("\"template\""), "{listed}");
    platform.cli(&["rm", "warm", "--yes"])?;
    templates(&platform, 0).await?;
    let listed = platform.json(&["snapshot", "ls"])?;
    ensure!(!listed.to_string().contains("\"template\""), "{listed}");
    platform.end()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ready_node_app_wakes_where_it_was_ready_and_draws_its_own() -> Result<()> {
    if !available() {
        return Ok(());
    }
    let platform = Platform::start_at(Site::with_templates()).await?;
    let code = include_str!("../apps/ready.js");
    let app = AppFolder::node("warm", code, WARM)?;
    platform.cli(&["deploy", &app.argument()])?;
    two_wakes_have_one_memory(&platform, &mut BTreeSet::new()).await?;
    platform.end()
}

/// The app runs in a VM that booted, and its wakes go on in one memory that is not that VM's.
async fn two_wakes_have_one_memory(platform: &Platform, seen: &mut BTreeSet<String>) -> Result<()> {
    ensure!(begun(platform, "warm")? == "boot", "there was no template");
    let booted = drawn(platform, 1, seen).await?;
    templates(platform, 1).await?;
    let mut started = BTreeSet::new();
    for _wake in 0..2 {
        platform.cli(&["stop", "warm"])?;
        started.insert(drawn(platform, 1, seen).await?);
        ensure!(begun(platform, "warm")? == "fork", "there is a template");
    }
    ensure!(started.len() == 1, "{started:?} are two memories");
    ensure!(!started.contains(&booted), "it is the first VM's memory");
    let forked = "spore_starts_total{from=\"ready_template\"}";
    ensure!(platform.metric(forked).await? == 2, "two wakes forked");
    Ok(())
}

/// What the app drew when it started. It is of this version, its clock is right, and what it draws
/// now nobody drew before.
async fn drawn(platform: &Platform, version: u64, seen: &mut BTreeSet<String>) -> Result<String> {
    let asked = UNIX_EPOCH.elapsed()?.as_secs_f64();
    let answer = platform.visitor().get("warm.localhost", "/").await?;
    ensure!(answer.status == 200, "{answer:?}");
    let told: Value = serde_json::from_str(&answer.body)?;
    ensure!(told["version"] == version, "{told}");
    let now = told["now"].as_f64().context("a time")?;
    let answered = UNIX_EPOCH.elapsed()?.as_secs_f64();
    ensure!(
        (asked - 2.0..=answered + 2.0).contains(&now),
        "asked at {asked}, answered at {answered}: {told}"
    );
    let own = told["own"].as_object().context("what is its own")?;
    ensure!(own.len() == 6, "{told}");
    for (name, value) in own {
        let is_new = seen.insert(format!("{name} {value}"));
        ensure!(is_new, "{name} is not its own: {told}");
    }
    Ok(told["started"].as_str().context("it tells it")?.to_owned())
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
fn folder_of(app: &AppFolder) -> Result<Value> {
    let mut files = serde_json::Map::new();
    for entry in std::fs::read_dir(app.path())? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        files.insert(name, entry.metadata()?.len().into());
    }
    Ok(Value::Object(files))
}
