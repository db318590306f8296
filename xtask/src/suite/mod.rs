//! `cargo xtask test`: everything that a change must pass, in the order in which it is cheap to
//! learn of a failure. Run by `make test` and by CI.
//!
//! Every step runs, whatever failed before it. A check or test that cannot run here says
//! `SKIPPED: reason`, is named and counted, and counts as nothing else.

mod leftovers;
mod tally;

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{ChildStdout, Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

use self::tally::Tally;
use crate::progress::{say, step};
use crate::{command, deps, fuzz, guest, place, rig, tidy};

/// Runs the suite.
pub(crate) fn run() -> Result<()> {
    let mut tally = Tally::default();
    say(
        "runs: fmt, tidy, clippy, deny, guest, tests of all crates and of tests/, rig, fuzz, \
         leftovers",
    );
    check(&mut tally, "fmt", || {
        command::run(place::cargo().args(["fmt", "--all", "--check"]))
    });
    check(&mut tally, "tidy", || tidy::run(true));
    check(&mut tally, "clippy", || {
        let what = ["--quiet", "--locked", "--workspace", "--all-targets"];
        command::run(
            place::cargo()
                .arg("clippy")
                .args(what)
                .args(["--", "--deny=warnings"]),
        )
    });
    deny(&mut tally);
    let folder = Path::new(place::DEPS_DEFAULT);
    match deps::kernel::GUEST.current(folder) {
        Ok(_release) => check(&mut tally, "guest", || guest::run(folder)),
        Err(error) if !folder.join("kernel").exists() => {
            skip(&mut tally, &format!("guest: {error:#}"));
        }
        // There, and not as this source wants it: no guest made of it would be the one to test.
        Err(error) => check(&mut tally, "guest", || Err(error)),
    }
    check(&mut tally, "build tests", || {
        let what = ["--quiet", "--locked", "--workspace", "--no-run"];
        command::run(place::cargo().arg("test").args(what))
    });
    say("==> tests");
    count(&mut tally, "tests", tests);
    match rig::lists::missing() {
        Some(missing) => skip(&mut tally, &format!("rig: {missing}")),
        None => count(&mut tally, "rig", smoke),
    }
    match fuzz::missing() {
        Some(missing) => skip(&mut tally, &format!("fuzz: {missing}")),
        None => check(&mut tally, "fuzz", || fuzz::all(fuzz::SUITE_SECONDS)),
    }
    check(&mut tally, "leftovers", nothing_is_left);
    finish(&tally)
}

/// Does what runs tests, which are counted one by one as they say how they ended.
fn count(tally: &mut Tally, name: &str, work: impl FnOnce(&mut Tally) -> Result<()>) {
    let before = tally.failed;
    if let Err(error) = work(tally) {
        say(format!("FAILED: {error:#}"));
        // A test program that ended by a signal, or was not built, has said no number.
        if tally.failed == before {
            tally.failed += 1;
            tally.broken.push(name.to_owned());
        }
    }
}

/// Does one step and counts it.
fn check(tally: &mut Tally, name: &str, work: impl FnOnce() -> Result<()>) {
    let outcome = step(name, work);
    if let Err(error) = &outcome {
        say(format!("FAILED: {name}: {error:#}"));
    }
    tally.check(name, &outcome);
}

/// cargo-deny, where it is installed; its advisories need a database from outside and are left to
/// machines that reach it.
fn deny(tally: &mut Tally) {
    if !command::exists("cargo-deny") {
        skip(tally, "deny: cargo-deny is not installed");
        return;
    }
    check(tally, "deny", || {
        let what = ["check", "bans", "licenses", "sources"];
        command::run(place::cargo().args(["deny", "--offline"]).args(what))
    });
}

fn skip(tally: &mut Tally, reason: &str) {
    say(format!("SKIPPED: {reason}"));
    tally.skipped.push(reason.to_owned());
}

/// All tests of the workspace, those of `tests/` included, shown as they come and counted.
fn tests(tally: &mut Tally) -> Result<()> {
    leftovers::keep_orphans()?;
    let mut cargo = place::cargo();
    cargo
        .args(["test", "--locked", "--workspace", "--no-fail-fast"])
        // Tests that skip themselves say so on their output, which is hidden unless asked for.
        .args(["--", "--format=pretty", "--show-output"]);
    shown(cargo, tally)
}

/// Stories of the platform on Spore's own VMM and real KVM, likewise.
fn smoke(tally: &mut Tally) -> Result<()> {
    say("==> stories on KVM, in the rig");
    let mut itself = Command::new(std::env::current_exe()?);
    itself.args(["rig-test", "--smoke"]);
    shown(itself, tally)
}

/// Runs what runs tests, whose output is shown as it comes, and counted.
fn shown(mut command: Command, tally: &mut Tally) -> Result<()> {
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    let child = command.spawn();
    let mut child = child.with_context(|| format!("cannot start {command:?}"))?;
    let stdout = child.stdout.take().context("it has no output")?;
    let status = std::thread::scope(|scope| {
        let ended = scope.spawn(|| leftovers::wait_for(&mut child));
        show(stdout, tally)?;
        let ended = ended.join();
        ended.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })?;
    if !status.success() {
        bail!("{command:?} failed: {status}");
    }
    Ok(())
}

/// Passes on what tests say, and counts it.
fn show(stdout: ChildStdout, tally: &mut Tally) -> Result<()> {
    let mut terminal = std::io::stdout().lock();
    for line in BufReader::new(stdout).split(b'\n') {
        let line = line?;
        let text = String::from_utf8_lossy(&line);
        writeln!(terminal, "{text}")?;
        if let Some(skipped) = tally.line(&text).filter(|skipped| *skipped > 0) {
            writeln!(terminal, "of these, {skipped} skipped themselves")?;
        }
    }
    Ok(())
}

/// A process that outlived its test is a bug of the test, or of what it tests.
fn nothing_is_left() -> Result<()> {
    let left = leftovers::processes()?;
    ensure!(left.is_empty(), "still running: {}", left.join("; "));
    Ok(())
}

fn finish(tally: &Tally) -> Result<()> {
    for reason in &tally.skipped {
        say(format!("SKIPPED: {reason}"));
    }
    for name in &tally.broken {
        say(format!("FAILED: {name}"));
    }
    say(tally.closing());
    if tally.failed > 0 {
        bail!("{} failed", tally.failed);
    }
    Ok(())
}
