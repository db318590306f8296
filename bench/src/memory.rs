//! What sleeping apps cost the daemon and the gateway.

use std::io::Write;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use spore_api::name::{AccountName, AppName};
use spore_control::store::embedded::EmbeddedStore;
use spore_control::store::record::app::{AppRecord, app_key};
use spore_control::store::record::release::{ReleaseRecord, release_key};
use spore_control::store::record::{Record, encode, load};
use spore_control::store::{Store, Transaction};
use spore_e2e::app::SELF_PORTRAIT;
use spore_e2e::{AppFolder, Platform};

/// Apps written in one transaction.
const BATCH: usize = 100;

/// Deploys one app for real, copies its records under so many names while the daemon is away, and
/// reads what daemon and gateway then take.
pub(crate) async fn run(apps: usize) -> Result<Value> {
    let mut platform = Platform::start().await?;
    let folder = AppFolder::python("hello", SELF_PORTRAIT, "")?;
    platform.cli(&["deploy", &folder.argument()])?;
    platform.cli(&["stop", "hello"])?;
    let empty = resident_kib(&platform)?;
    platform.stop_daemon()?;
    multiply(&platform, apps).await.context("write the apps")?;
    platform.start_daemon().await?;
    let listed = platform.client().apps().await?.len();
    // A request for the last one makes the gateway look at its whole table.
    let last = format!("{}.localhost", name(apps - 1));
    let answer = platform.visitor().get(&last, "/").await?;
    let full = resident_kib(&platform)?;
    platform.end()?;
    let mut out = std::io::stdout().lock();
    writeln!(
        out,
        "{:<24} {:>12} {:>12}",
        "resident, KiB",
        "one app",
        format!("{listed} apps")
    )?;
    writeln!(out, "{:<24} {:>12} {:>12}", "daemon", empty.0, full.0)?;
    writeln!(out, "{:<24} {:>12} {:>12}", "gateway", empty.1, full.1)?;
    writeln!(out, "the last app answers {} from asleep", answer.status)?;
    Ok(json!({
        "bench": "memory", "apps": listed, "daemon_kib": full.0, "gateway_kib": full.1,
        "daemon_kib_one_app": empty.0, "gateway_kib_one_app": empty.1,
    }))
}

fn name(number: usize) -> String {
    format!("app-{number:06}")
}

async fn multiply(platform: &Platform, apps: usize) -> Result<()> {
    let store = EmbeddedStore::open(&platform.home().join("data/store.redb")).await?;
    let me = AccountName::default_account();
    let model = "hello".parse::<AppName>()?;
    let app = read::<AppRecord>(&store, &app_key(&me, &model)).await?;
    let release = read::<ReleaseRecord>(&store, &release_key(&me, &model, 1)).await?;
    let numbers = (0..apps).collect::<Vec<_>>();
    for batch in numbers.chunks(BATCH) {
        let mut write = Transaction::default();
        for number in batch {
            let copy = name(*number).parse::<AppName>()?;
            write = write
                .put(app_key(&me, &copy), encode(&app))
                .put(release_key(&me, &copy, 1), encode(&release));
        }
        store.commit(write).await?;
    }
    Ok(())
}

async fn read<R: Record>(store: &EmbeddedStore, key: &str) -> Result<R> {
    let stored = load::<R>(store, key).await?;
    Ok(stored.with_context(|| format!("no record {key}"))?.record)
}

/// Resident memory of the daemon and of its gateway.
fn resident_kib(platform: &Platform) -> Result<(u64, u64)> {
    let daemon = std::fs::read_to_string(platform.home().join("run/daemon.lock"))?;
    let gateway = std::fs::read_to_string(platform.home().join("run/gateway/pid"))?;
    Ok((rss(daemon.trim())?, rss(gateway.trim())?))
}

fn rss(pid: &str) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
    kib.with_context(|| format!("no VmRSS of {pid}"))
}
