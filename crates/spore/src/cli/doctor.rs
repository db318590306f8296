//! `spore doctor`: what this host lacks for VMs, each with a remedy. It calls no daemon.

use std::ffi::OsString;
use std::fs::File;

use anyhow::{Context as _, Result};
use clap::Args;
use serde_json::json;
use spore_node::doctor::{Examination, Finding, ProbeReport, Verdict};
use spore_node::hypervisor::qemu::QemuConfig;
use spore_vmm::clock::Monotonic;
use spore_vmm::kvm::Kvm;
use spore_vmm::probe::probe;

use super::output::{Format, Look, Output};
use super::platform::ConfigFile;
use crate::server::{BUILD_USER, HypervisorChoice};

/// Say what this host lacks for VMs, and what to do
#[derive(Debug, Args)]
#[command(after_help = "\
Ends with 1 when something is missing without which no VM runs.")]
pub(crate) struct Doctor {
    #[command(flatten)]
    file: ConfigFile,
}

/// The guest that tells whether KVM is of use (started by `spore doctor`)
#[derive(Debug, Args)]
pub(crate) struct KvmProbe {}

impl Doctor {
    pub(crate) fn run(&self, output: &Output) -> Result<u8> {
        let config = self.file.read()?;
        let program = std::env::current_exe().context("find this program's own file")?;
        let asked = Examination {
            probe: vec![program.into_os_string(), OsString::from("kvm-probe")],
            emulates: config.hypervisor == HypervisorChoice::Qemu,
            qemu: QemuConfig::DEBIAN_QEMU.into(),
            vmm: config.vmm,
            kernel: config.kernel,
            initramfs: config.initramfs,
            data_dir: config.data_dir,
            memory_reserve_mib: config.memory_reserve_mib.into(),
            build_user: BUILD_USER.to_owned(),
        };
        let findings = asked.findings();
        let is_ready = findings.iter().all(|it| it.verdict != Verdict::Missing);
        if output.format() == Format::Json {
            output.json(&json!({ "ready": is_ready, "findings": findings }))?;
        } else {
            show(output, &findings)?;
        }
        Ok(u8::from(!is_ready))
    }
}

fn show(output: &Output, findings: &[Finding]) -> Result<()> {
    for Finding {
        name,
        verdict,
        says,
        remedy,
    } in findings
    {
        let (word, look) = match verdict {
            Verdict::Good => ("good", Look::Good),
            Verdict::Advice => ("advice", Look::Pending),
            Verdict::Missing => ("missing", Look::Bad),
        };
        let word = output.paint(look, &format!("{word:<7}"));
        output.line(&format!("{word}  {name:<12}  {says}"))?;
        if !remedy.is_empty() {
            output.line(&format!("{:23}{}", "", output.paint(Look::Faint, remedy)))?;
        }
    }
    Ok(())
}

impl KvmProbe {
    pub(crate) fn run(&self, output: &Output) -> Result<u8> {
        let opened = File::options().read(true).write(true).open("/dev/kvm");
        let device = opened.context("open /dev/kvm")?;
        let report = match Kvm::new(device.into()) {
            Ok(kvm) => match probe(&kvm, &Monotonic) {
                Ok(usable) => ProbeReport::Usable {
                    rounds_per_s: usable.rounds_per_s,
                },
                Err(error) => unusable(&error),
            },
            Err(error) => unusable(&error),
        };
        output.json_line(&report)?;
        Ok(0)
    }
}

fn unusable(error: &dyn std::error::Error) -> ProbeReport {
    let why = spore_wire::cause::chain(error);
    ProbeReport::Unusable { why }
}
