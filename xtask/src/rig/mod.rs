//! `cargo xtask rig -- COMMAND`: runs a command on a Linux with real KVM, on a machine without one.
//!
//! QEMU emulates a processor with AMD's virtualisation, so the kernel inside has a true KVM with
//! nested paging. Slow, so it shows behaviour and ratios, never absolute times. The command sees
//! this machine's files (what it writes over them goes away), folders of its own where a host has
//! its state, and `/out`, which comes back. Its output and exit code are this task's.
//!
//! ```text
//!   guest/rig/modules   what the kernel loads        guest/rig/init     makes the machine a host
//!   deps/rig.rs         what is booted               guest/rig/stage    runs the command
//!   guest/rig/tests     runs each test by itself     guest/rig/limited  ends what stands still
//! ```
//!
//! A boot that ends without the command's code is repeated once: the emulated processor makes the
//! kernel panic now and then. What the command says or finds is never repeated.

mod boot;
mod initramfs;
pub(crate) mod lists;
mod pin;

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};
use rustix::fs::FlockOperation;

use self::boot::{Boot, Ended};
use crate::deps::rig;
use crate::progress::say;
use crate::{Folder, place};

/// Folders of the rig's own, as guest/rig/init mounts them: what this machine has there is unseen.
const OWN_FOLDERS: [&str; 4] = ["/tmp", "/run", "/var/lib/spore", "/var/lib/spore-e2e"];

/// Boots until it ends as it should.
const ATTEMPTS: u32 = 2;

/// Processors, unless others are asked for.
const CPUS: u32 = 2;

/// Memory, likewise.
const MEMORY_MIB: u32 = 8192;

/// Seconds until it counts as hung, likewise.
const LIMIT_S: u32 = 3600;

/// What to run, and on how large a machine.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct RigOptions {
    #[command(flatten)]
    folder: Folder,
    /// Processors of the machine
    #[arg(long, default_value_t = CPUS, value_parser = clap::value_parser!(u32).range(1..=64))]
    cpus: u32,
    /// Memory of the machine, taken as it is used
    #[arg(long, value_name = "MIB", default_value_t = MEMORY_MIB)]
    memory_mib: u32,
    /// How long it may run before it counts as hung
    #[arg(long, value_name = "SECONDS", default_value_t = LIMIT_S)]
    limit_s: u32,
    /// Where `/out` and the console's log come to: an empty folder [default: `rig` in the target
    /// folder, emptied]
    #[arg(long, value_name = "FOLDER")]
    out: Option<PathBuf>,
    /// The command and its arguments, after `--`
    #[arg(required = true, last = true)]
    command: Vec<OsString>,
}

/// Boots the rig and runs the command in this folder; gives its exit code.
pub(crate) fn run(options: &RigOptions) -> Result<ExitCode> {
    let folder = std::env::current_dir().context("cannot tell the current folder")?;
    run_in(&folder, options)
}

fn run_in(folder: &Path, options: &RigOptions) -> Result<ExitCode> {
    let rig = rig::current(&options.folder.dir)?;
    check_seen(folder)?;
    let (out, _alone) = results(options.out.as_deref())?;
    let script = script(folder, &options.command);
    fs::write(out.join("command"), script.as_bytes())?;
    let archive = tempfile::NamedTempFile::new()?;
    initramfs::pack(&rig, &archive)?;
    let boot = Boot {
        vmlinux: &rig.vmlinux,
        initramfs: archive.path(),
        out: &out,
        cpus: options.cpus,
        memory_mib: options.memory_mib,
        limit_s: options.limit_s,
    };
    for attempt in 1..=ATTEMPTS {
        say(format!("==> boot the rig (results: {})", out.display()));
        let console = out.join(format!("console-{attempt}.log"));
        match boot.run(&console)? {
            Ended::Code(code) => return Ok(ExitCode::from(code)),
            Ended::Refused(why) => bail!("{why} (see {})", console.display()),
            Ended::Hung => bail!(
                "the rig ran for {} s and did not end: give it more with --limit-s, or see {}",
                options.limit_s,
                console.display()
            ),
            Ended::Early => say(format!(
                "the rig ended by itself before the command did: see {}",
                console.display()
            )),
        }
    }
    bail!("the rig ended by itself {ATTEMPTS} times before the command did")
}

/// The command is run in the same folder, which must be one that the rig has.
fn check_seen(folder: &Path) -> Result<()> {
    match OWN_FOLDERS.iter().find(|own| folder.starts_with(own)) {
        Some(own) => bail!(
            "{} cannot be seen in the rig, which has a {own} of its own: run this elsewhere",
            folder.display()
        ),
        None => Ok(()),
    }
}

/// The folder for results, empty, and a lock on it.
fn results(given: Option<&Path>) -> Result<(PathBuf, File)> {
    let out = match given {
        Some(given) => std::path::absolute(given)?,
        None => place::target()?.join("rig"),
    };
    fs::create_dir_all(&out).with_context(|| format!("cannot make {}", out.display()))?;
    let lock = File::open(&out)?;
    rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).with_context(|| {
        format!(
            "another rig writes its results to {}: name another folder with --out",
            out.display()
        )
    })?;
    for entry in fs::read_dir(&out)? {
        let path = entry?.path();
        ensure!(
            given.is_none(),
            "{} is not empty: results are not mixed with what was there",
            out.display()
        );
        let removed = if path.is_dir() && !path.is_symlink() {
            fs::remove_dir_all(&path)
        } else {
            fs::remove_file(&path)
        };
        removed.with_context(|| format!("cannot remove {}", path.display()))?;
    }
    Ok((out, lock))
}

/// A shell's script that runs the command in a folder; it takes every word as it is.
fn script(folder: &Path, command: &[OsString]) -> OsString {
    let mut script = OsString::from("cd ");
    script.push(quoted(folder.as_os_str()));
    script.push(" || exit 126\nexec");
    for word in command {
        script.push(" ");
        script.push(quoted(word));
    }
    script.push("\n");
    script
}

/// A word as a shell reads it back.
fn quoted(word: &OsStr) -> OsString {
    let mut quoted = vec![b'\''];
    for byte in word.as_bytes() {
        match byte {
            b'\'' => quoted.extend(br"'\''"),
            byte => quoted.push(*byte),
        }
    }
    quoted.push(b'\'');
    OsString::from_vec(quoted)
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;
    use std::fs;
    use std::path::Path;
    use std::process::Command;

    use super::{OWN_FOLDERS, check_seen, results, script};
    use crate::place;

    #[test]
    fn every_word_of_a_command_arrives_as_it_was_given() {
        let words = ["printf", "%s|", "it's", "$HOME", "two words", "", "a\nb"];
        let words = words.map(OsString::from);
        let output = Command::new("sh")
            .arg("-c")
            .arg(script(Path::new("/"), &words))
            .output()
            .unwrap();
        assert_eq!(output.stdout, b"it's|$HOME|two words||a\nb|");
    }

    #[test]
    fn a_folder_that_the_rig_does_not_have_is_named() {
        let error = check_seen(Path::new("/tmp/clone")).unwrap_err().to_string();
        assert!(error.contains("a /tmp of its own"), "{error}");
        check_seen(Path::new("/tmpfs")).unwrap();
    }

    #[test]
    fn the_folders_of_its_own_are_those_that_init_mounts() {
        let init = fs::read_to_string(place::repository().join("guest/rig/init")).unwrap();
        let names: Vec<&str> = OWN_FOLDERS.map(|folder| &folder[1..]).into();
        let line = format!("for folder in {}; do", names.join(" "));
        assert!(init.contains(&line), "{line}");
    }

    #[test]
    fn results_are_not_mixed_with_what_was_there() {
        let folder = tempfile::tempdir().unwrap();
        let (out, lock) = results(Some(folder.path())).unwrap();
        assert_eq!(out, folder.path());
        let error = format!("{:#}", results(Some(folder.path())).unwrap_err());
        assert!(error.contains("another rig"), "{error}");
        drop(lock);
        fs::write(out.join("result"), b"kept").unwrap();
        let error = format!("{:#}", results(Some(folder.path())).unwrap_err());
        assert!(error.contains("is not empty"), "{error}");
        assert_eq!(fs::read(out.join("result")).unwrap(), b"kept");
    }
}
