//! What sleeping apps cost the daemon and the gateway.

use std::io::Write;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use spore_api::name::{AccountName, AppName};
use spore_control::store::embedded::EmbeddedStore;
use spore_control::store::record::app::{AppRecord, app_key};
use spore_control::store::record::release::{ReleaseRecord, release_key};
use spore_control::store::record::{Record, encode, load};
use spore_control::store::{Store, Transaction};
use spore_e2e::Platform;
use spore_e2e::app::SELF_PORTRAIT;
use spore_e2e::memory::{self, Memory};

use crate::{Limit, Report};

/// What the daemon may hold with a thousand apps asleep.
const DAEMON_KIB_MAX: u32 = 100 * 1024;

/// Apps written in one transaction.
const BATCH: usize = 100;

/// Deploys one app for real, copies its records under so many names while the daemon is away, and
/// reads what daemon and gateway then take.
pub(crate) async fn run(apps: usize) -> Result<Report> {
    let mut platform = Platform::start().await?;
    platform.deploy("hello", SELF_PORTRAIT, "")?;
    platform.cli(&["stop", "hello"])?;
    let one = memory(&platform)?;
    platform.stop_daemon()?;
    multiply(&platform, apps).await.context("write the apps")?;
    platform.start_daemon().await?;
    let listed = platform.client().apps().await?.len();
    ensure!(listed == apps + 1, "{listed} apps are there");
    // A request for the last one makes the gateway look at its whole table.
    let last = name(apps - 1);
    let host = format!("{last}.localhost");
    let answer = platform.visitor().get(&host, "/").await?;
    ensure!(
        answer.status == 200,
        "the last app does not wake: {answer:?}"
    );
    platform.cli(&["stop", &last])?;
    let many = memory(&platform)?;
    platform.end()?;
    table(one, many, listed)?;
    let [daemon, gateway] = many;
    Ok(Report {
        json: json!({
            "bench": "memory", "apps": listed,
            "daemon": json_of(daemon), "gateway": json_of(gateway),
            "daemon_one_app": json_of(one[0]), "gateway_one_app": json_of(one[1]),
        }),
        limits: vec![Limit::at_most(
            "daemon, resident KiB",
            f64::from(u32::try_from(daemon.rss_kib)?),
            f64::from(DAEMON_KIB_MAX),
        )],
    })
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

/// Memory of the daemon and of its gateway.
fn memory(platform: &Platform) -> Result<[Memory; 2]> {
    Ok([
        memory::of(platform.daemon_pid()?)?,
        memory::of(platform.gateway_pid()?)?,
    ])
}

fn table(one: [Memory; 2], many: [Memory; 2], apps: usize) -> Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(
        out,
        "{:<24} {:>12} {:>12}",
        "memory, KiB",
        "one app",
        format!("{apps} apps")
    )?;
    for ((name, one), many) in ["daemon", "gateway"].into_iter().zip(one).zip(many) {
        for (kind, of) in KINDS {
            let (one, many) = (of(&one), of(&many));
            writeln!(out, "{:<24} {one:>12} {many:>12}", format!("{name} {kind}"))?;
        }
    }
    Ok(())
}

/// A name, and how to read it.
type Kind = (&'static str, fn(&Memory) -> u64);

const KINDS: [Kind; 3] = [
    ("resident", |memory| memory.rss_kib),
    ("proportional", |memory| memory.pss_kib),
    ("anonymous", |memory| memory.anon_kib),
];

fn json_of(memory: Memory) -> Value {
    let kinds = KINDS.map(|(kind, of)| (format!("{kind}_kib"), json!(of(&memory))));
    Value::Object(kinds.into_iter().collect())
}
