//! `cargo xtask tidy`: the house rules as code. Run by people before a commit and by `test`.
//!
//! Reads files and never compiles, so that it takes well under two seconds. Comments and strings
//! are told from code by a small lexer (`source.rs`); nothing more of Rust is understood.
//!
//! | module | rules |
//! |---|---|
//! | `source` | what is code, comment and string |
//! | `rust` | one Rust file at a time |
//! | `layout` | crates: lints, edges, versions; files that no module names |
//! | `text` | every text: words that must not be there; paths that documents name |
//! | `budget` | how many crates the programs depend on (`--deps`) |

mod budget;
mod layout;
mod rust;
mod source;
mod text;

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use self::source::Source;
use crate::progress::say;
use crate::{command, place};

/// One breach of a rule.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Finding {
    /// In the repository.
    file: String,
    /// From 1.
    line: usize,
    /// What is wrong and what would be right.
    message: String,
}

impl Finding {
    fn new(file: &str, line: usize, message: impl Into<String>) -> Self {
        Self {
            file: file.to_owned(),
            line,
            message: message.into(),
        }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.file, self.line, self.message)
    }
}

/// A text file of the repository.
#[derive(Clone, Debug)]
pub(crate) struct TextFile {
    path: String,
    text: String,
}

/// Checks everything; the dependency budget only when asked, since it starts cargo.
pub(crate) fn run(with_budget: bool) -> Result<()> {
    let root = place::repository();
    let files = read_all(&root)?;
    let mut findings = check(&files);
    if with_budget {
        findings.extend(budget::check()?);
    }
    findings.sort();
    for finding in &findings {
        say(finding.to_string());
    }
    if findings.is_empty() {
        say(format!("tidy: {} files, nothing to say", files.len()));
        return Ok(());
    }
    bail!("tidy: {} findings", findings.len())
}

/// All findings in a set of files.
fn check(files: &[TextFile]) -> Vec<Finding> {
    let paths: BTreeSet<&str> = files.iter().map(|file| file.path.as_str()).collect();
    let mut findings = Vec::new();
    for file in files {
        findings.extend(text::check(file, &paths));
        if is_rust(&file.path) {
            findings.extend(rust::check(&file.path, &Source::read(&file.text)));
        }
    }
    findings.extend(layout::check(files));
    findings
}

fn is_rust(path: &str) -> bool {
    Path::new(path)
        .extension()
        .is_some_and(|extension| extension == "rs")
}

/// What git tracks or would track, as far as it is text and there.
fn read_all(root: &Path) -> Result<Vec<TextFile>> {
    let list = command::output(
        Command::new("git")
            .args([
                "ls-files",
                "--cached",
                "--others",
                "--exclude-standard",
                "-z",
            ])
            .current_dir(root),
    )
    .context("tidy needs git to know which files are the repository's")?;
    let paths: BTreeSet<&str> = list.split('\0').filter(|path| !path.is_empty()).collect();
    let mut files = Vec::new();
    for path in paths {
        // A file that was removed and not yet committed, a link or a binary is no text.
        if let Ok(text) = fs::read_to_string(root.join(path)) {
            files.push(TextFile {
                path: path.to_owned(),
                text,
            });
        }
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::{Finding, TextFile, check};

    #[test]
    fn a_finding_is_shown_with_its_place() {
        let finding = Finding::new("a.rs", 3, "a line of 120 characters: 100 at most");
        assert_eq!(
            finding.to_string(),
            "a.rs:3: a line of 120 characters: 100 at most"
        );
    }

    #[test]
    fn a_clean_crate_has_no_findings() {
        let file = |path: &str, text: &str| TextFile {
            path: path.to_owned(),
            text: text.to_owned(),
        };
        let files = [
            file(
                "crates/spore-wire/Cargo.toml",
                "[package]\nname = \"spore-wire\"\n[lints]\nworkspace = true\n",
            ),
            file("crates/spore-wire/src/lib.rs", "//! What.\nmod id;\n"),
            file("crates/spore-wire/src/id.rs", "//! Ids.\n"),
        ];
        assert_eq!(check(&files), []);
    }
}
