//! What visitors meet: wakes, streams, large bodies, VMs that die, and each other.
#![expect(clippy::tests_outside_test_module, reason = "this is a test crate")]

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::header::HOST;
use hyper::{Method, Request};
use rustix::process::{Pid, Signal, kill_process};
use spore_e2e::app::{STAYS_AWAKE, WORDY};
use spore_e2e::{Answer, Platform, Visitor, available, memory, raw, until};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

/// VMs that became ready.
const WAKES: &str = "spore_wake_seconds_count{phase=\"total\"}";
const MIB: usize = 1024 * 1024;

#[tokio::test(flavor = "multi_thread")]
async fn fifty_waiters_one_wake_all_200() -> Result<()> {
    if !available() {
        return Ok(());
    }
    let platform = Platform::start().await?;
    deploy(&platform, "wordy")?;
    platform.cli(&["stop", "wordy"])?;
    let wakes = platform.metric(WAKES).await?;

    // Somebody who leaves before the app is there: the request goes with the visitor.
    let gone = "GET /from-somebody-gone HTTP/1.1\r\nHost: wordy.localhost\r\n\r\n";
    let mut leaver = TcpStream::connect(platform.visitor().gateway()).await?;
    leaver.write_all(gone.as_bytes()).await?;
    let waiters = (0..50).map(|number| {
        let visitor = platform.visitor();
        tokio::spawn(async move { visitor.get("wordy.localhost", &format!("/{number}")).await })
    });
    let waiters: Vec<_> = waiters.collect();
    until(120, || Ok(!platform.vm_pids()?.is_empty())).await?;
    drop(leaver);

    let mut bodies = BTreeSet::new();
    for waiter in waiters {
        let answer = waiter.await??;
        ensure!(answer.status == 200, "{answer:?}");
        ensure!(timing(&answer).contains("boot;dur="), "{answer:?}");
        ensure!(timing(&answer).contains("wait;dur="), "{answer:?}");
        bodies.insert(answer.body);
    }
    ensure!(bodies.len() == 1, "several VMs answered: {bodies:?}");
    ensure!(platform.vm_pids()?.len() == 1);
    ensure!(platform.metric(WAKES).await? == wakes + 1);
    let warm = platform.visitor().get("wordy.localhost", "/warm").await?;
    ensure!(warm.header("server-timing").is_none(), "{warm:?}");

    // Lines arrive behind the answers, in the order they were printed in.
    let logs = || platform.cli(&["logs", "wordy", "-n", "1000"]);
    until(120, || Ok(logs()?.contains("saw GET /warm\n"))).await?;
    let logs = logs()?;
    for number in 0..50 {
        let line = format!("saw GET /{number}\n");
        ensure!(logs.matches(&line).count() == 1, "{line}{logs}");
    }
    ensure!(!logs.contains("/from-somebody-gone"), "{logs}");
    platform.end()
}

#[tokio::test(flavor = "multi_thread")]
async fn recycled_vm_never_answers_for_another_app() -> Result<()> {
    if !available() {
        return Ok(());
    }
    let platform = Platform::start().await?;
    let names = ["left", "right"];
    for name in names {
        deploy(&platform, name)?;
    }
    // One connection per app, and one that both are asked on: all of them outlive the VMs.
    let visitor = platform.visitor();
    let mut own = [visitor.open().await?, visitor.open().await?];
    let mut shared = visitor.open().await?;
    let mut vms = BTreeSet::new();
    for swap in 0..20 {
        let (awake, asleep) = (swap % 2, (swap + 1) % 2);
        platform.cli(&["stop", names[asleep]])?;
        // The gateway closes what is silent for over a minute.
        let unknown = own[asleep].get("nobody.localhost", "/").await?;
        ensure!(unknown.status == 404, "{unknown:?}");
        let host = format!("{}.localhost", names[awake]);
        let asked = [
            own[awake].get(&host, "/").await?,
            shared.get(&host, "/").await?,
        ];
        for answer in asked {
            ensure!(answer.status == 200, "{answer:?}");
            let (name, boot) = answer.body.split_once(' ').context("name and boot id")?;
            ensure!(name == names[awake], "{} for {host}", answer.body);
            vms.insert(boot.to_owned());
        }
    }
    // The first app asked was awake since its deployment; every other swap is a new VM.
    ensure!(vms.len() == 20, "{}", vms.len());
    platform.end()
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_and_large_bodies_pass_both_ways() -> Result<()> {
    if !available() {
        return Ok(());
    }
    let platform = Platform::start().await?;
    deploy(&platform, "wordy")?;
    let visitor = platform.visitor();
    events_arrive_one_by_one(&platform).await?;

    // No two pieces of it are alike, so that none can be lost or repeated unseen.
    let numbers = (0_u32..).flat_map(u32::to_le_bytes);
    let sent: Vec<u8> = numbers.take(20 * MIB).collect();
    let request = Request::builder()
        .method(Method::POST)
        .uri("/echo")
        .header(HOST, "wordy.localhost")
        .body(Full::from(sent.clone()))?;
    let mut connection = visitor.open().await?;
    let answer = connection.begin(request).await?;
    let echoed = answer.into_body().collect().await?.to_bytes();
    ensure!(echoed == sent, "{} bytes came back", echoed.len());

    slow_visitors_hold_up_nobody(&platform).await?;
    platform.end()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_killed_under_a_request_is_a_502_and_the_app_saw_it_once() -> Result<()> {
    if !available() {
        return Ok(());
    }
    let platform = Platform::start().await?;
    let visitor = platform.visitor();
    // An app each: one that has just died twice is paused for longer than a request is held.
    for (name, method) in [("getter", Method::GET), ("poster", Method::POST)] {
        deploy(&platform, name)?;
        let host = format!("{name}.localhost");
        let asked = tokio::spawn(ask(visitor.clone(), method, host.clone()));
        let saw_it = || Ok(platform.cli(&["logs", name])?.contains("/slow\n"));
        until(120, saw_it).await.context("the app sees it")?;
        let vms = platform.vm_pids()?;
        ensure!(vms.len() == 1, "{vms:?}");
        kill_process(Pid::from_raw(vms[0]).context("a pid")?, Signal::KILL)?;
        let answer = asked.await??;
        ensure!(answer.status == 502, "{answer:?}");
        let reason: serde_json::Value = serde_json::from_str(&answer.body)?;
        ensure!(reason["code"] == "vm_died", "{reason}");

        let next = visitor.get(&host, "/after").await?;
        ensure!(next.status == 200, "{next:?}");
        ensure!(!timing(&next).is_empty(), "a new VM answers: {next:?}");
        let logs = platform.cli(&["logs", name])?;
        ensure!(logs.matches("/slow\n").count() == 1, "{logs}");
        let status = platform.json(&["status", name])?;
        ensure!(status["state"] == "awake", "{status}");
        platform.cli(&["stop", name])?;
    }
    platform.end()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_newly_installed_version_takes_the_door_over_and_refuses_nobody() -> Result<()> {
    if !available() {
        return Ok(());
    }
    let mut platform = Platform::start().await?;
    deploy(&platform, "wordy")?;
    let visitor = platform.visitor();
    let first = visitor.get("wordy.localhost", "/").await?;
    ensure!(first.status == 200, "{first:?}");
    let old = platform.gateway_pid()?;

    platform.stop_daemon()?;
    platform.start_daemon().await?;
    let same = visitor.get("wordy.localhost", "/").await?;
    ensure!(same.body == first.body, "{same:?}");
    ensure!(
        platform.gateway_pid()? == old,
        "the same version keeps its door"
    );

    platform.stop_daemon()?;
    platform.install()?;
    let (enough, told) = tokio::sync::oneshot::channel();
    let count = Arc::new(AtomicUsize::new(0));
    let visits = visit(visitor, first.body.clone(), told, Arc::clone(&count));
    let visits = tokio::spawn(visits);
    platform.start_daemon().await?;
    until(240, || {
        Ok(platform.gateway_pid().is_ok_and(|pid| pid != old))
    })
    .await?;
    until(240, || Ok(!platform.pids()?.contains(&old))).await?;
    // Some more, for the new one.
    let before = count.load(Ordering::Relaxed);
    until(240, || {
        Ok(visits.is_finished() || count.load(Ordering::Relaxed) > before + 10)
    })
    .await?;
    drop(enough);
    visits.await??;
    platform.end()
}

/// Visits an app in a row, each time on a connection of its own, until told to stop; every visit
/// must get this answer, and is counted.
async fn visit(
    visitor: Visitor,
    body: String,
    mut enough: tokio::sync::oneshot::Receiver<()>,
    count: Arc<AtomicUsize>,
) -> Result<()> {
    while enough.try_recv() == Err(tokio::sync::oneshot::error::TryRecvError::Empty) {
        let answer = visitor.get("wordy.localhost", "/").await;
        let answer = answer.with_context(|| format!("after {count:?} visits"))?;
        ensure!(answer.status == 200 && answer.body == body, "{answer:?}");
        count.fetch_add(1, Ordering::Relaxed);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_app_whose_visitors_left_sleeps_again() -> Result<()> {
    if !available() {
        return Ok(());
    }
    let platform = Platform::start().await?;
    platform.deploy("wordy", WORDY, "[idle]\nafter = \"2s\"\n")?;
    let asleep = || Ok(platform.vm_processes()?.is_empty());
    until(240, asleep)
        .await
        .context("asleep after the deploy")?;

    let half = "POST /half HTTP/1.1\r\nHost: wordy.localhost\r\nContent-Length: 10\r\n\r\nhalf";
    let whole = "GET /whole HTTP/1.1\r\nHost: wordy.localhost\r\n\r\n";
    for request in [whole, half] {
        let mut leaver = TcpStream::connect(platform.visitor().gateway()).await?;
        leaver.write_all(request.as_bytes()).await?;
        until(120, || Ok(!platform.vm_pids()?.is_empty())).await?;
        drop(leaver);
        until(240, asleep)
            .await
            .with_context(|| format!("asleep after {request}"))?;
    }
    let next = platform.visitor().get("wordy.localhost", "/next").await?;
    ensure!(next.status == 200, "{next:?}");
    let saw_next = || Ok(platform.cli(&["logs", "wordy"])?.contains("saw GET /next"));
    until(120, saw_next).await?;
    let logs = platform.cli(&["logs", "wordy"])?;
    ensure!(
        !logs.contains("/whole") && !logs.contains("/half"),
        "{logs}"
    );
    platform.end()
}

/// A request that the app takes minutes for. A POST keeps part of its body back.
async fn ask(visitor: Visitor, method: Method, host: String) -> Result<Answer> {
    if method == Method::GET {
        return visitor.get(&host, "/slow").await;
    }
    let part = format!(
        "POST /slow HTTP/1.1\r\nHost: {host}\r\nContent-Length: 10\r\n\
         Connection: close\r\n\r\nhalf"
    );
    raw(visitor.gateway(), &part).await
}

async fn events_arrive_one_by_one(platform: &Platform) -> Result<()> {
    let request = Request::builder()
        .uri("/events")
        .header(HOST, "wordy.localhost")
        .body(Full::<Bytes>::default())?;
    let mut connection = platform.visitor().open().await?;
    let mut events = connection.begin(request).await?.into_body();
    let mut seen = String::new();
    while !seen.contains("first") {
        let frame = events.frame().await.context("the stream ended")??;
        seen.push_str(&String::from_utf8_lossy(frame.data_ref().context("bytes")?));
    }
    ensure!(!seen.contains("second"), "{seen}");
    platform.cli(&["exec", "wordy", "--", "touch", "/tmp/go-on"])?;
    let rest = events.collect().await?.to_bytes();
    ensure!(rest.ends_with(b"data: second\n\n"), "{rest:?}");
    Ok(())
}

/// One who sends half a head, one who does not read 40 MiB: others are served, and the gateway
/// keeps little of it.
async fn slow_visitors_hold_up_nobody(platform: &Platform) -> Result<()> {
    let visitor = platform.visitor();
    let mut half = TcpStream::connect(visitor.gateway()).await?;
    half.write_all(b"GET / HTTP/1.1\r\nHost: wordy.loc").await?;
    let mut reader = TcpStream::connect(visitor.gateway()).await?;
    let large = b"GET /large/40 HTTP/1.1\r\nHost: wordy.localhost\r\nConnection: close\r\n\r\n";
    reader.write_all(large).await?;
    let mut first = [0; 1024];
    reader.read_exact(&mut first).await?;
    for _request in 0..20 {
        let answer = visitor.get("wordy.localhost", "/").await?;
        ensure!(answer.status == 200, "{answer:?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let memory = memory::of(platform.gateway_pid()?)?.anon_kib / 1024;
    ensure!(memory < 40, "the gateway holds {memory} MiB");
    let mut rest = Vec::new();
    reader.read_to_end(&mut rest).await?;
    ensure!(rest.len() > 40 * MIB - 1024, "{} bytes came", rest.len());
    let mut refusal = String::new();
    half.read_to_string(&mut refusal).await?;
    ensure!(refusal.is_empty() || refusal.contains(" 408 "), "{refusal}");
    Ok(())
}

fn deploy(platform: &Platform, name: &str) -> Result<()> {
    platform.deploy(name, WORDY, STAYS_AWAKE)?;
    Ok(())
}

fn timing(answer: &Answer) -> &str {
    answer.header("server-timing").unwrap_or_default()
}
