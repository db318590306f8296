//! What hosts VMs: found by itself, forced by a flag, and not changed under VMs.
#![expect(clippy::tests_outside_test_module, reason = "this is a test crate")]

use anyhow::{Context as _, Result, ensure};
use spore_e2e::app::{SELF_PORTRAIT, STAYS_AWAKE};
use spore_e2e::platform::{Driver, driver};
use spore_e2e::{Platform, available};

#[tokio::test(flavor = "multi_thread")]
async fn up_takes_what_the_host_has_and_changes_nothing_under_vms() -> Result<()> {
    if !available() {
        return Ok(());
    }
    let mut platform = Platform::start().await?;
    let _folder = platform.deploy("portrait", SELF_PORTRAIT, STAYS_AWAKE)?;
    let vms = platform.vm_pids()?;
    ensure!(vms.len() == 1, "{vms:?}");
    platform.stop_daemon()?;
    let (hosts, other) = match driver() {
        Driver::Qemu => ("qemu", "kvm"),
        Driver::Kvm => ("kvm", "qemu"),
    };
    let config = platform.config();
    let refused = platform.run(&["server", "--config", &config, "--hypervisor", other])?;
    refused.ensure_refused(&format!("VMs of `{hosts}` run here"))?;

    // Now the configuration says nothing of it.
    let text = std::fs::read_to_string(&config)?;
    let others = text.lines().filter(|line| !line.starts_with("hypervisor"));
    std::fs::write(&config, others.collect::<Vec<_>>().join("\n"))?;
    let up = platform.json(&["up", "--config", &config])?;
    ensure!(up["started"] == true, "{up}");
    let has = up["status"]["hypervisor"].as_str().context("a text")?;
    ensure!(has.split(' ').next() == Some(hosts), "{up}");
    ensure!(platform.vm_pids()? == vms, "the same VM goes on");
    let refused = platform.run(&["up", "--config", &config, "--hypervisor", other])?;
    refused.ensure_refused("spore down")?;
    platform.cli(&["up", "--config", &config, "--hypervisor", hosts])?;

    // Nothing is left that would decide it: what the host has does.
    platform.cli(&["down", "--config", &config])?;
    let up = platform.json(&["up", "--config", &config])?;
    let examined = platform.json(&["doctor", "--config", &config])?;
    let findings = examined["findings"].as_array().context("findings")?;
    let says = |name: &str| {
        let found = findings.iter().find(|finding| finding["name"] == name);
        found.map_or_else(String::new, |finding| finding["says"].to_string())
    };
    let boundary = up["status"]["boundary_text"].as_str().context("a text")?;
    ensure!(says("boundary").contains(boundary), "{up} {examined}");
    if driver() == Driver::Kvm {
        ensure!(boundary.starts_with("kvm"), "{up}");
    }
    platform.end()
}
