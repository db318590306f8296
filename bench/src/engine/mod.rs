//! What a fork costs beside a cold boot: VMs of one node, both kinds turn by turn in one run.

mod host;

use std::io::Write;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::json;
use spore_wire::id::{SnapshotId, VmId};
use spore_wire::node::{Source, VmStatus};
use tokio::time::Instant;

use self::host::Host;
use crate::{Limit, Report, median};

/// VMs that are started at once.
const TOGETHER: usize = 10;

/// Snapshots in a row, each of a fork of the one before.
const DEPTH: usize = 5;

/// How long a child is left alone before its pages are counted.
const IDLE: Duration = Duration::from_secs(5);

/// Changes 2 MiB of the memory of whoever runs it.
const CHANGE: &str = "head -c 2097152 /dev/urandom > /dev/shm/changed";

/// Every kind of start, so many times.
pub(crate) async fn run(rounds: usize) -> Result<Report> {
    ensure!(rounds > 0, "no rounds");
    let host = Host::open().await?;
    let (booted, forked) = to_agent(&host, rounds).await?;
    let (shallow, deep, paused) = by_depth(&host, rounds).await?;
    let empty = host.pauses(rounds.max(20)).await?;
    let (cold_together, forked_together, private_kib) = together(&host).await?;
    host.close().await?;

    let rows = [
        ("boot to the agent's answer, ms", booted),
        ("fork to the agent's answer, ms", forked),
        ("fork at depth 0, ms", shallow),
        ("fork at depth 5, ms", deep),
        ("pause of a checkpoint, ms", paused),
        ("pause for nothing, ms", empty),
        ("10 boots to all answers, ms", vec![cold_together]),
        ("10 forks to all answers, ms", vec![forked_together]),
        ("pages of an idle fork, KiB", private_kib),
    ];
    let mut out = std::io::stdout().lock();
    writeln!(
        out,
        "{:<36} {:>10} {:>10} {:>10}",
        "engine", "median", "least", "most"
    )?;
    let mut middles = Vec::new();
    let mut figures = serde_json::Map::new();
    for (name, mut numbers) in rows {
        let middle = median(&mut numbers);
        let ends = numbers.first().zip(numbers.last()).context("no rounds")?;
        let (least, most) = ends;
        writeln!(out, "{name:<36} {middle:>10.1} {least:>10.1} {most:>10.1}")?;
        figures.insert(
            name.to_owned(),
            json!({ "median": middle, "least": least, "most": most }),
        );
        middles.push(middle);
    }
    let [
        booted,
        forked,
        shallow,
        deep,
        paused,
        empty,
        cold,
        warm,
        private,
    ] = middles[..]
    else {
        unreachable!("a median of each row");
    };
    let limits = vec![
        Limit::at_most("fork to agent, part of a boot", forked / booted, 0.1),
        Limit::at_most("10 forks, part of 10 boots", warm / cold, 1.0 / 5.0),
        Limit::at_most("MiB of an idle fork's own", private / 1024.0, 3.0),
        Limit::at_most("fork at depth 5, times depth 0", deep / shallow, 1.5),
        Limit::at_most("pause, times one for nothing", paused / empty, 6.0),
    ];
    Ok(Report {
        json: json!({ "bench": "engine", "rounds": rounds, "figures": figures }),
        limits,
    })
}

/// From the VMM's start to the agent's first word, in milliseconds.
fn agent_ms(status: &VmStatus) -> f64 {
    let parts = status.phases.iter();
    let parts = parts.filter(|phase| matches!(&*phase.name, "boot" | "fork" | "agent"));
    Duration::from_micros(parts.map(|phase| phase.us).sum()).as_secs_f64() * 1000.0
}

/// Boots, and forks of a snapshot of one that was booted.
async fn to_agent(host: &Host, rounds: usize) -> Result<(Vec<f64>, Vec<f64>)> {
    let source = host.start(Source::Boot, false).await?;
    let (snapshot, _) = host.take(source.vm).await?;
    host.stop(source.vm).await?;
    let forks = Source::Snapshot(snapshot);
    // What brings the snapshot's memory in is no part of a fork of what is there.
    let first = host.start(forks, false).await?;
    host.stop(first.vm).await?;
    let mut times = (Vec::new(), Vec::new());
    for _round in 0..rounds {
        for (source, times) in [(Source::Boot, &mut times.0), (forks, &mut times.1)] {
            let status = host.start(source, false).await?;
            times.push(agent_ms(&status));
            host.stop(status.vm).await?;
        }
    }
    Ok(times)
}

/// Forks of the first and of the last of a row of snapshots, and what taking one cost a fork that
/// had changed 2 MiB.
async fn by_depth(host: &Host, rounds: usize) -> Result<(Vec<f64>, Vec<f64>, Vec<f64>)> {
    let mut paused = Vec::new();
    let first = host.start(Source::Boot, true).await?;
    let (shallow, _) = host.take(first.vm).await?;
    host.stop(first.vm).await?;
    let mut last = shallow;
    for _depth in 0..DEPTH {
        let fork = host.start(Source::Snapshot(last), true).await?;
        host.run(fork.vm, CHANGE).await?;
        let (snapshot, taken) = host.take(fork.vm).await?;
        paused.push(taken.pause.as_secs_f64() * 1000.0);
        host.stop(fork.vm).await?;
        last = snapshot;
    }
    let mut times = (Vec::new(), Vec::new());
    for round in 0..=rounds {
        for (snapshot, times) in [(shallow, &mut times.0), (last, &mut times.1)] {
            let ms = timed(host, snapshot).await?;
            // The first of each brings its memory in.
            if round > 0 {
                times.push(ms);
            }
        }
    }
    Ok((times.0, times.1, paused))
}

/// From the order to a ready VM, in milliseconds.
async fn timed(host: &Host, snapshot: SnapshotId) -> Result<f64> {
    let begun = Instant::now();
    let status = host.start(Source::Snapshot(snapshot), true).await?;
    let ms = begun.elapsed().as_secs_f64() * 1000.0;
    host.stop(status.vm).await?;
    Ok(ms)
}

/// From the order to the last of ten first answers, of boots and of forks of a VM that serves, and
/// what pages of the guest an idle fork has of its own.
async fn together(host: &Host) -> Result<(f64, f64, Vec<f64>)> {
    let (cold, booted) = ten(host, Source::Boot).await?;
    let source = booted.first().context("ten VMs")?;
    let (snapshot, _) = host.take(*source).await?;
    for vm in booted {
        host.stop(vm).await?;
    }
    timed(host, snapshot).await?;
    let (warm, forks) = ten(host, Source::Snapshot(snapshot)).await?;
    for vm in forks {
        host.stop(vm).await?;
    }
    let idle = host.start(Source::Snapshot(snapshot), true).await?;
    tokio::time::sleep(IDLE).await;
    let kib = host.private_kib(idle.vm)?;
    host.stop(idle.vm).await?;
    Ok((cold, warm, vec![f64::from(u32::try_from(kib)?)]))
}

async fn ten(host: &Host, source: Source) -> Result<(f64, Vec<VmId>)> {
    let begun = Instant::now();
    let begin = |_number| host.begin(source, true);
    let vms = (0..TOGETHER).map(begin).collect::<Result<Vec<_>>>()?;
    for vm in &vms {
        host.ready(*vm).await?;
        host.ask(*vm).await?;
    }
    Ok((begun.elapsed().as_secs_f64() * 1000.0, vms))
}
