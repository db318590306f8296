//! How long a visitor of a sleeping app waits, and for what.

use std::io::Write;

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use http_body_util::Full;
use hyper::header::HOST;
use hyper::{Request, StatusCode};
use serde_json::json;
use spore_e2e::Platform;
use spore_e2e::app::{SELF_PORTRAIT, STAYS_AWAKE};
use tokio::time::Instant;

use crate::{Limit, Report};

/// What a visitor waits for.
const FIRST_BYTE: &str = "request to first byte";

/// The longest median of it, with QEMU in software on two processors.
const WAKE_MS_MAX: f64 = 8000.0;

/// Puts an app to sleep and wakes it by a request, so many times.
pub(crate) async fn run(rounds: usize) -> Result<Report> {
    ensure!(rounds > 0, "no rounds");
    let platform = Platform::start().await?;
    platform.deploy("hello", SELF_PORTRAIT, STAYS_AWAKE)?;
    let mut totals = Vec::new();
    let mut warm = Vec::new();
    let mut phases: Vec<(String, Vec<f64>)> = Vec::new();
    for _round in 0..rounds {
        platform.cli(&["stop", "hello"])?;
        let (ms, timing) = timed(&platform, "hello").await?;
        totals.push(ms);
        let timing = timing.context("no timing on a waking answer")?;
        for (name, ms) in parse(&timing) {
            match phases.iter_mut().find(|(known, _)| *known == name) {
                Some((_, all)) => all.push(ms),
                None => phases.push((name, vec![ms])),
            }
        }
        warm.push(timed(&platform, "hello").await?.0);
    }
    platform.end()?;
    let mut out = std::io::stdout().lock();
    writeln!(
        out,
        "{:<24} {:>10} {:>10} {:>10}",
        "cold wake, ms", "median", "least", "most"
    )?;
    let mut report = serde_json::Map::new();
    let all = [
        (FIRST_BYTE.to_owned(), totals),
        ("the next request".to_owned(), warm),
    ];
    for (name, mut numbers) in all.into_iter().chain(phases) {
        let middle = crate::median(&mut numbers);
        let (least, most) = (numbers.first(), numbers.last());
        let (least, most) = least.zip(most).context("no rounds")?;
        writeln!(out, "{name:<24} {middle:>10.1} {least:>10.1} {most:>10.1}")?;
        report.insert(
            name,
            json!({ "median_ms": middle, "least_ms": least, "most_ms": most }),
        );
    }
    let figure = report[FIRST_BYTE]["median_ms"].as_f64();
    Ok(Report {
        json: json!({ "bench": "cold-wake", "rounds": rounds, "figures": report }),
        limits: vec![Limit::at_most(
            "request to first byte, ms",
            figure.context("no median")?,
            WAKE_MS_MAX,
        )],
    })
}

/// How long the head of an app's answer takes, and the `Server-Timing` in it.
pub(crate) async fn timed(platform: &Platform, app: &str) -> Result<(f64, Option<String>)> {
    let request = Request::builder()
        .uri("/")
        .header(HOST, format!("{app}.localhost"))
        .body(Full::<Bytes>::default())?;
    let begun = Instant::now();
    let mut connection = platform.visitor().open().await?;
    let answer = connection.begin(request).await?;
    let ms = begun.elapsed().as_secs_f64() * 1000.0;
    ensure!(answer.status() == StatusCode::OK, "{answer:?}");
    let timing = answer.headers().get("server-timing");
    let timing = timing.map(|timing| timing.to_str().map(ToOwned::to_owned));
    Ok((ms, timing.transpose()?))
}

/// Names and milliseconds of a `Server-Timing` header.
fn parse(header: &str) -> Vec<(String, f64)> {
    let metric = |metric: &str| {
        let (name, rest) = metric.split_once(';')?;
        let ms = rest
            .split(';')
            .find_map(|part| part.trim().strip_prefix("dur="))?;
        Some((name.trim().to_owned(), ms.parse().ok()?))
    };
    header.split(',').filter_map(metric).collect()
}
