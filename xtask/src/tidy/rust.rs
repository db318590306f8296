//! Rules for one Rust file. Called by `tidy`.

use std::path::Path;

use super::Finding;
use super::source::Source;

/// The most lines of code in a file, without comments and empty lines.
const CODE_LINES_MAX: usize = 600;

/// The same for `tests.rs`.
const TEST_LINES_MAX: usize = 1200;

/// The most characters in a line.
const LINE_CHARS_MAX: usize = 100;

/// Files are nouns; these are excuses.
const BANNED_NAMES: &[&str] = &[
    "common", "helper", "helpers", "manager", "misc", "type", "types", "util", "utils",
];

/// The only files with unsafe code. Changing this list is a decision that a reviewer should see.
const UNSAFE_FILES: &[&str] = &[
    "crates/spore-guest/src/sys.rs",
    "crates/spore-node/src/sys.rs",
    "crates/spore-vmm/src/inherited.rs",
    "crates/spore-vmm/src/jail/sys.rs",
    "crates/spore-vmm/src/kvm/kick.rs",
    "crates/spore-vmm/src/kvm/mod.rs",
    "crates/spore-vmm/src/kvm/vm.rs",
    "crates/spore-vmm/src/memory/mod.rs",
    "crates/spore-vmm/tests/jail/attempt.rs",
];

/// The only readers of the environment and of TOML in the product.
const CONFIG_FILES: &[&str] = &["crates/spore/src/config.rs", "crates/spore/src/document.rs"];

/// Reading the environment or TOML.
const CONFIG_READS: &[&str] = &[
    "env::var(",
    "env::var_os(",
    "env::vars(",
    "env::vars_os(",
    "toml::from_str",
    "toml::from_slice",
    "toml::de::",
    "toml_edit::",
];

/// The only folder that knows the embedded store.
const STORE_FOLDER: &str = "crates/spore-control/src/store/";

/// Marks of unfinished work, in pieces so that this file does not have them.
const UNFINISHED: &[&str] = &[
    concat!("TO", "DO"),
    concat!("FIX", "ME"),
    concat!("XX", "X"),
];

/// All findings in one file.
pub(crate) fn check(path: &str, source: &Source) -> Vec<Finding> {
    let mut findings = Vec::new();
    findings.extend(name(path));
    findings.extend(opening(path, source));
    findings.extend(length(path, source));
    for (number, line) in source.numbered() {
        let mut say = |message: String| findings.push(Finding::new(path, number, message));
        let chars = line.raw.chars().count();
        if chars > LINE_CHARS_MAX {
            say(format!(
                "a line of {chars} characters: {LINE_CHARS_MAX} at most"
            ));
        }
        if let Some(word) = UNFINISHED.iter().find(|word| has_word(&line.comment, word)) {
            say(format!(
                "`{word}`: open an issue, or write the limit down as a fact"
            ));
        }
        if is_banner(&line.comment) {
            say("a banner comment: split the file, or write a sentence".to_owned());
        }
        if has_word(&line.code, "unsafe") && !UNSAFE_FILES.contains(&path) {
            say(format!(
                "unsafe code: it may only be in {}",
                UNSAFE_FILES.join(" and ")
            ));
        }
        if line.code.contains("#[allow(") || line.code.contains("#![allow(") {
            say("`allow`: write `#[expect(lint, reason = \"…\")]`".to_owned());
        }
        if !line.in_tests && reads_config(path, &line.code) {
            say(format!(
                "environment or TOML is read here: only {} may",
                CONFIG_FILES.join(" and ")
            ));
        }
        if has_word(&line.code, "redb") && !path.starts_with(STORE_FOLDER) && !is_test(path) {
            say(format!(
                "the store's engine is used here: only {STORE_FOLDER} may"
            ));
        }
    }
    findings
}

fn name(path: &str) -> Option<Finding> {
    let stem = Path::new(path).file_stem()?.to_str()?;
    BANNED_NAMES.contains(&stem).then(|| {
        Finding::new(
            path,
            1,
            format!("a file named `{stem}`: name it after what is in it"),
        )
    })
}

fn opening(path: &str, source: &Source) -> Option<Finding> {
    let first = source.lines.first().map_or("", |line| line.raw.as_str());
    let says = first
        .strip_prefix("//!")
        .is_some_and(|text| !text.trim().is_empty());
    (!says).then(|| {
        Finding::new(
            path,
            1,
            "the file must open with `//!`: what it is, who calls it, what it never does",
        )
    })
}

fn length(path: &str, source: &Source) -> Option<Finding> {
    let is_tests = Path::new(path)
        .file_name()
        .is_some_and(|name| name == "tests.rs");
    let most = if is_tests {
        TEST_LINES_MAX
    } else {
        CODE_LINES_MAX
    };
    let code: Vec<usize> = source
        .numbered()
        .filter(|(_, line)| !line.code.trim().is_empty())
        .map(|(number, _)| number)
        .collect();
    let (count, first_too_many) = (code.len(), *code.get(most)?);
    Some(Finding::new(
        path,
        first_too_many,
        format!("{count} lines of code: {most} at most, split it"),
    ))
}

/// Whether this line reads the environment or TOML in the product.
fn reads_config(path: &str, code: &str) -> bool {
    !CONFIG_FILES.contains(&path)
        && !is_test(path)
        && !path.starts_with("xtask/")
        && CONFIG_READS.iter().any(|read| code.contains(read))
}

/// Whether the whole file is test or benchmark.
fn is_test(path: &str) -> bool {
    path.ends_with("/tests.rs")
        || ["tests/", "bench/", "fuzz/"]
            .iter()
            .any(|folder| path.starts_with(folder))
        || ["/tests/", "/benches/"]
            .iter()
            .any(|folder| path.contains(folder))
}

/// A line that only draws, or that draws beside a title. Documentation may draw: its tables and
/// state machines are made of the same marks.
fn is_banner(comment: &str) -> bool {
    let is_slashes = comment.starts_with("////");
    let is_doc = !is_slashes && (comment.starts_with("///") || comment.starts_with("//!"));
    let Some(text) = comment
        .strip_prefix("//")
        .or_else(|| comment.strip_prefix("/*"))
    else {
        return false;
    };
    if is_doc {
        return false;
    }
    let marks = ['=', '-', '*', '#', '~', '_', '/', '─', '━', '═'];
    let text: Vec<char> = text.chars().collect();
    text.windows(4).any(|four| {
        four.first()
            .is_some_and(|mark| marks.contains(mark) && four.iter().all(|c| c == mark))
    })
}

/// Whether `word` is in `text` as a word of its own.
pub(crate) fn has_word(text: &str, word: &str) -> bool {
    let in_name = |c: char| c.is_alphanumeric() || c == '_';
    text.match_indices(word).any(|(at, _)| {
        let before = text.get(..at).and_then(|text| text.chars().next_back());
        let after = text
            .get(at + word.len()..)
            .and_then(|text| text.chars().next());
        !before.is_some_and(in_name) && !after.is_some_and(in_name)
    })
}

#[cfg(test)]
mod tests {
    use super::{Source, check};

    fn messages(path: &str, text: &str) -> Vec<String> {
        check(path, &Source::read(text))
            .iter()
            .map(ToString::to_string)
            .collect()
    }

    fn fires(path: &str, text: &str, part: &str) {
        let found = messages(path, text);
        assert!(
            found.iter().any(|message| message.contains(part)),
            "{part}: {found:?}"
        );
    }

    fn is_silent(path: &str, text: &str) {
        assert_eq!(messages(path, text), Vec::<String>::new(), "{path}");
    }

    #[test]
    fn a_file_opens_with_what_it_is() {
        fires(
            "a.rs",
            "fn a() {}\n",
            "a.rs:1: the file must open with `//!`",
        );
        fires("a.rs", "//!\nfn a() {}\n", "must open");
        is_silent("a.rs", "//! What it is.\n");
    }

    #[test]
    fn a_long_line_is_found_at_its_number() {
        let exact = format!("//! x\n// {}\n", "y".repeat(97));
        is_silent("a.rs", &exact);
        let long = format!("//! x\n// {}\n", "y".repeat(98));
        fires("a.rs", &long, "a.rs:2: a line of 101 characters");
    }

    #[test]
    fn comments_and_empty_lines_are_no_code_lines() {
        let many = format!("//! x\n{}", "// why\n\n".repeat(700));
        is_silent("a.rs", &many);
        let long = format!("//! x\n{}", "f();\n".repeat(601));
        fires("a.rs", &long, "a.rs:602: 601 lines of code: 600 at most");
        is_silent("m/tests.rs", &long);
        fires(
            "m/tests.rs",
            &format!("//! x\n{}", "f();\n".repeat(1201)),
            "1200 at most",
        );
    }

    #[test]
    fn excuses_are_no_names() {
        fires("crates/a/src/utils.rs", "//! x\n", "a file named `utils`");
        is_silent("crates/a/src/queue.rs", "//! x\n");
    }

    #[test]
    fn unfinished_work_is_found_in_comments_only() {
        let word = concat!("TO", "DO");
        fires(
            "a.rs",
            &format!("//! x\n// {word}: later\n"),
            "open an issue",
        );
        is_silent(
            "a.rs",
            &format!("//! x\nlet a = \"{word}\";\nlet {word}S = 1;\n"),
        );
    }

    #[test]
    fn banners_are_found_and_drawings_in_documentation_are_not() {
        fires("a.rs", "//! x\n// ---- part two ----\n", "banner");
        fires("a.rs", "//! x\n//////////////////\nfn a() {}\n", "a.rs:2");
        is_silent(
            "a.rs",
            "//! x\n//! | a |\n//! |----|\n/// a ────▶ b\nfn a() {}\n",
        );
    }

    #[test]
    fn unsafe_code_is_found_outside_of_its_files() {
        let text = "//! x\nlet a = unsafe { f() };\n";
        fires(
            "crates/spore-wire/src/id.rs",
            text,
            "a.rs:2".trim_start_matches("a.rs"),
        );
        fires("crates/spore-node/src/net/sys.rs", text, "unsafe code");
        is_silent("crates/spore-node/src/sys.rs", text);
        is_silent(
            "a.rs",
            "//! x\n#![forbid(unsafe_code)]\n// unsafe\nlet a = \"unsafe\";\n",
        );
    }

    #[test]
    fn expectations_have_reasons() {
        fires("a.rs", "//! x\n#[allow(dead_code)]\n", "write `#[expect");
        is_silent("a.rs", "//! x\n#[expect(dead_code, reason = \"y\")]\n");
    }

    #[test]
    fn only_one_place_reads_the_environment() {
        let text = "//! x\nlet a = std::env::var(\"HOME\");\n";
        fires("crates/spore-node/src/lib.rs", text, "environment or TOML");
        fires(
            "crates/spore/src/main.rs",
            "//! x\ntoml::from_str(a)\n",
            "environment or TOML",
        );
        is_silent("crates/spore/src/config.rs", text);
        is_silent("xtask/src/main.rs", text);
        is_silent("tests/e2e/src/lib.rs", text);
        is_silent(
            "crates/a/src/b.rs",
            "//! x\n#[cfg(test)]\nlet a = std::env::var(\"HOME\");\n",
        );
        is_silent(
            "crates/a/src/b.rs",
            "//! x\nlet a = std::env::current_exe();\n",
        );
    }

    #[test]
    fn only_the_store_knows_its_engine() {
        let text = "//! x\nuse redb::Database;\n";
        fires(
            "crates/spore-control/src/nodes.rs",
            text,
            "the store's engine",
        );
        is_silent("crates/spore-control/src/store/embedded.rs", text);
    }
}
