//! How many crates the programs depend on: what one has to trust and to update. Called by `tidy`
//! with `--deps`, since it starts cargo.

use std::collections::BTreeSet;

use anyhow::Result;

use super::Finding;
use crate::{command, place};

/// The most crates behind each of ours; PID 1 and the VMM are read by people who must trust them.
const BUDGETS: &[(&str, usize)] = &[("spore-guest", 70), ("spore-vmm", 70)];

/// The most crates behind the whole workspace, without cloud features.
const WORKSPACE_BUDGET: usize = 360;

/// All findings about numbers of crates.
pub(crate) fn check() -> Result<Vec<Finding>> {
    let mut findings = Vec::new();
    for (name, most) in BUDGETS {
        let manifest = format!("crates/{name}/Cargo.toml");
        if place::repository().join(&manifest).is_file() {
            findings.extend(over(&manifest, count(&["--package", name])?, *most));
        }
    }
    findings.extend(over(
        "Cargo.toml",
        count(&["--workspace"])?,
        WORKSPACE_BUDGET,
    ));
    Ok(findings)
}

fn over(manifest: &str, found: usize, most: usize) -> Option<Finding> {
    (found > most).then(|| {
        Finding::new(
            manifest,
            1,
            format!("{found} crates: {most} at most, do without some"),
        )
    })
}

/// Crates that are built into something: tests' and procedural macros' own are counted too, since
/// they run on the machine that builds.
fn count(selection: &[&str]) -> Result<usize> {
    let tree = command::output(
        place::cargo()
            .args(["tree", "--offline", "--edges=normal,build", "--prefix=none"])
            .arg("--format={p}")
            .args(selection),
    )?;
    Ok(distinct(&tree))
}

/// Names with versions, each once.
fn distinct(tree: &str) -> usize {
    tree.lines()
        .map(|line| {
            line.split_whitespace()
                .take(2)
                .collect::<Vec<_>>()
                .join(" ")
        })
        .filter(|line| !line.is_empty())
        .collect::<BTreeSet<_>>()
        .len()
}

#[cfg(test)]
mod tests {
    use super::{distinct, over};

    #[test]
    fn a_crate_counts_once_per_version() {
        let tree = "a v1.0.0 (/x)\nb v1.0.0\nb v2.0.0\n\nb v1.0.0 (*)\nc v1.0.0 (proc-macro)\n";
        assert_eq!(distinct(tree), 4);
    }

    #[test]
    fn only_too_many_are_a_finding() {
        assert_eq!(over("Cargo.toml", 70, 70), None);
        let finding = over("Cargo.toml", 71, 70).unwrap();
        assert_eq!(
            finding.to_string(),
            "Cargo.toml:1: 71 crates: 70 at most, do without some"
        );
    }
}
