//! What of the machinery can be reached from a VM, and what of a VM from outside: its app alone.
#![expect(clippy::tests_outside_test_module, reason = "this is a test crate")]

use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde_json::Value;
use spore_e2e::app::{SELF_PORTRAIT, STAYS_AWAKE};
use spore_e2e::{Platform, available, until};

const BURGLAR: &str = include_str!("../apps/burglar.py");

/// The guest, in every VM's namespace.
const GUEST: Ipv4Addr = Ipv4Addr::new(10, 42, 0, 2);

const APP_PORT: u16 = 8000;

/// The one VM's namespace, as an operator finds it.
fn namespace(platform: &Platform) -> Result<PathBuf> {
    let host = platform.home().join("run/host");
    let mut found = Vec::new();
    for entry in std::fs::read_dir(host.join("vms"))? {
        let name = std::fs::read_to_string(entry?.path().join("namespace"))?;
        found.push(host.join("netns").join(name));
    }
    ensure!(found.len() == 1, "one VM runs: {found:?}");
    found.pop().context("one VM runs")
}

/// Every port of `ports` that accepts on the guest, tried from the host's side of its tap.
fn accepting(namespace: &Path, ports: Vec<u16>) -> Result<Vec<u16>> {
    let namespace = File::open(namespace)?;
    let scan = move || -> Result<Vec<u16>> {
        // Only this thread moves, and it ends here.
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
        let open = |port: &u16| {
            let address = SocketAddr::from((GUEST, *port));
            TcpStream::connect_timeout(&address, Duration::from_secs(60)).is_ok()
        };
        Ok(ports.into_iter().filter(open).collect())
    };
    let scanned = std::thread::spawn(scan).join();
    scanned.map_err(|_panic| anyhow::anyhow!("the scan panicked"))?
}

/// What the burglar found, run inside as `user`.
fn burgle(platform: &Platform, user: &[&str]) -> Result<Value> {
    let mut arguments = vec!["exec"];
    arguments.extend_from_slice(user);
    arguments.extend(["portrait", "python3", "-c", BURGLAR]);
    let out = platform.cli(&arguments)?;
    serde_json::from_str(&out).with_context(|| out.clone())
}

fn ensure_locked_out(found: &Value) -> Result<()> {
    let ports = found["devices"]["ports"].as_array().context("a list")?;
    ensure!(ports.is_empty(), "{found}");
    let listening = found["listening"].as_array().context("a list")?;
    ensure!(listening.iter().all(|port| *port == APP_PORT), "{found}");
    ensure!(!listening.is_empty(), "the app itself is seen: {found}");
    let made = found["made"].as_array().context("a list")?;
    let opened = |tried: &Value| tried.as_str().is_none_or(|tried| tried.ends_with("opened"));
    ensure!(!made.iter().any(opened), "{found}");
    for (question, answered) in [
        ("exec", false),
        ("read", false),
        ("frame", false),
        ("awake", true),
        ("ready", true),
    ] {
        let answer = found["agent"][question].as_str().context("a text")?;
        let answer: Value = serde_json::from_str(answer).with_context(|| answer.to_owned())?;
        ensure!(answer["ok"] == answered, "{question}: {answer}");
        let keys = answer.as_object().context("an object")?.keys();
        ensure!(
            keys.clone().all(|key| key == "ok" || key == "error"),
            "{question}: {answer}"
        );
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn agent_is_unreachable_from_the_public_url() -> Result<()> {
    if !available() {
        return Ok(());
    }
    let platform = Platform::start().await?;
    platform.deploy("portrait", SELF_PORTRAIT, STAYS_AWAKE)?;
    let visitor = platform.visitor();
    ensure!(visitor.get("portrait.localhost", "/").await?.status == 200);

    for (user, uid) in [(&[][..], 1000), (&["--user", "root"][..], 0)] {
        let found = burgle(&platform, user)?;
        ensure!(found["uid"] == uid, "{found}");
        ensure_locked_out(&found).with_context(|| format!("as uid {uid}"))?;
    }

    // A visitor's port is the manifest's and no other, so what accepts is all that one could lead
    // to: every well-known port, every one of the app's neighbours, a sample of the rest.
    let mut ports: Vec<u16> = (1..=1100).collect();
    ports.extend(7900..8100);
    ports.extend((1101..u16::MAX).step_by(97));
    ports.extend([3128, 5000, 8080, 8888, 8889, 9090, u16::MAX]);
    let namespace = namespace(&platform)?;
    let open = tokio::task::spawn_blocking(move || accepting(&namespace, ports)).await??;
    ensure!(open == [APP_PORT], "these accept: {open:?}");
    ensure!(visitor.get("portrait.localhost", "/").await?.status == 200);
    platform.end()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lease_keeps_an_idle_app_awake_until_it_is_taken_back() -> Result<()> {
    if !available() {
        return Ok(());
    }
    let platform = Platform::start().await?;
    platform.deploy("portrait", SELF_PORTRAIT, "[idle]\nafter = \"3s\"\n")?;
    let lease = |span: &str| {
        let program = "/run/spore/bin/spore-guest";
        platform.cli(&["exec", "portrait", program, "keep-awake", span])
    };
    lease("10m")?;
    let awake = platform.vm_processes()?;
    ensure!(awake.len() == 1, "{awake:?}");
    // Nobody visits for longer than it takes to be idle.
    tokio::time::sleep(Duration::from_secs(12)).await;
    ensure!(platform.vm_processes()? == awake, "the same VM is awake");
    lease("0")?;
    until(240, || Ok(platform.vm_processes()?.is_empty()))
        .await
        .context("reaped once the lease is taken back")?;
    platform.end()
}
