//! Apps that keep what they hold in memory while they sleep, on real VMs.
#![expect(clippy::tests_outside_test_module, reason = "this is a test crate")]

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use spore_e2e::{Platform, available};
use tokio::time::Instant;

/// Beyond this an idle app is not being suspended any more.
const HANGS: Duration = Duration::from_secs(300);

/// How far an app's clock may be off, the way of the answer on a busy machine included. Between two
/// of its answers it is suspended for longer.
const OFF_MAX_S: f64 = 5.0;

/// An app that counts, and keeps who logged in, in memory alone.
const SESSIONS: &str = include_str!("../apps/sessions.py");

/// It is idle soon, and small: all of its memory is written twenty times.
const SUSPENDS: &str = "[idle]\nafter = \"1s\"\nmode = \"suspend\"\n\
                        [resources]\nmemory = \"96MiB\"\ndisk = \"16MiB\"\n";

#[tokio::test(flavor = "multi_thread")]
async fn twenty_suspends_lose_nothing() -> Result<()> {
    if !available() {
        return Ok(());
    }
    let mut platform = Platform::start().await?;
    let _app = platform.deploy("sessions", SESSIONS, SUSPENDS)?;
    let mut count = 0;
    let login = ask(&platform, "/login?user=ada", &mut count).await?;
    let cookie = login["session"].as_str().context("a session")?.to_owned();
    let process = login["process"].clone();
    for round in 0..20 {
        until_suspended(&platform).await?;
        if round == 10 {
            platform.kill_daemon()?;
            platform.start_daemon().await?;
            ensure!(state(&platform)? == "suspended", "it outlives the daemon");
        }
        let told = ask(&platform, &format!("/who?session={cookie}"), &mut count).await?;
        ensure!(told["user"] == "ada", "round {round}: {told}");
        ensure!(told["process"] == process, "round {round}: {told}");
        let off = told["now"].as_f64().context("a time")? - now();
        ensure!(off.abs() < OFF_MAX_S, "round {round}: {off} s off");
        for _request in 0..3 {
            ask(&platform, "/", &mut count).await?;
        }
    }
    let logs = platform.cli(&["logs", "sessions"])?;
    ensure!(
        !logs.contains("suspended") && !logs.contains("anew"),
        "{logs}"
    );

    // Its owner wants it to begin anew.
    until_suspended(&platform).await?;
    platform.cli(&["stop", "sessions"])?;
    ensure!(state(&platform)? == "asleep", "nothing is kept");
    let mut fresh = 0;
    let told = ask(&platform, &format!("/who?session={cookie}"), &mut fresh).await?;
    ensure!(told["user"] == Value::Null, "{told}");
    platform.end()
}

/// One request, of which none may be lost.
async fn ask(platform: &Platform, path: &str, count: &mut u64) -> Result<Value> {
    let answer = platform.visitor().get("sessions.localhost", path).await?;
    ensure!(answer.status == 200, "{answer:?}\n{}", platform.log_tail());
    let told: Value = serde_json::from_str(&answer.body)?;
    *count += 1;
    ensure!(told["count"] == *count, "request {count}: {told}");
    Ok(told)
}

fn state(platform: &Platform) -> Result<String> {
    let status = platform.json(&["status", "sessions"])?;
    Ok(status["state"].as_str().context("a state")?.to_owned())
}

async fn until_suspended(platform: &Platform) -> Result<()> {
    let since = Instant::now();
    loop {
        let state = state(platform)?;
        if state == "suspended" {
            return Ok(());
        }
        ensure!(
            since.elapsed() < HANGS && state != "asleep",
            "it is {state}\n{}\n{}",
            platform.cli(&["logs", "sessions"])?,
            platform.log_tail()
        );
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

fn now() -> f64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
    let of_second = u32::try_from(now.tv_nsec).unwrap_or(0);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    Duration::new(seconds, of_second).as_secs_f64()
}
