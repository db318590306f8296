//! Rules for crates: lints, dependency edges and versions, and files that no module names. Called
//! by `tidy`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use super::source::Source;
use super::{Finding, TextFile, is_rust};

/// Which crates of ours a crate may depend on. Tools and tests may depend on all.
const EDGES: &[(&str, &[&str])] = &[
    ("spore-api", &[]),
    ("spore-wire", &[]),
    ("spore-guest", &["spore-wire"]),
    ("spore-seal", &[]),
    ("spore-vmm", &["spore-wire"]),
    ("spore-node", &["spore-seal", "spore-wire"]),
    ("spore-control", &["spore-api", "spore-wire"]),
    ("spore-gateway", &["spore-api", "spore-wire"]),
    (
        "spore",
        &[
            "spore-api",
            "spore-wire",
            "spore-node",
            "spore-control",
            "spore-gateway",
            "spore-vmm",
        ],
    ),
];

/// All findings about crates.
pub(crate) fn check(files: &[TextFile]) -> Vec<Finding> {
    let mut findings = Vec::new();
    let manifests = files.iter().filter(|file| {
        Path::new(&file.path)
            .file_name()
            .is_some_and(|name| name == "Cargo.toml")
    });
    let sources: BTreeMap<&str, &str> = files
        .iter()
        .filter(|file| is_rust(&file.path))
        .map(|file| (file.path.as_str(), file.text.as_str()))
        .collect();
    let crates: Vec<(&TextFile, Manifest)> = manifests
        .map(|file| (file, Manifest::read(&file.text)))
        .collect();
    for (file, manifest) in &crates {
        if manifest.name.is_some() {
            findings.extend(check_manifest(&file.path, manifest));
        }
    }
    findings.extend(orphans(&crates, &sources));
    findings
}

/// What the rules need to know of a `Cargo.toml`; read line by line, as these files are written.
#[derive(Debug, Default)]
struct Manifest {
    name: Option<String>,
    has_workspace_lints: bool,
    /// Name, line and whether the workspace gives the version.
    dependencies: Vec<(String, usize, bool)>,
    /// `path = "…"` of programs and tests.
    targets: Vec<String>,
}

impl Manifest {
    fn read(text: &str) -> Self {
        let mut manifest = Self::default();
        let mut section = String::new();
        for (number, line) in (1..).zip(text.lines()) {
            let line = line.trim();
            if let Some(header) = line.strip_prefix('[') {
                section = header.trim_matches(|c| c == '[' || c == ']').to_owned();
                continue;
            }
            let Some((key, value)) = line.split_once('=') else {
                continue;
            };
            let (key, value) = (key.trim(), value.trim());
            match section.as_str() {
                "package" if key == "name" => manifest.name = Some(value.replace('"', "")),
                "lints" if key == "workspace" && value == "true" => {
                    manifest.has_workspace_lints = true;
                }
                "bin" | "test" | "bench" | "example" | "lib" if key == "path" => {
                    manifest.targets.push(value.replace('"', ""));
                }
                _ if section.ends_with("dependencies") && !line.starts_with('#') => {
                    let name = key.split('.').next().unwrap_or(key);
                    let inherits =
                        key.ends_with(".workspace") || value.contains("workspace = true");
                    manifest
                        .dependencies
                        .push((name.to_owned(), number, inherits));
                }
                _ => {}
            }
        }
        manifest
    }
}

fn check_manifest(path: &str, manifest: &Manifest) -> Vec<Finding> {
    let mut findings = Vec::new();
    // Fuzz targets are a workspace of their own, for another toolchain.
    if path.starts_with("fuzz/") {
        return findings;
    }
    if !manifest.has_workspace_lints {
        findings.push(Finding::new(
            path,
            1,
            "no `[lints]` with `workspace = true`",
        ));
    }
    let own = manifest.name.as_deref().unwrap_or_default();
    let allowed = EDGES
        .iter()
        .find(|(name, _)| *name == own)
        .map(|(_, allowed)| *allowed);
    for (name, number, inherits) in &manifest.dependencies {
        if !inherits {
            let message = format!(
                "`{name}` has its own version: write `{name}.workspace = true`, and the version in \
                 the root Cargo.toml"
            );
            findings.push(Finding::new(path, *number, message));
        }
        let is_ours = name == "spore" || name.starts_with("spore-");
        if let Some(allowed) = allowed
            && is_ours
            && !allowed.contains(&name.as_str())
        {
            let message = match allowed {
                [] => format!("{own} must not depend on {name}: it depends on no crate of ours"),
                some => format!(
                    "{own} must not depend on {name}: only on {}",
                    some.join(", ")
                ),
            };
            findings.push(Finding::new(path, *number, message));
        }
    }
    findings
}

/// Rust files that no target and no module of any crate leads to.
fn orphans(crates: &[(&TextFile, Manifest)], sources: &BTreeMap<&str, &str>) -> Vec<Finding> {
    let mut reached = BTreeSet::new();
    for (file, manifest) in crates {
        let folder = Path::new(&file.path).parent().unwrap_or(Path::new(""));
        for root in roots(folder, manifest, sources) {
            follow(&root, &root, sources, &mut reached);
        }
    }
    let in_crate = |path: &str| {
        crates.iter().any(|(file, manifest)| {
            let folder = file.path.trim_end_matches("Cargo.toml");
            manifest.name.is_some() && path.starts_with(folder)
        })
    };
    sources
        .keys()
        .filter(|path| !reached.contains(**path) && in_crate(path))
        .map(|path| {
            Finding::new(
                path,
                1,
                "no module or target leads to this file: name it or remove it",
            )
        })
        .collect()
}

/// The files that cargo starts a crate's targets from.
fn roots(folder: &Path, manifest: &Manifest, sources: &BTreeMap<&str, &str>) -> Vec<String> {
    let mut roots: Vec<String> = manifest
        .targets
        .iter()
        .map(|target| folder.join(target).to_string_lossy().into_owned())
        .collect();
    for path in sources.keys() {
        let Ok(inside) = Path::new(path).strip_prefix(folder) else {
            continue;
        };
        let parts: Vec<&str> = inside.iter().filter_map(|part| part.to_str()).collect();
        let is_root = matches!(
            parts.as_slice(),
            ["build.rs"]
                | ["src", "lib.rs" | "main.rs"]
                | ["src", "bin", _]
                | ["tests" | "benches" | "examples" | "fuzz_targets", _]
                | ["tests" | "benches" | "examples", _, "main.rs"]
        );
        if is_root {
            roots.push((*path).to_owned());
        }
    }
    roots
}

/// Marks `path` and every module file below it as reached.
fn follow(path: &str, root: &str, sources: &BTreeMap<&str, &str>, reached: &mut BTreeSet<String>) {
    let Some(text) = sources.get(path) else {
        return;
    };
    if !reached.insert(path.to_owned()) {
        return;
    }
    let file = Path::new(path);
    let parent = file.parent().unwrap_or(Path::new(""));
    let is_folder_file = path == root || file.file_name().is_some_and(|name| name == "mod.rs");
    let folder = if is_folder_file {
        parent.to_path_buf()
    } else {
        file.with_extension("")
    };
    for (name, given) in modules(&Source::read(text)) {
        let candidates = match given {
            Some(given) => vec![parent.join(given)],
            None => vec![
                folder.join(format!("{name}.rs")),
                folder.join(&name).join("mod.rs"),
            ],
        };
        for candidate in candidates {
            follow(&plain(&candidate), root, sources, reached);
        }
    }
}

/// Names of `mod name;` in a file, with the path that an attribute gives.
fn modules(source: &Source) -> Vec<(String, Option<String>)> {
    let mut found = Vec::new();
    let mut given = None;
    for line in &source.lines {
        let code = line.code.trim();
        if code.starts_with("#[path") {
            given = line.raw.split('"').nth(1).map(str::to_owned);
            continue;
        }
        let declaration = code.strip_suffix(';').and_then(|code| {
            let (before, name) = code.rsplit_once("mod ")?;
            let is_name = name.chars().all(|c| c.is_alphanumeric() || c == '_');
            let is_declaration = before.is_empty() || before.ends_with(' ');
            (is_name && is_declaration).then(|| name.to_owned())
        });
        if let Some(name) = declaration {
            found.push((name, given.take()));
        }
    }
    found
}

/// A path without `..`.
fn plain(path: &Path) -> String {
    let mut plain = PathBuf::new();
    for part in path {
        if part == ".." {
            plain.pop();
        } else {
            plain.push(part);
        }
    }
    plain.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::super::TextFile;
    use super::check;

    fn messages(files: &[(&str, &str)]) -> Vec<String> {
        let files: Vec<TextFile> = files
            .iter()
            .map(|(path, text)| TextFile {
                path: (*path).to_owned(),
                text: (*text).to_owned(),
            })
            .collect();
        check(&files).iter().map(ToString::to_string).collect()
    }

    fn manifest(name: &str, rest: &str) -> String {
        format!("[package]\nname = \"{name}\"\n\n[lints]\nworkspace = true\n\n{rest}")
    }

    #[test]
    fn every_crate_has_the_workspaces_lints() {
        let found = messages(&[("crates/a/Cargo.toml", "[package]\nname = \"a\"\n")]);
        assert_eq!(
            found,
            ["crates/a/Cargo.toml:1: no `[lints]` with `workspace = true`"]
        );
        assert!(messages(&[("crates/a/Cargo.toml", &manifest("a", ""))]).is_empty());
        assert!(messages(&[("Cargo.toml", "[workspace]\n")]).is_empty());
    }

    #[test]
    fn an_edge_that_is_not_allowed_is_found() {
        let text = manifest(
            "spore-gateway",
            "[dependencies]\nspore-control.workspace = true\n",
        );
        let found = messages(&[("crates/spore-gateway/Cargo.toml", &text)]);
        assert!(
            found[0].contains(":8: spore-gateway must not depend on spore-control"),
            "{found:?}"
        );
        let text = manifest(
            "spore-wire",
            "[dev-dependencies]\nspore-api.workspace = true\n",
        );
        let found = messages(&[("crates/spore-wire/Cargo.toml", &text)]);
        assert!(found[0].contains("no crate of ours"), "{found:?}");
        let text = manifest("e2e", "[dependencies]\nspore-node.workspace = true\n");
        assert!(messages(&[("tests/e2e/Cargo.toml", &text)]).is_empty());
    }

    #[test]
    fn versions_are_the_workspaces() {
        let text = manifest(
            "a",
            "[dependencies]\nserde = \"1\"\ntokio = { workspace = true }\n",
        );
        let found = messages(&[("crates/a/Cargo.toml", &text)]);
        assert_eq!(found.len(), 1);
        assert!(
            found[0].contains("`serde` has its own version"),
            "{found:?}"
        );
    }

    #[test]
    fn a_file_that_no_module_names_is_an_orphan() {
        let found = messages(&[
            (
                "crates/a/Cargo.toml",
                &manifest("a", "[[bin]]\npath = \"tests/bin/b.rs\"\n"),
            ),
            (
                "crates/a/src/lib.rs",
                "//! x\npub mod one;\nmod two;\nmod r#in;\n",
            ),
            ("crates/a/src/one.rs", "//! x\n#[cfg(test)]\nmod tests;\n"),
            ("crates/a/src/one/tests.rs", "//! x\n"),
            (
                "crates/a/src/two/mod.rs",
                "//! x\npub(crate) mod three;\n// mod four;\n",
            ),
            ("crates/a/src/two/three.rs", "//! x\n"),
            ("crates/a/src/two/four.rs", "//! x\n"),
            ("crates/a/tests/story.rs", "//! x\n"),
            ("crates/a/tests/bin/b.rs", "//! x\n"),
        ]);
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(
            found[0].starts_with("crates/a/src/two/four.rs:1: no module"),
            "{found:?}"
        );
    }

    #[test]
    fn an_attribute_may_say_where_a_module_is() {
        let found = messages(&[
            ("crates/a/Cargo.toml", &manifest("a", "")),
            (
                "crates/a/src/lib.rs",
                "//! x\n#[path = \"../shared/b.rs\"]\nmod b;\n",
            ),
            ("crates/a/shared/b.rs", "//! x\n"),
        ]);
        assert_eq!(found, Vec::<String>::new());
    }
}
