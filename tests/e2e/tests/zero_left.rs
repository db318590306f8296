//! What is left on the host once the stories of this run are over, also one that was killed; those
//! of a run beside it are not looked at. Runs last: test binaries run in the order of their names.
#![expect(clippy::tests_outside_test_module, reason = "this is a test crate")]

use std::fs::OpenOptions;
use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use spore_e2e::app::{SELF_PORTRAIT, STAYS_AWAKE};
use spore_e2e::{Platform, available, platform};

/// Set for the process that plays the story that is killed.
const VICTIM: &str = "SPORE_E2E_VICTIM";

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_left_after_the_suite() -> Result<()> {
    if !available() {
        return Ok(());
    }
    if std::env::var_os(VICTIM).is_some() {
        return be_the_victim().await;
    }
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["--exact", "nothing_is_left_after_the_suite", "--nocapture"]);
    let mut victim = command
        .env(VICTIM, "1")
        .env(platform::RUN, platform::this_run())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    let out = BufReader::new(victim.stdout.take().context("a pipe")?);
    let mut vms = None;
    for line in out.lines() {
        if let Some(pids) = line?.strip_prefix("awake: ") {
            vms = Some(pids.to_owned());
            break;
        }
    }
    victim.kill()?;
    victim.wait()?;
    let vms = vms.context("the story to be killed did not come far enough")?;
    // A zombie, which has no command line, is its new parent's to collect.
    let runs = |pid: &str| {
        let command = std::fs::read(format!("/proc/{pid}/cmdline"));
        command.is_ok_and(|command| !command.is_empty())
    };
    ensure!(
        vms.split_whitespace().all(runs),
        "the VM went with the story, so that this shows nothing"
    );

    let left = tokio::task::spawn_blocking(Platform::clear_all).await??;
    ensure!(left.is_empty(), "left behind:\n{}", left.join("\n"));
    ensure!(!vms.split_whitespace().any(runs), "a VM is left: {vms}");
    Ok(())
}

/// Wakes an app, tells the pids of its VM, and waits to be killed. It is as if another version of
/// the project had played it: its platform's configuration has a key that this one does not know.
#[expect(
    clippy::print_stdout,
    reason = "the story that kills this one reads it"
)]
async fn be_the_victim() -> Result<()> {
    let platform = Platform::start().await?;
    platform.deploy("portrait", SELF_PORTRAIT, STAYS_AWAKE)?;
    platform.visitor().get("portrait.localhost", "/").await?;
    let pids = platform.vm_pids()?;
    let pids: Vec<_> = pids.iter().map(ToString::to_string).collect();
    let mut config = OpenOptions::new().append(true).open(platform.config())?;
    config.write_all(b"key_of_another_version = true\n")?;
    println!("awake: {}", pids.join(" "));
    std::future::pending::<()>().await;
    platform.end()
}
