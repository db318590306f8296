//! This crate's cgroups on a host whose only hierarchy is cgroup v2: Debian's kernel, C library,
//! shell and tools in a small machine under QEMU's software emulation, whatever the host here has.
//!
//! The machine is booted once, from an initramfs alone; its first process is
//! `tests/bin/cgroup_v2.rs`, which says a line for each check. Needs no root. The kernel is that of
//! `make deps`; without it or without QEMU every test says `SKIPPED: reason` and passes.
#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::tests_outside_test_module,
    reason = "the whole program is tests: a failed step ends its test, and a skip is said"
)]

mod archive;

use std::collections::BTreeSet;
use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

use crate::archive::Archive;

const QEMU: &str = "/usr/bin/qemu-system-x86_64";

/// Far longer than the boot and all checks take on a busy machine; only a hang reaches it.
const HANG: Duration = Duration::from_secs(600);

/// What the checks put into cgroups, besides their own program.
const TOOLS: [&str; 2] = ["/bin/sh", "/bin/sleep"];

/// What the machine said, or why there is none.
fn said() -> &'static Result<String, String> {
    static SAID: OnceLock<Result<String, String>> = OnceLock::new();
    SAID.get_or_init(|| {
        let deps = std::env::var_os("SPORE_DEPS").unwrap_or_else(|| "/var/lib/spore-deps".into());
        let kernel = PathBuf::from(deps).join("kernel/current/vmlinux");
        if !kernel.is_file() {
            return Err("no guest kernel: run `make deps`".to_owned());
        }
        if !Path::new(QEMU).is_file() {
            return Err("no QEMU: install qemu-system-x86".to_owned());
        }
        Ok(boot(&kernel))
    })
}

fn check(name: &str) {
    match said() {
        Err(reason) => println!("SKIPPED: {reason}"),
        Ok(said) => {
            let passed = format!("passed {name}");
            assert!(said.lines().any(|line| line.trim() == passed), "{said}");
        }
    }
}

/// Boots the machine and reads its console to the end.
fn boot(kernel: &Path) -> String {
    let folder = tempfile::tempdir().unwrap();
    let initramfs = folder.path().join("initramfs");
    fs::write(&initramfs, contents(folder.path())).unwrap();
    let mut machine = Command::new(QEMU)
        .args([
            "-M",
            "q35,accel=tcg",
            "-cpu",
            "qemu64",
            "-smp",
            "2",
            "-m",
            "512",
        ])
        .args(["-nodefaults", "-no-user-config", "-nographic", "-no-reboot"])
        .args(["-serial", "stdio", "-append"])
        .arg(
            "console=ttyS0 loglevel=1 panic=-1 reboot=t cgroup_no_v1=all no_timer_check \
             mitigations=off random.trust_cpu=on raid=noautodetect nokaslr audit=0",
        )
        .arg("-kernel")
        .arg(kernel)
        .arg("-initrd")
        .arg(&initramfs)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut console = machine.stdout.take().unwrap();
    let reader = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        console.read_to_end(&mut bytes).unwrap();
        String::from_utf8_lossy(&bytes).into_owned()
    });
    let step = Duration::from_millis(50);
    let mut waited = Duration::ZERO;
    while machine.try_wait().unwrap().is_none() {
        if waited > HANG {
            machine.kill().unwrap();
        }
        std::thread::sleep(step);
        waited += step;
    }
    reader.join().unwrap()
}

/// The initramfs: the program, the tools, and what both are linked with.
fn contents(folder: &Path) -> Vec<u8> {
    let program = folder.join("init");
    fs::copy(env!("CARGO_BIN_EXE_spore-node-cgroup-v2"), &program).unwrap();
    // Symbols are most of it, and the emulated machine has to copy them.
    let stripped = Command::new("strip").arg(&program).status();
    if !stripped.is_ok_and(|status| status.success()) {
        println!("without `strip` the boot takes longer");
    }
    let mut archive = Archive::default();
    archive.file("init", &fs::read(&program).unwrap());
    let mut libraries = BTreeSet::new();
    for tool in TOOLS {
        archive.file(tool.trim_start_matches('/'), &fs::read(tool).unwrap());
        libraries.extend(linked(Path::new(tool)));
    }
    libraries.extend(linked(&program));
    for library in libraries {
        archive.file(
            library.trim_start_matches('/'),
            &fs::read(&library).unwrap(),
        );
    }
    archive.finish()
}

/// The files that a program is linked with, the loader included.
fn linked(program: &Path) -> Vec<String> {
    let output = Command::new("ldd").arg(program).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    let words = text.split_whitespace().filter(|word| word.starts_with('/'));
    words.map(str::to_owned).collect()
}

#[test]
fn no_other_hierarchy_is_there() {
    check("only_hierarchy");
}

#[test]
fn every_level_above_vms_passes_the_controllers_on() {
    check("delegated");
}

#[test]
fn a_cgroup_that_is_made_twice_has_the_limits_of_the_second_time() {
    check("limited");
}

#[test]
fn a_launcher_that_enters_is_held_and_counted_and_the_next_daemon_finds_it() {
    check("entered");
}

#[test]
fn a_process_too_many_is_refused() {
    check("too_many_processes");
}

#[test]
fn a_vm_that_exceeds_its_memory_dies_whole() {
    check("too_much_memory");
}

#[test]
fn more_time_than_the_cpus_have_is_not_given() {
    check("throttled");
}

#[test]
fn nothing_survives_a_removal_however_fast_it_forks() {
    check("removed");
}

#[test]
fn a_sweep_sees_every_cgroup_and_their_parent_goes_last() {
    check("listed");
}
