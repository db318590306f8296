//! `cargo xtask rig-test`: which tests run in the rig, on Spore's own VMM and real KVM.
//!
//! Two lists: all that need KVM or were seen to pass on it, for `make rig-test`, and of those the
//! smoke list, which `make test` runs.

use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};

use super::{MEMORY_MIB, RigOptions, quoted, results, run_in};
use crate::progress::{say, step};
use crate::{Folder, command, deps, fixed, guest, place};

/// What `rig-test` runs.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct RigTestOptions {
    #[command(flatten)]
    folder: Folder,
    /// Runs the smoke list alone, as the suite does
    #[arg(long)]
    smoke: bool,
    /// Processors of the machine, for all lists
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=64))]
    cpus: Option<u32>,
}

/// Processors of the rig, unless others are needed or asked for. With more of them QEMU's VMRUN now
/// and then leaves the rig's kernel where it takes interrupts that it has masked; with one it was
/// never seen to (docs/internals/testing.md).
const CPUS: u32 = 1;

/// Seconds that one test may take: far longer than any does. Longer also than what the tests
/// themselves give a guest, so that they can say what it did.
const TEST_LIMIT_S: u32 = 600;

/// Seconds until the tests of one program count as hung.
const ALL_LIMIT_S: u32 = 2400;

/// The same for one of the smoke list.
const SMOKE_LIMIT_S: u32 = 600;

/// Tests of one program, which have a boot of the rig for themselves: what ends it ends no others.
#[derive(Debug)]
struct Tests {
    package: &'static str,
    name: &'static str,
    /// Which of them; all where none is named.
    filters: &'static [&'static str],
    cpus: u32,
}

/// All of them. Those of a node run on its driver for KVM; what is not named here has not been
/// seen to pass on it, or takes too long on an emulated processor.
const ALL: &[Tests] = &[
    tests("spore-vmm", "machine", &[]),
    tests("spore-vmm", "jail", &[]),
    tests(
        "spore-node",
        "qemu",
        &[
            "ahead::", "fork::", "live::", "parked::", "rates::", "thaw::",
        ],
    ),
    tests(
        "spore-node",
        "qemu",
        &[
            "confinement::",
            "folder::",
            "life::",
            "network::",
            "secrets::",
        ],
    ),
    tests("spore-node", "qemu", &["deaths::", "recovery::"]),
    tests("spore-node", "qemu", &["individuals::"]),
    tests("spore-node", "qemu", &["suspends::", "taken::", "takes::"]),
    tests("spore-node", "qemu", &["hundred::"]),
    // Its guest never rests: who checkpoints it needs another processor to come to its turn.
    Tests {
        cpus: 2,
        ..tests("spore-node", "qemu", &["load::checkpoint_under"])
    },
];

/// Stories of the whole platform, whose daemon finds KVM by itself.
const SMOKE: &[Tests] = &[
    story("hypervisor", &[]),
    story("hosting", &[]),
    story("visitors", &["fifty_waiters"]),
    story("forks", &["an_app_is_checkpointed"]),
];

/// Stories that were seen to pass there, and for which the suite has no time.
const STORIES: &[Tests] = &[
    story("api", &[]),
    story("bad_input", &[]),
    story("boundary", &[]),
    story("cli", &[]),
    story("forks", &["the_snapshot_that", "sandboxes_outlive"]),
    story("secrets", &["a_secret_is"]),
    story("suspend", &["what_goes_on_keeps"]),
    story("templates", &[]),
    story(
        "visitors",
        &[
            "newly_installed",
            "killed_under",
            "visitors_left",
            "recycled",
            "streams",
        ],
    ),
    story("websocket", &[]),
    story("zero_left", &[]),
];

const fn story(name: &'static str, filters: &'static [&'static str]) -> Tests {
    tests("spore-e2e", name, filters)
}

const fn tests(
    package: &'static str,
    name: &'static str,
    filters: &'static [&'static str],
) -> Tests {
    Tests {
        package,
        name,
        filters,
        cpus: CPUS,
    }
}

/// Builds the tests and runs them in the rig, each by itself.
pub(crate) fn test(options: &RigTestOptions) -> Result<ExitCode> {
    let (lists, limit_s): (&[&[Tests]], _) = match options.smoke {
        true => (&[SMOKE], SMOKE_LIMIT_S),
        false => (&[ALL, SMOKE, STORIES], ALL_LIMIT_S),
    };
    // What guests are made of: without it most tests would skip themselves. The suite has made it.
    if !options.smoke {
        guest::run(&options.folder.dir)?;
    }
    // Tests look for these beside their own programs.
    step("build spore and spore-vmm", || {
        let what = ["--package=spore", "--package=spore-vmm"];
        let build = ["build", "--quiet", "--locked"];
        command::run(place::cargo().args(build).args(what))
    })?;
    // Those that have guests have the VMM that is installed.
    let vmm = step("build spore-vmm (static)", || {
        fixed::build("spore-vmm", "vmm")
    })?;
    let lists = lists.iter().copied().flatten();
    let scripts = lists.map(|tests| Ok((tests, tests.script(&vmm)?)));
    let scripts = scripts.collect::<Result<Vec<_>>>()?;
    let (out, _alone) = results(None)?;
    let mut failed = Vec::new();
    for (number, (tests, script)) in (1..).zip(scripts) {
        let boot = RigOptions {
            folder: options.folder.clone(),
            cpus: options.cpus.unwrap_or(tests.cpus),
            memory_mib: MEMORY_MIB,
            limit_s,
            out: Some(out.join(format!("{number:02}-{}", tests.name))),
            command: vec!["sh".into(), "-c".into(), script],
        };
        // Programs were built for any folder: a clone in one that the rig has itself is none to it.
        // What ends one list ends no other.
        match run_in(Path::new("/"), &boot) {
            Ok(ExitCode::SUCCESS) => {}
            Ok(_failed) => failed.push(tests.to_string()),
            Err(error) => failed.push(format!("{tests}: {error:#}")),
        }
    }
    for tests in &failed {
        say(format!("rig-test: failed: {tests}"));
    }
    Ok(match failed.is_empty() {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}

impl Tests {
    /// Builds the program; gives what runs it in the rig.
    fn script(&self, vmm: &Path) -> Result<OsString> {
        let Self { package, name, .. } = self;
        let program = step(&format!("build {name} of {package}"), || {
            program(package, name)
        })?;
        let mut script = OsString::from("export SPORE_TEST_DRIVER=kvm SPORE_VMM=");
        script.push(quoted(vmm.as_os_str()));
        script.push(format!("\nexec /run/rig/tests {TEST_LIMIT_S} "));
        script.push(quoted(program.as_os_str()));
        for filter in self.filters {
            script.push(" ");
            script.push(filter);
        }
        Ok(script)
    }
}

impl fmt::Display for Tests {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.package, self.name)?;
        self.filters
            .iter()
            .try_for_each(|filter| write!(f, " {filter}"))
    }
}

/// Why there is no rig here, where `make deps` has fetched none.
pub(crate) fn missing() -> Option<String> {
    let rig = deps::rig::current(place::DEPS_DEFAULT.as_ref());
    rig.err().map(|error| format!("{error:#}"))
}

/// Builds a program of tests; gives its path.
fn program(package: &str, name: &str) -> Result<PathBuf> {
    let text = command::output(
        place::cargo()
            .args(["test", "--quiet", "--locked", "--no-run"])
            .args(["--message-format=json-render-diagnostics"])
            .args(["--package", package, "--test", name]),
    )?;
    executable(&text, name)
        .with_context(|| format!("cargo built no program for the tests {name} of {package}"))
}

/// The program of a target, in what cargo says of a build.
fn executable(messages: &str, name: &str) -> Option<PathBuf> {
    messages.lines().find_map(|line| {
        let message: serde_json::Value = serde_json::from_str(line).ok()?;
        let path = message["executable"].as_str()?;
        (message["target"]["name"] == name).then(|| PathBuf::from(path))
    })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::executable;

    #[test]
    fn a_test_program_is_found_in_what_cargo_says() {
        let said = "{\"reason\":\"compiler-artifact\",\"target\":{\"name\":\"spore_vmm\"},\
                    \"executable\":null}\n\
                    {\"reason\":\"compiler-artifact\",\"target\":{\"name\":\"machine\"},\
                    \"executable\":\"/target/debug/deps/machine-1\"}\n\
                    {\"reason\":\"build-finished\",\"success\":true}\n";
        let found = executable(said, "machine").unwrap();
        assert_eq!(found, Path::new("/target/debug/deps/machine-1"));
        assert_eq!(executable(said, "others"), None);
    }
}
