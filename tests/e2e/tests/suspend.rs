//! Apps that keep what they hold in memory while they sleep, on real VMs.
#![expect(clippy::tests_outside_test_module, reason = "this is a test crate")]

use std::collections::BTreeSet;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use spore_e2e::{HostAddresses, Platform, Site, available, templates, until};
use tokio::time::Instant;

/// Beyond this an idle app is not being suspended any more.
const HANGS: Duration = Duration::from_secs(900);

/// How far an app's clock may be off, the way of the answer on a busy machine included. Between two
/// of its answers it is suspended for longer.
const OFF_MAX_S: f64 = 5.0;

/// An app that counts, and keeps who logged in, in memory alone.
const SESSIONS: &str = include_str!("../apps/sessions.py");

/// An app that keeps connections open.
const CALLER: &str = include_str!("../apps/caller.py");

/// It is idle soon, and small: without a template all of its memory is written each time.
const SUSPENDS: &str = "[idle]\nafter = \"1s\"\nmode = \"suspend\"\n\
                        [resources]\nmemory = \"96MiB\"\ndisk = \"16MiB\"\n";

/// Of a net for documentation (RFC 5737), one for each story.
const OUTSIDE: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 79);
const OUTSIDE_TOO: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 80);

#[tokio::test(flavor = "multi_thread")]
async fn twenty_suspends_lose_nothing() -> Result<()> {
    lose_nothing(Site::default(), 20).await
}

#[tokio::test(flavor = "multi_thread")]
async fn suspends_over_a_template_lose_nothing_and_write_what_differs_from_it() -> Result<()> {
    lose_nothing(Site::with_templates(), 5).await
}

async fn lose_nothing(site: Site, rounds: u64) -> Result<()> {
    if !available() {
        return Ok(());
    }
    let has_template = site.templates;
    let mut platform = Platform::start_at(site).await?;
    let _app = platform.deploy("sessions", SESSIONS, SUSPENDS)?;
    if has_template {
        begin_from_template(&platform, "sessions").await?;
    }
    let mut count = 0;
    let login = ask(&platform, "/login?user=ada", &mut count).await?;
    let cookie = login["session"].as_str().context("a session")?.to_owned();
    let process = login["process"].clone();
    for round in 0..rounds {
        until_suspended(&platform, "sessions").await?;
        if has_template {
            stands_on_template(&platform)?;
        }
        if round == rounds / 2 {
            platform.kill_daemon()?;
            platform.start_daemon().await?;
            let is = state(&platform, "sessions")?;
            ensure!(is == "suspended", "it outlives the daemon: {is}");
        }
        let told = ask(&platform, &format!("/who?session={cookie}"), &mut count).await?;
        ensure!(told["user"] == "ada", "round {round}: {told}");
        ensure!(told["process"] == process, "round {round}: {told}");
        clock_is_right(&platform, told, &mut count)
            .await
            .with_context(|| format!("round {round}"))?;
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
    until_suspended(&platform, "sessions").await?;
    platform.cli(&["stop", "sessions"])?;
    let is = state(&platform, "sessions")?;
    ensure!(is == "asleep", "nothing is kept: {is}");
    let mut fresh = 0;
    let told = ask(&platform, &format!("/who?session={cookie}"), &mut fresh).await?;
    ensure!(told["user"] == Value::Null, "{told}");
    platform.end()
}

/// What an app told is of now. An answer may be late on a machine that stands still, so it is asked
/// again: a clock that is wrong stays wrong.
async fn clock_is_right(platform: &Platform, mut told: Value, count: &mut u64) -> Result<()> {
    for tries_left in (0..3).rev() {
        let off = told["now"].as_f64().context("a time")? - now();
        if off.abs() < OFF_MAX_S {
            break;
        }
        ensure!(tries_left > 0, "{off} s off");
        told = ask(platform, "/", count).await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_goes_on_keeps_its_memory_and_its_own_connections_and_tcp_is_new() -> Result<()> {
    tcp_is_new(Site::default()).await
}

#[tokio::test(flavor = "multi_thread")]
async fn tcp_is_new_over_a_template_too() -> Result<()> {
    tcp_is_new(Site::with_templates()).await
}

async fn tcp_is_new(site: Site) -> Result<()> {
    if !available() {
        return Ok(());
    }
    let has_template = site.templates;
    let platform = Platform::start_at(site).await?;
    let exchange = Exchange::open(if has_template { OUTSIDE_TOO } else { OUTSIDE })?;
    let grant = format!("{SUSPENDS}[egress]\nallow = [\"{}\"]\n", exchange.address);
    let _app = platform.deploy("caller", CALLER, &grant)?;
    if has_template {
        begin_from_template(&platform, "caller").await?;
    }
    tell(&platform, "/keep?value=4711").await?;
    for name in ["first", "second", "third"] {
        let call = format!("/call?to={}&name={name}", exchange.address);
        let told = tell(&platform, &call).await?;
        ensure!(told["welcome"] == "welcome", "{name}: {told}");
        until_suspended(&platform, "caller").await?;
        if has_template {
            stands_on_template(&platform)?;
        }
        // Nobody keeps a connection to what sleeps.
        let ended = until(900, || Ok(exchange.open_calls().is_empty())).await;
        ended.with_context(|| format!("{:?} are open", exchange.open_calls()))?;
        let told = tell(&platform, &format!("/tell?name={name}")).await?;
        ensure!(told["fared"] == "ConnectionAbortedError", "{name}: {told}");
        ensure!(told["inside"] == "across", "{name}: {told}");
        ensure!(told["kept"] == "4711", "{name}: {told}");
    }
    ensure!(exchange.met() == 3, "each connection was a new one");
    platform.end()
}

/// A server of the host that welcomes whoever says a name, and knows who is there.
struct Exchange {
    address: SocketAddr,
    met: Arc<Mutex<(usize, BTreeSet<String>)>>,
    _address: HostAddresses,
}

impl Exchange {
    fn open(on: Ipv4Addr) -> Result<Self> {
        let addresses = HostAddresses::add(&[on])?;
        let listener = TcpListener::bind((on, 0)).with_context(|| format!("listen on {on}"))?;
        let address = listener.local_addr()?;
        let met = Arc::default();
        let known = Arc::clone(&met);
        // Ends with the test's process, as those of its connections do.
        std::thread::spawn(move || {
            while let Ok((stream, _from)) = listener.accept() {
                let known = Arc::clone(&known);
                std::thread::spawn(move || serve(stream, &known));
            }
        });
        Ok(Self {
            address,
            met,
            _address: addresses,
        })
    }

    fn met(&self) -> usize {
        self.met.lock().unwrap_or_else(PoisonError::into_inner).0
    }

    fn open_calls(&self) -> BTreeSet<String> {
        let met = self.met.lock().unwrap_or_else(PoisonError::into_inner);
        met.1.clone()
    }
}

/// Welcomes one caller, and waits until the connection ends, in whichever way.
fn serve(mut stream: TcpStream, met: &Mutex<(usize, BTreeSet<String>)>) -> Option<()> {
    let met = || met.lock().unwrap_or_else(PoisonError::into_inner);
    let mut name = String::new();
    let mut reader = BufReader::new(stream.try_clone().ok()?);
    reader.read_line(&mut name).ok()?;
    {
        let mut met = met();
        met.0 += 1;
        met.1.insert(name.clone());
    }
    drop(stream.write_all(b"welcome"));
    while matches!(reader.read(&mut [0; 100]), Ok(1..)) {}
    met().1.remove(&name);
    Some(())
}

async fn tell(platform: &Platform, path: &str) -> Result<Value> {
    let answer = platform.visitor().get("caller.localhost", path).await?;
    ensure!(answer.status == 200, "{answer:?}\n{}", platform.log_tail());
    Ok(serde_json::from_str(&answer.body)?)
}

/// Has an app's next VM begin from a template: the one of its deploy booted.
async fn begin_from_template(platform: &Platform, app: &str) -> Result<()> {
    until_suspended(platform, app).await?;
    templates(platform, 1).await?;
    platform.cli(&["stop", app])?;
    platform.cli(&["wake", app])?;
    let forked = platform.metric("spore_starts_total{from=\"template\"}");
    ensure!(forked.await? == 1, "there is a template");
    Ok(())
}

/// What is suspended continues a template, and is much smaller than that.
fn stands_on_template(platform: &Platform) -> Result<()> {
    let listed = platform.json(&["snapshot", "ls"])?;
    let mut all = listed["items"].as_array().context("a list")?.iter();
    let suspended = all.find(|snapshot| snapshot["kind"] == "suspend");
    let suspended = suspended.with_context(|| listed.to_string())?;
    let parent = suspended["parent"].as_str();
    let parent = parent.with_context(|| format!("it stands alone: {suspended}"))?;
    let parent = platform.json(&["snapshot", "info", parent])?;
    ensure!(parent["kind"] == "template", "{parent}");
    let bytes = |of: &Value| of["bytes"].as_u64().context("its bytes");
    let (own, below) = (bytes(suspended)?, bytes(&parent)?);
    ensure!(own * 2 < below, "{own} bytes over {below}");
    Ok(())
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

fn state(platform: &Platform, app: &str) -> Result<String> {
    let status = platform.json(&["status", app])?;
    Ok(status["state"].as_str().context("a state")?.to_owned())
}

async fn until_suspended(platform: &Platform, app: &str) -> Result<()> {
    let since = Instant::now();
    loop {
        let state = state(platform, app)?;
        if state == "suspended" {
            return Ok(());
        }
        ensure!(
            since.elapsed() < HANGS && state != "asleep",
            "it is {state}\n{}\n{}",
            platform.cli(&["logs", app])?,
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
