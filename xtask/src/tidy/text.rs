//! Rules for every text of the repository. Called by `tidy`.

use std::collections::BTreeSet;
use std::path::{Component, Path, PathBuf};

use super::{Finding, TextFile};

/// Hosts of package registries: which one a machine uses is its configuration, not ours. In pieces,
/// so that this file does not have them.
const REGISTRIES: &[&str] = &[
    concat!("crates", ".io"),
    concat!("pypi", ".org"),
    concat!("pythonhosted", ".org"),
    concat!("npmjs", ".org"),
    concat!("npmjs", ".com"),
    concat!("proxy.golang", ".org"),
    concat!("deb.debian", ".org"),
    concat!("security.debian", ".org"),
    concat!("snapshot.debian", ".org"),
];

/// Where somebody's working copy happens to be.
const FOREIGN_PATHS: &[&str] = &[concat!("/wo", "rk/")];

/// How lines begin with which Git marks the two sides of a conflict.
const CONFLICTS: &[&str] = &[concat!("<<<<", "<<< "), concat!(">>>>", ">>> ")];

/// Written by cargo, which names its registry.
const GENERATED: &[&str] = &["Cargo.lock"];

/// Folders at the root whose paths documents may name.
const ROOTS: &[&str] = &[
    ".ci",
    ".github",
    "bench",
    "crates",
    "docs",
    "examples",
    "fuzz",
    "guest",
    "openapi",
    "packaging",
    "sdk",
    "tests",
    "web",
    "xtask",
];

/// All findings in one text.
pub(crate) fn check(file: &TextFile, paths: &BTreeSet<&str>) -> Vec<Finding> {
    let name = Path::new(&file.path)
        .file_name()
        .and_then(|name| name.to_str())
        .unwrap_or("");
    if GENERATED.contains(&name) {
        return Vec::new();
    }
    let is_document = Path::new(&file.path)
        .extension()
        .is_some_and(|extension| extension == "md");
    let mut findings = Vec::new();
    for (number, line) in (1..).zip(file.text.lines()) {
        for host in REGISTRIES.iter().filter(|host| line.contains(*host)) {
            let message = format!("`{host}`: say \"the registry\", its host is configuration");
            findings.push(Finding::new(&file.path, number, message));
        }
        if FOREIGN_PATHS.iter().any(|path| line.contains(path)) {
            let message = "a path of somebody's machine: name it from the repository's root";
            findings.push(Finding::new(&file.path, number, message));
        }
        if CONFLICTS.iter().any(|mark| line.starts_with(mark)) {
            let message = "a mark of a merge: keep one side and remove the marks";
            findings.push(Finding::new(&file.path, number, message));
        }
        if is_document {
            for named in named_paths(line).filter(|named| !is_there(named, &file.path, paths)) {
                let message = format!("`{named}` is not there: correct the path or remove it");
                findings.push(Finding::new(&file.path, number, message));
            }
        }
    }
    findings
}

/// What a line of Markdown names as a path: links, and code spans that begin with a root folder.
fn named_paths(line: &str) -> impl Iterator<Item = String> {
    let spans = line
        .split('`')
        .skip(1)
        .step_by(2)
        .filter(|span| is_repository_path(span));
    let links = line
        .split("](")
        .skip(1)
        .filter_map(|rest| rest.split(')').next())
        .filter(|link| !link.contains(':') && !link.starts_with('#') && !link.is_empty());
    spans
        .chain(links)
        .map(|path| path.split('#').next().unwrap_or(path).to_owned())
}

/// Whether a code span names a file or folder of this repository, and not a pattern or a route.
fn is_repository_path(span: &str) -> bool {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '/' | '.' | '-' | '_');
    let Some((first, rest)) = span.split_once('/') else {
        return false;
    };
    ROOTS.contains(&first)
        && !rest.is_empty()
        && span.chars().all(is_plain)
        && !span.contains("NNNN")
}

/// Whether a path names a file or folder, from the root or from the document.
fn is_there(named: &str, document: &str, paths: &BTreeSet<&str>) -> bool {
    let beside = Path::new(document)
        .parent()
        .unwrap_or(Path::new(""))
        .join(named);
    [PathBuf::from(named), beside].iter().any(|path| {
        let Some(path) = normal(path) else {
            return false;
        };
        let folder = format!("{path}/");
        path.is_empty()
            || paths.contains(path.as_str())
            || paths
                .range(folder.as_str()..)
                .next()
                .is_some_and(|next| next.starts_with(&folder))
    })
}

/// The path without `.` and `..`; `None` when it leads out.
fn normal(path: &Path) -> Option<String> {
    let mut parts = Vec::new();
    for component in path.components() {
        match component {
            Component::Normal(part) => parts.push(part.to_str()?),
            Component::ParentDir => drop(parts.pop()?),
            Component::CurDir => {}
            Component::RootDir | Component::Prefix(_) => return None,
        }
    }
    Some(parts.join("/"))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::{TextFile, check};

    fn messages(path: &str, text: &str) -> Vec<String> {
        let paths = BTreeSet::from([
            "docs/adr/0001-a.md",
            "crates/spore/src/main.rs",
            "README.md",
        ]);
        let file = TextFile {
            path: path.to_owned(),
            text: text.to_owned(),
        };
        check(&file, &paths)
            .iter()
            .map(ToString::to_string)
            .collect()
    }

    #[test]
    fn a_registrys_host_is_found_in_every_text_but_the_lock_file() {
        let host = concat!("https://crates", ".io/x");
        assert!(messages("a.toml", &format!("\n{host}\n"))[0].starts_with("a.toml:2: "));
        assert!(messages("Cargo.lock", host).is_empty());
    }

    #[test]
    fn a_path_of_a_machine_is_found() {
        assert_eq!(messages("a.sh", concat!("cd /wo", "rk/x")).len(), 1);
        assert!(messages("a.sh", "target: homework/x").is_empty());
    }

    #[test]
    fn both_sides_of_a_conflict_are_found() {
        let text = concat!("<<<<", "<<< HEAD\na\n=======\nb\n>>>>", ">>> 1234567\n");
        assert_eq!(messages("docs/a.md", text).len(), 2);
        assert!(messages("a.sh", "cat <<EOF >>> x").is_empty());
    }

    #[test]
    fn paths_that_documents_name_must_exist() {
        let found = messages("README.md", "see `crates/spore/src/gone.rs`\n");
        assert_eq!(
            found,
            [
                "README.md:1: `crates/spore/src/gone.rs` is not there: correct the path \
                            or remove it"
            ]
        );
        for fine in [
            "see `crates/spore/src/main.rs` and `crates/spore/` and `docs/adr`",
            "`docs/adr/NNNN-name.md`, `crates/*/src`, `GET /api/v1`, `a/b`",
            "[a](docs/adr/0001-a.md#part), [b](https://example.com), [c](#here)",
        ] {
            assert_eq!(messages("README.md", fine), Vec::<String>::new(), "{fine}");
        }
    }

    #[test]
    fn links_are_resolved_from_the_document() {
        assert!(messages("docs/adr/0001-a.md", "[a](../../README.md)").is_empty());
        assert_eq!(messages("docs/adr/0001-a.md", "[a](../README.md)").len(), 1);
        assert_eq!(messages("README.md", "[a](../outside.md)").len(), 1);
    }
}
