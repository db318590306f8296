//! An app's days: deployed, asleep, awake, asleep again.
#![expect(clippy::tests_outside_test_module, reason = "this is a test crate")]

use anyhow::{Context, Result, ensure};
use spore_e2e::app::{SELF_PORTRAIT, STAYS_AWAKE};
use spore_e2e::{Platform, available, until};

#[tokio::test(flavor = "multi_thread")]
async fn a_sleeping_app_wakes_serves_sleeps_and_wakes_again() -> Result<()> {
    if !available() {
        return Ok(());
    }
    let platform = Platform::start().await?;
    platform.deploy("portrait", SELF_PORTRAIT, "[idle]\nafter = \"20s\"\n")?;

    let host = "portrait.localhost";
    let visitor = platform.visitor();
    let first = visitor.get(host, "/").await?;
    ensure!(first.status == 200, "{first:?}");
    let again = visitor.get(host, "/").await?;
    ensure!(
        boot_id(&again.body)? == boot_id(&first.body)?,
        "one VM serves both"
    );

    platform.cli(&["stop", "portrait"])?;
    ensure!(
        platform.vm_processes()?.is_empty(),
        "{:?}",
        platform.vm_processes()?
    );
    let woken = visitor.get(host, "/").await?;
    ensure!(woken.status == 200, "{woken:?}");
    ensure!(
        boot_id(&woken.body)? != boot_id(&first.body)?,
        "a wake is a new VM"
    );
    let timing = woken
        .header("server-timing")
        .context("a waking answer has its timing")?;
    ensure!(
        timing.contains("boot") && timing.contains("app"),
        "{timing}"
    );

    until(240, || Ok(platform.vm_processes()?.is_empty()))
        .await
        .context("reaped when idle")?;
    let trace = woken.header("x-request-id").context("a request's id")?;
    until(120, || followed(&platform, trace))
        .await
        .context("the request's trace is in every hop's log")?;
    ensure!(visitor.get(host, "/").await?.status == 200);
    platform.end()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_vm_answers_after_the_daemon_was_killed() -> Result<()> {
    if !available() {
        return Ok(());
    }
    let mut platform = Platform::start().await?;
    platform.deploy("portrait", SELF_PORTRAIT, STAYS_AWAKE)?;
    let visitor = platform.visitor();
    let host = "portrait.localhost";
    let before = visitor.get(host, "/").await?;

    let load = tokio::spawn(load(visitor.clone(), host));
    tokio::time::sleep(std::time::Duration::from_millis(300)).await;
    platform.kill_daemon()?;
    platform.start_daemon().await?;
    let after = visitor.get(host, "/").await?;
    ensure!(
        boot_id(&after.body)? == boot_id(&before.body)?,
        "another VM answers"
    );
    ensure!(
        count(&after.body)? > count(&before.body)?,
        "its memory was lost"
    );
    let failed = load.await?;
    ensure!(
        failed.is_empty(),
        "requests failed while the daemon was away: {failed:?}"
    );
    platform.end()
}

/// Forty requests one after another; gives those that were not answered with 200.
/// Whether both logs have told what every hop did for a request that woke its app.
fn followed(platform: &Platform, trace: &str) -> Result<bool> {
    let (daemon, gateway) = platform.logs()?;
    let tells = |log: &str, hop: &str| {
        let mut lines = log.lines();
        lines.any(|line| line.contains(trace) && line.contains(hop) && line.contains("close"))
    };
    let hops = ["}: ", "}:wait: ", "}:connect: ", "}:exchange{"];
    let effects = ["Prepare", "Boot", "ConnectAgent", "Thaw", "StartApp"];
    let effect = |name: &&str| tells(&daemon, &format!("}}:effect{{name={name}}}: "));
    Ok(hops.iter().all(|hop| tells(&gateway, hop))
        && tells(&daemon, " start{")
        && tells(&daemon, " vm{")
        && effects.iter().all(effect))
}

async fn load(visitor: spore_e2e::Visitor, host: &'static str) -> Vec<String> {
    let mut failed = Vec::new();
    for _request in 0..40 {
        match visitor.get(host, "/").await {
            Ok(answer) if answer.status == 200 => {}
            Ok(answer) => failed.push(format!("{} {}", answer.status, answer.body)),
            Err(error) => failed.push(format!("{error:#}")),
        }
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    failed
}

fn field<'a>(body: &'a serde_json::Value, name: &str) -> Result<&'a serde_json::Value> {
    body.get(name)
        .with_context(|| format!("no {name} in {body}"))
}

fn boot_id(body: &str) -> Result<String> {
    let body = serde_json::from_str(body).with_context(|| format!("not JSON: {body}"))?;
    Ok(field(&body, "boot_id")?.to_string())
}

fn count(body: &str) -> Result<u64> {
    let body = serde_json::from_str(body).with_context(|| format!("not JSON: {body}"))?;
    field(&body, "count")?.as_u64().context("a number")
}
