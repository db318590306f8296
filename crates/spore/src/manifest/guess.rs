//! A manifest to paste, guessed from the files of a folder that has none.
//!
//! Used only to word a refusal: nothing guessed is ever deployed.

use std::collections::BTreeSet;
use std::path::Path;

use spore_api::name::AppName;

/// What a folder looks like.
#[derive(Debug)]
pub(super) struct Guess {
    /// What was recognised, as the beginning of a sentence.
    pub(super) found: &'static str,
    /// A manifest for it.
    pub(super) manifest: String,
}

/// Looks at the names in `folder`, and nowhere deeper.
pub(super) fn guess(folder: &Path) -> Guess {
    let names: BTreeSet<String> = std::fs::read_dir(folder)
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .collect();
    let has = |name: &str| names.contains(name);
    let name = app_name(folder);
    if has("package.json") {
        let entry = ["server.js", "index.js", "app.js", "main.js"];
        let file = entry
            .into_iter()
            .find(|name| has(name))
            .unwrap_or("server.js");
        return Guess {
            found: "It looks like a Node.js project",
            manifest: manifest(&name, "debian/node", &["node", file]),
        };
    }
    let usual = ["app.py", "main.py", "server.py"]
        .into_iter()
        .find(|name| has(name));
    let python = usual.or_else(|| {
        let mut files = names.iter().filter(|name| name.ends_with(".py"));
        files.next().map(String::as_str)
    });
    if let Some(file) = python {
        return Guess {
            found: "It looks like a Python project",
            manifest: manifest(&name, "debian/python3", &["python3", file]),
        };
    }
    if has("index.html") {
        return Guess {
            found: "It looks like a static site",
            manifest: manifest(
                &name,
                "debian/python3",
                &["python3", "-m", "http.server", "8000"],
            ),
        };
    }
    Guess {
        found: "What kind of project it is cannot be told from its files",
        manifest: manifest(&name, "debian/python3", &["python3", "app.py"]),
    }
}

fn manifest(name: &str, image: &str, command: &[&str]) -> String {
    let command: Vec<String> = command.iter().map(|part| format!("{part:?}")).collect();
    format!(
        "name    = \"{name}\"\nimage   = \"{image}\"\ncommand = [{}]\nport    = 8000\n",
        command.join(", ")
    )
}

/// The folder's own name, as near as an app's name may be to it.
fn app_name(folder: &Path) -> String {
    let full = folder
        .canonicalize()
        .unwrap_or_else(|_error| folder.to_owned());
    let text = full
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .to_lowercase();
    let mut name = String::new();
    for letter in text.chars() {
        if letter.is_ascii_lowercase() || (letter.is_ascii_digit() && !name.is_empty()) {
            name.push(letter);
        } else if !name.is_empty() && !name.ends_with('-') {
            name.push('-');
        }
    }
    name.truncate(40);
    let name = name.trim_end_matches('-');
    if name.parse::<AppName>().is_ok() {
        name.to_owned()
    } else {
        "app".to_owned()
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::{app_name, guess};
    use crate::manifest::Manifest;

    #[test]
    fn what_is_pasted_is_a_manifest() {
        for (files, found, command) in [
            (
                &["package.json", "index.js"][..],
                "Node.js",
                "[\"node\", \"index.js\"]",
            ),
            (
                &["main.py", "aaa.py"],
                "Python",
                "[\"python3\", \"main.py\"]",
            ),
            (&["notes.py"], "Python", "[\"python3\", \"notes.py\"]"),
            (&["index.html"], "static", "http.server"),
            (&[], "cannot be told", "app.py"),
        ] {
            let folder = tempfile::tempdir().unwrap();
            for file in files {
                fs::write(folder.path().join(file), "").unwrap();
            }
            let guess = guess(folder.path());
            assert!(guess.found.contains(found), "{guess:?}");
            assert!(guess.manifest.contains(command), "{guess:?}");
            Manifest::parse("spore.toml", &guess.manifest).unwrap();
        }
    }

    #[test]
    fn a_folders_name_becomes_an_apps_name() {
        let parent = tempfile::tempdir().unwrap();
        for (folder, name) in [
            ("Notes", "notes"),
            ("my_app v2", "my-app-v2"),
            ("2048", "app"),
            ("--x--y--", "x-y"),
            ("é", "app"),
        ] {
            assert_eq!(app_name(&parent.path().join(folder)), name, "{folder}");
        }
    }
}
