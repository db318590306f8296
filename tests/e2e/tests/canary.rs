//! Where a secret is once everything that could keep it has had it: nowhere in clear.
#![expect(clippy::tests_outside_test_module, reason = "this is a test crate")]

use anyhow::{Context, Result, ensure};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use spore_e2e::app::{SELF_PORTRAIT, STAYS_AWAKE};
use spore_e2e::cores::Cores;
use spore_e2e::platform::{Site, skipped};
use spore_e2e::search::Words;
use spore_e2e::{AppFolder, Platform, available, until};

const CANARY: &str = "canary-c41d8e0277ab4f93-survives-nowhere";
const CANARIES: Words<1> = Words([CANARY]);

/// Has it in memory, on its disk, and in a line that it prints.
const KEEPS_IT: &str = "import os
with open('/var/tmp/kept', 'w') as kept:
    kept.write(os.environ['API_KEY'] * 1000)
os.sync()
print('the key is', os.environ['API_KEY'], flush=True)
";

/// It is idle soon, and all that it holds in memory is put on the disk.
const SUSPENDS: &str = "[idle]\nafter = \"1s\"\nmode = \"suspend\"\n";

/// In a sandbox that has no process of its own, the same of what it was forked with.
const KEEPS_ON: &str = "cat /var/tmp/kept > /var/tmp/kept-too && sync && cat /run/secrets/SECOND";

#[tokio::test(flavor = "multi_thread")]
async fn canary_secret_survives_nowhere() -> Result<()> {
    if !available() {
        return Ok(());
    }
    let mut platform = Platform::start_at(Site::with_templates()).await?;
    let cores = Cores::into(&platform.home().join("cores"))?;
    if cores.is_none() {
        skipped("core_pattern cannot be set here, so no crash is looked at");
    }
    let _keeper = deploy(&platform, "keeper", STAYS_AWAKE)?;
    spore_e2e::templates(&platform, 1).await?;
    platform.cli(&["stop", "keeper"])?;
    holds_it(&platform, "keeper").await?;
    let began = platform
        .metric("spore_starts_total{from=\"template\"}")
        .await?;
    ensure!(began == 1, "the app did not begin from a template");

    let allowed = ["checkpoint", "keeper", "--tag", "kept", "--allow-secrets"];
    let taken = platform.json(&allowed)?;
    ensure!(taken["snapshot"]["encrypted"] == true, "{taken}");
    let forks = platform.json(&["fork", "kept"])?;
    let sandbox = forks[0]["id"].as_str().context("an id")?;
    let inside = ["sandbox", "exec", sandbox, "--", "sh", "-c", KEEPS_ON];
    ensure!(platform.cli(&inside)? == CANARY);
    let _dozer = deploy(&platform, "dozer", SUSPENDS)?;
    holds_it(&platform, "dozer").await?;
    until_suspended(&platform).await?;
    is_nowhere(&platform, 2)?;

    if let Some(cores) = cores {
        everything_crashes(&mut platform, &cores).await?;
        platform.start_daemon().await?;
        holds_it(&platform, "keeper").await?;
        is_nowhere(&platform, 1)?;
        drop(cores);
        let pattern = Cores::pattern()?;
        let home = platform.home().display().to_string();
        ensure!(!pattern.contains(&home), "{pattern} was not put back");
    }
    // It was in there: it goes on with it.
    holds_it(&platform, "dozer").await?;
    let answer = platform.visitor().get("dozer.localhost", "/").await?;
    let told: Value = serde_json::from_str(&answer.body)?;
    ensure!(told["count"] == 3, "{told}");
    platform.end()
}

fn deploy(platform: &Platform, app: &str, idle: &str) -> Result<AppFolder> {
    let manifest = format!(
        "{idle}[resources]\ndisk = \"64MiB\"\n\
         [secrets]\nnames = [\"API_KEY\"]\nfiles = [\"SECOND\"]\n"
    );
    let folder = AppFolder::python(app, &format!("{KEEPS_IT}{SELF_PORTRAIT}"), &manifest)?;
    for name in ["API_KEY", "SECOND"] {
        let set = platform.run_with(&["secret", "set", app, name], CANARY.as_bytes())?;
        ensure!(set.code == 0, "{set:?}");
    }
    platform.cli(&["deploy", &folder.argument()])?;
    Ok(folder)
}

async fn holds_it(platform: &Platform, app: &str) -> Result<()> {
    let visitor = platform.visitor();
    let host = format!("{app}.localhost");
    let answer = visitor.get(&host, "/env/API_KEY").await?;
    ensure!(answer.body == CANARY, "{answer:?}");
    Ok(())
}

async fn until_suspended(platform: &Platform) -> Result<()> {
    let there = || Ok(platform.json(&["status", "dozer"])?["state"] == "suspended");
    let waited = until(900, there).await;
    waited.with_context(|| {
        format!(
            "{:?}\n{}",
            platform.cli(&["logs", "dozer"]),
            platform.log_tail()
        )
    })
}

/// Neither in a file of the platform, by name or held open, nor where a user of the host reads.
fn is_nowhere(platform: &Platform, vms: usize) -> Result<()> {
    let mut found = CANARIES.files(platform.home())?;
    let pids = platform.pids()?;
    found.extend(CANARIES.processes(&pids));
    let (open, nameless) = CANARIES.open_files(&pids)?;
    ensure!(
        nameless >= vms,
        "{nameless} files without a name for {vms} VMs"
    );
    found.extend(open);
    ensure!(found.is_empty(), "the secret is in {found:?}");
    Ok(())
}

/// The daemon, the gateway and all VMs, as by a fault of their own.
async fn everything_crashes(platform: &mut Platform, cores: &Cores) -> Result<()> {
    let mut pids = platform.vm_pids()?;
    pids.extend([platform.gateway_pid()?, platform.daemon_pid()?]);
    ensure!(pids.len() >= 4, "only {pids:?} run");
    for pid in &pids {
        // What is the first process of its namespace does not die of this signal: so what would
        // keep it from a core file is looked at too.
        let limits = std::fs::read_to_string(format!("/proc/{pid}/limits"))?;
        let core = limits.lines().find(|line| line.starts_with("Max core"));
        let core = core.context("a limit of core files")?;
        let words: Vec<_> = core.split_whitespace().collect();
        ensure!(words[4..6] == ["1", "1"], "{pid}: {core}");
        let pid = Pid::from_raw(*pid).context("a pid")?;
        kill_process(pid, Signal::SEGV)?;
    }
    for pid in &pids {
        let pid = Pid::from_raw(*pid).context("a pid")?;
        match kill_process(pid, Signal::KILL) {
            Ok(()) | Err(Errno::SRCH) => {}
            Err(error) => return Err(error.into()),
        }
    }
    // The daemon is this process's child, and a zombie until it is waited for.
    platform.kill_daemon()?;
    let gone = |pid: &i32| {
        let command = std::fs::read(format!("/proc/{pid}/cmdline"));
        command.map_or(true, |command| command.is_empty())
    };
    until(240, || Ok(pids.iter().all(gone))).await?;
    cores.fence()?;
    let left = cores.of(&pids)?;
    ensure!(left.is_empty(), "core files of {left:?}");
    Ok(())
}
