//! Apps that go wrong: each is told to its owner and its visitors, and nobody else is hurt.
#![expect(clippy::tests_outside_test_module, reason = "this is a test crate")]

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use spore_e2e::app::{RECKLESS, SELF_PORTRAIT, STAYS_AWAKE};
use spore_e2e::{Answer, AppFolder, Neighbour, Platform, available, beside, memory};
use tokio::time::Instant;

/// An app that says something and never listens.
const MUTE: &str = "echo mute: I am up\nsleep 600\n";

/// What an app prints as fast as it can: over thirty times what is kept. Emulated, a guest prints
/// some 3 MiB a second.
const FLOOD_MIB: u64 = 1024;

/// More than the processes that a VM of this size may have at once.
const ORPHANS: u32 = 1500;

/// What takes longer hangs. Much more than anything takes on a machine that others keep busy.
const HANGS: Duration = Duration::from_secs(600);

/// An app that ends at once, with a word and a code.
const QUITTER: &str = "echo quitter: no key\nexit 7\n";

#[tokio::test(flavor = "multi_thread")]
async fn a_release_that_never_gets_ready_leaves_the_old_one_serving() -> Result<()> {
    if !available() {
        return Ok(());
    }
    let platform = Platform::start().await?;
    let slow = "[health]\ntimeout = \"15s\"\n";
    beside(vec![
        (
            "never listens",
            Box::pin(never_ready(
                &platform,
                "mute",
                (MUTE, slow),
                ["nothing listens on port 8000", "mute: I am up"],
            )),
        ),
        (
            "exits at once",
            Box::pin(never_ready(
                &platform,
                "quitter",
                (QUITTER, ""),
                ["exit code 7", "quitter: no key"],
            )),
        ),
    ])?;
    platform.end()
}

async fn never_ready(
    platform: &Platform,
    name: &str,
    (code, manifest): (&str, &str),
    said: [&str; 2],
) -> Result<()> {
    platform.deploy(name, SELF_PORTRAIT, STAYS_AWAKE)?;
    let before = portrait(platform, name).await?;

    let bad = AppFolder::shell(name, code, manifest)?;
    let begun = Instant::now();
    let refused = platform.run(&["deploy", &bad.argument()])?;
    let took = begun.elapsed();
    ensure!(refused.code == 3, "the app is to blame: {refused:?}");
    ensure!(refused.out.is_empty(), "no URL is printed: {refused:?}");
    for said in said {
        ensure!(refused.err.contains(said), "no {said}: {refused:?}");
    }
    ensure!(took < HANGS, "it took {took:?}");

    let after = portrait(platform, name).await?;
    ensure!(
        after["boot_id"] == before["boot_id"],
        "the old release's VM serves on: {before} {after}"
    );
    let status = platform.json(&["status", name])?;
    ensure!(
        status["release"] == 1 && status["state"] == "awake",
        "{status}"
    );
    // The VM of the failed release is gone, so after this one's there is none.
    platform.cli(&["stop", name])?;
    let woken = portrait(platform, name).await?;
    ensure!(woken["boot_id"] != before["boot_id"], "{woken}");
    Ok(())
}

/// What the app at that name tells of itself.
async fn portrait(platform: &Platform, name: &str) -> Result<Value> {
    asked(platform, name, "/").await
}

/// The JSON that an app answers a path with.
async fn asked(platform: &Platform, name: &str, path: &str) -> Result<Value> {
    let host = format!("{name}.localhost");
    let answer = platform.visitor().get(&host, path).await?;
    ensure!(
        answer.status == 200,
        "{path}: {answer:?}\n{}",
        platform.cli(&["logs", name, "-n", "50"])?
    );
    serde_json::from_str(&answer.body).with_context(|| answer.body.clone())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crash_loop_is_paused_told_to_visitors_and_healed_by_a_good_release() -> Result<()> {
    if !available() {
        return Ok(());
    }
    let platform = Platform::start().await?;
    let neighbour = Neighbour::move_in(&platform)?;
    set_key(&platform, "good")?;
    // It works as long as its key is good, which it is when it goes live.
    let picky = format!(
        "import os, sys\nif os.environ['KEY'] != 'good':\n    sys.exit('looper: bad key')\n\
         {SELF_PORTRAIT}"
    );
    let manifest = format!("{STAYS_AWAKE}[secrets]\nnames = [\"KEY\"]\n");
    platform.deploy("looper", &picky, &manifest)?;
    one_crash_is_mended_in_its_vm(&platform).await?;

    set_key(&platform, "rotten")?;
    platform.cli(&["stop", "looper"])?;
    starts_are_paused_longer_and_longer(&platform).await?;

    platform.deploy("looper", SELF_PORTRAIT, STAYS_AWAKE)?;
    portrait(&platform, "looper").await?;
    let status = platform.json(&["status", "looper"])?;
    ensure!(
        status["state"] == "awake" && status["last_failure"].is_null(),
        "{status}"
    );
    neighbour.was_unhurt().await?;
    platform.end()
}

fn set_key(platform: &Platform, value: &str) -> Result<()> {
    let set = platform.run_with(&["secret", "set", "looper", "KEY"], value.as_bytes())?;
    ensure!(set.code == 0, "{set:?}");
    Ok(())
}

async fn one_crash_is_mended_in_its_vm(platform: &Platform) -> Result<()> {
    let before = portrait(platform, "looper").await?;
    let crashed = platform.visitor().get("looper.localhost", "/crash").await?;
    ensure!(crashed.status == 502, "{crashed:?}");
    let reason: Value = serde_json::from_str(&crashed.body)?;
    ensure!(reason["code"] == "app_closed_connection", "{reason}");
    let after = answer_in_the_end(platform, "looper").await?;
    ensure!(after["boot_id"] == before["boot_id"], "{before} {after}");
    Ok(())
}

/// The app's own answer, once its agent has started it again.
async fn answer_in_the_end(platform: &Platform, name: &str) -> Result<Value> {
    let host = format!("{name}.localhost");
    let begun = Instant::now();
    loop {
        let answer = platform.visitor().get(&host, "/").await?;
        if answer.status == 200 {
            return serde_json::from_str(&answer.body).context(answer.body);
        }
        ensure!(
            answer.status == 502 && begun.elapsed() < HANGS,
            "{answer:?} after {:?}",
            begun.elapsed()
        );
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

async fn starts_are_paused_longer_and_longer(platform: &Platform) -> Result<()> {
    let starts = || -> Result<usize> {
        let logs = platform.cli(&["logs", "looper", "-n", "1000"])?;
        Ok(logs.matches("looper: bad key").count())
    };
    let visit = || async {
        let answer = platform.visitor().get("looper.localhost", "/").await?;
        told_to_wait(&answer)
    };
    // Each of these meets a start that fails: pauses of a second are waited out for the visitor.
    visit().await?;
    let second = visit().await?;
    tokio::time::sleep(Duration::from_secs(second)).await;
    let third = visit().await?;
    let mut begun = Instant::now();
    ensure!(third > second, "pauses of {second} s, then {third} s");
    let status = platform.json(&["status", "looper"])?;
    ensure!(status["state"] == "failing", "{status}");
    let why = status["last_failure"].as_str().unwrap_or_default();
    ensure!(why.contains("exit code 1"), "{status}");

    // Within the pause visitors are answered at once, and nothing is started. Where it is over
    // before that is seen, the next one is longer.
    let mut pause = third;
    for _pause in 0..6 {
        let before = starts()?;
        ensure!(before >= 9, "each start tries three times: {before}");
        let mut told = Vec::new();
        for _visit in 0..5 {
            told.push(visit().await?);
        }
        let after = starts()?;
        // The header's seconds are rounded up.
        if begun.elapsed() < Duration::from_secs(pause - 1) {
            let is_of_it = |retry_s: &u64| (1..=pause).contains(retry_s);
            ensure!(told.iter().all(is_of_it), "{told:?} s of {pause} s");
            ensure!(after == before, "an app was started in its pause");
            return Ok(());
        }
        tokio::time::sleep(Duration::from_secs(told[4])).await;
        pause = visit().await?;
        begun = Instant::now();
    }
    bail!("no pause was long enough for five visits")
}

/// The seconds of `Retry-After` in a 503 with a reason.
fn told_to_wait(answer: &Answer) -> Result<u64> {
    ensure!(answer.status == 503, "{answer:?}");
    let reason: Value = serde_json::from_str(&answer.body)?;
    ensure!(
        reason["code"] == "app_failed" && reason["blame"] == "app",
        "{reason}"
    );
    let after = answer.header("retry-after").context("no Retry-After")?;
    let after = after.parse()?;
    ensure!(after >= 1, "{answer:?}");
    Ok(after)
}

#[tokio::test(flavor = "multi_thread")]
async fn processes_without_end_stay_in_their_vm() -> Result<()> {
    if !available() {
        return Ok(());
    }
    let platform = Platform::start().await?;
    let neighbour = Neighbour::move_in(&platform)?;
    deploy_reckless(&platform, "forker", "192MiB")?;
    let before = portrait(&platform, "forker").await?;

    asked(&platform, "forker", &format!("/orphans/{ORPHANS}")).await?;
    let begun = Instant::now();
    loop {
        let now = portrait(&platform, "forker").await?;
        ensure!(now["boot_id"] == before["boot_id"], "{before} {now}");
        if now["processes"]["Z"].is_null() {
            let all = now["processes"].as_object().context("processes")?;
            let count: u64 = all.values().filter_map(Value::as_u64).sum();
            ensure!(count < 150, "{now}");
            break;
        }
        ensure!(begun.elapsed() < HANGS, "{now}");
    }

    // All the threads there may be: the app's own limit is met, not the kernel's.
    let threads = asked(&platform, "forker", "/threads/20000").await?;
    ensure!(threads["error"].is_string(), "{threads}");
    let now = portrait(&platform, "forker").await?;
    ensure!(now["boot_id"] == before["boot_id"], "{before} {now}");
    let looked = platform.cli(&["exec", "forker", "--", "sh", "-c", "ls / | wc -l"])?;
    ensure!(looked.trim().parse::<u32>()? > 5, "{looked}");

    stop(&platform, "forker")?;

    // Processes that make processes: whether memory or their number ends first, the VM is still
    // stopped in its time and the next one answers.
    let before = portrait(&platform, "forker").await?;
    asked(&platform, "forker", "/bomb").await?;
    tokio::time::sleep(Duration::from_secs(5)).await;
    neighbour.was_unhurt().await?;
    stop(&platform, "forker")?;
    let woken = portrait(&platform, "forker").await?;
    ensure!(woken["boot_id"] != before["boot_id"], "{before} {woken}");
    platform.end()
}

fn deploy_reckless(platform: &Platform, name: &str, memory: &str) -> Result<()> {
    let manifest = format!(
        "{STAYS_AWAKE}[resources]\nmemory = \"{memory}\"\ndisk = \"64MiB\"\n\
         [health]\ntimeout = \"10m\"\n"
    );
    platform.deploy(name, RECKLESS, &manifest)?;
    Ok(())
}

/// Puts an app to sleep, and tells how long it took.
fn stop(platform: &Platform, name: &str) -> Result<Duration> {
    let begun = Instant::now();
    platform.cli(&["stop", name])?;
    let took = begun.elapsed();
    ensure!(took < HANGS, "it took {took:?}");
    Ok(took)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_of_output_is_cut_and_counted() -> Result<()> {
    if !available() {
        return Ok(());
    }
    let platform = Platform::start().await?;
    let neighbour = Neighbour::move_in(&platform)?;
    deploy_reckless(&platform, "talker", "128MiB")?;
    let before = portrait(&platform, "talker").await?;
    let daemon = platform.daemon_pid()?;
    let quiet = memory::of(daemon)?;

    // In a child of the app's, which answers meanwhile.
    asked(&platform, "talker", &format!("/flood/{FLOOD_MIB}")).await?;
    let last = format!("{:05} end of the flood", FLOOD_MIB - 1);
    let mut loud = quiet;
    let begun = Instant::now();
    while !platform
        .cli(&["logs", "talker", "-n", "1"])?
        .contains(&last)
    {
        let now = portrait(&platform, "talker").await;
        let now = now.with_context(|| format!("after {:?}", begun.elapsed()))?;
        ensure!(now["boot_id"] == before["boot_id"], "{before} {now}");
        let size = memory::of(daemon)?;
        if size.anon_kib > loud.anon_kib {
            loud = size;
        }
        ensure!(begun.elapsed() < Duration::from_secs(6000), "it goes on");
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    ensure!(
        loud.anon_kib < quiet.anon_kib + 48 * 1024,
        "the daemon grew from {quiet:?} to {loud:?}"
    );
    let kept = bytes_below(&platform.home().join("log"))?;
    ensure!(kept < 33 * 1024 * 1024, "{kept} bytes of log are kept");
    ensure!(kept > 1024 * 1024, "only {kept} bytes of log are kept");

    let logs = platform.cli(&["logs", "talker", "-n", "10000"])?;
    every_line_is_shown_or_counted(&logs)?;
    neighbour.was_unhurt().await?;
    platform.end()
}

/// From the first end of a MiB on, each further MiB is 1024 lines, shown or counted as dropped.
fn every_line_is_shown_or_counted(logs: &str) -> Result<()> {
    const MARK: &str = " end of the flood";
    let mib_of = |line: &str| -> Option<u64> {
        let number = line.split_once(MARK)?.0.rsplit(' ').next()?;
        number.parse().ok()
    };
    let (mut first, mut last, mut lines) = (None, 0, 0);
    for line in logs.lines() {
        if first.is_some() {
            let dropped = line.split_once(" lines were dropped");
            let dropped = dropped.and_then(|(before, _)| before.rsplit('(').next()?.parse().ok());
            lines += 1 + dropped.unwrap_or(0);
        }
        if let Some(mib) = mib_of(line) {
            first.get_or_insert(mib);
            last = mib;
        }
    }
    let first: u64 = first.context("no MiB of the flood is shown whole")?;
    ensure!(last == FLOOD_MIB - 1, "MiB {last} is the last one");
    let expected = (last - first) * 1024;
    ensure!(
        lines == expected,
        "{lines} lines of {expected} from MiB {first} on"
    );
    Ok(())
}

fn bytes_below(folder: &Path) -> Result<u64> {
    let mut bytes = 0;
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        let kind = entry.metadata()?;
        bytes += if kind.is_dir() {
            bytes_below(&entry.path())?
        } else {
            kind.len()
        };
    }
    Ok(bytes)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_app_beyond_its_means_is_ended_alone() -> Result<()> {
    if !available() {
        return Ok(());
    }
    let platform = Platform::start().await?;
    let neighbour = Neighbour::move_in(&platform)?;
    beside(vec![
        ("ignores SIGTERM", Box::pin(ignores_sigterm(&platform))),
        ("fills its disk", Box::pin(fills_its_disk(&platform))),
        (
            "beyond its memory",
            Box::pin(allocates_beyond_its_memory(&platform)),
        ),
    ])?;
    neighbour.was_unhurt().await?;
    platform.end()
}

async fn ignores_sigterm(platform: &Platform) -> Result<()> {
    let deaf =
        format!("import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n{SELF_PORTRAIT}");
    platform.deploy("deaf", &deaf, STAYS_AWAKE)?;
    let before = portrait(platform, "deaf").await?;
    // Ten seconds are its grace.
    let took = stop(platform, "deaf")?;
    ensure!(took > Duration::from_secs(9), "no grace: {took:?}");
    let woken = portrait(platform, "deaf").await?;
    ensure!(woken["boot_id"] != before["boot_id"], "{before} {woken}");
    Ok(())
}

async fn fills_its_disk(platform: &Platform) -> Result<()> {
    deploy_reckless(platform, "hoarder", "128MiB")?;
    let full = asked(platform, "hoarder", "/fill/var/tmp/full").await?;
    ensure!(full["error"] == "ENOSPC", "{full}");
    let written = full["written_mib"].as_u64().context("written_mib")?;
    ensure!((40..64).contains(&written), "{full}");
    portrait(platform, "hoarder").await?;
    let disks = scratch_disks(platform)?;
    ensure!(!disks.is_empty(), "no VM has a scratch disk");
    for (most, used) in &disks {
        ensure!(used <= most, "{used} bytes on the host, {most} at most");
    }
    stop(platform, "hoarder")?;
    let woken = asked(platform, "hoarder", "/fill/var/tmp/full").await?;
    ensure!(woken == full, "a wake has an empty disk: {full} {woken}");
    Ok(())
}

/// The most that each VM may write to a file, and what the files of its scratch disk take on the
/// host.
fn scratch_disks(platform: &Platform) -> Result<Vec<(u64, u64)>> {
    let mut disks = Vec::new();
    for pid in platform.vm_pids()? {
        let Ok(open) = std::fs::read_dir(format!("/proc/{pid}/fd")) else {
            // It ended meanwhile: another part of the story stopped its own.
            continue;
        };
        let limits = std::fs::read_to_string(format!("/proc/{pid}/limits")).unwrap_or_default();
        let most = limits.lines().find_map(|line| {
            let rest = line.strip_prefix("Max file size")?;
            rest.split_whitespace().next()?.parse::<u64>().ok()
        });
        let Some(most) = most else {
            continue;
        };
        for fd in open {
            let path = fd?.path();
            let Ok(file) = std::fs::metadata(&path) else {
                continue;
            };
            let target = std::fs::read_link(&path).unwrap_or_default();
            if target.to_string_lossy().contains("scratch") {
                disks.push((most, file.blocks() * 512));
            }
        }
    }
    Ok(disks)
}

async fn allocates_beyond_its_memory(platform: &Platform) -> Result<()> {
    deploy_reckless(platform, "glutton", "128MiB")?;
    let before = portrait(platform, "glutton").await?;
    for _meal in 0..2 {
        let begun = Instant::now();
        let ended = platform
            .visitor()
            .get("glutton.localhost", "/eat/400")
            .await?;
        let took = begun.elapsed();
        ensure!(ended.status == 502, "{ended:?}");
        ensure!(took < HANGS, "it took {took:?}");
        let after = answer_in_the_end(platform, "glutton").await?;
        ensure!(after["boot_id"] == before["boot_id"], "{before} {after}");
        ensure!(after["pid"] != before["pid"], "{before} {after}");
    }
    let logs = platform.cli(&["logs", "glutton"])?;
    ensure!(logs.contains("more memory than its VM has"), "{logs}");
    Ok(())
}
