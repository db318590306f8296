//! What a run of the suite counts: reads the lines of libtest, prints nothing.
//!
//! A test that cannot run says `SKIPPED: reason` and returns, which libtest calls passed. What it
//! said is shown after its program's tests, so the count is put right before the program's result.

use std::collections::BTreeMap;

use anyhow::Result;

/// What ran so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Tally {
    pub(super) passed: u64,
    pub(super) failed: u64,
    /// Each with its reason.
    pub(super) skipped: Vec<String>,
    /// Names of steps and tests that failed.
    pub(super) broken: Vec<String>,
    section: Section,
    /// The tests of the present program that skipped themselves, and why.
    skipping: BTreeMap<String, String>,
}

/// Where in a program's output the last line was.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
enum Section {
    #[default]
    Running,
    /// What tests that passed said; the name is that of the test.
    Successes(Option<String>),
    /// The same of those that failed, then their names.
    Failures,
}

impl Tally {
    /// Counts a step that has no tests of its own.
    pub(super) fn check(&mut self, name: &str, outcome: &Result<()>) {
        match outcome {
            Ok(()) => self.passed += 1,
            Err(_) => {
                self.failed += 1;
                self.broken.push(name.to_owned());
            }
        }
    }

    /// Counts what one line of a test run says; at the end of a program gives how many of its
    /// tests skipped themselves.
    pub(super) fn line(&mut self, line: &str) -> Option<u64> {
        if let Some(rest) = line.strip_prefix("test result: ") {
            return Some(self.result(rest));
        }
        if line == "successes:" {
            self.section = Section::Successes(None);
        } else if line == "failures:" {
            self.section = Section::Failures;
        } else if let Some(rest) = line.strip_prefix("test ") {
            if let Some((name, why)) = rest.split_once(" ... ignored") {
                self.skipped.push(format!("{name}{why}"));
            } else if let Some((name, _)) = rest.split_once(" ... FAILED") {
                self.broken.push(name.to_owned());
            }
        } else if let Section::Successes(test) = &mut self.section {
            if let Some(name) = header(line) {
                *test = Some(name.to_owned());
            } else if let (Some((_, reason)), Some(test)) = (line.split_once("SKIPPED: "), test) {
                self.skipping
                    .entry(test.clone())
                    .or_insert_with(|| reason.to_owned());
            }
        }
        None
    }

    fn result(&mut self, text: &str) -> u64 {
        let skipping = std::mem::take(&mut self.skipping);
        self.section = Section::Running;
        let skipped = u64::try_from(skipping.len()).unwrap_or(u64::MAX);
        self.passed += number_before(text, " passed").saturating_sub(skipped);
        self.failed += number_before(text, " failed");
        let named = skipping
            .into_iter()
            .map(|(test, reason)| format!("{test}: {reason}"));
        self.skipped.extend(named);
        skipped
    }

    /// The last line, which CI reads.
    pub(super) fn closing(&self) -> String {
        format!(
            "{} passed, {} failed, {} skipped",
            self.passed,
            self.failed,
            self.skipped.len()
        )
    }
}

/// The test whose output follows a line such as `---- name stdout ----`.
fn header(line: &str) -> Option<&str> {
    line.strip_prefix("---- ")?.strip_suffix(" stdout ----")
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
    use super::Tally;

    const PROGRAM: &str = "
running 4 tests
test a::b ... ok
test a::c ... ok
test a::d ... ignored, needs KVM
test a::e ... FAILED

successes:

---- a::c stdout ----
SKIPPED: confining a process needs root
SKIPPED: so does the rest


successes:
    a::b
    a::c

failures:

---- a::e stdout ----
SKIPPED: said before it failed


failures:
    a::e

test result: FAILED. 2 passed; 1 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.1s
";

    #[test]
    fn a_test_that_skips_itself_is_skipped_once_and_not_passed() {
        let mut tally = Tally::default();
        let programs: Vec<u64> = PROGRAM
            .lines()
            .filter_map(|line| tally.line(line))
            .collect();
        assert_eq!(programs, [1]);
        assert_eq!(tally.closing(), "1 passed, 1 failed, 2 skipped");
        let skipped = ["a::d, needs KVM", "a::c: confining a process needs root"];
        assert_eq!(tally.skipped, skipped);
        assert_eq!(tally.broken, ["a::e"]);
    }

    #[test]
    fn results_of_all_test_programs_are_added() {
        let mut tally = Tally::default();
        PROGRAM.lines().for_each(|line| {
            tally.line(line);
        });
        tally.line("test result: ok. 7 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out");
        assert_eq!(tally.closing(), "8 passed, 1 failed, 2 skipped");
    }

    #[test]
    fn a_failed_check_is_counted_and_named() {
        let mut tally = Tally::default();
        tally.check("fmt", &Ok(()));
        tally.check("tidy", &Err(anyhow::anyhow!("2 findings")));
        assert_eq!(tally.closing(), "1 passed, 1 failed, 0 skipped");
        assert_eq!(tally.broken, ["tidy"]);
    }
}
