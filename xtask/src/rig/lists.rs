//! `cargo xtask rig-test`: which tests run in the rig, on Spore's own VMM and real KVM.
//!
//! Two lists: all that need KVM or were seen to pass on it, for `make rig-test`, and of those the
//! smoke list, which `make test` runs.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};

use super::{CPUS, MEMORY_MIB, RigOptions, quoted, run_in};
use crate::progress::step;
use crate::{Folder, command, deps, fixed, place};

/// What `rig-test` runs.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct RigTestOptions {
    #[command(flatten)]
    folder: Folder,
    /// Runs the smoke list alone, as the suite does
    #[arg(long)]
    smoke: bool,
}

/// Seconds that one test may take: far longer than any does. Longer also than what the tests
/// themselves give a guest, so that they can say what it did.
const TEST_LIMIT_S: u32 = 600;

/// Seconds until all of them count as hung.
const ALL_LIMIT_S: u32 = 7200;

/// Seconds that the smoke list may take.
const SMOKE_LIMIT_S: u32 = 1200;

/// A program of tests.
#[derive(Debug)]
struct Tests {
    package: &'static str,
    name: &'static str,
    /// Which of them; all where none is named.
    filters: &'static [&'static str],
}

/// All of them. Those of a node run on its driver for KVM; what is not named here has not been
/// seen to pass on it, or takes too long on an emulated processor.
const ALL: &[Tests] = &[
    Tests {
        package: "spore-vmm",
        name: "machine",
        filters: &[],
    },
    Tests {
        package: "spore-vmm",
        name: "jail",
        filters: &[],
    },
    Tests {
        package: "spore-node",
        name: "qemu",
        filters: &[
            "ahead::",
            "deaths::",
            "life::",
            "confinement::",
            "fork::",
            "folder::",
            "secrets::",
            "recovery::",
            "parked::",
            "network::",
            "thaw::",
            "suspends::",
            "takes::",
            "taken::",
        ],
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
    story("suspend", &["what_goes_on_keeps"]),
    story("cli", &["an_app_is_deployed"]),
    story("secrets", &["a_secret_is"]),
    story("boundary", &["agent_is"]),
    story("zero_left", &[]),
];

const fn story(name: &'static str, filters: &'static [&'static str]) -> Tests {
    Tests {
        package: "spore-e2e",
        name,
        filters,
    }
}

/// Builds the tests and runs them in the rig, each by itself.
pub(crate) fn test(options: &RigTestOptions) -> Result<ExitCode> {
    let (lists, limit_s): (&[&[Tests]], _) = match options.smoke {
        true => (&[SMOKE], SMOKE_LIMIT_S),
        false => (&[ALL, SMOKE, STORIES], ALL_LIMIT_S),
    };
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
    let mut script = OsString::from("export SPORE_TEST_DRIVER=kvm SPORE_VMM=");
    script.push(quoted(vmm.as_os_str()));
    script.push("\nfailed=0\n");
    for Tests {
        package,
        name,
        filters,
    } in lists.iter().copied().flatten()
    {
        let program = step(&format!("build {name} of {package}"), || {
            program(package, name)
        })?;
        script.push(format!("/run/rig/tests {TEST_LIMIT_S} "));
        script.push(quoted(program.as_os_str()));
        for filter in *filters {
            script.push(" ");
            script.push(filter);
        }
        script.push(" || failed=1\n");
    }
    script.push("exit $failed\n");
    let options = RigOptions {
        folder: options.folder.clone(),
        cpus: CPUS,
        memory_mib: MEMORY_MIB,
        limit_s,
        out: None,
        command: vec!["sh".into(), "-c".into(), script],
    };
    // Programs were built for any folder: a clone in one that the rig has itself is none to it.
    run_in(Path::new("/"), &options)
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
