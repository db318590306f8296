//! Snapshots and sandboxes: how a text names one.

use spore_api::name::{AppName, SandboxId, TagName};
use spore_wire::id::SnapshotId;

use super::RuleError;

/// What a fork may begin from, as its caller named it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ForkFrom {
    /// A tag or an app, whichever there is.
    Name(TagName),
    /// A sandbox or a snapshot, whichever there is.
    Id(SandboxId),
    /// An app, said so.
    App(AppName),
    /// A tag, said so.
    Tag(TagName),
}

/// A snapshot, as its caller named it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SnapshotName {
    /// By a tag.
    Tag(TagName),
    /// By its id.
    Id(SnapshotId),
}

/// Reads what a fork begins from.
///
/// # Errors
/// When it can name nothing.
pub fn fork_from(text: &str) -> Result<ForkFrom, RuleError> {
    let wrong = || {
        let rule = "the name of an app or tag, or the id of a sandbox or snapshot, is expected; \
                    where a tag and an app have one name, `tag:NAME` or `app:NAME`";
        RuleError::invalid("from", text.escape_default(), rule)
    };
    if let Some(name) = text.strip_prefix("app:") {
        return Ok(ForkFrom::App(name.parse().map_err(|_e| wrong())?));
    }
    if let Some(name) = text.strip_prefix("tag:") {
        return Ok(ForkFrom::Tag(name.parse().map_err(|_e| wrong())?));
    }
    if let Ok(id) = text.parse() {
        return Ok(ForkFrom::Id(id));
    }
    Ok(ForkFrom::Name(text.parse().map_err(|_e| wrong())?))
}

/// Reads the name of a snapshot.
///
/// # Errors
/// When it is neither a tag nor an id.
pub fn snapshot_name(field: &str, text: &str) -> Result<SnapshotName, RuleError> {
    if let Ok(id) = text.parse() {
        return Ok(SnapshotName::Id(id));
    }
    let rule = "a tag or the id of a snapshot is expected: `spore snapshot ls` lists them";
    let wrong = |_error| RuleError::invalid(field, text.escape_default(), rule);
    Ok(SnapshotName::Tag(text.parse().map_err(wrong)?))
}

#[cfg(test)]
mod tests {
    use super::{ForkFrom, SnapshotName, fork_from, snapshot_name};

    #[test]
    fn a_name_is_never_taken_for_an_id() {
        let id = "abcdefghijklmnopqrstuvwx2y";
        assert!(matches!(fork_from(id), Ok(ForkFrom::Id(_))));
        assert!(matches!(fork_from("notes"), Ok(ForkFrom::Name(_))));
        assert!(matches!(fork_from("app:notes"), Ok(ForkFrom::App(_))));
        assert!(matches!(fork_from("tag:notes"), Ok(ForkFrom::Tag(_))));
        for text in ["", "tag:", "app:../x", "sandbox:x", "A", "a--b", "a/b", "é"] {
            let error = fork_from(text).unwrap_err().to_string();
            assert!(error.contains("`from` is"), "{error}");
        }
    }

    #[test]
    fn a_bad_tag_is_refused_with_where_to_look() {
        let id = "abcdefghijklmnopqrstuvwxya";
        assert!(matches!(snapshot_name("to", id), Ok(SnapshotName::Id(_))));
        for text in ["", "..", "a b", "Python3", "x\u{1b}[2J"] {
            let error = snapshot_name("to", text).unwrap_err().to_string();
            assert!(error.contains("spore snapshot ls"), "{error}");
            assert!(!error.contains('\u{1b}'), "{error}");
        }
    }
}
