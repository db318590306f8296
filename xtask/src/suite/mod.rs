//! `cargo xtask test`: everything that a change must pass, in the order in which it is cheap to
//! learn of a failure. Run by `make test` and by CI.
//!
//! Every step runs, whatever failed before it. A check or test that cannot run here says
//! `SKIPPED: reason` and is counted: nothing is left out silently.

use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::progress::{say, step};
use crate::{command, deps, guest, place, tidy};

/// What ran so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Tally {
    passed: u64,
    failed: u64,
    /// Each with its reason.
    skipped: Vec<String>,
    /// Names of steps that failed.
    broken: Vec<String>,
}

impl Tally {
    /// Counts a step that has no tests of its own.
    fn check(&mut self, name: &str, outcome: Result<()>) {
        match outcome {
            Ok(()) => self.passed += 1,
            Err(error) => {
                say(format!("FAILED: {name}: {error:#}"));
                self.failed += 1;
                self.broken.push(name.to_owned());
            }
        }
    }

    /// Counts what one line of a test run says.
    fn line(&mut self, line: &str) {
        if let Some(rest) = line.strip_prefix("test result: ") {
            self.passed += number_before(rest, " passed");
            self.failed += number_before(rest, " failed");
        } else if let Some(name) = line
            .strip_prefix("test ")
            .and_then(|rest| rest.split_once(" ... ignored"))
            .map(|(name, why)| format!("{name}{why}"))
        {
            self.skipped.push(name);
        } else if let Some((_, reason)) = line.split_once("SKIPPED: ") {
            self.skipped.push(reason.to_owned());
        }
    }
}

/// Runs the suite.
pub(crate) fn run() -> Result<()> {
    let mut tally = Tally::default();
    say("runs: fmt, tidy, clippy, deny, guest, tests of all crates and of tests/");
    let fmt = step("fmt", || {
        command::run(place::cargo().args(["fmt", "--all", "--check"]))
    });
    tally.check("fmt", fmt);
    tally.check("tidy", step("tidy", || tidy::run(true)));
    let clippy = step("clippy", || {
        command::run(
            place::cargo()
                .args([
                    "clippy",
                    "--quiet",
                    "--locked",
                    "--workspace",
                    "--all-targets",
                ])
                .args(["--", "--deny=warnings"]),
        )
    });
    tally.check("clippy", clippy);
    deny(&mut tally);
    let folder = std::path::Path::new(place::DEPS_DEFAULT);
    match deps::kernel::current(folder) {
        Ok(_release) => tally.check("guest", guest::run(folder)),
        Err(error) => skip(&mut tally, &format!("guest: {error:#}")),
    }
    let built = step("build tests", || {
        command::run(place::cargo().args([
            "test",
            "--quiet",
            "--locked",
            "--workspace",
            "--no-run",
        ]))
    });
    tally.check("build tests", built);
    say("==> tests");
    let outcome = tests(&mut tally);
    if let Err(error) = outcome {
        say(format!("FAILED: tests: {error:#}"));
        tally.broken.push("tests".to_owned());
        tally.failed = tally.failed.max(1);
    }
    finish(&tally)
}

/// cargo-deny, where it is installed; its advisories need a database from outside and are left to
/// machines that reach it.
fn deny(tally: &mut Tally) {
    if !command::exists("cargo-deny") {
        skip(tally, "deny: cargo-deny is not installed");
        return;
    }
    let outcome = step("deny", || {
        command::run(place::cargo().args([
            "deny",
            "--offline",
            "check",
            "bans",
            "licenses",
            "sources",
        ]))
    });
    tally.check("deny", outcome);
}

fn skip(tally: &mut Tally, reason: &str) {
    say(format!("SKIPPED: {reason}"));
    tally.skipped.push(reason.to_owned());
}

/// All tests of the workspace, those of `tests/` included, shown as they come and counted.
fn tests(tally: &mut Tally) -> Result<()> {
    // Tests that skip themselves say so on their output, which is hidden unless asked for.
    let mut cargo = place::cargo();
    cargo
        .args([
            "test",
            "--quiet",
            "--locked",
            "--workspace",
            "--no-fail-fast",
        ])
        .args(["--", "--format=pretty", "--show-output"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    let mut child = cargo.spawn().context("cannot start `cargo test`")?;
    let stdout = child.stdout.take().context("`cargo test` has no output")?;
    let mut terminal = std::io::stdout().lock();
    for line in BufReader::new(stdout).split(b'\n') {
        let line = line?;
        let text = String::from_utf8_lossy(&line);
        tally.line(&text);
        writeln!(terminal, "{text}")?;
    }
    drop(terminal);
    let status = child.wait()?;
    if !status.success() {
        bail!("`cargo test` failed: {status}");
    }
    Ok(())
}

fn finish(tally: &Tally) -> Result<()> {
    leftovers();
    for reason in &tally.skipped {
        say(format!("SKIPPED: {reason}"));
    }
    for name in &tally.broken {
        say(format!("FAILED: {name}"));
    }
    say(closing(tally));
    if tally.failed > 0 {
        bail!("{} failed", tally.failed);
    }
    Ok(())
}

/// Processes of VMs that outlived their test are a bug of the test; they are named.
fn leftovers() {
    let found = Command::new("pgrep")
        .args(["-a", "-f", "^qemu-system-x86_64 .*spore"])
        .output();
    if let Ok(found) = found {
        for line in String::from_utf8_lossy(&found.stdout).lines() {
            say(format!("still running: {line}"));
        }
    }
}

/// The last line, which CI reads.
fn closing(tally: &Tally) -> String {
    format!(
        "{} passed, {} failed, {} skipped",
        tally.passed,
        tally.failed,
        tally.skipped.len()
    )
}

/// The number before a word in a line of libtest.
fn number_before(text: &str, word: &str) -> u64 {
    text.split(word)
        .next()
        .and_then(|before| before.rsplit(' ').next())
        .and_then(|number| number.parse().ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::{Tally, closing};

    #[test]
    fn results_of_all_test_programs_are_added() {
        let mut tally = Tally::default();
        tally.line("test result: ok. 7 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out");
        tally.line("test result: FAILED. 3 passed; 2 failed; 0 ignored; 0 measured");
        tally.line("test a::b ... ok");
        assert_eq!(closing(&tally), "10 passed, 2 failed, 0 skipped");
    }

    #[test]
    fn skipped_tests_are_named_with_their_reason() {
        let mut tally = Tally::default();
        tally.line("test a::b ... ignored, needs KVM");
        tally.line("SKIPPED: confining a process needs root");
        assert_eq!(
            tally.skipped,
            ["a::b, needs KVM", "confining a process needs root"]
        );
        assert_eq!(closing(&tally), "0 passed, 0 failed, 2 skipped");
    }

    #[test]
    fn a_failed_check_is_counted_and_named() {
        let mut tally = Tally::default();
        tally.check("fmt", Ok(()));
        tally.check("tidy", Err(anyhow::anyhow!("2 findings")));
        assert_eq!(closing(&tally), "1 passed, 1 failed, 0 skipped");
        assert_eq!(tally.broken, ["tidy"]);
    }
}
